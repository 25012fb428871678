"""A bank in host memory makes bitwise what one on the device does, on the streams of a GPU where there is one.

Copies and passes are delayed at random, and what is to be copied over is filled with NaN, or bytes that stand for it,
first: rows that are read too early, or overwritten while they are still read, change what comes out.
tests/test_bank_order.py looks for the same on a CPU, by a model of streams.
"""

import math
import random

import pytest
import torch
from conftest import DEVICE
from tiny_memory import jumps

import worldkv_kernels.memory.slots as slots_module
from worldkv_kernels import MemoryConfig, WorldMemory
from worldkv_kernels.memory.streams import LOAD, CopyEngine

ON_GPU = DEVICE.type == "cuda"
CHUNKS, LAYERS, HEADS = (40, 4, 8) if ON_GPU else (20, 2, 1)
GRID = (16, 26) if ON_GPU else (2, 3)  # on a GPU 5 MB of K and V a chunk and layer, of which half are kept


class SlowEngine(CopyEngine):
    """Waits on its stream before a copy, after spoiling what a load is to fill."""

    def __init__(self, seed: int, *args: object) -> None:
        super().__init__(*args)
        self.random = random.Random(seed)

    def copy(self, pairs, stream):
        with torch.cuda.stream(self._streams.get(stream)):  # of None, on a CPU: nothing
            if stream == LOAD:
                for target, _ in pairs:
                    target.fill_(math.nan if target.is_floating_point() else 255)
            if ON_GPU:
                torch.cuda._sleep(self.random.choice([1, 1, 10**5, 10**6]))
        super().copy(pairs, stream)


def outputs(poses, **options) -> tuple[list[torch.Tensor], dict[str, int]]:
    config = MemoryConfig(
        num_layers=LAYERS, num_heads=HEADS, head_dim=128, grid=GRID, recent_frames=3, retrieved_chunks=3,
        keep_ratio=0.5, bank_chunks=12, **options,
    )  # fmt: skip
    memory = WorldMemory(config, device=DEVICE, dtype=torch.bfloat16 if ON_GPU else torch.float32)
    delays, outs = random.Random(1), []
    for chunk in range(CHUNKS):
        generator = torch.Generator(DEVICE).manual_seed(chunk)
        shape = (LAYERS, 3, config.chunk_tokens, HEADS * 128)
        x = torch.randn(shape, generator=generator, device=DEVICE, dtype=memory.dtype)
        memory.begin_chunk(poses[chunk])
        for _ in range(2):
            for layer in range(LAYERS):
                if ON_GPU:
                    torch.cuda._sleep(delays.choice([1, 1, 10**5, 10**6]))
                out = memory.attend(layer, *x[layer])
        outs.append(out)
        memory.end_chunk()
    return outs, memory.stats()


@pytest.mark.parametrize("prefetch", [True, False])
@pytest.mark.parametrize("device_slots", [4, 7])
@pytest.mark.parametrize("bits", [16, 8, 4])
def test_a_host_bank_is_the_device_bank_whatever_is_late(monkeypatch, bits, device_slots, prefetch):
    poses = jumps(5, CHUNKS)
    wanted, _ = outputs(poses, bank_bits=bits)
    monkeypatch.setattr(slots_module, "CopyEngine", lambda *args: SlowEngine(device_slots, *args))
    got, stats = outputs(poses, bank="host", bank_bits=bits, device_slots=device_slots, prefetch=prefetch)
    assert stats["host_misses"] + stats["prefetch_hits"] > CHUNKS // 2 and stats["chunks_dropped"] > 0
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))
