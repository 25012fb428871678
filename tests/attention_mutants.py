"""Bugs to plant in csrc/attention: a name, a file, what stands there and what is put in its place.

Each is one that a kernel of this kind has had somewhere. `UNSEEN` are those that no run can tell from the kernel, with
the reason.
"""

from __future__ import annotations

from typing import NamedTuple

KERNEL, SEGMENTS, MERGE = "sm90_segment_attention.cuh", "segments.cuh", "merge.cuh"


class Mutant(NamedTuple):
    name: str
    file: str
    old: str
    new: str


def without(name: str, old: str, file: str = KERNEL) -> Mutant:
    return Mutant(name, file, old, "")


def instead(name: str, old: str, new: str, file: str = KERNEL) -> Mutant:
    return Mutant(name, file, old, new)


_WAIT_FOR_FIRST_K = (
    "            hopper::wait(shared + L::full_k + 8 * ring.stage, ring.parity);\n            if (kTurnedSlabs ||"
)
_WAIT_FOR_NEXT_K = """                if (tile + 1 < num_tiles) {
                    hopper::wait(shared + L::full_k + 8 * ring.next().stage, ring.next().parity);
                }
"""
_WAIT_FOR_V = "                hopper::wait(shared + L::full_v + 8 * before.stage, before.parity);\n"
_WAIT_FOR_LAST_V = """            hopper::wait(shared + L::full_v + 8 * ring.stage, ring.parity);
            hopper::fence_products(out);
            multiply(weights, shared + L::v + ring.stage * L::kTileBytes);
            hopper::commit_products();
            hopper::wait_products<0>(out);
            release(shared + L::empty_v + 8 * ring.stage);
            ring = ring.next();
            if (kMass) end_segment(0);"""
_WAIT_FOR_TAIL_K = (
    "            hopper::wait(shared + L::full_k + 8 * ring.stage, ring.parity);\n            if (kTurnedSlabs) {"
)
_WAIT_FOR_EMPTY_K = """            hopper::wait(shared + L::empty_k + 8 * ring.stage, ring.parity ^ 1);
            if (lane == 0) {"""
_WAIT_FOR_EMPTY_V = "            hopper::wait(shared + L::empty_v + 8 * at.stage, at.parity ^ 1);\n"
_WAIT_FOR_EMPTY_Q = """        hopper::wait(shared + L::empty_q, round % 2 ^ 1);
        if (lane == 0) {
            hopper::store_shared(shared + L::piece, piece);"""
_COPY_K = """                hopper::arrive_expecting(full, L::kTileBytes);
#pragma unroll
                for (int half = 0; half < L::kHalves; ++half) {
                    hopper::copy_box<L2::kEvictLast>(
                        shared + L::k"""
_SCORES_OF_TAIL = """            hopper::fence_products();
            score(scores, shared + L::k + ring.stage * L::kTileBytes);
            hopper::commit_products();
            hopper::wait_products<0>(scores);
"""
_LAST_READ_OF_Q = "            if (tail == num_tails - 1) release(shared + L::empty_q);\n"
_SCORES_DONE = """                hopper::wait_products<1>(scores);
                release(shared + L::empty_k + 8 * ring.stage);
                take_maxima<kMass>(rows, scores, p);
"""
_PRODUCTS_DONE = """                hopper::wait_products<0>(out);
                release(shared + L::empty_v + 8 * before.stage);
                to_weights<T>(weights, scores);
                rescale();
"""
_MASK = "                    if (!(mask >> j % 2 & 1)) scores[4 * i + j] = -INFINITY;\n"

