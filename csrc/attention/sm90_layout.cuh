// What the producer and the consumers of segment attention share: a piece of work, and shared memory.
#pragma once

#include "hopper.cuh"
#include "merge.cuh"
#include "segments.cuh"

namespace worldkv {

constexpr int kGroupQueries = 64;
constexpr int kThreads = 384;
constexpr int kRowBytes = 128;  // of half a row at head_dim 128: what the swizzle spans
constexpr int kMaxShared = 232448;

// Of q in boxes of 128 queries, and of each pool in boxes of a tile's rows, of 16 and of 1.
struct TensorMaps {
    CUtensorMap q, k_tile, v_tile, k_group, v_group, k_row, v_row;
};

// Shared memory, as offsets from its base.
template <int kHeadDim, int kTileRows>
struct Layout {
    static constexpr int kHalves = kHeadDim / 64;  // of 64 columns
    static constexpr uint32_t kQueryBytes = kQueries * kHeadDim * 2;
    static constexpr uint32_t kTileBytes = kTileRows * kHeadDim * 2;
    static constexpr uint32_t kTailBytes = kTailRows * kHeadDim * 2;
    static constexpr uint32_t kSlotBytes = 128;
    static constexpr int kFitting = (kMaxShared - kQueryBytes - 3 * kSlotBytes) / (2 * kTileBytes + kSlotBytes);
    static constexpr int kStages = kFitting < 4 ? kFitting : 4;

    static constexpr uint32_t q = 0, k = kQueryBytes, v = k + kStages * kTileBytes;
    static constexpr uint32_t piece = v + kStages * kTileBytes;  // slots: {piece, full tiles, blocks of tail rows},
    static constexpr uint32_t tile = piece + kSlotBytes;         // and of each stage {segment}, or of 4 groups, too,
    static constexpr uint32_t masks = 32;                        // from here on their masks
    static constexpr uint32_t full_q = tile + kStages * kSlotBytes, empty_q = full_q + 8;
    static constexpr uint32_t full_k = empty_q + 8, empty_k = full_k + 8 * kStages;
    static constexpr uint32_t full_v = empty_k + 8 * kStages, empty_v = full_v + 8 * kStages;
    static constexpr uint32_t bytes = full_q + 2 * kSlotBytes;
    static_assert(kStages >= 2 && bytes <= kMaxShared && 16 + 32 * kStages <= 2 * kSlotBytes);
};

// The stage of the tile in hand, and the parity of the phase in which it is full.
template <int kStages>
struct Ring {
    int stage = 0;
    uint32_t parity = 0;
    __device__ __forceinline__ Ring next() const {
        return stage + 1 == kStages ? Ring{0, parity ^ 1} : Ring{stage + 1, parity};
    }
    __device__ __forceinline__ Ring last() const {
        return stage == 0 ? Ring{kStages - 1, parity ^ 1} : Ring{stage - 1, parity};
    }
};

template <bool kWeight>
struct ParamsOf {
    using type = AttentionParams;
};
template <>
struct ParamsOf<true> {
    using type = WeightedAttentionParams;
};

struct Piece {
    int item, part, parts;
    __device__ __forceinline__ Piece(const AttentionParams& p, int piece) : item(piece), part(0), parts(1) {
        if (piece >= p.num_whole) {
            item = p.num_whole + (piece - p.num_whole) % p.num_cut;
            part = (piece - p.num_whole) / p.num_cut;
            parts = p.parts;
        }
    }
};

__device__ __forceinline__ int query_blocks(const AttentionParams& p) { return (p.q_len + kQueries - 1) / kQueries; }

}  // namespace worldkv
