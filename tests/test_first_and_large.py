"""What only a GPU shows: a first call inside a capture, one key and very many, pools past 2^31 elements."""

import subprocess
import sys

import pytest
import torch
from conftest import DEVICE, backends, relative_error
from torch.nn.functional import scaled_dot_product_attention

from worldkv_kernels import (
    Rope3D,
    Segment,
    Window,
    compress_chunk,
    dequantize_chunk,
    norm_rope_append,
    participation,
    quantize_chunk,
    segment_attention,
)
from worldkv_kernels.ops.compress_chunk import BACKENDS as COMPRESS
from worldkv_kernels.ops.norm_rope_append import BACKENDS as APPEND
from worldkv_kernels.ops.segment_attention import BACKENDS as ATTENTION

pytestmark = pytest.mark.skipif(DEVICE.type == "cpu", reason="needs a GPU")

OF_ATTENTION, OF_APPEND, OF_COMPRESS = (
    [name for name in backends(op) if name != "reference"] for op in (ATTENTION, APPEND, COMPRESS)
)
HALF = dict(dtype=torch.bfloat16, device=DEVICE)

FIRST_CALL = """
import torch
from worldkv_kernels import (
    Rope3D, RopeTable, Segment, Window, compress_chunk, dequantize_chunk, norm_rope_append, participation,
    quantize_chunk, segment_attention,
)

def random(*shape, seed=0):
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(shape, generator=generator, device="cuda").bfloat16()

k, v, q = (random(600, 4, 128, seed=i) for i in range(3))
window = Window([Segment(100, 300), Segment(0, 57)], device="cuda")
pools = [torch.zeros_like(k) for _ in range(2)]
first_row = torch.tensor([30], device="cuda")
where = dict(rope=RopeTable(Rope3D(128), (2, 6, 10), device="cuda", start_frame=30))
if not {table}:
    where = dict(rope=Rope3D(128), start_frame=30)
outs = [torch.empty_like(k[:400]) for _ in range(2)]
made = torch.empty_like(q)

def segment_attention_once(backend=None):
    return [segment_attention(q, k, v, window, out=made, backend=backend)]

lse = torch.full((4, 600), 7.0, device="cuda")

def participation_once(backend=None):
    return [participation(q, k, window, lse, backend=backend)]

def norm_rope_append_once(backend=None):
    rows = [x[:120].flatten(1) for x in (q, k, v)]
    options = dict(**where, grid=(2, 6, 10), backend=backend)
    return [norm_rope_append(*rows, *pools, first_row, **options), *pools]

def compress_chunk_once(backend=None):
    given = dict(frames=3, keep_ratio=0.5, out_k=outs[0], out_v=outs[1], backend=backend)
    return [x for x in compress_chunk(k, v, **given) if x is not None]

chosen = torch.tensor([[0, 600], [0, 0]], dtype=torch.int32, device="cuda")
of_chosen = torch.zeros(2, *chosen.shape[:1], *k.shape, dtype=k.dtype, device="cuda")
packed = {bits: torch.empty_like(quantize_chunk(k, v, bits=bits, backend="reference")) for bits in (8, 4)}

def quantize_chunk_once(backend=None):
    return [quantize_chunk(k, v, bits=bits, out=packed[bits], backend=backend) for bits in (8, 4)]

def dequantize_chunk_once(backend=None):
    bytes_of_both = quantize_chunk(k, v, bits=4, out=packed[4], backend=backend)
    return [
        *dequantize_chunk(bytes_of_both, bits=4, out_k=made, tokens=600, backend=backend),
        *dequantize_chunk(
            bytes_of_both[None], bits=4, out_k=of_chosen[0], out_v=of_chosen[1], chosen=chosen, backend=backend
        ),
    ]

once = {op}_once
torch.cuda.synchronize()
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):
    got = once()
graph.replay()
got = [x.float() for x in got]
want = [x.float() for x in once("reference")]
worst = max(((g - w).norm() / w.norm().clamp_min(1e-9)).item() for g, w in zip(got, want, strict=True))
print("error", worst)
assert worst < 1.5e-2, worst
"""


def first_call(op, table=True):
    program = FIRST_CALL.replace("{op}", op).replace("{table}", str(table))
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("self_check", ["1", "0"])
@pytest.mark.parametrize(
    "op",
    ["segment_attention", "participation", "norm_rope_append", "compress_chunk", "quantize_chunk", "dequantize_chunk"],
)
def test_the_first_call_of_a_process_may_be_inside_a_capture(op, self_check, monkeypatch):
    monkeypatch.setenv("WORLDKV_SELF_CHECK", self_check)
    done = first_call(op)
    assert done.returncode == 0, done.stderr[-3000:]


def test_a_rope_that_is_new_inside_a_capture_is_told_of():
    done = first_call("norm_rope_append", table=False)
    assert "norm_rope_append: rope must be a RopeTable inside the capture of a graph, or have been used" in done.stderr


@pytest.mark.parametrize("backend", OF_ATTENTION)
@pytest.mark.parametrize("keys", [1, 400_000])
def test_one_key_and_very_many(keys, backend):
    q = torch.randn(300, 2, 128, **HALF)
    k, v = (torch.randn(keys, 2, 128, **HALF) for _ in range(2))
    window = Window([Segment(0, keys)], device=DEVICE)
    got = segment_attention(q, k, v, window, backend=backend)
    of_heads = (x.float().transpose(0, 1)[None] for x in (q, k, v))
    want = scaled_dot_product_attention(*of_heads)[0].transpose(0, 1)
    assert relative_error(got, want) < 1.5e-2


