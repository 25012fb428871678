"""Every .cu builds for each architecture; registers, spills, shared memory and access widths of each kernel."""

import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from itertools import product
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on the PATH")

SOURCES = sorted(Path(__file__).parents[1].glob("csrc/*/*.cu"))
ARCHS = ("80", "90a", "100a", "120")
INSTANCES = {
    "anchor_kernel": {"bf16", "fp16", "fp32"},
    "select_copy_kernel": {"bf16", "fp16", "fp32"},
    "norm_rope_append_kernel": {f"{dtype} {vectors}" for dtype in ("bf16", "fp16") for vectors in (2, 5, 8)},
}
# What the launches count on: 65536 registers a multiprocessor for two blocks of 512, three of 256, five of 128.
REGISTERS = {"anchor_kernel": 64, "select_copy_kernel": 80, "norm_rope_append_kernel": 96}
# Bytes a block. Eight histograms of 256 bins and the sums of eight warps; the rest is small.
SHARED = {"anchor_kernel": 2048, "select_copy_kernel": 8500, "norm_rope_append_kernel": 16}
DTYPES = {"13__nv_bfloat16": "bf16", "6__half": "fp16", "f": "fp32"}
ENTRY = re.compile(r"\d\d([a-z_]+_kernel)I(13__nv_bfloat16|6__half|f)(?:Li(\d))?E")


def instance(mangled):
    """Kernel and template arguments of a mangled name, such as ("norm_rope_append_kernel", "bf16 5")."""
    kernel, dtype, vectors = ENTRY.search(mangled).groups()
    return kernel, f"{DTYPES[dtype]} {vectors}" if vectors else DTYPES[dtype]


@pytest.fixture(scope="module")
def cubins(tmp_path_factory):
    """By (source, architecture): the cubin, and the report of ptxas."""
    folder = tmp_path_factory.mktemp("cubins")

    def compile_one(case):
        source, arch = case
        cubin = folder / f"{source.stem}_{arch}.cubin"
        command = ["nvcc", "-cubin", "-O3", "-std=c++17", f"-gencode=arch=compute_{arch},code=sm_{arch}"]
        command += ["-Xptxas=-v", "-Werror=all-warnings", str(source), "-o", str(cubin)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return cubin, done.stderr

    cases = list(product(SOURCES, ARCHS))
    with ThreadPoolExecutor(2) as workers:
        return dict(zip(cases, workers.map(compile_one, cases), strict=True))


@pytest.mark.parametrize("arch", ARCHS)
def test_no_kernel_spills_and_each_keeps_to_its_resources(cubins, arch):
    found = {}
    for source in SOURCES:
        report = cubins[source, arch][1]
        for entry in report.split("Compiling entry function")[1:]:
            frame = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", entry)
            assert frame.groups() == ("0", "0", "0"), entry
            kernel, arguments = instance(entry)
            assert int(re.search(r"Used (\d+) registers", entry)[1]) <= REGISTERS[kernel], entry
            assert int(re.search(r"(\d+) bytes smem", entry)[1]) <= SHARED[kernel], entry
            found.setdefault(kernel, set()).add(arguments)
    assert found == INSTANCES


def sass(cubin):
    """Machine code by (kernel, arguments)."""
    disassembler = shutil.which("nvdisasm")
    if disassembler is None and find_spec("triton"):
        packaged = Path(find_spec("triton").origin).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
        disassembler = str(packaged) if packaged.exists() else None
    if disassembler is None:
        pytest.skip("nvdisasm is neither on the PATH nor in triton's package")
    text = subprocess.run([disassembler, str(cubin)], capture_output=True, text=True, check=True).stdout
    return {instance(part): part for part in re.split(r"\.section\s+\.text\.", text)[1:]}


def widths(code, instruction):
    """How many 16-byte and how many narrower accesses to global memory there are."""
    found = re.findall(rf"\b{instruction}\.E([.\w]*)", code)
    wide = sum(".128" in modifiers for modifiers in found)
    return wide, len(found) - wide


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_rows_are_read_and_written_16_bytes_at_a_time(cubins, source, arch):
    for (kernel, arguments), code in sass(cubins[source, arch][0]).items():
        assert not re.search(r"\b(LDL|STL)\b", code), kernel
        wide_loads, narrow_loads = widths(code, "LDG")
        wide_stores, narrow_stores = widths(code, "STG")
        if kernel == "anchor_kernel":  # a batch of four rows; means and counters are stored one by one
            assert (wide_loads, narrow_loads, wide_stores) == (4, 0, 4), arguments
        elif kernel == "select_copy_kernel":
            # Four vectors of two tokens' keys and the mean beside each; three places that copy eight vectors.
            mean_loads = 4 if arguments == "fp32" else 8
            assert (wide_loads, wide_stores) == (8 + mean_loads + 24, 24), arguments
            assert len(re.findall(r"\bLDG\.E\.128\.STRONG\.GPU\b", code)) == 8, arguments
        else:  # nothing but 16 bytes is stored; loaded are also positions and rotations
            vectors = int(arguments[-1])
            assert (wide_stores, narrow_stores) == (vectors, 0), arguments
            assert wide_loads >= 2 * vectors, arguments
