// Stands for csrc/attention/hopper.cuh: the same functions, by a model of the hardware (tests/cuda_on_host/hopper).
// Each one knows where in the kernel it was called.
#pragma once

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace cuda_on_host::hopper {

struct Shape {
    bool half, from_registers, transposed, accumulate;
    int n;
};

uint32_t shared_base();
uint32_t load_shared(uint32_t address, Place place);
void store_shared(uint32_t address, uint32_t value, Place place);
void init_barrier(uint32_t address, int arrivals, Place place);
void fence_barrier_init();
void arrive(uint32_t address, Place place);
void arrive_expecting(uint32_t address, uint32_t bytes, Place place);
void wait(uint32_t address, uint32_t parity, Place place);
void sync_named(int name, int threads, Place place);
void arrive_named(int name, int threads, Place place);
void prefetch(const CUtensorMap* map, Place place);
void copy_box(uint32_t destination, const CUtensorMap* map, uint32_t barrier, int column, int head, int row,
              Place place);
void fence_async_proxy(Place place);
void change_registers(int count, bool take, Place place);
void fence_products(Place place);
void commit_products(Place place);
void wait_products(int pending, Place place);
void bring_product(const Shape& shape, float* d, uint64_t a, const uint32_t* a_registers, uint64_t b, Place place);
void check_number(uint32_t bits, Place place);

inline void check_number(float number, Place place) {
    uint32_t bits;
    memcpy(&bits, &number, 4);
    if (number != number) check_number(bits, place);
}

}  // namespace cuda_on_host::hopper

namespace worldkv::hopper {

namespace model = cuda_on_host::hopper;

#define FILE_LINE const char *file = __builtin_FILE(), int line = __builtin_LINE()
#define PLACE \
    cuda_on_host::Place { __func__, file, line }

inline uint32_t shared_base() { return model::shared_base(); }

inline uint32_t load_shared(uint32_t address, FILE_LINE) { return model::load_shared(address, PLACE); }

inline void store_shared(uint32_t address, uint32_t value, FILE_LINE) { model::store_shared(address, value, PLACE); }

inline void init_barrier(uint32_t barrier, int arrivals, FILE_LINE) { model::init_barrier(barrier, arrivals, PLACE); }

inline void fence_barrier_init() { model::fence_barrier_init(); }

inline void arrive(uint32_t barrier, FILE_LINE) { model::arrive(barrier, PLACE); }

inline void arrive_expecting(uint32_t barrier, uint32_t bytes, FILE_LINE) {
    model::arrive_expecting(barrier, bytes, PLACE);
}

inline void wait(uint32_t barrier, uint32_t parity, FILE_LINE) { model::wait(barrier, parity, PLACE); }

inline void sync_named(int name, int threads, FILE_LINE) { model::sync_named(name, threads, PLACE); }

inline void arrive_named(int name, int threads, FILE_LINE) { model::arrive_named(name, threads, PLACE); }

enum class L2 : uint64_t { kEvictFirst = 0x12F0000000000000, kEvictLast = 0x14F0000000000000 };

inline void prefetch(const CUtensorMap* map, FILE_LINE) { model::prefetch(map, PLACE); }

template <L2 kHint>
inline void copy_box(uint32_t destination, const CUtensorMap* map, uint32_t barrier, int column, int head, int row,
                     FILE_LINE) {
    model::copy_box(destination, map, barrier, column, head, row, PLACE);
}

inline void fence_async_proxy(FILE_LINE) { model::fence_async_proxy(PLACE); }

template <int kRegisters>
inline void take_registers(FILE_LINE) {
    static_assert(kRegisters >= 24 && kRegisters <= 256 && kRegisters % 8 == 0);
    model::change_registers(kRegisters, true, PLACE);
}

template <int kRegisters>
inline void give_registers(FILE_LINE) {
    static_assert(kRegisters >= 24 && kRegisters <= 256 && kRegisters % 8 == 0);
    model::change_registers(kRegisters, false, PLACE);
}

template <int kSize>
inline void keep(float (&)[kSize]) {}

// Of any number of arrays; of four at most, since what is said of the place has to follow them.
inline void fence_products(FILE_LINE) { model::fence_products(PLACE); }
template <typename A>
inline void fence_products(A&, FILE_LINE) {
    model::fence_products(PLACE);
}
template <typename A, typename B>
inline void fence_products(A&, B&, FILE_LINE) {
    model::fence_products(PLACE);
}
template <typename A, typename B, typename C>
inline void fence_products(A&, B&, C&, FILE_LINE) {
    model::fence_products(PLACE);
}
template <typename A, typename B, typename C, typename D>
inline void fence_products(A&, B&, C&, D&, FILE_LINE) {
    model::fence_products(PLACE);
}

inline void commit_products(FILE_LINE) { model::commit_products(PLACE); }

template <int kPending>
inline void wait_products(FILE_LINE) {
    model::wait_products(kPending, PLACE);
}
template <int kPending, typename A>
inline void wait_products(A&, FILE_LINE) {
    model::wait_products(kPending, PLACE);
}
template <int kPending, typename A, typename B>
inline void wait_products(A&, B&, FILE_LINE) {
    model::wait_products(kPending, PLACE);
}
template <int kPending, typename A, typename B, typename C>
inline void wait_products(A&, B&, C&, FILE_LINE) {
    model::wait_products(kPending, PLACE);
}
template <int kPending, typename A, typename B, typename C, typename D>
inline void wait_products(A&, B&, C&, D&, FILE_LINE) {
    model::wait_products(kPending, PLACE);
}

inline constexpr uint64_t matrix(uint32_t half_bytes, uint32_t group_bytes) {
    return uint64_t{1} << 62 | uint64_t{group_bytes >> 4} << 32 | uint64_t{half_bytes >> 4} << 16;
}

inline uint64_t matrix_at(uint64_t matrix, uint32_t address, uint32_t offset = 0) {
    return matrix + (address >> 4) + (offset >> 4);
}

template <typename T, int N>
struct Product {
    static_assert(N == 64 || N == 128 || N == 176, "the device's header has no other");
    static constexpr bool kHalf = std::is_same_v<T, __half>;
    static_assert(kHalf || std::is_same_v<T, __nv_bfloat16>);

