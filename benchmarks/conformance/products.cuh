// Facts of the products of warp groups: which numbers of shared memory and of registers meet, and where the sums come
// to lie. All are whole numbers, exact in fp32. What is written is the registers as they are: d[0], d[1].. of thread 0,
// then those of thread 1.
#pragma once

#include "device.h"

#include <type_traits>

namespace worldkv::conformance {

constexpr uint64_t kRowsOfK = hopper::matrix(16, kPatternBytes);
template <int kRows>
constexpr uint64_t kRowsOfV = hopper::matrix(kRows * kRowBytes, kPatternBytes);

template <int kRows, int kColumns>
constexpr int kTileBytes = kRows * kColumns * 2;

// By thread 0: the halves of a tile one after the other.
template <int kRows, int kColumns>
__device__ __forceinline__ void load_tile(uint32_t to, const CUtensorMap& map, uint32_t barrier) {
#pragma unroll
    for (int half = 0; half < kColumns / 64; ++half) {
        hopper::copy_box<hopper::L2::kEvictLast>(to + half * kRows * kRowBytes, &map, barrier, 64 * half, 0, 0);
    }
}

__device__ __forceinline__ void init(uint32_t barrier) {
    if (threadIdx.x == 0) {
        hopper::init_barrier(barrier, 1);
        hopper::fence_barrier_init();
    }
    __syncthreads();
}

template <int kSize>
__device__ __forceinline__ void dump(float* g_out, const float (&d)[kSize]) {
#pragma unroll
    for (int v = 0; v < kSize; ++v) g_out[threadIdx.x * kSize + v] = d[v];
}

// A slab of 16 columns of 64 rows in global memory, as registers.
template <typename T>
__device__ __forceinline__ void load_fragment(uint32_t (&a)[4], const T* g_rows, int columns, int slab) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const int row = threadIdx.x / 32 * 16 + lane / 4 + 8 * (i % 2);
        const int column = 16 * slab + 8 * (i / 2) + 2 * (lane % 4);
        a[i] = *reinterpret_cast<const uint32_t*>(g_rows + row * columns + column);
    }
}

// Queries [64 a warp group, kHeadDim] by keys [N, kHeadDim], both from shared memory.
template <typename T, int N, int kHeadDim, int kGroups>
__global__ void __launch_bounds__(128 * kGroups) scores_kernel(const __grid_constant__ CUtensorMap q_map,
                                                               const __grid_constant__ CUtensorMap k_map,
                                                               float* g_out) {
    constexpr int kQueries = 64 * kGroups, kQueryBytes = kTileBytes<kQueries, kHeadDim>;
    constexpr int kKeyBytes = kTileBytes<N, kHeadDim>;
    const uint32_t q = hopper::shared_base(), k = q + kQueryBytes, barrier = k + kKeyBytes;
    init(barrier);
    if (threadIdx.x == 0) {
        hopper::arrive_expecting(barrier, kQueryBytes + kKeyBytes);
        load_tile<kQueries, kHeadDim>(q, q_map, barrier);
        load_tile<N, kHeadDim>(k, k_map, barrier);
    }
    hopper::wait(barrier, 0);
    const uint32_t queries = q + threadIdx.x / 128 * 64 * kRowBytes;
    float d[N / 2];
    hopper::fence_products();
#pragma unroll
    for (int slab = 0; slab < kHeadDim / 16; ++slab) {
        const uint64_t a = hopper::matrix_at(kRowsOfK, queries, slab / 4 * kQueries * kRowBytes + slab % 4 * 32);
        const uint64_t b = hopper::matrix_at(kRowsOfK, k, slab / 4 * N * kRowBytes + slab % 4 * 32);
        if (slab == 0) {
            hopper::Product<T, N>::template from_shared<false>(d, a, b);
        } else {
            hopper::Product<T, N>::template from_shared<true>(d, a, b);
        }
    }
    hopper::commit_products();
    hopper::wait_products<0>(d);
    dump(g_out, d);
}

