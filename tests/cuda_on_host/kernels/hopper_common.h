// What the kernels for test_hopper_on_host.py share: maps of tensors [rows, heads, columns].
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>
#include <attention/hopper.cuh>

#include <stdexcept>
#include <string>

namespace hopper_tests {

struct Tensor {
    const void* numbers;
    int rows, heads, columns;
};

using Encode = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*, const cuuint64_t*,
                            const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave, CUtensorMapSwizzle,
                            CUtensorMapL2promotion, CUtensorMapFloatOOBfill);

inline Encode encoder() {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found;
    if (cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found) ||
        found != cudaDriverEntryPointSuccess) {
        throw std::runtime_error("no cuTensorMapEncodeTiled");
    }
    return reinterpret_cast<Encode>(function);
}

inline CUtensorMap map_of(const Tensor& tensor, int box_rows, CUtensorMapDataType type) {
    const cuuint64_t sizes[] = {static_cast<cuuint64_t>(tensor.columns), static_cast<cuuint64_t>(tensor.heads),
                                static_cast<cuuint64_t>(tensor.rows)};
    const cuuint64_t strides[] = {2 * sizes[0], 2 * sizes[0] * sizes[1]};
    const cuuint32_t box[] = {64, 1, static_cast<cuuint32_t>(box_rows)}, ones[] = {1, 1, 1};
    CUtensorMap map;
    if (encoder()(&map, type, 3, const_cast<void*>(tensor.numbers), sizes, strides, box, ones,
                  CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                  CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) != CUDA_SUCCESS) {
        throw std::runtime_error("the tensor map was refused");
    }
    return map;
}

// Launches and returns what went wrong, null where nothing did.
template <typename Launch>
const char* fault_of(Launch launch) {
    static std::string fault;
    try {
        launch();
        const cudaError_t error = cudaGetLastError();
        if (error == cudaSuccess) return nullptr;
        fault = cudaGetErrorString(error);
    } catch (const std::exception& error) {
        fault = error.what();
    }
    return fault.c_str();
}

}  // namespace hopper_tests
