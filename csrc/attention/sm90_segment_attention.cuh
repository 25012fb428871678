// Segment attention on Hopper: a producer warp and two warp groups of 64 queries each, after FlashAttention-3
// (arXiv 2407.08608). NOTES.md counts its cycles.
//
// A thread block takes one piece after another: an item, 128 queries of one head over the whole window, or a part of an
// item's keys. The producer walks the window's tables and has the copy engine fill a ring of K and V tiles: full tiles
// of kTileRows rows first, then the rows that segments leave over, in blocks of 64. What the consumers need to know of
// a tile lies in a slot beside it.
#pragma once

#include "hopper.cuh"
#include "merge.cuh"
#include "segments.cuh"

namespace worldkv {

constexpr int kGroupQueries = 64;
constexpr int kThreads = 384;
constexpr int kRowBytes = 128;  // of half a row at head_dim 128: what the swizzle spans
constexpr int kMaxShared = 232448;

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
    static constexpr uint32_t tile = piece + kSlotBytes;         // and of each stage {segment}, or of 8 groups, too,
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

// The producer: one warp, whose first lane, or for tail rows first 8 lanes, issue the copies.
template <int kHeadDim, int kTileRows, bool kAlone>
__device__ __forceinline__ void produce(const AttentionParams& p, const TensorMaps& maps, uint32_t shared) {
    using L = Layout<kHeadDim, kTileRows>;
    using hopper::L2;
    const int lane = threadIdx.x % 32;
    if (lane == 0) {
        hopper::prefetch(&maps.q);
        hopper::prefetch(&maps.k_tile);
        hopper::prefetch(&maps.v_tile);
        hopper::prefetch(&maps.k_group);
        hopper::prefetch(&maps.v_group);
    }
    Segments<kTileRows, kAlone> segments(p);
    const int num_pieces = p.num_whole + p.num_cut * p.parts;
    Ring<L::kStages> ring;
    int round = 0;
    for (;; ++round) {
        const int piece = blockIdx.x + round * gridDim.x;
        if (piece >= num_pieces) break;
        const Piece work(p, piece);
        const int head = work.item / query_blocks(p), block = work.item % query_blocks(p);
        const int kv_head = head / (p.heads / p.kv_heads);
        const int tile_lo = segments.tiles() * work.part / work.parts;
        const int tile_hi = segments.tiles() * (work.part + 1) / work.parts;
        const int tail_lo = segments.tail_blocks() * work.part / work.parts;
        const int tail_hi = segments.tail_blocks() * (work.part + 1) / work.parts;

        // Queries.
        hopper::wait(shared + L::empty_q, round % 2 ^ 1);
        if (lane == 0) {
            hopper::store_shared(shared + L::piece, piece);
            hopper::store_shared(shared + L::piece + 4, tile_hi - tile_lo);
            hopper::store_shared(shared + L::piece + 8, tail_hi - tail_lo);
            hopper::arrive_expecting(shared + L::full_q, L::kQueryBytes);
#pragma unroll
            for (int half = 0; half < L::kHalves; ++half) {
                hopper::copy_box<L2::kEvictFirst>(shared + L::q + half * kQueries * kRowBytes, &maps.q,
                                                  shared + L::full_q, 64 * half, head, block * kQueries);
            }
        }

        // Full tiles: V a tile behind K, since the scores of a tile are wanted before its products.
        const auto load_v = [&](const Ring<L::kStages>& at, int row) {
            const uint32_t full = shared + L::full_v + 8 * at.stage;
            hopper::wait(shared + L::empty_v + 8 * at.stage, at.parity ^ 1);
            if (lane == 0) {
                hopper::arrive_expecting(full, L::kTileBytes);
#pragma unroll
                for (int half = 0; half < L::kHalves; ++half) {
                    hopper::copy_box<L2::kEvictLast>(
                        shared + L::v + at.stage * L::kTileBytes + half * kTileRows * kRowBytes, &maps.v_tile, full,
                        64 * half, kv_head, row);
                }
            }
        };
        int row_before = 0;
        for (int tile = tile_lo; tile < tile_hi; ++tile) {
            const Tile at = segments.tile(tile);
            const uint32_t full = shared + L::full_k + 8 * ring.stage;
            hopper::wait(shared + L::empty_k + 8 * ring.stage, ring.parity ^ 1);
            if (lane == 0) {
                hopper::store_shared(shared + L::tile + ring.stage * L::kSlotBytes, at.segment);
                hopper::arrive_expecting(full, L::kTileBytes);
#pragma unroll
                for (int half = 0; half < L::kHalves; ++half) {
                    hopper::copy_box<L2::kEvictLast>(
                        shared + L::k + ring.stage * L::kTileBytes + half * kTileRows * kRowBytes, &maps.k_tile, full,
                        64 * half, kv_head, at.first_row);
                }
            }
            if (tile > tile_lo) load_v(ring.last(), row_before);
            row_before = at.first_row;
            ring = ring.next();
        }
        if (tile_hi > tile_lo) load_v(ring.last(), row_before);

        // Blocks of tail rows: a lane, a group.
        for (int tail = tail_lo; tail < tail_hi; ++tail, ring = ring.next()) {
            const Group group = segments.group(tail * kTailGroups + lane % kTailGroups);
            const auto load = [&](uint32_t tiles, uint32_t full, const CUtensorMap& of_group,
                                  const CUtensorMap& of_row) {
                __syncwarp();
                if (lane == 0) hopper::arrive_expecting(full, L::kTailBytes);
                __syncwarp();
                if (lane >= kTailGroups) return;
#pragma unroll
                for (int half = 0; half < L::kHalves; ++half) {
                    const uint32_t to = tiles + ring.stage * L::kTileBytes + half * kTailRows * kRowBytes +
                                        lane * kGroupRows * kRowBytes;
                    if (group.num_rows == kGroupRows) {
                        hopper::copy_box<L2::kEvictLast>(to, &of_group, full, 64 * half, kv_head, group.first_row);
                    } else {
#pragma unroll 1
                        for (int i = 0; i < kGroupRows; ++i) {
                            hopper::copy_box<L2::kEvictLast>(to + i * kRowBytes, &of_row, full, 64 * half, kv_head,
                                                             group.first_row + min(i, group.num_rows - 1));
                        }
                    }
                }
            };
            hopper::wait(shared + L::empty_k + 8 * ring.stage, ring.parity ^ 1);
            if (lane < kTailGroups) {
                const uint32_t slot = shared + L::tile + ring.stage * L::kSlotBytes + 4 * lane;
                hopper::store_shared(slot, group.segment);
                hopper::store_shared(slot + L::masks, group.mask);
            }
            load(shared + L::k, shared + L::full_k + 8 * ring.stage, maps.k_group, maps.k_row);
            hopper::wait(shared + L::empty_v + 8 * ring.stage, ring.parity ^ 1);
            load(shared + L::v, shared + L::full_v + 8 * ring.stage, maps.v_group, maps.v_row);
        }
    }
    hopper::wait(shared + L::empty_q, round % 2 ^ 1);
    if (lane == 0) {
        hopper::store_shared(shared + L::piece, ~0u);  // no more pieces
        hopper::arrive(shared + L::full_q);
    }
}

// The online softmax of the two rows of a thread, i and i + 8 of its warp's 16; four threads share a row. `maximum` is
// a logarithm to base 2.
struct Softmax {
    float maximum[2], sum[2];
    float total[2];    // of segments that have ended, where the mass is wanted
    float rescale[2];  // what to multiply earlier products by
    float scale[2];
};

__device__ __forceinline__ float quad_max(float x) {
    x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, 1));
    return fmaxf(x, __shfl_xor_sync(kAllLanes, x, 2));
}

