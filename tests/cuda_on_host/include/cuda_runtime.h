// What csrc uses of CUDA, for the host's C++ compiler. scheduler.cpp runs the threads.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <string>
#include <type_traits>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __shared__ static thread_local  // the scheduler gives each block its own copy
#define CUDART_VERSION 13000
#define __CUDA_ARCH_FEAT_SM90_ALL  // as for compute_90a

struct uint3 {
    unsigned x, y, z;
};
struct dim3 : uint3 {
    dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : uint3{x, y, z} {}
};
struct alignas(8) float2 {
    float x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
struct alignas(8) int2 {
    int x, y;
};
struct alignas(16) int4 {
    int x, y, z, w;
};
struct alignas(8) uint2 {
    unsigned x, y;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline int2 make_int2(int x, int y) { return {x, y}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

using cudaStream_t = struct CUstream_st*;
enum cudaError_t {
    cudaSuccess = 0,
    cudaErrorInvalidValue = 1,
    cudaErrorMemoryAllocation = 2,
    cudaErrorInvalidConfiguration = 9,
    cudaErrorInsufficientDriver = 35,
    cudaErrorSymbolNotFound = 500
};
cudaError_t cudaGetLastError();
const char* cudaGetErrorString(cudaError_t error);

enum cudaFuncAttribute {
    cudaFuncAttributeMaxDynamicSharedMemorySize = 8,
    cudaFuncAttributePreferredSharedMemoryCarveout = 9
};
enum { cudaEnableDefault = 0 };
enum cudaDriverEntryPointQueryResult {
    cudaDriverEntryPointSuccess = 0,
    cudaDriverEntryPointSymbolNotFound = 1,
    cudaDriverEntryPointVersionNotSufficent = 2
};
cudaError_t cudaGetDriverEntryPointByVersion(const char* symbol, void** function, unsigned version,
                                             unsigned long long flags, cudaDriverEntryPointQueryResult* result);

// Memory of the device is the host's, which has all done when a launch returns.
enum cudaMemcpyKind { cudaMemcpyHostToDevice = 1, cudaMemcpyDeviceToHost = 2 };
inline cudaError_t cudaMalloc(void** address, size_t bytes) {
    *address = std::aligned_alloc(256, (bytes + 255) / 256 * 256);
    return *address ? cudaSuccess : cudaErrorMemoryAllocation;
}
inline cudaError_t cudaFree(void* address) {
    std::free(address);
    return cudaSuccess;
}
inline cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind) {
    memcpy(to, from, bytes);
    return cudaSuccess;
}
inline cudaError_t cudaDeviceSynchronize() { return cudaSuccess; }
inline cudaError_t cudaMemsetAsync(void* address, int value, size_t bytes, cudaStream_t) {
    memset(address, value, bytes);
    return cudaSuccess;
}

extern uint3 threadIdx, blockIdx;  // of the thread that runs
extern dim3 blockDim, gridDim;

namespace cuda_on_host {

// Runs `thread` as every thread of a grid, one block of it beside others. Throws std::runtime_error on a fault.
void launch(const void* kernel, const std::function<void()>& thread, dim3 grid, dim3 block, size_t shared_bytes,
            cudaStream_t stream);
cudaError_t allow_dynamic_bytes(const void* kernel, cudaFuncAttribute attribute, int value);

[[noreturn]] void fault(const std::string& what);  // in a thread; ends the launch
void let_others_run(bool spins);                   // `spins`: this thread waits for what another one does

// Where in the source a thread stops for others. They have to stop at the same place.
struct Place {
    const char *call, *file;
    int line;
};
void barrier(Place place);

// By all lanes of `mask`: `value` of lane `source`, or where there is `combine`, of all lanes together.
using Combine = unsigned (*)(unsigned, unsigned);
unsigned among_lanes(Place place, unsigned mask, unsigned value, int source, Combine combine,
                     bool orders_memory = false);

inline int lane() { return threadIdx.x % 32; }

namespace hopper {
void check_number(unsigned bits, Place place);  // is none that products were writing
}

template <typename T>
T shuffle(Place place, unsigned mask, T value, int source) {
    static_assert(sizeof(T) == 4);
    unsigned bits;
    memcpy(&bits, &value, 4);
    if (std::is_same_v<T, float>) hopper::check_number(bits, place);
    bits = among_lanes(place, mask, bits, source, nullptr);
    memcpy(&value, &bits, 4);
    return value;
}

// An access as wide as T, as the device makes it: a multiple of its size.
template <typename T>
T* aligned(T* address) {
    if (reinterpret_cast<uintptr_t>(address) % sizeof(T)) fault("a misaligned address");
    return address;
}

inline int load_acquire(const int* address) {
    let_others_run(true);
    return __atomic_load_n(aligned(address), __ATOMIC_ACQUIRE);
}

}  // namespace cuda_on_host

template <typename Kernel>
cudaError_t cudaFuncSetAttribute(Kernel* kernel, cudaFuncAttribute attribute, int value) {
    return cuda_on_host::allow_dynamic_bytes(reinterpret_cast<const void*>(kernel), attribute, value);
}

#define FILE_LINE const char *file = __builtin_FILE(), int line = __builtin_LINE()
#define PLACE \
    { __func__, file, line }

inline void __syncthreads(FILE_LINE) { cuda_on_host::barrier(PLACE); }
inline void __syncwarp(unsigned mask = 0xffffffff, FILE_LINE) {
    cuda_on_host::among_lanes(PLACE, mask, 0, cuda_on_host::lane(), nullptr, true);
}

template <typename T>
T __shfl_sync(unsigned mask, T value, int source, FILE_LINE) {
    return cuda_on_host::shuffle(PLACE, mask, value, source & 31);
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, FILE_LINE) {
    const int higher = cuda_on_host::lane() + static_cast<int>(delta);
    return cuda_on_host::shuffle(PLACE, mask, value, higher > 31 ? cuda_on_host::lane() : higher);
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, FILE_LINE) {
    return cuda_on_host::shuffle(PLACE, mask, value, cuda_on_host::lane() ^ lane_mask);
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, FILE_LINE) {
    const int lower = cuda_on_host::lane() - static_cast<int>(delta);
    return cuda_on_host::shuffle(PLACE, mask, value, lower < 0 ? cuda_on_host::lane() : lower);
}
inline unsigned __ballot_sync(unsigned mask, bool predicate, FILE_LINE) {
    const unsigned bit = static_cast<unsigned>(predicate) << cuda_on_host::lane();
    return cuda_on_host::among_lanes(PLACE, mask, bit, 0, [](unsigned a, unsigned b) { return a | b; });
}
inline int __any_sync(unsigned mask, bool predicate, FILE_LINE) {
    return cuda_on_host::among_lanes(PLACE, mask, predicate, 0, [](unsigned a, unsigned b) { return a | b; }) != 0;
}
inline unsigned __reduce_or_sync(unsigned mask, unsigned value, FILE_LINE) {
    return cuda_on_host::among_lanes(PLACE, mask, value, 0, [](unsigned a, unsigned b) { return a | b; });
}
inline unsigned __reduce_and_sync(unsigned mask, unsigned value, FILE_LINE) {
    return cuda_on_host::among_lanes(PLACE, mask, value, 0, [](unsigned a, unsigned b) { return a & b; });
}
template <typename T>
T __reduce_add_sync(unsigned mask, T value, FILE_LINE) {
    return cuda_on_host::among_lanes(PLACE, mask, value, 0, [](unsigned a, unsigned b) { return a + b; });
}

#undef FILE_LINE
#undef PLACE

// An atomic operation is where another block may come between.
inline int atomicAdd(int* address, int value) {
    cuda_on_host::let_others_run(false);
    return __atomic_fetch_add(cuda_on_host::aligned(address), value, __ATOMIC_RELAXED);
}
inline float atomicAdd(float* address, float value) {
    cuda_on_host::let_others_run(false);
    const float old = *cuda_on_host::aligned(address);
    *address = old + value;
    return old;
}
inline void __threadfence() { cuda_on_host::let_others_run(false); }
inline void __nanosleep(unsigned) { cuda_on_host::let_others_run(true); }

template <typename T>
T __ldg(const T* address) {
    return *cuda_on_host::aligned(address);
}
template <typename T>
T __ldcs(const T* address) {
    return *cuda_on_host::aligned(address);
}
template <typename T>
T __ldcg(const T* address) {
    return *cuda_on_host::aligned(address);
}
template <typename T>
void __stcs(T* address, const T& value) {
    *cuda_on_host::aligned(address) = value;
}

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x ? __builtin_clz(x) : 32; }
inline float __uint_as_float(unsigned x) {
    float y;
    memcpy(&y, &x, 4);
    return y;
}
inline unsigned __float_as_uint(float x) {
    unsigned y;
    memcpy(&y, &x, 4);
    return y;
}
inline float __int_as_float(int x) { return __uint_as_float(x); }
inline int __float_as_int(float x) { return __float_as_uint(x); }
inline float __fmaf_rn(float x, float y, float z) { return std::fma(x, y, z); }
inline float __fmul_rn(float x, float y) { return x * y; }
inline float __fadd_rn(float x, float y) { return x + y; }
inline float __fdiv_rn(float x, float y) { return x / y; }
inline float __fsqrt_rn(float x) { return std::sqrt(x); }
inline float __frcp_rn(float x) { return 1.f / x; }
[[noreturn]] inline void __trap() { cuda_on_host::fault("a trap"); }
using std::max;
using std::min;
