"""worldkv rollout: what it prints and writes, and every argument that it refuses."""

import argparse
import json
import re
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import relative_error

from worldkv_kernels import WorldMemory
from worldkv_kernels.cli import main, report, rollout_models
from worldkv_kernels.cli.rollout_revisits import find_revisits, retrieval_at_work
from worldkv_kernels.memory.config import MODES
from worldkv_kernels.models.rollout import rollout
from worldkv_kernels.models.small_world import SmallWorld, SmallWorldConfig
from worldkv_kernels.trajectory import latent_poses, load

AWAY_AND_BACK = "right*54,left*53"  # 108 video frames, 27 latent frames, 9 chunks
SMALL = ["rollout", "--random", "--layers", "1", "--trajectory", AWAY_AND_BACK, "--device", "cpu"]
REAL = Path(__file__).parents[2] / "shared/data/trajectories/jungle_flight"


def rows_of(out):
    """The table as {mode: {column: text}}."""
    lines = out.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("mode "))
    columns = re.split(r"\s{2,}", lines[start].strip())
    rows = {}
    for line in lines[start + 2 :]:
        if not line:
            break
        mode, *cells = re.split(r"\s{2,}", line.strip())
        rows[mode] = dict(zip(columns[1:], cells, strict=True))
    return rows


@pytest.fixture(scope="module")
def rolled(tmp_path_factory):
    """One run in all modes: its JSON, its picture, and what it printed."""
    folder = tmp_path_factory.mktemp("rollout")
    with pytest.MonkeyPatch.context() as patch:
        lines = []
        patch.setattr("builtins.print", lambda *words, **_: lines.append(" ".join(map(str, words))))
        files = ["--json", str(folder / "all.json"), "--picture", str(folder / "all.svg")]
        assert main([*SMALL, "--retrieved-chunks", "2", *files]) == 0
    return json.loads((folder / "all.json").read_text()), (folder / "all.svg").read_text(), "\n".join(lines)


def test_it_says_what_it_does_first(rolled):
    first, second = rolled[2].splitlines()[:2]
    assert first == f"trajectory {AWAY_AND_BACK}: 108 video frames, 27 latent frames, 9 chunks of 3"
    assert second.startswith(
        "model small_world: random weights, 1 layers, 2 heads x 64, 6 x 8 tokens a frame; float32 on cpu"
    )


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--trajectory", "right*27"], "not made: 1 latent frame at the end, too few for a chunk"),
        (["--trajectory", "right*30"], "not made: 2 latent frames at the end, too few for a chunk"),
        (["--chunks", "2"], "not made: 21 latent frames at the end, left out by --chunks"),
        (["--stride", "10", "--modes", "full"], "11 latent frames, 3 chunks of 3"),
    ],
)
def test_what_is_left_over_is_said(arguments, said, capsys):
    assert main([*SMALL, "--modes", "sliding", *arguments]) == 0
    assert said in capsys.readouterr().out


def test_table(rolled):
    result, _, out = rolled
    rows = rows_of(out)
    assert list(rows) == ["full", "worldkv", "sliding", "sink_recent"]
    assert list(rows["full"]) == [
        "video frames/s", "latent frames/s", "KV kept", "tokens attended", "by the last chunk", "chunks retrieved",
        "relative error",
    ]  # fmt: skip
    assert [row["by the last chunk"] for row in rows.values()] == ["1,296", str(4 * 144 + 2 * 72), "432", "576"]
    assert rows["full"]["tokens attended"] == "720"  # 144 * (1 + ... + 9) / 9
    assert [row["chunks retrieved"] for row in rows.values()] == ["0", str(1 + 4 * 2), "0", "0"]
    errors = {mode: float(row["relative error"]) for mode, row in rows.items()}
    assert errors["full"] == 0 < errors["worldkv"] < errors["sink_recent"] < errors["sliding"]
    for mode, row in rows.items():
        measured = result["modes"][mode]
        seconds = sum(chunk["seconds"] for chunk in measured["chunks"])
        assert float(row["video frames/s"]) == pytest.approx(105 / seconds, rel=0.01, abs=0.1)  # 1 + 26 * 4
        assert measured["video_frames_per_second"] == pytest.approx(105 / seconds)
        assert float(row["latent frames/s"]) == pytest.approx(9 * 3 / seconds, rel=0.01, abs=0.1)
    kept = {mode: result["modes"][mode]["kept_bytes"] for mode in rows}
    a_token = 2 * 128 * 4  # K and V of one layer in fp32
    assert kept == {
        "full": 9 * 144 * a_token, "worldkv": (3 * 144 + 6 * 72) * a_token,
        "sliding": 2 * 144 * a_token, "sink_recent": 3 * 144 * a_token,
    }  # fmt: skip


