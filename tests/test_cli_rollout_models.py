"""worldkv rollout with the real models: small by their variants' sizes, once at the real dimensions."""

import argparse
import dataclasses
import json
import re
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors_files import write, write_sharded
from test_cli_rollout import rows_of

from worldkv_kernels import ActionIntegrator, ActionScales, WorldMemory, parse_actions
from worldkv_kernels.cli import main, report, rollout_models
from worldkv_kernels.memory import pool
from worldkv_kernels.models import wan
from worldkv_kernels.models.action_module import ActionConfig
from worldkv_kernels.models.checkpoint import read_tensors, write_tensors
from worldkv_kernels.models.lingbot_camera import longest_step
from worldkv_kernels.models.lingbot_config import LingBotConfig
from worldkv_kernels.models.lingbot_world_fast import LingBotConditions, LingBotWorldFast
from worldkv_kernels.models.matrix_game_2 import MatrixGame2
from worldkv_kernels.models.matrix_game_config import MatrixGameConfig
from worldkv_kernels.models.rollout import rollout
from worldkv_kernels.models.small_world import SmallWorld, SmallWorldConfig
from worldkv_kernels.trajectory import latent_poses, load

LEFT_AND_BACK = "J*60,Q*8,L*60"  # 129 video frames, 33 latent frames, 11 chunks; chunk c stands where chunk 10 - c did
SIZES = dict(num_layers=2, num_heads=1, head_dim=64, ffn_dim=32, grid=(1, 2), frequency_dim=16)
ACTIONS = dict(num_heads=2, head_dim=16, embedding_dim=8)
SMALL = {
    "lingbot_world_fast": {
        "fast": LingBotConfig(text_tokens=3, text_dim=8, **SIZES),
        "v2-1.3b": LingBotConfig.v2_1_3b(text_tokens=3, text_dim=8, **SIZES),
    },
    "matrix_game_2": {
        variant: getattr(MatrixGameConfig, variant)(
            image_tokens=3, image_dim=8, action_layers=(0,), actions=ActionConfig(**ACTIONS, **columns), **SIZES
        )
        for variant, columns in {
            "universal": {}, "gta_drive": {"keyboard_dim": 2, "local_frames": 4},
            "templerun": {"mouse_dim": 0, "keyboard_dim": 7},
        }.items()
    },
}  # fmt: skip
MATRIX = ["--model", "matrix_game_2", "--random"]
LINGBOT = ["--model", "lingbot_world_fast", "--random"]


@pytest.fixture
def small(monkeypatch):
    """The real models' variants at sizes that take no time."""
    for model, configs in SMALL.items():
        for variant, config in configs.items():
            monkeypatch.setitem(rollout_models.MODELS[model], variant, lambda config=config: config)


def rolled(tmp_path, *arguments) -> dict:
    path = tmp_path / "result.json"
    assert main(["rollout", "--device", "cpu", "--threads", "1", "--json", str(path), *arguments]) == 0
    return json.loads(path.read_text())


def retrieved(result) -> list[list[int]]:
    return [chunk["retrieved"] for chunk in result["modes"]["worldkv"]["chunks"]]


def errors(result) -> list[float]:
    return [chunk["relative_error"] for chunk in result["modes"]["worldkv"]["chunks"]]


def own_errors(model, *args, retrieval="pose", **options) -> list[float]:
    """Of worldkv against full, by the rollout itself."""
    latents = {}
    for mode in ("full", "worldkv"):
        memory = WorldMemory(model.config.memory(mode=mode, retrieval=retrieval, bank_chunks=11), dtype=torch.float32)
        latents[mode] = [chunk.latents for chunk in rollout(model, memory, *args, **options)]
    return [((a - b).norm() / b.norm()).item() for a, b in zip(latents["worldkv"], latents["full"], strict=True)]


# --- Matrix-Game-2.0 ---


