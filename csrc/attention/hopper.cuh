// What sm_90a offers beyond CUDA C++, each in one function: the copy engine, barriers in shared memory, products of a
// warp group, registers handed from one warp group to another. All PTX of attention is here; tests/cuda_on_host has
// another file of this name, which runs on a CPU. Facts are of the PTX ISA, by the section named.
//
// An address in shared memory is the 32-bit number that PTX takes.
#pragma once

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace worldkv::hopper {

// Dynamic shared memory. Tiles of 128-byte rows are swizzled by the bits of their address: 1024 bytes are a pattern.
__device__ __forceinline__ uint32_t shared_base() {
    extern __shared__ __align__(1024) unsigned char s_dynamic[];
    return static_cast<uint32_t>(__cvta_generic_to_shared(s_dynamic));
}

__device__ __forceinline__ uint32_t load_shared(uint32_t address) {
    uint32_t value;
    asm volatile("ld.shared.b32 %0, [%1];" : "=r"(value) : "r"(address) : "memory");
    return value;
}

__device__ __forceinline__ void store_shared(uint32_t address, uint32_t value) {
    asm volatile("st.shared.b32 [%0], %1;" ::"r"(address), "r"(value) : "memory");
}

// Barriers in shared memory (mbarrier): 8 bytes each. A phase ends when `arrivals` threads have arrived and the bytes
// that they expect have been copied.

__device__ __forceinline__ void init_barrier(uint32_t barrier, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

// By the thread that has initialised barriers, before the __syncthreads() after which others use them.
__device__ __forceinline__ void fence_barrier_init() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void arrive(uint32_t barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// Before the copies of these bytes are issued.
__device__ __forceinline__ void arrive_expecting(uint32_t barrier, uint32_t bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

// Until the phase of this parity has ended. The first phase has parity 0; a barrier that has seen none lets 1 pass.
__device__ __forceinline__ void wait(uint32_t barrier, uint32_t parity) {
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "AGAIN_%=:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@done bra DONE_%=;\n"
        "bra AGAIN_%=;\n"
        "DONE_%=:\n"
        "}" ::"r"(barrier), "r"(parity) : "memory");
}

// Named barriers (barrier.cta), 1 to 15; 0 is __syncthreads(). `threads` counts those that wait and those that only
// arrive.

__device__ __forceinline__ void sync_named(int name, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(name), "r"(threads) : "memory");
}

__device__ __forceinline__ void arrive_named(int name, int threads) {
    asm volatile("bar.arrive %0, %1;" ::"r"(name), "r"(threads) : "memory");
}

// The bulk tensor copy engine.

// What becomes of the lines in L2; the numbers are those of CUTLASS (cute/arch/copy_sm90_desc.hpp).
enum class L2 : uint64_t { kEvictFirst = 0x12F0000000000000, kEvictLast = 0x14F0000000000000 };

__device__ __forceinline__ void prefetch(const CUtensorMap* map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(reinterpret_cast<uint64_t>(map)) : "memory");
}

// By one thread: a box of the map [rows, heads, columns], from the given element on, to `destination`. What lies
// outside of the tensor becomes zeros. The bytes of the whole box are credited to `barrier`.
template <L2 kHint>
__device__ __forceinline__ void copy_box(uint32_t destination, const CUtensorMap* map, uint32_t barrier, int column,
                                         int head, int row) {
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint"
        " [%0], [%1, {%3, %4, %5}], [%2], %6;" ::"r"(destination),
        "l"(reinterpret_cast<uint64_t>(map)), "r"(barrier), "r"(column), "r"(head), "r"(row),
        "l"(static_cast<uint64_t>(kHint))
        : "memory");
}

// By each thread that has written shared memory with ordinary stores, before a barrier after which the copy engine or
// products read it.
__device__ __forceinline__ void fence_async_proxy() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Registers a thread, by all warps of a warp group. Taking waits until other groups have given enough.

template <int kRegisters>
__device__ __forceinline__ void take_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

template <int kRegisters>
__device__ __forceinline__ void give_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// Products of a warp group (wgmma): d [64, N] += a [64, 16] b [N, 16]^T in fp32, asynchronous.
//
// Of thread t, d[v] is row 16 * (t / 32) + t % 32 / 4 + 8 * (v / 2 % 2), column 8 * (v / 4) + 2 * (t % 4) + v % 2. As
// registers, a[i] holds rows as d[2 * i] does and two columns, the lower one in the low half.
//
// Between the product and the wait that covers it no thread touches d, nor an `a` in registers. The arrays given to a
// fence or a wait are those that the compiler shall not move across it.

