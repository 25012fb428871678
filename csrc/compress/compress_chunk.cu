// Two kernels, for any number of layers. The first reads the anchor frame's keys once: it copies them and sums them
// by columns. The second takes work in the order of tickets: similarities, of which the last block of a group selects
// in it; the anchor's values, copied while that one selects; then the kept rows. NOTES.md says why.
#include "compress_chunk.h"

#include "../vector.cuh"
#include "group_select.cuh"
#include "selection.h"

#include <climits>
#include <stdexcept>
#include <string>

namespace worldkv {
namespace {

// The anchor kernel: a block sums kSlabVectors vectors of columns, its threads share the rows. 64 bytes of a row are
// two full sectors, and 40 heads of 128 make 160 blocks, enough for every processor.
constexpr int kAnchorThreads = 512;
constexpr int kSlabVectors = 4;
constexpr int kRowLanes = kAnchorThreads / kSlabVectors;
constexpr int kAnchorBatch = 4;  // loads in flight a thread

// The other kernel. Its register cap leaves room for three blocks on a processor, whose loads in flight are
// about 100 KB.
constexpr int kBlocksPerProcessor = 3;
constexpr int kScoreTokens = 2;  // that a warp scores at once, so that the mean is read half as often
constexpr int kScoreBatch = 4;   // loads in flight a thread and token
constexpr int kScoreBlockTokens = kWarps * kScoreTokens;
constexpr int kCopyBatch = 8;

struct Plan : CompressParams {
    float* mean;     // [layers, columns]
    uint32_t* keys;  // [layers, candidates], as of ordered_key
    int* arrived;    // [layers, groups]: blocks that have scored, and one more once the selection is there
    int* ticket;
    int columns, vectors;  // of a row
    int candidates, kept;  // of a layer
    int groups, group_size, group_kept;
    int group_blocks, score_blocks, anchor_blocks, kept_blocks;  // of a layer
    bool whole;  // all is kept: nothing is scored
};

__device__ __forceinline__ const uint4* row_of(const void* g_base, int64_t elements, int element_bytes) {
    return reinterpret_cast<const uint4*>(static_cast<const char*>(g_base) + elements * element_bytes);
}
__device__ __forceinline__ uint4* row_of(void* g_base, int64_t elements, int element_bytes) {
    return reinterpret_cast<uint4*>(static_cast<char*>(g_base) + elements * element_bytes);
}

template <typename T>
__device__ __forceinline__ void widen(const uint4& packed, float (&wide)[Vector<T>::kSize]) {
    const Vector<T>& vector = reinterpret_cast<const Vector<T>&>(packed);
#pragma unroll
    for (int j = 0; j < Vector<T>::kSize; ++j) wide[j] = to_float(vector.x[j]);
}

// The sum over a warp, in every lane, by the same tree every time.
__device__ __forceinline__ float warp_sum(float value) {
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) value += __shfl_xor_sync(kFullWarp, value, offset);
    return value;
}

// Copy the anchor's keys, average them by columns, and set the counters of the next kernel to zero.
template <typename T>
__global__ void __launch_bounds__(kAnchorThreads) anchor_kernel(const __grid_constant__ Plan p) {
    constexpr int kSize = Vector<T>::kSize;
    __shared__ float s_sums[kAnchorThreads / 32][kSlabVectors * kSize];
    const int64_t layer = blockIdx.y;
    const int vector = blockIdx.x * kSlabVectors + threadIdx.x % kSlabVectors;
    const int64_t first_token = static_cast<int64_t>(p.anchor) * p.frame_tokens;

    float sums[kSize] = {};
    for (int first = threadIdx.x / kSlabVectors; first < p.frame_tokens; first += kRowLanes * kAnchorBatch) {
        uint4 r_k[kAnchorBatch];
#pragma unroll
        for (int i = 0; i < kAnchorBatch; ++i) {
            const int row = first + i * kRowLanes;
            const int64_t from = layer * p.stride_k_layer + (first_token + row) * p.stride_k_row;
            if (row < p.frame_tokens) r_k[i] = __ldcs(row_of(p.k, from, sizeof(T)) + vector);
        }
#pragma unroll
        for (int i = 0; i < kAnchorBatch; ++i) {
            const int row = first + i * kRowLanes;
            if (row >= p.frame_tokens) break;
            const int64_t to = layer * p.stride_out_k_layer + row * p.stride_out_k_row;
            __stcs(row_of(p.out_k, to, sizeof(T)) + vector, r_k[i]);
            float wide[kSize];
            widen<T>(r_k[i], wide);
#pragma unroll
            for (int j = 0; j < kSize; ++j) sums[j] += wide[j];
        }
    }

    // Lanes with the same columns, then warps in order.
#pragma unroll
    for (int j = 0; j < kSize; ++j) {
#pragma unroll
        for (int offset = 16; offset >= kSlabVectors; offset /= 2) {
            sums[j] += __shfl_xor_sync(kFullWarp, sums[j], offset);
        }
    }
    if (threadIdx.x % 32 < kSlabVectors) {
#pragma unroll
        for (int j = 0; j < kSize; ++j) s_sums[threadIdx.x / 32][threadIdx.x % 32 * kSize + j] = sums[j];
    }
    __syncthreads();
    if (threadIdx.x < kSlabVectors * kSize) {
        float total = 0.f;
        for (int warp = 0; warp < kAnchorThreads / 32; ++warp) total += s_sums[warp][threadIdx.x];
        const int column = blockIdx.x * kSlabVectors * kSize + threadIdx.x;
        p.mean[layer * p.columns + column] = __fdiv_rn(total, static_cast<float>(p.frame_tokens));
    }

    if (blockIdx.x == 0) {
#pragma unroll 1
        for (int group = threadIdx.x; group < p.groups; group += kAnchorThreads) {
            p.arrived[layer * p.groups + group] = 0;
        }
        if (layer == 0 && threadIdx.x == 0) *p.ticket = 0;
    }
}

__device__ __forceinline__ int load_acquire(const int* g_counter) {
    int value;
    asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(value) : "l"(g_counter) : "memory");
    return value;
}

