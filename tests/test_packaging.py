"""What is made of a checkout: the sdist has all of it, a wheel from that says what is in it, and serves where it is
installed. README's examples are what an installed package is tried with."""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

pytest.importorskip("setuptools", minversion="77", reason="setuptools 77 or newer is not installed")
pytest.importorskip("pybind11", reason="pybind11 is not installed")
pytest.importorskip("pip", reason="pip is not installed")

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.skipif(not (ROOT / ".git").exists(), reason="needs a git checkout")

OF_THE_REPOSITORY = {".ci/run", ".gitignore"}
OF_SETUPTOOLS = re.compile(r"PKG-INFO|setup\.cfg|worldkv_kernels\.egg-info/.*")
EXTENSION = f"worldkv_kernels/_cuda{sysconfig.get_config_var('EXT_SUFFIX')}"
NOTE = "worldkv_kernels/_cuda_missing.txt"
WEIGHTS = [f"worldkv_kernels/models/weights/small_world/{name}" for name in ("config.json", "model.safetensors")]
LOAD = """
import sys
sys.meta_path = [finder for finder in sys.meta_path if "__editable__" not in getattr(finder, "__module__", "")]
import torch
from worldkv_kernels.models.small_world import WEIGHTS, SmallWorld

model = SmallWorld.from_pretrained(device="cpu", dtype=torch.bfloat16)
print(WEIGHTS, len(model.blocks))
"""
REPOSITORY = """
[project.urls]
Repository = "https://example.org/worldkv/"
"""
# Stands for an nvcc before sm_120: writes down what it is asked for, and fails where it is called to.
NVCC = """#!/bin/sh
case "$*" in
    *--dryrun*compute_120*) echo "nvcc fatal   : Unsupported gpu architecture 'compute_120'" >&2; exit 1 ;;
    *--dryrun*) exit 0 ;;
esac
echo "$@" >>nvcc.log
if [ "$NVCC_FAILS" ]; then
    echo "In file included from x.cu:1:" >&2
    echo "x.cu:3:10: fatal error: lost.h: No such file" >&2
    exit 1
fi
while [ "$1" != -o ]; do shift; done
echo extension >"$2"
"""
# Builds one after the other in one tree, where each finds what the one before has left.
BUILD = """
import json, os, sys
from pathlib import Path
from setuptools import build_meta

pyproject, made = Path("pyproject.toml"), {}
text = pyproject.read_text()
for case, (hook, environment, more) in json.loads(sys.argv[1]).items():
    folder = Path("made", case).absolute()
    folder.mkdir(parents=True)
    pyproject.write_text(text + more)
    if os.fork() == 0:  # setuptools remembers the folders that it has made
        for name in ("WORLDKV_CUDA", "WORLDKV_CUDA_ARCHS", "CUDA_HOME", "CUDA_PATH"):
            os.environ.pop(name, None)
        os.environ.update(environment)
        try:
            found = str(folder / getattr(build_meta, hook)(str(folder)))
        except RuntimeError as error:
            found = f"RuntimeError: {error}"
        (folder / "found").write_text(found)
        os._exit(0)
    os.wait()
    made[case] = (folder / "found").read_text()
Path("made.json").write_text(json.dumps(made))
"""
# README's examples of the ops and the memory where there is no triton, and what doctor then says.
WITHOUT_TRITON = r"""
import re, sys
from pathlib import Path

sys.modules["triton"] = None  # an import of it fails
# An editable install of the package would bring its extension in where the wheel has none.
sys.meta_path = [finder for finder in sys.meta_path if "__editable__" not in getattr(finder, "__module__", "")]
import torch
import worldkv_kernels
from worldkv_kernels.cli import main

torch.set_num_threads(1)
for example in re.findall(r"```python\n(.*?)```", Path(sys.argv[1]).read_text(), flags=re.DOTALL):
    if not re.search(r"\.enable\(|attach\(|rollout\(", example):
        exec(compile(example, "README.md", "exec"), {})
print(worldkv_kernels.__file__)
main(["doctor", "--device", "cpu"])
"""


