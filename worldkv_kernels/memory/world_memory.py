"""WorldMemory: the KV cache of a world model, with a window that reaches back to where the camera has been."""

from __future__ import annotations

import operator
import os
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from ..checks import DTYPES, as_device, as_integer, bad_type, check_backend, debug, describe, readable
from ..ops.all import check_every_backend
from ..ops.compress_chunk import compress_chunk
from ..ops.norm_rope_append import norm_rope_append
from ..ops.segment_attention import segment_attention
from ..ranges import ranged
from ..window import Segment, Window, tiles_of
from .bank import Bank
from .config import MemoryConfig
from .pool import Pool
from .retrieval import make_policy
from .room import bank_places, check_room
from .slots import COUNTS
from .views import View, Views


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

    With a bank in host memory, chunks go there and come back by copies on streams of their own. No call waits for
    them on the host, and begin_chunk not on the device: `attend` of a layer lets the stream that is current at the
    call wait for that layer's rows, the first time. A graph cannot wait for copies outside of it: call
    `wait` after begin_chunk, before a capture and before a replay, and `replayed` after one. The calls of a chunk
    may be on several streams if the caller orders them, end_chunk and abort_chunk after every pass.

    A memory on a GPU cannot be used in a child that its process forks: RuntimeError.

    Between chunks, a memory on a CPU can be pickled and copied (pickle, copy.deepcopy; torch.load needs
    weights_only=False); what is loaded goes on bit for bit as the original would. The policy and its descriptions must
    allow it. A whole rollout needs what is its pipeline's too: the state of the generator of its noise, the caches of
    the VAE and of the text, the chunk's number. A memory on a GPU raises RuntimeError: streams, events and page-locked
    memory belong to their process.

    `integrator`, where retrieval is by action, stands at the end of the last chunk of history (in the baselines, which
    retrieve nothing, at the start); it is None for other retrieval.

    Raises ValueError when the storage does not fit the memory that is free, with the numbers, when torch cannot use
    the device, or when an op has no such backend there; TypeError on another dtype, or what is no MemoryConfig.
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
        if not isinstance(config, MemoryConfig):
            raise bad_type("WorldMemory", "config", "a MemoryConfig", config)
        if dtype not in DTYPES:
            raise TypeError(f"WorldMemory: dtype must be bfloat16, float16 or float32, got {dtype}")
        self.config = config
        self.device = as_device("WorldMemory", device)
        check_backend("WorldMemory", backend)
        check_every_backend("WorldMemory: backend", backend, self.device)
        self.dtype = dtype
        self._backend = backend
        self._rope = config.make_rope()
        self._process = os.getpid() if self.device.type == "cuda" else None
        self._policy = make_policy(config.retrieval)
        self._views = Views(config, self._policy)
        self.integrator = self._views.integrator
        self._max_chunks = self._rope.max_position // config.chunk_frames if self._rope else sys.maxsize

        sizes = dict(num_layers=config.num_layers, num_heads=config.num_heads, head_dim=config.head_dim)
        whole = config.chunk_tokens
        tokens = whole if config.mode == "full" else config.banked_tokens
        slot_bytes = Pool.slot_bytes(tokens, dtype=dtype, **sizes)
        places = bank_places(config, self.device, slot_bytes, self._max_chunks)
        if config.mode == "full":
            self._max_chunks = min(self._max_chunks, places)
            ring = self._max_chunks
        else:
            ring = config.recent_chunks + config.gap_chunks + 1
        on_host = config.has_bank and config.bank == "host"
        self._may_ask_ahead = getattr(self._policy, "stateless", False)
        self._foresees = on_host and config.prefetch and self._may_ask_ahead
        bank_slots = (config.host_bank_slots if on_host else places) if config.has_bank else 0
        slots = [(whole, config.sink_chunks), (whole, ring), (config.banked_tokens, bank_slots)]
        check_room(
            config,
            self.device,
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
        in_window += config.gap_chunks
        capacity = in_window * tiles_of(whole) + config.retrieved_chunks * tiles_of(config.banked_tokens)
        self._window = Window(
            [Segment(0, 1)], device=self.device, rope=self._rope if config.rebase_time else None, capacity=capacity
        )
        self._position = torch.zeros(2, dtype=torch.int64, device=self.device)
        self._q = torch.empty((whole, config.num_heads, config.head_dim), dtype=dtype, device=self.device)
        # What compress_chunk says of a chunk and nobody asks for: kept here, it is not allocated in every end_chunk.
        self._index = torch.empty((config.num_layers, config.banked_tokens), dtype=torch.int32, device=self.device)
        self.reset()

    def reset(self) -> None:
        """Forget the rollout and start again at chunk 0. Keeps all storage."""
        self._check_process("reset")
        self._next_chunk = 0
        self._plan: ChunkPlan | None = None
        self._layers_done: set[int] = set()
        self._descriptions: dict[int, Any] = {}  # of chunks on their way to the bank
        self._view = self._last_view = View()  # of the chunk begun last, and of the last one of history
        self._tokens_attended = 0
        self._retrieved_total = 0
        self._left_window = 0
        if self.integrator is not None:
            self.integrator.reset()
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
        then as before. With a host bank, the copies of what is missing on the device are begun, then, under
        `MemoryConfig.prefetch`, those of what the next chunk would retrieve if the camera went on as it did.
        """
        if self._plan is not None:
            raise RuntimeError(
                f"begin_chunk: chunk {self._plan.chunk} must be ended (end_chunk) or dropped (abort_chunk) "
                f"before another is begun, got a second begin_chunk"
            )
        self._check_process("begin_chunk")
        config, chunk = self.config, self._next_chunk
        if chunk >= self._max_chunks:
            raise RuntimeError(
                f"begin_chunk: chunk must be below {self._max_chunks} (rope positions, or bank_chunks in mode 'full'), "
                f"got chunk {chunk}"
            )
        view = self._views.of("begin_chunk", chunk, poses, intrinsics, actions)
        start_frame = chunk * config.chunk_frames
        retrieved: list[int] = []
        if self._bank is not None:
            retrieved = self._select("begin_chunk", view.description, self._candidates())
            if config.order == "time":
                retrieved.sort()
            elif config.order == "nearest_last":
                retrieved.reverse()
        segments = self._segments(chunk, retrieved)
        self._window.update([segment for _, _, segment in segments])
        self._position[:1].fill_(self._slot(chunk))  # by launch argument: no copy to wait for
        self._position[1:].fill_(start_frame)
        if self._foresees and self._last_view.poses is not None:
            following = self._views.following(self._last_view, view)
            self._prefetch("begin_chunk", following, self._candidates(chunk, view.description))
        self._view = view
        self._layers_done.clear()
        self._plan = ChunkPlan(chunk, start_frame, tuple(retrieved), tuple(segments), self._window.num_tokens)
        return self._plan

    def prefetch(
        self, poses: object = None, *, intrinsics: object = None, actions: tuple[object, object] | None = None
    ) -> tuple[int, ...]:
        """Begin to bring to the device what the next chunk will retrieve, for a caller who knows where it will be.

        Between chunks that is the chunk about to begin; while one is begun, the chunk after it. The arguments are what
        begin_chunk will be given. Best candidates first, as far as there are slots that the present window does not
        use: all of them between chunks, `device_slots - retrieved_chunks` while one is begun. It changes no result:
        begin_chunk finds on the device what was guessed right, and copies the rest.

        Returns the chunks that are now on the device or on their way; none without a bank, nor with a policy object
        that is not `stateless`, which being asked could change: see RetrievalPolicy. Another has to describe the poses
        once more. Raises as begin_chunk does for its arguments, where it looks at them.
        """
        self._check_process("prefetch")
        if self._bank is None or not self._may_ask_ahead:
            return ()
        begun = self._plan.chunk if self._plan is not None else None
        start = self._view.after_actions if begun is not None else None
        chunk = self._next_chunk if begun is None else begun + 1
        view = self._views.of("prefetch", chunk, poses, intrinsics, actions, start)
        return self._prefetch("prefetch", view.description, self._candidates(begun, self._view.description))

    def wait(self) -> None:
        """Let the current stream wait for all rows of the window: `attend` then waits for none, on any stream.

        After begin_chunk: before a pass is captured in a CUDA graph or one is replayed; before the rows are read by
        other means than `attend`; and for torch.compile to trace `attend` in one graph. Does nothing when no row
        is on its way. Raises RuntimeError when the stream is being captured.
        """
        self._check_process("wait")
        if self._bank is not None:
            self._bank.wait()

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
            out: where to write; with it, a call allocates nothing but a kernel's scratch (see segment_attention).

        Returns [tokens, heads, head_dim]. For inference: call it under torch.no_grad() or torch.inference_mode().
        Raises RuntimeError when no chunk is begun, and in a graph capture when rows of the window may be on their way
        (call `wait` before); ValueError or TypeError on another dtype or device than the memory's, and as
        norm_rope_append does. Under WORLDKV_DEBUG=1 ValueError on a NaN or infinity in q, k or v, which would stay in
        the memory for good.
        """
        if self._plan is None:
            raise RuntimeError("attend: a chunk must be begun (begin_chunk), got attend outside one")
        self._check_layer("attend", layer)
        if isinstance(q, torch.Tensor):
            tokens = self.config.chunk_tokens
            if q.dim() == 2 and len(q) != tokens:
                raise ValueError(f"attend: q must have the chunk's {tokens} tokens, got {len(q)}")
            if q.dtype != self.dtype:
                raise TypeError(f"attend: q must be of the memory's dtype {self.dtype}, got {q.dtype}")
            if q.device != self.device:
                raise ValueError(f"attend: q must be on the memory's device {self.device}, got {q.device}")
        if debug():
            _check_finite(layer, q=q, k=k, v=v)
        pool, config = self._pool, self.config
        if self._process is not None and not torch.compiler.is_compiling():
            self._check_process("attend")
        if self._bank is not None and not self._bank.settled:
            self._bank.wait_layer(layer)
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

    def replayed(self) -> None:
        """Say that a CUDA graph of a pass over all layers was replayed: the rows it wrote are as those of `attend`.

        A chunk may be made of replays alone: begin_chunk, `wait`, the replays, `replayed`, end_chunk. Raises
        RuntimeError when no chunk is begun.
        """
        if self._plan is None:
            raise RuntimeError("replayed: a chunk must be begun (begin_chunk), got a replay outside one")
        self._layers_done.update(range(self.config.num_layers))

    @ranged("end_chunk")
    def end_chunk(self) -> None:
        """Make the current chunk history, and prune into the bank the chunk that leaves the recent frames.

        Raises RuntimeError when no chunk is begun, or a layer was never attended, whose rows would be stale, and
        ValueError when a policy object gives up a chunk that is not in a full bank; the chunk is then still begun.
        When pruning itself fails, it is still begun, to be ended again or dropped; what a full bank gave up is gone.
        """
        self._check_process("end_chunk")
        if self._plan is None:
            raise RuntimeError("end_chunk: a chunk must be begun (begin_chunk), got end_chunk outside one")
        config, chunk = self.config, self._plan.chunk
        missing = sorted(set(range(config.num_layers)) - self._layers_done)
        if missing:
            raise RuntimeError(f"end_chunk: chunk {chunk} must attend every layer, got none for layers {missing}")
        leaving = chunk - config.recent_chunks - config.gap_chunks
        if self._bank is not None:
            self._descriptions[chunk] = self._view.description
            if config.bank_sink and chunk < config.sink_chunks:
                self._store(chunk)
            elif leaving >= config.sink_chunks:
                self._store(leaving)
        elif config.mode != "full" and leaving >= config.sink_chunks:
            self._left_window += 1
        self._tokens_attended += self._plan.num_tokens
        self._retrieved_total += len(self._plan.retrieved)
        if self.integrator is not None:
            self.integrator.restore(self._view.after_actions)
        self._release()
        self._last_view = self._view
        self._next_chunk = chunk + 1

    def abort_chunk(self) -> None:
        """Drop the current chunk: the memory is as before its begin_chunk. Does nothing when none is begun.

        What was copied to the device for it stays there, as a cache.
        """
        self._check_process("abort_chunk")
        if self._plan is not None:
            self._release()

    # --- what is inside ---

    @property
    def window(self) -> Window:
        """The current window, for the ops themselves, after `wait`; rewritten by begin_chunk, never replaced."""
        return self._window

    def pools(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V pools of a layer, [rows, heads, head_dim]."""
        self._check_layer("pools", layer)
        return self._pool.k[layer], self._pool.v[layer]

    def location(self, chunk: int) -> str:
        """Where a past chunk is: "sink", "recent", "unattended", "bank" or "dropped"."""
        chunk = as_integer("location", "chunk", chunk)
        if not 0 <= chunk < self._next_chunk:
            raise ValueError(f"location: chunk must be from 0 to {self._next_chunk - 1}, got {chunk}")
        age = self._next_chunk - chunk
        if chunk < self.config.sink_chunks:
            return "sink"
        if self.config.mode == "full" or age <= self.config.recent_chunks:
            return "recent"
        if age <= self.config.recent_chunks + self.config.gap_chunks:
            return "unattended"
        return "bank" if self._bank is not None and chunk in self._bank else "dropped"

    def stats(self) -> dict[str, int]:
        """Counts since the last reset, and bytes: plain numbers, ready for JSON.

        Of a bank in host memory, else 0: host_copies_in, host_copies_out: chunks copied to the device and from it,
        host_bytes_in, host_bytes_out: their bytes. host_copies_saved, host_misses: retrieved chunks that were
        on the device (or on their way) when their chunk began, and others, aborted chunks included.
        prefetched: copies to the device made ahead, of which prefetch_hits were retrieved later and prefetch_misses
        given up before. host_bytes: of the arena; pinned: 1 if it is page-locked.
        """
        bank, has_bank = self._bank, self._bank is not None  # an empty bank is falsy
        return {
            "chunks": self._next_chunk,
            "tokens_attended": self._tokens_attended,
            "chunks_retrieved": self._retrieved_total,
            "chunks_banked": len(bank) if has_bank else 0,
            "bank_capacity": bank.capacity if has_bank else 0,
            "chunks_dropped": len(bank.dropped) if has_bank else self._left_window,
            "device_bytes": self._pool.bytes,
            "kept_bytes": self._kept_bytes(),
            **(bank.counts() if has_bank else dict.fromkeys(COUNTS, 0)),
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

    def __repr__(self) -> str:
        stats = self.stats()
        on_host = f" and {stats['host_bytes'] / 2**20:.1f} MiB of host memory" if stats["host_bytes"] else ""
        return (
            f"WorldMemory({self.config.mode}, {stats['chunks']} chunks, {stats['chunks_banked']} banked, "
            f"{stats['device_bytes'] / 2**20:.1f} MiB on {self.device}{on_host})"
        )

    def __getstate__(self) -> dict[str, Any]:
        if self.device.type != "cpu":
            raise RuntimeError(
                f"WorldMemory: a memory must be on a CPU to be pickled or copied, got one on {self.device}"
            )
        return self.__dict__

    # --- parts of the above ---

    def _check_layer(self, op: str, layer: object) -> None:
        if type(layer) is not int:
            layer = as_integer(op, "layer", layer)
        if not 0 <= layer < self.config.num_layers:
            raise ValueError(f"{op}: layer must be from 0 to {self.config.num_layers - 1}, got {layer}")

    def _check_process(self, op: str) -> None:
        if self._process not in (None, os.getpid()):
            raise RuntimeError(
                f"{op}: a memory on a GPU must be used in the process that made it, {self._process}, "
                f"got {os.getpid()}: a forked child has no CUDA"
            )

    def _candidates(self, begun: int | None = None, description: Any = None) -> list[tuple[int, Any]]:
        """What the next chunk may retrieve. While `begun` is, of that description, what will be banked at its end too,
        so that what is chosen is not one chunk too old; it comes to lie on the device by itself."""
        config = self.config
        candidates = [(c, d) for c, d in self._bank.descriptions.items() if c >= config.sink_chunks]
        if begun is not None:
            leaving = begun - config.recent_chunks - config.gap_chunks
            if leaving >= config.sink_chunks:
                candidates.append((leaving, {**self._descriptions, begun: description}[leaving]))
        return candidates

    def _select(self, op: str, description: Any, candidates: Sequence[tuple[int, Any]]) -> list[int]:
        """The policy's choice, best first, checked."""
        budget, known = self.config.retrieved_chunks, {c for c, _ in candidates}
        selected = self._policy.select(description, candidates, budget)
        try:
            chosen = [operator.index(chunk) for chunk in selected]
        except TypeError as error:
            raise TypeError(
                f"{op}: the retrieval policy must select a list of chunk numbers, got {describe(selected)}"
            ) from error
        if len(chosen) > budget or len(known.intersection(chosen)) != len(chosen):
            raise ValueError(
                f"{op}: the retrieval policy must select up to {budget} different chunks of {sorted(known)}, "
                f"got {chosen}"
            )
        return chosen

    def _prefetch(self, op: str, description: Any, candidates: Sequence[tuple[int, Any]]) -> tuple[int, ...]:
        chosen = self._select(op, description, candidates)
        return tuple(self._bank.prefetch([chunk for chunk in chosen if chunk in self._bank]))

    def _release(self) -> None:
        """No chunk is begun any more; the passes queued so far are all that read its window."""
        self._plan = None
        if self._bank is not None:
            self._bank.release()

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
            attended += config.gap_chunks
        recent = list(range(max(config.sink_chunks, chunk - attended, 0), chunk))
        # Chunk numbers at which retrieved and sink chunks would stand next to the recent ones.
        before = (recent[0] if recent else chunk) - len(retrieved)
        shift = config.chunk_frames if config.rebase_time else 0
        segments = []
        for place, past in enumerate(sink):
            moved = (before - len(sink) + place - past) * shift if config.rebase_sink else 0
            segments.append(("sink", past, Segment(self._slot(past), config.chunk_tokens, moved)))
        rows = self._bank.request(retrieved) if self._bank is not None else []
        for place, (past, first) in enumerate(zip(retrieved, rows, strict=True)):
            segments.append(("retrieved", past, Segment(first, config.banked_tokens, (before + place - past) * shift)))
        for past in recent:
            segments.append(("recent", past, Segment(self._slot(past), config.chunk_tokens)))
        segments.append(("current", chunk, Segment(self._slot(chunk), config.chunk_tokens)))
        return segments

    def _store(self, chunk: int) -> None:
        """Prune a whole chunk, all layers at once, from its slot into the bank's.

        One call launches as much as it would for one layer. A copy to the host then begins when all layers are pruned,
        not after the first: about 1 ms later, where the link takes some 36 ms for a chunk (14B, half of it kept).
        """
        config, k, v = self.config, self._pool.k, self._pool.v
        row = self._bank.row_to_fill(chunk, self._descriptions[chunk])
        self._bank.release()  # before pruning is queued: copies for the next window need not wait for it
        if row is None:
            del self._descriptions[chunk]
            return
        source = slice(self._slot(chunk), self._slot(chunk) + config.chunk_tokens)
        target = slice(row, row + config.banked_tokens)
        try:
            compress_chunk(
                k[:, source], v[:, source], frames=config.chunk_frames, keep_ratio=config.keep_ratio,
                pooled=config.pooled, out_k=k[:, target], out_v=v[:, target], out_index=self._index,
                backend=self._backend,
            )  # fmt: skip
            self._bank.stored(chunk)
        except BaseException:
            self._bank.break_off(chunk)
            raise
        del self._descriptions[chunk]


def _check_finite(layer: int, **given: object) -> None:
    for name, x in given.items():
        if isinstance(x, torch.Tensor) and readable(x) and not torch.isfinite(x).all():
            raise ValueError(f"attend: {name} must be finite, got NaN or infinity in layer {layer}")
