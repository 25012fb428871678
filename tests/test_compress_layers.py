"""compress_chunk as published, of all layers in one call, against one layer at a time, on every backend this machine
has."""

import math
import re

import pytest
import torch
from conftest import DEVICE, backends
from hypothesis import given, settings
from hypothesis import strategies as st
from launches import Counted
from test_compress_chunk import brute_force, float64_similarities, published, separated_keys

from worldkv_kernels import compress_chunk
from worldkv_kernels.checks import Pieces
from worldkv_kernels.ops import cuda
from worldkv_kernels.ops.compress_chunk import BACKENDS

BACKEND_NAMES = backends(BACKENDS)
TOKENS, HEADS, HEAD_DIM = 42, 2, 64  # of three frames
KEPT = 14 + 2 * 4  # of a quarter


def random_chunk(*layers, seed=0, dtype=torch.bfloat16):
    generator = torch.Generator().manual_seed(seed)
    k, v = torch.randn(2, *layers, TOKENS, HEADS, HEAD_DIM, generator=generator).to(DEVICE, dtype)
    return k, v


def assert_each_as_alone(got, k, v, **arguments):
    """`got` of all layers has the bits that each layer gets in a call of its own."""
    for layer in range(len(k)):
        alone = published(k[layer].contiguous(), v[layer].contiguous(), **arguments)
        for name in ("k", "v", "index"):
            assert torch.equal(getattr(got, name)[layer], getattr(alone, name)), (layer, name)


@pytest.mark.parametrize("backend", BACKEND_NAMES)
@pytest.mark.parametrize(("pooled", "keep_ratio"), [(True, 0.25), (False, 0.25), (True, 1.0)])
def test_slots_of_a_pool_in_and_out(backend, pooled, keep_ratio):
    """Rows of a pool into other rows of it. What is beside them is NaN: it is not read, and not written."""
    kept = KEPT if keep_ratio < 1 else TOKENS
    pools = torch.full((2, 3, 120, HEADS, HEAD_DIM), math.nan, device=DEVICE, dtype=torch.bfloat16)
    source, target = slice(70, 70 + TOKENS), slice(16, 16 + kept)
    pools[:, :, source] = torch.stack(random_chunk(3))
    want = pools.clone()
    (k, v), (out_k, out_v) = pools[:, :, source], pools[:, :, target]
    index = torch.full((3 * kept + 2,), -1, dtype=torch.int32, device=DEVICE)
    arguments = dict(frames=3, keep_ratio=keep_ratio, pooled=pooled, anchor=1, backend=backend)
    got = published(k, v, out_k=out_k, out_v=out_v, out_index=index[1:-1].view(3, kept), **arguments)
    assert got.k is out_k and got.v is out_v
    assert index[0] == index[-1] == -1
    assert_each_as_alone(got, k, v, **arguments)
    rows = got.index.long()
    assert len({tuple(kept) for kept in rows.tolist()}) == (3 if keep_ratio < 1 else 1)
    for layer in range(3):
        want[:, layer, target] = want[:, layer, source][:, rows[layer]]
    assert torch.equal(pools.view(torch.int16), want.view(torch.int16))


@pytest.mark.parametrize("backend", BACKEND_NAMES)
@pytest.mark.parametrize("pooled", [True, False])
def test_every_layer_is_judged_by_its_own_keys(backend, pooled):
    """By the rule in float64: layers apart in size, one with ties alone, one with NaN, and an anchor in the middle."""
    k = torch.stack([separated_keys(TOKENS, HEADS, HEAD_DIM, 3, 1, seed) for seed in range(4)])
    k[1, :14] = k[1, 28:] = 0.0  # the similarity of a key of zeros is zero: the earlier are kept
    k[2] *= 1000
    similarities = [float64_similarities(layer, 3, 1) for layer in k]
    k[3, 5] = math.nan
    similarities[3][0, 5] = math.inf
    k = k.to(DEVICE)
    got = published(k, k + 1, frames=3, keep_ratio=0.25, pooled=pooled, anchor=1, backend=backend)
    for layer in range(4):
        assert got.index[layer].tolist() == brute_force(similarities[layer], 4, pooled, 1), layer
        kept = got.index[layer].long()
        assert torch.equal(got.k[layer].nan_to_num(7), k[layer, kept].nan_to_num(7))
        assert torch.equal(got.v[layer].nan_to_num(7), (k[layer, kept] + 1).nan_to_num(7))


