"""What a machine has measured of itself: the file that keeps it, and what the automatic choice makes of it."""

import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from worldkv_kernels.ops import faster, proven, tuned
from worldkv_kernels.ops.backends import Backend, OpBackends
from worldkv_kernels.ops.faster import Faster
from worldkv_kernels.ops.tuned import Measurement

GPU, CPU = torch.device("cuda:0"), torch.device("cpu")
CARD = "NVIDIA L40S"
KIND = (torch.float32,)
FIXED = ["triton", "cuda", "sdpa", "reference"]


class Size(NamedTuple):
    heads: int
    keys: int
    has_mass: bool


@pytest.fixture
def here(monkeypatch, tmp_path):
    """An L40S that need not be there, torch 2.11 and triton 3.6, with nothing kept and no figure of the repository."""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 9))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: CARD)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(tuned, "versions", lambda: {"torch": "2.11.0+cu130", "triton": "3.6.0"})
    monkeypatch.setattr(faster, "FASTER", ())
    monkeypatch.setattr(proven, "is_proven", lambda op, device: True)
    faster.forget()
    yield
    monkeypatch.undo()
    faster.forget()


@pytest.fixture
def op(here):
    """An op with shapes, of which every backend is right."""
    runs = {name: lambda out: out.fill_(1.0) for name in FIXED}

    def small_case(device, kind):
        def call(run):
            out = torch.zeros(4)
            run(out)
            return {"out": out}

        return call

    backends = {name: Backend(lambda name=name: runs[name]) for name in ("cuda", "triton", "sdpa", "reference")}
    return OpBackends("some_op", backends, small_case, lambda kind: 1e-6, (KIND,), typical_shape=Size(8, 1000, False))


def spread(median, share=0.01):
    return {"us_20": median * (1 - share), "us": median, "us_80": median * (1 + share)}


def measured(keys=1024, *, heads=8, has_mass=False, share=0.01, **us):
    """Of a window that fills all but 24 of its keys; microseconds by backend."""
    times = {name: spread(median, share) for name, median in us.items()}
    size = {"heads": heads, "keys": keys, "has_mass": int(has_mass)}
    same = dict(torch="2.11.0+cu130", triton="3.6.0", driver="580.1", date="2026-11-27T01:02:03+00:00")
    return Measurement("some_op", size, keys - 24, "bfloat16", times, **same)


def keep(*measurements, card=CARD):
    tuned.record(card, measurements)
    faster.forget()


SDPA = dict(triton=200.0, cuda=150.0, sdpa=100.0)
TRITON = dict(triton=100.0, cuda=150.0, sdpa=200.0)


@pytest.mark.parametrize(
    ("kept", "shape", "order"),
    [
        ([measured(**SDPA)], Size(8, 1024, False), ["sdpa", "triton", "cuda", "reference"]),
        ([measured(**SDPA)], Size(8, 1000, False), ["sdpa", "triton", "cuda", "reference"]),  # what was attended to
        ([measured(**SDPA)], Size(8, 999, False), FIXED),
        ([measured(**SDPA)], Size(8, 1025, False), FIXED),
        ([measured(**SDPA)], Size(7, 1024, False), FIXED),
        ([measured(**SDPA)], Size(9, 1024, False), FIXED),
        ([measured(**SDPA)], Size(8, 1024, True), FIXED),
        ([measured(**SDPA, share=0.19)], Size(8, 1024, False), ["sdpa", "triton", "cuda", "reference"]),
        ([measured(**SDPA, share=0.21)], Size(8, 1024, False), ["cuda", "sdpa", "triton", "reference"]),
        ([measured(**SDPA, share=0.4)], Size(8, 1024, False), FIXED),
        ([measured(triton=100.0, cuda=100.5)], Size(8, 1024, False), FIXED),
        ([measured(sdpa=100.0, triton=200.0)], Size(8, 1024, False), ["sdpa", "triton", "cuda", "reference"]),
        # Between two of the same outcome, and not between others.
        ([measured(**SDPA), measured(9024, **SDPA)], Size(8, 5000, False), ["sdpa", "triton", "cuda", "reference"]),
        ([measured(**SDPA), measured(9024, **TRITON)], Size(8, 5000, False), FIXED),
        ([measured(**SDPA), measured(9024, **SDPA, heads=9)], Size(8, 5000, False), FIXED),
        ([measured(**SDPA), measured(5024, **TRITON), measured(9024, **SDPA)], Size(8, 7000, False), FIXED),
        ([measured(9024, **SDPA), measured(**SDPA, has_mass=True)], Size(8, 5000, False), FIXED),
        ([measured(**SDPA), measured(9024, triton=200.0, sdpa=100.0)], Size(8, 5000, False), FIXED),
        # Not of this installation, or this card.
        ([replace(measured(**SDPA), torch="2.11.1")], Size(8, 1024, False), ["sdpa", "triton", "cuda", "reference"]),
        ([replace(measured(**SDPA), torch="2.1.0")], Size(8, 1024, False), FIXED),
        ([replace(measured(**SDPA), triton="3.7.0")], Size(8, 1024, False), FIXED),
        ([replace(measured(**SDPA), triton=None)], Size(8, 1024, False), FIXED),
        ([replace(measured(**SDPA), op="other_op")], Size(8, 1024, False), FIXED),
    ],
)  # fmt: skip
def test_the_order_follows_what_was_measured_and_nothing_beyond(op, kept, shape, order):
    keep(*kept)
    assert op.order(GPU, shape) == order and op.name("auto", GPU, KIND, shape) == order[0]
    assert op.order(CPU, shape) == list(op.backends)