def test_matrix_game_by_actions(small, tmp_path, capsys):
    picture = tmp_path / "picture.svg"
    options = ["--actions", LEFT_AND_BACK, "--retrieved-chunks", "1", "--picture", str(picture)]
    result = rolled(tmp_path, *MATRIX, *options)
    out, err = capsys.readouterr()
    first, second, said, third = out.splitlines()[:4]
    assert said == "downloads nothing"
    assert first == f"actions {LEFT_AND_BACK}: 129 video frames, 33 latent frames, 11 chunks of 3"
    assert second.startswith(
        "model matrix_game_2, universal: random weights, 2 layers, 1 heads x 64, 1 x 2 tokens a frame; float32 on cpu"
    )
    model = MatrixGame2(SMALL["matrix_game_2"]["universal"], device="meta")
    count = sum(parameter.numel() for parameter in model.parameters())
    assert third.startswith(f"weights: {count / 1e6:.1f} million parameters, {count * 4 / 2**10:.1f} KiB, random, in ")
    assert set(rows_of(out)) == {"full", "worldkv", "sliding", "sink_recent"}
    assert retrieved(result)[6:] == [[4], [3], [2], [1], [0]]
    assert "chunk 10 got back 1 of 9 banked, 0; the nearest, chunk 0 from 10 chunks before, is 0.0 degrees and 0" in out
    assert "worldkv: 11/11 chunks, 16 tokens attended" in err  # 6 past, 4 of a pruned 6, 6 of its own
    assert result["actions"] == {
        "name": LEFT_AND_BACK, "video_frames": 129, "stride": 4, "latent_frames": 33, "chunks": 11,
        "scales": {"yaw": 15, "pitch": 15, "walk": 12.35, "run": 0, "turn": 0, "pitch_limits": [-85, 85]},
    }  # fmt: skip
    assert result["memory"]["retrieval"] == "action" and result["memory"]["recent_frames"] == 3
    sizes = result["model"]
    assert (sizes["name"], sizes["variant"], sizes["weights"]) == ("matrix_game_2", "universal", "random")
    assert (sizes["num_layers"], sizes["grid"], sizes["actions"]["keyboard_dim"]) == (2, [1, 2], 4)
    assert (sizes["parameters"], sizes["weight_bytes"]) == (count, 4 * count)
    assert LEFT_AND_BACK in "".join(ElementTree.parse(picture).getroot().itertext())


def test_fp8_halves_the_linear_layers(small, tmp_path, capsys):
    options = [*MATRIX, "--actions", LEFT_AND_BACK, "--modes", "sliding", "--chunks", "2"]
    assert main(["rollout", *options, "--fp8"]) == 2
    assert "--fp8 must go with --dtype bfloat16, got float32" in capsys.readouterr().err
    plain = rolled(tmp_path, *options, "--dtype", "bfloat16")["model"]
    near = rolled(tmp_path, *options, "--dtype", "bfloat16", "--fp8")["model"]
    assert (plain["fp8"], near["fp8"], near["compiled"]) == (False, True, False)
    assert near["parameters"] == plain["parameters"] and near["weight_bytes"] < plain["weight_bytes"]


