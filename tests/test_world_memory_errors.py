"""Every error of MemoryConfig and WorldMemory names the argument, and leaves the memory as it was."""

from __future__ import annotations

import dataclasses
import math
import pickle
import re
from fractions import Fraction

import numpy as np
import pytest
import torch
from random_rollouts import HEAD_DIM, Rollout, make, same, state, tiny

import worldkv_kernels.memory.pool as pool_module
import worldkv_kernels.memory.room as room_module
from worldkv_kernels import MemoryConfig, Rope3D, WorldMemory
from worldkv_kernels.memory.config import MODES
from worldkv_kernels.memory.retrieval import PoseRetrieval


@pytest.mark.parametrize(
    ("field", "value", "wanted"),
    [
        ("num_layers", 0, "at least 1"),
        ("num_heads", 0, "at least 1"),
        ("num_heads", 129, "at most 128"),
        ("branches", 0, "at least 1"),
        ("branches", 129, "at most 128, branches * num_heads at most 128"),
        ("num_kv_heads", 0, "None or a divisor of num_heads=1"),
        ("num_kv_heads", 2, "None or a divisor of num_heads=1"),
        ("num_kv_heads", -1, "None or a divisor of num_heads=1"),
        ("chunk_frames", 0, "at least 1"),
        ("head_dim", 96, "64 or 128"),
        ("grid", (0, 3), "at least 1 token"),
        ("grid", (2, 3, 4), "(height, width)"),
        ("grid", (2.5, 3), "(height, width)"),
        ("grid", 5, "(height, width)"),
        ("grid", (True, 3), "(height, width)"),
        ("grid", ("2", 3), "(height, width)"),
        ("grid", (2, 2**31), "(height, width)"),
        ("sink_frames", -2, "at least 0"),
        ("recent_frames", -1, "at least 0"),
        ("retrieved_chunks", -1, "at least 0"),
        ("unattended_chunks", -1, "at least 0"),
        ("keep_ratio", 0.0, "above 0 and at most 1"),
        ("keep_ratio", 1.1, "above 0 and at most 1"),
        ("keep_ratio", math.nan, "above 0 and at most 1"),
        ("eps", -1e-6, "not negative"),
        ("eps", math.nan, "finite"),
        ("scale", 0.0, "from 1e-25 to 1e+25"),
        ("scale", math.inf, "from 1e-25 to 1e+25"),
        ("retrieved_log_weight", 8.1, "from -8 to 8"),
        ("retrieved_log_weight", -8.1, "from -8 to 8"),
        ("retrieved_log_weight", math.nan, "from -8 to 8"),
        ("mode", "rolling", "worldkv, full, sliding, sink_recent"),
        ("prune_rule", "most alike", "one of nearest, similarity"),
        ("prune_rule", None, "one of nearest, similarity"),
        ("order", "random", "time, nearest_last, nearest_first"),
        ("bank", "disk", "'device' or 'host'"),
        ("bank_chunks", 1, "at least 2"),
        ("bank_chunks", 0, "at least 2"),
        ("device_slots", 1, "at least 2 with retrieved_chunks=2"),
        ("device_slots", 0, "at least 2"),
        ("rope", "llama", "a Rope3D, 'wan' or None"),
        ("rope", Rope3D(128), "for head_dim 64"),
        ("retrieval", "nearest", "'pose', 'fov', 'action', 'content' or a RetrievalPolicy"),
        ("retrieval", None, "'pose', 'fov', 'action', 'content' or a RetrievalPolicy"),
        ("retrieval", PoseRetrieval, "a RetrievalPolicy"),  # the class, not an object of it
    ],
)
def test_config_errors(field, value, wanted):
    with pytest.raises(ValueError) as caught:
        tiny(**{field: value})
    message = str(caught.value)
    assert message.startswith(f"MemoryConfig: {field} must be") and wanted in message
    assert message.endswith(f"got {value!r}")


