"""Every .cu builds for each architecture; registers, spills, shared memory and access widths of each kernel."""

import re
import shutil
import subprocess
from functools import cache
from itertools import pairwise, product
from pathlib import Path

import pytest
from conftest import disassembled

pytestmark = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on the PATH")

SOURCES = sorted(Path(__file__).parents[1].glob("csrc/*/*.cu"))
ARCHS = ["90a", *(pytest.param(arch, marks=pytest.mark.slow) for arch in ("80", "100a", "120"))]
# Of head_dim, rows of a tile, turned slabs, mass and weights.
ATTENTION = [
    *(
        (head_dim, tile_rows, slabs, mass, 0)
        for head_dim, slabs, tile_rows, mass in product((64,), (0, 4), (128, 176), (0, 1))
    ),
    *(
        (head_dim, tile_rows, slabs, mass, 0)
        for head_dim, slabs, tile_rows, mass in product((128,), (0, 3), (128, 176), (0, 1))
    ),
    *((128, 128, 8, mass, 0) for mass in (0, 1)),
    *(
        (head_dim, tile_rows, slabs, mass, 1)
        for head_dim, tile_rows, slabs in ((64, 176, 0), (64, 128, 4), (128, 176, 0), (128, 128, 3))
        for mass in (0, 1)
    ),
]
INSTANCES = {
    "anchor_kernel": {"bf16", "fp16", "fp32"},
    "select_copy_kernel": {"bf16", "fp16", "fp32"},
    "norm_rope_append_kernel": {f"{dtype} {vectors}" for dtype in ("bf16", "fp16") for vectors in (2, 5, 8)},
    "segment_attention_kernel": {" ".join(map(str, (dtype, *x))) for dtype in ("bf16", "fp16") for x in ATTENTION},
    "merge_parts_kernel": {
        f"{dtype} {head_dim} {weights}" for dtype in ("bf16", "fp16") for head_dim in (64, 128) for weights in (0, 1)
    },
    "segment_shares_kernel": {""},
}
# What the launches count on: 65536 registers a multiprocessor for two blocks of 512, three of 256, five of 128.
# Attention's are those that its 384 threads start with; who then has how many is in the test of its machine code.
REGISTERS = {"anchor_kernel": 64, "select_copy_kernel": 80, "norm_rope_append_kernel": 96}
REGISTERS |= {"segment_attention_kernel": 168, "merge_parts_kernel": 64, "segment_shares_kernel": 64}
# Bytes a block. Eight histograms of 256 bins and the sums of eight warps; the rest is small, in attention's file beside
# dynamic memory that starts on a multiple of 1024.
SHARED = {"anchor_kernel": 2048, "select_copy_kernel": 8500, "norm_rope_append_kernel": 16}
SHARED |= {"segment_attention_kernel": 0, "merge_parts_kernel": 0, "segment_shares_kernel": 1024}
DTYPES = {"13__nv_bfloat16": "bf16", "6__half": "fp16", "f": "fp32"}
ENTRY = re.compile(r"\d\d([a-z_]+_kernel)(?:I(13__nv_bfloat16|6__half|f)((?:L[ib]\d+E)*)E)?")


def instance(mangled):
    """Kernel and template arguments of a mangled name, such as ("norm_rope_append_kernel", "bf16 5")."""
    kernel, dtype, numbers = ENTRY.search(mangled).groups()
    return kernel, " ".join([DTYPES[dtype], *re.findall(r"\d+", numbers)]) if dtype else ""


@pytest.fixture(scope="module", params=["bf16", pytest.param("fp16", marks=pytest.mark.slow)])
def dtype(request):
    """Of attention's kernels, which take the most of the time: in one they are much as in the other."""
    return request.param