def build(tree, cases):
    """By case, what was made, or the error; and all that was said."""
    command = [sys.executable, "-c", BUILD, json.dumps(cases)]
    done = subprocess.run(command, cwd=tree, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return json.loads((tree / "made.json").read_text()), done.stderr


@pytest.fixture(scope="module")
def tracked():
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return {name for name in listed.split("\0") if name and (ROOT / name).exists()}


@pytest.fixture(scope="module")
def sdist(tracked, tmp_path_factory):
    """Of a copy of the checkout in which something was compiled and run."""
    tree = tmp_path_factory.mktemp("checkout")
    for name in (*tracked, EXTENSION, NOTE, "tests/__pycache__/x.pyc"):
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        if name in tracked:
            shutil.copy2(ROOT / name, tree / name)
        else:
            (tree / name).touch()
    made, _ = build(tree, {"sdist": ("build_sdist", {}, "")})
    return Path(made["sdist"])


@pytest.fixture(scope="module")
def unpacked(sdist, tmp_path_factory):
    folder = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder)
    return folder / sdist.name.removesuffix(".tar.gz")


@pytest.fixture(scope="module")
def made(unpacked, tmp_path_factory):
    """From the sdist, by case; "said" is all that was said."""
    nvcc, nothing = tmp_path_factory.mktemp("bin") / "nvcc", tmp_path_factory.mktemp("nothing")
    nvcc.write_text(NVCC)
    nvcc.chmod(0o755)
    fails = {"NVCC_FAILS": "1"}
    cases = {"extension": {}, "one architecture": {"WORLDKV_CUDA_ARCHS": "120"}, "failed": fails}
    cases.update({"insisted": {**fails, "WORLDKV_CUDA": "1"}, "skipped": {"WORLDKV_CUDA": "0"}})
    wheels = {case: ("build_wheel", {"PATH": str(nvcc.parent), **more}, "") for case, more in cases.items()}
    wheels["without nvcc"] = ("build_wheel", {"PATH": str(nothing)}, "")
    made, said = build(unpacked, {**wheels, "published": ("prepare_metadata_for_build_wheel", {}, REPOSITORY)})
    return {**made, "said": said}


@pytest.fixture(scope="module")
def python(made, tmp_path_factory):
    """Runs Python in an empty folder, where a wheel is installed that was made without nvcc."""
    target, empty = tmp_path_factory.mktemp("installed"), tmp_path_factory.mktemp("empty")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(target)]
    subprocess.run([*command, made["without nvcc"]], check=True)

    def run(*arguments):
        env = {**os.environ, "PYTHONPATH": str(target)}
        done = subprocess.run([sys.executable, *arguments], cwd=empty, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
        return done.stdout

    run.target = target
    return run


def files(wheel):
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name).decode(errors="replace") for name in archive.namelist()}


def metadata(wheel):
    (text,) = (text for name, text in files(wheel).items() if name.endswith(".dist-info/METADATA"))
    return text


def test_the_sdist_is_what_git_holds(sdist, tracked):
    with tarfile.open(sdist) as archive:
        inside = {member.name.partition("/")[2] for member in archive.getmembers() if member.isfile()}
    assert {name for name in inside if not OF_SETUPTOOLS.fullmatch(name)} == tracked - OF_THE_REPOSITORY


def test_a_wheel_tells_by_its_name_whether_it_has_the_extension(made):
    for case in ("extension", "one architecture"):
        assert re.search(r"-cp3\d+-cp3\d+-\w+\.whl$", made[case])
        assert EXTENSION in files(made[case]) and NOTE not in files(made[case])
    for case, why in (
        ("failed", "nvcc failed: x.cu:3:10: fatal error: lost.h: No such file"),
        ("skipped", "WORLDKV_CUDA=0"),
        ("without nvcc", "nvcc was not found"),
    ):
        assert made[case].endswith("-py3-none-any.whl")
        assert EXTENSION not in files(made[case]) and files(made[case])[NOTE] == f"{why}\n"
        assert f"CUDA kernels are not built: {why}\n" in made["said"]
    assert made["insisted"].startswith("RuntimeError: nvcc failed: x.cu:3:10: fatal error: lost.h: No such file\nIn ")