def layers_apart(rows, gap=0):
    """[3, rows, HEADS, HEAD_DIM], with `gap` numbers between layers."""
    size = rows * HEADS * HEAD_DIM
    space = torch.full((3 * (size + gap),), math.nan, device=DEVICE)
    return space.as_strided((3, rows, HEADS, HEAD_DIM), (size + gap, HEADS * HEAD_DIM, HEAD_DIM, 1))


def rows_before_layers(rows):
    """[3, rows, HEADS, HEAD_DIM] where a token's layers lie side by side."""
    return torch.full((rows, 3, HEADS, HEAD_DIM), math.nan, device=DEVICE).transpose(0, 1)


def columns_of_projections(rows):
    """[3, rows, HEADS, HEAD_DIM], every row the middle of a longer one."""
    wide = torch.full((3, rows, 3 * HEADS * HEAD_DIM), math.nan, device=DEVICE)
    return wide[..., HEADS * HEAD_DIM : 2 * HEADS * HEAD_DIM].unflatten(2, (HEADS, HEAD_DIM))


LAYOUTS = [
    layers_apart, rows_before_layers, columns_of_projections, lambda rows: layers_apart(rows, gap=4),
    lambda rows: layers_apart(rows, gap=3),
]  # fmt: skip


@pytest.mark.parametrize("backend", BACKEND_NAMES)
@pytest.mark.parametrize(("inward", "outward"), [(0, 1), (1, 2), (2, 3), (4, 0)])
def test_layers_and_rows_of_any_stride(backend, inward, outward):
    """K, V and both outputs each lie in a way of their own."""
    chunk = random_chunk(3, dtype=torch.float32)
    k, v = LAYOUTS[inward](TOKENS).copy_(chunk[0]), LAYOUTS[outward](TOKENS).copy_(chunk[1])
    out_k, out_v = LAYOUTS[outward](KEPT), LAYOUTS[inward](KEPT)
    if backend == "cuda" and inward == 4:
        with pytest.raises(ValueError, match="it takes rows that start on multiples of 16 bytes"):
            published(k, v, frames=3, keep_ratio=0.25, out_k=out_k, out_v=out_v, backend=backend)
        return
    got = published(k, v, frames=3, keep_ratio=0.25, out_k=out_k, out_v=out_v, backend=backend)
    assert_each_as_alone(got, *chunk, frames=3, keep_ratio=0.25, backend=backend)


@pytest.mark.parametrize("backend", BACKEND_NAMES)
def test_inputs_may_be_one_layer_seen_as_many(backend):
    k, v = random_chunk()
    got = published(k.expand(3, -1, -1, -1), v.expand(3, -1, -1, -1), frames=3, keep_ratio=0.25, backend=backend)
    alone = published(k, v, frames=3, keep_ratio=0.25, backend=backend)
    for all_layers, one in zip(got[:3], alone[:3], strict=True):
        assert torch.equal(all_layers, one.expand(3, *one.shape))


@pytest.mark.parametrize("backend", BACKEND_NAMES)
def test_one_layer(backend):
    k, v = random_chunk(1)
    got = published(k, v, frames=3, keep_ratio=0.25, backend=backend)
    assert [list(x.shape) for x in got[:3]] == [[1, KEPT, HEADS, HEAD_DIM]] * 2 + [[1, KEPT]]
    assert_each_as_alone(got, k, v, frames=3, keep_ratio=0.25, backend=backend)


