"""The chunk and rollout benches: what they count, what they refuse to time, what they say and draw."""

import json
import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from worldkv_kernels import WorldMemory
from worldkv_kernels.cli import main
from worldkv_kernels.cli.bench import script
from worldkv_kernels.memory import attention
from worldkv_kernels.models.small_world import SmallWorld, SmallWorldConfig

CPU = torch.device("cpu")
QUICK = ["--small", "--device", "cpu"]


@pytest.fixture
def cases(load):
    return load("model_cases")


def small_case(cases, **sizes):
    return cases.ModelCase("small_world", 2, {"grid": (2, 3), **sizes})


# What is counted.


def test_pass_operations_by_hand(cases):
    config = SmallWorldConfig(num_layers=2, num_heads=1, ffn_dim=96, grid=(2, 3), latent_channels=4)
    model = SmallWorld.random(config, device="cpu", dtype=torch.float32)
    (controls,) = cases.controls_of(model, 1)
    tokens, dim = 18, 64
    layer = 2 * tokens * (4 * dim * dim + 2 * dim * 96)  # q, k, v, o and the two layers of the feed-forward
    ends = 2 * tokens * (2 * 2 * 4 * dim + dim * 2 * 2 * 4)
    assert cases.pass_flops(model, controls, 0) == 2 * layer + ends
    # Attention: two products of 18 queries with 7 keys in one head of 64, and two layers.
    assert cases.pass_flops(model, controls, 7) - cases.pass_flops(model, controls, 0) == 2 * 2 * 2 * tokens * 7 * 64


def test_pass_bytes_by_hand(cases):
    model = SmallWorld.random(SmallWorldConfig(num_layers=3, num_heads=1), device="cpu", dtype=torch.bfloat16)
    weights = sum(p.numel() * (4 if p.dtype == torch.float32 else 2) for p in model.parameters())
    assert cases.pass_bytes(model, 10) == weights + 3 * 2 * 10 * 64 * 2  # layers, K and V, tokens, numbers of 2 bytes


def test_the_memories_that_are_compared(cases):
    model = cases.build(small_case(cases), CPU)
    windows = {mode: cases.full_window(cases.memory_config(mode, model, 20)) for mode in cases.MODES if mode != "full"}
    chunk = 18
    assert windows == {
        "worldkv": 4 * chunk + 6 * (6 + 2 * 2), "worldkv_eager": 4 * chunk + 6 * 10, "worldkv_host": 4 * chunk + 6 * 10,
        "worldkv_8_bits": 4 * chunk + 6 * 10, "worldkv_host_4_bits": 4 * chunk + 6 * 10,
        "official": 3 * chunk + 6 * 10, "published": 3 * chunk + 6 * 10,
        "sliding": 3 * chunk, "sliding_as_long": 7 * chunk, "sink_recent": 4 * chunk,
        "worldkv_compiled": 4 * chunk + 6 * 10, "worldkv_fp8": 4 * chunk + 6 * 10,
    }  # fmt: skip
    rebased = {mode for mode in cases.MODES if cases.memory_config(mode, model, 20).rebase_time}
    assert rebased == {
        "worldkv",
        "worldkv_eager",
        "worldkv_host",
        "worldkv_8_bits",
        "worldkv_host_4_bits",
        *cases.CHANGED,
    }  # the baselines as they are by default
    even = cases.build(small_case(cases, grid=(2, 4)), CPU)  # a quarter of a frame is a whole number: half a chunk
    as_long, worldkv = (cases.full_window(cases.memory_config(m, even, 20)) for m in ("sliding_as_long", "worldkv"))
    assert as_long == worldkv == 7 * 24
    with pytest.raises(ValueError, match=r"--modes must be of worldkv, .*, got 'other'"):
        cases.memory_config("other", model, 20)


def test_the_camera_goes_away_and_back(cases):
    model = cases.build(small_case(cases), CPU)
    controls = cases.controls_of(model, 8)
    assert len(controls) == 8 and all(c.poses.shape == (3, 4, 4) and c.intrinsics.shape == (3, 4) for c in controls)
    turns = [c.poses[1, 0, 2] for c in controls]  # sine of the yaw
    assert turns.index(max(turns)) in (3, 4) and turns[0] == pytest.approx(turns[-1], abs=0.3)
    assert controls[0].actions is None
    game = cases.build(cases.ModelCase("matrix_game_2", 2, cases.SMALL_SIZES["matrix_game_2"]), CPU)
    actions = [c.actions for c in cases.controls_of(game, 3)]
    assert [(a.mouse.shape, a.keyboard.shape) for a in actions] == [((n, 2), (n, 4)) for n in (9, 21, 33)]


