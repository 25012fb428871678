"""A model's own code with its self-attention patched: what the integrations of models of the Wan family share."""

from __future__ import annotations

import inspect
import sys
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..memory.saving import WHERE_ROWS_LIE, differences, is_of_this_package, with_own_policy
from ..memory.world_memory import WorldMemory
from ..tracing import untraced
from . import passes
from .checked import HANDLE, unwrapped
from .chunks import Chunks
from .named import attend_of, names_for
from .session import Session


class PatchedModel:
    """A model with a memory: what `enable` returns. Patches one instance of the model until `disable`.

    The memory is made in the first forward, of that forward's grid, device and dtype. A forward at token 0 of others
    makes it anew: so it follows a model that is moved or cast between two rollouts, and a clip of another size, as far
    as enable was not told which grid and dtype to keep to.
    """

    def __init__(
        self,
        op: str,
        model: nn.Module,
        attentions: list[nn.Module],
        chunks: Chunks,
        *,
        keep_grid: bool,
        dtype: torch.dtype | None,
        backend: str | None,
        graph: bool | None,
        signature: inspect.Signature,
    ) -> None:
        """`model` as the pipeline calls it, perhaps a wrapper, its `attentions`, `chunks` still without a memory.
        `keep_grid`: to that of the chunks' config. `signature` is that of the code behind the model's forward; `op`
        names the integration in errors."""
        self._op = op
        self._model = unwrapped(model)
        self._attentions = attentions
        self._config = with_own_policy(chunks.config)  # that sessions begin with
        self._session = Session(op, self, chunks)  # in place now
        self._sessions = weakref.WeakSet([self._session])
        self._keep_grid, self._dtype, self._backend = keep_grid, dtype, backend
        self._graph, self._signature = graph, signature
        self._may_be_graphs = graph is not False and passes.why_not(model, self._model) is None
        self._patch_size = tuple(self._model.patch_size)
        self._released: list[tuple[weakref.ref[torch.Tensor], torch.Size]] = []
        self._originals: list[tuple[nn.Module, Any]] = []
        names = names_for(self, len(attentions))  # of this handle, whichever session is in place: compiled code stays
        for layer, attention in enumerate(attentions):
            attend = attend_of(self, names, layer, chunks.config.num_heads)
            self._replace(attention, self._attention_of(attention, attend))
        self._replace(model, self._forward_of(model.forward, signature))
        setattr(self._model, HANDLE, self)

    @property
    def memory(self) -> WorldMemory:
        """The memory, inside `with session:` the session's. Raises RuntimeError before the first forward, which makes
        it."""
        return self._session.memory

    def stats(self) -> dict[str, int]:
        """WorldMemory.stats; a chunk whose clean pass (timestep 0) is done counts, which synchronises. Raises
        RuntimeError before the first forward."""
        return self._session.stats()

    @property
    def replayed_passes(self) -> int:
        """Passes that were replays of a CUDA graph, over the present memory; see enable's `graph`."""
        return self._session.replayed_passes

    def finish(self) -> None:
        """Make the current chunk history, where no clean pass and no next chunk will tell that it is done."""
        self._session.finish()

    def session(self, poses: object = None, intrinsics: object = None, *, actions: object = None) -> Session:
        """Another rollout on this model, with a memory of its own of the same config, to take turns with:

            with other: pipe.generate(...)  # its forwards are passes of that rollout

        Args:
            poses, intrinsics, actions: of its latent frames, as enable's.

        Its memory takes as much again, from its first forward until nothing holds the session. Raises RuntimeError once
        disabled, ValueError or TypeError when what retrieval needs is missing or wrong.
        """
        self._check_enabled("session")
        chunks = Chunks(
            self._op, with_own_policy(self._config), poses, intrinsics, actions=self.actions_or_pressed(actions)
        )
        made = Session(self._op, self, chunks)
        self._sessions.add(made)
        return made

    def save(self, path: str | Path) -> None:
        """Session.save, of the rollout in place."""
        self._session.save(path)

    def load(self, path: str | Path, *, device: torch.device | str | None = None) -> None:
        """Session.load, in place of the rollout that is."""
        self._session.load(path, device=device)

    def disable(self) -> None:
        """Give the model its own attention back; does nothing the second time. What the memory holds can still be read,
        but not be gone on from.

        Caches of the model's that the pipeline still holds get their k and v back, at their length and full of NaN: a
        new rollout writes each row before it reads it, and one that is gone on with shows that its past is not there.
        """
        if not self._originals:
            return
        for module, original in self._originals:
            if original is None:
                del module.forward
            else:
                module.forward = original
        self._originals = []
        delattr(self._model, HANDLE)
        for released, shape in self._released:
            tensor = released()
            if tensor is not None and not tensor.numel():
                tensor.resize_(shape).fill_(torch.nan)
        self._released = []
        for session in self._sessions:
            session.forget_passes()
            session.chunks.check_used()

    # --- for its sessions ---

    @property
    def enabled(self) -> bool:
        return bool(self._originals)

    def has_in_place(self, session: Session) -> bool:
        return self._session is session

    def put(self, session: Session) -> Session:
        """Put a session in place; returns the one that was. RuntimeError inside a pass."""
        if self._chunks.inside:
            raise RuntimeError(f"{self._op}: sessions must change between passes, got a change inside one")
        before, self._session = self._session, session
        return before

    def load_into(self, session: Session, path: str | Path, device: torch.device | str | None) -> None:
        """What Session.load does."""
        if session.chunks.inside:
            raise RuntimeError(f"{self._op}: load must be called between passes, got a call inside one")
        config = session.chunks.config
        places = {name: getattr(config, name) for name in WHERE_ROWS_LIE}
        if config.bank_chunks is None:
            del places["bank_chunks"]
        own = None if is_of_this_package(config.retrieval) else config.retrieval
        device = self._attentions[0].q.weight.device if device is None else device
        memory = WorldMemory.load(path, device=device, backend=self._backend, retrieval=own, **places)
        anew = () if self._keep_grid else ("grid",)
        differ = differences(memory.configured, config, but=(*WHERE_ROWS_LIE, *anew))
        if self._dtype not in (None, memory.dtype):
            differ.append(("dtype", memory.dtype, self._dtype))
        if differ:
            name, kept, wanted = differ[0]
            raise ValueError(
                f"{self._op}.load: {path} must be of {name}={wanted}, as the model was given it, got {kept}"
            )
        self._check_graphs(memory.device)
        session.forget_passes()
        session.chunks.go_on(memory)
        self._give_graphs(session)

    def actions_or_pressed(self, actions: object) -> object:
        """A rollout's actions, where none are given those that the forwards show, if they do."""
        return actions

    # --- parts of the above ---

    @property
    def _chunks(self) -> Chunks:
        return self._session.chunks

    def _attend(self, *arguments: Any) -> torch.Tensor:
        return self._session.chunks._attend(*arguments)

    def __repr__(self) -> str:
        memory = self._chunks.memory or "no memory before the first forward"
        return f"{type(self).__name__}({'enabled' if self._originals else 'disabled'}, {memory})"

    def __enter__(self) -> PatchedModel:
        return self

    def __exit__(self, *error: object) -> None:
        self.disable()

    def __reduce_ex__(self, protocol: object) -> Any:
        """A copy of the model takes its forwards along as they are: they would run this one's weights and memory."""
        raise RuntimeError(
            f"{self._op}: the model must give up its memory before it is copied, by disable, got one that has it"
        )

    @untraced
    def _check_forward(self, given: dict[str, Any]) -> None:
        """Raise, with the memory as before, on a forward that the memory cannot serve."""
        model, config = self._model, self._chunks.config
        if model.training:
            raise RuntimeError(f"{self._op}: the model must be in eval mode, got training mode")
        if torch.is_grad_enabled() and any(parameter.requires_grad for parameter in model.parameters()):
            raise RuntimeError(
                f"{self._op}: forward must run under torch.no_grad() or torch.inference_mode(), got neither"
            )
        x = given["x"]
        if len(x) not in (1, config.branches):
            raise ValueError(
                f"{self._op}: x must hold one video, or one for each of the config's branches={config.branches}, "
                f"got {len(x)}"
            )
        got = tuple(size // patch for size, patch in zip(x[0].shape[1:], self._patch_size, strict=True))
        starts = int(given.get("current_start") or 0) == 0
        grid = config.grid if self._keep_grid or (self._chunks.memory is not None and not starts) else got[1:]
        wanted = (config.chunk_frames, *grid)
        if got != wanted:
            raise ValueError(
                f"{self._op}: x must be of {wanted} frames, rows and columns of tokens, as the config says or the "
                f"rollout began, got {got}"
            )
        self._follow(grid, x[0].device, starts)

    def _follow(self, grid: tuple[int, int], device: torch.device, starts: bool) -> None:
        """Make the memory where there is none of this grid and device, and of the dtype that q will have."""
        dtype, memory = self._dtype, self._chunks.memory
        if dtype is None and torch.is_autocast_enabled(device.type):
            dtype = torch.get_autocast_dtype(device.type)
        elif dtype is None:
            dtype = self._attentions[0].q.weight.dtype
        if memory is not None and (grid, device, dtype) == (memory.config.grid, memory.device, memory.dtype):
            return
        if memory is not None and not starts:
            raise RuntimeError(
                f"{self._op}: the model must stay on {memory.device} in {memory.dtype} for all of a rollout, where its "
                f"memory is, got {device} and {dtype}"
            )
        self._check_graphs(device)
        self._session.forget_passes()
        memory = None  # and with the next line the room of the one before is free, before the new one needs it
        self._chunks.take(None)
        config = replace(self._chunks.config, grid=grid)
        self._chunks.take(WorldMemory(config, device=device, dtype=dtype, backend=self._backend))
        self._give_graphs(self._session)

    def _check_graphs(self, device: torch.device) -> None:
        no_graphs = passes.why_not_on(device)
        if self._graph and no_graphs:
            raise ValueError(f"{self._op}: graph must be None or False where {no_graphs}, got True")

    def _give_graphs(self, session: Session) -> None:
        """Over its memory, where there are graphs."""
        if self._may_be_graphs and passes.why_not_on(session.memory.device) is None:
            insists = bool(self._graph)
            session.passes = passes.Passes(self._op, self._model, session.chunks, self._signature, insists=insists)

    @untraced
    def _give_up_graphs(self) -> None:
        given_up, self._session.passes = self._session.passes, None
        given_up.give_up(passes.COMPILED)

    def _check_enabled(self, op: str) -> None:
        if not self._originals:
            raise RuntimeError(
                f"{self._op}: {op} must be called while the model has its memory, got a call after disable"
            )

    @untraced
    @torch.inference_mode(False)  # what is made in inference mode could not be resized outside of it
    def _release(self, cache: dict[str, Any]) -> None:
        """Free the storage of a published cache, until `disable`."""
        for name in ("k", "v"):
            tensor = cache.get(name)
            if isinstance(tensor, torch.Tensor) and tensor.shape[1]:
                cache[name] = emptied = tensor.new_empty((tensor.shape[0], 0, *tensor.shape[2:]))
                # Not the cache itself: a pipeline that makes new ones for each rollout has dropped it.
                self._released = [pair for pair in self._released if pair[0]() is not None]
                self._released.append((weakref.ref(emptied), tensor.shape))

    def _attention_of(self, attention: nn.Module, attend: Callable[..., torch.Tensor]) -> Callable[..., Any]:
        """The forward of one layer's self-attention, x [1 or branches, tokens, dim] -> as much."""

        def forward(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            q, k, v = attention.q(x), attention.k(x), attention.v(x)
            if x.shape[0] == 1:
                q, k, v = q[0], k[0], v[0]
            out = attend(q, k, v, _weight(attention.norm_q), _weight(attention.norm_k))
            return attention.o(out.flatten(-2) if out.dim() == 4 else out.flatten(-2)[None])

        return forward

    def _replace(self, module: nn.Module, forward: Callable[..., Any]) -> None:
        self._originals.append((module, module.__dict__.get("forward")))
        module.forward = forward

    def _forward_of(self, original: Callable[..., Any], signature: inspect.Signature) -> Callable[..., Any]:
        """The model's forward, with its chunk begun before it."""

        def forward(*args: Any, **kwargs: Any) -> Any:
            given = _by_name(signature, args, kwargs)
            self._check_forward(given)
            compiles = "torch._dynamo" in sys.modules and torch._C._dynamo.eval_frame.get_eval_frame_callback()
            if self._session.passes is not None and compiles:
                self._give_up_graphs()
            caches = given.get("kv_cache")
            stream = caches[0] if caches else None
            with self._chunks.model_pass(given.get("current_start", 0), timestep=given.get("t"), stream=stream):
                for cache in caches or ():
                    self._release(cache)
                if self._session.passes is None:
                    return original(*args, **kwargs)
                return self._session.passes.run(original, args, kwargs, self._chunks.current)

        return untraced(forward, recursive=False)  # the original may be compiled, this may not


def disable(call: str, model: nn.Module) -> None:
    """Give a model its own attention back. Raises RuntimeError when it is not enabled; `call` names what was called."""
    handle = getattr(unwrapped(model), HANDLE, None)
    if handle is None:
        raise RuntimeError(f"{call}: model must have a memory, got one that has none")
    handle.disable()


def _weight(norm: nn.Module) -> torch.Tensor | None:
    return getattr(norm, "weight", None)  # None of the Identity that stands for no norm


@untraced
def _by_name(signature: inspect.Signature, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call by their names, also where the callee takes them as **kwargs."""
    given = dict(signature.bind(*args, **kwargs).arguments)
    for parameter in signature.parameters.values():
        if parameter.kind is parameter.VAR_KEYWORD:
            given.update(given.pop(parameter.name, {}))
    return given