@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a GPU")
@pytest.mark.parametrize("backend", [name for name in BACKEND_NAMES if name != "reference"])
@pytest.mark.parametrize("pooled", [True, False])
def test_all_layers_of_a_model_twenty_times_the_same(backend, pooled):
    k, v = torch.randn(2, 30, 2640, 12, 128, device=DEVICE, dtype=torch.bfloat16)
    arguments = dict(frames=3, keep_ratio=0.25, pooled=pooled, backend=backend)
    first = published(k, v, **arguments)
    assert_each_as_alone(first, k, v, **arguments)
    for _ in range(20):
        again = published(k, v, **arguments)
        assert all(torch.equal(a, b) for a, b in zip(first[:3], again[:3], strict=True))


@pytest.mark.skipif("triton" not in BACKEND_NAMES, reason="triton is not installed")
@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize(("keep_ratio", "count"), [(0.25, 4), (1.0, 1)])
def test_triton_launches_as_much_for_all_layers_as_for_one(monkeypatch, layers, keep_ratio, count):
    from worldkv_kernels.kernels import compress_chunk as kernels

    launches = []
    for name in ("anchor_mean_kernel", "similarity_kernel", "select_kernel", "gather_kernel"):
        monkeypatch.setattr(kernels, name, Counted(getattr(kernels, name), launches))
    published(*random_chunk(layers), frames=3, keep_ratio=keep_ratio, backend="triton")
    assert len(launches) == count
    assert all(grid[-1] == layers for grid in launches)


@pytest.mark.skipif("triton" not in BACKEND_NAMES, reason="triton is not installed")
def test_triton_counts_candidates_in_32_bits():
    from worldkv_kernels.kernels.compress_chunk import compress_chunk as launch

    k = torch.empty(2**15, 3 * 2**15, 1, 64, device="meta")
    message = r"compress_chunk: k must have fewer than 2\*\*31 tokens .* got 32768 layers of 65536"
    with pytest.raises(ValueError, match=message):
        launch(
            k, k, k, k, k, None, frames=3, keep=1, pooled=True, anchor=0, rule="similarity", merge_above=0.9, scale=1.0,
        )  # fmt: skip


@pytest.mark.parametrize(("gap", "aligned"), [(0, True), (8, True), (4, False)])
@pytest.mark.parametrize("which", ["k", "v", "out_k", "out_v"])
def test_layers_that_do_not_start_on_16_bytes_are_no_work_for_the_cuda_kernel(monkeypatch, which, gap, aligned):
    kinds = []
    choose = BACKENDS.choose
    monkeypatch.setattr(BACKENDS, "choose", lambda *args: kinds.append(args[2]) or choose(*args))
    k, v = random_chunk(2)
    tensors = {"k": k, "v": v, "out_k": k[:, :KEPT].clone(), "out_v": v[:, :KEPT].clone()}
    stride = TOKENS * 128 + gap
    space = torch.zeros(2 * stride, dtype=k.dtype, device=DEVICE)
    strided = space.as_strided(tensors[which].shape, (stride, 128, 64, 1))
    tensors[which] = strided.copy_(tensors[which])
    published(**tensors, frames=3, keep_ratio=0.25, backend="reference")
    why = cuda.compress_unsupported(kinds[0])
    assert why is None if aligned else why == "it takes rows that start on multiples of 16 bytes"


# --- what overlaps ---


def buffer_view(data, rows_lie_close):
    """[layers, rows, 1, columns] somewhere in a buffer of bytes, and the bytes of each of its layers."""
    layers, rows, columns = (data.draw(st.integers(1, 4)) for _ in range(3))
    row_stride = columns if rows_lie_close else data.draw(st.integers(0, 6))
    layer_stride = data.draw(st.integers(0, 30))
    first = data.draw(st.integers(0, 40))
    view = torch.empty(256, dtype=torch.uint8).as_strided((layers, rows, 1, columns), (layer_stride, row_stride, 1, 1))
    starts = [first + layer * layer_stride for layer in range(layers)]
    cells = {start + row * row_stride + i for start in starts for row in range(rows) for i in range(columns)}
    reached = {start + i for start in starts for i in range((rows - 1) * row_stride + columns)}
    return Placed(view, first), cells, reached


