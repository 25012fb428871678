"""What a world memory keeps and what it brings back."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import torch

from ..checks import (
    DTYPES,
    HEAD_DIMS,
    MAX_HEADS,
    as_integer,
    bad_value,
    check_bool,
    check_integer,
    check_number,
    check_scale,
    describe,
    is_integer,
)
from ..ops.compress_chunk import RULES, kept_tokens
from ..rope import Rope3D
from ..window import MAX_LOG_WEIGHT
from .retrieval import OfficialPoseRetrieval, RetrievalPolicy, goes_by_content, goes_by_mass, make_policy

if TYPE_CHECKING:
    from .sizes import MemoryBytes

Mode = Literal["worldkv", "full", "sliding", "sink_recent"]
Order = Literal["time", "nearest_last", "nearest_first"]
PruneRule = Literal["nearest", "similarity"]
MODES = ("worldkv", "full", "sliding", "sink_recent")
BANK_BITS = (16, 8, 4)
_INTEGERS = ("num_layers", "num_heads", "head_dim", "chunk_frames", "unattended_chunks", "bank_bits", "branches")
_INTEGERS_IF_GIVEN = ("num_kv_heads", "sink_frames", "recent_frames", "retrieved_chunks", "bank_chunks", "device_slots")
_NOT_GIVEN: Any = None  # of what then follows from others
_LARGEST = 2**31 - 1  # of every count: far more than memory holds, and sums and products of them stay in float's range
_RETRIEVED_CHUNKS = 6
_BOOLS = ("pooled", "merge_pruned", "rebase_time", "prefetch", "round_before_rope", "rebase_sink", "bank_sink")
ORDERS = ("time", "nearest_last", "nearest_first")


@dataclass(frozen=True, kw_only=True)
class MemoryConfig:
    """The sizes of a model and the policy of its memory.

    The model: `num_layers`, `num_heads`, `num_kv_heads` of K and V, which divide `num_heads` and are as many by
    default, `head_dim` (64 or 128), `grid` (height, width) in tokens of one latent frame, `chunk_frames` latent frames
    denoised together; `rope`, "wan" for Rope3D(head_dim) or None for no rotation; `eps` and `round_before_rope` of its
    QK-norm; `scale` of its softmax, 1 / sqrt(head_dim) for None.

    `branches`: how many videos along one path share the memory, 1 or 2 as a rule: the two contexts of classifier-free
    guidance, or a batch. They have one window, one retrieval and one plan; keys, values, norm, pruning and attention
    are each one's own, as it would have them alone. See WorldMemory.attend. `branches * num_heads` is at most 128. By
    content a chunk is known by all branches' keys.

    The window: `sink_frames` latent frames from the start (by default one chunk), then up to `retrieved_chunks` from
    the bank (6, or as many as a given `bank_chunks` or `device_slots` has room for), then `recent_frames` past ones
    (two chunks), then the current chunk. `retrieved_log_weight`, from -8 to 8, is added to the scaled scores of the
    retrieved ones: log 2 lets each of their tokens count twice.

    Sink and recent frames may end and begin inside a chunk, as the windows do that some models were made with; chunks
    are kept whole all the same, each past one in exactly one of sink, recent and bank. Of the chunk in which the sink
    ends, the frames after `sink_frames` are attended while they are recent and never again: it is not banked. Of the
    chunk in which the recent frames begin, those before them are not attended until it is banked, when none of its
    frames is recent, and retrieved.

    `mode`: "worldkv" as described; the baselines "full" (every past chunk), "sliding" (recent and current) and
    "sink_recent" (sink, recent and current) ignore what they do not use.

    `keep_ratio`, `pooled`, `prune_rule`, `merge_pruned`: how a chunk is pruned when it leaves the recent frames, see
    compress_chunk: its first frame stays whole, of the others this share stays. 0.25 keeps half of a chunk of three
    frames, 0.5 two thirds, 1 all. The published way is "similarity", unmerged.
    `retrieval`: "pose", "fov", "action" or "content", or a RetrievalPolicy object. "action" is ActionRetrieval(), with
    guessed scales for Matrix-Game's "universal" actions; give an object for another game or other scales. "content" is
    ContentRetrieval(), for models without a camera: where few are retrieved, give it one more than the others.
    `order` of the retrieved chunks in the window: by "time", or "nearest_last", "nearest_first". `rebase_time`:
    turn retrieved and sink chunks in time so that the window's frames follow each other without a gap up to the
    recent ones; by default in mode "worldkv", where there is a rope.

    `mass_layers`: layers whose attention is asked how much of it each chunk received, in any mode, see
    WorldMemory.received; none by default. On an H100 it has cost 2 to 9 % of such a layer's attention
    (benchmarks/README.md); on a CPU, where the reference stands in for sdpa, it takes several times as long. Where
    another backend serves because of it, results differ by rounding.

    `bank_bits`: 16, banked chunks as they are, whatever the dtype; or 8 or 4, as quantize_chunk packs them when they
    are pruned, .51 and .28 of the bytes in 16 bits. Sink, recent and current chunks stay as they are; in every pass a
    layer's retrieved chunks are restored into rows that all layers share, just before it attends to them.

    `bank`: "device", or "host" for host memory, page-locked on a GPU. Of a bank in host memory `device_slots` chunks
    are cached on the device, in the bank's bits. None for retrieved_chunks + 2: the window, one to prune into and one
    to prefetch into without giving up the window; 2 * retrieved_chunks + 1 let a prefetch replace a whole window.
    `prefetch`: at begin_chunk, bring ahead what the next chunk would retrieve if the camera moved on as it did (a
    policy object of a user's own must be `stateless`, see RetrievalPolicy); by content nothing is foreseen. Neither
    changes a result.
    `bank_chunks`: how many chunks the bank holds, or in mode "full" how many chunks in all; past that the policy
    drops one ("full" raises). None: what fits half of the memory that is free when the WorldMemory is made,
    at most 1000.

    `unattended_chunks` and `bank_sink` reproduce two faults of the published code, see official(); in mode "worldkv"
    alone.

    What is not given is worked out when the config is made, and `dataclasses.replace` takes it along: to change `mode`,
    `rope`, `chunk_frames` or `num_heads` name `rebase_time`, the window and `num_kv_heads` too, or make the config
    anew.

    Raises ValueError on a size or a choice that is out of range, TypeError on a count that is not an integer, a number
    that is none, or a switch that is not True or False.
    """

    num_layers: int
    num_heads: int
    grid: tuple[int, int]
    num_kv_heads: int = _NOT_GIVEN
    head_dim: int = 128
    chunk_frames: int = 3
    sink_frames: int = _NOT_GIVEN
    recent_frames: int = _NOT_GIVEN
    retrieved_chunks: int = _NOT_GIVEN
    keep_ratio: float = 0.25
    pooled: bool = True
    prune_rule: PruneRule = "nearest"
    merge_pruned: bool = True
    mode: Mode = "worldkv"
    retrieval: Literal["pose", "fov", "action", "content"] | RetrievalPolicy = "pose"
    rebase_time: bool = _NOT_GIVEN
    order: Order = "time"
    bank: Literal["device", "host"] = "device"
    bank_bits: Literal[16, 8, 4] = 16
    mass_layers: tuple[int, ...] = ()
    bank_chunks: int | None = None
    device_slots: int | None = None
    prefetch: bool = True
    rope: Rope3D | Literal["wan"] | None = "wan"
    retrieved_log_weight: float = 0.0
    scale: float | None = None
    eps: float = 1e-6
    round_before_rope: bool = True
    rebase_sink: bool = True
    unattended_chunks: int = 0
    bank_sink: bool = False
    branches: int = 1

    def __post_init__(self) -> None:
        def check(right: bool, field: str, wanted: str) -> None:
            if not right:
                raise bad_value("MemoryConfig", field, wanted, getattr(self, field))

        for field in ("mode", "prune_rule", "retrieval", "order", "bank", "rope"):
            if isinstance(getattr(self, field), str):
                object.__setattr__(self, field, str.__str__(getattr(self, field)))  # of an enum its string
        for field in (*_INTEGERS, *(name for name in _INTEGERS_IF_GIVEN if getattr(self, name) is not None)):
            object.__setattr__(self, field, as_integer("MemoryConfig", field, getattr(self, field)))
            check(getattr(self, field) <= _LARGEST, field, f"at most {_LARGEST}")
        room = [self.device_slots, self.bank_chunks if self.mode == "worldkv" else None]
        follows = {
            "num_kv_heads": self.num_heads,
            "sink_frames": self.chunk_frames,
            "recent_frames": 2 * self.chunk_frames,
            "rebase_time": self.mode == "worldkv" and self.rope is not None,
            "retrieved_chunks": max(0, min([_RETRIEVED_CHUNKS, *(chunks for chunks in room if chunks is not None)])),
        }
        for field, value in follows.items():
            if getattr(self, field) is None:
                object.__setattr__(self, field, value)
        numbers = ("keep_ratio", "eps", "retrieved_log_weight", *(["scale"] if self.scale is not None else []))
        for field in numbers:
            check_number("MemoryConfig", field, getattr(self, field))
        for field in _BOOLS:
            check_bool("MemoryConfig", field, getattr(self, field))
        for field in ("num_layers", "num_heads", "chunk_frames", "branches"):
            check(getattr(self, field) >= 1, field, "at least 1")
        check(self.num_heads <= MAX_HEADS, "num_heads", f"at most {MAX_HEADS}")
        most = MAX_HEADS // self.num_heads
        check(self.branches <= most, "branches", f"at most {most}, branches * num_heads at most {MAX_HEADS}")
        divides = self.num_kv_heads >= 1 and self.num_heads % self.num_kv_heads == 0
        check(divides, "num_kv_heads", f"None or a divisor of num_heads={self.num_heads}")
        check(self.head_dim in HEAD_DIMS, "head_dim", "64 or 128")
        grid = tuple(self.grid) if isinstance(self.grid, Iterable) else ()
        sizes = len(grid) == 2 and all(is_integer(n) and 1 <= n <= _LARGEST for n in grid)
        check(sizes, "grid", f"(height, width) of at least 1 token each, at most {_LARGEST}")
        object.__setattr__(self, "grid", tuple(map(operator.index, grid)))
        for field in ("sink_frames", "recent_frames", "retrieved_chunks", "unattended_chunks"):
            check(getattr(self, field) >= 0, field, "at least 0")
        check(0 < self.keep_ratio <= 1, "keep_ratio", "above 0 and at most 1")
        check(0 <= self.eps < math.inf, "eps", "finite and not negative")
        if self.scale is not None:
            check_scale("MemoryConfig", "scale", self.scale)
        weight = -MAX_LOG_WEIGHT <= self.retrieved_log_weight <= MAX_LOG_WEIGHT
        check(weight, "retrieved_log_weight", f"from {-MAX_LOG_WEIGHT:g} to {MAX_LOG_WEIGHT:g}")
        check(self.mode in MODES, "mode", f"one of {', '.join(MODES)}")
        check(self.prune_rule in RULES, "prune_rule", f"one of {', '.join(RULES)}")
        check(self.order in ORDERS, "order", f"one of {', '.join(ORDERS)}")
        check(self.bank in ("device", "host"), "bank", "'device' or 'host'")
        try:
            layers = [None] if isinstance(self.mass_layers, str | bytes) else [*self.mass_layers]
        except TypeError:
            layers = [None]
        right = all(is_integer(layer) and 0 <= layer < self.num_layers for layer in layers)
        check(right and len(set(layers)) == len(layers), "mass_layers", f"layers from 0 to {self.num_layers - 1}")
        object.__setattr__(self, "mass_layers", tuple(sorted(map(operator.index, layers))))
        check(self.bank_bits in BANK_BITS, "bank_bits", f"one of {', '.join(map(str, BANK_BITS))}")
        asked = self.mass_layers or self.mode != "worldkv" or not goes_by_mass(make_policy(self.retrieval))
        check(asked, "mass_layers", "given where the retrieval policy goes by mass")
        least = max(1, self.retrieved_chunks) if self.mode == "worldkv" else 1
        enough = self.bank_chunks is None or self.bank_chunks >= least
        of_window = f", since retrieved_chunks={self.retrieved_chunks}" if least > 1 else ""
        check(enough, "bank_chunks", f"None or at least {least}{of_window}")
        slots = self.device_slots is None or self.device_slots >= max(1, self.retrieved_chunks)
        retrieved = f"retrieved_chunks={self.retrieved_chunks}"
        check(slots, "device_slots", f"None or at least {max(1, self.retrieved_chunks)} with {retrieved}")
        if isinstance(self.rope, Rope3D):
            check(self.rope.head_dim == self.head_dim, "rope", f"for head_dim {self.head_dim}")
        else:
            check(self.rope in ("wan", None), "rope", "a Rope3D, 'wan' or None")
        check(not (self.rebase_time and self.rope is None), "rebase_time", "False where there is no rope")
        for field in numbers:
            object.__setattr__(self, field, float(getattr(self, field)))

    @classmethod
    def official(
        cls,
        *,
        num_layers: int,
        num_heads: int,
        grid: tuple[int, int],
        head_dim: int = 128,
        chunk_frames: int = 3,
        sink_frames: int | None = None,
        retrieved_frames: int | None = None,
        recent_frames: int | None = None,
        keep_ratio: float = 0.5,
        pooled: bool = True,
        rope_correction: bool = False,
        clip_frames: int | None = None,
        bank: Literal["device", "host"] = "device",
        bank_chunks: int | None = None,
    ) -> MemoryConfig:
        """What WorldKV's published code (arXiv 2605.22718) does, faults included, to compare results with.

        Arguments have that code's meaning and its README's values: `recent_frames` includes the current
        chunk, and `clip_frames`, the latent frames of the whole clip, shrinks the recent frames of a
        short one. None is for a sink of one chunk, six chunks retrieved (or as many as a given `bank_chunks` holds),
        and two recent ones: 3, 18 and 6 frames. Reproduced: the chunk just older than the recent frames is neither
        attended nor a candidate as soon as anything is retrieved; rotation matrices are averaged; distances are
        divided by their maximum, however small; retrieved chunks stand nearest first, also under the rope
        correction, which leaves the sink at its absolute time; chunk 0 is banked beside being the sink.

        Raises ValueError where that code leaves a chunk outside its own window: when `clip_frames` is so short
        that no recent frames are left.
        """
        op = "MemoryConfig.official"
        given = dict(
            sink_frames=sink_frames, retrieved_frames=retrieved_frames, recent_frames=recent_frames,
            clip_frames=clip_frames, bank_chunks=bank_chunks,
        )  # fmt: skip
        check_integer(op, "chunk_frames", chunk_frames)
        for name, count in given.items():
            if count is not None:
                check_integer(op, name, count)
        if not 1 <= chunk_frames <= _LARGEST:
            raise bad_value(op, "chunk_frames", f"from 1 to {_LARGEST}", chunk_frames)
        most = _RETRIEVED_CHUNKS if bank_chunks is None else max(0, min(_RETRIEVED_CHUNKS, bank_chunks))
        sink_frames = chunk_frames if sink_frames is None else sink_frames
        retrieved_frames = most * chunk_frames if retrieved_frames is None else retrieved_frames
        recent_frames = 2 * chunk_frames if recent_frames is None else recent_frames
        if clip_frames is not None:
            window = min(sink_frames + retrieved_frames + recent_frames, clip_frames)
            recent_frames = window - sink_frames - retrieved_frames
        if recent_frames < chunk_frames:
            raise ValueError(
                f"{op}: recent_frames, the current chunk included, must be at least chunk_frames={chunk_frames} after "
                f"the clip's length is taken off, got {describe(recent_frames)} "
                f"(the published code then lets a chunk not attend to itself)"
            )
        multiples = dict(sink_frames=sink_frames, retrieved_frames=retrieved_frames, recent_frames=recent_frames)
        for name, frames in multiples.items():
            if frames % chunk_frames:
                raise bad_value(op, name, f"a multiple of chunk_frames={chunk_frames}", frames)
        return cls(
            num_layers=num_layers, num_heads=num_heads, grid=grid, head_dim=head_dim,
            chunk_frames=chunk_frames, sink_frames=sink_frames, recent_frames=recent_frames - chunk_frames,
            retrieved_chunks=retrieved_frames // chunk_frames, keep_ratio=keep_ratio, pooled=pooled,
            prune_rule="similarity", merge_pruned=False, retrieval=OfficialPoseRetrieval(),
            rebase_time=rope_correction, rebase_sink=False,
            order="nearest_first", bank=bank, bank_chunks=bank_chunks,
            unattended_chunks=1, bank_sink=True,
        )  # fmt: skip

    @property
    def frame_tokens(self) -> int:
        return self.grid[0] * self.grid[1]

    @property
    def chunk_tokens(self) -> int:
        return self.chunk_frames * self.frame_tokens

    @property
    def banked_tokens(self) -> int:
        """Tokens of a chunk after pruning."""
        return kept_tokens(self.chunk_frames, self.frame_tokens, self.keep_ratio)

    @property
    def sink_chunks(self) -> int:
        """Chunks that the sink has at least a part of; none in a mode without a sink."""
        return -(-self.sink_frames // self.chunk_frames) if self.mode in ("worldkv", "sink_recent") else 0

    @property
    def recent_chunks(self) -> int:
        """Past chunks that the recent frames have at least a part of."""
        return -(-self.recent_frames // self.chunk_frames)

    @property
    def pool_heads(self) -> int:
        """Heads of the pools: branch b has those from b * num_kv_heads on."""
        return self.branches * self.num_kv_heads

    @property
    def query_heads(self) -> int:
        """Heads of all branches' queries: branch b has those from b * num_heads on."""
        return self.branches * self.num_heads

    @property
    def gap_chunks(self) -> int:
        """Chunks between the recent ones and the bank, whole but unattended."""
        return self.unattended_chunks if self.mode == "worldkv" else 0

    @property
    def caches_bank(self) -> bool:
        """Whether slots on the device are a cache of the bank, which lies in host memory."""
        return self.has_bank and self.bank == "host"

    @property
    def packs_bank(self) -> bool:
        """Whether banked chunks are packed, and restored layer by layer."""
        return self.has_bank and self.bank_bits < 16

    @property
    def takes_contents(self) -> bool:
        """Whether banked chunks are chosen by what keys, or the caller, say of them."""
        return self.has_bank and goes_by_content(make_policy(self.retrieval))

    @property
    def takes_mass(self) -> bool:
        """Whether attention says how much of it each chunk received."""
        return bool(self.mass_layers)

    @property
    def cache_slots(self) -> int:
        """Slots on the device where they are a cache of the bank."""
        return self.retrieved_chunks + 2 if self.device_slots is None else self.device_slots

    @property
    def turns_segments(self) -> bool:
        """Whether any of the window may be turned in time."""
        return self.rebase_time and self.mode in ("worldkv", "sink_recent")

    @property
    def weighs_segments(self) -> bool:
        """Whether any of the window has a softmax weight of its own."""
        return self.has_bank and self.retrieved_log_weight != 0

    @property
    def has_bank(self) -> bool:
        return self.mode == "worldkv"

    def bytes(self, dtype: torch.dtype = torch.bfloat16, *, bank_chunks: int | None = None) -> MemoryBytes:
        """What a WorldMemory of this config and dtype allocates, by part, exact, before anything is.

        `bank_chunks` is in place of the config's, and needed where that is None, which means what fits the memory that
        is free, and a bank or mode "full" counts by it. Raises ValueError then and on a count that the config refuses,
        TypeError on another dtype than bfloat16, float16 and float32.
        """
        from .sizes import memory_bytes  # which stands on configs

        if dtype not in DTYPES:
            raise TypeError(f"MemoryConfig.bytes: dtype must be bfloat16, float16 or float32, got {describe(dtype)}")
        config = self if bank_chunks is None else replace(self, bank_chunks=bank_chunks)
        if config.bank_chunks is None and (config.has_bank or config.mode == "full"):
            raise ValueError("MemoryConfig.bytes: bank_chunks must be given where the config has none, got None")
        return memory_bytes(config, dtype, config.bank_chunks or 1)

    def make_rope(self) -> Rope3D | None:
        return Rope3D(self.head_dim) if self.rope == "wan" else self.rope


def changed(
    config: MemoryConfig,
    configured: MemoryConfig,
    *,
    retrieved_chunks: int | None,
    keep_ratio: float | None,
    recent_frames: int | None,
) -> MemoryConfig:
    """What WorldMemory.change makes of a config, where None is what it has. Raises as that does."""
    fields: dict[str, Any] = {}
    for name, count in (("retrieved_chunks", retrieved_chunks), ("recent_frames", recent_frames)):
        if count is not None:
            fields[name], most = as_integer("change", name, count), getattr(configured, name)
            if not 0 <= fields[name] <= most:
                raise bad_value("change", name, f"from 0 to the configured {most}", count)
    if keep_ratio is not None:
        check_number("change", "keep_ratio", keep_ratio)
        if not 0 < keep_ratio <= configured.keep_ratio:
            raise bad_value(
                "change", "keep_ratio", f"above 0, up to the configured {configured.keep_ratio}", keep_ratio
            )
        fields["keep_ratio"] = keep_ratio
    return replace(config, **fields)