COUNTS = (
    "num_layers", "num_heads", "num_kv_heads", "head_dim", "chunk_frames", "sink_frames", "recent_frames",
    "retrieved_chunks", "unattended_chunks", "bank_chunks", "device_slots", "branches",
)  # fmt: skip


@pytest.mark.parametrize("field", COUNTS)
def test_config_counts_are_integers(field):
    for value in (4.0, "4", True):
        with pytest.raises(TypeError, match=f"MemoryConfig: {field} must be an integer, got {value!r}"):
            tiny(**{field: value})


@pytest.mark.parametrize("field", COUNTS)
def test_config_counts_are_no_larger_than_memory_could_hold(field):
    for value in (2**31, 10**400, 10**5000):  # of the last, Python prints no digits
        with pytest.raises(ValueError, match=f"^MemoryConfig: {field} must be at most 2147483647, got"):
            tiny(**{field: value})


@pytest.mark.parametrize("field", ["keep_ratio", "eps", "retrieved_log_weight", "scale"])
def test_config_numbers_are_such_as_a_float_holds(field):
    for value in (10**400, -(10**400), Fraction(10**400, 3), 10**5000):
        with pytest.raises(ValueError, match=f"^MemoryConfig: {field} must be a number that a float can hold, got"):
            tiny(**{field: value})
    assert type(getattr(tiny(**{field: np.float32(0.5)}), field)) is float
    assert getattr(tiny(**{field: Fraction(1, 4)}), field) == 0.25


@pytest.mark.parametrize("field", ["keep_ratio", "eps", "retrieved_log_weight", "scale"])
@pytest.mark.parametrize("value", ["x", None, True, [0.5]])
def test_config_numbers_are_numbers(field, value):
    if field == "scale" and value is None:
        assert tiny(scale=None).scale is None
        return
    with pytest.raises(TypeError, match=re.escape(f"MemoryConfig: {field} must be a number, got {value!r}")):
        tiny(**{field: value})


@pytest.mark.parametrize(
    "field", ["pooled", "merge_pruned", "rebase_time", "prefetch", "round_before_rope", "rebase_sink", "bank_sink"]
)
@pytest.mark.parametrize("value", ["no", 1, None])
def test_config_switches_are_true_or_false(field, value):
    if field == "rebase_time" and value is None:
        value = 0  # None is for the default, which follows from mode and rope
    with pytest.raises(TypeError, match=f"MemoryConfig: {field} must be True or False, got {value!r}"):
        tiny(**{field: value})


def test_time_is_rebased_by_default_where_chunks_come_back_and_have_a_rope():
    rebased = {mode: tiny(mode=mode, bank_chunks=9).rebase_time for mode in MODES}
    assert rebased == {"worldkv": True, "full": False, "sliding": False, "sink_recent": False}
    assert not tiny(rope=None).rebase_time and not tiny(rebase_time=False).rebase_time
    assert tiny(mode="sink_recent", rebase_time=True).rebase_time
    sizes = dict(num_layers=1, num_heads=1, grid=(2, 3))
    assert not MemoryConfig.official(**sizes).rebase_time


@pytest.mark.parametrize("grid", [[2, 3], np.array([2, 3]), (np.int64(2), 3), torch.Size([2, 3])])
def test_config_grid_becomes_a_tuple_and_counts_plain_integers(grid):
    config = tiny(grid=grid, num_layers=np.int64(1))
    assert config == tiny() and hash(config) == hash(tiny())
    assert [type(number) for number in (*config.grid, config.num_layers)] == [int] * 3
    assert pickle.loads(pickle.dumps(config)) == config  # with its rope


