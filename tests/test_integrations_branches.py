"""Guidance by two caches, and videos in a batch, over a memory of two branches: each as over a memory of its own."""

import math
import re
import weakref

import plain_self_forcing as plain
import pytest
import recorded_pass
import small_lingbot
import small_matrix_game
import torch
from conftest import relative_error
from small_self_forcing import CHUNKS, GIVEN, OTHER_TEXT, TEXT, VIDEO, generate, make_model, pipeline
from test_integrations_attach import POSES as ALONG
from test_integrations_attach import WORLDKV, attach_own_window
from test_integrations_chunks import ALONG_THE_SAME, POSES, TOKENS, make, run_pass

from worldkv_kernels import MemoryConfig, WorldMemory
from worldkv_kernels.actions import parse_actions
from worldkv_kernels.integrations import attach, matrix_game, passes
from worldkv_kernels.integrations.chunks import Chunks

A, B = ["A"], ["B"]  # streams
STEPS = (1000.0, 500.0, 0.0)

# --- passes ---


def qkv(chunk, step, layer, stream):
    seed = 1000 * chunk + 10 * step + layer + 100_000 * ord(stream[0])
    return torch.randn(3, TOKENS, 64, generator=torch.Generator().manual_seed(seed))


def one_pass(chunks, chunk, step, stream, *, layers=(0, 1)):
    with chunks.model_pass(chunk * TOKENS, timestep=torch.tensor([STEPS[step]]), stream=stream):
        return [chunks.attend(layer, *qkv(chunk, step, layer, stream)) for layer in layers]


def two_videos(chunks, chunk, step, stream, *, layers=(0, 1)):
    """A pass over A and B in a batch."""
    with chunks.model_pass(chunk * TOKENS, timestep=torch.tensor([STEPS[step]]), stream=stream):
        given = [[qkv(chunk, step, layer, one) for one in (A, B)] for layer in layers]
        return [chunks.attend(layer, *torch.stack(of, dim=1)) for layer, of in zip(layers, given, strict=True)]


def chunk_of(chunks, chunk, *streams):
    """Each stream's passes, one stream after the other."""
    return {stream[0]: [one_pass(chunks, chunk, step, stream) for step in range(3)][-1] for stream in streams}


def alone(count, stream):
    """The last pass over the last of so many chunks, with a memory of its own, and its counts."""
    chunks = make()
    for chunk in range(count):
        outputs = chunk_of(chunks, chunk, stream)[stream[0]]
    return outputs, chunks.stats()


ORDERS = {
    "in turn": lambda chunk: [(step, stream) for step in range(3) for stream in (A, B)],
    "one after the other": lambda chunk: [(step, stream) for stream in (A, B) for step in range(3)],
    "B first behind chunk 0": lambda chunk: [
        (step, stream) for step in range(3) for stream in ((B, A) if chunk else (A, B))
    ],
    "B is done before A begins": lambda chunk: [
        (step, stream) for stream in ((B, A) if chunk % 2 else (A, B)) for step in range(3)
    ],
}


@pytest.mark.parametrize("order", ORDERS)
def test_two_streams_in_any_order_are_as_two_memories(order):
    chunks, last = make(branches=2), {}
    for chunk in range(7):
        for step, stream in ORDERS[order](chunk):
            last[stream[0]] = one_pass(chunks, chunk, step, stream)
    for stream in (A, B):
        want, stats = alone(7, stream)
        assert all(map(torch.equal, last[stream[0]], want))
        for name in ("chunks", "tokens_attended", "chunks_retrieved", "chunks_banked"):
            assert chunks.stats()[name] == stats[name]
    assert stats["chunks_retrieved"] > 2


def test_videos_in_a_batch_are_as_two_memories():
    chunks = make(branches=2)
    for chunk in range(7):
        for step in range(3):
            got = two_videos(chunks, chunk, step, A)
    for branch, stream in enumerate((A, B)):
        want, stats = alone(7, stream)
        assert all(torch.equal(x[branch], y) for x, y in zip(got, want, strict=True))
    assert chunks.stats()["chunks"] == stats["chunks"] == 7


