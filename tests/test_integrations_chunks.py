"""Passes of a pipeline become begin, attend and end of a memory; whatever is out of turn is an error."""

import warnings
import weakref

import numpy as np
import pytest
import torch

from worldkv_kernels import MemoryConfig, WorldMemory, parse_actions
from worldkv_kernels.integrations.chunks import Chunks
from worldkv_kernels.trajectory import latent_poses, load

SIZES = dict(num_layers=2, num_heads=1, head_dim=64, grid=(2, 3), bank_chunks=20, retrieved_chunks=2)
TOKENS = 18
POSES, INTRINSICS = latent_poses(load("right*30,forward*32,left*30"))  # 24 latent frames, 8 chunks
DENOISING = (1000.0, 500.0)
ALONG_THE_SAME = pytest.mark.filterwarnings("ignore:test. a new rollout goes along the poses of the one before")


def make(mode="worldkv", poses=POSES, intrinsics=None, *, actions=None, **options):
    memory = WorldMemory(MemoryConfig(mode=mode, **{**SIZES, **options}), dtype=torch.float32)
    return Chunks("test", memory, poses, intrinsics, actions=actions)


def qkv(chunk, step, layer):
    generator = torch.Generator().manual_seed(1000 * chunk + 10 * step + layer)
    return torch.randn(3, TOKENS, 64, generator=generator)


def run_pass(chunks, chunk, timestep, step=0, *, stream=None, layers=(0, 1), tensor=True):
    timestep = torch.tensor([timestep]) if tensor and timestep is not None else timestep
    with chunks.model_pass(chunk * TOKENS, timestep=timestep, stream=stream):
        return [chunks.attend(layer, *qkv(chunk, step, layer)) for layer in layers]


def run_chunk(chunks, chunk, **options):
    for step, timestep in enumerate((*DENOISING, 0.0)):
        outputs = run_pass(chunks, chunk, timestep, step, **options)
    return outputs


def run_direct(memory, count, poses=POSES):
    """The same passes, with the memory called by hand."""
    outputs, retrieved = [], []
    for chunk in range(count):
        plan = memory.begin_chunk(poses[3 * chunk : 3 * chunk + 3])
        retrieved.append(plan.retrieved)
        for step in range(3):
            outputs = [memory.attend(layer, *qkv(chunk, step, layer)) for layer in (0, 1)]
        memory.end_chunk()
    return outputs, retrieved


@pytest.mark.parametrize("mode", ["worldkv", "full", "sliding", "sink_recent"])
def test_passes_are_what_a_caller_of_the_memory_would_do(mode):
    chunks, direct = make(mode), make(mode).memory
    for chunk in range(7):
        outputs = run_chunk(chunks, chunk)
    wanted, retrieved = run_direct(direct, 7)
    assert all(torch.equal(a, b) for a, b in zip(outputs, wanted, strict=True))
    assert chunks.stats() == direct.stats()
    assert any(retrieved) == (mode == "worldkv")


def test_chunks_end_with_the_next_one_or_with_stats_after_the_clean_pass():
    chunks = make()
    run_pass(chunks, 0, 1000.0)
    assert chunks.stats()["chunks"] == 0  # noisy rows are no history yet
    run_pass(chunks, 0, 0.0)
    assert chunks.memory.stats()["chunks"] == 0
    assert chunks.stats()["chunks"] == chunks.stats()["chunks"] == 1
    run_pass(chunks, 1, 1000.0)
    run_pass(chunks, 2, 1000.0)  # a pipeline without a clean pass: the last pass is what counts
    assert chunks.memory.stats()["chunks"] == 2


@pytest.mark.parametrize("clean", [0, 0.0, torch.tensor(0), torch.zeros(1, 5)])
def test_the_clean_pass_is_known_by_timesteps_of_any_kind(clean):
    chunks = make()
    run_pass(chunks, 0, clean, tensor=False)
    assert chunks.stats()["chunks"] == 1


def test_a_timestep_that_is_overwritten_after_its_pass_is_not_read_later():
    chunks, timestep = make(), torch.tensor([1000.0])
    with chunks.model_pass(0, timestep=timestep):
        for layer in (0, 1):
            chunks.attend(layer, *qkv(0, 0, layer))
    timestep.zero_()
    assert chunks.stats()["chunks"] == 0


def test_finish_ends_a_chunk_whose_timesteps_are_unknown():
    chunks = make()
    chunks.finish()  # nothing to end
    run_pass(chunks, 0, None)
    assert chunks.stats()["chunks"] == 0
    chunks.finish()
    assert chunks.stats()["chunks"] == 1


