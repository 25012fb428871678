"""The benchmarks count rightly, refuse to time what is wrong, and run to the end without a GPU."""

import importlib
import itertools
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from worldkv_kernels import Segment

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
CPU = torch.device("cpu")
BENCHES = ["segment_attention", "norm_rope_append", "compress_chunk", "prefetch"]
KEYS = {
    "bench", "case", "variant", "shape", "is_rival", "status", "reason", "error", "error_limit", "us", "us_20", "us_80",
    "host_us", "rounds", "bytes", "link_bytes", "flops", "gb_s", "tflop_s", "ceiling", "share", "rival", "times_rival",
    "base", "over_base", "ceilings", "environment",
}  # fmt: skip
ENVIRONMENT_KEYS = {
    "date", "commit", "dirty", "source", "device", "driver", "cuda", "cudnn", "torch", "triton", "python",
    "clocks_before", "clocks_after",
}  # fmt: skip


@pytest.fixture
def load(monkeypatch):
    """Import a file of benchmarks/ as the scripts do, which are no package."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield importlib.import_module
    shared = ["common", "plots", "sanitize", "attention_rivals", "prefetch_rivals"]
    for name in [*shared, *(f"bench_{bench}" for bench in BENCHES)]:
        sys.modules.pop(name, None)


@pytest.fixture
def common(load):
    return load("common")


# Counting, against numbers worked out by hand.


def test_attention_operations_are_two_products(load):
    bench = load("bench_segment_attention")
    # 2 queries x 3 keys x 4 numbers: 24 products and 24 sums for the scores, as many for the values; 5 heads.
    assert bench.attention_flops(q_len=2, heads=5, head_dim=4, num_tokens=3) == 5 * (48 + 48)


def test_attention_bytes_are_q_out_and_each_row_once(load):
    bench = load("bench_segment_attention")
    # q 2 x 5 x 4 numbers of 2 bytes = 80, out as much; K 3 x 5 x 4 x 2 = 120, V as much.
    assert bench.attention_bytes(2, 5, 4, 3, 2) == 80 + 80 + 120 + 120
    # An fp32 number a head and query for lse, a head and segment for mass.
    assert bench.attention_bytes(2, 5, 4, 3, 2, lse=True) == 400 + 4 * 5 * 2
    assert bench.attention_bytes(2, 5, 4, 3, 2, mass_segments=7) == 400 + 4 * 5 * 7


@pytest.mark.parametrize(
    "segments, rows",
    [
        ([(0, 10, 0)], 10),
        ([(20, 5, 0), (0, 10, 3)], 15),  # apart, out of order
        ([(0, 10, 0), (0, 10, 2)], 10),  # the same rows twice, with another shift
        ([(0, 10, 0), (5, 10, 0)], 15),  # overlapping
        ([(0, 10, 0), (10, 1, 0)], 11),  # touching
        ([(0, 100, 0), (10, 5, 0), (90, 20, 0)], 110),  # one inside another
    ],
)
def test_rows_that_segments_share_count_once(load, segments, rows):
    assert load("bench_segment_attention").unique_rows([Segment(*s) for s in segments]) == rows


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


def test_the_core_windows_have_the_lengths_they_are_quoted_with(load):
    bench = load("bench_segment_attention")
    assert [(c.heads, c.q_len, c.num_tokens, c.pruned) for c in bench.CORE_CASES] == [
        (40, 4680, 32760, True), (12, 2640, 27720, True), (40, 4680, 140400, True), (40, 4680, 32760, False),
        (12, 2640, 79200, True), (40, 4524, 31668, True), (40, 4680, 14040, True), (12, 2640, 13200, True),
    ]  # fmt: skip
    assert bench.CORE_CASES[0].lengths == [4680] + 6 * [2340] + 3 * [4680]
    assert bench.CORE_CASES[3].lengths == 7 * [4680]
    assert bench.CASES[: len(bench.CORE_CASES)] == bench.CORE_CASES


def test_each_model_has_each_window_pruned_and_whole(load):
    cases = load("bench_segment_attention").CASES
    # Tokens a frame and heads; a chunk is three frames, and the window's last one makes the queries.
    for frame_tokens, heads in ((1560, 40), (1508, 40), (880, 12)):
        for frames, halves in ((9, 2), (15, 2), (21, 6), (27, 10), (90, 52)):
            of_length = [c for c in cases if (c.heads, c.q_len) == (heads, 3 * frame_tokens) and c.frames == frames]
            assert [c.num_tokens for c in of_length] == 2 * [frames * frame_tokens]
            pruned, whole = sorted(of_length, key=lambda c: not c.pruned)
            assert (pruned.pruned, whole.pruned) == (True, False)
            assert pruned.lengths.count(3 * frame_tokens // 2) == halves
            assert whole.lengths == [3 * frame_tokens] * (frames // 3)
    names = [str(c) for c in cases]
    assert len(set(names)) == len(names) == 36
    assert names[0] == "40 heads, 4680 queries, 32760 keys, 21 frames, pruned"
    assert names[3] == "40 heads, 4680 queries, 32760 keys, 21 frames, whole"


def test_retrieved_chunks_are_moved_in_time_and_no_others(load):
    case = load("bench_segment_attention").AttentionCase(heads=1, q_len=6, chunk=6, sink=1, retrieved=3, recent=1)
    assert case.lengths == [6, 3, 3, 3, 6, 6]
    assert [shift != 0 for shift in case.shifts] == [False, True, True, True, False, False]


@pytest.mark.parametrize("core, small, count", [(False, False, 36), (True, False, 8), (True, True, 4)])
def test_core_runs_the_first_cases_alone(load, monkeypatch, core, small, count):
    bench = load("bench_segment_attention")
    monkeypatch.setattr(bench, "run_cases", lambda name, cases, *args, **options: cases)
    cases = bench.run(core=core, small=small, device=CPU)
    assert len(cases) == count
    assert cases == (bench.SMALL_CASES if small else bench.CASES[:count])


def test_core_is_an_option_of_the_benches_that_have_one(load, monkeypatch, capsys):
    bench, asked = load("bench_segment_attention"), []
    monkeypatch.setattr(bench, "run", lambda **options: asked.append(options["core"]) or [])
    assert bench.main(["--small", "--device", "cpu", "--core"]) == bench.main(["--small", "--device", "cpu"]) == 0
    assert asked == [True, False]
    with pytest.raises(SystemExit):
        load("bench_compress_chunk").main(["--small", "--core"])
    assert "--core" in capsys.readouterr().err


@pytest.mark.parametrize("lengths", [[7], [128, 1], [300, 128, 5, 129, 4680], [2340] * 30])
def test_segments_are_scattered_over_aligned_slots(load, lengths):
    segments, rows = load("bench_segment_attention").scatter(lengths, range(len(lengths)))
    assert [s.num_rows for s in segments] == lengths
    assert [s.time_shift for s in segments] == list(range(len(lengths)))
    assert all(s.first_row % 128 == 0 for s in segments)
    in_pool = sorted(segments)
    assert all(a.first_row + a.num_rows <= b.first_row for a, b in itertools.pairwise(in_pool))
    assert in_pool[-1].first_row + in_pool[-1].num_rows <= rows
    assert len(lengths) < 3 or in_pool != segments


def test_the_ceiling_that_takes_longer_binds(common):
    ceilings = common.Ceilings(copy=100.0, matmul=1000.0)
    assert common.roof(200, 1000, ceilings) == ("copy", 2.0)
    assert common.roof(200, 3000, ceilings) == ("matmul", 3.0)
    assert common.roof(200, 0, ceilings) == ("copy", 2.0)
    linked = common.Ceilings(copy=100.0, matmul=1000.0, host_to_device=10.0)
    assert common.roof(200, 1000, linked, link_bytes=50) == ("link", 5.0)
    assert common.roof(200, 1000, linked, link_bytes=10) == ("copy", 2.0)
    assert common.roof(200, 6000, linked, link_bytes=50) == ("matmul", 6.0)
    # No link measured: what crosses it counts against the copy, once.
    assert common.roof(200, 0, ceilings, link_bytes=200) == ("copy", 2.0)
    assert common.roof(0, 0, ceilings, link_bytes=300) == ("copy", 3.0)


def test_percentiles_lie_between_values_in_proportion(common):
    values = [50.0, 10.0, 40.0, 20.0, 30.0]
    assert [common.percentile(values, share) for share in (0, 0.2, 0.5, 0.8, 1)] == [10, 18, 30, 42, 50]
    assert common.percentile([3.0], 0.8) == 3.0


def test_input_sets_exceed_four_times_the_cache(common):
    assert common.sets_for(bytes_per_call=48_000_000, l2_bytes=60_000_000) == 5
    assert common.sets_for(bytes_per_call=1 << 30, l2_bytes=60_000_000) == 2
    assert common.sets_for(bytes_per_call=1, l2_bytes=60_000_000) == 32


def test_relative_error_and_the_worst_of_them_see_nan(common):
    want = torch.tensor([3.0, 4.0])
    assert common.relative_error(torch.tensor([3.0, 4.5]), want) == pytest.approx(0.1)
    assert math.isnan(common.relative_error(torch.tensor([3.0, math.nan]), want))
    assert common.relative_error(torch.zeros(3), want) == math.inf
    assert math.isnan(common.worst([0.5, math.nan, 0.1]))
    assert common.worst([0.5, 0.7, 0.1]) == 0.7


# Timing.


def test_variants_are_interleaved_over_all_sets(common):
    calls = []
    runs = {name: lambda i, name=name: calls.append((name, i)) for name in "ab"}
    timings = common.time_variants(runs, CPU, sets=2, seconds=0.0)
    # One warm-up, then five rounds in which the first place changes hands.
    order = ["a", "b"] + ["a", "b", "b", "a"] * 2 + ["a", "b"]
    assert calls == [(name, i) for name in order for i in (0, 1)]
    assert timings["a"].rounds == 5
    assert timings["a"].low <= timings["a"].median <= timings["a"].high


class Clock:
    """A clock that only what is timed moves."""

    def __init__(self, common, monkeypatch):
        self.now = 0.0
        monkeypatch.setattr(common, "time", SimpleNamespace(perf_counter=lambda: self.now))

    def takes(self, *seconds):
        """A run that takes these times one after the other, then over again."""
        times = itertools.cycle(seconds)

        def run(i):
            self.now += next(times)

        return run


def test_what_still_runs_is_waited_for_before_each_sample_and_outside_its_time(common, monkeypatch):
    clock = Clock(common, monkeypatch)
    calls, right = [], clock.takes(2)

    def run(i):
        calls.append("run")
        right(i)

    def settle():
        calls.append("settle")
        clock.now += 100

    timing = common.time_variants({"a": run}, CPU, sets=2, seconds=0.0, settle=settle)["a"]
    assert calls == ["run", "run"] + ["settle", "run", "run"] * 5
    assert (timing.median, timing.low, timing.high) == (2.0, 2.0, 2.0)


def test_time_is_the_median_of_one_call(common, monkeypatch):
    clock = Clock(common, monkeypatch)
    # Two sets a sample; one warm-up sample, then five.
    times = [9, 9, 1, 1, 2, 4, 3, 3, 5, 3, 7, 1]
    timing = common.time_variants({"a": clock.takes(*times)}, CPU, sets=2, seconds=0.0)["a"]
    assert (timing.median, timing.rounds, timing.host) == (3.0, 5, 9.0)
    assert (timing.low, timing.high) == (pytest.approx(2.6), 4.0)


def test_one_thread_gives_the_others_back(common):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        with common.one_thread():
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_rounds_fill_the_time_given(common, monkeypatch):
    clock = Clock(common, monkeypatch)
    runs = {"a": clock.takes(0.25), "b": clock.takes(0.75)}
    assert common.time_variants(runs, CPU, seconds=12.0)["a"].rounds == 12
    assert common.time_variants(runs, CPU, seconds=1e6)["a"].rounds == 200


# A whole case.


def variant(common, name, run=lambda i: None, error=0.0, **options):
    return common.Variant(name, lambda: run, lambda run: error, 0.01, 1000, 4000, **options)


def test_figures_of_a_case(common, monkeypatch):
    clock = Clock(common, monkeypatch)
    variants = [
        variant(common, "ours", clock.takes(0.004)),
        variant(common, "ours more", clock.takes(0.006), base="ours"),
        variant(common, "slow", clock.takes(0.02), rival=True),
        variant(common, "fast", clock.takes(0.008), rival=True),
    ]
    ceilings = common.Ceilings(copy=1e6, matmul=2e6)  # 1 ms for the bytes, 2 ms for the operations
    ours, more, slow, fast = common.measure(common.Problem("case", variants), CPU, ceilings, seconds=0.0)
    assert {f["status"] for f in (ours, more, slow, fast)} == {"timed"}
    assert ours["us"] == pytest.approx(4000)
    assert (ours["us_20"], ours["us_80"]) == (pytest.approx(4000), pytest.approx(4000))
    assert (ours["ceiling"], ours["share"]) == ("matmul", pytest.approx(0.5))
    assert ours["gb_s"] == pytest.approx(250e-6)
    assert ours["tflop_s"] == pytest.approx(1e-6)
    assert (ours["rival"], ours["times_rival"]) == ("fast", pytest.approx(2.0))
    assert (fast["times_rival"], slow["times_rival"]) == (1.0, pytest.approx(0.4))
    assert (ours["over_base"], more["over_base"]) == (None, pytest.approx(0.5))


def test_what_is_wrong_or_cannot_run_is_reported_and_not_timed(common):
    def refuse():
        raise RuntimeError("no kernel\nand much more text")

    calls = []
    variants = [
        variant(common, "right", lambda i: calls.append("right")),
        variant(common, "off", lambda i: calls.append("off"), error=0.02),
        variant(common, "nan", lambda i: calls.append("nan"), error=math.nan, rival=True),
        common.Variant("absent", refuse, lambda run: 0.0, 0.01, 0, rival=True),
        common.Variant("broken", refuse, lambda run: 0.0, 0.01, 0),
    ]
    figures = common.measure(common.Problem("case", variants), CPU, common.Ceilings(1.0, 1.0), seconds=0.0)
    assert [f["status"] for f in figures] == ["timed", "wrong", "wrong", "skipped", "failed"]
    assert set(calls) == {"right"}
    assert all(f["us"] is None and f["share"] is None and f["times_rival"] is None for f in figures[1:])
    assert figures[1]["error"] == 0.02
    assert figures[2]["error"] is None
    assert figures[3]["reason"] == "RuntimeError: no kernel"
    json.dumps(figures, allow_nan=False)
    text = common.table(figures)
    assert "wrong: off: relative error 2.00e-02, limit 1e-02 (1 x, first: case)" in text
    assert "skipped: absent: RuntimeError: no kernel (1 x, first: case)" in text
    assert "absent" not in common.table(figures, short=True).split("wrong:")[0]


def test_a_case_that_cannot_be_made_ready_fails_alone(common, tmp_path):
    def prepare(case, device):
        if case == "large":
            raise RuntimeError("out of memory")
        return common.Problem(case, [variant(common, "ours")])

    figures = common.run_cases("b", ["large", "fits"], prepare, CPU, small=True, seconds=0.0)
    assert [(f["case"], f["status"]) for f in figures] == [("large", "failed"), ("fits", "timed")]
    assert "out of memory" in figures[0]["reason"]


@pytest.mark.parametrize("bench", BENCHES)
def test_small_runs_give_json_lines_with_the_documented_keys(load, tmp_path, bench, capsys):
    path = tmp_path / "results.jsonl"
    module = load(f"bench_{bench}")
    status = module.main(["--small", "--device", "cpu", "--seconds", "0.01", "--json", str(path)])
    assert status == 0
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in lines:
        assert set(line) == KEYS
        assert set(line["environment"]) == ENVIRONMENT_KEYS
        assert set(line["ceilings"]) == {"copy", "matmul", "host_to_device"}
        assert line["bench"] == bench
        assert line["status"] in {"timed", "skipped"}
        assert (line["us"] is None) == (line["status"] == "skipped") == (line["reason"] is not None)
    ours = [line for line in lines if not line["is_rival"]]
    on_a_cpu = [case for case in module.SMALL_CASES if not getattr(case, "beside", False)]
    assert {line["case"] for line in ours} == {str(case) for case in on_a_cpu}
    assert all({"heads", "tokens"} <= set(line["shape"]) for line in lines)
    assert all(line["status"] == "timed" and line["times_rival"] > 0 for line in ours)
    # Another way of doing the same agrees, so the check is not empty.
    assert any(line["is_rival"] and line["status"] == "timed" for line in lines)
    printed = capsys.readouterr().out
    assert printed.splitlines()[0].split() == ["case", "variant", "us", "GB/s", "TFLOP/s", "share", "x", "rival"]
    readme = (BENCHMARKS / "README.md").read_text()
    assert all(f"`{key}`" in readme for key in KEYS | ENVIRONMENT_KEYS)


def test_an_attention_rival_with_wrong_numbers_is_not_timed(load, monkeypatch):
    bench = load("bench_segment_attention")
    right = bench.scaled_dot_product_attention
    calls = []

    def one_key_short(q, k, v):
        calls.append(len(calls))
        return right(q, k[:, :, 1:], v[:, :, 1:])

    monkeypatch.setattr(bench, "scaled_dot_product_attention", one_key_short)
    figures = bench.run(small=True, device=CPU, seconds=0.01)
    rivals = [f for f in figures if f["is_rival"] and f["variant"].startswith("sdpa")]
    on_a_cpu = [f for f in rivals if not f["variant"].startswith(("sdpa cudnn", "sdpa efficient"))]
    assert {f["status"] for f in on_a_cpu} == {"wrong"}
    assert len(calls) == len(rivals)  # the check alone
    assert all(f["status"] == "timed" and f["rival"] is None for f in figures if not f["is_rival"])


@pytest.fixture
def window():
    """q, pools with NaN outside the window, the window's rows out of order, and what attention over them gives."""
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(70, 2, 64, generator=generator)
    pools = [torch.full((400, 2, 64), math.nan) for _ in range(2)]
    index = torch.cat([torch.arange(256, 300), torch.arange(5, 6), torch.arange(128, 256)])
    for pool in pools:
        pool[index] = torch.randn(len(index), 2, 64, generator=generator)
    k, v = (pool[index].transpose(0, 1) for pool in pools)
    exact = torch.nn.functional.scaled_dot_product_attention(q.transpose(0, 1).double(), k.double(), v.double())
    return q, *pools, index, exact.transpose(0, 1)