def test_json(rolled):
    result, _, _ = rolled
    assert list(result) == ["command", "machine", "trajectory", "model", "memory", "interrupted", "modes", "revisits"]
    assert result["interrupted"] is False
    assert result["machine"]["torch"] == torch.__version__
    assert result["trajectory"] == {
        "name": AWAY_AND_BACK, "video_frames": 108, "stride": 4, "latent_frames": 27, "chunks": 9
    }  # fmt: skip
    model = [result["model"][name] for name in ("name", "weights", "num_layers", "dtype")]
    assert model == ["small_world", "random", 1, "float32"]
    assert result["memory"]["retrieved_chunks"] == 2
    for mode in MODES:
        measured = result["modes"][mode]
        assert [chunk["chunk"] for chunk in measured["chunks"]] == list(range(9))
        for chunk in measured["chunks"]:
            assert set(chunk) == {"chunk", "retrieved", "banked", "tokens_attended", "seconds", "relative_error"}
            whole = {"full": 9, "sliding": 3}.get(mode, 4)  # so long the window holds all there is
            assert chunk["seconds"] > 0 and (chunk["relative_error"] == 0) == (chunk["chunk"] < whole)
        assert measured["tokens_attended"] == sum(chunk["tokens_attended"] for chunk in measured["chunks"])
        mean = sum(chunk["relative_error"] for chunk in measured["chunks"]) / 9
        assert measured["relative_error"] == pytest.approx(mean)
        assert measured["bank_capacity"] == (9 if mode == "worldkv" else 0)  # not what half the machine would hold
    assert [chunk["retrieved"] for chunk in result["modes"]["worldkv"]["chunks"]] == (
        [[], [], [], [], [1], [1, 2], [2, 3], [1, 2], [1, 2]]
    )


def test_retrieval_at_work(rolled):
    result, _, out = rolled
    lines = out[out.index("retrieval at work") :].splitlines()[1:6]
    assert lines[0] == (
        "  chunk 8 got back 2 of 5 banked, 1, 2; the nearest, chunk 1 from 7 chunks before, is 8.0 degrees and 0 units "
        "away"
    )
    chunks = [int(line.split()[1]) for line in lines]
    assert chunks == [revisit["chunk"] for revisit in result["revisits"]][:5] == [8, 7, 6, 4, 5]


def test_revisits_name_the_nearest_pose_and_start_with_the_oldest():
    poses = load("forward*8,right*90,left*90,back*3").poses  # the view of frame 8 comes again at 188
    records = [
        {"chunk": 80, "retrieved": [], "banked": 0},
        {"chunk": 94, "retrieved": [70, 20, 4], "banked": 91},
        {"chunk": 95, "retrieved": [90, 2], "banked": 92},
        {"chunk": 60, "retrieved": [57], "banked": 58},
    ]
    revisits = find_revisits(records, poses, 2)
    assert [(revisit.chunk, revisit.nearest) for revisit in revisits] == [(95, 2), (94, 4), (60, 57)]
    assert revisits[1].degrees == pytest.approx(0.5)  # frames 188, 189 at 0 degrees; frames 8, 9 at 0 and 1
    assert revisits[1].distance == pytest.approx(0.05)  # at 0.8, 0.7 units; at 0.8, 0.8
    assert revisits[2].degrees == pytest.approx(6) and revisits[2].retrieved == (57,)
    assert [revisit.sees_again for revisit in revisits] == [True, True, False]  # chunk 59 is 2 degrees from chunk 60
    said = "2 of 3 chunks see again what had left the window; first those that look back farthest\n  chunk 95 got back"
    assert retrieval_at_work(revisits).startswith(f"retrieval at work: {said}")


