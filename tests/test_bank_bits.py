"""A bank in 8 and 4 bits: a memory is one whose pruned chunks are rounded, wherever they lie, and takes fewer bytes."""

from __future__ import annotations

import copy
import dataclasses
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from random_rollouts import MAX_CHUNKS, Rollout, configs, fuzz, seeds
from tiny_memory import AWAY_AND_BACK, MODEL, jumps, latents, tiny, walk

import worldkv_kernels.memory.pool as pool
import worldkv_kernels.memory.room as room
import worldkv_kernels.memory.storage as storage_module
from worldkv_kernels import MemoryConfig, WorldMemory, compress_chunk, dequantize_chunk, quantize_chunk
from worldkv_kernels.models.lingbot_config import LingBotConfig
from worldkv_kernels.ops.cuda import attention_aligned
from worldkv_kernels.tensor_file import read_header

BITS = [8, 4]


def rounding(bits: int):
    """compress_chunk, with what it keeps rounded as a bank of so many bits gives it back."""

    def compressed(k, v, *, out_k, out_v, **options):
        compress_chunk(k, v, out_k=out_k, out_v=out_v, **options)
        dequantize_chunk(quantize_chunk(out_k, out_v, bits=bits), bits=bits, out_k=out_k, out_v=out_v)

    return compressed


@pytest.mark.parametrize(("bits", "dtype"), [(8, torch.float32), (4, torch.bfloat16)])
def test_it_is_a_memory_whose_pruned_chunks_are_rounded(monkeypatch, bits, dtype):
    @fuzz(15)
    @given(configs(mode="worldkv", bank_bits=bits), seeds)
    def check(config, seed):
        def of(config: MemoryConfig) -> list[torch.Tensor]:
            memory = WorldMemory(config, dtype=dtype, backend="reference")
            rollout, made = Rollout(config, seed, MAX_CHUNKS), []
            for chunk in range(MAX_CHUNKS):
                memory.begin_chunk(rollout.poses[chunk])
                for layer, x in enumerate(rollout.passes[chunk][-1]):
                    made.append(memory.attend(layer, *(part if part is None else part.to(dtype) for part in x)))
                memory.end_chunk()
            return made

        found = of(config)
        with monkeypatch.context() as patched:
            patched.setattr(storage_module, "compress_chunk", rounding(bits))
            wanted = of(dataclasses.replace(config, bank_bits=16, bank="device"))
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))

    check()


@pytest.mark.parametrize("bits", BITS)
def test_chunks_do_not_depend_on_where_they_lie(bits):
    """Nor on how many slots are a cache of a host bank, or on what is brought ahead."""
    out_and_back = AWAY_AND_BACK[0][:180]
    want = latents(tiny(bank_bits=bits), out_and_back)
    for fields, ahead in (({}, True), (dict(device_slots=3), False), (dict(prefetch=False), False)):
        memory = tiny(bank="host", bank_bits=bits, **fields)
        assert torch.equal(latents(memory, out_and_back), want)
        stats = memory.stats()
        assert stats["host_copies_in"] > 0 and (stats["prefetched"] > 0) == ahead
        assert stats["host_bytes_in"] * stats["host_copies_out"] == stats["host_bytes_out"] * stats["host_copies_in"]
    assert not torch.equal(want, latents(tiny(), out_and_back))


@pytest.mark.parametrize("bits", BITS)
def test_it_takes_the_bytes_it_says(bits):
    """40 banked chunks of 12 tokens (6 of the first frame, half of 12), of 2 layers with a head of 64 in fp32."""
    memory, poses = tiny(bank_bits=bits, keep_ratio=0.5), jumps(1, 50)
    for chunk in range(50):
        walk(memory, chunk, poses[chunk])
    each = {8: 12 * 64 + 12 * 4, 4: 12 * 32 + 2 * 64 * 4}[bits]
    stats, whole = memory.stats(), 2 * 2 * 18 * 64 * 4
    assert (stats["chunks_banked"], stats["kept_bytes"]) == (40, 40 * 2 * 2 * each + 3 * whole)
    without = tiny(mode="sink_recent").stats()["device_bytes"]  # and of 3 retrieved chunks the rows of one layer
    assert stats["device_bytes"] - without == 40 * 2 * 2 * each + 3 * 2 * 128 * 64 * 4
    host = tiny(bank="host", bank_bits=bits, keep_ratio=0.5).stats()  # of which five are on the device
    assert host["device_bytes"] - without == 5 * 2 * 2 * each + 3 * 2 * 128 * 64 * 4