template <int kSize>
__device__ __forceinline__ void keep(float (&registers)[kSize]) {
#pragma unroll
    for (int i = 0; i < kSize; ++i) asm volatile("" : "+f"(registers[i])::"memory");
}

// Before the first product, and before one that uses registers that the group has touched since the last.
template <typename... Registers>
__device__ __forceinline__ void fence_products(Registers&... registers) {
    (keep(registers), ...);
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

__device__ __forceinline__ void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Until all but the last kPending committed groups of products are done.
template <int kPending, typename... Registers>
__device__ __forceinline__ void wait_products(Registers&... registers) {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
    (keep(registers), ...);
}

// A matrix in shared memory in rows of 128 bytes with the 128-byte swizzle, which starts on a multiple of 1024 bytes
// (asynchronous warp group level matrix: shared memory layout). Rows of k: groups of 8 rows lie `group_bytes` apart.
// Rows of the other dimension (transposed): besides, each 64 columns lie `half_bytes` after the last.
__device__ __forceinline__ constexpr uint64_t matrix(uint32_t half_bytes, uint32_t group_bytes) {
    return uint64_t{1} << 62 | uint64_t{group_bytes >> 4} << 32 | uint64_t{half_bytes >> 4} << 16;
}

// Apart from `offset`, a constant, so that it is one addition to a register, and in the low half alone.
__device__ __forceinline__ uint64_t matrix_at(uint64_t matrix, uint32_t address, uint32_t offset = 0) {
    const uint32_t low = static_cast<uint32_t>(matrix) + (address >> 4) + (offset >> 4);
    return matrix >> 32 << 32 | low;
}

// from_shared(d, a, b): a and b by their matrix_at, rows of k both. from_registers<kTransposed>(d, a, b): b's rows are
// its k where kTransposed is 1. Without kAccumulate d is written and not read, as the compiler is told: it takes no
// registers until then.
template <typename T, int N>
struct Product;

#define WORLDKV_R32 \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15" \
    ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define WORLDKV_R64 WORLDKV_R32 \
    ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47" \
    ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define WORLDKV_R88 WORLDKV_R64 \
    ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79" \
    ", %80, %81, %82, %83, %84, %85, %86, %87"
#define WORLDKV_D8(io, i) \
    io(d[i]), io(d[i + 1]), io(d[i + 2]), io(d[i + 3]), io(d[i + 4]), io(d[i + 5]), io(d[i + 6]), io(d[i + 7])
#define WORLDKV_D32(io) WORLDKV_D8(io, 0), WORLDKV_D8(io, 8), WORLDKV_D8(io, 16), WORLDKV_D8(io, 24)
#define WORLDKV_D64(io) \
    WORLDKV_D32(io), WORLDKV_D8(io, 32), WORLDKV_D8(io, 40), WORLDKV_D8(io, 48), WORLDKV_D8(io, 56)
#define WORLDKV_D88(io) WORLDKV_D64(io), WORLDKV_D8(io, 64), WORLDKV_D8(io, 72), WORLDKV_D8(io, 80)
#define WORLDKV_ADDED "+f"
#define WORLDKV_WRITTEN "=f"

#define WORLDKV_WGMMA(TYPES, N, NUMBERS, ACCUMULATORS, A, B, ACCUMULATE, MODES, ...)                              \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " #ACCUMULATE ", 0;\n"                                         \
                 "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32" TYPES " {" NUMBERS "}, " A ", " B ", p, " MODES \
                 ";\n}"                                                                                           \
                 : ACCUMULATORS                                                                                   \
                 : __VA_ARGS__)

