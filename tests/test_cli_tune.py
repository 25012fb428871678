"""worldkv tune: what it times, keeps and says; a CPU stands for the GPU. And what doctor makes of it."""

import json
import re
from types import SimpleNamespace

import pytest
import torch

from worldkv_kernels.cli import doctor, main, tune
from worldkv_kernels.cli.bench import script
from worldkv_kernels.ops import faster, proven, tuned
from worldkv_kernels.ops.backends import Backend, Cannot
from worldkv_kernels.ops.segment_attention import BACKENDS as ATTENTION
from worldkv_kernels.ops.segment_attention import Shape

GPU, CPU = torch.device("cuda:0"), torch.device("cpu")
CARD = "NVIDIA L40S"
VERSIONS = {"torch": "2.11.0", "triton": "3.6.0"}
SHAPE = "heads=2,q=20,head_dim=64,window=30x2+20x1,dtype=float16"


@pytest.fixture
def card(monkeypatch, tmp_path):
    """A card that need not be there, on which all of "cuda", "triton" and "sdpa" are right, but for sdpa's limits, and
    windows have no rows: `.us` are the microseconds that the backends take, all but 1 % of them, or what they raise.
    `.timed` notes what was timed."""
    stand_in = SimpleNamespace(us={"triton": 100.0, "cuda": 90.0, "sdpa": 80.0}, timed=[], wrong={})
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("WORLDKV_BACKEND", raising=False)
    for name, value in {
        "is_current_stream_capturing": lambda: False, "get_device_capability": lambda device=None: (9, 0),
        "get_device_name": lambda device=None: CARD, "current_device": lambda: 0, "set_device": lambda device: None,
        "empty_cache": lambda: None,
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(proven, "is_proven", lambda op, device: True)
    monkeypatch.setattr(tuned, "versions", lambda: VERSIONS)
    monkeypatch.setattr(tune, "parse_device", lambda name: torch.device(name or "cuda"))
    monkeypatch.setattr(faster, "FASTER", ())
    monkeypatch.setattr(script("shapes"), "free_bytes", lambda device: 1 << 30)
    environment = {**VERSIONS, "driver": "580.1", "date": "2026-11-27T01:02:03+00:00", "device": CARD}
    monkeypatch.setattr(script("machine"), "environment", lambda device: environment)
    for name in ("cuda", "triton", "sdpa"):
        backend = ATTENTION.backends[name]
        limits = (
            lambda device: None,
            backend.unsupported,
            backend.unsupported_on if name == "sdpa" else lambda *x: None,
        )
        monkeypatch.setitem(ATTENTION.backends, name, Backend(backend.load, *limits))
    monkeypatch.setattr(ATTENTION, "disagreement", lambda name, device, kind: stand_in.wrong.get(name))
    monkeypatch.setenv("TRITON_INTERPRET", "0")

    class Window:
        """As long as the real one."""

        def __init__(self, case, extra):
            self.capacity = sum(-(-rows // 128) for rows in case.lengths)
            self.has_shift, self.has_weight = extra == "rebase", extra == "weights"
            self.tables = [None] * 4 + [torch.zeros(1, {128: 22, 64: 12}[case.head_dim], 2)]

    class Inputs:
        def __init__(self, case, device):
            assert device == GPU
            self.case, self.windows = case, {extra: Window(case, extra) for extra in tune.EXTRAS}

        def counts(self, **asked):
            return {"num_bytes": 1}

    def time_variants(runs, device, *, flush, seconds):
        assert device == GPU and flush and seconds == tune.SECONDS and len(runs) > 1
        stand_in.timed.append(list(runs))
        for name in runs:
            if isinstance(stand_in.us[name], BaseException):
                if not isinstance(stand_in.us[name], Exception):
                    raise stand_in.us[name]
                raise script("timing").VariantError(name) from stand_in.us[name]
        times = {name: stand_in.us[name] * 1e-6 for name in runs}
        return {name: script("timing").Timing(of, 0.99 * of, 1.01 * of, 0.0, 9) for name, of in times.items()}

    monkeypatch.setattr(script("bench_segment_attention"), "Inputs", Inputs)
    monkeypatch.setattr(script("timing"), "time_variants", time_variants)
    ATTENTION.forget()
    faster.forget()
    yield stand_in
    monkeypatch.undo()
    ATTENTION.forget()
    faster.forget()


def measured(tmp_path, *arguments, status=0):
    """The document of a run, its windows by case and extra."""
    path = tmp_path / "out.json"
    assert main(["tune", "--quiet", "--json", str(path), *arguments]) == status
    document = json.loads(path.read_text())
    return document, {(f["case"], f["extra"]): f for f in document["shapes"]}


def shape_of(heads, q_len, keys, *, turned_pairs=0, has_mass=False, has_weight=False):
    return Shape(heads, q_len, keys, 128, turned_pairs, has_mass, has_weight, 1)


def test_a_cpu_is_told_that_there_is_nothing_to_choose(capsys):
    assert main(["tune", "--device", "cpu"]) == 2
    assert capsys.readouterr() == (
        "",
        "worldkv tune: --device must be a GPU, got cpu: on a CPU auto takes sdpa, or where that cannot serve the "
        "reference, whatever the shape, since the other backends are for GPUs, so there is nothing to choose\n",
    )


def test_the_windows_are_those_of_the_models():
    windows = tune.windows(script("bench_segment_attention"))
    sizes = [(case.heads, case.q_len, case.num_tokens) for case in windows]
    assert sizes[:3] == list(doctor.SHAPES.values())
    assert sizes[3:] == [
        (40, 4680, 14_040), (40, 4524, 13_572), (12, 2640, 7920), (40, 4680, 140_400), (40, 4524, 135_720),
        (12, 2640, 79_200),
    ]  # fmt: skip
    assert all(case.dtype == torch.bfloat16 and case.head_dim == 128 for case in windows)


def test_what_is_fastest_here_serves_from_then_on(card, tmp_path, capsys):
    document, found = measured(tmp_path)
    assert len(found) == 36 and document["file"] == str(tuned.user_file())
    default = "40 heads, 4680 queries, 32760 keys, 21 frames, pruned"
    for extra, able, takes in (("", ["cuda", "triton", "sdpa"], "sdpa"), ("mass", ["cuda", "triton"], "cuda")):
        of = found[default, extra]
        assert (of["before"], of["auto"], of["fastest"], list(of["us"])) == ("triton", takes, [takes], able)
        assert of["us"]["cuda"] == pytest.approx({"us_20": 89.1, "us": 90.0, "us_80": 90.9})
    assert found[default, "rebase"]["shape"] == {
        "heads": 40, "q_len": 4680, "keys": 33_536, "head_dim": 128, "turned_pairs": 22, "has_mass": 0, "has_weight": 0,
        "group_size": 1,
    }  # fmt: skip
    assert found[default, "weights"]["left_out"] == {
        "sdpa": "PyTorch's attention with lengths on the device takes no log weights"
    }
    kept = tuned.read()[CARD]
    assert len(kept) == 36 and {(m.driver, m.date[:10], m.dtype) for m in kept} == {("580.1", "2026-11-27", "bfloat16")}
    assert {m.tokens: m.shape["keys"] for m in kept if m.shape["heads"] == 12}[27_720] == 29_056
    kind = (torch.bfloat16, 128, 0, False, False, False, True, True)
    for keys, serves in (
        (14_040, "sdpa"),
        (32_760, "sdpa"),
        (100_000, "sdpa"),
        (14_039, "triton"),
        (150_000, "triton"),
    ):
        assert ATTENTION.name("auto", GPU, kind, shape_of(40, 4680, keys)) == serves
    assert ATTENTION.name("auto", GPU, kind, shape_of(40, 4600, 32_760)) == "triton"
    printed = capsys.readouterr().out
    assert printed.startswith(f"{CARD}, microseconds: median, 20th to 80th percentile\n")
    assert re.search(rf"^{default} +- +sdpa +sdpa +triton +90\.0 \(89\.1 to 90\.9\) +100\.0 .* +80\.0 ", printed, re.M)
    assert re.search(rf"^{default} +mass +cuda +cuda +triton +90\.0 .* +-$", printed, re.M)
    assert printed.count("sdpa not timed: PyTorch's attention gives no softmax weight") == 1
    assert printed.endswith(f"kept in {tuned.user_file()}\n")


def test_a_second_run_takes_the_place_of_the_first(card, tmp_path):
    measured(tmp_path)
    card.us = {"triton": 100.0, "cuda": 101.0, "sdpa": 200.0}
    _, found = measured(tmp_path, "--shape", SHAPE)
    assert {(f["fastest"] == ["cuda", "triton"], f["before"], f["auto"]) for f in found.values()} == {
        (True, "triton", "triton")
    }
    assert len(tuned.read()[CARD]) == 40
    _, found = measured(tmp_path)
    of = found["12 heads, 2640 queries, 27720 keys, 31.5 frames, pruned", ""]
    assert (of["before"], of["auto"]) == ("sdpa", "triton") and len(tuned.read()[CARD]) == 40


def test_what_is_not_right_or_not_proven_is_not_timed(card, monkeypatch, tmp_path, capsys):
    card.wrong = {"sdpa": "its out differs"}
    monkeypatch.setattr(proven, "is_proven", lambda op, device: "weighted" not in op)
    with pytest.warns(UserWarning, match="the sdpa kernel is not used on cuda:0: its out differs"):
        _, found = measured(tmp_path, "--shape", SHAPE, status=1)
    assert card.timed == [["cuda", "triton"]] * 3  # with weights triton is alone
    assert [list(f["us"]) for f in found.values()] == [["cuda", "triton"]] * 3 + [[]]
    assert [f["faults"] for f in found.values()] == [["sdpa"], ["sdpa"], [], []]
    assert [f["auto"] for f in found.values()] == ["cuda"] * 3 + ["triton"]
    printed = capsys.readouterr().out
    assert "sdpa not timed: its out differs\n" in printed
    assert "cuda not timed: no run has proven it on sm_90 (worldkv doctor --prove)\n" in printed


def test_what_fails_is_left_out_and_the_others_are_timed(card, tmp_path, capsys):
    card.us["cuda"] = RuntimeError("an illegal instruction\nand more")
    _, found = measured(tmp_path, "--shape", SHAPE, status=1)
    plain, _, mass, _ = found.values()
    assert card.timed[:3] == [["cuda", "triton", "sdpa"], ["triton", "sdpa"], ["cuda", "triton", "sdpa"]]
    assert (list(plain["us"]), plain["auto"], plain["faults"]) == (["triton", "sdpa"], "sdpa", ["cuda"])
    assert (mass["us"], mass["auto"], len(tuned.read()[CARD])) == ({}, "triton", 2)
    assert "cuda not timed: an illegal instruction\n" in capsys.readouterr().out


def test_what_does_not_fit_is_told_and_no_fault(card, monkeypatch, tmp_path, capsys):
    full = torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.68 GiB")
    card.us["sdpa"] = full
    _, found = measured(tmp_path, "--shape", SHAPE)
    assert [list(f["us"]) for f in found.values()] == [["cuda", "triton"]] * 4
    monkeypatch.setattr(script("bench_segment_attention"), "Inputs", lambda case, device: (_ for _ in ()).throw(full))
    tuned.forget(CARD)
    _, found = measured(tmp_path)
    assert len(found) == 36 and {(f["auto"], f["shape"]) for f in found.values()} == {(None, None)}
    printed = capsys.readouterr().out
    assert "40 heads, 4680 queries, 140400 keys, 90 frames, pruned not timed: CUDA out of memory" in printed
    assert "nowhere were two to choose from" in printed and tuned.read() == {}


def test_where_one_backend_runs_there_is_nothing_to_time(card, monkeypatch, tmp_path):
    for name in ("cuda", "sdpa"):
        monkeypatch.setitem(ATTENTION.backends, name, Backend(lambda: None, lambda device: Cannot("not here")))
    _, found = measured(tmp_path, "--shape", SHAPE)
    assert card.timed == [] and {f["auto"] for f in found.values()} == {"triton"} and not tuned.user_file().exists()


def test_an_interrupted_run_keeps_what_it_has_measured(card, monkeypatch, capsys):
    calls, inputs = [], script("bench_segment_attention").Inputs

    def second_is_interrupted(case, device):
        calls.append(case)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return inputs(case, device)

    monkeypatch.setattr(script("bench_segment_attention"), "Inputs", second_is_interrupted)
    assert main(["tune", "--quiet"]) == 130
    assert {m.tokens for m in tuned.read()[CARD]} == {32_760} and len(tuned.read()[CARD]) == 4


def test_a_card_is_forgotten_and_others_are_not(card, tmp_path, capsys):
    measured(tmp_path, "--shape", SHAPE)
    tuned.record("NVIDIA A100", tuned.read()[CARD])
    found = tuned.read()[CARD][0]
    kind = (torch.float16, 64, 0, False, False, False, False, True, True)
    assert ATTENTION.name("auto", GPU, kind, Shape(**found.shape)) == "sdpa"
    capsys.readouterr()
    assert main(["tune", "--forget"]) == 0
    assert capsys.readouterr().out == f"{CARD}: dropped 4 measurements from {tuned.user_file()}\n"
    assert list(tuned.read()) == ["NVIDIA A100"] and ATTENTION.name("auto", GPU, kind, Shape(**found.shape)) == "triton"
    document = tmp_path / "forgotten.json"
    assert main(["tune", "--forget", "--json", str(document)]) == 0
    assert json.loads(document.read_text())["dropped"] == 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--forget", "--shape", SHAPE], "--forget must go without --shape"),
        (["--shape", "heads=2"], "--shape: q must be given, got 'heads=2'"),
        (["--shape", SHAPE.replace("float16", "float32")], "--shape: dtype must be bfloat16 or float16, got float32"),
        (["--shape", SHAPE.replace("30x2", "30x200000000")], "must fit the "),
    ],
)
def test_bad_arguments_are_one_line(card, arguments, said, capsys):
    assert main(["tune", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("worldkv tune: --") and said in err and err.count("\n") == 1
    assert card.timed == []


def test_a_damaged_file_is_told_before_the_work(card, monkeypatch, capsys):
    tuned.user_file().parent.mkdir(parents=True)
    tuned.user_file().write_text("{")
    for arguments in ([], ["--forget"]):
        assert main(["tune", *arguments]) == 2
        assert f"worldkv tune: faster: {tuned.user_file()} must hold what worldkv tune" in capsys.readouterr().err
    assert card.timed == [] and tuned.user_file().read_text() == "{"
    monkeypatch.setattr(doctor, "parse_device", lambda name: GPU)
    monkeypatch.setattr(doctor, "OPS", (ATTENTION,))
    assert main(["doctor"]) == 2
    assert f"worldkv doctor: faster: {tuned.user_file()} must hold" in capsys.readouterr().err


def test_doctor_says_on_whose_evidence(card, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(doctor, "parse_device", lambda name: GPU)
    monkeypatch.setattr(doctor, "OPS", (ATTENTION,))
    monkeypatch.setattr(doctor, "_launch", lambda backend, device, shape: "-")
    ranges = {name: (0, 2**31) for name in Shape._fields}
    entry = faster.Faster("segment_attention", "sm_90", {**ranges, "heads": (12, 12), "has_weight": (0, 0)}, ("x:1",))
    monkeypatch.setattr(faster, "FASTER", (entry,))
    faster.forget()

    def says():
        path = tmp_path / "doctor.json"
        assert main(["doctor", "--quiet", "--json", str(path)]) == 0
        found = json.loads(path.read_text())
        return {(f["keys"], f["extra"]): (f["backend"], f["evidence"], f["why"]) for f in found["shapes"]}, found[
            "unused"
        ]

    lingbot, matrix_game = "40 x 4680 x 32760", "12 x 2640 x 27720"
    shapes, unused = says()
    slower = "cuda: not measured faster than triton on sm_90"
    assert shapes[lingbot, ""] == ("triton", "fixed order", slower) and unused == {}
    assert shapes[matrix_game, "mass"] == ("cuda", "benchmarks/results", "")
    card.us = {"triton": 90.0, "cuda": 100.0, "sdpa": 80.0}
    measured(tmp_path)
    shapes, unused = says()
    by, slower = "tune, 2026-11-27", "cuda: measured slower than {} on this machine"
    assert shapes[lingbot, "rebase"] == ("sdpa", by, slower.format("sdpa")) and unused == {}
    assert shapes[matrix_game, "mass"] == ("triton", by, slower.format("triton"))
    capsys.readouterr()
    monkeypatch.setattr(tuned, "versions", lambda: {"torch": "2.12.0", "triton": "3.6.0"})
    faster.forget()
    shapes, unused = says()
    why = "measured with torch 2.11.0, here is 2.12.0"
    assert shapes[matrix_game, "mass"] == ("cuda", "benchmarks/results", "") and unused == {why: 36}
    printed = capsys.readouterr().out
    assert re.search(rf"^Matrix-Game-2.0 +{matrix_game} +mass +cuda +benchmarks/results +- +-$", printed, re.M)
    assert f"of worldkv tune, 36 measurements of this card do not count: {why}\n" in printed


@pytest.mark.parametrize("extra", tune.EXTRAS)
def test_a_window_is_kept_as_the_op_sees_it(monkeypatch, extra):
    """Really timed, on a CPU and by the reference: what is kept is what the op asks for, and what is held against the
    reference before is the kind of problem that is timed."""
    bench, choose, make = (
        script("bench_segment_attention"),
        ATTENTION.choose,
        script("bench_segment_attention").our_variant,
    )
    seen, checked = [], []

    def passed_over(name, device, kind):
        checked.append(kind)
        return Cannot("not here") if name == "cuda" else None

    monkeypatch.setattr(ATTENTION, "choose", lambda *x: seen.append(x[2:]) or choose(*x))
    monkeypatch.setattr(ATTENTION, "passed_over", passed_over)
    monkeypatch.setattr(bench, "our_variant", lambda inputs, name, extra: make(inputs, "reference", extra))
    monkeypatch.setattr(tune, "SECONDS", 0.01)
    case = bench.case_of(SHAPE.replace("heads=2", "heads=4,kv_heads=2"))
    found = tune._measure(bench.Inputs(case, CPU), CPU, extra)
    assert list(found["us"]) == ["triton", "sdpa"] and found["left_out"] == {"cuda": "not here"}
    assert all(0 < of["us_20"] <= of["us"] <= of["us_80"] for of in found["us"].values())
    assert {shape for _, shape in seen} == {Shape(**found["shape"])} and {kind for kind, _ in seen} == set(checked)