class Placed:
    """A tensor as if its first byte had the address `first`."""

    def __init__(self, tensor, first):
        self.shape, self.stride, self.element_size = tensor.shape, tensor.stride, tensor.element_size
        self.data_ptr = lambda: first


@settings(max_examples=600, deadline=None, derandomize=True)
@given(st.data(), st.booleans(), st.booleans())
def test_overlap_is_found_where_it_is_and_nowhere_else(data, rows_lie_close, same_stride):
    """Against sets of bytes: exactly, where a layer's rows lie one after another; without fail, where they do not."""
    (a, a_cells, a_reached), (b, b_cells, b_reached) = (buffer_view(data, rows_lie_close) for _ in range(2))
    meets = Pieces.of(a).meets(Pieces.of(b))
    assert meets == Pieces.of(b).meets(Pieces.of(a)) == bool(a_reached & b_reached)
    assert meets or not a_cells & b_cells
    assert not rows_lie_close or meets == bool(a_cells & b_cells)


def pool_rows(pool, first, count):
    return pool[:, first : first + count]


@pytest.mark.parametrize("first", [0, 10, 42, 58])
def test_layers_of_source_and_target_may_interleave(first):
    """Their spans overlap, since every layer of the pool has both; the target touches the source's ends."""
    pool = torch.randn(2, 5, 80, HEADS, HEAD_DIM, device=DEVICE)
    source = 0 if first >= TOKENS else first + KEPT
    k, v = pool[:, :, source : source + TOKENS].clone()
    got = published(
        pool_rows(pool[0], source, TOKENS), pool_rows(pool[1], source, TOKENS), frames=3, keep_ratio=0.25,
        out_k=pool_rows(pool[0], first, KEPT), out_v=pool_rows(pool[1], first, KEPT), backend="reference",
    )  # fmt: skip
    assert_each_as_alone(got, k, v, frames=3, keep_ratio=0.25, backend="reference")


@pytest.mark.parametrize(
    ("out_k", "out_v", "message"),
    [
        (lambda pool: pool_rows(pool, 41, KEPT), None,
         "out_k must not overlap k, got 3 x 11264 bytes, 40960 apart, from"),
        (None, lambda pool: pool_rows(pool, 0, KEPT), "out_v must not overlap k, got"),
        (lambda pool: pool_rows(pool, 58, KEPT), lambda pool: pool_rows(pool, 45, KEPT),
         "out_k must not overlap out_v"),
        # The first layer lies after the input's first; the second reaches into its second.
        (lambda pool: pool.as_strided((3, KEPT, HEADS, HEAD_DIM), (30 * 128, 128, 64, 1), 43 * 128), None,
         "out_k must not overlap k, got"),
        (lambda pool: pool[:, 50:51].expand(-1, KEPT, -1, -1), None, "out_k must not overlap itself"),
        (None, lambda pool: pool[:1, 50:72].expand(3, -1, -1, -1), "out_v must not overlap itself"),
        (lambda pool: pool.as_strided((3, KEPT, HEADS, HEAD_DIM), (21 * 128, 128, 64, 1)), None,
         "out_k must not overlap itself, got [3, 22, 2, 64] torch.float32"),
    ],
    ids=["k", "v on k", "outputs", "another stride", "rows", "layers expanded", "layers run into each other"],
)  # fmt: skip
def test_overlaps_are_refused(out_k, out_v, message):
    pool = torch.zeros(3, 80, HEADS, HEAD_DIM, device=DEVICE)
    k, v = pool_rows(pool, 0, TOKENS), torch.zeros(3, TOKENS, HEADS, HEAD_DIM, device=DEVICE)
    outs = {name: make(pool) for name, make in (("out_k", out_k), ("out_v", out_v)) if make is not None}
    with pytest.raises(ValueError, match=f"compress_chunk: {re.escape(message)}"):
        published(k, v, frames=3, keep_ratio=0.25, **outs)


