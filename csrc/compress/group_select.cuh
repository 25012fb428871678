// Selection in one group of keys by one block: a radix walk over histograms in shared memory, and a list in order.
#pragma once

#include <cstdint>

#include "selection.h"

namespace worldkv {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr unsigned kFullWarp = 0xffffffff;
static_assert(kThreads == kBins, "a thread owns a bin of the histogram");

// Each thread holds the count of its bin of the undecided keys. Finds the bin that the walk descends into.
__device__ __forceinline__ bool descend(RadixWalk& walk, int count) {
    __shared__ int s_warp_counts[kWarps];
    __shared__ int s_bin, s_before, s_count;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    int up_to = count;  // of this warp's bins, up to this one
#pragma unroll
    for (int offset = 1; offset < 32; offset *= 2) {
        const int lower = __shfl_up_sync(kFullWarp, up_to, offset);
        if (lane >= offset) up_to += lower;
    }
    if (lane == 31) s_warp_counts[warp] = up_to;
    __syncthreads();
    int before = up_to - count;
    for (int other = 0; other < warp; ++other) before += s_warp_counts[other];
    if (walk.ends_in(before, count)) {  // in one thread
        s_bin = threadIdx.x;
        s_before = before;
        s_count = count;
    }
    __syncthreads();
    return walk.descend(s_bin, s_before, s_count);
}

// The keys of a group, each in one thread; several loads in flight before the first use. Ordinary loads: the keys stay
// in the first-level cache from one pass to the next.
template <typename Use>
__device__ __forceinline__ void for_each_key(const uint32_t* g_keys, int count, Use use) {
    constexpr int kBatch = 4;
    for (int first = threadIdx.x; first < count; first += kThreads * kBatch) {
        uint32_t r_keys[kBatch];
#pragma unroll
        for (int i = 0; i < kBatch; ++i) {
            if (first + i * kThreads < count) r_keys[i] = g_keys[first + i * kThreads];
        }
#pragma unroll
        for (int i = 0; i < kBatch; ++i) {
            if (first + i * kThreads < count) use(r_keys[i]);
        }
    }
}

// Lists the tokens of the `wanted` lowest of `count` keys, of equal ones the earlier, in ascending order. The keys are
// those of the candidates from first_candidate on. By all threads of a block.
__device__ __forceinline__ void select_in_group(const uint32_t* g_keys, int count, int wanted, int first_candidate,
                                                int anchor, int frame_tokens, int32_t* g_tokens) {
    __shared__ int s_histogram[kWarps][kBins];  // one a warp: keys crowd into few bins
    __shared__ uint32_t s_and[kWarps], s_or[kWarps];
    __shared__ int s_lower[kWarps], s_undecided[kWarps];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;

    // The bits that all keys share.
    uint32_t all_and = ~0u, all_or = 0u;
    for_each_key(g_keys, count, [&](uint32_t key) { all_and &= key, all_or |= key; });
    all_and = __reduce_and_sync(kFullWarp, all_and);
    all_or = __reduce_or_sync(kFullWarp, all_or);
    if (lane == 0) s_and[warp] = all_and, s_or[warp] = all_or;
#pragma unroll
    for (int other = 0; other < kWarps; ++other) s_histogram[other][threadIdx.x] = 0;
    __syncthreads();
    for (int other = 0; other < kWarps; ++other) all_and &= s_and[other], all_or |= s_or[other];

    RadixWalk walk(all_and, all_or, wanted);
    for (bool done = walk.bits == 0; !done;) {
        for_each_key(g_keys, count, [&](uint32_t key) {
            if (walk.undecided(key)) atomicAdd(&s_histogram[warp][walk.digit(key)], 1);
        });
        __syncthreads();
        int in_bin = 0;
#pragma unroll
        for (int other = 0; other < kWarps; ++other) {
            in_bin += s_histogram[other][threadIdx.x];
            s_histogram[other][threadIdx.x] = 0;
        }
        done = descend(walk, in_bin);
    }

    // Each warp lists a stretch of the group; where it starts in the list follows from the counts of those before.
    const int stretch = (count + kThreads - 1) / kThreads * 32;
    const int begin = warp * stretch, end = min(begin + stretch, count);
    int lower_before = 0, undecided_before = 0;
    for (int i = begin + lane; i < end; i += 32) {
        lower_before += walk.lower(g_keys[i]);
        undecided_before += walk.undecided(g_keys[i]);
    }
    lower_before = __reduce_add_sync(kFullWarp, lower_before);
    undecided_before = __reduce_add_sync(kFullWarp, undecided_before);
    if (lane == 0) s_lower[warp] = lower_before, s_undecided[warp] = undecided_before;
    __syncthreads();
    lower_before = undecided_before = 0;
    for (int other = 0; other < warp; ++other) {
        lower_before += s_lower[other];
        undecided_before += s_undecided[other];
    }
    const unsigned earlier_lanes = (1u << lane) - 1;
    for (int first = begin; first < end; first += 32) {
        const int i = first + lane;
        const bool lower = i < end && walk.lower(g_keys[i]);
        const bool undecided = i < end && walk.undecided(g_keys[i]);
        const unsigned lower_lanes = __ballot_sync(kFullWarp, lower);
        const unsigned undecided_lanes = __ballot_sync(kFullWarp, undecided);
        const int earlier_undecided = undecided_before + __popc(undecided_lanes & earlier_lanes);
        if (lower || (undecided && earlier_undecided < walk.wanted)) {
            const int earlier_lower = lower_before + __popc(lower_lanes & earlier_lanes);
            g_tokens[kept_position(earlier_lower, earlier_undecided, walk.wanted)] =
                candidate_token(first_candidate + i, anchor, frame_tokens);
        }
        lower_before += __popc(lower_lanes);
        undecided_before += __popc(undecided_lanes);
    }
}

}  // namespace
}  // namespace worldkv