@ALONG_THE_SAME
def test_token_0_with_a_past_is_a_new_rollout():
    chunks, fresh = make(), make()
    for chunk in range(6):
        run_chunk(chunks, chunk)
    for chunk in range(6):
        outputs, wanted = run_chunk(chunks, chunk), run_chunk(fresh, chunk)
    assert chunks.stats() == fresh.stats() and chunks.stats()["chunks"] == 6
    assert all(torch.equal(a, b) for a, b in zip(outputs, wanted, strict=True))


@pytest.mark.parametrize("caches", [("same", "same"), ([], [])])
def test_token_0_after_the_clean_pass_of_chunk_0_is_a_new_rollout(caches):
    asked = []

    def poses(chunk):
        asked.append(chunk)
        return POSES[3 * chunk : 3 * chunk + 3]

    chunks = make(poses=poses)
    for cache in caches:  # two videos of one chunk
        run_chunk(chunks, 0, stream=cache)
    assert asked == [0, 0] and chunks.stats()["chunks"] == 1


@pytest.mark.parametrize("ended", [False, True])
@pytest.mark.parametrize("chunk", [1, 4, 7])
def test_chunks_out_of_turn_are_refused_and_change_nothing(chunk, ended):
    chunks = make()
    for past in range(3):
        run_chunk(chunks, past)
    if ended:
        chunks.stats()
    before = chunks.memory.stats()
    with pytest.raises(RuntimeError, match=rf"test: current_start must be 54 \(the next chunk\).*got {18 * chunk}: "):
        run_pass(chunks, chunk, 1000.0)
    assert chunks.memory.stats() == before
    run_chunk(chunks, 3)
    assert chunks.stats()["chunks"] == 4


@pytest.mark.parametrize("start", [1, 17, 19, -18])
def test_tokens_that_start_no_chunk_are_refused(start):
    with pytest.raises(ValueError, match=r"test: current_start must be a multiple of the chunk's 18 tokens .*got"):
        make().model_pass(start).__enter__()


@pytest.mark.parametrize("step", [0, 2])
def test_an_exception_inside_a_pass_drops_its_chunk(step):
    chunks, unhurt = make(), make()
    for chunk in range(6):
        run_chunk(chunks, chunk)
        run_chunk(unhurt, chunk)
    before = unhurt.stats()
    for earlier in range(step):
        run_pass(chunks, 6, 1000.0, earlier)
    with pytest.raises(KeyboardInterrupt), chunks.model_pass(6 * TOKENS):
        chunks.attend(0, *torch.full((3, TOKENS, 64), float("nan")))
        raise KeyboardInterrupt
    assert chunks.stats() == before
    with pytest.raises(RuntimeError, match="must be 108"):
        run_pass(chunks, 7, 1000.0)
    outputs, wanted = run_chunk(chunks, 6), run_chunk(unhurt, 6)
    assert all(torch.equal(a, b) for a, b in zip(outputs, wanted, strict=True))


@pytest.mark.parametrize("timesteps", [(1000.0, 1000.0, 500.0), (None, None, None)])
def test_two_streams_that_take_turns_over_chunk_0_are_refused(timesteps):
    chunks, caches = make(), ([], [])
    run_pass(chunks, 0, timesteps[0], stream=caches[0])
    run_pass(chunks, 0, timesteps[1], stream=caches[1])  # the first may have been broken off
    with pytest.raises(RuntimeError, match="one memory serves one stream; for the two of classifier-free guidance"):
        run_pass(chunks, 0, timesteps[2], stream=caches[0])
    run_chunk(chunks, 0, stream=caches[1])
    assert chunks.stats()["chunks"] == 1


@ALONG_THE_SAME
def test_two_streams_over_the_same_chunks_are_refused():
    chunks, caches = make(poses=POSES[:9]), ([], [])
    run_chunk(chunks, 0, stream=caches[0])
    for timestep in (1000.0, 500.0):
        with pytest.raises(RuntimeError, match="a second one at chunk 1"):
            run_pass(chunks, 1, timestep, stream=caches[1])
    assert chunks.stats()["chunks"] == 1
    run_pass(chunks, 1, 1000.0, stream=caches[0])
    with pytest.raises(RuntimeError, match="a second one at chunk 1"):
        run_pass(chunks, 1, 500.0, stream=caches[1])
    run_chunk(chunks, 1, stream=caches[0])
    run_chunk(chunks, 0, stream=caches[1])  # a new rollout may have a new cache
    assert chunks.stats()["chunks"] == 1


