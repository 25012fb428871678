// A consumer of segment attention: a warp group with 64 queries of each piece.
#pragma once

#include "sm90_layout.cuh"

namespace worldkv {

// The online softmax of the two rows of a thread, i and i + 8 of its warp's 16; four threads share a row. `maximum` is
// a logarithm to base 2, of a weight that was the largest once: it is replaced only by one that is 2**kSlack times as
// large, so that after a few tiles nothing has to be rescaled (FlashAttention-4, arXiv 2603.05451); beyond 2**26, where
// the slack is below the number's last digit, by any larger one. Weights stay within fp16, with the 2**8 that kLarge
// allows.
constexpr float kSlack = 4.f;
constexpr int kOfGroup = kGroupRows / 2;  // scores of a thread in a group of tail rows, 4 in 8 columns

struct Softmax {
    float maximum[2], sum[2];
    float total[2];    // of segments that have ended, where the mass is wanted
    float rescale[2];  // what to multiply earlier products by
    float scale[2];
};

// Where segments have weights (kernels/segment_attention.py says why it is done so): sums are relative to the weight
// `kept` of the segment in hand. Where that changes `maximum` moves with it, by what its digits allow; `pending` is how
// far sums have to follow, and `lag` by how much the maximum was rounded, since roundings would add up.
struct Weighing {
    float kept;
    float lag[2], pending[2];
};

__device__ __forceinline__ float quad_max(float x) {
    x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, 1));
    return fmaxf(x, __shfl_xor_sync(kAllLanes, x, 2));
}

__device__ __forceinline__ float quad_sum(float x) {
    x += __shfl_xor_sync(kAllLanes, x, 1);
    return x + __shfl_xor_sync(kAllLanes, x, 2);
}

// Sums of a row, to a maximum that may be the one before.
template <bool kMass>
__device__ __forceinline__ void follow(Softmax& rows, Weighing& weighing, int r, float maximum) {
    rows.rescale[r] = hopper::exp2_approx(rows.maximum[r] - maximum + weighing.pending[r]);
    weighing.pending[r] = 0.f;
    if (maximum > rows.maximum[r]) weighing.lag[r] = 0.f;
    rows.maximum[r] = maximum;
    rows.sum[r] *= rows.rescale[r];
    if (kMass) rows.total[r] *= rows.rescale[r];
}

// Two chains a row, here and for the sums: one of dependent instructions would take twice the time.
template <bool kMass, bool kWeight, int kSize>
__device__ __forceinline__ void take_maxima(Softmax& rows, Weighing& weighing, const float (&scores)[kSize],
                                            const AttentionParams& p) {
    float largest[2][2] = {{-INFINITY, -INFINITY}, {-INFINITY, -INFINITY}};
#pragma unroll
    for (int i = 0; i < kSize; ++i) largest[i / 2 % 2][i % 2] = fmaxf(largest[i / 2 % 2][i % 2], scores[i]);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        const float of_tile = quad_max(fmaxf(largest[r][0], largest[r][1]));
        // Beyond kLarge the rounding of the product no longer fits the weights; by a power of two it is exact.
        rows.scale[r] = fabsf(of_tile * p.scale_log2) < kLarge ? p.scale_log2 : p.scale_power;
        const float scaled = of_tile * rows.scale[r];
        const float maximum = scaled > rows.maximum[r] + kSlack ? scaled : rows.maximum[r];
        if constexpr (kWeight) {
            follow<kMass>(rows, weighing, r, maximum);
        } else {
            rows.rescale[r] = hopper::exp2_approx(rows.maximum[r] - maximum);
            rows.maximum[r] = maximum;
            rows.sum[r] *= rows.rescale[r];
            if (kMass) rows.total[r] *= rows.rescale[r];
        }
    }
}

