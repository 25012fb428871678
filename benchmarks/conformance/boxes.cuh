// Facts of the copy engine: where the bytes of a box come to lie in shared memory, seen by ordinary loads.
#pragma once

#include "device.h"

namespace worldkv::conformance {

constexpr uint32_t kUntouched = 0xeeeeeeee;  // of shared memory, before
constexpr uint32_t kOutside = 0xbadbad00;    // of global memory that is not of the tensor
constexpr int kMostBoxes = 16;

struct Box {
    int destination, column, head, row;  // destination in bytes
};

struct Boxes {
    int count, rows;  // rows of one
    Box box[kMostBoxes];
};

__global__ void copy_boxes_kernel(const __grid_constant__ CUtensorMap map, const __grid_constant__ Boxes boxes,
                                  int bytes, uint32_t* g_out) {
    const uint32_t shared = hopper::shared_base(), barrier = shared + bytes;
    if (threadIdx.x == 0) {
        hopper::prefetch(&map);
        hopper::init_barrier(barrier, 1);
        hopper::fence_barrier_init();
    }
    for (int i = threadIdx.x; i < bytes / 4; i += blockDim.x) hopper::store_shared(shared + 4 * i, kUntouched);
    hopper::fence_async_proxy();
    __syncthreads();
    // A lane, a box.
    if (threadIdx.x < 32) {
        if (threadIdx.x == 0) hopper::arrive_expecting(barrier, boxes.count * boxes.rows * kRowBytes);
        __syncwarp();
        if (threadIdx.x < boxes.count) {
            const Box& box = boxes.box[threadIdx.x];
            hopper::copy_box<hopper::L2::kEvictLast>(shared + box.destination, &map, barrier, box.column, box.head,
                                                     box.row);
        }
        __syncwarp();
    }
    hopper::wait(barrier, 0);
    for (int i = threadIdx.x; i < bytes / 4; i += blockDim.x) g_out[i] = hopper::load_shared(shared + 4 * i);
}

// Two numbers of a pool say where they are from: 1 << 31 | row << 16 | head << 8 | pair of columns.
struct Pool {
    int rows, heads, stride_row, stride_head;  // strides in elements
};
constexpr Pool kPool{300, 3, 3 * 128, 128};

class PoolMemory {
public:
    explicit PoolMemory(const Pool& pool) : pool_(pool), memory_(words(pool)) {}

    CUtensorMap map(int box_rows) const {
        return encode({memory_.as<uint32_t>() + kMargin, pool_.rows, pool_.heads, 128, pool_.stride_row,
                       pool_.stride_head, box_rows});
    }

private:
    static constexpr int kMargin = 4096;  // words before and behind

    static Words words(const Pool& pool) {
        const int last = (pool.rows - 1) * pool.stride_row + (pool.heads - 1) * pool.stride_head + 127;
        Words words(last / 2 + 1 + 2 * kMargin, kOutside);
        for (int row = 0; row < pool.rows; ++row) {
            for (int head = 0; head < pool.heads; ++head) {
                for (int pair = 0; pair < 64; ++pair) {
                    const int at = (row * pool.stride_row + head * pool.stride_head) / 2 + pair;
                    words[kMargin + at] = 1u << 31 | row << 16 | head << 8 | pair;  // never zero
                }
            }
        }
        return words;
    }

    Pool pool_;
    Memory memory_;
};

// What shared memory holds after these copies.
inline Words copied(const Pool& pool, int bytes, const Boxes& boxes) {
    const PoolMemory memory(pool);
    const Output output(bytes / 4);
    const CUtensorMap map = memory.map(boxes.rows);
    const int shared = bytes + kPatternBytes;
    allow_shared(copy_boxes_kernel, shared);
    copy_boxes_kernel<<<1, 128, shared, nullptr>>>(map, boxes, bytes, output.words());
    return output.read();
}

inline Words box_of_a_tile() { return copied(kPool, 128 * kRowBytes, {1, 128, {{0, 64, 1, 37}}}); }

// The third pattern is left as it was.
inline Words boxes_of_8_rows() {
    return copied(kPool, 4 * kPatternBytes, {3, 8, {{0, 0, 2, 3}, {1024, 64, 0, 101}, {3072, 0, 1, 58}}});
}

// A pattern filled row by row, from rows in no order, some twice; and rows 2 and 5 of another.
inline Words boxes_of_a_row() {
    Boxes boxes{10, 1, {}};
    const int from[] = {7, 3, 290, 0, 64, 64, 64, 12};
    for (int i = 0; i < 8; ++i) boxes.box[i] = {i * kRowBytes, 64 * (i % 2), i % 3, from[i]};
    boxes.box[8] = {kPatternBytes + 5 * kRowBytes, 64, 2, 33};
    boxes.box[9] = {kPatternBytes + 2 * kRowBytes, 0, 1, 150};
    return copied(kPool, 2 * kPatternBytes, boxes);
}

inline Words boxes_past_the_end() {
    Words words = copied(kPool, 128 * kRowBytes, {1, 128, {{0, 0, 2, 260}}});
    const Boxes of_8{3, 8, {{0, 0, 0, 297}, {1024, 64, 1, 300}, {2048, 0, 0, 5000}}};
    const Words groups = copied(kPool, 3 * kPatternBytes, of_8);
    const Words row = copied(kPool, kPatternBytes, {2, 1, {{384, 64, 2, 299}, {640, 64, 2, 300}}});
    words.insert(words.end(), groups.begin(), groups.end());
    words.insert(words.end(), row.begin(), row.end());
    return words;
}

inline Words boxes_before_the_start() {
    return copied(kPool, 4 * kPatternBytes,
                  {4, 8, {{0, 0, 1, -5}, {1024, 64, -1, 20}, {2048, -16, 1, 20}, {3072, 96, 2, 20}}});
}

inline Words pool_of_heads_apart() {
    return copied({300, 3, 128, 300 * 128}, 128 * kRowBytes, {1, 128, {{0, 64, 2, 151}}});
}

inline Words pool_of_padded_rows() {
    return copied({140, 3, 3 * 136 + 8, 136}, 128 * kRowBytes, {1, 128, {{0, 64, 2, 11}}});
}

}  // namespace worldkv::conformance
