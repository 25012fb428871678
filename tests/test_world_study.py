"""What docs/ say of the studies on the small world model is what their result lines hold."""

import json
import re
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from worldkv_kernels import MemoryConfig

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "cpu-20261126-small-world.jsonl"
LINES = [json.loads(line) for line in RESULTS.read_text().splitlines()]
LOG = [json.loads(line) for line in (ROOT / "docs" / "small_world_training.jsonl").read_text().splitlines()]
PAGES = [ROOT / "docs" / name for name in ("small_world.md", "guide.md")]
# | memory | PSNR ± error | difference ± error, or nothing | SSIM | tokens | kept | line |
ROW = re.compile(
    r"^\| ([^|]+) \| ([\d.]+) ± ([\d.]+) \| (?:([+-][\d.]+) ± ([\d.]+))? ?"
    r"\| ([\d.]+) \| ([\d,]+) \| ([\d.]+) MiB \| (\d+) \|$",
    re.MULTILINE,
)
ROWS = [pytest.param(row, id=f"{page.stem} {row[-1]}") for page in PAGES for row in ROW.findall(page.read_text())]


@pytest.mark.parametrize("row", ROWS)
def test_a_row_is_its_line(row):
    name, psnr, error, difference, of_difference, ssim, tokens, kept, number = row
    line = LINES[int(number) - 1]
    assert name == line["variant"]
    assert (psnr, error) == (f"{line['psnr_db']:.2f}", f"{line['standard_error']:.2f}")
    if line["difference"] is None:
        assert not difference
    else:
        assert difference == f"{line['difference']['db']:+.2f}"
        assert of_difference == f"{line['difference']['standard_error']:.2f}"
    assert (ssim, tokens) == (f"{line['ssim']:.3f}", f"{line['tokens_attended']:,.0f}")
    assert kept == f"{line['kept_bytes'] / 2**20:.1f}"


def test_every_line_is_told_and_is_of_unseen_worlds_and_one_version():
    assert len(ROWS) >= len(LINES) > 90
    told = {int(row.values[0][-1]) for row in ROWS if row.id.startswith("small_world ")}
    assert told == set(range(1, len(LINES) + 1))
    assert {line["bench"] for line in LINES} == {"world"} and len({line["weights"] for line in LINES}) == 1
    for line in LINES:
        few = 4 if "photographs" in line["case"] else 16 if line["case"] == "rebase, 504 frames" else 32
        assert line["worlds"] == len(line["psnr_db_per_world"]) == few
        assert line["standard_error"] > 0
        assert (line["difference"] is None) == (line["variant"] == first_of(line["case"])["variant"])


def first_of(case):
    return next(line for line in LINES if line["case"] == case)


def test_the_defaults_follow_the_evidence():
    """rebase_time, at every length: better by many standard errors, and so the default."""
    assert MemoryConfig(num_layers=1, num_heads=1, grid=(1, 1)).rebase_time
    worse = [line for line in LINES if line["options"].get("rebase_time") is False and line["difference"]]
    assert len(worse) >= 5
    for line in worse:
        assert line["difference"]["db"] < -3 * line["difference"]["standard_error"], line["case"]


def gain(case, variant, over=None):
    """Decibels of a memory over another in the same worlds, the study's first by default, and their standard error."""
    of = {line["variant"]: np.array(line["psnr_db_per_world"]) for line in LINES if line["case"] == case}
    gained = of[variant] - of[over or first_of(case)["variant"]]
    return gained.mean(), gained.std(ddof=1) / np.sqrt(len(gained))


def test_pruning_by_the_nearest_and_merging_wins_everywhere_and_is_the_default():
    config = MemoryConfig(num_layers=1, num_heads=1, grid=(1, 1))
    assert (config.prune_rule, config.merge_pruned) == ("nearest", True)
    cases = {line["case"] for line in LINES if line["case"].startswith("pruned to")}
    assert len(cases) == 10
    for case in cases:
        of = ["published", "nearest", "nearest, merged"]
        for worse, better in pairwise(name for name in of if name in variants(case)):
            db, error = gain(case, better, worse)
            assert db > 2 * error, (case, better, worse)
    for case, least in {"pruned to .25": 0.9, "pruned to .5": 0.8}.items():
        db, error = gain(case, "nearest, merged")
        assert db >= max(least, 5 * error), case


def test_half_a_chunk_costs_what_the_readme_says():
    told = r"half of each chunk costs (\.\d) dB, where the published rule costs (\d\.\d)"
    ours, published = re.search(told, " ".join((ROOT / "README.md").read_text().split())).groups()
    of = {line["variant"]: line["psnr_db"] for line in LINES if line["case"] in ("keep_ratio", "pruned to .25")}
    whole = of["keep_ratio=1.0"]
    assert f"{whole - of['nearest, merged']:.1f}" == f"0{ours}" and f"{whole - of['published']:.1f}" == published


def variants(case):
    return {line["variant"] for line in LINES if line["case"] == case}


def test_retrieved_tokens_have_no_weight_of_their_own_since_not_every_memory_gains():
    assert MemoryConfig(num_layers=1, num_heads=1, grid=(1, 1)).retrieved_log_weight == 0
    gains = {line["case"]: gain(line["case"], "twice") for line in LINES if line["case"].startswith("weight, ")}
    assert len(gains) == 6 and min(db for db, _ in gains.values()) < 0


def test_the_training_reached_what_is_shipped():
    """The log ends with the table of its weights, in fp32 and as they are shipped, in bf16."""
    *steps, table = LOG
    assert [line["step"] for line in steps] == sorted(line["step"] for line in steps) and steps[-1]["step"] == 4500
    assert steps[-1]["minutes"] < 90
    for name, of in table["psnr_db"].items():
        assert abs(of["fp32"] - of["bf16"]) < 0.1, name


def test_what_fewer_bits_of_the_model_cost():
    """As docs/models.md says of each kind of numbers."""
    lines = (RESULTS.parent / "cpu-20261127-small-world-numbers.jsonl").read_text().splitlines()
    costs = {line["numbers"]: line["difference"] for line in map(json.loads, lines)}
    said = " ".join((ROOT / "docs" / "models.md").read_text().split())
    fp8, bf16 = (f"{abs(of['db']):.2f} ± {of['standard_error']:.2f} dB" for of in (costs["fp8"], costs["bf16"]))
    assert f"it costs {fp8} of the views seen again, and bf16 {bf16}" in said and costs["fp8"]["db"] < 0
