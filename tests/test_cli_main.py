"""The worldkv command itself: how it ends, and what its subcommands share."""

import os
import sys
import time

import pytest
import torch

from worldkv_kernels.cli import doctor, main, report
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


@pytest.mark.parametrize("command", [["doctor"], ["bench", "append", "--small"], ["bench", "compare", "a", "b"]])
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
    with report.waiting("quick"):
        pass
    monkeypatch.setattr(report, "_SILENCE", 0.05)
    with report.waiting("slow"):
        time.sleep(0.3)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) >= 2 and set(lines) == {"slow: 0 s"}


def test_a_backend_that_cannot_run_here_is_refused(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    check_every_backend("--backend", None, CPU)
    check_every_backend("--backend", "reference", CPU)
    with pytest.raises(ValueError, match="--backend must be one that runs on cpu, got 'triton': triton on a CPU needs"):
        check_every_backend("--backend", "triton", CPU)
    with pytest.raises(ValueError, match="--backend must be one of triton, reference, got 'cuda'"):
        check_every_backend("--backend", "cuda", CPU)