@pytest.mark.parametrize("clean", [(A, B), (B, A)])
def test_stats_end_a_chunk_when_both_have_made_their_clean_pass(clean):
    chunks = make(branches=2)
    for chunk in (0, 1):
        for stream in (A, B):
            one_pass(chunks, chunk, 0, stream)
        assert chunks.stats()["chunks"] == chunk
        one_pass(chunks, chunk, 2, clean[0])
        assert chunks.stats()["chunks"] == chunk
        one_pass(chunks, chunk, 2, clean[1])
        assert chunks.stats()["chunks"] == chunk + 1


def test_where_one_of_two_makes_no_clean_pass_its_last_one_counts():
    chunks, unhurt = make(branches=2), make()
    for chunk in range(4):
        for step in range(3):
            got = one_pass(chunks, chunk, step, A)
            one_pass(unhurt, chunk, step, A)
        one_pass(chunks, chunk, 1, B)
        assert chunks.stats()["chunks"] == chunk  # one more of its passes could come
    chunks.finish()
    assert chunks.stats()["chunks"] == 4
    assert all(map(torch.equal, got, alone(4, A)[0]))


def test_a_chunk_needs_all_layers_of_both():
    chunks, of_all = make(branches=2), "must have passes over each of the 2 branches, with a cache each or in a batch"
    one_pass(chunks, 0, 2, A)
    for stream in (A, B):  # the second is not known yet
        with pytest.raises(RuntimeError, match=f"test: chunk 0 {of_all}, before it ends, got none over branch 1"):
            one_pass(chunks, 1, 0, stream)
    with pytest.raises(RuntimeError, match="got none over branch 1"):
        chunks.finish()
    assert chunks.stats()["chunks"] == 0
    one_pass(chunks, 0, 0, B, layers=(0,))
    message = re.escape("the last pass over chunk 0 of branch 1 must attend every layer, got none for [1]")
    with pytest.raises(RuntimeError, match=message):
        chunks.finish()
    one_pass(chunks, 0, 0, B)
    one_pass(chunks, 1, 0, B)
    with pytest.raises(RuntimeError, match=r"chunk 1 must have passes over .* got none over branch 0"):
        one_pass(chunks, 2, 0, B)
    one_pass(chunks, 1, 0, A)
    one_pass(chunks, 1, 2, A, layers=(1,))
    with pytest.raises(RuntimeError, match=r"chunk 1 of branch 0 must attend every layer, got none for \[0\]"):
        one_pass(chunks, 2, 0, B)


def test_a_layer_of_one_alone_counts_for_that_one():
    chunks = make(branches=2)
    two_videos(chunks, 0, 0, A)
    with chunks.model_pass(0, timestep=torch.tensor([0.0]), stream=A):
        chunks.attend(0, *torch.stack([qkv(0, 1, 0, one) for one in (A, B)], dim=1))
        chunks.attend(1, *qkv(0, 1, 1, A))
    with pytest.raises(RuntimeError, match=r"chunk 0 of branch 1 must attend every layer, got none for \[1\]"):
        chunks.finish()


@ALONG_THE_SAME
@pytest.mark.parametrize("streams", [(A, B), (B, A), (["C"], ["D"]), (["C"], B)])
@pytest.mark.parametrize("made", [1, 3])
def test_a_new_rollout_with_the_same_streams_or_others(made, streams):
    """After one chunk, both of whose clean passes are done, or after several."""
    chunks = make(branches=2)
    for chunk in range(made):
        chunk_of(chunks, chunk, A, B)
    for chunk in range(6):
        got = chunk_of(chunks, chunk, *streams)
    for stream in streams:
        want, stats = alone(6, stream)
        assert all(map(torch.equal, got[stream[0]], want))
    assert chunks.stats()["chunks"] == stats["chunks"] == 6
    assert chunks.stats()["chunks_retrieved"] == stats["chunks_retrieved"] > 0


@ALONG_THE_SAME
def test_videos_of_one_chunk_by_two_pipelines_in_turn():
    chunks, caches = make(branches=2), (["C"], ["D"])
    for _ in range(2):
        for streams in ((A, B), caches):
            got = chunk_of(chunks, 0, *streams)
            for stream in streams:
                assert all(map(torch.equal, got[stream[0]], alone(1, stream)[0]))
    assert chunks.begun == 4


def test_a_rollout_is_new_where_the_one_that_makes_clean_passes_begins_again():
    chunks = make(branches=2)
    for _ in range(2):
        for step in range(3):
            one_pass(chunks, 0, step, A)
            one_pass(chunks, 0, min(step, 1), B)
    assert chunks.begun == 2


