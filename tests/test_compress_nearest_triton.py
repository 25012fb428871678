"""compress_chunk by rule "nearest" and its merge, in Triton: against the contract as a plain loop, and a reference."""

import math

import pytest
import torch
from conftest import DEVICE, relative_error

from worldkv_kernels import compress_chunk
from worldkv_kernels.ops.compress_chunk import BACKENDS, kept_per_frame

pytest.importorskip("triton", reason="triton is not installed")
from worldkv_kernels.kernels import compress_chunk as kernel
from worldkv_kernels.kernels.compress_chunk import NearestConfig, nearest_config

pytestmark = pytest.mark.skipif(
    BACKENDS.backends["triton"].unavailable(DEVICE) is not None, reason="Triton cannot run on this machine"
)
# The interpreter multiplies no bf16 matrices.
HALF = torch.bfloat16 if DEVICE.type == "cuda" else torch.float16
# A norm of the difference: the products are exact to fp32, the last rounding is to the dtype.
ROUNDING = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
APART = 1e-5  # of two cosines that fp32 cannot confuse
SMALL_TILES = NearestConfig(16, 32, 32, num_warps=4, num_stages=1)


def order_of(frames, frame_tokens, anchor):
    """The chunk's tokens, the anchor frame first."""
    return [f * frame_tokens + i for f in sorted(range(frames), key=lambda f: f != anchor) for i in range(frame_tokens)]