def test_encoded_conditions_go_in_and_latents_come_out(small, tmp_path, capsys):
    config = SMALL["lingbot_world_fast"]["fast"]
    given = {"text": torch.randn(2, 8), "image": torch.randn(20, 4, 2, 4)}
    write_tensors(tmp_path / "given.safetensors", given)
    options = [*LINGBOT, "--modes", "sliding,full", "--chunks", "2", "--trajectory", "right*24,left*24"]
    kept = tmp_path / "latents.safetensors"
    rolled(tmp_path, *options, "--conditions", str(tmp_path / "given.safetensors"), "--save-latents", str(kept))
    model = LingBotWorldFast.random(config, device="cpu", dtype=torch.float32)
    poses, intrinsics = latent_poses(load("right*24,left*24"), chunk_frames=3)
    conditions = LingBotConditions(**given, translation_scale=longest_step(poses[:6]))
    saved = read_tensors(kept)
    assert list(saved) == ["full", "sliding"]
    for mode, latents in saved.items():
        memory = WorldMemory(model.config.memory(mode=mode, bank_chunks=2), dtype=torch.float32)
        made = rollout(model, memory, poses[:6], intrinsics[:6], conditions=conditions)
        assert latents.shape == (6, 16, 2, 4)
        assert torch.allclose(latents, torch.cat([chunk.latents for chunk in made]), atol=1e-5)
    for arguments, said in (
        (
            ["--model", "small_world"],
            "--conditions must go with --model lingbot_world_fast or matrix_game_2, got small",
        ),
        (MATRIX, "--conditions must hold image_tokens or image_latents or both, got text, image"),
    ):
        assert main(["rollout", *arguments, "--conditions", str(tmp_path / "given.safetensors")]) == 2
        assert said in capsys.readouterr().err
    assert main(["rollout", *LINGBOT, "--conditions", str(tmp_path / "none.safetensors")]) == 2
    assert "--conditions must be a .safetensors file: checkpoint: must be an existing" in capsys.readouterr().err
    assert main(["rollout", *LINGBOT, "--save-latents", str(tmp_path / "x.pt")]) == 2
    assert "--save-latents must end in .safetensors" in capsys.readouterr().err


def test_matrix_game_is_the_models_own_rollout(small, tmp_path):
    result = rolled(tmp_path, *MATRIX, "--actions", LEFT_AND_BACK, "--seed", "3", "--modes", "full,worldkv")
    model = MatrixGame2.random(SMALL["matrix_game_2"]["universal"], 3, device="cpu", dtype=torch.float32)
    want = own_errors(model, retrieval="action", actions=parse_actions(LEFT_AND_BACK), seed=3)
    assert max(want) > 1e-3
    assert errors(result) == pytest.approx(want, rel=1e-3)


def test_matrix_game_by_pose_or_fov_of_the_same_way(small, tmp_path):
    options = [*MATRIX, "--actions", "W*40,L*40,S*48", "--retrieved-chunks", "2", "--modes", "full,worldkv"]
    by_action, by_pose, by_fov = (
        rolled(tmp_path, *options, *more.split())
        for more in ("", "--retrieval pose", "--retrieval fov --depth-range 1 1000")
    )
    assert by_pose["memory"]["retrieval"] == "pose"
    assert retrieved(by_pose) == retrieved(by_action) and errors(by_pose) == errors(by_action)
    assert retrieved(by_fov) != retrieved(by_pose)
    diverse = rolled(tmp_path, *options, "--diversity", "1")
    assert retrieved(diverse) != retrieved(by_action)


@pytest.mark.parametrize(
    "variant, actions", [("gta_drive", "W+A*24,S+D*24"), ("templerun", "Z*24,W*12,C*12"), ("templerun", None)]
)
def test_the_other_games(small, tmp_path, variant, actions, capsys):
    more = ["--actions", actions] if actions else []
    result = rolled(tmp_path, *MATRIX, "--variant", variant, "--modes", "worldkv", *more)
    actions = actions or rollout_models.DEFAULT_ACTIONS[variant]
    assert result["model"]["variant"] == variant and result["actions"]["name"] == actions
    assert f"model matrix_game_2, {variant}: " in capsys.readouterr().out
    integrator = ActionIntegrator(layout=variant)
    poses = integrator.poses(parse_actions(actions, variant))
    moved = np.linalg.norm(poses[-1][:3, 3] - poses[0][:3, 3])
    assert moved > 10 if variant == "templerun" else moved < 20
    for revisit in result["revisits"]:
        chunks = (revisit["chunk"], revisit["nearest"])
        means = [poses[3 * chunk : 3 * chunk + 3, :3, 3].mean(axis=0) for chunk in chunks]
        assert revisit["distance"] == pytest.approx(np.linalg.norm(means[0] - means[1]))


