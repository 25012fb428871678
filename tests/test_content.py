"""Retrieval by content: what a chunk is known by, what comes back for it, and when the host has to wait."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import DEVICE

from worldkv_kernels import ContentRetrieval, MemoryConfig, WorldMemory
from worldkv_kernels.memory.contents import Contents
from worldkv_kernels.memory.kept import keep

FRAMES, FRAME_TOKENS, LAYERS, DIM = 3, 6, 2, 128


def make(dtype=torch.float32, device=DEVICE, **fields) -> WorldMemory:
    sizes = dict(num_layers=LAYERS, num_heads=2, head_dim=64, grid=(2, 3), chunk_frames=FRAMES)
    options = dict(retrieval="content", recent_frames=3, retrieved_chunks=2, bank_chunks=40)
    return WorldMemory(MemoryConfig(**{**sizes, **options, **fields}), device=device, dtype=dtype)


def keys(seed: int, mean: np.ndarray | None = None) -> torch.Tensor:
    """Of a chunk, [tokens, DIM]; with the means of its frames [FRAMES, DIM], but for a token's share of noise."""
    k = torch.randn(FRAMES, FRAME_TOKENS, DIM, generator=torch.Generator().manual_seed(seed), dtype=torch.float32)
    if mean is not None:
        k = k - k.mean(dim=1, keepdim=True) + torch.from_numpy(mean).float()[:, None]
    return k.flatten(0, 1)


def attend(memory: WorldMemory, seed: int, k: torch.Tensor | None = None) -> torch.Tensor:
    """A pass over all layers, of which layer 0's keys are k; what the last one gave."""
    for layer in range(LAYERS):
        q, other, v = (keys(1000 * seed + 10 * layer + i) for i in range(3))
        x = (q, k if layer == 0 and k is not None else other, v)
        out = memory.attend(layer, *(of.to(memory.device, memory.dtype) for of in x))
    return out


def chunk(memory: WorldMemory, seed: int, k: torch.Tensor | None = None, **of_end) -> tuple[int, ...]:
    plan = memory.begin_chunk()
    attend(memory, seed, k)
    memory.end_chunk(**of_end)
    return plan.retrieved


# --- what is chosen ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_copy_of_the_last_frame_is_found_at_any_age_among_three_hundred(dtype):
    """Each chunk looks like nothing before it; now and then one ends like a frame of an older one."""
    count, rng = 300, np.random.default_rng(0)
    means = rng.normal(size=(count, FRAMES, DIM))
    copies = {at: int(rng.integers(1, at - 6)) for at in range(20, count - 1, 7)}
    for at, of in copies.items():
        means[at, -1] = means[of, rng.integers(FRAMES)] + rng.normal(size=DIM) * 0.2
    memory = make(dtype, retrieved_chunks=1, bank_chunks=count)
    found = [chunk(memory, at, keys(at, means[at])) for at in range(count)]
    for at, of in copies.items():
        assert found[at + 1] == (of,)
    assert memory.stats()["chunks_dropped"] == 0


def test_a_chunk_is_as_near_as_its_nearest_frame_and_ties_go_to_the_older():
    means = np.zeros((10, FRAMES, DIM))
    means[:, :, 0] = 10.0 + np.arange(30).reshape(10, 3)  # none alike
    means[3, 1] = means[5, 0] = means[6, 2] = 0.0
    means[9, -1] = 0.0
    memory = make(retrieval=ContentRetrieval(skip_newest=0), retrieved_chunks=2, order="nearest_first")
    for number in range(10):
        chunk(memory, number, keys(number, means[number]))
    assert memory.begin_chunk().retrieved == (3, 5)


def test_the_newest_chunks_come_where_no_other_is_left():
    means = 100.0 - np.arange(30.0).reshape(10, 3, 1) * np.ones(DIM)  # ever nearer to the last frame made
    memory = make(retrieved_chunks=4, order="nearest_first")
    seen = [chunk(memory, number, keys(number, means[number])) for number in range(10)]
    # Chunk 0 is the sink, the one before is recent.
    assert seen[:4] == [(), (), (), (1,)] and seen[5] == (3, 2, 1) and seen[6] == (4, 3, 2, 1)
    assert seen[7] == (1, 5, 4, 3) and seen[9] == (3, 2, 1, 7)