@pytest.mark.filterwarnings("ignore:flex_attention called without")
def test_the_flex_mask_admits_the_window_and_nothing_else(load, window):
    from torch.nn.attention.flex_attention import flex_attention

    q, k_pool, v_pool, index, exact = window
    inputs, mask = load("attention_rivals").flex_inputs(q, k_pool, v_pool, index)
    with torch.no_grad():
        out = flex_attention(*inputs, block_mask=mask)
    assert load("common").relative_error(out.squeeze(0).transpose(0, 1), exact) < 1e-5
    # Of four tiles of 128 rows the last is never visited.
    assert mask.to_dense().flatten().tolist() == [1, 1, 1, 0]


def dense(q, k, v, causal):
    assert not causal
    assert q.is_contiguous() and k.is_contiguous() and v.is_contiguous()
    return torch.nn.functional.scaled_dot_product_attention(q, k, v)


class PagedPrefill:
    """FlashInfer's wrapper as documented, on one request."""

    def __init__(self, workspace, layout):
        assert (workspace.dtype, layout) == (torch.uint8, "NHD")

    def plan(self, qo_indptr, indptr, indices, last_page_len, qo_heads, kv_heads, head_dim, page_size, **options):
        assert {x.dtype for x in (qo_indptr, indptr, indices, last_page_len)} == {torch.int32}
        assert (qo_indptr.tolist(), indptr.tolist(), last_page_len.tolist()) == ([0, 70], [0, len(indices)], [1])
        assert (qo_heads, kv_heads, head_dim, page_size) == (2, 2, 64, 1)
        assert options == {"causal": False, "q_data_type": torch.float32}
        self.indices = indices.long()

    def run(self, q, pools):
        k, v = (pool[self.indices].flatten(0, 1).transpose(0, 1) for pool in pools)  # pages of [1, heads, head_dim]
        return dense(q.transpose(0, 1).contiguous(), k.contiguous(), v.contiguous(), False).transpose(0, 1)


