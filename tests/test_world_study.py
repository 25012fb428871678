"""What docs/ say of the studies on the small world model is what their result lines hold."""

import json
import re
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from worldkv_kernels import MemoryConfig
from worldkv_kernels.cli import main
from worldkv_kernels.memory.retrieval import ContentRetrieval, PoseRetrieval
from worldkv_kernels.memory.sizes import place_bytes
from worldkv_kernels.models.lingbot_config import LingBotConfig
from worldkv_kernels.models.matrix_game_config import MatrixGameConfig
from worldkv_kernels.ops.quantize_chunk import packed_bytes

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


def test_the_younger_of_two_goes_since_the_older_costs_decibels():
    """On one way; on the other it is worth as much."""
    assert PoseRetrieval().drop([(chunk, at(chunk)) for chunk in range(5)]) == 1  # even steps: every other one goes
    for places in (12, 6):
        names = [f"{which} given up, bank_chunks={places}" for which in ("older", "younger")]
        db, error = gain("bank, which of two, crossing", *names)
        assert db < -5 and db < -10 * error
        assert abs(gain("bank, which of two", *names)[0]) < 0.15


def test_attention_received_chooses_nothing_since_poses_are_decibels_better():
    assert MemoryConfig(num_layers=1, num_heads=1, grid=(1, 1)).mass_layers == ()
    for case in ("mass, turn and return", "mass, crossing"):
        for variant in ("the least attended given up", "the most attended retrieved"):
            db, error = gain(case, variant)
            assert -9 < db < -4.5 and db < -10 * error
        assert gain(case, "of two alike the less attended given up")[0] < 0


def at(x):
    pose = np.eye(4)
    pose[0, 3] = x
    return pose


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


# --- a bank in 8 and 4 bits ---


IN_BITS = [
    json.loads(line) for line in (RESULTS.parent / "cpu-20261127-small-world-bits.jsonl").read_text().splitlines()
]
BITS_PAGE = (ROOT / "docs" / "bits.md").read_text()
# | keep_ratio or keys | bank | PSNR ± error | difference ± error, or nothing | tokens | bytes, or nothing | line |
ROW_IN_BITS = re.compile(
    r"^\| ([^|]+) \| ([^|]+) \| ([\d.]+) ± ([\d.]+) \| (?:([+-][\d.]+) ± ([\d.]+))? ?"
    r"\| ([\d,]+) \| ([\d.]+)? ?\| (\d+) \|$",
    re.MULTILINE,
)


def test_the_rows_of_a_bank_in_fewer_bits_are_its_lines():
    rows = ROW_IN_BITS.findall(BITS_PAGE)
    assert sorted(int(row[-1]) for row in rows) == list(range(1, len(IN_BITS) + 1))
    for kind, bank, psnr, error, difference, of_difference, tokens, share, number in rows:
        line = IN_BITS[int(number) - 1]
        assert (bank, psnr, error) == (line["variant"], f"{line['psnr_db']:.2f}", f"{line['standard_error']:.2f}")
        gained = line["difference"] or {"db": None}
        wanted = ("", "") if not line["difference"] else (f"{gained['db']:+.2f}", f"{gained['standard_error']:.2f}")
        assert (difference, of_difference) == wanted, number
        assert tokens == f"{line['tokens_attended']:,.0f}"
        assert share == ("" if line["banked_share"] is None else f"{line['banked_share']:.3f}")
        assert line["worlds"] == 32 and line["numbers"] == "bf16" and line["bench"] == "world"
        ratio, _, way = kind.partition(", ")
        if kind in ("as trained", "with outliers"):
            assert line["outliers"] == (kind == "with outliers")
        else:
            assert not line["outliers"] and float(ratio) == line["options"]["keep_ratio"]
            assert (way == "dropped") == (line["options"].get("merge_pruned") is False)


