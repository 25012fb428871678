"""Chunks.attend as one op of torch's, for torch.compile: what it writes and where is hidden from the compiler."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable
from typing import Any

import torch

from ..ops.backends import NAMESPACE, register

_NUMBERS = globals().get("_NUMBERS") or itertools.count()  # kept by a reload in place, as the op is
_BY_NUMBER: weakref.WeakValueDictionary[int, Any] = globals().get("_BY_NUMBER", weakref.WeakValueDictionary())


@torch.inference_mode(False)  # the op could not write what was made in it outside of it
def names_for(owner: Any, num_layers: int) -> list[torch.Tensor]:
    """What tells the op whose layer it is, for each layer of what has `_attend`: [2] on the CPU, its number and the
    layer.

    Tensors, since on numbers a compiled block would depend, and be compiled anew for each layer.
    """
    number = next(_NUMBERS)
    _BY_NUMBER[number] = owner
    return [torch.tensor([number, layer], dtype=torch.int64, device="cpu") for layer in range(num_layers)]


def attend_of(owner: Any, names: list[torch.Tensor], layer: int, heads: int) -> Callable[..., torch.Tensor]:
    """`attend` of one layer of an owner: its `_attend`, or where it is traced the op that finds it by `names`."""
    named = names[layer] if type(layer) is int and 0 <= layer < len(names) else None

    def attend(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        q_weight: torch.Tensor | None = None,
        k_weight: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if named is not None and torch.compiler.is_compiling():
            return attend_named(q, k, v, q_weight, k_weight, named, heads)
        return owner._attend(layer, q, k, v, q_weight, k_weight)

    return attend


def _attend_of_named(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, q_weight: torch.Tensor | None, k_weight: torch.Tensor | None,
    named: torch.Tensor, heads: int,
) -> torch.Tensor:  # fmt: skip
    """The owner's `_attend`."""
    number, layer = named.tolist()
    owner = _BY_NUMBER.get(number)
    if owner is None:
        raise RuntimeError("self-attention must run while its model is enabled, got a compiled pass of one that is not")
    return owner._attend(layer, q, k, v, q_weight, k_weight)


def _attended_like(q: torch.Tensor, k: Any, v: Any, q_weight: Any, k_weight: Any, named: Any, heads: int) -> Any:
    tokens, columns = q.shape[-2:]
    return q.new_empty((tokens, *q.shape[:-2], heads, columns // heads)).movedim(0, -3)  # as WorldMemory.attend's


# That it writes `named` is not so, but lets the compiler neither drop a call, nor make one of two, nor change their
# order: of what a call does write, the memory, it sees nothing.
register(
    "attend(Tensor q, Tensor k, Tensor v, Tensor? q_weight, Tensor? k_weight, Tensor(a!) named, int heads) -> Tensor",
    _attend_of_named,
    fake=_attended_like,
    tags=(torch.Tag.cudagraph_unsafe,),  # a graph that does not call the memory is not to be replayed
)
attend_named = NAMESPACE.attend