def by_heads(q, k, v, causal):
    """As flash-attn wants it, [1, length, heads, head_dim]."""
    return dense(*(x.transpose(1, 2).contiguous() for x in (q, k, v)), causal).transpose(1, 2)


def by_pages(q, k, v, *, seqused_k, page_table, causal):
    """As flash-attn-4 reads a page table: pages of [rows, heads, head_dim], in full but at the end of the sequence."""
    assert page_table.dtype == seqused_k.dtype == torch.int32
    assert (q.ndim, page_table.ndim, seqused_k.shape) == (4, 2, (1,)) and page_table.is_contiguous()
    k, v = (pool[page_table[0].long()].flatten(0, 1)[: seqused_k.item()] for pool in (k, v))
    return by_heads(q, k.unsqueeze(0), v.unsqueeze(0), causal), None


@pytest.mark.parametrize("size", [1, 2, 4, 64, 128])
def test_pages_are_as_large_as_the_segments_allow(load, monkeypatch, size):
    rivals = load("attention_rivals")
    generator = torch.Generator().manual_seed(0)
    index = torch.cat([torch.arange(256, 256 + 2 * 128), torch.arange(0, 128 + size % 128)])
    assert rivals.whole_page(index) == size
    assert rivals.whole_page(index.flip(0)) == 1
    assert rivals.whole_page(index[size:]) == size
    assert rivals.whole_page(index + 1) == 1
    # Two halves of different pages, though the first of them starts one.
    assert rivals.whole_page(torch.cat([torch.arange(64), torch.arange(192, 256)])) == 64
    q, pools = torch.randn(9, 2, 64, generator=generator), [torch.full((512, 2, 64), math.nan) for _ in range(2)]
    for pool in pools:
        pool[index] = torch.randn(len(index), 2, 64, generator=generator)
    heads_first = [x.transpose(0, 1).double() for x in (q, pools[0][index], pools[1][index])]
    exact = torch.nn.functional.scaled_dot_product_attention(*heads_first).transpose(0, 1)
    pages = []

    def noted(q, k, v, **options):
        pages.append(k.shape[1])
        return by_pages(q, k, v, **options)

    monkeypatch.setitem(sys.modules, "flash_attn", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "flash_attn.cute", SimpleNamespace(flash_attn_varlen_func=noted))
    monkeypatch.setattr(rivals, "need_gpu", lambda q, name: None)
    out = rivals.flash_attn4_paged(q, *pools, index)(0)
    assert pages == [size]
    assert load("common").relative_error(out, exact) < 1e-5