@pytest.fixture(scope="module")
def cubins(dtype, tmp_path_factory):
    """Of a source and an architecture: the cubin, and the report of ptxas."""
    folder = tmp_path_factory.mktemp("cubins")
    other = {"bf16": "__half", "fp16": "__nv_bfloat16"}[dtype]
    for source in SOURCES:
        left_out = rf"launch(_weighted)?<{other}>\(\w+, maps, stream\)"
        text, found = re.subn(left_out, 'refuse("it is left out")', source.read_text())
        assert found == (2 if source.stem == "segment_attention" else 0)
        (folder / source.name).write_text(text)

    @cache
    def compile_one(source, arch):
        cubin = folder / f"{source.stem}_{arch}.cubin"
        command = ["nvcc", "-cubin", "-O3", "-std=c++17", f"-gencode=arch=compute_{arch},code=sm_{arch}"]
        command += ["-Xptxas=-v", "-Werror=all-warnings", f"-I{source.parent}"]
        command += [str(folder / source.name), "-o", str(cubin)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return cubin, done.stderr

    return compile_one


@pytest.mark.parametrize("arch", ARCHS)
def test_no_kernel_spills_and_each_keeps_to_its_resources(cubins, dtype, arch):
    found = {}
    for source in SOURCES:
        report = cubins(source, arch)[1]
        for entry in report.split("Compiling entry function")[1:]:
            frame = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", entry)
            assert frame.groups() == ("0", "0", "0"), entry
            kernel, arguments = instance(entry)
            assert int(re.search(r"Used (\d+) registers", entry)[1]) <= REGISTERS[kernel], entry
            shared = re.search(r"(\d+) bytes smem", entry)
            assert int(shared[1] if shared else 0) <= SHARED[kernel], entry
            assert not re.search(r"warning|C75\d\d", entry), entry  # such as products that wait for each other
            found.setdefault(kernel, set()).add(arguments)
    wanted = dict(INSTANCES)
    for kernel in ("segment_attention_kernel", "merge_parts_kernel"):
        wanted[kernel] = {x for x in INSTANCES[kernel] if x.startswith(dtype)}
    assert found == wanted


@cache
def sass(cubin):
    """Machine code by (kernel, arguments)."""
    return {instance(part): part for part in re.split(r"\.section\s+\.text\.", disassembled(cubin))[1:]}


def widths(code, instruction):
    """How many 16-byte and how many narrower accesses to global memory there are."""
    found = re.findall(rf"\b{instruction}\.E([.\w]*)", code)
    wide = sum(".128" in modifiers for modifiers in found)
    return wide, len(found) - wide


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_rows_are_read_and_written_16_bytes_at_a_time(cubins, source, arch):
    for (kernel, arguments), code in sass(cubins(source, arch)[0]).items():
        assert not re.search(r"\b(LDL|STL)\b", code), kernel
        wide_loads, narrow_loads = widths(code, "LDG")
        wide_stores, narrow_stores = widths(code, "STG")
        if kernel == "anchor_kernel":  # a batch of four rows; means and counters are stored one by one
            assert (wide_loads, narrow_loads, wide_stores) == (4, 0, 4), arguments
        elif source.parent.name == "attention":  # the copy engine reads; a row's results leave from their registers
            continue
        elif kernel == "select_copy_kernel":
            # Four vectors of two tokens' keys and the mean beside each; three places that copy eight vectors.
            mean_loads = 4 if arguments == "fp32" else 8
            assert (wide_loads, wide_stores) == (8 + mean_loads + 24, 24), arguments
            assert len(re.findall(r"\bLDG\.E\.128\.STRONG\.GPU\b", code)) == 8, arguments
        else:  # nothing but 16 bytes is stored; loaded are also positions and rotations
            vectors = int(arguments[-1])
            assert (wide_stores, narrow_stores) == (vectors, 0), arguments
            assert wide_loads >= 2 * vectors, arguments


def instructions(code):
    """(address, instruction) of a kernel, and addresses by label."""
    found, labels, waiting = [], {}, []
    for line in code.splitlines():
        if label := re.match(r"\s*\.(L_x_\d+):", line):
            waiting.append(label[1])
        if match := re.search(r"/\*([0-9a-f]{4,})\*/\s+(.*?);", line):
            labels.update((label, int(match[1], 16)) for label in waiting)
            waiting = []
            found.append((int(match[1], 16), match[2]))
    return found, labels


def target(instruction, labels):
    """Where a branch goes."""
    label = re.search(r"\b(?:BRA|CALL|BSSY)\b.*`\(\.(L_x_\d+)\)", instruction)
    return labels[label[1]] if label else None


def main_loop(found, labels):
    """The shortest loop with a wait that lets one group of products go on."""
    loops = []
    for address, instruction in found:
        first = target(instruction, labels) if "BRA" in instruction else None
        if first is not None and first < address:
            body = [x for at, x in found if first <= at <= address]
            if any("WARPGROUP.DEPBAR.LE gsb0, 0x1" in x for x in body):
                loops.append(body)
    return min(loops, key=len)


def reachable(found, labels, first):
    """The instructions that a warp may come to from address `first` on."""
    following = {at: after for (at, _), (after, _) in pairwise(found)}
    by_address, seen, waiting = dict(found), set(), [first]
    while waiting:
        at = waiting.pop()
        if at is None or at in seen:
            continue
        seen.add(at)
        waiting.append(target(by_address[at], labels))
        if not re.match(r"(BRA|EXIT|RET)\b", by_address[at]):
            waiting.append(following.get(at))
    return [by_address[at] for at in sorted(seen)]


def registers(code):
    return 1 + max(int(number) for number in re.findall(r"\bR(\d+)\b", " ".join(code)))


# Instructions a warp and tile, as compiled by nvcc 13.0 and a little more; NOTES.md counts the cycles.
MOST_INSTRUCTIONS = {("128", "128", "0", "0", "0"): 535, ("128", "176", "0", "0", "0"): 655}


def test_attention_overlaps_its_exponentials_with_products(cubins):
    """By the machine code, for every instance: registers, no serialised product, no exponential behind the wait."""
    (source,) = (source for source in SOURCES if source.stem == "segment_attention")
    checked = 0
    for (kernel, arguments), code in sass(cubins(source, "90a")[0]).items():
        if kernel != "segment_attention_kernel":
            continue
        checked += 1
        dtype, *numbers = arguments.split()
        head_dim, tile_rows, _, mass, weights = map(int, numbers)
        found, labels = instructions(code)
        given = next(at for at, x in found if "USETMAXREG.DEALLOC.CTAPOOL 0x18" in x)
        taken = next(at for at, x in found if "USETMAXREG.TRY_ALLOC.CTAPOOL" in x and "0xf0" in x)
        assert registers(reachable(found, labels, given)) <= 24, arguments
        assert registers(reachable(found, labels, taken)) <= 240, arguments
        loop = main_loop(found, labels)
        products = [x for x in loop if "HGMMA" in x]
        assert len(products) == head_dim // 16 + tile_rows // 16, arguments
        assert sum("tnspB" in x for x in products) == tile_rows // 16, arguments
        assert all(f"x16.F32{'.BF16' if dtype == 'bf16' else ''} " in x for x in products), arguments
        # Only the last of a group of products is waited for.
        assert sum("gsb0" in x for x in products) == 2, arguments
        between, after = (next(i for i, x in enumerate(loop) if f"gsb0, 0x{n}" in x) for n in (1, 0))
        exponentials = [i for i, x in enumerate(loop) if "MUFU.EX2" in x]
        beside = [i for i in exponentials if between < i < after]
        assert len(beside) == tile_rows // 2 + 2, arguments
        assert len(exponentials) == len(beside) + mass * weights, arguments  # one where a segment ends
        assert sum("BAR.SYNC" in x for x in loop) == sum("BAR.ARV" in x for x in loop) == 1, arguments
        assert len(loop) <= MOST_INSTRUCTIONS.get(tuple(numbers), 1200), arguments
    assert checked == len(ATTENTION)
