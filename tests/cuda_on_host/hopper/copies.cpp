// The bulk tensor copy engine, and the maps that it goes by.
#include "model.h"

#include <cuda.h>

namespace cuda_on_host::hopper {
namespace {

constexpr uint64_t kMagic = 0x70616d20726f736e;
constexpr uint32_t kChunk = 16;  // bytes that the swizzle moves as one
static_assert(sizeof(TensorMap) <= sizeof(CUtensorMap));

uint32_t element_bytes(uint32_t type) {
    switch (type) {
        case CU_TENSOR_MAP_DATA_TYPE_UINT8: return 1;
        case CU_TENSOR_MAP_DATA_TYPE_UINT16:
        case CU_TENSOR_MAP_DATA_TYPE_FLOAT16:
        case CU_TENSOR_MAP_DATA_TYPE_BFLOAT16: return 2;
        case CU_TENSOR_MAP_DATA_TYPE_UINT32:
        case CU_TENSOR_MAP_DATA_TYPE_INT32:
        case CU_TENSOR_MAP_DATA_TYPE_FLOAT32: return 4;
        case CU_TENSOR_MAP_DATA_TYPE_UINT64:
        case CU_TENSOR_MAP_DATA_TYPE_INT64:
        case CU_TENSOR_MAP_DATA_TYPE_FLOAT64: return 8;
        default: return 0;
    }
}

// As the comment of the function in cuda.h has it.
CUresult encode_tiled(CUtensorMap* out, CUtensorMapDataType type, cuuint32_t rank, void* base, const cuuint64_t* sizes,
                      const cuuint64_t* strides, const cuuint32_t* box, const cuuint32_t* element_strides,
                      CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle, CUtensorMapL2promotion promotion,
                      CUtensorMapFloatOOBfill fill) {
    const uint32_t element = element_bytes(type), swizzled = 16u << swizzle;
    if (reinterpret_cast<uintptr_t>(out) % 64 || !element || rank < 1 || rank > 5) return CUDA_ERROR_INVALID_VALUE;
    if (!base || reinterpret_cast<uintptr_t>(base) % 16) return CUDA_ERROR_INVALID_VALUE;
    if (interleave != CU_TENSOR_MAP_INTERLEAVE_NONE) return CUDA_ERROR_INVALID_VALUE;  // not modelled
    if (swizzle < 0 || swizzle > CU_TENSOR_MAP_SWIZZLE_128B) return CUDA_ERROR_INVALID_VALUE;
    if (promotion < 0 || promotion > CU_TENSOR_MAP_L2_PROMOTION_L2_256B) return CUDA_ERROR_INVALID_VALUE;
    if (fill != CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) return CUDA_ERROR_INVALID_VALUE;  // not modelled
    if (box[0] * element % 16 || (swizzle && box[0] * element > swizzled)) return CUDA_ERROR_INVALID_VALUE;
    TensorMap map{};
    map.magic = kMagic;
    map.base = static_cast<const char*>(base);
    map.rank = rank;
    map.type = type;
    map.swizzle = swizzle;
    for (uint32_t i = 0; i < rank; ++i) {
        if (sizes[i] < 1 || sizes[i] > uint64_t{1} << 32 || box[i] < 1 || box[i] > 256) return CUDA_ERROR_INVALID_VALUE;
        if (element_strides[i] < 1 || element_strides[i] > 8) return CUDA_ERROR_INVALID_VALUE;
        map.last[i] = sizes[i] - 1;
        map.box_less_one[i] = box[i] - 1;
        map.element_strides[i] = element_strides[i];
    }
    for (uint32_t i = 0; i + 1 < rank; ++i) {
        if (strides[i] % 16 || strides[i] >= uint64_t{1} << 40) return CUDA_ERROR_INVALID_VALUE;
        map.strides[i] = strides[i];
    }
    memcpy(out, &map, sizeof(map));
    return CUDA_SUCCESS;
}

// What is modelled of it: a tensor [rows, heads, columns] of 16-bit numbers, in boxes of 128-byte rows.
TensorMap read_map(const CUtensorMap* from, Place place) {
    const auto fail = [&](const std::string& what) { fault(text(place) + ": " + what); };
    if (reinterpret_cast<uintptr_t>(from) % 64) fail("the tensor map's address is no multiple of 64");
    TensorMap map;
    memcpy(&map, from, sizeof(map));
    if (map.magic != kMagic) fail("this is no tensor map");
    if (map.rank != 3) fail("a tensor map of " + std::to_string(map.rank) + " dimensions, not 3");
    if (element_bytes(map.type) != 2 || map.swizzle != CU_TENSOR_MAP_SWIZZLE_128B || map.box_less_one[0] != 63) {
        fail("only rows of 128 bytes of 16-bit numbers in the 128-byte swizzle are modelled");
    }
    for (int i = 1; i < 3; ++i) {
        if (map.element_strides[i] != 1) fail("strides of elements are not modelled");
    }
    return map;
}

int box_rows(const TensorMap& map) { return (map.box_less_one[1] + 1) * (map.box_less_one[2] + 1); }

void land_row(const Copy& copy, int row) {
    const TensorMap& map = copy.map;
    const int64_t heads = map.box_less_one[1] + 1;
    const int64_t at[3] = {copy.from[0], copy.from[1] + row % heads, copy.from[2] + row / heads};
    bool inside = true;
    for (int i = 1; i < 3; ++i) inside &= at[i] >= 0 && at[i] <= map.last[i];
    const char* source = map.base + at[1] * static_cast<int64_t>(map.strides[0]) +
                         at[2] * static_cast<int64_t>(map.strides[1]) + at[0] * 2;
    const uint32_t destination = copy.destination + row * kRowBytes;
    uint8_t* to = &model().memory[destination];
    for (uint32_t chunk = 0; chunk < kRowBytes / kChunk; ++chunk) {
        uint8_t* chunk_to = to + ((chunk ^ (destination / kRowBytes % 8)) * kChunk);
        const int64_t first = at[0] + chunk * 8, last = first + 7;
        if (inside && first >= 0 && last <= map.last[0]) {
            memcpy(chunk_to, source + chunk * kChunk, kChunk);
            continue;
        }
        memset(chunk_to, 0, kChunk);
        for (int i = 0; inside && i < 8; ++i) {
            if (first + i < 0 || first + i > map.last[0]) continue;
            memcpy(chunk_to + 2 * i, source + chunk * kChunk + 2 * i, 2);
        }
    }
}

}  // namespace

void prefetch(const CUtensorMap* map, Place place) { read_map(map, place); }

// The destination counts as written from here on, and holds NaNs until its rows land.
void copy_box(uint32_t destination, const CUtensorMap* from, uint32_t barrier_address, int column, int head, int row,
              Place place) {
    Model& m = model();
    Copy copy{read_map(from, place), destination, 0, {column, head, row}, {}};
    const int rows = box_rows(copy.map);
    const uint32_t bytes = rows * kRowBytes;
    check_inside(destination, bytes, place);
    const uint32_t alignment = rows < 8 ? kRowBytes : kPattern;  // a whole pattern of the swizzle
    if (destination % alignment) {
        fault(text(place) + ": a box of " + std::to_string(rows) + " rows to " + text_of(destination) +
              ", which is no multiple of " + std::to_string(alignment));
    }
    Barrier& barrier = barrier_for_use(barrier_address, place);
    copy.barrier = &barrier - m.barriers.data();
    ++barrier.copies;
    clock().at[warp()] = m.warp_time[warp()];
    const Access by{kFirstBarrierAgent + copy.barrier, barrier.completed + 1, place};
    note_write(destination, bytes, by, clock(), -1, true);
    constexpr uint16_t kPoison = 0x7fc5;  // a NaN, in bf16 and in fp16
    std::fill_n(reinterpret_cast<uint16_t*>(&m.memory[destination]), bytes / 2, kPoison);
    copy.rows.resize(rows);
    for (int i = 0; i < rows; ++i) {
        const size_t other = draw(i + 1);
        copy.rows[i] = copy.rows[other];
        copy.rows[other] = i;
    }
    m.copies.push_back(std::move(copy));
}

void land_some_rows(size_t chosen) {
    Model& m = model();
    Copy& copy = m.copies[chosen];
    for (size_t count = 1 + draw(8); count > 0 && !copy.rows.empty(); --count) {
        land_row(copy, copy.rows.back());
        copy.rows.pop_back();
    }
    if (!copy.rows.empty()) return;
    Barrier& barrier = m.barriers[copy.barrier];
    const int64_t bytes = box_rows(copy.map) * kRowBytes;
    std::swap(copy, m.copies.back());
    m.copies.pop_back();
    land_bytes(barrier, bytes);
}

}  // namespace cuda_on_host::hopper

cudaError_t cudaGetDriverEntryPointByVersion(const char* symbol, void** function, unsigned version,
                                             unsigned long long flags, cudaDriverEntryPointQueryResult* result) {
    const bool known = !strcmp(symbol, "cuTensorMapEncodeTiled"), recent = version >= 12000;
    if (!function || flags != cudaEnableDefault) return cudaErrorInvalidValue;
    *function = known && recent ? reinterpret_cast<void*>(&cuda_on_host::hopper::encode_tiled) : nullptr;
    if (result) {
        *result = !known   ? cudaDriverEntryPointSymbolNotFound
                  : recent ? cudaDriverEntryPointSuccess
                           : cudaDriverEntryPointVersionNotSufficent;
    }
    return cudaSuccess;
}
