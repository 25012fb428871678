// What the facts share: device memory, tensor maps, and numbers to feed in.
#pragma once

#include "attention/hopper.cuh"

#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

namespace worldkv::conformance {

using Words = std::vector<uint32_t>;

constexpr int kRowBytes = 128;       // what the swizzle spans: 64 columns
constexpr int kPatternBytes = 1024;  // after which it repeats

inline void check(cudaError_t error, const char* what) {
    if (error != cudaSuccess) throw std::runtime_error(std::string(what) + " failed: " + cudaGetErrorString(error));
}

// A copy on the device.
class Memory {
public:
    template <typename T>
    explicit Memory(const std::vector<T>& from) {
        void* data = nullptr;
        check(cudaMalloc(&data, from.size() * sizeof(T)), "cudaMalloc");
        data_.reset(data, cudaFree);
        check(cudaMemcpy(data, from.data(), from.size() * sizeof(T), cudaMemcpyHostToDevice), "a copy to the device");
    }
    template <typename T>
    T* as() const {
        return static_cast<T*>(data_.get());
    }

private:
    std::shared_ptr<void> data_;
};

// Words that a kernel is to write, all of them.
class Output {
public:
    explicit Output(size_t count) : count_(count), memory_(Words(count, 0xdeadbeef)) {}

    template <typename T>
    T* as() const {
        return memory_.as<T>();
    }
    uint32_t* words() const { return as<uint32_t>(); }
    Words read() const {
        check(cudaGetLastError(), "the launch");
        check(cudaDeviceSynchronize(), "the kernel");
        Words words(count_);
        check(cudaMemcpy(words.data(), memory_.as<void>(), 4 * count_, cudaMemcpyDeviceToHost), "a copy to the host");
        return words;
    }

private:
    size_t count_;
    Memory memory_;
};

template <typename Kernel>
void allow_shared(Kernel kernel, int bytes) {
    constexpr auto kMost = cudaFuncAttributeMaxDynamicSharedMemorySize;
    check(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), kMost, bytes), "asking for shared memory");
}

// A tensor [rows, heads, columns] of 16-bit numbers, copied in boxes of `box_rows` rows and 64 columns of one head.
// Strides in elements.
struct Mapped {
    const void* data;
    int64_t rows, heads, columns, stride_row, stride_head;
    int box_rows;
    bool half = false;
};

inline CUtensorMap encode(const Mapped& x) {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found;
    check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found),
          "looking for cuTensorMapEncodeTiled in the driver");
    if (found != cudaDriverEntryPointSuccess || !function) {
        throw std::runtime_error("the driver has no cuTensorMapEncodeTiled, of CUDA 12.0 or later");
    }
    const cuuint64_t sizes[] = {cuuint64_t(x.columns), cuuint64_t(x.heads), cuuint64_t(x.rows)};
    const cuuint64_t strides[] = {cuuint64_t(2 * x.stride_head), cuuint64_t(2 * x.stride_row)};  // bytes
    const cuuint32_t box[] = {64, 1, cuuint32_t(x.box_rows)}, steps[] = {1, 1, 1};
    CUtensorMap map;
    const CUresult result = reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function)(
        &map, x.half ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 3,
        const_cast<void*>(x.data), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
        CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    if (result != CUDA_SUCCESS) {
        throw std::runtime_error("cuTensorMapEncodeTiled failed with " + std::to_string(result));
    }
    return map;
}

inline uint32_t mix(uint32_t x) {
    x *= 0x9e3779b1;
    x ^= x >> 15;
    x *= 0x85ebca77;
    return x ^ x >> 13;
}

// Of a number that T holds exactly and that is no denormal of it.
template <typename T>
uint16_t bits_of(float x);
template <>
inline uint16_t bits_of<__nv_bfloat16>(float x) {
    uint32_t wide;
    memcpy(&wide, &x, 4);
    return wide >> 16;
}
template <>
inline uint16_t bits_of<__half>(float x) {
    uint32_t wide;
    memcpy(&wide, &x, 4);
    const uint32_t magnitude = wide & 0x7fffffff;
    return wide >> 16 & 0x8000 | (magnitude ? (magnitude >> 13) - (112 << 10) : 0);
}

// [rows, columns], each number by its row and column.
template <typename T, typename Number>
std::vector<uint16_t> matrix_of(int rows, int columns, Number number) {
    std::vector<uint16_t> all(rows * columns);
    for (int row = 0; row < rows; ++row) {
        for (int column = 0; column < columns; ++column) {
            all[row * columns + column] = bits_of<T>(static_cast<float>(number(row, column)));
        }
    }
    return all;
}

}  // namespace worldkv::conformance
