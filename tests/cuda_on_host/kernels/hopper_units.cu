// One copy or one chain of products, for their layouts; and small kernels that each do one thing that is wrong.
#include "hopper_common.h"

namespace {

using namespace worldkv::hopper;

constexpr int kGroup = 128, kRowBytes = 128, kPattern = 1024;
constexpr uint32_t kBarrier = 96 << 10, kBytes = kBarrier + 1024;  // barriers lie behind what is copied

__device__ uint32_t swizzled(uint32_t address) { return address ^ (address >> 7 & 7) << 4; }

__device__ void start_barrier(uint32_t barrier, int arrivals = 1) {
    if (threadIdx.x == 0) {
        init_barrier(barrier, arrivals);
        fence_barrier_init();
    }
    __syncthreads();
}

// A box, and what is in memory afterwards.

struct Box {
    int column, head, row, rows, offset, words;
};

__global__ void box_kernel(uint32_t* g_out, Box box, const __grid_constant__ CUtensorMap map) {
    const uint32_t s = shared_base();
    start_barrier(s + kBarrier);
    for (int i = threadIdx.x; i < box.words; i += kGroup) store_shared(s + 4 * i, 0xaaaaaaaa);
    fence_async_proxy();
    __syncthreads();
    if (threadIdx.x == 0) {
        prefetch(&map);
        arrive_expecting(s + kBarrier, box.rows * kRowBytes);
        copy_box<L2::kEvictFirst>(s + box.offset, &map, s + kBarrier, box.column, box.head, box.row);
    }
    wait(s + kBarrier, 0);
    for (int i = threadIdx.x; i < box.words; i += kGroup) g_out[i] = load_shared(s + 4 * i);
}

// d [64, N] = a [64, 64] b, b as [N, 64] or, transposed, [64, N] in halves of 64 columns.

enum ProductFlaw {
    kNone,
    kNoProxyFence,
    kProxyFenceByOneThread,
    kProxyFenceTooEarly,
    kNoSyncBeforeProducts,
    kNoFence,
    kWrittenAfterFence,
    kAWrittenAfterFence,
    kNoCommit,
    kNoWait,
    kAccumulatorsApart,
    kDescriptorsApart,
    kOutside,
    kAlongARow,
    kReservedBits,
    kGroupsOnOneRow,
    kReadInFlight,
    kStoredInFlight,
};

template <typename T, int N, bool kTransposed, bool kFromRegisters, bool kAccumulate>
__device__ void multiply(float (&d)[N / 2], const uint32_t (&registers)[4], uint64_t a, uint64_t b) {
    if constexpr (kFromRegisters) {
        Product<T, N>::template from_registers<kAccumulate, kTransposed>(d, registers, b);
    } else {
        Product<T, N>::template from_shared<kAccumulate>(d, a, b);
    }
}

template <typename T, int N, bool kTransposed, bool kFromRegisters>
__global__ void __launch_bounds__(kGroup)
    product_kernel(const uint32_t* g_a, const uint32_t* g_b, float* g_d, int flaw) {
    constexpr uint32_t kB = 64 * kRowBytes, kBRows = kTransposed ? 64 * ((N + 63) / 64) : N;
    const uint32_t s = shared_base();
    if (flaw == kProxyFenceTooEarly) fence_async_proxy();
    for (int i = threadIdx.x; i < 64 * 32; i += kGroup) store_shared(s + swizzled(4 * i), g_a[i]);
    for (int i = threadIdx.x; i < static_cast<int>(kBRows) * 32; i += kGroup) {
        store_shared(s + kB + swizzled(4 * i), g_b[i]);
    }
    const bool fences = flaw != kNoProxyFence && flaw != kProxyFenceTooEarly;
    if (fences && (flaw != kProxyFenceByOneThread || threadIdx.x == 0)) fence_async_proxy();
    if (flaw != kNoSyncBeforeProducts) __syncthreads();
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    float d[N / 2], other[N / 2], read = 0.f;
    uint32_t a_registers[4][4];
#pragma unroll
    for (int i = 0; i < 16; ++i) {
        const int row = 16 * warp + lane / 4 + 8 * (i % 2), word = 8 * (i / 4) + 4 * (i / 2 % 2) + lane % 4;
        a_registers[i / 4][i % 4] = g_a[row * 32 + word];
    }
    if (flaw != kNoFence) fence_products(d, other);
    if (flaw == kWrittenAfterFence || flaw == kAWrittenAfterFence) {
        // A second round: where the registers are is known by then.
        const uint64_t b = matrix_at(matrix(64 * kRowBytes, kPattern), s + kB);
        Product<T, N>::template from_registers<false, kTransposed>(d, a_registers[0], b);
        commit_products();
        wait_products<0>(d);
        fence_products(d);
        if (flaw == kWrittenAfterFence) d[3] = 1.f;
        if (flaw == kAWrittenAfterFence) a_registers[0][2] += 1;
    }
    uint64_t a_matrix = matrix(16, kPattern), b_matrix = matrix(64 * kRowBytes, kPattern);
    if (flaw == kReservedBits) a_matrix |= uint64_t{1} << 46;
    if (flaw == kGroupsOnOneRow) b_matrix = matrix(64 * kRowBytes, kRowBytes);
#pragma unroll
    for (int slab = 0; slab < 4; ++slab) {
        uint32_t b = s + kB + slab * (kTransposed ? 16 * kRowBytes : 32);
        if (flaw == kOutside) b = s + kBytes - kPattern;
        if (flaw == kAlongARow) b += 16;
        if (flaw == kDescriptorsApart && threadIdx.x == 77) b += kPattern;
        float(&to)[N / 2] = flaw == kAccumulatorsApart && slab == 1 && threadIdx.x == 77 ? other : d;
        const uint64_t a_at = matrix_at(a_matrix, s + slab * 32), b_at = matrix_at(b_matrix, b);
        if (slab == 0) {
            multiply<T, N, kTransposed, kFromRegisters, false>(to, a_registers[slab], a_at, b_at);
        } else {
            multiply<T, N, kTransposed, kFromRegisters, true>(to, a_registers[slab], a_at, b_at);
        }
    }
    if (flaw != kNoCommit) commit_products();
    if (flaw == kReadInFlight) {
        read = d[2] * 2.f;
        read += __shfl_xor_sync(0xffffffff, read, 1);
    }
    if (flaw == kStoredInFlight) store_shared(s + kBarrier + 4 * threadIdx.x, __float_as_uint(d[2]));
    if (flaw != kNoWait) wait_products<0>(d);
    for (int i = 0; i < N / 2; ++i) {
        const int row = 16 * warp + lane / 4 + 8 * (i / 2 % 2), column = 8 * (i / 4) + 2 * (lane % 4) + i % 2;
        g_d[row * N + column] = d[i] + 0.f * read;
    }
}

template <typename T, int N>
void launch_product(bool transposed, bool from_registers, const uint32_t* a, const uint32_t* b, float* d, int flaw) {
    const auto launch = [&](auto* kernel) {
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
        kernel<<<1, kGroup, kBytes, nullptr>>>(a, b, d, flaw);
    };
    if (transposed) return launch(product_kernel<T, N, true, true>);
    from_registers ? launch(product_kernel<T, N, false, true>) : launch(product_kernel<T, N, false, false>);
}

// Kernels that do one thing that is wrong, or right. Two warp groups.

using Kernel = void (*)(int*);

__device__ bool first_of_group() { return threadIdx.x % kGroup == 0; }

// One warp group writes a word that the other reads, behind a barrier or not.
template <bool kBarrier>
__global__ void share_a_word(int* g_out) {
    const uint32_t s = shared_base();
    if (threadIdx.x == 0) store_shared(s, 42);
    if (kBarrier && threadIdx.x / kGroup == 0) arrive_named(1, 256);
    if (kBarrier && threadIdx.x / kGroup == 1) sync_named(1, 256);
    if (threadIdx.x / kGroup == 1) g_out[threadIdx.x] = load_shared(s);
}

template <bool kBarrier>
__global__ void overwrite_a_word(int* g_out) {
    const uint32_t s = shared_base();
    if (threadIdx.x == 0) store_shared(s, 42);
    __syncthreads();
    if (threadIdx.x < 32) g_out[threadIdx.x] = load_shared(s);
    if (kBarrier) __syncthreads();
    if (threadIdx.x == 200) store_shared(s, 43);
}

// An mbarrier hands a word over; lane 0 alone waits for it.
template <bool kSyncWarp>
__global__ void wait_by_one_lane(int* g_out) {
    const uint32_t s = shared_base();
    start_barrier(s + kBarrier);
    if (threadIdx.x == 0) {
        store_shared(s, 42);
        arrive(s + kBarrier);
    }
    if (threadIdx.x < 128) return;
    if (threadIdx.x % 32 == 0) wait(s + kBarrier, 0);
    if (kSyncWarp) __syncwarp();
    g_out[threadIdx.x] = load_shared(s);
}

// A ring of one place, 200 times, by two threads that wait for each other's phases.
template <int>
__global__ void phases(int* g_out) {
    const uint32_t s = shared_base();
    start_barrier(s + kBarrier);
    start_barrier(s + kBarrier + 8);
    for (int i = 0; i < 200; ++i) {
        if (threadIdx.x == 0) {
            wait(s + kBarrier + 8, i % 2 ^ 1);
            store_shared(s, i);
            arrive(s + kBarrier);
        } else if (threadIdx.x == 128) {
            wait(s + kBarrier, i % 2);
            g_out[i] = load_shared(s);
            arrive(s + kBarrier + 8);
        }
    }
}

// Arrives twice where a second thread counts on each phase.
__global__ void run_past(int*) {
    const uint32_t s = shared_base();
    start_barrier(s + kBarrier);
    if (threadIdx.x == 0) {
        arrive(s + kBarrier);
        arrive(s + kBarrier);
    } else if (threadIdx.x == 128) {
        wait(s + kBarrier, 0);
        wait(s + kBarrier, 1);
    }
}

__global__ void too_many_arrivals(int*) {
    const uint32_t s = shared_base();
    start_barrier(s + kBarrier, 2);
    if (threadIdx.x == 0) {
        arrive_expecting(s + kBarrier, 128);
        for (int i = 0; i < 2; ++i) arrive(s + kBarrier);
    }
}

__global__ void misaligned_barrier(int*) { start_barrier(shared_base() + 4); }

__global__ void barrier_outside(int*) { start_barrier(shared_base() + kBytes); }

__global__ void barrier_twice(int*) {
    start_barrier(shared_base() + kBarrier);
    start_barrier(shared_base() + kBarrier);
}

__global__ void barrier_of_none(int*) { start_barrier(shared_base() + kBarrier, 0); }

__global__ void arrive_before_init(int*) { arrive(shared_base() + kBarrier); }

__global__ void write_over_a_barrier(int*) {
    start_barrier(shared_base() + kBarrier);
    if (threadIdx.x == 0) store_shared(shared_base() + kBarrier + 4, 1);
}

template <int kName, int kThreads>
__global__ void named(int*) {
    sync_named(kName, kThreads);
}

template <int kFirst, int kSecond>
__global__ void named_by_two_counts(int*) {
    sync_named(1, threadIdx.x < kGroup ? kFirst : kSecond);
}

// A count of 128, by one lane in two.
__global__ void named_by_half_warps(int*) {
    if (threadIdx.x % 2) sync_named(1, kGroup);
}

__global__ void named_twice(int*) {
    if (threadIdx.x < kGroup) {
        arrive_named(1, 256);
        arrive_named(1, 256);
    }
}

template <int kGiven, int kTaken>
__global__ void __launch_bounds__(256) registers(int*) {
    if (threadIdx.x < kGroup) {
        give_registers<kGiven>();
    } else {
        take_registers<kTaken>();
    }
}

__global__ void load_outside(int* g_out) { g_out[0] = load_shared(shared_base() + kBytes); }

__global__ void store_below(int*) { store_shared(shared_base() - 4, 0); }

__global__ void load_misaligned(int* g_out) { g_out[0] = load_shared(shared_base() + 2); }

// A warp of each group does not come; where kGone, it has had the time to return before.
template <bool kGone>
__global__ void part_of_a_group(int* g_out) {
    if (threadIdx.x % kGroup >= 96) return;
    for (int i = 0; kGone && i < 2000; ++i) atomicAdd(g_out, 1);
    fence_products();
}

__global__ void other_order(int*) {
    if (threadIdx.x % kGroup < 32) {
        commit_products();
        fence_products();
    } else {
        fence_products();
        commit_products();
    }
}

__global__ void null_map(int*) {
    if (first_of_group()) prefetch(nullptr);
}

__global__ void read_unset(int* g_out) {
    const uint32_t s = shared_base();
    g_out[blockIdx.x * blockDim.x + threadIdx.x] = load_shared(s + 4 * threadIdx.x);
    store_shared(s + 4 * threadIdx.x, 7);
}

const std::pair<const char*, Kernel> kKernels[] = {
    {"share a word", share_a_word<true>},
    {"share a word without a barrier", share_a_word<false>},
    {"overwrite a word", overwrite_a_word<true>},
    {"overwrite a word without a barrier", overwrite_a_word<false>},
    {"wait by one lane", wait_by_one_lane<true>},
    {"wait by one lane without __syncwarp", wait_by_one_lane<false>},
    {"phases", phases<0>},
    {"run past", run_past},
    {"too many arrivals", too_many_arrivals},
    {"misaligned barrier", misaligned_barrier},
    {"barrier outside", barrier_outside},
    {"barrier twice", barrier_twice},
    {"barrier of none", barrier_of_none},
    {"arrive before init", arrive_before_init},
    {"write over a barrier", write_over_a_barrier},
    {"named 0", named<0, 256>},
    {"named 16", named<16, 256>},
    {"named of 100", named<1, 100>},
    {"named of more", named<1, 288>},
    {"named of both", named<1, 256>},
    {"named by two counts", named_by_two_counts<256, 128>},
    {"named by half warps", named_by_half_warps},
    {"named twice", named_twice},
    {"registers", registers<216, 256>},
    {"registers of the other direction", registers<24, 128>},
    {"load outside", load_outside},
    {"store below", store_below},
    {"load misaligned", load_misaligned},
    {"part of a group", part_of_a_group<false>},
    {"part of a group, the others gone", part_of_a_group<true>},
    {"other order", other_order},
    {"null map", null_map},
    {"read unset", read_unset},
};

template <typename Launched>
void launch(Launched kernel, int* out, int blocks) {
    cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
    kernel<<<blocks, 256, kBytes, nullptr>>>(out);
}

}  // namespace