MUTANTS = [
    # Barriers in shared memory.
    instead("no wait for the first K", _WAIT_FOR_FIRST_K, "            if (kTurnedSlabs ||"),
    without("no wait for the next K", _WAIT_FOR_NEXT_K),
    without("no wait for V", _WAIT_FOR_V),
    instead("V waited for in the next phase", _WAIT_FOR_V, _WAIT_FOR_V.replace("before.parity", "before.parity ^ 1")),
    instead("no wait for the last V", _WAIT_FOR_LAST_V, _WAIT_FOR_LAST_V.split("\n", 1)[1]),
    instead("no wait for a tail's K", _WAIT_FOR_TAIL_K, "            if (kTurnedSlabs) {"),
    without("no wait for Q", "        hopper::wait(shared + L::full_q, query_parity);\n"),
    instead("Q's phases are not told apart", "for (uint32_t query_parity = 0;; query_parity ^= 1) {",
            "for (uint32_t query_parity = 0;;) {"),
    instead("K is filled before it is empty", _WAIT_FOR_EMPTY_K, "            if (lane == 0) {"),
    instead("K is waited for in the wrong phase", _WAIT_FOR_EMPTY_K, _WAIT_FOR_EMPTY_K.replace(" ^ 1", "")),
    without("V is filled before it is empty", _WAIT_FOR_EMPTY_V),
    instead("Q is filled before it is empty", _WAIT_FOR_EMPTY_Q, _WAIT_FOR_EMPTY_Q.split("\n", 1)[1]),
    instead("half of K's bytes expected", _COPY_K, _COPY_K.replace("kTileBytes)", "kTileBytes / 2)")),
    instead("twice Q's bytes expected", "full_q, L::kQueryBytes);", "full_q, 2 * L::kQueryBytes);"),
    instead("a tail's bytes are a tile's", "hopper::arrive_expecting(full, L::kTailBytes);",
            "hopper::arrive_expecting(full, L::kTileBytes);"),
    instead("one arrival a group counted", "kConsumerWarps = 8;", "kConsumerWarps = 2;"),
    instead("an arrival a thread counted", "kConsumerWarps = 8;", "kConsumerWarps = 256;"),
    without("barriers used before all see them", "    __syncthreads();\n"),
    instead("full_v and empty_v are one", "empty_v = full_v + 8 * kStages", "empty_v = full_v"),
    # What is released too early, or never.
    instead("K released before its scores are done", _SCORES_DONE, """\
                release(shared + L::empty_k + 8 * ring.stage);
                hopper::wait_products<1>(scores);
                take_maxima<kMass>(rows, scores, p);
"""),
    instead("V released before its products are done", _PRODUCTS_DONE,
            """                release(shared + L::empty_v + 8 * before.stage);
                hopper::wait_products<0>(out);
                to_weights<T>(weights, scores);
                rescale();
"""),
    instead("the next V released in place of the last", "release(shared + L::empty_v + 8 * before.stage);",
            "release(shared + L::empty_v + 8 * ring.stage);"),
    instead("Q released before the last tail's scores", _SCORES_OF_TAIL + _LAST_READ_OF_Q,
            _LAST_READ_OF_Q + _SCORES_OF_TAIL),
    without("Q never released after tails", _LAST_READ_OF_Q),
    instead("a tail's slot read after its release", _LAST_READ_OF_Q,
            _LAST_READ_OF_Q + "            release(shared + L::empty_k + 8 * ring.stage);\n"),
    # Products in flight.
    instead("scores read in flight", _SCORES_DONE, """                take_maxima<kMass>(rows, scores, p);
                hopper::wait_products<1>(scores);
                release(shared + L::empty_k + 8 * ring.stage);
"""),
    without("scores not waited for", "                hopper::wait_products<1>(scores);\n"),
    instead("weights overwritten in flight", _PRODUCTS_DONE, """                to_weights<T>(weights, scores);
                hopper::wait_products<0>(out);
                release(shared + L::empty_v + 8 * before.stage);
                rescale();
"""),
    instead("output rescaled in flight", _PRODUCTS_DONE, """                rescale();
                hopper::wait_products<0>(out);
                release(shared + L::empty_v + 8 * before.stage);
                to_weights<T>(weights, scores);
"""),
    without("no fence before the scores", "                hopper::fence_products(out);\n"),
    instead("scores and products in one group",
            "                hopper::commit_products();\n" + _WAIT_FOR_V, _WAIT_FOR_V),
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
    instead("scores added to the last tile's", "from_registers<false, 0>(result, turned[0], b)",
            "from_registers<true, 0>(result, turned[0], b)"),
    instead("a tile 1024 bytes into the last", "v = k + kStages * kTileBytes;", "v = k + kStages * kTileBytes - 1024;"),
    instead("a copy to a misaligned place", "shared + L::k + ring.stage * L::kTileBytes + half * kTileRows * kRowBytes",
            "shared + L::k + ring.stage * L::kTileBytes + half * kTileRows * kRowBytes + 128"),
    # Warp groups.
    without("nobody gives the first turn", "    if (group == 1) hopper::arrive_named(1, 256);\n"),
    instead("each group gives itself its turn",
            "                hopper::arrive_named(2 - group, 256);\n                hopper::wait_products<1>",
            "                hopper::arrive_named(1 + group, 256);\n                hopper::wait_products<1>"),
    instead("more registers than there are", "take_registers<240>", "take_registers<248>"),
    instead("the ring stands still after the last full tile",
            "ring = ring.next();\n            if (kMass) end_segment(0);",
            "if (kMass) end_segment(0);"),
    # Softmax, turns and mass.
    instead("rows of a turned fragment swapped", "row_in_block + 8 * (i % 2)", "row_in_block + 8 * (i / 2)"),
    instead("turned the wrong way", "x.x * by.x + x.y * by.y, x.y * by.x - x.x * by.y",
            "x.x * by.x - x.y * by.y, x.y * by.x + x.x * by.y"),
    instead("rows of the output swapped", "rows.rescale[i / 2 % 2]", "rows.rescale[i % 2]"),
    without("sums not rescaled", "        rows.sum[r] *= rows.rescale[r];\n"),
    without("totals not rescaled", "        if (kMass) rows.total[r] *= rows.rescale[r];\n"),
    without("a segment's sum runs on", "                rows.sum[r] = 0.f;\n"),
    instead("a segment's end passed over", "                        if (kMass) end_segment(0);\n", ""),
    without("the last tail's sum not written", "        if (kMass && num_tails > 0) end_segment(1);\n"),
    instead("one scale for all scores", "fabsf(largest * p.scale_log2) < kLarge ? p.scale_log2 : p.scale_power",
            "p.scale_log2"),
    # Where rows lie.
    without("tail rows not masked", _MASK),
    instead("tail rows masked a column off", "4 * i) >> 2 * (lane % 4)", "4 * i) >> (2 * (lane % 4) + 1)"),
    instead("a tail reads past its segment", "min(wanted, first + rows - kGroupRows)", "wanted", SEGMENTS),
    instead("a short segment reads on", "group.first_row + min(i, group.num_rows - 1)", "group.first_row + i"),
    instead("halves of a tail a tile apart", "half * kTailRows * kRowBytes", "half * kTileRows * kRowBytes"),
    instead("a segment's second tile is its first", "first + (index - before) * kTileRows", "first", SEGMENTS),
    instead("one group too few", "+ kGroupRows - 1) / kGroupRows;\n        return",
            ") / kGroupRows;\n        return", SEGMENTS),
    instead("pages are not turned back", "load(0);\n        for (;;)", ";\n        for (;;)", SEGMENTS),
    instead("V of the first head", "full,\n                        64 * half, kv_head, row);",
            "full,\n                        64 * half, 0, row);"),
    instead("a query head reads its own number's K", "head / (p.heads / p.kv_heads)", "head % p.kv_heads"),
    instead("a part ends where it begins", "segments.tiles() * (work.part + 1) / work.parts",
            "segments.tiles() * (work.part + 1) / work.parts - (work.part > 0)"),
    # Merging.
    instead("parts weigh the same", "const float weight = exp2f(sums[part * stride].x - merged.maximum);",
            "const float weight = 1.f;", MERGE),
    instead("shares of full tiles alone", "kind < 2", "kind < 1", MERGE),
    instead("shares of the first part alone", "for (int part = 0; part < parts; ++part) {\n            for",
            "for (int part = 0; part < 1; ++part) {\n            for", MERGE),
    instead("queries past the last have a share", "share = is_query ? share / merged.sum : 0.f;",
            "share = share / merged.sum;", MERGE),
    instead("logarithm to base 2", " * 0.6931471805599453f", "", MERGE),
]  # fmt: skip

UNSEEN = [
    # ptxas would serialise the products (its warning C7519); the fence before the scores comes after the last weights.
    instead("no second fence", "                hopper::fence_products();\n                multiply",
            "                multiply"),
    # A tail of the last tile's segment finds the turn that it wants; what is written for it is a sum of 0.
    instead("tails keep the last tile's turn", "        // Tail rows.\n        segment = -1;", "        // Tail rows."),
]  # fmt: skip
