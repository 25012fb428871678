"""The memory in models of the Self-Forcing family: the published pipelines, restated plainly, with it and without."""

import re
import textwrap
import weakref
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import plain_self_forcing as plain
import pytest
import recorded_pass
import torch
from conftest import relative_error
from small_self_forcing import (
    CHUNKS,
    FRAME_TOKENS,
    GIVEN,
    GRID,
    OTHER_TEXT,
    TEXT,
    generate,
    make_model,
    pipeline,
)
from torch import nn

from worldkv_kernels import WorldMemory
from worldkv_kernels.integrations import attach, causal, detach, passes
from worldkv_kernels.trajectory import latent_poses, load

POSES = latent_poses(load("right*40,left*40"))[0][: 3 * CHUNKS]
KINDS = pytest.mark.parametrize("kind", [plain.CausalWanModel, plain.PairedCausalWanModel])
WINDOWS = pytest.mark.parametrize(("window", "sink"), [(-1, 0), (9, 0), (9, 3)])
WORLDKV = dict(sink_frames=3, recent_frames=3, retrieved_chunks=1, bank_chunks=CHUNKS)


def attach_own_window(model, **options):
    """A memory that keeps what the model's own cache keeps."""
    mode = "full" if model.local_attn_size == -1 else "sink_recent"
    return attach(model, mode=mode, bank_chunks=2 * CHUNKS, **options)


# --- the same latents ---


@KINDS
@WINDOWS
def test_the_latents_are_those_of_the_models_own_cache(kind, window, sink):
    model = make_model(window, sink, kind=kind)
    wanted = generate(model)
    handle = attach_own_window(model)
    assert relative_error(generate(model), wanted) < 1e-5
    assert handle.stats()["chunks"] == CHUNKS
    whole = make_model(kind=kind)
    assert window == -1 or relative_error(generate(whole), wanted) > 1e-2  # the window matters here


def test_a_sink_may_end_inside_a_chunk():
    """In Self-Forcing's code; LongLive's keeps that frame as the chunk's first pass, of noise, has left it."""
    model, paired = make_model(10, 4), make_model(10, 4, kind=plain.PairedCausalWanModel)
    wanted = generate(model)
    assert relative_error(generate(paired), wanted) > 1e-2
    for one in (model, paired):
        attach_own_window(one)
        assert relative_error(generate(one), wanted) < 1e-5


def test_sliding_needs_no_sink_of_the_models():
    model = make_model(9)
    wanted = generate(model)
    attach(model, mode="sliding", recent_frames=6)
    assert relative_error(generate(model), wanted) < 1e-5


@KINDS
@WINDOWS
def test_initial_latents_are_the_first_chunks(kind, window, sink):
    model = make_model(window, sink, kind=kind)
    wanted = generate(model, 4, initial_latent=GIVEN)
    assert torch.equal(wanted[:6], GIVEN[0])
    handle = attach_own_window(model)
    assert relative_error(generate(model, 4, initial_latent=GIVEN), wanted) < 1e-5
    assert handle.stats()["chunks"] == 6
    assert relative_error(generate(model, 4)[6:], wanted[12:]) > 1e-2  # and they matter


def test_image_to_video_and_blocks_of_one_frame():
    model = make_model(model_type="i2v", in_dim=12)
    draw = torch.Generator().manual_seed(5)
    given = {"prompt_embeds": TEXT, "clip_fea": torch.randn(1, 4, plain.VISUAL_DIM, generator=draw)}
    given["y"] = torch.randn(1, 8, 1, 4, 6, generator=draw)
    pipe = pipeline(model, num_frame_per_block=1)
    noise = torch.randn(1, 5, 4, 4, 6, generator=draw)
    wanted = pipe.inference(noise, given)
    handle = attach_own_window(model)
    assert relative_error(pipe.inference(noise, given), wanted) < 1e-5
    assert handle.stats()["chunks"] == 5 and handle.memory.config.chunk_frames == 1


class ByPlace(plain.CausalWanSelfAttention):
    """CausVid's: the cache holds the video by place, and nothing else is known of it."""

    def forward(self, x, seq_lens, grid_sizes, freqs, block_mask, kv_cache=None, current_start=0, cache_start=None):
        q, k, v = self.turned_qkv(x, grid_sizes, freqs, current_start)
        end = current_start + x.shape[1]
        kv_cache["k"][:, current_start:end], kv_cache["v"][:, current_start:end] = k, v
        return self.o(plain.attention(q, kv_cache["k"][:, :end], kv_cache["v"][:, :end]).flatten(2))