def plain(k, v, *, frames, keep_ratio, pooled=True, anchor=0, rule="nearest", merge_above=0.95, scale=None):
    """The contract, token by token, for one layer on the CPU: index, count, k and v, and how far apart the cosines are.

    Cosines in float64, sums of v in fp32 in the order of the contract.
    """
    tokens, heads, head_dim = k.shape
    frame_tokens = tokens // frames
    order = order_of(frames, frame_tokens, anchor)
    keys = k.double().flatten(1)[order]
    norms = keys.norm(dim=1)
    comparable = keys.float().square().sum(1).sqrt().isfinite().tolist()
    unit = keys / (norms + 1e-8)[:, None]
    cosine = (unit @ unit.T).tolist()
    mean = keys[:frame_tokens].mean(0)
    to_mean = (keys @ mean / (norms * mean.norm() + 1e-8)).nan_to_num(nan=math.inf).tolist()
    gaps, near, similarity = [math.inf], {}, {}
    for t in range(frame_tokens, tokens):
        earlier = [u for u in range(t // frame_tokens * frame_tokens) if comparable[u]] if comparable[t] else []
        near[t] = max(earlier, key=lambda u: (cosine[t][u], -u), default=None)
        gaps += [cosine[t][near[t]] - cosine[t][u] for u in earlier if u != near[t]]
        similarity[t] = (cosine[t][near[t]] if earlier else -math.inf) if comparable[t] else math.inf
        if rule == "similarity":
            similarity[t] = to_mean[t]

    keep = kept_per_frame(frame_tokens, keep_ratio)
    groups = [range(f * frame_tokens, (f + 1) * frame_tokens) for f in range(1, frames)]
    if pooled:
        groups = [range(frame_tokens, tokens)]
    kept = set(range(frame_tokens))
    for group in groups:
        budget = keep * len(group) // frame_tokens
        ranked = sorted(group, key=lambda t: (similarity[t], t))
        kept |= set(ranked[:budget])
        if 0 < budget < len(ranked):
            gaps.append(similarity[ranked[budget]] - similarity[ranked[budget - 1]])

    rows = sorted(kept)
    joined, averaged = {r: 1 for r in rows}, {r: [r] for r in rows}
    for t in range(frame_tokens, tokens):
        root = t
        while root is not None and root not in kept:
            root = near[root]
        if t not in kept and root is not None:
            joined[root] += 1
            gaps.append(abs(cosine[t][root] - merge_above))
            if cosine[t][root] >= merge_above:
                averaged[root].append(t)
    scale = head_dim**-0.5 if scale is None else scale
    out_k, out_v = k[[order[r] for r in rows]].clone(), v[[order[r] for r in rows]].clone()
    for i, r in enumerate(rows):
        if joined[r] == 1:
            continue
        members = k[[order[t] for t in averaged[r]]].double()
        square = members.square().sum(-1).mean(0)[:, None]  # [heads, 1]
        m = members.mean(0)
        direction = m / m.norm(dim=1, keepdim=True) * square.sqrt() if len(members) > 1 else m
        stretch = 1 + (math.log(joined[r]) / (0.8 * scale * square)).clamp_max(1)
        out_k[i] = (direction.nan_to_num(nan=0.0) * stretch).nan_to_num(nan=0.0).to(k.dtype)
        if len(members) > 1:
            total = torch.zeros(heads, head_dim)
            for t in averaged[r]:
                total = total + v[order[t]].float()
            out_v[i] = (total / len(members)).to(v.dtype)
    index = torch.tensor([order[r] for r in rows], dtype=torch.int32)
    count = torch.tensor([joined[r] for r in rows], dtype=torch.int32)
    return index, count, out_k, out_v, min(gap for gap in gaps if gap > 0)  # equal keys tie in any arithmetic


def chunk(frames, frame_tokens, heads, head_dim, dtype, *, layers=(), seed=0, spread=0.5):
    """K and V of tokens that are noisy repeats of half as many: cosines of about .8 to others, or none like them."""
    generator = torch.Generator().manual_seed(seed)
    shape = (*layers, frames * frame_tokens)
    like = torch.randint(frame_tokens // 2 + 1, shape, generator=generator)
    k = torch.randn(frame_tokens // 2 + 1, heads, head_dim, generator=generator)[like]
    k = k + spread * torch.randn(k.shape, generator=generator) * torch.rand(*shape, 1, 1, generator=generator)
    return k.to(dtype), torch.randn(k.shape, generator=generator).to(dtype)


def triton(k, v, **options):
    got = compress_chunk(k.to(DEVICE), v.to(DEVICE), backend="triton", **options)
    return type(got)(*(None if x is None else x.cpu() for x in got))


def assert_as_plain(got, k, v, **options):
    merge = options.pop("merge", True)
    index, count, want_k, want_v, gap = plain(k, v, **options)
    assert gap > APART, "another seed, which rounding does not decide"
    assert got.index.tolist() == index.tolist()
    if not merge:
        assert got.count is None
        assert torch.equal(got.k, k[index.long()]) and torch.equal(got.v, v[index.long()])
        return
    assert got.count.tolist() == count.tolist()
    alone = count == 1
    assert torch.equal(got.k[alone], want_k[alone]) and torch.equal(got.v, want_v)
    assert relative_error(got.k, want_k) <= ROUNDING[k.dtype]


CASES = [  # frames, frame_tokens, heads, head_dim, ratio, pooled, anchor, rule
    (1, 6, 2, 64, 0.5, True, 0, "nearest"),
    (2, 9, 1, 128, 0.3, True, 0, "nearest"),
    (2, 9, 3, 64, 0.3, False, 1, "nearest"),
    (3, 12, 2, 64, 0.25, True, 0, "nearest"),
    (3, 12, 2, 128, 0.25, False, 1, "nearest"),
    (3, 12, 1, 64, 0.75, True, 2, "nearest"),
    (3, 12, 2, 64, 0.25, True, 1, "similarity"),
    (3, 12, 2, 64, 0.1, False, 0, "similarity"),
    (3, 1, 2, 64, 0.5, True, 1, "nearest"),
    (3, 5, 2, 64, 1.0, True, 1, "nearest"),
    (4, 11, 5, 64, 0.1, True, 2, "nearest"),
    (4, 11, 2, 128, 0.34, False, 1, "nearest"),
    (4, 8, 33, 64, 0.25, True, 1, "nearest"),  # more heads than a program of the merge takes
    (4, 8, 17, 128, 0.25, False, 0, "nearest"),
]


@pytest.mark.parametrize("dtype", [torch.float32, HALF])
@pytest.mark.parametrize("merge", [True, False])
@pytest.mark.parametrize(("frames", "frame_tokens", "heads", "head_dim", "ratio", "pooled", "anchor", "rule"), CASES)
def test_as_a_plain_loop(frames, frame_tokens, heads, head_dim, ratio, pooled, anchor, rule, merge, dtype):
    k, v = chunk(frames, frame_tokens, heads, head_dim, dtype, seed=frames + anchor)
    options = dict(frames=frames, keep_ratio=ratio, pooled=pooled, anchor=anchor, rule=rule, merge=merge)
    got = triton(k, v, merge_above=0.7, **options)
    assert_as_plain(got, k, v, merge_above=0.7, **options)
    if merge and frames > 1 and ratio < 1 and frame_tokens > 1:
        assert (got.count > 2).any()
    reference = compress_chunk(k, v, merge_above=0.7, backend="reference", **options)
    for have, want in zip(got[2:], reference[2:], strict=True):
        assert (have is want is None) or torch.equal(have, want)
    assert relative_error(got.k, reference.k) <= ROUNDING[dtype]
    assert relative_error(got.v, reference.v) <= ROUNDING[dtype]


@pytest.mark.parametrize("anchor", [0, 1])
def test_many_tiles_which_frames_do_not_divide(monkeypatch, anchor):
    """Tiles of 16 candidates by 32 positions over frames of 21: most of them hold two frames, some no earlier pair, and
    write nothing: what memory holds before must not matter."""
    monkeypatch.setattr(kernel, "nearest_config", lambda *_: SMALL_TILES)
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *sizes, **options: empty(*sizes, **options).fill_(1000))
    k, v = chunk(4, 21, 2, 64, torch.float32, seed=anchor)
    options = dict(frames=4, keep_ratio=0.25, anchor=anchor, merge_above=0.7)
    assert_as_plain(triton(k, v, **options), k, v, **options)


def test_more_tokens_than_a_tile_of_the_shipped_configuration():
    k, v = chunk(3, 129, 1, 64, HALF, seed=6)
    options = dict(frames=3, keep_ratio=0.2, anchor=1)
    assert nearest_config((9, 0), HALF).block_earlier < 2 * 129
    assert_as_plain(triton(k, v, **options), k, v, **options)


def test_layers_of_a_pool_beside_nan_with_sentinels():
    """Rows of a pool into rows of another. What is beside them is NaN: it is not read, and not written."""
    k, v = chunk(3, 10, 2, 64, torch.float32, layers=(3,), seed=3)
    pools = torch.full((2, 3, 90, 2, 64), math.nan)
    pools[:, :, 7:37] = torch.stack([k, v])
    pools = pools.to(DEVICE)
    kept = 10 + 2 * 3
    before = pools.clone()
    index, count = torch.full((2, 3 * kept + 2), -7, dtype=torch.int32, device=DEVICE)
    options = dict(frames=3, keep_ratio=0.3, anchor=1, merge_above=0.7)
    got = compress_chunk(
        *pools[:, :, 7:37], out_k=pools[0, :, 50 : 50 + kept], out_v=pools[1, :, 50 : 50 + kept],
        out_index=index[1:-1].view(3, kept), out_count=count[1:-1].view(3, kept), backend="triton", **options,
    )  # fmt: skip
    assert index[0] == index[-1] == count[0] == count[-1] == -7
    for layer in range(3):
        alone = triton(k[layer], v[layer], **options)
        assert_as_plain(alone, k[layer], v[layer], **options)
        for have, want in zip(got, alone, strict=True):
            assert torch.equal(have[layer].cpu(), want)
    before[:, :, 50 : 50 + kept] = pools[:, :, 50 : 50 + kept]
    assert torch.equal(pools.view(torch.int32), before.view(torch.int32))


def keys_of_integers(*numbers):
    """A key for each number: 0 to 63 for unit vectors, of which cosines are 0 or 1 in any arithmetic."""
    return torch.eye(64)[list(numbers)].view(-1, 1, 64)


@pytest.mark.parametrize("tiles", [None, SMALL_TILES])
def test_equal_cosines_go_to_the_earlier_in_the_order_that_the_anchor_leads(monkeypatch, tiles):
    """The anchor is the second of three frames of 20: its tokens come before those of the first."""
    if tiles:
        monkeypatch.setattr(kernel, "nearest_config", lambda *_: tiles)
    first, anchor, last = list(range(20, 40)), list(range(20)), list(range(40, 60))
    anchor[3] = anchor[17] = anchor[19] = 2  # as anchor[2]
    first[5] = first[7] = first[18] = 2  # equal to four tokens of the anchor: they join the earliest
    first[9] = first[8]  # equal to none of the anchor; not to one another's frame
    last[0] = last[1] = 2  # equal to seven: they join the anchor's
    last[4] = first[8]  # equal to two of the first frame
    last[6], last[7] = first[1], first[0]
    k = keys_of_integers(*first, *anchor, *last)
    v = torch.arange(60.0).view(-1, 1, 1).expand(60, 1, 64).contiguous()
    got = triton(k, v, frames=3, keep_ratio=0.8, anchor=1)
    # 32 of 40 are kept. Dropped, of cosine 1: three of the first, five of the last frame.
    dropped = {5, 7, 18, 40, 41, 44, 46, 47}
    assert got.index.tolist() == [*range(20, 40), *(t for t in range(60) if t not in {*range(20, 40), *dropped})]
    count = dict(zip(got.index.tolist(), got.count.tolist(), strict=True))
    assert {t: n for t, n in count.items() if n > 1} == {22: 6, 8: 2, 1: 2, 0: 2}
    value = dict(zip(got.index.tolist(), got.v[:, 0, 0].tolist(), strict=True))
    assert value[22] == torch.tensor((22.0 + 5 + 7 + 18 + 40 + 41) / 6).item()
    assert (value[8], value[1], value[0], value[9]) == (26.0, 23.5, 23.5, 9.0)


@pytest.mark.parametrize("anchor", [0, 1, 2])
def test_equal_similarities_keep_the_earlier_token(anchor):
    """All keys are equal: the earliest of the others are kept, and every dropped one joins the anchor's first."""
    k = keys_of_integers(*[7] * 24)
    got = triton(k, k + 1, frames=3, keep_ratio=0.5, anchor=anchor)
    order = order_of(3, 8, anchor)
    assert got.index.tolist() == [*order[:8], *order[8:16]]
    assert got.count.tolist() == [9, *[1] * 15]
    got = triton(k, k + 1, frames=3, keep_ratio=0.25, pooled=False, anchor=anchor)
    assert got.index.tolist() == [*order[:8], *order[8:10], *order[16:18]]


def test_a_token_of_its_own_frame_is_no_neighbour():
    """Pairs of equal keys within each frame, of which no other frame has any: nothing is alike."""
    k = keys_of_integers(*(n // 2 for n in range(24)))
    got = triton(k, k, frames=3, keep_ratio=0.5, merge_above=0.5)
    assert got.index.tolist() == [*range(8), *range(8, 16)]
    assert got.count.tolist() == [9, *[1] * 15]  # cosines of 0, all of them equal: counted, not averaged in
    assert torch.equal(got.v, k[:16]) and torch.equal(got.k[1:], k[1:16])
    assert relative_error(got.k[0], k[0] * 2) <= 1e-6  # log 9 is more than the limit


def test_chains_over_frames_end_at_the_anchor():
    """Each of five frames turns three keys by .3 further: a token is nearest to its own of the frame before, and joins
    the anchor's by way of all of them. The fourth is like no other, and is kept."""
    frames, frame_tokens = 6, 4
    k = torch.zeros(frames, frame_tokens, 1, 64)
    for f in range(frames):
        for i in range(3):
            k[f, i, 0, 2 * i], k[f, i, 0, 2 * i + 1] = math.cos(0.3 * f), math.sin(0.3 * f)
        k[f, 3, 0, 10 + f] = 1.0
    k = k.flatten(0, 1)
    v = torch.randn(k.shape, generator=torch.Generator().manual_seed(0))
    options = dict(frames=frames, keep_ratio=0.25, merge_above=math.cos(0.7))
    got = triton(k, v, **options)
    assert got.index.tolist() == [0, 1, 2, *range(3, 24, 4)]
    assert got.count.tolist() == [6, 6, 6, *[1] * 6]
    assert torch.equal(got.v[0], (v[0] + v[4] + v[8]) / 3)  # turned by .9 and more: no longer alike
    assert relative_error(got.k[0, 0], k[4, 0] * 2) <= 1e-6  # the mean of 0, .3 and .6, at full length
    assert_as_plain(got, k, v, **options)


def test_one_row_that_a_thousand_join():
    """More than a block of any kernel over candidates. V is a mean of 1039 in the order of tokens."""
    frame_tokens = 520
    numbers = [5] * 3 * frame_tokens
    numbers[521], numbers[1559] = 6, 7  # like no other: kept
    k = keys_of_integers(*numbers)
    v = torch.randn(k.shape, generator=torch.Generator().manual_seed(0))
    got = triton(k, v, frames=3, keep_ratio=0.001)
    assert got.index.tolist() == [*range(520), 521, 1559]
    assert got.count.tolist() == [1039, *[1] * 521]
    total = v[0]
    for t in range(520, 1559):
        if t != 521:
            total = total + v[t]
    assert torch.equal(got.v[0], total / 1039) and torch.equal(got.v[1:], v[got.index[1:].long()])
    assert relative_error(got.k[0], k[0] * 2) <= 1e-6 and torch.equal(got.k[1:], k[got.index[1:].long()])


def test_a_limit_that_all_pass_and_one_that_none_passes():
    k, v = chunk(3, 12, 2, 64, torch.float32, seed=4)
    v[0, 0, 0], v[1, 0, 0] = -0.0, math.inf
    for merge_above in (-1.5, 1.5):
        options = dict(frames=3, keep_ratio=0.25, merge_above=merge_above)
        got = triton(k, v, **options)
        index, count, want_k, want_v, _ = plain(k, v, **options)
        assert got.index.tolist() == index.tolist() and got.count.tolist() == count.tolist()
        assert torch.equal(got.v, want_v) and relative_error(got.k, want_k) <= 1e-6
    assert torch.equal(got.v.view(torch.int32), v[index.long()].view(torch.int32))
    square = k[index.long()].square().sum(-1, keepdim=True)
    stretch = 1 + (count.float().log()[:, None, None] / (0.8 * 0.125 * square)).clamp_max(1)
    assert (count > 1).any() and relative_error(got.k, k[index.long()] * stretch) <= 1e-6


def test_scale_is_of_the_softmax_that_reads_the_keys():
    k, v = chunk(3, 12, 2, 64, torch.float32, seed=4)
    for scale in (1e-25, 0.02, 1.0, 1e25):
        options = dict(frames=3, keep_ratio=0.25, merge_above=0.7, scale=scale)
        assert_as_plain(triton(k, v, **options), k, v, **options)


def test_nan_infinite_huge_and_zero_keys():
    """Which cannot be compared goes first and joins none; nothing joins it where it is kept with the anchor."""
    k, v = chunk(3, 10, 2, 64, torch.float32, seed=5)
    k[2, 1, 3], k[4, 0, 0], k[5] = math.nan, math.inf, 3e19  # in the anchor frame
    k[12, 0, 63], k[17, 1, 0], k[23] = math.nan, -math.inf, -3e19  # outside
    k[9], k[26], k[27] = 0.0, 0.0, -k[18]
    options = dict(frames=3, keep_ratio=0.4, merge_above=0.7)
    got = triton(k, v, **options)
    assert not {12, 17, 23} & set(got.index.tolist())
    index, count, want_k, want_v, gap = plain(k, v, **options)
    assert gap > APART and got.index.tolist() == index.tolist()
    assert got.count.tolist() == count.tolist() and count.sum() == 27
    assert torch.equal(got.v, want_v)
    finite = want_k.flatten(1).isfinite().all(1) & (want_k.flatten(1).abs().amax(1) < 1e19)
    assert (~finite).sum() == 3 and torch.equal(got.k[~finite].nan_to_num(7), want_k[~finite].nan_to_num(7))
    assert relative_error(got.k[finite], want_k[finite]) <= 1e-6


def test_nothing_to_compare_with():
    """An anchor of NaN: of the second frame each token is least similar, and of the third those of the second count."""
    k, v = chunk(3, 6, 1, 64, torch.float32, seed=6)
    k[:6] = math.nan
    options = dict(frames=3, keep_ratio=0.5, merge_above=0.7)
    got = triton(k, v, **options)
    assert got.index.tolist() == [*range(12)]
    index, count, _, want_v, gap = plain(k, v, **options)
    assert gap > APART and got.index.tolist() == index.tolist() and got.count.tolist() == count.tolist()
    assert torch.equal(got.v, want_v)


def test_zero_means_and_keys_that_cancel():
    """Two opposite heads cancel to a zero key; the other head, which made them alike, does not."""
    k = torch.zeros(6, 2, 64)
    k[:, 0] = 10 * torch.eye(64)[[1, 2, 3, 1, 4, 5]]
    k[0, 1, 9], k[3, 1, 9] = 1.0, -1.0
    got = triton(k, k, frames=2, keep_ratio=0.5, merge_above=0.5)
    assert got.index.tolist() == [0, 1, 2, 4, 5] and got.count.tolist() == [2, 1, 1, 1, 1]
    assert torch.equal(got.k[0, 1], torch.zeros(64)) and torch.equal(got.v[0, 1], torch.zeros(64))
    assert relative_error(got.k[0, 0], k[0, 0] * (1 + math.log(2) / (0.8 * 0.125 * 100))) <= 1e-6


def test_twenty_times_the_same_bits():
    k, v = (x.to(DEVICE) for x in chunk(3, 5, 2, 64, HALF, layers=(2,), seed=7))
    options = dict(frames=3, keep_ratio=0.3, anchor=1, merge_above=0.7, backend="triton")
    first = compress_chunk(k, v, **options)
    for _ in range(2 if DEVICE.type == "cpu" else 19):  # the interpreter has one order
        for have, want in zip(compress_chunk(k, v, **options), first, strict=True):
            assert torch.equal(have, want)


def test_which_kernels_are_launched(monkeypatch):
    """The published op has its own four; a merge by it looks for the nearest as well; a whole chunk is copied."""
    launched = []

    class Spy:
        def __init__(self, name):
            self.name, self.launch = name, getattr(kernel, name)

        def __getitem__(self, grid):
            launched.append(self.name.removesuffix("_kernel"))
            return self.launch[grid]

    for name in [name for name in vars(kernel) if name.endswith("_kernel")]:
        monkeypatch.setattr(kernel, name, Spy(name))
    k, v = chunk(3, 6, 1, 64, torch.float32)
    nearest, merge = ["norms", "nearest", "reduce"], ["root", "alike", "link", "merge"]
    for ratio, rule, merged, want in [
        (0.5, "similarity", False, ["anchor_mean", "similarity", "select", "gather"]),
        (0.5, "nearest", False, [*nearest, "select", "gather"]),
        (0.5, "nearest", True, [*nearest, "select", *merge]),
        (0.5, "similarity", True, [*nearest, "anchor_mean", "similarity", "select", *merge]),
        (1.0, "nearest", True, ["gather"]),
    ]:
        launched.clear()
        got = triton(k, v, frames=3, keep_ratio=ratio, rule=rule, merge=merged)
        assert launched == want
    assert got.count.tolist() == [1] * 18 and torch.equal(got.k, k)


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (9, 0), (10, 0), (12, 0)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_configurations_fit(capability, dtype):
    """Tiles of a pipeline in shared memory, of as many steps as Triton keeps there; any row is whole blocks."""
    config = nearest_config(capability, dtype)
    steps = config.num_stages - (capability[0] in (8, 12) and config.num_stages > 1)
    num_bytes = (config.block_candidates + config.block_earlier) * config.block_columns * dtype.itemsize * steps
    assert num_bytes <= {(8, 0): 163, (9, 0): 227, (10, 0): 227}.get(capability, 99) * 1024
    assert 64 % config.block_columns == 0


@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a GPU")
@pytest.mark.parametrize(
    ("frames", "frame_tokens", "heads", "anchor", "rule"),
    [(3, 1560, 40, 0, "nearest"), (4, 880, 12, 2, "nearest"), (3, 1508, 64, 1, "similarity")],
)
def test_real_frame_sizes(frames, frame_tokens, heads, anchor, rule):
    """As the reference but for what rounding decides, which is little; 20 times the same."""
    k, v = (x.to(DEVICE) for x in chunk(frames, frame_tokens, heads, 128, torch.bfloat16, seed=8))
    options = dict(frames=frames, keep_ratio=0.25, anchor=anchor, rule=rule, merge_above=0.7)
    got = compress_chunk(k, v, backend="triton", **options)
    want = compress_chunk(k, v, backend="reference", **options)
    assert torch.isin(got.index, want.index, invert=True).sum() <= 2
    assert got.count.sum() == want.count.sum() == len(k)
    got_row, want_row = (torch.full((len(k),), -1, dtype=torch.int64, device=DEVICE) for _ in range(2))
    got_row[got.index.long()] = torch.arange(len(got.index), dtype=torch.int64, device=DEVICE)
    want_row[want.index.long()] = torch.arange(len(want.index), dtype=torch.int64, device=DEVICE)
    both = (got_row >= 0) & (want_row >= 0)
    got_row, want_row = got_row[both], want_row[both]
    same = got.count[got_row] == want.count[want_row]
    assert same.float().mean() > 0.99
    for have, expected in ((got.k, want.k), (got.v, want.v)):
        assert relative_error(have[got_row[same]], expected[want_row[same]]) <= ROUNDING[torch.bfloat16]
    for _ in range(2 if DEVICE.type == "cpu" else 19):  # the interpreter has one order
        again = compress_chunk(k, v, backend="triton", **options)
        assert all(torch.equal(a, b) for a, b in zip(again, got, strict=True))
