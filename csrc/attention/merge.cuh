// What comes after the pieces: cut items merged, and the shares of segments.
#pragma once

#include "../vector.cuh"
#include "segment_attention.h"

namespace worldkv {

constexpr int kQueries = 128;  // of an item
constexpr float kLarge = 268435456.f;  // 2**28, see kernels/segment_attention.py

// The natural logarithm of a row's sum, of which `maximum` is a logarithm to base 2 in the scale that it was taken by.
// Weights have moved it by up to 24; what tells the scales apart is half-way between them.
template <bool kWeight>
__device__ __forceinline__ float log_sum_exp(const AttentionParams& p, float maximum, float sum) {
    const float large = kWeight ? kLarge * (0.5f + 0.5f * (p.scale_power / p.scale_log2)) : kLarge;
    const float of_scale = fabsf(maximum) < large ? maximum : maximum * (p.scale_log2 / p.scale_power);
    return (of_scale + log2f(sum)) * 0.6931471805599453f;
}

// Of a row's parts, always in the order of their keys.
struct Merged {
    float maximum = -INFINITY, sum = 0.f;
    __device__ __forceinline__ Merged(const float2* sums, int64_t stride, int parts) {
        for (int part = 0; part < parts; ++part) maximum = fmaxf(maximum, sums[part * stride].x);
        for (int part = 0; part < parts; ++part) {
            const float2 of_part = sums[part * stride];
            sum += exp2f(of_part.x - maximum) * of_part.y;
        }
    }
};

// A warp, a row of a cut item; a lane, kHeadDim / 32 of its columns.
template <typename T, int kHeadDim, bool kWeight = false>
__global__ void __launch_bounds__(256) merge_parts_kernel(const __grid_constant__ AttentionParams p) {
    constexpr int kColumns = kHeadDim / 32;
    const int lane = threadIdx.x % 32, in_block = blockIdx.y * 8 + threadIdx.x / 32;
    const int blocks = (p.q_len + kQueries - 1) / kQueries, item = p.num_whole + blockIdx.x;
    const int head = item / blocks, row = item % blocks * kQueries + in_block;
    if (row >= p.q_len) return;
    const int64_t first = static_cast<int64_t>(blockIdx.x) * kQueries + in_block;  // part 0
    const int64_t stride = static_cast<int64_t>(p.num_cut) * kQueries;             // from part to part
    const float2* sums = p.piece_sums + (p.block_mass ? static_cast<int64_t>(p.num_whole) * kQueries : 0) + first;
    const Merged merged(sums, stride, p.parts);
    float out[kColumns] = {};
    for (int part = 0; part < p.parts; ++part) {
        const float weight = exp2f(sums[part * stride].x - merged.maximum);
        const float* of_part = p.piece_out + (first + part * stride) * kHeadDim + lane * kColumns;
#pragma unroll
        for (int i = 0; i < kColumns; ++i) out[i] += weight * of_part[i];
    }
    T* g_out = static_cast<T*>(p.out) + row * p.stride_out_token + head * p.stride_out_head + lane * kColumns;
    const float inverse = 1.f / merged.sum;
#pragma unroll
    for (int i = 0; i < kColumns; ++i) g_out[i] = from_float<T>(out[i] * inverse);
    if (p.lse && lane == 0) {
        p.lse[static_cast<int64_t>(head) * p.q_len + row] = log_sum_exp<kWeight>(p, merged.maximum, merged.sum);
    }
}

// A block, an item and a segment; a thread, a row. The segment's shares of softmax weight, averaged over all queries as
// far as these have a part in it.
__global__ void __launch_bounds__(kQueries) segment_shares_kernel(const __grid_constant__ AttentionParams p) {
    __shared__ float s_shares[kQueries / 32];
    const int blocks = (p.q_len + kQueries - 1) / kQueries, item = blockIdx.x;
    const int head = item / blocks, block = item % blocks;
    const int parts = item < p.num_whole ? 1 : p.parts;
    const Merged merged(p.piece_sums + static_cast<int64_t>(item) * kQueries + threadIdx.x,
                        static_cast<int64_t>(p.num_cut) * kQueries, parts);
    const bool is_query = block * kQueries + static_cast<int>(threadIdx.x) < p.q_len;
    for (int segment = blockIdx.y; segment < p.max_segments; segment += gridDim.y) {
        float share = 0.f;
        for (int part = 0; part < parts; ++part) {
            for (int kind = 0; kind < 2; ++kind) {
                const int64_t piece = item + static_cast<int64_t>(part) * p.num_cut;
                const int64_t entry = (piece * 2 + kind) * p.max_segments + segment;
                const float2 sum = p.segment_sums[entry * kQueries + threadIdx.x];
                if (sum.y > 0.f) share += exp2f(sum.x - merged.maximum) * sum.y;  // else nothing was written there
            }
        }
        share = is_query ? share / merged.sum : 0.f;
#pragma unroll
        for (int step = 16; step > 0; step /= 2) share += __shfl_xor_sync(0xffffffff, share, step);
        if (threadIdx.x % 32 == 0) s_shares[threadIdx.x / 32] = share;
        __syncthreads();
        if (threadIdx.x == 0) {
            const int64_t entry = static_cast<int64_t>(head) * p.max_segments + segment;
            p.block_mass[entry * blocks + block] = (s_shares[0] + s_shares[1] + (s_shares[2] + s_shares[3])) / p.q_len;
        }
        __syncthreads();
    }
}

}  // namespace worldkv
