"""The rival of the rollout benchmark: it makes what WorldMemory makes under official(), and does the slow work."""

import dataclasses
import math
from collections import Counter

import numpy as np
import pytest
import torch
from conftest import relative_error
from torch.utils._python_dispatch import TorchDispatchMode

from worldkv_kernels import MemoryConfig, WorldMemory
from worldkv_kernels.memory.retrieval import PoseRetrieval
from worldkv_kernels.models.rollout import rollout
from worldkv_kernels.models.small_world import SmallWorld, SmallWorldConfig
from worldkv_kernels.ops.compress_chunk import compress_chunk
from worldkv_kernels.trajectory import DEFAULT_INTRINSICS

NUM_CHUNKS, FRAMES = 40, 3
SMALL = SmallWorldConfig(num_layers=2, num_heads=1, grid=(3, 4), ffn_dim=96, frequency_dim=16)
CHUNK_TOKENS = FRAMES * 12
# fp32 is rounded at 6e-8, and each memory rounds in an order of its own; 2e-7 was seen. Another choice of chunks,
# tokens or times moves the latents by 8e-4 or more.
FLOAT32_LIMIT = 1e-5


@pytest.fixture
def published_path(load):
    return load("published_path")


def turn_and_return(num_chunks: int = NUM_CHUNKS) -> np.ndarray:
    """Camera-to-world of 3 frames a chunk: a turn with a wobble, out and back, the way back a little aside.

    Distance and angle order the chunks differently, and no two of a chunk's nearest seven are closer than 8e-5.
    """
    last = num_chunks * FRAMES - 1
    poses = np.tile(np.eye(4), (last + 1, 1, 1))
    for frame, pose in enumerate(poses):
        out = min(frame, last - frame)
        yaw = math.radians(3.0 * out + 30 * math.sin(0.4 * frame))
        pose[:3, :3] = [[math.cos(yaw), 0, math.sin(yaw)], [0, 1, 0], [-math.sin(yaw), 0, math.cos(yaw)]]
        pose[:3, 3] = (0.004 * frame, 0.05 * math.sin(0.7 * frame), 0.05 * out)
    return poses


def official(**fields) -> MemoryConfig:
    sizes = dict(num_layers=SMALL.num_layers, num_heads=SMALL.num_heads, head_dim=SMALL.head_dim, grid=SMALL.grid)
    return MemoryConfig.official(**sizes, **{"bank_chunks": NUM_CHUNKS, **fields})


def world_memory(config: MemoryConfig, dtype=torch.float32) -> WorldMemory:
    return WorldMemory(config, dtype=dtype, backend="reference")


def make_model(dtype: torch.dtype) -> SmallWorld:
    return SmallWorld.random(SMALL, device="cpu", dtype=dtype)


def made_by(memory, num_chunks: int = NUM_CHUNKS, model=None, poses=None, after=lambda plan: None):
    """Plans and latents [chunks, ...] of a rollout; `after(plan)` runs at each chunk's end."""
    plans, latents = [], []
    poses = turn_and_return(num_chunks) if poses is None else poses
    for made in rollout(model or make_model(memory.dtype), memory, poses, DEFAULT_INTRINSICS):
        plans.append(made.plan)
        latents.append(made.latents)
        after(made.plan)
    return plans, torch.stack(latents)


def banked_by(memory: WorldMemory, layer: int, chunk: int) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V that WorldMemory's bank holds of a chunk."""
    (slot,) = memory._bank.fetch([chunk])
    return memory._bank.store.views(slot, layer, memory.config.banked_tokens)


def check_same_choices(ours, theirs, num_chunks: int) -> None:
    assert [plan.chunk for plan in theirs] == list(range(num_chunks)) == [plan.chunk for plan in ours]
    for our, their in zip(ours, theirs, strict=True):
        assert their.retrieved == our.retrieved
        assert their.num_tokens == our.num_tokens
        assert their.start_frame == our.start_frame


def index_check(memory):
    """A check at each chunk's end that a PublishedMemory kept the tokens that compress_chunk keeps of the same keys."""
    config = memory.config

    def check(plan):
        for layer in range(config.num_layers):
            kept, (k, v) = memory.banked(layer, plan.chunk), memory.whole_chunk(layer)
            want = compress_chunk(
                k, v, frames=FRAMES, keep_ratio=config.keep_ratio, pooled=config.pooled, rule="similarity",
                merge=False, backend="reference",
            )  # fmt: skip
            assert kept.index.tolist() == want.index.tolist()
            assert torch.equal(kept.k, want.k) and torch.equal(kept.v, want.v)

    return check


