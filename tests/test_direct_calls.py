"""torch.ops.worldkv called without the public functions: what their contracts refuse is refused there, too."""

import itertools
import math
import re

import pytest
import torch
from conftest import DEVICE

from worldkv_kernels import Rope3D, Segment, Window

F32, F64 = torch.float32, torch.float64


def zeros(*shape, dtype=F32):
    return torch.zeros(*shape, dtype=dtype, device=DEVICE)


def refuses(op, given, changes, error, message):
    outputs = [x for x in given.values() if isinstance(x, torch.Tensor) and x.is_floating_point()]
    getattr(torch.ops.worldkv, op)(**given)  # right without the changes
    before = [x.clone() for x in outputs]
    with pytest.raises(error, match=f"{op}: {re.escape(message)}"):
        getattr(torch.ops.worldkv, op)(**{**given, **changes})
    assert all(map(torch.equal, outputs, before))


TABLES = ("tiles", "tail_rows", "ranges", "num_segments", "turns", "weights")


def attention(segments=((0, 200, 1), (10, 5, 0)), **changes):
    window = Window([Segment(*s) for s in segments], device=DEVICE, rope=Rope3D(64), weighted=True, **changes)
    tensors = dict(q=zeros(5, 2, 64), k_pool=zeros(300, 2, 64), v_pool=zeros(300, 2, 64))
    outputs = dict(out=zeros(5, 2, 64), lse=zeros(2, 5), mass=zeros(2, len(segments)))
    tables = dict(zip(TABLES, window.tables, strict=True))
    return {**tensors, **tables, **outputs, "scale": 0.125, "has_shift": True, "has_weight": True, "backend": "auto"}


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"q": zeros(5, 128)}, ValueError, "q must be [q_len, heads, head_dim], got [5, 128]"),
        ({"q": zeros(())}, ValueError, "q must be [q_len, heads, head_dim], got []"),
        (
            {"q": zeros(5, 2, 96)},
            ValueError,
            "q must be [q_len, heads, head_dim], heads not first, with 1 to 128 heads",
        ),
        ({"q": zeros(2, 300, 64)}, ValueError, "q must be [q_len, heads, head_dim], heads not first, with 1 to 128 he"),
        ({"q": zeros(0, 2, 64)}, ValueError, "q must be [q_len >= 1, heads, head_dim]"),
        ({"q": zeros(5, 2, 64, dtype=F64)}, TypeError, "q must be torch.bfloat16 or torch.float16 or torch.float32"),
        ({"q": zeros(5, 64, 2).mT}, ValueError, "q must be contiguous in its last 1"),
        ({"k_pool": zeros(300)}, ValueError, "k_pool must be [rows, kv_heads, 64], got [300]"),
        (
            {"k_pool": zeros(300, 3, 64)},
            ValueError,
            "k_pool must be [300, kv_heads, 64] with kv_heads a divisor of q's 2 heads, got [300, 3, 64]",
        ),
        ({"k_pool": zeros(300, 1, 64)}, ValueError, "v_pool must be [300, 1, 64], got [300, 2, 64]"),
        ({"k_pool": zeros(300, 2, 64).half()}, TypeError, "k_pool must be torch.float32"),
        ({"v_pool": zeros(300, 2, 128)}, ValueError, "v_pool must be [300, 2, 64], since K and V share one head_dim"),
        ({"v_pool": zeros(299, 2, 64)}, ValueError, "v_pool must be [300, 2, 64], got [299, 2, 64]"),
        ({"tiles": zeros(3, 2, dtype=torch.int64)}, TypeError, "tiles must be torch.int32"),
        ({"tiles": zeros(6, 2, dtype=torch.int32)[::2]}, ValueError, "tiles must be contiguous"),
        ({"tail_rows": zeros(383, 2, dtype=torch.int32)}, ValueError, "tail_rows must be [384, 2]"),
        ({"num_segments": zeros(2, dtype=torch.int32)}, ValueError, "num_segments must be [1], got [2]"),
        ({"turns": zeros(1, 1, 2)}, ValueError, "turns must be [3, pairs, 2], got [1, 1, 2]"),
        ({"turns": zeros(3, 33, 2)}, ValueError, "turns must be [3, 1 to 32 pairs, 2], got [3, 33, 2]"),
        ({"turns": zeros(3, 0, 2)}, ValueError, "turns must be [3, 1 to 32 pairs, 2], got [3, 0, 2]"),
        ({"turns": zeros(3, 32, 4)[..., ::2]}, ValueError, "turns must be contiguous in its last 3"),
        ({"turns": zeros(3, 32, 2, dtype=F64)}, TypeError, "turns must be torch.float32"),
        ({"weights": zeros(1)}, ValueError, "weights must be [3], got [1]"),
        ({"weights": zeros(6)[::2]}, ValueError, "weights must be contiguous in its last 1"),
        ({"weights": zeros(3, dtype=F64)}, TypeError, "weights must be torch.float32"),
        ({"out": zeros(4, 2, 64)}, ValueError, "out must be [5, 2, 64], got [4, 2, 64]"),
        ({"lse": zeros(5, 2)}, ValueError, "lse must be [2, 5], got [5, 2]"),
        ({"lse": zeros(5, 2).T}, ValueError, "lse must be contiguous in its last 2"),
        ({"lse": zeros(2, 5).half()}, TypeError, "lse must be torch.float32"),
        ({"mass": zeros(3, 2)}, ValueError, "mass must be [2, segments], got [3, 2]"),
        ({"mass": zeros(2, 0)}, ValueError, "mass must be [2, segments >= 1], got [2, 0]"),
        *[
            ({"scale": scale}, ValueError, f"scale must be from 1e-25 to 1e+25, got {scale}")
            for scale in (-0.125, 0.0, 1e-46, 1e37, math.nan)
        ],
        ({"backend": "tpu"}, ValueError, "backend must be None or one of"),
    ],
)
def test_attention_refuses(changes, error, message):
    refuses("segment_attention", attention(), changes, error, message)


