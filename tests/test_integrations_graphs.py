"""Passes of models' own code as graphs: on a CPU by recordings that repeat operations, on a GPU by CUDA graphs."""

import gc
import weakref

import pytest
import recorded_pass
import small_lingbot
import small_matrix_game
import torch
from conftest import DEVICE
from plain_matrix_game_pipeline import CausalInferencePipeline

from worldkv_kernels.actions import parse_actions
from worldkv_kernels.integrations import lingbot, matrix_game, passes
from worldkv_kernels.integrations.watch import Watch
from worldkv_kernels.replays import Replays
from worldkv_kernels.trajectory import latent_poses, load

ON_GPU = DEVICE.type == "cuda"
DTYPE = torch.bfloat16 if ON_GPU else torch.float32
CHUNKS = 12
STEPS = 5  # passes of a chunk: of LingBot, and below of Matrix-Game too
LISTED = latent_poses(load("right*36,left*36,right*36,left*36"))[0][: 3 * CHUNKS]


def along(chunk):
    return LISTED[3 * chunk : 3 * chunk + 3]


def backwards(chunk):
    return LISTED[::-1][3 * chunk : 3 * chunk + 3]


LINGBOT = dict(mode="worldkv", sink_frames=3, recent_frames=3, retrieved_chunks=2, bank_chunks=CHUNKS)
BANKS = pytest.mark.parametrize(
    "bank", [{}, {"bank": "host"}, {"bank": "host", "bank_chunks": 4}], ids=["device", "host", "host, full"]
)


@pytest.fixture(autouse=True)
def stand_in(monkeypatch):
    if not ON_GPU:
        monkeypatch.setattr(passes, "why_not_on", lambda device: None)
        monkeypatch.setattr(passes, "_capture_on", lambda device: recorded_pass.recorded)


class Lingbot:
    """The plain pipeline over a clip of CHUNKS chunks."""

    def __init__(self, **sizes):
        self.model = small_lingbot.make_model(DTYPE, **sizes).to(DEVICE)
        generator = torch.Generator().manual_seed(1)
        self.image = torch.randn(20, 3 * CHUNKS, small_lingbot.HEIGHT, small_lingbot.WIDTH, generator=generator)
        self.camera = torch.randn(1, 384, *self.image.shape[1:], generator=generator)

    def enable(self, graph, **options):
        return lingbot.enable(self.model, **{"poses": along, **LINGBOT, **options}, graph=graph)

    def latents(self, chunks=CHUNKS, pipe=None):
        def drawn(*place):
            return small_lingbot.pipeline_noise(*place).to(DEVICE)

        pipe = pipe or small_lingbot.pipeline.WanI2VFast(self.model)
        sampler = [(sigma, 1000 * sigma) for sigma in small_lingbot.SIGMAS]
        given = (x.to(DEVICE) for x in (self.image[:, : 3 * chunks], self.camera[:, :, : 3 * chunks]))
        return pipe.generate(small_lingbot.TEXT.to(DEVICE), *given, drawn, sampler).cpu()


class OtherPrompt(small_lingbot.pipeline.WanI2VFast):
    """From chunk 5 on another prompt, of as many tokens or of others, whose keys and values the next pass makes, and
    from chunk 8 on again."""

    tokens = 5

    def prompt(self, context, chunk, crossattn_cache):
        if chunk in (5, 8):
            for cache in crossattn_cache:
                cache["is_init"] = torch.tensor(0)
        return context if chunk < 5 else (-context if chunk < 8 else 2 * context)[: self.tokens]


class WithoutActions(CausalInferencePipeline):
    """The pipeline for a model without action modules: no caches of actions, and none among the conditions."""

    def _initialize(self, batch, dtype, device="cpu"):
        layers = range(self.num_transformer_blocks)
        empty = torch.zeros(batch, 6 * self.frame_seq_length, 2, 64, dtype=dtype, device=device)
        self.kv_cache1 = [{"k": empty.clone(), "v": empty.clone()} for _ in layers]
        self.kv_cache_keyboard = self.kv_cache_mouse = [None for _ in layers]
        self.crossattn_cache = [{"k": None, "v": None, "is_init": False} for _ in layers]

    def _condition(self, conditional_dict, start_frame, mode):
        given = super()._condition(conditional_dict, start_frame, mode)
        return {name: rows for name, rows in given.items() if "cond_concat" in name or "visual" in name}


