"""Many rollouts on one model, in turn: each as it would be alone, and none holds what another has let go."""

import gc
import os
import weakref
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import small_lingbot
import small_matrix_game
import torch
from conftest import DEVICE
from recorded_pass import recorded
from small_lingbot import POSES, WORLDKV, caches, forward
from test_pass_graphs import MODELS

from worldkv_kernels import WorldMemory
from worldkv_kernels.actions import Actions, parse_actions, video_frames
from worldkv_kernels.integrations import matrix_game, passes
from worldkv_kernels.memory import arena
from worldkv_kernels.models.rollout import rollout
from worldkv_kernels.trajectory import latent_poses, load

CHUNKS = 6
WAYS = ("right*90,left*90", "forward*60,left*60,right*60")
OTHER = latent_poses(load("forward*36,right*30,left*30"))[0][:24]
ON_GPU = DEVICE.type == "cuda"


# --- the models here: a memory each ---


def of_way(model, way: int, graph: bool | None = None, **options):
    """A rollout along one of WAYS, with a memory of its own."""
    poses, intrinsics = (rows[: 3 * CHUNKS] for rows in latent_poses(load(WAYS[way])))
    sizes = dict(sink_frames=3, recent_frames=3, retrieved_chunks=2, bank_chunks=CHUNKS)
    memory = WorldMemory(model.config.memory(**sizes, **options), device=DEVICE, dtype=model.dtype)
    pressed = np.random.default_rng(way).integers(0, 2, (video_frames(3 * CHUNKS), 4)).astype(float)
    along = {"actions": Actions(pressed[:, :2], pressed)} if type(model).__name__ == "MatrixGame2" else {}
    return rollout(model, memory, poses, intrinsics, seed=way, graph=graph, **along)


def model_of(name: str):
    of_class, config = MODELS[name]
    return of_class.random(config, device=DEVICE, dtype=torch.bfloat16 if ON_GPU else torch.float32)


@pytest.mark.parametrize("bank", ["device", "host"])
@pytest.mark.parametrize("name", MODELS)
def test_rollouts_that_take_turns_are_each_as_alone(name, bank):
    model = model_of(name)
    alone = [[(chunk.latents, chunk.plan) for chunk in of_way(model, way, bank=bank)] for way in (0, 1)]
    assert any(plan.retrieved for _, plan in alone[0])
    turns = [of_way(model, way, bank=bank) for way in (0, 1)]
    for number in range(CHUNKS):
        for way, rolled in enumerate(turns):
            chunk, (latents, plan) = next(rolled), alone[way][number]
            assert torch.equal(chunk.latents, latents) and chunk.plan == plan


@pytest.mark.parametrize("name", MODELS)
def test_one_that_fails_or_is_reset_leaves_the_other_alone(name):
    model = model_of(name)
    alone = [chunk.latents for chunk in of_way(model, 1, graph=False)]
    whole = [chunk.latents for chunk in of_way(model, 0, graph=False)]
    failing, other = of_way(model, 0, graph=False), of_way(model, 1, graph=False)
    made = [next(other).latents for _ in range(2) if next(failing)]
    attend, calls = failing.memory.attend, []

    def broken(*arguments, **options):
        calls.append(arguments[0])
        if len(calls) == 4:
            raise MemoryError("no room")
        return attend(*arguments, **options)

    failing.memory.attend = broken
    with pytest.raises(MemoryError):
        next(failing)
    made.append(next(other).latents)
    assert failing.memory.stats()["chunks"] == 2
    del failing.memory.attend
    failing.memory.reset()
    made.append(next(other).latents)
    again = of_way(model, 0, graph=False)
    for chunk in range(CHUNKS):
        assert torch.equal(next(again).latents, whole[chunk])
        if chunk < 2:
            made.append(next(other).latents)
    assert all(map(torch.equal, made, alone)) and len(made) == CHUNKS


# --- the models' own code: sessions of a handle ---