def test_nvcc_is_asked_for_the_architectures_that_it_knows(made, unpacked):
    asked = (unpacked / "nvcc.log").read_text().splitlines()
    known = "-gencode=arch=compute_{0},code=sm_{0}"
    for command, archs in zip(asked, (["80", "90a", "100a"], ["120"], *2 * [["80", "90a", "100a"]]), strict=True):
        assert f'-DWORLDKV_ARCHITECTURES="{",".join(archs)}"' in command
        assert re.findall("-gencode=[^ ]*", command) == [known.format(arch) for arch in archs]


def test_a_wheel_has_what_is_imported_and_no_more(made, tracked):
    modules = {name for name in tracked if re.match(r"(worldkv_kernels|kernels|benchmarks)/.*\.py$", name)}
    modules = {re.sub("^(kernels|benchmarks)/", r"worldkv_kernels/\1/", name) for name in modules}
    inside = {name for name in files(made["skipped"]) if ".dist-info/" not in name}
    assert inside == modules | {NOTE, "worldkv_kernels/ops/proven.json", "worldkv_kernels/py.typed", *WEIGHTS}


def test_the_weights_are_in_sdist_and_wheel_and_are_small(sdist, made):
    with tarfile.open(sdist) as archive:
        sizes = {member.name.partition("/")[2]: member.size for member in archive.getmembers()}
    with zipfile.ZipFile(made["skipped"]) as archive:
        in_wheel = {member.filename: member.file_size for member in archive.infolist()}
    for of_archive in (sizes, in_wheel):
        assert [of_archive.get(name) for name in WEIGHTS] == [(ROOT / name).stat().st_size for name in WEIGHTS]
    assert sum(sizes[name] for name in WEIGHTS) <= 4 * 2**20


def test_an_installed_wheel_finds_its_weights(python):
    said = python("-c", LOAD)
    assert said == f"{python.target / 'worldkv_kernels/models/weights/small_world'} 4\n"


def test_the_description_has_no_link_that_leads_nowhere(made):
    text = metadata(made["skipped"])
    links = re.findall(r"\]\(([^)]+)\)", text)
    assert links and all(link.startswith("https://") for link in links)
    assert "Description-Content-Type: text/markdown" in text and "Project-URL" not in text
    published = Path(made["published"], "METADATA").read_text()
    links = re.findall(r"\]\(([^)]+)\)", published)
    assert links and all(link.startswith("https://") for link in links)
    assert "https://example.org/worldkv/blob/HEAD/tests/test_vendoring.py" in links
    assert "https://example.org/worldkv/blob/HEAD/README.md#what-has-been-proven" in links
    assert "https://example.org/worldkv/raw/HEAD/docs/world.webp" in links
    assert "Project-URL: Repository, https://example.org/worldkv/\n" in published


def test_nothing_is_installed_beside_torch_and_numpy(made):
    needed = re.findall("^Requires-Dist: ((?!.*extra).*)$", metadata(made["skipped"]), flags=re.MULTILINE)
    assert sorted(needed) == ["numpy", "torch>=2.10"]


def test_an_installed_wheel_serves_without_triton(python, unpacked):
    said = python("-c", WITHOUT_TRITON, str(unpacked / "README.md"))
    assert f"{python.target / 'worldkv_kernels/__init__.py'}\n" in said
    assert re.search(r"^triton +not installed$", said, flags=re.MULTILINE)
    assert re.search(r"^segment_attention +triton +- +triton cannot be imported", said, flags=re.MULTILINE)
    assert "cuda extension   the extension is not built: nvcc was not found (WORLDKV_CUDA=1 pip install" in said


def test_tests_of_the_sdist_pass_on_an_installed_wheel(python, unpacked):
    tests = [str(unpacked / "tests" / name) for name in ("test_arena.py", "test_readme.py::test_examples_run")]
    quiet = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-c", str(unpacked / "pyproject.toml")]
    assert re.search(r"\d+ passed", python("-m", "pytest", *quiet, *tests))