class ByPlaceModel(plain.CausalWanModel):
    attention_class = ByPlace

    def __init__(self, **options):
        super().__init__(**options)
        for block in self.blocks:
            del block.self_attn.local_attn_size, block.self_attn.sink_size


def test_a_model_that_knows_no_window():
    model = make_model(kind=ByPlaceModel)
    wanted = generate(model)
    handle = attach(model, mode="full", bank_chunks=CHUNKS)
    assert relative_error(generate(model), wanted) < 1e-5
    assert handle.memory.config.recent_frames == 6


@KINDS
def test_passes_may_be_graphs(kind, monkeypatch):
    monkeypatch.setattr(passes, "why_not_on", lambda device: None)
    monkeypatch.setattr(passes, "_capture_on", lambda device: recorded_pass.recorded)
    model = make_model(9, 3, kind=kind)
    with attach_own_window(model):
        wanted = generate(model)
    with attach_own_window(model, graph=True) as handle:
        assert torch.equal(generate(model), wanted)
        assert handle.replayed_passes == (CHUNKS - 2) * (len(plain.STEPS) + 1)


# --- retrieval ---


def by_hand(model, memory, along):
    """The model with its attention done by a memory whose chunks are begun and ended here."""
    chunks = []

    def attention_of(module, layer):
        def forward(x, seq_lens, grid_sizes, freqs, block_mask, kv_cache, current_start, cache_start):
            chunk = current_start // (3 * FRAME_TOKENS)
            if chunk not in chunks:
                if chunks:
                    memory.end_chunk()
                chunks.append(chunk)
                memory.begin_chunk(**along(chunk))
            q, k, v = (projection(x)[0] for projection in (module.q, module.k, module.v))
            out = memory.attend(layer, q, k, v, module.norm_q.weight, module.norm_k.weight)
            return module.o(out.flatten(1)[None])

        return forward

    for layer, block in enumerate(model.blocks):
        block.self_attn.forward = attention_of(block.self_attn, layer)
    return generate(model)


@pytest.mark.parametrize("by", ["content", "pose"])
def test_chunks_come_back_by_content_or_where_poses_are_given_by_pose(by):
    model = make_model()
    with attach(model, poses=POSES if by == "pose" else None, **WORLDKV) as handle:
        got = generate(model)
        config = handle.memory.config
        assert config.retrieval == by and handle.stats()["chunks_retrieved"] == 3
        # a second clip
        if by == "pose":
            handle.restart(POSES)
        assert torch.equal(generate(model), got)

    def along(chunk):
        return {"poses": POSES[3 * chunk : 3 * chunk + 3]} if by == "pose" else {}

    assert relative_error(got, by_hand(model, WorldMemory(config, dtype=torch.float32), along)) < 1e-6
    sliding = make_model()
    attach(sliding, mode="sink_recent", sink_frames=3, recent_frames=3)
    assert relative_error(got, generate(sliding)) > 1e-3


def test_poses_by_content_are_refused_as_are_poses_that_are_missing():
    model = make_model()
    with pytest.raises(ValueError, match="attach: poses must be None for retrieval 'content', got ndarray"):
        attach(model, poses=POSES, retrieval="content", **WORLDKV)
    with pytest.raises(ValueError, match="attach: poses must be given, or a callable, for this retrieval, got None"):
        attach(model, retrieval="pose", **WORLDKV)
    with pytest.raises(ValueError, match=r"attach: poses must be \[frames, 4, 4\]"):
        attach(model, poses=np.eye(4), **WORLDKV)
    assert "forward" not in model.__dict__


# --- what the model was made with ---


@pytest.mark.parametrize(
    ("heads", "layers", "window", "sink", "frames", "wanted"),
    [(12, 30, -1, 0, 3, (3, 6)), (12, 30, 12, 3, 3, (3, 6)), (40, 40, 6, 0, 3, (0, 3)), (40, 40, 9, 1, 1, (1, 7))],
)
def test_the_config_follows_models_of_1_3_billion_and_of_14(heads, layers, window, sink, frames, wanted):
    with torch.device("meta"):
        model = plain.CausalWanModel(
            dim=128 * heads, ffn_dim=1, num_heads=heads, num_layers=layers, local_attn_size=window, sink_size=sink
        )
    model.num_frame_per_block = frames
    config = causal.memory_config(model, grid=(30, 52))
    assert (config.num_layers, config.num_heads, config.head_dim, config.eps) == (layers, heads, 128, 1e-6)
    assert (config.chunk_frames, config.sink_frames, config.recent_frames) == (frames, *wanted)
    assert causal.memory_config(model, grid=(30, 52), chunk_frames=4, sink_frames=2, recent_frames=5).recent_frames == 5