def lingbot_pass(model, chunk: int, both, way: int, timestep: float) -> torch.Tensor:
    noise = torch.randn(16, 3, small_lingbot.HEIGHT, small_lingbot.WIDTH, generator=torch.Generator().manual_seed(way))
    return forward(model, chunk, timestep, both=both, video=[noise])


def lingbot_chunk(model, chunk: int, both, way: int) -> torch.Tensor:
    lingbot_pass(model, chunk, both, way, 1000.0)
    return lingbot_pass(model, chunk, both, way, 0.0)


def lingbot_alone(way: int) -> list[torch.Tensor]:
    model, both = small_lingbot.make_model(), caches()
    with small_lingbot.enable(model, (POSES, OTHER)[way], **WORLDKV) as handle:
        made = [lingbot_chunk(model, chunk, both, way) for chunk in range(CHUNKS)]
        assert handle.stats()["chunks_retrieved"] > 3
    return made


def test_lingbots_own_forwards_take_turns():
    alone = [lingbot_alone(way) for way in (0, 1)]
    assert not torch.equal(alone[0][-1], alone[1][-1])
    model = small_lingbot.make_model()
    with small_lingbot.enable(model, **WORLDKV) as handle:
        other, both, of_other = handle.session(OTHER), caches(), caches()
        for chunk in range(CHUNKS):
            assert torch.equal(lingbot_chunk(model, chunk, both, 0), alone[0][chunk])
            with other:
                lingbot_pass(model, chunk, of_other, 1, 1000.0)
            own = handle.memory
            with other:  # between two passes of a chunk
                made = lingbot_pass(model, chunk, of_other, 1, 0.0)
                assert handle.memory is other.memory is not own and handle.stats() == other.stats()
            assert torch.equal(made, alone[1][chunk])
        assert handle.stats()["chunks"] == other.stats()["chunks"] == CHUNKS
        assert own is handle.memory


def test_whole_rollouts_take_turns_in_matrix_games_pipeline():
    actions = [parse_actions(text) for text in ("J*28,L*28", "W*28,J*28")]
    alone = []
    for of_one in actions:
        model = small_matrix_game.plain_model()
        with matrix_game.enable(model, grid=(2, 3), bank_chunks=12, retrieved_chunks=1):
            alone.append(
                small_matrix_game.latents(small_matrix_game.pipeline(model), small_matrix_game.given_of(of_one), 5)
            )
    with matrix_game.enable(model, grid=(2, 3), bank_chunks=12, retrieved_chunks=1) as handle:
        sessions = [handle.session(), handle.session(actions=actions[1])]
        for _ in range(2):
            for session, of_one, wanted in zip(sessions, actions, alone, strict=True):
                with session:
                    given = small_matrix_game.given_of(of_one)
                    made = small_matrix_game.latents(small_matrix_game.pipeline(model), given, 5)
                assert torch.equal(made, wanted) and session.stats()["chunks_retrieved"] > 0
            sessions[1].restart(actions=actions[1])
        with pytest.raises(RuntimeError, match="matrix_game: the memory is made in the first forward, got none yet"):
            handle.stats()


def test_a_session_that_fails_or_restarts_leaves_the_other_alone():
    alone = [lingbot_alone(way) for way in (0, 1)]
    model = small_lingbot.make_model()
    handle = small_lingbot.enable(model, **WORLDKV)
    other, both, of_other = handle.session(OTHER), caches(), caches()
    for chunk in range(3):
        lingbot_chunk(model, chunk, both, 0)
        with other:
            lingbot_chunk(model, chunk, of_other, 1)
    hook = model.blocks[1].ffn[2].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError), other:
        forward(model, 3, both=of_other)
    hook.remove()
    assert torch.equal(lingbot_chunk(model, 3, both, 0), alone[0][3])
    with other:
        assert torch.equal(lingbot_chunk(model, 3, of_other, 1), alone[1][3])
    assert other.stats()["chunks"] == 4
    other.restart(OTHER)
    of_other = caches()
    for chunk in range(CHUNKS):
        with other:
            assert torch.equal(lingbot_chunk(model, chunk, of_other, 1), alone[1][chunk])
        if chunk < 2:
            assert torch.equal(lingbot_chunk(model, 4 + chunk, both, 0), alone[0][4 + chunk])


