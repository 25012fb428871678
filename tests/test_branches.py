"""A memory of several branches is, bit for bit, one of each branch's own, with one window."""

from __future__ import annotations

import dataclasses
import re

import numpy as np
import pytest
import torch
from hypothesis import given
from random_rollouts import HEAD_DIM, Rollout, configs, fuzz, make, same, seeds, state, tiny

from worldkv_kernels import WorldMemory
from worldkv_kernels.memory import attention
from worldkv_kernels.memory.retrieval import ContentRetrieval

CHUNKS = 10


class Branches:
    """As many rollouts along one path as there are branches, each with a memory of its own, and memories of them all:
    one that attends to all at once, and one that attends to a branch after the other."""

    def __init__(self, config, seed, chunks=CHUNKS):
        own = dataclasses.replace(config, branches=1)
        self.rollouts = [Rollout(own, seed + branch, chunks) for branch in range(config.branches)]
        self.poses = self.rollouts[0].poses
        self.alone = [make(own) for _ in self.rollouts]
        self.at_once, self.in_turn = make(config), make(config)
        self.retrieved = 0

    def given(self, chunk, layer):
        """q, k and v of each branch, and the weights of the norms, which are all one model's."""
        of_branches = [rollout.passes[chunk][-1][layer] for rollout in self.rollouts]
        return [x[:3] for x in of_branches], of_branches[0][3:]

    def chunk(self, chunk):
        poses = None if self.alone[0].config.takes_contents else self.poses[chunk]
        memories = [*self.alone, self.at_once, self.in_turn]
        plans = [memory.begin_chunk(poses) for memory in memories]
        chosen = [(plan.retrieved, plan.num_tokens) for plan in plans]
        assert chosen == chosen[:1] * len(chosen)
        self.retrieved += len(plans[0].retrieved)
        order = list(range(len(self.alone)))[:: -1 if chunk % 2 else 1]  # which comes first does not matter
        for layer in range(self.at_once.config.num_layers):
            each, weights = self.given(chunk, layer)
            want = [memory.attend(layer, *x, *weights) for memory, x in zip(self.alone, each, strict=True)]
            got = self.at_once.attend(layer, *map(torch.stack, zip(*each, strict=True)), *weights)
            assert got.shape == (len(each), *want[0].shape) and same(list(got), want)
            for branch in order:
                assert torch.equal(self.in_turn.attend(layer, *each[branch], *weights, branch=branch), want[branch])
        for memory in memories:
            memory.end_chunk()

    def run(self, first=0):
        for chunk in range(first, len(self.poses)):
            self.chunk(chunk)


@fuzz(12)
@given(configs(any_bits=True, branches=2) | configs(any_bits=True, branches=3), seeds)
def test_branches_are_as_memories_of_their_own(config, seed):
    """Which test_world_memory compares with the slow model, in float64."""
    rollouts = Branches(config, seed, chunks=6)
    for chunk in range(3):
        rollouts.chunk(chunk)
    rollouts.at_once, rollouts.in_turn = rollouts.at_once.fork(), rollouts.in_turn.fork()
    rollouts.run(first=3)


@pytest.mark.parametrize(
    "fields",
    [
        dict(num_heads=4, num_kv_heads=2, bank="host", device_slots=2, merge_pruned=False),
        dict(num_heads=2, bank_bits=4, bank="host", keep_ratio=0.5),
        dict(num_layers=5, bank_bits=8, num_heads=2, num_kv_heads=1),
    ],
)
def test_what_comes_back_is_each_branch_s_own(fields):
    """Pruned, packed and out of host memory, in layers that share rows and in one launch after warm_up."""
    rollouts = Branches(tiny(branches=2, **fields), 5)
    for memory in (rollouts.at_once, rollouts.in_turn):
        memory.warm_up(*rollouts.rollouts[0].weights[0])
    rollouts.run()
    assert rollouts.retrieved > 8


def test_warm_up_meets_every_size_of_the_passes(monkeypatch):
    sizes = set()
    for op in (attention.norm_rope_append, attention.segment_attention):

        def noted(x, *args, op=op, **options):
            sizes.add((op.__name__, x.shape, x.stride()))
            return op(x, *args, **options)

        monkeypatch.setattr(attention, op.__name__, noted)
    config = tiny(branches=2, num_heads=2)
    memory, x = make(config), numbers(2, config.chunk_tokens, 2 * HEAD_DIM)
    memory.warm_up()
    warmed = sizes.copy()
    assert len(warmed) == 3
    sizes.clear()
    attended(memory, *x)
    memory.attend(0, *x[:, 1], branch=1)
    assert sizes == warmed


