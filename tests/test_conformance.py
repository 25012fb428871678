"""What segment attention takes for granted of sm_90a: the kernels that show it, run by the host, give the bits kept for
a GPU; those follow from what the facts say; and what does not hold is said."""

import ctypes
import json
import re
import shutil
import subprocess
import sys

import cuda_on_host
import numpy as np
import pytest
import torch
from conftest import BENCHMARKS, disassembled

SEEDS = range(50)
NVCC = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on the PATH")


@pytest.fixture(scope="module")
def on_host(build_for_host):
    """The library for the host."""
    return build_for_host(BENCHMARKS / "conformance")


def mix(x):
    x = np.asarray(x, np.uint32) * np.uint32(0x9E3779B1)
    x = (x ^ x >> np.uint32(15)) * np.uint32(0x85EBCA77)
    return x ^ x >> np.uint32(13)


def words(numbers):
    return np.asarray(numbers, np.float32).view(np.uint32).ravel()


def element(row, head, pair):
    return 1 << 31 | row << 16 | head << 8 | pair


def copied(boxes, box_rows, size, rows=300, heads=3):
    """Shared memory after copies of boxes (destination, column, head, row), wherever the pool's rows lie."""
    memory = np.full(size // 4, 0xEEEEEEEE, np.uint32)
    for destination, column, head, first_row in boxes:
        for row in range(first_row, first_row + box_rows):
            for pair in range(32):
                at = destination + (row - first_row) * 128 + 4 * pair
                from_pair = column // 2 + pair
                inside = 0 <= row < rows and 0 <= head < heads and 0 <= from_pair < 64
                memory[(at ^ (at >> 7 & 7) << 4) // 4] = element(row, head, from_pair) if inside else 0
    return memory


def in_registers(sums):
    """d of every thread, of sums [64 a warp group, N]."""
    thread, v = np.indices((2 * len(sums), sums.shape[1] // 2))
    row = 64 * (thread // 128) + 16 * (thread // 32 % 4) + thread % 32 // 4 + 8 * (v // 2 % 2)
    return words(sums[row, 8 * (v // 4) + 2 * (thread % 4) + v % 2])


def few(first, rows, columns):
    """Of -1, 0 and 1."""
    row, column = np.indices((rows, columns))
    return (mix(first + 256 * row + column) % 3).astype(int) - 1


def bit(rows, columns):
    row, column = np.indices((rows, columns))
    return (mix(256 * row + column) % 2).astype(int)


def chosen(rows, slabs):
    """[rows, slabs]: the element of each slab that a row takes."""
    row, slab = np.indices((rows, slabs))
    return 16 * slab + (mix(16 * row + slab) % 16).astype(int)


def slabs(keys, head_dim, groups):
    of_keys = bit(keys, head_dim)[:, chosen(64 * groups, head_dim // 16)]  # [keys, queries, slabs]
    return in_registers((of_keys << np.arange(head_dim // 16)).sum(-1).T)


def values(rows, head_dim):
    of_weights = bit(rows, head_dim)[chosen(64, rows // 16)]  # [weights, slabs, head_dim]
    return in_registers((of_weights << np.arange(rows // 16)[:, None]).sum(1))


def numbers():
    pairs = np.array([
        [1, -2], [1.00390625, 1.01171875], [1.00390637, 1.01171863], [1.00048828125, 1.00146484375], [-0.0, 0.3333333],
        [65504, 0.75], [-3.14159274, 6.1e-5], [0.0009765, -np.inf],
    ], np.float32)  # fmt: skip
    powers = words([1, 1, 0, np.inf, 0, 0, np.inf, 0])
    rows = []
    for dtype in (torch.bfloat16, torch.float16):
        rounded = torch.from_numpy(pairs).to(dtype)
        both = rounded.view(torch.int16).numpy().view(np.uint16).astype(np.uint32)
        again = rounded.float().numpy().view(np.uint32)
        rows.append(np.column_stack([both[:, 0] | both[:, 1] << 16, again, powers]))
    return np.concatenate(rows).ravel()


def ring():
    tiles = [copied([(0, 64 * (tile % 2), tile % 3, 11 * tile)], 8, 1024) for tile in range(7)]
    return np.concatenate([np.column_stack([np.full(256, 1000 + i), tile]).ravel() for i, tile in enumerate(tiles)])


def rounds():
    return np.repeat(1000 + np.arange(6), 128)


def registers():
    held = mix(np.arange(208 * 256)).reshape(208, 256)
    digest = np.zeros(256, np.uint32)
    for row in held[::-1]:
        digest = (digest ^ row) * np.uint32(0x01000193)
    return np.concatenate([np.arange(128), digest])


def accumulate():
    q, k = few(0, 64, 64), few(70000, 64, 64)
    held = np.arange(128)[:, None] * 1000 + np.arange(32)
    first = in_registers(q[:, :16] @ k[:, :16].T).view(np.float32) + held.ravel()
    return np.concatenate([words(first), in_registers(q[:, 16:32] @ k[:, 16:32].T)])


def chain():
    scores = few(0, 64, 64) @ few(70000, 64, 64).T
    return np.concatenate([in_registers(scores), in_registers(1000 + scores @ bit(64, 64))])


def from_rows(*rows):
    return [(128 * i, 64 * (i % 2), i % 3, row) for i, row in enumerate(rows)]


DERIVED = {
    "numbers": numbers,
    "box_of_a_tile": lambda: copied([(0, 64, 1, 37)], 128, 16384),
    "boxes_of_8_rows": lambda: copied([(0, 0, 2, 3), (1024, 64, 0, 101), (3072, 0, 1, 58)], 8, 4096),
    "boxes_of_a_row": lambda: copied(
        [*from_rows(7, 3, 290, 0, 64, 64, 64, 12), (1024 + 640, 64, 2, 33), (1024 + 256, 0, 1, 150)], 1, 2048
    ),
    "boxes_past_the_end": lambda: np.concatenate([
        copied([(0, 0, 2, 260)], 128, 16384),
        copied([(0, 0, 0, 297), (1024, 64, 1, 300), (2048, 0, 0, 5000)], 8, 3072),
        copied([(384, 64, 2, 299), (640, 64, 2, 300)], 1, 1024),
    ]),
    "boxes_before_the_start": lambda: copied(
        [(0, 0, 1, -5), (1024, 64, -1, 20), (2048, -16, 1, 20), (3072, 96, 2, 20)], 8, 4096
    ),
    "pool_of_heads_apart": lambda: copied([(0, 64, 2, 151)], 128, 16384),
    "pool_of_padded_rows": lambda: copied([(0, 64, 2, 11)], 128, 16384, rows=140),
    "phases": lambda: np.concatenate(
        [np.arange(6), copied([(0, 0, 1, 40), (1024, 64, 2, 90)], 8, 2048)]
    ),
    "ring": ring,
    **dict.fromkeys(("handoff_by_lane", "handoff_by_lanes"), rounds),
    "turns": lambda: np.array([group << 16 | turn for turn in range(6) for group in range(2)]),
    "registers": registers,
    "accumulate": accumulate,
    "accumulators": lambda: in_registers(256 * np.arange(64)[:, None] + np.arange(176)),
    "scores_64": lambda: slabs(64, 128, 2),
    "scores_128": lambda: slabs(128, 128, 2),
    "scores_176": lambda: slabs(176, 128, 1),
    "scores_narrow": lambda: slabs(64, 64, 1),
    "fp16": lambda: in_registers(few(0, 64, 64) @ few(70000, 176, 64).T),
    "turned_scores": lambda: in_registers(few(0, 64, 128) @ few(70000, 128, 128).T),
    "partly_turned_scores": lambda: in_registers(few(0, 64, 128) @ few(70000, 128, 128).T),
    "values_64": lambda: values(64, 128),
    "values_128": lambda: values(128, 128),
    "values_176": lambda: values(176, 128),
    "values_narrow": lambda: values(176, 64),
    "chain": chain,
}  # fmt: skip


@pytest.mark.parametrize("fact", DERIVED)
def test_the_host_gives_the_bits_kept_and_they_follow_from_the_facts(load, on_host, fact):
    run, library = load("conformance_run"), load("conformance_run").load(on_host)
    kept = load("conformance").expected_words()[fact]
    np.testing.assert_array_equal(kept, DERIVED[fact]())
    for seed in SEEDS:
        library.cuda_on_host_seed(ctypes.c_uint64(seed))
        np.testing.assert_array_equal(np.frombuffer(run.run(library, fact), "<u4"), kept)


def test_a_slot_given_back_before_it_is_read_is_a_race(load, on_host):
    run = load("conformance_run")
    with pytest.raises(
        RuntimeError, match=r"race on .* store_shared at conformance/handoff.cuh:\d+ writes over what load_shared"
    ):
        run.run(run.load(on_host), "handoff_too_early")


def test_every_fact_has_its_kernel_its_words_and_its_bits(load, on_host):
    run, conformance = load("conformance_run"), load("conformance")
    assert list(run.names(run.load(on_host))) == list(conformance.FACTS) == list(conformance.expected_words())
    assert list(conformance.FACTS) == list(DERIVED)
    with pytest.raises(RuntimeError, match="no fact is called nothing"):
        run.run(run.load(on_host), "nothing")


@pytest.fixture
def on_gpu(load, on_host, monkeypatch):
    """conformance.py where the host stands for a GPU."""
    conformance = load("conformance")
    monkeypatch.setattr(conformance, "why_not", lambda: None)
    monkeypatch.setattr(conformance, "compile_for_gpu", lambda folder: on_host)
    monkeypatch.setattr(conformance, "environment", lambda device: {"device": "host"})
    return conformance


def test_the_script_says_of_each_fact_that_it_holds(load, on_gpu, tmp_path, capsys):
    lines = tmp_path / "lines.jsonl"
    assert on_gpu.main(["--jsonl", str(lines), "--json", "-"]) == 0
    said, progress = capsys.readouterr()
    assert re.findall(r"^ok      (\w+)$", progress, re.M) == list(on_gpu.FACTS)
    assert f"{len(on_gpu.FACTS)} of {len(on_gpu.FACTS)} facts hold" in progress
    figures = [json.loads(line) for line in lines.read_text().splitlines()]
    assert json.loads(said) == {"command": "conformance", "figures": figures}
    assert [figure["case"] for figure in figures] == list(on_gpu.FACTS)
    assert {(f["bench"], f["status"], f["reason"], f["differing"]) for f in figures} == {("conformance", "ok", None, 0)}
    assert load("common").measured_in(lines) == []  # nothing to draw or to compare


def test_the_script_says_what_does_not_hold(on_gpu, monkeypatch, tmp_path, capsys):
    kept = on_gpu.expected_words()
    kept["boxes_of_a_row"][[5, 9]] = element(7, 0, 33), 0
    kept["values_176"][88] = words(3)[0]
    kept["chain"][128 * 32 + 3] = 0x7FFFFFFF
    monkeypatch.setattr(on_gpu, "expected_words", lambda: kept)
    lines = tmp_path / "lines.jsonl"
    assert on_gpu.main(["--jsonl", str(lines)]) == 1
    said = capsys.readouterr().out
    wrong = dict(re.findall(r"^FAILED  (\w+): (.*)$", said, re.M))
    assert list(wrong) == ["boxes_of_a_row", "values_176", "chain"]
    assert wrong["boxes_of_a_row"].startswith(
        "2 of 512 words differ: word 5: row 7 head 0 columns 10-11 in place of row 7 head 0 columns 66-67; "
        "word 9: row 7 head 0 columns 18-19 in place of zeros. Not shown to hold here: a box of one row"
    )
    assert re.match(r"1 of 8192 words differ: thread 1, d\[24\]: 0b\d+ in place of 0b11\.", wrong["values_176"])
    assert re.search(r"thread 0, d\[3\], time 2: \d+ in place of 0x7fffffff\.", wrong["chain"])
    statuses = [json.loads(line)["status"] for line in lines.read_text().splitlines()]
    assert statuses.count("wrong") == 3 and statuses.count("ok") == len(statuses) - 3


FAKE = r"""
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <unistd.h>
extern "C" const char* conformance_fact(int) { return nullptr; }
extern "C" int conformance_run(const char* name, uint32_t* words, int, char* message, int) {
    if (!strncmp(name, "hangs", 5)) sleep(60);
    if (!strcmp(name, "dies")) abort();
    if (!strcmp(name, "fails")) return strcpy(message, "the kernel failed:\nan illegal address"), -1;
    words[0] = name[0];
    return 1;
}
"""


@pytest.mark.skipif(cuda_on_host.COMPILER is None, reason="no C++ compiler is on the PATH")
def test_a_fact_that_hangs_or_fails_takes_no_other_with_it(load, tmp_path):
    conformance, source, library = load("conformance"), tmp_path / "fake.cpp", tmp_path / "fake.so"
    source.write_text(FAKE)
    subprocess.run([cuda_on_host.COMPILER, "-shared", "-fPIC", source, "-o", library], check=True)

    def outcomes(*facts):
        found = conformance.run_apart(library, facts, seconds=0.5, start=1)
        return [
            (name, got.status, got.reason) if isinstance(got, conformance.Outcome) else got[0] for name, got in found
        ]

    assert outcomes("a", "hangs", "b", "dies", "fails", "c") == [
        ord("a"), ("hangs", "hung", "not done after 0.5 s"), ord("b"),
        ("dies", "failed", "the process ended with status -6"),
        ("fails", "failed", "the kernel failed: an illegal address"), ord("c"),
    ]  # fmt: skip
    many = outcomes("hangs", "hangs 2", "hangs 3", "a")
    assert [status for _, status, _ in many] == ["hung"] * 3 + ["left out"]
    one = conformance.judge("turns", conformance.Outcome("turns", "hung", "why"), np.zeros(1))
    assert (one.status, one.reason) == ("hung", "why")
    assert conformance.judge("turns", np.zeros(3), np.zeros(4)).status == "failed"


def test_without_a_gpu_of_the_kind_the_script_says_so(load, monkeypatch, capsys):
    conformance = load("conformance")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert conformance.main([]) == 0
    assert "skipped: there is no GPU" in capsys.readouterr().out
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (10, 0))
    assert conformance.main([]) == 0
    assert "skipped: these are facts of sm_90, and the GPU is of sm_100" in capsys.readouterr().out
    monkeypatch.setattr(conformance, "find_nvcc", lambda: None)
    assert conformance.main(["--compile"]) == 2
    assert "nvcc was not found" in capsys.readouterr().err


SANITIZER = """#!{python}
import subprocess, sys
tool, racecheck, *command = sys.argv[1:]
kernel = command[-1]
if kernel == "handoff_too_early":  # which the host does not run to its end
    print(kernel)
elif "failed " + kernel != {silent!r}:
    subprocess.run(command, check=True)
if kernel != {silent!r}:
    print("========= RACECHECK SUMMARY: %d hazards displayed (1 error, 0 warnings)" % {found}.get(kernel, 0))
"""


@pytest.mark.parametrize(
    "found, silent, status, says",
    [
        ({"handoff_too_early": 1, "handoff_by_lane": 324, "ring": 9}, "", 0, "does not take one lane's arrival"),
        ({"handoff_too_early": 1, "handoff_by_lane": 3}, "", 0, "does not take one lane's arrival"),
        ({"handoff_too_early": 1}, "", 0, "follows both ways"),
        ({"handoff_too_early": 1, "handoff_by_lane": 3, "handoff_by_lanes": 2}, "", 0, "does not follow barriers"),
        ({"handoff_by_lane": 3}, "", 1, "finds no race here"),
        ({"handoff_too_early": 1}, "ring", 2, "racecheck of ring gave no count"),
        ({"handoff_too_early": 1}, "failed ring", 2, "racecheck of ring gave no count"),
    ],
)
def test_what_racecheck_makes_of_the_protocol(load, on_gpu, monkeypatch, tmp_path, capsys, found, silent, status, says):
    racecheck, lines, tool = load("racecheck"), tmp_path / "lines.jsonl", tmp_path / "compute-sanitizer"
    monkeypatch.setattr(racecheck, "environment", lambda device: {"device": "host"})
    tool.write_text(SANITIZER.format(python=sys.executable, found=found, silent=silent))
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert racecheck.main(["--jsonl", str(lines)]) == status
    said = capsys.readouterr()
    assert says in said.out + said.err
    figures = [json.loads(line) for line in lines.read_text().splitlines()]
    want = {kernel: found.get(kernel, 0) for kernel in racecheck.KERNELS}
    assert {f["case"]: f["hazards"] for f in figures} == (
        {**want} if status < 2 else {k: want[k] for k in list(want)[:2]}
    )
    assert load("common").measured_in(lines) == []
    assert want == {k: int(n) for n, k in re.findall(r"^ *(\d+) hazards  (\w+):", said.out, re.M)} or status == 2


def test_racecheck_is_left_out_without_its_tool_or_a_gpu(load, on_gpu, monkeypatch, tmp_path, capsys):
    racecheck = load("racecheck")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert racecheck.main([]) == 0
    assert "racecheck: skipped: compute-sanitizer is not on the PATH" in capsys.readouterr().out
    monkeypatch.setattr(on_gpu, "why_not", lambda: "there is no GPU")
    assert racecheck.main([]) == 0
    assert "racecheck: skipped: there is no GPU" in capsys.readouterr().out


@NVCC
def test_the_kernels_compile_without_spills_and_hold_the_registers_they_are_to_hold(load, tmp_path):
    conformance = load("conformance")
    assert conformance.compile_for_gpu(tmp_path).exists()
    cubin = tmp_path / "conformance.cubin"
    command = ["nvcc", "-cubin", "-O3", "-std=c++17", "-gencode=arch=compute_90a,code=sm_90a", "-Xptxas=-v"]
    command += ["-Werror=all-warnings", f"-I{cuda_on_host.CSRC}", str(conformance.SOURCES / "conformance.cu")]
    done = subprocess.run([*command, "-o", str(cubin)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not re.search(r"C75\d\d|[1-9]\d* bytes (stack|spill)", done.stderr), done.stderr  # C75..: products in series
    text = disassembled(cubin)
    parts = {part.partition(",")[0]: part for part in re.split(r"\.section\s+\.text\.", text)[1:]}
    (code,) = (part for name, part in parts.items() if "registers_kernel" in name)
    taken, held = code.index("USETMAXREG.TRY_ALLOC"), 208
    assert held < max(map(int, re.findall(r"\bR(\d+)\b", code[taken:]))) < 240
