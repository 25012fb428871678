"""The worldkv command itself: how it ends, and what its subcommands share."""

import json
import os
import sys
import time

import pytest
import torch

from worldkv_kernels.cli import brief, doctor, main, report
from worldkv_kernels.ops.all import check_every_backend

CPU = torch.device("cpu")


def test_ctrl_c_is_one_line_and_status_130(monkeypatch, capsys):
    def interrupted(args):
        raise KeyboardInterrupt

    monkeypatch.setattr(doctor, "run", interrupted)
    assert main(["doctor"]) == 130
    assert capsys.readouterr() == ("", "worldkv doctor: interrupted\n")


def test_a_reader_that_has_gone_is_no_error(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "run", lambda args: print("a finding") or 0)
    ours, theirs = os.pipe()
    os.close(ours)
    with monkeypatch.context() as patch, os.fdopen(theirs, "w") as stdout:
        patch.setattr(sys, "stdout", stdout)
        assert main(["doctor"]) == 141
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("command", [["doctor"], ["bench", "chunk", "--small"], ["bench", "compare", "a", "b"]])
def test_json_is_refused_before_the_work(command, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("worldkv_kernels.cli.doctor.machine", lambda device: pytest.fail("it went to work"))
    for path, reason in (("nope/x.json", "No such file or directory"), (".", "Is a directory")):
        assert main([*command, "--json", path]) == 2
        out, err = capsys.readouterr()
        wanted = f"worldkv {command[0]}: --json must be a file that can be written, got {path!r}: {reason}\n"
        assert (out, err) == ("", wanted)
    assert list(tmp_path.iterdir()) == []


def test_writable_leaves_everything_as_it_is(tmp_path):
    there, absent, pipe = tmp_path / "there.json", tmp_path / "absent.json", tmp_path / "pipe"
    there.write_text("old")
    os.mkfifo(pipe)  # to open it would wait for a reader
    (tmp_path / "link.json").symlink_to(absent)
    for path in (there, absent, pipe, tmp_path / "link.json", "-", None):
        report.writable("--json", None if path is None else str(path))
    assert there.read_text() == "old" and not absent.exists() and (tmp_path / "link.json").is_symlink()
    report.writable("--picture", str(tmp_path / "A.SVG"), [".svg"])
    for path in ("a.png", "svg", "-"):
        with pytest.raises(ValueError, match=f"--picture must end in .svg, got '{path}'"):
            report.writable("--picture", path, [".svg"])
    with pytest.raises(ValueError, match=r"--json must be a file .*, got 'x*': File name too long"):
        report.writable("--json", "x" * 300)


def test_waiting_speaks_up_when_it_takes_long(monkeypatch, capsys):
    monkeypatch.setattr(report, "_SILENCE", 0.02)
    monkeypatch.setattr(report, "_LONGEST_SILENCE", 0.02)
    report.begin(quiet=False)
    with report.waiting("quick"):
        pass
    with report.waiting("slow"):
        time.sleep(0.3)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) >= 2 and set(lines) == {"slow: 0 s"}
    report.begin(quiet=True)
    with report.waiting("slow"):
        time.sleep(0.1)
    report.Progress("counted", 1).step()
    report.note("wrote a file")
    assert capsys.readouterr() == ("", "")


def test_lines_of_progress_grow_apart_where_there_is_no_terminal(monkeypatch, capsys):
    """An hour of steps of a second, in two halves: the last of each is told, and a dozen or so between."""
    seconds = [0.0]
    monkeypatch.setattr(report.time, "monotonic", lambda: seconds[0])
    report.begin(quiet=False)
    for half in ("first", "second"):
        progress = report.Progress(half, 1800)
        for _ in range(1800):
            seconds[0] += 1
            progress.step("steps")
    lines = capsys.readouterr().err.splitlines()
    assert lines[:3] == ["first: 3/1800 steps", "first: 8/1800 steps", "first: 17/1800 steps"]
    assert "first: 1800/1800 steps" in lines and lines[-1] == "second: 1800/1800 steps" and len(lines) < 24


