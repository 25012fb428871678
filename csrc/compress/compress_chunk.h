// Similarity to the anchor frame's mean key, selection and compaction of a chunk, for one layer or all of them. No
// torch, no pybind11: raw device pointers and a stream.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "../dtype.h"

namespace worldkv {

// Strides are in elements. Rows are dense: heads * head_dim numbers, 16-byte aligned.
struct CompressParams {
    const void* k;  // [layers, frames * frame_tokens] rows
    const void* v;
    void* out_k;  // [layers, kept] rows: the anchor frame, then the kept tokens in ascending order
    void* out_v;
    int32_t* index;   // [layers, kept], contiguous: the token in each row
    void* workspace;  // compress_workspace_bytes(), 16-byte aligned, with anything in it; null where that is 0
    int64_t stride_k_layer, stride_v_layer, stride_out_k_layer, stride_out_v_layer;
    int64_t stride_k_row, stride_v_row, stride_out_k_row, stride_out_v_row;
    int layers, frames, frame_tokens, heads, head_dim;
    int keep;  // tokens kept of each frame but the anchor, on average where pooled; frame_tokens or more: all
    int anchor;
    bool pooled;
};

// The mean key, a 4-byte key a candidate, and counters: 0 where all is kept.
int64_t compress_workspace_bytes(const CompressParams& params);

// Enqueues on `stream`: two kernels, or one where all is kept. Throws std::invalid_argument on what it does not support
// and std::runtime_error when a launch fails.
void compress_chunk(const CompressParams& params, Dtype dtype, cudaStream_t stream);

}  // namespace worldkv
