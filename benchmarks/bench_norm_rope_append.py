"""norm_rope_append, one launch, against the same in eager PyTorch and under torch.compile.

The rivals have their cosines and sines ready per token, as models cache them. One of them writes into a slice of
the pool, which a compiler can fuse, instead of copying by index; a fixed slice serves one chunk only.

    python benchmarks/bench_norm_rope_append.py [--small] [--jsonl FILE] [--device DEVICE]
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from common import (
    ERROR_LIMITS,
    Problem,
    Variant,
    bench_main,
    dtype_name,
    ours,
    parse_device,
    relative_error,
    run_cases,
    worst,
)
from shapes import DTYPE, HEAD_DIM, HEADS, grid, read_shape
from timing import Run, l2_bytes, sets_for

from worldkv_kernels import Rope3D, norm_rope_append

EPS = 1e-6
START_FRAME = 27  # an absolute frame well inside a rollout
FIRST_ROW = 128


@dataclass(frozen=True)
class AppendCase:
    """A chunk of frames x height x width tokens, as the projections give it."""

    grid: tuple[int, int, int]
    heads: int
    head_dim: int = 128
    dtype: torch.dtype = torch.bfloat16

    @property
    def tokens(self) -> int:
        return math.prod(self.grid)

    def __str__(self) -> str:
        dtype = f", {dtype_name(self.dtype)}" * (self.dtype != torch.bfloat16)
        return f"{self.tokens} tokens x {self.heads} x {self.head_dim}{dtype}"

    @property
    def needed_bytes(self) -> int:
        """What it takes on the device, about: two sets of q, k, v, q turned and the pools, and a check in float64."""
        return self.tokens * self.heads * self.head_dim * (2 * 6 * self.dtype.itemsize + 5 * 8)


CASES = [
    AppendCase((3, 30, 52), heads=40),
    AppendCase((3, 22, 40), heads=12),
    AppendCase((3, 30, 52), heads=40, dtype=torch.float16),
    AppendCase((3, 30, 52), heads=64, head_dim=64),
]
SMALL_CASES = [
    AppendCase((2, 3, 5), heads=2, dtype=torch.float32),
    AppendCase((1, 4, 4), heads=3),
    AppendCase((2, 3, 4), heads=2, head_dim=64, dtype=torch.float16),
]

KEYS = {"heads": HEADS, "head_dim": HEAD_DIM, "grid": grid, "dtype": DTYPE}  # of --shape


def case_of(shape: str) -> AppendCase:
    """The case of a --shape. Raises ValueError that names the key at fault."""
    return AppendCase(**read_shape(shape, KEYS, {"head_dim": 128, "dtype": torch.bfloat16}))


def append_bytes(grid: Sequence[int], heads: int, head_dim: int, itemsize: int, pairs: Sequence[int]) -> int:
    """q, k and v read and written once, two weights, and the fp32 cosines and sines of the positions in the grid."""
    columns = heads * head_dim
    table = sum(positions * of_axis for positions, of_axis in zip(grid, pairs, strict=True)) * 2 * 4
    return 6 * math.prod(grid) * columns * itemsize + 2 * columns * itemsize + table


def positions(grid: Sequence[int], start_frame: int, device: torch.device) -> tuple[torch.Tensor, ...]:
    """Frame, row and column of each token, [tokens] each."""
    frames, height, width = grid
    ranges = ((start_frame, start_frame + frames), (0, height), (0, width))
    axes = (torch.arange(*of_axis, dtype=torch.int64, device=device) for of_axis in ranges)
    return tuple(axis.flatten() for axis in torch.meshgrid(*axes, indexing="ij"))


def token_angles(case: AppendCase, rope: Rope3D, device: torch.device) -> torch.Tensor:
    """Angle of each token's pairs in radians, float64 [tokens, head_dim / 2]."""
    parts = []
    for position, count in zip(positions(case.grid, START_FRAME, device), rope.pairs, strict=True):
        frequency = rope.theta ** (-torch.arange(count, dtype=torch.float64, device=device) / count)
        parts.append(position.double()[:, None] * frequency)
    return torch.cat(parts, dim=1)


def norm_rope(
    x: torch.Tensor, weight: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, wide: torch.dtype
) -> torch.Tensor:
    """RMSNorm over all heads in `wide`, rounded to x's dtype, times the weight, then the rotation in `wide`.

    x [tokens, heads * head_dim], cos and sin [tokens, 1, head_dim / 2] -> [tokens, heads, head_dim] in x's dtype.
    """
    y = x.to(wide)
    y = (y * torch.rsqrt(y.square().mean(dim=-1, keepdim=True) + EPS)).to(x.dtype) * weight
    y = y.to(wide).unflatten(-1, (-1, cos.shape[-1], 2))
    real, imag = y.unbind(-1)
    turned = torch.stack((real * cos - imag * sin, real * sin + imag * cos), dim=-1)
    return turned.flatten(-2).to(x.dtype)


def append_by_index(q, k, v, q_weight, k_weight, cos, sin, k_pool, v_pool, rows):
    """What a model does without the op; k and v go to the pool's `rows`."""
    k_pool.index_copy_(0, rows, norm_rope(k, k_weight, cos, sin, torch.float32))
    v_pool.index_copy_(0, rows, v.unflatten(-1, k_pool.shape[1:]))
    return norm_rope(q, q_weight, cos, sin, torch.float32)


