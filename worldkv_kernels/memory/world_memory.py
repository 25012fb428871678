"""WorldMemory: the KV cache of a world model, with a window that reaches back to where the camera has been."""

from __future__ import annotations

import itertools
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .. import saved
from ..checks import DTYPES, as_device, as_integer, bad_type, check_backend, check_bool
from ..ops.all import check_every_backend
from ..ranges import ranged
from ..window import Window
from . import saving
from .attention import Attention
from .bank import Bank
from .config import MemoryConfig, changed
from .contents import Contents
from .plan import ChunkPlan, leaving, pieces, place
from .received import ROLES
from .retrieval import RetrievalPolicy, make_policy
from .sizes import content_shape
from .storage import Storage
from .views import View, Views

__all__ = ["ChunkPlan", "WorldMemory"]


class WorldMemory:
    """The keys and values of a rollout: sink, recent and current chunks whole, older ones banked and pruned.

    For each chunk: `begin_chunk` chooses the window, any number of passes call `attend` for every layer, and
    `end_chunk` makes the rows of the last pass history. All storage is allocated here, once; the window's tables, the
    chunk's row and its rotations are rewritten at fixed addresses, so a pass can be captured in a CUDA graph. In mode
    "full" a rollout ends with the pool, else with 2**31 frames, which are 17 years at 4 latent frames a second.
    Every past chunk is in exactly one of sink, recent and bank, unless a mode, the bank's bound or the caller drops it.

    `config` says what holds now, and `configured` what it was made with, see `change`.

    With a bank in host memory, chunks go there and come back on streams of their own. No call waits for them on the
    host, and begin_chunk not on the device: `attend` of a layer lets the stream that is current at the call wait for
    that layer's rows, the first time. A graph cannot wait for copies outside of it: call `wait` after begin_chunk,
    before a capture and before a replay, and `replayed` after one. The calls of a chunk
    may be on several streams if the caller orders them, end_chunk and abort_chunk after every pass.

    A memory on a GPU cannot be used in a child that its process forks: RuntimeError.

    Between chunks a memory can be saved, loaded on any device, and forked: `save`, `load`, `fork`. A whole rollout
    needs what is its pipeline's too: see models.rollout.Rollout.save. One on a CPU can also be pickled and copied
    (pickle, copy.deepcopy), if its policy can; one on a GPU raises RuntimeError: streams, events and page-locked memory
    belong to their process.

    `integrator`, where retrieval is by action, stands at the end of the last chunk of history (in the baselines, which
    retrieve nothing, at the start); it is None for other retrieval.

    Raises ValueError when the storage does not fit the memory that is free, with the numbers, when torch cannot use
    the device, or when an op of the passes has no such backend there (packing, which has no CUDA kernel, then makes its
    own choice); TypeError on another dtype, or what is no MemoryConfig.
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
        self.config = self.configured = config
        self.device = as_device("WorldMemory", device)
        check_backend("WorldMemory", backend)
        check_every_backend("WorldMemory: backend", backend, self.device)
        self.dtype = dtype
        self._backend = backend
        self._process = os.getpid() if self.device.type == "cuda" else None
        policy = make_policy(config.retrieval)
        self._views = Views(config, policy)
        self.integrator = self._views.integrator
        self._may_ask_ahead = getattr(policy, "stateless", False)
        self._foresees = config.caches_bank and config.prefetch and self._may_ask_ahead
        self._storage = Storage(config, policy, device=self.device, dtype=dtype, backend=backend)
        self._contents = Contents(content_shape(config), self.device) if config.takes_contents else None
        self._bank, self._received = self._storage.bank, self._storage.received
        self._attention = Attention(
            config, self._storage, self._contents, device=self.device, dtype=dtype, backend=backend
        )
        self.reset()

    def reset(self) -> None:
        """Forget the rollout and start again at chunk 0, with no chunk pinned and the config that the memory was made
        with. Keeps all storage."""
        self._check_process("reset")
        self._configure(self.configured)
        self._next_chunk = 0
        self._first_whole = self.config.sink_chunks  # see plan.leaving
        self._unbanked: set[int] = set()  # chunks that are whole and will not be banked
        self._plan: ChunkPlan | None = None
        self._layers_done: set[tuple[int, int]] = set()  # (branch, layer)
        self._descriptions: dict[int, Any] = {}  # of chunks on their way to the bank
        self._view = self._last_view = View()  # of the chunk begun last, and of the last one of history
        self._tokens_attended = 0
        self._retrieved_total = 0
        if self.integrator is not None:
            self.integrator.reset()
        if self._bank is not None:
            self._bank.clear()
        if self._received is not None:
            self._received.clear()

    # --- a chunk ---

    @ranged("begin_chunk")
    def begin_chunk(
        self,
        poses: object = None,
        *,
        intrinsics: object = None,
        actions: tuple[object, object] | None = None,
        query: object = None,
    ) -> ChunkPlan:
        """Choose what the next chunk attends to.

        Args:
            poses: camera-to-world [chunk_frames, 4, 4] of the chunk's latent frames, OpenCV coordinates, any unit
                of length; an array or tensor. Needed in mode "worldkv" but by content, checked wherever given.
            intrinsics: fx, fy, cx, cy in pixels, [chunk_frames, 4] or [4]; needed by retrieval "fov".
            actions: in place of poses where retrieval is by action: an Actions (mouse, keyboard) of this chunk's rows
                in the integrator's layout, 4 * chunk_frames - 3 of chunk 0, then 4 * chunk_frames a chunk. The
                memory integrates them; a chunk that is aborted or not begun leaves no trace.
            query: where retrieval is by content, what the chunk is to be like, a vector [dim] of the contents' numbers,
                such as an embedding of its prompt. None for the last vector of the content of the chunk before, that of
                its last frame. Poses are not used by content.

        Returns the plan. Nothing is synchronised unless the arguments lie on the GPU; but where retrieval is by the
        content of keys the host waits until those of the last pass's layer 0 have come, see Contents. Raises
        RuntimeError when a chunk is already begun or the rollout has ended (in mode "full" with its pool), ValueError
        when the poses, actions or query are missing, misshapen, not rigid or not finite, or are what this retrieval
        does not take, or a policy object selects what is not on offer, TypeError when that is no list of chunk numbers,
        or the query no array; the memory is then as before.
        With a bank in host memory, the copies of what is missing on the device are begun, then, under
        `MemoryConfig.prefetch`, those of what the next chunk would retrieve if the camera went on as it did.
        """
        if self._plan is not None:
            raise RuntimeError(
                f"begin_chunk: chunk {self._plan.chunk} must be ended (end_chunk) or dropped (abort_chunk) "
                f"before another is begun, got a second begin_chunk"
            )
        self._check_process("begin_chunk")
        config, chunk = self.config, self._next_chunk
        if chunk >= self._storage.max_chunks:
            most = self._storage.max_chunks
            of_what = "bank_chunks in mode 'full'" if config.mode == "full" else "2**31 frames"
            raise RuntimeError(f"begin_chunk: chunk must be below {most} ({of_what}), got chunk {chunk}")
        view = self._views.of("begin_chunk", chunk, poses, intrinsics, actions, query, content=self._last_content())
        start_frame = chunk * config.chunk_frames
        retrieved: list[int] = []
        if self._bank is not None and not (view.description is None and self._views.by_content):
            retrieved = self._bank.select(
                "begin_chunk", view.description, config.retrieved_chunks, first=config.sink_chunks
            )
            if config.order == "time":
                retrieved.sort()
            elif config.order == "nearest_last":
                retrieved.reverse()
        self._storage.join()
        tokens = {past: self._bank.tokens[past] for past in retrieved}
        segments = self._storage.segments(pieces(config, chunk, tokens, self._first_whole))
        self._attention.move(chunk, [segment for _, _, segment in segments])
        if self._foresees and self._last_view.poses is not None:
            following = self._views.following(self._last_view, view)
            self._prefetch("begin_chunk", following, self._coming(chunk, view.description))
        self._view = view
        self._layers_done.clear()
        self._plan = ChunkPlan(chunk, start_frame, tuple(retrieved), segments, self.window.num_tokens)
        return self._plan

    def prefetch(
        self,
        poses: object = None,
        *,
        intrinsics: object = None,
        actions: tuple[object, object] | None = None,
        query: object = None,
    ) -> tuple[int, ...]:
        """Begin to bring to the device what the next chunk will retrieve, for a caller who knows where it will be.

        Between chunks that is the chunk about to begin; while one is begun, the chunk after it. The arguments are what
        begin_chunk will be given. Best candidates first, as far as there are slots that the present window does not
        use: all of them between chunks, `device_slots - retrieved_chunks` while one is begun. It changes no result:
        begin_chunk finds on the device what was guessed right, and copies the rest.

        Returns the chunks that are now on the device or on their way; none without a bank, nor with a policy object
        that is not `stateless`, which being asked could change: see RetrievalPolicy; nor by content while a chunk is
        begun, without a query, for that is not made yet. A policy object has to describe the poses once more. Raises as
        begin_chunk does for its arguments, where it looks at them.
        """
        self._check_process("prefetch")
        if self._bank is None or not self._may_ask_ahead:
            return ()
        begun = self._plan.chunk if self._plan is not None else None
        start = self._view.after_actions if begun is not None else None
        chunk = self._next_chunk if begun is None else begun + 1
        view = self._views.of(
            "prefetch", chunk, poses, intrinsics, actions, query, start=start, content=self._last_content()
        )
        if self._views.by_content and (view.description is None or (begun is not None and query is None)):
            return ()
        return self._prefetch("prefetch", view.description, self._coming(begun, self._view.description))

    def wait(self) -> None:
        """Let the current stream wait for all rows of the window: `attend` then waits for none, on any stream.

        After begin_chunk: before a pass is captured in a CUDA graph or one is replayed; before the rows are read by
        other means than `attend`; and for torch.compile to trace `attend` in one graph. Between chunks: before the rows
        are read, for pruning, which runs on a stream of its own until the next begin_chunk. Does nothing when no row
        is on its way. Raises RuntimeError when the stream is being captured.
        """
        self._check_process("wait")
        if self._plan is None:
            self._storage.join()
        if self._bank is not None:
            self._bank.wait()

    @ranged("warm_up")
    def warm_up(self, q_weight: torch.Tensor | None = None, k_weight: torch.Tensor | None = None) -> None:
        """Compile, check and choose the kernels of a chunk, before a CUDA graph is captured or a clock runs.

        It runs each op once as the chunks will, over rows that no chunk has yet, which it leaves zero. The weights are
        those that `attend` will be given, in any layer. Synchronises. Raises RuntimeError when the memory is not at its
        start.
        """
        self._check_process("warm_up")
        if self._plan is not None or self._next_chunk:
            raise RuntimeError(f"warm_up: the memory must be new or reset, got one at chunk {self._next_chunk}")
        self._attention.warm_up(q_weight, k_weight)
        if self._process is not None:
            torch.cuda.synchronize(self.device)

    def attend(
        self,
        layer: int,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        q_weight: torch.Tensor | None = None,
        k_weight: torch.Tensor | None = None,
        *,
        branch: int | None = None,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Self-attention of one layer of the current chunk over its window.

        Args:
            layer: 0 .. num_layers - 1. Each pass over the layers overwrites the rows of the pass before.
            q, k, v: [chunk_frames * height * width, heads * head_dim] as the projections give them, of k and v
                kv_heads * head_dim.
            q_weight, k_weight: of the QK-norm, [heads * head_dim] and [kv_heads * head_dim]; None for no norm.
            branch: where the memory has several, whose q, k and v these are, from 0. None for those of all branches
                at once, [branches, tokens, columns], which attend in one launch, behind one of norm_rope_append for
                each branch.
            out: where to write, [tokens, heads, head_dim], of all branches at once [tokens, branches * heads,
                head_dim]; with it, a call allocates nothing but a kernel's scratch (see segment_attention).

        Returns [tokens, heads, head_dim], of all branches at once [branches, tokens, heads, head_dim], whose heads of a
        token lie together, as in `out`. For inference: call it under torch.no_grad() or torch.inference_mode().
        Raises RuntimeError when no chunk is begun, and in a graph capture when rows of the window may be on their way
        (call `wait` before); ValueError or TypeError on another dtype or device than the memory's, and as
        norm_rope_append does. Under WORLDKV_DEBUG=1 ValueError on a NaN or infinity in q, k or v, which would stay in
        the memory for good.
        """
        if self._plan is None:
            raise RuntimeError("attend: a chunk must be begun (begin_chunk), got attend outside one")
        self._check_layer("attend", layer)
        if self._process is not None and not torch.compiler.is_compiling():
            self._check_process("attend")
        attended = self._attention.attend(layer, q, k, v, q_weight, k_weight, branch=branch, out=out)
        for done in range(self.config.branches) if branch is None else (branch,):
            self._layers_done.add((done, layer))
        return attended

    def replayed(self, branch: int | None = None) -> None:
        """Say that a CUDA graph of a pass over all layers was replayed: the rows it wrote are as those of `attend`.

        A chunk may be made of replays alone: begin_chunk, `wait`, the replays, `replayed`, end_chunk. `branch`: whose
        pass it was, None for all of them. Raises RuntimeError when no chunk is begun, ValueError or TypeError on what
        is no branch.
        """
        if self._plan is None:
            raise RuntimeError("replayed: a chunk must be begun (begin_chunk), got a replay outside one")
        if branch is not None:
            self._attention.check_branch("replayed", branch)
        config = self.config
        branches = range(config.branches) if branch is None else (branch,)
        self._layers_done.update(itertools.product(branches, range(config.num_layers)))
        if self._contents is not None:
            self._contents.replayed()

    @ranged("end_chunk")
    def end_chunk(self, *, bank: bool = True, content: object = None) -> None:
        """Make the current chunk history, and prune into the bank the chunk that leaves the recent frames.

        With `bank` False this chunk is attended while it is recent and dropped when it leaves, such as one that has
        drifted. What it has in the sink stays there.

        `content`, where retrieval is by content: what the chunk is to be known by, vectors [vectors, dim], as a rule
        one for each frame, such as its latents averaged over a coarse grid. All chunks of a rollout have one shape of
        it. Where none is given, chunks are known by the means of their keys; or by what was asked for, one vector, if
        chunk 0 was begun with a query. With no recent frames the host waits here for the means, see begin_chunk.

        On a GPU pruning runs on a stream of its own, beside what is queued between here and the next begin_chunk.

        Raises RuntimeError when no chunk is begun, or a layer was never attended, or not by each branch, whose rows
        would be stale, and ValueError when a policy object gives up a chunk that is not in a full bank or is pinned, or
        the content is of another shape than those before, not finite, or given where retrieval is not by content,
        TypeError when what is given up is no chunk number, the content no array, or `bank` neither True nor False; the
        chunk is then still begun.
        When pruning itself fails, it is still begun, to be ended again or dropped; what a full bank gave up is gone.
        """
        self._check_process("end_chunk")
        if self._plan is None:
            raise RuntimeError("end_chunk: a chunk must be begun (begin_chunk), got end_chunk outside one")
        check_bool("end_chunk", "bank", bank)
        config, chunk = self.config, self._plan.chunk
        for branch in range(config.branches):
            missing = [layer for layer in range(config.num_layers) if (branch, layer) not in self._layers_done]
            if missing:
                of_branch = f" of branch {branch}" if config.branches > 1 else ""
                raise RuntimeError(
                    f"end_chunk: chunk {chunk} must attend every layer, got none for layers {missing}{of_branch}"
                )
        made = self._made(content)
        if self._bank is not None:
            self._descriptions[chunk] = made.description
            copied = config.bank_sink and chunk < config.sink_chunks  # to the bank at once
            self._unbanked.discard(chunk)
            if not bank and (copied or chunk >= config.sink_chunks):
                self._unbanked.add(chunk)
            if copied:
                self._to_bank(chunk)
        self._let_go(chunk + 1)
        self._tokens_attended += self._plan.num_tokens
        self._retrieved_total += len(self._plan.retrieved)
        if self.integrator is not None:
            self.integrator.restore(self._view.after_actions)
        if self._received is not None:
            self._received.end(self._plan, self._is_kept)
        self._release()
        self._last_view = made
        self._next_chunk = chunk + 1

    def abort_chunk(self) -> None:
        """Drop the current chunk: the memory is as before its begin_chunk. Does nothing when none is begun.

        What was copied to the device for it stays there, as a cache.
        """
        self._check_process("abort_chunk")
        if self._plan is not None:
            self._descriptions.pop(self._plan.chunk, None)  # of an end_chunk that failed
            self._unbanked.discard(self._plan.chunk)
            self._release()

    # --- from one day to another ---

    def save(self, path: str | Path) -> None:
        """Write the memory to a file, from which `load` makes one that goes on bit for bit as this one would.

        A safetensors file of the chunks' keys and values, each tensor with a SHA-256, and of all else as JSON in its
        metadata: config, policy and its descriptions, counts, integrator. It is written as it is read from the memory,
        without a second copy, beside the file of that name and in its place when complete: whoever is killed meanwhile
        leaves the old one. One save at a time to a path. Waits for the device.

        Raises RuntimeError while a chunk is begun, TypeError where a policy object of one's own describes chunks by
        what is no plain value, array or tensor (or lists, tuples and dictionaries of these), ValueError where `path` is
        a folder, OSError where the system cannot write.
        """
        saved.write("WorldMemory.save", path, saving.KIND, saving.file_tree("save", self))

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        device: torch.device | str = "cpu",
        backend: str | None = None,
        retrieval: RetrievalPolicy | None = None,
        **changes: Any,
    ) -> WorldMemory:
        """The memory that `save` wrote, on any device. Nothing in the file is run or imported.

        Args:
            device, backend: as of a new one. The dtype is the saved one's.
            retrieval: the policy object where one was saved that is not of this package: of a class of that name. Its
                own state is its owner's to bring along. Else None, or one of the same class in place of the saved one,
                which describes chunks alike (ActionRetrieval with the same integrator, FovRetrieval with as many
                samples).
            changes: of `bank`, `bank_chunks`, `device_slots` and `prefetch`, fields of MemoryConfig for where rows lie.
                A bank of "None" chunks, of what fitted, has as many again. More or fewer change only what it drops.

        Which chunks of a bank in host memory are on the device is not saved: what comes first is copied anew, and
        counted so. `bank_bits` cannot be changed: banked chunks are kept as they are packed.

        Raises ValueError, naming the file and what is wrong, on one that is no saved memory, of another version,
        damaged, cut short or that contradicts itself, also where it does not fit the memory that is free or the
        changes; TypeError on changes of other names.
        """
        with saved.Saved("WorldMemory.load", path, saving.KIND) as file:
            options = dict(device=device, backend=backend, retrieval=retrieval, changes=changes)
            memory = saving.new_of(cls, file, file.tree, **options)
            with file.explained():
                saving.restore(memory, file.tree)
        return memory

    def fork(self) -> WorldMemory:
        """Another memory, on the same device, that goes on from here as this one does, each on its own.

        It shares nothing that either writes, and only rows that hold something are copied. A policy object of one's own
        is copied (copy.deepcopy) unless it says that it is `stateless`. Waits for the device. Raises RuntimeError while
        a chunk is begun, ValueError where a second memory does not fit.
        """
        return saving.forked(self)

    # --- between chunks ---

    def pin(self, chunk: int) -> None:
        """Keep a past chunk: a full bank never gives it up, once it is there. Again: does nothing.

        Where all places are taken by pinned chunks, a chunk that leaves the recent frames is given up, pinned or not.
        Of a recent chunk it takes back end_chunk(bank=False) and `forget`. A chunk in the sink stays anyway. May be
        called at any time. Raises ValueError for a chunk that is not past or is dropped, and in a mode without a bank,
        TypeError on what is no integer.
        """
        bank = self._banking("pin")
        chunk, found = self._location("pin", chunk)
        if found == "dropped":
            raise ValueError(f"pin: chunk must still be kept, got {chunk}, which is dropped")
        bank.pinned.add(chunk)
        self._unbanked.discard(chunk)

    def unpin(self, chunk: int) -> None:
        """Let a pinned chunk be as any other. May be called at any time. Raises ValueError for one that is not pinned,
        and in a mode without a bank, TypeError on what is no integer."""
        bank = self._banking("unpin")
        if as_integer("unpin", "chunk", chunk) not in bank.pinned:
            raise ValueError(f"unpin: chunk must be one of the pinned {list(self.pinned)}, got {chunk}")
        bank.pinned.remove(chunk)

    @property
    def pinned(self) -> tuple[int, ...]:
        """The pinned chunks, oldest first; none of them is dropped."""
        return tuple(sorted(self._bank.pinned)) if self._bank is not None else ()

    def forget(self, chunk: int) -> None:
        """Drop a chunk from the bank; one that is still recent is attended as before, and will not be banked.

        It is pinned no more. Raises RuntimeError while a chunk is begun, whose window may be reading it; ValueError for
        a chunk that is not past, in the sink or dropped already, and in a mode without a bank, TypeError on what is no
        integer.
        """
        bank = self._banking("forget")
        chunk, found = self._location("forget", chunk)
        if found in ("sink", "dropped"):
            raise ValueError(f"forget: chunk must be in the bank or recent, got {chunk}, which is {found}")
        self._check_between("forget")
        if found == "bank":
            bank.forget(chunk)
        else:
            bank.pinned.discard(chunk)
            self._unbanked.add(chunk)

    def change(
        self,
        *,
        retrieved_chunks: int | None = None,
        keep_ratio: float | None = None,
        recent_frames: int | None = None,
    ) -> None:
        """Change what the chunks to come attend to and keep, up to what the memory was made with; None: as it is.

        Args:
            retrieved_chunks: from 0 to the configured ones.
            keep_ratio: above 0, up to the configured one: of chunks that will be pruned. Those in the bank stay as they
                were pruned, and the window takes each at its own number of tokens.
            recent_frames: from 0 to the configured ones. With fewer, chunks that are recent no more are banked here at
                once, oldest first, pruned to the new keep_ratio. With more, they fill up as chunks come: what is banked
                stays banked, and can be retrieved.

        `config` then has these values, until `reset`. Storage, window tables and addresses stay, so that a captured
        graph serves on. A field that the mode does not use changes nothing. Raises RuntimeError while a chunk is begun,
        ValueError on a value out of range, TypeError on another type, with the memory as before; and what end_chunk
        raises where a chunk is banked: the config is then as before, but what was banked stays in the bank.
        """
        self._check_between("change")
        before = self.config
        self._configure(
            changed(
                before, self.configured, retrieved_chunks=retrieved_chunks, keep_ratio=keep_ratio,
                recent_frames=recent_frames,
            )
        )  # fmt: skip
        try:
            self._let_go(self._next_chunk)
        except BaseException:
            self._configure(before)
            raise

    # --- what is inside ---

    @property
    def window(self) -> Window:
        """The current window, for the ops themselves, after `wait`; rewritten by begin_chunk, never replaced. With
        `bank_bits` below 16 it is layer 0's, and `attend` alone brings its retrieved rows."""
        return self._attention.window

    def pools(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V pools of a layer, [rows, branches * kv_heads, head_dim], a branch's heads together, and with
        `bank_bits` below 16 what lies behind them."""
        self._check_layer("pools", layer)
        return self._storage.pool.of_layer(layer)

    def received(self) -> dict[int, float]:
        """How much attention past chunks were given while they were in the window, those that are kept, oldest first.

        In even shares: 1 is what the chunk would have if all tokens of the window had the same. A mean over queries,
        heads, branches and `MemoryConfig.mass_layers`, and a running one, to which each adds a fifth, over the windows
        that the chunk was in, but for its own: of each the last pass. A window counts when the chunk after it has
        ended; one whose attention is not finite never. Empty without mass_layers.

        What was not in the window is not in it, nor is a reason: attention goes to what resembles the present, be it
        right or wrong, so that this shows whether retrieved chunks are used, and is no measure of their worth.
        docs/small_world.md has what was measured.
        """
        known = {} if self._received is None else self._received.known.chunks
        return {chunk: known[chunk] for chunk in sorted(known) if self._is_kept(chunk)}

    def location(self, chunk: int) -> str:
        """Where a past chunk is: "sink", "recent", "unattended", "bank" or "dropped"."""
        return self._location("location", chunk)[1]

    def stats(self) -> dict[str, Any]:
        """Counts since the last reset, and bytes: plain numbers, ready for JSON.

        chunks_dropped: by a full bank, by end_chunk(bank=False) once they are recent no more, by `forget`, by the mode.
        Of a bank in host memory, else 0: host_copies_in, host_copies_out: chunks copied to the device and from it,
        host_bytes_in, host_bytes_out: their bytes. host_copies_saved, host_misses: retrieved chunks that were
        on the device (or on their way) when their chunk began, and others, aborted chunks included.
        prefetched: chunks copied ahead, of which prefetch_hits were retrieved later and prefetch_misses given up
        before. host_bytes: of the arena; pinned: 1 if it is page-locked.
        kept_bytes: of what holds the past, banked chunks in their bits; no room that is free, and no copy of it.
        With `mass_layers` also mass_sink, mass_retrieved, mass_recent, mass_current: the shares of attention that went
        there, running means as of `received`; 0 before chunk 1 ends, then together 1.
        """
        roles = None if self._received is None else self._received.known.roles
        return {
            "chunks": self._next_chunk,
            "tokens_attended": self._tokens_attended,
            "chunks_retrieved": self._retrieved_total,
            **self._storage.stats(self._next_chunk, self._first_whole),
            **({} if roles is None else {f"mass_{role}": roles.get(role, 0.0) for role in ROLES}),
        }

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

    def _made(self, content: object) -> View:
        """The view of the chunk that ends. Of a content of keys the description is still to be read, None."""
        if content is not None and not self._views.by_content:
            raise ValueError("end_chunk: content must be None where retrieval is not by content, got one")
        if self._contents is None:
            return self._view
        before, view = self._last_view.description, self._view
        return View(description=self._contents.of_chunk(content, view.description, view.asked, before))

    def _last_content(self) -> np.ndarray | None:
        """Where retrieval is by content, that of the last chunk of history, read now if it was not."""
        last = self._next_chunk - 1
        if self._contents is not None and last >= 0 and self._last_view.description is None:
            self._last_view = View(description=self._contents.read())
            if last in self._descriptions:
                self._descriptions[last] = self._last_view.description
        return self._last_view.description if self._contents is not None else None

    def _check_layer(self, op: str, layer: object) -> None:
        if type(layer) is not int:
            layer = as_integer(op, "layer", layer)
        if not 0 <= layer < self.config.num_layers:
            raise ValueError(f"{op}: layer must be from 0 to {self.config.num_layers - 1}, got {layer}")

    def _check_between(self, op: str) -> None:
        """Raise RuntimeError naming `op` while a chunk is begun, and in another process than a GPU's memory is of."""
        self._check_process(op)
        if self._plan is not None:
            raise RuntimeError(f"{op}: chunk {self._plan.chunk} must be ended or aborted before, got one that is begun")

    def _check_process(self, op: str) -> None:
        if self._process not in (None, os.getpid()):
            raise RuntimeError(
                f"{op}: a memory on a GPU must be used in the process that made it, {self._process}, "
                f"got {os.getpid()}: a forked child has no CUDA"
            )

    def _location(self, op: str, chunk: int) -> tuple[int, str]:
        chunk = as_integer(op, "chunk", chunk)
        if not 0 <= chunk < self._next_chunk:
            last = self._next_chunk - 1
            wanted = f"from 0 to {last}" if last >= 0 else "one that has ended, of which there is none yet"
            raise ValueError(f"{op}: chunk must be {wanted}, got {chunk}")
        found = place(self.config, chunk, self._next_chunk, self._first_whole)
        if found == "left":
            found = "bank" if self._bank is not None and chunk in self._bank else "dropped"
        return chunk, found

    def _is_kept(self, chunk: int) -> bool:
        """Of a past chunk."""
        in_bank = self._bank is not None and chunk in self._bank
        return chunk < self.config.sink_chunks or chunk >= self._first_whole or in_bank

    def _coming(self, begun: int | None, description: Any) -> tuple[int, Any] | None:
        """What will be banked when `begun`, of that description, ends, and its description: the next chunk may retrieve
        it too, so that what is chosen is not one chunk too old; it comes to lie on the device by itself."""
        if begun is None:
            return None
        banked = next(iter(leaving(self.config, begun + 1, self._first_whole)), None)
        if banked is None or banked in self._unbanked or (banked == begun and self._views.by_content):
            return None
        return banked, {**self._descriptions, begun: description}[banked]

    def _prefetch(self, op: str, description: Any, coming: tuple[int, Any] | None) -> tuple[int, ...]:
        config = self.config
        chosen = self._bank.select(op, description, config.retrieved_chunks, first=config.sink_chunks, coming=coming)
        return tuple(self._bank.prefetch([chunk for chunk in chosen if chunk in self._bank]))

    def _let_go(self, next_chunk: int) -> None:
        """Bank, or drop, what is recent no more before `next_chunk`; most often one chunk, or none."""
        for chunk in leaving(self.config, next_chunk, self._first_whole):
            if self._bank is not None:
                self._to_bank(chunk)
            self._first_whole = chunk + 1

    def _to_bank(self, chunk: int) -> None:
        if chunk in self._unbanked:
            self._bank.pass_over(chunk)
            self._unbanked.remove(chunk)
        elif chunk not in self._bank:  # as it would be where an interrupt fell just behind it
            description = self._descriptions[chunk]
            if description is None and self._contents is not None:
                description = self._contents.read()
            self._storage.prune(chunk, description)
        self._descriptions.pop(chunk, None)

    def _configure(self, config: MemoryConfig) -> None:
        self.config = self._storage.config = config

    def _banking(self, op: str) -> Bank:
        if self._bank is None:
            raise ValueError(f"{op}: memory must be of mode 'worldkv', which has a bank, got {self.config.mode!r}")
        return self._bank

    def _release(self) -> None:
        """No chunk is begun any more; the passes queued so far are all that read its window."""
        self._plan = None
        if self._bank is not None:
            self._bank.release()
