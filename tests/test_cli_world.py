"""The main job: a trained model that comes back, with each memory; its table and its pictures, those in the README."""

import argparse
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.train_small_world import write_weights
from worldkv_kernels.cli import main, photographs
from worldkv_kernels.journeys import MODES
from worldkv_kernels.models.small_world import SmallWorld, SmallWorldConfig

pytest.importorskip("skimage", reason="scikit-image, which measures and brings the photographs, is not installed")
Image = pytest.importorskip("PIL.Image")

ROOT = Path(__file__).parents[1]
ROW = re.compile(r"^\| (.+?) \| ([\d.]+) ± ([\d.]+) \| (\d\.\d+) \| ([\d,]+) \| ([\d.]+) MiB \|$", re.MULTILINE)


def run(folder, *arguments):
    """The command's status and its JSON."""
    files = {name: folder / f"world.{name}" for name in ("png", "webp", "json")}
    options = ["--picture", str(files["png"]), "--animation", str(files["webp"]), "--json", str(files["json"])]
    status = main(["world", "--device", "cpu", *options, *arguments])
    return status, json.loads(files["json"].read_text()), files


@pytest.fixture(scope="module")
def default(tmp_path_factory):
    """The default run, which takes most of a minute."""
    return run(tmp_path_factory.mktemp("world"))


def check_order(modes, *, at_least):
    """Full KV above the sliding window by `at_least` dB, and WorldKV near or above it at no more than a third."""
    of = {mode["name"]: mode for mode in modes}
    assert list(of) == list(MODES)
    full, sliding, worldkv = of["full KV"], of["sliding window"], of["WorldKV"]
    assert full["psnr_db"] >= sliding["psnr_db"] + at_least
    assert worldkv["psnr_db"] >= full["psnr_db"] - 0.5
    assert worldkv["tokens_attended_mean"] <= full["tokens_attended_mean"] / 3
    assert of["WorldKV, unpruned"]["psnr_db"] >= worldkv["psnr_db"]
    assert of["WorldKV, unpruned"]["tokens_attended_mean"] == sliding["tokens_attended_mean"]
    assert sliding["psnr_db"] <= of["sink + recent"]["psnr_db"] <= sliding["psnr_db"] + 6
    assert worldkv["kept_bytes"] < 0.6 * full["kept_bytes"]
    return of


def test_a_memory_is_worth_what_is_promised(default):
    """On eight worlds that no training drew, with a margin of several standard errors."""
    status, measured, _ = default
    assert status == 0 and measured["frames"] == 90 and measured["given"] == 45
    of = check_order(measured["modes"], at_least=12)
    for mode in of.values():
        assert len(mode["psnr_db_per_world"]) == 8 and 0 < mode["psnr_db_standard_error"] < 1
        assert mode["psnr_db"] == pytest.approx(np.mean(mode["psnr_db_per_world"]))
        assert mode["frames_per_second"] > 0
    # Not on average alone: in each of the eight worlds.
    per_world = {name: np.array(mode["psnr_db_per_world"]) for name, mode in of.items()}
    assert (per_world["full KV"] - per_world["sliding window"]).min() > 9
    assert (per_world["WorldKV"] - per_world["full KV"]).min() > -0.5


def test_the_readme_opens_with_these_figures(default):
    rows = ROW.findall((ROOT / "README.md").read_text())
    assert [row[0] for row in rows] == list(MODES)
    for (_, psnr, error, ssim, tokens, kept), mode in zip(rows, default[1]["modes"], strict=True):
        assert abs(float(psnr) - mode["psnr_db"]) < 0.15
        assert abs(float(error) - mode["psnr_db_standard_error"]) < 0.06
        assert abs(float(ssim) - mode["ssim"]) < 0.0101
        assert float(tokens.replace(",", "")) == mode["tokens_attended_mean"]
        assert abs(float(kept) * 2**20 - mode["kept_bytes"]) < 0.06 * 2**20


