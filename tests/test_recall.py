"""The main job: what recall promises, on three photographs, and its picture and figures."""

import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from worldkv_kernels.cli import main
from worldkv_kernels.recall import MODES, Scene, pan_and_return, recall, revisited, to_values, to_view, yaw_poses

skimage = pytest.importorskip("skimage", reason="scikit-image, which brings the photographs, is not installed")
Image = pytest.importorskip("PIL.Image")


@pytest.fixture(autouse=True, scope="module")
def all_threads():
    threads = torch.get_num_threads()
    torch.set_num_threads(os.cpu_count() or 1)
    yield
    torch.set_num_threads(threads)


README = Path(__file__).parents[1] / "README.md"


def test_the_command_on_the_default_photograph(tmp_path, capsys):
    """The README's figures: within 0.5 and 1.5 dB of full KV, and 5 above the sliding window, at a third."""
    picture, figures = tmp_path / "recall.png", tmp_path / "recall.json"
    assert main(["recall", "--dtype", "float32", "--picture", str(picture), "--json", str(figures)]) == 0
    measured = json.loads(figures.read_text())
    check_order(measured)
    check_readme(measured)
    output = capsys.readouterr().out
    assert all(mode.name in output for mode in MODES) and "PSNR dB" in output
    with Image.open(picture) as image:
        assert image.width > 6 * 320 and image.height > 2 * 192


@pytest.mark.parametrize("photo", ["astronaut", "rocket"])
def test_the_same_order_on_two_more_photographs(tmp_path, photo):
    figures = tmp_path / "recall.json"
    picture = tmp_path / "recall.png"
    assert main(["recall", "--photo", photo, "--picture", str(picture), "--json", str(figures)]) == 0
    check_order(json.loads(figures.read_text()))


def check_readme(figures):
    """The table in the README is what was measured, to the last digit shown or its neighbour."""
    rows = re.findall(r"^\| (.+?) \| ([\d.]+) \| ([\d,]+) \| ([\d.]+) MiB \|$", README.read_text(), flags=re.MULTILINE)
    assert len(rows) == len(figures["modes"])
    for (name, psnr, tokens, kept), mode in zip(rows, figures["modes"], strict=True):
        assert name.replace(",", "").replace(" at", "") == mode["name"]
        assert abs(float(psnr) - mode["psnr_db"]) < 0.15
        assert float(tokens.replace(",", "")) == mode["tokens_attended"]
        assert abs(float(kept) * 2**20 - mode["kept_bytes"]) < 0.06 * 2**20


def check_order(figures):
    assert len(figures["revisited_frames"]) == 30
    full, sliding, worldkv, half, quarter = figures["modes"]
    assert [m["name"] for m in figures["modes"]] == [mode.name for mode in MODES]
    assert worldkv["psnr_db"] >= full["psnr_db"] - 0.5
    assert worldkv["tokens_attended"] <= full["tokens_attended"] / 3
    assert quarter["psnr_db"] >= full["psnr_db"] - 1.5 and half["psnr_db"] >= full["psnr_db"] - 1.5
    for kept in (worldkv, half, quarter):
        assert kept["psnr_db"] >= sliding["psnr_db"] + 5
    assert quarter["kept_bytes"] < half["kept_bytes"] < worldkv["kept_bytes"]
    # The way back retrieves chunks of the way out: the camera's pose finds them, not their age.
    last = worldkv["retrieved"][-1]
    assert min(last) <= 2 and len(last) == 6


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
        (["--frames", "91"], "--frames must be a positive multiple of 3, got 91"),
        (["--frames", "30"], "--frames must be enough to see a view again after 30 frames, got 30"),
        (["--step", "nan"], "--step must be from 0.001 to 360 degrees, got nan"),
        (["--step", "0"], "--step must be from 0.001 to 360 degrees, got 0.0"),
        (["--step", "1e308"], "--step must be from 0.001 to 360 degrees, got 1e+308"),
        (["--image", "nowhere.png"], "--image must be a picture that Pillow reads, got nowhere.png: No such file or"),
        (["--image", __file__], "--image must be a picture that Pillow reads"),
        (["--backend", "abacus"], "--backend must be one of triton, reference, got 'abacus'"),
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
    assert main(["recall", "--picture", "a.png", "--json", "a.json", *arguments]) == 2
    output = capsys.readouterr()
    assert output.err.startswith(f"worldkv recall: {message}") and output.err.count("\n") == 1 and not output.out
    assert not list(tmp_path.iterdir())


def test_a_small_photograph_is_named(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (100, 1)).save("dot.png")
    assert main(["recall", "--image", "dot.png"]) == 2
    said = "worldkv recall: --image must be at least 64 pixels each way, got 100 x 1: dot.png\n"
    assert capsys.readouterr() == ("", said)


def test_recall_refuses_what_it_cannot_measure():
    scene = Scene(np.zeros((64, 64, 3)), torch.device("cpu"))
    with pytest.raises(ValueError, match="yaws must be a multiple of 3 frames, got 4"):
        recall(scene, MODES[0], np.zeros(4))
    with pytest.raises(ValueError, match="image must be"):
        Scene(np.zeros((64, 64)), torch.device("cpu"))