__device__ __forceinline__ float quad_sum(float x) {
    x += __shfl_xor_sync(kAllLanes, x, 1);
    return x + __shfl_xor_sync(kAllLanes, x, 2);
}

template <bool kMass, int kSize>
__device__ __forceinline__ void take_maxima(Softmax& rows, const float (&scores)[kSize], const AttentionParams& p) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        float largest = -INFINITY;
#pragma unroll
        for (int i = 0; i < kSize / 2; ++i) largest = fmaxf(largest, scores[4 * (i / 2) + 2 * r + i % 2]);
        largest = quad_max(largest);
        // Beyond kLarge the rounding of the product no longer fits the weights; by a power of two it is exact.
        rows.scale[r] = fabsf(largest * p.scale_log2) < kLarge ? p.scale_log2 : p.scale_power;
        const float maximum = fmaxf(rows.maximum[r], largest * rows.scale[r]);
        rows.rescale[r] = hopper::exp2_approx(rows.maximum[r] - maximum);
        rows.maximum[r] = maximum;
        rows.sum[r] *= rows.rescale[r];
        if (kMass) rows.total[r] *= rows.rescale[r];
    }
}

template <int kSize>
__device__ __forceinline__ void exponentiate(Softmax& rows, float (&scores)[kSize], bool sums) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
#pragma unroll
        for (int i = 0; i < kSize / 2; ++i) {
            float& x = scores[4 * (i / 2) + 2 * r + i % 2];
            x = hopper::exp2_approx(fmaf(x, rows.scale[r], -rows.maximum[r]));
            if (sums) rows.sum[r] += x;
        }
    }
}