@ALONG_THE_SAME
@pytest.mark.parametrize("made", [1, 3])
def test_a_new_rollout_of_videos_in_a_batch(made):
    chunks = make(branches=2)
    for chunk in range(made):
        two_videos(chunks, chunk, 2, A)
    for stream in (A, B):
        two_videos(chunks, 0, 0, stream)
        two_videos(chunks, 0, 2, stream)
        assert chunks.stats()["chunks"] == 1
    two_videos(chunks, 1, 0, B)
    with pytest.raises(RuntimeError, match="must have 2 caches, one for each of the config's branches, got another"):
        two_videos(chunks, 1, 0, A)


def test_a_warm_up_and_a_rollout_broken_off_are_forgotten():
    chunks, caches = make(branches=2), [["C"], ["D"]]
    one_pass(chunks, 0, 1, A)
    for step in range(3):  # the first of these is taken for the warm-up's second stream
        for stream in caches:
            one_pass(chunks, 0, step, stream)
    got = chunk_of(chunks, 1, *caches)
    for stream in caches:
        assert all(map(torch.equal, got[stream[0]], alone(2, stream)[0]))
    chunks = make(branches=2)
    for stream in (A, B, *caches, *caches):
        one_pass(chunks, 0, 0, stream)
    chunk_of(chunks, 0, *caches)
    assert chunks.stats()["chunks"] == 1


def test_more_streams_than_branches_are_refused():
    chunks, others = make(branches=2), (["C"], ["D"])
    message = "test: all passes of a rollout must have 2 caches, one for each of the config's branches, got another one"
    for stream in (A, B, others[0], A):  # what came before the third may have been broken off
        one_pass(chunks, 0, 0, stream)
    with pytest.raises(RuntimeError, match=f"{message} at chunk 0"):
        one_pass(chunks, 0, 0, B)
    chunk_of(chunks, 0, others[0], A)
    before = chunks.memory.stats()
    for stream in (B, others[1]):
        with pytest.raises(RuntimeError, match=f"{message} at chunk 1"):
            one_pass(chunks, 1, 0, stream)
    assert chunks.memory.stats() == before
    one_pass(chunks, 1, 0, A)
    with pytest.raises(RuntimeError, match=f"{message} at chunk 1"):
        one_pass(chunks, 1, 0, B)


def test_after_an_exception_in_chunk_0_any_streams_may_begin():
    chunks, caches = make(branches=2), (["C"], ["D"])
    for stream in (A, B, *caches):  # A and B are given up
        one_pass(chunks, 0, 0, stream)
    with pytest.raises(KeyboardInterrupt), chunks.model_pass(0, stream=caches[0]):
        raise KeyboardInterrupt
    got = chunk_of(chunks, 0, A, B)
    for stream in (A, B):
        assert all(map(torch.equal, got[stream[0]], alone(1, stream)[0]))


def test_streams_that_nobody_tells_apart_are_one():
    chunks = make(branches=2)
    for _ in (A, B):
        run_pass(chunks, 0, 0.0)
    with pytest.raises(RuntimeError, match="got none over branch 1"):
        chunks.finish()


@pytest.mark.parametrize("hurt", [A, B])
def test_an_exception_drops_the_chunk_of_both(hurt):
    chunks = make(branches=2)
    for chunk in range(5):
        chunk_of(chunks, chunk, A, B)
    for stream in (A, B)[: 1 + (hurt is B)]:
        one_pass(chunks, 5, 0, stream)
    with pytest.raises(KeyboardInterrupt), chunks.model_pass(5 * TOKENS, stream=hurt):
        chunks.attend(0, *torch.full((3, TOKENS, 64), float("nan")))
        raise KeyboardInterrupt
    one_pass(chunks, 5, 2, B)
    assert chunks.stats()["chunks"] == 5
    got = chunk_of(chunks, 5, B, A)
    for stream in (A, B):
        assert all(map(torch.equal, got[stream[0]], alone(6, stream)[0]))


