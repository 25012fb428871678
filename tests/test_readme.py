"""The README's examples run as they stand, and the files it points to exist."""

import re
from pathlib import Path

import pytest
import small_matrix_game
import torch

from worldkv_kernels import WorldMemory

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
# These need a pipeline: the first is run by test_integrations_lingbot.
OF_PIPELINES = ("lingbot.enable(", "matrix_game.enable(")


@pytest.mark.parametrize("example", EXAMPLES, ids=[f"example {i}" for i in range(len(EXAMPLES))])
def test_examples_run(example):
    if not any(call in example for call in OF_PIPELINES):
        exec(compile(example, "README.md", "exec"), {})


def test_the_two_lines_in_matrix_game(monkeypatch):
    """In a plain restatement of its code, of one narrow layer, at 352 x 640 pixels."""
    queries, attend = [], WorldMemory.attend

    def spy(self, layer, q, *args):
        queries.append(tuple(q.shape))
        return attend(self, layer, q, *args)

    monkeypatch.setattr(WorldMemory, "attend", spy)
    model = small_matrix_game.plain_model(frame_tokens=880, layers=1)
    pipeline = small_matrix_game.pipeline(model, frame_tokens=880)
    (example,) = (example for example in EXAMPLES if "matrix_game.enable(" in example)
    exec(compile(example, "README.md", "exec"), {"pipeline": pipeline})
    given = small_matrix_game.conditions(*small_matrix_game.actions_of("universal", 1))
    given["cond_concat"] = torch.zeros(1, 20, 3, 44, 80)
    with torch.no_grad():
        latents = pipeline.inference(torch.ones(1, 16, 3, 44, 80), given)
    assert latents[0].isfinite().all() and queries == 4 * [(3 * 22 * 40, 128)]


def test_there_is_an_example_for_every_op_and_links_lead_somewhere():
    for op in ("segment_attention(", "norm_rope_append(", "compress_chunk(", "memory.attend(", *OF_PIPELINES):
        assert any(op in example for example in EXAMPLES)
    links = [link for link in re.findall(r"\]\(([^)]+)\)", README) if not link.startswith("http")]
    assert links and all((ROOT / link).exists() for link in links)
