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
    rivals = {(f["variant"], f["status"]) for f in figures if f["is_rival"]}
    assert rivals == {("published eager", "wrong"), ("eager", "timed")}


def layered(bench):
    (case,) = (case for case in bench.SMALL_CASES if case.layers > 1 and case.published)
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
    full = [(case.heads, case.frame_tokens, case.layers, case.merge) for case in bench.CASES if case.layers > 1]
    assert full == [(40, 1560, 40, False), (12, 880, 30, False), (40, 1560, 40, True), (12, 880, 30, True)]


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
    assert bench.compression_error(case, k, v, (*right, None)) == 0.0
    # The same count in each frame, but the most similar tokens instead of the least.
    k_least = torch.cat([k[:20], -k[20:]])
    index = bench.published_compress(k_least, v, 3, 0.25, pooled)[2]
    assert 0 < bench.compression_error(case, k, v, (k[index], v[index], index, None)) <= 1
    # Right for the other way of sharing the budget.
    index = bench.published_compress(k, v, 3, 0.25, not pooled)[2]
    assert bench.compression_error(case, k, v, (k[index], v[index], index, None)) > 0


def test_bytes_and_operations_of_the_nearest_rule(load):
    bench, nearest = load("bench_compress_chunk"), load("compress_nearest")
    # 3 frames of 10 tokens of 8 numbers of 2 bytes, 3 kept of each other frame, 5 averaged: K 30 rows and V 16 + 10
    # read, K and V 16 written each; 16 indices and counts.
    assert nearest.averaged_tokens(3, 10, 3) == 10
    assert nearest.averaged_tokens(3, 10, 8) == 4  # no more are dropped
    assert nearest.nearest_bytes(3, 10, 3, 8, 2, 1, True) == (30 + 3 * 16 + 10) * 16 + 16 * 8
    assert nearest.nearest_bytes(3, 10, 3, 8, 2, 5, False) == 5 * ((30 + 3 * 16) * 16 + 16 * 4)
    # The second frame with the first, the third with two.
    assert nearest.products_flops(3, 10, 8) == 2 * 300 * 8
    assert nearest.products_flops(2, 10, 8) == 2 * 100 * 8
    case = bench.CompressCase(3, 1560, heads=40, pooled=True, layers=40, rule="nearest", merge=True)
    assert bench.counted(case) == (nearest.nearest_bytes(3, 1560, 390, 5120, 2, 40, True), 40 * 74_760_192_000)
    assert str(case) == "40 layers of 4680 tokens x 40 x 128, keep_ratio 0.25, pooled, nearest, merged"


def nearest_case(bench, **changes):
    case = bench.CompressCase(**{**dict(frames=4, frame_tokens=15, heads=2, pooled=True), **changes})
    return case, bench.prepare(case, CPU)


@pytest.mark.parametrize("keep_ratio", [0.25, 0.8])
@pytest.mark.parametrize("pooled", [True, False])
def test_as_many_keys_are_averaged_as_counted(load, keep_ratio, pooled):
    bench, nearest = load("bench_compress_chunk"), load("compress_nearest")
    k = nearest.video_keys(1, 4, 15, 8, 128, torch.Generator().manual_seed(0))[0]
    v = torch.eye(60, 1024).view(60, 8, 128)  # a mean of them tells its members
    got = bench.compress_chunk(k, v, frames=4, keep_ratio=keep_ratio, pooled=pooled)
    averaged = (got.v != 0).sum().item() - len(got.index)
    assert averaged == nearest.averaged_tokens(4, 15, bench.kept_each(15, keep_ratio))
    assert abs(k.square().mean().item() - 1) < 0.05


@pytest.mark.parametrize("merge", [True, False])
@pytest.mark.parametrize("pooled", [True, False])
def test_the_rival_of_the_nearest_rule_is_right(load, merge, pooled):
    case, problem = nearest_case(load("bench_compress_chunk"), pooled=pooled, rule="nearest", merge=merge, layers=2)
    assert [v.name for v in problem.variants] == ["reference", "reference in 2 calls", "eager"]
    for variant in problem.variants:
        assert variant.check(variant.make()) <= variant.limit == (1e-2 if merge else 0.0)
    assert case.rule == "nearest"


def test_the_published_rule_with_a_merge_has_no_rival(load):
    _, problem = nearest_case(load("bench_compress_chunk"), merge=True)
    (ours,) = problem.variants
    assert ours.check(ours.make()) == 0.0 and not ours.rival


@pytest.mark.parametrize(
    "fault",
    [
        lambda k, v, index, count: (k.roll(1, 0), v, index, count),
        lambda k, v, index, count: (k, v * 1.02, index, count),
        lambda k, v, index, count: (k, v, index, count.roll(1, 0)),
        lambda k, v, index, count: (k, v, index.flip(0), count),
        lambda k, v, index, count: (k * 1.02, v, index, count),
    ],
    ids=["k rows", "v", "count", "order", "length"],
)
def test_a_merge_with_a_fault_is_wrong(load, monkeypatch, fault):
    bench = load("bench_compress_chunk")
    right = bench.eager_nearest
    monkeypatch.setattr(bench, "eager_nearest", lambda *args: fault(*right(*args)))
    _, problem = nearest_case(bench, rule="nearest", merge=True)
    rival = problem.variants[-1]
    assert not rival.check(rival.make()) <= rival.limit


def test_the_cuda_kernel_has_no_part_in_what_it_does_not_do(load, monkeypatch):
    bench = load("bench_compress_chunk")
    monkeypatch.setattr(bench, "ours", lambda op, device: ["cuda", "triton", "reference"])
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    published, nearest = (nearest_case(bench, rule=rule)[0] for rule in ("similarity", "nearest"))
    assert bench.our_backends(published, CPU) == ["cuda", "triton", "reference"]
    assert bench.our_backends(nearest, CPU) == ["triton", "reference"]