def costs(case, variant, of_case=None, of_variant="16 bits"):
    """Decibels to another memory in the same worlds, 16 bits of the same study by default, and their standard error."""
    of = {(line["case"], line["variant"]): np.array(line["psnr_db_per_world"]) for line in IN_BITS}
    lost = of[of_case or case, of_variant] - of[case, variant]
    return lost.mean(), lost.std(ddof=1) / np.sqrt(len(lost))


# Of 4 bits: where merged keys differ in length more than where they are dropped or whole.
MOST_OF_4_BITS = {
    "bits": 0.12, "bits, outliers": 0.12, "bits, pruned to .5, dropped": 0.12, "bits, pruned to .25, dropped": 0.13,
    "bits, pruned to .5": 0.18, "bits, pruned to .25": 0.23,
}  # fmt: skip


def test_the_gate_of_a_bank_in_fewer_bits():
    assert {line["case"] for line in IN_BITS if "groups" not in line["case"]} == set(MOST_OF_4_BITS)
    for case, most in MOST_OF_4_BITS.items():
        assert abs(costs(case, "8 bits")[0]) < (0.02 if "outliers" in case else 0.01), case
        assert 0.05 < costs(case, "4 bits")[0] < most, case
    assert MemoryConfig(num_layers=1, num_heads=1, grid=(1, 1)).bank_bits == 16


def test_what_is_said_of_bits_and_pruning():
    said = " ".join(BITS_PAGE.split())

    def short(db):
        return f"{db:.2f}".removeprefix("0")

    half, two_thirds = ("bits, pruned to .25", "16 bits"), ("bits, pruned to .5", "16 bits")
    four, pruned = short(costs("bits", "4 bits")[0]), short(costs(*half, of_case="bits")[0])
    assert f"4 bits of whole chunks cost {four} dB" in said
    assert f"(`keep_ratio=0.25`) costs {pruned} dB and leaves half" in said
    over_half, over_two_thirds = (
        " ± ".join(short(x) for x in costs(*of, of_case="bits", of_variant="4 bits")) for of in (half, two_thirds)
    )
    assert f"are {over_half} dB better than halves in 16 bits, and {over_two_thirds} better than two thirds" in said
    merged = [short(costs(f"bits, pruned to .{part}", "4 bits")[0]) for part in ("5", "25")]
    dropped = [short(costs(f"bits, pruned to .{part}, dropped", "4 bits")[0]) for part in ("5", "25")]
    assert f"4 bits cost {merged[0]} and {merged[1]} dB of chunks that are pruned and merged" in said
    assert f"{four} of whole ones and {dropped[0]} and {dropped[1]} of what pruning leaves" in said
    by_token, two_bits = (costs("bits, outliers", of)[0] for of in ("4 bits, keys by token", "2 bits"))
    both = costs("bits, pruned to .25", "4 bits", of_case="bits")[0]
    assert f"lose {by_token:.1f} dB with them; by channel nothing changes" in said
    assert f"2 bits cost {two_bits:.1f} dB, where half a chunk in 4 bits costs {short(both)} and takes fewer" in said
    assert abs(costs("bits, outliers", "4 bits")[0] - costs("bits", "4 bits")[0]) < 0.005
    readme, changes = (" ".join((ROOT / page).read_text().split()) for page in ("README.md", "CHANGELOG.md"))
    assert f"for {four} dB of whole chunks and {merged[1]} of halves" in readme
    assert f"4 bits {four} of whole chunks, {merged[1]} of merged halves" in changes


