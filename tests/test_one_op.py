"""docs/one_op.md: what it puts into the plain transformer makes what that made."""

import re
from pathlib import Path

import plain_causal
import pytest
import torch
from conftest import relative_error
from plain_causal import generate

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "one_op.md").read_text()


def run(heading):
    (code,) = re.findall(rf"## {heading}\n.*?```python\n(.*?)```", PAGE, flags=re.DOTALL)
    names = {}
    torch.manual_seed(0)
    exec(compile(code, "one_op.md", "exec"), names)
    return names


@pytest.mark.parametrize(
    ("heading", "made"), [("Two ops in place of the cache", "made"), ("A memory in place of the pool", "as_before")]
)
def test_the_chunks_are_those_of_the_plain_transformer(heading, made, monkeypatch):
    names = run(heading)
    wanted = generate(names["plain"], 8)
    assert relative_error(names[made], wanted) < 1e-6
    monkeypatch.setattr(plain_causal, "WINDOW", 2)
    assert relative_error(generate(names["plain"], 8), wanted) > 1e-3  # the window matters


def test_the_memory_brings_chunks_back():
    names = run("A memory in place of the pool")
    assert names["stats"]["chunks_banked"] == 6 and names["stats"]["chunks_retrieved"] > 4
    assert relative_error(names["made"], names["as_before"]) > 1e-3


def test_the_lines_shown_are_in_the_file():
    (lines,) = re.findall(r"```py\n(.*?)```", PAGE, flags=re.DOTALL)
    file = (ROOT / "tests" / "plain_causal.py").read_text()
    assert all(line in file for line in lines.splitlines())
