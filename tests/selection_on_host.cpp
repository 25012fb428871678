// csrc/compress/selection.h, compiled for the host: what test_compress_selection.py calls.
#include "../csrc/compress/selection.h"

#include <algorithm>
#include <vector>

using namespace worldkv;

extern "C" {

void ordered_keys(const float* x, uint32_t* keys, int count) { std::transform(x, x + count, keys, ordered_key); }

// Lists the `wanted` lowest keys by their places. Returns the steps of the walk, or -1 when the walk finds no bin, or
// more than one, in a step, or keeps too many.
int kept(const uint32_t* keys, int count, int wanted, int* places) {
    uint32_t all_and = ~0u, all_or = 0u;
    for (int i = 0; i < count; ++i) all_and &= keys[i], all_or |= keys[i];
    RadixWalk walk(all_and, all_or, wanted);
    int steps = 0;
    for (bool done = walk.bits == 0; !done; ++steps) {
        std::vector<int> bins(kBins);
        for (int i = 0; i < count; ++i) {
            if (walk.undecided(keys[i])) ++bins.at(walk.digit(keys[i]));
        }
        int before = 0, found = 0, bin = 0, before_bin = 0;
        for (int b = 0; b < kBins; before += bins[b++]) {
            if (walk.ends_in(before, bins[b])) bin = b, before_bin = before, ++found;
        }
        if (found != 1) return -1;
        done = walk.descend(bin, before_bin, bins[bin]);
    }
    int lower_before = 0, undecided_before = 0;
    for (int i = 0; i < count; ++i) {
        const bool lower = walk.lower(keys[i]), undecided = walk.undecided(keys[i]);
        if (lower || (undecided && undecided_before < walk.wanted)) {
            const int position = kept_position(lower_before, undecided_before, walk.wanted);
            if (position >= wanted) return -1;
            places[position] = i;
        }
        lower_before += lower;
        undecided_before += undecided;
    }
    return steps;
}

void work_items(int tickets, int layers, int score_blocks, int anchor_blocks, int kept_blocks, int* items) {
    for (int ticket = 0; ticket < tickets; ++ticket) {
        const WorkItem item = work_item(ticket, layers, score_blocks, anchor_blocks, kept_blocks);
        items[3 * ticket] = static_cast<int>(item.work);
        items[3 * ticket + 1] = item.layer;
        items[3 * ticket + 2] = item.block;
    }
}

int token_of_candidate(int candidate, int anchor, int frame_tokens) {
    return candidate_token(candidate, anchor, frame_tokens);
}

int token_of_row_of_a_whole_chunk(int row, int anchor, int frame_tokens) {
    return whole_token(row, anchor, frame_tokens);
}
}
