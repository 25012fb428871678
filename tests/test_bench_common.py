"""What the benches share: ceilings, timing, what is refused a time, the record, and lines with the documented keys."""

import itertools
import json
import math
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import BENCHMARKS

CPU = torch.device("cpu")
BENCHES = ["segment_attention", "norm_rope_append", "compress_chunk", "quantize_chunk", "participation", "prefetch"]
KEYS = {
    "bench", "case", "variant", "shape", "small", "is_rival", "status", "reason", "error", "error_limit", "us", "us_20",
    "us_80", "host_us", "rounds", "bytes", "link_bytes", "flops", "gb_s", "tflop_s", "ceiling", "share", "rival",
    "times_rival", "base", "over_base", "ceilings", "environment",
}  # fmt: skip
ENVIRONMENT_KEYS = {
    "date", "commit", "dirty", "source", "device", "driver", "cuda", "cudnn", "torch", "triton", "python",
    "clocks_before", "clocks_after",
}  # fmt: skip


@pytest.fixture
def common(load):
    return load("common")


@pytest.fixture
def timing(load):
    return load("timing")


@pytest.fixture
def machine(load):
    return load("machine")


def test_the_ceiling_that_takes_longer_binds(timing):
    ceilings = timing.Ceilings(copy=100.0, matmul=1000.0)
    assert timing.roof(200, 1000, ceilings) == ("copy", 2.0)
    assert timing.roof(200, 3000, ceilings) == ("matmul", 3.0)
    assert timing.roof(200, 0, ceilings) == ("copy", 2.0)
    linked = timing.Ceilings(copy=100.0, matmul=1000.0, host_to_device=10.0)
    assert timing.roof(200, 1000, linked, link_bytes=50) == ("link", 5.0)
    assert timing.roof(200, 1000, linked, link_bytes=10) == ("copy", 2.0)
    assert timing.roof(200, 6000, linked, link_bytes=50) == ("matmul", 6.0)
    # No link measured: what crosses it counts against the copy, once.
    assert timing.roof(200, 0, ceilings, link_bytes=200) == ("copy", 2.0)
    assert timing.roof(0, 0, ceilings, link_bytes=300) == ("copy", 3.0)


def test_percentiles_lie_between_values_in_proportion(timing):
    values = [50.0, 10.0, 40.0, 20.0, 30.0]
    assert [timing.percentile(values, share) for share in (0, 0.2, 0.5, 0.8, 1)] == [10, 18, 30, 42, 50]
    assert timing.percentile([3.0], 0.8) == 3.0


def test_input_sets_exceed_four_times_the_cache(timing):
    assert timing.sets_for(bytes_per_call=48_000_000, l2_bytes=60_000_000) == 5
    assert timing.sets_for(bytes_per_call=1 << 30, l2_bytes=60_000_000) == 2
    assert timing.sets_for(bytes_per_call=1, l2_bytes=60_000_000) == 32


def test_relative_error_and_the_worst_of_them_see_nan(common):
    want = torch.tensor([3.0, 4.0])
    assert common.relative_error(torch.tensor([3.0, 4.5]), want) == pytest.approx(0.1)
    assert math.isnan(common.relative_error(torch.tensor([3.0, math.nan]), want))
    assert common.relative_error(torch.zeros(3), want) == math.inf
    assert math.isnan(common.worst([0.5, math.nan, 0.1]))
    assert common.worst([0.5, 0.7, 0.1]) == 0.7


def test_variants_are_interleaved_over_all_sets(timing):
    calls = []
    runs = {name: lambda i, name=name: calls.append((name, i)) for name in "ab"}
    timings = timing.time_variants(runs, CPU, sets=2, seconds=0.0)
    # One warm-up, then five rounds in which the first place changes hands.
    order = ["a", "b"] + ["a", "b", "b", "a"] * 2 + ["a", "b"]
    assert calls == [(name, i) for name in order for i in (0, 1)]
    assert timings["a"].rounds == 5
    assert timings["a"].low <= timings["a"].median <= timings["a"].high


