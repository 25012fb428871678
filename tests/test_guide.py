"""The figures of docs/guide.md are those of the recall demonstration."""

import re
from ast import literal_eval
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch

from worldkv_kernels.recall import RecallMode, Scene, pan_and_return, recall

Image = pytest.importorskip("PIL.Image", reason="Pillow is not installed")
skimage = pytest.importorskip("skimage", reason="scikit-image, which brings the photographs, is not installed")

GUIDE = (Path(__file__).parents[1] / "docs" / "guide.md").read_text()
ROWS = re.findall(r"^\| (nothing|\w+=[\d.]+) \| ([\d.]+) \| ([\d,]+) \|$", GUIDE, flags=re.MULTILINE)


def test_the_guide_has_rows():
    assert len(ROWS) == 9


@pytest.mark.parametrize("changed, psnr, tokens", ROWS)
def test_a_row_is_what_is_measured(changed, psnr, tokens):
    photograph = Path(find_spec("skimage").origin).parent / "data" / "coffee.png"
    scene = Scene(np.asarray(Image.open(photograph).convert("RGB"), dtype=np.float64) / 255, torch.device("cpu"))
    options = {"mode": "worldkv", "keep_ratio": 0.25}
    if changed != "nothing":
        field, value = changed.split("=")
        options[field] = literal_eval(value)
    result = recall(scene, RecallMode(changed, options), pan_and_return(90, 4.0))
    assert abs(float(psnr) - np.mean(result.psnr)) < 0.15
    assert float(tokens.replace(",", "")) == np.mean(result.tokens_attended)
