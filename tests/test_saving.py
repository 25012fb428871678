"""Memories that are saved, loaded and forked go on bit for bit."""

import json
from collections import OrderedDict
from dataclasses import replace
from enum import Enum
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from conftest import DEVICE
from tiny_memory import MODEL, jumps

from worldkv_kernels import Rope3D, WorldMemory
from worldkv_kernels.actions import ActionIntegrator, Actions
from worldkv_kernels.memory.retrieval import ActionRetrieval, FovRetrieval, OfficialPoseRetrieval, PoseRetrieval
from worldkv_kernels.models.checkpoint import read_tensors
from worldkv_kernels.saved import Rows
from worldkv_kernels.tensor_file import read_header

INTRINSICS = np.array([100.0, 100.0, 48.0, 32.0])
POLICIES = {
    "pose": PoseRetrieval(diversity=0.3),
    "fov": FovRetrieval(depth_range=(0.5, 9.0), image_size=(64, 96), diversity=0.2, samples=32),
    "action": ActionRetrieval(ActionIntegrator(layout="templerun")),
    "official": OfficialPoseRetrieval(),
}


class Newest:
    """A policy of a user's own, with state and descriptions of several kinds."""

    needs_intrinsics = False

    def __init__(self) -> None:
        self.asked = 0

    def describe(self, poses, intrinsics):
        self.asked += 1
        return {"mean": poses.mean(axis=0), "tag": (self.asked, "made"), "tensor": torch.tensor([0.5])}

    def select(self, current, candidates, budget):
        return [chunk for chunk, _ in candidates[-budget:]]

    def drop(self, candidates):
        return candidates[len(candidates) // 2][0]


def config(**fields):
    return MODEL.memory(**{"retrieved_chunks": 2, "bank_chunks": 4, "recent_frames": 3, **fields})


def walk(memory: WorldMemory, first: int, end: int) -> list[torch.Tensor]:
    """What each layer attended to gave, in chunks of random numbers and poses, or actions."""
    poses, made = jumps(5, 64), []
    for chunk in range(first, end):
        generator = torch.Generator().manual_seed(chunk)
        if memory.integrator is not None:
            keys = np.eye(7)[np.random.default_rng(chunk).integers(0, 7, size=12 if chunk else 9)]
            memory.begin_chunk(actions=Actions(None, keys))
        else:
            memory.begin_chunk(poses[chunk], intrinsics=INTRINSICS)
        for layer in range(memory.config.num_layers):
            qkv = torch.randn(3, memory.config.chunk_tokens, MODEL.dim, generator=generator).to(DEVICE, memory.dtype)
            made.append(memory.attend(layer, *qkv).cpu())
        memory.end_chunk()
    return made


def equal(a, b) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def counts(memory: WorldMemory) -> dict:
    """Of stats, those that the place of rows does not change."""
    of_places = ("host_", "device_bytes", "prefetch", "pinned")
    return {name: n for name, n in memory.stats().items() if not name.startswith(of_places)}


CONFIGS = {
    **{name: dict(retrieval=policy) for name, policy in POLICIES.items()},
    **{mode: dict(mode=mode, bank_chunks=40) for mode in ("full", "sliding", "sink_recent")},
    "cut frames": dict(sink_frames=4, recent_frames=4, keep_ratio=0.5, merge_pruned=False, prune_rule="similarity"),
    "faults": dict(unattended_chunks=1, bank_sink=True, rebase_sink=False, order="nearest_first"),
    "in 8 bits": dict(bank_bits=8, keep_ratio=0.5),
    "weighted": dict(retrieval="fov", rebase_time=False, retrieved_log_weight=0.5),
}


@pytest.mark.parametrize("chunk", [0, 1, 2, 3, 4, 7, 9, 13])  # empty, sink, recent, first banked, full, drops
@pytest.mark.parametrize("name", CONFIGS)
def test_what_is_loaded_or_forked_goes_on_bitwise(name, chunk, tmp_path):
    memory = WorldMemory(config(**CONFIGS[name]), dtype=torch.float32, device=DEVICE)
    walk(memory, 0, chunk)
    memory.save(tmp_path / "walk.worldkv")
    loaded = WorldMemory.load(tmp_path / "walk.worldkv", device=DEVICE)
    on_host = WorldMemory.load(tmp_path / "walk.worldkv", device=DEVICE, bank="host", prefetch=False)
    forked = memory.fork()
    want = walk(memory, chunk, 20)
    for other in (loaded, on_host, forked):
        assert equal(walk(other, chunk, 20), want)
        assert counts(other) == counts(memory)
    assert type(loaded.config.retrieval) is type(memory.config.retrieval)


def test_rows_of_layers_are_layer_by_layer_k_before_v():
    rows = Rows.of_layers(3, lambda layer: torch.arange(8 * layer, 8 * layer + 8).view(2, 4))
    assert rows.shape == (3, 2, 4) and torch.equal(torch.cat(list(rows.pieces)), torch.arange(24))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_from_a_host_bank_in_16_bits(dtype, tmp_path):
    memory = WorldMemory(config(bank="host"), dtype=dtype, device=DEVICE)
    walk(memory, 0, 11)
    memory.save(tmp_path / "walk.worldkv")
    on_device = WorldMemory.load(tmp_path / "walk.worldkv", device=DEVICE, bank="device")
    again, forked = WorldMemory.load(tmp_path / "walk.worldkv", device=DEVICE), memory.fork()
    want = walk(memory, 11, 24)
    for other in (on_device, again, forked):
        assert other.dtype == dtype and equal(walk(other, 11, 24), want)
    assert on_device.stats()["host_copies_out"] == 0
    # What was on the device has to come again; after that all is as it was.
    for name in ("host_copies_out", "host_bytes_out", "host_bytes"):
        assert again.stats()[name] == forked.stats()[name] == memory.stats()[name] > 0
    assert again.stats()["host_misses"] >= memory.stats()["host_misses"]


@pytest.mark.parametrize("bank", ["device", "host"])
def test_what_a_caller_has_changed_goes_along(bank, tmp_path):
    """Pins, chunks that are not to be banked, another window, and chunks of several lengths in the bank."""
    memory = WorldMemory(config(recent_frames=6, bank=bank), dtype=torch.float32, device=DEVICE)
    walk(memory, 0, 5)
    memory.change(keep_ratio=0.1, recent_frames=3)
    memory.pin(2)
    walk(memory, 5, 8)
    memory.forget(7)
    memory.change(recent_frames=6, retrieved_chunks=1)
    memory.save(tmp_path / "m")
    loaded, forked = WorldMemory.load(tmp_path / "m", device=DEVICE), memory.fork()
    assert loaded.pinned == forked.pinned == (2,) and loaded.config == memory.config
    want = walk(memory, 8, 20)
    for other in (loaded, forked):
        assert equal(walk(other, 8, 20), want) and counts(other) == counts(memory)
        assert other.location(7) == "dropped" and other.location(2) == "bank"
        other.reset()
        assert other.config.recent_frames == 6 and other.config.keep_ratio == 0.25 and other.pinned == ()


def test_a_fork_shares_nothing_that_is_written():
    memory = WorldMemory(config(retrieval=Newest()), dtype=torch.float32, device=DEVICE)
    walk(memory, 0, 8)
    forks = [memory.fork(), memory.fork()]
    assert len({id(m.config.retrieval) for m in (memory, *forks)}) == 3
    for fork in forks:  # each goes its own way, twice as far as its bank and window reach
        poses = torch.randn(3, 1, generator=torch.Generator().manual_seed(id(fork) % 97))
        walk(fork, 8 + len(poses), 20)
    again = memory.fork()
    assert equal(walk(memory, 8, 20), walk(again, 8, 20))
    memory.reset()
    assert forks[0].stats()["chunks"] == 17


class CountsUses(Newest):
    """Writes into what it has described, and picks what was used least."""

    def __init__(self) -> None:
        super().__init__()
        self.last = None

    def describe(self, poses, intrinsics):
        self.last = {"uses": 0}
        return self.last

    def select(self, current, candidates, budget):
        picked = sorted(candidates, key=lambda item: (item[1]["uses"], item[0]))[:budget]
        for _, description in picked:
            description["uses"] += 1
        return [chunk for chunk, _ in picked]


def test_a_fork_has_descriptions_of_its_own_where_a_policy_writes_into_them():
    memory, alone = (WorldMemory(config(retrieval=CountsUses()), dtype=torch.float32) for _ in range(2))
    walk(memory, 0, 8)
    fork = memory.fork()
    walk(fork, 8, 12)
    walk(alone, 0, 8)
    assert equal(walk(memory, 8, 14), walk(alone, 8, 14))
    policy = fork.config.retrieval
    assert policy.last is fork._last_view.description  # what was one object still is


def test_a_rope_of_ones_own_is_refused_by_save_and_forked(tmp_path):
    class Slow(Rope3D):
        pass

    memory = WorldMemory(config(rope=Slow(64)), dtype=torch.float32)
    walk(memory, 0, 3)
    with pytest.raises(
        TypeError, match=r"WorldMemory.save: config.rope must be a Rope3D itself to be saved, got a Slow"
    ):
        memory.save(tmp_path / "m")
    assert type(memory.fork().config.rope) is Slow


def test_strings_of_an_enum_are_strings(tmp_path):
    class Modes(str, Enum):
        KEEP = "worldkv"

    memory = WorldMemory(config(mode=Modes.KEEP), dtype=torch.float32)
    memory.save(tmp_path / "m")
    assert type(memory.config.mode) is str and WorldMemory.load(tmp_path / "m").config == memory.config


def test_a_policy_of_ones_own_is_given_anew(tmp_path):
    file = tmp_path / "own.worldkv"
    memory = WorldMemory(config(retrieval=Newest()), dtype=torch.float32)
    walk(memory, 0, 9)
    memory.save(file)
    with pytest.raises(ValueError, match=r"retrieval must be a .*Newest, which the memory was saved with, got None"):
        WorldMemory.load(file)
    with pytest.raises(ValueError, match=r"retrieval must be a .*Newest, .* got .*PoseRetrieval"):
        WorldMemory.load(file, retrieval=PoseRetrieval())
    policy = Newest()
    policy.asked = memory.config.retrieval.asked
    loaded = WorldMemory.load(file, retrieval=policy)
    assert equal(walk(loaded, 9, 16), walk(memory, 9, 16))
    assert loaded.config.retrieval is policy

    described = WorldMemory(config(retrieval=SpeaksInObjects()), dtype=torch.float32)
    walk(described, 0, 5)
    before = file.read_bytes()
    with pytest.raises(TypeError, match=r"WorldMemory.save: \S+ must be of plain values, .* got SpeaksInObjects"):
        described.save(file)
    assert file.read_bytes() == before and list(tmp_path.iterdir()) == [file]


class SpeaksInObjects(Newest):
    def describe(self, poses, intrinsics):
        return self


def test_a_policy_of_the_package_may_be_replaced_by_its_like(tmp_path):
    file = tmp_path / "pose.worldkv"
    memory = WorldMemory(config(retrieval="pose"), dtype=torch.float32)
    walk(memory, 0, 6)
    memory.save(file)
    assert WorldMemory.load(file).config.retrieval == "pose"
    policy = PoseRetrieval(diversity=0.5)
    assert WorldMemory.load(file, retrieval=policy).config.retrieval is policy
    with pytest.raises(ValueError, match=r"retrieval must be None or a .*PoseRetrieval, .* got .*FovRetrieval"):
        WorldMemory.load(file, retrieval=FovRetrieval())


def test_what_changes_no_result_may_be_changed(tmp_path):
    file = tmp_path / "m.worldkv"
    memory = WorldMemory(config(), dtype=torch.float32)
    walk(memory, 0, 9)
    memory.save(file)
    larger = WorldMemory.load(file, bank_chunks=9, bank="host", device_slots=2, prefetch=False)
    assert larger.stats()["bank_capacity"] == 9 and larger.stats()["chunks_banked"] == 4
    assert larger.config == replace(memory.config, bank_chunks=9, bank="host", device_slots=2, prefetch=False)
    with pytest.raises(ValueError, match=r"m.worldkv: bank must hold up to 3 of the chunks"):
        WorldMemory.load(file, bank_chunks=3)
    with pytest.raises(TypeError, match=r"changes must be of bank, bank_chunks, .* got keep_ratio"):
        WorldMemory.load(file, keep_ratio=0.5)


def test_a_bank_of_what_fits_keeps_its_size(monkeypatch, tmp_path):
    memory = WorldMemory(config(bank_chunks=None), dtype=torch.float32)
    memory.save(tmp_path / "m")
    loaded = WorldMemory.load(tmp_path / "m")
    assert loaded.config.bank_chunks == memory.stats()["bank_capacity"] == memory.fork().config.bank_chunks


def test_between_chunks_alone(tmp_path):
    memory = WorldMemory(config(), dtype=torch.float32)
    memory.begin_chunk(jumps(0, 1)[0])
    for call in (memory.fork, lambda: memory.save(tmp_path / "m")):
        with pytest.raises(RuntimeError, match=r"(save|fork): chunk 0 must be ended or aborted before"):
            call()
    memory.abort_chunk()
    memory.save(tmp_path / "m")
    with pytest.raises(ValueError, match=r"path must be a file's, got the folder"):
        memory.save(tmp_path)


def test_the_file_is_safetensors_and_says_what_wrote_it(tmp_path):
    memory = WorldMemory(config(), dtype=torch.bfloat16, device=DEVICE)
    walk(memory, 0, 6)
    memory.save(tmp_path / "m.safetensors")
    layout, metadata = read_header("test", Path(tmp_path / "m.safetensors"))
    assert metadata["format"] == "worldkv memory" and metadata["version"] == "1"
    assert "worldkv_kernels 0." in metadata["written_by"] and torch.__version__ in metadata["written_by"]
    assert layout["whole.0"].shape == (2, 2, 18, 1, 64) and layout["whole.0"].dtype == "BF16"
    assert set(json.loads(metadata["state"])["sha256"]) == set(layout)
    k, _ = memory.pools(1)
    stored = read_tensors(tmp_path / "m.safetensors")["whole.0"]
    assert torch.equal(stored[1, 0], k[memory.window.segments[0].first_row :][:18].cpu())


def test_a_rope_of_ones_own_comes_back_whole(tmp_path):
    memory = WorldMemory(config(rope=Rope3D(64, theta=500.0, pairs=(12, 12, 8))), dtype=torch.float32)
    walk(memory, 0, 9)
    memory.save(tmp_path / "m")
    loaded = WorldMemory.load(tmp_path / "m")
    assert loaded.config == memory.config and loaded.config.rope.pairs == (12, 12, 8)
    other = WorldMemory(config(rope=Rope3D(64, theta=501.0, pairs=(12, 12, 8))), dtype=torch.float32)
    walk(other, 0, 9)
    made, again, others = (walk(one, 9, 12) for one in (memory, loaded, other))
    assert all(map(torch.equal, made, again)) and not any(map(torch.equal, made, others))


@pytest.mark.parametrize("bank", [True, False])
def test_a_chunk_that_was_aborted_after_its_pruning_failed_is_not_saved(bank, tmp_path, monkeypatch):
    memory = WorldMemory(config(), dtype=torch.float32)
    walk(memory, 0, 6)
    memory.begin_chunk(jumps(5, 64)[6])
    memory.replayed()

    def fails(*args):
        raise MemoryError

    monkeypatch.setattr(type(memory._storage), "prune", fails)
    with pytest.raises(MemoryError):
        memory.end_chunk(bank=bank)
    monkeypatch.undo()
    memory.abort_chunk()
    memory.save(tmp_path / "m")
    loaded, forked = WorldMemory.load(tmp_path / "m"), memory.fork()
    want = walk(memory, 6, 12)
    assert equal(walk(loaded, 6, 12), want) and equal(walk(forked, 6, 12), want)


class Told(Newest):
    """Describes chunks by what it is given."""

    def __init__(self, description) -> None:
        self.description = description

    def describe(self, poses, intrinsics):
        return self.description


class Pair(NamedTuple):
    first: int
    second: int


@pytest.mark.parametrize(
    "description",
    [
        np.float32(0.1),
        np.int64(3),
        np.bool_(True),
        {1: np.ones(2), "1": np.zeros(3)},
        {"a": {"b": np.ones(1)}, "a.b": np.zeros(2)},
    ],
)
def test_numbers_and_names_come_back_as_they_were(description, tmp_path):
    memory = WorldMemory(config(retrieval=Told(description)), dtype=torch.float32)
    walk(memory, 0, 2)
    memory.save(tmp_path / "m")
    again = WorldMemory.load(tmp_path / "m", retrieval=Told(description))._last_view.description
    assert type(again) is type(description) and str(again) == str(description)


@pytest.mark.parametrize("description", [Pair(1, 2), OrderedDict(a=1), np.array(["a"]), {(1, 2): 3}, [Pair(1, 2)]])
def test_what_would_come_back_as_another_type_is_refused(description, tmp_path):
    memory = WorldMemory(config(retrieval=Told(description)), dtype=torch.float32)
    walk(memory, 0, 2)
    with pytest.raises(TypeError, match=r"WorldMemory.save: \S+ must be of plain values"):
        memory.save(tmp_path / "m")
    assert not list(tmp_path.iterdir())