def test_a_bank_of_the_same_bytes_holds_twice_and_three_and_a_half_times_the_chunks():
    """Of LingBot-World-Fast in bf16: what a chunk takes in host memory, to the byte of MemoryConfig.bytes."""
    room = LingBotConfig().memory(bank="host", bank_chunks=100).bytes().host_bank
    holds = {}
    for bits in (16, *BITS):
        config = LingBotConfig().memory(bank="host", bank_chunks=1, bank_bits=bits, retrieved_chunks=1)
        each = config.bytes(bank_chunks=101).host_bank - config.bytes(bank_chunks=100).host_bank
        holds[bits] = room / each
    assert 1.96 < holds[8] / holds[16] < 2 and 3.5 < holds[4] / holds[16] < 3.6


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("bank", ["device", "host"])
def test_a_file_keeps_what_is_packed(bits, bank, tmp_path):
    memory, poses = tiny(bank=bank, bank_bits=bits), jumps(2, 30)
    for chunk in range(20):
        walk(memory, chunk, poses[chunk])
    memory.save(tmp_path / "walk.worldkv")
    layout, _ = read_header("test", tmp_path / "walk.worldkv")
    packed = [tensor for tensor in layout.values() if tensor.dtype == "U8" and len(tensor.shape) == 3]
    assert len(packed) == memory.stats()["chunks_banked"]
    rows = torch.zeros(2, MODEL.num_layers, memory.config.banked_tokens, MODEL.num_heads, 64)
    assert {tensor.shape for tensor in packed} == {tuple(quantize_chunk(*rows, bits=bits).shape)}
    loaded = [WorldMemory.load(tmp_path / "walk.worldkv", bank=where) for where in ("device", "host")]
    for one in loaded:
        assert (one.stats()["host_copies_out"] > 0) == (bank == one.config.bank == "host")
    others = [*loaded, memory.fork()]
    for chunk in range(20, 30):
        made = [attended(one, chunk, poses[chunk]) for one in (memory, *others)]
        assert all(other == made[0] for other in made)
    with pytest.raises(TypeError, match="bank_bits"):
        WorldMemory.load(tmp_path / "walk.worldkv", bank_bits=16)


@pytest.mark.parametrize("bank", ["device", "host"])
def test_a_copy_goes_on_alone(bank):
    """Its layers share rows of its own."""
    memory, poses = tiny(bank=bank, bank_bits=4), jumps(2, 20)
    for chunk in range(12):
        walk(memory, chunk, poses[chunk])
    pickled = pickle.dumps(memory)
    assert len(pickled) < 1.5 * sum(memory.config.bytes(memory.dtype).parts.values())  # each row once
    copies = [pickle.loads(pickled), copy.deepcopy(memory)]
    made = [[attended(one, chunk, poses[chunk]) for chunk in range(12, 20)] for one in (memory, *copies)]
    assert made[0] == made[1] == made[2]
    of_all = {x.data_ptr() for one in (memory, *copies) for x in (one._storage.pool._k, one._storage._packed.packed)}
    assert len(of_all) == 6 and all(
        one._storage.pool.shared_k.data_ptr() > one._storage.pool._k.data_ptr() for one in copies
    )


def attended(memory, chunk, poses):
    """What a chunk's layers attend, as lists, which compare."""
    qkv = torch.randn(3, 18, MODEL.dim, generator=torch.Generator().manual_seed(chunk))
    memory.begin_chunk(poses)
    made = [memory.attend(layer, *qkv).tolist() for layer in range(MODEL.num_layers)]
    memory.end_chunk()
    return made


