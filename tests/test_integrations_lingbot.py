"""The memory in LingBot-World-Fast's own code: the published pipeline, restated plainly, patched and unpatched."""

import re
import textwrap
import types
from pathlib import Path

import numpy as np
import plain_lingbot as plain
import pytest
import torch
from conftest import relative_error
from torch import nn

from worldkv_kernels import MemoryConfig, Rope3D, WorldMemory
from worldkv_kernels.integrations import lingbot
from worldkv_kernels.models.lingbot_camera import longest_step
from worldkv_kernels.models.lingbot_config import LingBotConfig
from worldkv_kernels.models.lingbot_world_fast import LingBotConditions, LingBotWorldFast
from worldkv_kernels.models.rollout import noise, rollout
from worldkv_kernels.trajectory import latent_poses, load

GRID, HEIGHT, WIDTH, FRAMES, CHUNKS = (2, 3), 4, 6, 24, 8
TOKENS = 18  # of a chunk
POSES, INTRINSICS = (rows[:FRAMES] for rows in latent_poses(load("right*30,forward*36,left*30")))
CAMERA = plain.camera_embedding(torch.from_numpy(POSES), INTRINSICS[0], 8 * HEIGHT, 8 * WIDTH)
TEXT = torch.randn(5, 24, generator=torch.Generator().manual_seed(1))
IMAGE = torch.randn(20, FRAMES, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(2))
SIGMAS = LingBotConfig().sigmas
WORLDKV = dict(mode="worldkv", sink_frames=3, recent_frames=3, retrieved_chunks=2, bank_chunks=9)


def make_model(dtype=torch.float32, **options):
    sizes = dict(text_len=7, dim=128, ffn_dim=160, freq_dim=16, text_dim=24, num_heads=2, num_layers=2)
    model = plain.WanModelFast(**{**sizes, **options}).eval().requires_grad_(False)
    plain.draw_weights(model)
    return model.to(dtype)


def pipeline_noise(chunk, step, shape):
    return noise(0, chunk, step, (shape[1], shape[0], *shape[2:])).transpose(0, 1)


def generate(model, frames=FRAMES, **options):
    """Latents [frames, channels, height, width] of the pipeline's own code."""
    sampler = [(sigma, 1000 * sigma) for sigma in SIGMAS]
    arguments = TEXT, IMAGE[:, :frames], CAMERA[:, :, :frames], pipeline_noise, sampler
    return plain.WanI2VFast(model).generate(*arguments, **options).transpose(0, 1)


def enable(model, poses=POSES, *, dtype=None, intrinsics=None, **options):
    options = {"mode": "full", "bank_chunks": 9, **options}
    config = lingbot.memory_config(model, grid=GRID, **options)
    return lingbot.enable(model, config, poses=poses, intrinsics=intrinsics, dtype=dtype)


def reference_rollout(model, config):
    """Latents and memory of our own model with the same weights."""
    sizes = dict(num_layers=2, num_heads=2, head_dim=64, ffn_dim=160, text_tokens=7, text_dim=24, frequency_dim=16)
    ours = LingBotWorldFast(LingBotConfig(grid=GRID, **sizes), dtype=torch.float32)
    ours.load_state_dict(model.state_dict())
    memory = WorldMemory(config, dtype=torch.float32)
    conditions = LingBotConditions(TEXT, IMAGE, longest_step(POSES))
    chunks = list(rollout(ours, memory, POSES, INTRINSICS, conditions=conditions))
    return torch.cat([chunk.latents for chunk in chunks]), memory


