"""Traces: what a kernel or an operation counts as, idle time, launches, copies; and the ranges they come from."""

import json
import os
import subprocess
import sys

import pytest
import torch

from worldkv_kernels import WorldMemory, ranges
from worldkv_kernels.models.rollout import rollout
from worldkv_kernels.models.small_world import SmallWorld, SmallWorldConfig
from worldkv_kernels.trajectory import latent_poses, load

CPU = torch.device("cpu")


@pytest.fixture
def traces(load):
    return load("traces")


def event(cat, name, ts, dur, tid=1, **args):
    return {"ph": "X", "cat": cat, "name": name, "pid": 1, "tid": tid, "ts": ts, "dur": dur, "args": args}


def launch(ts, correlation, name="cudaLaunchKernel"):
    return event("cuda_runtime", name, ts, 1, correlation=correlation)


def kernel(ts, dur, correlation, cat="kernel", name="k", **args):
    return event(cat, name, ts, dur, tid=7, correlation=correlation, **args)


REGION = event("user_annotation", "worldkv.traced a case", 100, 1000)


def test_a_kernel_belongs_to_where_it_was_launched(traces):
    events = [
        REGION,
        # The reference's own matrix product, in an op of ours: attention.
        event("cpu_op", "worldkv::segment_attention", 110, 40), event("cpu_op", "aten::mm", 120, 10), launch(121, 1),
        kernel(300, 100, 1),
        event("cpu_op", "aten::linear", 160, 20), event("cpu_op", "aten::addmm", 162, 10), launch(163, 2),
        kernel(400, 200, 2),
        event("user_annotation", "worldkv.norm_rope_append", 190, 10), launch(191, 3, "cuLaunchKernelEx"),
        kernel(600, 30, 3),
        event("user_annotation", "worldkv.end_chunk", 210, 60),
        event("cpu_op", "worldkv::compress_chunk", 220, 20), launch(225, 4), kernel(630, 20, 4),
        event("cpu_op", "aten::gelu", 280, 5), launch(281, 5), kernel(660, 40, 5),
        launch(290, 6, "cudaMemcpyAsync"), kernel(500, 50, 6, "gpu_memcpy", "Memcpy HtoD (Pinned)", bytes=640),
        launch(291, 7, "cudaMemsetAsync"), kernel(700, 10, 7, "gpu_memset", "Memset"),
        launch(295, 8, "cudaGraphLaunch"),
    ]  # fmt: skip
    got = traces.breakdown(reversed(events))
    assert {kind: round(seconds * 1e6) for kind, seconds in got.kinds.items()} == {
        "attention": 100, "matmuls": 200, "norm and rope": 30, "compression": 20, "copies": 50, "elementwise": 50,
    }  # fmt: skip
    assert list(got.kinds) == list(traces.ORDER)
    assert got.wall == pytest.approx(1e-3)
    # 300..650 without a gap (the copy lies within), 660..710.
    assert got.idle == pytest.approx((1000 - 350 - 50) * 1e-6)
    assert got.launches == 6
    assert got.copied == {"HtoD": 640}


def test_kernels_of_a_graph_are_told_by_their_names(traces):
    events = [
        REGION, launch(110, 1, "cudaGraphLaunch"),
        kernel(200, 40, 1, name="void segment_attention_kernel<128>"), kernel(240, 30, 1, name="nvjet_tst_128x256"),
        kernel(270, 20, 1, name="cudnn_generated_fort_native_sdpa_sm90_flash_fprop"),
        kernel(290, 10, 1, name="norm_rope_append_kernel"), kernel(300, 5, 1, name="void at::native::add"),
        launch(120, 2), kernel(305, 7, 2, name="a gemm, but launched by no known operation"),
    ]  # fmt: skip
    got = traces.breakdown(events)
    assert {kind: round(seconds * 1e6) for kind, seconds in got.kinds.items() if seconds} == {
        "attention": 60, "matmuls": 30, "norm and rope": 10, "elementwise": 12,
    }  # fmt: skip
    assert got.launches == 2


def test_what_lies_outside_the_region_does_not_count(traces):
    events = [
        REGION,
        launch(50, 1), kernel(80, 100, 1), launch(1200, 2), kernel(1250, 10, 2),
        {**launch(200, 3), "tid": 2}, kernel(300, 10, 3),  # another thread
        launch(1090, 4), kernel(1050, 100, 4),  # ends after the region: all of it counts, 50 us are in it
    ]  # fmt: skip
    got = traces.breakdown(events)
    assert got.kinds["elementwise"] == pytest.approx(100e-6)
    assert got.launches == 1
    assert got.idle == pytest.approx(950e-6)