def test_a_warm_up_pass_with_caches_of_its_own_is_forgotten():
    chunks, warm_up, caches = make(), [], []
    run_pass(chunks, 0, 500.0, stream=warm_up)
    run_chunk(chunks, 0, stream=caches)
    run_chunk(chunks, 1, stream=caches)
    assert chunks.stats()["chunks"] == 2


@pytest.mark.parametrize("tensor", [True, False])
@pytest.mark.parametrize("passes", [1, 2])
def test_a_rollout_broken_off_in_chunk_0_simply_begins_again(passes, tensor):
    chunks, fresh, caches = make(), make(), []
    for _ in range(3):  # each time with a cache of its own, which may lie where the one before lay
        for timestep in DENOISING[:passes]:
            run_pass(chunks, 0, timestep, stream=[], tensor=tensor)
    for chunk in range(6):
        outputs, wanted = run_chunk(chunks, chunk, stream=caches), run_chunk(fresh, chunk, stream=caches)
    assert all(torch.equal(a, b) for a, b in zip(outputs, wanted, strict=True))
    assert chunks.stats() == fresh.stats()


def test_the_streams_of_chunk_0_are_held_no_longer_than_it_is_the_current_one():
    class Cache(list):
        """A list that weakref takes."""

    chunks, caches = make(), [Cache(), Cache()]
    held = [weakref.ref(cache) for cache in caches]
    run_pass(chunks, 0, 1000.0, stream=caches[0])
    run_chunk(chunks, 0, stream=caches[1])
    run_pass(chunks, 1, 1000.0, stream=caches[1])
    del caches
    assert [cache() for cache in held] == [None, None]


def test_restart_takes_new_poses_and_keeps_the_old_ones_when_they_are_wrong():
    chunks, other = make(), latent_poses(load("forward*32,right*30,left*30"))[0]
    for chunk in range(6):
        run_chunk(chunks, chunk)
    with pytest.raises(ValueError, match="poses must be rigid"):
        chunks.restart(2 * POSES)
    assert chunks.stats()["chunks"] == 6
    chunks.restart(other)
    assert chunks.stats()["chunks"] == 0
    for chunk in range(7):
        outputs = run_chunk(chunks, chunk)
    wanted, _ = run_direct(make().memory, 7, other)
    assert all(torch.equal(a, b) for a, b in zip(outputs, wanted, strict=True))


def test_the_last_pass_must_attend_every_layer():
    chunks = make()
    run_pass(chunks, 0, 1000.0)
    run_pass(chunks, 0, 0.0, layers=(0,))
    for end in (chunks.stats, chunks.finish, lambda: run_pass(chunks, 1, 1000.0)):
        with pytest.raises(
            RuntimeError, match=r"the last pass over chunk 0 must attend every layer, got none for \[1\]"
        ):
            end()
    run_pass(chunks, 0, 0.0)
    assert chunks.stats()["chunks"] == 1


def test_attention_belongs_inside_a_pass_and_a_pass_not_inside_another():
    chunks = make()
    run_pass(chunks, 0, 0.0)
    with pytest.raises(RuntimeError, match="self-attention must run inside the model's forward"):
        chunks.attend(0, *qkv(0, 0, 0))
    with chunks.model_pass(0):
        chunks.attend(0, *qkv(0, 0, 0))
        with pytest.raises(RuntimeError, match="one pass must be over before another"), chunks.model_pass(0):
            pass
        with pytest.raises(RuntimeError, match="finish must be called between passes"):
            chunks.finish()
        assert chunks.stats()["chunks"] == 0  # one more pass is under way
        chunks.attend(1, *qkv(0, 0, 1))
    chunks.finish()


def test_another_dtype_or_device_is_refused():
    chunks = make()
    with pytest.raises(TypeError, match=r"dtype must be that of q, torch.bfloat16, got torch.float32"):
        run_with(chunks, qkv(0, 0, 0).bfloat16())
    with pytest.raises(ValueError, match="must be on the memory's device cpu, got meta"):
        run_with(chunks, qkv(0, 0, 0).to("meta"))


def run_with(chunks, tensors):
    with chunks.model_pass(0):
        chunks.attend(0, *tensors)


# --- poses, intrinsics, actions ---


def test_poses_may_come_chunk_by_chunk():
    asked = []

    def poses(chunk):
        asked.append(chunk)
        return POSES[3 * chunk : 3 * chunk + 3]

    chunks, listed = make(poses=poses), make()
    for chunk in range(7):
        outputs, wanted = run_chunk(chunks, chunk), run_chunk(listed, chunk)
    assert asked == list(range(7))
    assert all(torch.equal(a, b) for a, b in zip(outputs, wanted, strict=True))


