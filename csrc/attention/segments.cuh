// A window's rows as the producer's warp looks them up: full tiles, and what segments leave over, in groups of 16 rows.
#pragma once

#include <cuda_runtime.h>

#include "segment_attention.h"

namespace worldkv {

constexpr int kWindowTileRows = 128;  // of the window's tables, whatever the kernel's tiles
constexpr int kGroupRows = 16;        // two patterns of the swizzle; with one the producer has twice as much to issue
constexpr int kTailGroups = 4;        // of a block of tail rows
constexpr int kTailRows = kTailGroups * kGroupRows;
constexpr unsigned kAllLanes = 0xffffffff;

// 16 rows of one segment, of which the low bits of `mask` say which are to be attended to here: the last group of a
// tail ends with its segment, and its first rows belong to the group, or tile, before. So every row that is read is one
// of the window's. A segment of fewer rows gives its last one again, row by row.
struct Group {
    int segment, first_row;
    unsigned mask;
    int num_rows;  // 16, or of a shorter segment
};

struct Tile {
    int segment, first_row;
};

// Each lane holds one of 32 segments in turn, and each lane asks for what it wants. Tiles are counted over the whole
// window, groups as well; with kAlone those of a segment are filled up to a block of tail rows.
template <int kTileRows, bool kAlone>
class Segments {
  public:
    __device__ explicit Segments(const AttentionParams& params) : p(params), num_segments(*params.num_segments) {
        load(0);
        while (first_segment + 32 < num_segments) load(first_segment + 32);
        num_tiles = __shfl_sync(kAllLanes, tiles_end, 31);
        num_groups = __shfl_sync(kAllLanes, groups_end, 31);
    }

    __device__ int tiles() const { return num_tiles; }
    __device__ int tail_blocks() const { return (num_groups + kTailGroups - 1) / kTailGroups; }

    __device__ Tile tile(int index) {
        Tile found{-1, 0};
        find(index, tiles_end, [&] { return num_rows / kTileRows; }, [&](int source, int before, bool here) {
            const int first = __shfl_sync(kAllLanes, first_row, source);
            if (here) found = {first_segment + source, first + (index - before) * kTileRows};
        });
        return found;
    }

    __device__ Group group(int index) {
        const bool is_padding = index >= num_groups;
        index = min(index, num_groups - 1);
        Group found{-1, 0, 0, 0};
        find(index, groups_end, [&] { return groups_of(num_rows); }, [&](int source, int before, bool here) {
            const int first = __shfl_sync(kAllLanes, first_row, source);
            const int rows = __shfl_sync(kAllLanes, num_rows, source);
            if (here) found = group_of(first_segment + source, first, rows, index - before, is_padding);
        });
        return found;
    }

  private:
    const AttentionParams& p;
    const int num_segments;
    int num_tiles, num_groups;
    int first_segment;                  // of the 32
    int first_row, num_rows;            // of this lane's
    int tiles_end = 0, groups_end = 0;  // counted up to this lane's end

    static __device__ int groups_of(int rows) {
        const int groups = (rows % kTileRows + kGroupRows - 1) / kGroupRows;
        return kAlone ? (groups + kTailGroups - 1) / kTailGroups * kTailGroups : groups;
    }

    static __device__ Group group_of(int segment, int first, int rows, int group, bool is_padding) {
        const int last = (rows % kTileRows - 1) / kGroupRows;
        if (rows < kGroupRows) return {segment, first, group > last || is_padding ? 0 : (1u << rows) - 1, rows};
        const int wanted = first + rows / kTileRows * kTileRows + min(group, last) * kGroupRows;
        const int row = min(wanted, first + rows - kGroupRows);
        const unsigned all = (1u << kGroupRows) - 1, mask = all << (wanted - row) & all;
        return {segment, row, group > last || is_padding ? 0 : mask, kGroupRows};
    }

    __device__ void load(int first) {
        const int lane = threadIdx.x % 32;
        const int tiles_begin = first ? __shfl_sync(kAllLanes, tiles_end, 31) : 0;
        const int groups_begin = first ? __shfl_sync(kAllLanes, groups_end, 31) : 0;
        first_segment = first;
        first_row = num_rows = 0;
        if (first + lane < num_segments) {
            const int4 range = __ldg(p.ranges + 1 + first + lane);  // full tiles of 128 rows lo, hi, other rows lo, hi
            num_rows = (range.y - range.x) * kWindowTileRows + range.w - range.z;
            first_row = range.x < range.y ? __ldg(p.tiles + range.x).x : __ldg(p.tail_rows + range.z).x;
        }
        tiles_end = num_rows / kTileRows;
        groups_end = groups_of(num_rows);
#pragma unroll
        for (int step = 1; step < 32; step *= 2) {
            const int tiles = __shfl_up_sync(kAllLanes, tiles_end, step);
            const int groups = __shfl_up_sync(kAllLanes, groups_end, step);
            if (lane >= step) tiles_end += tiles, groups_end += groups;
        }
        tiles_end += tiles_begin;
        groups_end += groups_begin;
    }

    // Calls use(source, before, here) with the lane whose segment holds this lane's index and what is counted before
    // that segment, until each lane has been `here`. `count` is of this lane's segment.
    template <typename Count, typename Use>
    __device__ void find(int index, const int& end, Count count, Use use) {
        if (__ballot_sync(kAllLanes, index < __shfl_sync(kAllLanes, end - count(), 0))) load(0);
        for (;;) {
            int source = 0;
#pragma unroll
            for (int step = 16; step > 0; step /= 2) {
                if (__shfl_sync(kAllLanes, end, source + step - 1) <= index) source += step;
            }
            const int before = __shfl_sync(kAllLanes, end - count(), source);
            const bool past = index >= __shfl_sync(kAllLanes, end, 31);
            use(source, before, index >= before && !past);
            if (!__ballot_sync(kAllLanes, past)) return;
            load(first_segment + 32);
        }
    }
};

}  // namespace worldkv