def test_picture(rolled):
    result, svg, _ = rolled
    root = ElementTree.fromstring(svg)
    name = "{http://www.w3.org/2000/svg}"
    texts = [text.text for text in root.iter(f"{name}text")]
    assert {"chunk being made", "chunk attended to", "camera", "0", "8", AWAY_AND_BACK} < set(texts)
    assert "retrieved: at most 2 of up to 5 banked" in texts
    frame = next(rect for rect in root.iter(f"{name}rect") if rect.get("fill") == "none")
    left, top, side = (float(frame.get(key)) for key in ("x", "y", "width"))
    marks = {}
    for rect in root.iter(f"{name}rect"):
        if rect.get("class"):
            x, y, width, height = (float(rect.get(key)) for key in ("x", "y", "width", "height"))
            column = (x + width / 2 - left) / (side / 9)
            row = (top + side - y - height / 2) / (side / 9)  # upwards
            assert rect.get("class") == "legend" or (column % 1, row % 1) == pytest.approx((0.5, 0.5), abs=0.01)
            marks.setdefault(rect.get("class"), []).append((int(column), int(row)))
    chunks = result["modes"]["worldkv"]["chunks"]
    assert len(marks["legend"]) == 6 and all(row > column for column, row in marks["legend"])  # where nothing is
    retrieved = {(chunk["chunk"], past) for chunk in chunks for past in chunk["retrieved"]}
    assert set(marks["retrieved"]) == retrieved
    assert set(marks["sink"]) == {(chunk, 0) for chunk in range(1, 9)}
    assert set(marks["current"]) == {(chunk, chunk) for chunk in range(9)}
    assert set(marks["recent"]) == {(chunk, past) for chunk in range(9) for past in (chunk - 2, chunk - 1) if past > 0}
    older = {(chunk, past) for chunk in range(9) for past in range(1, chunk - 2)}
    assert set(marks["left"]) == older - retrieved
    again = [(revisit["chunk"], revisit["nearest"]) for revisit in result["revisits"] if revisit["sees_again"]]
    assert sorted(marks["again"]) == sorted(again) == [(6, 2), (7, 1), (8, 1)]
    assert f"a view seen again ({len(again)} times)" in texts
    turned = next(line for line in root.iter(f"{name}polyline") if line.get("class") == "turned")
    ups = [-float(point.split(",")[1]) for point in turned.get("points").split()]
    assert len(ups) == 9 and ups[0] == min(ups) and max(ups) == ups[4] and ups[8] == pytest.approx(ups[0], abs=20)
    assert "distance gone, up to 0" in texts


def test_the_default_run_has_more_to_choose_from_than_it_takes(tmp_path, capsys):
    """As `make demo` runs it, but for the model's size: each line and the picture say how many there were."""
    path, svg = tmp_path / "result.json", tmp_path / "rollout.svg"
    small = ["--random", "--layers", "1", "--grid", "1,1", "--device", "cpu", "--modes", "worldkv"]
    assert main(["rollout", *small, "--json", str(path), "--picture", str(svg)]) == 0
    out, _ = capsys.readouterr()
    result = json.loads(path.read_text())
    chunks = result["modes"]["worldkv"]["chunks"]
    chosen, banked = zip(*((len(chunk["retrieved"]), chunk["banked"]) for chunk in chunks), strict=True)
    assert max(chosen) == 6 and banked[-1] == 33 and sum(b > c for b, c in zip(banked, chosen, strict=True)) > 25
    again = [revisit for revisit in result["revisits"] if revisit["sees_again"]]
    assert len(again) >= 15 and again[0]["chunk"] - again[0]["nearest"] > 30 and again[0]["degrees"] < 2
    assert f"{len(again)} of 33 chunks see again what had left the window" in out
    assert re.search(r"chunk 36 got back 6 of 33 banked, \d", out) and "not made" not in out
    assert "retrieved: at most 6 of up to 33 banked" in svg.read_text()