@pytest.mark.parametrize(
    ("poses", "message"),
    [
        (POSES[:8], "poses must be of 9 latent frames up to chunk 2, got 8"),
        (lambda chunk: None if chunk == 2 else POSES[:3], r"poses\(2\) must be those of chunk 2, got None"),
        (lambda chunk: POSES[:2] if chunk == 2 else POSES[:3], r"poses must be \[3, 4, 4\], got \[2, 4, 4\]"),
        (lambda chunk: POSES[:3] * (1 + (chunk == 2)), "poses must be rigid"),
    ],
)
def test_poses_that_are_wrong_for_a_chunk_are_refused_when_it_begins(poses, message):
    chunks = make(poses=poses)
    for chunk in (0, 1):
        run_chunk(chunks, chunk)
    for _ in range(2):
        with pytest.raises(ValueError, match=message):
            run_pass(chunks, 2, 1000.0)
        assert chunks.stats()["chunks"] == 2


def test_poses_are_asked_for_before_the_chunk_before_is_ended():
    chunks = make(poses=lambda chunk: POSES[:3] if chunk < 2 else None)
    run_chunk(chunks, 0)
    run_pass(chunks, 1, 1000.0)
    with pytest.raises(ValueError, match=r"poses\(2\)"):
        run_pass(chunks, 2, 1000.0)
    run_chunk(chunks, 1)  # as if nothing had happened
    assert chunks.stats()["chunks"] == 2


@pytest.mark.parametrize(
    ("poses", "message"),
    [(None, "poses must be given"), (POSES[:, :3], r"\[frames, 4, 4\], got \[24, 3, 4\]"), (2 * POSES, "rigid")],
)
def test_poses_that_are_missing_or_wrong_are_refused_at_once(poses, message):
    with pytest.raises(ValueError, match=f"test: .*{message}"):
        make(poses=poses)


@pytest.mark.parametrize("kind", [np.asarray, torch.from_numpy])
def test_poses_and_intrinsics_are_the_memory_s_own(kind):
    poses, intrinsics = POSES.copy(), INTRINSICS.copy()
    chunks = make(poses=kind(poses), intrinsics=kind(intrinsics), retrieval="fov")
    wanted = make(poses=POSES, intrinsics=INTRINSICS, retrieval="fov")
    poses[:], intrinsics[:] = 0, -1
    for chunk in range(6):
        outputs, unchanged = run_chunk(chunks, chunk), run_chunk(wanted, chunk)
    assert all(torch.equal(a, b) for a, b in zip(outputs, unchanged, strict=True))


def rollout_of(chunks, count):
    for chunk in range(count):
        run_chunk(chunks, chunk)


OF_VIDEO_FRAMES = "test: poses may be of video frames, 21 for a rollout of 6 latent ones: of a clip"


@ALONG_THE_SAME
@pytest.mark.parametrize("end", [Chunks.finish, lambda chunks: chunks.restart(POSES), lambda chunks: chunks.take(None)])
def test_poses_that_may_be_of_video_frames_are_told_of_when_the_rollout_is_over(end):
    chunks = make(poses=load("right*20").poses)
    rollout_of(chunks, 2)
    with pytest.warns(UserWarning, match=OF_VIDEO_FRAMES) as told:
        end(chunks)
    assert "lingbot.latent_poses" in str(told[0].message)


def test_what_is_told_is_told_once():
    chunks = make(poses=load("right*20").poses)
    rollout_of(chunks, 2)
    with pytest.warns(UserWarning) as told:
        for _ in range(3):
            rollout_of(chunks, 2)
    assert [str(one.message)[:30] for one in told] == [
        "test: poses may be of video fr",
        "test: a new rollout goes along",
    ]
    chunks.restart(POSES[:6])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rollout_of(chunks, 2)
        chunks.finish()
    with pytest.warns(
        UserWarning, match="goes along the poses of the one before; give restart its own, or the same"
    ) as told:
        rollout_of(chunks, 1)
    assert len(told) == 1


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("poses, mode, count", [(21, "worldkv", 3), (24, "full", 2), (24, "worldkv", 1)])
def test_poses_of_the_latent_frames_are_not_told_of(poses, mode, count):
    chunks = make(mode, poses=POSES[:poses])
    rollout_of(chunks, count)
    chunks.finish()
    chunks.restart(POSES)
    called = make(poses=lambda chunk: POSES[3 * chunk : 3 * chunk + 3])
    for _ in range(2):
        rollout_of(called, 2)


