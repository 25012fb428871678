"""A bench of one's own shape, with chosen cases and variants, and beside a rival of one's own."""

import csv
import json
import math
import re
from types import SimpleNamespace

import pytest
import torch
from conftest import BENCHMARKS

from worldkv_kernels.cli import main

CPU = torch.device("cpu")
SHAPE = "heads=3,kv_heads=3,q=40,head_dim=64,window=40x1+20x3,dtype=float16"
GROUPED = SHAPE.replace("heads=3,kv_heads=3", "heads=4,kv_heads=2")
BENCHES = [
    "segment_attention", "norm_rope_append", "compress_chunk", "quantize_chunk", "participation", "prefetch", "chunk",
    "rollout",
]  # fmt: skip


def bench(tmp_path, *arguments):
    """Its figures."""
    path = tmp_path / "out.json"
    assert main(["bench", *arguments, "--device", "cpu", "--seconds", "0.01", "--json", str(path)]) == 0
    return json.loads(path.read_text())["figures"]


@pytest.mark.parametrize(
    "name, shape, case, of_figure",
    [
        (
            "segment_attention", GROUPED,
            "4 heads over 2, 40 queries, 100 keys, window 40x1+20x3, head_dim 64, float16",
            {"heads": 4, "queries": 40, "tokens": 100, "keys": "40x1+20x3", "head_dim": 64, "dtype": "float16",
             "kv_heads": 2},
        ),
        (
            "norm_rope_append", "heads=3,head_dim=64,grid=2x3x4,dtype=float32", "24 tokens x 3 x 64, float32",
            {"heads": 3, "tokens": 24, "head_dim": 64, "dtype": "float32"},
        ),
        (
            "compress_chunk", "frame_tokens=8,heads=2,head_dim=64,keep_ratio=0.5,pooled=false,layers=2",
            "2 layers of 24 tokens x 2 x 64, keep_ratio 0.5, per frame",
            {"heads": 2, "tokens": 24, "layers": 2, "head_dim": 64, "dtype": "bfloat16"},
        ),
        (
            "quantize_chunk", "tokens=70,heads=2,head_dim=64,bits=4,op=dequantize,layers=2",
            "dequantize, 4 bits, 2 layers of 70 tokens x 2 x 64",
            {"heads": 2, "tokens": 70, "layers": 2, "bits": 4, "head_dim": 64, "dtype": "bfloat16"},
        ),
        (
            "participation", GROUPED, "4 heads over 2, 40 queries, 100 keys, window 40x1+20x3, head_dim 64, float16",
            {"heads": 4, "queries": 40, "tokens": 100, "keys": "40x1+20x3", "head_dim": 64, "dtype": "float16",
             "kv_heads": 2},
        ),
    ],
)  # fmt: skip
def test_a_shape_takes_the_place_of_the_cases(tmp_path, name, shape, case, of_figure):
    figures = bench(tmp_path, name, "--shape", shape, "--only", "ours")
    assert {f["case"] for f in figures} == {case}
    assert all(f["shape"] == of_figure and f["status"] == "timed" and not f["small"] for f in figures)


def test_shapes_are_run_in_the_order_given(tmp_path):
    shapes = [argument for grid in ("1x2x2", "1x1x1") for argument in ("--shape", f"heads=1,grid={grid}")]
    assert [f["shape"]["tokens"] for f in bench(tmp_path, "norm_rope_append", *shapes, "--only", "ours")] == [4, 1]


def test_a_window_of_ones_own_is_the_one_asked_for(load):
    attention = load("bench_segment_attention")
    case = attention.case_of("heads=2,q=7,window=5x2+130x1")
    assert (case.lengths, case.num_tokens) == ([5, 5, 130], 140)
    assert (case.head_dim, case.dtype) == (128, torch.bfloat16)
    assert [shift != 0 for shift in case.shifts] == [True, True, False]
    inputs = attention.Inputs(case, CPU)
    assert [segment.num_rows for segment in inputs.plain] == case.lengths
    assert attention.case_of("heads=2,kv_heads=2,q=7,window=5x2+130x1") == case
    grouped = attention.case_of("heads=6,kv_heads=2,q=7,window=5x2+130x1")
    assert str(grouped) == "6 heads over 2, 7 queries, 140 keys, window 5x2+130x1"
    assert attention.Inputs(grouped, CPU).k_pool.shape[1] == 2


def test_sizes_that_do_not_fit_are_told_in_bytes(load, monkeypatch, capsys):
    attention, shapes = load("bench_segment_attention"), load("shapes")
    case = attention.case_of("heads=24,kv_heads=24,q=3600,head_dim=64,window=3600x1+1800x6,dtype=float16")
    pools = 2 * attention.scatter(case.lengths, case.shifts)[1] * 24 * 64 * 2
    scores = 3600 * 14_400 * 8
    assert pools + 4 * scores < case.needed_bytes < 2 * (pools + 4 * scores)
    monkeypatch.setattr(shapes, "free_bytes", lambda device: 2**20)
    for name, shape in (
        ("segment_attention", SHAPE), ("norm_rope_append", "heads=40,grid=3x30x52"),
        ("compress_chunk", "heads=40,frame_tokens=1560"), ("quantize_chunk", "heads=40,tokens=2340,bits=8"),
    ):  # fmt: skip
        assert main(["bench", name, "--device", "cpu", "--shape", shape]) == 2
        said = r"worldkv bench: --shape .* must fit the 1\.0 MiB that are free on cpu, got \d+\.\d [MG]iB\n"
        assert re.fullmatch(said, capsys.readouterr().err)


def test_weights_are_counted_as_they_are(load):
    cases = load("model_cases")
    for model, sizes in cases.SMALL_SIZES.items():
        case = cases.ModelCase(model, 5, sizes)
        assert cases.weights_of(case, torch.float32) == cases.weight_bytes(cases.build(case, CPU))


