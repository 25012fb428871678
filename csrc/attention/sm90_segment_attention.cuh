// Segment attention on Hopper: a producer warp and two warp groups of 64 queries each, after FlashAttention-3
// (arXiv 2407.08608). NOTES.md counts its cycles.
//
// A thread block takes one piece after another: an item, 128 queries of one head over the whole window, or a part of an
// item's keys. The producer walks the window's tables and has the copy engine fill a ring of K and V tiles: full tiles
// of kTileRows rows first, then the rows that segments leave over, in blocks of 64. What the consumers need to know of
// a tile lies in a slot beside it.
#pragma once

#include "sm90_consumer.cuh"
#include "sm90_producer.cuh"

namespace worldkv {

template <typename T, int kHeadDim, int kTileRows, int kTurnedSlabs, bool kMass, bool kWeight = false>
__global__ void __launch_bounds__(kThreads, 1)
    segment_attention_kernel(const __grid_constant__ typename ParamsOf<kWeight>::type p,
                             const __grid_constant__ TensorMaps maps) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL) || !defined(__CUDA_ARCH__)
    using L = Layout<kHeadDim, kTileRows>;
    const uint32_t shared = hopper::shared_base();
    if (threadIdx.x == 0) {
        constexpr int kConsumerWarps = 8;
        hopper::init_barrier(shared + L::full_q, 1);
        hopper::init_barrier(shared + L::empty_q, kConsumerWarps);
        for (int stage = 0; stage < L::kStages; ++stage) {
            hopper::init_barrier(shared + L::full_k + 8 * stage, 1);
            hopper::init_barrier(shared + L::empty_k + 8 * stage, kConsumerWarps);
            hopper::init_barrier(shared + L::full_v + 8 * stage, 1);
            hopper::init_barrier(shared + L::empty_v + 8 * stage, kConsumerWarps);
        }
        hopper::fence_barrier_init();
    }
    __syncthreads();
    if (threadIdx.x < 128) {
        hopper::give_registers<24>();
        if (threadIdx.x < 32) Producer<kHeadDim, kTileRows, (kTurnedSlabs > 0)>{p, maps, shared}.run();
    } else {
        hopper::take_registers<240>();
        Consumer<T, kHeadDim, kTileRows, kTurnedSlabs, kMass, kWeight>{p, shared}.run();
    }
#else
    __trap();  // other architectures have none of these instructions; the launcher asks for none
#endif
}

}  // namespace worldkv
