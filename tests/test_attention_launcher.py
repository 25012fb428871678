"""What the launcher of csrc/attention hands to the extension, which a recorder stands for, and what it takes."""

import re
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from worldkv_kernels import Rope3D, Segment, Window, segment_attention
from worldkv_kernels.ops import cuda
from worldkv_kernels.ops.segment_attention import BACKENDS

CPU = torch.device("cpu")
BINDINGS = (Path(__file__).parents[1] / "csrc" / "bindings.cpp").read_text()
SEGMENTS = [Segment(0, 200, 3), Segment(256, 100, -2)]


@pytest.fixture
def launched(monkeypatch):
    """A list of what the extension is given: the arguments of each launch, and in `.scratch` the tensors made for it,
    by address. Every sum over a block's mass comes out as 7."""
    pytest.importorskip("triton", reason="triton is not installed")
    launches, scratch = [], {}

    def remembering(make):
        def made(*shape, **options):
            tensor = make(*shape, **options)
            scratch[tensor.data_ptr()] = tensor
            return tensor

        return made

    def record(**arguments):
        launches.append(SimpleNamespace(**arguments, scratch=dict(scratch)))
        if arguments["segment_sums"]:
            assert (scratch[arguments["segment_sums"]] == 0).all()
        if arguments["block_mass"]:
            scratch[arguments["block_mass"]].fill_(7)

    monkeypatch.setitem(sys.modules, "worldkv_kernels._cuda", SimpleNamespace(segment_attention=record))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=31))
    monkeypatch.setattr(torch, "empty", remembering(torch.empty))
    monkeypatch.setattr(torch, "zeros", remembering(torch.zeros))
    return launches


def attention(q_len=300, heads=6, kv_heads=2, head_dim=64, dtype=torch.bfloat16, capacity=32):
    """Tensors and tables in the launcher's order, without lse and mass."""
    q, out = torch.ones(2, q_len, heads, head_dim, dtype=dtype)
    k, v = torch.ones(2, 400, kv_heads, head_dim, dtype=dtype)
    window = Window(SEGMENTS, device=CPU, rope=Rope3D(head_dim), capacity=capacity)
    return [q, k, v, *window.tables, out]


def test_the_extension_is_given_the_tensors_and_their_sizes(launched):
    given = attention()
    q, k, v, tiles, tail_rows, ranges, num_segments, turns, _, out = given
    lse, mass = torch.empty(6, 300), torch.empty(6, 2)
    cuda.segment_attention(*given, lse, mass, scale=0.1, has_shift=True, has_weight=False, processors=4)
    (got,) = launched
    for name, tensor in dict(
        q=q, k=k, v=v, out=out, lse=lse, tiles=tiles, tail_rows=tail_rows, ranges=ranges, num_segments=num_segments,
        turns=turns,
    ).items():  # fmt: skip
        assert getattr(got, name) == tensor.data_ptr(), name
    sizes = dict(rows=400, q_len=300, heads=6, kv_heads=2, head_dim=64, turned_pairs=12, max_segments=2)
    assert {name: getattr(got, name) for name in sizes} == sizes
    strides = ("q_token", "q_head", "k_row", "k_head", "v_row", "v_head", "out_token", "out_head")
    assert [getattr(got, f"stride_{name}") for name in strides] == [384, 64, 128, 64, 128, 64, 384, 64]
    assert (got.dtype, got.stream, got.processors, got.tile_rows) == (0, 31, 4, 128)
    assert got.scale_log2 == pytest.approx(0.1 / 0.6931471805599453) and got.scale_power == 0.25


def test_weights_are_given_where_a_window_has_them(launched):
    q, k, v, *tables, weights, out = attention()
    flags = dict(scale=0.1, has_shift=False)
    cuda.segment_attention(q, k, v, *tables, weights, out, None, None, has_weight=False, **flags)
    cuda.segment_attention(q, k, v, *tables, weights, out, None, None, has_weight=True, **flags)
    cuda.segment_attention(q, k, v, *tables, weights, out, None, None, has_weight=True, scale=0.1, has_shift=True)
    assert [got.weights for got in launched] == [0, weights.data_ptr(), weights.data_ptr()]
    assert [got.tile_rows for got in launched] == [176, 176, 128]