@pytest.mark.parametrize("name", BENCHES)
def test_the_variants_that_a_case_is_said_to_have_are_those_it_has(load, monkeypatch, name):
    module = load(f"bench_{name}")
    if name == "chunk":  # memories that take long to fill
        monkeypatch.setattr(module, "Filled", lambda *args: SimpleNamespace(check=None))
    for case in module.SMALL_CASES:
        named = module.variants_of(case, CPU)
        if name == "rollout":
            assert list(named) == [mode for mode in case.modes if mode not in module.CHANGED]
            assert list(module.variants_of(case, torch.device("cuda"))) == list(case.modes)
        elif not getattr(case, "beside", False):
            assert named == {v.name: v.rival for v in module.prepare(case, CPU).variants}
        assert not any("," in variant for variant in named)  # which --only goes by


def test_the_variants_beside_matmuls_are_those_named(load):
    module = load("bench_prefetch")
    (case,) = (case for case in module.SMALL_CASES if case.beside)
    assert list(module.variants_of(case, CPU)) == [
        "Bank.fetch", "Bank.fetch beside matmuls", "matmuls", "matmuls beside Bank.fetch",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "words, left",
    [
        (None, ["a", "a b", "a b c", "d 4 e"]),
        (["ours"], ["a", "a b"]),
        (["a"], ["a"]),  # a whole name is that one alone
        (["d"], ["d 4 e"]),
        (["d 4", "a b"], ["a b", "d 4 e"]),
        (["d 4 e f", "A", ""], []),
    ],
)
def test_variants_are_picked_by_name_or_first_words(load, words, left):
    variants = {"a": False, "a b": False, "a b c": True, "d 4 e": True}
    assert load("common").picked(variants, words) == left


def test_case_and_only_leave_what_they_name(tmp_path):
    figures = bench(tmp_path, "all", "--small", "--case", "float16$", "--only", "ours,eager,sdpa flash")
    assert [(f["bench"], f["variant"]) for f in figures if f["base"] is None] == [
        ("segment_attention", "sdpa backend"), ("segment_attention", "reference"), ("segment_attention", "sdpa flash"),
        ("norm_rope_append", "reference"), ("norm_rope_append", "eager"), ("compress_chunk", "reference"),
        ("quantize_chunk", "reference"), ("quantize_chunk", "eager"),
        ("participation", "reference attention"), ("participation", "eager"),
    ]  # fmt: skip
    assert all(f["case"].endswith("float16") for f in figures)


def test_csv_holds_a_row_a_figure(tmp_path):
    path = tmp_path / "out.csv"
    figures = bench(tmp_path, "norm_rope_append", "--shape", "heads=2,grid=1x2x2", "--csv", str(path))
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["variant"] for row in rows] == [f["variant"] for f in figures]
    assert [row["us"] for row in rows] == [str(f["us"] or "") for f in figures]
    assert {row["device"] for row in rows} == {figures[0]["environment"]["device"]}


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """The README's rival, in the current folder."""
    text = (BENCHMARKS / "README.md").read_text()
    (block,) = re.findall(r"```python\n(.*?)```", text, re.S)
    (tmp_path / "mine.py").write_text(block)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))  # so that what the command adds goes with it
    monkeypatch.delitem(__import__("sys").modules, "mine", raising=False)
    return tmp_path / "mine.py"


def run_with(mine, function="gathered"):
    arguments = ["segment_attention", "--shape", SHAPE, "--only", "ours", "--rival"]  # a rival given is a rival wanted
    return bench(mine.parent, *arguments, "mine:" + function)[-1]


def test_the_readmes_rival_is_checked_and_timed(mine):
    assert len(mine.read_text().splitlines()) <= 15
    figure = run_with(mine)
    assert (figure["variant"], figure["is_rival"], figure["status"]) == ("mine:gathered", True, "timed")
    assert figure["error"] < 2e-3 and figure["us"] > 0
    assert figure["rival"] == "mine:gathered"


@pytest.mark.parametrize(
    "fault, status, reason",
    [
        ("return out.squeeze(0).transpose(0, 1) * 1.01", "wrong", "relative error 1"),
        ("return out.squeeze(0)", "skipped", "TypeError: run must return a tensor ["),
        ("return out.squeeze(0).transpose(0, 1).log()", "wrong", "relative error nan"),
        ("raise KeyError('no kernel')", "skipped", "KeyError: 'no kernel'"),
        ("return None", "skipped", "TypeError: run must return a tensor ["),
        ("raise SystemExit(3)", "skipped", "SystemExit: 3"),
        (
            "calls.append(i); assert len(calls) < 3, 'tired'; return out.squeeze(0).transpose(0, 1)",
            "skipped",
            "AssertionError: tired",
        ),
        ("q.zero_(); return out.squeeze(0).transpose(0, 1)", "skipped", "RuntimeError: it has written to its inputs"),
    ],
)
def test_a_rival_of_ones_own_that_is_wrong_gets_no_number(mine, fault, status, reason):
    mine.write_text("calls = []\n" + mine.read_text().replace("return out.squeeze(0).transpose(0, 1)", fault))
    figure = run_with(mine)
    assert (figure["status"], figure["us"], figure["times_rival"]) == (status, None, None)
    assert figure["reason"].startswith(reason)
    assert figure["error"] is None or math.isfinite(figure["error"])


def test_a_rival_that_returns_no_function_gets_no_number(mine):
    mine.write_text("def forgetful(q, k_pool, v_pool, index):\n    pass\n")
    figure = run_with(mine, "forgetful")
    assert figure["status"] == "skipped"
    assert figure["reason"] == "TypeError: a rival must return a function run(i), got None"
