"""torch.ops.worldkv.norm_rope_append: QK-norm, 3D RoPE and the write into the KV pool."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

from ..checks import (
    MAX_HEADS,
    as_number,
    bad_type,
    bad_value,
    check_apart,
    check_backend,
    check_bool,
    check_heads,
    check_int64,
    check_layout,
    check_tensor,
    is_integer,
    readable,
)
from ..reference.norm_rope_append import norm_rope_append as reference
from ..rope import Rope3D, RopeTable, checked_start
from . import cuda
from .backends import (
    NAMESPACE,
    Backend,
    OpBackends,
    dtype_tolerance,
    exact,
    on_current_device,
    register,
    triton_unavailable,
)

_OP = "norm_rope_append"


def norm_rope_append(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    k_pool: torch.Tensor,
    v_pool: torch.Tensor,
    first_row: int | torch.Tensor,
    *,
    rope: Rope3D | RopeTable | None,
    grid: tuple[int, int, int],
    start_frame: int | None = None,
    q_weight: torch.Tensor | None = None,
    k_weight: torch.Tensor | None = None,
    eps: float = 1e-6,
    round_before_rope: bool = True,
    out: torch.Tensor | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """Normalise and turn q and k, write k and v to the pool rows from `first_row` on, and return q.

    x -> x / sqrt(mean(x^2) + eps) * weight over all heads of q or of k, where a weight is given;
    then pair (2i, 2i + 1) of each head turns by the angle that `rope` gives for the token's frame
    (start_frame + t), row and column, where a rope is given. v is copied.

    Args:
        q, k, v: [tokens, heads * head_dim] of q, [tokens, kv_heads * head_dim] of k and v, as the projections give
            them, bf16, fp16 or fp32, dense in the last dimension; they may be slices of one fused projection.
            tokens = frames * height * width, in that order; head_dim 64 or 128, 1 to 128 heads, which kv_heads divide.
        k_pool, v_pool: [rows, kv_heads, head_dim], dtype and device of q, dense in heads and head_dim, apart from each
            other and from q, k and v.
        first_row: the pool row of the first token, an int or a one-element int64 tensor on q's device, which is read
            when the kernel runs; on a GPU that is checked only under WORLDKV_DEBUG=1.
        rope: None for no rotation; a Rope3D, with `start_frame`; or a RopeTable of q's device and this grid, which is
            read as it is when the kernel runs. With the last and a tensor first_row a captured CUDA graph serves every
            chunk.
        grid: (frames, height, width) in tokens.
        start_frame: the absolute latent frame of the first token, from 0 to 2**31 - frames. None with a RopeTable,
            which has its own.
        q_weight, k_weight: [heads * head_dim] and [kv_heads * head_dim], dtype of q or fp32; None for no norm.
        eps: added to the mean square.
        round_before_rope: round to the input's dtype after the norm, and after the weight where it has
            that dtype, as Wan's qk-norm does; otherwise everything is fp32 up to the last rounding.
        out: where q goes, [tokens, heads, head_dim], dense in heads and head_dim, tokens of any stride, apart from all
            other tensors; allocated when None.
        backend: "reference", "triton", "cuda", or None for the automatic choice.

    Limits: no batch dimension, one session a call; V of K's heads and head_dim; no gradients. Under torch.compile a
    Rope3D that meets a new frame ends the graph; a RopeTable never does.

    Returns q, [tokens, heads, head_dim]. Norm and rotation in fp32, by cosines and sines out of float64. Deterministic.
    Does not synchronise, but where a Rope3D meets a grid and frame that are none of its last few: their table is then
    made, and copied to the device. Raises ValueError or TypeError on a wrong type, shape, dtype, device or stride, on
    an input that wants a gradient, on rows outside the pool, on frames that no position numbers, on pools or an out
    that overlap each other, themselves or q, k or v (from addresses and strides), and on a backend that is unknown or
    unavailable; RuntimeError on a Rope3D whose table would be made inside the capture of a graph.
    torch.ops.worldkv.norm_rope_append, which takes the table, raises the same.
    """
    check_layout(_OP, "k_pool", k_pool, ("rows", "kv_heads", "head_dim"))
    check_heads(_OP, "k_pool", k_pool, "[rows, kv_heads, head_dim]")
    _, kv_heads, head_dim = k_pool.shape
    check_layout(_OP, "q", q, ("tokens", f"heads * {head_dim}"), like=k_pool)
    heads, columns = q.shape[1] // head_dim, kv_heads * head_dim
    for name, x in (("k", k), ("v", v)):
        check_layout(_OP, name, x, ("tokens", columns), like=k_pool)
    check_layout(_OP, "v_pool", v_pool, ("rows", "kv_heads", "head_dim"), like=k_pool)
    for name, weight, numbers in (("q_weight", q_weight, q.shape[1]), ("k_weight", k_weight, columns)):
        if weight is not None:
            check_layout(_OP, name, weight, (numbers,), like=k_pool)
    if not (isinstance(grid, (tuple, list)) and all(map(is_integer, grid))):
        raise bad_type(_OP, "grid", "(frames, height, width) of integers", grid)
    for count in grid:
        check_int64(_OP, "grid", count)
    eps = as_number(_OP, "eps", eps)
    check_bool(_OP, "round_before_rope", round_before_rope)
    check_backend(_OP, backend)
    row = None
    if isinstance(first_row, torch.Tensor):
        check_layout(_OP, "first_row", first_row, (1,), like=k_pool)
        row, first_row = first_row, 0
    else:
        check_int64(_OP, "first_row", first_row)
    _check_grid(grid, q.shape[0])
    table, pairs = _rotations(rope, head_dim, tuple(grid), start_frame, q.device)
    if out is None:
        out = torch.empty((q.shape[0], heads, head_dim), dtype=q.dtype, device=q.device)
    else:
        check_layout(_OP, "out", out, (q.shape[0], heads, head_dim), like=k_pool)
    NAMESPACE.norm_rope_append(
        q, k, v, k_pool, v_pool, out, table, row, first_row, grid, pairs,
        q_weight, k_weight, eps, round_before_rope, backend or "auto",
    )  # fmt: skip
    return out


def _rotations(
    rope: object, head_dim: int, grid: tuple[int, int, int], start_frame: object, device: torch.device
) -> tuple[torch.Tensor | None, tuple[int, int, int]]:
    """The table that a kernel reads, and how many pairs turn with each axis."""
    if rope is None:
        if start_frame is not None:
            check_int64(_OP, "start_frame", start_frame)
        return None, (0, 0, 0)
    if not isinstance(rope, (Rope3D, RopeTable)):
        raise bad_type(_OP, "rope", "a Rope3D, a RopeTable or None", rope)
    angles = rope if isinstance(rope, Rope3D) else rope.rope
    if angles.head_dim != head_dim:
        raise bad_value(_OP, "rope", f"for head_dim {head_dim}", rope)
    if isinstance(rope, Rope3D):
        return rope.chunk_table_on(device, grid, checked_start(_OP, start_frame, grid[0])), rope.pairs
    if start_frame is not None:
        raise bad_value(_OP, "start_frame", "None with a RopeTable, which has its own", start_frame)
    if grid != rope.grid:
        raise bad_value(_OP, "grid", f"the RopeTable's {rope.grid}", grid)
    if device != rope.device:
        raise bad_value(_OP, "rope", f"on {device}", rope)
    return rope.table, angles.pairs


def _run(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, k_pool: torch.Tensor, v_pool: torch.Tensor,
    q_out: torch.Tensor, table: torch.Tensor | None,
    device_first_row: torch.Tensor | None, first_row: int, grid: list[int], pairs: list[int],
    q_weight: torch.Tensor | None, k_weight: torch.Tensor | None,
    eps: float, round_before_rope: bool, backend: str,
) -> None:  # fmt: skip
    _check(
        q, k, v, k_pool, v_pool, q_out, table, device_first_row, first_row, grid, pairs, q_weight, k_weight, eps,
    )  # fmt: skip
    aligned = all(x.data_ptr() % 16 == 0 and x.stride(0) % 8 == 0 for x in (q, k, v, k_pool, v_pool, q_out))
    aligned = aligned and all(w is None or w.data_ptr() % 16 == 0 for w in (q_weight, k_weight))
    weights = (None if w is None else w.dtype for w in (q_weight, k_weight))
    kind = (q.dtype, q_out.shape[1], *k_pool.shape[1:], *weights, table is not None, round_before_rope, aligned)
    run = BACKENDS.choose(backend, q.device, kind)
    with on_current_device(q.device):
        run(
            q, k, v, k_pool, v_pool, q_out, table,
            first_row if device_first_row is None else device_first_row,
            grid=grid, pairs=pairs, q_weight=q_weight, k_weight=k_weight, eps=eps,
            round_before_rope=round_before_rope,
        )  # fmt: skip


def _check(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, k_pool: torch.Tensor, v_pool: torch.Tensor,
    q_out: torch.Tensor, table: torch.Tensor | None,
    device_first_row: torch.Tensor | None, first_row: int, grid: list[int], pairs: list[int],
    q_weight: torch.Tensor | None, k_weight: torch.Tensor | None, eps: float,
) -> None:  # fmt: skip
    """What every call needs, also one of torch.ops.worldkv."""
    check_tensor(_OP, "k_pool", k_pool, ("rows", "kv_heads", "head_dim"), inner=2)
    check_heads(_OP, "k_pool", k_pool, "[rows, kv_heads, head_dim]")
    rows, kv_heads, head_dim = k_pool.shape
    check_tensor(_OP, "q", q, ("tokens", f"heads * {head_dim}"), like=k_pool)
    tokens, columns = q.shape
    heads = columns // head_dim
    if columns % head_dim or not 1 <= heads <= MAX_HEADS or heads % kv_heads:
        wanted = f"[tokens, heads * {head_dim}], heads a multiple of the pools' {kv_heads}, at most {MAX_HEADS}"
        raise bad_value(_OP, "q", wanted, q)
    check_tensor(_OP, "k", k, (tokens, kv_heads * head_dim), like=k_pool)
    check_tensor(_OP, "v", v, (tokens, kv_heads * head_dim), like=k_pool)
    check_tensor(_OP, "v_pool", v_pool, (rows, kv_heads, head_dim), like=k_pool, inner=2)
    check_tensor(_OP, "out", q_out, (tokens, heads, head_dim), like=k_pool, inner=2)
    _check_grid(grid, tokens)
    for name, weight, numbers in (("q_weight", q_weight, columns), ("k_weight", k_weight, kv_heads * head_dim)):
        if weight is not None:
            check_tensor(_OP, name, weight, (numbers,), like=k_pool, dtypes=(k_pool.dtype, torch.float32))
    if not 0 <= eps < math.inf:
        raise bad_value(_OP, "eps", "finite and not negative", eps)
    known = True
    if device_first_row is not None:
        check_tensor(_OP, "first_row", device_first_row, (1,), like=k_pool, dtypes=(torch.int64,))
        known = readable(q)
        first_row = int(device_first_row) if known else 0
    if known and not 0 <= first_row <= rows - tokens:
        wanted = f"from 0 to {rows - tokens} for {tokens} tokens in {rows} rows"
        raise bad_value(_OP, "first_row", wanted, first_row)
    if table is not None:
        shape = ("positions", head_dim // 2, 2)
        check_tensor(_OP, "table", table, shape, like=k_pool, dtypes=(torch.float32,), inner=3)
        positions = table.shape[0]
        if len(pairs) != 3 or min(pairs) < 0 or sum(pairs) != head_dim // 2:
            raise bad_value(_OP, "pairs", f"three counts that add up to {head_dim // 2}", tuple(pairs))
        if max(grid) > positions:
            raise bad_value(_OP, "grid", f"within the table's {positions} positions", tuple(grid))
    check_apart(_OP, {"k_pool": k_pool, "v_pool": v_pool, "out": q_out}, {"q": q, "k": k, "v": v})


def _check_grid(grid: Sequence[int], tokens: int) -> None:
    if len(grid) != 3 or min(grid) < 1 or grid[0] * grid[1] * grid[2] != tokens:
        raise bad_value(_OP, "grid", f"(frames, height, width) of {tokens} tokens in all", tuple(grid))


def _load_triton() -> Callable[..., None]:
    from ..kernels.norm_rope_append import norm_rope_append as launch

    return launch


def _small_case(device: torch.device, kind: tuple) -> Callable[[Callable[..., None]], dict[str, torch.Tensor]]:
    """Two frames of 3 x 5 tokens, into the middle of a NaN pool, of which the rest must stay as it is."""
    dtype, heads, kv_heads, head_dim, q_weight_dtype, k_weight_dtype, has_rope, round_before_rope, _ = kind
    generator = torch.Generator().manual_seed(0)
    fp32 = dict(generator=generator, dtype=torch.float32, device="cpu")
    q, k, v = (torch.randn(30, of * head_dim, **fp32).to(device, dtype) for of in (heads, kv_heads, kv_heads))
    q_weight, k_weight = (
        torch.randn(of * head_dim, **fp32).to(device, weight_dtype) if weight_dtype is not None else None
        for of, weight_dtype in ((heads, q_weight_dtype), (kv_heads, k_weight_dtype))
    )
    rope, grid = Rope3D(head_dim), (2, 3, 5)
    table = torch.from_numpy(rope.chunk_table(grid, 40)).to(device) if has_rope else None

    def call(run: Callable[..., None]) -> dict[str, torch.Tensor]:
        pools = torch.full((2, 40, kv_heads, head_dim), float("nan"), dtype=dtype, device=device)
        q_out = torch.full((30, heads, head_dim), float("nan"), dtype=dtype, device=device)
        run(
            q, k, v, pools[0], pools[1], q_out, table, 5, grid=grid, pairs=rope.pairs if has_rope else (0, 0, 0),
            q_weight=q_weight, k_weight=k_weight, eps=1e-6, round_before_rope=round_before_rope,
        )  # fmt: skip
        untouched = pools.isnan()
        untouched[:, 5:35] = True
        return {"q": q_out, "k": pools[0, 5:35], "v": pools[1, 5:35], "rows beside": untouched}

    return call


BACKENDS = OpBackends(
    op=_OP,
    backends={
        "cuda": Backend(lambda: cuda.norm_rope_append, cuda.unavailable, cuda.append_unsupported),
        "triton": Backend(_load_triton, triton_unavailable),
        "reference": Backend(lambda: exact(reference)),
    },
    small_case=_small_case,
    tolerance=lambda kind: dtype_tolerance(kind[0]),
    kinds=tuple(
        (dtype, heads, kv_heads, head_dim, weight, weight, True, True, True)
        for dtype in (torch.bfloat16, torch.float16)
        for heads, kv_heads, head_dim in ((12, 12, 128), (40, 40, 128), (16, 16, 64), (64, 64, 128), (40, 8, 128))
        for weight in (dtype, torch.float32, None)
    ),
    proven_as=lambda kind: _OP if kind[1] == kind[2] else f"{_OP}, grouped",
)

register(
    "norm_rope_append(Tensor q, Tensor k, Tensor v, Tensor(a!) k_pool, Tensor(b!) v_pool, Tensor(c!) q_out, "
    "Tensor? table, Tensor? device_first_row, SymInt first_row, SymInt[] grid, int[] pairs, Tensor? q_weight, "
    "Tensor? k_weight, float eps, bool round_before_rope, str backend) -> ()",
    _run,
)