def test_the_streams_of_chunk_0_are_held_no_longer_than_it_is_the_current_one():
    class Cache(list):
        """A list that weakref takes."""

    chunks, caches = make(branches=2), [Cache("A"), Cache("B")]
    held = [weakref.ref(cache) for cache in caches]
    for cache in caches:
        one_pass(chunks, 0, 2, cache)
    del cache
    caches = caches[:1]
    assert held[1]() is not None  # or another one could have its id
    one_pass(chunks, 1, 0, caches[0])
    assert held[1]() is None


def test_streams_over_a_memory_that_was_saved_are_told_by_their_order(tmp_path):
    chunks = make(branches=2)
    for chunk in range(5):
        chunk_of(chunks, chunk, A, B)
    chunks.settle()
    chunks.memory.save(tmp_path / "m")
    again = Chunks("test", chunks.config, POSES)
    again.go_on(WorldMemory.load(tmp_path / "m"))
    got = chunk_of(again, 5, A, B)
    with pytest.raises(RuntimeError, match="must have 2 caches"):
        one_pass(again, 5, 0, ["C"])
    got = chunk_of(again, 6, B, A)
    for stream in (A, B):
        assert all(map(torch.equal, got[stream[0]], alone(7, stream)[0]))


# --- pipelines ---


class Apart:
    """Two models in turn in place of one: a pipeline's forwards with the prompt and against it, each with a memory."""

    def __init__(self, *models):
        self.both = [plain.WanDiffusionWrapper(model) for model in models]
        self.model, self.scheduler = models[0], self.both[0].scheduler

    def __call__(self, *args, **kwargs):
        self.both.append(self.both.pop(0))
        return self.both[-1](*args, **kwargs)


def guided(model):
    return pipeline(model, plain.CausalDiffusionInferencePipeline)


def guided_latents(model, chunks=CHUNKS):
    return generate(guided(model), chunks)


def in_a_batch(model, chunks=CHUNKS, **options):
    """Two videos, of prompts of their own."""
    noise = torch.cat([VIDEO, VIDEO.flip(1)])[:, : 3 * chunks]
    return pipeline(model).inference(noise, {"prompt_embeds": torch.cat([TEXT, OTHER_TEXT])}, **options)


@pytest.mark.parametrize(
    ("of", "kind", "window", "sink"),
    [
        (guided_latents, plain.CausalWanModel, -1, 0),
        (guided_latents, plain.CausalWanModel, 9, 3),
        (guided_latents, plain.PairedCausalWanModel, 9, 0),
        (in_a_batch, plain.CausalWanModel, 9, 0),
        (in_a_batch, plain.PairedCausalWanModel, 9, 3),
    ],
)
def test_the_latents_are_those_of_the_models_own_caches(of, kind, window, sink):
    model = make_model(window, sink, kind=kind)
    wanted = of(model, 5)
    handle = attach_own_window(model, branches=2)
    assert relative_error(of(model, 5), wanted) < 1e-5
    assert handle.stats()["chunks"] == 5
    assert relative_error(of(model, 2), wanted[..., :6, :, :, :]) < 1e-5  # the next clip, of new caches


def test_initial_latents_are_the_first_chunks_of_both():
    model = make_model()
    wanted = generate(guided(model), 3, initial_latent=GIVEN)
    handle = attach_own_window(model, branches=2)
    pipe = guided(model)
    for _ in range(2):
        assert relative_error(generate(pipe, 3, initial_latent=GIVEN), wanted) < 1e-5
        assert handle.stats()["chunks"] == 5


@pytest.mark.parametrize(
    "options",
    [dict(), dict(poses=ALONG, bank="host"), dict(poses=ALONG, bank_bits=4, keep_ratio=0.5)],
    ids=["content", "pose, host", "pose, 4 bits"],
)
def test_guidance_is_as_by_two_models_with_a_memory_each(options):
    models = [make_model() for _ in range(3)]
    handles = [attach(one, **{**WORLDKV, **options}) for one in models[1:]]
    apart = plain.CausalDiffusionInferencePipeline(Apart(*models[1:]), 6)
    wanted = generate(apart)
    assert relative_error(generate(guided(make_model())), wanted) > 1e-3  # what is retrieved matters
    handle = attach(models[0], branches=2, **{**WORLDKV, **options})
    assert torch.equal(generate(guided(models[0])), wanted)
    for name in ("chunks", "tokens_attended", "chunks_retrieved", "chunks_banked"):
        assert handle.stats()[name] == handles[0].stats()[name] == handles[1].stats()[name]
    assert handle.stats()["chunks_retrieved"] == 3
    assert 2 * handles[0].stats()["kept_bytes"] == handle.stats()["kept_bytes"]