class Clock:
    """A clock that only what is timed moves."""

    def __init__(self, timing, monkeypatch):
        self.now = 0.0
        monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: self.now))

    def takes(self, *seconds):
        """A run that takes these times one after the other, then over again."""
        times = itertools.cycle(seconds)

        def run(i):
            self.now += next(times)

        return run


def test_what_still_runs_is_waited_for_before_each_sample_and_outside_its_time(timing, monkeypatch):
    clock = Clock(timing, monkeypatch)
    calls, right = [], clock.takes(2)

    def run(i):
        calls.append("run")
        right(i)

    def settle():
        calls.append("settle")
        clock.now += 100

    timed = timing.time_variants({"a": run}, CPU, sets=2, seconds=0.0, settle=settle)["a"]
    assert calls == ["run", "run"] + ["settle", "run", "run"] * 5
    assert (timed.median, timed.low, timed.high) == (2.0, 2.0, 2.0)


def test_time_is_the_median_of_one_call(timing, monkeypatch):
    clock = Clock(timing, monkeypatch)
    # Two sets a sample; one warm-up sample, then five.
    times = [9, 9, 1, 1, 2, 4, 3, 3, 5, 3, 7, 1]
    timed = timing.time_variants({"a": clock.takes(*times)}, CPU, sets=2, seconds=0.0)["a"]
    assert (timed.median, timed.rounds, timed.host) == (3.0, 5, 9.0)
    assert (timed.low, timed.high) == (pytest.approx(2.6), 4.0)


def test_one_thread_gives_the_others_back(timing):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        with timing.one_thread():
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_rounds_fill_the_time_given(timing, monkeypatch):
    clock = Clock(timing, monkeypatch)
    runs = {"a": clock.takes(0.25), "b": clock.takes(0.75)}
    assert timing.time_variants(runs, CPU, seconds=12.0)["a"].rounds == 12
    assert timing.time_variants(runs, CPU, seconds=1e6)["a"].rounds == 200


def variant(common, name, run=lambda i: None, error=0.0, **options):
    return common.Variant(name, lambda: run, lambda run: error, 0.01, 1000, 4000, **options)


def test_figures_of_a_case(common, timing, monkeypatch):
    clock = Clock(timing, monkeypatch)
    variants = [
        variant(common, "ours", clock.takes(0.004)),
        variant(common, "ours more", clock.takes(0.006), base="ours"),
        variant(common, "slow", clock.takes(0.02), rival=True),
        variant(common, "fast", clock.takes(0.008), rival=True),
    ]
    ceilings = timing.Ceilings(copy=1e6, matmul=2e6)  # 1 ms for the bytes, 2 ms for the operations
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


def test_what_is_wrong_or_cannot_run_is_reported_and_not_timed(common, timing):
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
    figures = common.measure(common.Problem("case", variants), CPU, timing.Ceilings(1.0, 1.0), seconds=0.0)
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
    status = module.main(["--small", "--device", "cpu", "--seconds", "0.01", "--jsonl", str(path)])
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
    assert printed.splitlines()[0] == bench
    assert printed.splitlines()[1].split() == ["case", "variant", "us", "GB/s", "TFLOP/s", "share", "x", "rival"]
    readme = (BENCHMARKS / "README.md").read_text()
    assert all(f"`{key}`" in readme for key in KEYS | ENVIRONMENT_KEYS)


