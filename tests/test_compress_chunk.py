"""compress_chunk as published, rule "similarity" without merging, against a float64 selection by plain sorting, on
every backend this machine has; and the errors of any call."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from conftest import DEVICE, backends
from hypothesis import given, settings
from hypothesis import strategies as st

from worldkv_kernels import compress_chunk
from worldkv_kernels.ops import cuda
from worldkv_kernels.ops.compress_chunk import BACKENDS
from worldkv_kernels.reference import compress_chunk as reference

BACKEND_NAMES = backends(BACKENDS)
published = partial(compress_chunk, rule="similarity", merge=False)


def float64_similarities(k, frames, anchor):
    """Similarity of every token, [frames, frame_tokens], as published: per token, all heads together."""
    k = k.double().cpu().reshape(frames, k.shape[0] // frames, -1)
    mean = k[anchor].mean(0)
    return (k * mean).sum(-1) / (k.square().sum(-1).sqrt() * mean.square().sum().sqrt() + 1e-8)


def brute_force(similarities, keep, pooled, anchor):
    """Kept tokens by Python's sort on (similarity, token)."""
    frames, frame_tokens = similarities.shape
    whole = list(range(anchor * frame_tokens, (anchor + 1) * frame_tokens))
    groups = [
        [(float(similarities[f, t]), f * frame_tokens + t) for t in range(frame_tokens)]
        for f in range(frames)
        if f != anchor
    ]
    if pooled:
        groups = [[one for group in groups for one in group]]
    budget = keep * (frames - 1) // max(1, len(groups))
    kept = sorted(token for group in groups for _, token in sorted(group)[:budget])
    return whole + kept


def separated_keys(tokens, heads, head_dim, frames, anchor, seed):
    """Keys whose similarities to the anchor's mean differ by far more than fp32 can confuse."""
    generator = torch.Generator().manual_seed(seed)
    base, across = torch.randn(2, heads * head_dim, generator=generator)
    across -= (across @ base) / (base @ base) * base
    across *= base.norm() / across.norm()
    angles = torch.linspace(0.2, 2.9, tokens)[torch.randperm(tokens, generator=generator)]
    frame_tokens = tokens // frames
    angles[anchor * frame_tokens : (anchor + 1) * frame_tokens] = 0.0
    sizes = torch.rand(tokens, 1, generator=generator) + 0.5
    keys = sizes * (torch.cos(angles)[:, None] * base + torch.sin(angles)[:, None] * across)
    return keys.view(tokens, heads, head_dim)


@pytest.mark.parametrize("backend", BACKEND_NAMES)
@settings(max_examples=60 if DEVICE.type == "cuda" else 25, deadline=None, derandomize=True)
@given(
    frames=st.integers(1, 4), frame_tokens=st.integers(1, 60), heads=st.sampled_from([1, 2, 3]),
    head_dim=st.sampled_from([64, 128]), ratio=st.sampled_from([0.1, 0.25, 1 / 3, 0.5, 0.75, 0.99, 1.0]),
    pooled=st.booleans(), anchor=st.integers(0, 2), seed=st.integers(0, 10**6),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)  # fmt: skip
def test_exact_indices_where_scores_are_apart(
    backend, frames, frame_tokens, heads, head_dim, ratio, pooled, anchor, seed, dtype
):
    anchor = min(anchor, frames - 1)
    tokens = frames * frame_tokens
    k = separated_keys(tokens, heads, head_dim, frames, anchor, seed).to(DEVICE, dtype)
    v = torch.randn(tokens, heads, head_dim, device=DEVICE).to(dtype)
    got = published(k, v, frames=frames, keep_ratio=ratio, pooled=pooled, anchor=anchor, backend=backend)
    keep = min(frame_tokens, max(1, math.ceil(ratio * frame_tokens)))
    similarities = float64_similarities(k, frames, anchor)
    want = brute_force(similarities, keep, pooled, anchor)
    # In half precision two similarities may round together; such a pair may stand either way around.
    others = similarities[[f for f in range(frames) if f != anchor]].flatten().sort().values
    apart = len(others) < 2 or (others.diff().min() > 4e-7).item()
    assert len(got.index) == len(want)
    if apart:
        assert got.index.tolist() == want
    index = got.index.long()
    assert torch.equal(got.k, k[index]) and torch.equal(got.v, v[index])