def test_a_saved_rollout_of_guidance_goes_on(tmp_path):
    model = make_model()
    wanted = generate(guided(model), 4)
    given = wanted[None]
    with attach(model, branches=2, **WORLDKV) as handle:
        whole = generate(guided(model), 3, initial_latent=given[:, :9])
        generate(guided(model), 0, initial_latent=given[:, :9])
        handle.save(tmp_path / "m")
    with attach(model, branches=2, **WORLDKV) as handle:
        handle.load(tmp_path / "m")
        assert handle.memory.config.branches == 2 and handle.stats()["chunks"] == 3
        assert torch.equal(generate_from(guided(model), 3, 3), whole[9:])
    with attach(model, **WORLDKV) as handle, pytest.raises(ValueError, match=r"must be of branches=1, .* got 2"):
        handle.load(tmp_path / "m")


def generate_from(pipe, chunk, chunks):
    """The chunks of VIDEO behind so many that the memory has."""
    conditions, made = {"prompt_embeds": TEXT}, []
    pipe._begin(VIDEO)
    with torch.no_grad():
        for at in range(chunks):
            start = 3 * (chunk + at)
            made.append(pipe._denoised(VIDEO[:, 3 * at : 3 * at + 3], conditions, start))
            pipe._pass(made[-1], conditions, torch.zeros(1, 3, dtype=torch.int64), start)
    return torch.cat(made, dim=1)[0]


@pytest.mark.parametrize("of", [guided_latents, in_a_batch])
def test_passes_of_both_may_be_graphs(of, monkeypatch):
    monkeypatch.setattr(passes, "why_not_on", lambda device: None)
    monkeypatch.setattr(passes, "_capture_on", lambda device: recorded_pass.recorded)
    monkeypatch.setattr(passes, "_KINDS", 2)  # which a pipeline of one branch has
    model = make_model()
    with attach(model, branches=2, **WORLDKV) as handle:
        wanted, counted = of(model), handle.stats()
    with attach(model, branches=2, **WORLDKV, graph=True) as handle:
        assert torch.equal(of(model), wanted) and handle.stats() == counted
        per_chunk = (len(plain.STEPS) + 1) * (1 if of is in_a_batch else 2)
        assert handle.replayed_passes == (CHUNKS - 2) * per_chunk


@pytest.mark.parametrize("of", [guided_latents, in_a_batch])
def test_the_compiled_blocks_serve_both(of):
    torch._dynamo.reset()
    model = make_model()
    handle = attach(model, branches=2, **WORLDKV)
    wanted, counted = of(model), handle.stats()
    for block in model.blocks:
        block.self_attn.compile(fullgraph=True, backend="aot_eager")
    handle.restart()
    assert torch.equal(of(model), wanted) and handle.stats() == counted
    torch._dynamo.reset()


@pytest.mark.parametrize("branches", [1, 2])
def test_a_batch_of_other_videos_than_branches_is_refused(branches):
    model = make_model()
    with attach_own_window(model, branches=branches) as handle:
        generate(guided(model) if branches == 2 else model, 2)
        before = handle.stats()
        message = rf"attach: x must hold one video, or one for each of the config's branches={branches}, got 3"
        with pytest.raises(ValueError, match=message):
            pipeline(model).inference(torch.cat([VIDEO] * 3), {"prompt_embeds": torch.cat([TEXT] * 3)})
        assert handle.stats() == before


def test_detach_gives_both_caches_back():
    model = make_model()
    pipe = guided(model)
    wanted = generate(pipe, 3)
    sizes = [cache["k"].shape for caches in (pipe.kv_cache1, pipe.of_negative[0]) for cache in caches]
    with attach_own_window(model, branches=2):
        generate(pipe, 3)
        of_both = [cache for caches in (pipe.kv_cache1, pipe.of_negative[0]) for cache in caches]
        assert not any(cache["k"].numel() for cache in of_both)
    assert [cache["k"].shape for cache in of_both] == sizes
    assert torch.equal(generate(pipe, 3), wanted)