def test_scratch_and_mass(launched):
    """18 items of 128 queries on 4 processors: 16 whole ones, and 2 in parts."""
    lse, mass = torch.full((6, 300), 5.0), torch.full((6, 3), 5.0)
    cuda.segment_attention(*attention(), lse, mass, scale=0.1, has_shift=True, has_weight=False, processors=4)
    (got,) = launched
    assert (got.num_whole, got.num_cut, got.parts) == (16, 2, 2)
    assert got.scratch[got.piece_out].shape == (4, 128, 64)
    assert got.scratch[got.piece_sums].shape == (16 + 4, 128, 2)
    assert got.scratch[got.segment_sums].shape == (16 + 4, 2, 3, 128, 2)
    assert got.scratch[got.block_mass].shape == (6, 3, 3)
    made = (got.piece_out, got.piece_sums, got.segment_sums, got.block_mass)
    assert all(got.scratch[address].dtype == torch.float32 for address in made)
    assert torch.equal(mass, torch.full((6, 3), 21.0))  # of three blocks


def test_without_a_mass_whole_items_leave_no_sums(launched):
    cuda.segment_attention(*attention(), None, None, scale=0.1, has_shift=False, has_weight=False, processors=4)
    (got,) = launched
    assert (got.lse, got.segment_sums, got.block_mass, got.max_segments, got.turned_pairs) == (0, 0, 0, 0, 0)
    assert got.scratch[got.piece_out].shape == (4, 128, 64) and got.scratch[got.piece_sums].shape == (4, 128, 2)
    assert got.tile_rows == 176


def test_what_is_not_said_is_chosen(launched):
    """An H200's processors stand for a CPU's; of 132 that 18 items do not fill, and 1 item of a short window."""
    cuda.segment_attention(*attention(dtype=torch.float16), None, None, scale=0.1, has_shift=False, has_weight=False)
    cuda.segment_attention(
        *attention(), None, None, scale=0.1, has_shift=False, has_weight=False, tile_rows=128, processors=18
    )
    many, few = launched
    assert (many.processors, many.num_whole, many.num_cut, many.parts, many.dtype) == (132, 0, 18, 4, 1)
    assert (few.processors, few.num_whole, few.num_cut, few.parts, few.tile_rows) == (18, 18, 0, 1, 128)


def test_strides_of_one_token_row_or_head_are_those_of_a_dense_tensor(launched):
    """Torch gives any: they are for no address, but the copy engine wants multiples of 16 bytes."""
    q, k, v, *tables, out = attention(q_len=1, heads=1, kv_heads=1)
    odd = [x.as_strided(x.shape, (stride, 3, 1)) for x, stride in ((q, 5), (k, 64), (v, 64), (out, 5))]
    assert cuda.attention_aligned(*odd)
    cuda.segment_attention(*odd[:3], *tables, odd[3], None, None, scale=0.1, has_shift=False, has_weight=False)
    row = odd[1][:1].as_strided((1, 1, 64), (7, 7, 1))
    cuda.segment_attention(q, row, row, *tables, out, None, None, scale=0.1, has_shift=False, has_weight=False)
    for got in launched:
        strides = {name: value for name, value in vars(got).items() if name.startswith("stride_")}
        assert len(strides) == 8 and set(strides.values()) == {64}


def test_the_op_launches_it_by_name(launched, monkeypatch):
    here = replace(BACKENDS.backends["cuda"], unavailable=lambda device: None)
    monkeypatch.setitem(BACKENDS.backends, "cuda", here)
    monkeypatch.setattr(BACKENDS, "chosen", {})
    q, k, v, *_ = attention(heads=2)
    window = Window(SEGMENTS, device=CPU, rope=Rope3D(64))
    out, mass = segment_attention(q, k, v, window, return_mass=True, backend="cuda")
    assert launched[0].out == out.data_ptr() and launched[0].turned_pairs == 12 and mass[0, 0] == 21
    segment_attention(q, k, v, Window([Segment(0, 9)], device=CPU), backend="cuda")
    assert launched[1].turned_pairs == 0
    for tensors, reason in (
        ([x.float() for x in (q, k, v)], "it takes bfloat16 and float16, not torch.float32"),
        (
            [q, k[:300], v.as_strided((300, 2, 64), (132, 64, 1))],
            "it takes q and pools that start on multiples of 16 bytes, head by head",
        ),
    ):
        with pytest.raises(ValueError, match=f"segment_attention: backend must be able .* got 'cuda': .*{reason}"):
            segment_attention(*tensors, Window([Segment(0, 9)], device=CPU), backend="cuda")
    assert len(launched) == 2


