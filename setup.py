"""Packages, and the CUDA extension where nvcc is found; everything else is in pyproject.toml.

WORLDKV_CUDA=0 skips the extension, WORLDKV_CUDA=1 insists on it; WORLDKV_CUDA_ARCHS names the architectures.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
SOURCES = ["csrc/bindings.cpp", *sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("csrc/*/*.cu"))]
ARCHS = os.environ.get("WORLDKV_CUDA_ARCHS", "80,90a,100a,120").split(",")


def find_nvcc() -> str | None:
    for home in (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")):
        if home and (Path(home) / "bin" / "nvcc").exists():
            return str(Path(home) / "bin" / "nvcc")
    return shutil.which("nvcc")


class BuildCuda(build_ext):
    """Builds with nvcc alone. Without it, or when it fails, the package installs without the extension."""

    def run(self) -> None:
        wanted = os.environ.get("WORLDKV_CUDA", "auto")
        nvcc = find_nvcc()
        try:
            if wanted == "0":
                raise RuntimeError("WORLDKV_CUDA=0")
            if nvcc is None:
                raise RuntimeError("nvcc was not found")
            for extension in self.extensions:
                self.build_with(nvcc, extension)
        except RuntimeError as error:
            if wanted == "1":
                raise
            print(f"worldkv_kernels: CUDA kernels are not built: {error}. Triton kernels serve.", file=sys.stderr)
            self.extensions = []

    def build_with(self, nvcc: str, extension: Extension) -> None:
        import pybind11

        target = Path(self.get_ext_fullpath(extension.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        command = [nvcc, "-shared", "-O3", "-std=c++17", "-lineinfo", "--threads=0", "-cudart=static"]
        command += ["-Xcompiler=-fPIC,-fvisibility=hidden", f'-DWORLDKV_ARCHITECTURES="{",".join(ARCHS)}"']
        command += [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in ARCHS]
        command += [f"-I{pybind11.get_include()}", *(f"-I{folder}" for folder in self.include_dirs)]
        command += [str(ROOT / source) for source in extension.sources] + ["-o", str(target)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"nvcc failed: {done.stderr.strip()[-2000:]}")


setup(
    packages=[
        "worldkv_kernels",
        "worldkv_kernels.benchmarks",
        "worldkv_kernels.cli",
        "worldkv_kernels.integrations",
        "worldkv_kernels.kernels",
        "worldkv_kernels.memory",
        "worldkv_kernels.models",
        "worldkv_kernels.ops",
        "worldkv_kernels.reference",
    ],
    package_dir={
        "worldkv_kernels": "worldkv_kernels",
        "worldkv_kernels.benchmarks": "benchmarks",
        "worldkv_kernels.kernels": "kernels",
    },
    package_data={"worldkv_kernels": ["py.typed"], "worldkv_kernels.ops": ["proven.json"]},
    ext_modules=[Extension("worldkv_kernels._cuda", SOURCES)],
    cmdclass={"build_ext": BuildCuda},
)
