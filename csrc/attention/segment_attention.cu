// Tensor maps and launches of segment attention.
#include "segment_attention.h"

#include "merge.cuh"
#include "sm90_segment_attention.cuh"

#include <cuda.h>

#include <array>
#include <map>
#include <mutex>
#include <stdexcept>
#include <string>

namespace worldkv {
namespace {

[[noreturn]] void refuse(const std::string& what) { throw std::invalid_argument("segment_attention: " + what); }

void check(cudaError_t error, const char* what) {
    if (error == cudaSuccess) return;
    throw std::runtime_error(std::string("segment_attention: ") + what + " failed: " + cudaGetErrorString(error));
}

// Of the driver, without linking it: the extension is to be imported where there is none.
decltype(&cuTensorMapEncodeTiled) tensor_map_encoder() {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found;
#if CUDART_VERSION >= 12050
    const cudaError_t error =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found);
#else
    const cudaError_t error = cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &function, cudaEnableDefault, &found);
#endif
    check(error, "looking for cuTensorMapEncodeTiled in the driver");
    if (found != cudaDriverEntryPointSuccess || !function) {
        throw std::runtime_error("segment_attention: the driver has no cuTensorMapEncodeTiled, of CUDA 12.0 or later");
    }
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function);
}

// A tensor [rows, heads, head_dim] of 16-bit numbers, copied in boxes of `box_rows` rows and 64 columns of one head.
struct Mapped {
    const void* data;
    int64_t rows, heads, head_dim, stride_row, stride_head, box_rows;
    Dtype dtype;
};

CUtensorMap encode(const Mapped& x) {
    static const auto encode_tiled = tensor_map_encoder();
    const cuuint64_t sizes[] = {cuuint64_t(x.head_dim), cuuint64_t(x.heads), cuuint64_t(x.rows)};
    const cuuint64_t strides[] = {cuuint64_t(2 * x.stride_head), cuuint64_t(2 * x.stride_row)};  // bytes
    const cuuint32_t box[] = {64, 1, cuuint32_t(x.box_rows)}, steps[] = {1, 1, 1};
    CUtensorMap map;
    const CUresult result = encode_tiled(
        &map, x.dtype == Dtype::kBFloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 3,
        const_cast<void*>(x.data), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
        CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    if (result != CUDA_SUCCESS) {
        throw std::runtime_error("segment_attention: cuTensorMapEncodeTiled failed with " + std::to_string(result) +
                                 " for rows " + std::to_string(x.rows) + ", heads " + std::to_string(x.heads) +
                                 ", strides " + std::to_string(x.stride_row) + " and " + std::to_string(x.stride_head));
    }
    return map;
}

// Made once for a pool, and for each address that queries come at. A map says nothing but what it is made from, so an
// old one is never wrong.
CUtensorMap tensor_map(const Mapped& x) {
    using Key = std::array<int64_t, 8>;
    constexpr size_t kMostMaps = 4096;
    static std::map<Key, CUtensorMap> maps;
    static std::mutex mutex;
    const Key key{reinterpret_cast<int64_t>(x.data), x.rows, x.heads, x.head_dim, x.stride_row, x.stride_head,
                  x.box_rows, static_cast<int64_t>(x.dtype)};
    const std::lock_guard<std::mutex> lock(mutex);
    const auto known = maps.find(key);
    if (known != maps.end()) return known->second;
    if (maps.size() == kMostMaps) maps.clear();
    return maps[key] = encode(x);
}

TensorMaps maps_of(const AttentionParams& p, Dtype dtype) {
    const auto of_pool = [&](const void* pool, int64_t stride_row, int64_t stride_head, int box_rows) {
        return tensor_map({pool, p.rows, p.kv_heads, p.head_dim, stride_row, stride_head, box_rows, dtype});
    };
    const auto of_k = [&](int box_rows) { return of_pool(p.k, p.stride_k_row, p.stride_k_head, box_rows); };
    const auto of_v = [&](int box_rows) { return of_pool(p.v, p.stride_v_row, p.stride_v_head, box_rows); };
    return {tensor_map({p.q, p.q_len, p.heads, p.head_dim, p.stride_q_token, p.stride_q_head, kQueries, dtype}),
            of_k(p.tile_rows), of_v(p.tile_rows), of_k(kGroupRows), of_v(kGroupRows), of_k(1), of_v(1)};
}

template <typename T, int kHeadDim, int kTileRows, int kTurnedSlabs, bool kMass, bool kWeight = false>
void launch(const typename ParamsOf<kWeight>::type& p, const TensorMaps& maps, cudaStream_t stream) {
    constexpr int kShared = Layout<kHeadDim, kTileRows>::bytes;
    const auto kernel = segment_attention_kernel<T, kHeadDim, kTileRows, kTurnedSlabs, kMass, kWeight>;
    check(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                               kShared),
          "asking for shared memory");
    const int pieces = p.num_whole + p.num_cut * p.parts;
    const int blocks = pieces < p.processors ? pieces : p.processors;
    kernel<<<blocks, kThreads, kShared, stream>>>(p, maps);
}

