// Launches and what else the host asks of the CUDA runtime.
#include "scheduler.h"

#include <map>
#include <stdexcept>
#include <utility>

namespace cuda_on_host {
namespace {

constexpr int kUnasked = 48 << 10;  // bytes of dynamic shared memory that any kernel may have

cudaError_t g_last_error = cudaSuccess;
std::map<const void*, int> g_dynamic_bytes;  // that a kernel may have, where it was asked for
uint64_t g_seed;
int g_launches;  // since it was given

bool fits(dim3 grid, dim3 block) {
    const uint64_t num_threads = static_cast<uint64_t>(block.x) * block.y * block.z;
    return num_threads > 0 && num_threads <= kMaxThreads && grid.x > 0 && grid.x <= INT32_MAX && grid.y > 0 &&
           grid.y <= 65535 && grid.z > 0 && grid.z <= 65535;
}

}  // namespace

void launch(const void* kernel, const std::function<void()>& thread, dim3 grid, dim3 block, size_t shared_bytes,
            cudaStream_t) {
    const auto asked = g_dynamic_bytes.find(kernel);
    if (!fits(grid, block)) {
        g_last_error = cudaErrorInvalidConfiguration;
        return;
    }
    if (shared_bytes > static_cast<size_t>(asked == g_dynamic_bytes.end() ? kUnasked : asked->second)) {
        g_last_error = cudaErrorInvalidValue;
        return;
    }
    ++g_launches;
    try {
        run(thread, grid, block, shared_bytes);
    } catch (const std::exception& error) {
        throw std::runtime_error(std::string(error.what()) + " (launch " + std::to_string(g_launches) + " of seed " +
                                 std::to_string(g_seed) + ")");
    }
}

cudaError_t allow_dynamic_bytes(const void* kernel, cudaFuncAttribute attribute, int bytes) {
    if (attribute == cudaFuncAttributePreferredSharedMemoryCarveout) return cudaSuccess;
    if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize || bytes < 0 || bytes > kMaxDynamicBytes) {
        return g_last_error = cudaErrorInvalidValue;
    }
    g_dynamic_bytes[kernel] = bytes;
    return cudaSuccess;
}

}  // namespace cuda_on_host

cudaError_t cudaGetLastError() { return std::exchange(cuda_on_host::g_last_error, cudaSuccess); }

const char* cudaGetErrorString(cudaError_t error) {
    switch (error) {
        case cudaSuccess: return "no error";
        case cudaErrorInvalidValue: return "invalid argument";
        case cudaErrorInvalidConfiguration: return "invalid configuration argument";
        default: return "an error of the driver";
    }
}

extern "C" __attribute__((visibility("default"))) void cuda_on_host_seed(uint64_t seed) {
    cuda_on_host::seed(seed);
    cuda_on_host::g_seed = seed;
    cuda_on_host::g_launches = 0;
}