def test_what_a_bank_in_fewer_bits_takes():
    models = {
        "LingBot-World-Fast, 40 layers, 480 x 832": LingBotConfig.fast(),
        "Matrix-Game-2.0, 30 layers, 352 x 640": MatrixGameConfig.universal(),
    }
    found = re.findall(r"^\| (\D[^|]+\d) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$", BITS_PAGE, re.MULTILINE)
    assert len(found) == 6
    for model, ratio, *sizes in found:
        config = models[model].memory(keep_ratio=float(ratio))
        of = (config.banked_tokens, config.num_heads, config.head_dim)
        bytes_of_one = [2 * np.prod(of) * 2, *(2 * packed_bytes(*of, bits, torch.bfloat16) for bits in (8, 4))]
        wanted = [f"{config.num_layers * size / 2**30:.2f}" for size in bytes_of_one]
        assert sizes == [size if size[0] != "0" else size[1:] for size in wanted]
    whole = 2 * 4680 * 40 * 128
    for bits, share in re.findall(r"^\| (\d) \| .* \| (\.\d+) \|$", BITS_PAGE, re.MULTILINE):
        assert share == f"{packed_bytes(4680, 40, 128, int(bits), torch.bfloat16) / whole:.3f}"[1:]
    said = " ".join(BITS_PAGE.split())
    fast = LingBotConfig.fast().memory(bank_bits=8, bank_chunks=6).bytes()
    assert f"one layer of six halves is restored take {fast.restored / 2**30:.2f} GiB".replace("0.", ".") in said
    slots = LingBotConfig.fast().memory(bank="host", bank_chunks=6).bytes().bank
    saved = [place_bytes(LingBotConfig.fast().memory(bank_bits=bits), torch.bfloat16) for bits in (16, 8)]
    chunks = slots // (saved[0] - saved[1])
    said_of_slots = f"eight slots of {slots / 8 / 2**30:.2f} GiB, which is more than 8 bits save of the first {chunks}"
    assert f"{said_of_slots} chunks" in said


def test_what_restoring_takes_of_attention():
    """By bytes and operations alone, at the rates that the page names."""
    said = " ".join(BITS_PAGE.split())
    for config, tflops in ((LingBotConfig.fast(), 550), (MatrixGameConfig.universal(), 450)):
        memory = config.memory(bank_bits=8)
        heads, queries, banked = memory.num_heads, memory.chunk_tokens, 6 * memory.banked_tokens
        tokens = 4 * queries + banked  # of the sink, two recent chunks and the current one
        bytes_of = 2 * 6 * packed_bytes(memory.banked_tokens, heads, 128, 8, torch.bfloat16) + 2 * banked * heads * 256
        restoring, attention = bytes_of / (0.75 * 3.35e12), 4 * queries * tokens * 128 * heads / (tflops * 1e12)
        assert f"{bytes_of / 1e6:.0f} MB" in said and f"{restoring * 1e6:.0f} us" in said
        took = f"{attention * 1e3:.1f}" if attention > 1e-3 else f"{attention * 1e3:.2f}"[1:]
        of_attention = f"{100 * restoring / attention:.1f} % of {took} ms"
        assert of_attention in said and f" at {tflops} TFLOP/s" in said
        if heads == 40:
            assert f"converted {-(-queries // 128)} times" in said and f"window of {tokens:,} tokens" in said