@pytest.mark.parametrize("bits", [16, 4])
def test_a_memory_of_branches_is_saved_and_forked(bits, tmp_path):
    config = tiny(branches=2, num_layers=2, bank_bits=bits)
    rollouts = Branches(config, 6)
    for chunk in range(6):
        rollouts.chunk(chunk)
    rollouts.at_once.save(tmp_path / "m")
    places = state(rollouts.at_once, 6)[1]
    rollouts.at_once = WorldMemory.load(tmp_path / "m", backend="reference", bank="host")
    assert rollouts.at_once.config == dataclasses.replace(config, bank="host")
    assert state(rollouts.at_once, 6)[1] == places
    rollouts.in_turn = rollouts.in_turn.fork()
    rollouts.run(first=6)
    assert rollouts.retrieved > 8


def test_where_branches_see_the_same_first_keys_content_retrieves_as_in_one():
    """As in guidance, where they differ by what cross-attention adds behind the first layer's keys."""
    config = tiny(branches=2, num_layers=2, retrieval=ContentRetrieval(skip_newest=1))
    rollouts = Branches(config, 7)
    for layers in zip(*(rollout.passes for rollout in rollouts.rollouts), strict=True):
        (_, k, *_), (q, _, v, *weights) = (of_branch[-1][0] for of_branch in layers)
        layers[1][-1][0] = (q, k, v, *weights)
    rollouts.run()
    assert rollouts.retrieved > 8


@pytest.mark.parametrize("at_once", [True, False])
def test_content_is_of_all_branches_keys(at_once):
    config = tiny(branches=2, retrieval="content")
    memory = make(config)
    q, k, v = torch.randn(3, 2, config.chunk_tokens, HEAD_DIM, generator=torch.Generator().manual_seed(1))
    memory.begin_chunk()
    if at_once:
        memory.attend(0, q, k, v)
    else:
        for branch in (1, 0):
            memory.attend(0, q[branch], k[branch], v[branch], branch=branch)
    memory.end_chunk()
    means = k.unflatten(1, (config.chunk_frames, -1)).mean(dim=2)  # [branches, frames, head_dim]
    np.testing.assert_allclose(memory._last_content(), means.transpose(0, 1).flatten(1).numpy(), atol=1e-6)


def test_what_chunks_received_is_the_mean_over_branches():
    rollouts = Branches(tiny(branches=2, num_heads=2, num_layers=2, mass_layers=(1,)), 8)
    for memory in (rollouts.at_once, rollouts.in_turn):
        memory.warm_up(*rollouts.rollouts[0].weights[0])
    rollouts.run()
    one, other = (memory.received() for memory in rollouts.alone)
    mean = {chunk: pytest.approx((one[chunk] + other[chunk]) / 2, rel=1e-5) for chunk in one}
    assert rollouts.at_once.received() == rollouts.in_turn.received() == mean and len(mean) > 5
    assert max(abs(one[chunk] - other[chunk]) for chunk in one) > 1e-3


def attended(memory, q, k, v, **options):
    memory.begin_chunk(np.tile(np.eye(4), (2, 1, 1)))
    return memory.attend(0, q, k, v, **options)


def numbers(*shape):
    return torch.randn(3, *shape, generator=torch.Generator().manual_seed(2))


def test_out_is_what_the_op_writes_and_the_result_a_view_of_it():
    config = tiny(branches=2, num_heads=2)
    memory, x = make(config), numbers(2, config.chunk_tokens, 2 * HEAD_DIM)
    out = torch.full((config.chunk_tokens, 4, HEAD_DIM), float("nan"))
    got = attended(memory, *x, out=out)
    assert got.data_ptr() == out.data_ptr() and torch.equal(got.transpose(0, 1).flatten(1, 2), out)
    alone = torch.full((config.chunk_tokens, 2, HEAD_DIM), float("nan"))
    assert memory.attend(0, *x[:, 1], branch=1, out=alone) is alone and torch.equal(alone, got[1])


def test_a_pass_over_one_branch_leaves_the_other_as_it_is():
    config = tiny(branches=2)
    memory, x = make(config), numbers(2, config.chunk_tokens, HEAD_DIM)
    before = attended(memory, *x)[1].clone()
    memory.attend(0, *(5 + x[:, 0]), branch=0)
    assert torch.equal(memory.attend(0, *x[:, 1], branch=1), before)


