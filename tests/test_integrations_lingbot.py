"""The memory in LingBot-World-Fast's own code: the published pipeline, restated plainly, patched and unpatched."""

import re
import textwrap
from pathlib import Path

import numpy as np
import plain_lingbot_pipeline as pipeline
import pytest
import torch
from conftest import relative_error
from slow_memory import SlowMemory
from small_lingbot import (
    CHUNKS,
    GRID,
    INTRINSICS,
    POSES,
    TEXT,
    TOKENS,
    WORLDKV,
    KeepsItsCaches,
    caches,
    enable,
    forward,
    generate,
    make_model,
    pipeline_noise,
    reference_rollout,
)

from worldkv_kernels import MemoryConfig
from worldkv_kernels.integrations import lingbot
from worldkv_kernels.trajectory import Trajectory, load
from worldkv_kernels.trajectory import latent_poses as trajectory_poses

# --- the same latents ---


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ({"mode": "full"}, {}),
        ({"mode": "sliding", "recent_frames": 6}, {"window": 9}),
        ({"mode": "sink_recent", "sink_frames": 3, "recent_frames": 3}, {"window": 9, "sink_size": 3}),
        # The sink ends inside a chunk, or the recent frames begin in one, or both.
        ({"mode": "sink_recent", "sink_frames": 4, "recent_frames": 3}, {"window": 10, "sink_size": 4}),
        ({"mode": "sliding", "recent_frames": 4}, {"window": 7}),
        ({"mode": "sink_recent", "sink_frames": 2, "recent_frames": 5}, {"window": 10, "sink_size": 2}),
    ],
)
def test_without_retrieval_the_latents_are_those_of_the_models_own_cache(ours, theirs):
    model = make_model()
    wanted = generate(model, **theirs)
    handle = enable(model, **ours)
    got = generate(model, **theirs)
    for chunk in range(CHUNKS):
        frames = slice(3 * chunk, 3 * chunk + 3)
        assert relative_error(got[frames], wanted[frames]) < 1e-5
    assert handle.stats()["chunks"] == CHUNKS and handle.memory.stats() == handle.stats()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"keep_ratio": 0.5, "pooled": False, "order": "nearest_first"},
        {"rebase_time": True, "bank": "host"},
        {"bank_chunks": 2, "retrieval": "fov"},
    ],
)
def test_with_retrieval_the_latents_are_those_of_the_reference_model(options):
    model = make_model()
    config = lingbot.memory_config(model, grid=GRID, **{**WORLDKV, **options})
    wanted, memory = reference_rollout(model, config)
    with lingbot.enable(model, config, poses=POSES, intrinsics=INTRINSICS) as handle:
        got = generate(model)
        assert handle.stats() == memory.stats() and handle.stats()["chunks_retrieved"] > 4
    assert relative_error(got, wanted) < 1e-5
    assert relative_error(generate(model), wanted) > 1e-2  # retrieval matters here


def test_with_retrieval_the_latents_are_those_of_a_slow_memory():
    model = make_model()
    config = lingbot.memory_config(model, grid=GRID, **WORLDKV)
    with lingbot.enable(model, config, poses=POSES):
        got = generate(model)
    memory, chunks = SlowMemory(config), []

    def attention_of(module, layer):
        def forward(x, seq_lens, grid_sizes, freqs, kv_cache, current_start, *_, **__):
            chunk = current_start // TOKENS
            if chunk not in chunks:
                if chunks:
                    memory.end()
                chunks.append(chunk)
                memory.begin(POSES[3 * chunk : 3 * chunk + 3])
            q, k, v = (projection(x)[0] for projection in (module.q, module.k, module.v))
            out = memory.attend(layer, q, k, v, module.norm_q.weight, module.norm_k.weight)
            return module.o(out.float().flatten(1)[None])

        return forward

    for layer, block in enumerate(model.blocks):
        block.self_attn.forward = attention_of(block.self_attn, layer)
    assert relative_error(got, generate(model)) < 1e-5
    assert chunks == list(range(CHUNKS))