def test_it_says_beforehand_what_it_downloads_and_how_long_it_takes(rolled, monkeypatch, capsys):
    assert "downloads nothing" in rolled[2].splitlines()[:4]  # nobody knows how long other sizes take
    monkeypatch.setattr(rollout_models, "make_model", lambda *args: pytest.fail("what was said is enough"))
    with pytest.raises(pytest.fail.Exception):
        main(["rollout", "--device", "cpu"])
    assert capsys.readouterr().out.splitlines()[-1] == "downloads nothing; takes about 20 seconds on two cores"
    with pytest.raises(SystemExit):
        main(["rollout", "--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert "It downloads nothing. The default run takes about 20 seconds on two cores." in said
    assert "0.25 keeps half of a chunk of three frames, 0.5 two thirds, 1 all" in said


def test_picture_of_a_name_with_markup(tmp_path):
    folder = tmp_path / "a<b & c\x01"
    folder.mkdir()
    np.save(folder / "poses.npy", load("right*8").poses)
    np.save(folder / "intrinsics.npy", np.array((500.0, 500.0, 416.0, 240.0)))
    picture = tmp_path / "picture.svg"
    assert main([*SMALL, "--trajectory", str(folder), "--modes", "worldkv", "--picture", str(picture)]) == 0
    assert "a<b & c?" in "".join(ElementTree.parse(picture).getroot().itertext())


def test_a_hint_on_a_folder_whose_poses_are_of_another_convention(tmp_path, capsys):
    walked = load("forward*20").poses
    np.save(tmp_path / "intrinsics.npy", np.array((500.0, 500.0, 416.0, 240.0)))
    args = argparse.Namespace(model="small_world", actions=None, scales=None, trajectory=str(tmp_path), stride=None)
    for poses, hinted in ((walked, False), (np.linalg.inv(walked), True)):
        np.save(tmp_path / "poses.npy", poses)
        rollout_models.motion(args)
        assert ("hint: --trajectory: the camera hardly ever goes where it looks" in capsys.readouterr().err) == hinted


def test_json_on_stdout_stands_alone(capsys):
    assert main([*SMALL, "--chunks", "2", "--modes", "sliding, sliding", "--json", "-"]) == 0
    out, err = capsys.readouterr()
    assert list(json.loads(out)["modes"]) == ["sliding"]
    assert "video frames/s" in err and "sliding: 2/2 chunks" in err
    assert main([*SMALL, "--chunks", "2", "--modes", "sliding", "--quiet"]) == 0
    out, err = capsys.readouterr()
    assert "video frames/s" in out and err == ""


def test_without_full_there_is_no_error(capsys):
    assert main([*SMALL, "--chunks", "2", "--modes", "sliding,worldkv"]) == 0
    out = capsys.readouterr().out
    assert {mode: row["relative error"] for mode, row in rows_of(out).items()} == {"sliding": "-", "worldkv": "-"}
    assert "retrieval at work" not in out  # nothing is banked yet


def of_worldkv(tmp_path, *arguments, modes="worldkv"):
    path = tmp_path / "result.json"
    assert main([*SMALL, "--modes", modes, "--json", str(path), *arguments]) == 0
    return json.loads(path.read_text())["modes"]["worldkv"]


def test_each_option_changes_the_latents(tmp_path):
    seven = ["--chunks", "7", "--retrieved-chunks", "2"]  # the last has a gap in time for rebasing to close
    plain = of_worldkv(tmp_path, *seven, modes="full,worldkv")
    errors = [chunk["relative_error"] for chunk in plain["chunks"]]

    host = of_worldkv(tmp_path, *seven, "--bank", "host", modes="full,worldkv")
    assert [chunk["relative_error"] for chunk in host["chunks"]] == errors
    assert host["host_bytes"] > 0 == plain["host_bytes"] and host["device_bytes"] < plain["device_bytes"]

    options = ("--no-pooled", "--prune-rule similarity", "--no-merge-pruned", "--retrieved-log-weight 0.7",
               "--no-rebase-time", "--dtype bfloat16")  # fmt: skip
    for changed in map(str.split, options):
        other = of_worldkv(tmp_path, *seven, *changed, modes="full,worldkv")
        assert [chunk["relative_error"] for chunk in other["chunks"]] != errors, changed
        assert [chunk["retrieved"] for chunk in other["chunks"]] == [chunk["retrieved"] for chunk in plain["chunks"]]

    whole = of_worldkv(tmp_path, *seven, "--retrieved-chunks", "9", "--keep-ratio", "1", modes="full,worldkv")
    assert max(chunk["relative_error"] for chunk in whole["chunks"]) < 1e-5 < max(errors)


def test_each_option_reaches_the_memory(tmp_path):
    wide = of_worldkv(tmp_path, "--sink-frames", "0", "--recent-frames", "12", "--retrieved-chunks", "0")
    assert wide["tokens_attended_last"] == 5 * 144 and wide["chunks_retrieved"] == 0
    small = of_worldkv(tmp_path, "--retrieved-chunks", "2", "--bank-chunks", "3")
    assert (small["bank_capacity"], small["chunks_banked"], small["chunks_dropped"]) == (3, 3, 3)
    nearest = of_worldkv(tmp_path, "--retrieved-chunks", "2", "--order", "nearest_first")
    assert nearest["chunks"][5]["retrieved"] == [2, 1]
    corner = ["--trajectory", "right*27,forward*27,left*53", "--retrieved-chunks", "2"]
    assert of_worldkv(tmp_path, *corner)["chunks"][8]["retrieved"] == [4, 5]
    assert of_worldkv(tmp_path, *corner, "--diversity", "1")["chunks"][8]["retrieved"] == [1, 5]
    chosen = {}
    for policy in ("pose", "fov --depth-range 0.5 9", "fov --depth-range 0.2 2", "content"):
        turn = ["--trajectory", "forward*40,left*40,back*27", "--retrieved-chunks", "1", "--retrieval", *policy.split()]
        chosen[policy] = [chunk["retrieved"] for chunk in of_worldkv(tmp_path, *turn)["chunks"][6:]]
    assert list(chosen.values()) == [[[3], [4], [5]], [[3], [2], [1]], [[3], [2], [2]], [[3], [3], [1]]]


def test_the_seed_is_that_of_weights_and_noise(tmp_path):
    measured = of_worldkv(tmp_path, "--retrieved-chunks", "2", "--seed", "5", modes="full,worldkv")
    model = SmallWorld.random(SmallWorldConfig(num_layers=1), 5, device="cpu", dtype=torch.float32)
    latents = {}
    for mode in ("full", "worldkv"):
        memory = WorldMemory(model.config.memory(mode=mode, retrieved_chunks=2, bank_chunks=9), dtype=torch.float32)
        latents[mode] = [chunk.latents for chunk in rollout(model, memory, *latent_poses(load(AWAY_AND_BACK)), seed=5)]
    errors = [relative_error(got, want) for got, want in zip(latents["worldkv"], latents["full"], strict=True)]
    assert errors == pytest.approx([chunk["relative_error"] for chunk in measured["chunks"]], rel=1e-3)


def test_the_callers_threads_are_left_alone(capsys):
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    assert main([*SMALL, "--chunks", "1", "--modes", "full"]) == 0
    assert torch.get_num_threads() == 2
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--trajectory", "jump*3"], "--trajectory: a move must be one of right, .*, got 'jump'"),
        (["--trajectory", "nowhere"], "--trajectory: must be an existing folder, or moves .*, got 'nowhere'"),
        (["--trajectory", "right*7"], "--trajectory must have at least 9 video frames .*, got 2 latent frames"),
        (["--model", "large"], "--model must be one of small_world, lingbot_world_fast, matrix_game_2, got 'large'"),
        (["--modes", "full,fast"], "--modes must be one of worldkv, full, sliding, sink_recent, got 'fast'"),
        (["--modes", ""], "--modes must be one of .*, got ''"),
        (["--retrieval", "sound"], "--retrieval must be one of pose, fov, action, content, got 'sound'"),
        (["--depth-range", "1", "9"], "--depth-range must go with --retrieval fov, got --retrieval pose"),
        (["--retrieval", "fov", "--depth-range", "9", "1"], "--depth-range must be 1e-09 <= NEAR < FAR <= .*, got 9 1"),
        (["--retrieval", "fov", "--depth-range", "1", "inf"], "--depth-range must be 1e-09 <= .*, got 1 inf"),
        (["--diversity", "2"], "--diversity must be from 0 to 1, got 2"),
        (["--diversity", "x"], "argument --diversity: must be a number, got 'x'"),
        (["--keep-ratio", "0"], "--keep-ratio must be above 0 and at most 1, got 0"),
        (["--retrieved-chunks", "-1"], "argument --retrieved-chunks: must be an integer of at least 0, got '-1'"),
        (["--bank-chunks", "5", "--retrieved-chunks", "6"], "--bank-chunks must be None or at least 6, since retr"),
        (["--bank", "cloud"], "--bank must be 'device' or 'host', got 'cloud'"),
        (["--order", "random"], "--order must be one of time, nearest_last, nearest_first, got 'random'"),
        (["--chunks", "0"], "argument --chunks: must be an integer of at least 1, got '0'"),
        (["--layers", "two"], "argument --layers: must be an integer of at least 1, got 'two'"),
        (["--stride", "1.5"], "argument --stride: must be an integer of at least 1, got '1.5'"),
        (["--seed", str(2**64)], f"argument --seed: must be at most {2**64 - 1}, got '{2**64}'"),
        (["--seed", "9" * 5000], f"argument --seed: must be at most {2**64 - 1}, got '9"),
        (["--chunks", "+-5"], "argument --chunks: must be an integer of at least 1, got"),
        (["--layers", "\u0663"], "argument --layers: must be an integer of at least 1, got"),
        (
            ["--retrieved-chunks", str(2**31 - 1)],
            "--grid, --layers or --chunks must be smaller: WorldMemory: storage must",
        ),
        (
            ["--bank-chunks", str(2**31 - 1)],
            "--bank-chunks, --grid or --layers must be smaller: WorldMemory: storage must",
        ),
        (["--bank-chunks", str(10**30)], "argument --bank-chunks: must be at most 2147483647, got '1000"),
        (
            ["--sink-frames", str(2**31 - 1), "--modes", "full,sink_recent"],
            "--grid, --layers or --chunks must be smaller",
        ),
        (["--recent-frames", str(2**31 - 1)], "--bank-chunks, --grid or --layers must be smaller: .*recent "),
        (["--recent-frames", str(2**31)], f"argument --recent-frames: must be at most {2**31 - 1}, got '{2**31}'"),
        (["--grid", "9" * 500 + ",1"], "argument --grid: must be height,width of 1 to 1024 tokens each, got '9"),
        (["--grid", "1,99999"], "argument --grid: must be height,width of 1 to 1024 tokens each, got '1,99999'"),
        (["--trajectory", ""], "--trajectory: must be an existing folder, or moves .*, got ''"),
        (["--trajectory", "x" * 5000], "--trajectory: must be an existing folder, or moves .*, got 'xxx"),
        (["--actions", ""], "--actions must go with --model matrix_game_2, got --model small_world"),
        (["--weights", ""], "--weights must be left out with --random, got ''"),
        (["--retrieval", ""], "--retrieval must be one of pose, fov, action, content, got ''"),
        (["--dtype", ""], "--dtype must be one of bfloat16, float16, float32, got ''"),
        (["--keep-ratio", "nan"], "--keep-ratio must be .*, got nan"),
        (["--diversity", "nan"], "--diversity must be from 0 to 1, got nan"),
        (["--device", "meta"], "--device must be cpu or a CUDA device of this machine, got 'meta'"),
        (["--device", "cpu:1"], "--device must be cpu or a CUDA device of this machine, got 'cpu:1'"),
        (["--device", "vulkan"], "--device must be cpu or a CUDA device of this machine, got 'vulkan'"),
        (["--json", "a\0b"], r"--json must be a file that can be written, got 'a\\x00b': embedded null byte"),
        (["--seed", "-1"], "argument --seed: must be an integer of at least 0, got '-1'"),
        (["--dtype", "int8"], "--dtype must be one of bfloat16, float16, float32, got 'int8'"),
        (["--device", "abacus"], "--device must be cpu or a CUDA device of this machine, got 'abacus'"),
        (["--backend", "abacus"], "--backend must be one of cuda, triton, reference, got 'abacus'"),
        (["--threads", "100000"], r"--threads must be at most \d+, 4 to a processor, got 100000"),
        (
            ["--layers", "9999999"],
            "--model small_world must fit the .* that are free on cpu, got .* GiB of weights; change",
        ),
        (["--trajectory", "right*9999999"], "--trajectory: moves must be at most 100000 together, got 'right"),
        (["--json", "no/x.json"], "--json must be a file that can be written, got 'no/x.json': No such file"),
        (["--json", "."], "--json must be a file that can be written, got '.': Is a directory"),
        (["--picture", "no/x.svg"], "--picture must be a file that can be written, got 'no/x.svg': No such file"),
        (["--picture", "x.png"], "--picture must end in .svg, got 'x.png'"),
        (["--modes", "full", "--picture", "x.svg"], "--picture must go with --modes that include worldkv, got 'full'"),
    ],
)
def test_bad_input_is_one_line_and_status_2(arguments, message, capsys):
    try:
        status = main([*SMALL, *arguments])
    except SystemExit as exit:
        status = exit.code
    out, err = capsys.readouterr()
    assert status == 2 and out == "" and len(err) < 700
    assert re.fullmatch(f"worldkv rollout: {message}.*\n", err), err


