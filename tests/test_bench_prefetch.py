"""The prefetch bench counts rightly, sees what arrives wrong, and times copies, not rows that are there already."""

import contextlib
import math
import os
from types import SimpleNamespace

import pytest
import torch

from worldkv_kernels.memory.bank import Bank
from worldkv_kernels.memory.slots import SlotCache

CPU = torch.device("cpu")
interpreted = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="runs in Triton's interpreter")


@pytest.fixture
def bench(load):
    return load("bench_prefetch")


def measured(bench, bits=(16, 8, 4)):
    """Status of each variant over the small cases of so many bits."""
    cases = [case for case in bench.SMALL_CASES if case.bits in bits]
    figures = bench.run(small=True, device=CPU, seconds=0.01, cases=cases)
    return {name: {f["status"] for f in figures if f["variant"] == name} for name in {f["variant"] for f in figures}}


def test_bytes_are_k_and_v_once(bench):
    # 5 tokens of 2 x 4 numbers of 2 bytes are 80 bytes of K, V as much; 3 layers, 2 chunks.
    case = dict(chunks=2, layers=3, of_layers=3, tokens=5, heads=2)
    whole = bench.PrefetchCase(**case, head_dim=4)
    assert whole.bytes == 2 * 3 * (80 + 80)
    # Six pruned chunks of the 14B model: 819,200 bytes a token.
    of_14b = dict(chunks=6, layers=40, of_layers=40, tokens=2340, heads=40)
    assert bench.PrefetchCase(**of_14b).bytes == 6 * 2340 * 819_200
    # In 8 bits a byte a number, and 2 of a scale for each of 10 tokens and heads, 660 bytes, which 672 are made of.
    assert bench.PrefetchCase(**case, head_dim=64, bits=8).bytes == 2 * 3 * 2 * 672


