"""Which backend is the fastest for a shape: what the automatic choice makes of measurements, and that these exist."""

import json
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from worldkv_kernels.cli import doctor
from worldkv_kernels.ops import faster, proven
from worldkv_kernels.ops.backends import Backend, OpBackends
from worldkv_kernels.ops.faster import FASTER, Faster
from worldkv_kernels.ops.segment_attention import BACKENDS as ATTENTION
from worldkv_kernels.ops.segment_attention import Shape

ROOT = Path(__file__).parents[1]
GPU = torch.device("cuda:0")
KIND = (torch.float32,)


class Size(NamedTuple):
    heads: int
    keys: int


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """As seen from a Hopper that need not be there, on which nothing is proven; `gpu(*entries)` sets the table."""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(proven, "REPOSITORY_LIST", tmp_path / "proven.json")

    def measured(*entries):
        monkeypatch.setattr(faster, "FASTER", entries)
        faster.forget()

    measured()
    proven._lists.cache_clear()
    yield measured
    monkeypatch.undo()
    proven._lists.cache_clear()
    faster.forget()


@pytest.fixture
def op(gpu):
    """An op with shapes, and three implementations that write 1; `.ran` notes which were run."""

    def small_case(device, kind):
        def call(run):
            out = torch.zeros(4)
            run(out)
            return {"out": out}

        return call

    def load(name):
        def run(out):
            made.ran.append(name)
            out.fill_(made.writes[name])

        return lambda: run

    backends = {name: Backend(load(name)) for name in ("cuda", "triton", "reference")}
    made = OpBackends("some_op", backends, small_case, lambda kind: 1e-6, (KIND,), typical_shape=Size(8, 1000))
    made.ran, made.writes = [], dict.fromkeys(backends, 1.0)
    return made


def entry(op="some_op", architecture="sm_90", heads=(4, 8), keys=(500, 1000)):
    return Faster(op, architecture, {"heads": heads, "keys": keys}, ("benchmarks/results/h200.jsonl:1",))


def chosen(op, shape=None):
    return op.name("auto", GPU, KIND, shape)


def test_a_proven_kernel_comes_after_triton_where_it_is_not_measured_faster(op):
    proven.record("some_op", GPU)
    assert op.order(GPU) == ["triton", "cuda", "reference"] and chosen(op) == "triton"
    assert op.slower(GPU) == "not measured faster than triton on sm_90"
    assert op.passed_over("cuda", GPU, KIND) is None  # it is right
    op.writes["triton"] = 2.0
    op.forget()
    with pytest.warns(UserWarning, match="the triton kernel is not used on cuda:0"):
        assert chosen(op) == "cuda"


def test_where_it_is_measured_faster_it_serves(op, gpu):
    proven.record("some_op", GPU)
    gpu(entry("other_op", heads=(0, 99)), entry(architecture="sm_100", heads=(0, 99)), entry())
    for shape in (None, Size(4, 500), Size(8, 1000), Size(5, 700)):
        assert chosen(op, shape) == "cuda" and op.slower(GPU, shape) is None
        assert op.order(GPU, shape) == ["cuda", "triton", "reference"]
    for shape in (Size(3, 700), Size(9, 700), Size(5, 499), Size(5, 1001)):
        assert chosen(op, shape) == "triton" and "on sm_90" in op.slower(GPU, shape)
    gpu(entry(), entry(heads=(3, 3), keys=(0, 9999)))
    assert chosen(op, Size(3, 700)) == "cuda" and chosen(op, Size(9, 700)) == "triton"


def test_another_backend_may_be_the_fastest(op, gpu):
    """Such as "sdpa", which otherwise comes after both kernels, and needs no proof."""
    op.backends = {**op.backends, "sdpa": Backend(lambda: lambda out: op.ran.append("sdpa") or out.fill_(1.0))}
    assert op.order(GPU) == ["triton", "cuda", "sdpa", "reference"]
    gpu(replace(entry(), backends=("sdpa",)))
    assert op.order(GPU, Size(5, 700)) == ["sdpa", "triton", "cuda", "reference"] and chosen(op, Size(5, 700)) == "sdpa"
    assert (
        op.order(GPU, Size(9, 700)) == ["triton", "cuda", "sdpa", "reference"] and chosen(op, Size(9, 700)) == "triton"
    )
    assert op.slower(GPU, Size(5, 700)) == "not measured faster than triton on sm_90"  # the CUDA kernel
    gpu(replace(entry(), backends=("sdpa",), on="sm_100"), entry(keys=(500, 600)))
    assert op.order(GPU, Size(5, 550)) == ["cuda", "triton", "sdpa", "reference"]


def test_a_fast_kernel_that_is_not_proven_or_not_right_does_not_serve(op, gpu):
    gpu(entry())
    assert chosen(op) == "triton" and "no run has proven it" in op.passed_over("cuda", GPU, KIND)
    proven.record("some_op", GPU)
    op.writes["cuda"] = 2.0
    with pytest.warns(UserWarning, match="the cuda kernel is not used on cuda:0"):
        assert chosen(op) == "triton"


