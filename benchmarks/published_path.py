"""What WorldKV's published code does for each chunk and layer, as the rival that a rollout runs beside WorldMemory.

A restatement from the description of the work, in plain PyTorch. It is slow on purpose, in the places where the
published code is, and its results have the faults that `MemoryConfig.official` states. Nothing here may be optimised.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F

from worldkv_kernels import MemoryConfig
from worldkv_kernels.memory.retrieval import OfficialPoseRetrieval
from worldkv_kernels.poses import as_poses
from worldkv_kernels.ranges import phase

_OFFICIAL = {
    "mode": "worldkv", "order": "nearest_first", "rebase_sink": False, "unattended_chunks": 1, "bank_sink": True,
    "prune_rule": "similarity", "merge_pruned": False, "rope": "wan", "round_before_rope": True,
}  # fmt: skip
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_THETA = 10000.0
POSITIONS = 1024  # rotations, of frames and of rows and columns


class PublishedPlan(NamedTuple):
    """What the chunk to be made will see."""

    chunk: int
    start_frame: int
    retrieved: tuple[int, ...]  # chunk numbers in window order: nearest first
    num_tokens: int  # what each query attends to, the current chunk included


class BankedChunk(NamedTuple):
    """A layer's K and V of a pruned chunk, [kept, heads, head_dim], and which of its tokens they are, int64 [kept]."""

    k: torch.Tensor
    v: torch.Tensor
    index: torch.Tensor


