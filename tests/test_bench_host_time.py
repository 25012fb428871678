"""The benches of a memory's bookkeeping: what they put through it, what they write, and that a long session is flat."""

import itertools
import json
import statistics
import sys
from pathlib import Path

import numpy as np
import pytest

from worldkv_kernels import WorldMemory
from worldkv_kernels.memory.kept import KeptPoses
from worldkv_kernels.memory.retrieval import ActionRetrieval, ContentRetrieval, FovRetrieval


@pytest.fixture
def bench(load):
    return load("bench_host_time")


@pytest.fixture
def long(load):
    return load("bench_long_session")


def command(module, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["bench", *map(str, arguments)])
    return module.main()


class Here:
    """Stands for a pool of processes: a test is process enough."""

    def __init__(self, *_, **options):
        assert options["max_tasks_per_child"] == 1

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def submit(self, function, *arguments):
        self.result = lambda: function(*arguments)
        return self


# --- begin_chunk and end_chunk, by what is banked ---


def test_there_is_a_line_for_each_memory_and_size(bench, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(bench, "ProcessPoolExecutor", Here)
    monkeypatch.setattr(bench.os, "environ", {})
    path = tmp_path / "host.jsonl"
    assert command(bench, monkeypatch, "--only", "pose,fov", "--chunks", "14,10", "--jsonl", path) == 0
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    variants = [
        retrieval + extra for retrieval in ("pose", "fov") for extra in ("", ", diversity 0.5", ", standing still")
    ]
    cases = [f"a {kind}, {size} chunks" for kind in ("bank that fills", "full bank") for size in (10, 14)]
    assert [(line["variant"], line["case"]) for line in lines] == list(itertools.product(variants, cases))
    for line in lines:
        assert (line["bench"], line["bank"]) == ("host_time", "host") and line["full"] == ("full" in line["case"])
        assert line["chunks"] == int(line["case"].split()[-2])
        # A bank that fills is timed from the start where that is nearer than the number of timed chunks.
        assert line["rounds"] == (bench.TIMED if line["full"] else min(bench.TIMED, line["chunks"] + 3))
        for name in ("begin", "end", "both", "processor"):
            assert 0 < line[f"{name}_us_20"] <= line[f"{name}_us"] <= line[f"{name}_us_80"]
        assert line["both_us_80"] > max(line["begin_us_20"], line["end_us_20"])
        assert isinstance(line["rss_bytes"], int) and line["environment"]["device"].startswith("cpu")
    printed = capsys.readouterr().out
    assert command(bench, monkeypatch, "--table", path) == 0
    assert capsys.readouterr().out == printed
    assert all(printed.count(f"{case}, bank='host'\n") == 1 for case in cases)
    row = next(row for row in printed.splitlines() if row.startswith("pose, standing still"))
    first = lines[variants.index("pose, standing still") * 4]
    names = ("begin_us", "end_us", "both_us", "both_us_80", "processor_us")
    assert row.split()[-6:-1] == [f"{first[name] / 1e3:.2f}" for name in names]


def test_a_file_of_earlier_lines_still_has_its_table(bench):
    results = Path(bench.__file__).parent / "results"
    lines = bench.measured_in(results / "cpu-20261127-host-time.jsonl")
    assert bench.report(lines).count("\n") > len(lines)


def test_a_full_bank_gives_up_a_chunk_in_every_round(bench, monkeypatch):
    dropped, right = [], KeptPoses.drop
    monkeypatch.setattr(KeptPoses, "drop", lambda kept, *held: dropped.append(kept._count) or right(kept, *held))
    session = bench.Session("pose", 0.0, False, "host", True, (12,))
    assert [(times.size, len(times.end)) for times in bench.go_through(session)] == [(12, bench.TIMED)]
    assert dropped == [13] * bench.TIMED


def test_a_memory_is_asked_as_its_session_says(bench):
    config = bench.memory_of(bench.Session("fov", 0.5, False, "device", True, (12,))).config
    assert (config.bank, config.bank_chunks) == ("device", 12)
    assert type(config.retrieval) is FovRetrieval and config.retrieval.diversity == 0.5
    config = bench.memory_of(bench.Session("content", 0.5, False, "host", False, (12,))).config
    assert type(config.retrieval) is ContentRetrieval and config.retrieval.diversity == 0.5
    config = bench.memory_of(bench.Session("action", 0.0, False, "host", False, (12, 14))).config
    assert config.bank == "host" and config.bank_chunks >= 1000 and type(config.retrieval) is ActionRetrieval


def test_a_walk_goes_and_turns_and_a_camera_that_stands_does_neither(bench):
    walked = np.concatenate([of["poses"] for of in itertools.islice(bench.cameras_of("pose", False), 200)])
    assert walked.shape == (200, 4, 4)
    steps = np.linalg.norm(np.diff(walked[:, :3, 3], axis=0), axis=1)
    assert 0.2 < np.mean(steps > 0.5) < 0.95 and steps.max() <= 1.0 + 1e-9
    assert 10 < len(np.unique(np.round(walked[:, 0, 0], 6))) < 100
    stood = np.concatenate([of["poses"] for of in itertools.islice(bench.cameras_of("fov", True), 20)])
    assert np.array_equal(stood, np.tile(np.eye(4), (20, 1, 1)))
    contents = [[of["content"] for of in itertools.islice(bench.cameras_of("content", s), 3)] for s in (False, True)]
    assert all(content.shape == (3, 5120) for content in contents[0])
    assert [len({content.tobytes() for content in some}) for some in contents] == [3, 1]
    actions = [of["actions"] for of in itertools.islice(bench.cameras_of("action", False), 3)]
    assert [len(rows.keyboard) for rows in actions] == [1, 4, 4]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--chunks", "5"], "argument --chunks: must be numbers from 10 to 1000, got 5"),
        (["--only", "poses"], "argument --only: must be of pose, action, fov and content, got poses"),
    ],
)
def test_bad_arguments_are_refused(bench, monkeypatch, capsys, arguments, message):
    with pytest.raises(SystemExit) as stopped:
        command(bench, monkeypatch, *arguments)
    assert stopped.value.code == 2 and message in capsys.readouterr().err