@pytest.mark.parametrize("bank", ["device", "host"])
def test_a_chunk_that_is_pruned_more_is_packed_shorter(bank):
    memory, poses = tiny(bank=bank, bank_bits=8, keep_ratio=1.0, recent_frames=3), jumps(3, 12)
    for chunk in range(12):
        if chunk == 6:
            memory.change(keep_ratio=0.25)
        walk(memory, chunk, poses[chunk])
    tokens = list(memory._bank.tokens.values())
    assert tokens == [18] * 4 + [10] * 6
    # Of 2 layers, K and V; 18 scales take 72 bytes, which with the codes are filled up to 80, and 10 take 48.
    banked = 2 * 2 * (4 * (18 * 64 + 80) + 6 * (10 * 64 + 48))
    assert memory.stats()["kept_bytes"] == banked + 2 * 2 * 2 * 18 * 64 * 4


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("bank", ["device", "host"])
def test_a_warm_up_packs_and_restores_and_leaves_nothing(monkeypatch, bits, bank):
    called = []

    def noting(op):
        return lambda *given, **options: (called.append(op), op(*given, **options))[1]

    for op in (quantize_chunk, dequantize_chunk):
        monkeypatch.setattr(storage_module, op.__name__, noting(op))
    warm, cold = (tiny(bank=bank, bank_bits=bits) for _ in range(2))
    for one in (warm, cold):
        one._storage._packed.packed.fill_(255)
        for pool_rows in (one._storage.pool._k, one._storage.pool._v):
            pool_rows.fill_(torch.nan)
    warm.change(keep_ratio=0.2)
    warm.warm_up()
    assert set(called) == {quantize_chunk, dequantize_chunk}
    tokens = warm.config.banked_tokens
    assert not any(rows[0, :tokens].any() for rows in (warm._storage.pool.shared_k, warm._storage.pool.shared_v))
    warm.reset()
    assert warm.stats() == cold.stats()
    assert torch.equal(latents(warm, AWAY_AND_BACK[0][:60]), latents(cold, AWAY_AND_BACK[0][:60]))


@pytest.mark.parametrize("bits", [0, 2, 5, 32, True, 8.0, "8"])
def test_other_bits_are_refused(bits):
    with pytest.raises((ValueError, TypeError), match=r"^MemoryConfig: bank_bits must be "):
        tiny(bank_bits=bits)


def test_modes_without_a_bank_take_none():
    for mode in ("full", "sliding", "sink_recent"):
        for bits in BITS:
            sizes = MODEL.memory(mode=mode, bank_bits=bits, bank_chunks=20).bytes()
            assert sizes == MODEL.memory(mode=mode, bank_chunks=20).bytes() and not sizes.packed_bank + sizes.restored


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("bank", ["device", "host"])
def test_what_a_model_makes_that_is_no_number_goes_on_as_nan(bits, bank):
    """As it does in 16 bits: it is found when its chunk leaves the recent ones, when nobody could make another."""
    memory, poses = tiny(bank=bank, bank_bits=bits, retrieved_chunks=1), jumps(4, 8)
    for chunk in range(8):
        plan = memory.begin_chunk(poses[1 if chunk == 7 else chunk])
        for layer in range(MODEL.num_layers):
            qkv = torch.ones(3, 18, MODEL.dim)
            if chunk == 1:
                qkv[2, 0, 5] = float("inf")
            out = memory.attend(layer, *qkv)
        memory.end_chunk()
    assert plan.retrieved == (1,) and memory.location(1) == "bank"
    assert out[..., 5].isnan().all() and out[..., 64:].isfinite().all()