@pytest.mark.parametrize("variant", ["universal", "gta_drive", "templerun"])
def test_the_default_actions_of_a_game(variant):
    given = dict.fromkeys(("actions", "scales", "trajectory", "stride"))
    motion = rollout_models.motion(argparse.Namespace(model="matrix_game_2", variant=variant, **given))
    assert motion.video_frames % 4 == 1 and motion.latent_frames >= 30
    if variant != "templerun":  # a runner does not come back
        assert motion.poses[-1] == pytest.approx(motion.poses[0], abs=13)


def test_rows_that_end_no_frame_are_left_over(small, tmp_path, capsys):
    result = rolled(tmp_path, *MATRIX, "--actions", "W*39", "--modes", "sliding")
    assert [result["actions"][name] for name in ("video_frames", "latent_frames", "chunks")] == [40, 10, 3]
    assert "not made: 1 latent frame at the end, too few for a chunk" in capsys.readouterr().out


def test_scales_of_the_actions(small, tmp_path):
    """Walked ahead, then a look about: how far those are from each other decides what is near."""
    options = [*MATRIX, "--actions", "W*60,L*60,S*30", "--retrieved-chunks", "2", "--modes", "worldkv"]
    plain, wide = rolled(tmp_path, *options), rolled(tmp_path, *options, "--scales", "yaw=60, walk=1")
    assert wide["actions"]["scales"] == {**plain["actions"]["scales"], "yaw": 60, "walk": 1}
    assert retrieved(wide) != retrieved(plain)
    integrator = ActionIntegrator(ActionScales(yaw=60, walk=1))
    poses = integrator.poses(parse_actions("W*60,L*60,S*30").until(149))
    revisit = wide["revisits"][0]
    means = [poses[3 * chunk : 3 * chunk + 3, :3, 3].mean(axis=0) for chunk in (revisit["chunk"], revisit["nearest"])]
    assert revisit["distance"] == pytest.approx(np.linalg.norm(means[0] - means[1]))


# --- LingBot-World-Fast ---


@pytest.mark.parametrize("variant, sink, recent", [("fast", 3, 6), ("v2-1.3b", 6, 9)])
def test_lingbot_by_a_trajectory(small, tmp_path, variant, sink, recent):
    way = "right*54,forward*20,left*53"
    result = rolled(tmp_path, *LINGBOT, "--variant", variant, "--trajectory", way, "--modes", "full,worldkv")
    assert (result["memory"]["sink_frames"], result["memory"]["recent_frames"]) == (sink, recent)
    assert result["trajectory"]["name"] == way and result["memory"]["retrieval"] == "pose"
    model = LingBotWorldFast.random(SMALL["lingbot_world_fast"][variant], device="cpu", dtype=torch.float32)
    poses, intrinsics = latent_poses(load(way), chunk_frames=3)  # 30 of 32 latent frames, spread over 125 video frames
    conditions = LingBotConditions(translation_scale=longest_step(poses))
    want = own_errors(model, poses, intrinsics, conditions=conditions)
    assert max(want) > 1e-4
    assert errors(result) == pytest.approx(want, rel=1e-2, abs=1e-7)


# --- SmallWorld ---

TURN = ["--trajectory", "right*54,left*53", "--modes", "full,worldkv"]  # 9 chunks


def own_small_world(model, seed=0) -> list[float]:
    return own_errors(model, *latent_poses(load("right*54,left*53")), seed=seed)


