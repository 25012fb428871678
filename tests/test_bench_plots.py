"""Pictures of figures: which panels there are, what is drawn in them, and the words on them."""

import re
import shlex
from itertools import pairwise

import pytest
from conftest import BENCHMARKS

pytest.importorskip("matplotlib")


def figure(variant, tokens, us, *, heads=40, share=0.5, device="H100", bench="segment_attention", **changes):
    shape = {"heads": heads, "queries": 4680, "tokens": tokens, "head_dim": 128, "dtype": "bfloat16"}
    return {
        "bench": bench, "case": f"{heads} heads, 4680 queries, {tokens} keys", "variant": variant, "is_rival": False,
        "shape": shape, "status": "timed", "us": us, "us_20": 0.9 * us, "us_80": 1.2 * us, "share": share, "base": None,
        "small": False, "environment": {"device": device}, **changes,
    }  # fmt: skip


@pytest.fixture
def drawn(load, tmp_path, monkeypatch):
    """Draws figures and returns the pictures' canvases, laid out, by name."""
    plots, canvases = load("plots"), {}

    def keep(canvas, path):
        canvas.draw_without_rendering()
        canvases[path.name] = canvas
        return []

    for module in (plots, load("plots_rollout"), load("plots_world")):
        monkeypatch.setattr(module, "save", keep)

    def draw(figures):
        plots.draw(figures, tmp_path)
        return canvases

    return draw


def panels(canvas):
    return [axes for axes in canvas.axes if axes.get_visible()]


def words(canvas):
    return [text.get_text() for text in (canvas._suptitle, canvas._supxlabel) if text is not None]


TWO_LENGTHS = [figure(v, n, us, share=s) for v, us, s in (("a", 1000, 0.5), ("b", 800, 0.625)) for n in (9000, 27_000)]


def test_the_pictures_of_the_readme_are_those_of_the_command(load, tmp_path, monkeypatch):
    """By all words in them; the lines are drawn from the same file."""
    told = (BENCHMARKS / "README.md").read_text().replace("\\\n", "")
    command = re.search(r"^python benchmarks/plots\.py .*\.jsonl docs.*$", told, re.M)[0]
    results, _, *options = shlex.split(command)[2:]
    assert load("plots").main([str(BENCHMARKS.parent / results), str(tmp_path), *options]) == 0
    shown = re.findall(r"\(docs/(segment_attention_\w+\.svg)\)", (BENCHMARKS.parent / "README.md").read_text())
    assert len(shown) == 2
    for name in shown:
        made, kept = (
            re.findall(r"<text[^>]*>([^<]*)</text>", (folder / name).read_text())
            for folder in (tmp_path, BENCHMARKS.parent / "docs")
        )
        assert made == kept and "sdpa cudnn gather (rival)" in kept


@pytest.mark.parametrize(
    "options, said",
    [
        (["--case", "nothing"], "what has a picture; got nothing"),
        (["--case", "("], "unterminated"),
        (["--only", "16 bits,no"], "--only must be of ours, 16 bits, "),
    ],
)
def test_what_is_left_to_draw_is_told(load, tmp_path, capsys, options, said):
    results = BENCHMARKS / "results" / "cpu-20261127-small-world-bits.jsonl"
    assert load("plots").main([str(results), str(tmp_path), *options]) == 2
    assert said in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_a_line_takes_more_than_one_length(drawn):
    canvases = drawn([*TWO_LENGTHS, figure("a", 5000, 900, heads=12)])
    lines, bars = panels(canvases["segment_attention_latency"])
    assert lines.get_title().replace("\n", " ") == "40 heads, 4,680 queries, head_dim 128, bfloat16"
    assert bars.get_title().replace("\n", " ") == "12 heads, 4,680 queries, 5,000 keys"
    assert lines.get_xlabel() == "context length, tokens" and len(bars.patches) == 1