def participation(**changes):
    given = {name: x for name, x in attention().items() if name not in ("v_pool", "mass")}
    return {**given, "out": zeros(2, 9), **changes}


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            {"q": zeros(5, 2, 96)},
            ValueError,
            "q must be [q_len, heads, head_dim], heads not first, with 1 to 128 heads",
        ),
        ({"k_pool": zeros(300, 2, 64).half()}, TypeError, "k_pool must be torch.float32"),
        ({"tail_rows": zeros(383, 2, dtype=torch.int32)}, ValueError, "tail_rows must be [384, 2]"),
        ({"turns": zeros(3, 33, 2)}, ValueError, "turns must be [3, 1 to 32 pairs, 2], got [3, 33, 2]"),
        ({"weights": zeros(6)[::2]}, ValueError, "weights must be contiguous in its last 1"),
        ({"lse": zeros(5, 2).T}, ValueError, "lse must be contiguous in its last 2"),
        ({"out": zeros(2, 0)}, ValueError, "out must be [2, tokens >= 1], got [2, 0]"),
        ({"out": zeros(3, 9)}, ValueError, "out must be [2, tokens], got [3, 9]"),
        ({"scale": math.nan}, ValueError, "scale must be from 1e-25 to 1e+25, got nan"),
        ({"backend": "cuda"}, ValueError, "backend must be None or one of"),
        (
            {"num_segments": torch.full((1,), 4, dtype=torch.int32, device=DEVICE), "backend": "reference"},
            ValueError,
            "num_segments must hold 1 to 3, got 4",
        ),
        (
            {"tiles": torch.full((3, 2), 173, dtype=torch.int32, device=DEVICE), "backend": "reference"},
            ValueError,
            "tiles and tail_rows must name rows of the pool, from 0 to 299, got 10 to 300",
        ),
    ],
)
def test_participation_refuses(changes, error, message):
    refuses("participation", participation(), changes, error, message)


@pytest.mark.parametrize("capacity", [3, 8])
def test_tables_in_another_order_are_refused(capacity):
    given = attention(capacity=capacity)
    for order in itertools.permutations(TABLES[:4]):
        if order != TABLES[:4]:
            changes = {name: given[other] for name, other in zip(TABLES, order, strict=False)}
            with pytest.raises(ValueError, match=r"segment_attention: .* must be "):
                torch.ops.worldkv.segment_attention(**{**given, **changes})


def test_outputs_of_attention_that_lie_over_each_other_or_an_input_are_refused():
    given = attention()
    room = zeros(300, 2, 64)
    for changes, message in (
        ({"out": room[:5], "q": room[4:9]}, "out must not overlap q"),
        ({"out": room[290:295], "v_pool": room}, "out must not overlap v_pool"),
        ({"lse": room.view(-1)[:10].view(2, 5), "out": room[:5]}, "out must not overlap lse"),
        ({"mass": room.view(-1)[:4].view(2, 2), "lse": room.view(-1)[:10].view(2, 5)}, "lse must not overlap mass"),
    ):
        refuses("segment_attention", given, changes, ValueError, message)