def test_a_rollout_goes_past_the_positions_that_the_models_number(tmp_path):
    """Their tables end at frame 1023."""
    far = of_worldkv(tmp_path, "--trajectory", "right*4200", "--grid", "1,2", "--retrieved-chunks", "2")
    assert [chunk["chunk"] for chunk in far["chunks"]] == list(range(350))
    assert far["chunks_retrieved"] == 2 * 345 + 1 and far["chunks_dropped"] == 0


def test_trajectories_that_cannot_be_read_are_named(tmp_path, capsys):
    """A folder where a file should be, and a header that promises more than any machine holds."""
    (tmp_path / "folder" / "poses.npy").mkdir(parents=True)
    (tmp_path / "vast").mkdir()
    with open(tmp_path / "vast" / "poses.npy", "wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "<f8", "fortran_order": False, "shape": (10**13, 4, 4)})
    for name, said in (("folder", "Is a directory"), ("vast", "Unable to allocate")):
        assert main(["rollout", "--device", "cpu", "--trajectory", str(tmp_path / name)]) == 2
        out, err = capsys.readouterr()
        assert out == "" and err.startswith("worldkv rollout: --trajectory: ") and said in err and err.count("\n") == 1


@pytest.mark.parametrize(
    "error, status, said",
    [
        (KeyboardInterrupt(), 130, "worldkv rollout: interrupted"),
        (torch.OutOfMemoryError("no room"), 2, "worldkv rollout: no room"),
    ],
)
def test_modes_that_are_complete_outlive_an_interruption(error, status, said, tmp_path, monkeypatch, capsys):
    begin_chunk = WorldMemory.begin_chunk

    def stop(memory, **options):
        if memory.config.mode == "sliding" and memory.stats()["chunks"] == 1:
            raise error
        return begin_chunk(memory, **options)

    monkeypatch.setattr(WorldMemory, "begin_chunk", stop)
    path = tmp_path / "result.json"
    assert main([*SMALL, "--chunks", "2", "--modes", "sliding", "--json", str(path)]) == status
    out, err = capsys.readouterr()
    assert err.splitlines()[-1] == said and "video frames/s" not in out and not path.exists()
    assert main([*SMALL, "--chunks", "2", "--modes", "full,worldkv,sliding", "--json", str(path)]) == status
    out, err = capsys.readouterr()
    assert err.splitlines()[-1] == said and "Traceback" not in err
    result = json.loads(path.read_text())
    assert result["interrupted"] is True and list(result["modes"]) == ["full", "worldkv"] == list(rows_of(out))
    assert out.splitlines()[-1] == "interrupted: full, worldkv of full, worldkv, sliding are complete"


def test_a_slow_chunk_says_so(monkeypatch, capsys):
    denoise = SmallWorld.denoise

    def slow(*args):
        time.sleep(0.1)
        return denoise(*args)

    monkeypatch.setattr(SmallWorld, "denoise", slow)
    monkeypatch.setattr(report, "_SILENCE", 0.1)
    assert main([*SMALL, "--chunks", "1", "--modes", "full"]) == 0
    assert "full: chunk 1 of 1: 0 s" in capsys.readouterr().err.splitlines()


@pytest.mark.skipif(not REAL.is_dir(), reason=f"no real trajectory at {REAL}")
def test_a_real_flight(tmp_path):
    """Every sixteenth of its frames: on its way it comes back to where it was long before."""
    path = tmp_path / "result.json"
    options = ["--trajectory", str(REAL), "--stride", "16", "--modes", "worldkv", "--json", str(path)]
    assert main([*SMALL, *options]) == 0
    result = json.loads(path.read_text())
    assert result["trajectory"] == {
        "name": "jungle_flight", "video_frames": 961, "stride": 16, "latent_frames": 61, "chunks": 20
    }  # fmt: skip
    assert any(revisit["chunk"] - revisit["nearest"] >= 8 for revisit in result["revisits"])


def test_a_small_bank_needs_no_smaller_budget(tmp_path):
    path = tmp_path / "result.json"
    small = [*SMALL, "--chunks", "7", "--modes", "worldkv", "--bank-chunks", "3", "--json", str(path)]
    assert main(small) == 0
    result = json.loads(path.read_text())
    assert result["memory"]["retrieved_chunks"] == result["memory"]["bank_chunks"] == 3
