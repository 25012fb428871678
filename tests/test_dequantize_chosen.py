"""dequantize_chunk of the chunks that a table chooses: what each is alone, bit for bit, and nothing beside them."""

import importlib
import math
import re

import pytest
import torch
from conftest import DEVICE
from launches import Counted
from test_quantize_chunk import BACKEND_NAMES, SIZE, WORD, by_backend, by_bits, by_dtype, random_chunk, room, zeros

from worldkv_kernels import dequantize_chunk, quantize_chunk
from worldkv_kernels.ops.quantize_chunk import DEQUANTIZE, packed_bytes

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")  # of numpy, in the interpreter
LONGEST = 130  # tokens


def bank_of(lengths, bits, dtype, heads=2, head_dim=64):
    """A chunk of each length in its place of the second of three layers, among bytes of 255: the layer, and what each
    place is restored to alone."""
    size = packed_bytes(LONGEST, heads, head_dim, bits, dtype)
    packed = torch.full((len(lengths), 3, 2, size), 255, dtype=torch.uint8, device=DEVICE)[:, 1]
    alone = []
    for place, n in enumerate(lengths):
        k, v = random_chunk(n, heads, head_dim, dtype=dtype, seed=place)
        of_chunk = quantize_chunk(k, v, bits=bits, backend="reference")
        packed[place, :, : of_chunk.shape[1]] = of_chunk
        given = dict(tokens=n, heads=heads, head_dim=head_dim, dtype=dtype)
        alone.append(dequantize_chunk(of_chunk, bits=bits, **given, backend="reference"))
    return packed, alone


def slots(chunks, dtype, heads=2, head_dim=64):
    """K's and V's rows [2, chunks, LONGEST, heads, head_dim] in slots with five rows before each and six behind, and
    the tensor of all of them, NaN."""
    rows = torch.full((2, chunks, 5 + LONGEST + 6, heads, head_dim), math.nan, dtype=dtype, device=DEVICE)
    return rows, rows[:, :, 5:-6]


def table(*rows):
    return torch.tensor(rows, dtype=torch.int32, device=DEVICE)


def assert_chosen(rows, alone, chosen):
    """The chunks of the table, bit for bit as each is alone, and NaN everywhere else."""
    want = torch.full_like(rows, math.nan)
    for i, (place, n) in enumerate(chosen.tolist()):
        for x, of_place in zip(want, alone[place], strict=True):
            x[i, 5 : 5 + n] = of_place[:n]
    assert torch.equal(rows.isnan(), want.isnan())
    assert torch.equal(rows.nan_to_num(0).view(WORD[rows.dtype]), want.nan_to_num(0).view(WORD[rows.dtype]))


@by_backend
@by_bits
@by_dtype
def test_chosen_chunks_are_what_each_is_alone(backend, bits, dtype):
    """Of every length, out of order, one twice and one not at all; then of a table rewritten in place."""
    lengths = (63, LONGEST, 1, 65, 64)
    packed, alone = bank_of(lengths, bits, dtype)
    order = (3, 1, 4, 0, 1, 2)
    chosen = table(*((place, lengths[place]) for place in order), (2, 0))
    rows, (k, v) = slots(7, dtype)
    before = packed.clone()
    restored = dequantize_chunk(packed, bits=bits, out_k=k, out_v=v, chosen=chosen, backend=backend)
    assert restored[0] is k and restored[1] is v
    assert_chosen(rows, alone, chosen)
    assert torch.equal(packed, before)
    chosen.copy_(table((2, 0), (4, 64), (0, 0), (3, 65), (2, 1), (0, 63), (1, LONGEST)))
    rows.fill_(math.nan)
    dequantize_chunk(packed, bits=bits, out_k=k, out_v=v, chosen=chosen, backend=backend)
    assert_chosen(rows, alone, chosen)


@by_backend
@by_bits
def test_chosen_chunks_of_wide_heads_in_rows_that_are_apart(backend, bits):
    """Every other row of slots whose chunks lie between each other."""
    packed, alone = bank_of((70, 3), bits, torch.float16, heads=3, head_dim=128)
    rows = torch.full((2, 2 * LONGEST + 1, 3, 3, 128), math.nan, dtype=torch.float16, device=DEVICE)
    k, v = rows[:, 1::2].transpose(1, 2)
    chosen = table((1, 3), (0, 70), (0, 0))
    dequantize_chunk(packed, bits=bits, out_k=k, out_v=v, chosen=chosen, backend=backend)
    for i, n in enumerate((3, 70, 0)):
        for x, of_place in zip((k, v), alone[chosen[i, 0]], strict=True):
            assert torch.equal(x[i, :n], of_place[:n]) and x[i, n:].isnan().all()
    assert rows[:, ::2].isnan().all()