class PublishedMemory:
    """The published code's memory (arXiv 2605.22718) with the calls of WorldMemory that a rollout makes.

    Per chunk: poses are compared in PyTorch on the device and the choice is read back; the chosen chunks of a bank in
    host memory are copied in, from pageable memory, layer by layer, each copy waited for. Per layer and pass: a table
    of rotations for the chunk's tokens is put together and applied to q, then to k, in complex float64; the cache of
    sink, retrieved and recent frames is rolled through clones when it is full; retrieved keys are cloned (and with the
    RoPE correction turned, in complex float64), sink, retrieved and recent are concatenated, and
    scaled_dot_product_attention runs on that. Indices live on the device and are read back 6 to 9 times. After the last
    pass the chunk is pruned by way of fp32 copies, and banked.

    Kept once, to the rival's advantage: the rotations of 1024 positions, and what a bank on the host gives a chunk.

    Args:
        config: of MemoryConfig.official(...). Its `bank_chunks` has no effect, since the published bank has no bound;
            WorldMemory does the same as long as it has to drop nothing.
        device, dtype: as of WorldMemory.

    Allocates and synchronises throughout. Raises ValueError when the config is not an official one, TypeError when
    it is no MemoryConfig or the dtype is unsupported.
    """

    integrator = None  # of actions: the published code retrieves by poses alone

    def __init__(
        self, config: MemoryConfig, device: torch.device | str = "cpu", dtype: torch.dtype = torch.bfloat16
    ) -> None:
        _check_official(config)
        if dtype not in _DTYPES:
            raise TypeError(f"PublishedMemory: dtype must be bfloat16, float16 or float32, got {dtype}")
        self.config = config
        self.device = torch.empty(0, dtype=torch.uint8, device=device).device
        self.dtype = dtype
        tokens, frames = config.frame_tokens, config.chunk_frames
        self._sink_tokens = config.sink_frames * tokens
        self._recent_frames = config.recent_frames + frames  # the published count has the current chunk in it
        self._recent_tokens = self._recent_frames * tokens
        self._cache_tokens = self._sink_tokens + config.retrieved_chunks * config.chunk_tokens + self._recent_tokens
        self._bank_device = torch.device("cpu") if config.bank == "host" else self.device
        self._grid = torch.tensor([frames, *config.grid], dtype=torch.int64, device=self.device)
        self._rotations = _rotations(config.head_dim, self.device)
        shape = (self._cache_tokens, config.num_heads, config.head_dim)
        self._caches = [_Cache(shape, self.device, dtype) for _ in range(config.num_layers)]
        self.reset()

    def reset(self) -> None:
        """Forget the rollout and start again at chunk 0."""
        for cache in self._caches:
            cache.clear()
        self._bank: list[list[BankedChunk]] = [[] for _ in self._caches]  # layer, chunk
        self._means: list[tuple[torch.Tensor, torch.Tensor]] = []  # per chunk: translation [3], matrix [3, 3]
        self._plan: PublishedPlan | None = None
        self._current_mean: tuple[torch.Tensor, torch.Tensor] | None = None
        self._window: list[list[tuple[torch.Tensor, torch.Tensor]]] = []  # retrieved K and V: layer, place
        self._layers_done: set[int] = set()
        self._tokens_attended = 0
        self._chunks_retrieved = 0

    # --- a chunk ---

    @torch.no_grad()
    def begin_chunk(self, poses: object = None, intrinsics: object = None) -> PublishedPlan:
        """Choose what the next chunk attends to, from camera-to-world poses [chunk_frames, 4, 4].

        `intrinsics` has no effect. Of equally near chunks, whose order the published code leaves open, the older
        goes first. Raises RuntimeError when a chunk is already begun or its frames would pass position 1023,
        ValueError when the poses are missing, misshapen or not rigid; the memory is then as before.
        """
        config, chunk = self.config, len(self._means)
        if self._plan is not None:
            raise RuntimeError(
                f"begin_chunk: chunk {self._plan.chunk} must be ended or dropped first, got a second begin_chunk"
            )
        if (chunk + 1) * config.chunk_frames > POSITIONS:
            raise RuntimeError(f"begin_chunk: frames must stay below position {POSITIONS}, got chunk {chunk}")
        if poses is None:
            raise ValueError(f"begin_chunk: poses must be [{config.chunk_frames}, 4, 4], got None")
        checked = as_poses("begin_chunk", poses, config.chunk_frames)
        on_device = torch.from_numpy(checked).to(self.device, torch.float32)
        mean = on_device[:, :3, 3].mean(dim=0), on_device[:, :3, :3].mean(dim=0)
        retrieved = self._select(mean, chunk)
        with phase("bank_copy_in"):
            self._window = [
                [
                    (banked[past].k.to(self.device, copy=True), banked[past].v.to(self.device, copy=True))
                    if config.bank == "host"
                    else (banked[past].k, banked[past].v)
                    for past in retrieved
                ]
                for banked in self._bank
            ]
        if retrieved:
            num_tokens = self._sink_tokens + sum(len(k) for k, _ in self._window[0]) + self._recent_tokens
        else:
            num_tokens = min((chunk + 1) * config.chunk_tokens, self._cache_tokens)
        self._current_mean = mean
        self._layers_done.clear()
        self._plan = PublishedPlan(chunk, chunk * config.chunk_frames, tuple(retrieved), num_tokens)
        return self._plan

    @torch.no_grad()
    def attend(
        self,
        layer: int,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        q_weight: torch.Tensor | None = None,
        k_weight: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Self-attention of one layer of the current chunk over its window.

        Args as of WorldMemory.attend: q, k, v [chunk tokens, heads * head_dim], the weights [heads * head_dim] or
        None for no norm. Returns [tokens, heads, head_dim]. Raises RuntimeError when no chunk is begun, ValueError
        when the layer, a shape or a dtype is wrong.
        """
        if self._plan is None:
            raise RuntimeError("attend: a chunk must be begun (begin_chunk), got attend outside one")
        config, plan = self.config, self._plan
        if not 0 <= layer < config.num_layers:
            raise ValueError(f"attend: layer must be from 0 to {config.num_layers - 1}, got {layer}")
        wanted = (config.chunk_tokens, config.num_heads * config.head_dim)
        for name, x in (("q", q), ("k", k), ("v", v)):
            if tuple(x.shape) != wanted or x.dtype != self.dtype:
                got = f"{list(x.shape)} {x.dtype}"
                raise ValueError(f"attend: {name} must be {list(wanted)} {self.dtype}, got {got}")

        heads = (config.num_heads, config.head_dim)
        with phase("norm_rope"):
            q = _rms_norm(q, q_weight, config.eps).unflatten(1, heads)
            k = _rms_norm(k, k_weight, config.eps).unflatten(1, heads)
            v = v.unflatten(1, heads)
            frame_tokens = int((self._grid[1] * self._grid[2]).item())
            q = self._rope(q, plan.start_frame)
            k = self._rope(k, plan.start_frame)

        cache = self._caches[layer]
        retrieved = self._window[layer]
        with phase("gather"):
            end = cache.write(k, v, plan.start_frame * frame_tokens, self._sink_tokens)
            if retrieved:
                recent = slice(end - self._recent_tokens, end)
                keys = [self._corrected(past_k, place) for place, (past_k, _) in enumerate(retrieved)]
                values = [past_v for _, past_v in retrieved]
                window_k = torch.cat([cache.k[: self._sink_tokens], *keys, cache.k[recent]])
                window_v = torch.cat([cache.v[: self._sink_tokens], *values, cache.v[recent]])
            else:  # without candidates the published window is all of the rolling cache
                window_k, window_v = cache.k[:end], cache.v[:end]
        self._layers_done.add(layer)
        of_heads = [x.transpose(0, 1)[None] for x in (q, window_k, window_v)]  # [1, heads, tokens, head_dim]
        return F.scaled_dot_product_attention(*of_heads, scale=config.scale)[0].transpose(0, 1)

    @torch.no_grad()
    def end_chunk(self) -> None:
        """Make the rows of the last pass history, and bank them pruned.

        Raises RuntimeError when no chunk is begun or a layer was never attended; the chunk is then still begun.
        """
        if self._plan is None:
            raise RuntimeError("end_chunk: a chunk must be begun (begin_chunk), got end_chunk outside one")
        config, chunk = self.config, self._plan.chunk
        missing = sorted(set(range(config.num_layers)) - self._layers_done)
        if missing:
            raise RuntimeError(f"end_chunk: chunk {chunk} must attend every layer, got none for layers {missing}")
        for layer, bank in enumerate(self._bank):
            with phase("compress_chunk"):
                kept = published_compress(
                    *self.whole_chunk(layer),
                    frames=config.chunk_frames, keep_ratio=config.keep_ratio, pooled=config.pooled,
                )  # fmt: skip
            bank.append(BankedChunk(kept.k.to(self._bank_device), kept.v.to(self._bank_device), kept.index))
        self._means.append(self._current_mean)
        self._tokens_attended += self._plan.num_tokens
        self._chunks_retrieved += len(self._plan.retrieved)
        self._plan = None
        self._window = []  # so that a host bank's copies make room for the next

    def abort_chunk(self) -> None:
        """Drop the current chunk: a next one is made as if this had never been begun. Does nothing outside one.

        A cache that was rolled stays rolled; what rolling lost no later chunk reads, and the next overwrites the rows.
        """
        self._plan = None
        self._window = []

    # --- what is inside ---

    def whole_chunk(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of the chunk attended last, before pruning, [tokens, heads, head_dim]: views of the cache."""
        cache = self._caches[layer]
        end = int(cache.local_end.item())
        rows = slice(end - self.config.chunk_tokens, end)
        return cache.k[rows], cache.v[rows]

    def banked(self, layer: int, chunk: int) -> BankedChunk:
        """What a layer keeps of a past chunk."""
        return self._bank[layer][chunk]

    def stats(self) -> dict[str, int]:
        """Counts since the last reset, and bytes of the cache and the bank: plain numbers, ready for JSON."""
        cache = sum(_bytes(layer.k) + _bytes(layer.v) for layer in self._caches)
        bank = sum(_bytes(chunk.k) + _bytes(chunk.v) for layer in self._bank for chunk in layer)
        on_host = self.config.bank == "host"
        return {
            "chunks": len(self._means),
            "tokens_attended": self._tokens_attended,
            "chunks_retrieved": self._chunks_retrieved,
            "chunks_banked": len(self._bank[0]),
            "device_bytes": cache + (0 if on_host else bank),
            "host_bytes": bank if on_host else 0,
        }

    # --- parts of the above ---

    def _select(self, mean: tuple[torch.Tensor, torch.Tensor], chunk: int) -> list[int]:
        """The nearest candidates, nearest first, by distances that are divided by their maximum."""
        config = self.config
        first = config.sink_frames // config.chunk_frames
        # The chunk just before the recent ones should be the last of these: the published hole.
        candidates = list(range(first, chunk - self._recent_frames // config.chunk_frames))
        budget = min(config.retrieved_chunks, len(candidates))
        if budget < 1:
            return []
        positions = torch.stack([self._means[c][0] for c in candidates])
        matrices = torch.stack([self._means[c][1] for c in candidates])  # not rotations, where the camera turned
        dt = (positions - mean[0]).square().sum(dim=1)
        trace = (matrices.transpose(1, 2) @ mean[1]).diagonal(dim1=1, dim2=2).sum(dim=1)
        dr = torch.acos(((trace - 1) / 2).clamp(-1, 1))
        if dt.max().item() > 0:
            dt = dt / dt.max()
        if dr.max().item() > 0:
            dr = dr / dr.max()
        nearest = torch.argsort(0.5 * dt + 0.5 * dr, stable=True)[:budget]
        return [candidates[int(i.item())] for i in nearest]

    def _rope(self, x: torch.Tensor, start_frame: int) -> torch.Tensor:
        """3D RoPE of x [tokens, heads, head_dim] in complex float64, from a table put together for this call."""
        frames, height, width = self._grid.tolist()
        along = (self._rotations[0][start_frame : start_frame + frames].view(frames, 1, 1, -1),
                 self._rotations[1][:height].view(1, height, 1, -1),
                 self._rotations[2][:width].view(1, 1, width, -1))  # fmt: skip
        table = torch.cat([axis.expand(frames, height, width, -1) for axis in along], dim=-1).flatten(0, 2)
        pairs = torch.view_as_complex(x.to(torch.float64).unflatten(-1, (-1, 2)))
        return torch.view_as_real(pairs * table[:, None]).flatten(-2).to(x.dtype)

    def _corrected(self, k: torch.Tensor, place: int) -> torch.Tensor:
        """A clone of the retrieved keys at `place`, with the correction moved in time to just before the recent."""
        k = k.clone()
        config, plan = self.config, self._plan
        if not config.rebase_time:
            return k
        recent_start = plan.start_frame + config.chunk_frames - self._recent_frames
        virtual = recent_start - (len(plan.retrieved) - place) * config.chunk_frames
        shift = virtual - plan.retrieved[place] * config.chunk_frames
        frequencies = _frequencies(_pairs(config.head_dim)[0], self.device)
        turn = torch.polar(torch.ones_like(frequencies), shift * frequencies)
        temporal = 2 * len(frequencies)
        pairs = torch.view_as_complex(k[..., :temporal].to(torch.float64).unflatten(-1, (-1, 2)))
        k[..., :temporal] = torch.view_as_real(pairs * turn).flatten(-2).to(k.dtype)
        return k


class _Cache:
    """A layer's rolling K and V: the sink stays, what follows moves up by a chunk when there is no room."""

    def __init__(self, shape: tuple[int, int, int], device: torch.device, dtype: torch.dtype) -> None:
        self.k, self.v = (torch.zeros(shape, dtype=dtype, device=device) for _ in range(2))
        # Tokens written since the start, and rows in use: on the device, and read back wherever they are needed.
        self.global_end, self.local_end = (torch.zeros(1, dtype=torch.int64, device=device) for _ in range(2))

    def clear(self) -> None:
        self.global_end.zero_()
        self.local_end.zero_()

    def write(self, k: torch.Tensor, v: torch.Tensor, start: int, sink: int) -> int:
        """Put a chunk's rows in, at its own place if it has one from a pass before; returns the end of its rows."""
        tokens, end = len(k), start + len(k)
        evicted = 0
        if end > self.global_end.item() and tokens + self.local_end.item() > len(self.k):
            evicted = int(tokens + self.local_end.item() - len(self.k))
            rolled = int(self.local_end.item()) - evicted - sink
            for cached in (self.k, self.v):
                cached[sink : sink + rolled] = cached[sink + evicted : sink + evicted + rolled].clone()
        local_end = int(self.local_end.item()) + end - int(self.global_end.item()) - evicted
        self.k[local_end - tokens : local_end] = k
        self.v[local_end - tokens : local_end] = v
        self.global_end.fill_(end)
        self.local_end.fill_(local_end)
        return local_end


def published_compress(
    k: torch.Tensor, v: torch.Tensor, *, frames: int, keep_ratio: float, pooled: bool
) -> BankedChunk:
    """What pruning keeps of k and v [frames * frame_tokens, heads, head_dim], in copies; its index ascends.

    Frame 0, and of the other frames (pooled: of all of them together) the max(1, ceil(keep_ratio * frame_tokens)) a
    frame that are least similar to the mean key of frame 0. By way of fp32 copies of K and of V.
    """
    frame_tokens = len(k) // frames
    keep = max(1, math.ceil(keep_ratio * frame_tokens))
    index = torch.arange(len(k), dtype=torch.int64, device=k.device)
    if keep >= frame_tokens:
        return BankedChunk(k.clone(), v.clone(), index)
    wide_k, wide_v = k.to(torch.float32, copy=True), v.to(torch.float32, copy=True)
    tokens = wide_k.flatten(1)  # [tokens, heads * head_dim]
    centroid = tokens[:frame_tokens].mean(dim=0)
    similarity = (tokens * centroid).sum(dim=1) / (tokens.norm(dim=1) * centroid.norm() + 1e-8)
    groups = similarity[frame_tokens:].view(1 if pooled else frames - 1, -1)
    lowest = torch.topk(groups, keep * (frames - 1) // len(groups), dim=1, largest=False).indices
    first = frame_tokens + torch.arange(len(groups), dtype=torch.int64, device=k.device)[:, None] * groups.shape[1]
    index = torch.cat([index[:frame_tokens], (lowest + first).flatten().sort().values])
    return BankedChunk(wide_k[index].to(k.dtype), wide_v[index].to(v.dtype), index)


def _check_official(config: MemoryConfig) -> None:
    if not isinstance(config, MemoryConfig):
        raise TypeError(f"PublishedMemory: config must be a MemoryConfig, got {type(config).__name__}")
    for field, wanted in _OFFICIAL.items():
        got = getattr(config, field)
        if got != wanted:
            raise ValueError(f"PublishedMemory: {field} must be {wanted!r}, as of MemoryConfig.official, got {got!r}")
    if not isinstance(config.retrieval, OfficialPoseRetrieval):
        wanted = "an OfficialPoseRetrieval, as of MemoryConfig.official"
        raise ValueError(f"PublishedMemory: retrieval must be {wanted}, got {config.retrieval!r}")


def _rms_norm(x: torch.Tensor, weight: torch.Tensor | None, eps: float) -> torch.Tensor:
    """Over the last dimension in fp32, rounded to x's dtype, then times the weight; x itself without one."""
    if weight is None:
        return x
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)).to(x.dtype) * weight


def _pairs(head_dim: int) -> tuple[int, int, int]:
    """Complex pairs for time, height and width."""
    half = head_dim // 2
    return half - 2 * (half // 3), half // 3, half // 3


def _frequencies(pairs: int, device: torch.device) -> torch.Tensor:
    """Radians a position, float64 [pairs]."""
    return _THETA ** (-torch.arange(pairs, dtype=torch.float64, device=device) / pairs)


def _rotations(head_dim: int, device: torch.device) -> list[torch.Tensor]:
    """Unit complex128 numbers [positions, pairs] for each axis."""
    positions = torch.arange(POSITIONS, dtype=torch.float64, device=device)
    angles = [torch.outer(positions, _frequencies(pairs, device)) for pairs in _pairs(head_dim)]
    return [torch.polar(torch.ones_like(angle), angle) for angle in angles]


def _bytes(x: torch.Tensor) -> int:
    return x.numel() * x.element_size()
