"""quantize_chunk and dequantize_chunk in float64, written from the format alone: nothing of the package is imported.

Every operation is one of float64, whose result is then rounded to fp32 or to a smaller type by its own grid of numbers.
"""

from typing import NamedTuple

import numpy as np
import torch


class Grid(NamedTuple):
    """The numbers of a floating-point type: bits of a significand, and the exponents of the normal ones."""

    digits: int
    least: int
    most: int

    @property
    def largest(self):
        return (2 - 2.0 ** (1 - self.digits)) * 2.0**self.most

    def quantum(self, x):
        """How far numbers of this type lie apart around x."""
        exponent = np.frexp(np.abs(x))[1] - 1
        return np.ldexp(1.0, np.maximum(exponent, self.least) - self.digits + 1)

    def nearest(self, x):
        """Of equally near ones the even one; beyond the largest, infinite."""
        with np.errstate(invalid="ignore"):
            rounded = np.where(np.isfinite(x), np.rint(x / self.quantum(x)) * self.quantum(x), x)
        return np.where(np.abs(rounded) > self.largest, np.copysign(np.inf, rounded), rounded)

    def above(self, x):
        """The smallest that is not below x, which is not negative."""
        return np.ceil(x / self.quantum(x)) * self.quantum(x)

    def below(self, x):
        """The largest below x > 0 of this grid."""
        return x - self.quantum(np.nextafter(x, 0))


FP32 = Grid(24, -126, 127)
GRIDS = {torch.bfloat16: Grid(8, -126, 127), torch.float16: Grid(11, -14, 15), torch.float32: FP32}


def scale_of(step, top, low, grid):
    """Of arrays whose step is finite."""
    scale = grid.above(step)
    over = FP32.nearest(FP32.nearest(scale * top) + low) > grid.largest
    return np.where(over, grid.below(scale), scale)


def divided(x, scale):
    """x / scale in fp32, to the nearest integer; 0 where the scale is 0 or infinite."""
    usable = (scale > 0) & np.isfinite(scale)
    ratio = np.divide(x, np.where(usable, scale, 1.0), out=np.zeros_like(x), where=usable & np.isfinite(x))
    return np.rint(FP32.nearest(ratio))


def bytes_of(numbers, dtype):
    return torch.from_numpy(np.array(numbers, dtype=np.float64)).to(dtype).contiguous().view(torch.uint8).flatten()


def eight(x, dtype):
    """The bytes of K or V [tokens, heads, head_dim] in 8 bits, its scales, and what is restored."""
    largest = np.abs(x).max(axis=2)
    finite = np.isfinite(largest)
    step = FP32.nearest(np.where(finite, largest, 0.0) / 127)
    scale = np.where(finite, scale_of(step, 127, 0.0, GRIDS[dtype]), np.inf)
    codes = np.clip(divided(x, np.broadcast_to(scale[..., None], x.shape)), -127, 127) + 0.0
    parts = [torch.from_numpy(codes.astype(np.int8)).view(torch.uint8).flatten(), bytes_of(scale, dtype)]
    parts.append(torch.zeros(-sum(map(len, parts)) % 16, dtype=torch.uint8))
    with np.errstate(invalid="ignore"):
        restored = GRIDS[dtype].nearest(FP32.nearest(codes * scale[..., None]))
    return torch.cat(parts), np.broadcast_to(scale[..., None], x.shape), restored


def four(x, dtype, group_tokens):
    """As `eight`, in 4 bits."""
    scales, minima, restored, codes = [], [], [], []
    for first in range(0, len(x), group_tokens):
        group = x[first : first + group_tokens]
        with np.errstate(invalid="ignore", over="ignore"):
            spread = FP32.nearest(group.max(axis=0) - group.min(axis=0))
        finite = np.isfinite(spread) & np.isfinite(group).all(axis=0)
        low = np.where(finite, group.min(axis=0), 0.0) + 0.0
        step = FP32.nearest(np.where(finite, spread, 0.0) / 15)
        scale = np.where(finite, scale_of(step, 15, low, GRIDS[dtype]), np.inf)
        with np.errstate(invalid="ignore"):
            of_group = np.clip(divided(FP32.nearest(group - low), np.broadcast_to(scale, group.shape)), 0, 15)
            whole = FP32.nearest(FP32.nearest(of_group * scale) + low)
        scales.append(scale)
        minima.append(low)
        codes.append(of_group.astype(np.uint8))
        restored.append(GRIDS[dtype].nearest(whole))
    codes = np.concatenate(codes)
    parts = [torch.from_numpy(codes[..., 0::2] + 16 * codes[..., 1::2]).flatten()]
    parts += [bytes_of(scales, dtype), bytes_of(minima, dtype)]
    assert sum(map(len, parts)) % 16 == 0
    group = np.arange(len(x)) // group_tokens
    return torch.cat(parts), np.stack(scales)[group], np.concatenate(restored)


def plain_quantize(x, bits, group_tokens=64):
    """Of K or V of one layer: the bytes, the scale of every number, and every number restored, in float64."""
    values = x.double().cpu().numpy()
    return eight(values, x.dtype) if bits == 8 else four(values, x.dtype, group_tokens)
