"""The sources of the CUDA kernels, compiled by the host's C++ compiler and run on fibers (scheduler.cpp).

What is no C++ is rewritten: launches, and the one instruction in assembly. All else is compiled as it stands, against
include/, which stands for the CUDA runtime, and for attention/hopper.cuh: hopper/ models what that has in assembly.
"""

from __future__ import annotations

import ctypes
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


def build(sources: Path, folder: Path) -> Path:
    """Compile every .cu and .cpp under `sources` into one module in `folder`, unless the same one is there."""
    files = sorted(path for path in sources.rglob("*") if path.suffix in (".cu", ".cuh", ".h", ".cpp"))
    include = HERE / "include"
    texts = {}
    for path in files:
        relative = path.relative_to(sources)
        stand_in = include / relative
        found = stand_in.exists()
        texts[relative] = (
            stand_in.read_text() if found else translated(path.read_text(), path.relative_to(sources.parent))
        )
    own = [HERE / "scheduler.cpp", *sorted((HERE / "hopper").glob("*.cpp"))]
    headers = [HERE / "scheduler.h", HERE / "hopper/model.h", *sorted(path for path in include.rglob("*.*h"))]
    # nvcc fuses products and sums too. Vectors are read as numbers, which CUDA's compiler allows.
    flags = ["-std=c++17", "-O1", "-march=native", "-ffp-contract=fast", "-fno-strict-aliasing", "-fPIC"]
    flags += ["-fvisibility=hidden", "-U_FORTIFY_SOURCE", f"-I{include}", f"-I{CSRC}"]
    if Path("bindings.cpp") in texts:
        pybind11 = importlib.import_module("pybind11").get_include()
        flags += ['-DWORLDKV_ARCHITECTURES="host"', f"-I{pybind11}", f"-I{sysconfig.get_path('include')}"]
    content = [platform.node(), COMPILER, *flags, *map(str, texts), *texts.values()]
    content += [path.read_text() for path in [*own, *headers, *sorted(CSRC.glob("*/*.*h"))]]
    digest = hashlib.sha256("\0".join(content).encode()).hexdigest()[:16]
    module = folder / digest / f"_cuda{sysconfig.get_config_var('EXT_SUFFIX')}"
    if module.exists():
        return module

    def compiled(arguments: list) -> None:
        done = subprocess.run([COMPILER, *map(str, arguments)], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(map(str, arguments))}: {done.stderr[-4000:]}")

    with tempfile.TemporaryDirectory(dir=folder) as work:
        units = list(own)
        for relative, text in texts.items():
            path = Path(work) / (relative.with_suffix(".cpp") if relative.suffix == ".cu" else relative)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
            units += [path] if path.suffix == ".cpp" else []
        objects = [Path(work) / f"{number}_{unit.stem}.o" for number, unit in enumerate(units)]
        with ThreadPoolExecutor(os.cpu_count()) as workers:
            fast = {unit: ["-O3"] for unit in own}  # the model, where most of the time goes
            commands = (
                [*flags, *fast.get(unit, []), "-c", unit, "-o", o] for unit, o in zip(units, objects, strict=True)
            )
            list(workers.map(compiled, commands))
        compiled(["-shared", *objects, "-o", Path(work) / module.name])
        module.parent.mkdir(exist_ok=True)
        (Path(work) / module.name).replace(module)
    return module


def load(path: Path) -> ModuleType:
    """The module, with what `import worldkv_kernels._cuda` gives, and seed(number) for the order of its threads."""
    # Not under that name: pybind11 would hand back the installed module, where one has been imported.
    spec = importlib.util.spec_from_file_location(f"{__name__}._cuda", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert Path(module.__file__) == path, f"{module.__file__} was loaded for {path}"
    seed = ctypes.CDLL(str(path)).cuda_on_host_seed
    seed.argtypes = [ctypes.c_uint64]
    module.seed = seed
    return module