def test_small_world_with_the_packages_weights(tmp_path, capsys):
    result = rolled(tmp_path, *TURN, "--seed", "2")
    out = capsys.readouterr().out
    assert (
        "model small_world: the package's weights, 4 layers, 2 heads x 64, 6 x 8 tokens a frame; float32 on cpu" in out
    )
    assert re.search(r"^weights: 1.2 million parameters, 4.\d MiB, the package's, in \d+.\d s$", out, re.M)
    assert result["model"]["weights"] == "the package's" and result["model"]["sigmas"] == [1, 0.75]
    model = SmallWorld.from_pretrained(device="cpu", dtype=torch.float32)
    want = own_small_world(model, seed=2)  # of the noise alone
    assert max(want) > 1e-3
    assert errors(result) == pytest.approx(want, rel=1e-2, abs=1e-7)
    wide = rolled(tmp_path, *TURN, "--grid", "3,12", "--chunks", "1")
    assert wide["model"]["grid"] == [3, 12] and wide["model"]["weights"] == "the package's"
    assert wide["modes"]["full"]["chunks"][0]["tokens_attended"] == 108


def test_small_world_with_weights_of_a_folder(tmp_path, capsys):
    """Of sizes of its own, which the config.json beside them says."""
    config = SmallWorldConfig(num_layers=1, num_heads=1, ffn_dim=32, grid=(2, 3), ray_octaves=1, sigmas=(1.0, 0.5))
    folder = tmp_path / "weights"
    folder.mkdir()
    model = SmallWorld.random(config, 7, device="cpu", dtype=torch.float32)
    write(folder / "model.safetensors", model.state_dict())
    (folder / "config.json").write_text(json.dumps(dataclasses.asdict(config)))
    result = rolled(tmp_path, *TURN, "--weights", str(folder))
    assert result["model"]["weights"] == str(folder)
    assert [result["model"][name] for name in ("num_layers", "grid", "sigmas")] == [1, [2, 3], [1, 0.5]]
    want = own_small_world(model)
    assert max(want) > 1e-3
    assert errors(result) == pytest.approx(want, rel=1e-2, abs=1e-7)
    capsys.readouterr()
    for text, said in (
        ("{}", "SmallWorld: checkpoint must hold the 109 tensors of its config, got 69 missing: "),
        (
            '{"ffn_dim": 0}',
            "--weights: SmallWorldConfig: config.json must have ffn_dim an integer from 1 to 1048576, got 0",
        ),
        ("[]", "--weights: "),
    ):
        (folder / "config.json").write_text(text)
        assert main(["rollout", "--device", "cpu", *TURN, "--weights", str(folder)]) == 2
        assert capsys.readouterr().err.startswith(f"worldkv rollout: {said}")


# --- sizes and weights ---


def test_layers_and_grid(small, tmp_path, capsys):
    options = ["--layers", "1", "--grid", "2, 3", "--chunks", "5", "--modes", "worldkv"]
    for model in (MATRIX, LINGBOT, ["--random"]):
        result = rolled(tmp_path, *model, *options)
        assert (result["model"]["num_layers"], result["model"]["grid"]) == (1, [2, 3])
        assert result["modes"]["worldkv"]["chunks"][0]["tokens_attended"] == 18
        assert "1 layers, " in capsys.readouterr().out
    deep = rolled(tmp_path, *MATRIX, "--layers", "16", "--chunks", "1", "--modes", "sliding")
    assert deep["model"]["num_layers"] == 16 and deep["model"]["action_layers"] == list(range(15))


