"""What recall promises, on three photographs, and its picture and figures."""

import argparse
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from worldkv_kernels.cli import main, photographs
from worldkv_kernels.recall import (
    MODES,
    RecallMode,
    Scene,
    pan_and_return,
    recall,
    revisited,
    to_values,
    to_view,
    yaw_poses,
)

skimage = pytest.importorskip("skimage", reason="scikit-image, which brings the photographs, is not installed")
Image = pytest.importorskip("PIL.Image")


def test_the_command_on_the_default_photograph(tmp_path, capsys):
    """Within 0.5 and 1.5 dB of full KV, and 15 above the sliding window, at a third of the tokens."""
    picture, figures = tmp_path / "recall.png", tmp_path / "recall.json"
    assert main(["recall", "--device", "cpu", "--picture", str(picture), "--json", str(figures)]) == 0
    measured = json.loads(figures.read_text())
    check_order(measured)
    output = capsys.readouterr().out
    assert output.index("downloads nothing; 90 frames take about 20 seconds") < output.index("PSNR, dB")
    assert all(mode.name in output for mode in MODES)
    check_picture(picture)


@pytest.mark.slow
@pytest.mark.parametrize("photo", ["astronaut", "rocket"])
def test_the_same_order_on_two_more_photographs(tmp_path, photo):
    figures = tmp_path / "recall.json"
    picture = tmp_path / "recall.png"
    assert main(["recall", "--photo", photo, "--picture", str(picture), "--json", str(figures)]) == 0
    check_order(json.loads(figures.read_text()))


def check_picture(path):
    """Of the six panels all show the view but the sliding window's, which has nothing of it left."""
    with Image.open(path) as image:
        pixels = np.asarray(image, dtype=float) / 255
    panels = [pixels[top : top + 288, left : left + 480] for top in (104, 508) for left in (24, 528, 1032)]
    psnr = [-10 * np.log10(np.square(panel - panels[0]).mean()) for panel in panels[1:]]
    assert psnr[1] < 15 and min(psnr[0], *psnr[2:]) > 30


def check_order(figures):
    assert len(figures["revisited_frames"]) == 30
    full, sliding, worldkv, half, quarter = figures["modes"]
    assert [m["name"] for m in figures["modes"]] == [mode.name for mode in MODES]
    assert worldkv["psnr_db"] >= full["psnr_db"] - 0.5
    assert worldkv["tokens_attended_mean"] <= full["tokens_attended_mean"] / 3
    assert quarter["psnr_db"] >= full["psnr_db"] - 1.5 and half["psnr_db"] >= full["psnr_db"] - 1.5
    for kept in (worldkv, half, quarter):
        assert kept["psnr_db"] >= sliding["psnr_db"] + 15
    assert quarter["kept_bytes"] < half["kept_bytes"] < worldkv["kept_bytes"]
    # The way back retrieves chunks of the way out: the camera's pose finds them, not their age.
    last = worldkv["retrieved"][-1]
    assert min(last) <= 2 and len(last) == 6


def test_what_a_window_has_lost_stays_lost():
    """What is recalled becomes history: coming back, a sliding window loses a strip more with every chunk."""
    scene = Scene(np.random.default_rng(0).random((96, 160, 3)), torch.device("cpu"))
    sliding = recall(scene, MODES[1], pan_and_return(48, 4.0))
    assert sliding.mode.name == "sliding window" and len(sliding.psnr) == 9
    assert max(sliding.psnr) < 16 and sliding.psnr[-1] < 13  # a grey view of noise has 11 or so


@pytest.mark.parametrize("photo", ["astronaut", "coffee"])
def test_without_poses_content_recalls_as_much(photo):
    _, image = photographs.load(argparse.Namespace(image=None, photo=photo))
    scene, yaws = Scene(image, torch.device("cpu")), pan_and_return(90, 4.0)
    found = {}
    for retrieval in ("pose", "content"):
        result = recall(scene, RecallMode(retrieval, {"keep_ratio": 0.25, "retrieval": retrieval}), yaws)
        found[retrieval] = np.mean(result.psnr)
    assert found["content"] > found["pose"] - 1 > 30


