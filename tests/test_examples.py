"""The examples from their arguments to a video, over stand-ins at the places of the published modules."""

import importlib
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import stand_in_lingbot
import stand_in_matrix_game
import torch
from PIL import Image

from worldkv_kernels import trajectory
from worldkv_kernels.actions import parse_actions
from worldkv_kernels.integrations import lingbot, matrix_game

EXAMPLES = Path(__file__).parents[1] / "examples"
STAND_INS = {"lingbot": stand_in_lingbot, "matrix_game": stand_in_matrix_game}
MADE = {"lingbot": stand_in_lingbot.PIPELINES, "matrix_game": stand_in_matrix_game.GAMES}
WEIGHTS = {"lingbot": "lingbot-world-base-cam", "matrix_game": "Matrix-Game-2.0"}
THERE_AND_BACK = "right*34,left*30"  # 65 video frames, 17 latent frames, 5 chunks
LOOK = "L*30,J*30"  # 61 rows, 16 latent frames, 5 chunks
CONTROLS = {"lingbot": ["--prompt", "A room.", "--trajectory", THERE_AND_BACK], "matrix_game": ["--actions", LOOK]}
FRAMES = 4 * 15 - 3
LINE = re.compile(
    r"(.*): (\d+) frames in \d+\.\d s; memory: (\d+) chunks made, (\d+) banked, (\d+) dropped, (\d+) brought back; "
    r"\d+\.\d\d GiB on the GPU, \d+\.\d\d GiB in host memory"
)


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs an example in the folder that holds room.png and the checkouts `lingbot` and `matrix_game`."""
    for name, stand_in in STAND_INS.items():
        weights = {f"{WEIGHTS[name]}/{file}": "" for file in stand_in.WEIGHTS}
        for file, text in {**stand_in.FILES, **weights}.items():
            path = tmp_path / name / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
    draw = np.random.default_rng(0)
    Image.fromarray(draw.integers(0, 255, (90, 160, 3), dtype=np.uint8)).save(tmp_path / "room.png")
    (tmp_path / "folder.mp4").mkdir()
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(sys, "path", [str(EXAMPLES), *sys.path])
    before = dict(sys.modules)
    names = ("common", "lingbot", "matrix_game", "wan", "inference", "utils")
    for made in MADE.values():
        made.clear()

    def main(example, *arguments, controls=None, folder=tmp_path):
        monkeypatch.chdir(folder)
        for name in [name for name in sys.modules if name.partition(".")[0] in names]:
            del sys.modules[name]
        given = CONTROLS[example] if controls is None else controls
        importlib.import_module(example).main(
            ["--repo", example, "--image", "room.png", "--out", "made/out.mp4", *given, *arguments]
        )
        return np.load(tmp_path / "made/out.mp4")

    yield main
    for name in [name for name in sys.modules if name.partition(".")[0] in names]:
        del sys.modules[name]
    sys.modules.update({name: module for name, module in before.items() if name.partition(".")[0] in names})


@pytest.fixture
def enabled(monkeypatch):
    """What the examples' enable was given, and its handles."""
    calls = []
    for integration in (lingbot, matrix_game):
        monkeypatch.setattr(integration, "enable", recording(integration.enable, calls))
    return calls


def recording(enable, calls):
    def call(model, **options):
        handle = enable(model, **options)
        calls.append((options, handle))
        return handle

    return call


def lingbot_by_hand(tmp_path, enable, video_frames=FRAMES + 8, **options):
    """What the stand-in's pipeline makes of the same arguments."""
    room = Image.open(tmp_path / "room.png")
    camera = trajectory.load(THERE_AND_BACK)
    for name in ("poses", "intrinsics"):
        np.save(tmp_path / f"{name}.npy", getattr(camera, name))
    config = stand_in_lingbot.WAN_CONFIGS["i2v-A14B"]
    pipe = stand_in_lingbot.WanI2VFast(config, str(tmp_path / "lingbot" / WEIGHTS["lingbot"]), **options)
    if enable:
        lingbot.enable(pipe.model, poses=lingbot.latent_poses(camera.poses, video_frames))
    return pipe.generate("A room.", room, tmp_path, frame_num=video_frames, shift=10.0, seed=42).numpy()