def test_the_ceiling_is_drawn_where_the_work_could_be(drawn):
    canvases = drawn([*TWO_LENGTHS, figure("a", 5000, 900, heads=12, share=0.25)])
    for picture, of_lines, of_bar in (("latency", 500, 225), ("share", 100, 100)):
        lines, bars = panels(canvases[f"segment_attention_{picture}"])
        ceiling = next(line for line in lines.lines if line.get_linestyle() == ":")
        assert list(ceiling.get_xdata()) == [9000, 27_000] and list(ceiling.get_ydata()) == [of_lines, of_lines]
        (mark,) = bars.collections[-1].get_offsets()
        assert mark[0] == pytest.approx(of_bar)


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"device": "cpu (x86_64)", "small": True}, "toy sizes on a CPU: times mean nothing"),
        ({"device": "H100", "small": True}, "toy sizes: times mean nothing"),
        ({"device": "cpu (x86_64)"}, "on a CPU: times say nothing of a GPU"),
        ({"device": "H100"}, None),
    ],
)
def test_a_picture_says_what_its_times_are_worth(drawn, changes, said):
    for canvas in drawn([figure("a", 9000, 1000, **changes)]).values():
        assert words(canvas)[1:] == ([said] if said else [])


@pytest.mark.parametrize("lengths", [(9000,), (9000, 27_000, 90_000)])
def test_titles_fit(drawn, lengths):
    """The widest titles, on a canvas of one panel and of three."""
    long = {"device": "NVIDIA H100 80GB HBM3 of a very long name", "bench": "tune_segment_attention"}
    figures = [figure("a", n, 1000, heads=heads, **long) for n in lengths for heads in (40, 80)[: len(lengths)]]
    for f in figures:
        f["case"] += ", 21 frames, window 3600x1+1800x6+3600x2, head_dim 64, float16"
        f["shape"]["keys"] = "3600x1+1800x6+3600x2"
    for canvas in drawn(figures).values():
        titles = [axes.title.get_window_extent() for axes in panels(canvas)]
        for title in (canvas._suptitle.get_window_extent(), *titles):
            assert title.x0 >= 0 and title.x1 <= canvas.bbox.x1
        assert all(a.x1 < b.x0 or b.y1 < a.y0 for a, b in pairwise(titles))


def test_thousands_are_separated(load, drawn):
    text = load("plots_common")
    assert text.wrapped("12345 keys, 999 of 0.12345, float16", 60) == "12,345 keys, 999 of 0.12345, float16"
    (axes,) = panels(drawn([figure("a", 9000, 12_345)])["segment_attention_latency"])
    assert "12,345" in [label.get_text() for label in axes.texts]
    assert any("," in label.get_text() for label in axes.get_xticklabels())


def of_world(bits, ratio, psnr_db, *, outliers=False, share=0.3, **options):
    return {
        "bench": "world", "case": "bits", "options": {"bank_bits": bits, "keep_ratio": ratio, **options},
        "outliers": outliers, "banked_share": share, "tokens_attended": 480 + 240 * ratio, "psnr_db": psnr_db,
        "worlds": 32,
    }  # fmt: skip


def test_a_bank_in_fewer_bits_has_a_curve_for_each_number_and_way(drawn):
    """From what is kept whole on, which is on both ways; by bytes and by tokens."""
    dropped = {"merge_pruned": False}
    figures = [
        of_world(4, 0.25, 32, share=0.15), of_world(4, 1.0, 33, share=0.29),
        of_world(4, 0.25, 31, share=0.15, **dropped), of_world(16, 1.0, 34, share=1.0),
        of_world(4, 1.0, 20, outliers=True), of_world(4, 1.0, 19), {**of_world(4, 1.0, 10), "banked_share": None},
        {**of_world(16, 1.0, 9), "options": {"keep_ratio": 1.0}},
    ]  # fmt: skip
    by_bytes, by_tokens = panels(drawn([*figures, *TWO_LENGTHS])["bits"])
    for axes, at_whole, pruned in ((by_bytes, 0.29, 0.15), (by_tokens, 720, 540)):
        curves = {line.get_label(): line.get_xydata().tolist() for line in axes.lines}
        assert curves["4 bits, merged"] == [[at_whole, 33], [pruned, 32]]
        assert curves["4 bits, dropped"] == [[at_whole, 33], [pruned, 31]]
        assert [y for _, y in curves["16 bits, merged"]] == [34] and curves["8 bits, merged"] == []
    assert "share of a whole one" in by_bytes.get_xlabel() and by_tokens.get_xlabel() == "tokens attended"
    labels = {text.get_text() for axes in (by_bytes, by_tokens) for text in axes.texts}
    assert labels == {"keep_ratio 1", "keep_ratio 0.25"}


def test_other_studies_of_the_small_world_have_no_picture(drawn):
    assert drawn([{"bench": "world", "case": "sink", "options": {"sink_frames": 3}}]) == {}