// The operands after N / 2 accumulators are numbered I0 to I5.
#define WORLDKV_PRODUCT(T, TYPES, N, NUMBERS, D, I0, I1, I2, I3, I4, I5)                                             \
    template <>                                                                                                      \
    struct Product<T, N> {                                                                                           \
        template <bool kAccumulate>                                                                                  \
        static __device__ __forceinline__ void from_shared(float (&d)[N / 2], uint64_t a, uint64_t b) {              \
            if constexpr (kAccumulate) {                                                                             \
                WORLDKV_WGMMA(TYPES, N, NUMBERS, D(WORLDKV_ADDED), "%" #I0, "%" #I1, 1, "1, 1, 0, 0", "l"(a),        \
                              "l"(b));                                                                               \
            } else {                                                                                                 \
                WORLDKV_WGMMA(TYPES, N, NUMBERS, D(WORLDKV_WRITTEN), "%" #I0, "%" #I1, 0, "1, 1, 0, 0", "l"(a),      \
                              "l"(b));                                                                               \
            }                                                                                                        \
        }                                                                                                            \
        template <bool kAccumulate, int kTransposed>                                                                 \
        static __device__ __forceinline__ void from_registers(float (&d)[N / 2], const uint32_t (&a)[4],             \
                                                              uint64_t b) {                                          \
            if constexpr (kAccumulate) {                                                                             \
                WORLDKV_WGMMA(TYPES, N, NUMBERS, D(WORLDKV_ADDED), "{%" #I0 ", %" #I1 ", %" #I2 ", %" #I3 "}",       \
                              "%" #I4, 1, "1, 1, %" #I5, "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b),         \
                              "n"(kTransposed));                                                                     \
            } else {                                                                                                 \
                WORLDKV_WGMMA(TYPES, N, NUMBERS, D(WORLDKV_WRITTEN), "{%" #I0 ", %" #I1 ", %" #I2 ", %" #I3 "}",     \
                              "%" #I4, 0, "1, 1, %" #I5, "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b),         \
                              "n"(kTransposed));                                                                     \
            }                                                                                                        \
        }                                                                                                            \
    };

WORLDKV_PRODUCT(__nv_bfloat16, ".bf16.bf16", 64, WORLDKV_R32, WORLDKV_D32, 32, 33, 34, 35, 36, 37)
WORLDKV_PRODUCT(__nv_bfloat16, ".bf16.bf16", 128, WORLDKV_R64, WORLDKV_D64, 64, 65, 66, 67, 68, 69)
WORLDKV_PRODUCT(__nv_bfloat16, ".bf16.bf16", 176, WORLDKV_R88, WORLDKV_D88, 88, 89, 90, 91, 92, 93)
WORLDKV_PRODUCT(__half, ".f16.f16", 64, WORLDKV_R32, WORLDKV_D32, 32, 33, 34, 35, 36, 37)
WORLDKV_PRODUCT(__half, ".f16.f16", 128, WORLDKV_R64, WORLDKV_D64, 64, 65, 66, 67, 68, 69)
WORLDKV_PRODUCT(__half, ".f16.f16", 176, WORLDKV_R88, WORLDKV_D88, 88, 89, 90, 91, 92, 93)

#undef WORLDKV_PRODUCT
#undef WORLDKV_WGMMA
#undef WORLDKV_WRITTEN
#undef WORLDKV_ADDED
#undef WORLDKV_D88
#undef WORLDKV_D64
#undef WORLDKV_D32
#undef WORLDKV_D8
#undef WORLDKV_R88
#undef WORLDKV_R64
#undef WORLDKV_R32

// Numbers.

// The same number, of which the compiler knows nothing: what depends on it is computed where it is wanted, and not
// ahead of a loop, where it would take registers.
__device__ __forceinline__ int computed_here(int x) {
    asm volatile("" : "+r"(x));
    return x;
}

__device__ __forceinline__ float exp2_approx(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// Two numbers in a register, `low` in its low half.
template <typename T>
__device__ __forceinline__ uint32_t pack(float low, float high);
template <>
__device__ __forceinline__ uint32_t pack<__nv_bfloat16>(float low, float high) {
    uint32_t both;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
    return both;
}
template <>
__device__ __forceinline__ uint32_t pack<__half>(float low, float high) {
    uint32_t both;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
    return both;
}

template <typename T>
__device__ __forceinline__ float2 unpack(uint32_t both);
template <>
__device__ __forceinline__ float2 unpack<__nv_bfloat16>(uint32_t both) {
    return make_float2(__uint_as_float(both << 16), __uint_as_float(both & 0xffff0000u));
}
template <>
__device__ __forceinline__ float2 unpack<__half>(uint32_t both) {
    float2 numbers;
    asm("{\n.reg .f16 low, high;\nmov.b32 {low, high}, %2;\ncvt.f32.f16 %0, low;\ncvt.f32.f16 %1, high;\n}"
        : "=f"(numbers.x), "=f"(numbers.y)
        : "r"(both));
    return numbers;
}

}  // namespace worldkv::hopper