@by_backend
@by_bits
def test_more_places_than_a_grid_has_and_one_two_gigabytes_on(backend, bits):
    """Places that lie over each other, and some that 32 bits of place times stride do not reach. On a CPU most of the
    memory is never touched."""
    k, v = random_chunk(5, 1, 64)
    of_chunk = quantize_chunk(k, v, bits=bits, backend="reference")
    size = of_chunk.shape[1]
    space = torch.empty(2**31 + 2 * size, dtype=torch.uint8, device=DEVICE)
    for first in (139_999 * 16, 2**31):
        space[first : first + 2 * size] = of_chunk.flatten()
    want = dequantize_chunk(of_chunk, bits=bits, tokens=5, heads=1, head_dim=64, dtype=k.dtype, backend="reference")
    for places, stride, place in ((140_000, 16, 139_999), (3, 2**30, 2)):
        packed = space.as_strided((places, 2, size), (stride, size, 1))
        outs = [torch.full_like(x, math.nan)[None] for x in (k, v)]
        given = dict(out_k=outs[0], out_v=outs[1], chosen=table((place, 5)), backend=backend)
        dequantize_chunk(packed, bits=bits, **given)
        assert all(torch.equal(got[0], x) for got, x in zip(outs, want, strict=True))


NONE_SUCH = [
    (-1, 5), (2, 5), (-(2**31), 5), (2**31 - 1, 5),
    (0, -1), (0, LONGEST + 1), (0, 2**31 - 1), (0, -(2**31)), (0, -(2**30) - 1),  # times two heads positive in 32 bits
]  # fmt: skip


@by_backend
@by_bits
def test_of_places_and_tokens_that_there_are_not_nothing_is_written(backend, bits):
    packed, alone = bank_of((70, 3), bits, torch.bfloat16)
    if backend == "reference":
        for wrong in [*NONE_SUCH, (2, 0)]:
            rows, (k, v) = slots(2, torch.bfloat16)
            named = "^dequantize_chunk: chosen must be of places from 0 to 1 and of 0 to 130 tokens, got place"
            with pytest.raises(ValueError, match=rf"{named} {wrong[0]}, {wrong[1]} tokens in row 1$"):
                dequantize_chunk(packed, bits=bits, out_k=k, out_v=v, chosen=table((0, 3), wrong), backend=backend)
            assert rows.isnan().all()
        return
    rows, (k, v) = slots(len(NONE_SUCH) + 1, torch.bfloat16)
    chosen = table(*NONE_SUCH[:4], (1, 3), *NONE_SUCH[4:])
    dequantize_chunk(packed, bits=bits, out_k=k, out_v=v, chosen=chosen, backend=backend)
    chosen[:4] = chosen[5:] = 0
    assert_chosen(rows, alone, chosen)


@pytest.mark.skipif("triton" not in BACKEND_NAMES, reason="triton is not installed")
@by_bits
def test_one_launch_for_all_chosen_chunks(monkeypatch, bits):
    kernels = importlib.import_module("worldkv_kernels.kernels.quantize_chunk")
    launches, (packed, _) = [], bank_of((5,), bits, torch.float32)
    name = f"dequantize_{bits}_kernel"
    monkeypatch.setattr(kernels, name, Counted(getattr(kernels, name), launches))
    _, (k, v) = slots(3, torch.float32)
    dequantize_chunk(packed, bits=bits, out_k=k, out_v=v, chosen=table((0, 5), (0, 0), (0, 5)), backend="triton")
    assert [grid[1:] for grid in launches] == [(3, 2)]


@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a GPU")
@by_bits
def test_a_graph_restores_the_chunks_of_a_table_rewritten_in_place(bits):
    lengths = (63, LONGEST, 65)
    packed, alone = bank_of(lengths, bits, torch.bfloat16, heads=12, head_dim=128)
    rows, (k, v) = slots(3, torch.bfloat16, heads=12, head_dim=128)
    chosen = table((0, 63), (1, LONGEST), (2, 0))
    given = dict(out_k=k, out_v=v, chosen=chosen, backend="triton")
    dequantize_chunk(packed, bits=bits, **given)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        dequantize_chunk(packed, bits=bits, **given)
    for other in (chosen.clone(), table((2, 65), (2, 1), (1, LONGEST)), table((0, 0), (3, 1), (0, 63))):
        chosen.copy_(other)
        rows.fill_(math.nan)
        graph.replay()
        assert_chosen(rows, alone, torch.where(other[:, :1] < 3, other, 0))


def without_place(packed, k, v, *, chosen=None, **options):
    """Right without a table."""
    if chosen is not None:
        chosen = torch.stack([torch.arange(len(chosen), dtype=torch.int32).clamp_max(1), chosen[:, 1]], dim=1)
    DEQUANTIZE.run("reference")(packed, k, v, chosen=chosen, **options)


