"""Random memories, saved at any chunk, go on bit for bit: of every mode, policy and kind of bank."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from random_rollouts import HEAD_DIM, configs, fuzz
from saved_files import begin, same_state, walk

from worldkv_kernels import MemoryConfig, Rope3D, WorldMemory
from worldkv_kernels.actions import ActionIntegrator
from worldkv_kernels.memory.retrieval import (
    ActionRetrieval,
    ContentRetrieval,
    FovRetrieval,
    OfficialPoseRetrieval,
    PoseRetrieval,
)

AFTER = 20  # chunks
diversities = st.sampled_from([0.0, 0.3, 1.0])
POLICIES = {
    "pose": st.just("pose") | st.builds(PoseRetrieval, diversity=diversities),
    "fov": st.just("fov")
    | st.builds(
        FovRetrieval,
        depth_range=st.sampled_from([(0.5, 9.0), (1.0, 50.0)]),
        image_size=st.sampled_from([None, (64, 96)]),
        diversity=diversities,
        samples=st.sampled_from([1, 16]),
    ),
    "action": st.just("action")
    | st.builds(
        ActionRetrieval,
        st.builds(ActionIntegrator, layout=st.sampled_from(["universal", "gta_drive", "templerun"])),
        diversity=diversities,
    ),
    "official": st.builds(OfficialPoseRetrieval),
    "content": st.just("content") | st.builds(ContentRetrieval, skip_newest=st.integers(0, 5), diversity=diversities),
}
BASELINES = ("full", "sliding", "sink_recent")


@st.composite
def longer(draw, kind: str) -> MemoryConfig:
    """Random configs of a policy, or a baseline, that can make the chunks: the pool of "full" has room for them."""
    mode = kind if kind in BASELINES else "worldkv"
    config = draw(configs(mode=mode, any_bits=True, retrieval=draw(POLICIES.get(kind, st.one_of(*POLICIES.values())))))
    fields = {"bank_sink": draw(st.booleans()), "rebase_sink": draw(st.booleans()), "prefetch": draw(st.booleans())}
    if config.rope is not None:
        fields["rope"] = Rope3D(HEAD_DIM, draw(st.sampled_from([config.rope.theta, 77.0])), config.rope.pairs)
    if config.mode == "full":
        fields["bank_chunks"] = 60
    if draw(st.booleans()):
        fields["device_slots"] = config.retrieved_chunks + draw(st.integers(1, 3))
    return replace(config, **fields)


def chunk_of_interest(config: MemoryConfig):
    """Before and after the sink, the recent frames and the bank are full, mostly."""
    recent = config.recent_chunks + config.gap_chunks
    full = config.sink_chunks + recent + min(config.bank_chunks or 6, 12)
    edges = [0, config.sink_chunks, recent, config.sink_chunks + recent, full, full + 1, full + 4]
    return st.integers(0, 20) | st.sampled_from([min(20, edge) for edge in edges])


@pytest.mark.parametrize("examples", [6, pytest.param(60, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", [*POLICIES, *BASELINES])
def test_saved_at_any_chunk_it_goes_on_bitwise(kind, examples, tmp_path):
    banks = set()

    @fuzz(examples)
    @given(st.data())
    def check(data):
        config, file = data.draw(longer(kind)), tmp_path / "walk.worldkv"
        dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
        chunk = data.draw(chunk_of_interest(config))
        memory = WorldMemory(config, dtype=dtype, backend="reference")
        turns = data.draw(st.booleans())
        walk(memory, chunk, turns=turns)
        if data.draw(st.booleans()):  # one that is dropped leaves no trace
            begin(memory, chunk)
            memory.abort_chunk()
        memory.save(file)
        other_bank = "host" if config.bank == "device" else "device"
        loaded = WorldMemory.load(file, backend="reference")
        moved = WorldMemory.load(file, backend="reference", bank=other_bank, prefetch=not config.prefetch)
        forked = memory.fork()
        assert same_state(loaded, memory) and same_state(forked, memory)
        assert loaded.config.rope == config.rope and loaded.stats()["bank_capacity"] == memory.stats()["bank_capacity"]
        want = walk(memory, AFTER, turns=turns)
        for other in (loaded, moved, forked):
            assert all(torch.equal(a, b) for a, b in zip(walk(other, AFTER, turns=turns), want, strict=True))
            assert results(other) == results(memory)
        banks.add(config.bank)

    check()
    assert banks == {"device", "host"}


def results(memory: WorldMemory) -> dict[str, int]:
    """Of stats, those that the place of rows does not change."""
    names = ("chunks", "tokens_attended", "chunks_retrieved", "chunks_banked", "chunks_dropped", "kept_bytes")
    return {name: memory.stats()[name] for name in names}