@pytest.mark.parametrize(
    "model, config, prefix", [(MatrixGame2, "universal", "model."), (LingBotWorldFast, "fast", "")]
)
def test_weights_from_a_checkpoint(small, tmp_path, model, config, prefix):
    """Written by a random model of another seed than that of the command."""
    name = "matrix_game_2" if model is MatrixGame2 else "lingbot_world_fast"
    options = ["--model", name, "--chunks", "8", "--modes", "full,worldkv"]
    tensors = model.random(SMALL[name][config], 7, device="cpu", dtype=torch.float32).state_dict()
    folder = tmp_path / "weights"
    folder.mkdir()
    tensors = {f"{prefix}{key}": tensor for key, tensor in tensors.items()}
    write_sharded(folder, tensors) if prefix else write(folder / "model.safetensors", tensors)
    loaded = rolled(tmp_path, *options, "--weights", str(folder))
    assert loaded["model"]["weights"] == str(folder) and len(set(errors(loaded))) > 2
    other = rolled(tmp_path, *options, "--random")
    assert errors(other) != errors(loaded)
    assert other["model"]["parameters"] == loaded["model"]["parameters"]
    again = model.from_pretrained(folder, device="cpu", dtype=torch.float32, config=SMALL[name][config])
    if model is MatrixGame2:
        actions = parse_actions(rollout_models.DEFAULT_ACTIONS["universal"]).until(93)
        want = own_errors(again, retrieval="action", actions=actions)
    else:
        poses, intrinsics = (
            array[:24] for array in latent_poses(load(rollout_models.DEFAULT_TRAJECTORY), chunk_frames=3)
        )
        want = own_errors(again, poses, intrinsics)
    assert errors(loaded) == pytest.approx(want, rel=1e-2, abs=1e-7)


def test_a_real_width_at_one_layer(tmp_path, capsys):
    """Matrix-Game-2.0 as published but for its depth and the picture's size."""
    options = ["--layers", "1", "--grid", "1,1", "--chunks", "3", "--modes", "worldkv"]
    result = rolled(tmp_path, *MATRIX, *options)
    sizes = result["model"]
    assert (sizes["num_heads"], sizes["head_dim"], sizes["ffn_dim"], sizes["image_tokens"]) == (12, 128, 8960, 257)
    assert sizes["parameters"] > 5e7
    row = rows_of(capsys.readouterr().out)["worldkv"]
    measured = result["modes"]["worldkv"]["video_frames_per_second"]
    assert float(row["video frames/s"]) == pytest.approx(measured, rel=0.01)


def test_a_bank_that_does_not_fit_holds_fewer(small, tmp_path, monkeypatch, capsys):
    # Two layers of one head: slots of 128 rows of 64 numbers, K and V, fp32: 128 KiB. Two ring slots, eleven banked.
    monkeypatch.setattr(pool, "_free_host_bytes", lambda: 128 * 1024 * 12)
    options = [*MATRIX, "--actions", LEFT_AND_BACK, "--modes", "worldkv", "--retrieved-chunks", "2"]
    measured = rolled(tmp_path, *options)["modes"]["worldkv"]
    assert (measured["bank_capacity"], measured["chunks_dropped"], measured["chunks_banked"]) == (6, 4, 6)
    said = "bank: room for 6 chunks in half of the free memory, not for the rollout's 11; past that, chunks are dropped"
    assert said in capsys.readouterr().out.splitlines()
    for refused in (["--bank-chunks", "11"], ["--modes", "full", "--chunks", "11"]):
        monkeypatch.setattr(pool, "_free_host_bytes", lambda: 128 * 1024 * 10)
        assert main(["rollout", "--device", "cpu", *options, *refused]) == 2
        assert "WorldMemory: storage must fit" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--random"], "got 69.1 GiB of weights; change --layers or --device or --dtype"),
        (["--random", "--dtype", "bfloat16"], "got 34.9 GiB of weights; change --layers or --device"),
        (["--random", "--layers", "1000000"], "GiB of weights; change --layers or --device or --dtype"),
        (["--weights", "weights"], "got 69.1 GiB of weights; change --device or --dtype"),
    ],
)
def test_weights_that_do_not_fit_are_refused_before_they_are_made(arguments, said, tmp_path, monkeypatch, capsys):
    """The 14B model of LingBot-World-Fast, of which nothing is allocated."""
    monkeypatch.setattr(pool, "_free_host_bytes", lambda: 23 * 2**30)
    monkeypatch.setattr(rollout_models, "make_model", lambda *args: pytest.fail("it went to work"))
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "weights", {"head.head.bias": torch.zeros(64)})
    assert main(["rollout", "--device", "cpu", "--model", "lingbot_world_fast", "--chunks", "1", *arguments]) == 2
    out, err = capsys.readouterr()
    wanted = "worldkv rollout: --model lingbot_world_fast must fit the 23.0 GiB that are free on cpu, got "
    assert out == "" and err.startswith(wanted) and err.endswith(f"{said}\n") and err.count("\n") == 1