def without_length(packed, k, v, *, chosen=None, **options):
    """Right without a table."""
    if chosen is not None:
        chosen = torch.stack([chosen[:, 0], torch.full_like(chosen[:, 1], k.shape[1])], dim=1)
    DEQUANTIZE.run("reference")(packed, k, v, chosen=chosen, **options)


@pytest.mark.parametrize("wrong", [without_place, without_length])
def test_the_check_of_a_backend_looks_at_chosen_chunks(monkeypatch, wrong):
    monkeypatch.setitem(DEQUANTIZE.loaded, "triton", wrong)
    for kind in DEQUANTIZE.kinds:
        assert re.match(r"its k by a table differs", DEQUANTIZE.disagreement("triton", torch.device("cpu"), kind))


TABLE = torch.zeros(3, 2, dtype=torch.int32, device=DEVICE)
BOTH = {"out_k": zeros(3, 5, 2, 64), "out_v": zeros(3, 5, 2, 64)}


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"chosen": [(0, 5)] * 3}, TypeError, "chosen must be a tensor [chunks, 2], got"),
        ({"chosen": TABLE[0]}, ValueError, "chosen must be [chunks, 2], got [2]"),
        ({"chosen": TABLE[:2]}, ValueError, "chosen must be [3, 2], got [2, 2]"),
        ({"chosen": TABLE.new_zeros(3, 3)}, ValueError, "chosen must be [3, 2], got [3, 3]"),
        ({"chosen": TABLE.long()}, TypeError, "chosen must be torch.int32, got"),
        ({"chosen": TABLE.mT.contiguous().mT}, ValueError, "chosen must be contiguous in its last 2 dimension(s)"),
        ({"chosen": TABLE.to("meta")}, ValueError, f"chosen must be on {DEVICE}, got"),
        ({"chosen": BOTH["out_v"].view(torch.int32)[2, 4, 1, :6].view(3, 2)}, ValueError,
         "out_v must not overlap chosen, got"),
        ({"out_k": None}, TypeError, "out_k must be given, with chosen, got None"),
        ({"out_v": None}, TypeError, "out_v must be given, with chosen, got None"),
        ({"out_k": None, "out_v": None, "tokens": 5, "heads": 2, "head_dim": 64, "dtype": torch.bfloat16}, TypeError,
         "out_k must be given, with chosen, got None"),
        ({"out_k": zeros(5, 2, 64)}, ValueError, "out_k must be [chunks, tokens, heads, head_dim], got [5, 2, 64]"),
        ({"out_v": zeros(3, 5, 1, 64)}, ValueError, "out_v must be [3, 5, 2, 64] of torch.bfloat16, as out_k,"),
        ({"packed": room(2, SIZE)}, ValueError, "packed must be [places, 2, bytes], got"),
        ({"packed": room(0, 2, SIZE)}, ValueError, f"packed must be [1, 2, {SIZE}], got"),
        ({"packed": room(7, 1, SIZE)}, ValueError, f"packed must be [7, 2, {SIZE}], got"),
        ({"packed": room(7, 2, SIZE + 16)}, ValueError, f"packed must be [7, 2, {SIZE}], got"),
        ({"packed": room(7, 2, SIZE + 8)[..., :-8]}, ValueError, "packed must be with K and V of every layer on"),
        ({"packed": room(7, 2, 2 * SIZE)[..., ::2]}, ValueError, "packed must be contiguous in its last 1"),
        ({"tokens": 4}, ValueError, "tokens must be 5, as in out_k, or None, got 4"),
    ],
)  # fmt: skip
def test_dequantize_by_a_table_refuses(changes, error, message):
    arguments = {"packed": room(7, 2, SIZE), "bits": 8, **BOTH, "chosen": TABLE, **changes}
    with pytest.raises(error, match=f"^dequantize_chunk: {re.escape(message)}"):
        dequantize_chunk(**arguments)


@by_bits
def test_opcheck_and_compile_by_a_table(bits):
    packed, alone = bank_of((66, 9), bits, torch.float32)
    rows, (k, v) = slots(3, torch.float32)
    chosen = table((1, 9), (0, 66), (0, 0))
    outs = (torch.zeros_like(k), torch.zeros_like(v))
    torch.library.opcheck(torch.ops.worldkv.dequantize_chunk.default, (packed, *outs, chosen, bits, "auto"))

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(k, v, chosen):
        dequantize_chunk(packed, bits=bits, out_k=k, out_v=v, chosen=chosen * 1)

    compiled(k, v, chosen)
    assert_chosen(rows, alone, chosen)