template <typename T, int kHeadDim, int kTileRows, int kTurnedSlabs>
void launch(const AttentionParams& p, const TensorMaps& maps, cudaStream_t stream) {
    if (p.block_mass) {
        launch<T, kHeadDim, kTileRows, kTurnedSlabs, true>(p, maps, stream);
    } else {
        launch<T, kHeadDim, kTileRows, kTurnedSlabs, false>(p, maps, stream);
    }
}

template <typename T, int kHeadDim, int kTileRows, int kTurnedSlabs>
void launch_weighted(const WeightedAttentionParams& p, const TensorMaps& maps, cudaStream_t stream) {
    if (p.block_mass) {
        launch<T, kHeadDim, kTileRows, kTurnedSlabs, true, true>(p, maps, stream);
    } else {
        launch<T, kHeadDim, kTileRows, kTurnedSlabs, false, true>(p, maps, stream);
    }
}

// One size of tiles a kind: weights take five registers, which turned queries leave beside 128 rows only, and all slabs
// turned at head_dim 128 not even there.
template <typename T>
void launch_weighted(const WeightedAttentionParams& p, const TensorMaps& maps, cudaStream_t stream) {
    if (p.head_dim == 64) {
        p.turned_pairs > 0 ? launch_weighted<T, 64, 128, 4>(p, maps, stream)
                           : launch_weighted<T, 64, 176, 0>(p, maps, stream);
    } else if (p.turned_pairs > 0) {
        launch_weighted<T, 128, 128, 3>(p, maps, stream);
    } else {
        launch_weighted<T, 128, 176, 0>(p, maps, stream);
    }
    if (p.num_cut > 0) {
        const dim3 blocks(p.num_cut, kQueries / 8);
        if (p.head_dim == 64) {
            merge_parts_kernel<T, 64, true><<<blocks, 256, 0, stream>>>(p);
        } else {
            merge_parts_kernel<T, 128, true><<<blocks, 256, 0, stream>>>(p);
        }
    }
}

// With all slabs turned at head_dim 128, the queries' 32 registers leave room for tiles of 128 rows only.
template <typename T>
void launch(const AttentionParams& p, const TensorMaps& maps, cudaStream_t stream) {
    const bool large = p.tile_rows == 176;
    if (p.head_dim == 64) {
        if (p.turned_pairs > 0) {
            large ? launch<T, 64, 176, 4>(p, maps, stream) : launch<T, 64, 128, 4>(p, maps, stream);
        } else {
            large ? launch<T, 64, 176, 0>(p, maps, stream) : launch<T, 64, 128, 0>(p, maps, stream);
        }
    } else if (p.turned_pairs > 24) {
        launch<T, 128, 128, 8>(p, maps, stream);
    } else if (p.turned_pairs > 0) {
        large ? launch<T, 128, 176, 3>(p, maps, stream) : launch<T, 128, 128, 3>(p, maps, stream);
    } else {
        large ? launch<T, 128, 176, 0>(p, maps, stream) : launch<T, 128, 128, 0>(p, maps, stream);
    }
    if (p.num_cut > 0) {
        const dim3 blocks(p.num_cut, kQueries / 8);
        if (p.head_dim == 64) {
            merge_parts_kernel<T, 64><<<blocks, 256, 0, stream>>>(p);
        } else {
            merge_parts_kernel<T, 128><<<blocks, 256, 0, stream>>>(p);
        }
    }
}

