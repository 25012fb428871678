"""Retrieved chunks from the host bank into its slots: Bank.fetch where every chunk misses, against other ways to copy.

A bank in fewer bits copies what it has packed; what restoring that takes is in bench_quantize_chunk. On a GPU also what
a fetch and matmuls on another stream cost each other.

    python benchmarks/bench_prefetch.py [--small] [--jsonl FILE] [--device DEVICE]
"""

from __future__ import annotations

import math
import sys
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from common import ERROR_LIMITS, Problem, Variant, bench_main, parse_device, run_cases
from prefetch_rivals import RIVALS, Rows
from timing import Run, time_variants

from worldkv_kernels import quantize_chunk
from worldkv_kernels.cli.report import note
from worldkv_kernels.memory.bank import Bank
from worldkv_kernels.memory.pool import Pool
from worldkv_kernels.memory.retrieval import PoseRetrieval
from worldkv_kernels.memory.store import PackedStore, Store, WholeStore, chunk_bytes, held


@dataclass(frozen=True)
class PrefetchCase:
    """`chunks` banked chunks of `tokens` each that are all missing. `layers` of the model's `of_layers`, since all of
    them would take a minute to pin. `beside`: with matmuls on another stream, in place of the rivals. `bits`: of the
    bank, whose bytes rivals copy too."""

    heads: int
    tokens: int
    layers: int
    of_layers: int
    chunks: int
    beside: bool = False
    bits: int = 16
    head_dim: int = 128
    dtype: torch.dtype = torch.bfloat16

    def __str__(self) -> str:
        size = f"{self.chunks} x {self.tokens} tokens x {self.heads} x {self.head_dim}"
        bits = f", {self.bits} bits" if self.bits < 16 else ""
        beside = ", beside matmuls" if self.beside else ""
        return f"{size}, {self.layers} of {self.of_layers} layers{bits}{beside}"

    @property
    def bytes(self) -> int:
        """K and V of every missing chunk and layer, once, as the bank keeps them: what crosses the link."""
        of_one = chunk_bytes(self.tokens, self.heads, self.head_dim, self.bits, self.dtype)
        return self.chunks * self.layers * 2 * of_one


# Chunks of three frames pruned to half: 1560 tokens a frame in 40 layers, 880 in 30. What matters most comes first.
CASES = [
    PrefetchCase(heads=40, tokens=2340, layers=4, of_layers=40, chunks=6),
    PrefetchCase(heads=40, tokens=2340, layers=4, of_layers=40, chunks=6, beside=True),
    PrefetchCase(heads=40, tokens=2340, layers=4, of_layers=40, chunks=6, bits=8),
    PrefetchCase(heads=40, tokens=2340, layers=4, of_layers=40, chunks=6, bits=4),
    PrefetchCase(heads=40, tokens=2340, layers=4, of_layers=40, chunks=6, bits=8, beside=True),
    PrefetchCase(heads=12, tokens=1320, layers=15, of_layers=30, chunks=6),
    PrefetchCase(heads=40, tokens=2340, layers=4, of_layers=40, chunks=1),
    PrefetchCase(heads=12, tokens=1320, layers=15, of_layers=30, chunks=6, beside=True),
    PrefetchCase(heads=12, tokens=1320, layers=15, of_layers=30, chunks=1),
]
SMALL_CASES = [
    PrefetchCase(heads=2, tokens=70, layers=3, of_layers=3, chunks=3, head_dim=64),
    PrefetchCase(heads=3, tokens=33, layers=2, of_layers=2, chunks=1, dtype=torch.float32),
    PrefetchCase(heads=2, tokens=70, layers=3, of_layers=3, chunks=3, bits=8, head_dim=64),
    PrefetchCase(heads=3, tokens=33, layers=2, of_layers=2, chunks=1, bits=4, dtype=torch.float32),
    PrefetchCase(heads=2, tokens=70, layers=3, of_layers=3, chunks=3, beside=True, head_dim=64),
]
SETS = 2  # the chunks of one set take the slots of the other, so that each fetch copies all of its own
MATMUL_SIDE = 4096


