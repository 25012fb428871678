// What a product reads and where its numbers go: descriptors, the swizzle, the layout of accumulators.
#include "model.h"

namespace cuda_on_host::hopper {
namespace {

constexpr int kRows = 64, kDepth = 16, kHalfColumns = 64, kChunkColumns = 8;

struct Matrix {
    uint32_t start, half_bytes, group_bytes;
    int rows;  // of k where not transposed, else numbers a row
    bool transposed;

    // Of the 128 bytes that hold row `i`; transposed: row `i` of k, of the columns from 64 * half on.
    uint32_t row(int i, int half = 0) const {
        return start / kRowBytes * kRowBytes + i % 8 * kRowBytes + i / 8 * group_bytes + half * half_bytes;
    }
};

Matrix decode(uint64_t descriptor, int rows, bool transposed) {
    const auto field = [&](int first) { return static_cast<uint32_t>(descriptor >> first & 0x3fff) << 4; };
    return {field(0), field(16), field(32), rows, transposed};
}

template <typename Use>
void for_each_row(const Matrix& matrix, Use use) {
    if (!matrix.transposed) {
        for (int i = 0; i < matrix.rows; ++i) use(matrix.row(i));
        return;
    }
    for (int half = 0; half * kHalfColumns < matrix.rows; ++half) {
        for (int i = 0; i < kDepth; ++i) use(matrix.row(i, half));
    }
}

void check_matrix(uint64_t descriptor, const Matrix& matrix, const std::string& what) {
    constexpr uint64_t kFields = uint64_t{3} << 62 | uint64_t{0x3fff} << 32 | uint64_t{0x3fff} << 16 | 0x3fff;
    if (descriptor >> 62 != 1) fault(what + " is not described as in the 128-byte swizzle");
    if (descriptor & ~kFields) fault(what + ": bits are set in its descriptor that have to be 0");
    if (matrix.start / kRowBytes % 8) {
        fault(what + " starts at " + text_of(matrix.start) + ", not with a pattern of the swizzle, on 1024 bytes");
    }
    const uint32_t column = matrix.start % kRowBytes;
    if (matrix.transposed ? column != 0 : column % (2 * kDepth) != 0) {
        fault(what + " starts at byte " + std::to_string(column) + " of a row");
    }
    if (matrix.group_bytes == 0 || matrix.group_bytes % kPattern) {
        fault(what + ": groups of 8 rows lie " + std::to_string(matrix.group_bytes) + " bytes apart");
    }
    if (matrix.transposed && matrix.rows > kHalfColumns && (matrix.half_bytes == 0 || matrix.half_bytes % kPattern)) {
        fault(what + ": its halves lie " + std::to_string(matrix.half_bytes) + " bytes apart");
    }
}

void check_operand(uint64_t descriptor, const Matrix& matrix, const Product& product, int group, const char* name) {
    const std::string what = text(product.place) + ": " + name;
    check_matrix(descriptor, matrix, what);
    const Access by{kFirstGroupAgent + group, product.committed_as, product.place};
    for_each_row(matrix, [&](uint32_t row) {
        check_inside(row, kRowBytes, product.place);
        note_read(row, kRowBytes, by, product.known, -1, true);
    });
}

template <bool kHalf>
inline float widened(uint16_t bits) {
    if (kHalf) {
        _Float16 number;
        memcpy(&number, &bits, 2);
        return number;
    }
    const uint32_t wide = static_cast<uint32_t>(bits) << 16;
    float number;
    memcpy(&number, &wide, 4);
    return number;
}

inline const uint16_t* chunk_of(const uint8_t* memory, uint32_t row, uint32_t chunk) {
    return reinterpret_cast<const uint16_t*>(memory + row + ((chunk ^ (row / kRowBytes % 8)) * 16));
}

// [kDepth][kMaxN] from either layout.
template <bool kHalf>
void load(const uint8_t* memory, const Matrix& matrix, float (*to)[kMaxN]) {
    if (matrix.transposed) {
        for (int k = 0; k < kDepth; ++k) {
            for (int column = 0; column < matrix.rows; column += kChunkColumns) {
                const uint32_t row = matrix.row(k, column / kHalfColumns);
                const uint16_t* from = chunk_of(memory, row, column % kHalfColumns / kChunkColumns);
                for (int i = 0; i < kChunkColumns; ++i) to[k][column + i] = widened<kHalf>(from[i]);
            }
        }
        return;
    }
    for (int i = 0; i < matrix.rows; ++i) {
        const uint32_t row = matrix.row(i), first = matrix.start % kRowBytes / 16;
        for (int k = 0; k < kDepth; ++k) {
            to[k][i] = widened<kHalf>(chunk_of(memory, row, first + k / 8)[k % 8]);
        }
    }
}

template <bool kHalf>
void load_registers(const Product& product, float (*to)[kMaxN]) {
    for (int row = 0; row < kRows; ++row) {
        for (int k = 0; k < kDepth; ++k) {
            const int thread = row / 16 * 32 + row % 8 * 4 + k % 8 / 2, i = row % 16 / 8 + k / 8 * 2;
            to[k][row] = widened<kHalf>(product.a_values[thread][i] >> 16 * (k % 2));
        }
    }
}

// In the order of k, whatever the schedule.
template <int N>
void multiply(const float (*a)[kMaxN], const float (*b)[kMaxN], Accumulator& d) {
    for (int row = 0; row < kRows; ++row) {
        float sums[N];
        std::copy_n(d.values[row], N, sums);
        for (int k = 0; k < kDepth; ++k) {
            const float factor = a[k][row];
            for (int i = 0; i < N; ++i) sums[i] += factor * b[k][i];
        }
        std::copy_n(sums, N, d.values[row]);
    }
}

template <bool kHalf>
void take_as(const Product& product) {
    static float a[kDepth][kMaxN], b[kDepth][kMaxN];
    const uint8_t* memory = model().memory.data();
    const Shape& shape = product.shape;
    if (shape.from_registers) {
        load_registers<kHalf>(product, a);
    } else {
        load<kHalf>(memory, decode(product.a, kRows, false), a);
    }
    load<kHalf>(memory, decode(product.b, shape.n, shape.transposed), b);
    if (!shape.accumulate) {
        for (auto& row : product.d->values) std::fill_n(row, shape.n, 0.f);
    }
    switch (shape.n) {
        case 64: return multiply<64>(a, b, *product.d);
        case 128: return multiply<128>(a, b, *product.d);
        case 176: return multiply<176>(a, b, *product.d);
    }
}

// Where two neighbours, d[2 * pair] and the next, of a thread of the group are.
template <typename Values>
auto place_of(Values& values, int thread, int pair) {
    return &values[16 * (thread / 32) + thread % 32 / 4 + 8 * (pair % 2)][8 * (pair / 2) + 2 * (thread % 4)];
}

}  // namespace

void check_operands(const Product& product, int group) {
    if (!product.shape.from_registers) check_operand(product.a, decode(product.a, kRows, false), product, group, "a");
    const Matrix b = decode(product.b, product.shape.n, product.shape.transposed);
    check_operand(product.b, b, product, group, "b");
}

void take(const Product& product) { product.shape.half ? take_as<true>(product) : take_as<false>(product); }

void take_in(Accumulator& accumulator, const float* d, int n, int thread) {
    for (int pair = 0; pair < n / 4; ++pair) memcpy(place_of(accumulator.values, thread, pair), d + 2 * pair, 8);
}

void give_back(const Accumulator& accumulator, float* d, int n, int thread) {
    for (int pair = 0; pair < n / 4; ++pair) memcpy(d + 2 * pair, place_of(accumulator.values, thread, pair), 8);
}

}  // namespace cuda_on_host::hopper
