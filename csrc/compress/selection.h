// What decides which tokens are kept and who does which work, with nothing in it that needs a GPU: the tests compile
// it with the host's compiler.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define WORLDKV_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define WORLDKV_HOST_DEVICE inline
#endif

namespace worldkv {

constexpr int kDigitBits = 8;
constexpr int kBins = 1 << kDigitBits;

// An unsigned integer in the order of x: equal floats have equal keys, zeros of either sign too; NaN is +inf.
WORLDKV_HOST_DEVICE uint32_t ordered_key(float x) {
    if (x != x) x = INFINITY;
    if (x == 0.f) x = 0.f;  // also -0
    uint32_t bits;
    memcpy(&bits, &x, sizeof(bits));
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// Finds the `wanted` smallest of a group of keys, digit by digit from the top. Every key is lower (kept), undecided,
// or higher (not kept). A step counts the undecided keys by their next digit and descends into the bin with the last
// wanted key. When it is done, of the undecided keys, which are equal or all wanted, the first `wanted` are kept.
struct RadixWalk {
    uint32_t prefix;  // the bits that are decided, the others zero
    int bits;         // how many low bits are undecided, from 0 to 32
    int wanted;       // how many undecided keys are to be kept, at least 1

    // `all_and`, `all_or`: of all keys in the group. Leading bits that all keys share need no step.
    WORLDKV_HOST_DEVICE RadixWalk(uint32_t all_and, uint32_t all_or, int wanted_keys) : bits(0), wanted(wanted_keys) {
        for (uint32_t differing = all_and ^ all_or; differing; differing >>= 1) ++bits;
        prefix = all_and & decided_mask();
    }
    WORLDKV_HOST_DEVICE uint32_t decided_mask() const { return bits < 32 ? ~0u << bits : 0u; }
    WORLDKV_HOST_DEVICE int digit_shift() const { return bits > kDigitBits ? bits - kDigitBits : 0; }
    WORLDKV_HOST_DEVICE bool lower(uint32_t key) const { return (key & decided_mask()) < prefix; }
    WORLDKV_HOST_DEVICE bool undecided(uint32_t key) const { return (key & decided_mask()) == prefix; }
    // The next digit of an undecided key, below kBins.
    WORLDKV_HOST_DEVICE uint32_t digit(uint32_t key) const { return (key & ~decided_mask()) >> digit_shift(); }
    // Whether the last wanted key is in a bin of `count` keys, with `before` undecided keys in the bins below it.
    WORLDKV_HOST_DEVICE bool ends_in(int before, int count) const {
        return before < wanted && wanted <= before + count;
    }
    // Returns whether the walk is done; `count` as above.
    WORLDKV_HOST_DEVICE bool descend(uint32_t bin, int before, int count) {
        const int shift = digit_shift();
        prefix |= bin << shift;
        bits = shift;
        wanted -= before;
        return bits == 0 || wanted == count;
    }
};

// Where a kept key goes in the list of the kept, from the numbers of lower and of undecided keys that stand before it.
WORLDKV_HOST_DEVICE int kept_position(int lower_before, int undecided_before, int wanted) {
    return lower_before + (undecided_before < wanted ? undecided_before : wanted);
}

// A candidate is a token outside the anchor frame, numbered in the chunk's order.
WORLDKV_HOST_DEVICE int candidate_token(int candidate, int anchor, int frame_tokens) {
    return candidate < anchor * frame_tokens ? candidate : candidate + frame_tokens;
}

// The token of an output row where all tokens are kept: the anchor frame first.
WORLDKV_HOST_DEVICE int whole_token(int row, int anchor, int frame_tokens) {
    return row < frame_tokens ? anchor * frame_tokens + row : candidate_token(row - frame_tokens, anchor, frame_tokens);
}

enum class Work : int {
    kScore,       // similarities of some candidates; the last such block of a group selects in it
    kCopyAnchor,  // V of some anchor rows, once all similarities of the layer are there
    kCopyKept,    // K and V of some kept rows, once the layer's selection is there
};

struct WorkItem {
    Work work;
    int layer;
    int block;  // among the blocks with this work in this layer
};

// What the block with a ticket does. Tickets are drawn when blocks start, so whatever has a lower ticket has started,
// and a block may wait for it. Layer l + 1 is scored before layer l is copied, so that with many layers nobody waits.
WORLDKV_HOST_DEVICE WorkItem work_item(int ticket, int layers, int score_blocks, int anchor_blocks, int kept_blocks) {
    if (ticket < score_blocks) return {Work::kScore, 0, ticket};
    ticket -= score_blocks;
    const int period = score_blocks + anchor_blocks + kept_blocks;
    const int layer = ticket / period;
    int block = ticket % period;
    if (layer + 1 < layers) {
        if (block < score_blocks) return {Work::kScore, layer + 1, block};
        block -= score_blocks;
    }
    if (block < anchor_blocks) return {Work::kCopyAnchor, layer, block};
    return {Work::kCopyKept, layer, block - anchor_blocks};
}

}  // namespace worldkv
