"""How much attention past chunks received: counted by hand, and what a policy, a file and a fork know of it."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from conftest import DEVICE

from worldkv_kernels import MemoryConfig, WorldMemory, segment_attention
from worldkv_kernels.memory import saving
from worldkv_kernels.memory.received import ROLES
from worldkv_kernels.memory.retrieval import ActionRetrieval, ContentRetrieval, FovRetrieval, PoseRetrieval

LAYERS, HEADS = 3, 2
ASKED = (0, 2)


def make(device=DEVICE, **fields) -> WorldMemory:
    sizes = dict(num_layers=LAYERS, num_heads=HEADS, head_dim=64, grid=(2, 3), chunk_frames=2)
    options = dict(recent_frames=2, retrieved_chunks=2, bank_chunks=5, mass_layers=ASKED)
    return WorldMemory(MemoryConfig(**{**sizes, **options, **fields}), device=device, dtype=torch.float32)


def poses(number: int) -> np.ndarray:
    """There and back, so that everything comes again."""
    of = np.tile(np.eye(4), (2, 1, 1))
    of[:, 0, 3] = abs(number % 12 - 6)
    return of


def drawn(memory: WorldMemory, number: int, layer: int) -> list[torch.Tensor]:
    """q, k and v of a chunk; large, so that attention has favourites."""
    generator = torch.Generator().manual_seed(10 * number + layer)
    config = memory.config
    heads = config.num_heads, config.num_kv_heads, config.num_kv_heads
    shapes = [(config.chunk_tokens, of * config.head_dim) for of in heads]
    return [2 * torch.randn(shape, generator=generator, dtype=torch.float32).to(memory.device) for shape in shapes]


def attend(memory: WorldMemory, number: int) -> np.ndarray:
    """A pass, and what the op says that the window's segments received in the layers asked, [segments]."""
    of_layers = []
    for layer in range(LAYERS):
        memory.attend(layer, *drawn(memory, number, layer))
        if layer in ASKED:
            attention, window = memory._attention, memory.window
            if attention.layer_windows is not None:
                window = attention.layer_windows.of_layer[layer]
            of_layers.append(segment_attention(attention.q, *memory.pools(layer), window, return_mass=True)[1])
    return torch.stack(of_layers).double().mean(dim=(0, 1)).cpu().numpy()


def rolled(memory: WorldMemory, chunks: range) -> list[tuple[object, np.ndarray]]:
    """Plans, and what their segments received."""
    made = []
    for number in chunks:
        plan = memory.begin_chunk(poses(number))
        made.append((plan, attend(memory, number)))
        memory.end_chunk()
    return made


def by_hand(made: list[tuple[object, np.ndarray]]) -> tuple[dict[int, float], dict[str, float]]:
    """All windows but the last."""
    chunks: dict[int, float] = {}
    roles: dict[str, float] = {}
    for plan, mass in made[:-1]:
        here, shares = {}, dict.fromkeys(("sink", "retrieved", "recent", "current"), 0.0)
        for (role, _, _), share in zip(plan.segments, mass, strict=True):
            shares[role] += share
        for past in {past for _, past, _ in plan.segments} - {plan.chunk}:
            of = [place for place, (_, chunk, _) in enumerate(plan.segments) if chunk == past]
            tokens = sum(plan.segments[place][2].num_rows for place in of)
            here[past] = sum(mass[place] for place in of) * plan.num_tokens / tokens
        for known, new in ((chunks, here), (roles, shares)):
            for name, share in new.items():
                known[name] = 0.8 * known[name] + 0.2 * share if name in known else share
    return chunks, roles


CONFIGS = {
    "device": {},
    "host, 4 bits": dict(bank="host", bank_bits=4),
    "cut": dict(sink_frames=3, recent_frames=3, grid=(2, 4)),
    "weights": dict(retrieved_log_weight=1.0, keep_ratio=1.0, num_kv_heads=1),
}