// The same of one warp group, with the first slabs of the queries in registers.
template <typename T, int N, int kHeadDim, int kTurnedSlabs>
__global__ void __launch_bounds__(128) turned_scores_kernel(const T* g_queries,
                                                            const __grid_constant__ CUtensorMap q_map,
                                                            const __grid_constant__ CUtensorMap k_map, float* g_out) {
    constexpr int kQueryBytes = kTileBytes<64, kHeadDim>, kKeyBytes = kTileBytes<N, kHeadDim>;
    const uint32_t q = hopper::shared_base(), k = q + kQueryBytes, barrier = k + kKeyBytes;
    init(barrier);
    if (threadIdx.x == 0) {
        hopper::arrive_expecting(barrier, kQueryBytes + kKeyBytes);
        load_tile<64, kHeadDim>(q, q_map, barrier);
        load_tile<N, kHeadDim>(k, k_map, barrier);
    }
    uint32_t turned[kTurnedSlabs][4];
#pragma unroll
    for (int slab = 0; slab < kTurnedSlabs; ++slab) load_fragment(turned[slab], g_queries, kHeadDim, slab);
    hopper::wait(barrier, 0);
    float d[N / 2];
    hopper::fence_products();
#pragma unroll
    for (int slab = 0; slab < kHeadDim / 16; ++slab) {
        const uint64_t a = hopper::matrix_at(kRowsOfK, q, slab / 4 * 64 * kRowBytes + slab % 4 * 32);
        const uint64_t b = hopper::matrix_at(kRowsOfK, k, slab / 4 * N * kRowBytes + slab % 4 * 32);
        if (slab == 0) {
            hopper::Product<T, N>::template from_registers<false, 0>(d, turned[0], b);
        } else if (slab < kTurnedSlabs) {
            hopper::Product<T, N>::template from_registers<true, 0>(d, turned[slab % kTurnedSlabs], b);
        } else {
            hopper::Product<T, N>::template from_shared<true>(d, a, b);
        }
    }
    hopper::commit_products();
    hopper::wait_products<0>(d);
    dump(g_out, d);
}

// Weights [64, kRows] in registers by values [kRows, kHeadDim], whose rows are those of memory.
template <typename T, int kHeadDim, int kRows>
__global__ void __launch_bounds__(128) values_kernel(const T* g_weights, const __grid_constant__ CUtensorMap v_map,
                                                     float* g_out) {
    constexpr int kValueBytes = kTileBytes<kRows, kHeadDim>;
    const uint32_t v = hopper::shared_base(), barrier = v + kValueBytes;
    init(barrier);
    if (threadIdx.x == 0) {
        hopper::arrive_expecting(barrier, kValueBytes);
        load_tile<kRows, kHeadDim>(v, v_map, barrier);
    }
    uint32_t a[kRows / 16][4];
#pragma unroll
    for (int slab = 0; slab < kRows / 16; ++slab) load_fragment(a[slab], g_weights, kRows, slab);
    float d[kHeadDim / 2];
#pragma unroll
    for (int i = 0; i < kHeadDim / 2; ++i) d[i] = 0.f;
    hopper::wait(barrier, 0);
    hopper::fence_products(d);
#pragma unroll
    for (int slab = 0; slab < kRows / 16; ++slab) {
        const uint64_t b = hopper::matrix_at(kRowsOfV<kRows>, v, slab * 16 * kRowBytes);
        hopper::Product<T, kHeadDim>::template from_registers<true, 1>(d, a[slab], b);
    }
    hopper::commit_products();
    hopper::wait_products<0>(d);
    dump(g_out, d);
}

