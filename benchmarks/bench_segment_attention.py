"""segment_attention over a window scattered in its pool, against PyTorch's attention kernels and other libraries'.

The dense rivals are best cases: they read a window that already lies gathered in one piece; the ones named "gather"
also pay for gathering it, as a cache that is concatenated anew for each call does. Two read the pool where it is. None
of them rebases time, nor returns the softmax weight of each segment.

    python benchmarks/bench_segment_attention.py [--small | --core] [--shape SHAPE] [--rival MODULE:FUNCTION] ...

takes what `worldkv bench segment_attention` takes.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from attention_rivals import RIVALS, Rival
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
from shapes import DTYPE, HEAD_DIM, HEADS, read_shape, runs, whole
from timing import Run
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from worldkv_kernels import Rope3D, Segment, Window, segment_attention
from worldkv_kernels.ops.backends import Backend
from worldkv_kernels.ops.segment_attention import BACKENDS

TILE_ROWS = 128
MOST_SCORES = 2**28  # held at once by the check
EXTRAS = ("rebase", "mass", "lse", "weights")  # what is asked for on top
LOG_WEIGHT = math.log(2)  # of each retrieved segment, with "weights"
# Ours, beside the rivals "sdpa flash", "sdpa cudnn" and so on: it gathers by itself.
NAMES = {"sdpa": "sdpa backend"}


@dataclass(frozen=True)
class AttentionCase:
    """`sink` whole chunks, `retrieved` ones of half a chunk each or, not `pruned`, whole, `recent` whole ones, and the
    current chunk. `chunk` in tokens, of three frames."""

    heads: int
    q_len: int
    chunk: int
    sink: int
    retrieved: int
    recent: int
    pruned: bool = True
    head_dim: int = 128
    dtype: torch.dtype = torch.bfloat16
    group_size: int = 1  # heads of q that share one of K and V

    @property
    def lengths(self) -> list[int]:
        """Tokens of each segment, in window order."""
        retrieved = self.chunk // 2 if self.pruned else self.chunk
        return [self.chunk] * self.sink + [retrieved] * self.retrieved + [self.chunk] * (self.recent + 1)

    @property
    def shifts(self) -> list[int]:
        """Frames by which each segment is moved where time is rebased: the retrieved ones, none of them by zero."""
        return [0] * self.sink + [3 * (7 + i) for i in range(self.retrieved)] + [0] * (self.recent + 1)

    @property
    def num_tokens(self) -> int:
        return sum(self.lengths)

    @property
    def frames(self) -> float:
        """The window's length in frames' worth of tokens; a pruned chunk counts as half."""
        return 3 * self.num_tokens / self.chunk

    @property
    def kind(self) -> str:
        return "pruned" if self.pruned else "whole"

    def __str__(self) -> str:
        return f"{describe(self)}, {self.frames:.3g} frames, {self.kind}{storage(self)}"


@dataclass(frozen=True)
class ShapeCase:
    """A window of one's own: `window` holds the rows of a segment and how many such segments, in window order;
    `group_size` heads of q share one of K and V."""

    heads: int
    q_len: int
    window: tuple[tuple[int, int], ...]
    head_dim: int = 128
    dtype: torch.dtype = torch.bfloat16
    group_size: int = 1

    @property
    def lengths(self) -> list[int]:
        return [rows for rows, number in self.window for _ in range(number)]

    @property
    def shifts(self) -> list[int]:
        """Frames by which each segment is moved where time is rebased: all but the last, the current chunk."""
        return [3 * (7 + i) for i in range(len(self.lengths) - 1)] + [0]

    @property
    def num_tokens(self) -> int:
        return sum(rows * number for rows, number in self.window)

    @property
    def kind(self) -> str:
        return "+".join(f"{rows}x{number}" for rows, number in self.window)

    @property
    def needed_bytes(self) -> int:
        """What it takes on the device, about: the pools, three gathered copies of the window, as if no heads shared
        one, q, what comes out and the float64 that it is held against, and the check's scores, scaled, exponentiated
        and summed."""
        slots = sum(-(-rows // TILE_ROWS) * number + -(-number // 3) for rows, number in self.window) * TILE_ROWS
        columns, tokens, itemsize = self.heads * self.head_dim, self.num_tokens, self.dtype.itemsize
        scores = 4 * 8 * max(tokens, min(self.q_len * tokens, MOST_SCORES))
        return columns * (2 * (slots + 3 * tokens) * itemsize + self.q_len * (4 * itemsize + 2 * 8)) + scores

    def __str__(self) -> str:
        return f"{describe(self)}, window {self.kind}{storage(self)}"


Case = AttentionCase | ShapeCase


def describe(case: Case) -> str:
    shared = f" over {case.heads // case.group_size}" * (case.group_size > 1)
    return f"{case.heads} heads{shared}, {case.q_len} queries, {case.num_tokens} keys"


def storage(case: Case) -> str:
    """What of a case's numbers is not as the models have it."""
    head_dim = f", head_dim {case.head_dim}" * (case.head_dim != 128)
    return head_dim + f", {dtype_name(case.dtype)}" * (case.dtype != torch.bfloat16)


