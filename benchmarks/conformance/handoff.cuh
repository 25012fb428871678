// How consumers give a slot in shared memory back to the producer that writes it: as segment_attention does, beside a
// plainer way and a wrong one. racecheck.py asks what compute-sanitizer makes of each.
#pragma once

#include "device.h"

namespace worldkv::conformance {

enum class GivenBack {
    kByLane,    // __syncwarp(), then one lane arrives for its warp
    kByLanes,   // each lane arrives for itself
    kTooEarly,  // before it is read, which is a race
};

// A producer warp, and four warps that read its slot again and again.
constexpr int kRounds = 6, kReaders = 128;
template <GivenBack kHow>
__global__ void __launch_bounds__(32 + kReaders) handoff_kernel(uint32_t* g_out) {
    const uint32_t slot = hopper::shared_base(), full = slot + 128, empty = full + 8;
    const int lane = threadIdx.x % 32;
    if (threadIdx.x == 0) {
        hopper::init_barrier(full, 1);
        hopper::init_barrier(empty, kHow == GivenBack::kByLanes ? kReaders : kReaders / 32);
        hopper::fence_barrier_init();
    }
    __syncthreads();
    for (int round = 0; round < kRounds; ++round) {
        if (threadIdx.x < 32) {
            hopper::wait(empty, round % 2 ^ 1);
            __syncwarp();  // else the barrier might run phases past a lane that lags
            if (lane == 0) {
                hopper::store_shared(slot, 1000 + round);
                hopper::arrive(full);
            }
        } else {
            const int reader = threadIdx.x - 32;
            hopper::wait(full, round % 2);
            if (kHow == GivenBack::kTooEarly) {
                __syncwarp();
                if (lane == 0) hopper::arrive(empty);
            }
            __nanosleep(100 * (reader / 32));  // none at the pace of another
            g_out[round * kReaders + reader] = hopper::load_shared(slot);
            if (kHow == GivenBack::kByLane) __syncwarp();
            if (kHow == GivenBack::kByLanes || (kHow != GivenBack::kTooEarly && lane == 0)) hopper::arrive(empty);
        }
    }
}

template <GivenBack kHow>
Words handoff() {
    const Output output(kRounds * kReaders);
    handoff_kernel<kHow><<<1, 32 + kReaders, kPatternBytes, nullptr>>>(output.words());
    return output.read();
}

}  // namespace worldkv::conformance