def caches(length=FRAMES * TOKENS // 3):
    model = types.SimpleNamespace(config=types.SimpleNamespace(dim=128, num_heads=2, num_layers=2))
    return plain.WanI2VFast(model).caches(length, torch.float32)


def forward(model, chunk, timestep=1000.0, *, both=None, video=None, start=None, **options):
    """One forward of the model, as the pipeline calls it."""
    kv_cache, crossattn_cache = both or caches()
    frames = slice(3 * chunk, 3 * chunk + 3)
    x = [torch.zeros(16, 3, HEIGHT, WIDTH)] if video is None else video
    arguments = dict(
        context=[TEXT] * len(x),
        seq_len=4 * TOKENS,
        y=[torch.zeros(20, *latents.shape[1:]) for latents in x],
        dit_cond_dict={"c2ws_plucker_emb": (CAMERA[:, :, frames],)},
        kv_cache=kv_cache,
        crossattn_cache=crossattn_cache,
        current_start=chunk * TOKENS if start is None else start,
        **options,
    )
    with torch.no_grad():
        return model(x=x, t=torch.tensor([timestep]), **arguments)[0]


# --- the same latents ---


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ({"mode": "full"}, {}),
        ({"mode": "sliding", "recent_frames": 6}, {"window": 9}),
        ({"mode": "sink_recent", "sink_frames": 3, "recent_frames": 3}, {"window": 9, "sink_size": 3}),
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
    with pytest.raises(RuntimeError, match=r"lingbot.disable: model must be enabled"):
        lingbot.disable(model)


def test_half_precision_weights_get_a_memory_of_their_dtype():
    exact, model = generate(make_model()), make_model(torch.bfloat16)
    unpatched = relative_error(generate(model), exact)
    handle = enable(model)
    assert handle.memory.dtype is torch.bfloat16
    assert relative_error(generate(model), exact) < 2 * unpatched


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
    model = make_model(dim=64, num_heads=1, num_layers=1, ffn_dim=64)
    at_480_x_832 = TEXT, torch.randn(20, 3, 60, 104), torch.randn(1, 384, 3, 60, 104), pipeline_noise, [(1.0, 1000.0)]
    pipe = plain.WanI2VFast(model)
    wanted = pipe.generate(*at_480_x_832)
    exec(lines, {"pipe": pipe, "poses": POSES})
    assert relative_error(pipe.generate(*at_480_x_832), wanted) < 1e-5
    assert model._worldkv.stats()["chunks"] == 1
    lingbot.disable(model)


# --- rollouts that start again, break off or go another way ---


def test_a_second_rollout_starts_from_an_empty_memory():
    model = make_model()
    handle = enable(model, **WORLDKV)
    first, stats = generate(model), handle.stats()
    assert torch.equal(generate(model), first)
    assert handle.stats() == stats


def test_restart_takes_other_poses():
    model, other = make_model(), np.roll(POSES, 9, axis=0)
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
    assert torch.equal(generate(model), wanted)


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
    with pytest.raises(RuntimeError, match="must match the existing size"):
        forward(model, 1, both=both)
    assert torch.equal(generate(model), wanted)


def test_a_warm_up_forward_is_no_part_of_the_rollout():
    model = make_model()
    handle = enable(model, **WORLDKV)
    wanted = generate(model)
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
    with torch.inference_mode():
        got = generate(model)
    assert torch.equal(got, wanted) and handle.stats() == stats
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


# --- what is refused, and changes nothing ---


@pytest.mark.parametrize(
    ("chunk", "options", "error", "message"),
    [
        (5, {}, RuntimeError, r"current_start must be 54 \(the next chunk\), 36 \(the current one again\) or 0"),
        (1, {}, RuntimeError, r"got 18: the memory cannot skip chunks or go back"),
        (3, {"start": 55}, ValueError, "current_start must be a multiple of the chunk's 18 tokens"),
        (2, {"both": "other"}, RuntimeError, "classifier-free guidance by two forwards is not supported"),
        (3, {"both": "other"}, RuntimeError, "classifier-free guidance by two forwards is not supported"),
        (2, {"video": [torch.zeros(16, 3, HEIGHT, WIDTH)] * 2}, ValueError, "x must hold one video.* got 2"),
        (2, {"video": [torch.zeros(16, 3, 6, 4)]}, ValueError, r"x must be of \(3, 2, 3\) frames.*got \(3, 3, 2\)"),
        (2, {"video": [torch.zeros(16, 3, 8, 6)]}, ValueError, r"got \(3, 4, 3\)"),
        (2, {"video": [torch.zeros(16, 1, HEIGHT, WIDTH)]}, ValueError, r"got \(1, 2, 3\)"),
    ],
)
def test_forwards_that_the_memory_cannot_serve(chunk, options, error, message):
    model, both = make_model(), caches()
    handle = enable(model, **WORLDKV)
    for past in range(3):
        forward(model, past, both=both)
    before = handle.memory.stats()
    options = {"both": both, **options}
    if options["both"] == "other":
        options["both"] = caches()
    with pytest.raises(error, match=f"lingbot: .*{message}"):
        forward(model, chunk, **options)
    assert handle.memory.stats() == before
    forward(model, 2, 0.0, both=both)
    assert handle.stats()["chunks"] == 3


def test_guidance_by_two_forwards_is_refused_at_its_first_step():
    model, conditional, unconditional = make_model(), caches(), caches()
    enable(model)
    forward(model, 0, both=conditional)
    with pytest.raises(RuntimeError, match="classifier-free guidance"):
        forward(model, 0, both=unconditional)


def test_training_mode_and_gradients_are_refused():
    model, both = make_model(), caches()
    handle = enable(model)
    model.train()
    with pytest.raises(RuntimeError, match="lingbot: the model must be in eval mode"):
        forward(model, 0, both=both)
    model.eval()
    model.blocks[0].self_attn.q.weight.requires_grad_(True)
    no_grad, torch.no_grad = torch.no_grad, torch.enable_grad
    try:
        with pytest.raises(RuntimeError, match=r"lingbot: forward must run under torch.no_grad\(\)"):
            forward(model, 0, both=both)
    finally:
        torch.no_grad = no_grad
    forward(model, 0, both=both)
    assert handle.stats()["chunks"] == 0


def test_a_memory_of_another_dtype_is_refused():
    model = make_model()
    enable(model, dtype=torch.bfloat16)
    with pytest.raises(TypeError, match=r"lingbot: the memory's dtype must be that of q, torch.float32, got"):
        forward(model, 0)


def test_poses_that_are_missing_wrong_or_too_few():
    model = make_model()
    for poses, message in (
        (None, "poses must be given"),
        (POSES[:, :3], r"poses must be \[frames, 4, 4\], got"),
        (2 * POSES, "poses must be rigid"),
        (np.full_like(POSES, np.nan), "poses must be finite"),
    ):
        with pytest.raises(ValueError, match=f"lingbot: .*{message}"):
            enable(model, poses, **WORLDKV)
    handle = enable(model, POSES[:8], **WORLDKV)
    with pytest.raises(ValueError, match="lingbot: poses must be of 9 latent frames up to chunk 2, got 8"):
        generate(model)
    assert handle.stats()["chunks"] == 2


def test_enabling_twice_is_refused():
    model = make_model()
    handle = enable(model)
    with pytest.raises(RuntimeError, match=r"lingbot.enable: model must not be enabled"):
        enable(model)
    generate(model, 6)
    assert handle.stats()["chunks"] == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_layers": 3}, "num_layers must be the model's 2, got 3"),
        ({"num_heads": 4}, "num_heads must be the model's 2, got 4"),
        ({"head_dim": 128}, "head_dim must be the model's 64, got 128"),
        ({"eps": 1e-5}, "eps must be the model's 1e-06, got 1e-05"),
        ({"rope": None}, "rope must be the model's, .* got None"),
        ({"rope": Rope3D(64, theta=256)}, "rope must be the model's"),
        ({"rope": Rope3D(64, max_position=512)}, "rope must be the model's"),
    ],
)
def test_a_config_of_another_model_is_refused(options, message):
    model = make_model()
    with pytest.raises(ValueError, match=rf"lingbot.enable: config's {message}"):
        enable(model, **options)
    assert "forward" not in model.__dict__ and "forward" not in model.blocks[0].self_attn.__dict__


