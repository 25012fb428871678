"""What the integrations find in a model and check before they patch it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields as dataclass_fields
from difflib import get_close_matches
from typing import Any

import torch
from torch import nn

from ..checks import DTYPES, check_backend, describe
from ..memory.config import MemoryConfig
from ..ops.all import EVERY_BACKEND
from .passes import why_not

ATTENTION = "CausalWanSelfAttention"
HANDLE = "_worldkv"  # the attribute of an enabled model that is its handle
_TOKEN_PIXELS = 16
_LONGEST_SIDE = 256  # tokens: 4096 pixels, which none of these models makes


def called(model: nn.Module) -> nn.Module:
    """The module whose forward is to be replaced. What torch.compile made of it would go on with the one it has seen;
    other wrappers copy the caches on their way in."""
    while isinstance(getattr(model, "_orig_mod", None), nn.Module):
        model = model._orig_mod
    return model


def unwrapped(module: nn.Module) -> nn.Module:
    """The module inside what torch.compile, FSDP, DDP or peft made of it, however often; a mode of theirs is not its
    own."""
    while True:
        inner = getattr(module, "_orig_mod", getattr(module, "module", None))
        if not isinstance(inner, nn.Module) and hasattr(module, "get_base_model"):  # adapters in its layers
            inner = module.get_base_model()
        if not isinstance(inner, nn.Module) or inner is module:
            return module
        module = inner


def attentions_of(op: str, model: nn.Module, wanted: str) -> list[nn.Module]:
    """The self-attention of each block. Raises TypeError when the model is not of the published class, `wanted`."""
    blocks = [unwrapped(block) for block in getattr(model, "blocks", ())]
    attentions = [unwrapped(getattr(block, "self_attn", None)) for block in blocks]
    wrong = [type(attention).__name__ for attention in attentions if not _is_attention(attention)]
    if not attentions or wrong or not hasattr(model, "patch_size"):
        got = f"a self_attn of {wrong[0]}" if wrong else type(model).__name__
        raise TypeError(f"{op}: model must be {wanted}, with blocks whose self_attn is a {ATTENTION}, got {got}")
    return attentions


def _is_attention(module: object) -> bool:
    """By its class or a base of it: fully_shard and swapping code derive a class of their own."""
    return any(base.__name__ == ATTENTION for base in type(module).__mro__)


def sizes_of(attentions: list[nn.Module]) -> dict[str, Any]:
    """The fields of a MemoryConfig that the model determines."""
    first = attentions[0]
    heads = dict(num_heads=first.num_heads, num_kv_heads=first.num_heads, head_dim=first.head_dim)
    return dict(num_layers=len(attentions), **heads, eps=first.eps)


def config_for(
    call: str,
    model: nn.Module,
    attentions: list[nn.Module],
    config: MemoryConfig | None,
    make: Callable[..., MemoryConfig],
    *,
    grid: tuple[int, int] | None,
    fields: dict[str, Any],
    dtype: torch.dtype | None,
    backend: str | None,
    graph: bool | None,
    alone: tuple[str, ...] = (),
) -> MemoryConfig:
    """The config of what a call such as enable was given, or what `make`, memory_config, makes of the fields.

    `model` is as the pipeline calls it; `alone` names what may be in its attention's place where there is one device.
    Raises what enable says that holds for any model.
    """
    inner = unwrapped(model)
    _check_free(call, inner, attentions, alone)
    config = _config_of(call, inner, config, grid, fields, make)
    _check_sizes(call, inner, attentions, config, make)
    _check_choices(call, dtype, backend)
    no_graphs = why_not(model, inner)
    if graph and no_graphs:
        raise ValueError(f"{call}: graph must be None or False where {no_graphs}, got True")
    return config


def _config_of(
    call: str,
    model: nn.Module,
    config: MemoryConfig | None,
    grid: tuple[int, int] | None,
    fields: dict[str, Any],
    make: Callable[..., MemoryConfig],
) -> MemoryConfig:
    """What was given, or what `make` makes of the fields; any grid stands for one to be seen.

    Raises TypeError where a config and fields are given, ValueError on a grid that looks like pixels, else as `make`.
    """
    given = ["grid"] * (grid is not None) + list(fields)
    if config is not None and given:
        raise TypeError(f"{call}: {', '.join(given)} must be left out where a config is given, which has its own")
    if config is None:
        names = [field.name for field in dataclass_fields(MemoryConfig)]
        for name in fields:
            if name not in names:
                near = get_close_matches(name, names, n=1)
                such = f", such as {near[0]}" if near else ""
                wanted = f"an argument of {call.rpartition('.')[2]} or a field of MemoryConfig{such}"
                raise TypeError(f"{call}: {name} must be {wanted}, got {describe(fields[name])}")
        config = make(model, grid=(1, 1) if grid is None else grid, **fields)
    if isinstance(config, MemoryConfig) and max(config.grid) > _LONGEST_SIDE:
        pixels = tuple(side // _TOKEN_PIXELS for side in config.grid)
        raise ValueError(
            f"{call}: grid must be (height, width) in tokens of {_TOKEN_PIXELS} x {_TOKEN_PIXELS} pixels, at most "
            f"{_LONGEST_SIDE} each, got {config.grid}: as pixels it would be {pixels}"
        )
    return config


def _check_free(call: str, model: nn.Module, attentions: list[nn.Module], alone: tuple[str, ...]) -> None:
    """Raise RuntimeError when the model is enabled, or its attention replaced by what is not named in `alone`, or
    replaced at all where there are more devices."""
    if getattr(model, HANDLE, None) is not None:
        raise RuntimeError(f"{call}: model must have no memory yet, got one that has: disable that first")
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    devices = torch.distributed.get_world_size() if distributed else 1
    for layer, attention in enumerate(attentions):
        replaced = attention.__dict__.get("forward")
        name = getattr(replaced, "__name__", repr(replaced))
        if replaced is not None and name not in alone:
            raise RuntimeError(
                f"{call}: blocks[{layer}].self_attn.forward must be the model's own, got {name} in its place"
            )
        if replaced is not None and devices > 1:
            raise RuntimeError(
                f"{call}: sequence parallel is supported on 1 device, got {devices}: each would need the memory of its "
                f"own heads. Load the model with use_sp=False, one process a session"
            )


def _check_sizes(
    call: str, model: nn.Module, attentions: list[nn.Module], config: MemoryConfig, make: Callable[..., MemoryConfig]
) -> None:
    """Raise TypeError on what is no MemoryConfig, ValueError when its sizes or rope are not the model's."""
    if not isinstance(config, MemoryConfig):
        wanted = f"a MemoryConfig, such as {make.__module__.rpartition('.')[2]}.memory_config makes of the model"
        raise TypeError(f"{call}: config must be {wanted}, got {describe(config)}")
    for field, value in sizes_of(attentions).items():
        got = getattr(config, field)
        if got != value:
            raise ValueError(f"{call}: config's {field} must be the model's {value}, got {got}")
    rope, freqs = config.make_rope(), torch.view_as_real(model.freqs).cpu()
    table = torch.from_numpy(rope.table(range(len(freqs)))) if rope is not None else None
    if table is None or table.shape != freqs.shape or not torch.allclose(table, freqs.float(), atol=1e-5):
        raise ValueError(f"{call}: config's rope must be the model's, {list(freqs.shape[:2])} angles, got {rope}")


def _check_choices(call: str, dtype: torch.dtype | None, backend: str | None) -> None:
    """Raise what WorldMemory would raise of these in the first forward, but for a backend that its device lacks."""
    if dtype is not None and dtype not in DTYPES:
        raise TypeError(f"{call}: dtype must be bfloat16, float16, float32 or None, got {dtype}")
    check_backend(call, backend)
    if backend is not None and backend not in EVERY_BACKEND:
        raise ValueError(f"{call}: backend must be one of {', '.join(EVERY_BACKEND)}, got {backend!r}")