// Waits until every group of a layer has `count` arrivals. What was written before those may be read afterwards.
__device__ __forceinline__ void wait_for_groups(const Plan& p, int64_t layer, int count) {
    for (int group = threadIdx.x; group < p.groups; group += kThreads) {
        while (load_acquire(p.arrived + layer * p.groups + group) < count) __nanosleep(100);
    }
    __syncthreads();
}

// Counts this block in at its group: what any of its threads wrote before is there for who sees the count. Returns in
// every thread whether it was the `count`th, and then what the others wrote may be read.
__device__ __forceinline__ bool arrive(int* g_arrived, int count) {
    __shared__ bool s_is_last;
    __syncthreads();
    if (threadIdx.x == 0) {
        __threadfence();
        s_is_last = atomicAdd(g_arrived, 1) == count - 1;
        __threadfence();
    }
    __syncthreads();
    return s_is_last;
}

// The similarities of kScoreTokens candidates to the layer's mean key, by one warp.
template <typename T>
__device__ __forceinline__ void score(const Plan& p, int64_t layer, int first, int count) {
    constexpr int kSize = Vector<T>::kSize;
    const int lane = threadIdx.x % 32;
    const float* g_mean = p.mean + layer * p.columns;
    const uint4* g_k[kScoreTokens];
#pragma unroll
    for (int t = 0; t < kScoreTokens; ++t) {
        // Past the last candidate a lane reads the first one again.
        const int token = candidate_token(t < count ? first + t : first, p.anchor, p.frame_tokens);
        g_k[t] = row_of(p.k, layer * p.stride_k_layer + token * p.stride_k_row, sizeof(T));
    }
    float dots[kScoreTokens] = {}, squares[kScoreTokens] = {}, mean_squares = 0.f;
    for (int base = lane; base < p.vectors; base += 32 * kScoreBatch) {
        uint4 r_k[kScoreTokens][kScoreBatch];
#pragma unroll
        for (int i = 0; i < kScoreBatch; ++i) {
#pragma unroll
            for (int t = 0; t < kScoreTokens; ++t) {
                // Past the first-level cache, which keeps the mean.
                if (base + 32 * i < p.vectors) r_k[t][i] = __ldcg(g_k[t] + base + 32 * i);
            }
        }
#pragma unroll
        for (int i = 0; i < kScoreBatch; ++i) {
            if (base + 32 * i >= p.vectors) break;
            float mean[kSize];
#pragma unroll
            for (int j = 0; j < kSize; j += 4) {
                const float4 four = __ldg(reinterpret_cast<const float4*>(g_mean + (base + 32 * i) * kSize + j));
                mean[j] = four.x, mean[j + 1] = four.y, mean[j + 2] = four.z, mean[j + 3] = four.w;
            }
#pragma unroll
            for (int j = 0; j < kSize; ++j) mean_squares += mean[j] * mean[j];
#pragma unroll
            for (int t = 0; t < kScoreTokens; ++t) {
                float wide[kSize];
                widen<T>(r_k[t][i], wide);
#pragma unroll
                for (int j = 0; j < kSize; ++j) {
                    dots[t] += wide[j] * mean[j];
                    squares[t] += wide[j] * wide[j];
                }
            }
        }
    }
    const float mean_norm = __fsqrt_rn(warp_sum(mean_squares));
#pragma unroll
    for (int t = 0; t < kScoreTokens; ++t) {
        const float norms = __fsqrt_rn(warp_sum(squares[t])) * mean_norm;
        const float similarity = __fdiv_rn(warp_sum(dots[t]), norms + 1e-8f);
        if (lane == 0 && t < count) p.keys[layer * p.candidates + first + t] = ordered_key(similarity);
    }
}