def listed(backend="cuda", on="sm_89", keys=(0, 9999)):
    """An entry as the repository has them."""
    return Faster("some_op", on, {"heads": (1, 99), "keys": keys, "has_mass": (0, 1)}, ("x.jsonl:1",), (backend,))


@pytest.mark.parametrize(
    ("us", "order", "by"),
    [
        (TRITON, ["triton", "cuda", "sdpa", "reference"], "tune, 2026-11-27"),
        (SDPA, ["sdpa", "cuda", "triton", "reference"], "tune, 2026-11-27"),
        (dict(triton=100.0, cuda=100.5, sdpa=100.2), ["cuda", "triton", "sdpa", "reference"],
         "benchmarks/results; none faster in tune, 2026-11-27"),
        (dict(triton=100.0, cuda=100.5, sdpa=200.0), ["cuda", "triton", "sdpa", "reference"], "tune, 2026-11-27"),
        # The kernel in CUDA was not there when this was measured: of it the repository has the word.
        (dict(triton=200.0, sdpa=100.0), ["cuda", "sdpa", "triton", "reference"], "benchmarks/results"),
    ],
)  # fmt: skip
def test_the_machine_goes_before_the_repository(op, monkeypatch, us, order, by):
    monkeypatch.setattr(faster, "FASTER", (listed(), listed("sdpa", on="sm_90")))
    faster.forget()
    shape = Size(8, 1024, False)
    assert op.order(GPU, shape) == FIXED[1::-1] + FIXED[2:] and op.evidence("cuda", GPU, shape) == "benchmarks/results"
    keep(measured(**us))
    assert op.order(GPU, shape) == order and op.evidence(order[0], GPU, shape) == by
    assert op.order(GPU, Size(8, 5000, False)) == FIXED[1::-1] + FIXED[2:]
    if us is TRITON:
        assert op.slower(GPU, shape) == "measured slower than triton on this machine"
    keep(measured(30_000, triton=100.0, cuda=100.5, sdpa=200.0))
    assert op.slower(GPU, Size(8, 30_000, False)) == "not measured faster than triton on sm_89"
    assert op.slower(GPU, Size(8, 20_000, False)) == "not measured faster than triton on sm_89"


def test_whose_evidence_it_is_is_said(op, monkeypatch):
    assert op.evidence("triton", GPU) == "fixed order"
    keep(measured(triton=100.0, cuda=100.5), replace(measured(2048, **SDPA), date="2026-11-28T01:02:03+00:00"),
         measured(4096, **SDPA))  # fmt: skip
    assert op.evidence("triton", GPU) == "fixed order; none faster in tune, 2026-11-27"
    assert op.evidence("sdpa", GPU, Size(8, 3000, False)) == "tune, 2026-11-27"  # of two, the older
    assert op.evidence("triton", GPU, Size(8, 3000, False)) == "fixed order"  # sdpa was passed over
    monkeypatch.setenv("WORLDKV_BACKEND", "triton")
    assert op.evidence("triton", GPU) == "WORLDKV_BACKEND"


def test_a_file_holds_cards_by_name(op, monkeypatch):
    """Two of one architecture, measured in two runs."""
    keep(measured(**SDPA), card="NVIDIA RTX 4090")
    assert op.name("auto", GPU, KIND, Size(8, 1024, False)) == "triton"
    keep(measured(**SDPA | {"cuda": 50.0}))
    assert op.name("auto", GPU, KIND, Size(8, 1024, False)) == "cuda"
    assert sorted(tuned.read()) == [CARD, "NVIDIA RTX 4090"]
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "NVIDIA RTX 4090")
    assert op.name("auto", GPU, KIND, Size(8, 1024, False)) == "sdpa"
    assert tuned.forget("NVIDIA RTX 4090") == 1 and tuned.forget("NVIDIA RTX 4090") == 0
    assert tuned.read() == {CARD: [measured(**SDPA | {"cuda": 50.0})]}


def test_a_shape_measured_again_takes_the_place_of_its_own(op):
    first, other = measured(**SDPA), measured(2048, **SDPA)
    again = replace(measured(**TRITON), date="2026-12-01T00:00:00+00:00", dtype="float16")
    of_another = replace(first, op="other_op")
    assert tuned.record(CARD, [first, other, of_another]) == tuned.user_file()
    tuned.record(CARD, [again, measured(**SDPA, has_mass=True)])
    assert tuned.read()[CARD] == [other, of_another, again, measured(**SDPA, has_mass=True)]