@pytest.mark.parametrize("layers", [1, 47, 48, 50])
def test_weights_are_counted_without_being_made(layers):
    config = dataclasses.replace(SMALL["lingbot_world_fast"]["fast"], num_layers=layers)
    model = LingBotWorldFast(config, device="meta", dtype=torch.bfloat16)
    parameters = list(model.parameters())
    want = (sum(one.numel() for one in parameters), sum(one.nbytes for one in parameters))
    assert rollout_models.count_weights("lingbot_world_fast", config, torch.bfloat16) == want


def test_weights_in_fp8_are_counted_as_they_were_on_a_gpu():
    config = dataclasses.replace(SMALL["lingbot_world_fast"]["fast"], num_layers=50)
    model = LingBotWorldFast(config, device="meta", dtype=torch.bfloat16)
    count = sum(one.numel() for one in model.parameters())
    model.to_fp8()
    want = (count, sum(one.nbytes for one in model.state_dict().values()))
    assert rollout_models.count_weights("lingbot_world_fast", config, torch.bfloat16, True) == want
    lines = (
        (Path(__file__).parents[1] / "benchmarks" / "results" / "nvidia-h200-20261127-043302.jsonl")
        .read_text()
        .splitlines()
    )
    held = {line["variant"]: line["bytes_by_kind"]["weights"] for line in map(json.loads, lines)}
    for variant, fp8 in (("worldkv", False), ("worldkv_fp8", True)):
        counted = rollout_models.count_weights("lingbot_world_fast", LingBotConfig.fast(), torch.bfloat16, fp8)
        assert counted[1] == held[variant]


def test_slow_weights_say_so(small, monkeypatch, capsys):
    draw = wan.draw_parameters

    def slow(*args):
        time.sleep(0.3)
        draw(*args)

    monkeypatch.setattr(wan, "draw_parameters", slow)
    monkeypatch.setattr(report, "_SILENCE", 0.1)
    assert main(["rollout", "--device", "cpu", *LINGBOT, "--chunks", "1", "--modes", "full"]) == 0
    assert re.search(r"^drawing 0\.\d million parameters: 0 s$", capsys.readouterr().err, re.M)


def test_threads(small, tmp_path):
    options = [*MATRIX, "--chunks", "1", "--modes", "sliding"]
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        assert rolled(tmp_path, *options, "--threads", "2")["machine"]["threads"] == 2
        path = tmp_path / "default.json"
        for model, threads in ((MATRIX, 3), ([], 1)):
            assert main(["rollout", "--device", "cpu", *options[3:], *model, "--json", str(path)]) == 0
            assert json.loads(path.read_text())["machine"]["threads"] == threads
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


