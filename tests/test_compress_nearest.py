"""compress_chunk with rule "nearest" and with merging, under either rule, against plain loops in float64, on every
backend this machine has."""

import math
import os
import re
from functools import partial
from itertools import count

import pytest
import torch
from conftest import DEVICE, backends
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_compress import MATCH, compressed

from worldkv_kernels import compress_chunk
from worldkv_kernels.ops.compress_chunk import BACKENDS

BACKEND_NAMES = [name for name in backends(BACKENDS) if name != "cuda"]
MARGIN = 4e-6  # in cosines: more than any order of fp32 sums of 384 products is off
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def alike_keys(tokens, heads, head_dim, seed):
    """Keys of all lengths, many with a cosine of .8 to 1 to others."""
    generator = torch.Generator().manual_seed(seed)
    like = torch.randint(tokens // 3 + 1, (tokens,), generator=generator)
    noise, size = torch.rand(2, tokens, 1, generator=generator)
    keys = torch.randn(tokens, heads * head_dim, generator=generator)[like]
    keys = (size + 0.5) * (keys + 0.7 * noise * torch.randn(keys.shape, generator=generator))
    return keys.view(tokens, heads, head_dim)


def random_values(k, seed=0):
    return torch.randn(k.shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, k.dtype)


def clear_case(tokens, heads, head_dim, dtype, seed, **arguments):
    """K and V of which nothing is decided by less than MARGIN, and what plain loops make of them."""
    for attempt in count():
        k = alike_keys(tokens, heads, head_dim, seed + attempt).to(DEVICE, dtype)
        v = random_values(k, seed)
        plain = compressed(k, v, **arguments)
        if plain.margin > MARGIN:
            return k, v, plain


def assert_same(got, plain, k, v):
    """Index, count and single rows exactly, merged rows within the rounding of fp32 sums and of the dtype."""
    assert got.index.tolist() == plain.index
    rounding = torch.finfo(k.dtype).eps / 2
    if got.count is not None:
        assert got.count.tolist() == plain.count
    rows = torch.tensor(plain.count) == 1
    index = got.index.cpu().long()
    assert torch.equal(got.k.cpu()[rows], k.cpu()[index[rows]]) and torch.equal(got.v.cpu()[rows], v.cpu()[index[rows]])
    merged_k, merged_v = got.k.double().cpu()[~rows], got.v.double().cpu()[~rows]
    want_k, want_v, shrunk = plain.k[~rows], plain.v[~rows], plain.shrunk[~rows]
    limit = (rounding + 1e-6 * shrunk.nan_to_num(0.0)) * want_k.norm(dim=2)
    assert ((merged_k - want_k).norm(dim=2) <= limit).all()
    assert ((merged_v - want_v).abs() <= rounding * want_v.abs() + 2e-6).all()


CASES = dict(
    frames=st.integers(1, 4), heads=st.sampled_from([1, 2, 3]), head_dim=st.sampled_from([64, 128]),
    ratio=st.sampled_from([0.1, 0.25, 1 / 3, 0.5, 0.75, 0.99, 1.0]), pooled=st.booleans(), anchor=st.integers(0, 2),
    seed=st.integers(0, 10**6), dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    rule=st.sampled_from(["nearest", "nearest", "similarity"]), layers=st.sampled_from([None, 1, 3]),
    merge_above=st.sampled_from([0.9, 0.95, -2.0, 0.5, 0.99, 2.0]), scale=st.sampled_from([None, None, 0.01, 1.0]),
    frame_tokens=st.integers(1, 40),
)  # fmt: skip


@pytest.mark.parametrize("backend", BACKEND_NAMES)
@pytest.mark.parametrize("merge", [True, False])
@settings(max_examples=100 if DEVICE.type == "cuda" else 40, deadline=None, derandomize=True)
@given(**CASES)
def test_agrees_with_plain_loops(
    backend, merge, frames, frame_tokens, heads, head_dim, ratio, pooled, anchor, seed, dtype, rule, layers,
    merge_above, scale,
):  # fmt: skip
    if backend == "triton" and INTERPRETED:  # which is slow, and multiplies bf16 as integers
        frame_tokens, heads, layers = 1 + frame_tokens % 9, 1, layers and min(layers, 2)
        dtype = torch.float16 if dtype == torch.bfloat16 else dtype
    arguments = dict(
        frames=frames, keep_ratio=ratio, pooled=pooled, anchor=min(anchor, frames - 1), rule=rule, merge=merge,
        merge_above=merge_above, scale=scale,
    )  # fmt: skip
    sizes = (frames * frame_tokens, heads, head_dim, dtype)
    cases = [clear_case(*sizes, seed + 1000 * layer, **arguments) for layer in range(layers or 1)]
    k, v = (torch.stack([case[i] for case in cases]) for i in (0, 1))
    if layers is None:
        k, v = k[0], v[0]
    got = compress_chunk(k, v, **arguments, backend=backend)
    assert (got.count is None) == (not merge)
    for layer, (of_k, of_v, plain) in enumerate(cases):
        of_layer = got if layers is None else type(got)(*(None if x is None else x[layer] for x in got))
        assert_same(of_layer, plain, of_k, of_v)
        assert not merge or of_layer.count.sum() == len(of_k)  # each token is in a row


# --- by hand: ties, chains, and keys that are none ---


def keys_of(*rows, dtype=torch.float32):
    """[tokens, 1, 64] from their first numbers; whole ones have exact products."""
    k = torch.zeros(len(rows), 1, 64)
    for token, row in enumerate(rows):
        k[token, 0, : len(row)] = torch.tensor(row, dtype=torch.float32)
    return k.to(DEVICE, dtype)


def marked(k):
    """Values that tell tokens apart: of token t all zeros but a one in column t."""
    return torch.eye(len(k), k.shape[2], device=k.device)[:, None].expand(k.shape).to(k.dtype).contiguous()


def averaged(got):
    """The tokens that each row of `marked` values averages."""
    found = [row.nonzero().flatten().tolist() for row in got.v[:, 0]]
    for row, tokens in zip(got.v, found, strict=True):
        torch.testing.assert_close(row[:, tokens], torch.full_like(row[:, tokens], 1 / len(tokens)))
    return found


@pytest.mark.parametrize("backend", BACKEND_NAMES)
def test_of_equally_near_keys_the_earlier_in_the_order_of_the_output(backend):
    """All of frame 0 and token 8 are as 5 and 6 of the anchor, and 8 also as 0 and 1, which stay: they join 5. As near
    to all of those as to 4 is token 9. Of 10 and 11, each other's like in one frame, neither is before the other."""
    k = keys_of(
        *[(4, 3)] * 4,
        *((3, 4), (4, 3), (4, 3), (0, 0, 5)),  # the anchor
        *((4, 3), (1, 1), (0, 0, 0, 5), (0, 0, 0, 5)),
    )
    arguments = dict(frames=3, keep_ratio=0.5, pooled=False, anchor=1, merge_above=0.5)
    got = compress_chunk(k, marked(k), **arguments, backend=backend)
    assert got.index.tolist() == [4, 5, 6, 7, 0, 1, 10, 11]
    assert got.count.tolist() == [2, 4, 1, 1, 1, 1, 1, 1]
    assert averaged(got) == [[4, 9], [2, 3, 5, 8], [6], [7], [0], [1], [10], [11]]


@pytest.mark.parametrize("backend", BACKEND_NAMES)
@pytest.mark.parametrize("anchor", [0, 1, 2])
def test_ties_across_frames_go_to_the_anchor_and_then_to_the_earlier_frame(backend, anchor):
    """One key in every frame, beside others that are like none: all equal ones join that of the anchor, and without
    it in the anchor, that of the first other frame."""
    frame = [(0,) * (1 + i) + (5,) for i in range(3)]
    k = keys_of(*((3, *[0] * 20, 4), *frame) * 3)
    for f in range(3):
        k[4 * f + 1 : 4 * f + 4] = k[4 * f + 1 : 4 * f + 4].roll(4 * f, dims=2)  # unlike all of other frames
    got = compress_chunk(k, marked(k), frames=3, keep_ratio=0.75, anchor=anchor, backend=backend)
    assert got.count.tolist() == [3, *[1] * 9]
    assert averaged(got)[0] == [0, 4, 8] and got.index[0] == 4 * anchor
    k[4 * anchor] = keys_of((0,) * 40 + (5,))
    got = compress_chunk(k, marked(k), frames=3, keep_ratio=0.8, anchor=anchor, backend=backend)  # all kept
    assert got.count.tolist() == [1] * 12
    got = compress_chunk(k, marked(k), frames=3, keep_ratio=0.75, anchor=anchor, backend=backend)
    first, second = sorted(4 * f for f in range(3) if f != anchor)
    row = got.index.tolist().index(first)
    assert second not in got.index.tolist() and averaged(got)[row] == [first, second]
    # All that stay have a similarity of zero. One of them goes, too, and ties say which: the last.
    assert got.count.tolist() == [2 if r in (0, row) else 1 for r in range(10)]


@pytest.mark.parametrize("backend", BACKEND_NAMES)
@pytest.mark.parametrize("rule", ["nearest", "similarity"])
@pytest.mark.parametrize("pooled", [True, False])
def test_equal_similarities_keep_the_earlier_token(backend, rule, pooled):
    """Whole numbers: every token of a frame has its permutation of one key, and is as near as the others."""
    k = keys_of(*[(2,)] * 8, *[(0, 3), (3, 0)] * 4, *[(3, 0), (0, 3)] * 4)
    got = compress_chunk(k, marked(k), frames=3, keep_ratio=0.25, pooled=pooled, rule=rule, backend=backend)
    if rule == "nearest":  # of frame 1 every second is at right angles to the anchor; of frame 2 all have their like
        want = [8, 10, 12, 14] if pooled else [8, 10, 16, 17]
    else:  # also of frame 2
        want = [8, 10, 12, 14] if pooled else [8, 10, 17, 19]
    assert got.index.tolist() == [*range(8), *want]
    assert got.count.sum() == 24


CHAIN = [(math.cos(math.radians(15 * f)), math.sin(math.radians(15 * f))) for f in range(4)]


@pytest.mark.parametrize("backend", BACKEND_NAMES)
def test_a_chain_joins_its_end_and_only_what_is_like_it_is_averaged(backend):
    """The first of frame f is 15 f degrees on: nearest to that before, .97 like the anchor's if it is the next."""
    frames = [(CHAIN[f], *((0,) * (2 + 3 * f + i) + (5,) for i in range(3))) for f in range(4)]
    k = keys_of(*(row for frame in frames for row in frame))
    got = compress_chunk(k, marked(k), frames=4, keep_ratio=0.75, backend=backend)
    assert got.index.tolist() == [0, 1, 2, 3, *(4 * f + i for f in (1, 2, 3) for i in (1, 2, 3))]
    assert got.count.tolist() == [4, *[1] * 12]
    assert averaged(got)[0] == [0, 4]


@pytest.mark.parametrize("backend", BACKEND_NAMES)
def test_a_chain_ends_where_a_token_is_kept(backend):
    """Of frame 1 token 2 stays, which frame 2's token 5 is near to: it joins that, and not what that is near to."""
    k = keys_of((5,), (5, 1), (0, 5), (5, 1), (5, 0, 1), (1, 9))
    got = compress_chunk(k, marked(k), frames=3, keep_ratio=0.5, backend=backend)
    assert got.index.tolist() == [0, 1, 2, 4]
    assert got.count.tolist() == [1, 2, 2, 1]
    assert averaged(got) == [[0], [1, 3], [2, 5], [4]]


def odd_keys(dtype, large):
    """Three frames of 10: NaN, infinities, zeros and large numbers in all of them."""
    k = alike_keys(30, 2, 64, seed=4).to(dtype)
    for token, value in ((1, math.nan), (2, 0.0), (11, 0.0), (12, math.nan), (13, -math.inf), (23, 0.0), (24, large)):
        k[token] = value
    k[4, 1, 3], k[15, 0, 7], k[26, 1, 63], k[27, 0, 0] = math.inf, math.nan, -math.inf, large
    return k.to(DEVICE)


@pytest.mark.parametrize("backend", BACKEND_NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rule", ["nearest", "similarity"])
@pytest.mark.parametrize("ratio", [0.3, 0.6])
def test_keys_without_a_length_go_first_and_join_nothing(backend, dtype, rule, ratio):
    if backend == "triton" and INTERPRETED and dtype == torch.bfloat16:
        pytest.skip("triton's interpreter multiplies bf16 matrices as integers")
    squares_fit = dtype == torch.float16 or rule == "similarity"
    k = odd_keys(dtype, math.inf if squares_fit else 1e30)
    if rule == "similarity":
        k[:10] = k[:10].nan_to_num(0.5, posinf=0.5, neginf=0.5)  # or all are as similar: NaN
    v = random_values(k)
    arguments = dict(frames=3, keep_ratio=ratio, rule=rule, merge_above=0.8)
    got, plain = compress_chunk(k, v, **arguments, backend=backend), compressed(k, v, **arguments)
    assert got.index.tolist() == plain.index and got.count.tolist() == plain.count
    odd = {12, 13, 15, 24, 26, 27}
    assert not odd & set(plain.index)
    assert got.count.sum() == 30 - len(odd)
    single = got.count == 1
    rows = got.index.long()[single]
    assert torch.equal(got.k[single].nan_to_num(7, 8, 9), k[rows].nan_to_num(7, 8, 9))
    assert torch.equal(got.v[single], v[rows])
    assert got.k[~single].isfinite().all() and got.v.isfinite().all() and (~single).any()
    rounding = torch.finfo(dtype).eps / 2
    for name in ("k", "v"):
        got_rows, want = getattr(got, name).double().cpu()[~single.cpu()], getattr(plain, name)[~single.cpu()]
        assert torch.allclose(got_rows, want, rtol=rounding + 1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", BACKEND_NAMES)
def test_a_key_with_nothing_before_it_stays(backend):
    """The anchor is NaN: frame 1 is near to none and goes last; frame 2 is near to frame 1."""
    k = alike_keys(12, 2, 64, seed=0)
    k[:4] = math.nan
    k[8], k[9] = k[5], k[6]
    k = k.to(DEVICE)
    got = compress_chunk(k, random_values(k), frames=3, keep_ratio=0.75, backend=backend)
    plain = compressed(k, k, frames=3, keep_ratio=0.75)
    assert got.index.tolist() == plain.index and {4, 5, 6, 7} < set(plain.index)
    assert got.count.tolist() == plain.count and got.count.sum() == 12
    got = compress_chunk(k, random_values(k), frames=3, keep_ratio=0.5, pooled=False, backend=backend)
    assert got.index.tolist()[4:] == [4, 5, 10, 11]  # of equals, the earlier
    assert got.count.tolist() == [1, 1, 1, 1, 1, 2, 1, 1]  # 6 and 7 join none, so that 9 does not either


@pytest.mark.parametrize("backend", BACKEND_NAMES)
def test_zeros(backend):
    """All similarities are zero; all join the first token of the anchor; its key has no direction and stays zero."""
    k = torch.zeros(12, 2, 64, device=DEVICE)
    for merge_above, of_first in ((0.9, 0), (0.0, (0 + 6 + 7 + 10 + 11) / 5)):
        v = torch.arange(12.0, device=DEVICE).view(12, 1, 1).expand(12, 2, 64).contiguous()
        got = compress_chunk(
            k, v, frames=3, keep_ratio=0.5, pooled=False, merge_above=merge_above, backend=backend
        )  # fmt: skip
        assert got.index.tolist() == [0, 1, 2, 3, 4, 5, 8, 9]
        assert got.count.tolist() == [5, *[1] * 7]
        assert (got.k == 0).all() and torch.allclose(got.v[0], torch.full_like(got.v[0], of_first))


# --- what merging makes of keys and values ---


@pytest.mark.parametrize("backend", BACKEND_NAMES)
@pytest.mark.parametrize("n", [2, 5, 90])
def test_a_query_that_is_like_the_key_attends_as_to_all_that_were_merged(backend, n):
    """To n rows of one key, by a query of four fifths of its length: that is what the longer key is made for. Values
    are averaged, and the merged row has n times the weight of one."""
    generator = torch.Generator().manual_seed(n)
    tokens = 2 * max(n, 8)
    k, v = 1.5 * torch.randn(2, tokens, 2, 64, generator=generator)  # so long that none is to be doubled
    half = tokens // 2
    k[half : half + n - 1] = k[3]  # n with the anchor's own
    k, v = k.to(DEVICE), v.to(DEVICE)
    keep_ratio = max(1, half - (n - 1)) / half
    got = compress_chunk(k, v, frames=2, keep_ratio=keep_ratio, backend=backend)
    assert got.count.tolist()[:8] == [1, 1, 1, n, 1, 1, 1, 1]
    q, scale = MATCH * k[3].double(), 64**-0.5
    whole = (torch.einsum("hd,thd->ht", q, k.double()) * scale).exp()
    less = (torch.einsum("hd,thd->ht", q, got.k.double()) * scale).exp()
    equal = whole[:, 3:4] * n
    torch.testing.assert_close(less[:, 3:4], equal, rtol=2e-5, atol=0)
    rows = [torch.einsum("ht,thd->hd", w / w.sum(1, keepdim=True), x.double()) for w, x in ((whole, v), (less, got.v))]
    torch.testing.assert_close(rows[1], rows[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", BACKEND_NAMES)
def test_the_longer_key_depends_on_the_scale_and_at_most_doubles(backend):
    """Three equal keys of a squared length of 25 in one head, and a tiny one in the other."""
    k = keys_of((3, 4), (0, 0, 5), (3, 4), (3, 4)).expand(4, 2, 64).clone()
    k[:, 1] *= 1e-6
    v = random_values(k)
    for scale in (1.0, 0.5, 0.04, 1e-3):
        got = compress_chunk(k, v, frames=2, keep_ratio=0.1, scale=scale, backend=backend)
        assert got.index.tolist() == [0, 1, 2] and got.count.tolist() == [2, 1, 1]
        longer = 1 + min(1, math.log(2) / (MATCH * scale * 25))
        assert torch.allclose(got.k[0, 0], longer * k[0, 0], rtol=1e-6, atol=0)
        assert torch.allclose(got.k[0, 1], 2 * k[0, 1], rtol=1e-6, atol=0)
        assert torch.allclose(got.v[0], (v[0] + v[3]) / 2, rtol=1e-6, atol=1e-7)
    default = compress_chunk(k, v, frames=2, keep_ratio=0.1, backend=backend)
    given = compress_chunk(k, v, frames=2, keep_ratio=0.1, scale=1 / 8, backend=backend)
    assert torch.equal(default.k, given.k)


@pytest.mark.parametrize("backend", BACKEND_NAMES)
def test_without_merging_neither_scale_nor_limit_does_anything(backend):
    k = alike_keys(60, 2, 64, seed=2).to(DEVICE)
    call = partial(compress_chunk, k, k + 1, frames=3, keep_ratio=0.25, merge=False, backend=backend)
    for options in ({}, dict(scale=0.01), dict(merge_above=-1.0)):
        got = call(**options)
        index = got.index.long()
        assert got.count is None and torch.equal(got.k, k[index]) and torch.equal(got.v, k[index] + 1)
        assert torch.equal(got.index, call().index)
    merged = compress_chunk(k, k + 1, frames=3, keep_ratio=0.25, backend=backend)
    assert torch.equal(merged.index, call().index)


@pytest.mark.parametrize("backend", BACKEND_NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_limit_at_its_extremes(backend, dtype):
    """Above 1, all are counted and none averaged: values are copies. Below -1, all that joined are averaged."""
    k = alike_keys(60, 2, 64, seed=2).to(DEVICE, dtype)
    v = marked(k) if dtype == torch.float32 else random_values(k)
    arguments = dict(frames=3, keep_ratio=0.25)
    none, every = (compress_chunk(k, v, **arguments, merge_above=x, backend=backend) for x in (1.5, -1.5))
    index = none.index.long()
    assert torch.equal(none.index, every.index) and torch.equal(none.count, every.count)
    assert torch.equal(none.v, v[index])
    square = k[index].float().square().sum(dim=2, keepdim=True)
    longer = 1 + (none.count.float().log()[:, None, None] / (MATCH * 64**-0.5 * square)).clamp_max(1)
    want = k[index].float() * longer
    torch.testing.assert_close(none.k.float(), want, rtol=torch.finfo(dtype).eps + 4e-7, atol=0)
    plain = compressed(k, v, **arguments, merge_above=-1.5)
    assert [len(members) for members in plain.averaged] == every.count.tolist()
    if dtype == torch.float32:
        torch.testing.assert_close(every.v.double().cpu(), plain.v, rtol=1e-6, atol=0)


@pytest.mark.parametrize("backend", BACKEND_NAMES)
@pytest.mark.parametrize(("frames", "ratio"), [(3, 1.0), (3, 0.99), (1, 0.25)])
def test_where_all_is_kept_each_row_stands_for_itself(backend, frames, ratio):
    k = torch.zeros(12, 2, 64, device=DEVICE)  # all of them alike
    v = random_values(k)
    got = compress_chunk(k, v, frames=frames, keep_ratio=ratio, anchor=frames // 2, backend=backend)
    assert got.count.tolist() == [1] * 12
    assert torch.equal(got.k, k) and torch.equal(got.v, v[got.index.long()])


@pytest.mark.parametrize("backend", BACKEND_NAMES)
def test_values_are_averaged_where_they_are_not_finite_too(backend):
    """And only there: an infinite value does not reach another row."""
    k = keys_of((5,), (0, 5), (5,), (0, 0, 5))
    v = random_values(k)
    v[2, 0, 5] = math.inf
    got = compress_chunk(k, v, frames=2, keep_ratio=0.5, backend=backend)
    assert got.index.tolist() == [0, 1, 3] and got.count.tolist() == [2, 1, 1]
    assert got.v.isinf().nonzero().tolist() == [[0, 0, 5]] and not got.v.isnan().any()


# --- where it is read and written ---


@pytest.mark.parametrize("backend", BACKEND_NAMES)
@pytest.mark.parametrize("rule", ["nearest", "similarity"])
def test_slots_of_a_pool_twenty_times_the_same(backend, rule):
    """Rows of a pool into other rows of it, NaN beside all of them: not read, and not written. As each layer alone."""
    pools = torch.full((2, 3, 200, 2, 64), math.nan, device=DEVICE, dtype=torch.float16)
    source, target = slice(100, 160), slice(20, 20 + 20 + 2 * 5)
    keys = torch.stack([alike_keys(60, 2, 64, seed) for seed in (1, 2, 3)]).to(DEVICE, torch.float16)
    pools[0, :, source], pools[1, :, source] = keys, random_values(keys)
    before = pools.clone()
    room = torch.full((2, 3 * 30 + 2), -7, dtype=torch.int32, device=DEVICE)
    index, number = (x[1:-1].view(3, 30) for x in room)
    call = partial(
        compress_chunk, pools[0, :, source], pools[1, :, source], frames=3, keep_ratio=0.25, anchor=1, rule=rule,
        backend=backend,
    )  # fmt: skip
    want = call()
    assert (want.count > 1).any() and want.count.sum() == 180
    for _ in range(3 if INTERPRETED and backend == "triton" else 20):  # the interpreter has one order
        pools[:, :, target], room[:, 1:-1] = math.nan, -1
        out_k, out_v = pools[:, :, target]
        got = call(out_k=out_k, out_v=out_v, out_index=index, out_count=number)
        assert got.k is out_k and got.v is out_v and got.index is index and got.count is number
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert (room[:, 0] == -7).all() and (room[:, -1] == -7).all()
    pools[:, :, target] = math.nan
    assert torch.equal(pools.view(torch.int16), before.view(torch.int16))
    for layer in range(3):
        k, v = before[:, layer, source]
        alone = compress_chunk(
            k.contiguous(), v.contiguous(), frames=3, keep_ratio=0.25, anchor=1, rule=rule, backend=backend
        )
        assert all(torch.equal(a[layer], b) for a, b in zip(want, alone, strict=True))


@pytest.mark.parametrize("backend", BACKEND_NAMES)
def test_layers_and_rows_of_any_stride(backend):
    """Tokens whose layers lie side by side, columns of wider rows, and one layer seen as many."""
    k, v = (torch.stack([alike_keys(45, 2, 64, seed + i) for i in range(3)]).to(DEVICE) for seed in (0, 10))
    call = partial(compress_chunk, frames=3, keep_ratio=0.4, backend=backend)
    want = call(k, v)
    aside = k.transpose(0, 1).contiguous().transpose(0, 1)
    wide = torch.full((3, 45, 6, 64), math.nan, device=DEVICE)
    wide[:, :, 2:4] = v
    out = torch.full((27, 3, 2, 64), math.nan, device=DEVICE).transpose(0, 1)
    got = call(aside, wide[:, :, 2:4], out_k=out)
    assert got.k is out and all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    got = call(k[:1].expand(2, -1, -1, -1), v[0].expand(2, -1, -1, -1))
    assert all(torch.equal(a[layer], b[0]) for a, b in zip(got, want, strict=True) for layer in (0, 1))


@pytest.mark.parametrize("rule", ["nearest", "similarity"])
@pytest.mark.parametrize("merge", [True, False])
def test_opcheck_and_compile(rule, merge):
    k = alike_keys(90, 2, 64, seed=0).to(DEVICE)
    v = random_values(k)
    call = partial(compress_chunk, frames=3, keep_ratio=0.25, rule=rule, merge=merge, backend="reference")
    want = call(k, v)
    outputs = [torch.zeros_like(x) for x in want if x is not None] + [None] * (not merge)
    torch.library.opcheck(
        torch.ops.worldkv.compress_chunk.default,
        (k, v, *outputs, 3, 8, True, 0, rule, 0.95, 0.125, "reference"),
    )
    torch.ops.worldkv.compress_chunk(k, v, *outputs, 3, 8, True, 0, rule, 0.95, 0.125, "reference")
    compiled = torch.compile(lambda k, v: call(k * 1, v), fullgraph=True, backend="aot_eager")(k, v)
    for got in (outputs, compiled):
        assert (got[3] is None) == (want.count is None) == (not merge)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True) if b is not None)


@pytest.mark.skipif("cuda" not in backends(BACKENDS), reason="the CUDA kernels are not built")
@pytest.mark.parametrize("backend", ["cuda"])
@pytest.mark.parametrize("options", [{}, dict(merge=False), dict(rule="similarity")])
def test_cuda_refuses(backend, options):
    k = torch.zeros(90, 2, 64, dtype=torch.bfloat16, device=DEVICE)
    with pytest.raises(ValueError, match="it prunes by rule='similarity', and merges nothing"):
        compress_chunk(k, k, frames=3, keep_ratio=0.25, backend=backend, **options)


# --- errors ---


def zeros(*shape, dtype=torch.float32):
    return torch.zeros(*shape, dtype=dtype, device=DEVICE)


def int32(*shape):
    return zeros(*shape, dtype=torch.int32)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"rule": "most alike"}, ValueError, "rule must be one of nearest, similarity, got 'most alike'"),
        ({"rule": None}, TypeError, "rule must be one of nearest, similarity, got None"),
        ({"rule": 1}, TypeError, "rule must be one of nearest, similarity, got 1"),
        ({"merge": "no"}, TypeError, "merge must be True or False, got 'no'"),
        ({"merge": None}, TypeError, "merge must be True or False, got None"),
        ({"merge": 1}, TypeError, "merge must be True or False, got 1"),
        ({"merge_above": math.nan}, ValueError, "merge_above must be finite, got nan"),
        ({"merge_above": math.inf}, ValueError, "merge_above must be finite, got inf"),
        ({"merge_above": -math.inf, "merge": False}, ValueError, "merge_above must be finite, got -inf"),
        ({"merge_above": None}, TypeError, "merge_above must be a number, got None"),
        ({"merge_above": True}, TypeError, "merge_above must be a number, got True"),
        ({"scale": 0.0}, ValueError, "scale must be from 1e-25 to 1e+25, got 0.0"),
        ({"scale": -1}, ValueError, "scale must be from 1e-25 to 1e+25, got -1"),
        ({"scale": math.inf, "merge": False}, ValueError, "scale must be from 1e-25 to 1e+25, got inf"),
        ({"scale": math.nan}, ValueError, "scale must be from 1e-25 to 1e+25, got nan"),
        ({"scale": "1"}, TypeError, "scale must be a number, got '1'"),
        ({"scale": True}, TypeError, "scale must be a number, got True"),
        ({"out_count": int32(46), "merge": False}, ValueError, "out_count must be None without merge, got"),
        ({"out_count": int32(45)}, ValueError, "out_count must be [46], got [45]"),
        ({"out_count": int32(1, 46)}, ValueError, "out_count must be [46], got [1, 46]"),
        ({"out_count": int32(92)[::2]}, ValueError, "out_count must be contiguous"),
        ({"out_count": zeros(46)}, TypeError, "out_count must be torch.int32"),
        ({"out_count": zeros(46, dtype=torch.int64)}, TypeError, "out_count must be torch.int32"),
        ({"out_count": [1] * 46}, TypeError, "out_count must be a tensor"),
    ],
)
def test_bad_arguments_are_named(changes, error, message):
    arguments = {"k": zeros(90, 2, 64), "v": zeros(90, 2, 64), "frames": 3, "keep_ratio": 0.25, **changes}
    with pytest.raises(error, match=f"compress_chunk: {re.escape(message)}"):
        compress_chunk(**arguments)


@pytest.mark.parametrize("other", ["k", "v", "out_k", "out_v", "out_index"])
def test_a_count_over_another_tensor_is_refused(other):
    tensors = {"k": zeros(90, 2, 64), "v": zeros(90, 2, 64), "out_k": zeros(46, 2, 64), "out_v": zeros(46, 2, 64)}
    tensors["out_index"] = int32(50)[:46]
    count = tensors[other].view(torch.int32).flatten()
    if other == "out_index":
        count = count.as_strided((46,), (1,), 4)  # its last 42
    pair = "out_count must not overlap .*" if other in "kv" else f"{other} must not overlap out_count"
    with pytest.raises(ValueError, match=f"compress_chunk: {pair}, got"):
        compress_chunk(**tensors, out_count=count[:46], frames=3, keep_ratio=0.25)