template <typename T, int kSlabs, int kSize>
__device__ __forceinline__ void to_weights(uint32_t (&weights)[kSlabs][4], const float (&scores)[kSize]) {
#pragma unroll
    for (int i = 0; i < kSize / 2; ++i) {
        weights[i / 4][i % 4] = hopper::pack<T>(scores[2 * i], scores[2 * i + 1]);
    }
}

// An item is done; a part leaves its products as they are, which may be of no key at all.
template <typename T, int kHeadDim, bool kMass>
__device__ __forceinline__ void store(const AttentionParams& p, int piece, int row_in_block, int lane,
                                      const Softmax& rows, const float (&out)[kHeadDim / 2]) {
    const Piece work(p, piece);
    const int head = work.item / query_blocks(p), block = work.item % query_blocks(p);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        const float sum = quad_sum(kMass ? rows.total[r] : rows.sum[r]);
        const int in_block = row_in_block + 8 * r, row = block * kQueries + in_block;
        if (lane % 4 == 0 && (kMass || piece >= p.num_whole)) {
            const int64_t entry = kMass ? piece : piece - p.num_whole;
            p.piece_sums[entry * kQueries + in_block] = make_float2(rows.maximum[r], sum);
        }
        if (piece >= p.num_whole) {
            const int64_t entry = (static_cast<int64_t>(piece - p.num_whole) * kQueries + in_block) * kHeadDim;
            float2* g_out = reinterpret_cast<float2*>(p.piece_out + entry);
#pragma unroll
            for (int i = 0; i < kHeadDim / 8; ++i) {
                g_out[4 * i + lane % 4] = make_float2(out[4 * i + 2 * r], out[4 * i + 2 * r + 1]);
            }
        } else if (row < p.q_len) {
            const float inverse = 1.f / sum;
            uint32_t* g_out = reinterpret_cast<uint32_t*>(static_cast<T*>(p.out) + row * p.stride_out_token +
                                                          head * p.stride_out_head);
#pragma unroll
            for (int i = 0; i < kHeadDim / 8; ++i) {
                g_out[4 * i + lane % 4] =
                    hopper::pack<T>(out[4 * i + 2 * r] * inverse, out[4 * i + 2 * r + 1] * inverse);
            }
            if (p.lse && lane % 4 == 0) {
                p.lse[static_cast<int64_t>(head) * p.q_len + row] = log_sum_exp(p, rows.maximum[r], sum);
            }
        }
    }
}