class MatrixGame:
    def __init__(self, actions=False):
        model = small_matrix_game.plain_model()
        if not actions:
            for block in model.blocks:
                block.action_model = None
        self.model, self.actions = model.to(DEVICE, DTYPE), actions
        given = small_matrix_game.conditions(*small_matrix_game.actions_of("universal", CHUNKS))
        self.given = {name: rows.to(DTYPE) for name, rows in given.items()}

    def enable(self, graph, **options):
        along = {} if self.actions else {"actions": parse_actions("J*60,L*84")}
        if not self.actions:
            options = {
                "retrieval": matrix_game.ActionRetrieval(matrix_game.ActionIntegrator(layout="universal")),
                **options,
            }
        sizes = {"bank_chunks": CHUNKS, "retrieved_chunks": 1}
        return matrix_game.enable(self.model, **{**sizes, **along, **options}, graph=graph)

    def latents(self, chunks=CHUNKS):
        pipe = small_matrix_game.pipeline(self.model, CausalInferencePipeline if self.actions else WithoutActions)
        pipe.denoising_step_list = pipe.denoising_step_list[[0, 1, 1, 2][: STEPS - 1]]
        return small_matrix_game.latents(pipe, self.given, chunks).cpu()


@BANKS
@pytest.mark.parametrize("of", [Lingbot, MatrixGame])
def test_a_rollout_of_replays_is_the_rollout(of, bank):
    case = of()
    with case.enable(False, **bank) as handle:
        wanted, counted = case.latents(), handle.stats()
        assert counted["chunks_retrieved"] > 4 and handle.replayed_passes == 0
    with case.enable(True, **bank) as handle:
        assert torch.equal(case.latents(), wanted)
        assert handle.stats() == counted
        # Chunk 0 fills the cache of text or image, and has the first passes of the kind of all others; chunk 1 is
        # captured, and what chunk 2 has of replays is compared.
        assert handle.replayed_passes == STEPS * (CHUNKS - 2)


def test_a_second_rollout_and_one_after_restart_are_of_the_same_graphs():
    """Also where the pipeline makes its caches anew, as each one does here."""
    case = Lingbot()
    with case.enable(False) as handle:
        wanted = case.latents()
        handle.restart(backwards)
        turned = case.latents()
    with case.enable(True) as handle:
        case.latents(4)
        handle.restart(along)
        before = handle.replayed_passes
        assert torch.equal(case.latents(), wanted)
        handle.restart(backwards)
        assert torch.equal(case.latents(), turned) and not torch.equal(turned, wanted)
        assert handle.replayed_passes - before == 2 * STEPS * CHUNKS - 2  # but for the passes that fill the caches


def test_arguments_may_have_places_and_be_written_again():
    case, buffer = Lingbot(), []

    def other(module, args, kwargs):
        (x,) = kwargs["x"]
        if not buffer or buffer[0].is_inference():
            buffer[:] = [torch.empty_like(x)]
        buffer[0].copy_(x)
        places = ("t", "context", "seq_len", "y", "dit_cond_dict", "kv_cache", "crossattn_cache", "current_start")
        rest = {name: value for name, value in kwargs.items() if name not in (*places, "x")}
        return ([buffer[0]], *(kwargs[name] for name in places)), rest

    case.model.register_forward_pre_hook(other, with_kwargs=True)
    with case.enable(False):
        wanted = case.latents()
    with case.enable(True) as handle:
        assert torch.equal(case.latents(), wanted) and handle.replayed_passes == STEPS * (CHUNKS - 2)


def test_what_is_returned_is_not_written_again():
    case, returned = Lingbot(), []
    case.model.register_forward_hook(lambda module, args, made: returned.append((made[0], made[0].clone())))
    with case.enable(True):
        case.latents()
    assert all(torch.equal(flow, at_first) for flow, at_first in returned)


