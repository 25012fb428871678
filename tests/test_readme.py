"""The README's examples run as they stand, and the files it points to exist."""

import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import plain_lingbot
import pytest
import small_matrix_game
import torch

from worldkv_kernels import WorldMemory

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
OF_PIPELINES = {"lingbot.enable(": "pipe", "matrix_game.enable(": "pipeline"}


@pytest.mark.parametrize("example", EXAMPLES, ids=[f"example {i}" for i in range(len(EXAMPLES))])
def test_examples_run(example):
    if not any(call in example for call in OF_PIPELINES):
        exec(compile(example, "README.md", "exec"), {})


def run_two_lines(call, **names):
    (example,) = (example for example in EXAMPLES if call in example)
    assert len(example.splitlines()) == 2
    exec(compile(example, "README.md", "exec"), names)


@pytest.fixture
def attended(monkeypatch):
    """Shapes of the queries that a memory has attended with."""
    shapes, attend = [], WorldMemory.attend

    def spy(self, layer, q, *args):
        shapes.append(tuple(q.shape))
        return attend(self, layer, q, *args)

    monkeypatch.setattr(WorldMemory, "attend", spy)
    return shapes


def test_the_two_lines_in_lingbot(attended):
    """In a plain restatement of its code, of one narrow layer, at 480 x 832 pixels."""
    sizes = dict(text_len=7, dim=64, ffn_dim=160, freq_dim=16, text_dim=24, num_heads=1, num_layers=1)
    model = plain_lingbot.WanModelFast(**sizes).eval().requires_grad_(False)
    plain_lingbot.draw_weights(model)
    poses = np.tile(np.eye(4), (3, 1, 1))
    run_two_lines("lingbot.enable(", pipe=SimpleNamespace(model=model), poses=poses)
    camera = torch.zeros(1, 384, 3, 60, 104)
    latents = plain_lingbot.WanI2VFast(model).generate(
        torch.ones(5, 24), torch.zeros(20, 3, 60, 104), camera, lambda chunk, step, shape: torch.ones(shape),
        [(1.0, 1000.0)],
    )  # fmt: skip
    assert latents.isfinite().all() and attended == 2 * [(3 * 30 * 52, 64)]  # a denoising pass and the clean one


def test_the_two_lines_in_matrix_game(attended):
    """In a plain restatement of its code, of one narrow layer, at 352 x 640 pixels."""
    model = small_matrix_game.plain_model(frame_tokens=880, layers=1)
    pipeline = small_matrix_game.pipeline(model, frame_tokens=880)
    run_two_lines("matrix_game.enable(", pipeline=pipeline)
    given = small_matrix_game.conditions(*small_matrix_game.actions_of("universal", 1))
    given["cond_concat"] = torch.zeros(1, 20, 3, 44, 80)
    with torch.no_grad():
        latents = pipeline.inference(torch.ones(1, 16, 3, 44, 80), given)
    assert latents[0].isfinite().all() and attended == 4 * [(3 * 22 * 40, 128)]


def test_there_is_an_example_for_every_op_and_links_lead_somewhere():
    for op in ("segment_attention(", "norm_rope_append(", "compress_chunk(", "memory.attend(", *OF_PIPELINES):
        assert any(op in example for example in EXAMPLES)
    links = [link for link in re.findall(r"\]\(([^)]+)\)", README) if not link.startswith("http")]
    assert links and all((ROOT / link).exists() for link in links)