@pytest.mark.parametrize(
    ("changes", "error_type", "message"),
    [
        (dict(chunk_frames=0), ValueError, "chunk_frames must be from 1 to 2147483647, got 0"),
        (dict(chunk_frames=10**5000, recent_frames=6), ValueError, "chunk_frames must be from .* too long to print"),
        (dict(recent_frames=-(10**5000)), ValueError, "recent_frames, .*, got int too long to print .*"),
        (dict(recent_frames="6"), TypeError, "recent_frames must be an integer, got '6'"),
        (dict(retrieved_frames=18.0), TypeError, "retrieved_frames must be an integer, got 18.0"),
        (dict(bank_chunks="5"), TypeError, "bank_chunks must be an integer, got '5'"),
        (dict(clip_frames=81.0), TypeError, "clip_frames must be an integer, got 81.0"),
    ],
)
def test_official_errors(changes, error_type, message):
    with pytest.raises(error_type, match=f"^MemoryConfig.official: {message}$"):
        MemoryConfig.official(**{"num_layers": 1, "num_heads": 1, "grid": (2, 3), **changes})


@pytest.mark.parametrize(
    ("given", "followed"),  # sink_frames, recent_frames, retrieved_chunks
    [
        (dict(), (3, 6, 6)),
        (dict(chunk_frames=4), (4, 8, 6)),
        (dict(chunk_frames=1, sink_frames=3), (3, 2, 6)),
        (dict(chunk_frames=4, recent_frames=3), (4, 3, 6)),
        (dict(bank_chunks=4), (3, 6, 4)),
        (dict(device_slots=3, bank_chunks=4, bank="host"), (3, 6, 3)),
        (dict(bank_chunks=4, mode="full"), (3, 6, 6)),  # there it is how many chunks there can be
    ],
)
def test_config_what_is_not_given_follows(given, followed):
    config = MemoryConfig(**{"num_layers": 1, "num_heads": 1, "grid": (2, 3), **given})
    assert (config.sink_frames, config.recent_frames, config.retrieved_chunks) == followed
    assert {type(frames) for frames in (config.sink_frames, config.recent_frames, config.retrieved_chunks)} == {int}
    assert dataclasses.replace(config) == config
    assert dataclasses.replace(config, chunk_frames=5).sink_frames == config.sink_frames


def test_config_given_bounds_are_what_is_refused_not_what_follows():
    sizes = dict(num_layers=1, num_heads=1, grid=(2, 3))
    with pytest.raises(ValueError, match=r"^MemoryConfig: bank_chunks must be None or at least 1, got -1$"):
        MemoryConfig(**sizes, bank_chunks=-1)
    with pytest.raises(ValueError, match=r"^MemoryConfig: device_slots must be None or at least 1 .*, got 0$"):
        MemoryConfig(**sizes, device_slots=0)


def test_config_rebase_needs_a_rope():
    with pytest.raises(ValueError, match="MemoryConfig: rebase_time must be False where there is no rope, got True"):
        tiny(rope=None, bank_chunks=4, rebase_time=True)


def test_config_is_frozen_and_by_keyword():
    with pytest.raises(dataclasses.FrozenInstanceError):
        tiny().num_layers = 2
    with pytest.raises(TypeError):
        MemoryConfig(1, 1, (2, 3))


NO_SUCH_DEVICE = f"cuda:{torch.cuda.device_count()}"


@pytest.mark.parametrize(
    ("arguments", "error_type", "message"),
    [
        (dict(dtype=torch.float64), TypeError, r"dtype must be .*float32, got torch\.float64"),
        (dict(config=None), TypeError, "config must be a MemoryConfig, got None"),
        (dict(config={"num_layers": 1}), TypeError, "config must be a MemoryConfig, got {'num_layers': 1}"),
        (dict(device=NO_SUCH_DEVICE), ValueError, f"device must be 'cpu' or a CUDA .* here, got '{NO_SUCH_DEVICE}': "),
        (dict(device="foo"), ValueError, "device must be 'cpu' or a CUDA device that torch can use here, got 'foo': "),
        (dict(device="meta"), ValueError, "device must be 'cpu' or a CUDA device that torch can use here, got 'meta'"),
        (dict(backend="zzz"), ValueError, "backend must be one of cuda, triton, reference, got 'zzz'"),
        (dict(backend=1), TypeError, "backend must be None or a name, got 1"),
    ],
)
def test_memory_errors(arguments, error_type, message):
    with pytest.raises(error_type, match=f"^WorldMemory: {message}"):
        WorldMemory(**{"config": tiny(), **arguments})


