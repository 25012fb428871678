"""The bench of participation: what it counts, and the faults that it sees."""

import pytest
import torch

CPU = torch.device("cpu")


def test_one_product_is_counted_of_attentions_two(load):
    bench = load("bench_participation")
    case = bench.case_of("heads=4,kv_heads=2,q=40,head_dim=64,window=40x1+20x3,dtype=float16")
    counted = {v.name: (v.num_bytes, v.flops) for v in bench.prepare(case, CPU).variants}
    attention = counted.pop("reference attention")
    assert attention == (2 * (2 * 40 * 4 + 2 * 100 * 2) * 64 + 4 * 4 * 40, 4 * 40 * 4 * 64 * 100)
    assert set(counted.values()) == {(2 * (40 * 4 + 100 * 2) * 64 + 4 * 4 * (40 + 100), 2 * 40 * 4 * 64 * 100)}


@pytest.mark.parametrize(
    "fault",
    [lambda x: x.roll(1, 1), lambda x: x * 1.02, lambda x: x.index_fill(0, torch.tensor([1]), float("nan"))],
    ids=["rolled", "more", "a head of NaN"],
)
def test_shares_with_a_fault_are_wrong(load, monkeypatch, fault):
    bench = load("bench_participation")
    right = bench.participation
    monkeypatch.setattr(bench, "participation", lambda *given, **options: fault(right(*given, **options)))
    variants = bench.prepare(bench.SMALL_CASES[0], CPU).variants
    wrong = [v.name for v in variants if not v.check(v.make()) <= v.limit]
    assert wrong == ["reference", "reference rebase", "reference weights"]


def test_right_shares_are_right(load):
    bench = load("bench_participation")
    for case in bench.SMALL_CASES:
        variants = bench.prepare(case, CPU).variants
        assert all(v.check(v.make()) <= v.limit for v in variants) and len(variants) == 5
