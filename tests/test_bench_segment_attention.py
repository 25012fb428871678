"""The attention bench: what it counts, which windows it takes, and that its rivals attend to the same rows."""

import itertools
import math
import sys
from types import SimpleNamespace

import pytest
import torch

from worldkv_kernels import Segment

CPU = torch.device("cpu")


def test_attention_operations_are_two_products(load):
    bench = load("bench_segment_attention")
    # 2 queries x 3 keys x 4 numbers: 24 products and 24 sums for the scores, as many for the values; 5 heads.
    assert bench.attention_flops(q_len=2, heads=5, head_dim=4, num_tokens=3) == 5 * (48 + 48)


def test_attention_bytes_are_q_out_and_each_row_once(load):
    bench = load("bench_segment_attention")
    # q 2 x 5 x 4 numbers of 2 bytes = 80, out as much; K 3 x 5 x 4 x 2 = 120, V as much.
    assert bench.attention_bytes(2, 5, 4, 3, 2, kv_heads=5) == 80 + 80 + 120 + 120
    assert bench.attention_bytes(2, 5, 4, 3, 2, kv_heads=1) == 80 + 80 + 24 + 24
    # An fp32 number a head and query for lse, a head and segment for mass.
    assert bench.attention_bytes(2, 5, 4, 3, 2, kv_heads=5, lse=True) == 400 + 4 * 5 * 2
    assert bench.attention_bytes(2, 5, 4, 3, 2, kv_heads=5, mass_segments=7) == 400 + 4 * 5 * 7


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
    every = load("bench_segment_attention").CASES
    cases = [c for c in every if (c.head_dim, c.dtype) == (128, torch.bfloat16)]
    # Tokens a frame and heads; a chunk is three frames, and the window's last one makes the queries.
    for frame_tokens, heads in ((1560, 40), (1508, 40), (880, 12)):
        for frames, halves in ((9, 2), (15, 2), (21, 6), (27, 10), (90, 52)):
            of_length = [c for c in cases if (c.heads, c.q_len) == (heads, 3 * frame_tokens) and c.frames == frames]
            assert [c.num_tokens for c in of_length] == 2 * [frames * frame_tokens]
            pruned, whole = sorted(of_length, key=lambda c: not c.pruned)
            assert (pruned.pruned, whole.pruned) == (True, False)
            assert pruned.lengths.count(3 * frame_tokens // 2) == halves
            assert whole.lengths == [3 * frame_tokens] * (frames // 3)
    names = [str(c) for c in every]
    assert len(set(names)) == len(names) == 40
    assert names[0] == "40 heads, 4680 queries, 32760 keys, 21 frames, pruned"
    assert names[3] == "40 heads, 4680 queries, 32760 keys, 21 frames, whole"


def test_retrieved_chunks_are_moved_in_time_and_no_others(load):
    case = load("bench_segment_attention").AttentionCase(heads=1, q_len=6, chunk=6, sink=1, retrieved=3, recent=1)
    assert case.lengths == [6, 3, 3, 3, 6, 6]
    assert [shift != 0 for shift in case.shifts] == [False, True, True, True, False, False]


def test_other_head_dims_and_dtypes_are_among_the_cases(load):
    for name in ("segment_attention", "norm_rope_append", "compress_chunk", "quantize_chunk", "participation"):
        bench = load(f"bench_{name}")
        for cases in (bench.CASES, bench.SMALL_CASES):
            assert {64, 128} <= {case.head_dim for case in cases}
            assert {torch.float16, torch.bfloat16} <= {case.dtype for case in cases}


@pytest.mark.parametrize("options, count", [([], 40), (["--core"], 8), (["--core", "--small"], 5)])
def test_core_runs_the_first_cases_alone(load, monkeypatch, options, count):
    bench, asked = load("bench_segment_attention"), []
    monkeypatch.setattr(load("common"), "device_for", lambda name, small: CPU)
    monkeypatch.setattr(bench, "run", lambda **options: asked.append(options["cases"]) or [])
    assert bench.main(options) == 0
    assert asked == [bench.SMALL_CASES if "--small" in options else bench.CASES[:count]] and len(asked[0]) == count
    with pytest.raises(SystemExit):
        load("bench_compress_chunk").main(["--small", "--core"])


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


def test_a_backend_is_timed_on_the_numbers_that_it_takes(load, monkeypatch):
    bench = load("bench_segment_attention")
    monkeypatch.setattr(bench, "ours", lambda op, device: ["cuda", "sdpa", "reference"])
    half, full = bench.SMALL_CASES[-1], bench.SMALL_CASES[0]
    assert (half.dtype, full.dtype) == (torch.float16, torch.float32)
    extras = ["", " rebase", " mass", " lse", " weights"]
    dense = [f"sdpa backend{extra}" for extra in extras if extra != " mass"]
    for case, mine in ((half, ["cuda"]), (full, [])):
        wanted = [f"{name}{extra}" for name in mine for extra in extras]
        wanted += [*dense, *(f"reference{extra}" for extra in extras)]
        assert [name for name, rival in bench.variants_of(case, CPU).items() if not rival] == wanted
        assert [v.name for v in bench.prepare(case, CPU).variants if not v.rival] == wanted


def test_an_attention_rival_with_wrong_numbers_is_not_timed(load, monkeypatch):
    bench = load("bench_segment_attention")
    right = bench.scaled_dot_product_attention
    calls = []

    def one_key_short(q, k, v, enable_gqa):
        calls.append(len(calls))
        return right(q, k[:, :, 1:], v[:, :, 1:], enable_gqa=enable_gqa)

    monkeypatch.setattr(bench, "scaled_dot_product_attention", one_key_short)
    figures = bench.run(small=True, device=CPU, seconds=0.01)
    rivals = [f for f in figures if f["is_rival"] and f["variant"].startswith("sdpa")]
    on_a_cpu = [f for f in rivals if not f["variant"].startswith(("sdpa cudnn", "sdpa efficient"))]
    assert {f["status"] for f in on_a_cpu} == {"wrong"}
    assert len(calls) == len(rivals)  # the check alone
    assert all(f["status"] == "timed" and f["rival"] is None for f in figures if not f["is_rival"])


@pytest.fixture
def window():
    """q of 4 heads, pools of 2 with NaN outside the window, the window's rows out of order, and what attention over
    them gives."""
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(70, 4, 64, generator=generator)
    pools = [torch.full((400, 2, 64), math.nan) for _ in range(2)]
    index = torch.cat([torch.arange(256, 300), torch.arange(5, 6), torch.arange(128, 256)])
    for pool in pools:
        pool[index] = torch.randn(len(index), 2, 64, generator=generator)
    k, v = (pool[index].transpose(0, 1).repeat_interleave(2, dim=0) for pool in pools)
    exact = torch.nn.functional.scaled_dot_product_attention(q.transpose(0, 1).double(), k.double(), v.double())
    return q, *pools, index, exact.transpose(0, 1)


@pytest.mark.filterwarnings("ignore:flex_attention called without")
def test_the_flex_mask_admits_the_window_and_nothing_else(load, window):
    from torch.nn.attention.flex_attention import flex_attention

    q, k_pool, v_pool, index, exact = window
    inputs, mask = load("attention_rivals").flex_inputs(q, k_pool, v_pool, index)
    with torch.no_grad():
        out = flex_attention(*inputs, block_mask=mask, enable_gqa=True)
    assert load("common").relative_error(out.squeeze(0).transpose(0, 1), exact) < 1e-5
    # Of four tiles of 128 rows the last is never visited.
    assert mask.to_dense().flatten().tolist() == [1, 1, 1, 0]


def dense(q, k, v, causal):
    assert not causal
    assert q.is_contiguous() and k.is_contiguous() and v.is_contiguous()
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)


class PagedPrefill:
    """FlashInfer's wrapper as documented, on one request."""

    def __init__(self, workspace, layout):
        assert (workspace.dtype, layout) == (torch.uint8, "NHD")

    def plan(self, qo_indptr, indptr, indices, last_page_len, qo_heads, kv_heads, head_dim, page_size, **options):
        assert {x.dtype for x in (qo_indptr, indptr, indices, last_page_len)} == {torch.int32}
        assert (qo_indptr.tolist(), indptr.tolist(), last_page_len.tolist()) == ([0, 70], [0, len(indices)], [1])
        assert (qo_heads, kv_heads, head_dim, page_size) == (4, 2, 64, 1)
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

        def run(*inputs, block_mask, enable_gqa, kernel_options):
            asked.append((block_mask.BLOCK_SIZE, kernel_options))
            with torch.no_grad():
                return function(*inputs, block_mask=block_mask, enable_gqa=enable_gqa)

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
