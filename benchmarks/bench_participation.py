"""participation over a window scattered in its pool, against the same in eager PyTorch over gathered keys.

Beside it the attention that gives its lse, of the same backend: `over_base` is what shares cost more or less than that.
The windows and their order in the pool are those of bench_segment_attention.py.

    python benchmarks/bench_participation.py [--small] [--shape SHAPE] ...

takes what `worldkv bench participation` takes.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Collection, Sequence
from functools import cache
from typing import Any

import torch
from bench_segment_attention import (
    LINGBOT,
    MATRIX_GAME,
    MOST_SCORES,
    AttentionCase,
    Case,
    Inputs,
    ShapeCase,
    attention_flops,
    case_of,
    turned_keys,
    unique_rows,
    window_case,
)
from common import ERROR_LIMITS, Problem, Variant, bench_main, dtype_name, ours, parse_device, relative_error, run_cases
from timing import Run

from worldkv_kernels import participation, segment_attention
from worldkv_kernels.ops.participation import BACKENDS

__all__ = ["CASES", "SMALL_CASES", "case_of", "run", "variants_of"]  # what `worldkv bench` asks for
EXTRAS = ("", "rebase", "weights")  # of the window

CASES: list[Case] = [
    window_case(21, *LINGBOT, pruned=True),  # the default memory: six pruned chunks, 32,760 keys
    AttentionCase(heads=12, q_len=2640, chunk=2640, sink=1, retrieved=13, recent=2),  # 27,720
    window_case(9, *LINGBOT, pruned=True),  # 14,040
    window_case(90, *MATRIX_GAME, pruned=True),  # 79,200
    AttentionCase(heads=80, q_len=4680, chunk=4680, sink=1, retrieved=6, recent=2, head_dim=64),
    AttentionCase(heads=40, q_len=4680, chunk=4680, sink=1, retrieved=6, recent=2, dtype=torch.float16),
    AttentionCase(heads=32, q_len=4680, chunk=4680, sink=1, retrieved=6, recent=2, group_size=4),
]
SMALL_CASES: list[Case] = [
    AttentionCase(heads=2, q_len=150, chunk=150, sink=1, retrieved=3, recent=1, dtype=torch.float32),
    AttentionCase(heads=1, q_len=33, chunk=33, sink=0, retrieved=0, recent=0),
    ShapeCase(heads=4, q_len=60, window=((60, 1), (30, 3)), head_dim=64, dtype=torch.float16, group_size=2),
]


def counts(inputs: Inputs) -> dict[str, int]:
    """One product, of attention's two; q and the K rows once, lse, and what comes out."""
    case = inputs.case
    kv_heads = case.heads // case.group_size
    rows = case.q_len * case.heads + unique_rows(inputs.plain) * kv_heads
    return {
        "num_bytes": rows * case.head_dim * case.dtype.itemsize + 4 * case.heads * (case.q_len + case.num_tokens),
        "flops": attention_flops(case.q_len, case.heads, case.head_dim, case.num_tokens) // 2,
    }