// Scores become weights. The next tile's scores, the same ones here, are read while the products of these weights may
// go on. Head_dim 64, 64 keys.
__global__ void __launch_bounds__(128) chain_kernel(const __grid_constant__ CUtensorMap q_map,
                                                    const __grid_constant__ CUtensorMap k_map,
                                                    const __grid_constant__ CUtensorMap v_map, float* g_out) {
    using Products = hopper::Product<__nv_bfloat16, 64>;
    constexpr int kBytes = kTileBytes<64, 64>;
    const uint32_t q = hopper::shared_base(), k = q + kBytes, v = k + kBytes, barrier = v + kBytes;
    init(barrier);
    if (threadIdx.x == 0) {
        hopper::arrive_expecting(barrier, 3 * kBytes);
        load_tile<64, 64>(q, q_map, barrier);
        load_tile<64, 64>(k, k_map, barrier);
        load_tile<64, 64>(v, v_map, barrier);
    }
    hopper::wait(barrier, 0);
    float scores[32], out[32];
    const auto score = [&] {
#pragma unroll
        for (int slab = 0; slab < 4; ++slab) {
            const uint64_t a = hopper::matrix_at(kRowsOfK, q, slab * 32), b = hopper::matrix_at(kRowsOfK, k, slab * 32);
            if (slab == 0) {
                Products::from_shared<false>(scores, a, b);
            } else {
                Products::from_shared<true>(scores, a, b);
            }
        }
    };
    hopper::fence_products();
    score();
    hopper::commit_products();
    hopper::wait_products<0>(scores);
    uint32_t weights[4][4];
#pragma unroll
    for (int i = 0; i < 16; ++i) weights[i / 4][i % 4] = hopper::pack<__nv_bfloat16>(scores[2 * i], scores[2 * i + 1]);
#pragma unroll
    for (int i = 0; i < 32; ++i) out[i] = 1000.f;
    hopper::fence_products(out);
    score();
    hopper::commit_products();
    hopper::fence_products();
#pragma unroll
    for (int slab = 0; slab < 4; ++slab) {
        const uint64_t b = hopper::matrix_at(kRowsOfV<64>, v, slab * 16 * kRowBytes);
        Products::from_registers<true, 1>(out, weights[slab], b);
    }
    hopper::commit_products();
    hopper::wait_products<1>(scores);
    dump(g_out, scores);
    hopper::wait_products<0>(out);
    dump(g_out + 128 * 32, out);
}

// One slab, added to what d holds, and then in the place of NaN. Tiles are written by ordinary stores.
__global__ void __launch_bounds__(128) accumulate_kernel(const uint32_t* g_queries, const uint32_t* g_keys,
                                                         float* g_out) {
    using Products = hopper::Product<__nv_bfloat16, 64>;
    const uint32_t q = hopper::shared_base(), k = q + 64 * kRowBytes;
    for (int i = threadIdx.x; i < 64 * 32; i += blockDim.x) {  // two columns each
        const uint32_t row = i / 32, chunk = i / 4 % 8, at = row * kRowBytes + (chunk ^ row % 8) * 16 + i % 4 * 4;
        hopper::store_shared(q + at, g_queries[i]);
        hopper::store_shared(k + at, g_keys[i]);
    }
    hopper::fence_async_proxy();
    __syncthreads();
    float d[32];
#pragma unroll
    for (int v = 0; v < 32; ++v) d[v] = static_cast<float>(1000 * threadIdx.x + v);
    hopper::fence_products(d);
    Products::from_shared<true>(d, hopper::matrix_at(kRowsOfK, q), hopper::matrix_at(kRowsOfK, k));
    hopper::commit_products();
    hopper::wait_products<0>(d);
    dump(g_out, d);
#pragma unroll
    for (int v = 0; v < 32; ++v) d[v] = __uint_as_float(0x7fffffff);
    hopper::fence_products(d);
    Products::from_shared<false>(d, hopper::matrix_at(kRowsOfK, q, 32), hopper::matrix_at(kRowsOfK, k, 32));
    hopper::commit_products();
    hopper::wait_products<0>(d);
    dump(g_out + 128 * 32, d);
}

// Each in [-1, 1], for sums of many.
inline int of_query(int row, int column) { return static_cast<int>(mix(row * 256 + column) % 3) - 1; }
inline int of_key(int row, int column) { return static_cast<int>(mix(70000 + row * 256 + column) % 3) - 1; }

// For sums of which bit i tells what slab i has brought: a row of `chosen` takes one element of each slab of `bit`.
inline int chosen(int row, int k) {
    return k % 16 == static_cast<int>(mix(row * 16 + k / 16) % 16) ? 1 << k / 16 : 0;
}
inline int bit(int row, int column) { return mix(row * 256 + column) % 2; }

// A pool of one head whose rows are all one box.
template <typename T>
CUtensorMap map_of(const Memory& memory, int rows, int columns) {
    return encode({memory.as<void>(), rows, 1, columns, columns, columns, rows, std::is_same_v<T, __half>});
}