# Of --shape.
KEYS = {"heads": HEADS, "kv_heads": HEADS, "q": whole, "head_dim": HEAD_DIM, "window": runs, "dtype": DTYPE}


def case_of(shape: str) -> ShapeCase:
    """The case of a --shape. Raises ValueError that names the key at fault."""
    values = read_shape(shape, KEYS, {"kv_heads": None, "head_dim": 128, "dtype": torch.bfloat16})
    heads, kv_heads = values["heads"], values["kv_heads"]
    if kv_heads is not None and heads % kv_heads:
        raise ValueError(f"--shape: kv_heads must be a divisor of heads={heads}, got {kv_heads}")
    group_size = heads // (kv_heads or heads)
    return ShapeCase(heads, values["q"], values["window"], values["head_dim"], values["dtype"], group_size)


def window_case(frames: int, frame_tokens: int, heads: int, *, pruned: bool) -> AttentionCase:
    """A window of `frames` frames' worth of tokens, 9 or more in threes: a sink chunk, the current one, two recent ones
    where there is room, and retrieved chunks, two pruned ones in place of one whole."""
    chunks = frames // 3
    recent = 2 if chunks > 4 else 0
    retrieved = (chunks - 2 - recent) * (2 if pruned else 1)
    return AttentionCase(heads, 3 * frame_tokens, 3 * frame_tokens, 1, retrieved, recent, pruned)


MODELS = {"lingbot 480 x 832": (1560, 40), "matrix-game": (880, 12), "lingbot 16:9": (1508, 40)}  # frame tokens, heads
LINGBOT, MATRIX_GAME, LINGBOT_WIDE = MODELS.values()
WINDOWS = (21, 90, 9, 27, 15)  # frames

