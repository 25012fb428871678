"""WorldMemory chunk after chunk: nothing is allocated, moved or compiled again, and no work grows with the past."""

from __future__ import annotations

import pytest
import torch
from random_rollouts import HEAD_DIM, MAX_CHUNKS, Rollout, error, make, tiny
from slow_memory import pair_frequencies, turned
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import worldkv_kernels.memory.storage as storage_module
from worldkv_kernels import compress_chunk, quantize_chunk


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


def of_layers(memory):
    """Of a bank in fewer bits, what a pass of each layer reads: a captured graph has it at these addresses."""
    if not memory.config.packs_bank:
        return []
    windows, storage = memory._attention.layer_windows, memory._storage
    found = [storage._chosen.on_device["chosen"], *storage._packed.tensors, windows.tiles, windows.tail_rows]
    return [*found, *(x for window in windows.of_layer for x in window.tables)]


@pytest.mark.parametrize(
    "fields",
    [
        dict(bank_chunks=20),
        dict(bank="host", bank_chunks=20),
        dict(bank="host", bank_chunks=300, rebase_time=True, order="nearest_last"),
        dict(bank_bits=4, bank_chunks=20),
        dict(bank="host", bank_bits=8, bank_chunks=20, rebase_time=True),
        dict(mode="full", bank_chunks=200),
        dict(mode="sliding"),
        dict(mode="sink_recent", rebase_time=True),
    ],
    ids=lambda fields: "-".join(map(str, fields.values())),
)
def test_200_chunks_allocate_nothing_and_move_no_table(fields):
    config = tiny(num_layers=2, grid=(1, 3), **fields)
    memory, rollout = make(config), Rollout(config, 1, MAX_CHUNKS)
    out = torch.empty_like(memory._attention.q)

    def addresses():
        attention, storage = memory._attention, memory._storage
        kept = [attention.q, storage.index, storage.count, attention.first_row, attention.rotations.table]
        kept += [memory._storage.pool.k, memory._storage.pool.v, *memory.window.tables, *of_layers(memory)]
        return [x.data_ptr() for x in [*kept, *(x for layer in range(2) for x in memory.pools(layer))]]

    before, window = addresses(), memory.window
    for chunk in range(200):
        with NewStorages() as seen:
            memory.begin_chunk(rollout.poses[chunk % MAX_CHUNKS])
            for layers in rollout.passes[chunk % MAX_CHUNKS]:
                for layer, x in enumerate(layers):
                    assert memory.attend(layer, *x, out=out) is out
            memory.end_chunk()
        assert not seen.ops, seen.ops
    assert addresses() == before
    assert memory.window is window


class Long:
    """A rollout of four tokens a chunk, unpruned, whose numbers follow from the chunk's."""

    def __init__(self, **fields) -> None:
        self.config = tiny(grid=(1, 2), keep_ratio=1.0, **fields)
        self.memory = make(self.config)
        self.frequencies = pair_frequencies(HEAD_DIM)

    def made(self, chunk: int) -> torch.Tensor:
        """q, k and v [3, tokens, heads * head_dim]."""
        return torch.randn(3, 4, HEAD_DIM, generator=torch.Generator().manual_seed(chunk))

    def chunk(self, chunk: int, checked: bool = True) -> float:
        """Makes it; the error, to attention in float64 over what the plan says of the window, 0 if not looked at."""
        poses = torch.eye(4).repeat(2, 1, 1)
        poses[:, 0, 3] = chunk * 7 % 31
        plan = self.memory.begin_chunk(poses)
        got = self.memory.attend(0, *self.made(chunk))
        self.memory.end_chunk()
        assert (plan.chunk, plan.start_frame) == (chunk, 2 * chunk)
        if not checked:
            return 0.0
        keys = [self.turned(self.made(past)[1], 2 * past + s.time_shift) for _, past, s in plan.segments]
        values = [self.made(past)[2].double() for _, past, _ in plan.segments]
        scores = self.turned(self.made(chunk)[0], 2 * chunk) @ torch.cat(keys).T / HEAD_DIM**0.5
        return error(got.flatten(1), scores.softmax(dim=-1) @ torch.cat(values))

    def turned(self, x: torch.Tensor, frame: int) -> torch.Tensor:
        return turned(x.double().view(4, 1, HEAD_DIM), (2, 1, 2), frame, self.frequencies).flatten(1)


@pytest.mark.parametrize("fields", [dict(rebase_time=True), dict(rebase_time=False, bank="host"), dict(mode="sliding")])
def test_a_rollout_goes_on_past_the_positions_that_the_models_number(fields):
    """Which end with frame 1023, of chunk 511."""
    long = Long(**fields)
    errors = [long.chunk(chunk, checked=chunk % 100 < 4 or 505 < chunk < 520) for chunk in range(2100)]
    assert sum(error > 0 for error in errors) > 80 and max(errors) < 2e-6
    retrieved, dropped = (long.memory.stats()[name] for name in ("chunks_retrieved", "chunks_dropped"))
    assert (retrieved > 4000, dropped > 2000) == (long.config.has_bank, True)


@pytest.mark.parametrize("fields", [dict(mode="sliding"), dict(mode="sink_recent", rebase_time=True)])
def test_far_out_it_is_as_exact(fields):
    long, far = Long(**fields), 10**7
    assert max(long.chunk(chunk) for chunk in range(3)) < 2e-6
    long.memory._next_chunk = long.memory._first_whole = far
    assert max(long.chunk(chunk) for chunk in range(far, far + 20)) < 2e-6


@pytest.mark.parametrize(
    ("fields", "layers"), [({}, [6]), (dict(bank="host"), [6]), (dict(bank_bits=4), [4, 2])], ids=str
)
def test_a_chunk_is_pruned_in_one_call_for_all_layers(monkeypatch, fields, layers):
    """Or, to be packed, for as many as there are rows for."""
    config, calls = tiny(num_layers=6, **fields), []
    for op in (compress_chunk, quantize_chunk):
        monkeypatch.setattr(
            storage_module, op.__name__,
            lambda k, v, op=op, **options: calls.append((op, list(k.shape))) or op(k, v, **options),
        )  # fmt: skip
    memory, rollout = make(config), Rollout(config, 1, 8)
    for chunk in range(8):
        rollout.chunk(memory, chunk)
    heads = config.num_heads, HEAD_DIM
    of_chunk = []
    for count in layers:
        of_chunk.append((compress_chunk, [count, config.chunk_tokens, *heads]))
        if config.packs_bank:
            of_chunk.append((quantize_chunk, [count, config.banked_tokens, *heads]))
    assert calls == (8 - config.sink_chunks - config.recent_chunks) * of_chunk


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


@pytest.mark.parametrize("fields", [{}, dict(bank="host"), dict(bank_bits=8)], ids=str)
def test_attend_traces_through_torch_compile_and_a_new_window_compiles_nothing(fields):
    config = tiny(num_layers=2, device_slots=2, **fields)
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
