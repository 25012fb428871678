"""csrc/attention on the windows of one seed after another: on a CPU by way of cuda_on_host, on a GPU by itself.

The quick part runs every kernel that is compiled. `pytest -m slow` runs 300 random windows.
"""

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib import import_module

import pytest
import torch
from conftest import DEVICE, moved, relative_error

from worldkv_kernels import Rope3D, Segment, Window
from worldkv_kernels.ops import cuda

pytestmark = pytest.mark.usefixtures("attention_kernels")
POISON = (math.nan, math.inf, -math.inf)


@pytest.fixture
def attention_kernels(cuda_kernels):
    reason = DEVICE.type == "cuda" and cuda.attention_unavailable(DEVICE)
    if reason:
        pytest.skip(f"csrc/attention cannot run: {reason}")


@dataclass(frozen=True)
class Case:
    segments: list[Segment]
    dtype: torch.dtype = torch.bfloat16
    head_dim: int = 128
    tile_rows: int = 176
    turned_pairs: int = 0  # of a rope that turns that many with time
    with_lse: bool = True
    with_mass: bool = True
    q_len: int = 130
    heads: int = 2
    kv_heads: int = 2
    processors: int = 3  # fewer than items: pieces follow each other; the last round is cut, where a window is long
    spare: int = 20  # tiles that the window could hold besides
    pad: int = 0  # numbers between rows, and between heads
    growth: float = 0.0  # how many times their size keys grow by along the pool: maxima that go on growing
    seed: int = 0


@dataclass
class Inputs:
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    window: Window


