"""Every Triton kernel compiles at its shipped configurations, without spills, for GPUs that need not be there."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton", reason="triton is not installed")


SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}  # CUDA programming guide, per block
# Spilled loads and stores, none in a loop over tiles, with Triton 3.6 and 3.9: 2 with mass on sm_120, 37 where sm_90
# reads by pointers for the mass, a few in fp32. None in compress_chunk.
SPILLS = {"mass": 2, "mass pointers": 40, "float32": 8}
COMPRESS_KERNELS = {
    "anchor_mean_kernel", "similarity_kernel", "norms_kernel", "nearest_kernel", "reduce_kernel", "select_kernel",
    "gather_kernel", "root_kernel", "alike_kernel", "link_kernel", "merge_kernel",
}  # fmt: skip
QUANTIZE_KERNELS = {"quantize_8_kernel", "quantize_4_kernel", "dequantize_8_kernel", "dequantize_4_kernel"}


EVERY = [pytest.param((arch, "--every"), marks=pytest.mark.slow, id=f"sm_{arch}, every") for arch in SHARED_LIMIT]


@pytest.fixture(scope="module", params=[(90,), *EVERY], ids=["sm_90", *(param.id for param in EVERY)])
def compiled(request):
    """An architecture, and all kernels compiled for it in a child process, since this one may have put Triton into its
    interpreter. One architecture by default: it takes a minute of a processor or more."""
    script = Path(__file__).with_name("compile_kernels.py")
    done = subprocess.run(
        [sys.executable, str(script), *map(str, request.param)],
        env={**os.environ, "TRITON_INTERPRET": "0"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return request.param[0], json.loads(done.stdout)


def test_every_kernel_compiles_without_spills_and_fits(compiled):
    arch, entries = compiled
    assert {entry["kernel"] for entry in entries} == {
        "segment_attention_kernel", "merge_pieces_kernel", "participation_kernel", "gather_window_kernel",
        "norm_rope_append_kernel",
        *COMPRESS_KERNELS, *QUANTIZE_KERNELS,
    }  # fmt: skip
    for entry in entries:
        limit = max((spills for word, spills in SPILLS.items() if word in entry["case"]), default=0)
        if entry["kernel"] in {*COMPRESS_KERNELS, *QUANTIZE_KERNELS, "gather_window_kernel", "participation_kernel"}:
            limit = 0
            assert entry["stack_bytes"] == 0, entry
        assert entry["spills"] <= limit and entry["spills_in_matrix_loops"] == 0, entry
        assert entry["shared_bytes"] <= SHARED_LIMIT[arch], entry


def test_the_products_of_the_nearest_rule_keep_the_matrix_unit_fed(compiled):
    """Each architecture's matrix instructions, fed by copies that no thread waits for in its registers."""
    arch, report = compiled
    entries = [e for e in report if e["kernel"] == "nearest_kernel"]
    half = [e for e in entries if "float32" not in e["case"]]
    assert len(half) == 3 and len(entries) == 4
    instruction = {80: "mma", 90: "wgmma", 100: "tcgen05", 120: "mma"}
    for entry in half:
        assert entry[instruction[arch]] > 0 and entry["async_copies"] > 0, entry
        assert arch != 90 or (entry["mma"] == 0 and entry["warpgroup_starts_in_matrix_loops"] == 1), entry


def test_chunks_are_packed_and_restored_in_pieces_of_16_bytes(compiled):
    """All but scales and minima, a number a row or a channel."""
    _, report = compiled
    entries = [e for e in report if e["kernel"] in QUANTIZE_KERNELS]
    assert len(entries) == 2 * 9 + 4
    assert sum("by a table" in entry["case"] for entry in entries) == 4
    for entry in entries:
        assert entry["registers"] <= 96 and entry["shared_bytes"] <= 16 * 1024, entry
        assert entry["wide_loads"] >= 1 and entry["wide_stores"] >= 1, entry
        scales = {"quantize_8_kernel": 1, "quantize_4_kernel": 2}.get(entry["kernel"], 0)
        assert entry["narrow_stores"] <= scales, entry


def test_attention_issues_the_matrix_instructions_of_each_architecture(compiled):
    """On Hopper each of the two products is started once: where ptxas finds fault with a loop (its warning C7515), it
    has every matrix instruction wait for the last."""
    arch, report = compiled
    attention = [e for e in report if e["kernel"] == "segment_attention_kernel" and "float32" not in e["case"]]
    instruction = {80: "mma", 90: "wgmma", 100: "tcgen05", 120: "mma"}
    assert attention
    for entry in attention:
        assert entry[instruction[arch]] > 0, entry
        assert arch != 90 or (entry["mma"] == 0 and entry["warpgroup_starts_in_matrix_loops"] == 2), entry
        assert (entry["bulk_copies"] > 0) == (arch == 90 and "pointers" not in entry["case"]), entry


def test_attention_takes_every_exponential_once(compiled):
    """One a score and two a row of the rescaling, in the loops over tiles; the special function unit is slow."""
    arch, report = compiled
    attention = [e for e in report if e["kernel"] == "segment_attention_kernel" and "float32" not in e["case"]]
    assert attention
    for entry in attention:
        assert entry["exponentials_in_matrix_loops"] <= entry["scores_a_thread"] + 4, entry
        assert arch != 90 or entry["exponentials_in_matrix_loops"] >= entry["scores_a_thread"], entry


def test_participation_leaves_a_processor_room_for_several_programs(compiled):
    """Of 64 K registers; of shared memory; one product and one exponential a score in the loop over queries."""
    arch, report = compiled
    entries = [e for e in report if e["kernel"] == "participation_kernel"]
    half = [e for e in entries if "float32" not in e["case"]]
    assert len(half) == 4 and len(entries) == 5
    instruction = {80: "mma", 90: "wgmma", 100: "tcgen05", 120: "mma"}
    for entry in half:
        warps = 8 if arch == 100 and "shift" in entry["case"] else 4
        programs = 1 if warps == 8 else 2 if "shift" in entry["case"] else 3
        assert programs * 32 * warps * -(-entry["registers"] // 8) * 8 <= 65536, entry
        assert min(programs, 2 if arch == 120 else 3) * entry["shared_bytes"] <= SHARED_LIMIT[arch], entry
        assert entry[instruction[arch]] > 0 and entry["async_copies"] > 0, entry
        assert arch != 90 or (entry["mma"] == 0 and entry["warpgroup_starts_in_matrix_loops"] == 1), entry
        assert arch == 100 or entry["exponentials_in_matrix_loops"] == entry["scores_a_thread"], entry
