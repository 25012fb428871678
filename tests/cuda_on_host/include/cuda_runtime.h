// What csrc uses of CUDA, for the host's C++ compiler. scheduler.cpp runs the threads.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <string>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __shared__ static thread_local  // the scheduler gives each block its own copy

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
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};

using cudaStream_t = struct CUstream_st*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidConfiguration = 9 };
cudaError_t cudaGetLastError();
const char* cudaGetErrorString(cudaError_t error);

extern uint3 threadIdx, blockIdx;  // of the thread that runs
extern dim3 blockDim, gridDim;

namespace cuda_on_host {

// Runs `thread` as every thread of a grid, one block of it beside others. Throws std::runtime_error on a fault.
void launch(const std::function<void()>& thread, dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream);

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
unsigned among_lanes(Place place, unsigned mask, unsigned value, int source, Combine combine);

inline int lane() { return threadIdx.x % 32; }

template <typename T>
T shuffle(Place place, unsigned mask, T value, int source) {
    static_assert(sizeof(T) == 4);
    unsigned bits;
    memcpy(&bits, &value, 4);
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

#define FILE_LINE const char *file = __builtin_FILE(), int line = __builtin_LINE()
#define PLACE \
    { __func__, file, line }

inline void __syncthreads(FILE_LINE) { cuda_on_host::barrier(PLACE); }

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
inline float __fdiv_rn(float x, float y) { return x / y; }
inline float __fsqrt_rn(float x) { return std::sqrt(x); }
inline float __frcp_rn(float x) { return 1.f / x; }
using std::min;
