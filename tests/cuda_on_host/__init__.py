"""The sources of the CUDA kernels, compiled by the host's C++ compiler and run on fibers (scheduler.cpp).

What is no C++ is rewritten: launches, and the one instruction in assembly. All else is compiled as it stands, against
include/, which stands for the CUDA runtime, and for attention/hopper.cuh: what that has in assembly is modelled by
hopper/, where copies and products take their time in a drawn order, and whoever touches memory or registers that are
not its own, or not yet, ends the launch with a message. What holds of the model is as true of a GPU as the facts of
the instruction set are that it is written after.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"
COMPILER = shutil.which("c++") or shutil.which("g++")

# Kernel, template arguments and all; configuration; arguments.
LAUNCH = re.compile(r"([\w:]+(?:<[^<>;]*>)?)<<<([^;]*?)>>>\(([^;]*)\);")
LOAD_ACQUIRE = re.compile(
    r'asm volatile\("ld\.acquire\.gpu\.global\.s32 %0, \[%1\];" : "=r"\((\w+)\) : "l"\((\w+)\) : "memory"\);'
)


def why_not() -> str | None:
    """Why the kernels cannot be built for the host; None when they can."""
    if COMPILER is None:
        return "no C++ compiler is on the PATH"
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        return "Python's headers are not installed"
    return None if importlib.util.find_spec("pybind11") else "pybind11 is not installed"


def translated(text: str, name: Path) -> str:
    launch = r"cuda_on_host::launch(reinterpret_cast<const void*>(+\1), [=] { \1(\3); }, \2);"
    text = LAUNCH.sub(launch, text)
    text = LOAD_ACQUIRE.sub(r"\1 = cuda_on_host::load_acquire(\2);", text)
    assert "<<<" not in text and "asm" not in re.findall(r"\w+", text), f"{name}: not understood"
    return f'#line 1 "{name}"\n{text}'


def digest(*texts: str) -> str:
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16]


def with_includes(path: Path, texts: dict[Path, str], seen: dict[Path, str]) -> dict[Path, str]:
    """What `path` is compiled from: its text, and that of each file of `texts` that it includes, directly or not."""
    if path not in seen:
        seen[path] = texts[path]
        for name in re.findall(r'#include ["<]([^">]+)[">]', texts[path]):
            found = [Path(os.path.normpath(place / name)) for place in (path.parent, HERE / "include", HERE, CSRC)]
            for header in [x for x in found if x in texts][:1]:
                with_includes(header, texts, seen)
    return seen


def build(sources: Path, folder: Path, parts: Path | None = None) -> Path:
    """Compile every .cu and .cpp under `sources` into one module in `folder`, unless the same one is there.

    What was compiled there, or in the folder `parts`, from the same text is taken as it is.
    """
    include = HERE / "include"
    texts = {path: path.read_text() for path in HERE.rglob("*") if path.suffix in (".cuh", ".h", ".cpp")}
    texts |= {path: path.read_text() for path in CSRC.rglob("*.*h")}
    copies = {}
    for path in sorted(sources.rglob("*")):
        if path.suffix in (".cu", ".cuh", ".h", ".cpp"):
            stand_in = include / path.relative_to(sources)
            known = stand_in.exists()
            texts[path] = (stand_in if known else path).read_text()
            copies[path] = texts[path] if known else translated(texts[path], path.relative_to(sources.parent))
    # nvcc fuses products and sums too. Vectors are read as numbers, which CUDA's compiler allows.
    flags = ["-std=c++17", "-march=native", "-ffp-contract=fast", "-fno-strict-aliasing", "-fPIC"]
    flags += ["-fvisibility=hidden", "-U_FORTIFY_SOURCE", f"-I{include}", f"-I{CSRC}"]
    model = [*sorted(HERE.glob("*.cpp")), *sorted((HERE / "hopper").glob("*.cpp"))]
    units = {unit: ["-O3"] for unit in model}  # where most of the time goes
    units |= {path: ["-O1"] for path in copies if path.suffix in (".cu", ".cpp")}
    if sources / "bindings.cpp" in units:
        pybind11 = importlib.import_module("pybind11").get_include()
        python = ['-DWORLDKV_ARCHITECTURES="host"', f"-I{pybind11}", f"-I{sysconfig.get_path('include')}"]
        units[sources / "bindings.cpp"] += python
    machine = (platform.node(), COMPILER, Path(__file__).read_text(), *flags)
    objects = {}
    for unit, own_flags in units.items():
        name = f"{unit.stem}_{digest(*machine, *own_flags, *with_includes(unit, texts, {}).values())}.o"
        objects[unit] = parts / name if parts and (parts / name).exists() else folder / name
    module = (
        folder / digest(*(path.name for path in objects.values())) / f"_cuda{sysconfig.get_config_var('EXT_SUFFIX')}"
    )
    if module.exists():
        return module

    def compiled(arguments: list) -> None:
        done = subprocess.run([COMPILER, *map(str, arguments)], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(map(str, arguments))}: {done.stderr[:6000]}")

    # Workers of pytest-xdist may want the same at once.
    with (folder / "lock").open("w") as lock, tempfile.TemporaryDirectory(dir=folder) as work:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for path, text in copies.items():
            copy = Path(work) / path.relative_to(sources)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_text(text)

        def make(unit: Path) -> None:
            if not objects[unit].exists():
                place = Path(work) / unit.relative_to(sources) if unit.is_relative_to(sources) else unit
                made = Path(work) / objects[unit].name
                compiled([*flags, *units[unit], "-x", "c++", "-c", place, "-o", made])
                made.replace(objects[unit])

        with ThreadPoolExecutor(os.cpu_count()) as workers:
            list(workers.map(make, units))
        compiled(["-shared", *objects.values(), "-o", Path(work) / module.name])
        module.parent.mkdir(exist_ok=True)
        (Path(work) / module.name).replace(module)
    return module


def load(path: Path) -> ModuleType:
    """The module, with what `import worldkv_kernels._cuda` gives, and seed(number) for the order of its threads."""
    # Not under that name, nor twice under one: pybind11 would hand back the module that was imported first.
    spec = importlib.util.spec_from_file_location(f"{__name__}.{path.parent.name}._cuda", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert Path(module.__file__) == path, f"{module.__file__} was loaded for {path}"
    seed = ctypes.CDLL(str(path)).cuda_on_host_seed
    seed.argtypes = [ctypes.c_uint64]
    module.seed = seed
    return module