template <typename T, int kHeadDim, int kTileRows, int kTurnedSlabs, bool kMass>
__device__ __forceinline__ void consume(const AttentionParams& p, uint32_t shared) {
    using L = Layout<kHeadDim, kTileRows>;
    const int group = threadIdx.x / 128 - 1, lane = threadIdx.x % 32;
    const int row_in_block = kGroupQueries * group + threadIdx.x / 32 % 4 * 16 + lane / 4;
    // One arrival a warp: each has read its slot, and waited for its products, by itself.
    const auto release = [&](uint32_t empty) {
        if (lane == 0) hopper::arrive(empty);
    };
    // By the other group: a warp must not arrive twice at a barrier that is open.
    if (group == 1) hopper::arrive_named(1, 256);

    constexpr uint64_t kRowsOfK = hopper::matrix(16, 8 * kRowBytes);
    const uint32_t queries = shared + L::q + group * kGroupQueries * kRowBytes;
    Ring<L::kStages> ring;
    for (uint32_t query_parity = 0;; query_parity ^= 1) {
        hopper::wait(shared + L::full_q, query_parity);
        const int piece = hopper::load_shared(shared + L::piece);
        const int num_tiles = hopper::load_shared(shared + L::piece + 4);
        const int num_tails = hopper::load_shared(shared + L::piece + 8);
        if (piece < 0) return;

        float scores[kTileRows / 2], out[kHeadDim / 2];
        uint32_t weights[kTileRows / 16][4];
        constexpr int kTurned = kTurnedSlabs > 0 ? kTurnedSlabs : 1;
        uint32_t turned[kTurned][4];
        Softmax rows{{-INFINITY, -INFINITY}, {}, {}, {}, {}};
        int segment = -1;
#pragma unroll
        for (int i = 0; i < kHeadDim / 2; ++i) out[i] = 0.f;

        // The slabs of 16 columns that turn with time, from the original queries: a pair is one register.
        const auto turn = [&] {
            // Of the swizzle: row % 8. Not kept over the loop, which has no register left for what follows from it.
            const int row_bits = hopper::computed_here(lane / 4);
            const float2* g_turns = p.turns + static_cast<int64_t>(segment) * p.turned_pairs;
#pragma unroll
            for (int slab = 0; slab < kTurnedSlabs; ++slab) {
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const uint32_t row = slab / 4 * kQueries + row_in_block + 8 * (i % 2);
                    const uint32_t column = (2 * (slab % 4) + i / 2 ^ row_bits) * 16 + lane % 4 * 4;  // in bytes
                    const uint32_t both = hopper::load_shared(shared + L::q + row * kRowBytes + column);
                    const int pair = 8 * slab + 4 * (i / 2) + lane % 4;
                    const float2 by = pair < p.turned_pairs ? __ldg(g_turns + pair) : make_float2(1.f, 0.f);
                    const float2 x = hopper::unpack<T>(both);
                    turned[slab][i] = hopper::pack<T>(x.x * by.x + x.y * by.y, x.y * by.x - x.x * by.y);
                }
            }
        };
        const auto score = [&](auto& result, uint32_t keys) {
            constexpr int kRows = 2 * sizeof(result) / sizeof(float);
            using Scores = hopper::Product<T, kRows>;
#pragma unroll
            for (int slab = 0; slab < kHeadDim / 16; ++slab) {
                const uint32_t of_keys = slab / 4 * kRows * kRowBytes + slab % 4 * 32;
                const uint64_t b = hopper::matrix_at(kRowsOfK, keys, of_keys);
                const uint32_t of_queries = slab / 4 * kQueries * kRowBytes + slab % 4 * 32;
                const uint64_t a = hopper::matrix_at(kRowsOfK, queries, of_queries);
                if (slab == 0 && kTurnedSlabs == 0) {
                    Scores::template from_shared<false>(result, a, b);
                } else if (slab == 0) {
                    Scores::template from_registers<false, 0>(result, turned[0], b);
                } else if (slab < kTurnedSlabs) {
                    Scores::template from_registers<true, 0>(result, turned[slab % kTurned], b);
                } else {
                    Scores::template from_shared<true>(result, a, b);
                }
            }
        };
        const auto multiply = [&](const auto& of_tile, uint32_t values) {
            constexpr int kSlabs = sizeof(of_tile) / sizeof(of_tile[0]);
            constexpr uint64_t kRowsOfV = hopper::matrix(16 * kSlabs * kRowBytes, 8 * kRowBytes);
#pragma unroll
            for (int slab = 0; slab < kSlabs; ++slab) {
                const uint64_t b = hopper::matrix_at(kRowsOfV, values, slab * 16 * kRowBytes);
                hopper::Product<T, kHeadDim>::template from_registers<true, 1>(out, of_tile[slab], b);
            }
        };
        const auto rescale = [&] {
#pragma unroll
            for (int i = 0; i < kHeadDim / 2; ++i) out[i] *= rows.rescale[i / 2 % 2];
        };
        const auto slot_of = [&](int stage) { return shared + L::tile + stage * L::kSlotBytes; };
        // `kind`: 0 full tiles, 1 tail rows. A replayed graph may meet more segments than it was captured with.
        const auto end_segment = [&](int kind) {
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                const float sum = quad_sum(rows.sum[r]);
                if (lane % 4 == 0 && segment < p.max_segments) {
                    const int64_t entry = (static_cast<int64_t>(piece) * 2 + kind) * p.max_segments + segment;
                    p.segment_sums[entry * kQueries + row_in_block + 8 * r] = make_float2(rows.maximum[r], sum);
                }
                rows.total[r] += rows.sum[r];
                rows.sum[r] = 0.f;
            }
        };

        // Full tiles. While a tile's weights are computed, the last tile's products go on, and the other group's.
        if (num_tiles > 0) {
            hopper::wait(shared + L::full_k + 8 * ring.stage, ring.parity);
            if (kTurnedSlabs || kMass) segment = hopper::load_shared(slot_of(ring.stage));
            if (kTurnedSlabs) turn();
            hopper::sync_named(1 + group, 256);
            hopper::fence_products();
            score(scores, shared + L::k + ring.stage * L::kTileBytes);
            hopper::commit_products();
            hopper::arrive_named(2 - group, 256);
            hopper::wait_products<0>(scores);
            release(shared + L::empty_k + 8 * ring.stage);
            take_maxima<kMass>(rows, scores, p);
            exponentiate(rows, scores, true);
            if (num_tiles > 1) hopper::wait(shared + L::full_k + 8 * ring.next().stage, ring.next().parity);
            to_weights<T>(weights, scores);
#pragma unroll 1
            for (int tile = 1; tile < num_tiles; ++tile) {
                const Ring<L::kStages> before = ring;
                ring = ring.next();
                if (kTurnedSlabs || kMass) {
                    const int next = hopper::load_shared(slot_of(ring.stage));
                    if (next != segment) {
                        if (kMass) end_segment(0);
                        segment = next;
                        if (kTurnedSlabs) turn();
                    }
                }
                hopper::sync_named(1 + group, 256);
                hopper::fence_products(out);
                score(scores, shared + L::k + ring.stage * L::kTileBytes);
                hopper::commit_products();
                hopper::wait(shared + L::full_v + 8 * before.stage, before.parity);
                hopper::fence_products();
                multiply(weights, shared + L::v + before.stage * L::kTileBytes);
                hopper::commit_products();
                hopper::arrive_named(2 - group, 256);
                hopper::wait_products<1>(scores);
                release(shared + L::empty_k + 8 * ring.stage);
                take_maxima<kMass>(rows, scores, p);
                exponentiate(rows, scores, true);
                // This wait's loop also keeps ptxas from moving the exponentials behind the wait for the products.
                if (tile + 1 < num_tiles) {
                    hopper::wait(shared + L::full_k + 8 * ring.next().stage, ring.next().parity);
                }
                hopper::wait_products<0>(out);
                release(shared + L::empty_v + 8 * before.stage);
                to_weights<T>(weights, scores);
                rescale();
            }
            if (num_tails == 0) release(shared + L::empty_q);
            hopper::wait(shared + L::full_v + 8 * ring.stage, ring.parity);
            hopper::fence_products(out);
            multiply(weights, shared + L::v + ring.stage * L::kTileBytes);
            hopper::commit_products();
            hopper::wait_products<0>(out);
            release(shared + L::empty_v + 8 * ring.stage);
            ring = ring.next();
            if (kMass) end_segment(0);
        } else if (num_tails == 0) {  // a part that has nothing to do
            __syncwarp();             // all lanes have read the slot
            release(shared + L::empty_q);
        }

        // Tail rows.
        segment = -1;