@pytest.mark.parametrize("fields", CONFIGS.values(), ids=CONFIGS)
def test_received_is_what_the_op_says_of_each_window(fields):
    memory = make(**fields)
    made = rolled(memory, range(14))
    chunks, roles = by_hand(made)
    received, stats = memory.received(), memory.stats()
    kept = [chunk for chunk in range(14) if memory.location(chunk) != "dropped"]
    assert list(received) == [chunk for chunk in kept if chunk in chunks] and len(received) >= 6
    assert received == pytest.approx({chunk: chunks[chunk] for chunk in received}, rel=1e-4)
    assert {role: stats[f"mass_{role}"] for role in roles} == pytest.approx(roles, rel=1e-4)
    assert math.isclose(sum(roles.values()), 1.0, rel_tol=1e-5) and roles["retrieved"] > 0.05
    assert json.loads(json.dumps(stats)) == stats and stats["chunks_dropped"]


def test_it_is_known_a_chunk_late_and_not_of_what_is_gone():
    memory = make()
    assert memory.received() == {} and memory.stats()["mass_current"] == 0
    made = rolled(memory, range(1))
    assert memory.received() == {} and memory.stats()["mass_current"] == 0
    made += rolled(memory, range(1, 3))
    assert memory.received() == pytest.approx(by_hand(made)[0], rel=1e-4) and list(memory.received()) == [0]
    made += rolled(memory, range(3, 6))
    assert list(memory.received()) == [0, 1, 2, 3]
    memory.forget(2)
    assert list(memory.received()) == [0, 1, 3]
    rolled(memory, range(6, 7))
    assert 2 not in memory._received.known.chunks and list(memory.received()) == [0, 1, 3, 4]
    memory.reset()
    assert memory.received() == {}
    assert "mass_sink" not in make(mass_layers=()).stats() and make(mass_layers=()).received() == {}


@pytest.mark.parametrize("bank", ["device", "host"])
def test_an_aborted_chunk_and_passes_before_the_last_count_for_nothing(bank):
    plain, shaken = make(bank=bank), make(bank=bank)
    rolled(plain, range(9))
    for number in range(9):
        shaken.begin_chunk(poses(number + 1))
        attend(shaken, 100 + number)
        shaken.abort_chunk()
        shaken.begin_chunk(poses(number))
        attend(shaken, 50 + number)
        attend(shaken, number)
        shaken.end_chunk()
    assert shaken.received() == plain.received() and shaken.stats()["mass_sink"] == plain.stats()["mass_sink"]


def test_an_end_that_fails_adds_a_window_once():
    class Refuses(PoseRetrieval):
        broken = False

        def drop(self, candidates):
            return -1 if self.broken else super().drop(candidates)

    policy, plain = Refuses(), make(bank_chunks=2)
    memory = make(bank_chunks=2, retrieval=policy)
    rolled(plain, range(7))
    rolled(memory, range(6))
    memory.begin_chunk(poses(6))
    attend(memory, 6)
    policy.broken = True
    for _ in range(2):
        with pytest.raises(ValueError, match="policy must drop one of"):
            memory.end_chunk()
    policy.broken = False
    memory.end_chunk()
    assert memory.received() == plain.received()


def test_an_end_that_fails_and_is_given_up_adds_no_window():
    class Refuses(PoseRetrieval):
        def drop(self, candidates):
            return -1

    memory = make(bank_chunks=2, retrieval=Refuses())
    rolled(memory, range(4))
    before = memory.received(), memory.stats()
    memory.begin_chunk(poses(4))
    attend(memory, 4)
    with pytest.raises(ValueError, match="policy must drop one of"):
        memory.end_chunk()
    memory.abort_chunk()
    assert (memory.received(), memory.stats()) == before


def test_a_window_that_is_not_finite_is_as_if_it_had_not_been(tmp_path):
    memory = make(sink_frames=0)
    made = rolled(memory, range(3))
    memory.begin_chunk(poses(3))
    attend(memory, 3)
    q, k, v = drawn(memory, 3, 0)
    memory.attend(0, q, k * float("nan"), v)
    memory.end_chunk()
    assert memory.received() == pytest.approx(by_hand([*made, None])[0])
    memory.save(tmp_path / "saved")
    assert WorldMemory.load(tmp_path / "saved", device=DEVICE).received() == memory.received()
    rolled(memory.fork(), range(4, 6)), rolled(memory, range(4, 6))
    assert all(math.isfinite(share) for share in memory.received().values())
    assert math.isfinite(memory.stats()["mass_current"])


