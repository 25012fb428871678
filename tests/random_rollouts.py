"""Random configurations of WorldMemory and random rollouts for them: poses, and projections of every pass and layer."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from slow_memory import SlowMemory, pruned, qk_norm, turned

from worldkv_kernels import MemoryConfig, Rope3D, WorldMemory

HEAD_DIM = 64
# Similarities are computed in fp32 (error some 1e-7); keys are drawn so that they decide by more than this.
SIMILARITY_GAP = 1e-5
MAX_CHUNKS = 14
ROPES = [
    Rope3D(HEAD_DIM),
    Rope3D(HEAD_DIM, pairs=(12, 12, 8), theta=500.0),
    Rope3D(HEAD_DIM, pairs=(32, 0, 0)),
]
seeds = st.integers(0, 2**31)


def fuzz(examples: int):
    return settings(
        max_examples=examples, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), database=None
    )


def rotation(yaw: float, pitch: float) -> np.ndarray:
    """Camera-to-world, degrees; OpenCV axes (x right, y down, z ahead)."""
    a, b = math.radians(yaw), math.radians(pitch)
    about_y = np.array([[math.cos(a), 0, math.sin(a)], [0, 1, 0], [-math.sin(a), 0, math.cos(a)]])
    about_x = np.array([[1, 0, 0], [0, math.cos(b), -math.sin(b)], [0, math.sin(b), math.cos(b)]])
    return about_y @ about_x


def camera_walk(rng: np.random.Generator, num_chunks: int, frames: int, only: str = "") -> list[np.ndarray]:
    """Poses [frames, 4, 4] of each chunk: stands, turns, strides, strays, or repeats an earlier chunk.

    Turns and strides come in round numbers, so that distances are either equal but for float64's rounding or
    clearly apart; a common rigid motion makes sure of the rounding.
    """
    yaw, pitch, position = 0.0, 0.0, np.zeros(3)
    chunks: list[np.ndarray] = []
    for number in range(num_chunks):
        what = only or rng.choice(["stand", "turn", "nod", "stride", "stray", "repeat", "return"])
        if what in ("repeat", "return") and number:
            earlier = chunks[rng.integers(number)]
            chunks.append(earlier if what == "repeat" else earlier[::-1])
            continue
        step = float(rng.choice([-15, -5, 5, 15]))
        poses = np.tile(np.eye(4), (frames, 1, 1))
        for pose in poses:
            yaw += step * (what in ("turn", "stray"))
            pitch += step * (what == "nod") if abs(pitch + step) < 60 else 0
            if what == "stride":
                position = position + rotation(yaw, pitch)[:, 2]
            elif what == "stray":
                position = position + rng.normal(size=3)
            pose[:3, :3], pose[:3, 3] = rotation(yaw, pitch), position
        chunks.append(poses)
    world = np.eye(4)
    world[:3, :3], world[:3, 3] = rotation(*rng.uniform(-80, 80, size=2)), rng.normal(size=3)
    return [world @ poses for poses in chunks]


class Rollout:
    """What a model feeds its memory: poses, and per chunk, pass and layer the projections q, k and v."""

    def __init__(self, config: MemoryConfig, seed: int, num_chunks: int, walk: str = "") -> None:
        rng = np.random.default_rng(seed)
        self.random = torch.Generator().manual_seed(seed)
        self.config = config
        self.poses = camera_walk(rng, num_chunks, config.chunk_frames, walk)
        columns = [heads * config.head_dim for heads in (config.num_heads, config.num_kv_heads)]
        self.weights = [(None, None)] * config.num_layers
        if rng.random() < 0.7:
            self.weights = [
                tuple(1 + 0.2 * torch.randn(of, generator=self.random) for of in columns)
                for _ in range(config.num_layers)
            ]
        self.passes = [[self._layers(chunk) for _ in range(rng.integers(1, 3))] for chunk in range(num_chunks)]

    def _layers(self, chunk: int) -> list[tuple[torch.Tensor, ...]]:
        config, layers = self.config, []
        for layer in range(config.num_layers):
            q, v = (
                torch.randn(config.chunk_tokens, heads * config.head_dim, generator=self.random)
                for heads in (config.num_heads, config.num_kv_heads)
            )
            k = self._keys(chunk, layer)
            while self._margin(chunk, layer, k) < SIMILARITY_GAP:
                k = self._keys(chunk, layer)
            layers.append((q, k, v, *self.weights[layer]))
        return layers

    def _keys(self, chunk: int, layer: int) -> torch.Tensor:
        """Keys of which, once normed and turned, about half are like one of an earlier frame; without a bank, any."""
        config, per_frame = self.config, self.config.chunk_tokens // self.config.chunk_frames
        k = torch.randn(config.chunk_tokens, config.num_kv_heads * config.head_dim, generator=self.random)
        if config.mode != "worldkv":
            return k
        for token in range(per_frame, config.chunk_tokens):
            share, source = torch.rand(2, generator=self.random).tolist()
            if share < 0.6:  # times the length of the other's: a cosine of .86 or more
                k[token] = share * k[token] + k[int(source * (token // per_frame * per_frame))]
        weight = self.weights[layer][1]
        unturned = self._turned(k.double(), chunk, -1)
        return (unturned if weight is None else unturned / weight.double()).float()

    def _turned(self, k: torch.Tensor, chunk: int, sign: int = 1) -> torch.Tensor:
        """[tokens, kv_heads * head_dim] as the rope turns a chunk's keys, or back."""
        config, frequencies = self.config, SlowMemory(self.config).frequencies
        if frequencies is None:
            return k
        frequencies = [[axis, sign * frequency] for axis, frequency in frequencies]
        first, sizes = chunk * config.chunk_frames, (config.chunk_frames, *config.grid)
        return turned(k.view(len(k), config.num_kv_heads, config.head_dim), sizes, first, frequencies).view(k.shape)

    def _margin(self, chunk: int, layer: int, k: torch.Tensor) -> float:
        """The least difference that decides what pruning makes of these keys."""
        config = self.config
        if config.mode != "worldkv":
            return math.inf
        keys = self._turned(qk_norm(k.double(), self.weights[layer][1], config.eps), chunk)
        keys = keys.view(len(k), config.num_kv_heads, config.head_dim)
        return pruned(config, keys, keys).margin

    def chunk(self, memory: WorldMemory, chunk: int) -> list[torch.Tensor]:
        """One chunk through the memory: the outputs of every pass and layer."""
        memory.begin_chunk(self.poses[chunk])
        outputs = [memory.attend(layer, *x) for layers in self.passes[chunk] for layer, x in enumerate(layers)]
        memory.end_chunk()
        return outputs

    def run(self, memory: WorldMemory) -> Iterator[list[torch.Tensor]]:
        for chunk in range(len(self.poses)):
            yield self.chunk(memory, chunk)