// As take_maxima, of a block of tail rows, whose groups are of segments with the given weights.
template <bool kMass, int kSize>
__device__ __forceinline__ void take_weighted_maxima(Softmax& rows, Weighing& weighing, const float (&scores)[kSize],
                                                     const float (&of_groups)[kTailGroups], const AttentionParams& p) {
    float largest[kTailGroups][2];
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
        float& of_group = largest[i / kOfGroup][i / 2 % 2];
        of_group = i % kOfGroup / 2 < 2 && i % 2 == 0 ? scores[i] : fmaxf(of_group, scores[i]);
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        float of_block = -INFINITY, weighted = -INFINITY;
#pragma unroll
        for (int i = 0; i < kTailGroups; ++i) of_block = fmaxf(of_block, largest[i][r]);
        rows.scale[r] = fabsf(quad_max(of_block) * p.scale_log2) < kLarge ? p.scale_log2 : p.scale_power;
#pragma unroll
        for (int i = 0; i < kTailGroups; ++i) {
            weighted = fmaxf(weighted, fmaf(largest[i][r], rows.scale[r], of_groups[i]));
        }
        weighted = quad_max(weighted);
        follow<kMass>(rows, weighing, r, weighted > rows.maximum[r] + kSlack ? weighted : rows.maximum[r]);
    }
}

template <int kSize>
__device__ __forceinline__ void exponentiate(Softmax& rows, float (&scores)[kSize], bool sums) {
    float sum[2] = {};
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
        const int r = i / 2 % 2;
        scores[i] = hopper::exp2_approx(fmaf(scores[i], rows.scale[r], -rows.maximum[r]));
        if (!sums) continue;
        if (i % 2) {
            sum[r] += scores[i];
        } else {
            rows.sum[r] += scores[i];
        }
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) rows.sum[r] += sum[r];
}

// As exponentiate, of a block of tail rows.
template <int kSize>
__device__ __forceinline__ void exponentiate_weighted(Softmax& rows, float (&scores)[kSize], bool sums,
                                                      const float (&of_groups)[kTailGroups]) {
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
        const int r = i / 2 % 2;
        const float relative = fmaf(scores[i], rows.scale[r], -rows.maximum[r]);
        scores[i] = hopper::exp2_approx(relative + of_groups[i / kOfGroup]);
        if (sums) rows.sum[r] += scores[i];
    }
}

template <typename T, int kSlabs, int kSize>
__device__ __forceinline__ void to_weights(uint32_t (&weights)[kSlabs][4], const float (&scores)[kSize]) {
#pragma unroll
    for (int i = 0; i < kSize / 2; ++i) {
        weights[i / 4][i % 4] = hopper::pack<T>(scores[2 * i], scores[2 * i + 1]);
    }
}

template <typename T, int kHeadDim, int kTileRows, int kTurnedSlabs, bool kMass, bool kWeight>
struct Consumer {
    using L = Layout<kHeadDim, kTileRows>;
    static constexpr uint64_t kRowsOfK = hopper::matrix(16, 8 * kRowBytes);
    static constexpr int kTurned = kTurnedSlabs > 0 ? kTurnedSlabs : 1;

    const typename ParamsOf<kWeight>::type& p;
    const uint32_t shared;
    const int group = threadIdx.x / 128 - 1, lane = threadIdx.x % 32;
    const int row_in_block = kGroupQueries * group + threadIdx.x / 32 % 4 * 16 + lane / 4;  // and 8 below
    Ring<L::kStages> ring;
    int piece, segment;
    Softmax rows;
    Weighing weighing;
    float out[kHeadDim / 2];
    uint32_t turned[kTurned][4];  // queries of the segment

