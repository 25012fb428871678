"""Linear layers in FP8: E4M3 weights with a scale a row, inputs rounded with a scale a token, torch's own product.

As torchao's and vLLM's dynamic row-wise FP8. A weight takes half of bf16's bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import nn

_LARGEST = 448.0  # of E4M3
_LEAST = 2.0**-100  # whose scale has a reciprocal
_FEWEST = 16  # columns and rows of a weight that the kernel takes are multiples of it


class Rounded(NamedTuple):
    """E4M3 `values` and the fp32 `scale` [rows, 1] of each row: their product is about x [rows, columns]."""

    values: torch.Tensor
    scale: torch.Tensor


def quantized(x: torch.Tensor) -> Rounded:
    """A row's largest number is kept exactly, up to the scale's rounding; a row below 2**-100 is zeros with scale 1."""
    largest = x.abs().amax(dim=1, keepdim=True).float()
    scale = torch.where(largest > _LEAST, largest / _LARGEST, 1.0)
    return Rounded((x.float() * scale.reciprocal()).clamp(-_LARGEST, _LARGEST).to(torch.float8_e4m3fn), scale)


class Fp8Linear(nn.Module):
    """nn.Linear with an FP8 weight. Inputs [tokens, in_features] in bf16, or rounded already; result in bf16.

    Args:
        linear: with a bf16 weight, both sides multiples of 16.
        quantize: what rounds inputs that are not, as `quantized` does.
    """

    def __init__(self, linear: nn.Linear, quantize: Callable[[torch.Tensor], Rounded]) -> None:
        super().__init__()
        weight, scale = quantized(linear.weight)
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale.T.contiguous())
        self.bias = linear.bias
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self._quantize = quantize

    def forward(self, x: torch.Tensor | Rounded) -> torch.Tensor:
        values, scale = x if isinstance(x, Rounded) else self._quantize(x)
        return torch._scaled_mm(
            values, self.weight.T, scale_a=scale, scale_b=self.scale, bias=self.bias, out_dtype=torch.bfloat16,
            use_fast_accum=True,
        )  # fmt: skip

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"


def to_fp8(op: str, module: nn.Module, quantize: Callable[[torch.Tensor], Rounded], keep: Sequence[str] = ()) -> int:
    """Replace every bf16 nn.Linear inside `module` whose sides are multiples of 16; returns how many.

    What lies in a child named in `keep` stays. Raises ValueError where the GPU has no such product, or none is bf16.
    """
    linears = [
        (owner, name, child)
        for path, owner in module.named_modules()
        for name, child in owner.named_children()
        if path.partition(".")[0] not in keep
        and isinstance(child, nn.Linear)
        and child.weight.dtype == torch.bfloat16
        and child.in_features % _FEWEST == child.out_features % _FEWEST == 0
    ]
    if not linears:
        raise ValueError(f"{op}: linear layers must be bfloat16 to be made FP8, got none that is")
    device = linears[0][2].weight.device
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (9, 0):
        raise ValueError(f"{op}: FP8 needs compute capability 9.0, got {torch.cuda.get_device_capability(device)}")
    count = len(linears)
    while linears:  # one after the other: the weights take no second room
        owner, name, child = linears.pop()
        setattr(owner, name, Fp8Linear(child, quantize))
    return count