def test_lingbot_makes_what_the_pipeline_makes_with_the_memory_enabled(run, enabled, tmp_path, capsys):
    made = run("lingbot")
    assert made.shape == (3, FRAMES, 4, 6) and np.isfinite(made).all()
    (pipe,), ((options, handle),) = stand_in_lingbot.PIPELINES, enabled
    assert pipe.local_attn_size == 0  # no room for the cache that it stands in for
    assert (options["bank"], options["bank_chunks"]) == ("device", None)
    assert np.array_equal(options["poses"], lingbot.latent_poses(trajectory.load(THERE_AND_BACK).poses, FRAMES + 8))
    out, *numbers = LINE.fullmatch(capsys.readouterr().out.splitlines()[-1]).groups()
    stats = handle.stats()
    keys = ("chunks", "chunks_banked", "chunks_dropped", "chunks_retrieved")
    assert Path(out).samefile(tmp_path / "made/out.mp4")
    assert list(map(int, numbers)) == [FRAMES, *(stats[key] for key in keys)] == [FRAMES, 5, 2, 0, 1]
    assert np.array_equal(made, lingbot_by_hand(tmp_path, enable=True))
    assert not np.allclose(made, lingbot_by_hand(tmp_path, enable=False), atol=1e-3)


@pytest.mark.parametrize("arguments, options", [([], {}), (["--window", "6"], {"local_attn_size": 6})])
def test_lingbot_without_the_memory_is_the_published_pipeline(run, enabled, tmp_path, capsys, arguments, options):
    made = run("lingbot", "--no-memory", *arguments)
    (pipe,) = stand_in_lingbot.PIPELINES
    assert not enabled and "forward" not in vars(pipe.model)
    assert not any("forward" in vars(block.self_attn) for block in pipe.model.blocks)
    assert np.array_equal(made, lingbot_by_hand(tmp_path, enable=False, **options))
    assert capsys.readouterr().out.endswith(" s; without a memory\n")


def test_lingbot_takes_frames_and_a_folder_of_poses(run, enabled, tmp_path):
    folder = tmp_path / "clip"
    folder.mkdir()
    camera = trajectory.load(THERE_AND_BACK)
    np.save(folder / "poses.npy", camera.poses)
    np.save(folder / "intrinsics.npy", camera.intrinsics[0])
    made = run("lingbot", "--frames", "40", controls=["--prompt", "A room.", "--trajectory", "clip"])
    assert made.shape[1] == 33
    assert np.array_equal(enabled[0][0]["poses"], lingbot.latent_poses(camera.poses, 40))
    assert np.array_equal(made, lingbot_by_hand(tmp_path, enable=True, video_frames=40))


def matrix_game_by_hand(tmp_path, enable, text=LOOK, variant="universal"):
    """What the stand-in's pipeline makes of the same arguments."""
    torch.manual_seed(42)
    weights = tmp_path / "matrix_game" / WEIGHTS["matrix_game"]
    game = stand_in_matrix_game.InteractiveGameInference(
        type("", (), dict(
            config_path=tmp_path / f"matrix_game/configs/inference_yaml/inference_{variant}.yaml",
            checkpoint_path=str(weights / stand_in_matrix_game.VARIANTS[variant]), pretrained_model_path=str(weights),
        ))
    )  # fmt: skip
    if enable:
        matrix_game.enable(game.pipeline.generator.model)
    actions = parse_actions(text, variant)
    frames = len(actions.keyboard[3:]) // 4 + 1
    frames -= frames % 3
    rows = 4 * frames - 3
    image = game.frame_process(game._resizecrop(Image.open(tmp_path / "room.png"), 352, 640))[None, :, None]
    video = torch.cat([image, torch.zeros(1, 3, rows - 1, *image.shape[3:])], dim=2)
    encoded = game.vae.encode(video, "cpu", tiled=True, tile_size=(44, 80), tile_stride=(23, 38))
    mask = torch.zeros(1, 4, *encoded.shape[2:])
    mask[:, :, 0] = 1
    given = {"cond_concat": torch.cat([mask, encoded], dim=1), "visual_context": game.vae.encode_video(image)}
    given["keyboard_cond"] = torch.from_numpy(actions.keyboard[None, :rows])
    if actions.mouse is not None:
        given["mouse_cond"] = torch.from_numpy(actions.mouse[None, :rows])
    with torch.no_grad():
        made = game.pipeline.inference(torch.randn_like(encoded), given, mode=variant)
    return ((torch.cat(made, dim=1)[0] + 1) * 127.5).byte().permute(0, 2, 3, 1).numpy()