def test_what_a_session_refuses():
    model = small_lingbot.make_model()
    handle = small_lingbot.enable(model, **WORLDKV)
    first, second = handle.session(POSES), handle.session(OTHER)
    with pytest.raises(RuntimeError, match="lingbot: the memory is made in the first forward, got none yet"):
        first.memory  # noqa: B018
    with pytest.raises(ValueError, match="lingbot: poses must be given, or a callable, for this retrieval, got None"):
        handle.session()
    with pytest.raises(ValueError, match="lingbot: actions must be None for retrieval 'pose', got Actions"):
        handle.session(POSES, actions=parse_actions("W*28"))

    def enters(*_):
        with second:
            pass

    hook = model.blocks[0].register_forward_pre_hook(enters)
    with pytest.raises(RuntimeError, match="lingbot: sessions must change between passes, got a change inside one"):
        forward(model, 0)
    hook.remove()
    first.__enter__()
    second.__enter__()
    with pytest.raises(RuntimeError, match="lingbot: sessions must be left in the opposite order"):
        first.__exit__(None, None, None)
    with second, second:  # one in itself will do
        forward(model, 0, both=caches())
    handle.disable()
    for call in (first.__enter__, first.restart, partial(handle.session, POSES)):
        with pytest.raises(RuntimeError, match=r"lingbot: \w+ must be called while the model has its memory"):
            call()
    del call
    assert second.memory.stats()["chunks"] == 0  # what it holds can still be read
    del handle
    with pytest.raises(RuntimeError, match="lingbot: session must be called while the model has its memory"):
        first.__enter__()


def test_a_session_that_nothing_holds_frees_its_pool_at_once():
    model = small_lingbot.make_model()
    handle = small_lingbot.enable(model, **WORLDKV)
    forward(model, 0)
    other = handle.session(OTHER)
    with other:
        forward(model, 0)
    held = [weakref.ref(one) for one in (other.memory, other.memory.pools(0)[0].untyped_storage(), other.chunks)]
    gc.collect()
    gc.disable()
    try:
        del other
        assert [one() for one in held] == [None] * 3
        own = [weakref.ref(handle.memory), weakref.ref(handle)]
        handle.disable()
        assert own[0]().stats()["chunks"] == 0  # what it holds can still be read
        del handle
        assert [one() for one in own] == [None] * 2
    finally:
        gc.enable()


def test_graphs_belong_to_a_session(monkeypatch):
    monkeypatch.setattr(passes, "why_not_on", lambda device: None)
    monkeypatch.setattr(passes, "_capture_on", lambda device: recorded)
    alone = [lingbot_alone(way) for way in (0, 1)]
    model = small_lingbot.make_model()
    with small_lingbot.enable(model, **WORLDKV, graph=True) as handle:
        other, both, of_other = handle.session(OTHER), caches(), caches()
        for chunk in range(CHUNKS):
            assert torch.equal(lingbot_chunk(model, chunk, both, 0), alone[0][chunk])
            with other:
                assert torch.equal(lingbot_chunk(model, chunk, of_other, 1), alone[1][chunk])
        assert handle.replayed_passes == other.replayed_passes == 2 * (CHUNKS - 2)
        held = weakref.ref(other.passes), weakref.ref(other.memory)
        gc.collect()
        gc.disable()
        try:
            del other
            assert [one() for one in held] == [None, None]
        finally:
            gc.enable()
        third = handle.session(OTHER)
        with third:
            lingbot_chunk(model, 0, caches(), 1)
    assert third.passes is None  # with disable, all graphs are free


