"""Pruning beside the caller's stream: nothing may read what it writes, or write what it reads, before it is joined."""

import dataclasses
from contextlib import contextmanager

import pytest
import torch
from conftest import DEVICE

from worldkv_kernels import MemoryConfig, WorldMemory
from worldkv_kernels.memory import storage

CONFIG = MemoryConfig(
    num_layers=2, num_heads=2, head_dim=64, grid=(4, 5), chunk_frames=3, recent_frames=3, retrieved_chunks=2,
    bank_chunks=4, retrieval="pose",
)  # fmt: skip
CHUNKS = 9


def walk(memory, between=lambda: None):
    """What every layer of every chunk gave; `between` is called after each chunk."""
    generator = torch.Generator().manual_seed(0)
    seen = []
    for chunk in range(CHUNKS):
        poses = torch.eye(4, dtype=torch.float64).repeat(3, 1, 1)
        poses[:, 0, 3] = abs(4 - chunk)
        memory.begin_chunk(poses=poses)
        for layer in range(CONFIG.num_layers):
            q, k, v = torch.randn(3, CONFIG.chunk_tokens, 128, generator=generator).to(DEVICE)
            seen.append(memory.attend(layer, q, k, v))
        memory.end_chunk()
        between()
    return seen


class Late:
    """A side stream whose work is done when it has to be, and no earlier."""

    def __init__(self, monkeypatch):
        self.work, self.inside = [], False
        op = storage.compress_chunk

        def compress(*tensors, **options):
            assert self.inside, "pruned on the caller's stream"
            self.work.append(lambda: op(*tensors, **options))

        monkeypatch.setattr(storage, "compress_chunk", compress)

    @contextmanager
    def beside(self):
        self.inside = True
        yield
        self.inside = False

    def join(self):
        while self.work:
            self.work.pop(0)()


def test_pruning_that_ends_as_late_as_it_may_changes_nothing(monkeypatch):
    want = walk(WorldMemory(CONFIG, device=DEVICE, dtype=torch.float32, backend="reference"))
    memory = WorldMemory(CONFIG, device=DEVICE, dtype=torch.float32, backend="reference")
    late = memory._storage._side = Late(monkeypatch)
    waited = []
    got = walk(memory, lambda: waited.append(len(late.work)))
    assert all(map(torch.equal, got, want)) and max(waited) == 1
    memory.wait()  # between chunks, as before rows are read
    assert not late.work
    assert memory.stats()["chunks_banked"] == 4 and memory.stats()["chunks_retrieved"] > 8


@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a GPU")
@pytest.mark.parametrize("bank", ["device", "host"])
def test_a_slow_pruning_on_a_gpu_changes_nothing(monkeypatch, bank):
    config = dataclasses.replace(CONFIG, bank=bank)
    want = walk(WorldMemory(config, device=DEVICE, dtype=torch.float32))
    op = storage.compress_chunk

    def slow(*tensors, **options):
        torch.cuda._sleep(20_000_000)
        assert torch.cuda.current_stream() != torch.cuda.default_stream()
        return op(*tensors, **options)

    monkeypatch.setattr(storage, "compress_chunk", slow)
    got = walk(WorldMemory(config, device=DEVICE, dtype=torch.float32))
    assert all(map(torch.equal, got, want))


@pytest.mark.parametrize("merge", [False, True])
def test_what_pruning_touches_outlives_it(monkeypatch, merge):
    """A memory may be deleted while a chunk is pruned: the allocator has to know of every tensor of that stream."""
    held, touched = set(), set()
    op, side_stream = storage.compress_chunk, storage.SideStream

    def compress(*tensors, **options):
        given = [x for x in (*tensors, *options.values()) if isinstance(x, torch.Tensor)]
        touched.update(x.untyped_storage().data_ptr() for x in given)
        return op(*tensors, **options)

    def side(device, *tensors):
        held.update(x.untyped_storage().data_ptr() for x in tensors)
        return side_stream(device, *tensors)

    monkeypatch.setattr(storage, "compress_chunk", compress)
    monkeypatch.setattr(storage, "SideStream", side)
    walk(WorldMemory(dataclasses.replace(CONFIG, merge_pruned=merge), device=DEVICE, dtype=torch.float32))
    assert len(touched) == 3 and touched <= held