def test_synchronisations_without_the_benchs_own(traces):
    events = [
        REGION, launch(110, 1), kernel(200, 10, 1),
        launch(120, 2, "cudaStreamSynchronize"), launch(130, 3, "cudaMemcpy"), launch(135, 9, "cudaMemcpyAsync"),
        launch(140, 4, "cudaEventSynchronize"), launch(145, 5, "cudaEventQuery"),
        event("user_annotation", "worldkv.wait", 900, 50), launch(910, 6, "cudaDeviceSynchronize"),
    ]  # fmt: skip
    assert traces.breakdown(events).synchronisations == 3


def test_on_a_cpu_an_operations_own_time_counts(traces):
    events = [
        REGION,
        event("cpu_op", "worldkv::segment_attention", 110, 100), event("cpu_op", "aten::softmax", 120, 30),
        event("cpu_op", "aten::linear", 300, 50), event("cpu_op", "aten::add", 400, 20),
        event("cpu_op", "aten::add", 2000, 20),
    ]  # fmt: skip
    got = traces.breakdown(events)
    assert {kind: round(seconds * 1e6) for kind, seconds in got.kinds.items() if seconds} == {
        "attention": 100, "matmuls": 50, "elementwise": 20,
    }  # fmt: skip
    assert got.idle == pytest.approx(830e-6)
    assert (got.launches, got.synchronisations, got.copied) == (None, None, {})


def test_kernels_without_a_launch_are_told(traces):
    with pytest.raises(ValueError, match="must hold the launches of 1 kernels and copies, got none"):
        traces.breakdown([REGION, kernel(300, 10, 3)])


@pytest.mark.parametrize("events, count", [([], 0), ([REGION, REGION], 2)])
def test_one_region_is_wanted(traces, events, count):
    with pytest.raises(ValueError, match=f"must hold one traced region, got {count}"):
        traces.breakdown(events)


def test_a_chunk_is_traced_with_its_phases(traces, tmp_path):
    model = SmallWorld.random(SmallWorldConfig(num_layers=1), device="cpu", dtype=torch.float32)
    memory = WorldMemory(model.config.memory(bank_chunks=6, retrieved_chunks=2, bank="host"), dtype=torch.float32)
    chunks = rollout(model, memory, *latent_poses(load("right*40,left*40")))
    for _ in range(5):
        next(chunks)
    kept = tmp_path / "new" / "trace.json"
    with traces.recorded("chunk 5", CPU, keep=kept) as events:
        next(chunks)
    names = {e["name"] for e in events if e.get("cat") == "user_annotation"}
    assert {name.removeprefix("worldkv.") for name in names} == {
        "traced chunk 5", "begin_chunk", "prepare_chunk", "pass_0", "pass_1", "clean_pass",
        "norm_rope_append", "segment_attention", "end_chunk", "compress_chunk", "bank_copy_in", "bank_prefetch",
        "bank_copy_out",
    }  # fmt: skip
    got = traces.breakdown(events)
    assert all(got.kinds[kind] > 0 for kind in traces.ORDER)
    assert sum(got.kinds.values()) + got.idle == pytest.approx(got.wall)
    with traces.recorded("chunk 6", CPU, keep=kept):
        next(chunks)
    joined = json.loads(kept.read_text())
    regions = [e for e in joined["traceEvents"] if e.get("name", "").startswith("worldkv.traced")]
    assert [e["name"] for e in regions] == ["worldkv.traced chunk 5", "worldkv.traced chunk 6"]
    assert regions[0]["ts"] + regions[0]["dur"] <= regions[1]["ts"]  # one base of time
    assert not ranges.enable(False)  # left as it was


def test_ranges_are_off_by_default_and_reach_the_profiler_when_on():
    def seen():
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
            add(1, 2)
        return [e.name for e in profiler.events() if e.name.startswith("worldkv.")]

    @ranges.ranged("adding")
    def add(a, b):
        """Adds."""
        with ranges.phase("inside"):
            return torch.tensor(a) + b

    assert add.__doc__ == "Adds." and add.__name__ == "add"
    assert seen() == []
    assert ranges.enable() is False
    try:
        assert sorted(seen()) == ["worldkv.adding", "worldkv.inside"]
    finally:
        assert ranges.enable(False) is True


def test_a_range_ends_with_an_exception():
    ranges.enable()
    try:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
            with pytest.raises(KeyError), ranges.phase("failing"):
                raise KeyError("x")
            torch.ones(1)
    finally:
        ranges.enable(False)
    (failing,) = (e for e in profiler.events() if e.name == "worldkv.failing")
    ones = next(e for e in profiler.events() if e.name == "aten::ones")
    assert failing.time_range.end <= ones.time_range.start


def test_the_environment_turns_ranges_on():
    done = subprocess.run(
        [sys.executable, "-c", "from worldkv_kernels import ranges; print(ranges.enable())"],
        env={**os.environ, "WORLDKV_RANGES": "1"}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout == "True\n"