def test_the_pictures_are_those_of_the_readme(default):
    """The rows of the picture: what the sliding window has lost is plain to see, and no other row has lost it."""
    _, _, files = default
    for name in ("png", "webp"):
        with Image.open(files[name]) as drawn, Image.open(ROOT / "docs" / f"world.{name}") as shown:
            assert drawn.size == shown.size and getattr(drawn, "n_frames", 1) == getattr(shown, "n_frames", 1)
            ours, theirs = (np.asarray(image.convert("RGB"), dtype=float) for image in (drawn, shown))
        assert np.abs(ours - theirs).mean() < 4  # of 255: the text is another Pillow's
        assert (ROOT / "docs" / f"world.{name}").stat().st_size < 2**20
    with Image.open(files["png"]) as image:
        pixels = np.asarray(image.convert("RGB"), dtype=float) / 255
    rows = [pixels[96 + 102 * row : 192 + 102 * row, 200 + 134 * 4 :] for row in range(6)]  # of the later half
    psnr = dict(zip(MODES, (-10 * np.log10(np.square(row - rows[0]).mean()) for row in rows[1:]), strict=True))
    assert psnr["sliding window"] < 15 and psnr["sink + recent"] < 19
    assert min(psnr["full KV"], psnr["WorldKV"], psnr["WorldKV, unpruned"]) > 22
    with Image.open(files["webp"]) as image:
        assert image.n_frames == 45 and image.is_animated


@pytest.mark.slow
@pytest.mark.parametrize("seed", ["1", "2"])
def test_other_worlds_and_other_noise_say_the_same(tmp_path, seed):
    _, measured, _ = run(tmp_path, "--seed", seed, "--worlds", "2")
    check_order(measured["modes"], at_least=12)


def test_a_photograph(tmp_path, capsys):
    _, measured, _ = run(tmp_path, "--photo", "astronaut")
    check_order(measured["modes"], at_least=8)
    assert measured["worlds"] == "the photograph 'astronaut'" and measured["modes"][0]["psnr_db_standard_error"] is None
    out = capsys.readouterr().out
    assert "downloads nothing" in out and all(name in out for name in MODES)


def test_a_way_of_ones_own(tmp_path):
    _, measured, _ = run(tmp_path, "--worlds", "1", "--trajectory", "right*180,left*180")
    assert measured["frames"] == 90 and measured["given"] == 45 and measured["way"] == "right*180,left*180"
    check_order(measured["modes"], at_least=9)
    assert len(measured["seen_again"][0]) > 20


