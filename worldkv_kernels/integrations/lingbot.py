"""The memory in LingBot-World-Fast's own code (version 1 and 2, and WorldKV's copy of it): two lines.

    from worldkv_kernels.integrations import lingbot
    lingbot.enable(pipe.model, lingbot.memory_config(pipe.model, grid=(30, 52)), poses=poses)

and the pipeline's own `generate` runs as it is, with the memory in place of its KV cache.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..memory.config import MemoryConfig
from ..memory.world_memory import WorldMemory
from .chunks import Chunks

_OP = "lingbot"
_ATTENTION = "CausalWanSelfAttention"
_SEQUENCE_PARALLEL = "sp_attn_forward_causal"  # what the published code puts in the attention's place
_HANDLE = "_worldkv"


def memory_config(model: nn.Module, *, grid: tuple[int, int], **options: Any) -> MemoryConfig:
    """The MemoryConfig of a model of the published class; `options` are the rest of its fields.

    grid is (height, width) in tokens of one latent frame: the video's height and width over 16. Raises TypeError when
    the model is not of that class, and what MemoryConfig raises.
    """
    attentions = _attentions(_unwrapped(model))
    first = attentions[0]
    sizes = dict(num_layers=len(attentions), num_heads=first.num_heads, head_dim=first.head_dim)
    return MemoryConfig(**sizes, grid=grid, **{"eps": first.eps, **options})


def enable(
    model: nn.Module,
    config: MemoryConfig,
    *,
    poses: object = None,
    intrinsics: object = None,
    dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> LingBotMemory:
    """Put a memory in the place of a model's KV cache. The mode is the config's: "worldkv", "full", "sliding", ...

    The model's forward and that of each `blocks[i].self_attn` are replaced on this instance alone, until `disable`.
    Self-attention then takes the model's q, k, v, o and qk-norm, and rope, cache and attention from the memory. A new
    chunk is recognised by the forward's `current_start`; a forward at 0 with a past starts the rollout anew, with
    the memory reset. See integrations.chunks for what else may come, and what is an error.

    The pipeline's `kv_cache` is not used. A forward replaces the k and v in it by tensors of length 0, so their memory
    is free from the first forward on; a pipeline that can allocate them with length 0 saves the peak, too. Its index
    entries stay as they are. Code that reads chunks out of that cache (WorldKV's `use_retrieval`) finds nothing in
    it, and a `retrieval_kv` is not attended to, with a warning: the memory retrieves. The text's cache is as ever.

    Args:
        model: a WanModelFast, in eval mode, on the device where it will run. One wrapped by torch.compile is unwrapped.
        config: of the model's sizes, see memory_config.
        poses: camera-to-world [n, 4, 4] of the latent frames, OpenCV coordinates, in any unit of length: those that
            the pipeline computes its camera embedding from. Or a callable that gives the [chunk_frames, 4, 4] of a
            chunk number. None where the mode needs none.
        intrinsics: fx, fy, cx, cy in pixels, [4], [n, 4] or a callable; None where retrieval needs none.
        dtype: of the keys and values; None for that of the q projection's weight. Under autocast, autocast's.
        backend: of the ops, see segment_attention.

    Returns a handle: `.memory`, `.stats()`, `.restart(poses)`, `.finish()`, `.disable()`; a context manager that
    disables at its end. Raises before anything is changed: TypeError when the model is not of the published class,
    ValueError when it does not agree with the config or the poses are missing or wrong, RuntimeError when it is enabled
    already, something else has replaced its attention, or it runs in sequence parallel on more than one device.
    """
    model = _unwrapped(model)
    attentions = _attentions(model)
    _check_free(model, attentions)
    _check_sizes(model, attentions, config)
    weight = attentions[0].q.weight
    memory = WorldMemory(config, device=weight.device, dtype=dtype or weight.dtype, backend=backend)
    handle = LingBotMemory(model, attentions, Chunks(_OP, memory, poses, intrinsics))
    setattr(model, _HANDLE, handle)
    return handle


def disable(model: nn.Module) -> None:
    """Give the model its own attention back. Raises RuntimeError when it is not enabled.

    In the middle of a rollout its own code then has no past to go on from, and fails: start a new one.
    """
    model = _unwrapped(model)
    handle = getattr(model, _HANDLE, None)
    if handle is None:
        raise RuntimeError(f"{_OP}.disable: model must be enabled, got one that is not")
    handle.disable()


class LingBotMemory:
    """A model with a memory: what `enable` returns."""

    def __init__(self, model: nn.Module, attentions: list[nn.Module], chunks: Chunks) -> None:
        self.memory = chunks.memory
        self._model = model
        self._chunks = chunks
        self._patch_size = tuple(model.patch_size)
        self._told_of_retrieval = False
        self._originals: list[tuple[nn.Module, Any]] = []
        for layer, attention in enumerate(attentions):
            self._replace(attention, _attention_of(attention, layer, chunks))
        self._replace(model, self._forward_of(model.forward))

    def stats(self) -> dict[str, int]:
        """WorldMemory.stats; a chunk whose clean pass (timestep 0) is done counts, which synchronises."""
        return self._chunks.stats()

    def restart(self, poses: object = None, intrinsics: object = None) -> None:
        """Forget the rollout; the next one goes along these poses, which are as enable's."""
        self._chunks.restart(poses, intrinsics)

    def finish(self) -> None:
        """Make the current chunk history, where no clean pass and no next chunk will tell that it is done."""
        self._chunks.finish()

    def disable(self) -> None:
        """Give the model its own attention back; does nothing the second time."""
        for module, original in self._originals:
            if original is None:
                del module.forward
            else:
                module.forward = original
        if self._originals:
            self._originals = []
            delattr(self._model, _HANDLE)

    def __enter__(self) -> LingBotMemory:
        return self

    def __exit__(self, *error: object) -> None:
        self.disable()

    def _replace(self, module: nn.Module, forward: Callable[..., Any]) -> None:
        self._originals.append((module, module.__dict__.get("forward")))
        module.forward = forward

    def _forward_of(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """The model's forward, with its chunk begun before it."""
        signature = inspect.signature(original)

        @torch.compiler.disable(recursive=False)  # the original may be compiled, this may not
        def forward(*args: Any, **kwargs: Any) -> Any:
            given = _by_name(signature, args, kwargs)
            self._check_forward(given)
            caches = given.get("kv_cache")
            stream = caches[0] if caches else None
            with self._chunks.model_pass(given.get("current_start", 0), timestep=given.get("t"), stream=stream):
                for cache in caches or ():
                    _release(cache)
                return original(*args, **kwargs)

        return forward

    @torch.compiler.disable
    def _check_forward(self, given: dict[str, Any]) -> None:
        """Raise, with the memory as before, on a forward that the memory cannot serve."""
        model, config = self._model, self.memory.config
        if model.training:
            raise RuntimeError(f"{_OP}: the model must be in eval mode, got training mode")
        if torch.is_grad_enabled() and any(parameter.requires_grad for parameter in model.parameters()):
            raise RuntimeError(f"{_OP}: forward must run under torch.no_grad() or torch.inference_mode(), got neither")
        x = given["x"]
        if len(x) != 1:
            raise ValueError(f"{_OP}: x must hold one video, since one memory serves one stream, got {len(x)}")
        got = tuple(size // patch for size, patch in zip(x[0].shape[1:], self._patch_size, strict=True))
        wanted = (config.chunk_frames, *config.grid)
        if got != wanted:
            raise ValueError(
                f"{_OP}: x must be of {wanted} frames, rows and columns of tokens, as the config says, got {got}"
            )
        if given.get("retrieval_kv") is not None and not self._told_of_retrieval:
            self._told_of_retrieval = True
            warnings.warn(
                f"{_OP}: retrieval_kv is not attended to: the memory retrieves in its place. Call generate with "
                f"use_retrieval=False to save its bank.",
                stacklevel=3,
            )


def _attention_of(attention: nn.Module, layer: int, chunks: Chunks) -> Callable[..., torch.Tensor]:
    """The forward of one layer's self-attention, x [1, tokens, dim] -> [1, tokens, dim]; the rest is the memory's."""

    def forward(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        q, k, v = attention.q(x)[0], attention.k(x)[0], attention.v(x)[0]
        out = chunks.attend(layer, q, k, v, _weight(attention.norm_q), _weight(attention.norm_k))
        return attention.o(out.flatten(1)[None])

    return forward


def _weight(norm: nn.Module) -> torch.Tensor | None:
    return getattr(norm, "weight", None)  # None of the Identity that stands for no norm


@torch.compiler.disable
def _release(cache: dict[str, Any]) -> None:
    """Free the storage of a published cache; code that would go on from it then fails instead of reading zeros."""
    for name in ("k", "v"):
        tensor = cache.get(name)
        if isinstance(tensor, torch.Tensor) and tensor.shape[1]:
            cache[name] = tensor.new_empty((tensor.shape[0], 0, *tensor.shape[2:]))


@torch.compiler.disable
def _by_name(signature: inspect.Signature, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call by their names, also where the callee takes them as **kwargs."""
    given = dict(signature.bind(*args, **kwargs).arguments)
    for parameter in signature.parameters.values():
        if parameter.kind is parameter.VAR_KEYWORD:
            given.update(given.pop(parameter.name, {}))
    return given


def _unwrapped(model: nn.Module) -> nn.Module:
    return getattr(model, "_orig_mod", model)  # of torch.compile


def _attentions(model: nn.Module) -> list[nn.Module]:
    attentions = [getattr(block, "self_attn", None) for block in getattr(model, "blocks", ())]
    wrong = [type(attention).__name__ for attention in attentions if type(attention).__name__ != _ATTENTION]
    if not attentions or wrong or not hasattr(model, "patch_size"):
        got = f"a self_attn of {wrong[0]}" if wrong else type(model).__name__
        raise TypeError(
            f"{_OP}: model must be LingBot-World-Fast's WanModelFast (a pipeline's .model), with blocks whose "
            f"self_attn is a {_ATTENTION}, got {got}"
        )
    return attentions


def _check_free(model: nn.Module, attentions: list[nn.Module]) -> None:
    if getattr(model, _HANDLE, None) is not None:
        raise RuntimeError(f"{_OP}.enable: model must not be enabled, got one that is: disable it first")
    for layer, attention in enumerate(attentions):
        replaced = attention.__dict__.get("forward")
        if replaced is None:
            continue
        name = getattr(replaced, "__name__", repr(replaced))
        if name != _SEQUENCE_PARALLEL:
            raise RuntimeError(
                f"{_OP}.enable: blocks[{layer}].self_attn.forward must be the model's own, got {name} in its place"
            )
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            size = torch.distributed.get_world_size()
            if size > 1:
                raise RuntimeError(
                    f"{_OP}.enable: sequence parallel is supported on 1 device, got {size}: each would need the memory "
                    f"of its own heads. Load the model with use_sp=False, one process a session"
                )


def _check_sizes(model: nn.Module, attentions: list[nn.Module], config: MemoryConfig) -> None:
    first = attentions[0]
    found = dict(num_layers=len(attentions), num_heads=first.num_heads, head_dim=first.head_dim, eps=first.eps)
    for field, value in found.items():
        got = getattr(config, field)
        if got != value:
            raise ValueError(f"{_OP}.enable: config's {field} must be the model's {value}, got {got}")
    rope, freqs = config.make_rope(), torch.view_as_real(model.freqs).cpu()
    table = rope.table("cpu") if rope is not None else None
    if table is None or table.shape != freqs.shape or not torch.allclose(table, freqs.float(), atol=1e-5):
        raise ValueError(f"{_OP}.enable: config's rope must be the model's, {list(freqs.shape[:2])} angles, got {rope}")