void check_tensor(const char* name, const void* data, int64_t stride_row, int64_t stride_head, int multiple) {
    const bool fits = reinterpret_cast<uintptr_t>(data) % (2 * multiple) == 0 && stride_row % multiple == 0 &&
                      stride_head % multiple == 0 && stride_row > 0 && stride_head > 0 &&
                      stride_row < int64_t{1} << 39 && stride_head < int64_t{1} << 39;
    if (!fits) {
        refuse(std::string(name) + " must have rows and heads that start on multiples of " +
               std::to_string(2 * multiple) + " bytes, less than 2**40 apart, for backend 'cuda', got strides of " +
               std::to_string(stride_row) + " and " + std::to_string(stride_head) + " elements");
    }
}

void check_count(const char* name, int64_t count, int64_t least, int64_t most) {
    if (count < least || count > most) {
        refuse(std::string(name) + " must be from " + std::to_string(least) + " to " + std::to_string(most) + ", got " +
               std::to_string(count));
    }
}

}  // namespace

void segment_attention(const AttentionParams& p, const float* weights, Dtype dtype, cudaStream_t stream) {
    check_tensor("q", p.q, p.stride_q_token, p.stride_q_head, 8);
    check_tensor("k_pool", p.k, p.stride_k_row, p.stride_k_head, 8);
    check_tensor("v_pool", p.v, p.stride_v_row, p.stride_v_head, 8);
    check_tensor("out", p.out, p.stride_out_token, p.stride_out_head, 2);
    if (dtype == Dtype::kFloat32) refuse("q must be bfloat16 or float16 for backend 'cuda'");
    if (p.head_dim != 64 && p.head_dim != 128) {
        refuse("q must have head_dim 64 or 128, got " + std::to_string(p.head_dim));
    }
    if (p.heads < 1 || p.kv_heads < 1 || p.heads % p.kv_heads) {
        refuse("k_pool must have a number of heads that divides q's " + std::to_string(p.heads) + ", got " +
               std::to_string(p.kv_heads));
    }
    const int most = p.head_dim == 128 && p.turned_pairs > 24 ? 128 : 176;
    if (weights ? p.tile_rows != (p.turned_pairs > 0 ? 128 : 176) : p.tile_rows != 128 && p.tile_rows != most) {
        const char* taken = weights ? p.turned_pairs > 0 ? "128" : "176" : most == 176 ? "128 or 176" : "128";
        refuse("tile_rows must be " + std::string(taken) + ", got " + std::to_string(p.tile_rows));
    }
    if (weights && p.head_dim == 128 && p.turned_pairs > 24) {
        refuse("turned_pairs must be at most 24 with weights at head_dim 128, got " + std::to_string(p.turned_pairs));
    }
    check_count("q_len", p.q_len, 1, INT32_MAX - kQueries);
    check_count("rows", p.rows, 1, INT32_MAX);
    check_count("turned_pairs", p.turned_pairs, 0, p.head_dim / 2);
    check_count("max_segments", p.max_segments, p.block_mass ? 1 : 0, INT32_MAX);
    check_count("parts", p.parts, 1, INT32_MAX);
    check_count("processors", p.processors, 1, INT32_MAX);
    for (const void* table : {static_cast<const void*>(p.tiles), static_cast<const void*>(p.ranges),
                              static_cast<const void*>(p.tail_rows), static_cast<const void*>(p.turns)}) {
        if (reinterpret_cast<uintptr_t>(table) % 16) refuse("a window's tables must start on multiples of 16 bytes");
    }
    const int64_t blocks = (static_cast<int64_t>(p.q_len) + kQueries - 1) / kQueries;
    if (blocks * p.heads != static_cast<int64_t>(p.num_whole) + p.num_cut) {
        refuse("num_whole and num_cut must add up to " + std::to_string(blocks * p.heads) + " items, got " +
               std::to_string(p.num_whole) + " and " + std::to_string(p.num_cut));
    }
    const TensorMaps maps = maps_of(p, dtype);
    const WeightedAttentionParams weighted{p, weights};
    if (dtype == Dtype::kBFloat16) {
        weights ? launch_weighted<__nv_bfloat16>(weighted, maps, stream) : launch<__nv_bfloat16>(p, maps, stream);
    } else {
        weights ? launch_weighted<__half>(weighted, maps, stream) : launch<__half>(p, maps, stream);
    }
    if (p.block_mass) {
        constexpr int kMostBlocks = 65535;  // along y
        const dim3 grid(p.num_whole + p.num_cut, p.max_segments < kMostBlocks ? p.max_segments : kMostBlocks);
        segment_shares_kernel<<<grid, kQueries, 0, stream>>>(p);
    }
    check(cudaGetLastError(), "launch");
}

}  // namespace worldkv