# --- what is refused ---


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--model", "matrix_game_2"], "--model matrix_game_2 must have --weights FOLDER or --random, got neither"),
        (["--model", "lingbot_world_fast"], "--model lingbot_world_fast must have --weights FOLDER or --random, got"),
        ([*MATRIX, "--weights", "x"], "--weights must be left out with --random, got 'x'"),
        (["--random", "--weights", "x"], "--weights must be left out with --random, got 'x'"),
        (["--model", "matrix_game_2", "--weights", "x", "--layers", "2"], "--layers must go with --random, since all"),
        (["--layers", "2"], "--layers must go with --random, since all other weights have their own, got 2"),
        (["--weights", "x", "--layers", "2"], "--layers must go with --random, since all other weights .* got 2"),
        (["--weights", "x"], "--weights: must be an existing folder or .safetensors file, got x"),
        ([*MATRIX, "--variant", "fast"], "--variant must be one of universal, gta_drive, templerun for matrix_game_2"),
        ([*LINGBOT, "--variant", "v3"], "--variant must be one of fast, v2-14b, v2-1.3b for lingbot_world_fast, got"),
        (["--variant", "fast"], "--variant must be one of small_world for small_world, got 'fast'"),
        ([*MATRIX, "--trajectory", "right*9"], "--trajectory must be left out with --model matrix_game_2, .* got 'ri"),
        ([*MATRIX, "--stride", "4"], "--stride must be left out with --model matrix_game_2, which goes by --actions"),
        ([*LINGBOT, "--actions", "W*9"], "--actions must go with --model matrix_game_2, got --model lingbot_world"),
        (["--scales", "yaw=9"], "--scales must go with --model matrix_game_2, got --model small_world"),
        ([*MATRIX, "--scales", "yaw=9,tilt=2"], "--scales must be numbers of yaw, .*, turn, such as .* got 'tilt=2'"),
        ([*MATRIX, "--scales", "yaw"], "--scales must be numbers of yaw, .* got 'yaw'"),
        ([*MATRIX, "--scales", "walk=nan"], "--scales: walk must be finite, got nan"),
        ([*MATRIX, "--scales", "yaw=1e300"], r"--scales: yaw must be from -1000000 to 1000000, got 1e\+300"),
        ([*MATRIX, "--actions", "W*9999999"], "--actions: counts must be at most 100000 together, got 'W.999"),
        (["--actions", "W*9"], "--actions must go with --model matrix_game_2, got --model small_world"),
        ([*MATRIX, "--actions", ""], "--actions: .* got ''"),
        ([*MATRIX, "--scales", ""], "--scales must be numbers of yaw, .* got ''"),
        ([*MATRIX, "--trajectory", ""], "--trajectory must be left out with --model matrix_game_2, .* got ''"),
        ([*MATRIX, "--actions", "W9"], "--actions: an action's count must be a positive integer, .* got 'W9'"),
        ([*MATRIX, "--actions", "X*9"], "--actions: keys of 'universal' must be of W, S, .* got 'X'"),
        ([*MATRIX, "--actions", "W*7"], "--actions must have at least 9 video frames .* got 2 latent frames"),
        (["--retrieval", "action"], "--retrieval action must go with --model matrix_game_2, got --model small_world"),
        ([*MATRIX, "--depth-range", "1", "9"], "--depth-range must go with --retrieval fov, got --retrieval action"),
        ([*MATRIX, "--grid", "22"], "argument --grid: must be height,width of 1 to 1024 tokens each, got '22'"),
        ([*MATRIX, "--grid", "0,2"], "argument --grid: must be height,width of 1 to 1024 tokens each, got '0,2'"),
    ],
)
def test_bad_input_is_one_line_and_status_2(arguments, message, small, capsys):
    try:
        status = main(["rollout", "--device", "cpu", *arguments])
    except SystemExit as exit:
        status = exit.code
    out, err = capsys.readouterr()
    assert status == 2 and out == ""
    assert re.fullmatch(f"worldkv rollout: {message}.*\n", err), err


def test_weights_that_are_not_there_or_not_the_models(small, tmp_path, capsys):
    options = ["rollout", "--device", "cpu", "--model", "matrix_game_2", "--modes", "sliding", "--weights"]
    assert main([*options, str(tmp_path / "none")]) == 2
    said = f"worldkv rollout: --weights: must be an existing folder or .safetensors file, got {tmp_path / 'none'}\n"
    assert capsys.readouterr() == ("", said)
    assert main([*options, str(tmp_path)]) == 2
    said = f"worldkv rollout: --weights: {tmp_path} must hold .safetensors files, got none\n"
    assert capsys.readouterr() == ("", said)
    write(tmp_path / "model.safetensors", {"head.head.bias": torch.zeros(64)})
    assert main([*options, str(tmp_path)]) == 2
    assert re.search(r"worldkv rollout: MatrixGame2: .*missing", capsys.readouterr().err)
