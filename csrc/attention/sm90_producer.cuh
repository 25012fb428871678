// The producer of segment attention: one warp, which looks up where the rows of a window lie and has them copied. Its
// first lane issues the copies; of tail rows its first 4 lanes do, a group each.
#pragma once

#include "sm90_layout.cuh"

namespace worldkv {

template <int kHeadDim, int kTileRows, bool kAlone>
struct Producer {
    using L = Layout<kHeadDim, kTileRows>;
    using L2 = hopper::L2;

    const AttentionParams& p;
    const TensorMaps& maps;
    const uint32_t shared;
    const int lane = threadIdx.x % 32;
    Ring<L::kStages> ring;
    int kv_head = 0;

    __device__ __forceinline__ void run() {
        if (lane == 0) {
            hopper::prefetch(&maps.q);
            hopper::prefetch(&maps.k_tile);
            hopper::prefetch(&maps.v_tile);
            hopper::prefetch(&maps.k_group);
            hopper::prefetch(&maps.v_group);
        }
        Segments<kTileRows, kAlone> segments(p);
        const int num_pieces = p.num_whole + p.num_cut * p.parts;
        int round = 0;
        for (;; ++round) {
            const int piece = blockIdx.x + round * gridDim.x;
            if (piece >= num_pieces) break;
            const Piece work(p, piece);
            const int head = work.item / query_blocks(p), block = work.item % query_blocks(p);
            const int tile_lo = segments.tiles() * work.part / work.parts;
            const int tile_hi = segments.tiles() * (work.part + 1) / work.parts;
            const int tail_lo = segments.tail_blocks() * work.part / work.parts;
            const int tail_hi = segments.tail_blocks() * (work.part + 1) / work.parts;
            kv_head = head / (p.heads / p.kv_heads);
            hopper::wait(shared + L::empty_q, round % 2 ^ 1);
            __syncwarp();  // no lane still waits when the next phase ends, which it may without a tile between
            if (lane == 0) {
                hopper::store_shared(shared + L::piece, piece);
                hopper::store_shared(shared + L::piece + 4, tile_hi - tile_lo);
                hopper::store_shared(shared + L::piece + 8, tail_hi - tail_lo);
                load<L2::kEvictFirst>(L::q, L::full_q, L::kQueryBytes, maps.q, head, block * kQueries);
            }
            load_tiles(segments, tile_lo, tile_hi);
            for (int tail = tail_lo; tail < tail_hi; ++tail, ring = ring.next()) {
                load_tail(segments.group(tail * kTailGroups + lane % kTailGroups));
            }
        }
        hopper::wait(shared + L::empty_q, round % 2 ^ 1);
        if (lane == 0) {
            hopper::store_shared(shared + L::piece, ~0u);  // no more pieces
            hopper::arrive(shared + L::full_q);
        }
    }

    // V a tile behind K, since the scores of a tile are wanted before its products.
    __device__ __forceinline__ void load_tiles(Segments<kTileRows, kAlone>& segments, int tile_lo, int tile_hi) {
        int row_before = 0;
        for (int tile = tile_lo; tile < tile_hi; ++tile) {
            const Tile at = segments.tile(tile);
            hopper::wait(shared + L::empty_k + 8 * ring.stage, ring.parity ^ 1);
            if (lane == 0) {
                hopper::store_shared(shared + L::tile + ring.stage * L::kSlotBytes, at.segment);
                load<L2::kEvictLast>(L::k + ring.stage * L::kTileBytes, L::full_k + 8 * ring.stage, L::kTileBytes,
                                     maps.k_tile, kv_head, at.first_row);
            }
            if (tile > tile_lo) load_v(ring.last(), row_before);
            row_before = at.first_row;
            ring = ring.next();
        }
        if (tile_hi > tile_lo) load_v(ring.last(), row_before);
        __syncwarp();  // as behind the wait for Q
    }

    __device__ __forceinline__ void load_v(const Ring<L::kStages>& at, int row) {
        hopper::wait(shared + L::empty_v + 8 * at.stage, at.parity ^ 1);
        if (lane == 0) {
            load<L2::kEvictLast>(L::v + at.stage * L::kTileBytes, L::full_v + 8 * at.stage, L::kTileBytes, maps.v_tile,
                                 kv_head, row);
        }
    }

    // By one lane: all of a tile, in boxes of 64 columns.
    template <L2 kHint>
    __device__ __forceinline__ void load(uint32_t to, uint32_t full, uint32_t bytes, const CUtensorMap& map, int head,
                                         int row) {
        hopper::arrive_expecting(shared + full, bytes);
#pragma unroll
        for (int half = 0; half < L::kHalves; ++half) {
            hopper::copy_box<kHint>(shared + to + half * (bytes / L::kHalves), &map, shared + full, 64 * half, head,
                                    row);
        }
    }

    __device__ __forceinline__ void load_tail(const Group& group) {
        hopper::wait(shared + L::empty_k + 8 * ring.stage, ring.parity ^ 1);
        if (lane < kTailGroups) {
            const uint32_t slot = shared + L::tile + ring.stage * L::kSlotBytes + 4 * lane;
            hopper::store_shared(slot, group.segment);
            hopper::store_shared(slot + L::masks, group.mask);
        }
        load_groups(group, L::k, L::full_k + 8 * ring.stage, maps.k_group, maps.k_row);
        hopper::wait(shared + L::empty_v + 8 * ring.stage, ring.parity ^ 1);
        load_groups(group, L::v, L::full_v + 8 * ring.stage, maps.v_group, maps.v_row);
    }

    __device__ __forceinline__ void load_groups(const Group& group, uint32_t tiles, uint32_t full,
                                                const CUtensorMap& of_group, const CUtensorMap& of_row) {
        __syncwarp();  // slots are written, and the bytes expected, before they can come
        if (lane == 0) hopper::arrive_expecting(shared + full, L::kTailBytes);
        __syncwarp();
        if (lane >= kTailGroups) return;
        const uint32_t to = shared + tiles + ring.stage * L::kTileBytes + lane * kGroupRows * kRowBytes;
#pragma unroll
        for (int half = 0; half < L::kHalves; ++half) {
            const uint32_t to_half = to + half * kTailRows * kRowBytes;
            if (group.num_rows == kGroupRows) {
                hopper::copy_box<L2::kEvictLast>(to_half, &of_group, shared + full, 64 * half, kv_head,
                                                 group.first_row);
            } else {
#pragma unroll 1
                for (int i = 0; i < kGroupRows; ++i) {
                    hopper::copy_box<L2::kEvictLast>(to_half + i * kRowBytes, &of_row, shared + full, 64 * half,
                                                     kv_head, group.first_row + min(i, group.num_rows - 1));
                }
            }
        }
    }
};

}  // namespace worldkv