@pytest.mark.parametrize("variant, text", [("universal", LOOK), ("gta_drive", "W+D*30,W+A*30"), ("templerun", "Z*60")])
def test_matrix_game_makes_what_the_pipeline_makes_with_the_memory_enabled(
    run, enabled, tmp_path, capsys, variant, text
):
    made = run("matrix_game", controls=["--variant", variant, "--actions", text])
    assert made.shape == (FRAMES, 4, 6, 3) and made.std() > 10
    ((options, handle),) = enabled
    assert options == {"bank": "device", "bank_chunks": None}
    out, *numbers = LINE.fullmatch(capsys.readouterr().out.splitlines()[-1]).groups()
    stats = handle.stats()
    keys = ("chunks", "chunks_banked", "chunks_dropped", "chunks_retrieved")
    assert Path(out).samefile(tmp_path / "made/out.mp4")
    assert list(map(int, numbers)) == [FRAMES, *(stats[key] for key in keys)] and stats["chunks_retrieved"] > 0
    assert np.array_equal(made, matrix_game_by_hand(tmp_path, True, text, variant))
    assert not np.array_equal(made, matrix_game_by_hand(tmp_path, False, text, variant))


def test_matrix_game_without_the_memory_is_the_published_pipeline(run, enabled, tmp_path, capsys):
    made = run("matrix_game", "--no-memory")
    (game,) = stand_in_matrix_game.GAMES
    model = game.pipeline.generator.model
    assert not enabled and "forward" not in vars(model)
    assert not any("forward" in vars(block.self_attn) for block in model.blocks)
    assert np.array_equal(made, matrix_game_by_hand(tmp_path, enable=False))
    assert capsys.readouterr().out.endswith(" s; without a memory\n")


def test_matrix_game_takes_frames(run):
    assert len(run("matrix_game", "--frames", "40")) == 33


@pytest.mark.parametrize("example", STAND_INS)
def test_the_bank_and_the_seed_are_those_asked_for(run, enabled, example):
    of_device = run(example)
    in_host = run(example, "--bank", "host", "--bank-chunks", "7")
    options, handle = enabled[-1]
    assert (options["bank"], options["bank_chunks"]) == ("host", 7)
    assert handle.memory.config.bank == "host" and handle.stats()["bank_capacity"] == 7
    assert np.array_equal(of_device, in_host)
    assert not np.array_equal(of_device, run(example, "--seed", "7"))


@pytest.mark.parametrize("example", STAND_INS)
def test_it_runs_in_the_checkout_and_with_weights_elsewhere(run, example, tmp_path):
    here = run(example)
    (tmp_path / example / WEIGHTS[example]).rename(tmp_path / "cam")
    elsewhere = ["--weights", str(tmp_path / "cam"), "--image", str(tmp_path / "room.png")]
    (tmp_path / "made/out.mp4").unlink()
    out = ["--repo", ".", "--out", "../made/out.mp4"]
    assert np.array_equal(run(example, *elsewhere, *out, folder=tmp_path / example), here)


ERRORS = [
    ("--image none.png", r"--image must be an image, got .*/none\.png: .*No such file"),
    ("--image lingbot/wan/__init__.py", r"--image must be an image, got .*/__init__\.py: cannot identify image file"),
    ("--repo .", r"--repo must be a folder with (wan/image2video_fast|inference)\.py, got .*, which has none"),
    ("--weights none", r"--weights must be a folder with (models_t5|base_dist).*, got .*/none, which has none"),
    ("--frames 8", r"--frames: must be at least 9, got 8"),
    ("--frames x", r"--frames: invalid integer value: 'x'"),
    ("--bank-chunks 0", r"--bank-chunks: must be at least 1, got 0"),
    ("--bank gpu", r"--bank: invalid choice: 'gpu'"),
    ("--seed -1", r"--seed: must be at least 0, got -1"),
    ("--out x.avi", r"--out must be a file whose name ends in \.mp4, got .*/x\.avi"),
    ("--out folder.mp4", r"--out must be a file whose name ends in \.mp4, got .*/folder\.mp4"),
    ("--out room.png/x.mp4", r"--out must be in a folder of its own, got .*/room\.png/x\.mp4: .*File exists"),
]
OF_LINGBOT = [
    ("--trajectory right*7", "--trajectory must be of 9 video frames at least, a chunk of 3 latent, got 8"),
    ("--trajectory turn*90", r"--trajectory must be moves or .*, got turn\*90: .*one of right, .*got 'turn'"),
    ("--trajectory none", r"--trajectory must be moves or .*, got none: trajectory: must be an existing folder"),
    ("--window 6", "--window must go with --no-memory, got 6 without it"),
    ("--no-memory --window 2", "--window: must be at least 3, got 2"),
]
OF_MATRIX_GAME = [
    ("--actions L*7", "--actions must be of 8 video frames at least, a chunk of 3 latent, got 7"),
    ("--actions Y*90", r"--actions must be keys and counts, got Y\*90: .*of W, .*got 'Y'"),
    ("--variant gta_drive --actions L*90", r"--actions must be keys and counts, got L\*90: .*'gta_drive'.*got 'L'"),
]