// One warp copies a row. Streaming: what the other blocks read again shall stay in the second-level cache.
__device__ __forceinline__ void copy_row(const uint4* g_from, uint4* g_to, int vectors) {
    for (int base = threadIdx.x % 32; base < vectors; base += 32 * kCopyBatch) {
        uint4 r_row[kCopyBatch];
#pragma unroll
        for (int i = 0; i < kCopyBatch; ++i) {
            if (base + 32 * i < vectors) r_row[i] = __ldcs(g_from + base + 32 * i);
        }
#pragma unroll
        for (int i = 0; i < kCopyBatch; ++i) {
            if (base + 32 * i < vectors) __stcs(g_to + base + 32 * i, r_row[i]);
        }
    }
}

template <typename T>
__global__ void __launch_bounds__(kThreads, kBlocksPerProcessor) select_copy_kernel(const __grid_constant__ Plan p) {
    __shared__ int s_ticket;
    if (threadIdx.x == 0) s_ticket = p.whole ? blockIdx.x : atomicAdd(p.ticket, 1);
    __syncthreads();
    const WorkItem item = work_item(s_ticket, p.layers, p.score_blocks, p.anchor_blocks, p.kept_blocks);
    const int64_t layer = item.layer;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    int* g_index = p.index + layer * p.kept;

    if (item.work == Work::kScore) {
        const int group = item.block / p.group_blocks;
        const int in_group = item.block % p.group_blocks * kScoreBlockTokens + warp * kScoreTokens;
        if (in_group < p.group_size) score<T>(p, layer, group * p.group_size + in_group, p.group_size - in_group);
        int* g_arrived = p.arrived + layer * p.groups + group;
        if (arrive(g_arrived, p.group_blocks)) {
            select_in_group(p.keys + layer * p.candidates + group * p.group_size, p.group_size, p.group_kept,
                            group * p.group_size, p.anchor, p.frame_tokens,
                            g_index + p.frame_tokens + group * p.group_kept);
            arrive(g_arrived, p.group_blocks + 1);
        }
    } else if (item.work == Work::kCopyAnchor) {
        // Needs nothing of the similarities, but would take bandwidth from them; it fills the time of the selection.
        wait_for_groups(p, layer, p.group_blocks);
        const int row = item.block * kWarps + warp;
        if (row >= p.frame_tokens) return;
        const int64_t token = static_cast<int64_t>(p.anchor) * p.frame_tokens + row;
        if (lane == 0) g_index[row] = static_cast<int>(token);
        copy_row(row_of(p.v, layer * p.stride_v_layer + token * p.stride_v_row, sizeof(T)),
                 row_of(p.out_v, layer * p.stride_out_v_layer + row * p.stride_out_v_row, sizeof(T)), p.vectors);
    } else {
        if (!p.whole) wait_for_groups(p, layer, p.group_blocks + 1);
        const int copy = item.block * kWarps + warp;  // of K where even, of V where odd
        const int64_t row = (p.whole ? 0 : p.frame_tokens) + copy / 2;
        if (row >= p.kept) return;
        int64_t token;
        if (p.whole) {
            token = whole_token(static_cast<int>(row), p.anchor, p.frame_tokens);
            if (lane == 0 && copy % 2 == 0) g_index[row] = static_cast<int>(token);
        } else {
            token = __ldcg(g_index + row);
        }
        if (copy % 2 == 0) {
            copy_row(row_of(p.k, layer * p.stride_k_layer + token * p.stride_k_row, sizeof(T)),
                     row_of(p.out_k, layer * p.stride_out_k_layer + row * p.stride_out_k_row, sizeof(T)), p.vectors);
        } else {
            copy_row(row_of(p.v, layer * p.stride_v_layer + token * p.stride_v_row, sizeof(T)),
                     row_of(p.out_v, layer * p.stride_out_v_layer + row * p.stride_out_v_row, sizeof(T)), p.vectors);
        }
    }
}

int divide_up(int64_t x, int64_t y) { return static_cast<int>((x + y - 1) / y); }