@pytest.mark.parametrize(
    ("table", "place", "value", "message"),
    [
        ("tiles", (0, 0), 173, "tiles and tail_rows must name rows of the pool, from 0 to 299, got 10 to 300"),
        ("tail_rows", (0, 0), -1, "tiles and tail_rows must name rows of the pool, from 0 to 299, got -1 to 199"),
        ("num_segments", 0, 0, "num_segments must hold 1 to 3, got 0"),
        ("num_segments", 0, 4, "num_segments must hold 1 to 3, got 4"),
    ],
)
def test_the_reference_looks_at_what_is_in_the_tables(table, place, value, message):
    given = attention()
    changed = given[table].clone()
    changed[place] = value
    refuses("segment_attention", {**given, "backend": "reference"}, {table: changed}, ValueError, message)


def append():
    q, k, v = zeros(3, 12, 128)
    return dict(
        q=q, k=k, v=v, k_pool=zeros(20, 2, 64), v_pool=zeros(20, 2, 64), q_out=zeros(12, 2, 64), table=zeros(8, 32, 2),
        device_first_row=None, first_row=8, grid=[2, 2, 3], pairs=[12, 10, 10],
        q_weight=zeros(128), k_weight=zeros(128), eps=1e-6, round_before_rope=True, backend="auto",
    )  # fmt: skip


AT = zeros(1, dtype=torch.int64)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"q": zeros(())}, ValueError, "q must be [tokens, heads * 64], got []"),
        (
            {"q": zeros(12, 192)},
            ValueError,
            "q must be [tokens, heads * 64], heads a multiple of the pools' 2, at most",
        ),
        ({"k": zeros(11, 128)}, ValueError, "k must be [12, 128], got [11, 128]"),
        ({"v": zeros(12, 128, dtype=F64)}, TypeError, "v must be torch.float32"),
        ({"k_pool": zeros(20)}, ValueError, "k_pool must be [rows, kv_heads, head_dim], got [20]"),
        ({"k_pool": zeros(2, 129, 64)}, ValueError, "k_pool must be [rows, kv_heads, head_dim], heads not first, with"),
        ({"v_pool": zeros(20, 2, 128)}, ValueError, "v_pool must be [20, 2, 64], got [20, 2, 128]"),
        ({"v_pool": zeros(20, 64, 2).mT}, ValueError, "v_pool must be contiguous in its last 2"),
        ({"q_out": zeros(12, 128)}, ValueError, "out must be [12, 2, 64], got [12, 128]"),
        ({"table": zeros(8, 64, 2)}, ValueError, "table must be [positions, 32, 2], got [8, 64, 2]"),
        ({"table": zeros(8, 32, 2, dtype=F64)}, TypeError, "table must be torch.float32"),
        ({"grid": [2, 2, 2]}, ValueError, "grid must be (frames, height, width) of 12 tokens in all, got (2, 2, 2)"),
        ({"grid": [12]}, ValueError, "grid must be (frames, height, width) of 12 tokens in all, got (12,)"),
        ({"grid": [1, 1, 12]}, ValueError, "grid must be within the table's 8 positions, got (1, 1, 12)"),
        ({"pairs": [40, -4, -4]}, ValueError, "pairs must be three counts that add up to 32, got (40, -4, -4)"),
        ({"first_row": 9}, ValueError, "first_row must be from 0 to 8 for 12 tokens in 20 rows, got 9"),
        ({"grid": [12, 1, 1]}, ValueError, "grid must be within the table's 8 positions, got (12, 1, 1)"),
        ({"device_first_row": AT.int()}, TypeError, "first_row must be torch.int64"),
        ({"device_first_row": AT + 9}, ValueError, "first_row must be from 0 to 8 for 12 tokens in 20 rows, got 9"),
        ({"q_weight": zeros(64)}, ValueError, "q_weight must be [128], got [64]"),
        *[({"eps": eps}, ValueError, f"eps must be finite and not negative, got {eps}") for eps in (-1e-6, math.nan)],
    ],
)
def test_append_refuses(changes, error, message):
    refuses("norm_rope_append", append(), changes, error, message)


def test_outputs_of_append_that_lie_over_each_other_or_an_input_are_refused():
    given = append()
    for changes, message in (
        ({"v_pool": given["k_pool"]}, "k_pool must not overlap v_pool"),
        ({"q_out": given["q"].view(12, 2, 64)}, "out must not overlap q"),
    ):
        refuses("norm_rope_append", given, changes, ValueError, message)