@pytest.mark.parametrize("mode", ["inference, then not", "not, then inference"])
def test_modes_are_of_other_graphs(mode):
    case = Lingbot()
    with case.enable(False):
        wanted = case.latents()
    with case.enable(True) as handle:
        for inference in (mode[0] == "i", mode[0] != "i"):
            handle.restart(along)
            before = handle.replayed_passes
            with torch.inference_mode(inference):
                assert torch.equal(case.latents(), wanted)
            assert handle.replayed_passes == before + STEPS * (CHUNKS - 2)


def test_weights_that_move_begin_anew_and_others_are_read_where_they_lie():
    def changed(rollout):
        weight = case.model.blocks[0].ffn[0].weight
        if rollout == 1:
            weight.data = weight.data * 1.5
        elif rollout == 2:
            weight.mul_(1.5)

    made, replayed = {}, []
    for graph in (False, True):
        case = Lingbot()
        with case.enable(graph) as handle:
            for rollout in range(3):
                changed(rollout)
                handle.restart(along)
                made[graph, rollout] = case.latents()
                replayed.append(handle.replayed_passes)
    assert all(torch.equal(made[True, rollout], made[False, rollout]) for rollout in range(3))
    assert not torch.equal(made[True, 1], made[True, 2])
    once = STEPS * (CHUNKS - 2)
    assert replayed == [0, 0, 0, once, 2 * once, 2 * once + STEPS * CHUNKS - 1]


def test_a_module_that_is_replaced_begins_anew_and_is_let_go():
    made = {}
    for graph in (False, True):
        case = Lingbot()
        with case.enable(graph) as handle:
            case.latents()
            ffn = case.model.blocks[0].ffn
            other = torch.nn.Linear(ffn[0].in_features, ffn[0].out_features).to(DEVICE, DTYPE).requires_grad_(False)
            other.weight.copy_(1.5 * ffn[0].weight)
            other.bias.copy_(ffn[0].bias)
            replaced, ffn[0] = weakref.ref(ffn[0].weight), other
            handle.restart(along)
            made[graph] = case.latents()
            gc.collect()
            assert replaced() is None
    assert torch.equal(made[True], made[False])


def test_passes_are_compared_at_another_place_than_they_were_captured_at():
    """Rollouts of one chunk each, of which all are the first."""
    case = Lingbot()
    with case.enable(True) as handle:
        for _ in range(4):
            case.latents(1)
            handle.restart(along)
        assert handle.replayed_passes == 0
        case.latents()
        assert handle.replayed_passes > 0


def test_what_passes_were_given_is_let_go():
    case = Lingbot()
    with case.enable(True) as handle:
        case.latents()
        assert handle._session.passes._now == []


def test_a_model_enabled_in_inference_mode_may_be_called_outside_of_it():
    case = Lingbot()
    with torch.inference_mode():
        handle = case.enable(False)
    assert not any(name.is_inference() for name in handle._chunks._names)


def test_a_model_that_is_cast_gets_other_graphs():
    case = Lingbot()
    other = torch.float32 if ON_GPU else torch.bfloat16
    with case.enable(True) as handle:
        case.latents()
        case.model.to(other)
        handle.restart(along)
        made, replayed = case.latents(), handle.replayed_passes
        assert handle.memory.dtype is other and replayed == STEPS * (CHUNKS - 2)
    with case.enable(False):
        assert torch.equal(case.latents(), made)


def test_disable_leaves_nothing():
    case = Lingbot()
    own = case.latents()
    handle = case.enable(True)
    case.latents()
    kept = [weakref.ref(handle._session.passes), weakref.ref(handle.memory)]
    gc.collect()
    gc.disable()  # what the graphs hold is to be free at once
    try:
        handle.disable()
        assert kept[0]() is None
    finally:
        gc.enable()
    assert torch.equal(case.latents(), own) and handle.replayed_passes == 0
    del handle
    gc.collect()
    assert kept[1]() is None