@pytest.mark.parametrize("backend", BACKEND_NAMES)
@pytest.mark.parametrize("pooled", [True, False])
def test_random_keys_agree_beyond_fp32_resolution(backend, pooled):
    """Whatever is kept is within fp32 resolution of the threshold or on its right side."""
    k = torch.randn(3 * 200, 4, 64, generator=torch.Generator().manual_seed(3)).to(DEVICE)
    got = published(k, k.clone(), frames=3, keep_ratio=0.3, pooled=pooled, anchor=1, backend=backend)
    similarities = float64_similarities(k, 3, 1)
    kept = torch.zeros(600, dtype=torch.bool)
    kept[got.index.long().cpu()] = True
    kept = kept.view(3, 200)
    assert kept[1].all() and kept.sum() == 200 + 2 * 60
    for group in [[0, 2]] if pooled else [[0], [2]]:
        highest_kept = similarities[group][kept[group]].max()
        lowest_left = similarities[group][~kept[group]].min()
        assert highest_kept <= lowest_left + 3e-7


@pytest.mark.parametrize("backend", BACKEND_NAMES)
@pytest.mark.parametrize("pooled", [True, False])
def test_equal_scores_keep_the_earlier_token(backend, pooled):
    """Frames 0 and 2 repeat four keys, so similarities tie in fours, and across frames."""
    four = separated_keys(4, 2, 64, 1, 0, seed=1) + torch.randn(4, 2, 64, generator=torch.Generator().manual_seed(5))
    k = torch.cat([four.repeat(4, 1, 1), torch.randn(16, 2, 64), four.repeat(4, 1, 1)]).to(DEVICE)
    got = published(k, k.clone(), frames=3, keep_ratio=6 / 16, pooled=pooled, anchor=1, backend=backend)
    similarities = float64_similarities(k, 3, 1)
    for frame in (0, 2):  # exact ties in whatever precision: give them one value each
        similarities[frame] = similarities[0, :4].repeat(4)
    assert got.index.tolist() == brute_force(similarities, 6, pooled, 1)