@pytest.mark.filterwarnings("ignore:flex_attention called without")
@pytest.mark.parametrize("major, q_tile", [(9, 128), (10, 256)])
def test_flash_attn_4_gets_its_lists_through_flex_attention(load, monkeypatch, window, major, q_tile):
    *inputs, exact = window
    rivals, asked = load("attention_rivals"), []

    def compiled(function, fullgraph, dynamic):
        assert fullgraph and not dynamic

        def run(*inputs, block_mask, kernel_options):
            asked.append((block_mask.BLOCK_SIZE, kernel_options))
            with torch.no_grad():
                return function(*inputs, block_mask=block_mask)

        return run

    monkeypatch.setitem(sys.modules, "flash_attn", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "flash_attn.cute", None)
    with pytest.raises(ImportError, match=r"flash_attn\.cute"):
        rivals.flash_attn4_lists(*inputs)
    monkeypatch.setitem(sys.modules, "flash_attn.cute", SimpleNamespace())
    with pytest.raises(RuntimeError, match="is timed on a GPU only"):
        rivals.flash_attn4_lists(*inputs)
    monkeypatch.setattr(rivals, "need_gpu", lambda q, name: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (major, 0))
    with monkeypatch.context() as patch:
        patch.setattr(torch, "compile", compiled)
        run = rivals.flash_attn4_lists(*inputs)
    out = run(0)
    assert asked == [((q_tile, 128), {"BACKEND": "FLASH"})]
    assert load("common").relative_error(out, exact) < 1e-5