def test_progress_on_a_terminal_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    report.begin(quiet=False)
    progress = report.Progress("counted", 3)
    for _ in range(3):
        progress.step()
    assert capsys.readouterr().err == "".join(f"\r\x1b[Kcounted: {n}/3" for n in (1, 2, 3)) + "\n"


@pytest.mark.parametrize("device", ["meta", "", "cpu:1", "vulkan", "abacus", "x" * 5000])
def test_a_device_that_the_ops_do_not_know_is_refused(device, capsys):
    assert main(["doctor", "--device", device]) == 2
    out, err = capsys.readouterr()
    wanted = f"worldkv doctor: --device must be cpu or a CUDA device of this machine, got {device!r:.60}\n"
    assert (out, err) == ("", wanted)


def test_doctor_is_quiet_and_its_json_whole(capsys):
    assert main(["doctor", "--device", "cpu:0", "--json", "-", "--quiet"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["command"] == "doctor" and "segment_attention" in err and "9/9" not in err


def test_a_quiet_bench_says_nothing_beside_its_table(capsys):
    asked = ["bench", "norm_rope_append", "--small", "--device", "cpu", "--seconds", "0.01", "--only", "ours"]
    assert main([*asked, "--quiet"]) == 0
    out, err = capsys.readouterr()
    assert "reference" in out and err == ""


def test_json_has_no_word_for_infinity(tmp_path):
    path = tmp_path / "x.json"
    report.write_json(str(path), {"rows": [float("inf"), (1.5, float("nan"))], "text": "\u2603"})
    assert json.loads(path.read_text()) == {"rows": [None, [1.5, None]], "text": "\u2603"}


def test_an_error_is_one_line_of_a_length_to_be_read():
    assert brief(ValueError("one\ntwo")) == "one" and brief(ValueError()) == "ValueError"
    line = brief("a" * 5000 + "b" * 5000)
    assert len(line) < 700 and line.startswith("aaa") and line.endswith("bbb")


def test_a_backend_that_cannot_run_here_is_refused(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    check_every_backend("--backend", None, CPU)
    check_every_backend("--backend", "reference", CPU)
    with pytest.raises(ValueError, match="--backend must be one that runs on cpu, got 'triton': triton on a CPU needs"):
        check_every_backend("--backend", "triton", CPU)
    with pytest.raises(ValueError, match="--backend must be one that runs on cpu, got 'cuda': it needs a GPU"):
        check_every_backend("--backend", "cuda", CPU)
    with pytest.raises(ValueError, match="--backend must be one of cuda, triton, reference, got 'tpu'"):
        check_every_backend("--backend", "tpu", CPU)


@pytest.mark.parametrize("command", [["rollout"], ["recall"]])
def test_two_files_of_one_name_are_refused_before_the_work(command, tmp_path, capsys):
    file = tmp_path / "both.svg" if command == ["rollout"] else tmp_path / "both.png"
    assert main([*command, "--device", "cpu", "--picture", str(file), "--json", str(file)]) == 2
    assert "--json must be another file than --picture, got " in capsys.readouterr().err
    assert not file.exists()


def test_a_photograph_is_not_overwritten(tmp_path, capsys):
    Image = pytest.importorskip("PIL.Image", reason="Pillow is not installed")
    photograph = tmp_path / "mine.png"
    Image.new("RGB", (128, 96), "red").save(photograph)
    before = photograph.read_bytes()
    assert main(["recall", "--device", "cpu", "--image", str(photograph), "--picture", str(photograph)]) == 2
    assert "--picture must be another file than --image" in capsys.readouterr().err
    assert photograph.read_bytes() == before


def test_a_backend_of_the_environment_that_is_none_is_told_before_anything_runs(monkeypatch, capsys):
    monkeypatch.setenv("WORLDKV_BACKEND", "cudnn")
    assert main(["recall"]) == 2
    assert capsys.readouterr().err.startswith("worldkv recall: WORLDKV_BACKEND must be auto or one of 'cuda', 'triton'")
