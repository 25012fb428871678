"""Passes of a rollout as graphs: on a CPU by recordings that repeat operations, on a GPU by CUDA graphs."""

import numpy as np
import pytest
import torch
from conftest import DEVICE
from recorded_pass import recorded

from worldkv_kernels import WorldMemory
from worldkv_kernels.actions import Actions, video_frames
from worldkv_kernels.memory.config import MODES
from worldkv_kernels.models import graphs
from worldkv_kernels.models.lingbot_config import LingBotConfig
from worldkv_kernels.models.lingbot_world_fast import LingBotWorldFast
from worldkv_kernels.models.matrix_game_2 import MatrixGame2
from worldkv_kernels.models.matrix_game_config import MatrixGameConfig
from worldkv_kernels.models.rollout import rollout
from worldkv_kernels.models.small_world import SmallWorld, SmallWorldConfig
from worldkv_kernels.trajectory import latent_poses, load

ON_GPU = DEVICE.type == "cuda"
CHUNKS = 40 if ON_GPU else 9
HALF = 2 * 3 * CHUNKS
POSES, INTRINSICS = (rows[: 3 * CHUNKS] for rows in latent_poses(load(f"right*{HALF},left*{HALF}")))
SIZES = dict(num_layers=2, num_heads=2, head_dim=64, grid=(2, 3))
MODELS = {
    "small_world": (SmallWorld, SmallWorldConfig(**SIZES)),
    "lingbot": (LingBotWorldFast, LingBotConfig(**SIZES, ffn_dim=160, text_tokens=7, text_dim=24)),
    "matrix_game": (
        MatrixGame2, MatrixGameConfig(**SIZES, ffn_dim=160, image_tokens=5, image_dim=32, action_layers=(0,))
    ),
}  # fmt: skip


@pytest.fixture(autouse=True)
def stand_in(monkeypatch):
    if not ON_GPU:
        monkeypatch.setattr(graphs, "_why_not", lambda model, memory: None)
        monkeypatch.setattr(graphs, "_capture_on", lambda device: recorded)


@pytest.fixture
def counted(monkeypatch):
    """How many passes were captured and how many replayed."""
    counts = {"captured": 0, "replayed": 0}
    of_device = graphs._capture_on

    def capture_on(device):
        capture = of_device(device)

        def counting(function):
            replay = capture(function)
            counts["captured"] += 1

            def counted_replay():
                counts["replayed"] += 1
                replay()

            return counted_replay

        return counting

    monkeypatch.setattr(graphs, "_capture_on", capture_on)
    return counts


def make(name, hoist=True):
    of_class, config = MODELS[name]
    return of_class.random(config, device=DEVICE, dtype=torch.bfloat16 if ON_GPU else torch.float32, hoist=hoist)


def made(model, graph, chunks=CHUNKS, given=None, **options):
    """Latents and retrieved chunks of every chunk."""
    sizes = dict(sink_frames=3, recent_frames=3, retrieved_chunks=2, bank_chunks=max(chunks, 6))
    memory = WorldMemory(model.config.memory(**{**sizes, **options}), device=DEVICE, dtype=model.dtype)
    turning = np.repeat([0.1, -0.1], HALF)
    keyboard = np.zeros((2 * HALF, 4))
    actions = Actions(np.stack([0 * turning, turning], axis=1), keyboard).until(video_frames(3 * chunks))
    along = dict(actions=actions) if isinstance(model, MatrixGame2) else {}
    rolled = rollout(model, memory, POSES[: 3 * chunks], INTRINSICS[: 3 * chunks], graph=graph, given=given, **along)
    return [(chunk.latents.cpu(), chunk.plan.retrieved) for chunk in rolled]