def test_views_and_values_are_what_they_say():
    rng = np.random.default_rng(0)
    scene = Scene(rng.random((80, 120, 3)), torch.device("cpu"))
    view = scene.view(33.3)
    torch.testing.assert_close(to_view(to_values(view)), view)
    torch.testing.assert_close(scene.view(360.0 + 33.3), view, atol=1e-3, rtol=0)
    keys = scene.keys(10.0).view(240, 3, 64)
    torch.testing.assert_close(keys.norm(dim=2), torch.ones(240, 3))
    # One patch to the right now is the same direction as this patch after turning by one patch.
    torch.testing.assert_close(
        scene.keys(14.0).view(12, 20, -1)[:, :-1], scene.keys(10.0).view(12, 20, -1)[:, 1:], atol=1e-4, rtol=0
    )

    # What lies behind the camera resembles nothing before it.
    behind = (scene.keys(0.0) * scene.keys(180.0)).view(240, 3, 64).sum(dim=2)
    assert behind.abs().max() < 0.7


def test_pan_comes_back_and_revisits_are_old():
    yaws = pan_and_return(90, 4.0, start=0.0)
    assert yaws.max() == 176 and yaws[0] == yaws[-1] == 0 and len(yaws) == 90
    again = revisited(yaws)
    assert again.tolist() == list(range(60, 90))
    assert all(yaws[f] == yaws[89 - f] for f in again)
    poses = yaw_poses(yaws)
    assert np.allclose(poses[45, :3, :3] @ (0, 0, 1), (np.sin(np.deg2rad(176)), 0, np.cos(np.deg2rad(176))))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--frames", "91"], "--frames must be a multiple of 3, got 91"),
        (["--frames", "-3"], "argument --frames: must be an integer of at least 1, got '-3'"),
        (["--frames", "3000000000"], "argument --frames: must be at most 100000, got '3000000000'"),
        (["--frames", "9" * 5000], "argument --frames: must be at most 100000, got '99999"),
        (["--seed", "-1"], "argument --seed: must be an integer of at least 0, got '-1'"),
        (["--seed", str(2**64)], f"argument --seed: must be at most {2**64 - 1}, got '{2**64}'"),
        (["--image", ""], "--image must be a picture that Pillow reads, got '.': Is a directory"),
        (["--image", "a\0b"], "--image must be a picture that Pillow reads, got 'a\\x00b': embedded null byte"),
        (["--image", "x", "--photo", "cat"], "argument --photo: not allowed with argument --image"),
        (["--device", "meta"], "--device must be cpu or a CUDA device of this machine, got 'meta'"),
        (["--device", "cpu:1"], "--device must be cpu or a CUDA device of this machine, got 'cpu:1'"),
        (["--device", "xla"], "--device must be cpu or a CUDA device of this machine, got 'xla'"),
        (["--frames", "30"], "--frames must be enough to see a view again after 30 frames, got 30"),
        (["--step", "nan"], "--step must be from 0.001 to 360 degrees, got nan"),
        (["--step", "0"], "--step must be from 0.001 to 360 degrees, got 0.0"),
        (["--step", "1e308"], "--step must be from 0.001 to 360 degrees, got 1e+308"),
        (["--image", "nowhere.png"], "--image must be a picture that Pillow reads, got 'nowhere.png': No such file"),
        (["--image", __file__], "--image must be a picture that Pillow reads"),
        (["--backend", "abacus"], "--backend must be one of cuda, triton, reference, got 'abacus'"),
        (["--picture", "nope/x.png"], "--picture must be a file that can be written, got 'nope/x.png': No such file"),
        (["--picture", "x.zzz"], "--picture must end in .png or .jpg or .webp, got 'x.zzz'"),
        (["--picture", "x.xbm"], "--picture must end in .png or .jpg or .webp, got 'x.xbm'"),  # black and white alone
        (["--picture", "-"], "--picture must end in .png or .jpg or .webp, got '-'"),
        (["--json", "nope/x.json"], "--json must be a file that can be written, got 'nope/x.json': No such file"),
        (["--json", "."], "--json must be a file that can be written, got '.': Is a directory"),
    ],
)
def test_bad_input_is_one_line_and_status_2(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("worldkv_kernels.cli.recall.recall", lambda *args, **options: pytest.fail("it went to work"))
    monkeypatch.chdir(tmp_path)
    assert status_of(["recall", "--picture", "a.png", "--json", "a.json", *arguments]) == 2
    output = capsys.readouterr()
    assert output.err.startswith(f"worldkv recall: {message}") and output.err.count("\n") == 1 and not output.out
    assert len(output.err) < 700
    assert not list(tmp_path.iterdir())


def status_of(arguments):
    try:
        return main(arguments)
    except SystemExit as exit:
        return exit.code


def test_photographs_that_will_not_do_are_named(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("worldkv_kernels.cli.recall.recall", lambda *args, **options: pytest.fail("it went to work"))
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (100, 1)).save("dot.png")
    Image.effect_noise((100, 100), 64).save("large.png")
    Path("half.png").write_bytes(Path("large.png").read_bytes()[:5000])
    for name, said in (
        ("dot.png", "at least 64 pixels each way, got 100 x 1: 'dot.png'"),
        ("half.png", "a picture that Pillow reads, got 'half.png': image file is truncated"),
        ("large.png", "a picture that Pillow reads, got 'large.png': Image size (10000 pixels) exceeds limit of 4000"),
    ):
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2000 if name == "large.png" else 20_000)
        assert main(["recall", "--image", name, "--json", "a.json", "--picture", "a.png"]) == 2
        out, err = capsys.readouterr()
        assert out == "" and err.startswith(f"worldkv recall: --image must be {said}") and err.count("\n") == 1