# --- a long session ---


def test_there_is_a_line_for_each_tenth_of_a_session(long, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(long, "ProcessPoolExecutor", Here)
    monkeypatch.setattr(long.os, "environ", {})
    path = tmp_path / "long.jsonl"
    arguments = ["--only", "fov", "--chunks", "60", "--bank-chunks", "20", "--jsonl", path]
    assert command(long, monkeypatch, *arguments) == 0
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(line["bank"], line["chunks"]) for line in lines] == [
        (bank, chunks) for bank in ("device", "host") for chunks in range(6, 61, 6)
    ]
    for line in lines:
        assert (line["bench"], line["variant"], line["rounds"], line["rope"]) == ("long_session", "fov", 6, None)
        assert line["chunks_banked"] == min(20, line["chunks"] - 3)
        assert line["chunks_dropped"] == max(0, line["chunks"] - 23)
        assert 0 < line["ms_20"] <= line["ms"] <= line["ms_80"] and 0 < line["cpu_ms"] <= line["cpu_ms_80"]
        assert line["rss_mib"] > 10 and line["python_blocks"] > 10_000
    printed = capsys.readouterr().out
    assert command(long, monkeypatch, "--table", path) == 0
    assert capsys.readouterr().out == printed


def test_a_session_may_have_a_rope(long):
    parts = list(long.go_through(long.Session("pose", "device", 40, 10, "wan")))
    assert [part.end for part in parts] == list(range(4, 41, 4))
    assert long.memory_of(long.Session("pose", "device", 40, 10, "wan")).config.rebase_time


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--only", "poses"], "argument --only: must be of action, fov, pose, got poses"),
        (["--bank", "disk"], "argument --bank: must be of device, host, got disk"),
        (["--chunks", "9"], "argument --chunks: must be at least 10, got 9"),
        (["--bank-chunks", "5"], "argument --bank-chunks: must be at least 6, got 5"),
    ],
)
def test_a_long_session_refuses_bad_arguments(long, monkeypatch, capsys, arguments, message):
    with pytest.raises(SystemExit) as stopped:
        command(long, monkeypatch, *arguments)
    assert stopped.value.code == 2 and message in capsys.readouterr().err


def check_flat(long, session, mib):
    """From the third tenth on a chunk keeps no block of Python's, whatever is cached at first, and a session no more
    pages than `mib`; nor does a chunk take longer."""
    parts = [
        (part.end, part.rss / 2**20, part.blocks, statistics.median(part.cpu_seconds), part.stats["chunks_banked"])
        for part in long.go_through(session)
    ][2:]
    ends, rss, blocks, seconds, banked = zip(*parts, strict=True)
    assert set(banked) == {session.bank_chunks}
    assert blocks[-1] - blocks[0] < (ends[-1] - ends[0]) / 4, f"blocks {blocks}"
    assert rss[-1] - rss[0] < mib, f"rss {rss}"
    assert statistics.median(seconds[-3:]) < 1.5 * statistics.median(seconds[:3]), f"seconds {seconds}"


@pytest.mark.parametrize("retrieval, bank", [("pose", "device"), ("fov", "host")])
def test_a_session_of_thousands_of_chunks_is_flat(long, retrieval, bank):
    check_flat(long, long.Session(retrieval, bank, 2000, 40), mib=1.0)


@pytest.mark.slow
@pytest.mark.parametrize("bank", ["device", "host"])
@pytest.mark.parametrize("retrieval", ["pose", "action", "fov"])
def test_a_session_of_a_hundred_thousand_chunks_is_flat(long, retrieval, bank):
    check_flat(long, long.Session(retrieval, bank, 100_000, 300), mib=4.0)


@pytest.mark.slow
@pytest.mark.parametrize("leak", ["blocks", "rss", "seconds"])
def test_a_session_that_grows_is_seen(long, monkeypatch, leak):
    """One object a chunk; 64 KiB a chunk, all of them in one object; in each chunk a walk through all of them."""
    kept, buffer, right = [], bytearray(), WorldMemory.end_chunk

    def end_chunk(memory):
        right(memory)
        if leak == "blocks":
            kept.append(object())
        elif leak == "rss":
            buffer.extend(bytes(2**16))  # more than other tests may have left free in this process
        else:
            sum(range(memory.stats()["chunks"] ** 2 // 10))

    monkeypatch.setattr(WorldMemory, "end_chunk", end_chunk)
    with pytest.raises(AssertionError, match=leak):
        check_flat(long, long.Session("pose", "device", 2000, 40), mib=1.0)