def store_of(case: PrefetchCase, slots: int, device: torch.device) -> Store:
    sizes = dict(
        num_layers=case.layers, num_heads=case.heads, head_dim=case.head_dim, dtype=case.dtype, device=device
    )  # fmt: skip
    if case.bits < 16:
        return PackedStore(slots, tokens=case.tokens, bits=case.bits, **sizes)
    pool = Pool([(case.tokens, slots)], **sizes)
    return WholeStore(pool, pool.first_rows[0], tokens=case.tokens)


class Banked:
    """A host bank that holds SETS times `case.chunks` random chunks, and slots for one set."""

    def __init__(self, case: PrefetchCase, device: torch.device) -> None:
        self.case = case
        self.store = store_of(case, case.chunks, device)  # no more, or one of a set could stay while the other comes
        self.bank = Bank(self.store, places=SETS * case.chunks, on_host=True, policy=PoseRetrieval())
        wanted = (case.chunks, *self.store.place_shape)  # set 0 as it has to arrive
        self.rows = torch.empty(wanted, dtype=self.store.dtype, device="cpu")
        shape = (case.layers, 2, case.tokens, case.heads, case.head_dim)
        generator = torch.Generator(device=device).manual_seed(0)
        for chunk in range(SETS * case.chunks):
            data = torch.randn(shape, generator=generator, dtype=torch.float32, device=device).to(case.dtype)
            if case.bits < 16:
                data = quantize_chunk(data[:, 0], data[:, 1], bits=case.bits)
            slot = self.bank.slot_to_fill(chunk, np.eye(4))
            for of_layer, k_and_v in zip(self.in_slots([slot])[0], data.transpose(0, 1), strict=True):
                for rows, x in zip(of_layer, k_and_v, strict=True):
                    rows.copy_(x)
            self.bank.stored(chunk)
            if chunk < case.chunks:
                self.rows[chunk] = data

    def in_slots(self, slots: Sequence[int]) -> Rows:
        pieces = [held(self.store, slot, self.case.tokens).pieces for slot in slots]
        return [(of_slot[0::2], of_slot[1::2]) for of_slot in pieces]

    def fetch(self, i: int) -> list[int]:
        """Set i into slots, which are returned."""
        return self.bank.fetch(list(range(i * self.case.chunks, (i + 1) * self.case.chunks)))

    def check_fetch(self, run: Run) -> float:
        """0 where set 0 arrives bit for bit, though all slots were spoiled, and nothing is written beside; else inf."""
        for i in (0, 1):  # were there room for both sets, set 0 would now be a hit
            run(i)
        for x in self.store.tensors:
            spoil(x)
        got = self.in_slots(run(0))
        error = copy_error(got, self.rows)
        for x in (x for chunk in got for layers in chunk for x in layers):
            spoil(x)
        clean = all(map(is_spoiled, self.store.tensors))
        run(1)  # set 0 comes first when time is taken
        return error if clean else math.inf


def spoil(x: torch.Tensor) -> None:
    x.fill_(math.nan if x.is_floating_point() else 255)


def is_spoiled(x: torch.Tensor) -> bool:
    return bool((x.isnan() if x.is_floating_point() else x == 255).all())


def copy_error(got: Rows, want: torch.Tensor) -> float:
    """0 where K and V of every chunk and layer are equal bit for bit, else inf. `want` may lie in host memory."""
    for (k, v), chunk in zip(got, want, strict=True):
        for k_layer, v_layer, layer in zip(k, v, chunk, strict=True):
            if not torch.equal(torch.stack([k_layer, v_layer]), layer.to(k_layer.device)):
                return math.inf
    return 0.0


def variants_of(case: PrefetchCase, device: torch.device) -> dict[str, bool]:
    """The names of a case's variants, and whether each is a rival, without making any."""
    if case.beside:
        return dict.fromkeys(("Bank.fetch", "Bank.fetch beside matmuls", "matmuls", "matmuls beside Bank.fetch"), False)
    return {"Bank.fetch": False, **dict.fromkeys(RIVALS, True)}