# --- the same results ---


@pytest.mark.parametrize(
    ("pooled", "rope_correction", "bank"),
    [(True, False, "device"), (False, False, "host"), (True, True, "host"), (False, True, "device")],
)
def test_float32_rollouts_agree(published_path, pooled, rope_correction, bank):
    config = official(pooled=pooled, rope_correction=rope_correction, bank=bank)
    ours, theirs = world_memory(config), published_path.PublishedMemory(config, "cpu", torch.float32)
    our_plans, our_latents = made_by(ours)
    their_plans, their_latents = made_by(theirs, after=index_check(theirs))
    check_same_choices(our_plans, their_plans, NUM_CHUNKS)
    assert len(our_plans[-1].retrieved) == 6
    for our, their in zip(our_latents, their_latents, strict=True):
        assert relative_error(our, their) < FLOAT32_LIMIT
    # Of each chunk both have the same tokens, since another token would be off by as much as it is long.
    for chunk in range(NUM_CHUNKS - 2):
        for layer in range(SMALL.num_layers):
            their = theirs.banked(layer, chunk)
            for our, want in zip(banked_by(ours, layer, chunk), (their.k, their.v), strict=True):
                assert relative_error(our, want) < FLOAT32_LIMIT
    counts = ("chunks", "tokens_attended", "chunks_retrieved")
    assert [theirs.stats()[count] for count in counts] == [ours.stats()[count] for count in counts]


@pytest.mark.parametrize(("pooled", "rope_correction"), [(True, False), (False, True)])
def test_bfloat16_rollouts_agree_within_rounding(published_path, pooled, rope_correction):
    """Against fp32 on the same (rounded) weights ours is at most twice as far as theirs, and the two are no further
    from each other than that. Rounding alone separates them: RoPE in fp32 or fp64 before it rounds, a turn of the
    queries or of the keys, sums split otherwise. Which tokens are kept hangs on rounded keys: compared on the same."""
    config = official(pooled=pooled, rope_correction=rope_correction)
    model = make_model(torch.bfloat16)
    exact = make_model(torch.float32)
    exact.load_state_dict(model.state_dict())
    our_plans, ours = made_by(world_memory(config, torch.bfloat16), model=model)
    memory = published_path.PublishedMemory(config, "cpu", torch.bfloat16)
    their_plans, theirs = made_by(memory, model=model, after=index_check(memory))
    _, want = made_by(published_path.PublishedMemory(config, "cpu", torch.float32), model=exact)
    check_same_choices(our_plans, their_plans, NUM_CHUNKS)
    error = relative_error(theirs, want)
    assert 1e-4 < error < 1e-2  # bf16 is rounded at 4e-3, the latents hold fp32 noise beside what is rounded
    assert relative_error(ours, want) <= 2 * error
    assert relative_error(ours, theirs) <= 2 * error


@pytest.mark.parametrize("rope_correction", [False, True])
def test_bfloat16_outputs_agree_within_rounding(published_path, rope_correction):
    """The same q, k and v for both, nothing pruned: what a rollout's own noise hides, attention's outputs show."""
    config, poses = official(rope_correction=rope_correction, keep_ratio=1.0), turn_and_return(14)
    make = published_path.PublishedMemory
    ours, theirs = world_memory(config, torch.bfloat16), make(config, "cpu", torch.bfloat16)
    exact = make(config, "cpu", torch.float32)
    for chunk in range(14):
        outputs = [play_chunk(memory, chunk, poses) for memory in (exact, ours, theirs)]
        our_error, their_error = (relative_error(out, outputs[0]) for out in outputs[1:])
        assert 1e-3 < their_error < 2e-2
        assert 0.5 * their_error <= our_error <= 2 * their_error  # nor has the rival an error of its own