def both(case, reason, chunks=CHUNKS):
    """With graph=None there is a warning and the rollout goes on as if there were none; with True there is an error."""
    with case.enable(False):
        wanted = case.latents(chunks)
    with case.enable(None) as handle:
        with pytest.warns(UserWarning, match=f"passes are not made of CUDA graphs: {reason}") as told:
            assert torch.equal(case.latents(chunks), wanted)
        assert len([one for one in told if "CUDA graphs" in str(one.message)]) == 1 and handle.replayed_passes <= STEPS
    with case.enable(True), pytest.raises(RuntimeError, match=f"must have passes that can be replayed, but {reason}"):
        case.latents(chunks)


def test_a_replay_that_differs_is_not_used_and_leaves_nothing(monkeypatch):
    """Not even in the rows of a clean pass, which become history."""
    of_device = passes._capture_on

    def capture_on(device):
        capture = of_device(device)

        def wrong(function):
            replay = capture(function)
            fixed = next(
                cell.cell_contents for cell in function.__closure__ if isinstance(cell.cell_contents, dict)
            )  # arguments by name

            def then():
                fixed["x"][0].mul_(1.5)
                replay()

            return then

        return wrong

    monkeypatch.setattr(passes, "_capture_on", capture_on)
    both(Lingbot(), "the replay of a pass differs from the pass", 6)


def test_matrix_games_actions_are_told_by_the_line_that_reads_the_host():
    both(MatrixGame(actions=True), r"a pass could not be captured: aten\._local_scalar_dense.* \(plain_matrix_game", 6)


def test_a_capture_that_fails_is_told_by_the_line(monkeypatch):
    case, of_device, inside = Lingbot(), passes._capture_on, []

    def capture_on(device):
        capture = of_device(device)

        def noted(function):
            inside.append(True)
            try:
                return capture(function)
            finally:
                inside.clear()

        return noted

    def fails(module, args):
        if inside:
            raise RuntimeError("not here\nat all")

    monkeypatch.setattr(passes, "_capture_on", capture_on)
    case.model.head.register_forward_pre_hook(fails)
    both(case, r"a pass could not be captured: RuntimeError: not here \(test_integrations_graphs.py, line ", 6)


@pytest.mark.parametrize("changes", [False, True])
def test_what_a_pass_brings_from_the_host_must_not_change(monkeypatch, changes):
    """On a CPU, numbers of int16 stand for those of the host."""
    from worldkv_kernels.integrations import watch

    def of_int16(func, args, kwargs, device):
        return args[0] if func is torch.ops.aten._to_copy.default and args[0].dtype is torch.int16 else None

    if not ON_GPU:
        monkeypatch.setattr(watch, "_uploaded", of_int16)
    case = Lingbot()

    def brings(module, args):
        chunk = case.model._worldkv._chunks.current if changes else 3
        return (args[0] + torch.tensor([chunk], dtype=torch.int16).to(args[0]),)

    case.model.patch_embedding.register_forward_pre_hook(brings)
    if changes:
        return both(case, "a pass could not be captured: a pass copies other numbers from the host", 6)
    with case.enable(False):
        wanted = case.latents()
    with case.enable(True) as handle:
        assert torch.equal(case.latents(), wanted) and handle.replayed_passes == STEPS * (CHUNKS - 2)


def test_what_the_memory_reads_to_check_it_is_no_reason(monkeypatch):
    """It reads nothing in a capture, which the stand-in for one does not tell."""
    monkeypatch.setenv("WORLDKV_DEBUG", "1")
    monkeypatch.setattr(recorded_pass, "READS", ())
    case = Lingbot()
    with case.enable(True) as handle:
        case.latents(6)
        assert handle.replayed_passes == STEPS * 4


def test_a_pass_that_writes_its_arguments_is_none_to_capture():
    case = Lingbot()
    text = small_lingbot.TEXT.to(DEVICE)

    def writes(module, args, made):
        text.mul_(1)

    case.model.patch_embedding.register_forward_hook(writes)
    case.latents = lambda chunks: Lingbot.latents(case, chunks)
    small_text, small_lingbot.TEXT = small_lingbot.TEXT, text
    try:
        both(case, r"a pass could not be captured: aten\.mul_\.Tensor writes into an argument", 4)
    finally:
        small_lingbot.TEXT = small_text


