"""Saving that is killed, breaks off or finds the disk full leaves the last good file; and what it takes in memory."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from saved_files import SIZES, same_state, walk

from worldkv_kernels import MemoryConfig, WorldMemory, saved

LINUX = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs Linux")


def states(count: int) -> list[WorldMemory]:
    """One memory at each of its chunks, of some MiB."""
    config = MemoryConfig(**{**SIZES, "grid": (16, 24), "num_layers": 2, "bank_chunks": 4, "keep_ratio": 1.0})
    found = [WorldMemory(config, dtype=torch.float32)]
    walk(found[0], 4)
    for _ in range(count - 1):
        found.append(found[-1].fork())
        walk(found[-1], 1)
    return found


# --- killed ---


@LINUX
@pytest.mark.parametrize("tries", [12, pytest.param(200, marks=pytest.mark.slow)])
def test_killed_while_saving(tries, tmp_path):
    """The file is always one of those that were saved, whole; what is left beside it, the next save writes over."""
    memories, file, beside = states(4), tmp_path / "walk.worldkv", tmp_path / "walk.worldkv.unfinished"
    start = time.perf_counter()
    memories[0].save(file)
    duration = time.perf_counter() - start
    chance, left, changed, last = random.Random(0), 0, 0, memories[0]
    for tried in range(tries + 200):
        if tried >= tries and left and changed:  # some were killed inside a save, others after one
            break
        child = os.fork()
        if not child:
            try:
                number = 0
                while True:
                    memories[number % len(memories)].save(file)
                    number += 1
            finally:
                os._exit(1)
        time.sleep(chance.uniform(0, max(3, tried) * duration))  # longer and longer, for a machine that is busy
        os.kill(child, signal.SIGKILL)
        assert os.waitpid(child, 0)[1] == signal.SIGKILL
        loaded = WorldMemory.load(file)
        now = next(memory for memory in memories if same_state(memory, loaded))
        changed, last = changed + (now is not last), now
        left += beside.exists()
        assert set(tmp_path.iterdir()) <= {file, beside}
        if beside.exists() and chance.random() < 0.3:
            memories[1].save(file)
            last = memories[1]
            assert same_state(WorldMemory.load(file), last) and list(tmp_path.iterdir()) == [file]
    assert left and changed


# --- broken off ---


@pytest.fixture
def good(tmp_path):
    """Two memories, the first of which is saved."""
    memories = states(2)
    memories[0].save(tmp_path / "walk.worldkv")
    return memories


def check_the_old_file_stands(memory, tmp_path):
    file = tmp_path / "walk.worldkv"
    assert list(tmp_path.iterdir()) == [file]
    assert same_state(WorldMemory.load(file), memory)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device"), MemoryError()])
@pytest.mark.parametrize("part", [0, 1, 5, -1])
def test_an_exception_inside_leaves_the_old_file_alone(error, part, good, tmp_path, monkeypatch):
    old, new = good
    parts, raw = [], saved.raw
    monkeypatch.setattr(saved, "raw", lambda tensor: parts.append(1) or raw(tensor))
    new.save(tmp_path / "count")
    (tmp_path / "count").unlink()
    breaks = len(parts) + part if part < 0 else part
    parts.clear()

    def breaks_off(tensor):
        parts.append(1)
        if len(parts) > breaks:
            raise error
        return raw(tensor)

    monkeypatch.setattr(saved, "raw", breaks_off)
    with pytest.raises(type(error)):
        new.save(tmp_path / "walk.worldkv")
    monkeypatch.undo()  # loading reads by it too
    check_the_old_file_stands(old, tmp_path)


@LINUX
@pytest.mark.parametrize("chunks", [0, 4])  # a file of one buffer, which is written as it is closed, and of many
def test_a_full_disk_leaves_the_old_file_alone(chunks, good, tmp_path):
    new = WorldMemory(good[0].config, dtype=torch.float32)
    walk(new, chunks)
    (tmp_path / "walk.worldkv.unfinished").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left on device"):
        new.save(tmp_path / "walk.worldkv")
    check_the_old_file_stands(good[0], tmp_path)


@pytest.mark.parametrize("name", ["fsync", "replace"])
def test_a_disk_that_fails_at_the_end_leaves_the_old_file_alone(name, good, tmp_path, monkeypatch):
    def fails(*args):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os if name == "fsync" else Path, name, fails)
    with pytest.raises(OSError, match="Input/output error"):
        good[1].save(tmp_path / "walk.worldkv")
    check_the_old_file_stands(good[0], tmp_path)


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written_to(good, tmp_path):
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(PermissionError):
            good[1].save(tmp_path / "walk.worldkv")
    finally:
        tmp_path.chmod(0o700)
    check_the_old_file_stands(good[0], tmp_path)


def test_what_a_folder_lacks(good, tmp_path):
    with pytest.raises(FileNotFoundError):
        good[1].save(tmp_path / "none" / "walk.worldkv")
    (tmp_path / "sub").mkdir()
    with pytest.raises(ValueError, match=r"WorldMemory.save: path must be a file's, got the folder"):
        good[1].save(tmp_path / "sub")
    assert not list((tmp_path / "sub").iterdir())


# --- memory on top ---

# The peak is that of the process alone (VmHWM): getrusage's begins with that of the process that started it.
SCRIPT = """
import sys
import torch
from worldkv_kernels import MemoryConfig, WorldMemory

