"""worldkv bench: what it prints, writes and draws, two files side by side, and every argument that it refuses."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from worldkv_kernels.cli import main
from worldkv_kernels.cli.bench import BENCHES, script

ROOT = Path(__file__).resolve().parent.parent
QUICK = ["--small", "--device", "cpu", "--seconds", "0.02"]
OPS = {
    "segment_attention", "norm_rope_append", "compress_chunk", "quantize_chunk", "participation", "prefetch", "chunk",
}  # fmt: skip
RIVALS = {
    "sdpa cudnn", "sdpa flash", "sdpa efficient", "flex attention", "flash-attn 2", "flash-attn 4 lists",
    "flash-attn 4 pages", "flashinfer", "sage attention", "eager", "compiled", "published",
}  # fmt: skip
CPU_TIMES = "\ntimed on a CPU: these times say nothing of a GPU\n"
PLOTS = [f"{op}_{what}.{kind}" for op in sorted(OPS) for what in ("latency", "share") for kind in ("png", "svg")]
PLOTS = sorted([*PLOTS, "rollout.png", "rollout.svg"])


@pytest.fixture(scope="module")
def benched(tmp_path_factory):
    """One run of everything, but for the rollouts of test_bench_rollout: its folder, lines and what it printed."""
    pytest.importorskip("matplotlib")
    folder = tmp_path_factory.mktemp("bench")
    (folder / "new").mkdir()
    files = ["--jsonl", str(folder / "new" / "out.jsonl"), "--plot", str(folder / "new" / "plots")]
    with pytest.MonkeyPatch.context() as patch:
        printed = []
        patch.setattr("builtins.print", lambda *words, end="\n", **_: printed.append(" ".join(map(str, words)) + end))
        patch.setattr(script("bench_rollout"), "SMALL_CASES", script("bench_rollout").SMALL_CASES[1:])
        assert main(["bench", "all", *QUICK, *files]) == 0
    lines = [json.loads(line) for line in (folder / "new" / "out.jsonl").read_text().splitlines()]
    return folder / "new", lines, "".join(printed)


def test_all_prints_a_table_of_each_op(benched):
    _, lines, printed = benched
    heads = r"\n(.*: memory costs .*\n)*case +(variant +us|mode +frames/s) "
    assert [name for name in BENCHES if re.search(rf"^{name}{heads}", printed, re.M)] == list(BENCHES)
    for line in lines:
        assert re.search(rf"^{re.escape(line['case'])} +{re.escape(line['variant'])}\b", printed, re.M)
    assert f"bench 2/{len(BENCHES)}: norm_rope_append\n" in printed
    assert re.search(r"^segment_attention 5/5: .*: \d+\.\d s$", printed, re.M)


def test_every_rival_is_timed_or_skipped_with_a_reason(benched):
    _, lines, printed = benched
    assert {line["bench"] for line in lines} == OPS | {"rollout"}
    rivals = [line for line in lines if line["is_rival"]]
    assert {name for name in RIVALS for line in rivals if line["variant"].startswith(name)} == RIVALS
    for line in lines:
        assert (line["status"], line["us"] is None) in {("timed", False), ("skipped", True)}
        assert line["status"] == "timed" or (line["reason"] and line["is_rival"])
        assert line["status"] == "timed" or f"skipped: {line['variant']}: {line['reason']} (" in printed


def test_pictures_show_each_timed_variant(benched):
    folder, lines, _ = benched
    assert sorted(path.name for path in (folder / "plots").iterdir()) == PLOTS
    for name in PLOTS:
        if name == "rollout.svg":  # see test_bench_rollout
            continue
        if name.endswith("png"):
            assert (folder / "plots" / name).read_bytes().startswith(b"\x89PNG\r\n")
            continue
        words = " ".join(ElementTree.parse(folder / "plots" / name).getroot().itertext())
        of_op = [line for line in lines if name.startswith(line["bench"]) and line["status"] == "timed"]
        for line in of_op:
            assert f"{line['variant']}{' (rival)' if line['is_rival'] else ''}" in words
        assert ("latency, us" if "latency" in name else "share of the measured ceiling, %") in words
        assert "toy sizes on a CPU: times mean nothing" in words
        flat = " ".join(words.split())
        if "attention" in name:  # context lengths along the axis where there are several, else bars
            assert "2 heads, 150 queries, pruned keys, head_dim 128, float32" in flat
            assert "at the measured ceiling" in words
            of_op = [line for line in of_op if "pruned, float32" not in line["case"]]
            assert all(length in words for length in ("675", "1,125"))
        assert all(line["case"] in flat for line in of_op)


def test_plots_from_a_file_of_lines(benched, tmp_path, capsys):
    folder, lines, _ = benched
    plots = script("plots")
    few = write(tmp_path / "few.jsonl", *(line for line in lines if line["bench"] in ("prefetch", "norm_rope_append")))
    assert plots.main([few, str(tmp_path / "plots")]) == 0
    drawn = [name for name in PLOTS if name.startswith(("prefetch", "norm_rope_append"))]
    assert sorted(path.name for path in (tmp_path / "plots").iterdir()) == drawn
    assert plots.main([str(folder / "absent.jsonl"), str(tmp_path)]) == 2
    assert "absent.jsonl" in capsys.readouterr().err


def test_json_is_one_document_and_jsonl_appends(tmp_path, capsys):
    lines = tmp_path / "lines.jsonl"
    lines.write_text('{"bench": "ceilings"}\n')
    asked = ["bench", "compress_chunk", *QUICK, "--only", "ours", "--jsonl", str(lines)]
    assert main([*asked, "--json", "-"]) == 0
    printed = capsys.readouterr()
    document = json.loads(printed.out)
    assert document["command"] == "bench compress_chunk"
    assert "x rival" in printed.err and CPU_TIMES in printed.err
    assert [json.loads(line) for line in lines.read_text().splitlines()[1:]] == document["figures"]
    path = tmp_path / "out.json"
    assert main([*asked[:-2], "--quiet", "--csv", str(tmp_path / "out.csv")]) == 0
    assert capsys.readouterr().err == ""
    assert main([*asked[:-2], "--json", str(path)]) == main([*asked[:-2], "--json", str(path)]) == 0
    assert len(json.loads(path.read_text())["figures"]) == len(document["figures"])  # written anew
    printed = capsys.readouterr().out
    assert "x rival" in printed and CPU_TIMES in printed


def test_ours_being_wrong_is_exit_status_1(monkeypatch, capsys):
    bench = script("bench_norm_rope_append")
    right = bench.norm_rope_append
    monkeypatch.setattr(bench, "norm_rope_append", lambda *args, **options: 1.1 * right(*args, **options))
    assert main(["bench", "norm_rope_append", *QUICK]) == 1
    assert re.search(r"^wrong: reference: relative error 1\.\d+e-01", capsys.readouterr().out, re.M)


# Two files side by side.


def row(printed, variant):
    """Cells of a compare table from the variant on."""
    line = next(line for line in printed.splitlines() if f"  {variant}  " in line)
    return line[line.index(f"  {variant}  ") :].split()


def test_compare_shows_a_planted_slow_down(tmp_path, monkeypatch, capsys):
    a, b = str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")
    bench = script("bench_norm_rope_append")
    monkeypatch.setattr(bench, "SMALL_CASES", bench.SMALL_CASES[:1])
    assert main(["bench", "norm_rope_append", *QUICK, "--jsonl", a]) == 0
    right = bench.norm_rope_append

    def slow(*args, **options):
        time.sleep(0.05)
        return right(*args, **options)

    monkeypatch.setattr(bench, "norm_rope_append", slow)
    assert main(["bench", "norm_rope_append", *QUICK, "--jsonl", b]) == 0
    capsys.readouterr()
    assert main(["bench", "compare", a, b]) == 0
    _, us_a, us_b, ratio, mark = row(capsys.readouterr().out, "reference")
    assert float(us_b) - float(us_a) > 30_000
    assert float(ratio) == pytest.approx(float(us_b) / float(us_a), rel=0.01)
    assert mark == "slower"


def figure(variant, low, median, high, *, status="timed", reason=None, device="H200", bench="op"):
    times = dict(zip(("us_20", "us", "us_80"), (low, median, high), strict=True))
    where = {"device": device, "commit": "0123456789abcdef"}
    return {
        "bench": bench, "case": "a case", "variant": variant, "status": status, "reason": reason, **times,
        "environment": where,
    }  # fmt: skip


def write(path, *figures):
    path.write_text("".join(json.dumps(f) + "\n" for f in figures))
    return str(path)


def test_compare_marks_what_lies_beyond_the_spread_and_names_the_lone(tmp_path, capsys):
    skipped = {"status": "skipped", "reason": "no GPU"}
    a = write(
        tmp_path / "a.jsonl",
        {"bench": "ceilings", "ceilings": {}}, {"bench": "conformance", "case": "turns", "status": "ok"},
        figure("again", 1, 1, 1), figure("again", 9, 10, 11), figure("slower", 9, 10, 11), figure("faster", 9, 10, 11),
        figure("touching", 9, 10, 11), figure("below", 9, 10, 11), figure("went", 9, 10, 11),
        figure("stopped", 9, 10, 11),
        figure("never", None, None, None, **skipped),
    )  # fmt: skip
    b = write(
        tmp_path / "b.jsonl",
        figure("again", 9, 10, 11), figure("slower", 12, 15, 16), figure("faster", 7, 8, 8.9),
        figure("touching", 11, 12, 13), figure("below", 7, 8, 9),
        figure("stopped", None, None, None, status="wrong", reason="error 0.1"),
        figure("never", None, None, None, **skipped), figure("came", 1, 2, 3),
    )  # fmt: skip
    assert main(["bench", "compare", a, b]) == 0
    printed = capsys.readouterr().out
    assert f"A: {a}, commit 0123456789ab\nB: {b}, commit 0123456789ab\nH200\n" in printed
    assert row(printed, "again") == ["again", "10.0", "10.0", "1.00"]
    assert row(printed, "slower") == ["slower", "10.0", "15.0", "1.50", "slower"]
    assert row(printed, "faster") == ["faster", "10.0", "8.0", "0.80", "faster"]
    assert row(printed, "touching") == ["touching", "10.0", "12.0", "1.20"]
    assert row(printed, "below") == ["below", "10.0", "8.0", "0.80"]
    assert printed.splitlines()[-4:] == [
        "timed in A only: op, a case, went: no such line in the other",
        "timed in A only: op, a case, stopped: wrong in the other: error 0.1",
        "timed in B only: op, a case, came: no such line in the other",
        "timed in neither: 1",
    ]


def test_compare_reads_documents_and_lines(tmp_path, capsys):
    figures = [figure("same", 9, 10, 11), figure("slow", 9, 10, 11)]
    lines = write(tmp_path / "a.jsonl", *figures)
    one = write(tmp_path / "one.jsonl", figures[0])  # a line that is a document by itself, too
    (tmp_path / "b.json").write_text(json.dumps({"command": "bench op", "figures": figures}, indent=2))
    document = str(tmp_path / "b.json")
    for a, b in ((lines, document), (document, lines), (document, document), (one, document)):
        assert main(["bench", "compare", a, b]) == 0
        assert row(capsys.readouterr().out, "same") == ["same", "10.0", "10.0", "1.00"]


def test_compare_as_json(tmp_path, capsys):
    a = write(tmp_path / "a.jsonl", figure("same", 9, 10, 11), figure("slow", 9, 10, 11), figure("went", 9, 10, 11))
    skipped = figure("never", None, None, None, status="skipped", reason="no GPU")
    b = write(tmp_path / "b.jsonl", figure("same", 9, 10, 11), figure("slow", 12, 15, 16), skipped)
    assert main(["bench", "compare", a, b, "--json", "-"]) == 0
    printed = capsys.readouterr()
    assert "beyond 20/80" in printed.err and "timed in neither: 1" in printed.err
    key = {"bench": "op", "case": "a case"}
    commits = ["0123456789ab"]
    assert json.loads(printed.out) == {
        "command": "bench compare", "devices": ["H200"],
        "a": {"path": a, "commits": commits}, "b": {"path": b, "commits": commits},
        "timed_in_both": [
            {**key, "variant": "same", "us_a": 10, "us_b": 10, "b_over_a": 1, "beyond_20_80": None},
            {**key, "variant": "slow", "us_a": 10, "us_b": 15, "b_over_a": 1.5, "beyond_20_80": "slower"},
        ],
        "timed_in_one": [{**key, "variant": "went", "in": "a", "why": "no such line in the other"}],
        "timed_in_neither": 1,
    }  # fmt: skip
    assert main(["bench", "compare", a, b, "--json", str(tmp_path / "c.json")]) == 0
    assert json.loads((tmp_path / "c.json").read_text()) == json.loads(printed.out)
    assert "beyond 20/80" in capsys.readouterr().out


def test_compare_refuses_other_devices_unless_told(tmp_path, capsys):
    a = write(tmp_path / "a.jsonl", figure("x", 1, 2, 3))
    b = write(tmp_path / "b.jsonl", figure("x", 1, 2, 3, device="H100"))
    assert main(["bench", "compare", a, b]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err == "worldkv bench: the figures come from different devices: H100, H200; --any compares them\n"
    assert main(["bench", "compare", a, b, "--any"]) == 0
    assert "H100, H200\n" in capsys.readouterr().out


NO_FIGURE = "not a figure that --json or --jsonl wrote"


@pytest.mark.parametrize(
    "text, said",
    [
        ("", "b.jsonl holds no figures"),
        ('{"bench": "ceilings"}\n', "b.jsonl holds no figures"),
        ('{"figures": []}', "b.jsonl holds no figures"),
        ("\nnonsense\n", f"b.jsonl, line 2: {NO_FIGURE}"),
        ("[1, 2]\n", f"b.jsonl, line 1: {NO_FIGURE}"),
        ("[" * 100_000, f"b.jsonl, line 1: {NO_FIGURE}"),
        ('{"bench": "op", "case": "c", "variant": "v"}\n', f"b.jsonl, line 1: {NO_FIGURE}"),
        ('{"bench": "op", "case": "c", "variant": []}\n', f"b.jsonl, line 1: {NO_FIGURE}"),
        (json.dumps(figure("x", 1, None, 3)), f"b.jsonl, line 1: {NO_FIGURE}"),
        (json.dumps(figure("x", 1, 0, 3)), f"b.jsonl, line 1: {NO_FIGURE}"),
        (json.dumps({"figures": [figure("x", 1, 2, 3), figure("x", 1, 0, 3)]}), f"b.jsonl, figure 2: {NO_FIGURE}"),
    ],
)
def test_compare_refuses_what_is_no_result_file(tmp_path, capsys, text, said):
    a = write(tmp_path / "a.jsonl", figure("x", 1, 2, 3))
    (tmp_path / "b.jsonl").write_text(text)
    assert main(["bench", "compare", a, str(tmp_path / "b.jsonl")]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and len(printed.err.splitlines()) == 1
    assert said in printed.err


# What is refused.


SHAPE = ["segment_attention", "--device", "cpu", "--shape"]
APPEND_SHAPE = ["norm_rope_append", "--device", "cpu", "--shape"]
APPEND = ["norm_rope_append", *QUICK]
ROLLOUT = ["rollout", *QUICK]


@pytest.mark.parametrize(
    "arguments, said",
    [
        ([], "BENCH"),
        (["nothing"], "invalid choice: 'nothing'"),
        (["norm_rope_append", "--device", "cpu"], "the full cases need a GPU; --small runs on a CPU"),
        (["norm_rope_append", "--small", "--device", "nowhere"], "--device must be cpu or cuda:N, got 'nowhere'"),
        (["norm_rope_append", "--small", "--device", "meta"], "--device must be cpu or cuda:N, got 'meta'"),
        (
            ["norm_rope_append", "--small", "--device", "cpu:x"],
            "--device must be a device of this machine, got 'cpu:x'",
        ),
        ([*APPEND, "--seconds", "0"], "--seconds must be above 0 and at most 3600, got 0.0"),
        ([*APPEND, "--seconds", "nan"], "--seconds must be above 0 and at most 3600, got nan"),
        ([*APPEND, "--seconds", "1e300"], "--seconds must be above 0 and at most 3600, got 1e+300"),
        ([*APPEND, "--seconds", "long"], "invalid float value: 'long'"),
        ([*APPEND, "--json", "."], "--json must be a file that can be written, got '.': Is a directory"),
        ([*APPEND, "--json", "new/x"], "--json must be a file that can be written, got 'new/x': No such file"),
        ([*APPEND, "--jsonl", "new/x"], "--jsonl must be a file that can be written, got 'new/x': No such file"),
        ([*APPEND, "--jsonl", "-"], "--jsonl must be a file, got '-'"),
        ([*APPEND, "--csv", "new/x"], "--csv must be a file that can be written, got 'new/x': No such file"),
        ([*APPEND, "--trace", "new/x"], "--trace must be a file that can be written, got 'new/x': No such"),
        ([*APPEND, "--json", "x", "--csv", "./x"], "--csv must be another file than --json, got './x' for both"),
        ([*APPEND, "--plot", "a-file"], "--plot must be a folder that can be written, got 'a-file': File exists"),
        ([*APPEND, "--plot", "a-file/x"], "--plot must be a folder that can be written, got 'a-file/x': Not a dir"),
        ([*APPEND_SHAPE, "heads=1,grid=1x1x1", "--small"], "--shape must go without --small and --core"),
        ([*APPEND, "--case", "("], "--case must be a regular expression, got '(': missing ), unterminated subpattern"),
        ([*APPEND, "--case", "none"], '--case must be found in one of: "30 tokens x 2 x 128, float32", '),
        (
            [*APPEND, "--only", "eager,sdpa"],
            "--only must be of ours, reference, eager, compiled, compiled slice; got 's",
        ),
        ([*APPEND, "--only", ""], "--only must be of ours, reference, eager, compiled, compiled slice; got ''"),
        ([*ROLLOUT, "--layers", "99999999999"], "--layers: 99999999999 layers of small_world must fit the"),
        ([*ROLLOUT, "--layers", "0"], "--layers must be at least 1, got 0"),
        ([*ROLLOUT, "--chunks", "99999999999"], "--chunks must be at most 340, which the published code's rotations n"),
        ([*SHAPE, "heads=2,q=1,window=1x1,heads=3"], "--shape: heads must be given once, got '2' and '3'"),
        (
            [*SHAPE, "heads=2,q=1,window=1x1,batch=2"],
            "--shape must be KEY=VALUE,... with the keys heads, kv_heads, q, ",
        ),
        ([*SHAPE, ""], "--shape must be KEY=VALUE,... with the keys heads, kv_heads, q, "),
        ([*SHAPE, "heads=2,window=1x1"], "--shape: q must be given, got 'heads=2,window=1x1'"),
        ([*SHAPE, "heads=0,q=1,window=1x1"], "--shape: heads must be an integer from 1 to 128, got '0'"),
        ([*SHAPE, "heads=2,q=1e3,window=1x1"], "--shape: q must be an integer from 1 to 2147483647, got '1e3'"),
        (
            [*SHAPE, f"heads=2,q={'9' * 5000},window=1x1"],
            "--shape: q must be an integer from 1 to 2147483647, got '999",
        ),
        (
            [*SHAPE, "heads=2,q=1,window=1x1+x"],
            "--shape: window must be rows x number of segments, such as 3600x1+1800x6",
        ),
        ([*SHAPE, "heads=2,q=1,window=1x1,head_dim=96"], "--shape: head_dim must be 64 or 128, got '96'"),
        (
            [*SHAPE, "heads=2,q=1,window=1x1,dtype=fp8"],
            "--shape: dtype must be float16 or bfloat16 or float32, got 'fp8'",
        ),
        (
            [*SHAPE, "heads=24,kv_heads=7,q=1,window=1x1"],
            "--shape: kv_heads must be a divisor of heads=24, got 7",
        ),
        ([*SHAPE, "heads=24,q=1,window=1x2147483647"], "--shape 24 heads, 1 queries, 2147483647 keys, window 1x214748"),
        ([*SHAPE, "heads=1,q=2147483647,window=1x1"], " GiB that are free on cpu, got "),
        (
            [*APPEND_SHAPE, "heads=2,grid=3x0x2"],
            "--shape: grid must be frames x hei",
        ),
        (
            [*APPEND_SHAPE, "heads=2,grid=999999x9999x9"],
            " that are free on cpu, got ",
        ),
        (
            [*APPEND_SHAPE, "heads=128,grid=997x1024x1024"],
            " that are free on cpu, got ",
        ),
        (
            ["compress_chunk", "--device", "cpu", "--shape", "heads=2,frame_tokens=9,frames=1"],
            "frames must be at least 2",
        ),
        (
            ["compress_chunk", "--device", "cpu", "--shape", "heads=2,frame_tokens=9,keep_ratio=nan"],
            "keep_ratio must be a",
        ),
        (["compress_chunk", "--device", "cpu", "--shape", "heads=2,frame_tokens=2147483647"], "are free on cpu, got "),
        (["segment_attention", *QUICK, "--rival", "sdpa"], "--rival must be module:function, got 'sdpa'"),
        (
            ["segment_attention", *QUICK, "--rival", "no.such:f"],
            "--rival no.such:f: ModuleNotFoundError: No module name",
        ),
        (["segment_attention", *QUICK, "--rival", "math:flash"], "got 'math:flash': math has no function flash"),
        (["segment_attention", *QUICK, "--rival", "math:pi"], "got 'math:pi': math has no function pi"),
        *[
            (
                [name, *QUICK, "--shape", "heads=2,q=1,window=1x1"],
                "--shape must go with one of segment_attention, norm_rope_append, compress_chunk, quantize_chunk, "
                f"participation, got bench {name}",
            )
            for name in ("all", "chunk")
        ],
        (
            ["compare", "absent.jsonl", "a-file"],
            "compare: A must be a file that can be read, got 'absent.jsonl': No such",
        ),
        (["compare", "a-file", "."], "a-file holds no figures"),
        (["compare", "a-file"], "required: B"),
    ],
)
def test_bad_arguments_are_one_line(arguments, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("a-file").write_text("")
    try:
        status = main(["bench", *arguments])
    except SystemExit as left:
        status = left.code
    printed = capsys.readouterr()
    assert status == 2
    assert printed.out == "" and len(printed.err.splitlines()) == 1
    assert said in printed.err
    assert list(tmp_path.iterdir()) == [tmp_path / "a-file"]


@pytest.mark.parametrize("name, takes", [("all", "about a minute"), ("norm_rope_append", "half a minute at most")])
def test_help_says_how_long_the_small_cases_take(name, takes, capsys):
    with pytest.raises(SystemExit):
        main(["bench", name, "--help"])
    assert f"small cases, for a CPU; it takes {takes}" in " ".join(capsys.readouterr().out.split())


def test_without_matplotlib_the_extra_is_named_before_anything_runs(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    files = ["--jsonl", str(tmp_path / "out.jsonl"), "--plot", str(tmp_path / "plots")]
    assert main(["bench", "norm_rope_append", *QUICK, *files]) == 2
    assert capsys.readouterr().err == "worldkv bench: plots need matplotlib: pip install 'worldkv-kernels[bench]'\n"
    assert list(tmp_path.iterdir()) == []


# Installed elsewhere.


def test_it_runs_from_an_installed_package(tmp_path):
    installed = tmp_path / "site" / "worldkv_kernels"
    for source, target in (("worldkv_kernels", "."), ("kernels", "kernels"), ("benchmarks", "benchmarks")):
        ignored = shutil.ignore_patterns("__pycache__", "*.so", "results")
        shutil.copytree(ROOT / source, installed / target, ignore=ignored, dirs_exist_ok=True)
    (tmp_path / "here").mkdir()
    done = subprocess.run(
        [sys.executable, "-m", "worldkv_kernels", "bench", "compress_chunk", *QUICK, "--jsonl", "out.jsonl"],
        cwd=tmp_path / "here", env={**os.environ, "PYTHONPATH": str(tmp_path / "site"), "WORLDKV_COMMIT": "abc"},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in (tmp_path / "here" / "out.jsonl").read_text().splitlines()]
    assert {line["status"] for line in lines} == {"timed"}
    assert {line["environment"]["commit"] for line in lines} == {"abc"}


def test_another_module_called_common_is_named(monkeypatch, tmp_path, capsys):
    (tmp_path / "other.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    import other

    monkeypatch.setitem(sys.modules, "common", other)
    assert main(["bench", "norm_rope_append", *QUICK]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"worldkv bench: the benchmarks need the module name 'common', which {other.__file__}")
