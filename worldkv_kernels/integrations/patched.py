"""A model's own code with its self-attention patched: what the integrations of models of the Wan family share."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..checks import describe
from ..memory.config import MemoryConfig
from ..tracing import untraced
from .chunks import Chunks

ATTENTION = "CausalWanSelfAttention"
_HANDLE = "_worldkv"


class PatchedModel:
    """A model with a memory: what `enable` returns. Patches one instance of the model until `disable`."""

    def __init__(self, op: str, model: nn.Module, signature: inspect.Signature, chunks: Chunks) -> None:
        """`signature` is that of the code behind the model's forward; `op` names the integration in errors."""
        self.memory = chunks.memory
        self._op = op
        self._model = model
        self._chunks = chunks
        self._patch_size = tuple(model.patch_size)
        self._originals: list[tuple[nn.Module, Any]] = []
        for layer, block in enumerate(model.blocks):
            self._replace(block.self_attn, _attention_of(block.self_attn, layer, chunks))
        self._replace(model, self._forward_of(model.forward, signature))
        setattr(model, _HANDLE, self)

    def stats(self) -> dict[str, int]:
        """WorldMemory.stats; a chunk whose clean pass (timestep 0) is done counts, which synchronises."""
        return self._chunks.stats()

    def finish(self) -> None:
        """Make the current chunk history, where no clean pass and no next chunk will tell that it is done."""
        self._chunks.finish()

    def disable(self) -> None:
        """Give the model its own attention back; does nothing the second time. What the memory holds can still be read,
        but not be gone on from."""
        for module, original in self._originals:
            if original is None:
                del module.forward
            else:
                module.forward = original
        if self._originals:
            self._originals = []
            delattr(self._model, _HANDLE)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({'enabled' if self._originals else 'disabled'}, {self.memory!r})"

    def __enter__(self) -> PatchedModel:
        return self

    def __exit__(self, *error: object) -> None:
        self.disable()

    def __reduce_ex__(self, protocol: object) -> Any:
        """A copy of the model takes its forwards along as they are: they would run this one's weights and memory."""
        raise RuntimeError(f"{self._op}: the model must be disabled before it is copied, got one enabled")

    @untraced
    def _check_forward(self, given: dict[str, Any]) -> None:
        """Raise, with the memory as before, on a forward that the memory cannot serve."""
        model, config = self._model, self.memory.config
        if model.training:
            raise RuntimeError(f"{self._op}: the model must be in eval mode, got training mode")
        if torch.is_grad_enabled() and any(parameter.requires_grad for parameter in model.parameters()):
            raise RuntimeError(
                f"{self._op}: forward must run under torch.no_grad() or torch.inference_mode(), got neither"
            )
        x = given["x"]
        if len(x) != 1:
            raise ValueError(f"{self._op}: x must hold one video, since one memory serves one stream, got {len(x)}")
        got = tuple(size // patch for size, patch in zip(x[0].shape[1:], self._patch_size, strict=True))
        wanted = (config.chunk_frames, *config.grid)
        if got != wanted:
            raise ValueError(
                f"{self._op}: x must be of {wanted} frames, rows and columns of tokens, as the config says, got {got}"
            )

    def _check_enabled(self, op: str) -> None:
        if not self._originals:
            raise RuntimeError(f"{self._op}: {op} must be called while the model is enabled, got a call after disable")

    def _replace(self, module: nn.Module, forward: Callable[..., Any]) -> None:
        self._originals.append((module, module.__dict__.get("forward")))
        module.forward = forward

    def _forward_of(self, original: Callable[..., Any], signature: inspect.Signature) -> Callable[..., Any]:
        """The model's forward, with its chunk begun before it."""

        def forward(*args: Any, **kwargs: Any) -> Any:
            given = _by_name(signature, args, kwargs)
            self._check_forward(given)
            caches = given.get("kv_cache")
            stream = caches[0] if caches else None
            with self._chunks.model_pass(given.get("current_start", 0), timestep=given.get("t"), stream=stream):
                for cache in caches or ():
                    _release(cache)
                return original(*args, **kwargs)

        return untraced(forward, recursive=False)  # the original may be compiled, this may not


def disable(op: str, model: nn.Module) -> None:
    """Give a model its own attention back. Raises RuntimeError when it is not enabled."""
    handle = getattr(unwrapped(model), _HANDLE, None)
    if handle is None:
        raise RuntimeError(f"{op}.disable: model must be enabled, got one that is not")
    handle.disable()


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside what torch.compile made of it."""
    return getattr(model, "_orig_mod", model)


def attentions_of(op: str, model: nn.Module, wanted: str) -> list[nn.Module]:
    """The self-attention of each block. Raises TypeError when the model is not of the published class, `wanted`."""
    attentions = [getattr(block, "self_attn", None) for block in getattr(model, "blocks", ())]
    wrong = [type(attention).__name__ for attention in attentions if type(attention).__name__ != ATTENTION]
    if not attentions or wrong or not hasattr(model, "patch_size"):
        got = f"a self_attn of {wrong[0]}" if wrong else type(model).__name__
        raise TypeError(f"{op}: model must be {wanted}, with blocks whose self_attn is a {ATTENTION}, got {got}")
    return attentions


def sizes_of(attentions: list[nn.Module]) -> dict[str, Any]:
    """The fields of a MemoryConfig that the model determines."""
    first = attentions[0]
    return dict(num_layers=len(attentions), num_heads=first.num_heads, head_dim=first.head_dim, eps=first.eps)


def check_free(op: str, model: nn.Module, attentions: list[nn.Module], allowed: tuple[str, ...] = ()) -> None:
    """Raise RuntimeError when the model is enabled, or its attention replaced by what is not named in `allowed`."""
    if getattr(model, _HANDLE, None) is not None:
        raise RuntimeError(f"{op}.enable: model must not be enabled, got one that is: disable it first")
    for layer, attention in enumerate(attentions):
        replaced = attention.__dict__.get("forward")
        name = getattr(replaced, "__name__", repr(replaced))
        if replaced is not None and name not in allowed:
            raise RuntimeError(
                f"{op}.enable: blocks[{layer}].self_attn.forward must be the model's own, got {name} in its place"
            )


def check_sizes(op: str, model: nn.Module, attentions: list[nn.Module], config: MemoryConfig) -> None:
    """Raise TypeError on what is no MemoryConfig, ValueError when its sizes or rope are not the model's."""
    if not isinstance(config, MemoryConfig):
        wanted = f"a MemoryConfig, such as {op}.memory_config makes of the model"
        raise TypeError(f"{op}.enable: config must be {wanted}, got {describe(config)}")
    for field, value in sizes_of(attentions).items():
        got = getattr(config, field)
        if got != value:
            raise ValueError(f"{op}.enable: config's {field} must be the model's {value}, got {got}")
    rope, freqs = config.make_rope(), torch.view_as_real(model.freqs).cpu()
    table = rope.table("cpu") if rope is not None else None
    if table is None or table.shape != freqs.shape or not torch.allclose(table, freqs.float(), atol=1e-5):
        raise ValueError(f"{op}.enable: config's rope must be the model's, {list(freqs.shape[:2])} angles, got {rope}")


def _attention_of(attention: nn.Module, layer: int, chunks: Chunks) -> Callable[..., torch.Tensor]:
    """The forward of one layer's self-attention, x [1, tokens, dim] -> [1, tokens, dim]; the rest is the memory's."""

    def forward(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        q, k, v = attention.q(x)[0], attention.k(x)[0], attention.v(x)[0]
        out = chunks.attend(layer, q, k, v, _weight(attention.norm_q), _weight(attention.norm_k))
        return attention.o(out.flatten(1)[None])

    return forward


def _weight(norm: nn.Module) -> torch.Tensor | None:
    return getattr(norm, "weight", None)  # None of the Identity that stands for no norm


@untraced
def _release(cache: dict[str, Any]) -> None:
    """Free the storage of a published cache; code that would go on from it then fails instead of reading zeros."""
    for name in ("k", "v"):
        tensor = cache.get(name)
        if isinstance(tensor, torch.Tensor) and tensor.shape[1]:
            cache[name] = tensor.new_empty((tensor.shape[0], 0, *tensor.shape[2:]))


@untraced
def _by_name(signature: inspect.Signature, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call by their names, also where the callee takes them as **kwargs."""
    given = dict(signature.bind(*args, **kwargs).arguments)
    for parameter in signature.parameters.values():
        if parameter.kind is parameter.VAR_KEYWORD:
            given.update(given.pop(parameter.name, {}))
    return given
