"""Saved memories to break: small ones of each kind, and files taken apart and put together again, checksums and all."""

from __future__ import annotations

import copy
import hashlib
import json
import math
import struct
from pathlib import Path

import numpy as np
import torch

from worldkv_kernels import MemoryConfig, Rope3D, WorldMemory
from worldkv_kernels.actions import LAYOUTS, Actions
from worldkv_kernels.memory import saving
from worldkv_kernels.memory.retrieval import (
    ActionRetrieval,
    ContentRetrieval,
    FovRetrieval,
    OfficialPoseRetrieval,
    PoseRetrieval,
)
from worldkv_kernels.saved import Rows

SIZES = dict(
    num_layers=1, num_heads=1, head_dim=64, grid=(1, 2), chunk_frames=2, retrieved_chunks=2, bank_chunks=3,
    recent_frames=2, rope=Rope3D(64),
)  # fmt: skip
# A memory of each kind, and after how many chunks it is saved: with the bank full, before anything, on the way.
KINDS = {
    "pose": (dict(retrieval=PoseRetrieval(diversity=0.3)), 8),
    "fov": (dict(retrieval=FovRetrieval(samples=4), bank="host", device_slots=3, unattended_chunks=1), 9),
    "action": (dict(retrieval=ActionRetrieval()), 6),
    "official": (dict(retrieval=OfficialPoseRetrieval(), bank="host", bank_sink=True, rebase_sink=False), 4),
    "new": (dict(retrieval="action"), 0),
    "full": (dict(mode="full", bank_chunks=40), 3),
    "sink_recent": (dict(mode="sink_recent", retrieval="action"), 5),
    "unbounded": (dict(bank_chunks=None, rope=Rope3D(64)), 5),
    "without a rope": (dict(mode="sliding", rope=None), 5),
    "content": (dict(retrieval=ContentRetrieval(skip_newest=1, diversity=0.3)), 8),
    "in 4 bits": (dict(bank_bits=4), 8),
    "mass": (dict(mass_layers=(0,)), 8),
    "turned": (dict(bank="host", recent_frames=4, keep_ratio=0.8), 9),
}
OPS = ("begin_chunk: ", "end_chunk: ", "attend: ", "quantize_chunk: ")


def memory_of(kind: str) -> WorldMemory:
    fields, chunks = KINDS[kind]
    memory = WorldMemory(MemoryConfig(**{**SIZES, **fields}), dtype=torch.bfloat16)
    walk(memory, chunks, turns=kind == "turned")
    if kind == "turned":  # by now another window, and chunk 8 is left out of the bank
        memory.pin(0), memory.pin(1)
    return memory


def walk(memory: WorldMemory, chunks: int, *, turns: bool = False) -> list[torch.Tensor]:
    """What each layer attended to gave in the next chunks, of numbers, poses or actions that their numbers say.

    With `turns` chunks are pinned, forgotten and left out of the bank between them, and what the window takes changes.
    """
    config, made = memory.config, []
    for _ in range(chunks):
        chunk = memory.stats()["chunks"]
        begin(memory, chunk)
        generator = torch.Generator().manual_seed(chunk)
        for layer in range(config.num_layers):
            qkv = torch.randn(3, config.chunk_tokens, config.num_heads * config.head_dim, generator=generator)
            q, k, v = qkv.to(memory.device, memory.dtype)
            columns = config.num_kv_heads * config.head_dim
            made.append(memory.attend(layer, q, k[:, :columns], v[:, :columns]).cpu())
        memory.end_chunk(bank=not turns or chunk % 5 != 3)
        if turns:
            turn(memory, chunk)
    return made


def turn(memory: WorldMemory, chunk: int) -> None:
    """One thing that may be done after this chunk, as its number says."""
    random, config = np.random.default_rng(chunk), memory.config
    kept = [past for past in range(chunk + 1) if memory.location(past) != "dropped"]
    to_forget = [past for past in kept if memory.location(past) != "sink"]
    what = random.choice(["pin", "unpin", "forget", "change"])
    if what == "change":
        most = memory.configured
        memory.change(
            retrieved_chunks=int(random.integers(0, most.retrieved_chunks + 1)),
            recent_frames=int(random.integers(0, most.recent_frames + 1)),
            keep_ratio=float(random.uniform(0.1, 1)) * most.keep_ratio,
        )
    elif what == "pin" and config.has_bank:
        memory.pin(int(random.choice(kept)))
    elif what == "unpin" and memory.pinned:
        memory.unpin(memory.pinned[0])
    elif what == "forget" and config.has_bank and to_forget:
        memory.forget(int(random.choice(to_forget)))