def test_the_published_retrieval_is_that_of_the_reference_model():
    model = make_model()
    config = MemoryConfig.official(
        num_layers=2, num_heads=2, head_dim=64, grid=GRID, retrieved_frames=6, recent_frames=6, bank_chunks=9
    )
    wanted, _ = reference_rollout(model, config)
    lingbot.enable(model, config, poses=POSES)
    assert relative_error(generate(model), wanted) < 1e-5


@pytest.mark.parametrize("window", [{}, {"window": 9, "sink_size": 3}])
def test_disable_restores_the_original_to_the_bit(window):
    model = make_model()
    wanted, before = generate(model, **window), {name: dict(part.__dict__) for name, part in model.named_modules()}
    handle = enable(model, **WORLDKV)
    assert list(model.state_dict()) == list(make_model().state_dict())
    generate(model, **window)
    lingbot.disable(model)
    handle.disable()  # once more does nothing
    assert {name: set(part.__dict__) for name, part in model.named_modules()} == {
        name: set(attributes) for name, attributes in before.items()
    }
    assert torch.equal(generate(model, **window), wanted)
    enable(model)  # and it can be enabled again


def test_a_context_disables_at_its_end_also_after_an_error():
    model = make_model()
    with pytest.raises(KeyError), enable(model):
        raise KeyError
    with enable(model):
        lingbot.disable(model)
    with pytest.raises(RuntimeError, match=r"lingbot.disable: model must have a memory"):
        lingbot.disable(model)


def test_half_precision_weights_get_a_memory_of_their_dtype():
    exact, model = generate(make_model()), make_model(torch.bfloat16)
    unpatched = relative_error(generate(model), exact)
    handle = enable(model)
    assert relative_error(generate(model), exact) < 2 * unpatched
    assert handle.memory.dtype is torch.bfloat16


def test_no_qk_norm_is_no_qk_norm():
    model = make_model(qk_norm=False)
    wanted = generate(model, 9)
    enable(model)
    assert relative_error(generate(model, 9), wanted) < 1e-5


def test_a_compiled_model_is_patched_inside():
    model, graphs = make_model(num_layers=1), []
    wanted = generate(model, 6)

    def backend(graph, _):
        graphs.append(graph)
        return graph

    compiled = torch.compile(model, backend=backend)
    handle = enable(compiled)
    assert relative_error(generate(compiled, 6), wanted) < 1e-5
    assert handle.stats()["chunks"] == 2 and graphs
    assert relative_error(generate(model, 6), wanted) < 1e-5  # and so is the model that was compiled
    lingbot.disable(compiled)
    assert torch.equal(generate(model, 6), wanted)


def documented_lines():
    """The two lines of the docstring, and of the README where it has them."""
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    blocks = [block for block in re.findall(r"```python\n(.*?)```", readme, flags=re.DOTALL) if "lingbot" in block]
    return [textwrap.dedent("\n".join(line for line in lingbot.__doc__.splitlines() if line[:4] == "    ")), *blocks]


@pytest.mark.parametrize("lines", documented_lines())
def test_the_two_lines_as_they_are_documented(lines):
    """At the size that 480p has for an image of 720 x 1280."""
    model = make_model(dim=64, num_heads=1, num_layers=1, ffn_dim=64)
    given = TEXT, torch.randn(20, 3, 58, 104), torch.randn(1, 384, 3, 58, 104), pipeline_noise, [(1.0, 1000.0)]
    pipe = pipeline.WanI2VFast(model)
    wanted = pipe.generate(*given)
    exec(lines, {"pipe": pipe, "poses": CLIP, "frame_num": 9})
    assert relative_error(pipe.generate(*given), wanted) < 1e-5
    assert model._worldkv.stats()["chunks"] == 1
    lingbot.disable(model)


# --- what the model was made with ---


