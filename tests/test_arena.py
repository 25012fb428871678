"""Host memory of the bank, page-locked, and the streams that copy from it."""

from __future__ import annotations

import math
import os
import warnings

import pytest
import torch

import worldkv_kernels.memory.arena as arena_module
import worldkv_kernels.memory.streams as streams_module
from worldkv_kernels.memory.arena import Arena, node_cpus
from worldkv_kernels.memory.streams import COMPUTE, LOAD, SAVE, CopyEngine

# --- host memory ---

SHAPE = (2, 3, 2, 5, 1, 64)


def arena_on_gpu(monkeypatch, refusal: str | None) -> tuple[Arena, list]:
    calls: list[tuple] = []
    monkeypatch.setattr(arena_module, "page_lock", lambda *given: (calls.append(("lock", *given)), refusal)[1])
    monkeypatch.setattr(arena_module, "_page_unlock", lambda *given: calls.append(("unlock", *given[1:])))
    return Arena(SHAPE, torch.bfloat16, torch.device("cuda", 0)), calls


def test_the_arena_is_locked_by_whole_pages_and_unlocked_once(monkeypatch):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        arena, calls = arena_on_gpu(monkeypatch, None)
    ((_, address, span, device),) = calls
    assert arena.pinned and arena.rows.shape == SHAPE and arena.rows.dtype == torch.bfloat16
    assert arena.bytes == math.prod(SHAPE) * 2
    page = os.sysconf("SC_PAGE_SIZE")
    assert address == arena.rows.data_ptr() and address % page == span % page == 0
    assert arena.bytes <= span < arena.bytes + page
    storage = arena.rows.untyped_storage()
    assert storage.data_ptr() <= address and address + span <= storage.data_ptr() + storage.nbytes()
    del arena
    assert calls[1:] == [("unlock", address, device, os.getpid())]


def test_pinned_memory_refused(monkeypatch):
    with pytest.warns(RuntimeWarning, match=r"must be page-locked .* got pageable memory \(no more\)") as warned:
        arena, calls = arena_on_gpu(monkeypatch, "no more")
    assert len(warned) == 1 and not arena.pinned
    arena.rows.fill_(1)
    del arena
    assert len(calls) == 1  # nothing to unlock


def test_page_lock_says_why_not_and_never_raises():
    if torch.cuda.is_available():
        pytest.skip("needs a machine without a GPU")
    memory = torch.empty(4096, dtype=torch.uint8)
    assert isinstance(arena_module.page_lock(memory.data_ptr(), 4096, torch.device("cuda", 0)), str)


def test_cpus_of_a_numa_node(tmp_path):
    mine = sorted(os.sched_getaffinity(0))
    gpu, node = tmp_path / "bus/pci/devices/0000:3b:00.0", tmp_path / "devices/system/node/node1"
    assert node_cpus("0000:3b:00.0", tmp_path) == set()
    gpu.mkdir(parents=True)
    (gpu / "numa_node").write_text("-1\n")
    assert node_cpus("0000:3b:00.0", tmp_path) == set()
    (gpu / "numa_node").write_text("1\n")
    node.mkdir(parents=True)
    (node / "cpulist").write_text(f"{mine[0]},5000-5003\n")
    assert node_cpus("0000:3b:00.0", tmp_path) == {mine[0]}
    (node / "cpulist").write_text("0-4095\n")
    assert node_cpus("0000:3b:00.0", tmp_path) == set(mine)
    (node / "cpulist").write_text("\n")  # a node of memory alone
    assert node_cpus("0000:3b:00.0", tmp_path) == set()


# --- the streams ---


class Recorder:
    """Stands for torch.cuda's streams and events; `log` is what was done to which stream."""

    def __init__(self, monkeypatch) -> None:
        self.log: list[tuple] = []
        self.current = self.compute = object()
        recorder = self

        class Stream:
            def __init__(self, device):
                self.device = device

        class Event:
            def record(self, stream):
                recorder.log.append(("record", self, stream))

            def wait(self, stream):
                recorder.log.append(("wait", self, stream))

        class Current:
            def __init__(self, stream):
                self.stream = stream

            def __enter__(self):
                recorder.current = self.stream

            def __exit__(self, *error):
                recorder.current = recorder.compute

        monkeypatch.setattr(streams_module.torch.cuda, "Stream", Stream)
        monkeypatch.setattr(streams_module.torch.cuda, "Event", Event)
        monkeypatch.setattr(streams_module.torch.cuda, "stream", Current)
        monkeypatch.setattr(streams_module.torch.cuda, "current_stream", lambda device: self.current)
        monkeypatch.setattr(streams_module.torch.cuda, "is_current_stream_capturing", lambda: True)


class Rows:
    """A tensor of which the engine may ask two things."""

    def __init__(self, log: Recorder) -> None:
        self.recorder, self.used = log, []

    def record_stream(self, stream):
        self.used.append(stream)

    def copy_(self, source, non_blocking):
        self.recorder.log.append(("copy", self, source, non_blocking, self.recorder.current))


def test_the_engine_on_a_gpu(monkeypatch):
    recorder = Recorder(monkeypatch)
    rows = Rows(recorder)
    engine = CopyEngine(torch.device("cuda", 0), rows)
    load, save = rows.used  # kept from torch's allocator for both
    event = engine.event()
    engine.record(event, COMPUTE)
    engine.wait(event, LOAD)
    engine.copy([(rows, "host"), (rows, "more")], LOAD)
    engine.copy([(rows, "back")], SAVE)
    engine.record(event, SAVE)
    engine.wait(event, COMPUTE)
    assert recorder.log == [
        ("record", event, recorder.compute), ("wait", event, load), ("copy", rows, "host", True, load),
        ("copy", rows, "more", True, load), ("copy", rows, "back", True, save), ("record", event, save),
        ("wait", event, recorder.compute),
    ]  # fmt: skip
    assert load is not save and engine.capturing()


def test_the_engine_on_a_cpu():
    engine = CopyEngine(torch.device("cpu"))
    target = torch.zeros(3)
    event = engine.event()
    engine.record(event, COMPUTE)
    engine.wait(event, LOAD)
    engine.copy([(target, torch.ones(3))], LOAD)
    assert event is None and target.sum() == 3 and not engine.capturing()