# --- errors, and what torch makes of the op ---


def zeros(*shape, dtype=torch.float32):
    return torch.zeros(*shape, dtype=dtype, device=DEVICE)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"k": zeros(1, 3, 90, 2, 64)}, ValueError,
         "k must be [tokens, heads, head_dim] or [layers, tokens, heads, head_dim], got [1, 3, 90, 2, 64]"),
        ({"k": zeros(0, 90, 2, 64)}, ValueError, "k must be of 1 to 65535 layers, got [0, 90, 2, 64]"),
        ({"k": zeros(1, 90, 2, 64).expand(65536, -1, -1, -1)}, ValueError,
         "k must be of 1 to 65535 layers, got [65536, 90, 2, 64]"),
        ({"k": zeros(3, 90, 64, 2).transpose(2, 3)}, ValueError, "k must be contiguous in its last 2"),
        ({"v": zeros(2, 90, 2, 64)}, ValueError, "v must be [3, 90, 2, 64], got [2, 90, 2, 64]"),
        ({"v": zeros(90, 2, 64)}, ValueError, "v must be [3, 90, 2, 64], got [90, 2, 64]"),
        ({"k": zeros(90, 2, 64)}, ValueError, "v must be [90, 2, 64], got [3, 90, 2, 64]"),
        ({"out_k": zeros(2, 46, 2, 64)}, ValueError, "out_k must be [3, 46, 2, 64], got [2, 46, 2, 64]"),
        ({"out_v": zeros(46, 2, 64)}, ValueError, "out_v must be [3, 46, 2, 64], got [46, 2, 64]"),
        ({"out_v": zeros(3, 46, 64, 2).transpose(2, 3)}, ValueError, "out_v must be contiguous in its last 2"),
        ({"out_index": zeros(46, dtype=torch.int32)}, ValueError, "out_index must be [3, 46], got [46]"),
        ({"out_index": zeros(3, 50, dtype=torch.int32)[:, :46]}, ValueError,
         "out_index must be contiguous in its last 2"),
        ({"frames": 4}, ValueError, "frames must be a divisor of the 90 tokens, got 4"),
    ],
)  # fmt: skip
def test_bad_layers_are_named(changes, error, message):
    arguments = {"k": zeros(3, 90, 2, 64), "v": zeros(3, 90, 2, 64), "frames": 3, "keep_ratio": 0.25, **changes}
    with pytest.raises(error, match=f"compress_chunk: {re.escape(message)}"):
        compress_chunk(**arguments)


def test_opcheck_and_compile():
    pools = torch.zeros(2, 3, 160, HEADS, HEAD_DIM, device=DEVICE)
    pools[:, :, :TOKENS] = torch.stack(random_chunk(3, dtype=torch.float32))
    target = slice(100, 100 + KEPT)
    (k, v), (out_k, out_v) = pools[:, :, :TOKENS], pools[:, :, target].clone()
    want = published(k, v, frames=3, keep_ratio=0.25)
    index = zeros(3, KEPT, dtype=torch.int32)
    args = (k, v, out_k, out_v, index, None, 3, 4, True, 0, "similarity", 0.9, 0.125, "auto")
    torch.library.opcheck(torch.ops.worldkv.compress_chunk.default, args)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(pools):
        k, v = pools[:, :, :TOKENS] * 1
        return published(k, v, frames=3, keep_ratio=0.25, out_k=pools[0, :, target], out_v=pools[1, :, target])

    assert all(torch.equal(a, b) for a, b in zip(compiled(pools)[:3], want[:3], strict=True))
    assert torch.equal(pools[0, :, target], want.k)