    __device__ __forceinline__ void run() {
        // The first turn is the first group's, by the other: a warp must not arrive twice at a barrier that is open.
        if (group == 1) hopper::arrive_named(1, 256);
        for (uint32_t query_parity = 0;; query_parity ^= 1) {
            hopper::wait(shared + L::full_q, query_parity);
            piece = hopper::load_shared(shared + L::piece);
            const int num_tiles = hopper::load_shared(shared + L::piece + 4);
            const int num_tails = hopper::load_shared(shared + L::piece + 8);
            if (piece < 0) return;
            rows = {{-INFINITY, -INFINITY}, {}, {}, {}, {}};
            if (kWeight) weighing = {};
#pragma unroll
            for (int i = 0; i < kHeadDim / 2; ++i) out[i] = 0.f;
            segment = -1;
            if (num_tiles > 0) attend_tiles(num_tiles, num_tails == 0);
            if (num_tiles + num_tails == 0) {  // a part that has nothing to do
                __syncwarp();                  // all lanes have read the slot
                release(L::empty_q);
            }
            segment = -1;
            if (kWeight && !kTurnedSlabs) enter(0.f);
#pragma unroll 1
            for (int tail = 0; tail < num_tails; ++tail) attend_tail(tail == num_tails - 1);
            if (kMass && num_tails > 0) end_segment(1);
            if (kWeight) leave_weights();
            store();
        }
    }

    // Full tiles. While a tile's weights are computed, the last tile's products go on, and the other group's.
    __device__ __forceinline__ void attend_tiles(int num_tiles, bool releases_q) {
        float scores[kTileRows / 2];
        uint32_t weights[kTileRows / 16][4];
        hopper::wait(shared + L::full_k + 8 * ring.stage, ring.parity);
        if (kTurnedSlabs || kMass || kWeight) segment = hopper::load_shared(slot());
        if (kTurnedSlabs) turn();
        if constexpr (kWeight) enter(__ldg(p.weights + segment));
        hopper::sync_named(1 + group, 256);
        hopper::fence_products();
        score(scores);
        hopper::commit_products();
        hopper::arrive_named(2 - group, 256);
        hopper::wait_products<0>(scores);
        release(L::empty_k + 8 * ring.stage);
        take_maxima<kMass, kWeight>(rows, weighing, scores, p);
        exponentiate(rows, scores, true);
        if (num_tiles > 1) wait_for_next_k();
        to_weights<T>(weights, scores);
#pragma unroll 1
        for (int tile = 1; tile < num_tiles; ++tile) {
            const Ring<L::kStages> before = ring;
            ring = ring.next();
            if (kTurnedSlabs || kMass || kWeight) {
                const int next = hopper::load_shared(slot());
                if (next != segment) {
                    if (kMass) end_segment(0);
                    segment = next;
                    if (kTurnedSlabs) turn();
                    if constexpr (kWeight) enter(__ldg(p.weights + segment));
                }
            }
            hopper::sync_named(1 + group, 256);
            hopper::fence_products(out);
            score(scores);
            hopper::commit_products();
            hopper::wait(shared + L::full_v + 8 * before.stage, before.parity);
            hopper::fence_products();
            multiply(weights, before.stage);
            hopper::commit_products();
            hopper::arrive_named(2 - group, 256);
            hopper::wait_products<1>(scores);
            release(L::empty_k + 8 * ring.stage);
            take_maxima<kMass, kWeight>(rows, weighing, scores, p);
            exponentiate(rows, scores, true);
            // The loop in this wait also keeps ptxas from moving the exponentials behind the wait for the products.
            if (tile + 1 < num_tiles) wait_for_next_k();
            hopper::wait_products<0>(out);
            release(L::empty_v + 8 * before.stage);
            to_weights<T>(weights, scores);
            rescale();
        }
        if (releases_q) release(L::empty_q);
        finish_stage(weights);
        if (kMass) end_segment(0);
    }

