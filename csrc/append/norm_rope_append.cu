// One block handles one token of one of q, k and v. A thread keeps its share of the row in registers, as 16-byte
// vectors, so that every number is read once and written once: sum of squares, norm, rotation, store.
#include "norm_rope_append.h"

#include "../vector.cuh"

#include <stdexcept>
#include <string>

namespace worldkv {
namespace {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / 32;
constexpr int kPerVector = 8;  // 16-bit numbers in 16 bytes

// The same tree of additions in every block, so the result has the same bits every time.
__device__ __forceinline__ float block_sum(float value) {
    __shared__ float s_warp_sums[kWarps];
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) value += __shfl_xor_sync(0xffffffff, value, offset);
    if (threadIdx.x % 32 == 0) s_warp_sums[threadIdx.x / 32] = value;
    __syncthreads();
    float total = 0.f;
#pragma unroll
    for (int warp = 0; warp < kWarps; ++warp) total += s_warp_sums[warp];
    return total;
}

template <typename T>
__device__ __forceinline__ void load_weight(const void* g_weight, bool is_float, int column,
                                            float (&weight)[kPerVector]) {
    if (is_float) {
        const float4* g_float = reinterpret_cast<const float4*>(static_cast<const float*>(g_weight) + column);
        const float4 low = __ldg(g_float), high = __ldg(g_float + 1);
        weight[0] = low.x, weight[1] = low.y, weight[2] = low.z, weight[3] = low.w;
        weight[4] = high.x, weight[5] = high.y, weight[6] = high.z, weight[7] = high.w;
    } else {
        const Vector<T> same = *reinterpret_cast<const Vector<T>*>(static_cast<const T*>(g_weight) + column);
#pragma unroll
        for (int i = 0; i < kPerVector; ++i) weight[i] = to_float(same.x[i]);
    }
}

template <typename T, int kVectors>
__global__ void __launch_bounds__(kThreads) norm_rope_append_kernel(const __grid_constant__ AppendParams p) {
    const int64_t token = blockIdx.x;
    const int tensor = blockIdx.y;
    const int columns = (tensor == 0 ? p.heads : p.kv_heads) * p.head_dim;
    const int64_t pool_row = (p.device_first_row ? *p.device_first_row : p.first_row) + token;

    // What this block reads and where it writes.
    const T* g_in;
    T* g_out;
    const void* g_weight = nullptr;
    bool weight_is_float = false;
    if (tensor == 0) {
        g_in = static_cast<const T*>(p.q) + token * p.stride_q_token;
        g_out = static_cast<T*>(p.q_out) + token * p.stride_q_out_token;
        g_weight = p.q_weight;
        weight_is_float = p.q_weight_is_float;
    } else if (tensor == 1) {
        g_in = static_cast<const T*>(p.k) + token * p.stride_k_token;
        g_out = static_cast<T*>(p.k_pool) + pool_row * p.stride_k_pool_row;
        g_weight = p.k_weight;
        weight_is_float = p.k_weight_is_float;
    } else {
        g_in = static_cast<const T*>(p.v) + token * p.stride_v_token;
        g_out = static_cast<T*>(p.v_pool) + pool_row * p.stride_v_pool_row;
    }

    // Load the row: all reads in flight before the first use.
    Vector<T> r_row[kVectors];
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
        const int column = (i * kThreads + threadIdx.x) * kPerVector;
        if (column < columns) r_row[i] = *reinterpret_cast<const Vector<T>*>(g_in + column);
    }

    // Norm: the reciprocal root of the mean square, over all heads.
    float rstd = 1.f;
    if (g_weight) {
        float squares = 0.f;
#pragma unroll
        for (int i = 0; i < kVectors; ++i) {
            if ((i * kThreads + threadIdx.x) * kPerVector < columns) {
#pragma unroll
                for (int j = 0; j < kPerVector; ++j) squares += to_float(r_row[i].x[j]) * to_float(r_row[i].x[j]);
            }
        }
        rstd = __frcp_rn(__fsqrt_rn(block_sum(squares) / columns + p.eps));
    }

    const bool rotates = p.table && tensor < 2;
    const int64_t start_frame = p.device_start_frame ? *p.device_start_frame : p.start_frame;
    const int frame = static_cast<int>(start_frame) + static_cast<int>(token) / (p.grid_height * p.grid_width);
    const int row = static_cast<int>(token) / p.grid_width % p.grid_height;
    const int col = static_cast<int>(token) % p.grid_width;
    const int pairs = p.head_dim / 2;