@pytest.mark.filterwarnings("error")
def test_a_rollout_that_failed_is_not_told_of():
    chunks = make()
    rollout_of(chunks, 2)
    with pytest.raises(KeyboardInterrupt), chunks.model_pass(2 * TOKENS):
        raise KeyboardInterrupt
    rollout_of(chunks, 3)
    assert chunks.stats()["chunks"] == 3


def test_a_memory_taken_later_serves_as_one_given_at_once():
    memory = make().memory
    chunks, wanted = Chunks("test", memory.config, POSES), make()
    for ask in (chunks.stats, chunks.made):
        with pytest.raises(RuntimeError, match="test: the memory is made in the first forward, got none yet"):
            ask()
    with pytest.raises(ValueError, match="test: poses must be rigid"):
        Chunks("test", memory.config, 2 * POSES)
    chunks.finish()
    chunks.restart(POSES)
    chunks.take(memory)
    for chunk in range(6):
        outputs, unchanged = run_chunk(chunks, chunk), run_chunk(wanted, chunk)
    assert all(torch.equal(a, b) for a, b in zip(outputs, unchanged, strict=True)) and chunks.made() is memory


def test_modes_without_retrieval_need_no_poses():
    chunks = make("sliding", poses=None)
    run_chunk(chunks, 0)
    assert chunks.stats()["chunks"] == 1


@pytest.mark.parametrize("intrinsics", [INTRINSICS, INTRINSICS[0], lambda chunk: INTRINSICS[3 * chunk : 3 * chunk + 3]])
@pytest.mark.parametrize("listed", [True, False])
def test_intrinsics_go_with_the_poses(intrinsics, listed):
    poses = POSES if listed else lambda chunk: POSES[3 * chunk : 3 * chunk + 3]
    if not listed and np.ndim(intrinsics) == 2:
        intrinsics = INTRINSICS[:3]
    chunks, direct = (
        make(poses=poses, intrinsics=intrinsics, retrieval="fov"),
        make(retrieval="fov", intrinsics=INTRINSICS),
    )
    for chunk in range(7):
        outputs, wanted = run_chunk(chunks, chunk), run_chunk(direct, chunk)
    assert all(torch.equal(a, b) for a, b in zip(outputs, wanted, strict=True))
    assert chunks.stats()["chunks_retrieved"] > 0


def test_intrinsics_that_are_missing_or_misshapen_are_refused():
    with pytest.raises(ValueError, match="test: intrinsics must be given"):
        make(retrieval="fov")
    with pytest.raises(ValueError, match=r"test: intrinsics must be \[24, 4\] or \[4\], got \[3, 4\]"):
        make(retrieval="fov", intrinsics=INTRINSICS[:3])


def test_actions_take_the_place_of_poses():
    actions = parse_actions("L*30,J*30,W*20")
    listed = make(poses=None, actions=actions, retrieval="action")
    called = make(poses=None, actions=lambda chunk: actions.of_frames(3 * chunk, 3), retrieval="action")
    for chunk in range(6):
        outputs, wanted = run_chunk(listed, chunk), run_chunk(called, chunk)
    assert all(torch.equal(a, b) for a, b in zip(outputs, wanted, strict=True))
    assert listed.stats() == called.stats() and listed.stats()["chunks_retrieved"] > 0
    run_chunk(listed, 6)
    with pytest.raises(ValueError, match="actions must be of 93 video frames up to chunk 7, got 81"):
        run_chunk(listed, 7)


def test_poses_and_actions_are_not_taken_for_one_another():
    actions = parse_actions("W*20")
    with pytest.raises(ValueError, match="poses must be None for retrieval 'action', got ndarray"):
        make(actions=actions, retrieval="action")
    with pytest.raises(ValueError, match="actions must be given"):
        make(poses=None, retrieval="action")
    with pytest.raises(ValueError, match="actions must be None for retrieval 'pose', got Actions"):
        make(actions=actions)


def test_poses_of_another_convention_are_told_of_at_once():
    walked = load("forward*30,right*90,forward*30,up*20,forward*20").poses
    make(poses=walked[:72])
    for wrong in (np.linalg.inv(walked), walked @ np.diag([1.0, -1.0, -1.0, 1.0])):
        with pytest.warns(UserWarning, match="test: the camera hardly ever goes where it looks .* camera-to-world"):
            make(poses=wrong)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            make("full", poses=wrong)  # nothing is retrieved by them