def test_diversity_passes_over_near_copies():
    means = np.zeros((12, FRAMES, DIM))
    means[:, :, 1] = 50.0 + 9 * np.arange(12)[:, None]
    means[2], means[3], means[4] = np.eye(DIM)[0] * 1.0, np.eye(DIM)[0] * 1.01, np.eye(DIM)[0] * -1.5
    means[-1, -1] = 0.0
    for diversity, expected in ((0.0, (2, 3)), (1.0, (2, 4))):
        memory = make(retrieval=ContentRetrieval(diversity=diversity))
        for number in range(12):
            chunk(memory, number, keys(number, means[number]))
        assert memory.begin_chunk().retrieved == expected


def test_a_full_bank_gives_up_the_younger_of_two_that_look_alike():
    rng = np.random.default_rng(1)
    means = rng.normal(size=(9, FRAMES, DIM)) * 5
    means[5] = means[2][::-1] + 0.01  # the other way round
    memory = make(bank_chunks=4)
    for number in range(7):
        chunk(memory, number, keys(number, means[number]))
    assert [memory.location(past) for past in range(7)] == [
        "sink", "bank", "bank", "bank", "bank", "dropped", "recent",
    ]  # fmt: skip


def test_what_is_not_finite_is_never_near_and_given_up_first():
    policy = ContentRetrieval(skip_newest=0)
    fine, broken = np.ones((2, 4), np.float32), np.full((2, 4), np.nan, np.float32)
    far = np.full((2, 4), 3e38, np.float32)  # its square is infinite in fp32
    on_offer = [(1, fine), (2, far), (3, broken), (4, fine + 5)]
    assert policy.select(fine[0], on_offer, 4) == [1, 4, 2, 3]
    assert policy.select(broken[0], on_offer, 2) == [1, 2]
    assert policy.drop(on_offer) == 3 and policy.drop([*on_offer[:2], on_offer[3]]) == 4
    kept = keep(policy, 4)
    for number, content in on_offer:
        kept.add(number, content)
    assert kept.select(fine[0], 4, 0, None) == [1, 4, 2, 3]
    assert kept.drop() == 3 and kept.drop({3}) == 4 and kept.drop({1, 3}) == 4


def test_what_keys_have_in_common_hides_nothing():
    """As far from 0 as three thousand times their spread."""
    rng = np.random.default_rng(4)
    contents = (300 + 0.1 * rng.normal(size=(40, FRAMES, DIM))).astype(np.float32)
    kept = keep(policy := ContentRetrieval(skip_newest=0), 40)
    for number, content in enumerate(contents):
        kept.add(number, content)
    for number in range(0, 40, 3):
        assert kept.select(contents[number, 1], 1, 0, None) == [number]
        assert policy.select(contents[number, 1], list(enumerate(contents)), 1) == [number]


# --- what a chunk is known by ---


def test_the_last_pass_is_what_a_chunk_is_known_by():
    memory = make(rope=None)
    memory.begin_chunk()
    for k in (keys(1), keys(2)):
        attend(memory, 0, k)
    memory.end_chunk()
    memory.begin_chunk()
    attend(memory, 3, keys(3))
    memory.abort_chunk()  # leaves no trace
    memory.begin_chunk()
    expected = keys(2).view(FRAMES, FRAME_TOKENS, DIM).mean(dim=1)
    assert np.abs(memory._last_content() - expected.numpy()).max() < 1e-6


def test_time_and_norm_change_nothing():
    """Keys as the projection gives them: not as a later rotation, or a weight, has turned them."""
    found = []
    for fields, weight in (({}, None), ({"rope": None}, None), ({}, torch.full((DIM,), 2.0, device=DEVICE))):
        memory = make(**fields)
        for number in range(3):
            memory.begin_chunk()
            for layer in range(LAYERS):
                memory.attend(layer, *(keys(number + i).to(DEVICE) for i in range(3)), k_weight=weight)
            memory.end_chunk()
        found.append(memory._last_content())
    assert np.array_equal(found[0], found[1]) and np.array_equal(found[0], found[2])