def recipe(k, frames, keep, pooled, anchor):
    """The published selection of one layer in fp32, step by step as this package has always made it."""
    by_frame = k.float().reshape(frames, len(k) // frames, -1)
    mean = by_frame[anchor].mean(dim=0)
    others = [f for f in range(frames) if f != anchor]
    similarity = [by_frame[f] @ mean / (by_frame[f].norm(dim=1) * mean.norm() + 1e-8) for f in others]
    groups = torch.cat(similarity)[None] if pooled else torch.stack(similarity)
    token = torch.arange(len(k)).view(frames, -1)
    least = groups.sort(dim=1, stable=True).indices[:, : keep * len(others) // len(groups)]
    kept = token[others].view(groups.shape).gather(1, least).flatten().sort().values
    return torch.cat([token[anchor], kept]), torch.stack(similarity)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("pooled", [True, False])
@pytest.mark.parametrize("anchor", [0, 1])
def test_the_reference_is_the_published_recipe_to_the_bit(dtype, pooled, anchor):
    """With keys so alike that rounding decides: any other order of sums, or width, keeps other tokens."""
    base, noise = torch.randn(2, 600, 2, 64, generator=torch.Generator().manual_seed(3))
    k, v = (base[:1] + 1e-3 * noise).to(dtype), base.to(dtype)
    want, similarity = recipe(k, 3, 60, pooled, anchor)
    assert torch.equal(reference.similarities(k, 3, anchor), similarity)
    got = published(k, v, frames=3, keep_ratio=0.3, pooled=pooled, anchor=anchor, backend="reference")
    assert torch.equal(got.index, want.int()) and got.count is None
    assert torch.equal(got.k, k[want]) and torch.equal(got.v, v[want])
    exact = brute_force(float64_similarities(k, 3, anchor), 60, pooled, anchor)
    assert want.tolist() != exact


@pytest.mark.parametrize("backend", BACKEND_NAMES)
def test_a_whole_chunk_is_kept_anchor_first(backend):
    k = torch.randn(3 * 5, 2, 64, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    got = published(k, k + 1, frames=3, keep_ratio=1.0, anchor=1, backend=backend)
    order = [*range(5, 10), *range(5), *range(10, 15)]
    assert got.index.tolist() == order
    assert torch.equal(got.k, k[order]) and torch.equal(got.v, k[order] + 1)


@pytest.mark.parametrize("backend", BACKEND_NAMES)
def test_nan_and_zero_keys(backend):
    """A NaN counts as most similar, so it goes first; a zero key has similarity zero. Nothing is lost or doubled."""
    k = torch.randn(3 * 20, 1, 64, generator=torch.Generator().manual_seed(0))
    k[25:33], k[45] = math.nan, 0.0
    got = published(k.to(DEVICE), k.to(DEVICE), frames=3, keep_ratio=0.5, backend=backend)
    assert len(set(got.index.tolist())) == 40
    assert not set(range(25, 33)) & set(got.index.tolist())


@pytest.mark.parametrize("backend", BACKEND_NAMES)
def test_pool_rows_in_and_out_with_sentinels(backend):
    """Reads rows of a pool, writes rows of the same pool, and nothing around them; each time the same bits."""
    pool_k, pool_v = torch.randn(2, 300, 2, 64, generator=torch.Generator().manual_seed(2)).to(DEVICE)
    before_k, before_v = pool_k.clone(), pool_v.clone()
    source, target = slice(10, 100), slice(150, 150 + 30 + 2 * 9)
    for _ in range(3 if backend == "triton" and DEVICE.type == "cpu" else 20):  # the interpreter has one order
        got = published(
            pool_k[source], pool_v[source], frames=3, keep_ratio=0.3, out_k=pool_k[target], out_v=pool_v[target],
            backend=backend,
        )  # fmt: skip
        index = got.index.long()
        assert torch.equal(pool_k[target], before_k[source][index])
        assert torch.equal(pool_v[target], before_v[source][index])
    outside = torch.ones(300, dtype=torch.bool, device=DEVICE)
    outside[target] = False
    assert torch.equal(pool_k[outside], before_k[outside]) and torch.equal(pool_v[outside], before_v[outside])


def chunk_and_its_choice(frames, frame_tokens, heads, anchor, pooled, keep_ratio=0.25):
    """K and V in bf16 on the device, and the tokens to keep, with a cut that fp32 cannot miss."""
    k = separated_keys(frames * frame_tokens, heads, 128, frames, anchor, seed=frames).bfloat16()
    v = torch.randn(k.shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    similarities = float64_similarities(k, frames, anchor)
    keep = math.ceil(keep_ratio * frame_tokens)
    others = similarities[[f for f in range(frames) if f != anchor]]
    ranked = (others.view(1, -1) if pooled else others).sort(dim=1).values
    cut = keep * (frames - 1) if pooled else keep
    assert (ranked[:, cut] - ranked[:, cut - 1]).min() > 1e-5
    return k.to(DEVICE), v.to(DEVICE), brute_force(similarities, keep, pooled, anchor)


KERNELS_ON_A_GPU = [name for name in BACKEND_NAMES if name != "reference" and DEVICE.type == "cuda"]
needs_gpu = pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a GPU")


@needs_gpu
@pytest.mark.parametrize("backend", KERNELS_ON_A_GPU)
@pytest.mark.parametrize("pooled", [True, False])
@pytest.mark.parametrize(
    ("frames", "frame_tokens", "heads", "anchor"),
    [(3, 1560, 40, 0), (4, 1560, 40, 2), (3, 880, 12, 0), (3, 1508, 64, 1)],
)
def test_real_frame_sizes_twenty_times_the_same(backend, pooled, frames, frame_tokens, heads, anchor):
    k, v, want = chunk_and_its_choice(frames, frame_tokens, heads, anchor, pooled)
    for _ in range(20):
        out_k, out_v = torch.full((2, len(want), heads, 128), math.nan, dtype=k.dtype, device=DEVICE)
        got = published(
            k, v, frames=frames, keep_ratio=0.25, pooled=pooled, anchor=anchor, out_k=out_k, out_v=out_v,
            backend=backend,
        )  # fmt: skip
        assert got.index.tolist() == want
        assert torch.equal(out_k, k[want]) and torch.equal(out_v, v[want])


@needs_gpu
@pytest.mark.parametrize("backend", KERNELS_ON_A_GPU)
def test_replays_of_a_captured_graph(backend):
    """New keys at the same addresses: each replay starts from whatever the last one left in the workspace."""
    k, v, want = chunk_and_its_choice(3, 200, 4, 0, pooled=False)
    keys = torch.zeros_like(k)
    call = partial(published, keys, v, frames=3, keep_ratio=0.25, pooled=False, backend=backend)
    call()  # outside the capture: loads and checks the kernel
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = call()
    for _ in range(3):
        keys.zero_()
        graph.replay()
        assert got.index.tolist() == [*range(250), *range(400, 450)]  # all equal: the earliest of each frame
        keys.copy_(k)
        graph.replay()
        assert got.index.tolist() == want


@pytest.mark.parametrize(
    ("stride", "offset", "aligned"), [(128, 0, True), (136, 8, True), (130, 0, False), (128, 1, False)]
)
def test_rows_that_do_not_start_on_16_bytes_are_no_work_for_the_cuda_kernel(monkeypatch, stride, offset, aligned):
    kinds = []
    choose = BACKENDS.choose
    monkeypatch.setattr(BACKENDS, "choose", lambda *args: kinds.append(args[2]) or choose(*args))
    k = torch.randn(90 * 140, generator=torch.Generator().manual_seed(0)).bfloat16().to(DEVICE)
    k = k.as_strided((90, 2, 64), (stride, 64, 1), offset)
    published(k, k.contiguous(), frames=3, keep_ratio=0.25, backend="reference")
    why = cuda.compress_unsupported(kinds[0])
    assert why is None if aligned else why == "it takes rows that start on multiples of 16 bytes"


def zeros(*shape, dtype=torch.float32):
    return torch.zeros(*shape, dtype=dtype, device=DEVICE)


SIZES = "heads, head_dim], heads not first, with 1 to 128 heads and head_dim 64 or 128"


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"k": zeros(90, 128)}, ValueError, "k must be [tokens, heads, head_dim] or [layers, tokens, heads, head_dim]"),
        ({"k": None}, TypeError, "k must be a tensor [tokens, heads, head_dim], got None"),
        ({"k": zeros(90, 2, 32)}, ValueError, f"k must be [tokens, {SIZES}, got [90, 2, 32]"),
        ({"k": zeros(90, 0, 64)}, ValueError, f"k must be [tokens, {SIZES}, got [90, 0, 64]"),
        ({"k": zeros(2, 129, 64)}, ValueError, f"k must be [tokens, {SIZES}, got [2, 129, 64]"),
        ({"k": zeros(1, 2, 600, 64)}, ValueError, f"k must be [layers, tokens, {SIZES}, got [1, 2, 600, 64]"),
        ({"k": zeros(90, 64, 2).transpose(1, 2)}, ValueError, "k must be contiguous in its last 2"),
        ({"v": zeros(89, 2, 64)}, ValueError, "v must be [90, 2, 64], got [89, 2, 64]"),
        ({"v": zeros(90, 2, 64, dtype=torch.bfloat16)}, TypeError, "v must be torch.float32"),
        ({"frames": 4}, ValueError, "frames must be a divisor of the 90 tokens, got 4"),
        ({"frames": 0}, ValueError, "frames must be a divisor of the 90 tokens, got 0"),
        ({"keep_ratio": 0.0}, ValueError, "keep_ratio must be above 0 and at most 1, got 0.0"),
        ({"keep_ratio": 1.5}, ValueError, "keep_ratio must be above 0 and at most 1, got 1.5"),
        ({"keep_ratio": math.nan}, ValueError, "keep_ratio must be above 0 and at most 1, got nan"),
        ({"anchor": 3}, ValueError, "anchor must be a frame from 0 to 2, got 3"),
        ({"out_k": zeros(45, 2, 64)}, ValueError, "out_k must be [46, 2, 64], got [45, 2, 64]"),
        ({"out_index": zeros(46)}, TypeError, "out_index must be torch.int32, got"),
        ({"k": np.zeros((90, 2, 64))}, TypeError, "head_dim], got a numpy array [90, 2, 64] float64"),
        ({"frames": "3"}, TypeError, "frames must be an integer, got '3'"),
        ({"frames": None}, TypeError, "frames must be an integer, got None"),
        ({"frames": 3.0}, TypeError, "frames must be an integer, got 3.0"),
        ({"keep_ratio": "x"}, TypeError, "keep_ratio must be a number, got 'x'"),
        ({"keep_ratio": None}, TypeError, "keep_ratio must be a number, got None"),
        ({"keep_ratio": True}, TypeError, "keep_ratio must be a number, got True"),
        ({"anchor": 1.5}, TypeError, "anchor must be an integer, got 1.5"),
        ({"pooled": "no"}, TypeError, "pooled must be True or False, got 'no'"),
        ({"backend": 1}, TypeError, "backend must be None or a name, got 1"),
        ({"backend": "nope"}, ValueError, "backend must be None or one of"),
    ],
)
def test_bad_arguments_are_named(changes, error, message):
    arguments = {"k": zeros(90, 2, 64), "v": zeros(90, 2, 64), "frames": 3, "keep_ratio": 0.25, **changes}
    with pytest.raises(error, match="compress_chunk: ") as caught:
        compress_chunk(**arguments)
    assert message in str(caught.value)


def test_outputs_must_not_overlap_inputs():
    pool = zeros(200, 2, 64)
    with pytest.raises(ValueError, match="compress_chunk: out_k must not overlap k, got 46 x 512 bytes"):
        compress_chunk(pool[:90], zeros(90, 2, 64), frames=3, keep_ratio=0.25, out_k=pool[89:135])


def test_opcheck_and_compile():
    k = torch.randn(90, 2, 64, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    v = k + 1
    want = published(k, v, frames=3, keep_ratio=0.25)
    outputs = (zeros(46, 2, 64), zeros(46, 2, 64), zeros(46, dtype=torch.int32), None)
    args = (k, v, *outputs, 3, 8, True, 0, "similarity", 0.9, 0.125, "auto")
    torch.library.opcheck(torch.ops.worldkv.compress_chunk.default, args)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(k, v):
        return published(k * 1, v, frames=3, keep_ratio=0.25)

    assert want.count is None
    assert all(torch.equal(a, b) for a, b in zip(compiled(k, v)[:3], want[:3], strict=True))
