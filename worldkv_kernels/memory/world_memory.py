"""WorldMemory: the KV cache of a world model, with a window that reaches back to where the camera has been."""

from __future__ import annotations

import sys
from typing import Any, NamedTuple

import torch

from ..actions import ActionIntegrator, as_actions
from ..ops.checks import DTYPES
from ..ops.compress_chunk import compress_chunk
from ..ops.norm_rope_append import norm_rope_append
from ..ops.segment_attention import segment_attention
from ..ranges import ranged
from .bank import Bank
from .config import MemoryConfig
from .pool import Pool, free_bytes
from .poses import as_intrinsics, as_poses
from .retrieval import ActionRetrieval, make_policy
from .window import Segment, Window, tiles_of

_CHUNKS_WITHOUT_ROPE = 340  # that a bank of unstated size holds at most; as many as 1024 positions number


class ChunkPlan(NamedTuple):
    """What the chunk to be made will see."""

    chunk: int
    start_frame: int
    retrieved: tuple[int, ...]  # chunk numbers, in window order
    segments: tuple[tuple[str, int, Segment], ...]  # role, chunk number, rows: in window order
    num_tokens: int  # what each query attends to, the current chunk included


class WorldMemory:
    """The keys and values of a rollout: sink, recent and current chunks whole, older ones banked and pruned.

    For each chunk: `begin_chunk` chooses the window, any number of passes call `attend` for every layer, and
    `end_chunk` makes the rows of the last pass history. All storage is allocated here, once; the window's tables
    and the chunk's position are rewritten at fixed addresses, so a pass can be captured in a CUDA graph.
    Every past chunk is in exactly one of sink, recent and bank, unless a mode or the bank's bound drops it.

    `integrator`, where retrieval is by action, stands at the end of the last chunk of history (in the baselines, which
    retrieve nothing, at the start); it is None for other retrieval.

    Raises ValueError when the storage does not fit the memory that is free, with the numbers.
    """

    @torch.inference_mode(False)  # storage made in inference mode could not be written outside of it
    def __init__(
        self,
        config: MemoryConfig,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.bfloat16,
        backend: str | None = None,
    ) -> None:
        if dtype not in DTYPES:
            raise TypeError(f"WorldMemory: dtype must be bfloat16, float16 or float32, got {dtype}")
        self.config = config
        self.device = torch.empty(0, device=device).device
        self.dtype = dtype
        self._backend = backend
        self._rope = config.make_rope()
        self._policy = make_policy(config.retrieval)
        self.integrator: ActionIntegrator | None = None
        if isinstance(self._policy, ActionRetrieval):
            self.integrator = self._policy.integrator.fresh()
        self._max_chunks = self._rope.max_position // config.chunk_frames if self._rope else sys.maxsize

        sizes = dict(num_layers=config.num_layers, num_heads=config.num_heads, head_dim=config.head_dim)
        whole = config.chunk_tokens
        places = self._bank_places(sizes)
        if config.mode == "full":
            self._max_chunks = min(self._max_chunks, places)
            ring = self._max_chunks
        else:
            ring = config.recent_chunks + config.unattended_chunks + 1
        on_host = config.has_bank and config.bank == "host"
        bank_slots = 0
        if config.has_bank:
            bank_slots = config.retrieved_chunks + 1 if on_host else places
        slots = [(whole, config.sink_chunks), (whole, ring), (config.banked_tokens, bank_slots)]
        self._check_room(
            sum(count * Pool.slot_bytes(tokens, dtype=dtype, **sizes) for tokens, count in slots),
            places * config.banked_tokens * self._token_bytes() if on_host else 0,
        )
        self._pool = Pool(slots, device=self.device, dtype=dtype, **sizes)
        self._sink_rows, self._ring_rows, bank_rows = self._pool.first_rows
        self._bank = None
        if config.has_bank:
            self._bank = Bank(
                self._pool, bank_rows, tokens=config.banked_tokens, places=places, on_host=on_host, policy=self._policy
            )
        in_window = config.sink_chunks + (ring if config.mode == "full" else config.recent_chunks + 1)
        in_window += config.unattended_chunks
        capacity = in_window * tiles_of(whole) + config.retrieved_chunks * tiles_of(config.banked_tokens)
        self._window = Window(
            [Segment(0, 1)], device=self.device, rope=self._rope if config.rebase_time else None, capacity=capacity
        )
        self._position = torch.zeros(2, dtype=torch.int64, device=self.device)
        self._q = torch.empty((whole, config.num_heads, config.head_dim), dtype=dtype, device=self.device)
        self._index = torch.empty(config.banked_tokens, dtype=torch.int32, device=self.device)
        self.reset()

    def reset(self) -> None:
        """Forget the rollout and start again at chunk 0. Keeps all storage."""
        self._next_chunk = 0
        self._plan: ChunkPlan | None = None
        self._layers_done: set[int] = set()
        self._descriptions: dict[int, Any] = {}  # of chunks on their way to the bank
        self._current_description: Any = None
        self._tokens_attended = 0
        self._retrieved_total = 0
        self._left_window = 0
        if self.integrator is not None:
            self.integrator.reset()
            self._after_actions = self.integrator.state  # where the chunk begun last ends
        if self._bank is not None:
            self._bank.clear()

    # --- a chunk ---

    @ranged("begin_chunk")
    def begin_chunk(
        self, poses: object = None, *, intrinsics: object = None, actions: tuple[object, object] | None = None
    ) -> ChunkPlan:
        """Choose what the next chunk attends to.

        Args:
            poses: camera-to-world [chunk_frames, 4, 4] of the chunk's latent frames, OpenCV coordinates, any unit
                of length; an array or tensor. Needed in mode "worldkv", checked wherever given.
            intrinsics: fx, fy, cx, cy in pixels, [chunk_frames, 4] or [4]; needed by retrieval "fov".
            actions: in place of poses where retrieval is by action: an Actions (mouse, keyboard) of this chunk's rows
                in the integrator's layout, 4 * chunk_frames - 3 of chunk 0, then 4 * chunk_frames a chunk. The
                memory integrates them; a chunk that is aborted or not begun leaves no trace.

        Returns the plan. Nothing is synchronised unless the arguments lie on the GPU. Raises RuntimeError
        when a chunk is already begun or the frames would pass the rope's positions (or, in mode "full", the
        pool), ValueError when the poses or actions are missing, misshapen, not rigid or not finite, or
        are what this retrieval does not take, or a policy object selects what is not on offer; the memory is
        then as before.
        """
        if self._plan is not None:
            raise RuntimeError(
                f"begin_chunk: chunk {self._plan.chunk} must be ended (end_chunk) or dropped (abort_chunk) "
                f"before another is begun, got a second begin_chunk"
            )
        config, chunk = self.config, self._next_chunk
        if chunk >= self._max_chunks:
            raise RuntimeError(
                f"begin_chunk: chunk must be below {self._max_chunks} (rope positions, or bank_chunks in mode 'full'), "
                f"got chunk {chunk}"
            )
        description = self._described(self._integrated(poses, actions), intrinsics)
        start_frame = chunk * config.chunk_frames
        retrieved: list[int] = []
        if self._bank is not None:
            candidates = [(c, d) for c, d in self._bank.descriptions.items() if c >= config.sink_chunks]
            retrieved = list(self._policy.select(description, candidates, config.retrieved_chunks))
            known = {c for c, _ in candidates}
            if len(retrieved) > config.retrieved_chunks or len(known.intersection(retrieved)) != len(retrieved):
                raise ValueError(
                    f"begin_chunk: the retrieval policy must select up to {config.retrieved_chunks} different chunks "
                    f"of {sorted(known)}, got {retrieved}"
                )
            if config.order == "time":
                retrieved.sort()
            elif config.order == "nearest_last":
                retrieved.reverse()
        segments = self._segments(chunk, retrieved)
        self._window.update([segment for _, _, segment in segments])
        self._position[:1].fill_(self._slot(chunk))  # by launch argument: no copy to wait for
        self._position[1:].fill_(start_frame)
        self._current_description = description
        self._layers_done.clear()
        self._plan = ChunkPlan(chunk, start_frame, tuple(retrieved), tuple(segments), self._window.num_tokens)
        return self._plan

    def attend(
        self,
        layer: int,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        q_weight: torch.Tensor | None = None,
        k_weight: torch.Tensor | None = None,
        *,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Self-attention of one layer of the current chunk over its window.

        Args:
            layer: 0 .. num_layers - 1. Each pass over the layers overwrites the rows of the pass before.
            q, k, v: [chunk_frames * height * width, heads * head_dim] as the projections give them.
            q_weight, k_weight: of the QK-norm, [heads * head_dim]; None for no norm.
            out: where to write; with it, a call allocates nothing.

        Returns [tokens, heads, head_dim]. For inference: call it under torch.no_grad() or torch.inference_mode().
        Raises RuntimeError when no chunk is begun, ValueError or TypeError as norm_rope_append does.
        """
        if self._plan is None:
            raise RuntimeError("attend: a chunk must be begun (begin_chunk), got attend outside one")
        if not 0 <= layer < self.config.num_layers:
            raise ValueError(f"attend: layer must be from 0 to {self.config.num_layers - 1}, got {layer}")
        tokens = self.config.chunk_tokens
        if isinstance(q, torch.Tensor) and q.dim() == 2 and len(q) != tokens:
            raise ValueError(f"attend: q must have the chunk's {tokens} tokens, got {len(q)}")
        pool, config = self._pool, self.config
        turned = norm_rope_append(
            q, k, v, pool.k[layer], pool.v[layer], self._position[:1],
            rope=self._rope, grid=(config.chunk_frames, *config.grid), start_frame=self._position[1:],
            q_weight=q_weight, k_weight=k_weight, eps=config.eps, round_before_rope=config.round_before_rope,
            out=self._q, backend=self._backend,
        )  # fmt: skip
        self._layers_done.add(layer)
        return segment_attention(
            turned, pool.k[layer], pool.v[layer], self._window, scale=config.scale, out=out, backend=self._backend
        )

    @ranged("end_chunk")
    def end_chunk(self) -> None:
        """Make the current chunk history, and prune into the bank the chunk that leaves the recent frames.

        Raises RuntimeError when no chunk is begun, or a layer was never attended, whose rows would be stale, and
        ValueError when a policy object gives up a chunk that is not in a full bank; the chunk is then still begun.
        """
        if self._plan is None:
            raise RuntimeError("end_chunk: a chunk must be begun (begin_chunk), got end_chunk outside one")
        config, chunk = self.config, self._plan.chunk
        missing = sorted(set(range(config.num_layers)) - self._layers_done)
        if missing:
            raise RuntimeError(f"end_chunk: chunk {chunk} must attend every layer, got none for layers {missing}")
        if self._bank is not None:
            self._descriptions[chunk] = self._current_description
            if config.bank_sink and chunk < config.sink_chunks:
                self._store(chunk)
        leaving = chunk - config.recent_chunks - config.unattended_chunks
        if config.mode != "full" and leaving >= config.sink_chunks:
            if self._bank is not None:
                self._store(leaving)
            else:
                self._left_window += 1
        self._tokens_attended += self._plan.num_tokens
        self._retrieved_total += len(self._plan.retrieved)
        if self.integrator is not None:
            self.integrator.restore(self._after_actions)
        self._plan = None
        self._next_chunk = chunk + 1

    def abort_chunk(self) -> None:
        """Drop the current chunk: the memory is as before its begin_chunk. Does nothing when none is begun."""
        self._plan = None

    # --- what is inside ---

    @property
    def window(self) -> Window:
        """The current window, for use with the ops themselves; rewritten by begin_chunk, never replaced."""
        return self._window

    def pools(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V pools of a layer, [rows, heads, head_dim]."""
        return self._pool.k[layer], self._pool.v[layer]

    def location(self, chunk: int) -> str:
        """Where a past chunk is: "sink", "recent", "unattended", "bank" or "dropped"."""
        if not 0 <= chunk < self._next_chunk:
            raise ValueError(f"location: chunk must be from 0 to {self._next_chunk - 1}, got {chunk}")
        age = self._next_chunk - chunk
        if chunk < self.config.sink_chunks:
            return "sink"
        if self.config.mode == "full" or age <= self.config.recent_chunks:
            return "recent"
        if age <= self.config.recent_chunks + self.config.unattended_chunks:
            return "unattended"
        return "bank" if self._bank is not None and chunk in self._bank else "dropped"

    def stats(self) -> dict[str, int]:
        """Counts since the last reset, and bytes: plain numbers, ready for JSON."""
        bank, has_bank = self._bank, self._bank is not None  # an empty bank is falsy
        return {
            "chunks": self._next_chunk,
            "tokens_attended": self._tokens_attended,
            "chunks_retrieved": self._retrieved_total,
            "chunks_banked": len(bank) if has_bank else 0,
            "bank_capacity": bank.capacity if has_bank else 0,
            "chunks_dropped": len(bank.dropped) if has_bank else self._left_window,
            "host_copies_in": bank.copies_in if has_bank else 0,
            "host_copies_saved": bank.hits if has_bank else 0,
            "device_bytes": self._pool.bytes,
            "host_bytes": bank.host_bytes if has_bank else 0,
            "kept_bytes": self._kept_bytes(),
        }

    def _kept_bytes(self) -> int:
        """Bytes of the K and V rows that hold the past, without room that is free or a slot's tail."""
        config = self.config
        banked = len(self._bank) if self._bank is not None else 0  # with the sink's copy where bank_sink keeps one
        places = [self.location(chunk) for chunk in range(self._next_chunk)]
        whole = sum(place not in ("bank", "dropped") for place in places)
        tokens = whole * config.chunk_tokens + banked * config.banked_tokens
        return tokens * self._token_bytes()

    def _token_bytes(self) -> int:
        """Of K and V of one token over all layers."""
        config = self.config
        return 2 * config.num_layers * config.num_heads * config.head_dim * self.dtype.itemsize

    # --- parts of the above ---

    def _integrated(self, poses: object, actions: tuple[object, object] | None) -> object:
        """The poses given, or those that the actions lead to."""
        if self.integrator is None:
            if actions is not None:
                policy, got = type(self._policy).__name__, type(actions).__name__
                raise ValueError(f"begin_chunk: actions must be None for retrieval by {policy}, got {got}")
            return poses
        if poses is not None:
            got = type(poses).__name__
            raise ValueError(f"begin_chunk: poses must be None for retrieval by ActionRetrieval, got {got}")
        rows = 4 * self.config.chunk_frames - (0 if self._next_chunk else 3)
        if actions is None:
            if self._bank is not None:
                raise ValueError(f"begin_chunk: actions must be of {rows} rows in mode 'worldkv', got None")
            return None
        checked = as_actions("begin_chunk", actions, self.integrator.layout_name, rows)
        if self._bank is None:
            return None
        before = self.integrator.state
        poses = self.integrator.advance(*checked)
        self._after_actions = self.integrator.state
        self.integrator.restore(before)  # the chunk may yet be refused or dropped
        return poses

    def _described(self, poses: object, intrinsics: object) -> Any:
        frames = self.config.chunk_frames
        if poses is None:
            if self._bank is not None:
                raise ValueError(f"begin_chunk: poses must be [{frames}, 4, 4] in mode 'worldkv', got None")
            return None
        checked = as_poses("begin_chunk", poses, frames)
        if self._bank is None:
            return None
        if not self._policy.needs_intrinsics:
            return self._policy.describe(checked, None)
        if intrinsics is None:
            raise ValueError(f"begin_chunk: intrinsics must be [{frames}, 4] for this retrieval policy, got None")
        return self._policy.describe(checked, as_intrinsics("begin_chunk", intrinsics, frames))

    def _slot(self, chunk: int) -> int:
        """First pool row of a chunk that is whole: in the sink, recent, or current."""
        sink = self.config.sink_chunks
        return self._sink_rows[chunk] if chunk < sink else self._ring_rows[(chunk - sink) % len(self._ring_rows)]

    def _segments(self, chunk: int, retrieved: list[int]) -> list[tuple[str, int, Segment]]:
        """Sink, retrieved, recent, current; with the time shifts that close the gaps between their frames."""
        config = self.config
        sink = list(range(min(config.sink_chunks, chunk)))
        attended = chunk if config.mode == "full" else config.recent_chunks
        # The published code leaves its gap as soon as something is retrieved; with no room for that, always.
        if not retrieved and config.retrieved_chunks:
            attended += config.unattended_chunks
        recent = list(range(max(config.sink_chunks, chunk - attended, 0), chunk))
        # Chunk numbers at which retrieved and sink chunks would stand next to the recent ones.
        before = (recent[0] if recent else chunk) - len(retrieved)
        shift = config.chunk_frames if config.rebase_time else 0
        segments = []
        for place, past in enumerate(sink):
            moved = (before - len(sink) + place - past) * shift if config.rebase_sink else 0
            segments.append(("sink", past, Segment(self._slot(past), config.chunk_tokens, moved)))
        rows = self._bank.fetch(retrieved) if self._bank is not None else []
        for place, (past, first) in enumerate(zip(retrieved, rows, strict=True)):
            segments.append(("retrieved", past, Segment(first, config.banked_tokens, (before + place - past) * shift)))
        for past in recent:
            segments.append(("recent", past, Segment(self._slot(past), config.chunk_tokens)))
        segments.append(("current", chunk, Segment(self._slot(chunk), config.chunk_tokens)))
        return segments

    def _store(self, chunk: int) -> None:
        """Prune a whole chunk, layer by layer, from its slot into the bank's."""
        config = self.config
        row = self._bank.row_to_fill(chunk, self._descriptions[chunk])
        del self._descriptions[chunk]
        if row is None:
            return
        source = slice(self._slot(chunk), self._slot(chunk) + config.chunk_tokens)
        target = slice(row, row + config.banked_tokens)
        for k, v in zip(self._pool.k, self._pool.v, strict=True):
            compress_chunk(
                k[source], v[source], frames=config.chunk_frames, keep_ratio=config.keep_ratio, pooled=config.pooled,
                out_k=k[target], out_v=v[target], out_index=self._index, backend=self._backend,
            )  # fmt: skip
        self._bank.stored(chunk)

    def _bank_places(self, sizes: dict[str, int]) -> int:
        """How many chunks the bank (mode "full": the pool) holds."""
        config = self.config
        if config.bank_chunks is not None or not (config.has_bank or config.mode == "full"):
            return config.bank_chunks or 1
        tokens = config.chunk_tokens if config.mode == "full" else config.banked_tokens
        size = Pool.slot_bytes(tokens, dtype=self.dtype, **sizes)
        on_device = self.device.type == "cuda" and not (config.has_bank and config.bank == "host")
        free = free_bytes(self.device if on_device else torch.device("cpu"))
        fits = int(free // 2 // size)
        least = max(1, config.retrieved_chunks) if config.has_bank else 1
        if fits < least:
            where = "on the device" if on_device else "on the host"
            raise ValueError(
                f"WorldMemory: bank_chunks must be at least {least} at {size / 2**20:.0f} MiB each, "
                f"got {fits} that fit half of the {free / 2**30:.1f} GiB that are free {where}"
            )
        return min(fits, self._max_chunks if self._rope else _CHUNKS_WITHOUT_ROPE)

    def _check_room(self, pool_bytes: int, arena_bytes: int) -> None:
        wanted = {self.device.type: pool_bytes}
        wanted["cpu"] = wanted.get("cpu", 0) + arena_bytes
        for kind, needed in wanted.items():
            free = free_bytes(torch.device(kind) if kind == "cpu" else self.device)
            if needed > free:
                raise ValueError(
                    f"WorldMemory: storage must fit the {free / 2**30:.1f} GiB that are free on {kind}, "
                    f"got {needed / 2**30:.1f} GiB; bank_chunks, {self.config.bank_chunks}, sets most of it"
                )