def assert_same(got, want):
    assert len(got) == len(want)
    for chunk, ((latents, retrieved), (wanted, of_wanted)) in enumerate(zip(got, want, strict=True)):
        assert retrieved == of_wanted and torch.equal(latents, wanted), f"chunk {chunk}"


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    "options", [*({"mode": mode} for mode in MODES), {"bank": "host"}, {"bank": "host", "bank_chunks": 4},
     {"bank_bits": 4}, {"bank": "host", "bank_bits": 8, "bank_chunks": 4}],
    ids=[*MODES, "host", "host, full", "4 bits", "host, 8 bits, full"],
)  # fmt: skip
def test_a_rollout_of_replays_is_the_rollout(name, options, counted):
    model = make(name)
    want = made(model, False, **options)
    assert counted["captured"] == 0
    assert_same(made(model, True, **options), want)
    steps = len(model.sigmas) + 1
    before = 3 if name == "matrix_game" else 2  # chunks; the second attends to more actions than the first
    assert counted == {"captured": steps, "replayed": steps * (CHUNKS - before)}


def test_a_model_that_makes_its_conditions_in_a_pass_has_no_graphs(counted):
    model = make("lingbot", hoist=False)
    assert_same(made(model, None, 4), made(model, False, 4))
    assert counted["captured"] == 0


def test_a_pass_that_reads_the_host_goes_on_without_graphs_or_is_an_error(monkeypatch):
    model = make("small_world")
    want, attend = made(model, False, 4), WorldMemory.attend

    def reads(self, layer, q, *rest):
        float(q.sum())
        return attend(self, layer, q, *rest)

    monkeypatch.setattr(WorldMemory, "attend", reads)
    with pytest.warns(UserWarning, match="passes are not made of CUDA graphs: a pass could not be captured"):
        assert_same(made(model, None, 4), want)
    if not ON_GPU:
        with pytest.raises(RuntimeError, match=r"but a pass could not be captured: RuntimeError: aten\._local_scalar"):
            made(model, True, 4)


@pytest.mark.parametrize("given", [0, 2], ids=["noise", "given"])
def test_a_replay_that_differs_is_not_used_and_leaves_nothing(monkeypatch, given):
    """Not even in the rows of a clean pass, which become history."""
    model = make("lingbot")
    latents = torch.randn(3 * given, *model.latent_shape)
    want = made(model, False, 6, given=latents)
    of_device = graphs._capture_on

    def capture_on(device):
        capture = of_device(device)

        def wrong(function):
            replay = capture(function)
            held = next(
                cell.cell_contents for cell in function.__closure__ if isinstance(cell.cell_contents, graphs.Passes)
            )

            def then():
                held._latents.mul_(1.5)
                replay()

            return then

        return wrong

    monkeypatch.setattr(graphs, "_capture_on", capture_on)
    with pytest.warns(UserWarning, match="the replay of a pass differs from the pass"):
        assert_same(made(model, None, 6, given=latents), want)
    with pytest.raises(RuntimeError, match="but the replay of a pass differs"):
        made(model, True, 6, given=latents)


def test_what_a_chunk_prepares_elsewhere_is_seen_by_the_comparison(monkeypatch):
    model = make("small_world")
    want, prepare = made(model, False, 5), model.prepare_chunk
    kept = []  # else a chunk's lies where that of the chunk before has been

    def elsewhere(of_rollout, *rest):
        of_chunk = prepare(of_rollout, *rest)
        kept.append(of_rollout.camera.clone())
        return of_chunk._replace(rollout=of_rollout._replace(camera=kept[-1]))

    monkeypatch.setattr(model, "prepare_chunk", elsewhere)
    with pytest.warns(UserWarning, match="the replay of a pass differs from the pass"):
        assert_same(made(model, None, 5), want)


def test_a_rollout_may_go_on_outside_of_the_mode_that_it_began_in():
    model = make("small_world")
    memory = WorldMemory(model.config.memory(mode="sliding"), device=DEVICE, dtype=model.dtype)
    rolled = rollout(model, memory, POSES[:12], INTRINSICS[:12], graph=True)
    with torch.inference_mode():  # a chunk of kernels, and one that is captured
        next(rolled), next(rolled)
    assert len(list(rolled)) == 2


@pytest.mark.skipif(ON_GPU, reason="a GPU has graphs")
def test_without_a_gpu_there_are_none(monkeypatch):
    monkeypatch.undo()
    model = make("small_world")
    with pytest.raises(ValueError, match="rollout: graph must be None or False where the model is on cpu, got True"):
        made(model, True, 3)
    assert_same(made(model, None, 3), made(model, False, 3))