    // A block of tail rows, by itself.
    __device__ __forceinline__ void attend_tail(bool releases_q) {
        float scores[kTailRows / 2];
        uint32_t weights[kTailRows / 16][4];
        hopper::wait(shared + L::full_k + 8 * ring.stage, ring.parity);
        if (kTurnedSlabs) {  // all of the block is of one segment
            const int next = hopper::load_shared(slot());
            if (next != segment) {
                if (kMass && segment >= 0) end_segment(1);
                segment = next;
                turn();
                if constexpr (kWeight) enter(__ldg(p.weights + segment));
            }
        }
        hopper::fence_products();
        score(scores);
        hopper::commit_products();
        hopper::wait_products<0>(scores);
        if (releases_q) release(L::empty_q);
        float of_groups[kTailGroups];
#pragma unroll
        for (int i = 0; i < kTailGroups; ++i) {
            if constexpr (kWeight && !kTurnedSlabs) {
                of_groups[i] = __ldg(p.weights + hopper::load_shared(slot() + 4 * i));
            }
            const unsigned mask = hopper::load_shared(slot() + L::masks + 4 * i) >> 2 * (lane % 4);
#pragma unroll
            for (int j = 0; j < kOfGroup; ++j) {
                if (!(mask >> (j / 4 * 8 + j % 2) & 1)) scores[kOfGroup * i + j] = -INFINITY;
            }
        }
        if constexpr (kWeight && !kTurnedSlabs) {
            take_weighted_maxima<kMass>(rows, weighing, scores, of_groups, p);
            exponentiate_weighted(rows, scores, !kMass, of_groups);
        } else {
            take_maxima<kMass, kWeight>(rows, weighing, scores, p);
            exponentiate(rows, scores, !kMass);
        }
        if (kMass) {
#pragma unroll
            for (int i = 0; i < kTailGroups; ++i) {
                const int next = hopper::load_shared(slot() + 4 * i);
                if (next != segment) {
                    if (segment >= 0) end_segment(1);
                    segment = next;
                }
#pragma unroll
                for (int j = 0; j < kOfGroup; ++j) rows.sum[j / 2 % 2] += scores[kOfGroup * i + j];
            }
        }
        __syncwarp();  // all lanes have read the slot
        release(L::empty_k + 8 * ring.stage);
        to_weights<T>(weights, scores);
        rescale();
        finish_stage(weights);
    }

    // The last products of a row of stages, which nothing is computed beside.
    template <int kSlabs>
    __device__ __forceinline__ void finish_stage(const uint32_t (&weights)[kSlabs][4]) {
        hopper::wait(shared + L::full_v + 8 * ring.stage, ring.parity);
        hopper::fence_products(out);
        multiply(weights, ring.stage);
        hopper::commit_products();
        hopper::wait_products<0>(out);
        release(L::empty_v + 8 * ring.stage);
        ring = ring.next();
    }

    __device__ __forceinline__ uint32_t slot() const { return shared + L::tile + ring.stage * L::kSlotBytes; }

    // Where registers are short, ptxas moves the exponentials even behind this wait, unless it takes the wait to depend on
    // them: no sum is negative, which it does not know.
    __device__ __forceinline__ void wait_for_next_k() const {
        constexpr bool kIsShort =
            kTurnedSlabs == 8 || (kTurnedSlabs == 3 && kTileRows == 176 && !kMass) || (kWeight && kMass);
        const bool never = kIsShort && rows.sum[0] + rows.sum[1] < 0.f;
        hopper::wait(shared + L::full_k + 8 * ring.next().stage, ring.next().parity ^ never);
    }

    // One arrival a warp: each has read its slot, and waited for its products, by itself.
    __device__ __forceinline__ void release(uint32_t empty) const {
        if (lane == 0) hopper::arrive(shared + empty);
    }

    // The slabs of 16 columns that turn with time, from the original queries: a pair is one register.
    __device__ __forceinline__ void turn() {
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
    }

    // Of the stage in hand: scores = q k^T.
    template <int kSize>
    __device__ __forceinline__ void score(float (&scores)[kSize]) {
        constexpr int kRows = 2 * kSize;
        using Scores = hopper::Product<T, kRows>;
        const uint32_t queries = shared + L::q + group * kGroupQueries * kRowBytes;
        const uint32_t keys = shared + L::k + ring.stage * L::kTileBytes;
#pragma unroll
        for (int slab = 0; slab < kHeadDim / 16; ++slab) {
            const uint32_t of_queries = slab / 4 * kQueries * kRowBytes + slab % 4 * 32;
            const uint32_t of_keys = slab / 4 * kRows * kRowBytes + slab % 4 * 32;
            const uint64_t a = hopper::matrix_at(kRowsOfK, queries, of_queries);
            const uint64_t b = hopper::matrix_at(kRowsOfK, keys, of_keys);
            if (slab == 0 && kTurnedSlabs == 0) {
                Scores::template from_shared<false>(scores, a, b);
            } else if (slab == 0) {
                Scores::template from_registers<false, 0>(scores, turned[0], b);
            } else if (slab < kTurnedSlabs) {
                Scores::template from_registers<true, 0>(scores, turned[slab % kTurned], b);
            } else {
                Scores::template from_shared<true>(scores, a, b);
            }
        }
    }