# What matters most comes first, since a run may be cut short. The core is what benchmarks/device.sh has time for.
CORE_CASES = [
    window_case(21, *LINGBOT, pruned=True),  # the default memory: six pruned chunks, 32,760 keys
    AttentionCase(heads=12, q_len=2640, chunk=2640, sink=1, retrieved=13, recent=2),  # 27,720
    window_case(90, *LINGBOT, pruned=True),  # 140,400, as a full cache
    window_case(21, *LINGBOT, pruned=False),
    window_case(90, *MATRIX_GAME, pruned=True),  # 79,200
    window_case(21, *LINGBOT_WIDE, pruned=True),  # 31,668
    window_case(9, *LINGBOT, pruned=True),  # 14,040
    window_case(15, *MATRIX_GAME, pruned=True),  # 13,200
]
CASES = list(dict.fromkeys([
    *CORE_CASES,
    *(window_case(n, *model, pruned=pruned) for pruned in (True, False) for n in WINDOWS for model in MODELS.values()),
    AttentionCase(heads=40, q_len=4680, chunk=4680, sink=1, retrieved=6, recent=1),  # 28,080, the published window
    AttentionCase(heads=12, q_len=4680, chunk=4680, sink=1, retrieved=6, recent=1),  # 12 heads at 1560 a frame
    AttentionCase(heads=12, q_len=4680, chunk=4680, sink=1, retrieved=52, recent=2),  # 140,400
    AttentionCase(heads=12, q_len=4680, chunk=4680, sink=1, retrieved=2, recent=0),  # 14,040
    AttentionCase(heads=12, q_len=2640, chunk=2640, sink=1, retrieved=98, recent=2),  # 139,920
    AttentionCase(heads=40, q_len=4680, chunk=4680, sink=1, retrieved=6, recent=2, dtype=torch.float16),
    AttentionCase(heads=80, q_len=4680, chunk=4680, sink=1, retrieved=6, recent=2, head_dim=64),  # as wide
    ShapeCase(heads=24, q_len=3600, window=((3600, 1), (1800, 6)), head_dim=64, dtype=torch.float16),
    AttentionCase(heads=32, q_len=4680, chunk=4680, sink=1, retrieved=6, recent=2, group_size=4),
]))  # fmt: skip
SMALL_CASES = [
    AttentionCase(heads=2, q_len=150, chunk=150, sink=1, retrieved=3, recent=1, dtype=torch.float32),
    AttentionCase(heads=2, q_len=150, chunk=150, sink=1, retrieved=9, recent=1, dtype=torch.float32),
    AttentionCase(heads=2, q_len=150, chunk=150, sink=1, retrieved=2, recent=1, pruned=False, dtype=torch.float32),
    AttentionCase(heads=1, q_len=33, chunk=33, sink=0, retrieved=0, recent=0),
    ShapeCase(heads=4, q_len=60, window=((60, 1), (30, 3)), head_dim=64, dtype=torch.float16, group_size=2),
]


def unique_rows(segments: Sequence[Segment]) -> int:
    """Pool rows that the segments name at least once."""
    rows, end = 0, 0
    for first, count, *_ in sorted(segments):
        rows += max(0, first + count - max(first, end))
        end = max(end, first + count)
    return rows


def attention_flops(q_len: int, heads: int, head_dim: int, num_tokens: int) -> int:
    """Two products of q_len x num_tokens x head_dim a head, a multiplication and an addition each."""
    return 4 * q_len * heads * head_dim * num_tokens


def attention_bytes(
    q_len: int, heads: int, head_dim: int, rows: int, itemsize: int, *, kv_heads: int, lse: bool = False,
    mass_segments: int = 0,
) -> int:  # fmt: skip
    """q and out, the K and V rows once however often they are named, and the fp32 extras. The window's tables, a few
    kilobytes, are not counted."""
    rows_of_heads = 2 * q_len * heads + 2 * rows * kv_heads
    return rows_of_heads * head_dim * itemsize + 4 * heads * (q_len * lse + mass_segments)


