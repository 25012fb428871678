"""device.sh runs to the end without a GPU, goes on past what fails, and keeps to its time."""

import json
import os
import shutil
import signal
import subprocess
import sys

import pytest
from conftest import BENCHMARKS

STUB = """#!/bin/sh
echo "$*" >> "$COMMANDS"
case "$*" in
    *"${SLOW:-nothing slow}"*)
        trap 'echo interrupted, and this is what failed; exit 1' INT
        sleep 30 >/dev/null 2>&1 & wait ;;
    *bench_norm*) exit 3 ;;
    *bench_segment*) exit 124 ;;
esac
"""
CONFORMANCE = ["conformance"] if shutil.which("nvcc") else []
BENCHES = ["segment_attention", "norm_rope_append", "compress_chunk", "quantize_chunk", "participation", "prefetch"]


@pytest.mark.parametrize(
    "parts, benches",
    [
        (["--sanitize", "--segment_attention"], ["segment_attention"]),
        pytest.param([], BENCHES, marks=pytest.mark.slow, id="all that is the default"),
    ],
)
def test_device_script_runs_dry(tmp_path, parts, benches):
    environment = {**os.environ, "PYTHON": sys.executable, "OUT": str(tmp_path)}
    done = subprocess.run(
        ["bash", str(BENCHMARKS / "device.sh"), "--dry", *parts],
        env=environment, capture_output=True, text=True, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    (results,) = tmp_path.glob("cpu-*.jsonl")
    (log,) = tmp_path.glob("cpu-*.log")
    assert {json.loads(line)["bench"] for line in results.read_text().splitlines()} == {"ceilings", *benches}
    assert log.read_text() == done.stdout
    assert "memcheck             skipped: needs a GPU" in done.stdout
    assert f"conformance          {'ok' if CONFORMANCE else 'skipped: needs a GPU'}" in done.stdout
    assert "FAILED" not in done.stdout
    # The table comes last, and nothing was left beside the files it names.
    assert "x rival" in done.stdout.split(f"figures in {results}")[1]
    assert sorted(tmp_path.iterdir()) == sorted([results, log, tmp_path / "stages.tsv"])


def dry_run_with_a_stub(tmp_path, *options, **variables):
    """With a program in the interpreter's place that fails one stage and is cut short in another."""
    python = tmp_path / "python"
    python.write_text(STUB)
    python.chmod(0o755)
    ignored = variables.pop("ignored", False)
    environment = {**os.environ, "PYTHON": str(python), "OUT": str(tmp_path / "out"), **variables}
    environment["COMMANDS"] = str(tmp_path / "commands")
    return subprocess.run(
        ["bash", str(BENCHMARKS / "device.sh"), "--dry", *options],
        env=environment, capture_output=True, text=True,
        preexec_fn=(lambda: signal.signal(signal.SIGINT, signal.SIG_IGN)) if ignored else None,
    )  # fmt: skip


def test_device_script_goes_on_past_a_failing_stage(tmp_path):
    done = dry_run_with_a_stub(tmp_path)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "segment_attention    FAILED: ran past its 200 s" in done.stdout
    assert "norm_rope_append     FAILED: status 3" in done.stdout
    assert "compress_chunk       ok" in done.stdout
    assert "NOT ALL WELL" in done.stdout


def test_device_script_starts_nothing_past_its_budget(tmp_path):
    done = dry_run_with_a_stub(tmp_path, BUDGET="3")
    assert done.returncode == 1, done.stdout + done.stderr
    # environment, conformance, doctor, ceilings and the benches
    assert done.stdout.count("FAILED: no time left of 3 s") == 9 + len(CONFORMANCE)
    assert "(at most" not in done.stdout


def test_device_script_does_what_it_is_asked_to_in_order(tmp_path):
    done = dry_run_with_a_stub(tmp_path, "--models", "--ops", "--fuzz")
    stages = [line.split()[1] for line in done.stdout.splitlines() if line.startswith("== ") and " (at most" in line]
    assert stages == [
        "environment", "doctor", "ceilings", *["rollout,"] * 3, "chunk", "norm_rope_append", "compress_chunk",
        "quantize_chunk", "participation", "prefetch",
    ]  # fmt: skip
    assert "fuzz                 skipped: needs a GPU" in done.stdout
    commands = (tmp_path / "commands").read_text().splitlines()
    assert ["--seconds" in line for line in commands if "/bench_" in line] == [False] * 3 + [True] * 6
    done = dry_run_with_a_stub(tmp_path, "--everything")
    assert done.returncode == 2 and "got --everything" in done.stderr


def test_next_leaves_out_what_has_ended_well_with_this_code(tmp_path):
    first = dry_run_with_a_stub(tmp_path, "--ops")
    assert "norm_rope_append     FAILED" in first.stdout
    done = (tmp_path / "out" / "stages.tsv").read_text().splitlines()
    assert [line.split("\t")[2] for line in done] == ["compress_chunk", "quantize_chunk", "participation", "prefetch"]
    following = dry_run_with_a_stub(tmp_path, "--next")
    assert "compress_chunk       skipped: it has ended well here" in following.stdout
    assert "norm_rope_append     FAILED" in following.stdout
    assert "rollout, matrix      ok" in following.stdout
    changed = tmp_path / "out" / "stages.tsv"
    changed.write_text(changed.read_text().replace("cpu\t", "cpu\tother code", 1))
    assert "prefetch             skipped" in (again := dry_run_with_a_stub(tmp_path, "--next")).stdout
    assert "compress_chunk       ok" in again.stdout


def test_a_stage_that_runs_too_long_may_still_say_what_it_has(tmp_path):
    """Also where the script was started with interrupts ignored, as a shell does in the background."""
    done = dry_run_with_a_stub(tmp_path, "--ops", BUDGET="7", SLOW="doctor", ignored=True)
    assert "interrupted, and this is what failed" in done.stdout
    assert "doctor               FAILED: ran past its" in done.stdout


def test_what_runs_under_the_sanitizer_agrees_where_no_kernel_needs_a_gpu(load, monkeypatch, capsys):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    sanitize = load("sanitize")
    assert sanitize.main(["--device", "cpu"]) == 0
    lines = capsys.readouterr().out.splitlines()
    left = {case for op, backend, case in sanitize.NOT_TAKEN if (op, backend) == ("segment_attention", "sdpa")}
    of_attention = sanitize.cases(sanitize.torch.device("cpu"))["segment_attention"]
    assert len(lines) == len(of_attention) - len(left) > 0 and left < set(of_attention)