def test_asked_for_by_name_it_runs_whatever_is_measured(op):
    op.choose("cuda", GPU, KIND, Size(1, 1))(torch.zeros(1))
    assert op.ran == ["cuda"]


def test_an_op_without_shapes_takes_a_proven_kernel_first(op):
    op.typical_shape = None
    proven.record("some_op", GPU)
    assert op.order(GPU) == ["cuda", "triton", "reference"] and chosen(op) == "cuda" and op.slower(GPU) is None


def test_new_shapes_cost_no_check_and_no_memory(op, gpu):
    gpu(entry())
    proven.record("some_op", GPU)
    runs = {op.choose("auto", GPU, KIND, Size(heads, keys)) for heads in range(20) for keys in range(400, 1100, 100)}
    assert len(runs) == 2 and len(op.chosen) == 2
    assert sorted(op.ran) == ["cuda", "reference", "reference", "triton"]  # each kernel held against the reference once


def test_attention_says_its_shape(monkeypatch):
    from worldkv_kernels import Rope3D, Segment, Window, segment_attention

    seen = []
    monkeypatch.setattr(ATTENTION, "choose", lambda *x: seen.append(x[3]) or (lambda *x, **y: None))
    q, pool = torch.zeros(7, 6, 64), torch.zeros(300, 6, 64)
    segments = [Segment(0, 129), Segment(140, 1)]
    segment_attention(q, pool, pool, Window(segments, device="cpu"))
    window = Window(segments, device="cpu", rope=Rope3D(64), capacity=5)
    segment_attention(q, pool, pool, window, return_mass=True)
    segment_attention(q, pool[:, ::3], pool[:, ::3], Window(segments, device="cpu", weighted=True))
    assert seen == [
        Shape(6, 7, 384, 64, 0, False, False, 1), Shape(6, 7, 640, 64, 12, True, False, 1),
        Shape(6, 7, 384, 64, 0, False, True, 3),
    ]  # fmt: skip
    assert isinstance(ATTENTION.typical_shape, Shape)


def test_doctor_says_which_kernel_a_shape_gets_and_why(gpu, monkeypatch):
    kernel = pytest.importorskip("worldkv_kernels.kernels.segment_attention", reason="triton is not installed")
    monkeypatch.setenv("WORLDKV_SELF_CHECK", "0")
    monkeypatch.setattr(kernel, "device_processors", lambda device: 132)
    for name in ("cuda", "triton"):
        monkeypatch.setitem(ATTENTION.backends, name, Backend(ATTENTION.backends[name].load))

    def shapes():
        found = {(f["keys"], f["extra"]): f for f in doctor._shapes(GPU)}
        return found["40 x 4680 x 32760", ""], found["40 x 4680 x 32760", "rebase"], found["12 x 2640 x 27720", "mass"]

    for found in shapes():
        assert found["backend"] == "triton"
        assert found["why"] == "cuda: no run has proven it on sm_90 (worldkv doctor --prove)"
    proven.record("segment_attention", GPU)
    for found in shapes():
        assert (found["backend"], found["why"]) == ("triton", "cuda: not measured faster than triton on sm_90")
    assert doctor._finding(ATTENTION, GPU, "cuda", 0, None)["why"] == "not measured faster than triton on sm_90"
    ranges = {name: (0, 2**31) for name in Shape._fields}
    gpu(Faster("segment_attention", "sm_90", {**ranges, "turned_pairs": (0, 0)}, ()))
    plain, rebase, mass = shapes()
    assert (plain["backend"], plain["why"], rebase["backend"], mass["backend"]) == ("cuda", "", "triton", "cuda")
    assert rebase["why"] == "cuda: not measured faster than triton on sm_90"
    tiles = "tiles of 128 queries x 176 keys, 132 blocks that stay; "
    assert plain["how"] == tiles + "1452 of 1480 items whole, 28 in 9 parts each"
    assert mass["how"] == tiles + "252 of 252 items whole"
    ATTENTION.forget()  # what a GPU that is not there was given


# --- the table itself ---


def extra_of(variant, backend):
    """What is asked of a backend on top: "rebase" of "cuda rebase"; None of another backend's variant."""
    name, extra = variant[: len(backend)], variant[len(backend) :]
    return extra.strip() if name == backend and extra[:1] in ("", " ") else None