@pytest.mark.parametrize("mode", ["full", "sliding", "sink_recent"])
def test_the_baselines_say_it_too(mode):
    memory = make(mode=mode, bank_chunks=9)
    made = rolled(memory, range(7))
    chunks, roles = by_hand(made)
    kept = {"full": range(6), "sliding": range(5, 6), "sink_recent": (0, 5)}[mode]
    assert memory.received() == pytest.approx({chunk: chunks[chunk] for chunk in kept if chunk in chunks}, rel=1e-4)
    assert {role: memory.stats()[f"mass_{role}"] for role in roles} == pytest.approx(roles, rel=1e-4)
    assert make(mode=mode, bank_chunks=9, mass_layers=(), retrieval=ByMass()).received() == {}


@pytest.mark.parametrize("policy", [PoseRetrieval(), FovRetrieval(), ActionRetrieval(), ContentRetrieval()])
def test_the_policies_here_take_what_was_received_and_look_at_none_of_it(policy):
    by_content = isinstance(policy, ContentRetrieval)
    view = np.ones((2, 4), np.float32) if by_content else policy.describe(poses(0), np.full((2, 4), 10.0))
    current = view[-1] if by_content else view
    assert policy.select(current, [(1, view), (2, view)], 1, received={1: 0.0, 2: 9.0}) == [1]
    assert policy.drop([(1, view), (2, view)], received={1: 0.0, 2: 9.0}) == 2


@pytest.mark.parametrize("method", ["select", "drop"])
def test_a_policy_may_go_by_mass_in_one_of_the_two(method):
    told = []

    def own(self, *args, received):
        told.append(received)
        return getattr(PoseRetrieval, method)(self, *args)

    policy = type("One", (PoseRetrieval,), {"by_mass": True, method: own})()
    memory, plain = make(retrieval=policy), make()
    assert [plan for plan, _ in rolled(memory, range(10))] == [plan for plan, _ in rolled(plain, range(10))]
    assert any(told)


@pytest.mark.parametrize("fields", [{}, dict(bank="host", bank_bits=8)], ids=["device", "host, 8 bits"])
def test_saved_and_forked_it_goes_on_as_it_would(fields, tmp_path):
    memory = make(**fields)
    rolled(memory, range(8))
    memory.save(tmp_path / "saved")
    others = [memory.fork(), WorldMemory.load(tmp_path / "saved", device=DEVICE)]
    assert all(other.received() == memory.received() for other in others)
    want = [mass for _, mass in rolled(memory, range(8, 12))]
    for other in others:
        assert all((mass == of).all() for (_, mass), of in zip(rolled(other, range(8, 12)), want, strict=True))
        assert other.received() == memory.received() and other.stats()["mass_sink"] == memory.stats()["mass_sink"]
    assert memory.received() != make(**fields).received()


@pytest.mark.parametrize(
    "damage",
    [
        {"last": {"chunks": {99: 1.0}, "roles": {}}},
        {"chunks": {0: float("nan")}},
        {"chunks": {0: -1.0}},
        {"chunks": {0: 1}},
        {"chunks": {"0": 1.0}},
        {"roles": {"sink": 1.0}},
        {"roles": dict.fromkeys(ROLES[::-1], 0.25)},
    ],
    ids=str,
)
def test_a_file_that_says_what_cannot_be_is_refused(damage):
    memory = make()
    rolled(memory, range(4))
    tree = saving.tree_of("save", memory)
    saving.restore(make(), tree)
    with pytest.raises(ValueError, match=r"WorldMemory\.load: received must be of past chunks and of sink, retrieved"):
        saving.restore(make(), {**tree, "received": {**tree["received"], **damage}})


def test_a_file_has_it_where_layers_are_asked():
    memory, without = make(), make(mass_layers=())
    rolled(memory, range(4)), rolled(without, range(4))
    trees = [saving.tree_of("save", one) for one in (memory, without)]
    assert "received" not in trees[1]
    for one, tree in ((make(), trees[1]), (make(mass_layers=()), trees[0])):
        with pytest.raises(ValueError, match="received must be there with mass_layers, else not"):
            saving.restore(one, tree)