def test_models_of_other_classes_are_refused():
    other = make_model()
    other.blocks[1].self_attn = nn.Identity()
    for model, got in ((nn.Linear(2, 2), "Linear"), (plain.WanI2VFast(None), "WanI2VFast"), (other, "of Identity")):
        with pytest.raises(TypeError, match=f"lingbot: model must be LingBot-World-Fast's WanModelFast.* got .*{got}"):
            lingbot.memory_config(model, grid=GRID)


def test_another_patch_of_the_attention_is_refused():
    model = make_model()
    model.blocks[1].self_attn.forward = print
    with pytest.raises(RuntimeError, match=r"blocks\[1\].self_attn.forward must be the model's own, got print"):
        enable(model)


def sp_attn_forward_causal(self, *args, **kwargs):
    return type(self).forward(self, *args, **kwargs)


def sp_dit_forward_causal(self, *args, **kwargs):
    return type(self).forward(self, *args, **kwargs)


def put_in_sequence_parallel(model):
    for block in model.blocks:
        block.self_attn.forward = types.MethodType(sp_attn_forward_causal, block.self_attn)
    model.forward = types.MethodType(sp_dit_forward_causal, model)


def test_sequence_parallel_on_one_device_is_patched_and_restored():
    model = make_model()
    wanted = generate(model, 9)
    put_in_sequence_parallel(model)
    patched = [model.forward, *(block.self_attn.forward for block in model.blocks)]
    with enable(model) as handle:
        assert relative_error(generate(model, 9), wanted) < 1e-5
        assert handle.stats()["chunks"] == 3
    assert patched == [model.forward, *(block.self_attn.forward for block in model.blocks)]


def test_sequence_parallel_on_more_devices_is_refused(monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    model = make_model()
    with enable(model):  # a process with a model of its own
        pass
    put_in_sequence_parallel(model)
    with pytest.raises(RuntimeError, match="sequence parallel is supported on 1 device, got 2"):
        enable(model)
