"""Importing the package costs what importing torch costs, and the command's first answers not even that."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import worldkv_kernels

ROOT = Path(__file__).resolve().parent.parent
HEAVY = ("torch._dynamo", "torch._inductor", "sympy", "triton", "matplotlib", "skimage", "PIL")
# What the script does that pip makes of [project.scripts].
SCRIPT = "import sys; sys.argv[0] = 'worldkv'; from worldkv_kernels.cli import main; sys.exit(main())"
STARTS = {"script": ["-c", SCRIPT], "module": ["-m", "worldkv_kernels"]}


def python(*arguments, **options):
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, cwd=ROOT, **options)


@pytest.mark.parametrize(
    "imported", ["worldkv_kernels", "worldkv_kernels.integrations.lingbot, worldkv_kernels.integrations.matrix_game"]
)
def test_the_import_brings_in_no_more_than_torch(imported):
    program = f"""
import sys, torch
with_torch = set(sys.modules)
import {imported}
print(sorted(set({HEAVY}).intersection(set(sys.modules) - with_torch)))
print(len([name for name in set(sys.modules) - with_torch if name.split(".")[0] != "worldkv_kernels"]))
assert torch.ops.worldkv.segment_attention.default
"""
    done = python("-c", program)
    assert done.returncode == 0, done.stderr
    heavy, others = done.stdout.splitlines()
    assert heavy == "[]" and int(others) < 20


def test_modules_are_found_without_being_imported_by_name():
    program = """
import worldkv_kernels
for package, modules in {"models": ["small_world", "rollout"], "integrations": ["lingbot", "matrix_game"]}.items():
    for module in modules:
        assert getattr(getattr(worldkv_kernels, package), module).__name__ == f"worldkv_kernels.{package}.{module}"
from worldkv_kernels.integrations import attach, detach
assert (attach.__module__, detach.__module__) == ("worldkv_kernels.integrations.causal",) * 2
assert worldkv_kernels.recall.Scene and worldkv_kernels.kernels and worldkv_kernels.trajectory.load
"""
    done = python("-c", program)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("package", ["worldkv_kernels", "worldkv_kernels.models", "worldkv_kernels.integrations"])
def test_what_is_no_module_is_no_attribute(package):
    with pytest.raises(AttributeError, match=f"module '{package}' has no attribute 'nothing'"):
        _ = sys.modules[package].nothing if package in sys.modules else getattr(worldkv_kernels, package[16:]).nothing
    assert not hasattr(worldkv_kernels, "_cuda_of_another_day")


# --- the command, with a torch that must not be imported ---


@pytest.fixture
def torch_stands_for(tmp_path):
    def write(program):
        (tmp_path / "torch.py").write_text(program)
        paths = [str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])]
        return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}

    return write


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("arguments, status, said", [
    (["--help"], 0, "usage: worldkv [-h] [--version] COMMAND"),
    (["--version"], 0, f"worldkv_kernels {worldkv_kernels.__version__}\n"),
    ([], 2, "worldkv: the following arguments are required: COMMAND\n"),
])  # fmt: skip
def test_first_answers_need_no_torch(start, arguments, status, said, torch_stands_for):
    environment = torch_stands_for("raise SystemExit('torch was imported')")
    done = python(*STARTS[start], *arguments, env=environment)
    assert done.returncode == status, done.stderr
    assert (done.stdout or done.stderr).startswith(said)


@pytest.mark.parametrize("start", STARTS)
def test_ctrl_c_while_torch_is_imported_is_one_line_and_status_130(start, torch_stands_for):
    # A process in the background of a shell ignores the signal from the start, and so would its children.
    heard = "import os, signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    environment = torch_stands_for(f"{heard}; os.kill(os.getpid(), signal.SIGINT)")
    done = python(*STARTS[start], "doctor", env=environment)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "worldkv: interrupted\n")


def test_without_torch_the_command_says_so(torch_stands_for):
    done = python(*STARTS["script"], "doctor", env=torch_stands_for("raise ImportError('no torch here')"))
    assert (done.returncode, done.stderr) == (2, "worldkv: no torch here\n")


@pytest.mark.parametrize("name", ["worldkv", "-m"])
def test_the_package_is_whole_for_who_only_looks_like_the_command(name, tmp_path):
    """A script called worldkv, and a package of the user's that is run by -m."""
    (tmp_path / "game").mkdir()
    (tmp_path / "game" / "__init__.py").write_text("from worldkv_kernels import WorldMemory\n")
    (tmp_path / "game" / "__main__.py").write_text("import torch; torch.ops.worldkv.compress_chunk.default\n")
    (tmp_path / "worldkv").write_text("from worldkv_kernels import WorldMemory\n")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    done = python(*(["-m", "game"] if name == "-m" else [str(tmp_path / "worldkv")]), env=environment)
    assert done.returncode == 0, done.stderr
