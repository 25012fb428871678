"""Bugs to plant in csrc/attention: a name, a file, what stands there and what is put in its place.

Each is one that a kernel of this kind has had somewhere. `UNSEEN` are those that no run can tell from the kernel, with
the reason.
"""

from __future__ import annotations

import re
from typing import NamedTuple

KERNEL, CONSUMER, PRODUCER = "sm90_segment_attention.cuh", "sm90_consumer.cuh", "sm90_producer.cuh"
LAYOUT, SEGMENTS, MERGE = "sm90_layout.cuh", "segments.cuh", "merge.cuh"


class Mutant(NamedTuple):
    name: str
    file: str
    old: str
    new: str

    def planted(self, text: str) -> str:
        """`text` of the file with the bug; however its lines are broken and indented."""
        pattern = r"\s+".join(map(re.escape, self.old.split()))
        changed, found = re.subn(pattern, lambda match: self.new, text)
        assert found == 1, f"{self.name}: found {found} times"
        return changed


def instead(name: str, old: str, new: str, file: str = CONSUMER) -> Mutant:
    return Mutant(name, file, old, new)


def without(name: str, old: str, file: str = CONSUMER) -> Mutant:
    return Mutant(name, file, old, "")


def swapped(name: str, first: str, second: str, file: str = CONSUMER) -> Mutant:
    return Mutant(name, file, f"{first} {second}", f"{second} {first}")


RESCALE_SUM = "rows.sum[r] *= rows.rescale[r];"
RESCALE_TOTAL = "if (kMass) rows.total[r] *= rows.rescale[r];"
WAIT_FOR_K = "hopper::wait(shared + L::full_k + 8 * ring.stage, ring.parity);"
WAIT_FOR_EMPTY_K = "hopper::wait(shared + L::empty_k + 8 * ring.stage, ring.parity ^ 1);"
WAIT_FOR_V = "hopper::wait(shared + L::full_v + 8 * before.stage, before.parity);"
SCORES_WAIT, RELEASE_K = "hopper::wait_products<1>(scores);", "release(L::empty_k + 8 * ring.stage);"
PRODUCTS_WAIT, RELEASE_V = "hopper::wait_products<0>(out);", "release(L::empty_v + 8 * before.stage);"
SCORE_TAIL = "hopper::fence_products(); score(scores); hopper::commit_products(); hopper::wait_products<0>(scores);"
RELEASE_Q, AFTER_RELEASE_Q = "if (releases_q) release(L::empty_q);", "float of_groups"