def test_a_photograph_is_taken_upright(tmp_path):
    """As the camera was held, which it writes beside the pixels."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (70, 90, 3), dtype=np.uint8))
    held = Image.Exif()
    held[0x0112] = 6  # a quarter turn
    image.save(tmp_path / "held.png", exif=held)
    name, pixels = photographs.load(argparse.Namespace(image=str(tmp_path / "held.png"), photo=None))
    assert name == "held.png"
    np.testing.assert_array_equal(pixels, np.rot90(np.asarray(image), -1) / 255)


def test_a_photograph_of_one_colour_is_recalled_exactly(tmp_path, monkeypatch, capsys):
    """Its figures are numbers, so that the JSON is one; and a quiet run says nothing beside them."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("worldkv_kernels.cli.recall.MODES", MODES[1:2])
    Image.new("RGB", (64, 64), "#808080").save("grey.png")
    options = ["--image", "grey.png", "--frames", "36", "--json", "-", "--picture", "out.png"]
    assert main(["recall", *options, "--quiet"]) == 0
    out, err = capsys.readouterr()
    measured = json.loads(out, parse_constant=lambda name: pytest.fail(name))
    assert (measured["modes"][0]["name"], measured["modes"][0]["mode"]) == ("sliding window", "sliding")
    assert "wrote out.png" in err and "12/12" not in err


def test_recall_refuses_what_it_cannot_measure():
    scene = Scene(np.zeros((64, 64, 3)), torch.device("cpu"))
    with pytest.raises(ValueError, match="yaws must be a multiple of 3 frames, got 4"):
        recall(scene, MODES[0], np.zeros(4))
    with pytest.raises(ValueError, match="image must be"):
        Scene(np.zeros((64, 64)), torch.device("cpu"))