def test_an_unknown_model_is_told(cases):
    with pytest.raises(ValueError, match=r"--model must be one of .*small_world.*, got 'other'"):
        cases.build(cases.ModelCase("other"), CPU)


def test_steady_chunks(load):
    bench = load("bench_rollout")

    def steady(*tokens):
        chunks = [SimpleNamespace(plan=SimpleNamespace(num_tokens=count)) for count in tokens]
        return [chunk.plan.num_tokens for chunk in bench.steady_chunks(chunks)]

    assert steady(1, 2, 3, 3, 3, 3) == [3, 3, 3, 3]
    assert steady(1, 2, 3, 4, 5, 6) == [4, 5, 6]  # grows for ever
    assert steady(7) == [7]


# What is refused.


def run_small(bench, cases, modes=("worldkv", "published"), **options):
    case = bench.RolloutCase(small_case(cases), chunks=3, modes=modes)
    return bench.run(small=True, device=CPU, cases=[case], **options)


def scaled(attend):
    return lambda *args, **options: 1.01 * attend(*args, **options)


def test_a_wrong_memory_is_not_timed(load, cases, monkeypatch):
    bench = load("bench_rollout")
    monkeypatch.setattr(WorldMemory, "attend", scaled(WorldMemory.attend))
    ours, rival = run_small(bench, cases)
    assert (ours["status"], ours["us"], ours["per_chunk"]) == ("wrong", None, [])
    assert re.fullmatch(r"relative error \d\.\d+e-0\d, limit 1e-04", ours["reason"])
    assert rival["status"] == "wrong"  # the two disagree; which is right the bench cannot know
    assert "wrong: worldkv: relative error" in bench.table([ours, rival])


def test_what_a_memory_costs_is_what_comes_first(load, cases, monkeypatch):
    bench = load("bench_rollout")
    seconds = {"sliding_as_long": 0.5, "worldkv": 0.75, "worldkv_host": 0.4, "sliding": 0.1}
    roll_out = bench.roll_out

    def timed(mode, *args):
        done = roll_out(mode, *args)
        done.chunks = [replace(chunk, took=SimpleNamespace(seconds=lambda: seconds[mode])) for chunk in done.chunks]
        return done

    monkeypatch.setattr(bench, "roll_out", timed)
    figures = run_small(bench, cases, modes=("worldkv", "sliding", "worldkv_host", "sliding_as_long"))
    assert [f["reason"] for f in figures] == [None] * 4
    costs = {f["variant"]: (f["base"], f["over_base"]) for f in figures}
    assert costs["worldkv"] == ("sliding_as_long", pytest.approx(0.5))
    assert costs["worldkv_host"] == ("sliding_as_long", pytest.approx(-0.2))
    assert costs["sliding"] == costs["sliding_as_long"] == (None, None)
    first, *rest = bench.table(figures).splitlines()
    tokens = [figures[i]["per_chunk"][-1]["tokens"] for i in (0, 3)]
    assert first.endswith(
        f": memory costs +50.0 % of a chunk: worldkv 16.00 frames/s with {tokens[0]} tokens, "
        f"sliding_as_long 24.00 frames/s with {tokens[1]} tokens"
    )
    assert sum("+50.0 %" in line for line in rest) == sum("-20.0 %" in line for line in rest) == 1
    alone = run_small(bench, cases, modes=("worldkv",))
    assert alone[0]["base"] is None and bench.headlines(alone) == []