def test_a_change_of_session_compiles_nothing():
    torch._dynamo.reset()
    alone = [lingbot_alone(way) for way in (0, 1)]
    model, graphs = small_lingbot.make_model(), []

    def backend(graph, _):
        graphs.append(graph)
        return graph

    handle = small_lingbot.enable(model, **WORLDKV)
    other = handle.session(OTHER)
    for block in model.blocks:
        block.compile(backend=backend)
    both, of_other, made = caches(), caches(), []
    for chunk in range(CHUNKS):
        assert torch.equal(lingbot_chunk(model, chunk, both, 0), alone[0][chunk])
        made.append(len(graphs))
        with other:
            assert torch.equal(lingbot_chunk(model, chunk, of_other, 1), alone[1][chunk])
        made.append(len(graphs))
    assert made[0] == made[-1] > 0
    torch._dynamo.reset()


# --- nothing is left behind ---


def cycle(model) -> int:
    """Enable, a chunk of each of two sessions, disable; the bytes that both memories held."""
    both, of_other = caches_on_device(), caches_on_device()
    with small_lingbot.enable(model, **{**WORLDKV, "bank_chunks": 60, "bank": "host"}) as handle:
        on_device_chunk(model, both)
        with handle.session(OTHER) as other:
            on_device_chunk(model, of_other)
        return sum(one.stats()[name] for one in (handle, other) for name in ("device_bytes", "host_bytes"))


def caches_on_device():
    both = caches()
    for cache in (*both[0], *both[1]):
        cache.update({name: rows.to(DEVICE) for name, rows in cache.items() if isinstance(rows, torch.Tensor)})
    return both


def on_device_chunk(model, both) -> None:
    x = torch.zeros(16, 3, small_lingbot.HEIGHT, small_lingbot.WIDTH, device=DEVICE)
    for timestep in (1000.0, 0.0):
        with torch.no_grad():
            model(
                x=[x], t=torch.tensor([timestep], device=DEVICE), context=[small_lingbot.TEXT.to(DEVICE)],
                seq_len=4 * small_lingbot.TOKENS, y=[torch.zeros(20, *x.shape[1:], device=DEVICE)],
                dit_cond_dict={"c2ws_plucker_emb": (small_lingbot.CAMERA[:, :, :3].to(DEVICE),)},
                kv_cache=both[0], crossattn_cache=both[1], current_start=0,
            )  # fmt: skip


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc to tell what is resident")
def test_fifty_times_enabled_and_disabled_leave_the_process_as_large():
    model = small_lingbot.make_model().to(DEVICE)
    for _ in range(5):
        held = cycle(model)
    before = resident()
    for _ in range(50):
        cycle(model)
    grown = resident() - before
    assert held > 4 * 2**20 and grown < 5 * held, f"{grown / 2**20:.1f} MiB more, of {held / 2**20:.1f} MiB a cycle"


@pytest.mark.skipif(not ON_GPU, reason="needs a GPU: what it and page-locked memory hold")
def test_fifty_times_enabled_and_disabled_leave_device_and_locked_memory_as_before(monkeypatch):
    model, locked = small_lingbot.make_model().to(DEVICE), {}
    lock, unlock = arena.page_lock, arena._page_unlock

    def locks(address, span, device):
        refusal = lock(address, span, device)
        if refusal is None:
            locked[address] = span
        return refusal

    def unlocks(memory, address, *rest):
        unlock(memory, address, *rest)
        del locked[address]

    monkeypatch.setattr(arena, "page_lock", locks)
    monkeypatch.setattr(arena, "_page_unlock", unlocks)
    for _ in range(5):
        cycle(model)
    before = torch.cuda.memory_allocated()
    with small_lingbot.enable(model, **{**WORLDKV, "bank": "host"}) as handle:
        on_device_chunk(model, caches_on_device())
        assert locked and torch.cuda.memory_allocated() > before  # of what is measured there is something
    del handle
    for _ in range(50):
        cycle(model)
        assert torch.cuda.memory_allocated() == before and not locked