def test_rows_past_2_31_elements(cuda_kernels):
    """One test, since several at once would not fit a GPU."""
    rows = (1 << 31) // (40 * 128) + 4096
    pools = [torch.full((rows, 40, 128), float("nan"), **HALF) for _ in range(2)]
    for backend in OF_ATTENTION:
        attended(pools, backend)
    for backend in OF_APPEND:
        appended(pools, backend)
    for backend in OF_COMPRESS:
        for rule in ("nearest", "similarity") if backend != "cuda" else ("similarity",):
            pruned(pools, backend, rule)
    for bits in (8, 4):
        packed_and_restored(pools, bits)


def attended(pools, backend):
    q = torch.randn(200, 40, 128, **HALF)
    k, v = (torch.randn(3000, 40, 128, **HALF) for _ in range(2))
    first = len(pools[0]) - 3000
    for pool, rows in zip(pools, (k, v), strict=True):
        pool[first:] = rows
    near, far = (Window([Segment(at, 1500), Segment(at + 1800, 1200)], device=DEVICE) for at in (0, first))
    want, lse = segment_attention(q, k, v, near, return_lse=True, backend=backend)
    assert torch.equal(segment_attention(q, *pools, far, backend=backend), want), backend
    assert torch.isfinite(want).all(), backend
    shares = participation(q, k, near, lse, backend="triton")
    assert torch.equal(participation(q, pools[0], far, lse, backend="triton"), shares)
    assert (shares.sum(1) - 1).abs().max() <= 1e-2


def appended(pools, backend):
    q, k, v = torch.randn(3, 2400, 5120, **HALF)
    near = [torch.zeros(2400, 40, 128, **HALF) for _ in range(2)]
    made = dict(rope=Rope3D(128), grid=(3, 20, 40), start_frame=5, backend=backend)
    first = len(pools[0]) - 2500
    for pool in pools:
        pool[first - 1 :] = float("nan")
    turned = norm_rope_append(q, k, v, *pools, first, **made)
    assert torch.equal(turned, norm_rope_append(q, k, v, *near, 0, **made)), backend
    for got, want in zip(pools, near, strict=True):
        assert torch.equal(got[first : first + 2400], want), backend
        assert got[first - 1].isnan().all() and got[first + 2400 :].isnan().all(), backend


def pruned(pools, backend, rule):
    options = dict(frames=3, keep_ratio=0.5, rule=rule, merge=rule == "nearest", backend=backend)
    k, v = (torch.randn(2400, 40, 128, **HALF) for _ in range(2))
    first = len(pools[0]) - 2400
    for pool, rows in zip(pools, (k, v), strict=True):
        pool[first:] = rows
    want = compress_chunk(k, v, **options)
    got = compress_chunk(*(pool[first:] for pool in pools), **options)
    assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True) if w is not None), (backend, rule)


def packed_and_restored(pools, bits):
    k, v = (torch.randn(2400, 40, 128, **HALF) for _ in range(2))
    rows = [pool[len(pool) - 2400 :] for pool in pools]
    for of_pool, x in zip(rows, (k, v), strict=True):
        of_pool.copy_(x)
    packed = quantize_chunk(*rows, bits=bits, backend="triton")
    assert torch.equal(packed, quantize_chunk(k, v, bits=bits, backend="triton")), bits
    dequantize_chunk(packed, bits=bits, out_k=rows[0], out_v=rows[1], backend="triton")
    dequantize_chunk(packed, bits=bits, out_k=k, out_v=v, backend="triton")
    assert torch.equal(rows[0], k) and torch.equal(rows[1], v), bits
    restored_far(pools, packed, bits, k, v)


def restored_far(pools, packed, bits, k, v):
    """A chunk whose place in the bank is as far from the first one as the rows that it is restored to."""
    of_pool, of_bank = pools[0], pools[1].view(torch.uint8).flatten()
    far = (len(of_bank) - packed.numel()) // 16 * 16
    bank = of_bank.as_strided((2, *packed.shape), (far, *packed.stride()))
    bank[1] = packed
    out_k = of_pool.as_strided((2, *k.shape), (of_pool[:-2400].numel(), *k.stride()))
    out_k[1], out_v = 0.0, torch.empty(2, *v.shape, **HALF)
    chosen = torch.tensor([[1, 0], [1, 2400]], dtype=torch.int32, device=DEVICE)
    dequantize_chunk(bank, bits=bits, out_k=out_k, out_v=out_v, chosen=chosen, backend="triton")
    assert torch.equal(out_k[1], k) and torch.equal(out_v[1], v), bits


@pytest.mark.parametrize("backend", OF_ATTENTION)
@pytest.mark.parametrize("q_len, keys", [(300, 40_000), (4680, 5_000)])
def test_twenty_runs_of_attention_give_the_same_bits(q_len, keys, backend):
    q = torch.randn(q_len, 12, 128, **HALF)
    k, v = (torch.randn(keys, 12, 128, **HALF) for _ in range(2))
    segments = [Segment(0, keys // 2, 3), Segment(keys // 2 + 5, keys // 3, -7)]
    window = Window(segments, device=DEVICE, rope=Rope3D(128))
    extras = dict(return_lse=True, return_mass=backend != "sdpa")  # which has no mass
    runs = [segment_attention(q, k, v, window, backend=backend, **extras) for _ in range(20)]
    assert all(torch.equal(x, first) for run in runs[1:] for x, first in zip(run, runs[0], strict=True))
