// AVX-512 bf16 and AMX in plain C++, as far as linear_avx512.cpp and linear_amx.cpp use them: so that the logic of those kernels is tested on
// CPUs that lack the instructions. Slow, and no test of what the instructions themselves do: dot products add pairs in one order, and
// subnormals are taken for zero, as Intel's manual says of vdpbf16ps and tdpbf16ps. `cxx` includes this before the two files.
#pragma once
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cmath>
#include <cstdint>
#include <cstring>

#include "../../workers/kernels/src/simd.h"

namespace emulated {

struct Vector {  // 512 bits
    alignas(64) unsigned char bytes[64];

    float number(int i) const {
        float value;
        std::memcpy(&value, bytes + 4 * i, 4);
        return value;
    }
    void set(int i, float value) { std::memcpy(bytes + 4 * i, &value, 4); }
};
struct Pairs : Vector {  // of bfloat16
    Pairs() = default;
    explicit Pairs(const Vector &v) : Vector(v) {}
};

inline float flushed(float x) { return std::fabs(x) < 1.17549435e-38f ? std::copysign(0.0f, x) : x; }
inline float widened(std::uint16_t x) {
    const std::uint32_t bits = static_cast<std::uint32_t>(x) << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return flushed(value);
}
inline std::uint16_t narrowed(float x) {
    std::uint32_t bits;
    std::memcpy(&bits, &x, 4);
    if ((bits & 0x7fffffff) > 0x7f800000) return static_cast<std::uint16_t>(bits >> 16 | 0x40);
    if ((bits & 0x7f800000) == 0) return static_cast<std::uint16_t>(bits >> 16 & 0x8000);
    return static_cast<std::uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
inline float plus_product(float sum, std::uint16_t a, std::uint16_t b) { return flushed(std::fma(widened(a), widened(b), flushed(sum))); }

inline Vector load(const void *p) {
    Vector v;
    std::memcpy(v.bytes, p, 64);
    return v;
}
inline void store(void *p, const Vector &v) { std::memcpy(p, v.bytes, 64); }
inline Vector add(Vector a, const Vector &b) {
    for (int i = 0; i < 16; i++) a.set(i, a.number(i) + b.number(i));
    return a;
}
inline Vector splat(int x) {
    Vector v;
    for (int i = 0; i < 16; i++) std::memcpy(v.bytes + 4 * i, &x, 4);
    return v;
}
inline Vector dot_pairs(Vector sums, const Pairs &a, const Pairs &b) {
    for (int i = 0; i < 16; i++) {
        std::uint16_t x[2], y[2];
        std::memcpy(x, a.bytes + 4 * i, 4);
        std::memcpy(y, b.bytes + 4 * i, 4);
        sums.set(i, plus_product(plus_product(sums.number(i), x[1], y[1]), x[0], y[0]));
    }
    return sums;
}
inline __m256i narrow(const Vector &v) {
    std::uint16_t values[16];
    for (int i = 0; i < 16; i++) values[i] = narrowed(v.number(i));
    __m256i result;
    std::memcpy(&result, values, 32);
    return result;
}
inline Vector narrow_two(const Vector &upper, const Vector &lower) {
    const __m256i halves[2] = {narrow(lower), narrow(upper)};
    return load(halves);
}
template <int COUNT, class V> void store_some(void *p, std::uint32_t mask, const V &v) {
    for (int i = 0; i < COUNT; i++)
        if (mask >> i & 1) std::memcpy(static_cast<char *>(p) + 2 * i, reinterpret_cast<const char *>(&v) + 2 * i, 2);
}

struct Tiles {
    int rows[8], bytes[8];
    unsigned char data[8][16][64];

    static Tiles &own() {
        static thread_local Tiles tiles;
        return tiles;
    }
    void check(int tile) const {
        if (rows[tile] < 1 || rows[tile] > 16) __builtin_trap();
    }
};
inline void load_config(const void *p) {
    const auto *from = static_cast<const unsigned char *>(p);
    Tiles &t = Tiles::own();
    for (int i = 0; i < 8; i++) {
        std::uint16_t bytes;
        std::memcpy(&bytes, from + 16 + 2 * i, 2);
        t.bytes[i] = bytes;
        t.rows[i] = from[48 + i];
    }
    std::memset(t.data, 0, sizeof t.data);
}
inline void release() { std::memset(&Tiles::own(), 0xee, sizeof(Tiles)); }
inline void zero(int tile) { std::memset(Tiles::own().data[tile], 0, sizeof Tiles::own().data[tile]); }
inline void load_tile(int tile, const void *p, long stride) {
    Tiles &t = Tiles::own();
    t.check(tile);
    zero(tile);
    for (int r = 0; r < t.rows[tile]; r++) std::memcpy(t.data[tile][r], static_cast<const char *>(p) + r * stride, static_cast<std::size_t>(t.bytes[tile]));
}
inline void store_tile(int tile, void *p, long stride) {
    const Tiles &t = Tiles::own();
    t.check(tile);
    for (int r = 0; r < t.rows[tile]; r++) std::memcpy(static_cast<char *>(p) + r * stride, t.data[tile][r], static_cast<std::size_t>(t.bytes[tile]));
}
inline void dot_tiles(int c, int a, int b) {
    Tiles &t = Tiles::own();
    for (int m = 0; m < t.rows[c]; m++)
        for (int k = 0; k < 16; k++)
            for (int n = 0; n < 16; n++) {
                float sum;
                std::uint16_t x[2], y[2];
                std::memcpy(&sum, &t.data[c][m][4 * n], 4);
                std::memcpy(x, &t.data[a][m][4 * k], 4);
                std::memcpy(y, &t.data[b][k][4 * n], 4);
                sum = plus_product(plus_product(sum, x[0], y[0]), x[1], y[1]);
                std::memcpy(&t.data[c][m][4 * n], &sum, 4);
            }
}

}  // namespace emulated

#define __AVX512BF16__ 1
#define __AVX512VL__ 1
#define __AVX512BW__ 1
#define __AMX_BF16__ 1
#define __m512 emulated::Vector
#define __m512i emulated::Vector
#define __m512bh emulated::Pairs
#define _mm512_loadu_ps emulated::load
#define _mm512_load_ps emulated::load
#define _mm512_loadu_si512 emulated::load
#define _mm512_storeu_ps emulated::store
#define _mm512_add_ps emulated::add
#define _mm512_set1_epi32 emulated::splat
#define _mm512_dpbf16_ps emulated::dot_pairs
#define _mm512_cvtneps_pbh emulated::narrow
#define _mm512_cvtne2ps_pbh emulated::narrow_two
#define _mm256_mask_storeu_epi16 emulated::store_some<16>
#define _mm512_mask_storeu_epi16 emulated::store_some<32>
#define _tile_loadconfig emulated::load_config
#define _tile_release emulated::release
#define _tile_zero emulated::zero
#define _tile_loadd emulated::load_tile
#define _tile_stored emulated::store_tile
#define _tile_dpbf16ps emulated::dot_tiles
#define __builtin_cpu_supports(name) 1
#define syscall(...) 0
