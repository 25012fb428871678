"""The bench of quantize_chunk: what it counts, and the faults that it sees."""

import pytest
import torch

CPU = torch.device("cpu")


def test_bytes_are_counted_once_each_way(load):
    bench = load("bench_quantize_chunk")
    # Of 2 layers, K and V: 70 x 2 x 64 numbers of 2 bytes; codes, and 140 scales of 2 bytes up to a multiple of 16.
    case = bench.case_of("tokens=70,heads=2,head_dim=64,bits=8,layers=2")
    assert case.num_bytes == 2 * 2 * (70 * 2 * 64 * 2 + 70 * 2 * 64 + 288)
    # Half a byte a number; a scale and a minimum of 2 bytes for each channel of 2 groups.
    case = bench.case_of("tokens=70,heads=2,head_dim=64,bits=4,layers=2,op=dequantize")
    assert case.num_bytes == 2 * 2 * (70 * 2 * 64 * 2 + 70 * 64 + 2 * 2 * 128 * 2)
    assert {v.num_bytes for v in bench.prepare(case, CPU).variants} == {case.num_bytes}
    # Of 3 chunks that a table chooses, what is restored and nothing of the other places or rows.
    case = bench.QuantizeCase(70, 2, 8, "dequantize", head_dim=64, chunks=3)
    assert {v.num_bytes for v in bench.prepare(case, CPU).variants} == {2 * 3 * (70 * 2 * 64 * 2 + 70 * 2 * 64 + 288)}
    full = [(case.tokens, case.heads, case.layers, case.chunks) for case in bench.CASES]
    assert full.count((2340, 40, 40, 0)) == 4
    assert full.count((2340, 40, 1, 6)) == full.count((1320, 12, 1, 6)) == 2


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("op", ["quantize", "dequantize", "chosen"])
@pytest.mark.parametrize(
    "fault",
    [
        lambda x: x.roll(1, 1),
        lambda x: x * 1.02,
        lambda x: x.index_fill(1, torch.tensor([x.shape[1] - 1]), 0.0),
        lambda x: x.index_fill(0, torch.tensor([1]), float("nan")),
    ],
    ids=["rolled", "longer", "last token", "a layer of NaN"],
)
def test_a_restored_chunk_with_a_fault_is_wrong(load, monkeypatch, bits, op, fault):
    bench = load("bench_quantize_chunk")
    case = bench.QuantizeCase(70, 2, bits, op, layers=2)
    if op == "chosen":
        case = bench.QuantizeCase(70, 2, bits, "dequantize", chunks=2)
    right, ours = bench.eager_restored, bench.dequantize_chunk
    monkeypatch.setattr(bench, "eager_restored", lambda *given: fault(right(*given)))
    monkeypatch.setattr(bench, "dequantize_chunk", lambda *x, **given: tuple(map(fault, ours(*x, **given))))
    problem = bench.prepare(case, CPU)
    assert all(not variant.check(variant.make()) <= variant.limit for variant in problem.variants)


@pytest.mark.parametrize("bits", [8, 4])
def test_another_order_than_the_tables_is_wrong(load, monkeypatch, bits):
    bench = load("bench_quantize_chunk")
    ours = bench.dequantize_chunk
    monkeypatch.setattr(bench, "dequantize_chunk", lambda *x, **given: ours(*x, **shifted(given)))

    def shifted(given):
        return {**given, "chosen": given["chosen"] - torch.tensor([1, 0], dtype=torch.int32)}

    problem = bench.prepare(bench.QuantizeCase(70, 2, bits, "dequantize", chunks=3), CPU)
    assert [not variant.check(variant.make()) <= variant.limit for variant in problem.variants] == [True, False]


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("tokens", [1, 64, 70])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_both_ways_of_packing_are_right(load, bits, tokens, dtype):
    bench = load("bench_quantize_chunk")
    for op, chunks in (("quantize", 0), ("dequantize", 0), ("dequantize", 3)):
        problem = bench.prepare(bench.QuantizeCase(tokens, 2, bits, op, 2 - (chunks > 0), 64, dtype, chunks), CPU)
        assert [variant.check(variant.make()) for variant in problem.variants] == [0.0, 0.0]


@pytest.mark.parametrize(
    ("shape", "said"),
    [
        ("tokens=70,heads=2,bits=2", "bits must be 8 or 4, got '2'"),
        ("tokens=70,heads=2", "bits must be given"),
        ("tokens=70,heads=2,bits=8,op=both", "op must be quantize or dequantize, got 'both'"),
    ],
)
def test_shapes_that_are_none(load, shape, said):
    with pytest.raises(ValueError, match=f"--shape: {said}"):
        load("bench_quantize_chunk").case_of(shape)