def make(config: MemoryConfig) -> WorldMemory:
    return WorldMemory(config, dtype=torch.float32, backend="reference")


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    return ((got.double() - want).norm() / want.norm()).item()


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def state(memory: WorldMemory, chunk: int) -> tuple:
    return memory.stats(), [memory.location(past) for past in range(chunk)], memory.window.segments


@st.composite
def configs(draw, whole_chunks: bool = False, any_bits: bool = False, **fixed) -> MemoryConfig:
    """`whole_chunks`: sink and recent frames neither end nor begin inside a chunk. `any_bits`: of the bank, else 16."""
    frames = draw(st.integers(1, 4))
    mode = fixed.get("mode") or draw(st.sampled_from(["worldkv"] * 5 + ["full", "sliding", "sink_recent"]))
    whole = whole_chunks or draw(st.booleans())
    retrieved = draw(st.integers(0, 4))
    rope = draw(st.sampled_from([*ROPES, ROPES[0], None]))
    heads, kv_heads = draw(st.sampled_from([(1, 1), (2, 1), (2, 2), (3, 3), (4, 2)]))
    bounds = [MAX_CHUNKS] + [max(1, retrieved) + draw(st.integers(0, 3))] * (mode != "full")
    drawn = dict(
        num_layers=draw(st.integers(1, 2)),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=HEAD_DIM,
        grid=(draw(st.integers(2, 4)), draw(st.integers(3, 5))),
        chunk_frames=frames,
        sink_frames=draw(st.integers(0, 2)) * frames if whole else draw(st.integers(0, 2 * frames)),
        recent_frames=draw(st.integers(0, 3)) * frames if whole else draw(st.integers(0, 3 * frames)),
        retrieved_chunks=retrieved,
        keep_ratio=draw(st.sampled_from([0.1, 0.25, 0.5, 0.7, 1.0]) | st.floats(0.1, 1)),
        pooled=draw(st.booleans()),
        prune_rule=draw(st.sampled_from(["nearest", "similarity"])),
        merge_pruned=draw(st.booleans()),
        retrieved_log_weight=draw(st.sampled_from([0.0, 0.0, math.log(2), -1.5])),
        mode=mode,
        rope=rope,
        rebase_time=rope is not None and draw(st.booleans()),
        order=draw(st.sampled_from(["time", "nearest_last", "nearest_first"])),
        bank=draw(st.sampled_from(["device", "host"])),
        bank_chunks=draw(st.sampled_from(bounds)),
        scale=draw(st.sampled_from([None, None, 0.2])),
        eps=draw(st.sampled_from([1e-6, 1e-2])),
        unattended_chunks=draw(st.integers(0, 1)),
    )
    if any_bits:
        drawn["bank_bits"] = draw(st.sampled_from([16, 8, 4]))
    return MemoryConfig(**{**drawn, **fixed})


def tiny(**fields) -> MemoryConfig:
    """One layer, one head, 2 x 3 tokens a frame, chunks of 2; sink 1, recent 2, retrieved 2."""
    small = dict(
        num_layers=1, num_heads=1, head_dim=HEAD_DIM, grid=(2, 3), chunk_frames=2, sink_frames=2, recent_frames=4,
        retrieved_chunks=2, rope=ROPES[0], bank_chunks=32,
    )  # fmt: skip
    return MemoryConfig(**{**small, **fields})