def test_the_json_may_go_to_stdout_alone(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("worldkv_kernels.cli.world.MODES", {name: MODES[name] for name in ("full KV", "WorldKV")})
    assert main(["world", "--worlds", "1", "--chunks", "14", "--json", "-", "--quiet", "--animation", "a.gif"]) == 0
    out, err = capsys.readouterr()
    assert [mode["name"] for mode in json.loads(out)["modes"]] == ["full KV", "WorldKV"]
    assert "14/28" not in err and {path.name for path in tmp_path.iterdir()} == {"world.png", "a.gif"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--worlds", "0"], "argument --worlds: must be an integer of at least 1, got '0'"),
        (["--worlds", "2", "--photo", "cat"], "--worlds must be left out with a photograph, got 2"),
        (["--image", "x", "--photo", "cat"], "argument --photo: not allowed with argument --image"),
        (["--image", "nowhere.png"], "--image must be a picture that Pillow reads, got 'nowhere.png': No such file"),
        (["--chunks", "12"], "argument --chunks: must be an integer of at least 14, got '12'"),
        (["--chunks", "15"], "--chunks must be even, got 15"),
        (["--chunks", "1002"], "argument --chunks: must be at most 1000, got '1002'"),
        (["--chunks", "20", "--trajectory", "left*9"], "argument --trajectory: not allowed with argument --chunks"),
        (["--trajectory", "right*90"], "--trajectory must come back, in the second half, to views last seen 18 frames"),
        (["--trajectory", "sideways*9"], "--trajectory: a move must be one of"),
        (["--trajectory", "right*8000,left*8000"], "--trajectory must have at most 3,000 frames, got 4,001"),
        (["--weights", "nowhere"], "--weights: must be an existing folder or .safetensors file, got nowhere"),
        (["--weights", ""], "--weights: . must hold .safetensors files, got none"),
        (["--device", "meta"], "--device must be cpu or a CUDA device of this machine, got 'meta'"),
        (["--backend", "abacus"], "--backend must be one of cuda, triton, reference, got 'abacus'"),
        (["--picture", "x.zzz"], "--picture must end in .png or .jpg or .webp, got 'x.zzz'"),
        (["--animation", "x.jpg"], "--animation must end in .webp or .gif or .png, got 'x.jpg'"),
        (["--picture", "a.png", "--animation", "a.png"], "--animation must be another file than --picture"),
        (["--json", "nope/x.json"], "--json must be a file that can be written, got 'nope/x.json': No such file"),
    ],
)
def test_bad_input_is_one_line_and_status_2(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("worldkv_kernels.cli.world.travel", lambda *args, **options: pytest.fail("it went to work"))
    monkeypatch.chdir(tmp_path)
    try:
        status = main(["world", *arguments])
    except SystemExit as exit:
        status = exit.code
    output = capsys.readouterr()
    assert status == 2 and not output.out
    assert output.err.startswith(f"worldkv world: {message}") and output.err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_pillow_without_webp_is_told_before_the_work(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("worldkv_kernels.cli.world.travel", lambda *args, **options: pytest.fail("it went to work"))
    monkeypatch.chdir(tmp_path)
    Image.init()
    monkeypatch.delitem(Image.SAVE, "WEBP")
    assert main(["world"]) == 2
    assert capsys.readouterr().err == "worldkv world: --animation must end in .gif or .png, got 'world.webp'\n"


def test_weights_of_other_pictures_are_refused(tmp_path, monkeypatch, capsys):
    sizes = dict(num_layers=1, num_heads=1, ffn_dim=64, frequency_dim=16)
    monkeypatch.chdir(tmp_path)
    for other, found in (
        (dict(grid=(3, 4)), "latents of [16, 6, 8], 3 frames a chunk"),
        (dict(chunk_frames=2), "latents of [16, 12, 16], 2 frames a chunk"),
    ):
        model = SmallWorld.random(SmallWorldConfig(**sizes, **other), device="cpu", dtype=torch.float32)
        write_weights(model, tmp_path)
        assert main(["world", "--weights", "."]) == 2
        wanted = "--weights must be of a model that makes latents of [16, 12, 16], 3 frames a chunk"
        assert capsys.readouterr().err == f"worldkv world: {wanted}, got {found}: '.'\n"


def test_sixteen_bits_of_grey_are_not_clipped_to_eight(tmp_path):
    deep = np.linspace(0, 65535, 70 * 80).reshape(70, 80).astype(np.uint16)
    Image.fromarray(deep).save(tmp_path / "deep.png")
    _, pixels = photographs.load(argparse.Namespace(image=str(tmp_path / "deep.png"), photo=None))
    assert pixels.shape == (70, 80, 3) and np.allclose(pixels, deep[..., None] / 65535)


def test_one_thread_and_back(tmp_path, monkeypatch):
    threads = torch.get_num_threads()
    seen = []

    def refuse(*args, **options):
        seen.append(torch.get_num_threads())
        raise ValueError("enough")

    monkeypatch.setattr("worldkv_kernels.cli.world.travel", refuse)
    monkeypatch.chdir(tmp_path)
    assert main(["world", "--worlds", "1"]) == 2
    assert seen == [1] and torch.get_num_threads() == threads