@pytest.mark.parametrize(
    ("shape", "options", "error", "message"),
    [
        ((12, 64), {}, ValueError, "q must be [2, tokens, columns], of 2 branches, or of one with branch given"),
        ((3, 12, 64), {}, ValueError, "q must be [2, tokens, columns], of 2 branches, or of one with branch given"),
        ((2, 64), {}, ValueError, "q must be [2, tokens, columns], of 2 branches, or of one with branch given"),
        ((2, 11, 64), {}, ValueError, "q must have the chunk's 12 tokens, got 11"),
        ((2, 12, 128), {}, ValueError, "q must be [branches, 12, 64], num_heads * head_dim, got [2, 12, 128]"),
        ((2, 12, 64), dict(branch=0), ValueError, "q must be [12, 64], of one branch, got [2, 12, 64]"),
        ((12, 128), dict(branch=0), ValueError, "q must be [12, 64], num_heads * head_dim, got [12, 128]"),
        ((12, 64), dict(branch=2), ValueError, "branch must be None or from 0 to 1, of the config's branches, got 2"),
        ((12, 64), dict(branch=-1), ValueError, "branch must be None or from 0 to 1, of the config's branches, got -1"),
        ((12, 64), dict(branch=True), TypeError, "branch must be an integer, got True"),
        ((12, 64), dict(branch="0"), TypeError, "branch must be an integer, got '0'"),
    ],
)  # fmt: skip
def test_what_is_of_no_branch_is_refused(shape, options, error, message):
    memory = make(tiny(branches=2))
    with pytest.raises(error, match=re.escape(message)):
        attended(memory, *numbers(*shape), **options)
    assert not memory._layers_done


@pytest.mark.parametrize("name", ["k", "v"])
def test_k_and_v_must_be_of_all_branches_as_q_is(name):
    memory, given = make(tiny(branches=2)), dict(zip("qkv", numbers(2, 12, 64), strict=True))
    for wrong, error in ((given[name][0], ValueError), ([1], TypeError)):
        memory.abort_chunk()
        with pytest.raises(error, match=rf"attend: {name} must be .*\[2, tokens, columns\], of 2 branches"):
            attended(memory, **{**given, name: wrong})


def test_a_memory_of_one_branch_takes_branch_0_alone():
    memory = make(tiny())
    want = attended(memory, *numbers(12, 64))
    assert torch.equal(memory.attend(0, *numbers(12, 64), branch=0), want)
    with pytest.raises(ValueError, match="branch must be None or from 0 to 0, of the config's branches, got 1"):
        memory.attend(0, *numbers(12, 64), branch=1)
    with pytest.raises(ValueError, match=r"q must be .*, of the one branch that the config has"):
        memory.attend(0, *numbers(1, 12, 64))


def test_a_chunk_ends_when_each_branch_has_attended_every_layer():
    config = tiny(branches=2, num_layers=2)
    memory, x = make(config), numbers(2, 12, 64)
    attended(memory, *x[:, 0], branch=0)
    with pytest.raises(RuntimeError, match=r"must attend every layer, got none for layers \[1\] of branch 0$"):
        memory.end_chunk()
    memory.replayed(branch=0)
    with pytest.raises(RuntimeError, match=r"must attend every layer, got none for layers \[0, 1\] of branch 1$"):
        memory.end_chunk()
    with pytest.raises(ValueError, match="replayed: branch must be None or from 0 to 1"):
        memory.replayed(branch=2)
    memory.attend(0, *x)
    with pytest.raises(RuntimeError, match=r"got none for layers \[1\] of branch 1$"):
        memory.end_chunk()
    memory.attend(1, *x[:, 1], branch=1)
    memory.end_chunk()
    memory.begin_chunk(np.tile(np.eye(4), (2, 1, 1)))
    with pytest.raises(RuntimeError, match=r"got none for layers \[0, 1\] of branch 0$"):
        memory.end_chunk()
    memory.replayed()
    memory.end_chunk()


def test_debug_looks_at_all_branches(monkeypatch):
    monkeypatch.setenv("WORLDKV_DEBUG", "1")
    x = numbers(2, 12, 64)
    x[2, 1, 3, 4] = float("nan")
    with pytest.raises(ValueError, match="attend: v must be finite"):
        attended(make(tiny(branches=2)), *x)


@pytest.mark.parametrize("at_once", [True, False])
def test_it_compiles_in_one_graph(at_once):
    config = tiny(branches=2, retrieval="content", mass_layers=(0,))
    memory, eager = make(config), make(config)
    x = numbers(2, config.chunk_tokens, HEAD_DIM)
    given, options = (x, {}) if at_once else (x[:, 1], dict(branch=1))
    compiled = torch.compile(lambda q, k, v: memory.attend(0, q, k, v, **options), backend="aot_eager", fullgraph=True)
    for made in (memory, eager):
        made.begin_chunk()
        made.attend(0, *x)
        made.wait()
    assert torch.equal(compiled(*(2 * given)), eager.attend(0, *(2 * given), **options))
    assert torch.equal(memory.attend(0, *x[:, 0], branch=0), eager.attend(0, *x[:, 0], branch=0))
    memory.end_chunk()
    eager.end_chunk()
    assert np.array_equal(memory._last_content(), eager._last_content())
    for made in (memory, eager):
        made.begin_chunk()
        made.attend(0, *x)
        made.end_chunk()
    assert memory.stats()["mass_current"] == eager.stats()["mass_current"] == pytest.approx(1)
