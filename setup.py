"""Packages, the CUDA extension where nvcc is found, and README.md as a package index can show it; all else is in
pyproject.toml.

WORLDKV_CUDA=0 skips the extension, WORLDKV_CUDA=1 insists on it. WORLDKV_CUDA_ARCHS names the architectures; by default
they are those of ARCHS that nvcc knows.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.egg_info import egg_info

ROOT = Path(__file__).parent.resolve()
SOURCES = ["csrc/bindings.cpp", *sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("csrc/*/*.cu"))]
ARCHS = ("80", "90a", "100a", "120")
LINK = re.compile(r"(!?)\[((?:[^][]|\[[^][]*\])*)\]\(([^()\s]+)\)")


def find_nvcc() -> str | None:
    for home in (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")):
        if home and (Path(home) / "bin" / "nvcc").exists():
            return str(Path(home) / "bin" / "nvcc")
    return shutil.which("nvcc")


def run(command: list[str]) -> None:
    """Raises RuntimeError, first of all with the line that says what was wrong."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        lines = [line.strip() for line in done.stderr.splitlines()] or [f"status {done.returncode}"]
        said = next((line for line in lines if re.search("error|fatal", line)), lines[0])
        raise RuntimeError("\n".join([f"nvcc failed: {said}", *lines]))


def for_arch(arch: str) -> str:
    return f"-gencode=arch=compute_{arch},code=sm_{arch}"


def architectures(nvcc: str) -> list[str]:
    if os.environ.get("WORLDKV_CUDA_ARCHS"):
        return os.environ["WORLDKV_CUDA_ARCHS"].split(",")
    known = []
    for arch in ARCHS:
        try:
            run([nvcc, "--dryrun", for_arch(arch), "-c", str(ROOT / SOURCES[-1])])
            known.append(arch)
        except RuntimeError as error:
            unknown = error
    if not known:
        raise unknown
    return known


class BuildCuda(build_ext):
    """Builds with nvcc alone.

    Without it, or when it fails, the package is made without the extension: a wheel of any platform, with a note of
    the reason for `worldkv doctor`.
    """

    def run(self) -> None:
        wanted, nvcc = os.environ.get("WORLDKV_CUDA", "auto"), find_nvcc()
        (extension,) = self.extensions
        target = Path(self.get_ext_fullpath(extension.name))
        note = target.with_name("_cuda_missing.txt")
        target.parent.mkdir(parents=True, exist_ok=True)
        for stale in (target, note):
            stale.unlink(missing_ok=True)
        try:
            if wanted == "0":
                raise RuntimeError("WORLDKV_CUDA=0")
            if nvcc is None:
                raise RuntimeError("nvcc was not found")
            self.build_with(nvcc, extension, target)
        except (RuntimeError, OSError, ImportError) as error:  # nvcc's, its start's, pybind11's
            if wanted == "1":
                raise
            print(f"worldkv_kernels: CUDA kernels are not built: {error}\nTriton kernels serve.", file=sys.stderr)
            note.write_text(f"{str(error).splitlines()[0]}\n")
            self.extensions = self.distribution.ext_modules = []
            wheel = self.distribution.get_command_obj("bdist_wheel", create=False)
            if wheel:
                wheel.root_is_pure = True

    def build_with(self, nvcc: str, extension: Extension, target: Path) -> None:
        import pybind11

        archs = architectures(nvcc)
        command = [nvcc, "-shared", "-O3", "-std=c++17", "-lineinfo", "--threads=0", "-cudart=static"]
        command += ["-Xcompiler=-fPIC,-fvisibility=hidden", f'-DWORLDKV_ARCHITECTURES="{",".join(archs)}"']
        command += [*map(for_arch, archs), f"-I{pybind11.get_include()}", *(f"-I{path}" for path in self.include_dirs)]
        run([*command, *(str(ROOT / source) for source in extension.sources), "-o", str(target)])


def for_package_index(text: str, repository: str | None) -> str:
    """README.md where the files that it links to are not beside it: links into the repository, or none."""

    def link(found: re.Match) -> str:
        picture, label, target = found.groups()
        if target.startswith("#"):
            target = f"README.md{target}"  # headings have no names there
        path = target.partition("#")[0]
        if not (ROOT / path).exists():
            return found[0]
        if repository:
            return f"{picture}[{label}]({repository.rstrip('/')}/{'raw' if picture else 'blob'}/HEAD/{target})"
        return f"({label}: {path})" if picture else label

    return LINK.sub(link, text)


class EggInfo(egg_info):
    """Writes the metadata of everything that is built."""

    def run(self) -> None:
        metadata = self.distribution.metadata
        repository = metadata.project_urls.get("Repository")
        metadata.long_description = for_package_index(metadata.long_description, repository)
        super().run()


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
    package_data={
        "worldkv_kernels": ["py.typed"],
        "worldkv_kernels.models": ["weights/small_world/config.json", "weights/small_world/model.safetensors"],
        "worldkv_kernels.ops": ["proven.json"],
    },
    include_package_data=False,  # else all of MANIFEST.in that lies in a package, device.sh and figures among it
    ext_modules=[Extension("worldkv_kernels._cuda", SOURCES)],
    cmdclass={"build_ext": BuildCuda, "egg_info": EggInfo},
)