class ByMass(PoseRetrieval):
    """Notes what it is told; takes what received most, and gives up what received least."""

    by_mass = True

    def __init__(self) -> None:
        super().__init__()
        self.told, self.dropped = [], []

    def select(self, current, candidates, budget, *, received):
        self.told.append(received)
        return sorted((chunk for chunk, _ in candidates), key=lambda chunk: -received.get(chunk, 0.0))[:budget]

    def drop(self, candidates, *, received):
        self.dropped.append(([chunk for chunk, _ in candidates], dict(received)))
        least = min((chunk for chunk, _ in candidates), key=lambda chunk: received.get(chunk, 0.0))
        received.clear()  # its own copy
        return least


def test_a_policy_that_goes_by_mass_is_told():
    policy = ByMass()
    memory = make(retrieval=policy, order="nearest_first")
    for number in range(13):
        if number == 9:
            memory.forget(next(chunk for chunk in memory.received() if memory.location(chunk) == "bank"))
        in_bank = [chunk for chunk in range(number) if memory.location(chunk) == "bank"]
        known = {chunk: share for chunk, share in memory.received().items() if chunk in in_bank}
        plan = memory.begin_chunk(poses(number))
        assert policy.told[-1] == known
        assert list(plan.retrieved) == sorted(in_bank, key=lambda chunk: -known.get(chunk, 0.0))[:2]
        attend(memory, number)
        memory.end_chunk()
        assert all(chunk in memory.received() for chunk in range(number - 1) if memory.location(chunk) != "dropped")
    assert memory.stats()["chunks_dropped"] == len(policy.dropped) + 1 == 6
    for on_offer, received in policy.dropped:
        assert received.keys() == set(on_offer[:-2])  # the newest two were in no window that counts yet
        least = min(on_offer, key=lambda chunk: received.get(chunk, 0.0))
        assert memory.location(least) == "dropped" and least not in memory._received.known.chunks
    with pytest.raises(ValueError, match="mass_layers must be given where the retrieval policy goes by mass"):
        make(retrieval=ByMass(), mass_layers=())


@pytest.mark.parametrize("layers", [(3,), (-1,), (0, 0), (True,), (0.5,), 1, "1", b"\x00", np.array(1), None])
def test_layers_that_are_none(layers):
    with pytest.raises(ValueError, match="MemoryConfig: mass_layers must be layers from 0 to 2"):
        make(mass_layers=layers)


def test_layers_are_taken_as_integers():
    assert make(mass_layers=[np.int64(2), 0]).config.mass_layers == (0, 2)


def test_warm_up_asks_a_layer_and_leaves_nothing_behind():
    memory, plain = make(mass_layers=(1,)), make(mass_layers=(1,))
    memory.warm_up()
    rolled(memory, range(5)), rolled(plain, range(5))
    assert memory.received() == plain.received()


def test_bytes_count_it():
    for fields in CONFIGS.values():
        memory, without = make(**fields), make(**{**fields, "mass_layers": ()})
        received = memory._received
        more, less = (of.config.bytes(torch.float32) for of in (memory, without))
        on_device = received._on_device.nbytes + received._mean.nbytes
        assert (more.scratch - less.scratch, more.host - less.host) == (on_device, received._on_host.nbytes)


def test_a_compiled_pass_says_it_in_one_graph():
    memory, plain = make(mass_layers=(0,)), make(mass_layers=(0,))
    compiled = torch.compile(lambda q, k, v: memory.attend(0, q, k, v), backend="aot_eager", fullgraph=True)
    for number in range(4):
        for one in (memory, plain):
            one.begin_chunk(poses(number))
            one.wait()
        x = drawn(memory, number, 0)
        assert torch.equal(compiled(*x), plain.attend(0, *x))
        for one in (memory, plain):
            for layer in range(1, LAYERS):
                one.attend(layer, *drawn(one, number, layer))
            one.end_chunk()
    assert memory.received() == plain.received() != {}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU whose work is late")
@pytest.mark.parametrize("bank", ["device", "host"])
def test_a_gpu_that_is_late_says_what_a_cpu_says(bank):
    said = []
    for device in ("cpu", "cuda"):
        memory = make(device, bank=bank)
        for number in range(12):
            memory.begin_chunk(poses(number))
            if device == "cuda":
                torch.cuda._sleep(20_000_000)
            for layer in range(LAYERS):
                memory.attend(layer, *drawn(memory, number, layer))
            memory.end_chunk()
            said.append(memory.received())
    for of_cpu, of_gpu in zip(said[:12], said[12:], strict=True):
        assert of_gpu == pytest.approx(of_cpu, rel=1e-3)
