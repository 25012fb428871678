"""A slow model of WorldMemory, written from the design alone, to compare the real one with.

It keeps the raw projections of every chunk in float64 and works everything out anew whenever it is asked:
QK-norm, rotary embedding, pruning, distances, the window. Keys are turned in time by rotating them at
another frame, and attention is one softmax over concatenated rows. What pruning makes of a chunk is worked out
by plain_compress. Nothing here is imported from the package; of a config only the fields are read.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import torch
from plain_compress import Plain, compressed

TIE = 1e-6  # distances closer than this are equal, and the older chunk goes first


def qk_norm(x: torch.Tensor, weight: torch.Tensor | None, eps: float) -> torch.Tensor:
    """RMSNorm over all heads together, [tokens, heads * head_dim]; none without a weight."""
    if weight is None:
        return x
    return x / torch.sqrt((x * x).mean(dim=1, keepdim=True) + eps) * weight.double()


def pair_frequencies(head_dim: int, theta: float = 10000.0, pairs: tuple[int, int, int] | None = None) -> list[list]:
    """(axis, radians per position) of each complex pair: time pairs, then height, then width."""
    half = head_dim // 2
    third = half // 3
    counts = pairs or (half - 2 * third, third, third)
    return [[axis, theta ** (-i / count)] for axis, count in enumerate(counts) for i in range(count)]


def turned(x: torch.Tensor, grid: tuple[int, int, int], start_frame: int, frequencies: list[list]) -> torch.Tensor:
    """3D rotary embedding of [frames * height * width, heads, head_dim], by complex numbers."""
    frames, height, width = grid
    out = torch.empty_like(x)
    each = itertools.product(range(frames), range(height), range(width))
    positions = [(start_frame + frame, row, column) for frame, row, column in each]
    axes = [axis for axis, _ in frequencies]
    per_position = torch.tensor([frequency for _, frequency in frequencies], dtype=torch.float64)
    angles = torch.tensor(positions, dtype=torch.float64)[:, axes] * per_position
    phase = torch.polar(torch.ones_like(angles), angles)[:, None, :]
    number = torch.complex(x[..., 0::2], x[..., 1::2]) * phase
    out[..., 0::2], out[..., 1::2] = number.real, number.imag
    return out


def turned_in_time(x: torch.Tensor, by: int, frequencies: list[list]) -> torch.Tensor:
    """Rows [rows, heads, head_dim], each turned by as many frames."""
    return turned(x.reshape(1, -1, x.shape[2]), (1, 1, 1), by, frequencies).view(x.shape)


def pruned(config, keys: torch.Tensor, values: torch.Tensor) -> Plain:
    """What is left of a chunk's keys, as they are stored, and values, both [tokens, heads, head_dim]."""
    return compressed(
        keys, values, frames=config.chunk_frames, keep_ratio=config.keep_ratio, pooled=config.pooled,
        rule=config.prune_rule, merge=config.merge_pruned, scale=config.scale,
    )  # fmt: skip