def test_a_figure_is_written_as_soon_as_it_is_there(load, cases, monkeypatch, tmp_path):
    bench, path = load("bench_rollout"), tmp_path / "out.jsonl"
    measure = bench.measure_mode

    def interrupted(mode, *args):
        if mode == "worldkv":
            raise KeyboardInterrupt
        return measure(mode, *args)

    monkeypatch.setattr(bench, "measure_mode", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_small(bench, cases, jsonl_path=path)
    (line,) = map(json.loads, path.read_text().splitlines())
    assert (line["variant"], line["status"], line["times_rival"]) == ("published", "timed", 1.0)


def test_where_the_published_path_does_not_fit_ours_is_held_against_itself(load, cases, monkeypatch, capsys):
    bench = load("bench_rollout")
    make = bench.make_memory

    def small_device(mode, *args):
        if mode not in room_for:
            raise torch.OutOfMemoryError("CUDA out of memory\nand more")
        return make(mode, *args)

    monkeypatch.setattr(bench, "make_memory", small_device)
    room_for = {"full", "worldkv"}
    assert [f["status"] for f in run_small(bench, cases)] == ["timed", "skipped"]
    assert "nothing is compared with published: CUDA out of memory\n" in capsys.readouterr().err
    assert [f["status"] for f in run_small(bench, cases, modes=("worldkv",))] == ["timed"]
    room_for = {"worldkv"}
    ours, rival = run_small(bench, cases)
    assert (ours["status"], rival["status"]) == ("failed", "skipped")
    assert "no room for anything to compare with" in ours["reason"]


def test_a_memory_of_nan_is_not_timed(load, cases, monkeypatch):
    bench = load("bench_rollout")
    attend = WorldMemory.attend
    monkeypatch.setattr(WorldMemory, "attend", lambda *args, **options: attend(*args, **options) * float("nan"))
    ours, _ = run_small(bench, cases)
    assert (ours["status"], ours["error"]) == ("wrong", None)
    json.dumps(ours, allow_nan=False)


def test_a_memory_that_fails_is_reported_and_the_rest_goes_on(load, cases, monkeypatch):
    bench = load("bench_rollout")
    make = bench.make_memory

    def fail(mode, *args, **options):
        if mode == "worldkv":
            raise RuntimeError("no room\nmore words")
        return make(mode, *args, **options)

    monkeypatch.setattr(bench, "make_memory", fail)
    ours, rival = run_small(bench, cases)
    assert (ours["status"], ours["reason"]) == ("failed", "RuntimeError: no room")
    assert rival["status"] == "timed" and rival["times_rival"] == 1


def test_a_rollout_that_runs_out_of_room_keeps_its_chunks(load, cases):
    bench = load("bench_rollout")
    model = cases.build(small_case(cases), CPU)
    memory = WorldMemory(model.config.memory(mode="full", bank_chunks=2), dtype=torch.float32)
    done = bench.roll_out("full", model, memory, bench.RolloutCase(small_case(cases), chunks=5))
    assert [chunk.plan.chunk for chunk in done.chunks] == [0, 1] and done.breakdown is None
    assert done.stopped.startswith("RuntimeError: begin_chunk: chunk must be below 2")


def test_every_attend_of_the_chunk_bench_is_checked(load, cases, monkeypatch):
    bench = load("bench_chunk")
    problem = bench.prepare(bench.ChunkCase(small_case(cases)), CPU)
    for variant in problem.variants:
        assert variant.check(variant.make()) <= variant.limit
    ours = problem.variants[0]
    monkeypatch.setattr(WorldMemory, "attend", scaled(WorldMemory.attend))
    assert ours.check(ours.make()) == pytest.approx(0.01, rel=0.01)


def test_a_chunk_written_wrongly_is_seen(load, cases, monkeypatch):
    bench = load("bench_chunk")
    problem = bench.prepare(bench.ChunkCase(small_case(cases)), CPU)
    write = attention.norm_rope_append

    def off(q, k, v, k_pool, v_pool, first_row, **options):
        """Before attention reads it: only what is written can tell."""
        turned = write(q, k, v, k_pool, v_pool, first_row, **options)
        k_pool[int(first_row)] += 1
        return turned

    monkeypatch.setattr(attention, "norm_rope_append", off)
    ours = problem.variants[0]
    assert ours.check(ours.make()) > 1e-2


def test_the_published_path_is_the_chunks_yardstick(load, cases):
    bench, common = load("bench_chunk"), load("common")
    problem = bench.prepare(bench.ChunkCase(small_case(cases)), CPU)
    figures = common.measure(problem, CPU, load("timing").Ceilings(1e9, 1e9), seconds=0.01)
    assert {f["variant"]: f["rival"] for f in figures} == dict.fromkeys(
        ("worldkv", "official", "sliding_as_long", "worldkv at chunk 60", "published path"), "published path"
    )
    later = next(f for f in figures if f["variant"] == "worldkv at chunk 60")
    assert later["base"] == "worldkv" and later["over_base"] == pytest.approx(later["us"] / figures[0]["us"] - 1)
    assert len({f["flops"] for f in figures}) == 1


# What is said and drawn.


@pytest.fixture(scope="module")
def rolled(tmp_path_factory):
    pytest.importorskip("matplotlib")
    folder = tmp_path_factory.mktemp("rollout")
    files = [f"--{what}={folder / name}" for what, name in (("jsonl", "out.jsonl"), ("plot", "."), ("trace", "t.json"))]
    with pytest.MonkeyPatch.context() as patch:
        printed = []
        patch.setattr("builtins.print", lambda *words, **_: printed.append(" ".join(map(str, words))))
        patch.setattr(script("bench_rollout"), "SMALL_CASES", script("bench_rollout").SMALL_CASES[:1])
        assert main(["bench", "rollout", *QUICK, "--only", "worldkv,full,published", "--chunks", "5", *files]) == 0
    lines = [json.loads(line) for line in (folder / "out.jsonl").read_text().splitlines()]
    return folder, lines, "\n".join(printed)


def test_figures_of_a_rollout(rolled):
    _, lines, printed = rolled
    assert [line["variant"] for line in lines] == ["published", "worldkv", "full"]  # the rival comes first
    assert [line["is_rival"] for line in lines] == [True, False, False]
    for line in lines:
        assert line["bench"] == "rollout" and line["status"] == "timed" and line["error"] < 1e-5
        assert [chunk["chunk"] for chunk in line["per_chunk"]] == [0, 1, 2, 3, 4]
        assert line["us_20"] <= line["us"] <= line["us_80"]
        assert line["frames_per_second"] == pytest.approx(12 / (line["us"] * 1e-6))
        assert line["times_rival"] == pytest.approx(lines[0]["us"] / line["us"])
        assert line["tflop_s"] == pytest.approx(line["flops"] / line["us"] * 1e-6)
        assert line["bytes_by_kind"]["weights"] > 0 and line["bytes_by_kind"]["cache"] > 0
        parts = line["breakdown"]
        assert parts["wall"] == pytest.approx(sum(parts["kinds"].values()) + parts["idle"])
        assert parts["kinds"]["attention"] > 0 and parts["kinds"]["norm and rope"] > 0
        assert f"{line['frames_per_second']:.2f}" in printed and f"{1e3 * parts['wall']:.1f}" in printed
    published, worldkv, full = lines
    of_full = full["per_chunk"]
    assert [chunk["tokens"] for chunk in of_full] == [(1 + i) * of_full[0]["tokens"] for i in range(5)]
    assert worldkv["breakdown"]["kinds"]["compression"] > 0 == full["breakdown"]["kinds"]["compression"]
    assert published["breakdown"]["kinds"]["copies"] > 0


def test_the_trace_holds_a_late_chunk_of_each_mode(rolled):
    folder, lines, _ = rolled
    events = json.loads((folder / "t.json").read_text())["traceEvents"]
    traced = [e["name"] for e in events if e.get("name", "").startswith("worldkv.traced ")]
    assert [name.rsplit(": ", 1)[1] for name in traced] == [line["variant"] for line in lines]


def test_the_picture_names_modes_and_kinds(rolled):
    folder, _, _ = rolled
    words = (folder / "rollout.svg").read_text()
    for word in ("worldkv", "full", "published (rival)", "norm and rope", "idle", "video frames per second"):
        assert f">{word}<" in words
    assert (folder / "rollout.png").read_bytes().startswith(b"\x89PNG\r\n")


def test_a_slower_mode_shows_in_compare(rolled, tmp_path, capsys):
    folder, lines, _ = rolled
    slower = [{**line, **{key: 2 * line[key] for key in ("us", "us_20", "us_80")}} for line in lines]
    (tmp_path / "b.jsonl").write_text("".join(json.dumps(line) + "\n" for line in slower))
    assert main(["bench", "compare", str(folder / "out.jsonl"), str(tmp_path / "b.jsonl")]) == 0
    assert re.search(r"rollout .* worldkv .* 2\.00 +slower", capsys.readouterr().out)


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--model", "other"], r"--model must be one of .*small_world.*, got 'other'"),
        (
            ["--model", "small_world", "--variant", "large"],
            "--variant must be one of small_world for small_world, got 'large'",
        ),
        (["--variant", "fast"], "--variant must go with --model, got 'fast' alone"),
        (["--only", "worldkv,other"], "--only must be of ours, worldkv, .*; got 'other'"),
        (["--chunks", "0"], "--chunks must be at least 1, got 0"),
        (["--layers", "-2"], "--layers must be at least 1, got -2"),
    ],
)
def test_bad_arguments_are_one_line(arguments, said, load, capsys):
    assert main(["bench", "rollout", *QUICK, *arguments]) == 2
    assert re.fullmatch(rf"worldkv bench: {said}\n", capsys.readouterr().err)
    assert load("bench_rollout").main([*QUICK, *arguments]) == 2
    assert re.fullmatch(rf"worldkv bench: {said}\n", capsys.readouterr().err)