def test_a_window_that_is_no_number_is_refused():
    model = make_model()
    model.blocks[0].self_attn.local_attn_size = [12, 24]
    with pytest.raises(TypeError, match=r"attach: the model's local_attn_size must be an integer, got \[12, 24\]"):
        causal.memory_config(model, grid=GRID)


# --- what is given back ---


@pytest.mark.parametrize(("kind", "window"), [(plain.CausalWanModel, -1), (plain.PairedCausalWanModel, 9)])
def test_a_pipeline_that_keeps_its_cache_makes_several_clips_and_finds_it_again(kind, window):
    model = make_model(window, kind=kind)
    before = {name: set(part.__dict__) for name, part in model.named_modules()}
    pipe, fresh = pipeline(model), pipeline(model)
    first, second = generate(pipe), generate(pipe, 4, initial_latent=GIVEN)
    with attach_own_window(model) as handle:
        for own in (pipe, fresh):  # one that ran before, one whose cache was never used
            assert relative_error(generate(own), first) < 1e-5
            assert relative_error(generate(own, 4, initial_latent=GIVEN), second) < 1e-5
            assert all(cache[name].numel() == 0 for cache in own.kv_cache1 for name in ("k", "v"))
            assert all(cache["local_end_index"] == 0 for cache in own.kv_cache1)
        assert handle.stats()["chunks"] == 6
    assert {name: set(part.__dict__) for name, part in model.named_modules()} == before
    for own in (pipe, fresh):
        assert torch.equal(generate(own), first) and torch.equal(generate(own, 4, initial_latent=GIVEN), second)
    with pytest.raises(RuntimeError, match="detach: model must have a memory, got one that has none"):
        detach(model)


@KINDS
def test_the_models_own_code_does_not_go_on_from_a_past_that_it_has_not(kind):
    model = make_model(kind=kind)
    pipe = pipeline(model)
    attach_own_window(model)
    generate(pipe, 2)
    detach(model)
    level, conditions = torch.ones(1, 3, dtype=torch.int64), {"prompt_embeds": TEXT}
    with torch.no_grad():
        assert pipe._pass(GIVEN[:, :3], conditions, level, 6)[0].isnan().all()


class Adapted(nn.Module):
    """What peft makes of a model."""

    def __init__(self, model):
        super().__init__()
        self.base_model = model

    def get_base_model(self):
        return self.base_model

    def forward(self, *args, **kwargs):
        return self.base_model(*args, **kwargs)

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.base_model, name)


def test_a_model_with_adapters_around_it():
    model = make_model(9, kind=plain.PairedCausalWanModel)
    wanted = generate(model)
    adapted = Adapted(model).eval()
    handle = attach_own_window(adapted)
    assert relative_error(generate(adapted), wanted) < 1e-5 and handle.stats()["chunks"] == CHUNKS
    with pytest.raises(RuntimeError, match="attach: model must have no memory yet, got one that has"):
        attach(model)
    gone = weakref.ref(handle)
    detach(adapted)
    del handle
    assert torch.equal(generate(adapted), wanted) and gone() is None


# --- another prompt ---


class KeepsThePast(plain.InteractiveCausalInferencePipeline):
    def _recache_after_switch(self, output, current_start_frame, new_conditional_dict):
        self._forget_text()


@WINDOWS
def test_another_prompt_keeps_the_past(window, sink):
    model = make_model(window, sink, kind=plain.PairedCausalWanModel)
    pipe = pipeline(model, KeepsThePast, switches=[(9, OTHER_TEXT)])
    wanted, unchanged = generate(pipe), generate(pipeline(model, KeepsThePast))
    assert torch.equal(wanted[:9], unchanged[:9]) and relative_error(wanted[9:], unchanged[9:]) > 1e-2
    handle = attach_own_window(model)
    assert relative_error(generate(pipe), wanted) < 1e-5
    assert handle.stats()["chunks"] == CHUNKS