@pytest.mark.parametrize(
    "example, arguments, said",
    [
        *((example, *error) for example in STAND_INS for error in ERRORS),
        *(("lingbot", *error) for error in OF_LINGBOT),
        *(("matrix_game", *error) for error in OF_MATRIX_GAME),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_loaded(run, example, arguments, said, capsys):
    refused(run, example, arguments.split(), said, capsys)


def refused(run, example, arguments, said, capsys):
    with pytest.raises(SystemExit) as stopped:
        run(example, *arguments)
    assert stopped.value.code == 2 and not MADE[example]
    last = capsys.readouterr().err.splitlines()[-1]
    assert re.search(said, last), last


# With the arguments under which they are asked for.
NEEDED = [
    *(
        ("lingbot", "--repo", file, [])
        for file in stand_in_lingbot.FILES
        if not re.search(r"(wan|utils)/__init__", file)
    ),
    *(("lingbot", "--weights", file.removesuffix("/x"), []) for file in stand_in_lingbot.WEIGHTS),
    *(("matrix_game", "--repo", file, []) for file in stand_in_matrix_game.FILES if not file.startswith("configs/")),
    *(("matrix_game", "--weights", file.removesuffix("/x"), []) for file in stand_in_matrix_game.WEIGHTS[:3]),
    *(
        ("matrix_game", name, file, ["--variant", variant, "--actions", "W*20"])
        for variant, checkpoint in stand_in_matrix_game.VARIANTS.items()
        for name, file in (("--weights", checkpoint), ("--repo", f"configs/inference_yaml/inference_{variant}.yaml"))
    ),
]


@pytest.mark.parametrize("example, name, file, arguments", NEEDED)
def test_missing_files_are_named(run, example, name, file, arguments, tmp_path, capsys):
    folder = tmp_path / example / (WEIGHTS[example] if name == "--weights" else "")
    (folder / file).rename(tmp_path / "away")
    refused(run, example, arguments, re.escape(f"{name} must be a folder with {file}, got {folder}, which has"), capsys)


def test_weights_that_the_pipeline_would_take_for_others(run, tmp_path, capsys):
    folder = (tmp_path / "lingbot" / WEIGHTS["lingbot"]).rename(tmp_path / "weights")
    if "cam" in str(folder):
        pytest.skip("'cam' is in the path of the folder for temporary files")
    refused(run, "lingbot", ["--weights", "weights"], "--weights must be a path with 'cam' in it", capsys)


@pytest.mark.parametrize("example", STAND_INS)
def test_without_a_gpu_or_packages(run, example, tmp_path, capsys, monkeypatch):
    (tmp_path / example / ("wan/__init__.py" if example == "lingbot" else "inference.py")).write_text("import flash_")
    wanted = r"--repo's packages must be installed, pip install -r .*/requirements\.txt, got: No module named 'flash_'"
    refused(run, example, [], wanted, capsys)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    refused(run, example, [], "a GPU that CUDA can use must be there, got none", capsys)


def test_a_video_that_was_not_written_is_an_error(run, monkeypatch, capsys):
    monkeypatch.setattr(stand_in_lingbot, "save_video", lambda *arguments, **options: None)
    with pytest.raises(SystemExit) as stopped:
        run("lingbot")
    assert stopped.value.code == 2
    assert "--out must be a file that can be written, got " in capsys.readouterr().err


@pytest.mark.parametrize("example", STAND_INS)
def test_help_says_what_is_needed_and_how_to_compare(run, example, capsys):
    with pytest.raises(SystemExit) as stopped:
        run(example, "--help")
    assert stopped.value.code == 0
    said = capsys.readouterr().out
    assert re.search(r"at commit\s[0-9a-f]{40}", said) and " GB or more" in said and "requirements.txt" in said
    on, off = re.findall(rf"^  python {example}\.py (.*?)$\n^ +(.*)$", said, flags=re.MULTILINE)
    assert "--no-memory" in off[1] and "--no-memory" not in on[1]