@pytest.mark.parametrize("bank", ["device", "host"])
def test_storage_that_does_not_fit(monkeypatch, bank):
    # fp32, one layer, one head: a slot is 128 rows of 64 numbers, K and V: 64 KiB; a sink slot and three ring slots.
    # A chunk of 8 tokens in host memory has no tail: 4 KiB.
    each = {"device": 64, "host": 4}[bank] * 1024
    monkeypatch.setattr(pool_module, "_free_host_bytes", lambda: 3 * each)
    with pytest.raises(ValueError, match=r"WorldMemory: bank_chunks must be at least 2 .* got 1 that fit half of the"):
        make(tiny(bank=bank, bank_chunks=None))
    with pytest.raises(
        ValueError, match=r"WorldMemory: storage must fit the (192.0|11.2) KiB that .* on cpu, got [4-6]"
    ):
        make(tiny(bank=bank, bank_chunks=2))
    with pytest.raises(
        ValueError, match=r"storage must fit .* KiB .*, got .* [GM]iB \((host )?bank .* [GM]iB, (bank .*, )?recent"
    ):
        make(tiny(bank=bank, bank_chunks=100000))
    with pytest.raises(ValueError, match=r"WorldMemory: storage must fit"):
        make(tiny(mode="full", bank_chunks=10))
    monkeypatch.setattr(pool_module, "_free_host_bytes", lambda: 2 * 64 * 1024 * 10)
    monkeypatch.setattr(room_module, "BANK_LIMIT", 32)
    unstated = tiny(sink_frames=0, bank=bank, bank_chunks=None)
    assert make(unstated).stats()["bank_capacity"] == {"device": 10, "host": 32}[bank]
    assert make(dataclasses.replace(unstated, mode="full")).stats()["device_bytes"] == 10 * 64 * 1024
    many = dataclasses.replace(unstated, bank="host", retrieved_chunks=40, device_slots=40)
    monkeypatch.setattr(pool_module, "_free_host_bytes", lambda: 2**23)
    assert make(many).stats()["bank_capacity"] == 40  # what a window retrieves has room whatever the limit


def test_real_free_memory_is_found():
    assert pool_module._free_host_bytes() > 2**20


def bad_poses(what: str) -> object:
    poses = np.tile(np.eye(4), (2, 1, 1))
    if what == "missing":
        return None
    if what == "frames":
        return poses[:1]
    if what == "flat":
        return poses[0]
    if what == "nan":
        poses[1, 0, 3] = math.nan
    if what == "huge":
        return [[[10**400] * 4] * 4] * 2
    if what == "scaled":
        poses[1, :3, :3] *= 1.01
    if what == "mirrored":
        poses[1, 0, 0] = -1
    if what == "row":
        poses[0, 3, 0] = 0.5
    return "a string" if what == "string" else torch.from_numpy(poses)


def errors_of_begin() -> list:
    wanted = "begin_chunk: poses must be "
    return [
        ("missing", ValueError, [wanted + "[2, 4, 4] in mode 'worldkv'", "got None"]),
        ("frames", ValueError, [wanted + "[2, 4, 4]", "got [1, 4, 4]"]),
        ("flat", ValueError, [wanted + "[2, 4, 4]", "got [4, 4]"]),
        ("nan", ValueError, [wanted + "finite", "got nan"]),
        ("huge", ValueError, [wanted + "an array [2, 4, 4] of numbers that a float can hold", "got [[[1000"]),
        ("scaled", ValueError, [wanted + "rigid", "got frame 1"]),
        ("mirrored", ValueError, [wanted + "rigid", "got frame 1"]),
        ("row", ValueError, [wanted + "rigid", "got frame 0", "0.5"]),
        ("string", TypeError, [wanted + "an array [2, 4, 4]", "got str"]),
    ]


