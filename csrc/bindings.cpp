// The extension module worldkv_kernels._cuda. Pointers and streams come as integers, so that one build serves
// every release of torch and needs none to build.
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "append/norm_rope_append.h"
#include "attention/segment_attention.h"
#include "compress/compress_chunk.h"

namespace py = pybind11;

namespace {

template <typename T>
T* pointer(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

void norm_rope_append(
    uintptr_t q, uintptr_t k, uintptr_t v, uintptr_t q_out, uintptr_t k_pool, uintptr_t v_pool,
    uintptr_t q_weight, uintptr_t k_weight, uintptr_t table, uintptr_t device_first_row, uintptr_t device_start_frame,
    int64_t first_row, int64_t start_frame,
    int64_t stride_q_token, int64_t stride_k_token, int64_t stride_v_token,
    int64_t stride_q_out_token, int64_t stride_k_pool_row, int64_t stride_v_pool_row,
    int tokens, int heads, int kv_heads, int head_dim, int grid_height, int grid_width, int pairs_time, int pairs_height,
    float eps, bool round_before_rope, bool q_weight_is_float, bool k_weight_is_float, int dtype, uintptr_t stream) {
    worldkv::AppendParams params{};
    params.q = pointer<const void>(q);
    params.k = pointer<const void>(k);
    params.v = pointer<const void>(v);
    params.q_out = pointer<void>(q_out);
    params.k_pool = pointer<void>(k_pool);
    params.v_pool = pointer<void>(v_pool);
    params.q_weight = pointer<const void>(q_weight);
    params.k_weight = pointer<const void>(k_weight);
    params.table = pointer<const float2>(table);
    params.device_first_row = pointer<const int64_t>(device_first_row);
    params.device_start_frame = pointer<const int64_t>(device_start_frame);
    params.first_row = first_row;
    params.start_frame = start_frame;
    params.stride_q_token = stride_q_token;
    params.stride_k_token = stride_k_token;
    params.stride_v_token = stride_v_token;
    params.stride_q_out_token = stride_q_out_token;
    params.stride_k_pool_row = stride_k_pool_row;
    params.stride_v_pool_row = stride_v_pool_row;
    params.tokens = tokens;
    params.heads = heads;
    params.kv_heads = kv_heads;
    params.head_dim = head_dim;
    params.grid_height = grid_height;
    params.grid_width = grid_width;
    params.pairs_time = pairs_time;
    params.pairs_height = pairs_height;
    params.eps = eps;
    params.round_before_rope = round_before_rope;
    params.q_weight_is_float = q_weight_is_float;
    params.k_weight_is_float = k_weight_is_float;
    worldkv::norm_rope_append(params, static_cast<worldkv::Dtype>(dtype), pointer<CUstream_st>(stream));
}

void compress_chunk(
    uintptr_t k, uintptr_t v, uintptr_t out_k, uintptr_t out_v, uintptr_t index, uintptr_t workspace,
    int64_t workspace_bytes, int64_t stride_k_layer, int64_t stride_v_layer, int64_t stride_out_k_layer,
    int64_t stride_out_v_layer, int64_t stride_k_row, int64_t stride_v_row, int64_t stride_out_k_row,
    int64_t stride_out_v_row, int layers, int frames, int frame_tokens, int heads, int head_dim, int keep, int anchor,
    bool pooled, int dtype, uintptr_t stream) {
    worldkv::CompressParams params{};
    params.k = pointer<const void>(k);
    params.v = pointer<const void>(v);
    params.out_k = pointer<void>(out_k);
    params.out_v = pointer<void>(out_v);
    params.index = pointer<int32_t>(index);
    params.workspace = pointer<void>(workspace);
    params.stride_k_layer = stride_k_layer;
    params.stride_v_layer = stride_v_layer;
    params.stride_out_k_layer = stride_out_k_layer;
    params.stride_out_v_layer = stride_out_v_layer;
    params.stride_k_row = stride_k_row;
    params.stride_v_row = stride_v_row;
    params.stride_out_k_row = stride_out_k_row;
    params.stride_out_v_row = stride_out_v_row;
    params.layers = layers;
    params.frames = frames;
    params.frame_tokens = frame_tokens;
    params.heads = heads;
    params.head_dim = head_dim;
    params.keep = keep;
    params.anchor = anchor;
    params.pooled = pooled;
    const int64_t needed = worldkv::compress_workspace_bytes(params);
    if (workspace_bytes < needed) {
        throw std::invalid_argument("compress_chunk: workspace must be of " + std::to_string(needed) + " bytes, got " +
                                    std::to_string(workspace_bytes));
    }
    worldkv::compress_chunk(params, static_cast<worldkv::Dtype>(dtype), pointer<CUstream_st>(stream));
}

void segment_attention(
    uintptr_t q, uintptr_t k, uintptr_t v, uintptr_t out, uintptr_t lse, uintptr_t block_mass, uintptr_t tiles,
    uintptr_t ranges, uintptr_t tail_rows, uintptr_t num_segments, uintptr_t turns, uintptr_t piece_out,
    uintptr_t piece_sums, uintptr_t segment_sums, int64_t rows, int64_t stride_q_token, int64_t stride_q_head,
    int64_t stride_k_row, int64_t stride_k_head, int64_t stride_v_row, int64_t stride_v_head, int64_t stride_out_token,
    int64_t stride_out_head, int q_len, int heads, int kv_heads, int head_dim, int turned_pairs, int max_segments,
    int num_whole, int num_cut, int parts, int processors, int tile_rows, float scale_log2, float scale_power,
    uintptr_t weights, int dtype, uintptr_t stream) {
    worldkv::AttentionParams params{};
    params.q = pointer<const void>(q);
    params.k = pointer<const void>(k);
    params.v = pointer<const void>(v);
    params.out = pointer<void>(out);
    params.lse = pointer<float>(lse);
    params.block_mass = pointer<float>(block_mass);
    params.tiles = pointer<const int2>(tiles);
    params.ranges = pointer<const int4>(ranges);
    params.tail_rows = pointer<const int2>(tail_rows);
    params.num_segments = pointer<const int>(num_segments);
    params.turns = pointer<const float2>(turns);
    params.piece_out = pointer<float>(piece_out);
    params.piece_sums = pointer<float2>(piece_sums);
    params.segment_sums = pointer<float2>(segment_sums);
    params.rows = rows;
    params.stride_q_token = stride_q_token;
    params.stride_q_head = stride_q_head;
    params.stride_k_row = stride_k_row;
    params.stride_k_head = stride_k_head;
    params.stride_v_row = stride_v_row;
    params.stride_v_head = stride_v_head;
    params.stride_out_token = stride_out_token;
    params.stride_out_head = stride_out_head;
    params.q_len = q_len;
    params.heads = heads;
    params.kv_heads = kv_heads;
    params.head_dim = head_dim;
    params.turned_pairs = turned_pairs;
    params.max_segments = max_segments;
    params.num_whole = num_whole;
    params.num_cut = num_cut;
    params.parts = parts;
    params.processors = processors;
    params.tile_rows = tile_rows;
    params.scale_log2 = scale_log2;
    params.scale_power = scale_power;
    worldkv::segment_attention(params, pointer<const float>(weights), static_cast<worldkv::Dtype>(dtype),
                               pointer<CUstream_st>(stream));
}

}  // namespace

PYBIND11_MODULE(_cuda, module) {
    module.doc() = "CUDA kernels of worldkv_kernels";
    module.attr("architectures") = WORLDKV_ARCHITECTURES;
    // Arguments by keyword only: thirty integers in a row are not to be told apart by place.
    module.def(
        "norm_rope_append", &norm_rope_append, py::kw_only(),
        py::arg("q"), py::arg("k"), py::arg("v"), py::arg("q_out"), py::arg("k_pool"), py::arg("v_pool"),
        py::arg("q_weight"), py::arg("k_weight"), py::arg("table"),
        py::arg("device_first_row"), py::arg("device_start_frame"), py::arg("first_row"), py::arg("start_frame"),
        py::arg("stride_q_token"), py::arg("stride_k_token"), py::arg("stride_v_token"),
        py::arg("stride_q_out_token"), py::arg("stride_k_pool_row"), py::arg("stride_v_pool_row"),
        py::arg("tokens"), py::arg("heads"), py::arg("kv_heads"), py::arg("head_dim"), py::arg("grid_height"),
        py::arg("grid_width"), py::arg("pairs_time"), py::arg("pairs_height"), py::arg("eps"), py::arg("round_before_rope"),
        py::arg("q_weight_is_float"), py::arg("k_weight_is_float"), py::arg("dtype"), py::arg("stream"));
    module.def(
        "compress_chunk", &compress_chunk, py::kw_only(),
        py::arg("k"), py::arg("v"), py::arg("out_k"), py::arg("out_v"), py::arg("index"), py::arg("workspace"),
        py::arg("workspace_bytes"), py::arg("stride_k_layer"), py::arg("stride_v_layer"),
        py::arg("stride_out_k_layer"), py::arg("stride_out_v_layer"), py::arg("stride_k_row"), py::arg("stride_v_row"),
        py::arg("stride_out_k_row"), py::arg("stride_out_v_row"), py::arg("layers"), py::arg("frames"),
        py::arg("frame_tokens"), py::arg("heads"), py::arg("head_dim"), py::arg("keep"), py::arg("anchor"),
        py::arg("pooled"), py::arg("dtype"), py::arg("stream"));
    module.def(
        "segment_attention", &segment_attention, py::kw_only(),
        py::arg("q"), py::arg("k"), py::arg("v"), py::arg("out"), py::arg("lse"), py::arg("block_mass"),
        py::arg("tiles"), py::arg("ranges"), py::arg("tail_rows"), py::arg("num_segments"), py::arg("turns"),
        py::arg("piece_out"), py::arg("piece_sums"), py::arg("segment_sums"), py::arg("rows"),
        py::arg("stride_q_token"), py::arg("stride_q_head"), py::arg("stride_k_row"), py::arg("stride_k_head"),
        py::arg("stride_v_row"), py::arg("stride_v_head"), py::arg("stride_out_token"), py::arg("stride_out_head"),
        py::arg("q_len"), py::arg("heads"), py::arg("kv_heads"), py::arg("head_dim"), py::arg("turned_pairs"),
        py::arg("max_segments"), py::arg("num_whole"), py::arg("num_cut"), py::arg("parts"), py::arg("processors"),
        py::arg("tile_rows"), py::arg("scale_log2"), py::arg("scale_power"), py::arg("weights"),
        py::arg("dtype"), py::arg("stream"));
}