@pytest.mark.parametrize(
    "module, rival, function",
    [
        ("flash_attn", "flash_attn2", {"flash_attn_func": by_heads}),
        ("sageattention", "sage", {"sageattn": lambda q, k, v, is_causal: dense(q, k, v, is_causal)}),
        ("flashinfer", "flashinfer_paged", {"BatchPrefillWithPagedKVCacheWrapper": PagedPrefill}),
        ("flash_attn.cute", "flash_attn4_paged", {"flash_attn_varlen_func": by_pages}),
    ],
)
def test_other_libraries_get_the_layout_that_they_document(load, monkeypatch, window, module, rival, function):
    *inputs, exact = window
    rivals = load("attention_rivals")
    monkeypatch.setitem(sys.modules, module.split(".")[0], SimpleNamespace())
    monkeypatch.setitem(sys.modules, module, SimpleNamespace(**function))
    with pytest.raises(RuntimeError, match="is timed on a GPU only"):
        getattr(rivals, rival)(*inputs)
    monkeypatch.setattr(rivals, "need_gpu", lambda q, name: None)
    assert load("common").relative_error(getattr(rivals, rival)(*inputs)(0), exact) < 1e-5


def test_a_rival_that_may_err_more_is_timed_but_no_yardstick(common, monkeypatch):
    clock = Clock(common, monkeypatch)
    rough = common.Variant("8 bits", lambda: clock.takes(0.001), lambda run: 0.02, 0.05, 1000, 4000, rival=True)
    variants = [variant(common, "ours", clock.takes(0.004)), variant(common, "fp16", clock.takes(0.008), rival=True)]
    problem = common.Problem("case", [*variants, rough])
    figures = common.measure(problem, CPU, common.Ceilings(copy=1e6, matmul=2e6), seconds=0.0)
    assert {f["rival"] for f in figures} == {"fp16"}
    assert [f["times_rival"] for f in figures] == [pytest.approx(x) for x in (2.0, 1.0, 8.0)]