def compress(layers=(3,)):
    return dict(
        k=zeros(*layers, 12, 2, 64), v=zeros(*layers, 12, 2, 64), out_k=zeros(*layers, 8, 2, 64),
        out_v=zeros(*layers, 8, 2, 64), index=zeros(*layers, 8, dtype=torch.int32),
        count=zeros(*layers, 8, dtype=torch.int32), frames=3, keep=2, pooled=True, anchor=0, rule="nearest",
        merge_above=0.9, scale=0.125, backend="auto",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"k": zeros(12)}, ValueError, "k must be [tokens, heads, head_dim] or [layers, tokens, heads, head_dim]"),
        (
            {"k": zeros(1, 2, 600, 64)},
            ValueError,
            "k must be [layers, tokens, heads, head_dim], heads not first, with 1",
        ),
        ({"k": zeros(3, 12, 2, 64, dtype=F64)}, TypeError, "k must be torch.bfloat16 or"),
        ({"v": zeros(12, 2, 64)}, ValueError, "v must be [3, 12, 2, 64], got [12, 2, 64]"),
        ({"out_k": zeros(3, 7, 2, 64)}, ValueError, "out_k must be [3, 8, 2, 64], got [3, 7, 2, 64]"),
        ({"out_v": zeros(3, 8, 2, 64).half()}, TypeError, "out_v must be torch.float32"),
        ({"index": zeros(3, 8)}, TypeError, "out_index must be torch.int32"),
        ({"index": zeros(8, dtype=torch.int32)}, ValueError, "out_index must be [3, 8], got [8]"),
        ({"index": zeros(3, 9, dtype=torch.int32)[:, :8]}, ValueError, "out_index must be contiguous in its last 2"),
        ({"frames": 5}, ValueError, "frames must be a divisor of the 12 tokens, got 5"),
        ({"anchor": 3}, ValueError, "anchor must be a frame from 0 to 2, got 3"),
        ({"anchor": -1}, ValueError, "anchor must be a frame from 0 to 2, got -1"),
        ({"keep": 0}, ValueError, "keep must be at least 1, got 0"),
        ({"count": zeros(3, 8)}, TypeError, "out_count must be torch.int32"),
        ({"count": zeros(8, dtype=torch.int32)}, ValueError, "out_count must be [3, 8], got [8]"),
        ({"count": zeros(3, 9, dtype=torch.int32)[:, :8]}, ValueError, "out_count must be contiguous in its last 2"),
        ({"rule": "Nearest"}, ValueError, "rule must be one of nearest, similarity, got 'Nearest'"),
        ({"merge_above": float("inf")}, ValueError, "merge_above must be finite, got inf"),
        ({"merge_above": float("nan")}, ValueError, "merge_above must be finite, got nan"),
        ({"scale": 0.0}, ValueError, "scale must be from 1e-25 to 1e+25"),
        ({"scale": float("nan")}, ValueError, "scale must be from 1e-25 to 1e+25"),
    ],
)
def test_compress_refuses(changes, error, message):
    refuses("compress_chunk", compress(), changes, error, message)


@pytest.mark.parametrize("layers", [(), (3,)])
@pytest.mark.parametrize("other", ["k", "v", "out_k", "out_v", "index"])
@pytest.mark.parametrize("name", ["index", "count"])
def test_an_index_or_count_that_lies_over_another_tensor_is_refused(layers, other, name):
    if name == other:
        other = "count"
    given = compress(layers)
    over = given[other].view(torch.int32).flatten()[: given[name].numel()].view(given[name].shape)
    first, second = f"out_{name}", other.replace("index", "out_index").replace("count", "out_count")
    if other in ("out_k", "out_v") or (other, name) == ("index", "count"):
        first, second = second, first
    refuses("compress_chunk", given, {name: over}, ValueError, f"{first} must not overlap {second}, got")