def append_to_slice(q, k, v, q_weight, k_weight, cos, sin, k_rows, v_rows):
    """The same into slices of the pools."""
    k_rows.copy_(norm_rope(k, k_weight, cos, sin, torch.float32))
    v_rows.copy_(v.unflatten(-1, v_rows.shape[1:]))
    return norm_rope(q, q_weight, cos, sin, torch.float32)


def compiled(function: Callable[..., Any], device: torch.device) -> Callable[..., Any]:
    if device.type == "cpu":
        raise RuntimeError("torch.compile is timed on a GPU only")
    return torch.compile(function, fullgraph=True, dynamic=False)


def variants_of(case: AppendCase, device: torch.device) -> dict[str, bool]:
    """The names of a case's variants, and whether each is a rival, without making any."""
    mine = dict.fromkeys(ours("norm_rope_append", device), False)
    return {**mine, **dict.fromkeys(("eager", "compiled", "compiled slice"), True)}


def prepare(case: AppendCase, device: torch.device) -> Problem:
    """Random q, k, v in every input set; pools of NaN with 128 rows before the chunk and 128 after it."""
    columns, tokens = case.heads * case.head_dim, case.tokens
    rope = Rope3D(case.head_dim)
    num_bytes = append_bytes(case.grid, case.heads, case.head_dim, case.dtype.itemsize, rope.pairs)
    sets = sets_for(num_bytes, l2_bytes(device))
    generator = torch.Generator(device=device).manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float32, device=device).to(case.dtype)

    inputs = [tuple(random(tokens, columns) for _ in range(3)) for _ in range(sets)]
    weights = (1 + 0.1 * random(columns), 1 + 0.1 * random(columns))
    pool_shape = (FIRST_ROW + tokens + 128, case.heads, case.head_dim)
    # Two tensors, not two halves of one, which torch.compile would have to treat as aliases.
    pools = [
        [torch.full(pool_shape, float("nan"), dtype=case.dtype, device=device) for _ in range(2)] for _ in range(sets)
    ]
    outs = [torch.empty((tokens, case.heads, case.head_dim), dtype=case.dtype, device=device) for _ in range(sets)]
    written = slice(FIRST_ROW, FIRST_ROW + tokens)
    rows = torch.arange(FIRST_ROW, FIRST_ROW + tokens, dtype=torch.int64, device=device)
    angles = token_angles(case, rope, device)
    cos, sin = angles.cos().float().unsqueeze(1), angles.sin().float().unsqueeze(1)

    def check(run: Run) -> float:
        """Error of q and of the rows written; inf where a row beside them was written too."""
        for poisoned in (*pools[0], outs[0]):
            poisoned.fill_(float("nan"))
        got = run(0)
        for pool in pools[0]:
            if not (pool[:FIRST_ROW].isnan().all() and pool[FIRST_ROW + tokens :].isnan().all()):
                return math.inf
        exact_cos, exact_sin = angles.cos().unsqueeze(1), angles.sin().unsqueeze(1)
        errors = [relative_error(pools[0][1][written], inputs[0][2].unflatten(-1, pool_shape[1:]))]
        for x, weight, result in ((0, weights[0], got), (1, weights[1], pools[0][0][written])):
            want = norm_rope(inputs[0][x].double(), weight.double(), exact_cos, exact_sin, torch.float64)
            errors.append(relative_error(result, want))
        return worst(errors)

    def our_run(backend: str) -> Run:
        return lambda i: norm_rope_append(
            *inputs[i], *pools[i], FIRST_ROW, rope=rope, grid=case.grid, start_frame=START_FRAME,
            q_weight=weights[0], k_weight=weights[1], eps=EPS, out=outs[i], backend=backend,
        )  # fmt: skip

    def by_index(function: Callable[..., Any]) -> Run:
        return lambda i: function(*inputs[i], *weights, cos, sin, *pools[i], rows)

    def to_slice(function: Callable[..., Any]) -> Run:
        return lambda i: function(*inputs[i], *weights, cos, sin, *(pool[written] for pool in pools[i]))

    rivals: dict[str, Callable[[], Run]] = {
        "eager": lambda: by_index(append_by_index),
        "compiled": lambda: by_index(compiled(append_by_index, device)),
        "compiled slice": lambda: to_slice(compiled(append_to_slice, device)),
    }
    limit = ERROR_LIMITS[case.dtype]
    variants = [
        Variant(name, lambda name=name: our_run(name), check, limit, num_bytes)
        for name in ours("norm_rope_append", device)
    ]
    variants += [Variant(name, make, check, limit, num_bytes, rival=True) for name, make in rivals.items()]
    shape = {"heads": case.heads, "tokens": case.tokens, "head_dim": case.head_dim, "dtype": dtype_name(case.dtype)}
    return Problem(str(case), variants, sets=sets, shape=shape)


def run(
    *,
    small: bool = False,
    device: torch.device | None = None,
    seconds: float = 1.0,
    jsonl_path: str | None = None,
    cases: Sequence[AppendCase] | None = None,
    only: Collection[str] | None = None,
) -> list[dict[str, Any]]:
    """Measure the cases and return the figures, as `common.run_cases` does."""
    return run_cases(
        "norm_rope_append", cases or (SMALL_CASES if small else CASES), prepare, device or parse_device(None),
        small=small, seconds=seconds, jsonl_path=jsonl_path, only=only,
    )  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    return bench_main("norm_rope_append", argv)


if __name__ == "__main__":
    sys.exit(main())