def test_an_installed_package_names_no_commit_of_a_repository_around_it(common, monkeypatch, tmp_path):
    (tmp_path / "ops").mkdir()
    (tmp_path / "ops" / "x.py").write_text("1")
    monkeypatch.setattr(common, "ROOT", tmp_path)
    monkeypatch.setattr(common, "_output", lambda *command: "someone else's")
    monkeypatch.delenv("WORLDKV_COMMIT", raising=False)
    before = common.environment(CPU)
    assert (before["commit"], before["dirty"]) == (None, None)
    (tmp_path / "ops" / "x.py").write_text("2")
    assert common.environment(CPU)["source"] != before["source"]


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
        ("reference", counted, None, False), ("reference, 3 calls", counted, "reference", False),
        ("published, eager", counted, None, True),
    ]  # fmt: skip
    assert str(case) == problem.case == "3 layers of 51 tokens x 2 x 128, pooled"
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


def test_full_cases_are_refused_on_a_cpu(load, capsys):
    assert load("bench_compress_chunk").main(["--device", "cpu"]) == 2
    assert load("bench_compress_chunk").main(["--small", "--device", "nowhere"]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert errors[0] == "compress_chunk: the full cases need a GPU; --small runs on a CPU"
    assert errors[1].startswith("compress_chunk: --device must be a device of this machine, got 'nowhere'")


def test_the_record_names_the_code(common, monkeypatch):
    monkeypatch.setattr(common, "_output", lambda *command: None)
    monkeypatch.setenv("WORLDKV_COMMIT", "abc123")
    record = common.environment(CPU)
    assert (record["commit"], record["dirty"]) == ("abc123", None)
    assert len(record["source"]) == 12
    assert record["torch"] == torch.__version__
    assert common.clocks(CPU) is None


def test_clocks_are_numbers_where_the_card_tells_them(common, monkeypatch):
    monkeypatch.setattr(common, "_output", lambda *command: "1980, 3201, [N/A], 55, 580.159.04")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="1-2"))
    assert common.clocks(torch.device("cuda:0")) == {
        "sm_mhz": 1980.0, "memory_mhz": 3201.0, "power_w": None, "temperature_c": 55.0, "driver": "580.159.04",
    }  # fmt: skip