def test_a_query_of_the_callers_own_is_what_its_chunk_is_known_by():
    """As an embedding of the prompt is: scenes come back when they are told."""
    scenes = np.eye(3, 5)
    memory, told = make(retrieval=ContentRetrieval(skip_newest=0), retrieved_chunks=1), []
    for number, scene in enumerate([0, 0, 0, 1, 1, 2, 2, 1, 0, 2]):
        query = scenes[scene] if number % 2 else torch.from_numpy(scenes[scene]).to(DEVICE)
        told.append(memory.begin_chunk(query=query).retrieved)
        attend(memory, number)
        memory.end_chunk()
    assert told == [(), (), (), (1,), (1,), (1,), (1,), (3,), (1,), (5,)]
    assert memory.begin_chunk().retrieved == (5,)  # as the chunk before
    memory.abort_chunk()
    assert memory.prefetch(query=scenes[1])[:1] == (3,)


def test_what_was_told_holds_until_something_else_is():
    scenes = np.eye(3, 5, dtype=np.float32)
    memory = make()
    for number, told in enumerate([scenes[0], None, scenes[1], None]):
        memory.begin_chunk(query=told)
        attend(memory, number)
        memory.end_chunk()
        assert np.array_equal(memory._last_content(), scenes[[number // 2]])


def test_a_query_may_be_asked_where_chunks_are_known_by_their_keys():
    means = np.random.default_rng(5).normal(size=(9, FRAMES, DIM)) * 3
    memory = make(retrieved_chunks=1)
    for number in range(9):
        chunk(memory, number, keys(number, means[number]))
    assert memory.begin_chunk(query=means[2, 1]).retrieved == (2,)
    attend(memory, 9, keys(9, means[5]))
    memory.end_chunk()
    assert np.abs(memory._last_content() - means[5]).max() < 1e-5


def test_contents_of_the_callers_own():
    """As pooled latents are, one vector a frame; the last one is asked for next."""
    contents = np.random.default_rng(2).normal(size=(9, FRAMES, 7)).astype(np.float32)
    contents[8, -1] = contents[2, 0]
    memory = make()
    for number in range(9):
        chunk(memory, number, content=contents[number] if number % 2 else torch.from_numpy(contents[number]))
    assert 2 in memory.begin_chunk().retrieved
    memory.abort_chunk()
    assert 3 in memory.begin_chunk(query=contents[3, 1]).retrieved


def test_pruned_at_once_a_chunk_has_its_content():
    """With no recent frames, a chunk is banked before anyone has asked for its content."""
    memory = make(recent_frames=0, sink_frames=0, retrieval=ContentRetrieval(skip_newest=0))
    means = np.random.default_rng(3).normal(size=(6, FRAMES, DIM))
    for number in range(6):
        chunk(memory, number, keys(number, means[number]))
        assert np.abs(memory._bank.description(number) - means[number]).max() < 1e-5


def test_what_is_not_made_yet_is_not_asked_for_ahead():
    memory = make(recent_frames=0, sink_frames=0, retrieval=ContentRetrieval(skip_newest=0), bank="host")
    assert memory.prefetch() == ()
    for number in range(5):
        chunk(memory, number, content=np.full((1, 4), float(number)))
    assert set(memory.prefetch()) == {3, 4}  # between chunks: what is asked for next is known
    memory.begin_chunk()
    assert memory.prefetch() == ()
    assert set(memory.prefetch(query=np.zeros(4))) == {0, 1}  # the one begun, which will be banked, is not made either


def test_poses_are_looked_at_and_not_needed():
    memory = make()
    with pytest.raises(ValueError, match="begin_chunk: poses must be rigid"):
        memory.begin_chunk(poses=np.ones((3, 4, 4)))
    memory.begin_chunk(poses=np.tile(np.eye(4), (3, 1, 1)))


@pytest.mark.parametrize("mode", ["full", "sliding", "sink_recent"])
def test_baselines_take_none(mode):
    memory = make(mode=mode)
    for number in range(4):
        memory.begin_chunk()
        attend(memory, number)
        memory.end_chunk()
    assert memory._contents is None and memory.stats()["chunks"] == 4


def test_a_policy_of_a_users_own():
    class Newest:
        needs_intrinsics, stateless, by_content = False, True, True

        def describe(self, poses, intrinsics):
            raise AssertionError("it goes by content")

        def select(self, current, candidates, budget):
            assert current.shape == (DIM,) and all(of.shape == (FRAMES, DIM) for _, of in candidates)
            return [number for number, _ in candidates[::-1]][:budget]

        def drop(self, candidates):
            return candidates[0][0]

    memory = make(retrieval=Newest(), bank_chunks=3)
    assert [chunk(memory, number) for number in range(8)][-1] == (4, 5)
    assert [chunk(fork, 8) for fork in (memory.fork(), memory)] == [(5, 6)] * 2


# --- errors ---


@pytest.mark.parametrize(
    "given, error, message",
    [
        ({"query": np.ones(5)}, ValueError, r"begin_chunk: query must be \[128\] as in the chunks before, got \[5\]"),
        ({"query": np.ones((1, DIM))}, ValueError, r"query must be \[128\] as in the chunks before, got \[1, 128\]"),
        ({"query": np.full(DIM, np.nan)}, ValueError, "query must be finite in fp32, got nan"),
        ({"query": np.full(DIM, 1e39)}, ValueError, "query must be finite in fp32, got inf"),
        ({"query": "a castle"}, TypeError, r"query must be an array \[128\]"),
        ({"actions": (1, 2)}, ValueError, "actions must be None for retrieval by ContentRetrieval"),
    ],
)
def test_queries_that_are_wrong(given, error, message):
    memory = make()
    chunk(memory, 0)
    with pytest.raises(error, match=message):
        memory.begin_chunk(**given)
    assert memory.begin_chunk().chunk == 1


@pytest.mark.parametrize(
    "content, error, message",
    [
        (np.ones((2, DIM)), ValueError, r"content must be \[3, 128\] as in the chunks before, got \[2, 128\]"),
        (np.ones(DIM), ValueError, r"content must be \[3, 128\] as in the chunks before, got \[128\]"),
        (np.full((3, DIM), np.inf), ValueError, "end_chunk: content must be finite in fp32, got inf"),
        (object(), TypeError, r"end_chunk: content must be an array \[3, 128\]"),
    ],
)
def test_contents_that_are_wrong_leave_the_chunk_begun(content, error, message):
    memory = make()
    chunk(memory, 0)
    memory.begin_chunk()
    attend(memory, 1)
    with pytest.raises(error, match=message):
        memory.end_chunk(content=content)
    memory.end_chunk()
    assert memory.stats()["chunks"] == 2


def test_contents_of_two_kinds_are_refused():
    memory = make()
    chunk(memory, 0, content=np.ones((2, 4)))
    memory.begin_chunk()
    attend(memory, 1)
    with pytest.raises(ValueError, match=r"end_chunk: content must be \[2, 4\] as in the chunks before, got None"):
        memory.end_chunk()
    memory.end_chunk(content=np.zeros((2, 4)))
    one = make()
    one.begin_chunk(query=np.ones(5))
    attend(one, 0)
    with pytest.raises(ValueError, match=r"content must be \[vectors, 5\] as the query is, got \[2, 7\]"):
        one.end_chunk(content=np.ones((2, 7)))
    with pytest.raises(ValueError, match=r"content must be \[vectors, dim\], got \[0, 4\]"):
        chunk(make(), 0, content=np.ones((0, 4)))


def test_who_goes_by_pose_takes_no_content():
    memory = make(retrieval="pose")
    poses = np.tile(np.eye(4), (3, 1, 1))
    for call in (memory.begin_chunk, memory.prefetch):
        with pytest.raises(ValueError, match="query must be None for retrieval by PoseRetrieval, got ndarray"):
            call(poses, query=np.ones(3))
    memory.begin_chunk(poses)
    attend(memory, 0)
    with pytest.raises(ValueError, match="end_chunk: content must be None where retrieval is not by content"):
        memory.end_chunk(content=np.ones((1, 3)))


@pytest.mark.parametrize("skip, error", [(-1, ValueError), (1.5, TypeError), (True, TypeError)])
def test_skip_newest_that_is_wrong(skip, error):
    with pytest.raises(error, match="ContentRetrieval: skip_newest must be"):
        ContentRetrieval(skip_newest=skip)


# --- when the host waits ---


class Events:
    """Stands for a GPU's event: notes after how many copies it was recorded."""

    def __init__(self):
        self.copies, self.recorded, self.waits = 0, [], 0

    def record(self, stream):
        self.recorded.append(self.copies)

    def synchronize(self):
        self.waits += 1
        assert self.recorded[-1:] == [self.copies], "the copy that is read is not the one that was waited for"


@pytest.fixture
def on_a_gpu(monkeypatch):
    """Contents that think that they are on a GPU, whose event and capture a test has in hand."""
    contents, events = Contents((1, FRAMES, DIM), torch.device("cpu")), Events()
    contents._copied = events
    capture = SimpleNamespace(on=False)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capture.on)

    def take():
        events.copies += 1
        contents.take(keys(events.copies))

    return SimpleNamespace(contents=contents, events=events, capture=capture, take=take)


def test_a_pass_is_waited_for_where_its_layer_0_is_done(on_a_gpu):
    """And no later: the event is recorded in the pass, and not again at its end."""
    for _ in range(2):
        on_a_gpu.take()
    on_a_gpu.contents.end()
    assert on_a_gpu.events.recorded == [1, 2]
    expected = keys(2).view(FRAMES, FRAME_TOKENS, DIM).mean(dim=1).numpy()
    assert np.abs(on_a_gpu.contents.read() - expected).max() < 1e-6 and on_a_gpu.events.waits == 1


def test_a_captured_pass_is_waited_for_at_its_end(on_a_gpu):
    on_a_gpu.take()
    on_a_gpu.capture.on = True
    on_a_gpu.take()  # runs at no replay on the host
    on_a_gpu.capture.on = False
    assert on_a_gpu.events.recorded == [1]
    on_a_gpu.events.copies = 3
    on_a_gpu.contents.replayed()
    on_a_gpu.contents.end()
    assert on_a_gpu.events.recorded == [1, 3]
    on_a_gpu.contents.read()
    on_a_gpu.take()  # the next chunk's first pass is one of kernels, its last a replay
    on_a_gpu.events.copies = 5
    on_a_gpu.contents.replayed()
    on_a_gpu.contents.end()
    on_a_gpu.contents.read()


def test_a_compiled_pass_is_waited_for_at_its_end(on_a_gpu, monkeypatch):
    on_a_gpu.take()
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    on_a_gpu.take()
    on_a_gpu.contents.end()
    assert on_a_gpu.events.recorded == [1, 2]


def test_a_memory_says_so_of_replays(monkeypatch):
    memory = make()
    chunk(memory, 0)
    calls = []
    for name in ("replayed", "end", "read"):
        right = getattr(memory._contents, name)
        monkeypatch.setattr(memory._contents, name, lambda name=name, right=right: calls.append(name) or right())
    memory.begin_chunk()
    attend(memory, 1)
    memory.replayed()
    memory.end_chunk()
    memory.begin_chunk()
    memory.abort_chunk()
    memory.begin_chunk()
    assert calls == ["read", "replayed", "end", "read"]


def test_a_compiled_pass_takes_contents_in_one_graph():
    memory, plain = make(), make()
    x = [of.to(DEVICE) for of in (keys(1), keys(2), keys(3))]
    for one in (memory, plain):
        one.begin_chunk()
        one.wait()
    compiled = torch.compile(lambda q, k, v: memory.attend(0, q, k, v), backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(*x), plain.attend(0, *x))
    for one in (memory, plain):
        one.attend(1, *x)
        one.end_chunk()
    assert np.array_equal(memory._last_content(), plain._last_content())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU whose work is late")
@pytest.mark.parametrize("bank", ["device", "host"])
def test_a_gpu_that_is_late_has_the_same_chosen(bank):
    """Of a CPU, where contents are there at once."""
    found = []
    for device in ("cpu", "cuda"):
        memory, chosen = make(torch.bfloat16, device, bank=bank), []
        for number in range(12):
            plan = memory.begin_chunk()
            if device == "cuda":
                torch.cuda._sleep(20_000_000)
            attend(memory, number, keys(number % 5) + 0.1 * keys(number + 100))
            memory.end_chunk()
            chosen.append(plan.retrieved)
        found.append(chosen)
    assert found[0] == found[1]