@pytest.mark.parametrize(
    "fields",
    [
        dict(recent_frames=3),
        dict(recent_frames=9, retrieved_frames=3),
        dict(retrieved_frames=0),
        dict(sink_frames=0, retrieved_frames=6, rope_correction=True),
        dict(sink_frames=6, keep_ratio=1.0),
        dict(keep_ratio=0.01),
        dict(keep_ratio=0.3, pooled=False),  # 3.6 of 12 tokens: rounded up
        dict(clip_frames=24),
    ],
)
def test_other_windows_agree(published_path, fields):
    config, num_chunks = official(**fields), 12
    ours, theirs = world_memory(config), published_path.PublishedMemory(config, "cpu", torch.float32)
    our_plans, our_latents = made_by(ours, num_chunks)
    their_plans, their_latents = made_by(theirs, num_chunks, after=index_check(theirs))
    check_same_choices(our_plans, their_plans, num_chunks)
    for our, their in zip(our_latents, their_latents, strict=True):
        assert relative_error(our, their) < FLOAT32_LIMIT


def test_the_published_faults_are_in(published_path):
    """Chunk c - 2 is attended to by no query from chunk 4 on; until then everything is; chunk 0 is banked too."""
    config = official(keep_ratio=0.5)
    memory = published_path.PublishedMemory(config, "cpu", torch.float32)
    plans, _ = made_by(memory, 12)
    kept = config.banked_tokens
    assert [plan.num_tokens for plan in plans[:4]] == [CHUNK_TOKENS * (chunk + 1) for chunk in range(4)]
    for plan in plans[4:]:
        assert set(plan.retrieved) <= set(range(1, plan.chunk - 2))
        assert plan.num_tokens == 3 * CHUNK_TOKENS + min(6, plan.chunk - 3) * kept  # sink, c - 1 and c, no c - 2
    assert memory.banked(0, 0).k.shape == (kept, SMALL.num_heads, SMALL.head_dim)
    assert memory.stats()["chunks_banked"] == 12


# --- the bank, abort and reset ---


def test_where_the_bank_is_changes_nothing(published_path):
    results = {}
    for bank in ("device", "host"):
        memory = published_path.PublishedMemory(official(bank=bank), "cpu", torch.float32)
        results[bank] = made_by(memory, 12)
        stats = memory.stats()
        held = 12 * 2 * SMALL.num_layers * memory.config.banked_tokens * SMALL.dim * 4
        cache = 2 * SMALL.num_layers * 9 * CHUNK_TOKENS * SMALL.dim * 4  # sink, 6 to retrieve, 2 recent
        assert (stats["device_bytes"], stats["host_bytes"]) == ((cache, held) if bank == "host" else (cache + held, 0))
        assert not memory.banked(0, 3).k.is_pinned()
    assert results["host"][0] == results["device"][0]
    assert torch.equal(results["host"][1], results["device"][1])