    template <bool kAccumulate>
    static void from_shared(float (&d)[N / 2], uint64_t a, uint64_t b, FILE_LINE) {
        model::bring_product({kHalf, false, false, kAccumulate, N}, d, a, nullptr, b, PLACE);
    }
    template <bool kAccumulate, int kTransposed>
    static void from_registers(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b, FILE_LINE) {
        model::bring_product({kHalf, true, kTransposed == 1, kAccumulate, N}, d, 0, a, b, PLACE);
    }
};

inline int computed_here(int x) { return x; }

// Results below 2**-126 become zeros.
inline float exp2_approx(float x, FILE_LINE) {
    model::check_number(x, PLACE);
    return x < -126.f ? 0.f : exp2f(x);
}

template <typename T>
inline uint32_t pack(float low, float high, FILE_LINE) {
    static_assert(sizeof(T) == 2);
    model::check_number(low, PLACE);
    model::check_number(high, PLACE);
    T numbers[2];
    if constexpr (std::is_same_v<T, __half>) {
        numbers[0] = __float2half_rn(low), numbers[1] = __float2half_rn(high);
    } else {
        numbers[0] = __float2bfloat16_rn(low), numbers[1] = __float2bfloat16_rn(high);
    }
    uint32_t both;
    memcpy(&both, numbers, 4);
    return both;
}

template <typename T>
inline float2 unpack(uint32_t both) {
    T numbers[2];
    memcpy(numbers, &both, 4);
    if constexpr (std::is_same_v<T, __half>) {
        return {__half2float(numbers[0]), __half2float(numbers[1])};
    } else {
        return {__bfloat162float(numbers[0]), __bfloat162float(numbers[1])};
    }
}

#undef FILE_LINE
#undef PLACE

}  // namespace worldkv::hopper