#define EXPORTED extern "C" __attribute__((visibility("default")))

EXPORTED const char* run_hopper_kernel(const char* name, int* out, int blocks) {
    return hopper_tests::fault_of([&] {
        for (const auto& [known, kernel] : kKernels) {
            if (!strcmp(known, name)) return launch(kernel, out, blocks);
        }
        throw std::logic_error("no such kernel");
    });
}

// A tensor [rows, heads, columns]; memory from its start on, in words.
EXPORTED const char* run_box(const void* numbers, int rows, int heads, int columns, int box_rows, int column, int head,
                             int row, int offset, uint32_t* out, int words) {
    return hopper_tests::fault_of([&] {
        const CUtensorMap map =
            hopper_tests::map_of({numbers, rows, heads, columns}, box_rows, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16);
        cudaFuncSetAttribute(box_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
        box_kernel<<<1, kGroup, kBytes, nullptr>>>(out, Box{column, head, row, box_rows, offset, words}, map);
    });
}

EXPORTED const char* run_product(bool half, int n, bool transposed, bool from_registers, const uint32_t* a,
                                 const uint32_t* b, float* d, int flaw) {
    return hopper_tests::fault_of([&] {
        const auto launch = [&](auto number) {
            using T = decltype(number);
            if (n == 64) return launch_product<T, 64>(transposed, from_registers, a, b, d, flaw);
            if (n == 128) return launch_product<T, 128>(transposed, from_registers, a, b, d, flaw);
            launch_product<T, 176>(transposed, from_registers, a, b, d, flaw);
        };
        half ? launch(__half{}) : launch(__nv_bfloat16{});
    });
}

// What a kernel is launched with, after it was allowed so much; 0 for not asked.
EXPORTED const char* run_with_shared_memory(int bytes, int allowed, int* out) {
    return hopper_tests::fault_of([&] {
        const auto kernel = phases<1>;
        if (allowed && cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, allowed)) return;
        kernel<<<1, 256, bytes, nullptr>>>(out);
    });
}

EXPORTED int encode(int type, int rank, void* base, const uint64_t* sizes, const uint64_t* strides,
                    const uint32_t* box, const uint32_t* element_strides, int swizzle, int map_offset) {
    alignas(128) char map[256];
    return hopper_tests::encoder()(reinterpret_cast<CUtensorMap*>(map + map_offset),
                                   static_cast<CUtensorMapDataType>(type), rank, base, sizes, strides, box,
                                   element_strides, CU_TENSOR_MAP_INTERLEAVE_NONE,
                                   static_cast<CUtensorMapSwizzle>(swizzle), CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                                   CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
}
