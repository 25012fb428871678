"""The sweep over launch configurations: what it launches with, what it reports, what it says of the fastest."""

import json
import os
import sys
from importlib import import_module
from types import SimpleNamespace

import pytest
import torch
from conftest import DEVICE

pytest.importorskip("triton", reason="triton is not installed")
from worldkv_kernels.kernels import segment_attention as kernel

from worldkv_kernels.ops import cuda

CPU = torch.device("cpu")
interpreted = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="runs in Triton's interpreter")


@pytest.fixture
def tune(load):
    return load("tune_segment_attention")


@interpreted
def test_candidates_are_checked_and_timed_beside_the_shipped_one(tune, tmp_path, capsys):
    results = tmp_path / "tune.jsonl"
    choose = kernel.attention_config
    assert tune.main(["--small", "--device", "cpu", "--seconds", "0.01", "--jsonl", str(results)]) == 0
    assert kernel.attention_config is choose
    figures = [json.loads(line) for line in results.read_text().splitlines()]
    by_case = {f["case"]: [g["variant"] for g in figures if g["case"] == f["case"]] for f in figures}
    own = "32 x 32, 16 warps, 1 stages"
    names = [f"{own} (shipped)", f"{own}, uncut", "32 x 32, 4 warps, 1 stages"]
    names.append("64 x 32, 4 warps, 1 stages, descriptors")
    assert list(by_case.values()) == [names, names]
    assert all(f["status"] == "timed" and f["error"] < 1e-5 for f in figures)
    assert [line.rsplit(": ", 1)[0] for line in capsys.readouterr().out.splitlines()[-2:]] == list(by_case)


@interpreted
def test_a_launch_takes_the_candidate_and_only_it(tune, monkeypatch):
    seen = []
    launch = kernel.segment_attention_kernel

    class Spy:
        def __getitem__(self, grid):
            return lambda *args, **options: seen.append(options["BLOCK_Q"]) or launch[grid](*args, **options)

    monkeypatch.setattr(kernel, "segment_attention_kernel", Spy())
    problem = tune.prepare(tune.SMALL_CASES[0], CPU, tune.SMALL_CANDIDATES)
    for variant in problem.variants:
        run = variant.make()
        seen.clear()
        run(0)
        assert seen == [int(variant.name.split()[0])]


@pytest.mark.usefixtures("cuda_kernels")
def test_cuda_is_launched_with_each_of_its_tiles(tune, monkeypatch):
    case = tune.replace(tune.SMALL_WINDOW, dtype=torch.float16)
    variants = tune.in_cuda(tune.Inputs(case, DEVICE), "rebase")
    module, seen = import_module("worldkv_kernels._cuda"), []
    launch = module.segment_attention
    recorder = SimpleNamespace(segment_attention=lambda **given: seen.append(given["tile_rows"]) or launch(**given))
    recorder.architectures = module.architectures
    monkeypatch.setitem(sys.modules, "worldkv_kernels._cuda", recorder)
    runs = [variant.make() for variant in variants]
    assert seen == [128, 176] and cuda.attention_tile_rows(128, 0) == 176
    errors = [variant.check(run) for variant, run in zip(variants, runs, strict=True)]
    assert [variant.name for variant in variants] == ["cuda, 128 keys", "cuda, 176 keys"] and max(errors) < 2e-3
    assert tune.in_cuda(tune.Inputs(tune.SMALL_WINDOW, DEVICE), "") == []  # it takes no fp32


@interpreted
def test_a_candidate_that_cannot_be_launched_is_skipped_and_a_wrong_one_reported(load, tune, monkeypatch):
    common = load("common")
    inner = tune.our_variant

    def planted(inputs, backend, extra):
        variant = inner(inputs, backend, extra)

        def make():
            run = variant.make()

            def with_faults(i):
                queries = kernel.attention_config().block_q
                if queries == 64:
                    raise RuntimeError("out of resource: shared memory")
                result = run(i)
                return result * 1.1 if queries == 16 else result

            return with_faults

        return tune.replace(variant, make=make)

    monkeypatch.setattr(tune, "our_variant", planted)
    candidates = [*tune.SMALL_CANDIDATES, kernel.AttentionConfig(16, 32, 4, 1)]
    problem = tune.prepare(tune.SMALL_CASES[0], CPU, candidates)
    figures = common.measure(problem, CPU, load("timing").Ceilings(1e9, 1e9), seconds=0.01)
    assert [f["status"] for f in figures] == ["timed", "timed", "timed", "skipped", "wrong"]
    assert figures[3]["reason"] == "RuntimeError: out of resource: shared memory"


@interpreted
def test_an_uncut_variant_deals_every_item_whole(tune, monkeypatch):
    seen = []
    launch, deal = kernel.segment_attention_kernel, kernel.deal

    class Spy:
        def __getitem__(self, grid):
            return lambda *args, **options: seen.append(grid) or launch[grid](*args, **options)

    monkeypatch.setattr(kernel, "segment_attention_kernel", Spy())
    monkeypatch.setattr(kernel, "deal", lambda num_items, *args: kernel.Deal(0, num_items, 3))
    problem = tune.prepare(tune.SMALL_CASES[0], CPU, [])
    for variant in problem.variants:
        variant.make()(0)
    assert seen == [(3,), (3,), (1,), (1,)]  # one item, launched when made and when run
    monkeypatch.undo()
    assert kernel.deal is deal


def figure(case, variant, low, median, high, *, rival=True, status="timed"):
    return {"case": case, "variant": variant, "us_20": low, "us": median, "us_80": high, "is_rival": rival,
            "status": status}  # fmt: skip


def test_what_is_said_of_the_fastest(tune):
    figures = [
        figure("a", "shipped", 9, 10, 11, rival=False), figure("a", "other", 7, 8, 8.5),
        figure("a", "slow", 20, 20, 20),
        figure("b", "shipped", 9, 10, 11, rival=False), figure("b", "other", 8.9, 9.5, 10),
        figure("c", "shipped", None, None, None, rival=False, status="failed"), figure("c", "other", 8, 9, 10),
    ]  # fmt: skip
    assert tune.winners(figures) == [
        "a: other takes 20.0 % less",
        "b: shipped is the fastest, or none is faster beyond the spread",
        "c: the shipped configuration was not timed",
    ]


def test_the_shipped_configurations_of_hopper_are_candidates(tune):
    for case in tune.CASES:
        own = kernel.attention_config((9, 0), torch.bfloat16, 128, case.extra == "rebase", case.extra == "mass")
        assert own in tune.CANDIDATES
    assert len(set(tune.CANDIDATES)) == len(tune.CANDIDATES)


def test_a_cpu_without_the_interpreter_is_told(tune, monkeypatch, capsys):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert tune.main(["--small", "--device", "cpu", "--seconds", "nan"]) == 2
    assert "--seconds must be above 0 and at most 3600, got nan\n" in capsys.readouterr().err
    assert tune.main(["--small", "--device", "cpu"]) == 2
    assert capsys.readouterr().err == (
        "tune_segment_attention: on a CPU, set TRITON_INTERPRET=1: the kernel runs in Triton's interpreter\n"
    )