def test_arguments_that_differ_in_each_chunk_end_it(monkeypatch):
    case = MatrixGame()
    condition = CausalInferencePipeline._condition  # with the keys from the start on
    monkeypatch.setattr(WithoutActions, "_condition", condition)
    both(case, "the arguments have other shapes or values in each chunk")


def test_an_argument_that_could_hold_tensors_ends_it():
    case = Lingbot()

    def adds(module, args, kwargs):
        return args, kwargs | {"dit_cond_dict": kwargs["dit_cond_dict"] | {"other": object()}}

    case.model.register_forward_pre_hook(adds, with_kwargs=True)
    both(case, "an argument is a object, which could hold tensors", 4)


@pytest.mark.skipif(ON_GPU, reason="a GPU has graphs")
def test_without_a_gpu_there_are_none(monkeypatch):
    monkeypatch.undo()
    case = Lingbot()
    with (
        case.enable(True),
        pytest.raises(ValueError, match="lingbot: graph must be None or False where the model is on cpu, got True"),
    ):
        case.latents(1)
    with case.enable(None) as handle:
        case.latents(4)
        assert handle.replayed_passes == 0


def test_a_model_that_is_wrapped_has_none():
    wrapper = torch.nn.Module()
    wrapper.module = small_lingbot.make_model()
    with pytest.raises(ValueError, match=r"lingbot\.enable: graph must be None or False where the model is wrapped"):
        lingbot.enable(wrapper, mode="full", poses=along, graph=True)
    assert not hasattr(wrapper.module, "_worldkv")


@pytest.mark.parametrize("whole", [False, True])
def test_a_compiled_model_has_none(whole):
    torch._dynamo.reset()
    case = Lingbot()
    if whole:
        compiled = torch.compile(case.model, backend="eager")
        case.latents = lambda chunks: Lingbot.latents(case, chunks, small_lingbot.pipeline.WanI2VFast(compiled))
    else:
        case.model.blocks[1].compile(backend="eager")
    both(case, "the model is compiled by torch.compile", 3)
    torch._dynamo.reset()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_what_a_pass_copies_to_the_device_and_reads_there_is_seen_in_any_mode(mode):
    """On a device without storage. In inference mode torch hands on operations that it has not taken apart."""
    device, there = torch.device("meta"), torch.zeros(4, device="meta")
    with mode(), Watch(device, []) as watch:
        made = torch.arange(4.0, device="cpu").to(device)
        there.copy_(torch.ones(4, device="cpu"))
        assert watch.reason is None
        with pytest.raises(RuntimeError, match="meta"):
            float((made + there).sum())
    assert [upload.tolist() for upload in watch.uploads] == [[0, 1, 2, 3], [1, 1, 1, 1]]
    assert watch.reason.startswith("aten._local_scalar_dense.default reads the device on the host (test_integrations_")


def test_graphs_that_begin_anew_have_other_memory_to_share():
    made = []

    def capture_on():
        made.append(f"pool {len(made)}")
        return lambda function: function

    replays = Replays("here", insists=True, capture_on=capture_on)
    for _ in range(2):
        replays.capture(print), replays.capture(print)
        replays.forget()
    assert made == ["pool 0", "pool 1"]


@pytest.mark.parametrize("tokens", [5, 4])
def test_another_prompt_is_no_reason_against_graphs(tokens):
    case = Lingbot()
    pipe = OtherPrompt(case.model)
    pipe.tokens = tokens
    with case.enable(False) as handle:
        wanted = case.latents(pipe=pipe)
        handle.restart(along)
        unchanged = case.latents()
    assert torch.equal(wanted[:, :15], unchanged[:, :15]) and not torch.equal(wanted[:, 15:], unchanged[:, 15:])
    with case.enable(True) as handle:
        assert torch.equal(case.latents(pipe=pipe), wanted)
        # From chunk 2 on all but the two that make the prompt's keys; of other shapes, kernels and a capture first.
        assert handle.replayed_passes == (10 * STEPS - 2 if tokens == 5 else 8 * STEPS - 1)