#pragma unroll 1
        for (int tail = 0; tail < num_tails; ++tail) {
            float scores[kTailRows / 2];
            uint32_t weights[kTailRows / 16][4];
            const uint32_t slot = slot_of(ring.stage);
            hopper::wait(shared + L::full_k + 8 * ring.stage, ring.parity);
            if (kTurnedSlabs) {
                const int next = hopper::load_shared(slot);
                if (kMass && segment >= 0 && next != segment) end_segment(1);
                if (next != segment) {
                    segment = next;
                    turn();
                }
            }
            hopper::fence_products();
            score(scores, shared + L::k + ring.stage * L::kTileBytes);
            hopper::commit_products();
            hopper::wait_products<0>(scores);
            if (tail == num_tails - 1) release(shared + L::empty_q);
#pragma unroll
            for (int i = 0; i < kTailGroups; ++i) {
                const unsigned mask = hopper::load_shared(slot + L::masks + 4 * i) >> 2 * (lane % 4);
#pragma unroll
                for (int j = 0; j < 4; ++j) {
                    if (!(mask >> j % 2 & 1)) scores[4 * i + j] = -INFINITY;
                }
            }
            take_maxima<kMass>(rows, scores, p);
            exponentiate(rows, scores, !kMass);
            if (kMass) {
#pragma unroll
                for (int i = 0; i < kTailGroups; ++i) {
                    const int next = hopper::load_shared(slot + 4 * i);
                    if (next != segment) {
                        if (segment >= 0) end_segment(1);
                        segment = next;
                    }
#pragma unroll
                    for (int r = 0; r < 2; ++r) rows.sum[r] += scores[4 * i + 2 * r] + scores[4 * i + 2 * r + 1];
                }
            }
            __syncwarp();  // all lanes have read the slot
            release(shared + L::empty_k + 8 * ring.stage);
            to_weights<T>(weights, scores);
            rescale();
            hopper::wait(shared + L::full_v + 8 * ring.stage, ring.parity);
            hopper::fence_products(out);
            multiply(weights, shared + L::v + ring.stage * L::kTileBytes);
            hopper::commit_products();
            hopper::wait_products<0>(out);
            release(shared + L::empty_v + 8 * ring.stage);
            ring = ring.next();
        }
        if (kMass && num_tails > 0) end_segment(1);

        store<T, kHeadDim, kMass>(p, piece, row_in_block, lane, rows, out);
    }
}