@pytest.mark.parametrize(
    ("window", "sink", "chunk_frames", "wanted"),
    [
        (18, 6, 3, (6, 9)),
        (18, 0, 3, (0, 15)),
        (16, 4, 3, (4, 9)),
        (6, 6, 3, (6, 0)),
        (18, 6, 4, (6, 8)),
        (-1, 0, 3, (3, 6)),
    ],
)
def test_the_config_follows_the_models_window(window, sink, chunk_frames, wanted):
    model = make_model(local_attn_size=window, sink_size=sink)
    config = lingbot.memory_config(model, grid=GRID, chunk_frames=chunk_frames)
    assert (config.sink_frames, config.recent_frames) == wanted and config.chunk_frames == chunk_frames
    config = lingbot.memory_config(model, grid=GRID, recent_frames=12, sink_frames=3)
    assert (config.sink_frames, config.recent_frames) == (3, 12)


def test_a_model_with_a_window_has_it_in_the_memory_too():
    wanted, shorter = (generate(make_model(), 15, window=window, sink_size=3) for window in (12, 9))
    model = make_model(local_attn_size=12, sink_size=3)
    lingbot.enable(model, mode="sink_recent")
    assert relative_error(generate(model, 15), wanted) < 1e-5
    assert relative_error(shorter, wanted) > 1e-2


def test_a_max_attention_size_that_would_cut_the_window_is_told_of_once():
    model = make_model()
    own = generate(model, 9)
    assert relative_error(generate(model, 9, max_attention_size=20), own) > 1e-2
    enable(model)
    with pytest.warns(
        UserWarning, match="lingbot: max_attention_size is not used, got 20 tokens: the memory's"
    ) as told:
        got = generate(model, 9, max_attention_size=20)
    assert len(told) == 1 and relative_error(got, own) < 1e-5
    generate(model, 9, max_attention_size=54)  # of the whole cache: nothing to tell
    generate(model, 9)


# --- poses of a clip ---

CLIP = load("right*50,up*20,forward*40,strafe_left*30,left*150,down*19,forward*61").poses  # 371


@pytest.mark.parametrize(
    "frame_num, chunk_frames", [(81, 3), (161, 3), (162, 3), (361, 3), (1000, 3), (161, 4), (9, 3)]
)
def test_latent_poses_are_those_of_the_pipeline(frame_num, chunk_frames):
    wanted = pipeline.latent_poses(torch.from_numpy(CLIP), frame_num, chunk_frames)
    got = lingbot.latent_poses(torch.from_numpy(CLIP).float(), frame_num, chunk_frames=chunk_frames)
    assert got.shape == wanted.shape and got.dtype == np.float64
    np.testing.assert_allclose(got, wanted, atol=2e-6)
    named = trajectory_poses(
        Trajectory(CLIP[:frame_num], np.ones((len(CLIP[:frame_num]), 4)), ""), chunk_frames=chunk_frames
    )
    np.testing.assert_allclose(named[0], wanted, atol=1e-6)


def test_latent_poses_refuse_less_than_a_chunk_and_what_is_no_pose():
    for poses, frame_num, message in (
        (CLIP[:8], 81, r"poses and frame_num must be at least 9 video frames, .* got 8 and 81"),
        (CLIP, 8, r"got 371 and 8"),
        (CLIP, 0, "frame_num must be at least 1, got 0"),
        (2 * CLIP, 81, "poses must be rigid"),
    ):
        with pytest.raises(ValueError, match=f"lingbot.latent_poses: .*{message}"):
            lingbot.latent_poses(poses, frame_num)
    with pytest.raises(TypeError, match=r"lingbot\.latent_poses: frame_num must be an integer, got 81\.0"):
        lingbot.latent_poses(CLIP, 81.0)


AS_VIDEO_FRAMES = "lingbot: poses may be of video frames, 371 for a rollout of 24 latent ones"


def test_a_clips_own_poses_are_told_of_in_the_first_forward_where_the_cache_is_of_the_whole_clip():
    model = make_model()
    with enable(model, CLIP, **WORLDKV) as handle:
        with pytest.warns(UserWarning, match=AS_VIDEO_FRAMES):
            forward(model, 0)
        handle.restart(lingbot.latent_poses(CLIP, 93))
        generate(model)


