// 16 bytes of numbers, and their way to fp32 and back.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace worldkv {

template <typename T>
struct alignas(16) Vector {
    static constexpr int kSize = 16 / sizeof(T);
    T x[kSize];
};

__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
__device__ __forceinline__ float to_float(float x) { return x; }

template <typename T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ __nv_bfloat16 from_float(float x) {
    return __float2bfloat16_rn(x);
}
template <>
__device__ __forceinline__ __half from_float(float x) {
    return __float2half_rn(x);
}

}  // namespace worldkv