def test_a_rival_that_may_err_more_is_timed_but_no_yardstick(common, timing, monkeypatch):
    clock = Clock(timing, monkeypatch)
    rough = common.Variant("8 bits", lambda: clock.takes(0.001), lambda run: 0.02, 0.05, 1000, 4000, rival=True)
    variants = [variant(common, "ours", clock.takes(0.004)), variant(common, "fp16", clock.takes(0.008), rival=True)]
    problem = common.Problem("case", [*variants, rough])
    figures = common.measure(problem, CPU, timing.Ceilings(copy=1e6, matmul=2e6), seconds=0.0)
    assert {f["rival"] for f in figures} == {"fp16"}
    assert [f["times_rival"] for f in figures] == [pytest.approx(x) for x in (2.0, 1.0, 8.0)]


def test_an_installed_package_names_no_commit_of_a_repository_around_it(machine, monkeypatch, tmp_path):
    (tmp_path / "ops").mkdir()
    (tmp_path / "ops" / "x.py").write_text("1")
    monkeypatch.setattr(machine, "ROOT", tmp_path)
    monkeypatch.setattr(machine, "_output", lambda *command: "someone else's")
    monkeypatch.delenv("WORLDKV_COMMIT", raising=False)
    before = machine.environment(CPU)
    assert (before["commit"], before["dirty"]) == (None, None)
    (tmp_path / "ops" / "x.py").write_text("2")
    assert machine.environment(CPU)["source"] != before["source"]


def test_full_cases_are_refused_on_a_cpu(load, capsys):
    assert load("bench_compress_chunk").main(["--device", "cpu"]) == 2
    assert load("bench_compress_chunk").main(["--small", "--device", "nowhere"]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert errors[0] == "worldkv bench: the full cases need a GPU; --small runs on a CPU"
    assert errors[1] == "worldkv bench: --device must be cpu or cuda:N, got 'nowhere'"


def test_scripts_by_themselves_say_what_is_wrong_in_one_line(common, tmp_path, capsys):
    (tmp_path / "broken").write_text('{"bench": "op"}\n[]\n')
    for arguments, said in (
        (
            ["--table", str(tmp_path / "broken")],
            f"{tmp_path / 'broken'}, line 2: not a figure that --json or --jsonl wrote",
        ),
        (["--table", str(tmp_path)], f"[Errno 21] Is a directory: '{tmp_path}'"),
        (["--small", "--device", "meta"], "--device must be cpu or cuda:N, got 'meta'"),
        (
            ["--small", "--device", "cpu", "--jsonl", "/new/x"],
            "--jsonl must be a file that can be written, got '/new/x'",
        ),
    ):
        assert common.main(arguments) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"common: {said}")


def test_the_record_names_the_code(machine, monkeypatch):
    monkeypatch.setattr(machine, "_output", lambda *command: None)
    monkeypatch.setenv("WORLDKV_COMMIT", "abc123")
    record = machine.environment(CPU)
    assert (record["commit"], record["dirty"]) == ("abc123", None)
    assert len(record["source"]) == 12
    assert record["torch"] == torch.__version__
    assert machine.clocks(CPU) is None


def test_clocks_are_numbers_where_the_card_tells_them(machine, monkeypatch):
    monkeypatch.setattr(machine, "_output", lambda *command: "1980, 3201, [N/A], 55, 580.159.04")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="1-2"))
    assert machine.clocks(torch.device("cuda:0")) == {
        "sm_mhz": 1980.0, "memory_mhz": 3201.0, "power_w": None, "temperature_c": 55.0, "driver": "580.159.04",
    }  # fmt: skip


def test_the_library_does_not_import_the_benchmarks():
    library = BENCHMARKS.parent / "worldkv_kernels"
    for path in library.rglob("*.py"):
        imports = re.search(r"\b(from|import)\b[^\n]*\bbenchmarks\b", path.read_text())
        assert path == library / "cli" / "bench.py" or not imports, path
    # Not even the command does, until a bench is run.
    program = "import sys, worldkv_kernels.cli.bench; print('|'.join(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert {"common", "timing", "plots", "matplotlib", "worldkv_kernels.benchmarks"}.isdisjoint(done.stdout.split("|"))
    assert "worldkv_kernels.cli.bench" in done.stdout