@pytest.mark.parametrize(
    ("head_dim", "turned_pairs", "rows"),
    [(128, 0, 176), (128, 1, 176), (128, 22, 176), (128, 24, 176), (128, 25, 128), (128, 64, 128), (64, 0, 176),
     (64, 1, 128), (64, 32, 128)],
)  # fmt: skip
def test_tiles_are_smaller_where_all_columns_of_a_query_turn(head_dim, turned_pairs, rows):
    assert cuda.attention_tile_rows(head_dim, turned_pairs) == rows
    assert cuda.attention_tile_rows(head_dim, turned_pairs, has_weight=True) == (128 if turned_pairs else 176)


STORE = torch.zeros(4096, dtype=torch.bfloat16)


def strided(offset=0, token=128, head=64, tokens=5):
    return STORE.as_strided((tokens, 2, 64), (token, head, 1), offset)


@pytest.mark.parametrize(
    ("changes", "aligned"),
    [
        ({}, True),
        *[({name: strided(offset=8, token=136, head=72)}, True) for name in ("q", "k_pool", "v_pool")],
        *[({name: strided(offset=4)}, False) for name in ("q", "k_pool", "v_pool")],
        *[({name: strided(token=132)}, False) for name in ("q", "k_pool", "v_pool")],
        *[({name: strided(head=68)}, False) for name in ("q", "k_pool", "v_pool")],
        ({"out": strided(offset=2, token=130, head=66)}, True),
        ({"out": strided(offset=1)}, False),
        ({"out": strided(token=129)}, False),
        ({"out": strided(head=65)}, False),
    ],
)
def test_what_starts_where_the_copy_engine_and_the_stores_take_it(changes, aligned):
    tensors = dict.fromkeys(("q", "k_pool", "v_pool", "out"), strided())
    assert cuda.attention_aligned(**{**tensors, **changes}) is aligned


def test_strides_are_below_those_that_the_copy_engine_takes():
    for stride, aligned in ((2**39 - 8, True), (2**39, False)):
        for strides in ((stride, 64, 1), (128, stride, 1)):
            far = SimpleNamespace(data_ptr=lambda: 0, shape=(2, 2, 64), stride=lambda strides=strides: strides)
            assert cuda.attention_aligned(strided(), far, strided(), strided()) is aligned


# --- the binding ---


@pytest.mark.parametrize("name", ["norm_rope_append", "compress_chunk", "segment_attention"])
def test_a_binding_names_its_arguments_as_the_function_does_and_fills_the_fields_of_these_names(name):
    signature, body = re.search(rf"^void {name}\((.*?)\) {{\n(.*?)^}}", BINDINGS, re.M | re.S).groups()
    parameters = re.findall(r"(\w+)(?:,|$)", signature)
    bound = re.search(rf'"{name}", &{name}, py::kw_only\(\),(.*?)\);', BINDINGS, re.S)[1]
    assert re.findall(r'py::arg\("(\w+)"\)', bound) == parameters
    fields = re.findall(r"params\.(\w+) = (?:pointer<[^>]*>\()?(\w+)\)?;", body)
    assert len(fields) > 10 and all(field == value for field, value in fields)
    by_hand = {"dtype", "stream", "weights", "workspace_bytes"}
    assert {field for field, _ in fields} == set(parameters) - by_hand


def test_the_launcher_gives_what_the_binding_takes(launched):
    cuda.segment_attention(*attention(), None, None, scale=0.1, has_shift=True, has_weight=False)
    bound = re.search(r'"segment_attention", &segment_attention(.*?)\);', BINDINGS, re.S)[1]
    assert set(re.findall(r'py::arg\("(\w+)"\)', bound)) == set(vars(launched[0])) - {"scratch"}


def test_the_binding_fills_every_parameter_of_the_kernel():
    header = (Path(__file__).parents[1] / "csrc" / "attention" / "segment_attention.h").read_text()
    struct = re.sub(r"//.*", "", re.search(r"struct AttentionParams {(.*?)^};", header, re.M | re.S)[1])
    fields = {name for line in struct.split(";") for name in re.findall(r"\*?(\w+)\s*(?:,|$)", line.strip())}
    body = re.search(r"^void segment_attention\(.*?\) {\n(.*?)^}", BINDINGS, re.M | re.S)[1]
    assert len(fields) > 30 and set(re.findall(r"params\.(\w+) =", body)) == fields
