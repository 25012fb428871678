// The shape of attention on Hopper, small: a warp that copies K and V into a ring, two warp groups that take turns at
// products, weights exp2(scale * q k) that go from registers into the second product. With one flaw, if any.
#include "hopper_common.h"

namespace {

using namespace worldkv::hopper;

constexpr int kColumns = 128, kQueries = 128, kStages = 2, kThreads = 384, kRowBytes = 128;

enum Flaw {
    kNone,
    kNoWaitForK,
    kNoWaitForV,
    kNoWaitForQ,
    kVOfTheNextPhase,
    kNoWaitForEmptyK,
    kEmptyKOfTheOtherParity,
    kNoWaitForEmptyQ,
    kVReleasedEarly,
    kQReleasedEarly,
    kScoresReadEarly,
    kNoWaitForScores,
    kWeightsWrittenEarly,
    kOutputScaledEarly,
    kNoFence,
    kNoSecondFence,
    kNoCommit,
    kReturnsEarly,
    kHalvesSwapped,
    kHalfStrideOfARow,
    kNotOnAPattern,
    kNoSwizzle,
    kNotTransposed,
    kOtherHalf,
    kOtherQueries,
    kHalfOfTheBytes,
    kTwiceTheBytes,
    kOneArrivalForK,
    kTooManyArrivalsForV,
    kNoSyncAfterInit,
    kNoFenceAfterInit,
    kNoFirstTurn,
    kTurnOfOneGroup,
    kTurnByOneWarp,
    kTooManyRegisters,
    kRegistersNotGiven,
    kMisaligned,
    kOverlappingStages,
    kPhaseNotFlipped,
    kOneThreadWaitsForK,
    kGroupsPart,
};

template <int kN>
struct Layout {
    static constexpr uint32_t kTile = kN * kColumns * 2, kHalf = kTile / 2, kQ = kQueries * kColumns * 2;
    static constexpr uint32_t q = 0, k = kQ, v = k + kStages * kTile, barriers = v + kStages * kTile;
    static constexpr uint32_t full_q = barriers, empty_q = barriers + 8, full_k = barriers + 16,
                              full_v = full_k + 8 * kStages, empty_k = full_v + 8 * kStages,
                              empty_v = empty_k + 8 * kStages, bytes = barriers + 256;
};

struct Params {
    float *out, *sums;  // [q_len, heads, 128], [heads, q_len]
    float scale;
    int q_len, heads, blocks, tiles, flaw;
};

struct Ring {
    int stage = 0;
    uint32_t phase = 0;