Plan plan_of(const CompressParams& params, int element_bytes) {
    Plan p{};
    static_cast<CompressParams&>(p) = params;
    p.columns = p.heads * p.head_dim;
    p.vectors = p.columns * element_bytes / 16;
    p.candidates = (p.frames - 1) * p.frame_tokens;
    p.whole = p.keep >= p.frame_tokens || p.candidates == 0;
    if (p.whole) {
        p.kept = p.frames * p.frame_tokens;
        p.kept_blocks = divide_up(2LL * p.kept, kWarps);
        return p;
    }
    p.groups = p.pooled ? 1 : p.frames - 1;
    p.group_size = p.candidates / p.groups;
    p.group_kept = p.keep * (p.frames - 1) / p.groups;
    p.kept = p.frame_tokens + p.groups * p.group_kept;
    p.group_blocks = divide_up(p.group_size, kScoreBlockTokens);
    p.score_blocks = p.groups * p.group_blocks;
    p.anchor_blocks = divide_up(p.frame_tokens, kWarps);
    p.kept_blocks = divide_up(2LL * p.groups * p.group_kept, kWarps);
    const int64_t layers = p.layers;
    p.mean = static_cast<float*>(p.workspace);
    p.keys = reinterpret_cast<uint32_t*>(p.mean + layers * p.columns);
    p.arrived = reinterpret_cast<int*>(p.keys + layers * p.candidates);
    p.ticket = p.arrived + layers * p.groups;
    return p;
}

void check_launch() {
    const cudaError_t error = cudaGetLastError();
    if (error != cudaSuccess) {
        throw std::runtime_error(std::string("compress_chunk: launch failed: ") + cudaGetErrorString(error));
    }
}

template <typename T>
void launch(const CompressParams& params, cudaStream_t stream) {
    const Plan p = plan_of(params, sizeof(T));
    const int64_t blocks = static_cast<int64_t>(p.layers) * (p.score_blocks + p.anchor_blocks + p.kept_blocks);
    if (blocks > INT_MAX) {
        throw std::invalid_argument("compress_chunk: k must have fewer tokens, or fewer layers, for backend 'cuda'");
    }
    if (!p.whole) {
        anchor_kernel<T><<<dim3(p.vectors / kSlabVectors, p.layers), kAnchorThreads, 0, stream>>>(p);
        check_launch();
    }
    select_copy_kernel<T><<<static_cast<int>(blocks), kThreads, 0, stream>>>(p);
    check_launch();
}

void check_rows(const char* name, const void* data, int64_t stride_layer, int64_t stride_row, int element_bytes) {
    const bool aligned = reinterpret_cast<uintptr_t>(data) % 16 == 0 && stride_layer * element_bytes % 16 == 0 &&
                         stride_row * element_bytes % 16 == 0;
    if (!aligned) {
        throw std::invalid_argument(std::string("compress_chunk: ") + name +
                                    " must have rows aligned to 16 bytes for backend 'cuda', got a layer stride of " +
                                    std::to_string(stride_layer) + " and a row stride of " +
                                    std::to_string(stride_row) + " elements");
    }
}

}  // namespace

int64_t compress_workspace_bytes(const CompressParams& params) {
    const Plan p = plan_of(params, 2);
    return p.whole ? 0 : 4 * (static_cast<int64_t>(p.layers) * (p.columns + p.candidates + p.groups) + 1);
}

void compress_chunk(const CompressParams& p, Dtype dtype, cudaStream_t stream) {
    if (p.heads < 1 || p.heads > 128 || (p.head_dim != 64 && p.head_dim != 128)) {
        throw std::invalid_argument("compress_chunk: k must be of 1 to 128 heads with head_dim 64 or 128");
    }
    if (p.layers < 1 || p.layers > 65535) {  // the second dimension of anchor_kernel's grid
        throw std::invalid_argument("compress_chunk: k must be of 1 to 65535 layers for backend 'cuda', got " +
                                    std::to_string(p.layers));
    }
    if (p.frames < 1 || p.frame_tokens < 1 || p.keep < 1 || p.anchor < 0 || p.anchor >= p.frames ||
        static_cast<int64_t>(p.frames) * p.frame_tokens > INT_MAX / 2) {
        throw std::invalid_argument("compress_chunk: frames, frame_tokens, keep and anchor must be in range");
    }
    const int element_bytes = dtype == Dtype::kFloat32 ? 4 : 2;
    check_rows("k", p.k, p.stride_k_layer, p.stride_k_row, element_bytes);
    check_rows("v", p.v, p.stride_v_layer, p.stride_v_row, element_bytes);
    check_rows("out_k", p.out_k, p.stride_out_k_layer, p.stride_out_k_row, element_bytes);
    check_rows("out_v", p.out_v, p.stride_out_v_layer, p.stride_out_v_row, element_bytes);
    check_rows("workspace", p.workspace, 0, 0, element_bytes);
    switch (dtype) {
        case Dtype::kBFloat16: return launch<__nv_bfloat16>(p, stream);
        case Dtype::kFloat16: return launch<__half>(p, stream);
        case Dtype::kFloat32: return launch<float>(p, stream);
    }
    throw std::invalid_argument("compress_chunk: k must be bfloat16, float16 or float32 for backend 'cuda'");
}

}  // namespace worldkv