def test_a_clips_own_poses_are_told_of_at_the_end_where_the_cache_is_a_window():
    model = make_model()
    handle = enable(model, CLIP, **WORLDKV)
    generate(model, window=9)
    with pytest.warns(UserWarning, match=AS_VIDEO_FRAMES):
        handle.disable()
    assert "forward" not in model.__dict__


# --- rollouts that start again, break off or go another way ---


@pytest.mark.parametrize("again", [True, False])
def test_a_second_rollout_starts_from_an_empty_memory(again):
    model = make_model()
    handle = enable(model, **WORLDKV)
    first, stats = generate(model), handle.stats()
    if again:
        handle.restart(POSES)
        assert torch.equal(generate(model), first)
    else:
        with pytest.warns(UserWarning, match="lingbot: a new rollout goes along the poses of the one before") as told:
            assert torch.equal(generate(model), first)
        assert len(told) == 1
        assert torch.equal(generate(model), first)
    assert handle.stats() == stats


def test_restart_takes_other_poses():
    model, other = make_model(), trajectory_poses(load("forward*36,right*30,left*30"))[0][:24]
    options = {**WORLDKV, "intrinsics": INTRINSICS, "retrieval": "fov"}
    handle = enable(model, **options)
    first = generate(model)
    handle.restart(other, INTRINSICS)
    assert handle.stats()["chunks"] == 0
    second = generate(model)
    handle.disable()
    enable(model, other, **options)
    assert torch.equal(generate(model), second)
    assert not torch.equal(first, second)


def test_poses_may_come_from_a_callable():
    model = make_model()
    with enable(model, **WORLDKV):
        wanted = generate(model)
    enable(model, lambda chunk: torch.from_numpy(POSES[3 * chunk : 3 * chunk + 3]), **WORLDKV)
    assert torch.equal(generate(model), wanted)


@pytest.mark.parametrize("call", [0, 13, 24])
def test_an_exception_inside_a_forward_leaves_the_memory_as_before_its_chunk(call):
    model = make_model()
    handle = enable(model, **WORLDKV)
    wanted = generate(model)
    handle.restart(POSES)
    calls = []

    def fail(*_):
        calls.append(None)
        if len(calls) == call + 1:
            raise MemoryError("no room")

    hook = model.blocks[1].self_attn.v.register_forward_hook(fail)
    with pytest.raises(MemoryError):
        generate(model)
    assert handle.memory.stats()["chunks"] == handle.stats()["chunks"] == call // 5
    hook.remove()
    assert torch.equal(generate(model), wanted)  # and nothing is said of the poses: it may be the same rollout


def test_a_chunk_that_failed_can_be_made_again():
    model, both, twin, both_of_twin = make_model(), caches(), make_model(), caches()
    handle, unhurt = enable(model, **WORLDKV), enable(twin, **WORLDKV)
    for chunk in range(5):
        for timestep in (1000.0, 0.0):
            forward(model, chunk, timestep, both=both)
            forward(twin, chunk, timestep, both=both_of_twin)
    forward(model, 5, both=both)
    hook = model.blocks[1].ffn[2].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        forward(model, 5, 0.0, both=both)
    hook.remove()
    assert handle.stats()["chunks"] == 5
    assert torch.equal(forward(model, 5, both=both), forward(twin, 5, both=both_of_twin))
    handle.finish()
    unhurt.finish()
    assert handle.stats() == unhurt.stats() and handle.stats()["chunks"] == 6


def test_the_models_own_code_does_not_go_on_from_a_past_that_it_has_not():
    model, both = make_model(), caches()
    wanted = generate(model)
    handle = enable(model)
    forward(model, 0, both=both)
    forward(model, 0, 0.0, both=both)
    handle.disable()
    assert forward(model, 1, both=both).isnan().all()
    assert torch.equal(generate(model), wanted)