MUTANTS = [
    # Barriers in shared memory.
    instead("no wait for the first K", f"{WAIT_FOR_K} if (kTurnedSlabs ||", "if (kTurnedSlabs ||"),
    without("no wait for the next K", "if (tile + 1 < num_tiles) wait_for_next_k();"),
    without("no wait for V", WAIT_FOR_V),
    instead("V waited for in the next phase", WAIT_FOR_V, WAIT_FOR_V.replace("before.parity", "before.parity ^ 1")),
    without("no wait for the last V", "hopper::wait(shared + L::full_v + 8 * ring.stage, ring.parity);"),
    instead("no wait for a tail's K", f"{WAIT_FOR_K} if (kTurnedSlabs) {{", "if (kTurnedSlabs) {"),
    without("no wait for Q", "hopper::wait(shared + L::full_q, query_parity);"),
    instead("Q's phases are not told apart", "query_parity = 0;; query_parity ^= 1", "query_parity = 0;;"),
    instead("K is filled before it is empty", f"{WAIT_FOR_EMPTY_K} if (lane == 0) {{", "if (lane == 0) {", PRODUCER),
    instead("K is waited for in the wrong phase", f"{WAIT_FOR_EMPTY_K} if (lane == 0) {{",
            f"{WAIT_FOR_K.replace('full', 'empty')} if (lane == 0) {{", PRODUCER),
    without("V is filled before it is empty", "hopper::wait(shared + L::empty_v + 8 * at.stage, at.parity ^ 1);",
            PRODUCER),
    instead("Q is filled before it is empty", "hopper::wait(shared + L::empty_q, round % 2 ^ 1); __syncwarp();",
            "__syncwarp();", PRODUCER),
    instead("half of a tile's bytes expected", "hopper::arrive_expecting(shared + full, bytes);",
            "hopper::arrive_expecting(shared + full, bytes / 2);", PRODUCER),
    instead("twice a tile's bytes expected", "hopper::arrive_expecting(shared + full, bytes);",
            "hopper::arrive_expecting(shared + full, 2 * bytes);", PRODUCER),
    instead("a tail's bytes are a tile's", "L::kTailBytes", "L::kTileBytes", PRODUCER),
    instead("one arrival a group counted", "kConsumerWarps = 8;", "kConsumerWarps = 2;", KERNEL),
    instead("an arrival a thread counted", "kConsumerWarps = 8;", "kConsumerWarps = 256;", KERNEL),
    without("barriers used before all see them", "__syncthreads();", KERNEL),
    instead("full_v and empty_v are one", "empty_v = full_v + 8 * kStages", "empty_v = full_v", LAYOUT),
    # What is released too early, or never.
    swapped("K released before its scores are done", SCORES_WAIT, RELEASE_K),
    swapped("V released before its products are done", PRODUCTS_WAIT, RELEASE_V),
    instead("the next V released in place of the last", RELEASE_V, RELEASE_V.replace("before", "ring")),
    swapped("Q released before the last tail's scores", SCORE_TAIL, RELEASE_Q),
    instead("Q never released after tails", f"{RELEASE_Q} {AFTER_RELEASE_Q}", AFTER_RELEASE_Q),
    instead("a tail's slot read after its release", f"{RELEASE_Q} {AFTER_RELEASE_Q}",
            f"{RELEASE_K} {RELEASE_Q} {AFTER_RELEASE_Q}"),
    instead("a tail's slot given back by the first lane to come",
            f"__syncwarp();  // all lanes have read the slot {RELEASE_K}", RELEASE_K),
    instead("an empty part's slot given back by the first lane to come",
            "// a part that has nothing to do __syncwarp();", "\n"),
    # Products in flight.
    swapped("scores read in flight", f"{SCORES_WAIT} {RELEASE_K}",
            "take_maxima<kMass, kWeight>(rows, weighing, scores, p);"),
    without("scores not waited for", SCORES_WAIT),
    swapped("weights overwritten in flight", f"{PRODUCTS_WAIT} {RELEASE_V}", "to_weights<T>(weights, scores);"),
    instead("output rescaled in flight", f"{PRODUCTS_WAIT} {RELEASE_V} to_weights<T>(weights, scores); rescale();",
            f"rescale(); {PRODUCTS_WAIT} {RELEASE_V} to_weights<T>(weights, scores);"),
    instead("no fence before the scores", "hopper::fence_products(out); score(scores);", "score(scores);"),
    instead("scores and products in one group", f"hopper::commit_products(); {WAIT_FOR_V}", WAIT_FOR_V),
    # Matrices in shared memory.
    instead("strides of V swapped", "hopper::matrix(16 * kSlabs * kRowBytes, 8 * kRowBytes)",
            "hopper::matrix(8 * kRowBytes, 16 * kSlabs * kRowBytes)"),
    instead("halves of V one row apart", "hopper::matrix(16 * kSlabs * kRowBytes, 8 * kRowBytes)",
            "hopper::matrix(kRowBytes, 8 * kRowBytes)"),
    instead("slabs of V 8 rows apart", "values, slab * 16 * kRowBytes", "values, slab * 8 * kRowBytes"),
    instead("V not transposed", "from_registers<true, 1>", "from_registers<true, 0>"),
    instead("halves of K side by side", "slab / 4 * kRows * kRowBytes + slab % 4 * 32", "slab * 32"),
    instead("queries of the other group", "group * kGroupQueries * kRowBytes",
            "(1 - group) * kGroupQueries * kRowBytes"),
    instead("scores added to the last tile's", "from_registers<false, 0>", "from_registers<true, 0>"),
    instead("a tile 1024 bytes into the last", "v = k + kStages * kTileBytes;", "v = k + kStages * kTileBytes - 1024;",
            LAYOUT),
    instead("a copy to a misaligned place", "half * (bytes / L::kHalves)",
            "half * (bytes / L::kHalves) + 128", PRODUCER),
    # Warp groups.
    without("nobody gives the first turn", "if (group == 1) hopper::arrive_named(1, 256);"),
    instead("each group gives itself its turn", f"hopper::arrive_named(2 - group, 256); {SCORES_WAIT}",
            f"hopper::arrive_named(1 + group, 256); {SCORES_WAIT}"),
    instead("more registers than there are", "take_registers<240>", "take_registers<248>", KERNEL),
    instead("the ring stands still after a last stage", "release(L::empty_v + 8 * ring.stage); ring = ring.next();",
            "release(L::empty_v + 8 * ring.stage);"),
    # Softmax, turns and mass.
    instead("rows of a turned fragment swapped", "row_in_block + 8 * (i % 2)", "row_in_block + 8 * (i / 2)"),
    instead("turned the wrong way", "x.x * by.x + x.y * by.y, x.y * by.x - x.x * by.y",
            "x.x * by.x - x.y * by.y, x.y * by.x + x.x * by.y"),
    instead("rows of the output swapped", "rows.rescale[i / 2 % 2]", "rows.rescale[i % 2]"),
    instead("rescaled where the first row asks for it", "rows.rescale[0] != 1.f || rows.rescale[1] != 1.f",
            "rows.rescale[0] != 1.f"),
    instead("a maximum replaced, and nothing rescaled", "hopper::exp2_approx(rows.maximum[r] - maximum);", "1.f;"),
    # Of kernels without weights of segments; those with them do the same in a function of their own.
    instead("sums not rescaled", f"{RESCALE_SUM} {RESCALE_TOTAL} }} }}", f"{RESCALE_TOTAL} }} }}"),
    instead("totals not rescaled", f"{RESCALE_SUM} {RESCALE_TOTAL} }} }}", f"{RESCALE_SUM} }} }}"),
    without("a segment's sum runs on", "rows.sum[r] = 0.f;"),
    instead("a segment's end passed over", "if (kMass) end_segment(0); segment = next;", "segment = next;"),
    without("the last tail's sum not written", "if (kMass && num_tails > 0) end_segment(1);"),
    instead("one scale for all scores", "fabsf(of_tile * p.scale_log2) < kLarge ? p.scale_log2 : p.scale_power",
            "p.scale_log2"),
    # Where rows lie.
    without("tail rows not masked", "if (!(mask >> (j / 4 * 8 + j % 2) & 1)) scores[kOfGroup * i + j] = -INFINITY;"),
    instead("half of a group's rows masked by the other's", "mask >> (j / 4 * 8 + j % 2)", "mask >> j % 2"),
    instead("tail rows masked a column off", ">> 2 * (lane % 4)", ">> (2 * (lane % 4) + 1)"),
    instead("a tail reads past its segment", "min(wanted, first + rows - kGroupRows)", "wanted", SEGMENTS),
    instead("a short segment reads on", "group.first_row + min(i, group.num_rows - 1)", "group.first_row + i",
            PRODUCER),
    instead("halves of a tail a tile apart", "half * kTailRows * kRowBytes", "half * kTileRows * kRowBytes", PRODUCER),
    instead("a segment's second tile is its first", "first + (index - before) * kTileRows", "first", SEGMENTS),
    instead("one group too few", "(rows % kTileRows + kGroupRows - 1) / kGroupRows;",
            "(rows % kTileRows) / kGroupRows;", SEGMENTS),
    instead("pages are not turned back", "load(0); for (;;)", "; for (;;)", SEGMENTS),
    instead("V of the first head", "L::kTileBytes, maps.v_tile, kv_head, row);", "L::kTileBytes, maps.v_tile, 0, row);",
            PRODUCER),
    instead("a query head reads its own number's K", "head / (p.heads / p.kv_heads)", "head % p.kv_heads", PRODUCER),
    instead("a part ends where it begins", "segments.tiles() * (work.part + 1) / work.parts;",
            "segments.tiles() * (work.part + 1) / work.parts - (work.part > 0);", PRODUCER),
    # Merging.
    instead("parts weigh the same", "const float weight = exp2f(sums[part * stride].x - merged.maximum);",
            "const float weight = 1.f;", MERGE),
    instead("shares of full tiles alone", "kind < 2", "kind < 1", MERGE),
    instead("shares of the first part alone", "for (int part = 0; part < parts; ++part) { for",
            "for (int part = 0; part < 1; ++part) { for", MERGE),
    instead("queries past the last have a share", "share = is_query ? share / merged.sum : 0.f;",
            "share = share / merged.sum;", MERGE),
    instead("logarithm to base 2", " * 0.6931471805599453f", "", MERGE),
]  # fmt: skip

UNSEEN = [
    # ptxas would serialise the products (its warning C7519); the fence before the scores comes after the last weights.
    instead("no second fence", "hopper::fence_products(); multiply(weights, before.stage);",
            "multiply(weights, before.stage);"),
    # A tail of the last tile's segment finds the turn that it wants; what is written for it is a sum of 0.
    instead("tails keep the last tile's turn", "segment = -1;\n#pragma unroll 1", "#pragma unroll 1"),
]  # fmt: skip
