"""Pruning beside the caller's stream: nothing may read what it writes, or write what it reads, before it is joined."""

import dataclasses
from contextlib import contextmanager

import pytest
import torch
from conftest import DEVICE

from worldkv_kernels import MemoryConfig, WorldMemory
from worldkv_kernels.memory import sizes, storage

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

        def late(op):
            def call(*tensors, **options):
                assert self.inside, "pruned on the caller's stream"
                self.work.append(lambda: op(*tensors, **options))

            return call

        for op in ("compress_chunk", "quantize_chunk"):
            monkeypatch.setattr(storage, op, late(getattr(storage, op)))

    @contextmanager
    def beside(self):
        self.inside = True
        yield
        self.inside = False

    def join(self):
        while self.work:
            self.work.pop(0)()


@pytest.mark.parametrize(
    ("fields", "ops"), [({}, 1), (dict(bank_bits=4), 2), (dict(bank_bits=8, retrieved_chunks=1), 4)], ids=str
)
def test_pruning_that_ends_as_late_as_it_may_changes_nothing(monkeypatch, fields, ops):
    monkeypatch.setattr(sizes, "_LAYERS_AT_ONCE", 1)
    config = dataclasses.replace(CONFIG, **fields)
    want = walk(WorldMemory(config, device=DEVICE, dtype=torch.float32, backend="reference"))
    memory = WorldMemory(config, device=DEVICE, dtype=torch.float32, backend="reference")
    late = memory._storage._side = Late(monkeypatch)
    waited = []
    got = walk(memory, lambda: waited.append(len(late.work)))
    assert all(map(torch.equal, got, want)) and max(waited) == ops
    memory.wait()  # between chunks, as before rows are read
    assert not late.work
    assert memory.stats()["chunks_banked"] == 4 and memory.stats()["chunks_retrieved"] > 4 * config.retrieved_chunks


@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a GPU")
@pytest.mark.parametrize("bits", [16, 4])
@pytest.mark.parametrize("bank", ["device", "host"])
def test_a_slow_pruning_on_a_gpu_changes_nothing(monkeypatch, bank, bits):
    config = dataclasses.replace(CONFIG, bank=bank, bank_bits=bits)
    want = walk(WorldMemory(config, device=DEVICE, dtype=torch.float32))

    def slow(op):
        def call(*tensors, **options):
            torch.cuda._sleep(20_000_000)
            assert torch.cuda.current_stream() != torch.cuda.default_stream()
            return op(*tensors, **options)

        return call

    for op in ("compress_chunk", "quantize_chunk"):
        monkeypatch.setattr(storage, op, slow(getattr(storage, op)))
    got = walk(WorldMemory(config, device=DEVICE, dtype=torch.float32))
    assert all(map(torch.equal, got, want))


@pytest.mark.parametrize(
    ("fields", "tensors"),
    [
        (dict(merge_pruned=False), 3),
        (dict(merge_pruned=True), 3),
        (dict(bank_bits=8), 4),
        (dict(bank="host", bank_bits=4), 4),
    ],
    ids=str,
)
def test_what_pruning_touches_outlives_it(monkeypatch, fields, tensors):
    """A memory may be deleted while a chunk is pruned: the allocator has to know of every tensor of that stream."""
    held, touched = set(), set()
    side_stream = storage.SideStream

    def touching(op):
        def call(*given, **options):
            found = [x for x in (*given, *options.values()) if isinstance(x, torch.Tensor)]
            touched.update(x.untyped_storage().data_ptr() for x in found)
            return op(*given, **options)

        return call

    def side(device, *tensors):
        held.update(x.untyped_storage().data_ptr() for x in tensors)
        return side_stream(device, *tensors)

    monkeypatch.setattr(storage, "compress_chunk", touching(storage.compress_chunk))
    monkeypatch.setattr(storage, "quantize_chunk", touching(storage.quantize_chunk))
    monkeypatch.setattr(storage, "SideStream", side)
    walk(WorldMemory(dataclasses.replace(CONFIG, **fields), device=DEVICE, dtype=torch.float32))
    assert len(touched) == tensors and touched <= held