def raises(error_type, parts, call, *args, **kwargs) -> None:
    with pytest.raises(error_type) as caught:
        call(*args, **kwargs)
    for part in parts:
        assert part in str(caught.value), str(caught.value)


def test_every_error_leaves_the_memory_as_before():
    """One rollout with every error provoked on the way equals one without, bitwise."""
    config = tiny(num_layers=2)
    memory, calm, rollout = make(config), make(config), Rollout(config, 7, 10)
    raises(RuntimeError, ["attend: a chunk must be begun", "got"], memory.attend, 0, *rollout.passes[0][0][0])
    raises(RuntimeError, ["end_chunk: a chunk must be begun", "got"], memory.end_chunk)
    raises(
        ValueError,
        ["location: chunk must be one that has ended, of which there is none yet", "got 0"],
        memory.location,
        0,
    )
    for chunk in range(10):
        layers = rollout.passes[chunk] = rollout.passes[chunk][:1]
        expected = rollout.chunk(calm, chunk)
        before = state(memory, chunk)
        for what, error_type, parts in errors_of_begin():
            raises(error_type, parts, memory.begin_chunk, bad_poses(what))
            assert state(memory, chunk) == before
        raises(ValueError, ["location: chunk must be", f"got {chunk}"], memory.location, chunk)
        raises(ValueError, ["location: chunk must be", "got -1"], memory.location, -1)
        memory.begin_chunk(rollout.poses[chunk])
        before = state(memory, chunk)
        raises(
            RuntimeError, [f"begin_chunk: chunk {chunk} must be ended", "got a second begin_chunk"],
            memory.begin_chunk, rollout.poses[chunk],
        )  # fmt: skip
        q, k, v = layers[0][0][:3]
        ones, short = torch.ones(HEAD_DIM), torch.ones(HEAD_DIM - 1)
        for layer in (-1, 2):
            raises(ValueError, ["attend: layer must be from 0 to 1", f"got {layer}"], memory.attend, layer, q, k, v)
        raises(ValueError, ["norm_rope_append: q must be", "got [64]"], memory.attend, 0, q[0], k, v)
        raises(ValueError, ["norm_rope_append: k must be", "got [11, 64]"], memory.attend, 0, q, k[1:], v)
        raises(TypeError, ["norm_rope_append: v must be", "torch.float64"], memory.attend, 0, q, k, v.double())
        raises(TypeError, ["norm_rope_append: q must be", "got None"], memory.attend, 0, None, k, v)
        raises(ValueError, ["norm_rope_append: q_weight must be", "[63]"], memory.attend, 0, q, k, v, short)
        raises(ValueError, ["norm_rope_append: k_weight must be", "[63]"], memory.attend, 0, q, k, v, ones, short)
        raises(
            ValueError, ["segment_attention: out must be", "got [12, 1, 32]"],
            memory.attend, 0, q, k, v, out=torch.empty(12, 1, 32),
        )  # fmt: skip
        got = [memory.attend(0, *layers[0][0])]
        raises(RuntimeError, [f"end_chunk: chunk {chunk} must attend every layer", "layers [1]"], memory.end_chunk)
        assert state(memory, chunk) == before
        got.append(memory.attend(1, *layers[0][1]))
        memory.end_chunk()
        raises(RuntimeError, ["end_chunk: a chunk must be begun"], memory.end_chunk)
        raises(RuntimeError, ["attend: a chunk must be begun"], memory.attend, 0, q, k, v)
        assert same(got, expected)
        assert memory.stats() == calm.stats()


def test_too_few_or_too_many_tokens():
    memory = make(tiny())
    memory.begin_chunk(bad_poses("none"))
    x = torch.zeros(11, HEAD_DIM)
    raises(ValueError, ["attend: q must have the chunk's 12 tokens", "got 11"], memory.attend, 0, x, x, x)