    // out += weights v.
    template <int kSlabs>
    __device__ __forceinline__ void multiply(const uint32_t (&weights)[kSlabs][4], int stage) {
        constexpr uint64_t kRowsOfV = hopper::matrix(16 * kSlabs * kRowBytes, 8 * kRowBytes);
        const uint32_t values = shared + L::v + stage * L::kTileBytes;
#pragma unroll
        for (int slab = 0; slab < kSlabs; ++slab) {
            const uint64_t b = hopper::matrix_at(kRowsOfV, values, slab * 16 * kRowBytes);
            hopper::Product<T, kHeadDim>::template from_registers<true, 1>(out, weights[slab], b);
        }
    }

    __device__ __forceinline__ void rescale() {
        if (!__any_sync(kAllLanes, rows.rescale[0] != 1.f || rows.rescale[1] != 1.f)) return;
#pragma unroll
        for (int i = 0; i < kHeadDim / 2; ++i) out[i] *= rows.rescale[i / 2 % 2];
    }

    // From here on sums are relative to `weight`. Before the first key there are none.
    __device__ __forceinline__ void enter(float weight) {
        const float change = weighing.kept - weight;
        weighing.kept = weight;
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            if (rows.maximum[r] == -INFINITY) continue;
            const float by = change + weighing.lag[r], moved = rows.maximum[r] + by;
            weighing.lag[r] = by - (moved - rows.maximum[r]);
            weighing.pending[r] = rows.maximum[r] - moved + change;
            rows.maximum[r] = moved;
        }
    }

    // Sums relative to no weight, at the end of a piece.
    __device__ __forceinline__ void leave_weights() {
        const float gain = hopper::exp2_approx(weighing.kept);
#pragma unroll
        for (int i = 0; i < kHeadDim / 2; ++i) out[i] *= gain;
#pragma unroll
        for (int r = 0; r < 2; ++r) (kMass ? rows.total[r] : rows.sum[r]) *= gain;
    }

    // `kind`: 0 full tiles, 1 tail rows. A replayed graph may meet more segments than it was captured with.
    __device__ __forceinline__ void end_segment(int kind) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            float sum = quad_sum(rows.sum[r]);
            if (kWeight) sum *= hopper::exp2_approx(weighing.kept);
            if (lane % 4 == 0 && segment < p.max_segments) {
                const int64_t entry = (static_cast<int64_t>(piece) * 2 + kind) * p.max_segments + segment;
                p.segment_sums[entry * kQueries + row_in_block + 8 * r] = make_float2(rows.maximum[r], sum);
            }
            rows.total[r] += rows.sum[r];
            rows.sum[r] = 0.f;
        }
    }

    // An item is done; a part leaves its products as they are, which may be of no key at all.
    __device__ __forceinline__ void store() const {
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
                T* g_row = static_cast<T*>(p.out) + row * p.stride_out_token + head * p.stride_out_head;
                uint32_t* g_out = reinterpret_cast<uint32_t*>(g_row);
#pragma unroll
                for (int i = 0; i < kHeadDim / 8; ++i) {
                    g_out[4 * i + lane % 4] =
                        hopper::pack<T>(out[4 * i + 2 * r] * inverse, out[4 * i + 2 * r + 1] * inverse);
                }
                if (p.lse && lane % 4 == 0) {
                    p.lse[static_cast<int64_t>(head) * p.q_len + row] = log_sum_exp<kWeight>(p, rows.maximum[r], sum);
                }
            }
        }
    }
};

}  // namespace worldkv