def inputs(seed: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """q, k and v of a chunk: the same numbers, which bf16 can hold, in any dtype."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(CHUNK_TOKENS, SMALL.dim, generator=generator).bfloat16().to(dtype) for _ in range(3)]


def play_chunk(memory, chunk: int, poses: np.ndarray) -> torch.Tensor:
    """Two passes over the layers; the outputs of the second."""
    memory.begin_chunk(poses[FRAMES * chunk : FRAMES * chunk + FRAMES])
    for step in range(2):
        given = [inputs(9 * chunk + 2 * layer + step, memory.dtype) for layer in range(SMALL.num_layers)]
        outputs = [memory.attend(layer, *qkv) for layer, qkv in enumerate(given)]
    memory.end_chunk()
    return torch.stack(outputs)


def test_an_aborted_chunk_leaves_no_trace(published_path):
    """At every chunk: dropped before any layer, after one, and after all."""
    config, poses = official(rope_correction=True), turn_and_return(14)
    undisturbed, disturbed = (published_path.PublishedMemory(config, "cpu", torch.float32) for _ in range(2))
    for chunk in range(14):
        for layers in range(SMALL.num_layers + 1):
            disturbed.begin_chunk(poses[-FRAMES:])
            for layer in range(layers):
                disturbed.attend(layer, *inputs(1000 + layer))
            disturbed.abort_chunk()
            disturbed.abort_chunk()  # a second one does nothing
        assert torch.equal(play_chunk(disturbed, chunk, poses), play_chunk(undisturbed, chunk, poses))
    assert disturbed.stats() == undisturbed.stats()


def test_reset_starts_again(published_path):
    memory, poses = published_path.PublishedMemory(official(), "cpu", torch.float32), turn_and_return(12)
    first = [play_chunk(memory, chunk, poses) for chunk in range(12)]
    memory.begin_chunk(poses[:FRAMES])
    memory.reset()
    assert memory.stats()["chunks"] == memory.stats()["tokens_attended"] == memory.stats()["chunks_banked"] == 0
    assert all(torch.equal(play_chunk(memory, chunk, poses), first[chunk]) for chunk in range(12))


# --- the slow work ---


class Work(TorchDispatchMode):
    """Counts what is dispatched: ops by name, complex128 results, host reads, and numbers that go through cat."""

    def __init__(self):
        super().__init__()
        self.ops, self.complex128, self.concatenated, self.copied_to = Counter(), Counter(), [], Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name = func._schema.name.removeprefix("aten::")
        self.ops[name] += 1
        if isinstance(result, torch.Tensor):
            self.complex128[name] += result.dtype == torch.complex128
            if name == "cat":
                self.concatenated.append((tuple(result.shape), result.dtype))
            if name == "_to_copy":
                self.copied_to[result.dtype] += 1
        return result


@pytest.mark.parametrize("rope_correction", [False, True])
def test_the_slow_work_of_attend_is_there(published_path, rope_correction, monkeypatch):
    """In every pass: two tables, each applied in complex128, six clones of keys, two concatenations, host reads;
    in a chunk's first pass the cache is rolled too."""
    config, poses = official(rope_correction=rope_correction), turn_and_return(14)
    memory = published_path.PublishedMemory(config, "cpu", torch.bfloat16)
    bf16, lists, tolist = inputs(0, torch.bfloat16), [], torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda x: lists.append(x) or tolist(x))  # no op is dispatched for it
    for chunk in range(14):
        plan = memory.begin_chunk(poses[FRAMES * chunk : FRAMES * chunk + FRAMES])
        works = []
        lists.clear()
        for _ in range(3):
            for layer in range(SMALL.num_layers):
                with Work() as work:
                    memory.attend(layer, *bf16)
                works.append((len(works) < SMALL.num_layers, work))
        memory.end_chunk()
    assert len(plan.retrieved) == 6
    assert len(lists) == 2 * len(works)  # the grid, for q and for k
    corrected = 6 if rope_correction else 0
    for first_pass, work in works:
        tables = [math.prod(shape) for shape, dtype in work.concatenated if dtype == torch.complex128]
        assert tables == 2 * [CHUNK_TOKENS * SMALL.head_dim // 2]
        window = ((plan.num_tokens, SMALL.num_heads, SMALL.head_dim), torch.bfloat16)
        assert work.concatenated.count(window) == 2
        assert work.complex128["mul"] == 2 + corrected
        assert work.complex128["polar"] == corrected
        assert work.copied_to[torch.float64] == 2 + corrected  # of q, k and each retrieved chunk's keys
        assert work.ops["clone"] - (2 if first_pass else 0) == 6
        assert work.ops["_local_scalar_dense"] == (7 if first_pass else 4)  # and the grid, above
        assert work.ops["_scaled_dot_product_flash_attention_for_cpu"] == 1


def test_the_slow_work_of_a_chunk_is_there(published_path):
    """Retrieval in PyTorch, read back; a host bank copied in piece by piece; fp32 copies of K and V to prune."""
    poses = turn_and_return(14)
    memory = published_path.PublishedMemory(official(bank="host"), "cpu", torch.bfloat16)
    for chunk in range(14):
        with Work() as begin:
            memory.begin_chunk(poses[FRAMES * chunk : FRAMES * chunk + FRAMES])
        for layer in range(SMALL.num_layers):
            memory.attend(layer, *inputs(layer, torch.bfloat16))
        with Work() as end:
            memory.end_chunk()
    assert begin.copied_to[torch.bfloat16] == 6 * 2 * SMALL.num_layers  # K and V of each chunk and layer
    assert begin.ops["_local_scalar_dense"] == 6 + 2  # each choice, and both maxima
    assert begin.ops["acos"] == 1
    assert end.copied_to[torch.float32] == 2 * SMALL.num_layers
    assert end.ops["topk"] == SMALL.num_layers


# --- errors ---


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(mode="full"), "mode must be 'worldkv', as of MemoryConfig.official, got 'full'"),
        (dict(rebase_sink=True), "rebase_sink must be False, as of MemoryConfig.official, got True"),
        (dict(order="time"), "order must be 'nearest_first', as of MemoryConfig.official, got 'time'"),
        (dict(unattended_chunks=0), "unattended_chunks must be 1, as of MemoryConfig.official, got 0"),
        (dict(bank_sink=False), "bank_sink must be True, as of MemoryConfig.official, got False"),
        (dict(prune_rule="nearest"), "prune_rule must be 'similarity', as of MemoryConfig.official, got 'nearest'"),
        (dict(merge_pruned=True), "merge_pruned must be False, as of MemoryConfig.official, got True"),
        (dict(rope=None), "rope must be 'wan', as of MemoryConfig.official, got None"),
        (dict(round_before_rope=False), "round_before_rope must be True, as of MemoryConfig.official, got False"),
        (dict(retrieval="pose"), "retrieval must be an OfficialPoseRetrieval, as of MemoryConfig.official, got 'pose'"),
        (dict(retrieval=PoseRetrieval()), "retrieval must be an OfficialPoseRetrieval, as of MemoryConfig.official, "),
    ],
)
def test_only_an_official_config(published_path, fields, message):
    with pytest.raises(ValueError) as caught:
        published_path.PublishedMemory(dataclasses.replace(official(), **fields))
    assert str(caught.value).startswith(f"PublishedMemory: {message}")