def test_too_few_or_too_many_heads():
    memory = make(tiny(num_heads=4, num_kv_heads=2))
    memory.begin_chunk(bad_poses("none"))
    q, k = torch.zeros(12, 4 * HEAD_DIM), torch.zeros(12, 2 * HEAD_DIM)
    raises(
        ValueError, ["attend: q must be [12, 256], num_heads * head_dim", "got [12, 128]"], memory.attend, 0, k, k, k
    )
    raises(ValueError, ["norm_rope_append: k must be [12, 128]", "got [12, 256]"], memory.attend, 0, q, q, k)
    raises(ValueError, ["norm_rope_append: v must be [12, 128]", "got [12, 256]"], memory.attend, 0, q, k, q)
    assert memory.attend(0, q, k, k).shape == (12, 4, HEAD_DIM)


def test_layers_and_chunks_are_integers_and_tensors_the_memory_s():
    memory = make(tiny())
    memory.begin_chunk(bad_poses("none"))
    x = torch.zeros(12, HEAD_DIM)
    for layer in ("0", None, 0.5, True):
        raises(TypeError, [f"attend: layer must be an integer, got {layer!r}"], memory.attend, layer, x, x, x)
        raises(TypeError, [f"pools: layer must be an integer, got {layer!r}"], memory.pools, layer)
        raises(TypeError, [f"location: chunk must be an integer, got {layer!r}"], memory.location, layer)
    for layer in (1, -1):
        raises(ValueError, [f"pools: layer must be from 0 to 0, got {layer}"], memory.pools, layer)
    half, elsewhere = x.bfloat16(), x.to("meta")
    message = "attend: q must be of the memory's dtype torch.float32, got torch.bfloat16"
    raises(TypeError, [message], memory.attend, 0, half, half, half)
    message = "attend: q must be on the memory's device cpu, got meta"
    raises(ValueError, [message], memory.attend, 0, elsewhere, elsewhere, elsewhere)
    assert memory.attend(np.int64(0), x, x, x).shape == (12, 1, HEAD_DIM)


@pytest.mark.parametrize("name", ["q", "k", "v"])
@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_debug_refuses_what_would_stay_in_the_memory(monkeypatch, name, value):
    memory, x = make(tiny(num_layers=2)), torch.zeros(12, HEAD_DIM)
    memory.begin_chunk(bad_poses("none"))
    bad = x.clone()
    bad[7, 5] = value
    given = {**dict.fromkeys("qkv", x), name: bad}
    memory.attend(1, **given)
    monkeypatch.setenv("WORLDKV_DEBUG", "1")
    memory.attend(1, x, x, x)
    message = f"attend: {name} must be finite, got NaN or infinity in layer 1"
    raises(ValueError, [message], memory.attend, 1, **given)
    assert torch.isfinite(memory.pools(1)[0][:12]).all()


def test_poses_are_checked_in_every_mode_and_needed_in_one():
    for mode in ("full", "sliding", "sink_recent"):
        memory = make(tiny(mode=mode, bank_chunks=4))
        raises(ValueError, ["begin_chunk: poses must be rigid"], memory.begin_chunk, bad_poses("scaled"))
        assert memory.begin_chunk().chunk == 0


def test_fov_needs_intrinsics():
    memory = make(tiny(retrieval="fov"))
    poses = bad_poses("none")
    for intrinsics, error_type, parts in [
        (None, ValueError, ["[2, 4]", "got None"]),
        (np.ones((3, 4)), ValueError, ["[2, 4] or [4]", "got [3, 4]"]),
        ([1.0, 1.0, 0.0, 1.0], ValueError, ["positive fx, fy, cx, cy", "0.0"]),
        ([1.0, math.nan, 1.0, 1.0], ValueError, ["positive", "nan"]),
        ("wide", TypeError, ["an array [2, 4] or [4]", "got str"]),
    ]:
        parts = ["begin_chunk: intrinsics must be", *parts]
        raises(error_type, parts, memory.begin_chunk, poses, intrinsics=intrinsics)
        assert memory.stats()["chunks"] == 0
    for dtype in (torch.float32, torch.bfloat16):
        assert memory.begin_chunk(poses, intrinsics=torch.tensor([10.0, 10, 5, 5], dtype=dtype)).chunk == 0
        memory.abort_chunk()