def quantize(back=False, **changes):
    k, v = zeros(2, 3, 12, 2, 64)
    packed = zeros(3, 2, 12 * 128 + 12 * 8, dtype=torch.uint8)
    tensors = dict(packed=packed, k=k, v=v) if back else dict(k=k, v=v, packed=packed)
    finite = {"chosen": None} if back else {"check_finite": True}
    return {**tensors, "bits": 8, **finite, "backend": "auto", **changes}


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"k": zeros(12, 128)}, ValueError, "{k} must be [tokens, heads, head_dim] or [layers, tokens, heads, head_di"),
        ({"k": zeros(3, 12, 2, 96)}, ValueError, "{k} must be [layers, tokens, heads, head_dim], heads not first, wi"),
        ({"k": zeros(3, 0, 2, 64)}, ValueError, "{k} must be [layers, tokens, heads, head_dim] of 1 to 65535 layers"),
        ({"k": zeros(3, 12, 2, 64, dtype=F64)}, TypeError, "{k} must be torch.bfloat16 or torch.float16 or"),
        ({"k": zeros(3, 12, 64, 2).mT}, ValueError, "{k} must be contiguous in its last 2"),
        ({"v": zeros(12, 2, 64)}, ValueError, "{v} must be [3, 12, 2, 64], got [12, 2, 64]"),
        ({"v": zeros(3, 12, 2, 64).half()}, TypeError, "{v} must be torch.float32"),
        ({"packed": zeros(3, 2, 408)}, ValueError, "{packed} must be [3, 2, 1632], got [3, 2, 408]"),
        ({"packed": zeros(3, 2, 1632)}, TypeError, "{packed} must be torch.uint8"),
        ({"packed": zeros(3, 2, 1640, dtype=torch.uint8)[..., 4:-4]}, ValueError,
         "{packed} must be with K and V of every layer on multiples of 16 bytes"),
        ({"bits": 4}, ValueError, "{packed} must be [3, 2, 1792], got [3, 2, 1632]"),
        ({"bits": 16}, ValueError, "bits must be 8 or 4, got 16"),
        ({"backend": "cuda"}, ValueError, "backend must be None or one of 'triton', 'reference', got 'cuda'"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("back", [False, True])
def test_quantize_refuses(changes, error, message, back):
    names = dict(k="out_k", v="out_v", packed="packed") if back else dict(k="k", v="v", packed="out")
    refuses("dequantize_chunk" if back else "quantize_chunk", quantize(back), changes, error, message.format(**names))


TABLE = zeros(3, 2, dtype=torch.int32)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"chosen": TABLE[0]}, ValueError, "chosen must be [3, 2], got [2]"),
        ({"chosen": TABLE[1:]}, ValueError, "chosen must be [3, 2], got [2, 2]"),
        ({"chosen": TABLE.long()}, TypeError, "chosen must be torch.int32, got"),
        ({"chosen": TABLE.mT.contiguous().mT}, ValueError, "chosen must be contiguous in its last 2"),
        ({"chosen": zeros(6, 2, dtype=torch.int32)[::2]}, ValueError, "chosen must be contiguous in its last 2"),
        ({"k": zeros(12, 2, 64)}, ValueError, "out_k must be [chunks, tokens, heads, head_dim], got [12, 2, 64]"),
        ({"v": zeros(12, 2, 64)}, ValueError, "out_v must be [3, 12, 2, 64], got [12, 2, 64]"),
        ({"packed": zeros(2, 1632, dtype=torch.uint8)}, ValueError, "packed must be [places, 2, bytes], got [2, 1632]"),
        ({"packed": zeros(0, 2, 1632, dtype=torch.uint8)}, ValueError, "packed must be [1, 2, 1632], got [0, 2, 1632]"),
        ({"packed": zeros(5, 2, 1616, dtype=torch.uint8)}, ValueError, "packed must be [5, 2, 1632], got [5, 2, 1616]"),
    ],
)  # fmt: skip
def test_dequantize_by_a_table_refuses(changes, error, message):
    given = quantize(back=True, packed=zeros(5, 2, 1632, dtype=torch.uint8), chosen=TABLE)
    refuses("dequantize_chunk", given, changes, error, message)


@pytest.mark.parametrize("name", ["k", "v"])
def test_what_is_packed_may_not_lie_over_what_it_is_packed_of(name):
    given = quantize()
    over = given[name].view(torch.uint8).flatten()[: given["packed"].numel()].view(given["packed"].shape)
    refuses("quantize_chunk", given, {"packed": over}, ValueError, f"out must not overlap {name}, got")
    back = quantize(back=True)
    over = back[name].view(torch.uint8).flatten()[: back["packed"].numel()].view(back["packed"].shape)
    refuses("dequantize_chunk", back, {"packed": over}, ValueError, f"out_{name} must not overlap packed, got")
    refuses("dequantize_chunk", back, {"v": back["k"]}, ValueError, "out_k must not overlap out_v, got")
    over = back[name].view(torch.int32).flatten()[:6].view(3, 2)
    refuses("dequantize_chunk", back, {"chosen": over}, ValueError, f"out_{name} must not overlap chosen, got")
