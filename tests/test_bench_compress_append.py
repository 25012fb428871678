"""The benches of compress_chunk and norm_rope_append: what they count, and the faults that they see."""

import math

import pytest
import torch

CPU = torch.device("cpu")


def test_append_bytes(load):
    bench = load("bench_norm_rope_append")
    # 2 x 3 x 5 = 30 tokens of 4 x 8 = 32 numbers of 2 bytes, 1920 bytes, six times; two weights of 64 bytes;
    # 2 frames with 2 pairs, 3 rows with 1, 5 columns with 1, each a cosine and a sine in fp32: 12 x 8 bytes.
    assert bench.append_bytes((2, 3, 5), 4, 8, 2, pairs=(2, 1, 1)) == 6 * 1920 + 128 + 96


def test_compress_bytes(load):
    bench = load("bench_compress_chunk")
    # 3 frames of 10 tokens of 2 x 4 numbers of 2 bytes; ceil(.25 x 10) = 3 of each other frame: 16 kept.
    # K 30 x 16 bytes read; V 16 x 16 read; K and V 16 x 16 written each; 16 indices of 4 bytes.
    assert bench.compress_bytes(3, 10, 0.25, 2, 4, 2) == 480 + 3 * 256 + 64
    assert bench.compress_bytes(3, 10, 0.25, 2, 4, 2, layers=5) == 6560
    assert bench.kept_each(10, 0.25) == 3
    assert bench.kept_each(10, 0.01) == 1
    assert bench.kept_each(10, 1.0) == 10
    # The 14B chunk at 0.25 keeps half.
    assert bench.kept_each(1560, 0.25) * 2 + 1560 == 2340


def test_an_append_that_writes_beside_its_rows_is_not_timed(load, monkeypatch):
    bench = load("bench_norm_rope_append")
    right = bench.append_by_index

    def one_row_more(*args):
        out = right(*args)
        args[-3][args[-1][-1] + 1] = 0.0
        return out

    monkeypatch.setattr(bench, "append_by_index", one_row_more)
    figures = bench.run(small=True, device=CPU, seconds=0.01)
    assert {f["status"] for f in figures if f["variant"] == "eager"} == {"wrong"}


def test_an_append_without_the_last_frame_is_wrong(load, monkeypatch):
    bench = load("bench_norm_rope_append")
    right = bench.norm_rope_append

    def earlier(*args, **options):
        return right(*args, **{**options, "start_frame": bench.START_FRAME - 1})

    monkeypatch.setattr(bench, "norm_rope_append", earlier)
    figures = bench.run(small=True, device=CPU, seconds=0.01)
    assert {f["status"] for f in figures if not f["is_rival"]} == {"wrong"}
    assert bench.main(["--small", "--device", "cpu", "--seconds", "0.01"]) == 1


@pytest.mark.parametrize(
    "fault",
    [
        lambda *kept: [torch.cat([x[:-2], x[-2:].flip(0)]) for x in kept],
        lambda *kept: [x.flip(0) for x in kept],
        lambda *kept: [x[:-1] for x in kept],
        lambda k, v, index: (k.roll(1, 0), v, index),
        lambda k, v, index: (k, v * 1.01, index),
    ],
    ids=["order", "anchor", "length", "k rows", "v rows"],
)
def test_a_compression_with_a_fault_is_wrong(load, monkeypatch, fault):
    bench = load("bench_compress_chunk")
    right = bench.published_compress
    monkeypatch.setattr(bench, "published_compress", lambda *args: fault(*right(*args)))
    figures = bench.run(small=True, device=CPU, seconds=0.01)
    assert {f["status"] for f in figures if f["is_rival"]} == {"wrong"}


def layered(bench):
    (case,) = (case for case in bench.SMALL_CASES if case.layers > 1)
    return case, bench.prepare(case, CPU)


def test_all_layers_are_compressed_in_one_call_beside_a_call_each(load, monkeypatch):
    bench, calls = load("bench_compress_chunk"), []
    right = bench.compress_chunk
    monkeypatch.setattr(bench, "compress_chunk", lambda k, v, **options: calls.append(len(k)) or right(k, v, **options))
    case, problem = layered(bench)
    # 3 layers of 51 tokens of 2 x 128 numbers of 2 bytes, 17 + 2 x ceil(17 / 4) = 27 kept.
    counted = 3 * ((51 + 3 * 27) * 512 + 4 * 27)
    assert [(v.name, v.num_bytes, v.base, v.rival) for v in problem.variants] == [
        ("reference", counted, None, False), ("reference in 3 calls", counted, "reference", False),
        ("published eager", counted, None, True),
    ]  # fmt: skip
    assert str(case) == problem.case == "3 layers of 51 tokens x 2 x 128, keep_ratio 0.25, pooled"
    for variant, want in zip(problem.variants, ([3], [1, 1, 1], []), strict=True):
        calls.clear()
        assert variant.check(variant.make()) == 0.0
        assert calls == want
    full = [(case.heads, case.frame_tokens, case.layers) for case in bench.CASES if case.layers > 1]
    assert full == [(40, 1560, 40), (12, 880, 30)]


def test_a_layer_that_is_not_compressed_is_wrong(load, monkeypatch):
    bench = load("bench_compress_chunk")
    ours, published, seen = bench.compress_chunk, bench.published_compress, []

    def but_the_last(k, v, *, out_k, out_v, out_index, **options):
        if len(k) == 3:
            k, v, out_k, out_v, out_index = (x[:2] for x in (k, v, out_k, out_v, out_index))
        return ours(k, v, out_k=out_k, out_v=out_v, out_index=out_index, **options)

    def at_fault_in_the_last(*args):
        seen.append(args)
        k, v, index = published(*args)
        return (k.roll(1, 0) if len(seen) == 3 else k), v, index

    monkeypatch.setattr(bench, "compress_chunk", but_the_last)
    monkeypatch.setattr(bench, "published_compress", at_fault_in_the_last)
    errors = [variant.check(variant.make()) for variant in layered(bench)[1].variants]
    assert errors == [math.inf, 0.0, math.inf]


@pytest.mark.parametrize("pooled", [True, False])
def test_a_compression_that_keeps_the_wrong_tokens_is_wrong(load, pooled):
    bench = load("bench_compress_chunk")
    case = bench.CompressCase(3, 20, heads=2, pooled=pooled, dtype=torch.float32)
    k, v = torch.randn(2, 60, 2, 128, generator=torch.Generator().manual_seed(0))
    right = bench.published_compress(k, v, 3, 0.25, pooled)
    assert bench.selection_error(case, k, v, right) == 0.0
    # The same count in each frame, but the most similar tokens instead of the least.
    k_least = torch.cat([k[:20], -k[20:]])
    index = bench.published_compress(k_least, v, 3, 0.25, pooled)[2]
    assert 0 < bench.selection_error(case, k, v, (k[index], v[index], index)) <= 1
    # Right for the other way of sharing the budget.
    index = bench.published_compress(k, v, 3, 0.25, not pooled)[2]
    assert bench.selection_error(case, k, v, (k[index], v[index], index)) > 0