    __device__ void advance(bool flip = true) {
        if (++stage == kStages) stage = 0, phase ^= flip;
    }
};

template <int kN>
__device__ void copy_tile(uint32_t to, const CUtensorMap* map, uint32_t full, int head, int row, const Params& p) {
    constexpr uint32_t kTile = Layout<kN>::kTile;
    arrive_expecting(full, p.flaw == kHalfOfTheBytes ? kTile / 2 : p.flaw == kTwiceTheBytes ? kTile * 2 : kTile);
    for (int half = 0; half < 2; ++half) {
        copy_box<L2::kEvictLast>(to + half * (kTile / 2), map, full, 64 * half, head, row);
    }
}

template <int kN>
__device__ void produce(const Params& p, uint32_t s, const CUtensorMap* q_map, const CUtensorMap* k_map,
                        const CUtensorMap* v_map) {
    using L = Layout<kN>;
    prefetch(q_map);
    Ring ring;
    uint32_t q_phase = 0;
    const uint32_t stride = p.flaw == kOverlappingStages ? L::kTile / 2 : L::kTile;
    const uint32_t off = p.flaw == kMisaligned ? 128 : 0;
    for (int item = blockIdx.x; item < p.heads * p.blocks; item += gridDim.x, q_phase ^= 1) {
        const int head = item / p.blocks, row = item % p.blocks * kQueries;
        if (p.flaw != kNoWaitForEmptyQ) wait(s + L::empty_q, q_phase ^ 1);
        arrive_expecting(s + L::full_q, L::kQ);
        for (int half = 0; half < 2; ++half) {
            copy_box<L2::kEvictFirst>(s + L::q + half * (L::kQ / 2), q_map, s + L::full_q, 64 * half, head, row);
        }
        for (int t = 0; t < p.tiles; ++t) {
            const uint32_t parity = p.flaw == kEmptyKOfTheOtherParity ? ring.phase : ring.phase ^ 1;
            if (p.flaw != kNoWaitForEmptyK) wait(s + L::empty_k + 8 * ring.stage, parity);
            copy_tile<kN>(s + L::k + ring.stage * stride + off, k_map, s + L::full_k + 8 * ring.stage, head, kN * t, p);
            wait(s + L::empty_v + 8 * ring.stage, ring.phase ^ 1);
            copy_tile<kN>(s + L::v + ring.stage * stride, v_map, s + L::full_v + 8 * ring.stage, head, kN * t, p);
            ring.advance(p.flaw != kPhaseNotFlipped);
        }
    }
}

template <typename T, int kN>
__device__ void scores(float (&d)[kN / 2], uint32_t q, uint32_t k, const Params& p) {
    using L = Layout<kN>;
    const uint64_t rows = p.flaw == kNoSwizzle ? matrix(16, 1024) & ~(uint64_t{3} << 62) : matrix(16, 1024);
#pragma unroll
    for (int slab = 0; slab < 8; ++slab) {
        const uint32_t half = p.flaw == kOtherHalf ? 0 : slab / 4, off = p.flaw == kNotOnAPattern ? 128 : 0;
        const uint64_t a = matrix_at(rows, q + half * (L::kQ / 2) + slab % 4 * 32);
        const uint64_t b = matrix_at(rows, k + half * L::kHalf + slab % 4 * 32 + off);
        if (slab == 0) {
            Product<T, kN>::template from_shared<false>(d, a, b);
        } else {
            Product<T, kN>::template from_shared<true>(d, a, b);
        }
    }
}

template <typename T, int kN>
__device__ void add_values(float (&d)[kColumns / 2], const uint32_t (&weights)[kN / 16][4], uint32_t v,
                           const Params& p) {
    const uint32_t half_bytes = p.flaw == kHalfStrideOfARow ? kRowBytes : kN * kRowBytes;
    const uint64_t rows = p.flaw == kHalvesSwapped ? matrix(1024, half_bytes) : matrix(half_bytes, 1024);
#pragma unroll
    for (int slab = 0; slab < kN / 16; ++slab) {
        const uint64_t b = matrix_at(rows, v + slab * 16 * kRowBytes);
        if (p.flaw == kNotTransposed) {
            Product<T, kColumns>::template from_registers<true, 0>(d, weights[slab], b);
        } else {
            Product<T, kColumns>::template from_registers<true, 1>(d, weights[slab], b);
        }
    }
}

template <typename T, int kN>
__device__ void weigh(float (&s)[kN / 2], float (&sum)[2], float scale) {
#pragma unroll
    for (int i = 0; i < kN / 2; ++i) {
        s[i] = exp2_approx(s[i] * scale);
        sum[i / 2 % 2] += s[i];
    }
}

template <typename T, int kN>
__device__ void round_weights(uint32_t (&weights)[kN / 16][4], const float (&s)[kN / 2]) {
#pragma unroll
    for (int i = 0; i < kN / 4; ++i) weights[i / 4][i % 4] = pack<T>(s[2 * i], s[2 * i + 1]);
}

template <typename T, int kN>
__device__ void consume(const Params& p, uint32_t s, int group) {
    using L = Layout<kN>;
    const bool leader = threadIdx.x % 128 == 0;
    const uint32_t q = s + L::q + (p.flaw == kOtherQueries ? 1 - group : group) * 64 * kRowBytes;
    if (group == 1 && p.flaw != kNoFirstTurn) arrive_named(1, 256);  // the first turn is group 0's
    Ring ring;
    uint32_t q_phase = 0;
    for (int item = blockIdx.x; item < p.heads * p.blocks; item += gridDim.x, q_phase ^= 1) {
        float d[kN / 2], out[kColumns / 2], sum[2] = {0.f, 0.f};
        uint32_t weights[kN / 16][4];
#pragma unroll
        for (float& x : out) x = 0.f;
        if (p.flaw != kNoWaitForQ) wait(s + L::full_q, q_phase);
        for (int t = 0; t < p.tiles; ++t) {
            const Ring before = ring;
            if (t > 0) ring.advance();
            if (p.flaw != kNoWaitForK && (p.flaw != kOneThreadWaitsForK || leader)) {
                wait(s + L::full_k + 8 * ring.stage, ring.phase);
            }
            const bool one_warp = p.flaw == kTurnByOneWarp && threadIdx.x % 128 >= 32;
            if (!one_warp) sync_named(1 + group, p.flaw == kTurnOfOneGroup && group == 0 ? 128 : 256);
            if (p.flaw != kNoFence) fence_products(d, out);
            if (p.flaw == kGroupsPart && threadIdx.x % 128 >= 96) {
                scores<T, kN>(d, q, s + L::k, p);
            } else {
                scores<T, kN>(d, q, s + L::k + ring.stage * L::kTile, p);
            }
            if (p.flaw != kNoCommit) commit_products();
            if (t > 0) {
                const uint32_t phase = p.flaw == kVOfTheNextPhase ? before.phase ^ 1 : before.phase;
                if (p.flaw != kNoWaitForV) wait(s + L::full_v + 8 * before.stage, phase);
                fence_products(out);
                add_values<T, kN>(out, weights, s + L::v + before.stage * L::kTile, p);
                commit_products();
            }
            arrive_named(2 - group, 256);
            if (p.flaw == kScoresReadEarly) weigh<T, kN>(d, sum, p.scale);
            if (t > 0) {
                if (p.flaw == kVReleasedEarly && leader) arrive(s + L::empty_v + 8 * before.stage);
                if (p.flaw != kNoWaitForScores) wait_products<1>(d);
            } else {
                wait_products<0>(d);
            }
            if (leader) arrive(s + L::empty_k + 8 * ring.stage);
            if (p.flaw != kScoresReadEarly) weigh<T, kN>(d, sum, p.scale);
            if (t > 0) {
                if (p.flaw == kWeightsWrittenEarly) round_weights<T, kN>(weights, d);
                if (p.flaw == kOutputScaledEarly) {
#pragma unroll
                    for (float& x : out) x = 0.5f;
                }
                wait_products<0>(out);
                if (p.flaw != kVReleasedEarly && leader) arrive(s + L::empty_v + 8 * before.stage);
            }
            round_weights<T, kN>(weights, d);
            if (p.flaw == kQReleasedEarly && leader && t == 0) arrive(s + L::empty_q);
        }
        if (p.flaw != kQReleasedEarly && leader) arrive(s + L::empty_q);
        wait(s + L::full_v + 8 * ring.stage, ring.phase);
        if (p.flaw != kNoSecondFence) fence_products(out);
        add_values<T, kN>(out, weights, s + L::v + ring.stage * L::kTile, p);
        commit_products();
        if (p.flaw == kReturnsEarly) return;
        wait_products<0>(out);
        if (leader) arrive(s + L::empty_v + 8 * ring.stage);
        ring.advance();
        const int head = item / p.blocks, warp = threadIdx.x % 128 / 32, lane = threadIdx.x % 32;
        for (int r = 0; r < 2; ++r) {
            sum[r] += __shfl_xor_sync(0xffffffff, sum[r], 1);
            sum[r] += __shfl_xor_sync(0xffffffff, sum[r], 2);
            const int row = item % p.blocks * kQueries + 64 * group + 16 * warp + lane / 4 + 8 * r;
            if (row >= p.q_len) continue;
            if (lane % 4 == 0) p.sums[head * p.q_len + row] = sum[r];
#pragma unroll
            for (int i = 0; i < kColumns / 8; ++i) {
                float* to = p.out + (static_cast<int64_t>(row) * p.heads + head) * kColumns + 8 * i + lane % 4 * 2;
                *reinterpret_cast<float2*>(to) = make_float2(out[4 * i + 2 * r], out[4 * i + 2 * r + 1]);
            }
        }
    }
}

template <typename T, int kN>
__global__ void __launch_bounds__(kThreads, 1)
    pipeline_kernel(const __grid_constant__ Params p, const __grid_constant__ CUtensorMap q_map,
                    const __grid_constant__ CUtensorMap k_map, const __grid_constant__ CUtensorMap v_map) {
    using L = Layout<kN>;
    const uint32_t s = shared_base();
    if (threadIdx.x == 0) {
        init_barrier(s + L::full_q, 1);
        init_barrier(s + L::empty_q, 2);
        for (int i = 0; i < kStages; ++i) {
            init_barrier(s + L::full_k + 8 * i, 1);
            init_barrier(s + L::full_v + 8 * i, 1);
            init_barrier(s + L::empty_k + 8 * i, p.flaw == kOneArrivalForK ? 1 : 2);
            init_barrier(s + L::empty_v + 8 * i, p.flaw == kTooManyArrivalsForV ? 256 : 2);
        }
        if (p.flaw != kNoFenceAfterInit) fence_barrier_init();
    }
    if (p.flaw != kNoSyncAfterInit) __syncthreads();
    if (threadIdx.x < 128) {
        if (p.flaw != kRegistersNotGiven) give_registers<24>();
        if (threadIdx.x == 0) produce<kN>(p, s, &q_map, &k_map, &v_map);
    } else {
        if (p.flaw == kTooManyRegisters) {
            take_registers<248>();
        } else {
            take_registers<240>();
        }
        consume<T, kN>(p, s, threadIdx.x / 128 - 1);
    }
}

template <typename T, int kN>
void launch(const Params& p, const void* q, const void* k, const void* v, int rows, int grid, bool ask) {
    constexpr bool kHalf = std::is_same_v<T, __half>;
    const CUtensorMapDataType type = kHalf ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
    const CUtensorMap q_map = hopper_tests::map_of({q, p.q_len, p.heads, kColumns}, kQueries, type);
    const CUtensorMap k_map = hopper_tests::map_of({k, rows, p.heads, kColumns}, kN, type);
    const CUtensorMap v_map = hopper_tests::map_of({v, rows, p.heads, kColumns}, kN, type);
    constexpr uint32_t kBytes = Layout<kN>::bytes;
    if (ask) cudaFuncSetAttribute(pipeline_kernel<T, kN>, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
    pipeline_kernel<T, kN><<<grid, kThreads, kBytes, nullptr>>>(p, q_map, k_map, v_map);
}

}  // namespace

// q [q_len, heads, 128], k and v [rows, heads, 128] in bf16, or in fp16. `ask`: for its shared memory, as one has to.
extern "C" __attribute__((visibility("default"))) const char* run_pipeline(
    int flaw, bool half, int tile_rows, const void* q, const void* k, const void* v, float* out, float* sums,
    float scale, int q_len, int heads, int rows, int tiles, int grid, bool ask) {
    const Params p{out, sums, scale, q_len, heads, (q_len + kQueries - 1) / kQueries, tiles, flaw};
    return hopper_tests::fault_of([&] {
        if (half) {
            launch<__half, 128>(p, q, k, v, rows, grid, ask);
        } else if (tile_rows == 176) {
            launch<__nv_bfloat16, 176>(p, q, k, v, rows, grid, ask);
        } else {
            launch<__nv_bfloat16, 128>(p, q, k, v, rows, grid, ask);
        }
    });
}