def resident(name):
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith(name + ":")) / 1024

what, file, mebibytes, bank = *sys.argv[1:3], int(sys.argv[3]), sys.argv[4]
torch.set_num_threads(1)
places = mebibytes // 16  # a chunk, or a banked one, takes 16 MiB
if what == "save":
    of_mode = dict(mode="full") if bank == "none" else dict(bank=bank, recent_frames=0, sink_frames=0, keep_ratio=1.0)
    config = MemoryConfig(num_layers=8, num_heads=8, head_dim=128, grid=(16, 32), chunk_frames=1, rope=None,
                          bank_chunks=places, retrieved_chunks=1, **of_mode)
    memory = WorldMemory(config)
    memory._storage.pool.k.fill_(0.5), memory._storage.pool.v.fill_(0.25)
    for chunk in range(places):
        memory.begin_chunk(torch.eye(4)[None])
        memory.replayed()  # as if a graph had written the rows
        memory.end_chunk()
    before = resident("VmRSS"), resident("VmHWM")
    memory.save(file)
    kept = memory.stats()["kept_bytes"] / 2**20
else:
    torch.zeros(64).add_(1)
    before = resident("VmRSS"), resident("VmRSS")
    memory = WorldMemory.load(file)
    kept = memory.stats()["kept_bytes"] / 2**20
print(*before, resident("VmHWM"), kept, memory._storage.pool.bytes / 2**20)
"""


def peak_on_top(what: str, file: Path, mebibytes: int, bank: str) -> tuple[float, float]:
    """MiB that the peak is above what was there, and MiB of the chunks."""
    command = [sys.executable, "-c", SCRIPT, what, str(file), str(mebibytes), bank]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    _, before, peak, kept, _ = map(float, told.split())
    return peak - before, kept


@LINUX
@pytest.mark.parametrize(
    "mebibytes, bank, bound",
    [
        (256, "none", 64),
        (256, "host", 64),
        pytest.param(2048, "none", 200, marks=pytest.mark.slow),
        pytest.param(2048, "host", 200, marks=pytest.mark.slow),
    ],
)
def test_saving_and_loading_make_no_second_copy(mebibytes, bank, bound, tmp_path, record_property):
    file = tmp_path / "walk.worldkv"
    on_top, kept = peak_on_top("save", file, mebibytes, bank)
    assert kept == mebibytes and file.stat().st_size >= kept * 2**20
    assert on_top < bound
    loaded, kept_again = peak_on_top("load", file, mebibytes, bank)
    assert kept_again == kept <= loaded < kept + bound
    file.unlink()
    record_property("MiB on top", (on_top, loaded - kept))
    print(f"{kept:.0f} MiB, bank {bank}: {on_top:.1f} MiB on top to save, {loaded - kept:.1f} to load")
