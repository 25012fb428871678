// csrc/compress/group_select.cuh and selection.h alone, for test_compress_selection.py.
#include <cuda_runtime.h>

#include "compress/group_select.cuh"

#include <algorithm>
#include <vector>

using namespace worldkv;

namespace {

__global__ void select_kernel(const uint32_t* g_keys, int count, int wanted, int first_candidate, int anchor,
                              int frame_tokens, int32_t* g_tokens) {
    select_in_group(g_keys, count, wanted, first_candidate, anchor, frame_tokens, g_tokens);
}

}  // namespace

#pragma GCC visibility push(default)
extern "C" {

void ordered_keys(const float* x, uint32_t* keys, int count) { std::transform(x, x + count, keys, ordered_key); }

void select_tokens(const uint32_t* keys, int count, int wanted, int first_candidate, int anchor, int frame_tokens,
                   int32_t* tokens) {
    select_kernel<<<1, kThreads, 0, nullptr>>>(keys, count, wanted, first_candidate, anchor, frame_tokens, tokens);
}

// The steps of the walk, or -1 when it finds no bin, or more than one, in a step.
int steps(const uint32_t* keys, int count, int wanted) {
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