@pytest.mark.parametrize("fields", [dict(mode="sink_recent", rebase_time=True), dict(mode="sliding", rope=None)])
def test_a_rollout_ends_with_its_positions(fields):
    """Of which there are 2**31, in chunks of 2."""
    memory, rollout = make(tiny(**fields)), Rollout(tiny(**fields), 0, 3)
    for _ in rollout.run(memory):
        pass
    memory._next_chunk = memory._first_whole = 2**30 - 1
    assert memory.begin_chunk().start_frame == 2**31 - 2
    memory.attend(0, *rollout.passes[2][0][0])
    memory.end_chunk()
    before = state(memory, 4)
    raises(RuntimeError, ["begin_chunk: chunk must be below 1073741824 (2**31 frames), got chunk 1073741824"],
           memory.begin_chunk)  # fmt: skip
    assert state(memory, 4) == before
    memory.reset()
    assert memory.begin_chunk().chunk == 0


def test_full_ends_with_its_pool():
    config = tiny(mode="full", bank_chunks=3)
    memory, rollout = make(config), Rollout(config, 0, 3)
    for _ in rollout.run(memory):
        pass
    raises(RuntimeError, ["begin_chunk: chunk must be below 3", "mode 'full'", "got chunk 3"], memory.begin_chunk)
    assert [memory.location(chunk) for chunk in range(3)] == ["recent"] * 3


@pytest.mark.parametrize("choice", [[1, 1], [9], [1, 2, 3], [0], None, 1, ["1"], [1.0], [[1]], [True]])
def test_a_policy_that_selects_what_is_not_on_offer(choice):
    class Wrong(PoseRetrieval):
        def select(self, current, candidates, budget):
            return choice if len(candidates) == 3 else []

    config = tiny(retrieval=Wrong())
    memory, rollout = make(config), Rollout(config, 0, 7)
    for chunk in range(6):
        rollout.chunk(memory, chunk)
    before = state(memory, 6)
    if choice in ([1, 1], [9], [1, 2, 3], [0]):
        parts = ["begin_chunk: the retrieval policy must select up to 2", "[1, 2, 3]", f"got {choice}"]
        raises(ValueError, parts, memory.begin_chunk, rollout.poses[6])
    else:
        parts = [f"begin_chunk: the retrieval policy must select a list of chunk numbers, got {choice!r}"]
        raises(TypeError, parts, memory.begin_chunk, rollout.poses[6])
    assert state(memory, 6) == before


def test_a_policy_that_drops_what_is_not_there():
    """An error that names the choice; the chunk stays begun and nothing has changed, so it may be tried again."""

    class Wrong(PoseRetrieval):
        def drop(self, candidates):
            return self.choice if self.wrong else candidates[0][0]

    policy = Wrong()
    config = tiny(retrieval=policy, sink_frames=0, recent_frames=0, retrieved_chunks=1, bank_chunks=1)
    memory, rollout = make(config), Rollout(config, 0, 2)
    rollout.chunk(memory, 0)
    memory.begin_chunk(rollout.poses[1])
    memory.attend(0, *rollout.passes[1][0][0])
    before, policy.wrong = state(memory, 1), True
    for choice, error_type in (
        (77, ValueError),
        (77, ValueError),
        (True, TypeError),
        (0.0, TypeError),
        (None, TypeError),
    ):
        policy.choice = choice
        parts = ["end_chunk: the retrieval policy must drop one of [0, 1]", f"got {choice}"]
        raises(error_type, parts, memory.end_chunk)
        assert state(memory, 1) == before
    policy.wrong = False
    memory.end_chunk()
    assert (memory.location(0), memory.location(1)) == ("dropped", "bank")