@pytest.mark.parametrize("global_sink", [True, False])
@pytest.mark.parametrize(("window", "switch", "frames", "token"), [(-1, 9, 9, 0), (9, 12, 9, 18), (9, 6, 6, 0)])
def test_past_chunks_that_are_recomputed_at_a_change_of_prompt_are_refused(global_sink, window, switch, frames, token):
    model = make_model(window, kind=plain.PairedCausalWanModel)
    pipe = pipeline(model, plain.InteractiveCausalInferencePipeline, switches=[(switch, OTHER_TEXT)])
    pipe.global_sink = global_sink
    own = generate(pipe)
    with attach_own_window(model) as handle:
        message = (
            rf"attach: a pass must be over one chunk, 3 frames, got {frames} frames of the past from token {token}"
        )
        with pytest.raises(RuntimeError, match=message):
            generate(pipe)
        assert handle.stats()["chunks"] == switch // 3
    assert torch.equal(generate(pipe), own)


def test_the_newest_chunk_alone_may_be_recomputed():
    model = make_model(kind=plain.PairedCausalWanModel)
    pipe = pipeline(model, plain.InteractiveCausalInferencePipeline, switches=[(3, OTHER_TEXT)])
    wanted, kept = generate(pipe), generate(pipeline(model, KeepsThePast, switches=[(3, OTHER_TEXT)]))
    assert relative_error(kept, wanted) > 1e-3
    handle = attach_own_window(model)
    assert relative_error(generate(pipe), wanted) < 1e-5
    assert handle.stats()["chunks"] == CHUNKS


# --- the documentation ---


def blocks(page, language="python"):
    text = (Path(__file__).parents[1] / page).read_text()
    found = re.findall(rf"^( *)```{language}\n(.*?)^ *```$", text, flags=re.DOTALL | re.MULTILINE)
    return [textwrap.dedent(block) for _, block in found]


@pytest.mark.parametrize("page", ["README.md", "docs/models.md"])
def test_the_lines_as_they_are_documented(page, capsys):
    (lines,) = (block for block in blocks(page) if "attach(" in block)
    model = make_model(6)
    plainly = pipeline(model)
    wanted = generate(plainly)
    around = SimpleNamespace(generator=plainly.generator, inference=lambda noise, text_prompts: generate(plainly))
    names = {"pipeline": around, "noise": None}
    exec(compile(lines, page, "exec"), names)
    made = names["video"] if "video" in names else generate(plainly)
    assert names["memory"].stats()["chunks_retrieved"] > 0 and relative_error(made, wanted) > 1e-3
    assert capsys.readouterr().out in ("", f"{names['memory'].stats()['chunks_retrieved']}\n")
    assert ("detach(" in lines) == ("forward" not in model.__dict__)


def test_the_change_of_prompt_as_it_is_documented():
    (lines,) = blocks("docs/models.md", "py")
    model = make_model(9, 3, kind=plain.PairedCausalWanModel)
    wanted = generate(pipeline(model, KeepsThePast, switches=[(9, OTHER_TEXT)]))
    pipe = pipeline(model, plain.InteractiveCausalInferencePipeline, switches=[(9, OTHER_TEXT)])
    assert relative_error(generate(pipe), wanted) > 1e-3
    exec(lines, {"pipeline": pipe})
    assert torch.equal(generate(pipe), wanted)


# --- what is refused ---


def test_guidance_by_two_forwards_is_refused_where_the_memory_has_one_branch():
    model = make_model()
    pipe = pipeline(model, plain.CausalDiffusionInferencePipeline)
    own = generate(pipe, 3)
    for given in (None, GIVEN):
        with attach_own_window(model), pytest.raises(RuntimeError, match="guidance by two forwards give it branches=2"):
            generate(pipe, 3, initial_latent=given)
    assert torch.equal(generate(pipe, 3), own)


def test_other_chunks_than_the_models_are_refused():
    model = make_model()
    pipe = pipeline(model)
    with attach_own_window(model) as handle:
        with pytest.raises(ValueError, match=r"attach: x must be of \(3, 2, 3\) frames.* got \(1, 2, 3\)"):
            generate(pipe, independent_first_frame=True)
        with pytest.raises(RuntimeError, match=r"attach: current_start must be 0 \(the next chunk\)"), torch.no_grad():
            pipe._pass(GIVEN[:, :3], {"prompt_embeds": TEXT}, torch.zeros(1, 1), 6)
        with pytest.raises(RuntimeError, match="attach: forward must have the pipeline's kv_cache, got none"):
            model(GIVEN, t=torch.zeros(1, 1), context=TEXT, seq_len=99)
        model.block_mask = "of blocks"
        with pytest.raises(RuntimeError, match="attach: the model's block_mask must be None, got one"):
            generate(pipe, 2)
        model.block_mask = None
        generate(pipe, 2)
        with pytest.raises(ValueError, match=r"x must be of \(3, 2, 3\) frames.* got \(6, 2, 3\)"), torch.no_grad():
            pipe._pass(GIVEN, {"prompt_embeds": TEXT}, torch.zeros(1, 1), 6)
        assert handle.stats()["chunks"] == 2