def begin(memory: WorldMemory, chunk: int) -> None:
    config, random = memory.config, np.random.default_rng(chunk)
    if memory.integrator is not None:
        layout, rows = LAYOUTS[memory.integrator.layout_name], 4 * config.chunk_frames - (0 if chunk else 3)
        keys = np.eye(len(layout.keyboard))[random.integers(0, len(layout.keyboard), size=rows)]
        memory.begin_chunk(actions=Actions(random.normal(size=(rows, 2)) if layout.mouse else None, keys))
        return
    angle = random.uniform(0, 2 * math.pi)
    poses = np.tile(np.eye(4), (config.chunk_frames, 1, 1))
    poses[:, :3, 3] = random.normal(size=3)
    poses[:, 0, 0] = poses[:, 2, 2] = math.cos(angle)
    poses[:, 0, 2], poses[:, 2, 0] = math.sin(angle), -math.sin(angle)
    memory.begin_chunk(poses, intrinsics=np.array([100.0, 100.0, 48.0, 32.0]))


def equal(one: object, other: object) -> bool:
    """Whether two states, as saving.file_tree gives them, are of the same types, numbers and order."""
    if type(one) is not type(other):
        return False
    if isinstance(one, Rows):
        return all(torch.equal(a, b) for a, b in zip(one.pieces, other.pieces, strict=True))
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, np.ndarray):
        return one.dtype == other.dtype and np.array_equal(one, other)
    if isinstance(one, dict):
        return list(one) == list(other) and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(equal, one, other))
    return one == other


def same_state(one: WorldMemory, other: WorldMemory) -> bool:
    trees = [saving.file_tree("test", memory) for memory in (one, other)]
    for tree in trees:
        tree["config"].pop("bank_chunks")  # which is `places` once loaded, where it was None
    return equal(*trees)


def loaded(file: Path) -> WorldMemory | str:
    """The memory of a file, or why it is refused: by a ValueError, no other, that names the file."""
    try:
        return WorldMemory.load(file)
    except ValueError as error:
        told = str(error)
        assert type(error) is ValueError, repr(error)
        assert told.startswith("WorldMemory.load: ") and str(file) in told, told
        return told.replace(str(file), "FILE")


def refused(file: Path) -> str:
    told = loaded(file)
    assert isinstance(told, str), told
    return told


def refused_or_goes_on(file: Path, chunks: int = 5) -> str | None:
    """Why it is refused; None where it loads, and then makes chunks: errors of an op name it, there are no others."""
    memory = loaded(file)
    if isinstance(memory, str):
        return memory
    try:
        walk(memory, chunks)
    except (ValueError, RuntimeError) as error:
        if not str(error).startswith(OPS):
            raise
    return None


class Parts:
    """A saved file in its parts: `metadata`, `state` (its JSON), and `tensors` by name, (dtype, shape, bytes).

    `write` puts them together again so that every checksum is right.
    """

    def __init__(self, file: Path) -> None:
        whole = file.read_bytes()
        (length,) = struct.unpack("<Q", whole[:8])
        header, self.data_begin = json.loads(whole[8 : 8 + length]), 8 + length
        self.metadata = header.pop("__metadata__")
        self.state = json.loads(self.metadata["state"])
        self.tensors = {}
        for name, entry in header.items():
            begin, end = (self.data_begin + offset for offset in entry["data_offsets"])
            self.tensors[name] = (entry["dtype"], entry["shape"], whole[begin:end])

    def copied(self) -> Parts:
        return copy.deepcopy(self)

    @property
    def tree(self):
        return self.state["tree"]

    def sum_up(self) -> None:
        """Let the state have the tensors' checksums."""
        self.state["sha256"] = {
            name: hashlib.sha256(f"{dtype} {shape}".encode() + data).hexdigest()
            for name, (dtype, shape, data) in self.tensors.items()
        }

    def write(self, file: Path, state: str | None = None) -> Path:
        """With `state` as the JSON of the state, where it is given."""
        text = json.dumps(self.state) if state is None else state
        sums = hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()
        header, at = {"__metadata__": {**self.metadata, "state": text, "sha256": sums}}, 0
        for name, (dtype, shape, data) in self.tensors.items():
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + len(data)]}
            at += len(data)
        encoded = json.dumps(header).encode()
        data = b"".join(data for _, _, data in self.tensors.values())
        file.write_bytes(struct.pack("<Q", len(encoded)) + encoded + data)
        return file


def field(packed: dict, *keys):
    """What stands in the packed tree under keys of dictionaries."""
    for key in keys:
        packed = dict((name, value) for name, value in packed["dict"])[key]
    return packed


def put(packed: dict, *keys, value) -> None:
    """Put it there in place of what is; at the end where nothing is."""
    *way, last = keys
    pairs = field(packed, *way)["dict"]
    for pair in pairs:
        if pair[0] == last and type(pair[0]) is type(last):
            pair[1] = value
            return
    pairs.append([last, value])