template <typename T, int N, int kHeadDim, int kGroups, typename Query, typename Key>
Words scores(Query query, Key key) {
    const Memory q(matrix_of<T>(64 * kGroups, kHeadDim, query)), k(matrix_of<T>(N, kHeadDim, key));
    const Output output(128 * kGroups * N / 2);
    const CUtensorMap q_map = map_of<T>(q, 64 * kGroups, kHeadDim), k_map = map_of<T>(k, N, kHeadDim);
    const auto kernel = scores_kernel<T, N, kHeadDim, kGroups>;
    constexpr int kShared = kTileBytes<64 * kGroups + N, kHeadDim> + kPatternBytes;
    allow_shared(kernel, kShared);
    kernel<<<1, 128 * kGroups, kShared, nullptr>>>(q_map, k_map, output.as<float>());
    return output.read();
}

template <int kTurnedSlabs>
Words turned_scores() {
    using T = __nv_bfloat16;
    constexpr int kKeys = 128, kHeadDim = 128;
    const Memory q(matrix_of<T>(64, kHeadDim, of_query)), k(matrix_of<T>(kKeys, kHeadDim, of_key));
    // Where they are taken from registers, what shared memory holds shall not matter.
    const Memory unturned(matrix_of<T>(64, kHeadDim, [](int row, int column) {
        return column < 16 * kTurnedSlabs ? 100 : of_query(row, column);
    }));
    const Output output(128 * kKeys / 2);
    const CUtensorMap q_map = map_of<T>(unturned, 64, kHeadDim), k_map = map_of<T>(k, kKeys, kHeadDim);
    const auto kernel = turned_scores_kernel<T, kKeys, kHeadDim, kTurnedSlabs>;
    constexpr int kShared = kTileBytes<64 + kKeys, kHeadDim> + kPatternBytes;
    allow_shared(kernel, kShared);
    kernel<<<1, 128, kShared, nullptr>>>(q.as<T>(), q_map, k_map, output.as<float>());
    return output.read();
}

template <int kHeadDim, int kRows>
Words values() {
    using T = __nv_bfloat16;
    const Memory weights(matrix_of<T>(64, kRows, chosen)), v(matrix_of<T>(kRows, kHeadDim, bit));
    const Output output(128 * kHeadDim / 2);
    const CUtensorMap v_map = map_of<T>(v, kRows, kHeadDim);
    const auto kernel = values_kernel<T, kHeadDim, kRows>;
    constexpr int kShared = kTileBytes<kRows, kHeadDim> + kPatternBytes;
    allow_shared(kernel, kShared);
    kernel<<<1, 128, kShared, nullptr>>>(weights.as<T>(), v_map, output.as<float>());
    return output.read();
}

// 256 * row + column.
inline Words accumulators() {
    return scores<__nv_bfloat16, 176, 64, 1>([](int row, int k) { return k == 0 ? row : k == 1; },
                                             [](int row, int k) { return k == 0 ? 256 : k == 1 ? row : 0; });
}

template <int N, int kHeadDim, int kGroups>
Words slabs() {
    return scores<__nv_bfloat16, N, kHeadDim, kGroups>(chosen, bit);
}

inline Words fp16() { return scores<__half, 176, 64, 1>(of_query, of_key); }

inline Words chain() {
    using T = __nv_bfloat16;
    const Memory q(matrix_of<T>(64, 64, of_query)), k(matrix_of<T>(64, 64, of_key)), v(matrix_of<T>(64, 64, bit));
    const Output output(2 * 128 * 32);
    const CUtensorMap q_map = map_of<T>(q, 64, 64), k_map = map_of<T>(k, 64, 64), v_map = map_of<T>(v, 64, 64);
    constexpr int kShared = 3 * kTileBytes<64, 64> + kPatternBytes;
    allow_shared(chain_kernel, kShared);
    chain_kernel<<<1, 128, kShared, nullptr>>>(q_map, k_map, v_map, output.as<float>());
    return output.read();
}

inline Words accumulate() {
    using T = __nv_bfloat16;
    const Memory q(matrix_of<T>(64, 64, of_query)), k(matrix_of<T>(64, 64, of_key));
    const Output output(2 * 128 * 32);
    constexpr int kShared = 2 * kTileBytes<64, 64>;
    allow_shared(accumulate_kernel, kShared);
    accumulate_kernel<<<1, 128, kShared, nullptr>>>(q.as<uint32_t>(), k.as<uint32_t>(), output.as<float>());
    return output.read();
}

}  // namespace worldkv::conformance