def test_figures_carry_what_crosses_the_link(bench):
    # 3 chunks of 3 layers of 70 tokens of 2 x 64 numbers in bf16; a chunk of 2 layers of 33 tokens of 3 x 128 in fp32
    counts = {
        ("3 x", 16): 3 * 3 * 2 * 70 * 128 * 2,
        ("3 x", 8): 3 * 3 * 2 * (70 * 128 + 70 * 2 * 2 + 8),  # filled up to a multiple of 16
        ("1 x", 16): 2 * 2 * 33 * 384 * 4,
        ("1 x", 4): 2 * 2 * (33 * 384 // 2 + 2 * 384 * 4),
    }
    figures = bench.run(small=True, device=CPU, seconds=0.01)
    keys = [(f["case"][:3], f["shape"]["bits"]) for f in figures]
    assert [f["link_bytes"] for f in figures] == [f["bytes"] for f in figures] == [counts[key] for key in keys]
    assert {*keys} == {*counts}


def test_cases_are_the_models_chunks(bench):
    shapes = {(c.heads, c.tokens, c.of_layers) for c in bench.CASES}
    assert shapes == {(40, 3 * 1560 // 2, 40), (12, 3 * 880 // 2, 30)}
    assert [(c.chunks, c.bits) for c in bench.CASES if c.heads == 40 and not c.beside] == [
        (6, 16),
        (6, 8),
        (6, 4),
        (1, 16),
    ]
    assert len({str(c) for c in bench.CASES}) == len(bench.CASES)
    # A fetch of each case has to fit in host memory twice for the bank and twice for the rivals.
    for c in bench.CASES:
        assert c.bytes < 1.25e9


def test_every_fetch_that_is_timed_copies_all_chunks(bench, monkeypatch):
    right, copied = Bank.fetch, []

    def counted(bank, chunks):
        before = bank.copies_in
        slots = right(bank, chunks)
        copied.append(bank.copies_in - before == len(chunks) == len(set(slots)))
        return slots

    monkeypatch.setattr(Bank, "fetch", counted)
    assert measured(bench)["Bank.fetch"] == {"timed"}
    assert len(copied) > 20 and all(copied)


def one_row_more(cache, chunks, places, tokens, keep):
    SlotCache.right(cache, chunks, places, tokens, keep)
    for chunk in chunks:
        cache._store._pool.v[0, cache._store.first_rows[cache._cached[chunk]] + tokens[chunk]] = 0.0


def a_bit_off(cache, chunks, places, tokens, keep):
    SlotCache.right(cache, chunks, places, tokens, keep)
    for chunk in chunks:
        k, _ = cache._store.views(cache._cached[chunk], cache._num_layers - 1, tokens[chunk])
        k.view(torch.uint8)[(0,) * k.dim()] ^= 1


def never(cache, chunks, places, tokens, keep):
    for chunk in chunks:
        cache._cached[chunk] = cache._take(keep)


def another(cache, chunks, places, tokens, keep):
    num_places = len(cache.arena.rows)
    elsewhere = {chunk: (place + 1) % num_places for chunk, place in places.items()}
    SlotCache.right(cache, chunks, elsewhere, tokens, keep)


@pytest.mark.parametrize("fault", [one_row_more, a_bit_off, never, another])
def test_a_fetch_with_a_fault_is_wrong(bench, monkeypatch, fault):
    monkeypatch.setattr(SlotCache, "right", SlotCache._load, raising=False)
    monkeypatch.setattr(SlotCache, "_load", fault)
    of_bits = (16,) if fault is one_row_more else (16, 8, 4)  # packed, no slot has more rows
    assert measured(bench, of_bits)["Bank.fetch"] == {"wrong"}
    if fault is never:
        assert bench.main(["--small", "--device", "cpu", "--seconds", "0.01"]) == 1


def test_a_fetch_of_what_is_there_already_is_wrong(bench, monkeypatch):
    right = bench.store_of
    monkeypatch.setattr(bench, "store_of", lambda case, slots, device: right(case, 2 * slots, device))
    assert measured(bench)["Bank.fetch"] == {"wrong"}


@pytest.mark.parametrize(
    "fault",
    [
        lambda rows: [(v, k) for k, v in rows],
        lambda rows: [(k, list(v)[::-1]) for k, v in rows],
        lambda rows: [([x + (x == x.max()) for x in k], v) for k, v in rows],
    ],
    ids=["swapped", "another layer's v", "one number"],
)
def test_a_rival_with_wrong_rows_is_reported_and_not_timed(bench, monkeypatch, fault):
    right, calls = bench.RIVALS["pageable per layer"], []

    def wrong(host, pin, device):
        run = right(host, pin, device)
        return lambda i: (calls.append(i), fault(run(i)))[1]

    monkeypatch.setitem(bench.RIVALS, "pageable per layer", wrong)
    statuses = measured(bench)
    assert statuses["Bank.fetch"] == {"timed"}
    assert statuses["pageable per layer"] == {"wrong"}
    assert calls == [0] * 4  # the check alone, once a case


@interpreted
@pytest.mark.parametrize("size", [1, 4096, 3 * 4096 + 5])
def test_the_kernel_copies_all_and_nothing_past_the_end(load, bench, size):
    kernel = load("pinned_kernel")
    source = torch.randn(size, dtype=torch.float32)
    target = torch.full((size + 4096,), math.nan)
    kernel.read_pinned(source, target[:size])
    assert torch.equal(target[:size], source)
    assert bool(target[size:].isnan().all())


@interpreted
def test_rivals_from_pinned_memory_bring_the_rows(load, bench, monkeypatch):
    rivals = load("prefetch_rivals")
    host = torch.randn(2, 3, 2, 5, 2, 4)
    pinned = [name for name in rivals.RIVALS if name.startswith("pinned")]
    assert len(pinned) == 3
    for name in pinned:
        with pytest.raises(RuntimeError, match="on a GPU only"):
            rivals.RIVALS[name](host, lambda: host, CPU)
    monkeypatch.setattr(rivals, "need_gpu", lambda device: None)
    for name, make in rivals.RIVALS.items():
        got = make(host, lambda: host, CPU)(0)
        assert bench.copy_error(got, host) == 0.0, name
        # New memory each time or a buffer of its own, never the source itself.
        assert all(x.data_ptr() != y.data_ptr() for x, y in zip(got[0][0], host[0, :, 0], strict=True)), name


def test_a_cpu_says_that_it_has_no_second_stream(bench, capsys):
    cases = {f["case"] for f in bench.run(small=True, device=CPU, seconds=0.01)}
    beside = [str(c) for c in bench.SMALL_CASES if c.beside]
    assert cases == {str(c) for c in bench.SMALL_CASES} - set(beside)
    assert [f"prefetch: {c}: skipped: a CPU has no second stream" in capsys.readouterr().err for c in beside] == [True]


# Beside matmuls, with stand-ins for streams that note what is queued where.


class Stream:
    def __init__(self, name, log):
        self.name, self.log = name, log

    def wait_stream(self, other):
        self.log.append(f"{self.name} waits for {other.name}")


@pytest.fixture
def streams(bench, monkeypatch):
    log = []
    main, side = Stream("main", log), Stream("side", log)

    @contextlib.contextmanager
    def inside(stream):
        log.append("[")
        yield
        log.append("]")

    cuda = SimpleNamespace(Stream=lambda device: side, current_stream=lambda device: main, stream=inside)
    monkeypatch.setattr(torch, "cuda", cuda)
    fetch, mm = Bank.fetch, torch.mm
    monkeypatch.setattr(Bank, "fetch", lambda *args: (log.append("fetch"), fetch(*args))[1])
    monkeypatch.setattr(torch, "mm", lambda *args, **out: (log.append("mm"), mm(*args, **out))[1])
    monkeypatch.setattr(bench, "MATMUL_SIDE", 64)
    # A fetch that takes as long as three matmuls.
    times = {"fetch": SimpleNamespace(median=3.0), "matmul": SimpleNamespace(median=1.0)}
    monkeypatch.setattr(bench, "time_variants", lambda *args, **options: times)
    return log


@pytest.fixture
def problem(bench, streams):
    case = next(c for c in bench.SMALL_CASES if c.beside)
    made = bench.prepare(case, CPU)
    streams.clear()
    return made


def test_the_one_beside_starts_first_and_lasts_longer(problem, streams):
    runs = {v.name: v.make() for v in problem.variants}
    queued = {}
    for name, run in runs.items():
        streams.clear()
        run(1)
        queued[name] = " ".join(streams)
    assert queued == {
        "Bank.fetch": "fetch",
        "Bank.fetch beside matmuls": "side waits for main [ mm mm mm mm mm mm ] fetch",
        "matmuls": "mm mm",
        "matmuls beside Bank.fetch": "side waits for main [ fetch ] mm mm",
    }
    streams.clear()
    problem.settle()
    assert streams == ["main waits for side"]


def test_what_each_costs_the_other_is_a_figure(load, bench, problem):
    common = load("common")
    figures = common.measure(problem, CPU, load("timing").Ceilings(1e9, 1e9, 1e8), seconds=0.0)
    assert [f["status"] for f in figures] == ["timed"] * 4
    assert [f["base"] for f in figures] == [None, "Bank.fetch", None, "matmuls"]
    assert [f["ceiling"] for f in figures] == ["link", "link", "matmul", "matmul"]
    assert [f["flops"] for f in figures] == [0, 0, 2 * 2 * 64**3, 2 * 2 * 64**3]
    assert all(f["over_base"] is not None for f in figures if f["base"])


def test_beside_matmuls_a_wrong_fetch_or_product_is_seen(load, bench, problem, monkeypatch):
    common = load("common")
    monkeypatch.setattr(SlotCache, "_load", never)
    right = torch.mm
    monkeypatch.setattr(torch, "mm", lambda a, b, out: right(a, b, out=out).mul_(1.05))
    figures = common.measure(problem, CPU, load("timing").Ceilings(1e9, 1e9, 1e8), seconds=0.0)
    assert [f["status"] for f in figures] == ["wrong"] * 4


def test_bars_show_what_each_costs_the_other(load, bench, problem, monkeypatch, tmp_path):
    pytest.importorskip("matplotlib")
    common, plots = load("common"), load("plots")
    figures = common.measure(problem, CPU, load("timing").Ceilings(1e9, 1e9, 1e8), seconds=0.0)
    record = {"bench": "prefetch", "environment": {"device": "none"}}
    written = plots.draw([{**record, **f} for f in figures], tmp_path)
    words = next(path for path in written if path.name == "prefetch_latency.svg").read_text()
    assert all(f">{v.name}<" in words for v in problem.variants)
    assert len(set(plots.COLORS)) == 16 and math.gcd(len(plots.COLORS), len(plots.MARKERS)) == 1
