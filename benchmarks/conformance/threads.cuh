// Facts of what threads wait for and hand to each other: barriers, registers, a ring of tiles; and of numbers.
#pragma once

#include "boxes.cuh"

namespace worldkv::conformance {

constexpr unsigned kLong = 20000;  // ns: in which a thread that did not wait would be seen

// The number of this event among those of a launch. What follows in the thread waits for it.
__device__ __forceinline__ int ticket(int* g_tickets, uint32_t* g_out) {
    const int number = atomicAdd(g_tickets, 1);
    *g_out = number;
    return number;
}

// Three phases of a barrier of two arrivals. Lane 0 of warp 0 makes each end, and warp 1 waits; both take tickets.
__global__ void __launch_bounds__(64) phases_kernel(const __grid_constant__ CUtensorMap map, int* g_tickets,
                                                    uint32_t* g_out) {
    const uint32_t shared = hopper::shared_base(), barrier = shared + 2 * kPatternBytes;
    const int lane = threadIdx.x % 32;
    uint32_t* g_copied = g_out + 6;
    if (threadIdx.x == 0) {
        hopper::init_barrier(barrier, 2);
        hopper::fence_barrier_init();
    }
    __syncthreads();
    if (threadIdx.x >= 32) hopper::wait(barrier, 1);  // as if the phase before the first had ended
    __syncthreads();
    if (threadIdx.x == 0) {  // two arrivals, then the bytes
        hopper::arrive_expecting(barrier, kPatternBytes);
        hopper::arrive(barrier);
        __nanosleep(kLong);
        const int number = ticket(g_tickets, g_out);
        hopper::copy_box<hopper::L2::kEvictFirst>(shared, &map, barrier, 0, 1, 40 + number);
    } else if (threadIdx.x >= 32) {
        hopper::wait(barrier, 0);
        if (lane == 0) ticket(g_tickets, g_out + 1);
        for (int i = lane; i < kPatternBytes / 4; i += 32) g_copied[i] = hopper::load_shared(shared + 4 * i);
    }
    __syncthreads();
    if (threadIdx.x == 0) {  // an arrival and the bytes, then the other arrival
        hopper::arrive_expecting(barrier, kPatternBytes);
        hopper::copy_box<hopper::L2::kEvictFirst>(shared + kPatternBytes, &map, barrier, 64, 2, 90);
        __nanosleep(kLong);
        ticket(g_tickets, g_out + 2);
        hopper::arrive(barrier);
    } else if (threadIdx.x >= 32) {
        hopper::wait(barrier, 1);
        if (lane == 0) ticket(g_tickets, g_out + 3);
        for (int i = lane; i < kPatternBytes / 4; i += 32) {
            g_copied[kPatternBytes / 4 + i] = hopper::load_shared(shared + kPatternBytes + 4 * i);
        }
    }
    __syncthreads();
    if (threadIdx.x == 0) {  // nothing but two arrivals
        hopper::arrive(barrier);
        __nanosleep(kLong);
        ticket(g_tickets, g_out + 4);
        hopper::arrive(barrier);
    } else if (threadIdx.x >= 32) {
        hopper::wait(barrier, 0);
        if (lane == 0) ticket(g_tickets, g_out + 5);
    }
}

// Two warp groups take turns. The second one gives the first turn away before it asks for its own.
constexpr int kTurns = 6;
__global__ void __launch_bounds__(256) turns_kernel(uint32_t* g_out) {
    const uint32_t turn = hopper::shared_base();
    const int group = threadIdx.x / 128;
    if (threadIdx.x == 0) hopper::store_shared(turn, 0);
    __syncthreads();
    if (group == 1) hopper::arrive_named(1, 256);
    for (int i = 0; i < kTurns; ++i) {
        hopper::sync_named(1 + group, 256);
        if (threadIdx.x % 128 == 0) {
            const uint32_t number = hopper::load_shared(turn);
            __nanosleep(1000 * (i % 3));
            g_out[number] = group << 16 | i;
            hopper::store_shared(turn, number + 1);
        }
        hopper::arrive_named(2 - group, 256);
    }
}

// A warp group gives registers, two take them and hold more at once than each thread was launched with.
constexpr int kHeld = 208;
__global__ void __launch_bounds__(384, 1) registers_kernel(const volatile uint32_t* g_in,
                                                           uint32_t* g_out) {
    if (threadIdx.x < 128) {
        hopper::give_registers<24>();
        g_out[threadIdx.x] = threadIdx.x;
        return;
    }
    hopper::take_registers<240>();
    uint32_t held[kHeld];  // loaded before the barrier, as volatile, since else each were loaded where it is wanted
#pragma unroll
    for (int i = 0; i < kHeld; ++i) held[i] = g_in[i * 256 + threadIdx.x - 128];
    hopper::sync_named(1, 256);
    uint32_t digest = 0;
#pragma unroll
    for (int i = kHeld - 1; i >= 0; --i) digest = (digest ^ held[i]) * 0x01000193;
    g_out[threadIdx.x] = digest;
}

// A producer warp and eight warps that consume, as in segment_attention: tiles of 8 rows, each with a slot beside it.
constexpr int kStages = 2, kTiles = 7, kConsumers = 256;
__global__ void __launch_bounds__(32 + kConsumers) ring_kernel(const __grid_constant__ CUtensorMap map,
                                                               uint32_t* g_out) {
    constexpr int kSlotBytes = 128;
    const uint32_t tiles = hopper::shared_base(), slots = tiles + kStages * kPatternBytes;
    const uint32_t full = slots + kStages * kSlotBytes, empty = full + 8 * kStages;
    const int lane = threadIdx.x % 32;
    if (threadIdx.x == 0) {
        for (int stage = 0; stage < kStages; ++stage) {
            hopper::init_barrier(full + 8 * stage, 1);
            hopper::init_barrier(empty + 8 * stage, kConsumers / 32);
        }
        hopper::fence_barrier_init();
    }
    __syncthreads();
    for (int tile = 0; tile < kTiles; ++tile) {
        const int stage = tile % kStages, parity = tile / kStages % 2;
        const uint32_t slot = slots + stage * kSlotBytes;
        if (threadIdx.x < 32) {
            hopper::wait(empty + 8 * stage, parity ^ 1);
            __syncwarp();  // else the barrier might run phases past a lane that lags
            if (lane == 0) {
                hopper::store_shared(slot, 1000 + tile);
                hopper::arrive_expecting(full + 8 * stage, kPatternBytes);
                hopper::copy_box<hopper::L2::kEvictLast>(tiles + stage * kPatternBytes, &map, full + 8 * stage,
                                                         64 * (tile % 2), tile % 3, 11 * tile);
            }
        } else {
            const int consumer = threadIdx.x - 32;
            hopper::wait(full + 8 * stage, parity);
            __nanosleep(100 * (consumer / 32));  // none at the pace of another
            const uint32_t number = hopper::load_shared(slot);
            const uint32_t word = hopper::load_shared(tiles + stage * kPatternBytes + 4 * consumer);
            __syncwarp();
            if (lane == 0) hopper::arrive(empty + 8 * stage);
            g_out[2 * (tile * kConsumers + consumer)] = number;
            g_out[2 * (tile * kConsumers + consumer) + 1] = word;
        }
    }
}

// Two numbers packed as T and unpacked again, and a power of 2.
template <typename T>
__global__ void numbers_kernel(const float2* g_pairs, const float* g_exponents, uint32_t* g_out) {
    const float2 pair = g_pairs[threadIdx.x];
    const uint32_t both = hopper::pack<T>(pair.x, pair.y);
    const float2 again = hopper::unpack<T>(both);
    uint32_t* g_row = g_out + 4 * threadIdx.x;
    g_row[0] = both;
    g_row[1] = __float_as_uint(again.x);
    g_row[2] = __float_as_uint(again.y);
    g_row[3] = __float_as_uint(hopper::exp2_approx(g_exponents[threadIdx.x]));
}

inline Words phases() {
    const PoolMemory memory(kPool);
    const Memory tickets(Words{0});
    const Output output(6 + 2 * kPatternBytes / 4);
    const CUtensorMap map = memory.map(8);
    phases_kernel<<<1, 64, 3 * kPatternBytes, nullptr>>>(map, tickets.as<int>(), output.words());
    return output.read();
}

inline Words turns() {
    const Output output(2 * kTurns);
    turns_kernel<<<1, 256, kPatternBytes, nullptr>>>(output.words());
    return output.read();
}

inline Words registers() {
    Words numbers(kHeld * 256);
    for (size_t i = 0; i < numbers.size(); ++i) numbers[i] = mix(i);
    const Memory memory(numbers);
    const Output output(384);
    registers_kernel<<<1, 384, 0, nullptr>>>(memory.as<uint32_t>(), output.words());
    return output.read();
}

inline Words ring() {
    const PoolMemory memory(kPool);
    const Output output(2 * kTiles * kConsumers);
    const CUtensorMap map = memory.map(8);
    ring_kernel<<<1, 32 + kConsumers, 3 * kPatternBytes, nullptr>>>(map, output.words());
    return output.read();
}

inline Words numbers() {
    // Ties of bfloat16 and of fp16, which go to the even neighbour; numbers beside them; the largest ones.
    const Memory pairs(std::vector<float2>{{1.f, -2.f}, {1.00390625f, 1.01171875f}, {1.00390637f, 1.01171863f},
                                           {1.00048828125f, 1.00146484375f}, {-0.f, 0.3333333f}, {65504.f, 0.75f},
                                           {-3.14159274f, 6.1e-5f}, {0.0009765f, -INFINITY}});
    const Memory exponents(std::vector<float>{0.f, -0.f, -INFINITY, INFINITY, -1000.f, -160.f, 1000.f, -INFINITY});
    const Output of_bfloat16(4 * 8), of_half(4 * 8);
    numbers_kernel<__nv_bfloat16><<<1, 8, 0, nullptr>>>(pairs.as<float2>(), exponents.as<float>(), of_bfloat16.words());
    numbers_kernel<__half><<<1, 8, 0, nullptr>>>(pairs.as<float2>(), exponents.as<float>(), of_half.words());
    Words words = of_bfloat16.read();
    const Words others = of_half.read();
    words.insert(words.end(), others.begin(), others.end());
    return words;
}

}  // namespace worldkv::conformance