def scatter(lengths: Sequence[int], shifts: Sequence[int]) -> tuple[list[Segment], int]:
    """Segments of these lengths in slots of a pool, out of order and with unused slots between, and the pool's rows.

    Slots start on multiples of 128. Every third slot is followed by an unused one of 128 rows.
    """
    count = len(lengths)
    step = next(s for s in range(max(1, count // 2), 0, -1) if _coprime(s, count))
    first_rows, row = [0] * count, TILE_ROWS
    for place in range(count):
        i = (place * step + count // 2) % count
        first_rows[i] = row
        row += -(-lengths[i] // TILE_ROWS) * TILE_ROWS + TILE_ROWS * (place % 3 == 2)
    return [Segment(*s) for s in zip(first_rows, lengths, shifts, strict=True)], row


def _coprime(a: int, b: int) -> bool:
    while b:
        a, b = b, a % b
    return a == 1


def turned_keys(k: torch.Tensor, rope: Rope3D, shift: int) -> torch.Tensor:
    """Keys [rows, head_dim], in their wide dtype, moved by `shift` latent frames: the temporal pairs turn."""
    pairs = rope.pairs[0]
    angles = shift * rope.theta ** (-torch.arange(pairs, dtype=torch.float64, device=k.device) / pairs)
    turn = torch.polar(torch.ones_like(angles), angles).to(k.dtype.to_complex())
    temporal = torch.view_as_complex(k[:, : 2 * pairs].unflatten(1, (pairs, 2)).contiguous())
    return torch.cat([torch.view_as_real(temporal * turn).flatten(1), k[:, 2 * pairs :]], dim=1)


def exact_attention(
    q: torch.Tensor, k_pool: torch.Tensor, v_pool: torch.Tensor, segments: Sequence[Segment], rope: Rope3D
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """out [q_len, heads, head_dim], lse [heads, q_len] and mass [heads, segments], turning the keys themselves.

    In fp32 on a GPU and in fp64 on a CPU, at most MOST_SCORES scores at once.
    """
    wide = torch.float32 if q.is_cuda else torch.float64
    q_len, heads, head_dim = q.shape
    lengths = [s.num_rows for s in segments]
    weights = torch.cat([torch.full((s.num_rows,), s.log_weight, dtype=wide, device=q.device) for s in segments])
    out = torch.empty(q.shape, dtype=wide, device=q.device)
    lse = torch.empty((heads, q_len), dtype=wide, device=q.device)
    mass = torch.zeros((heads, len(segments)), dtype=wide, device=q.device)
    step = max(1, MOST_SCORES // sum(lengths))
    for head in range(heads):
        keys, values, kv_head = [], [], head * k_pool.shape[1] // heads
        for first, count, shift, *_ in segments:
            k = k_pool[first : first + count, kv_head].to(wide)
            keys.append(turned_keys(k, rope, shift) if shift else k)
            values.append(v_pool[first : first + count, kv_head].to(wide))
        k, v = torch.cat(keys), torch.cat(values)
        for start in range(0, q_len, step):
            scores = torch.addmm(weights, q[start : start + step, head].to(wide), k.T, alpha=head_dim**-0.5)
            lse[head, start : start + step] = scores.logsumexp(dim=1)
            p = scores.softmax(dim=1)
            out[start : start + step, head] = p @ v
            mass[head] += torch.stack([part.sum() for part in p.split(lengths, dim=1)])
    return out, lse, mass / q_len


class Inputs:
    """A case's q, pools and windows: NaN where the window has no row, random numbers elsewhere."""

    def __init__(self, case: Case, device: torch.device) -> None:
        self.case = case
        self.shifted, rows = scatter(case.lengths, case.shifts)
        self.plain = [segment._replace(time_shift=0) for segment in self.shifted]
        generator = torch.Generator(device=device).manual_seed(0)
        kv_heads = case.heads // case.group_size
        pools = torch.full((2, rows, kv_heads, case.head_dim), float("nan"), dtype=case.dtype, device=device)
        self.k_pool, self.v_pool = pools
        for first, count, *_ in self.plain:
            for pool in pools:
                pool[first : first + count].normal_(generator=generator)
        self.q = torch.empty((case.q_len, case.heads, case.head_dim), dtype=case.dtype, device=device)
        self.q.normal_(generator=generator)
        self.out = torch.empty_like(self.q)
        self.rope = Rope3D(case.head_dim)
        self.weighted = [
            plain._replace(log_weight=LOG_WEIGHT if shifted.time_shift else 0.0)
            for plain, shifted in zip(self.plain, self.shifted, strict=True)
        ]
        plain = Window(self.plain, device=device)
        self.windows = {
            **dict.fromkeys(("", *EXTRAS), plain),
            "rebase": Window(self.shifted, device=device, rope=self.rope),
            "weights": Window(self.weighted, device=device, weighted=True),
        }  # by what is asked for on top
        self.index = torch.cat(
            [torch.arange(first, first + count, dtype=torch.int64, device="cpu") for first, count, *_ in self.plain]
        ).to(device)
        self.exact = cache(self._exact)
        self.gathered = cache(self._gathered)

    def _exact(self, extra: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        segments = {"rebase": self.shifted, "weights": self.weighted}.get(extra, self.plain)
        return exact_attention(self.q, self.k_pool, self.v_pool, segments, self.rope)

    def _gathered(self) -> list[torch.Tensor]:
        """q, K and V as [1, heads, length, head_dim], contiguous."""
        pieces = (self.q, self.k_pool[self.index], self.v_pool[self.index])
        return [x.transpose(0, 1).contiguous().unsqueeze(0) for x in pieces]

    def counts(self, *, lse: bool = False, mass: bool = False) -> dict[str, int]:
        """What a Variant counts."""
        case = self.case
        return {
            "num_bytes": attention_bytes(
                case.q_len, case.heads, case.head_dim, unique_rows(self.plain), case.dtype.itemsize,
                kv_heads=case.heads // case.group_size, lse=lse, mass_segments=len(self.plain) * mass,
            ),
            "flops": attention_flops(case.q_len, case.heads, case.head_dim, case.num_tokens),
        }  # fmt: skip


def our_variants(case: Case, device: torch.device) -> list[tuple[str, str]]:
    """Backend and extra of each that runs here and takes the case's numbers."""
    mine = {name: BACKENDS.backends[name] for name in ours("segment_attention", device)}

    def takes(backend: Backend, extra: str) -> bool:
        extras, grouped = (False, extra == "mass", extra == "weights"), case.group_size > 1
        kind = (case.dtype, case.head_dim, 0, *extras, grouped, True, True)
        return not (backend.unsupported(kind) or backend.unsupported_on(device, kind))

    return [(name, extra) for name, backend in mine.items() for extra in ("", *EXTRAS) if takes(backend, extra)]


def name_of(backend: str, extra: str) -> str:
    return f"{NAMES.get(backend, backend)} {extra}".strip()


def our_variant(inputs: Inputs, backend: str, extra: str) -> Variant:
    """segment_attention by a backend, alone or with one of EXTRAS on top."""
    lse, mass = extra == "lse", extra == "mass"

    def run(i: int) -> Any:
        return segment_attention(
            inputs.q, inputs.k_pool, inputs.v_pool, inputs.windows[extra], return_lse=lse, return_mass=mass,
            out=inputs.out, backend=backend,
        )  # fmt: skip

    def check(run: Run) -> float:
        inputs.out.fill_(float("nan"))
        result = run(0)
        got = result if isinstance(result, tuple) else (result,)
        exact_out, exact_lse, exact_mass = inputs.exact(extra if extra in ("rebase", "weights") else "")
        want = [exact_out, *([exact_lse] if lse else []), *([exact_mass] if mass else [])]
        return worst(relative_error(g, w) for g, w in zip(got, want, strict=True))

    limit = ERROR_LIMITS[inputs.case.dtype]
    counts = inputs.counts(lse=lse, mass=mass)
    base = name_of(backend, "") if extra else None
    return Variant(name_of(backend, extra), lambda: run, check, limit, **counts, base=base)


def _sdpa(inputs: Inputs, kernel: SDPBackend, gather: bool) -> Run:
    """PyTorch's attention by one kernel, on a window that lies gathered or, with `gather`, is gathered in each call."""
    scores = inputs.case.heads * inputs.case.q_len * inputs.case.num_tokens
    if kernel == SDPBackend.MATH and scores > MOST_SCORES:
        raise RuntimeError(f"it would hold {scores} scores at once")
    dense = None if gather else inputs.gathered()
    grouped = inputs.case.group_size > 1

    def run(i: int) -> torch.Tensor:
        with sdpa_kernel(kernel):
            if dense is not None:
                result = scaled_dot_product_attention(*dense, enable_gqa=grouped)
            else:
                pools = (x.index_select(0, inputs.index) for x in (inputs.k_pool, inputs.v_pool))
                of_heads = (x.transpose(0, 1).unsqueeze(0) for x in (inputs.q, *pools))
                result = scaled_dot_product_attention(*of_heads, enable_gqa=grouped)
        return result.squeeze(0).transpose(0, 1)

    return run


def sdpa_kernels(device: torch.device) -> dict[str, SDPBackend]:
    """PyTorch's, by name. The one that holds all scores at once is for a CPU, where the others may be none."""
    kernels = {
        "sdpa cudnn": SDPBackend.CUDNN_ATTENTION,
        "sdpa flash": SDPBackend.FLASH_ATTENTION,
        "sdpa efficient": SDPBackend.EFFICIENT_ATTENTION,
    }
    return {**kernels, "sdpa math": SDPBackend.MATH} if device.type == "cpu" else kernels


def variants_of(case: Case, device: torch.device, own: Collection[str] = ()) -> dict[str, bool]:
    """The names of a case's variants, and whether each is a rival, without making any."""
    mine = [name_of(backend, extra) for backend, extra in our_variants(case, device)]
    sdpa = [f"{name}{gather}" for gather in ("", " gather") for name in sdpa_kernels(device)]
    return dict.fromkeys(mine, False) | dict.fromkeys([*sdpa, *RIVALS, *own], True)


def prepare(case: Case, device: torch.device, own: Mapping[str, Rival] | None = None) -> Problem:
    """Ours, then the rivals, and `own` as the last of them."""
    inputs = Inputs(case, device)
    limit = ERROR_LIMITS[case.dtype]

    given = (inputs.q, inputs.k_pool, inputs.v_pool, inputs.index)
    untouched, spoiled_by = [x._version for x in given], []

    def rival(name: str, make: Callable[[], Run], limit: float) -> Variant:
        def check(run: Run) -> float:
            if spoiled_by:
                raise RuntimeError(f"{spoiled_by[0]} has written to the inputs")
            if not callable(run):
                raise TypeError(f"a rival must return a function run(i), got {run!r:.60}")
            out = run(0)
            if untouched != [x._version for x in given]:
                spoiled_by.append(name)
                raise RuntimeError("it has written to its inputs")
            if getattr(out, "shape", None) != inputs.q.shape:
                got = list(out.shape) if isinstance(out, torch.Tensor) else out
                raise TypeError(f"run must return a tensor {list(inputs.q.shape)}, got {got!r:.60}")
            return relative_error(out, inputs.exact("")[0])

        return Variant(name, make, check, limit, **inputs.counts(), rival=True)

    kernels = sdpa_kernels(device)
    variants = [our_variant(inputs, backend, extra) for backend, extra in our_variants(case, device)]
    variants += [
        rival(f"{name} gather" if gather else name, partial(_sdpa, inputs, kernel, gather), limit)
        for gather in (False, True)
        for name, kernel in kernels.items()
    ]
    variants += [
        rival(name, partial(make, *given), widened or limit)
        for name, (make, widened) in {**RIVALS, **{name: (make, None) for name, make in (own or {}).items()}}.items()
    ]
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
    own: Mapping[str, Rival] | None = None,
) -> list[dict[str, Any]]:
    """Measure the cases and return the figures, as `common.run_cases` does. `own` are more rivals, by name."""
    return run_cases(
        "segment_attention", cases or (SMALL_CASES if small else CASES), partial(prepare, own=own),
        device or parse_device(None), small=small, seconds=seconds, jsonl_path=jsonl_path, only=only,
    )  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    return bench_main("segment_attention", argv)


if __name__ == "__main__":
    sys.exit(main())