# --- Matrix-Game-2.0 and LingBot-World-Fast ---


def played(model, actions, other=None, chunks=5):
    """Latents [2, frames, ...] of two videos in a batch, which differ in image and noise, and perhaps in actions."""
    of_both = small_matrix_game.given_of(actions), small_matrix_game.given_of(other or actions, seed=7)
    given = {name: torch.cat([of[name] for of in of_both]) for name in of_both[0]}
    noise = small_matrix_game.first_noise(chunks)
    with torch.no_grad():
        return small_matrix_game.pipeline(model).inference(torch.cat([noise, noise.flip(2)]), given, mode="universal")


@pytest.mark.parametrize("mode", ["sliding", "worldkv"])
def test_two_games_that_are_played_alike(mode):
    model, actions, chunks = small_matrix_game.plain_model(), parse_actions("J*28,L*28"), 3 if mode == "sliding" else 5
    options = dict(mode=mode, bank_chunks=12, retrieved_chunks=1, branches=2)
    with matrix_game.enable(model, **options) as handle:
        made = played(model, actions, chunks=chunks)
        assert handle.stats()["chunks"] == chunks
    if mode == "sliding":
        assert relative_error(made, played(model, actions, chunks=chunks)) < 1e-5
        return
    with matrix_game.enable(model, actions=actions, **options) as handle:
        assert torch.equal(played(model, actions), made)
        assert handle.stats()["chunks_retrieved"] > 0


def test_two_games_of_one_memory_go_one_way():
    model, actions = small_matrix_game.plain_model(), [parse_actions(keys) for keys in ("J*28,L*28", "L*28,J*28")]
    with matrix_game.enable(model, bank_chunks=12, retrieved_chunks=1, branches=2) as handle:
        with pytest.raises(ValueError, match="mouse_cond must be the same for each video of a batch"):
            played(model, *actions)
        assert handle.stats()["chunks"] == 0


def test_actions_of_one_game_that_are_no_numbers_differ_from_no_others():
    config = MemoryConfig(num_layers=1, num_heads=1, grid=(1, 1), retrieval="action", branches=2)
    pressed = matrix_game._Pressed(config)
    pressed.conditions = torch.full((1, 9, 2), math.nan), torch.zeros(1, 9, 4)
    assert torch.isnan(torch.as_tensor(pressed.of(0).mouse)).all()  # which begin_chunk refuses by what it is
    for videos in (0, 2):
        pressed.conditions = torch.zeros(videos, 5, 2), torch.zeros(videos, 5, 4)
        with pytest.raises(ValueError, match=rf"must be \[videos, 9, c\], .*, got \[{videos}, 5, 2\]"):
            pressed.of(0)


class Guided:
    """LingBot's model, called once more with a cache and a prompt of its own; by another model where one is given."""

    def __init__(self, model, other=None, frames=small_lingbot.FRAMES):
        self.model, self.other = model, other or model
        self.caches = small_lingbot.pipeline.WanI2VFast(model).caches(6 * frames, torch.float32)

    def __getattr__(self, name):
        return getattr(self.model, name)

    def __call__(self, x, *, context, kv_cache, crossattn_cache, **given):
        (flow,) = self.model(x, context=context, kv_cache=kv_cache, crossattn_cache=crossattn_cache, **given)
        kv_cache, crossattn_cache = self.caches
        context = [-text for text in context]
        (away,) = self.other(x, context=context, kv_cache=kv_cache, crossattn_cache=crossattn_cache, **given)
        return [away + 2 * (flow - away)]


def test_guidance_of_lingbot():
    model, others = small_lingbot.make_model(), [small_lingbot.make_model() for _ in range(2)]
    wanted = small_lingbot.generate(Guided(model, frames=6), 6)
    with small_lingbot.enable(model, branches=2):
        assert relative_error(small_lingbot.generate(Guided(model, frames=6), 6), wanted) < 1e-5
    handles = [small_lingbot.enable(one, **small_lingbot.WORLDKV) for one in others]
    apart = small_lingbot.generate(Guided(*others))
    with small_lingbot.enable(model, branches=2, **small_lingbot.WORLDKV) as handle:
        assert torch.equal(small_lingbot.generate(Guided(model)), apart)
        assert handle.stats()["chunks_retrieved"] == handles[1].stats()["chunks_retrieved"] > 4
