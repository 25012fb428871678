"""WorldMemory chunk after chunk: nothing is allocated, moved or compiled again, and no work grows with the past."""

from __future__ import annotations

import pytest
import torch
from random_rollouts import HEAD_DIM, MAX_CHUNKS, Rollout, make, tiny
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import worldkv_kernels.memory.storage as storage_module
from worldkv_kernels import Rope3D, compress_chunk


class NewStorages(TorchDispatchMode):
    """Records every op with an output whose storage is not that of one of its inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        result = func(*args, **(kwargs or {}))
        made = {x.untyped_storage().data_ptr() for x in tree_leaves(result) if isinstance(x, torch.Tensor)}
        if made - given:
            self.ops.append(str(func))
        return result


def test_the_recorder_sees_allocations():
    x = torch.zeros(3)
    with NewStorages() as seen:
        x.add_(1)
        x[:1].copy_(x[1:2].view(1))
    assert not seen.ops
    with NewStorages() as seen:
        x + 1
        torch.empty(2)
        x[torch.tensor([0, 1])]
    assert len(seen.ops) >= 3


@pytest.mark.parametrize(
    "fields",
    [
        dict(bank_chunks=20),
        dict(bank="host", bank_chunks=20),
        dict(bank="host", bank_chunks=300, rebase_time=True, order="nearest_last"),
        dict(mode="full", bank_chunks=200),
        dict(mode="sliding"),
        dict(mode="sink_recent", rebase_time=True),
    ],
    ids=lambda fields: "-".join(map(str, fields.values())),
)
def test_200_chunks_allocate_nothing_and_move_no_table(fields):
    config = tiny(num_layers=2, grid=(1, 3), rope=Rope3D(HEAD_DIM, max_position=400), **fields)
    memory, rollout = make(config), Rollout(config, 1, MAX_CHUNKS)
    out = torch.empty_like(memory._q)
    kept = [memory._q, memory._storage.index, memory._storage.count, memory._position, memory._pool.k, memory._pool.v]
    kept += memory.window.tables
    kept += [x for layer in range(2) for x in memory.pools(layer)]
    addresses, window = [x.data_ptr() for x in kept], memory.window
    for chunk in range(200):
        with NewStorages() as seen:
            memory.begin_chunk(rollout.poses[chunk % MAX_CHUNKS])
            for layers in rollout.passes[chunk % MAX_CHUNKS]:
                for layer, x in enumerate(layers):
                    assert memory.attend(layer, *x, out=out) is out
            memory.end_chunk()
        assert chunk == 0 or not seen.ops, seen.ops  # the first may make the rope's table
    now = [memory._q, memory._storage.index, memory._storage.count, memory._position, memory._pool.k, memory._pool.v]
    now += memory.window.tables
    now += [x for layer in range(2) for x in memory.pools(layer)]
    assert [x.data_ptr() for x in now] == addresses
    assert memory.window is window


@pytest.mark.parametrize("bank", ["device", "host"])
def test_a_chunk_is_pruned_in_one_call_for_all_layers(monkeypatch, bank):
    config, calls = tiny(bank=bank), []
    monkeypatch.setattr(
        storage_module, "compress_chunk",
        lambda k, v, **options: calls.append(list(k.shape)) or compress_chunk(k, v, **options),
    )  # fmt: skip
    memory, rollout = make(config), Rollout(config, 1, MAX_CHUNKS)
    for chunk in range(MAX_CHUNKS):
        rollout.chunk(memory, chunk)
    banked = MAX_CHUNKS - config.sink_chunks - config.recent_chunks
    assert calls == banked * [[config.num_layers, config.chunk_tokens, config.num_heads, HEAD_DIM]]


@pytest.mark.parametrize(
    ("prune_rule", "merge_pruned", "scale"),
    [("nearest", True, None), ("nearest", True, 0.2), ("similarity", True, 3.0), ("similarity", False, None)],
)
def test_a_chunk_is_pruned_as_the_config_says(monkeypatch, prune_rule, merge_pruned, scale):
    """Merging needs the scale of the softmax that reads the keys, and writes its counts where the memory has room."""
    calls = []
    monkeypatch.setattr(
        storage_module, "compress_chunk",
        lambda k, v, **options: calls.append(options) or compress_chunk(k, v, **options),
    )  # fmt: skip
    config = tiny(prune_rule=prune_rule, merge_pruned=merge_pruned, scale=scale, keep_ratio=0.3, pooled=False)
    memory, rollout = make(config), Rollout(config, 1, 6)
    for chunk in range(6):
        rollout.chunk(memory, chunk)
    assert len(calls) == 3
    for options in calls:
        told = [options[name] for name in ("rule", "merge", "scale", "keep_ratio", "pooled", "frames")]
        assert told == [prune_rule, merge_pruned, scale, 0.3, False, 2]
        counts = options["out_count"]
        assert (None if counts is None else counts.data_ptr()) == (
            memory._storage.count.data_ptr() if merge_pruned else None
        )
    defaults = tiny()
    assert (defaults.prune_rule, defaults.merge_pruned, defaults.scale) == ("nearest", True, None)


def test_no_work_grows_with_the_past():
    """What a chunk attends to is bounded in every mode but "full"."""
    for mode, tokens in (("worldkv", 12 + 2 * 8 + 24 + 12), ("sliding", 24 + 12), ("sink_recent", 12 + 24 + 12)):
        config = tiny(mode=mode, keep_ratio=0.25)
        memory, rollout = make(config), Rollout(config, 1, MAX_CHUNKS)
        for chunk in range(MAX_CHUNKS):
            rollout.chunk(memory, chunk)
        assert memory.begin_chunk(rollout.poses[0]).num_tokens == tokens


@pytest.mark.parametrize("bank", ["device", "host"])
def test_attend_traces_through_torch_compile_and_a_new_window_compiles_nothing(bank):
    config = tiny(num_layers=2, bank=bank, device_slots=2)
    eager, compiled, rollout = make(config), make(config), Rollout(config, 3, 8)

    def layers(memory, x, weight):
        for layer in range(2):
            x = x + memory.attend(layer, x * 2, x, x, weight, weight).flatten(1)
        return x

    torch._dynamo.reset()
    traced = torch.compile(layers, fullgraph=True, backend="aot_eager")
    weight = torch.ones(HEAD_DIM)
    graphs = []
    for chunk in range(8):
        for memory in (eager, compiled):
            memory.begin_chunk(rollout.poses[chunk])
            memory.wait()
        x = rollout.passes[chunk][0][0][0]
        assert torch.equal(layers(eager, x, weight), traced(compiled, x, weight))
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
        for memory in (eager, compiled):
            memory.end_chunk()
    assert graphs[2] == graphs[-1]


@pytest.mark.parametrize("made_in", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("used_in", [torch.no_grad, torch.inference_mode])
def test_no_grad_and_inference_mode_mix(made_in, used_in):
    config = tiny()
    rollout, calm = Rollout(config, 1, 6), make(config)
    weight = torch.nn.Parameter(torch.ones(HEAD_DIM))
    with made_in():
        memory = make(config)
    for chunk in range(6):
        q, k, v = rollout.passes[chunk][0][0][:3]
        with used_in():
            memory.begin_chunk(rollout.poses[chunk])
            got = memory.attend(0, q, k, v, weight, weight)
            memory.end_chunk()
        calm.begin_chunk(rollout.poses[chunk])
        assert torch.equal(got, calm.attend(0, q, k, v, weight.detach(), weight.detach()))
        calm.end_chunk()