template <typename T, int kHeadDim, int kTileRows, int kTurnedSlabs, bool kMass>
__global__ void __launch_bounds__(kThreads, 1) segment_attention_kernel(const __grid_constant__ AttentionParams p,
                                                                        const __grid_constant__ TensorMaps maps) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL) || !defined(__CUDA_ARCH__)
    using L = Layout<kHeadDim, kTileRows>;
    const uint32_t shared = hopper::shared_base();
    if (threadIdx.x == 0) {
        constexpr int kConsumerWarps = 8;
        hopper::init_barrier(shared + L::full_q, 1);
        hopper::init_barrier(shared + L::empty_q, kConsumerWarps);
        for (int stage = 0; stage < L::kStages; ++stage) {
            hopper::init_barrier(shared + L::full_k + 8 * stage, 1);
            hopper::init_barrier(shared + L::empty_k + 8 * stage, kConsumerWarps);
            hopper::init_barrier(shared + L::full_v + 8 * stage, 1);
            hopper::init_barrier(shared + L::empty_v + 8 * stage, kConsumerWarps);
        }
        hopper::fence_barrier_init();
    }
    __syncthreads();
    if (threadIdx.x < 128) {
        hopper::give_registers<24>();
        if (threadIdx.x < 32) produce<kHeadDim, kTileRows, (kTurnedSlabs > 0)>(p, maps, shared);
    } else {
        hopper::take_registers<240>();
        consume<T, kHeadDim, kTileRows, kTurnedSlabs, kMass>(p, shared);
    }
#else
    __trap();  // other architectures have none of these instructions; the launcher asks for none
#endif
}

}  // namespace worldkv