def fault(entry, root=ROOT):
    """What is wrong with an entry of segment_attention: each figure has to be one of its shapes, and the fastest of
    the backends'. None where nothing is."""
    if set(entry.ranges) != set(Shape._fields) or not entry.figures or len(entry.backends) != 1 or entry.date:
        return "a field without a range, no figure, or not of one backend"
    shapes = []
    for name in entry.figures:
        path, _, number = name.partition(":")
        figures = [json.loads(line) for line in (root / path).read_text().splitlines()]
        figure = figures[int(number) - 1]
        (backend,) = entry.backends
        name_there = {"sdpa": "sdpa backend"}.get(backend, backend)
        extra = extra_of(figure["variant"], name_there)
        if extra is None or (figure["bench"], figure["status"]) != ("segment_attention", "timed"):
            return f"{name} is no figure of the kernel"
        numbers = figure["shape"]
        turned = numbers["head_dim"] // 2 - 2 * (numbers["head_dim"] // 6) if extra == "rebase" else 0
        sizes = (numbers["heads"], numbers["queries"], numbers["tokens"], numbers["head_dim"])
        group_size = numbers["heads"] // numbers.get("kv_heads", numbers["heads"])
        shapes.append(Shape(*sizes, turned, extra == "mass", extra == "weights", group_size))
        if not entry.holds(shapes[-1]):
            return f"{name} is of another shape"
        others = [
            f for f in figures
            if f["bench"] == figure["bench"] and not f["is_rival"]
            and (f["case"], f["status"]) == (figure["case"], "timed")
            and f["variant"] != figure["variant"]
            and extra in (extra_of(f["variant"], other) for other in ("cuda", "triton", "sdpa backend", "reference"))
        ]  # fmt: skip
        if not others or any(f["us"] <= figure["us"] for f in others):
            return f"{name} does not show it as the fastest"
    for field, (lowest, highest) in entry.ranges.items():
        of_field = [getattr(shape, field) for shape in shapes]
        if lowest < min(of_field) or highest > max(of_field) * (1.05 if field == "keys" else 1):
            return f"{field} goes beyond the figures"
    return None


def test_every_entry_has_figures_that_show_it():
    known = {"segment_attention"}
    assert [e for e in FASTER if e.op not in known or fault(e)] == []


@pytest.mark.parametrize(
    ("changes", "ranges", "wanted"),
    [
        ({}, {}, None),
        ({"us": 100.0}, {}, "does not show it as the fastest"),
        ({"case": "another"}, {}, "does not show it as the fastest"),
        ({"variant": "cuda rebase"}, {}, "is of another shape"),
        ({"variant": "triton"}, {}, "is no figure of the kernel"),
        ({"variant": "sdpa backend"}, {}, "is no figure of the kernel"),
        ({"status": "wrong"}, {}, "is no figure of the kernel"),
        ({}, {"heads": (41, 80)}, "is of another shape"),
        ({}, {"keys": (0, 1000)}, "is of another shape"),
        ({}, {"has_mass": (1, 1)}, "is of another shape"),
        (
            {"shape": {"heads": 40, "queries": 4680, "tokens": 32_760, "head_dim": 128, "kv_heads": 8}},
            {},
            "is of another shape",
        ),
        ({}, {"heads": (40, 41)}, "heads goes beyond the figures"),
        ({}, {"keys": (32_759, 32_760)}, "keys goes beyond the figures"),
        ({}, {"keys": (32_760, 34_400)}, "keys goes beyond the figures"),
        ({}, {"turned_pairs": (0, 1)}, "turned_pairs goes beyond the figures"),
        ({}, {"group_size": (1, 2)}, "group_size goes beyond the figures"),
    ],
)
def test_an_entry_without_such_figures_is_found(tmp_path, changes, ranges, wanted):
    shape = {"heads": 40, "queries": 4680, "tokens": 32_760, "head_dim": 128}
    common = {"bench": "segment_attention", "case": "a case", "status": "timed", "is_rival": False, "shape": shape}
    lines = [
        {**common, "variant": "triton", "us": 100.0},
        {**common, "variant": "triton mass", "us": 50.0},
        {**common, "variant": "sdpa flash", "us": 60.0, "is_rival": True},
        {**common, "variant": "cuda", "us": 90.0, **changes},
    ]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    held = dict(zip(Shape._fields, ((n, n) for n in (40, 4680, 32_760, 128, 0, 0, 0, 1)), strict=True)) | ranges
    found = fault(Faster("segment_attention", "sm_90", held, ("x.jsonl:4",)), tmp_path)
    assert found is None if wanted is None else found.endswith(wanted)
    del held["keys"]
    assert fault(Faster("segment_attention", "sm_90", held, ("x.jsonl:4",)), tmp_path) is not None


def test_an_entry_of_sdpa_needs_lines_of_the_backend(tmp_path):
    shape = {"heads": 40, "queries": 4680, "tokens": 32_760, "head_dim": 128}
    common = {"bench": "segment_attention", "case": "a case", "status": "timed", "is_rival": False, "shape": shape}
    times = {"triton": 100.0, "cuda": 90.0, "sdpa backend lse": 70.0, "sdpa backend": 80.0}
    lines = [{**common, "variant": variant, "us": us} for variant, us in times.items()]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    held = dict(zip(Shape._fields, ((n, n) for n in (40, 4680, 32_760, 128, 0, 0, 0, 1)), strict=True))
    assert fault(Faster("segment_attention", "sm_90", held, ("x.jsonl:4",), ("sdpa",)), tmp_path) is None
    assert fault(Faster("segment_attention", "sm_90", held, ("x.jsonl:2",), ("sdpa",)), tmp_path).endswith("the kernel")
    assert fault(Faster("segment_attention", "sm_90", held, ("x.jsonl:2",)), tmp_path).endswith("as the fastest")