    // Scale, turn and store.
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
        const int column = (i * kThreads + threadIdx.x) * kPerVector;
        if (column >= columns) continue;
        float y[kPerVector];
#pragma unroll
        for (int j = 0; j < kPerVector; ++j) y[j] = to_float(r_row[i].x[j]);
        if (g_weight) {
            float weight[kPerVector];
            load_weight<T>(g_weight, weight_is_float, column, weight);
#pragma unroll
            for (int j = 0; j < kPerVector; ++j) {
                y[j] *= rstd;
                if (p.round_before_rope) y[j] = to_float(from_float<T>(y[j]));
                y[j] *= weight[j];
                if (p.round_before_rope && !weight_is_float) y[j] = to_float(from_float<T>(y[j]));
            }
        }
        if (rotates) {
#pragma unroll
            for (int j = 0; j < kPerVector; j += 2) {
                const int pair = (column + j) % p.head_dim / 2;
                const int position = pair < p.pairs_time ? frame : pair < p.pairs_time + p.pairs_height ? row : col;
                const float2 turn = __ldg(p.table + static_cast<int64_t>(position) * pairs + pair);
                const float real = y[j], imag = y[j + 1];
                y[j] = real * turn.x - imag * turn.y;
                y[j + 1] = real * turn.y + imag * turn.x;
            }
        }
        Vector<T> out;
#pragma unroll
        for (int j = 0; j < kPerVector; ++j) out.x[j] = from_float<T>(y[j]);
        *reinterpret_cast<Vector<T>*>(g_out + column) = out;
    }
}

template <typename T>
void launch(const AppendParams& p, cudaStream_t stream) {
    const dim3 blocks(p.tokens, 3);
    const int vectors = (p.heads * p.head_dim + kThreads * kPerVector - 1) / (kThreads * kPerVector);
    if (vectors <= 2) {  // 12 heads of 128
        norm_rope_append_kernel<T, 2><<<blocks, kThreads, 0, stream>>>(p);
    } else if (vectors <= 5) {  // 40 heads of 128
        norm_rope_append_kernel<T, 5><<<blocks, kThreads, 0, stream>>>(p);
    } else {  // up to 64 heads of 128, 128 of 64
        norm_rope_append_kernel<T, 8><<<blocks, kThreads, 0, stream>>>(p);
    }
}

void check_rows(const char* name, const void* data, int64_t stride) {
    if (reinterpret_cast<uintptr_t>(data) % 16 || stride % kPerVector) {
        throw std::invalid_argument(std::string("norm_rope_append: ") + name +
                                    " must have rows aligned to 16 bytes for backend 'cuda', got a row stride of " +
                                    std::to_string(stride) + " elements");
    }
}

}  // namespace

void norm_rope_append(const AppendParams& p, Dtype dtype, cudaStream_t stream) {
    check_rows("q", p.q, p.stride_q_token);
    check_rows("k", p.k, p.stride_k_token);
    check_rows("v", p.v, p.stride_v_token);
    check_rows("out", p.q_out, p.stride_q_out_token);
    check_rows("k_pool", p.k_pool, p.stride_k_pool_row);
    check_rows("v_pool", p.v_pool, p.stride_v_pool_row);
    check_rows("q_weight", p.q_weight, 0);
    check_rows("k_weight", p.k_weight, 0);
    if (p.kv_heads < 1 || p.kv_heads > p.heads) {
        throw std::invalid_argument("norm_rope_append: k_pool must be of 1 to " + std::to_string(p.heads) +
                                    " heads, got " + std::to_string(p.kv_heads));
    }
    if (p.heads < 1 || (p.head_dim != 64 && p.head_dim != 128) || p.heads * p.head_dim > 8192) {
        throw std::invalid_argument(
            "norm_rope_append: q must be of 1 to 64 heads with head_dim 128, or to 128 with head_dim 64, for backend "
            "'cuda', got " + std::to_string(p.heads) + " with head_dim " + std::to_string(p.head_dim));
    }
    if (dtype == Dtype::kBFloat16) {
        launch<__nv_bfloat16>(p, stream);
    } else if (dtype == Dtype::kFloat16) {
        launch<__half>(p, stream);
    } else {
        throw std::invalid_argument("norm_rope_append: q must be bfloat16 or float16 for backend 'cuda'");
    }
    const cudaError_t error = cudaGetLastError();
    if (error != cudaSuccess) {
        throw std::runtime_error(std::string("norm_rope_append: launch failed: ") + cudaGetErrorString(error));
    }
}

}  // namespace worldkv