def test_what_an_80_gb_gpu_and_its_host_hold_in_fewer_bits(capsys):
    options = ["--gpu", "80", "--host", "128", "--keep-ratio", "0.25,1", "--bank-bits", "16,8,4", "--json", "-"]
    assert main(["plan", "--model", "lingbot_world_fast", *options]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    of = {(row["bank"], row["keep_ratio"], row["bank_bits"]): row["bank_chunks"] for row in rows}
    halves, whole, on_host = (
        [of[kind, ratio, bits] for bits in (16, 8, 4)]
        for kind, ratio in (("device", 0.25), ("device", 1.0), ("host", 0.25))
    )
    said = " ".join(BITS_PAGE.split())
    assert f"counts {halves[0]} halves of chunks in 16 bits, {halves[1]} in 8 and {halves[2]} in 4" in said
    assert whole[0] is None and f"not even the six that a window retrieves, {whole[1]} and {whole[2]}. With" in said
    assert f"it is {on_host[0]}, {on_host[1]} and {on_host[2]} halves" in said
    held = f"holds {halves[0]}, {halves[1]} or {halves[2]} halves of LingBot-World-Fast's chunks in 16, 8 or 4 bits"
    assert held in " ".join((ROOT / "CHANGELOG.md").read_text().split())


# --- retrieval by content ---


BY_CONTENT = [
    json.loads(line) for line in (RESULTS.parent / "cpu-20261127-small-world-content.jsonl").read_text().splitlines()
]
CONTENT_PAGE = (ROOT / "docs" / "content.md").read_text()
WAYS = {
    "turns away and back": "content, turn and return", "twice round": "content, twice round", "cuts": "content, cuts",
}  # fmt: skip
# | way | memory | PSNR ± error | difference ± error, or nothing | share | tokens | line |
ROW_BY_CONTENT = re.compile(
    r"^\| ([^|]+) \| ([^|]+) \| ([\d.]+) ± ([\d.]+) \| (?:([+-][\d.]+) ± ([\d.]+))? ?"
    r"\| (\d+) % \| ([\d,]+) \| (\d+) \|$",
    re.MULTILINE,
)


def share(case, variant):
    """Of what retrieval by pose gains over none."""
    of = {line["variant"]: line["psnr_db"] for line in BY_CONTENT if line["case"] == case}
    return (of[variant] - of["sink + recent"]) / (of["pose"] - of["sink + recent"])


def test_the_rows_of_retrieval_by_content_are_its_lines():
    rows = ROW_BY_CONTENT.findall(CONTENT_PAGE)
    assert [int(row[-1]) for row in rows] == list(range(1, len(BY_CONTENT) + 1))
    for way, variant, psnr, error, difference, of_difference, gained, tokens, number in rows:
        line = BY_CONTENT[int(number) - 1]
        assert (WAYS[way], variant, line["worlds"]) == (line["case"], line["variant"], 32)
        assert (psnr, error) == (f"{line['psnr_db']:.2f}", f"{line['standard_error']:.2f}")
        if line["difference"] is None:
            assert (variant, difference) == ("pose", "")
        else:
            told = f"{line['difference']['db']:+.2f}", f"{line['difference']['standard_error']:.2f}"
            assert (difference, of_difference) == told
        assert (gained, tokens) == (f"{100 * share(line['case'], variant):.0f}", f"{line['tokens_attended']:,.0f}")


def test_the_gate_of_retrieval_by_content_and_what_is_said_of_it():
    smooth = [share(case, "content, 3 chunks") for case in ("content, turn and return", "content, twice round")]
    assert min(smooth) >= 0.93
    said, guide, changes = (
        " ".join((ROOT / page).read_text().split()) for page in ("docs/content.md", "docs/guide.md", "CHANGELOG.md")
    )
    there, round_ = (f"{100 * of:.0f}" for of in smooth)
    assert f"gets {there} % of its gain on the way back, and {round_} % a second time round" in said
    assert f"it has {there} to {round_} % of what poses gain on smooth ways" in changes
    assert "nine tenths of what poses are worth where the camera moves on smoothly" in guide
    assert share("content, cuts", "content") < share("content, cuts", "random")  # as the page says of two chunks
    default, none = ContentRetrieval().skip_newest, "content, 3 chunks, none skipped"
    assert default and all(share(case, none) < share(case, "content, 3 chunks") for case in WAYS.values())


def test_the_time_of_choosing_by_content():
    lines = (RESULTS.parent / "cpu-20261127-host-time-content.jsonl").read_text().splitlines()
    both = {line["case"]: line["both_us"] for line in map(json.loads, lines) if line["variant"] == "content"}
    small, middle, large = (f"{both[f'a bank that fills, {count} chunks'] / 1e3:.1f}" for count in (100, 340, 1000))
    full = f"{both['a full bank, 1000 chunks'] / 1e3:.1f}"
    told = (
        f"both together take {small} ms with 100 chunks in a bank that fills, {middle} with 340 and {large} with "
        f"1,000, and {full} with a full one of 1,000 "
    )
    assert told in " ".join(CONTENT_PAGE.split())