def inputs_of(case: Case) -> Inputs:
    """Pools that hold NaN and infinity in every row that no segment names."""
    generator = torch.Generator().manual_seed(case.seed)
    rows = max(s.first_row + s.num_rows for s in case.segments) + 3

    def random_rows(count: int, heads: int) -> torch.Tensor:
        wide = torch.randn(count, heads, case.head_dim + case.pad, generator=generator).to(case.dtype)
        return wide[..., : case.head_dim]

    q, k, v = random_rows(case.q_len, case.heads), random_rows(rows, case.kv_heads), random_rows(rows, case.kv_heads)
    k *= (1 + case.growth * torch.arange(rows) / rows)[:, None, None].to(case.dtype)
    unused = torch.ones(rows, dtype=torch.bool)
    for segment in case.segments:
        unused[segment.first_row : segment.first_row + segment.num_rows] = False
    for i, pool in enumerate((k, v)):
        for row in unused.nonzero().flatten().tolist():
            pool[row] = POISON[(row + i) % 3]
    rope = None
    if case.turned_pairs:
        rope = Rope3D(case.head_dim, pairs=(case.turned_pairs, case.head_dim // 2 - case.turned_pairs, 0))
    capacity = sum(-(-s.num_rows // 128) for s in case.segments) + case.spare
    weighted = any(s.log_weight for s in case.segments)
    window = Window(case.segments, device=DEVICE, rope=rope, weighted=weighted, capacity=capacity)
    return Inputs(*map(moved, (q, k, v)), window)


def run(case: Case, inputs: Inputs, order: int = 0) -> list[torch.Tensor]:
    """out, lse and mass as asked for, in one order of the threads; nothing beside them is written."""
    getattr(import_module("worldkv_kernels._cuda"), "seed", lambda seed: None)(order)
    storage = torch.full((case.q_len + 2, case.heads, case.head_dim + 2), -77.0, dtype=case.dtype, device=DEVICE)
    out = storage[1:-1, :, : case.head_dim]
    lse = mass = None
    if case.with_lse:
        lse = torch.full((case.heads, case.q_len), math.nan, dtype=torch.float32, device=DEVICE)
    if case.with_mass:
        mass = torch.full((case.heads, len(case.segments)), math.nan, dtype=torch.float32, device=DEVICE)
    cuda.segment_attention(
        inputs.q, inputs.k, inputs.v, *inputs.window.tables, out, lse, mass, scale=case.head_dim**-0.5,
        has_shift=case.turned_pairs > 0, has_weight=inputs.window.has_weight,
        tile_rows=case.tile_rows, processors=case.processors,
    )  # fmt: skip
    result = out.clone()
    out.fill_(-77.0)
    assert (storage == -77.0).all()
    return [x for x in (result, lse, mass) if x is not None]


def turned(k: torch.Tensor, shift: int, pairs: int) -> torch.Tensor:
    """Keys turned forward in time by `shift` frames, in float64."""
    if not pairs:
        return k.double()
    angles = shift * 10000.0 ** (-torch.arange(pairs, dtype=torch.float64) / pairs)
    turning = torch.view_as_complex(k[..., : 2 * pairs].double().unflatten(-1, (pairs, 2)).contiguous())
    now = torch.view_as_real(turning * torch.polar(torch.ones_like(angles), angles)).flatten(-2)
    return torch.cat([now, k[..., 2 * pairs :].double()], dim=-1)


def check(case: Case, orders: tuple[int, ...] = (0,)) -> None:
    """Against float64, the error at most twice that of SDPA in the same dtype; the same bits in any order."""
    inputs = inputs_of(case)
    results = [run(case, inputs, order) for order in orders]
    for other in results[1:]:
        assert all(torch.equal(a.view(torch.int8), b.view(torch.int8)) for a, b in zip(results[0], other, strict=True))
    q, k, v = (x.cpu() for x in (inputs.q, inputs.k, inputs.v))
    pieces = [slice(s.first_row, s.first_row + s.num_rows) for s in case.segments]
    keys = torch.cat(
        [turned(k[p], s.time_shift, case.turned_pairs) for p, s in zip(pieces, case.segments, strict=True)]
    )
    values = torch.cat([v[p] for p in pieces])
    group = case.heads // case.kv_heads
    queries, keys, values = q.transpose(0, 1), *(x.transpose(0, 1).repeat_interleave(group, 0) for x in (keys, values))
    scores = queries.double() @ keys.mT * case.head_dim**-0.5
    lengths = torch.tensor([s.num_rows for s in case.segments])
    logs = torch.tensor([s.log_weight for s in case.segments], dtype=torch.float64)
    scores = scores + logs.repeat_interleave(lengths)
    weights = scores.softmax(-1)
    want = [(weights @ values.double()).transpose(0, 1)]
    if case.with_lse:
        want.append(scores.logsumexp(-1))
    if case.with_mass:
        want.append(torch.stack([part.sum(-1).mean(-1) for part in weights.split(lengths.tolist(), dim=-1)], dim=1))
    heads_first = (x.to(case.dtype).unsqueeze(0) for x in (queries, keys, values))
    mask = logs.repeat_interleave(lengths).to(case.dtype).view(1, 1, 1, -1) if logs.any() else None
    sdpa = torch.nn.functional.scaled_dot_product_attention(*heads_first, attn_mask=mask)[0].transpose(0, 1)
    # A turned query is rounded to its dtype, and the weights with it; lse and mass are in fp32 else.
    limits = [2 * relative_error(sdpa, want[0]), *([3e-3, 3e-3] if case.turned_pairs else [1e-6, 1e-5])]
    limits = [limits[0], *[limits[1]] * case.with_lse, *[limits[2]] * case.with_mass]
    for got, wanted, limit in zip(results[0], want, limits, strict=True):
        assert relative_error(got, wanted) <= limit, (case, relative_error(got, wanted), limit)


SHIFTED = [Segment(300, 741, -3), Segment(0, 1, 200), Segment(40, 180, 7), Segment(2, 3, -200), Segment(100, 128, 7)]
# Head dim, rows of a tile, pairs that turn: what csrc/attention is compiled for.
KERNELS = [
    *((64, tile_rows, pairs) for tile_rows in (128, 176) for pairs in (0, 12)),
    *((128, tile_rows, pairs) for tile_rows in (128, 176) for pairs in (0, 22)),
    (128, 128, 64),
]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("with_mass", [False, True])
@pytest.mark.parametrize(("head_dim", "tile_rows", "turned_pairs"), KERNELS)
def test_every_kernel_matches_float64_in_any_order(head_dim, tile_rows, turned_pairs, with_mass, dtype):
    segments = SHIFTED if turned_pairs else [s._replace(time_shift=0) for s in SHIFTED]
    case = Case(
        segments, dtype, head_dim, tile_rows, turned_pairs, with_lse=not with_mass, with_mass=with_mass,
        heads=2, kv_heads=1 + with_mass, pad=8 * with_mass, growth=6.0,
    )  # fmt: skip
    check(case, orders=(0, 1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("with_mass", [False, True])
@pytest.mark.parametrize(
    ("head_dim", "tile_rows", "turned_pairs"), [(64, 176, 0), (64, 128, 12), (128, 176, 0), (128, 128, 22)]
)
def test_every_kernel_with_weights_matches_float64_in_any_order(head_dim, tile_rows, turned_pairs, with_mass, dtype):
    """Segments that share a tile's walk, a block of tail rows and, in parts of an item, neither."""
    logs = (0.75, -8.0, -0.5, 8.0, 2.0)
    segments = [s._replace(log_weight=w) for s, w in zip(SHIFTED, logs, strict=True)]
    segments = segments if turned_pairs else [s._replace(time_shift=0) for s in segments]
    case = Case(
        segments, dtype, head_dim, tile_rows, turned_pairs, with_lse=not with_mass, with_mass=with_mass,
        heads=2, kv_heads=1 + with_mass, growth=3.0, spare=200,
    )  # fmt: skip
    check(case, orders=(0, 1))


@pytest.mark.parametrize("tile_rows", [128, 176])
@pytest.mark.parametrize("num_rows", [1, 8, 15, 16, 17, 63, 64, 65, 127, 128, 129, 144, 176, 177, 191, 193, 352, 400])
def test_ends_of_segments(num_rows, tile_rows):
    """One segment, and one beside a single row, whose tail rows share a block."""
    check(Case([Segment(3, num_rows)], tile_rows=tile_rows, q_len=1, heads=1, kv_heads=1, with_mass=False))
    check(Case([Segment(3, num_rows), Segment(0, 1)], tile_rows=tile_rows, q_len=1, heads=1, kv_heads=1))


@pytest.mark.parametrize("tile_rows", [128, 176])
@pytest.mark.parametrize("turned_pairs", [0, 22])
def test_more_segments_than_a_warp_holds(turned_pairs, tile_rows):
    """70 segments: the producer turns pages, forth and, for the next piece, back."""
    segments = [Segment(i * 11 % 500, 1 + i * 29 % 190, (i % 9 - 4) * bool(turned_pairs)) for i in range(70)]
    check(Case(segments, tile_rows=tile_rows, turned_pairs=turned_pairs, q_len=20, heads=3, kv_heads=3, processors=2))


@pytest.mark.parametrize("with_mass", [False, True])
def test_parts_of_an_item_are_merged_and_some_have_nothing_to_do(with_mass):
    """One item on 12 processors, in a window whose capacity is far from used."""
    segments = [Segment(0, 300), Segment(300, 77)]
    case = Case(segments, q_len=5, heads=1, kv_heads=1, processors=12, spare=200, with_mass=with_mass)
    check(case, orders=(1, 2, 3))


def check_large_scores(scale: float) -> None:
    """Keys of powers of two times a row's sign: largest scores equal one another, all others far below."""
    generator = torch.Generator().manual_seed(0)
    case = Case([Segment(0, 230), Segment(250, 30)], tile_rows=128, q_len=40, heads=1, kv_heads=1, with_mass=False)
    inputs = inputs_of(case)
    signs = (torch.randint(0, 2, (len(inputs.k), 1, 1), generator=generator) * 2 - 1).to(inputs.k)
    inputs.k.copy_(torch.where(inputs.k.isfinite(), signs * torch.ones_like(inputs.k), inputs.k))
    inputs.q.copy_(torch.full_like(inputs.q, scale))
    out, lse = run(case, inputs)
    rows = [row for s in case.segments for row in range(s.first_row, s.first_row + s.num_rows) if signs[row, 0, 0] > 0]
    want = inputs.v[rows].double().mean(0)
    assert relative_error(out, want.expand(40, 1, 128)) < 3e-3
    assert relative_error(lse, torch.full((1, 40), scale * 128**0.5 + math.log(len(rows)))) < 1e-6


@pytest.mark.parametrize("scale", [2.0**10, 2.0**100])
def test_large_scores_cost_no_digit(scale):
    check_large_scores(scale)


def random_cases(count: int, seed: int) -> Iterator[Case]:
    """Windows of 1 to 30 segments of 1 to 1500 rows, overlapping, in any order, shifted by -200 to 200 frames."""
    draw = random.Random(seed)
    for i in range(count):
        head_dim = draw.choice((64, 128))
        turned_pairs = draw.choice((0, 0, 1, 12, 22, 24, 32) if head_dim == 64 else (0, 0, 0, 1, 22, 24, 25, 64))
        turned_pairs = min(turned_pairs, head_dim // 2)
        most = draw.choice((8, 200, 1500))
        segments = [
            Segment(draw.randrange(3000), draw.randint(1, most), draw.randint(-200, 200) * bool(turned_pairs))
            for _ in range(draw.choice((1, 2, 5, draw.randint(1, 30))))
        ]
        kv_heads, group = draw.choice(((1, 1), (1, 4), (2, 1), (2, 3), (3, 1), (5, 1), (12, 1), (4, 3)))
        yield Case(
            segments, draw.choice((torch.bfloat16, torch.float16)), head_dim,
            128 if head_dim == 128 and turned_pairs > 24 else draw.choice((128, 176)), turned_pairs,
            with_lse=draw.random() < 0.5, with_mass=draw.random() < 0.5,
            q_len=draw.choice((1, 5, 64, 65, 128, 129, 200)), heads=kv_heads * group, kv_heads=kv_heads,
            processors=draw.choice((1, 2, 3, 5, 16)), pad=draw.choice((0, 0, 8, 40)),
            growth=draw.choice((0.0, 3.0, 9.0)), seed=1000 * seed + i,
        )  # fmt: skip


def test_some_random_windows_match_float64():
    for case in random_cases(6, seed=1):
        check(replace(case, heads=case.heads // case.kv_heads, kv_heads=1))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2, 32))
def test_random_windows_match_float64(seed):
    """Ten windows, each in two orders of threads, copies and products."""
    for case in random_cases(10, seed):
        check(case, orders=(seed, seed + 1))
