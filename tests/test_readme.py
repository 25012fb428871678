"""The examples of the README and of docs/ run as they stand, and the files that they point to exist."""

import json
import re
from pathlib import Path

import pytest
import small_matrix_game
import torch

from worldkv_kernels import WorldMemory
from worldkv_kernels.models.lingbot_config import LingBotConfig
from worldkv_kernels.models.matrix_game_config import MatrixGameConfig

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"```python\n(.*?)```", flags=re.DOTALL)
EXAMPLES = BLOCK.findall(README)
EVERY_EXAMPLE = [
    pytest.param(block, id=f"{page.name} {i}")
    for page in PAGES
    for i, block in enumerate(BLOCK.findall(page.read_text()))
]
# These need a pipeline: test_integrations_lingbot and test_integrations_attach run theirs.
OF_PIPELINES = ("lingbot.enable(", "matrix_game.enable(", "attach(")


@pytest.mark.parametrize("example", EVERY_EXAMPLE)
def test_examples_run(example, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where they may write
    if not any(call in example for call in OF_PIPELINES):
        exec(compile(example, "an example", "exec"), {})


def test_the_two_lines_in_matrix_game(monkeypatch):
    """In a plain restatement of its code, of one narrow layer, at 352 x 640 pixels."""
    queries, attend = [], WorldMemory.attend

    def spy(self, layer, q, *args, **options):
        queries.append(tuple(q.shape))
        return attend(self, layer, q, *args, **options)

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


def test_there_is_an_example_for_every_op():
    ops = ("segment_attention(", "participation(", "norm_rope_append(", "compress_chunk(")
    for op in (*ops, "memory.attend(", *OF_PIPELINES):
        assert any(op in example for example in EXAMPLES)


@pytest.mark.parametrize(
    "page", [*PAGES, ROOT / "benchmarks" / "README.md"], ids=lambda page: f"{page.parent.name} {page.name}"
)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        if not link.startswith("http"):
            path, _, heading = link.partition("#")
            target = page.parent / path if path else page
            assert target.exists(), link
            assert not heading or heading in headings_of(target), link


def headings_of(page):
    """As links name them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_every_page_of_docs_is_pointed_to_and_every_variable_explained():
    assert all(f"(docs/{page.name})" in README for page in PAGES[1:])
    sources = [
        path for folder in ("worldkv_kernels", "kernels", "benchmarks") for path in (ROOT / folder).rglob("*.py")
    ]
    text = "\n".join(path.read_text() for path in [*sources, ROOT / "setup.py"])
    variables = set(re.findall(r"environ(?:\.get\(|\[)\"(WORLDKV_\w+)\"", text))
    explained = (ROOT / "docs" / "environment.md").read_text()
    assert len(variables) > 4 and not [name for name in variables if name not in explained]


def test_banked_chunks_take_what_is_said():
    said = {("1.86 GiB", "1.79 GiB"): LingBotConfig.fast(), (".24 GiB", ".23 GiB"): MatrixGameConfig.universal()}
    for sizes, model in said.items():
        for size, bank, part in zip(sizes, ("device", "host"), ("bank", "host_bank"), strict=True):
            one, two = (
                getattr(model.memory(bank=bank, bank_chunks=n).bytes(torch.bfloat16), part) for n in (1, 2)
            )  # fmt: skip
            assert f"{(two - one) / 2**30:.2f}".lstrip("0") == size.removesuffix(" GiB")
            assert all(size in " ".join(page.read_text().split()) for page in (PAGES[0], ROOT / "docs" / "guide.md"))


_FIRST, _SECOND, _H200 = "h100-80gb-hbm3-20261127-013059", "h100-80gb-hbm3-20261127-023600", "h200-20261127-043302"
_COOLER = "h200-20261127-060500"
# Of README's table of rollouts: the row, the column, and the file and line that say it.
ROLLOUTS = {
    ("Matrix-Game-2.0, 30 layers, 352 x 640", 1): (_SECOND, 1),
    ("Matrix-Game-2.0, 30 layers, 352 x 640", 2): (_SECOND, 2),
    ("Matrix-Game-2.0, 30 layers, 352 x 640", 3): (_SECOND, 4),
    ("the same, its bank in host memory", 1): (_SECOND, 3),
    ("LingBot-World-Fast, 40 layers, 480 x 832", 2): (_FIRST, 14),
    ("LingBot-World-Fast, 40 layers, 480 x 832", 3): (_SECOND, 10),
    ("8 of its layers", 1): (_SECOND, 6),
    ("8 of its layers", 2): (_SECOND, 7),
    ("8 of its layers", 3): (_SECOND, 8),
    ("8 of its layers, what lies between the products compiled", 1): (_SECOND, 9),
    ("all 40 layers, on an H200", 1): (_H200, 1),
    ("all 40 layers, on an H200", 3): (_COOLER, 1),
    ("the same, what lies between the products compiled", 1): (_H200, 2),
    ("the same, linear layers in FP8, too", 1): (_H200, 3),
}


def test_the_frames_per_second_are_those_of_the_lines():
    table = {}
    for line in README.splitlines():
        cells = [cell.strip() for cell in line.split("|")[1:-1]]
        if len(cells) == 4:
            filled = {(cells[0], column): cell for column, cell in enumerate(cells) if column and cell}
            table.update({place: cell for place, cell in filled.items() if cell != "not measured"})
    for place, (file, line) in ROLLOUTS.items():
        figure = json.loads((ROOT / f"benchmarks/results/nvidia-{file}.jsonl").read_text().splitlines()[line - 1])
        digits = len(table[place].partition(".")[2])
        assert figure["bench"] == "rollout" and table[place] == f"{figure['frames_per_second']:.{digits}f}", place
    assert {place for place in table if place[0] in {row for row, _ in ROLLOUTS}} == set(ROLLOUTS)