class Scaled(plain.CausalWanSelfAttention):
    def forward(self, x, *args, kv_cache=None, current_start=0, t_scale=1.0):
        """As LongLive 2.0's, whose positions are scaled."""


class Uncached(plain.CausalWanSelfAttention):
    def forward(self, x, seq_lens, grid_sizes, freqs):
        """As Wan's own."""


class Untimed(plain.CausalWanModel):
    def _forward_inference(self, x):
        raise NotImplementedError


def test_a_second_memory_is_refused_and_its_config_is_as_before():
    model = make_model()
    before = causal.memory_config(model, grid=GRID)
    with attach(model):
        assert causal.memory_config(model, grid=GRID) == before
        with pytest.raises(RuntimeError, match="attach: model must have no memory yet, got one that has"):
            attach(model)


def give_one_head(attention):
    attention.num_heads, attention.head_dim = 1, 128


def other_models():
    def changed(change):
        model = make_model()
        change(model)
        return model

    def last(model):
        return model.blocks[1].self_attn

    def of_class(name):
        return changed(lambda model: setattr(last(model), "__class__", name))

    yield nn.Linear(2, 2), "Linear with no blocks"
    yield changed(lambda model: delattr(model, "freqs")), "CausalWanModel with no freqs"
    yield changed(lambda model: setattr(model, "__class__", Untimed)), "Untimed with a forward that takes no t$"
    yield changed(lambda model: delattr(last(model), "norm_k")), r"no norm_k in blocks\[1\].self_attn, a CausalWan"
    yield changed(lambda model: delattr(last(model), "eps")), r"no eps in blocks\[1\]"
    yield changed(lambda model: setattr(model.blocks[1], "self_attn", None)), r"no q in .*, a NoneType"
    yield of_class(Uncached), r"blocks\[1\].self_attn.forward that takes no kv_cache"
    yield of_class(Scaled), r"blocks\[1\].self_attn.forward that takes args"
    yield changed(lambda model: setattr(last(model), "gate", nn.Linear(2, 2))), r"self_attn.gate, which the memory"
    yield changed(lambda model: setattr(last(model), "gain", nn.Parameter(torch.ones(1)))), "self_attn.gain, which"
    yield changed(lambda model: setattr(last(model), "eps", 1e-5)), r"norm_q of eps=1e-06, not the attention's 1e-05"
    yield changed(lambda model: give_one_head(last(model))), r"blocks\[1\].self_attn of other sizes than the first"
    no_bias = nn.LayerNorm(128, bias=False)
    for norm in (nn.RMSNorm(64), nn.LayerNorm(128), no_bias, nn.RMSNorm(128, elementwise_affine=False)):
        found = r"blocks\[1\].self_attn.norm_q that is no RMS norm over all 128 numbers of the heads"
        yield changed(lambda model, norm=norm: setattr(last(model), "norm_q", norm)), found


@pytest.mark.parametrize(("model", "found"), list(other_models()))
def test_other_models_are_refused(model, found):
    for call in (lambda: attach(model), lambda: causal.memory_config(model, grid=GRID)):
        with pytest.raises(TypeError, match=f"attach: model must be a causal Wan model, .* got .*{found}"):
            call()


def test_attention_that_something_else_has_replaced_is_refused():
    model = make_model()

    def quantised(*args):
        """Stands for any."""

    model.blocks[1].self_attn.forward = quantised
    with pytest.raises(RuntimeError, match=r"attach: blocks\[1\].self_attn.forward must be the model's own, got quant"):
        attach(model)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"modes": "full"}, TypeError, "modes must be an argument of attach or a field of .* such as mode, got"),
        ({"config": "full"}, TypeError, "config must be a MemoryConfig, such as causal.memory_config makes of"),
        ({"grid": (480, 832)}, ValueError, "grid must be .* in tokens"),
        ({"num_heads": 4}, ValueError, "config's num_heads must be the model's 2, got 4"),
        ({"num_kv_heads": 1}, ValueError, "config's num_kv_heads must be the model's 2, got 1"),
        ({"backend": "cudnn"}, ValueError, "backend must be one of"),
    ],
)
def test_what_attach_is_given_is_checked_before_anything_changes(options, error, message):
    model = make_model()
    with pytest.raises(error, match=f"attach: {message}"):
        attach(model, **options)
    assert "forward" not in model.__dict__ and "forward" not in model.blocks[0].self_attn.__dict__