def test_what_is_chosen_is_chosen_anew_in_the_process_that_measures(op):
    def runs():
        return {name: op.choose("auto", GPU, KIND, Size(8, 1024, False)) is op.run(name) for name in ("triton", "sdpa")}

    op.loaded.update((name, lambda out, name=name: out.fill_(1.0)) for name in FIXED)
    assert runs() == {"triton": True, "sdpa": False}
    keep(measured(**SDPA))
    assert runs() == {"triton": False, "sdpa": True}
    keep(measured(**TRITON))
    assert runs() == {"triton": True, "sdpa": False}


def test_the_file_is_read_once_and_not_on_a_cpu(op, monkeypatch):
    keep(measured(**SDPA))
    read, reads = Path.read_text, []
    monkeypatch.setattr(Path, "read_text", lambda path, *x, **y: reads.append(path) or read(path, *x, **y))
    op.choose("auto", CPU, KIND, Size(8, 1024, False))
    assert reads == []
    for keys in range(900, 1100):
        op.choose("auto", GPU, KIND, Size(8, keys, False))
    assert reads == [tuned.user_file()] and len(op.chosen) == 3  # on the CPU, and on the GPU where it holds or not


def test_an_interrupted_write_leaves_the_old_file(op, monkeypatch):
    keep(measured(**SDPA))
    before = tuned.user_file().read_text()

    def interrupted(source, target):
        assert Path(source).parent == tuned.user_file().parent and json.loads(Path(source).read_text())["cards"]
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tuned.record(CARD, [measured(**TRITON)])
    assert list(tuned.user_file().parent.iterdir()) == [tuned.user_file()] and tuned.user_file().read_text() == before


def damaged(**changes):
    kept = json.loads(json.dumps({**vars(measured(**SDPA)), **changes}))
    return json.dumps({"cards": {CARD: [{name: value for name, value in kept.items() if value != "gone"}]}})


@pytest.mark.parametrize(
    "text",
    [
        "", "[]", "{}", '{"cards": []}', '{"cards": {"x": 9}}', '{"cards": {"x": [[]]}}', "[" * 10**5,
        damaged(shape="gone"), damaged(more=1), damaged(tokens="many"), damaged(us=[]), damaged(date=None),
        damaged(shape={"heads": 8}), damaged(shape={"keys": "1"}), damaged(us={"sdpa": {"us": 1.0}}),
        damaged(us={"sdpa": spread(-1.0)}), damaged(us={"sdpa": spread(float("nan"))}),
        damaged(us={"sdpa": dict.fromkeys(tuned.SPREAD, "9")}),
    ],
)  # fmt: skip
def test_a_damaged_file_is_told_with_its_path_and_left_as_it_is(op, text):
    tuned.user_file().parent.mkdir(parents=True)
    tuned.user_file().write_text(text)
    record, forget = (lambda: tuned.record(CARD, [measured(**SDPA)])), (lambda: tuned.forget(CARD))
    for use in (lambda: op.choose("auto", GPU, KIND), record, forget):
        with pytest.raises(ValueError, match=rf"faster: {tuned.user_file()} must hold what worldkv tune writes"):
            use()
    assert tuned.user_file().read_text() == text
    op.choose("auto", CPU, KIND)
    op.choose("triton", GPU, KIND)  # by name


def test_a_file_that_cannot_be_read_is_as_none_with_a_warning(op):
    tuned.user_file().mkdir(parents=True)
    with pytest.warns(UserWarning, match=f"what tune has kept on this machine is not used: .*{tuned.user_file()}"):
        assert op.order(GPU, Size(8, 1024, False)) == FIXED


def test_fields_of_another_version_hold_for_no_shape(op):
    sizes = {"heads": 8, "keys": 1024, "has_mass": 0}
    keep(
        replace(measured(**SDPA), shape={**sizes, "kv_heads": 8}),
        replace(measured(**SDPA), shape={"heads": 8, "keys": 1024}),
    )
    assert op.order(GPU, Size(8, 1024, False)) == FIXED
    keep(replace(measured(**SDPA), shape=sizes))
    assert op.order(GPU, Size(8, 1024, False))[0] == "sdpa"


def test_the_versions_are_those_that_are_installed(monkeypatch):
    triton = pytest.importorskip("triton", reason="triton is not installed")
    assert tuned.versions() == {"torch": torch.__version__, "triton": triton.__version__}
    monkeypatch.setitem(sys.modules, "triton", None)
    assert tuned.versions()["triton"] is None
    monkeypatch.setattr(tuned, "versions", lambda: {"torch": "2.10.0", "triton": "3.6.0"})
    assert tuned.unusable(measured(**SDPA)) == "measured with torch 2.11.0+cu130, here is 2.10.0"
    monkeypatch.setattr(tuned, "versions", lambda: {"torch": "2.11.9", "triton": None})
    assert tuned.unusable(measured(**SDPA)) == "measured with triton 3.6.0, here is none"
