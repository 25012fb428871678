// Small kernels, most of them wrong, for test_cuda_on_host.py.
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

namespace {

constexpr int kThreads = 96;
constexpr unsigned kFullWarp = 0xffffffff;

template <bool kBarrier>
__global__ void mirror(int* g_out) {
    __shared__ int s_numbers[kThreads];
    s_numbers[threadIdx.x] = threadIdx.x;
    if (kBarrier) __syncthreads();
    g_out[blockIdx.x * kThreads + threadIdx.x] = s_numbers[kThreads - 1 - threadIdx.x];
}

template <bool kSecondBarrier>
__global__ void rotate_twice(int* g_out) {
    __shared__ int s_numbers[kThreads];
    int number = threadIdx.x;
    for (int i = 0; i < 2; ++i) {
        s_numbers[threadIdx.x] = number;
        __syncthreads();
        number = s_numbers[(threadIdx.x + 40) % kThreads];
        if (kSecondBarrier) __syncthreads();
    }
    g_out[blockIdx.x * kThreads + threadIdx.x] = number;
}

__global__ void read_unset_shared(int* g_out) {
    __shared__ int s_numbers[kThreads];
    g_out[blockIdx.x * kThreads + threadIdx.x] = s_numbers[threadIdx.x];
    s_numbers[threadIdx.x] = 7;
}

__global__ void two_barriers(int*) {
    if (threadIdx.x < 32) {
        __syncthreads();
    } else {
        __syncthreads();
    }
}

// One thread returns, before the others go on or whenever its turn comes.
template <bool kFirst>
__device__ bool returns(int* g_out) {
    if (threadIdx.x == 5) {
        atomicAdd(g_out, 1);
        return true;
    }
    while (kFirst && cuda_on_host::load_acquire(g_out) == 0) __nanosleep(100);
    return false;
}

template <bool kFirst>
__global__ void return_beside_barrier(int* g_out) {
    if (returns<kFirst>(g_out)) return;
    __syncthreads();
}

template <bool kFirst>
__global__ void return_beside_shuffle(int* g_out) {
    if (returns<kFirst>(g_out)) return;
    g_out[threadIdx.x] = __shfl_xor_sync(kFullWarp, static_cast<int>(threadIdx.x), 1);
}

__global__ void lanes_apart(int* g_out) {
    if (threadIdx.x % 2) {
        g_out[threadIdx.x] = __ballot_sync(kFullWarp, true);
    } else {
        g_out[threadIdx.x] = __reduce_or_sync(kFullWarp, 1);
    }
}

__global__ void lane_at_barrier(int* g_out) {
    if (threadIdx.x != 5) g_out[threadIdx.x] = __ballot_sync(kFullWarp, true);
    __syncthreads();
}

__global__ void lane_outside_mask(int* g_out) {
    g_out[threadIdx.x] = __shfl_xor_sync(0x0000ffff, static_cast<int>(threadIdx.x), 1);
}

__global__ void source_outside_mask(int* g_out) {
    if (threadIdx.x < 16) g_out[threadIdx.x] = __shfl_xor_sync(0x0000ffff, static_cast<int>(threadIdx.x), 16);
}

// Each block waits for the one before it, in the order of blockIdx or of tickets.
template <bool kTicket>
__global__ void chain(int* g_out) {
    __shared__ int s_place;
    if (threadIdx.x == 0) {
        s_place = kTicket ? atomicAdd(g_out, 1) : blockIdx.x;
        while (cuda_on_host::load_acquire(g_out + 1) < s_place) __nanosleep(100);
        atomicAdd(g_out + 1, 1);
    }
    __syncthreads();
}

__global__ void spin(int* g_out) {
    while (cuda_on_host::load_acquire(g_out) == 0) __nanosleep(100);
}

__global__ void read_null(int* g_out) { g_out[0] = *__ldg(reinterpret_cast<int* const*>(g_out)); }

__global__ void read_misaligned(int* g_out) { g_out[0] = __ldg(reinterpret_cast<const uint4*>(g_out + 1)).x; }

template <typename Kernel>
void run(Kernel kernel, int* g_out, int blocks) {
    kernel<<<blocks, kThreads, 0, nullptr>>>(g_out);
}

}  // namespace

// Runs a kernel over zeros, or whatever is in g_out. Returns what went wrong, null where nothing did.
extern "C" __attribute__((visibility("default"))) const char* run_small_kernel(const char* name, int* g_out,
                                                                               int blocks) {
    static std::string fault;
    const std::pair<const char*, void (*)(int*)> kernels[] = {
        {"mirror", mirror<true>},
        {"mirror without a barrier", mirror<false>},
        {"rotate twice", rotate_twice<true>},
        {"rotate twice without the second barrier", rotate_twice<false>},
        {"read unset shared memory", read_unset_shared},
        {"two barriers", two_barriers},
        {"return before a barrier", return_beside_barrier<true>},
        {"return beside a barrier", return_beside_barrier<false>},
        {"return before a shuffle", return_beside_shuffle<true>},
        {"return beside a shuffle", return_beside_shuffle<false>},
        {"lanes apart", lanes_apart},
        {"lane at a barrier", lane_at_barrier},
        {"lane outside the mask", lane_outside_mask},
        {"source outside the mask", source_outside_mask},
        {"chain of tickets", chain<true>},
        {"chain of blocks", chain<false>},
        {"spin", spin},
        {"read null", read_null},
        {"read misaligned", read_misaligned},
    };
    try {
        for (const auto& [known, kernel] : kernels) {
            if (!strcmp(known, name)) {
                run(kernel, g_out, blocks);
                return nullptr;
            }
        }
        throw std::logic_error("no such kernel");
    } catch (const std::exception& error) {
        fault = error.what();
        return fault.c_str();
    }
}