@pytest.mark.parametrize("bits", BITS)
def test_a_bank_of_unstated_size_fits_what_is_free(monkeypatch, bits):
    config = LingBotConfig().memory(bank_bits=bits)
    for module in (room, pool):
        monkeypatch.setattr(module, "free_bytes", lambda device: 60 * 2**30)
    gpu = torch.device("cuda")
    places = room.bank_places(config, gpu, torch.bfloat16)
    sizes = config.bytes(bank_chunks=places)
    each = config.bytes(bank_chunks=places + 1).device - sizes.device
    assert 30 * 2**30 - each < sizes.packed_bank <= 30 * 2**30
    room.check_room(config, gpu, torch.bfloat16, places)


@pytest.mark.parametrize(("recent_frames", "tiles"), [(3, 6), (6, 7)])
def test_tables_of_every_layer_start_on_multiples_of_16_bytes(recent_frames, tiles):
    """Which the CUDA kernel takes alone, also where the window has an odd number of tiles."""
    memory = tiny(bank_bits=8, recent_frames=recent_frames)
    assert memory.window.capacity == tiles
    k_pool, v_pool = memory.pools(1)
    for window in memory._attention.layer_windows.of_layer:
        assert attention_aligned(memory._attention.q, k_pool, v_pool, memory._attention.q, *window.tables)


def test_pruning_that_fails_is_waited_for(monkeypatch):
    """What it has queued writes rows that a pass would restore chunks to, and the chunk is still begun."""
    memory, poses, joined = tiny(bank_bits=8), jumps(1, 8), []

    def broken(*given, **options):
        raise MemoryError("no more")

    for chunk in range(3):
        walk(memory, chunk, poses[chunk])
    monkeypatch.setattr(storage_module, "quantize_chunk", broken)
    monkeypatch.setattr(memory._storage._side, "join", lambda: joined.append(memory._plan is not None))
    with pytest.raises(MemoryError):
        walk(memory, 3, poses[3])
    assert joined == [False, True]  # as the chunk begins, and where it was to end


def test_fewer_bits_take_less_of_any_bank_and_are_proposed():
    """Of LingBot-World-Fast: also of the smallest bank, whose retrieved chunks are restored a layer at a time."""
    for chunks in (6, 60):
        of_bits = {bits: LingBotConfig().memory(bank_chunks=chunks, bank_bits=bits) for bits in (16, *BITS)}
        sizes = {bits: config.bytes().device for bits, config in of_bits.items()}
        assert sizes[4] < sizes[8] < sizes[16]
        for bits in BITS:
            assert proposed_bits(of_bits[16], sizes[bits]) == [bits]
        assert proposed_bits(of_bits[4], sizes[4] - 1) == []


def proposed_bits(config, room_for):
    """Where a memory may take so many bytes."""
    found = room.changes(config, torch.bfloat16, lambda sizes: sizes.device <= room_for, device_type="cuda")
    return [fields["bank_bits"] for fields, _ in found if "bank_bits" in fields]


@pytest.mark.slow
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("bank", ["device", "host"])
def test_many_random_memories(bits, bank):
    """As pruned chunks rounded, over configs, pins and changes: a device bank and a host bank of few slots agree."""

    @fuzz(300)
    @given(configs(mode="worldkv", bank_bits=bits, bank=bank), seeds, st.data())
    def check(config, seed, data):
        few = dataclasses.replace(config, device_slots=max(1, config.retrieved_chunks), prefetch=False)
        many = dataclasses.replace(config, device_slots=config.retrieved_chunks + data.draw(st.integers(1, 9)))
        memories = [WorldMemory(one, dtype=torch.float32, backend="reference") for one in (few, many)]
        rollout = Rollout(config, seed, MAX_CHUNKS)
        for chunk in range(MAX_CHUNKS):
            a, b = (rollout.chunk(memory, chunk) for memory in memories)
            assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
            frames = data.draw(st.integers(0, config.recent_frames))
            ratio = float(np.float32(data.draw(st.sampled_from([1.0, 0.6, 0.3])))) * config.keep_ratio
            for memory in memories:
                memory.change(recent_frames=frames, keep_ratio=min(ratio, config.keep_ratio))

    check()