def exact_shares(inputs: Inputs, extra: str) -> torch.Tensor:
    """[heads, tokens], by a softmax over keys that are turned themselves; in fp32 on a GPU and in fp64 on a CPU."""
    wide = torch.float32 if inputs.q.is_cuda else torch.float64
    segments = {"rebase": inputs.shifted, "weights": inputs.weighted}.get(extra, inputs.plain)
    weights = torch.cat([torch.full((s.num_rows,), s.log_weight, dtype=wide, device=inputs.q.device) for s in segments])
    q_len, heads, head_dim = inputs.q.shape
    shares = torch.zeros((heads, len(weights)), dtype=wide, device=inputs.q.device)
    for head in range(heads):
        keys = []
        for first, count, shift, *_ in segments:
            k = inputs.k_pool[first : first + count, head // inputs.case.group_size].to(wide)
            keys.append(turned_keys(k, inputs.rope, shift) if shift else k)
        for q in inputs.q[:, head].split(max(1, MOST_SCORES // len(weights))):
            scores = torch.addmm(weights, q.to(wide), torch.cat(keys).T, alpha=head_dim**-0.5)
            shares[head] += scores.softmax(dim=1).sum(dim=0)
    return shares / q_len


def our_variants(case: Case, device: torch.device) -> list[tuple[str, str]]:
    """Backend and extra of each that runs here and takes the case's numbers."""
    kind = (case.dtype, case.head_dim, 0, False, case.group_size > 1, True)
    backends = [name for name in ours("participation", device) if not BACKENDS.backends[name].unsupported(kind)]
    return [(name, extra) for name in backends for extra in EXTRAS]


def variants_of(case: Case, device: torch.device) -> dict[str, bool]:
    """The names of a case's variants, and whether each is a rival, without making any."""
    mine = our_variants(case, device)
    attention = [f"{backend} attention" for backend in dict.fromkeys(backend for backend, _ in mine)]
    return dict.fromkeys([*attention, *(f"{b} {e}".strip() for b, e in mine)], False) | {"eager": True}


def prepare(case: Case, device: torch.device) -> Problem:
    inputs, limit = Inputs(case, device), ERROR_LIMITS[case.dtype]
    q, k_pool, scale = inputs.q, inputs.k_pool, case.head_dim**-0.5
    out = torch.empty((case.heads, case.num_tokens), dtype=torch.float32, device=device)
    exact = cache(lambda extra: exact_shares(inputs, extra))
    lse_of = cache(lambda extra: inputs.exact(extra)[1].float())

    def attention(backend: str) -> Variant:
        def run(i: int) -> torch.Tensor:
            result = segment_attention(
                q, k_pool, inputs.v_pool, inputs.windows[""], return_lse=True, out=inputs.out, backend=backend
            )
            return result[1]

        def check(run: Run) -> float:
            return relative_error(run(0), inputs.exact("")[1])

        return Variant(f"{backend} attention", lambda: run, check, limit, **inputs.counts(lse=True))

    def our_variant(backend: str, extra: str) -> Variant:
        def run(i: int) -> torch.Tensor:
            return participation(q, k_pool, inputs.windows[extra], lse_of(extra), out=out, backend=backend)

        def check(run: Run) -> float:
            out.fill_(math.nan)
            return relative_error(run(0), exact(extra))

        name = f"{backend} {extra}".strip()
        return Variant(name, lambda: run, check, limit, **counts(inputs), base=f"{backend} attention")

    def eager() -> Run:
        keys = k_pool[inputs.index].repeat_interleave(case.group_size, dim=1).permute(1, 2, 0).contiguous()
        lse = lse_of("")
        step = max(1, MOST_SCORES // (case.heads * case.num_tokens))

        def run(i: int) -> torch.Tensor:
            shares = torch.zeros_like(out)
            for first in range(0, case.q_len, step):
                scores = q[first : first + step].transpose(0, 1) @ keys
                weights = (scores.float() * scale - lse[:, first : first + step, None]).exp()
                shares += weights.sum(dim=1)
            return shares / case.q_len

        return run

    def check_eager(run: Run) -> float:
        return relative_error(run(0), exact(""))

    mine = our_variants(case, device)
    variants = [attention(backend) for backend in dict.fromkeys(backend for backend, _ in mine)]
    variants += [our_variant(*which) for which in mine]
    variants.append(Variant("eager", eager, check_eager, limit, **counts(inputs), rival=True))
    shape = {"heads": case.heads, "queries": case.q_len, "tokens": case.num_tokens, "keys": case.kind}
    shape |= {"head_dim": case.head_dim, "dtype": dtype_name(case.dtype), "kv_heads": case.heads // case.group_size}
    return Problem(str(case), variants, flush=True, shape=shape)


def run(
    *,
    small: bool = False,
    device: torch.device | None = None,
    seconds: float = 1.0,
    jsonl_path: str | None = None,
    cases: Sequence[Case] | None = None,
    only: Collection[str] | None = None,
) -> list[dict[str, Any]]:
    """Measure the cases and return the figures, as `common.run_cases` does."""
    return run_cases(
        "participation", cases or (SMALL_CASES if small else CASES), prepare, device or parse_device(None),
        small=small, seconds=seconds, jsonl_path=jsonl_path, only=only,
    )  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    return bench_main("participation", argv)


if __name__ == "__main__":
    sys.exit(main())
