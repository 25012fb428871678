// The extension module worldkv_kernels._cuda. Pointers and streams come as integers, so that one build serves
// every release of torch and needs none to build.
#include <pybind11/pybind11.h>

#include "append/norm_rope_append.h"

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
    int tokens, int heads, int head_dim, int grid_height, int grid_width, int pairs_time, int pairs_height,
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
        py::arg("tokens"), py::arg("heads"), py::arg("head_dim"), py::arg("grid_height"), py::arg("grid_width"),
        py::arg("pairs_time"), py::arg("pairs_height"), py::arg("eps"), py::arg("round_before_rope"),
        py::arg("q_weight_is_float"), py::arg("k_weight_is_float"), py::arg("dtype"), py::arg("stream"));
}