def test_the_library_does_not_import_the_benchmarks():
    library = BENCHMARKS.parent / "worldkv_kernels"
    for path in library.rglob("*.py"):
        assert path == library / "cli" / "bench.py" or "benchmarks" not in path.read_text(), path
    # Not even the command does, until a bench is run.
    program = "import sys, worldkv_kernels.cli.bench; print('|'.join(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert {"common", "plots", "matplotlib", "worldkv_kernels.benchmarks"}.isdisjoint(done.stdout.strip().split("|"))
    assert "worldkv_kernels.cli.bench" in done.stdout


def test_device_script_runs_dry(tmp_path):
    environment = {**os.environ, "PYTHON": sys.executable, "OUT": str(tmp_path)}
    done = subprocess.run(
        ["bash", str(BENCHMARKS / "device.sh"), "--dry"],
        env=environment, capture_output=True, text=True, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    (results,) = tmp_path.glob("cpu-*.jsonl")
    (log,) = tmp_path.glob("cpu-*.log")
    assert {json.loads(line)["bench"] for line in results.read_text().splitlines()} == {"ceilings", *BENCHES}
    assert log.read_text() == done.stdout
    assert "memcheck             skipped: needs a GPU" in done.stdout
    assert "FAILED" not in done.stdout
    # The table comes last, and nothing was left beside the two files.
    assert "x rival" in done.stdout.split(f"figures in {results}")[1]
    assert sorted(tmp_path.iterdir()) == sorted([results, log])


def dry_run_with_a_stub(tmp_path, **variables):
    """With a program in the interpreter's place that fails one stage and is cut short in another."""
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\ncase "$*" in *bench_norm*) exit 3;; *bench_segment*) exit 124;; esac\n')
    python.chmod(0o755)
    environment = {**os.environ, "PYTHON": str(python), "OUT": str(tmp_path / "out"), **variables}
    script = str(BENCHMARKS / "device.sh")
    return subprocess.run(["bash", script, "--dry"], env=environment, capture_output=True, text=True)


def test_device_script_goes_on_past_a_failing_stage(tmp_path):
    done = dry_run_with_a_stub(tmp_path)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "segment_attention    FAILED: ran past its 200 s" in done.stdout
    assert "norm_rope_append     FAILED: status 3" in done.stdout
    assert "compress_chunk       ok" in done.stdout
    assert "NOT ALL WELL" in done.stdout


def test_device_script_starts_nothing_past_its_budget(tmp_path):
    done = dry_run_with_a_stub(tmp_path, BUDGET="3")
    assert done.returncode == 1, done.stdout + done.stderr
    # environment, doctor where there is one, ceilings and the benches
    assert done.stdout.count("FAILED: no time left of 3 s") in (6, 7)
    assert "(at most" not in done.stdout
