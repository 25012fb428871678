// RMSNorm, 3D RoPE and the write into the KV pool. No torch, no pybind11: raw device pointers and a stream.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "../dtype.h"

namespace worldkv {

// Strides are in elements. Rows are dense: heads * head_dim numbers, of k, v and the pools kv_heads * head_dim, 16-byte
// aligned.
struct AppendParams {
    const void* q;
    const void* k;
    const void* v;
    void* q_out;
    void* k_pool;
    void* v_pool;
    const void* q_weight;  // null: no norm
    const void* k_weight;
    const float2* table;  // [positions, head_dim / 2] of (cos, sin); null: no rotation
    const int64_t* device_first_row;  // null: the numbers below
    const int64_t* device_start_frame;
    int64_t first_row, start_frame;
    int64_t stride_q_token, stride_k_token, stride_v_token;
    int64_t stride_q_out_token, stride_k_pool_row, stride_v_pool_row;
    int tokens, heads, kv_heads, head_dim;
    int grid_height, grid_width;
    int pairs_time, pairs_height;
    float eps;
    bool round_before_rope;
    bool q_weight_is_float, k_weight_is_float;  // otherwise the dtype of q
};

// Enqueues on `stream`. Throws std::invalid_argument on what it does not support and std::runtime_error when the
// launch fails.
void norm_rope_append(const AppendParams& params, Dtype dtype, cudaStream_t stream);

}  // namespace worldkv