def prepare(case: PrefetchCase, device: torch.device) -> Problem:
    """A filled bank; Bank.fetch and the rivals, or Bank.fetch and matmuls beside each other."""
    banked = Banked(case, device)
    shape = {
        "heads": case.heads, "tokens": case.tokens, "chunks": case.chunks, "layers": case.layers, "bits": case.bits
    }  # fmt: skip
    if case.beside:
        return beside_matmuls(banked, device, shape)
    fetch = Variant("Bank.fetch", lambda: banked.fetch, banked.check_fetch, 0.0, case.bytes, link_bytes=case.bytes)
    variants = [fetch]
    pinned_rows = cache(banked.rows.pin_memory)  # one copy for all rivals that want it, made by the first

    def check(run: Run) -> float:
        return copy_error(run(0), banked.rows)

    for name, make in RIVALS.items():
        ready = partial(make, banked.rows, pinned_rows, device)
        variants.append(Variant(name, ready, check, 0.0, case.bytes, rival=True, link_bytes=case.bytes))
    return Problem(str(case), variants, sets=SETS, shape=shape)


def beside_matmuls(banked: Banked, device: torch.device, shape: dict[str, int]) -> Problem:
    """Each of a fetch and matmuls alone, and timed while the other keeps a second stream busy.

    The one beside is given about twice the time of the one timed, so that it never ends first.
    """
    a, b = (torch.randn(MATMUL_SIDE, MATMUL_SIDE, device=device, dtype=torch.bfloat16) for _ in range(2))
    product = torch.empty_like(a)

    def matmuls(count: int) -> Run:
        def run(i: int) -> torch.Tensor:
            for _ in range(count):
                torch.mm(a, b, out=product)
            return product

        return run

    alone = time_variants({"fetch": banked.fetch, "matmul": matmuls(1)}, device, sets=SETS, seconds=0.1)
    fetch_matmuls = alone["fetch"].median / alone["matmul"].median  # how many last as long as a fetch
    few, many = math.ceil(fetch_matmuls / 2), math.ceil(2 * fetch_matmuls)
    side = torch.cuda.Stream(device)

    def with_beside(run: Run, other: Run) -> Run:
        def both(i: int) -> Any:
            side.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(side):
                other(i)
            return run(i)

        return both

    def settle() -> None:
        torch.cuda.current_stream(device).wait_stream(side)

    def check_fetch(run: Run) -> float:
        return banked.check_fetch(lambda i: (settle(), run(i))[1])

    def check_product(run: Run) -> float:
        # Eight rows of the product in float64: bf16 rounds to one part in 256.
        want = a[:8].double() @ b.double()
        return ((run(0)[:8].double() - want).norm() / want.norm()).item()

    flops = 2 * MATMUL_SIDE**3 * few
    limit, case = ERROR_LIMITS[product.dtype], banked.case
    fetch, product_alone = banked.fetch, matmuls(few)
    variants = [
        Variant("Bank.fetch", lambda: fetch, check_fetch, 0.0, case.bytes, link_bytes=case.bytes),
        Variant(
            "Bank.fetch beside matmuls", lambda: with_beside(fetch, matmuls(many)), check_fetch, 0.0, case.bytes,
            base="Bank.fetch", link_bytes=case.bytes,
        ),
        Variant("matmuls", lambda: product_alone, check_product, limit, 0, flops),
        Variant(
            "matmuls beside Bank.fetch", lambda: with_beside(product_alone, fetch), check_product, limit, 0, flops,
            base="matmuls",
        ),
    ]  # fmt: skip
    return Problem(str(case), variants, sets=SETS, shape=shape, settle=settle)


def run(
    *,
    small: bool = False,
    device: torch.device | None = None,
    seconds: float = 1.0,
    jsonl_path: str | None = None,
    cases: Sequence[PrefetchCase] | None = None,
    only: Collection[str] | None = None,
) -> list[dict[str, Any]]:
    """Measure the cases and return the figures, as `common.run_cases` does.

    A CPU has no streams: cases with matmuls beside are left out there, which is said on stderr.
    """
    cases = cases or (SMALL_CASES if small else CASES)
    device = device or parse_device(None)
    if device.type == "cpu":
        for case in (c for c in cases if c.beside):
            note(f"prefetch: {case}: skipped: a CPU has no second stream")
        cases = [c for c in cases if not c.beside]
    return run_cases(
        "prefetch", cases, prepare, device, small=small, seconds=seconds, jsonl_path=jsonl_path, only=only,
        host_to_device=True,
    )  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    return bench_main("prefetch", argv)


if __name__ == "__main__":
    sys.exit(main())
