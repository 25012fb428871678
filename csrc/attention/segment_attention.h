#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "../dtype.h"

namespace worldkv {

// Strides in elements. The tables are those of kernels/segment_attention.py, each on a multiple of 16 bytes.
struct AttentionParams {
    const void *q, *k, *v;  // [q_len, heads, head_dim], [rows, kv_heads, head_dim]
    void* out;              // [q_len, heads, head_dim]
    float* lse;             // [heads, q_len], or null
    float* block_mass;      // [heads, max_segments, blocks of 128 queries]: parts of a mean; null for none
    const int2* tiles;
    const int4* ranges;
    const int2* tail_rows;
    const int* num_segments;
    const float2* turns;  // [capacity, turned_pairs]
    // Scratch. Pieces are whole items, where there is a mass, and the parts of cut ones.
    float* piece_out;      // [num_cut * parts, 128, head_dim]
    float2* piece_sums;    // [pieces, 128]: maximum and sum
    float2* segment_sums;  // [pieces, 2, max_segments, 128]: of full tiles, of tails
    int64_t rows;
    int64_t stride_q_token, stride_q_head, stride_k_row, stride_k_head, stride_v_row, stride_v_head;
    int64_t stride_out_token, stride_out_head;
    int q_len, heads, kv_heads, head_dim;
    int turned_pairs;  // leading pairs of a head that turn with time; 0 where no segment is shifted
    int max_segments;
    int num_whole, num_cut, parts;  // of `deal`
    int processors;                 // thread blocks in all
    int tile_rows;                  // 128 or 176
    float scale_log2, scale_power;
};

// Beside the others, whose machine code a field more would change.
struct WeightedAttentionParams : AttentionParams {
    const float* weights;  // [capacity], logarithms to base 2
};

// `weights` is null where segments have none. Throws std::invalid_argument on what the kernel does not take,
// std::runtime_error when a launch fails.
void segment_attention(const AttentionParams& params, const float* weights, Dtype dtype, cudaStream_t stream);

}  // namespace worldkv