@pytest.mark.parametrize("inference_mode", [False, True])
def test_after_disable_a_pipeline_that_keeps_its_caches_is_as_before(inference_mode):
    model = make_model()
    pipe, fresh = KeepsItsCaches(model), KeepsItsCaches(model)
    wanted = generate(model, 12, pipe=pipe, window=9, sink_size=3)
    with torch.inference_mode(inference_mode), enable(model) as handle:
        for of_clip in (pipe, fresh):  # one that ran before, one whose caches were never used
            generate(model, 12, pipe=of_clip, window=9, sink_size=3)
            assert all(cache[name].numel() == 0 for cache in of_clip.kept[0] for name in ("k", "v"))
        assert handle.stats()["chunks"] == 4
    for of_clip in (pipe, fresh):
        assert torch.equal(generate(model, 12, pipe=of_clip, window=9, sink_size=3), wanted)


def test_caches_that_the_pipeline_has_dropped_are_not_given_back(monkeypatch):
    model = make_model()
    given_back, resize = [], torch.Tensor.resize_
    monkeypatch.setattr(torch.Tensor, "resize_", lambda x, shape: given_back.append(x) or resize(x, shape))
    with enable(model):
        both = caches()
        for chunk in range(2):
            forward(model, chunk, both=both)
        generate(model, 6)
    assert len(given_back) == 4 and all(any(x is cache[name] for x in given_back) for cache in both[0] for name in "kv")


def test_a_warm_up_forward_is_no_part_of_the_rollout():
    model = make_model()
    handle = enable(model, **WORLDKV)
    wanted = generate(model)
    handle.restart(POSES)
    forward(model, 0, 500.0)
    assert torch.equal(generate(model), wanted)
    assert handle.stats()["chunks"] == CHUNKS


def test_the_published_caches_are_released_and_otherwise_untouched():
    model, both = make_model(), caches()
    enable(model)
    forward(model, 0, both=both)
    forward(model, 0, 0.0, both=both)
    for cache in both[0]:
        assert cache["k"].shape == cache["v"].shape == (1, 0, 2, 64)
        assert cache["k"].untyped_storage().nbytes() == 0
        assert cache["global_end_index"] == cache["local_end_index"] == 0
        end = cache["local_end_index"].item()  # as WorldKV's copy of the pipeline reads a chunk for its own bank
        assert cache["k"][:, end - TOKENS : end].numel() == 0
    assert all(cache["is_init"] for cache in both[1])


def test_arguments_and_caches_of_version_2_are_taken():
    model, both = make_model(), caches()
    wanted = forward(model, 0)
    handle = enable(model)
    for block in model.blocks:  # its attention is called with more arguments
        block.self_attn.register_forward_pre_hook(
            lambda _, args, kwargs: (args, {"frame_seqlen": 6, "seq_lens_int": TOKENS}), with_kwargs=True
        )
    for cache in both[0]:  # and its indices are plain numbers
        cache["global_end_index"] = cache["local_end_index"] = 0
    assert relative_error(forward(model, 0, both=both), wanted) < 1e-5
    assert relative_error(forward(model, 0, 0.0, both=both), wanted) > 1e-2
    assert handle.stats()["chunks"] == 1


def test_inference_mode_will_do():
    model = make_model()
    handle = enable(model, **WORLDKV)
    wanted, stats = generate(model), handle.stats()
    handle.restart(POSES)
    with torch.inference_mode():
        got = generate(model)
    assert torch.equal(got, wanted) and handle.stats() == stats
    handle.restart(POSES)
    assert torch.equal(generate(model), wanted)


def test_caches_of_length_0_will_do():
    model = make_model()
    wanted = generate(model, 9)
    enable(model)
    assert relative_error(generate(model, 9, window=0), wanted) < 1e-5


def test_a_retrieval_kv_is_replaced_by_the_memory_with_one_warning():
    model = make_model()
    extra = [{"k": torch.ones(1, 9, 2, 64), "v": torch.ones(1, 9, 2, 64), "recent_frames": 6}] * 2
    wanted = generate(model, 9)
    enable(model)
    with pytest.warns(UserWarning, match="retrieval_kv is not attended to: the memory retrieves") as told:
        got = generate(model, 9, retrieval_kv=extra)
    assert len(told) == 1
    assert relative_error(got, wanted) < 1e-5