def softmax_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, log_weights: torch.Tensor
) -> torch.Tensor:
    """[tokens, heads, head_dim], every query on every key, whose score its `log_weights` is added to. Of k and v
    [rows, kv_heads, head_dim] a head serves as many heads of q as any other, in their order."""
    k, v = (torch.stack([x[:, head * x.shape[1] // q.shape[1]] for head in range(q.shape[1])], dim=1) for x in (k, v))
    logits = torch.einsum("qhd,khd->hqk", q, k) * scale + log_weights
    return torch.einsum("hqk,khd->qhd", torch.softmax(logits, dim=2), v)


def as_quaternion(rotation: np.ndarray) -> np.ndarray:
    """Unit quaternion (w, x, y, z) of a rotation matrix: the eigenvector of the largest eigenvalue (Bar-Itzhack)."""
    m = rotation
    k = np.array(
        [
            [m[0, 0] + m[1, 1] + m[2, 2], m[2, 1] - m[1, 2], m[0, 2] - m[2, 0], m[1, 0] - m[0, 1]],
            [m[2, 1] - m[1, 2], m[0, 0] - m[1, 1] - m[2, 2], m[0, 1] + m[1, 0], m[0, 2] + m[2, 0]],
            [m[0, 2] - m[2, 0], m[0, 1] + m[1, 0], m[1, 1] - m[0, 0] - m[2, 2], m[1, 2] + m[2, 1]],
            [m[1, 0] - m[0, 1], m[0, 2] + m[2, 0], m[1, 2] + m[2, 1], m[2, 2] - m[0, 0] - m[1, 1]],
        ]
    )
    return np.linalg.eigh(k)[1][:, 3]


def quaternion_product(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.concatenate(
        [[a[0] * b[0] - a[1:] @ b[1:]], a[0] * b[1:] + b[0] * a[1:] + np.cross(a[1:], b[1:])]
    )  # Hamilton's


def rotation_mean(rotations: list[np.ndarray]) -> np.ndarray:
    """The unit quaternion with the least sum of squared angles to the rotations."""
    quaternions = [as_quaternion(rotation) for rotation in rotations]
    mean = quaternions[0]
    for _ in range(200):
        steps = []
        for quaternion in quaternions:
            difference = quaternion_product(mean * (1, -1, -1, -1), quaternion)
            difference = difference if difference[0] >= 0 else -difference
            sine = np.linalg.norm(difference[1:])
            half_angle = math.atan2(sine, difference[0])
            steps.append(difference[1:] / sine * half_angle if sine > 0 else np.zeros(3))
        step = np.mean(steps, axis=0)
        size = np.linalg.norm(step)
        if size < 1e-14:
            break
        mean = quaternion_product(mean, np.concatenate([[math.cos(size)], math.sin(size) * step / size]))
        mean = mean / np.linalg.norm(mean)
    return mean


def quaternion_angle(a: np.ndarray, b: np.ndarray) -> float:
    difference = quaternion_product(a * (1, -1, -1, -1), b)
    return 2 * math.atan2(np.linalg.norm(difference[1:]), abs(difference[0]))


class PoseOrder:
    """0.5 dt / max dt + 0.5 dr / max dr on chunk means; a maximum that is float noise counts as zero."""

    def describe(self, poses: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return poses[:, :3, 3].mean(axis=0), rotation_mean(list(poses[:, :3, :3]))

    def terms(self, a, b) -> tuple[float, float]:
        return float(((a[0] - b[0]) ** 2).sum()), quaternion_angle(a[1], b[1])

    def scales(self, current, candidates: list) -> tuple[float, float]:
        """What to divide by: the largest of either term over the candidates; infinity where it is noise."""
        dt, dr = zip(*(self.terms(current, candidate) for candidate in candidates), strict=True)
        extent = max(np.abs(view[0]).max() for view in [current, *candidates])
        return (
            max(dt) if max(dt) > max(1e-5 * extent, 1e-6) ** 2 else math.inf,
            max(dr) if max(dr) > 1e-4 else math.inf,
        )

    def distance(self, a, b, scales: tuple[float, float]) -> float:
        dt, dr = self.terms(a, b)
        return 0.5 * dt / scales[0] + 0.5 * dr / scales[1]

    def select(self, current, candidates: dict[int, object], budget: int) -> list[int]:
        if not candidates:
            return []
        scales = self.scales(current, list(candidates.values()))
        left = {chunk: self.distance(current, view, scales) for chunk, view in candidates.items()}
        picked: list[int] = []
        while left and len(picked) < budget:
            nearest = min(left.values())
            chunk = min(chunk for chunk, distance in left.items() if distance <= nearest + TIE)
            picked.append(chunk)
            del left[chunk]
        return picked

    def drop(self, candidates: dict[int, object]) -> int:
        """The younger chunk of the two most alike; of equal pairs the oldest."""
        chunks = sorted(candidates)
        if len(chunks) == 1:
            return chunks[0]
        scales = self.scales(candidates[chunks[-1]], list(candidates.values()))
        pairs = {(a, b): self.distance(candidates[a], candidates[b], scales) for a in chunks for b in chunks if a < b}
        least = min(pairs.values())
        return min(pair for pair, distance in pairs.items() if distance <= least + TIE)[1]


class OfficialOrder:
    """The published distance: averaged matrices, acos, each term divided by its maximum if that is above 0."""

    def describe(self, poses: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return poses[:, :3, 3].mean(axis=0), poses[:, :3, :3].mean(axis=0)

    def distances(self, current, candidates: dict[int, object]) -> dict[int, float]:
        dt, dr = {}, {}
        for chunk, (position, rotation) in candidates.items():
            dt[chunk] = float(((position - current[0]) ** 2).sum())
            cosine = (np.trace(rotation.T @ current[1]) - 1) / 2
            dr[chunk] = math.acos(min(1.0, max(-1.0, cosine)))
        for term in (dt, dr):
            largest = max(term.values())
            for chunk in term:
                term[chunk] = term[chunk] / largest if largest > 0 else term[chunk]
        return {chunk: 0.5 * dt[chunk] + 0.5 * dr[chunk] for chunk in candidates}

    def select(self, current, candidates: dict[int, object], budget: int) -> list[int]:
        if not candidates:
            return []
        distances = self.distances(current, candidates)
        return sorted(candidates, key=lambda chunk: (distances[chunk], chunk))[:budget]

    def drop(self, candidates: dict[int, object]) -> int:
        return min(candidates)


class SlowChunk:
    """One chunk: its number, and per layer the raw projections of its last pass."""

    def __init__(self, number: int, num_layers: int) -> None:
        self.number = number
        self.k: list[torch.Tensor | None] = [None] * num_layers
        self.v: list[torch.Tensor | None] = [None] * num_layers
        self.k_weight: list[torch.Tensor | None] = [None] * num_layers
        self.pruned: list[Plain] | None = None  # per layer, with its keys as in the chunk's own frames
        self.view: object = None


class SlowMemory:
    """See WorldMemory; `order` is a PoseOrder or an OfficialOrder."""

    def __init__(self, config, order=None) -> None:
        self.config = config
        self.order = order or PoseOrder()
        rope = config.rope
        self.frequencies = None
        if rope == "wan":
            self.frequencies = pair_frequencies(config.head_dim)
        elif rope is not None:
            self.frequencies = pair_frequencies(config.head_dim, rope.theta, rope.pairs)
        self.past: dict[int, SlowChunk] = {}
        self.where: dict[int, str] = {}  # sink, recent, unattended, bank or dropped
        self.banked: list[int] = []  # with the published code's copy of the sink, which `where` calls sink
        self.unbanked: set[int] = set()  # not to be banked when they leave
        self.pinned: set[int] = set()
        self.num_dropped = 0
        self.next = 0
        self.current: SlowChunk | None = None
        # Role, chunk, the frame to which the keys of its first frame are turned, which of its frames.
        self.window: list[tuple[str, int, int, range]] = []

    # The window.

    def begin(self, poses: np.ndarray | None = None) -> None:
        config, number = self.config, self.next
        self.current = SlowChunk(number, config.num_layers)
        if poses is not None and config.mode == "worldkv":
            self.current.view = self.order.describe(np.asarray(poses, dtype=np.float64))
        frames = config.chunk_frames
        retrieved: list[int] = []
        if config.mode == "worldkv":
            candidates = {chunk: self.past[chunk].view for chunk in range(number) if self.where[chunk] == "bank"}
            retrieved = self.order.select(self.current.view, candidates, config.retrieved_chunks)
            if config.order == "time":
                retrieved.sort()
            elif config.order == "nearest_last":
                retrieved.reverse()
        self.retrieved = retrieved
        reach = config.recent_frames
        if config.mode == "worldkv" and not retrieved and config.retrieved_chunks:
            reach += config.unattended_chunks * frames
        roles = {frame: self.role_of_frame(frame, number * frames, reach) for frame in range(number * frames)}
        pieces = [("sink", chunk, self.frames_with("sink", roles, chunk)) for chunk in range(number)]
        pieces += [("retrieved", chunk, range(frames)) for chunk in retrieved]
        pieces += [("recent", chunk, self.frames_with("recent", roles, chunk)) for chunk in range(number)]
        pieces = [piece for piece in [*pieces, ("current", number, range(frames))] if len(piece[2])]
        firsts = [chunk * frames for _, chunk, _ in pieces]
        if config.rebase_time and config.mode != "full":
            stands = min((frame for frame, role in roles.items() if role == "recent"), default=number * frames)
            for place, (role, _, of_chunk) in reversed(list(enumerate(pieces))):
                if role == "retrieved" or (role == "sink" and config.rebase_sink):
                    stands -= len(of_chunk)
                    firsts[place] = stands
        self.window = [
            (role, chunk, first, of_chunk) for (role, chunk, of_chunk), first in zip(pieces, firsts, strict=True)
        ]

    def role_of_frame(self, frame: int, now: int, reach: int) -> str:
        """What a past frame is while the frames from `now` on are made, if the recent ones go `reach` back."""
        config = self.config
        if config.mode in ("worldkv", "sink_recent") and frame < config.sink_frames:
            return "sink"
        where = self.where.get(frame // config.chunk_frames)
        gone = {"bank", "dropped"}.intersection(self.where.values())
        if where in ("bank", "dropped") or (where == "sink" and gone):  # the rest of the chunk in which the sink ends
            return "out"
        return "recent" if config.mode == "full" or now - frame <= reach else "out"

    def frames_with(self, role: str, roles: dict[int, str], chunk: int) -> range:
        """Of a chunk's frames, counted from 0, those of a role, which follow one another."""
        frames = self.config.chunk_frames
        found = [frame for frame in range(frames) if roles[chunk * frames + frame] == role]
        return range(found[0], found[-1] + 1) if found else range(0)

    @property
    def num_tokens(self) -> int:
        return sum(len(self.tokens(role, chunk, of_chunk)) for role, chunk, _, of_chunk in self.window)

    def tokens(self, role: str, chunk: int, of_chunk: range, layer: int = 0) -> list[int]:
        """Which of a chunk's tokens are attended to."""
        if role == "retrieved":
            return self.past[chunk].pruned[layer].index
        per_frame = self.config.grid[0] * self.config.grid[1]
        return list(range(of_chunk.start * per_frame, of_chunk.stop * per_frame))

    def rows(self, chunk: int) -> int:
        config = self.config
        whole = config.chunk_frames * config.grid[0] * config.grid[1]
        if self.past[chunk].pruned is None:
            return whole
        return len(self.past[chunk].pruned[0].index)

    # Attention.

    def keys(self, chunk: SlowChunk, layer: int, first_frame: int) -> torch.Tensor:
        config = self.config
        keys = qk_norm(chunk.k[layer], chunk.k_weight[layer], config.eps)
        return self.rotate(keys.view(len(keys), config.num_kv_heads, config.head_dim), first_frame)

    def rotate(self, x: torch.Tensor, first_frame: int) -> torch.Tensor:
        if self.frequencies is None:
            return x
        return turned(x, (self.config.chunk_frames, *self.config.grid), first_frame, self.frequencies)

    def turn(self, x: torch.Tensor, by: int) -> torch.Tensor:
        return x if self.frequencies is None else turned_in_time(x, by, self.frequencies)

    def attend(self, layer: int, q, k, v, q_weight=None, k_weight=None) -> torch.Tensor:
        config, current = self.config, self.current
        current.k[layer], current.v[layer], current.k_weight[layer] = k.double(), v.double(), k_weight
        queries = qk_norm(q.double(), q_weight, config.eps).view(-1, config.num_heads, config.head_dim)
        queries = self.rotate(queries, current.number * config.chunk_frames)
        keys, values, log_weights = [], [], []
        for role, number, first_frame, of_chunk in self.window:
            chunk = current if number == current.number else self.past[number]
            if role == "retrieved":
                rows = chunk.pruned[layer]
                keys.append(self.turn(rows.k, first_frame - number * config.chunk_frames))
                values.append(rows.v)
                log_weights += [config.retrieved_log_weight] * len(rows.v)
                continue
            tokens = self.tokens(role, number, of_chunk, layer)
            keys.append(self.keys(chunk, layer, first_frame)[tokens])
            values.append(chunk.v[layer].view(-1, config.num_kv_heads, config.head_dim)[tokens])
            log_weights += [0.0] * len(tokens)
        scale = config.scale if config.scale is not None else 1 / math.sqrt(config.head_dim)
        weights = torch.tensor(log_weights, dtype=torch.float64)
        return softmax_attention(queries, torch.cat(keys), torch.cat(values), scale, weights)

    # History.

    def end(self, bank: bool = True) -> None:
        config, number = self.config, self.next
        self.past[number] = self.current
        self.current = None
        self.next += 1
        in_sink = config.mode in ("worldkv", "sink_recent") and number * config.chunk_frames < config.sink_frames
        self.where[number] = "sink" if in_sink else "recent"
        if not bank:
            self.unbanked.add(number)
        if config.bank_sink and in_sink:
            self.bank(number)
        self.settle()

    def change(self, **fields) -> None:
        self.config = replace(self.config, **fields)
        self.settle()

    def forget(self, number: int) -> None:
        self.pinned.discard(number)
        if self.where[number] == "bank":
            self.where[number] = "dropped"
            self.banked.remove(number)
            self.num_dropped += 1
        else:
            self.unbanked.add(number)

    def settle(self) -> None:
        """Put every chunk where it belongs before the next one is made, oldest first."""
        config, frames = self.config, self.config.chunk_frames

        def any_frame(chunk: int, role: str, reach: int = config.recent_frames) -> bool:
            of_chunk = range(chunk * frames, (chunk + 1) * frames)
            return any(self.role_of_frame(frame, self.next * frames, reach) == role for frame in of_chunk)

        for chunk in range(self.next):
            if self.where[chunk] in ("recent", "unattended"):
                elsewhere = "unattended" if config.mode == "worldkv" else "dropped"
                self.where[chunk] = "recent" if any_frame(chunk, "recent") else elsewhere
        if config.mode != "worldkv":
            return
        for chunk in range(self.next):
            reach = config.recent_frames + config.unattended_chunks * frames
            if self.where[chunk] == "unattended" and not any_frame(chunk, "recent", reach):
                self.bank(chunk)

    def bank(self, number: int) -> None:
        config, chunk = self.config, self.past[number]
        if number in self.unbanked:
            self.drop(number)
            return
        self.banked.append(number)
        if self.where[number] != "sink":
            self.where[number] = "bank"
            chunk.pruned = []
            for layer in range(config.num_layers):
                keys = self.keys(chunk, layer, number * config.chunk_frames)
                chunk.pruned.append(pruned(config, keys, chunk.v[layer].view(keys.shape)))
        if config.bank_chunks is not None and len(self.banked) > config.bank_chunks:
            free = [chunk for chunk in self.banked if chunk not in self.pinned]
            given_up = number
            if set(free) - {number}:
                given_up = self.order.drop({chunk: self.past[chunk].view for chunk in free})
            self.banked.remove(given_up)
            self.drop(given_up)

    def drop(self, number: int) -> None:
        self.num_dropped += 1
        self.pinned.discard(number)
        if self.where[number] != "sink":
            self.where[number] = "dropped"

    def kept_rows(self) -> int:
        """Rows of K (as many of V) in a layer that hold the past."""
        rows = sum(self.rows(chunk) for chunk, place in self.where.items() if place != "dropped")
        copies = [chunk for chunk in self.banked if self.where[chunk] == "sink"]
        return rows + len(copies) * self.banked_rows()

    def banked_rows(self) -> int:
        """Rows of a pruned chunk."""
        config = self.config
        per_frame = config.grid[0] * config.grid[1]
        keep = min(per_frame, max(1, math.ceil(config.keep_ratio * per_frame)))
        return per_frame + (config.chunk_frames - 1) * keep
