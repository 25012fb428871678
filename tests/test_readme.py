"""The README's examples run as they stand, and the files it points to exist."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


@pytest.mark.parametrize("example", EXAMPLES, ids=[f"example {i}" for i in range(len(EXAMPLES))])
def test_examples_run(example):
    exec(compile(example, "README.md", "exec"), {})


def test_there_is_an_example_for_every_op_and_links_lead_somewhere():
    for op in ("segment_attention(", "norm_rope_append(", "compress_chunk(", "memory.attend("):
        assert any(op in example for example in EXAMPLES)
    links = [link for link in re.findall(r"\]\(([^)]+)\)", README) if not link.startswith("http")]
    assert links and all((ROOT / link).exists() for link in links)
