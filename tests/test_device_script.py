"""device.sh runs to the end without a GPU, goes on past what fails, and keeps to its time."""

import json
import os
import subprocess
import sys

from conftest import BENCHMARKS

BENCHES = ["segment_attention", "norm_rope_append", "compress_chunk", "prefetch"]


def test_device_script_runs_dry(tmp_path):
    environment = {**os.environ, "PYTHON": sys.executable, "OUT": str(tmp_path)}
    done = subprocess.run(
        ["bash", str(BENCHMARKS / "device.sh"), "--dry"],
        env=environment, capture_output=True, text=True, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    (results,) = tmp_path.glob("cpu-*.jsonl")
    (log,) = tmp_path.glob("cpu-*.log")
    assert {json.loads(line)["bench"] for line in results.read_text().splitlines()} == {"ceilings", *BENCHES}
    assert log.read_text() == done.stdout
    assert "memcheck             skipped: needs a GPU" in done.stdout
    assert "FAILED" not in done.stdout
    # The table comes last, and nothing was left beside the two files.
    assert "x rival" in done.stdout.split(f"figures in {results}")[1]
    assert sorted(tmp_path.iterdir()) == sorted([results, log])


def dry_run_with_a_stub(tmp_path, **variables):
    """With a program in the interpreter's place that fails one stage and is cut short in another."""
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\ncase "$*" in *bench_norm*) exit 3;; *bench_segment*) exit 124;; esac\n')
    python.chmod(0o755)
    environment = {**os.environ, "PYTHON": str(python), "OUT": str(tmp_path / "out"), **variables}
    script = str(BENCHMARKS / "device.sh")
    return subprocess.run(["bash", script, "--dry"], env=environment, capture_output=True, text=True)


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
    # environment, doctor where there is one, ceilings and the benches
    assert done.stdout.count("FAILED: no time left of 3 s") in (6, 7)
    assert "(at most" not in done.stdout