def test_errors(published_path):
    make = published_path.PublishedMemory
    with pytest.raises(TypeError, match="PublishedMemory: config must be a MemoryConfig, got dict"):
        make({})
    with pytest.raises(TypeError, match=r"PublishedMemory: dtype must be .*, got torch.float64"):
        make(official(), "cpu", torch.float64)
    memory, poses = make(official(), "cpu", torch.float32), turn_and_return(1)
    q, k, v = inputs(0)
    with pytest.raises(RuntimeError, match="attend: a chunk must be begun"):
        memory.attend(0, q, k, v)
    with pytest.raises(RuntimeError, match="end_chunk: a chunk must be begun"):
        memory.end_chunk()
    with pytest.raises(ValueError, match=r"begin_chunk: poses must be \[3, 4, 4\], got None"):
        memory.begin_chunk()
    with pytest.raises(ValueError, match="begin_chunk: poses must be rigid"):
        memory.begin_chunk(2 * poses)
    memory.begin_chunk(poses)
    with pytest.raises(RuntimeError, match="begin_chunk: chunk 0 must be ended or dropped first, got a second"):
        memory.begin_chunk(poses)
    with pytest.raises(ValueError, match="attend: layer must be from 0 to 1, got 2"):
        memory.attend(2, q, k, v)
    with pytest.raises(ValueError, match=r"attend: k must be \[36, 64\] torch.float32, got \[35, 64\] torch.float32"):
        memory.attend(0, q, k[1:], v)
    with pytest.raises(ValueError, match=r"attend: v must be \[36, 64\] torch.float32, got \[36, 64\] torch.bfloat16"):
        memory.attend(0, q, k, v.bfloat16())
    memory.attend(1, q, k, v)
    with pytest.raises(RuntimeError, match=r"end_chunk: chunk 0 must attend every layer, got none for layers \[0\]"):
        memory.end_chunk()
    memory.attend(0, q, k, v)
    memory.end_chunk()
    assert memory.stats()["chunks"] == 1


def test_frames_end_at_the_last_position(published_path):
    """A rotation for position 1023 is the last; the chunk after is refused before anything changes."""
    config = MemoryConfig.official(num_layers=1, num_heads=1, head_dim=64, grid=(1, 1), bank_chunks=400)
    memory, poses = published_path.PublishedMemory(config, "cpu", torch.float32), turn_and_return(1)
    for _ in range(341):
        memory.begin_chunk(poses)
        memory.attend(0, *(torch.ones(3, 64) for _ in range(3)))
        memory.end_chunk()
    with pytest.raises(RuntimeError, match="begin_chunk: frames must stay below position 1024, got chunk 341"):
        memory.begin_chunk(poses)
    assert memory.stats()["chunks"] == 341
