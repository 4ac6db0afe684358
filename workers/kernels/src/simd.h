// Sixteen floats at a time, for every CPU. All arithmetic is spelled out (these files are built with -ffp-contract=off), and what a lane
// computes never depends on its neighbours, so a value has the same bits in a full vector and in the tail of a row.
#pragma once
#include <cstdint>
#include <cstring>
#include <type_traits>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace understudy {

typedef float floats __attribute__((vector_size(64)));
typedef std::int32_t ints __attribute__((vector_size(64)));
typedef std::uint32_t uints __attribute__((vector_size(64)));
typedef std::uint16_t halves __attribute__((vector_size(32)));

constexpr int LANES = 16;

enum Dtype : int { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2 };

constexpr long size_of(Dtype dtype) { return dtype == FLOAT32 ? 4 : 2; }

struct bf16 { std::uint16_t bits; };
struct fp16 { std::uint16_t bits; };

inline floats splat(float x) { return floats{x, x, x, x, x, x, x, x, x, x, x, x, x, x, x, x}; }

inline floats fma(floats a, floats b, floats c) {
#if defined(__AVX512F__)
    return reinterpret_cast<floats>(_mm512_fmadd_ps(reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b), reinterpret_cast<__m512>(c)));
#else
    floats result;
#if defined(__FMA__)
    for (int half = 0; half < 2; half++) {
        __m256 x, y, z;
        std::memcpy(&x, reinterpret_cast<float *>(&a) + 8 * half, 32);
        std::memcpy(&y, reinterpret_cast<float *>(&b) + 8 * half, 32);
        std::memcpy(&z, reinterpret_cast<float *>(&c) + 8 * half, 32);
        z = _mm256_fmadd_ps(x, y, z);
        std::memcpy(reinterpret_cast<float *>(&result) + 8 * half, &z, 32);
    }
#else
    result = a * b + c;
#endif
    return result;
#endif
}

inline floats widen_bf16(halves h) {
#if defined(__AVX512F__)
    return reinterpret_cast<floats>(_mm512_slli_epi32(_mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(h)), 16));  // which GCC makes two halves of
#else
    return reinterpret_cast<floats>(__builtin_convertvector(h, uints) << 16);
#endif
}

// To the nearest, ties to even; NaN stays NaN. The instruction takes subnormals for 0.
inline halves narrow_bf16(floats x) {
#if defined(__AVX512BF16__)
    return reinterpret_cast<halves>(_mm512_cvtneps_pbh(reinterpret_cast<__m512>(x)));
#else
    const uints u = reinterpret_cast<uints>(x);
    const uints rounded = (u + 0x7FFF + ((u >> 16) & 1)) >> 16;
    const uints quiet = (u >> 16) | 0x40;
    const ints nan = reinterpret_cast<ints>((u & 0x7FFFFFFF) > 0x7F800000);
    const uints mask = reinterpret_cast<uints>(nan);
    return __builtin_convertvector((quiet & mask) | (rounded & ~mask), halves);
#endif
}

inline floats widen_fp16(halves h) {
#if defined(__AVX512F__)
    return reinterpret_cast<floats>(_mm512_cvtph_ps(reinterpret_cast<__m256i>(h)));
#elif defined(__F16C__)
    __m128i parts[2];
    std::memcpy(parts, &h, sizeof parts);
    const __m256 wide[2] = {_mm256_cvtph_ps(parts[0]), _mm256_cvtph_ps(parts[1])};
    floats result;
    std::memcpy(&result, wide, sizeof result);
    return result;
#else
    floats result;
    for (int i = 0; i < LANES; i++) {
        const std::uint16_t bits = h[i];
        _Float16 value;
        std::memcpy(&value, &bits, 2);
        result[i] = static_cast<float>(value);
    }
    return result;
#endif
}

inline halves narrow_fp16(floats x) {
#if defined(__AVX512F__)
    return reinterpret_cast<halves>(_mm512_cvtps_ph(reinterpret_cast<__m512>(x), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif defined(__F16C__)
    __m256 parts[2];
    std::memcpy(parts, &x, sizeof parts);
    const __m128i narrow[2] = {_mm256_cvtps_ph(parts[0], _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC),
                               _mm256_cvtps_ph(parts[1], _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
    halves result;
    std::memcpy(&result, narrow, sizeof result);
    return result;
#else
    halves result;
    for (int i = 0; i < LANES; i++) {
        const _Float16 value = static_cast<_Float16>(x[i]);
        std::uint16_t bits;
        std::memcpy(&bits, &value, 2);
        result[i] = bits;
    }
    return result;
#endif
}

inline floats widen(const float *p) {
    floats v;
    std::memcpy(&v, p, 64);
    return v;
}
inline floats widen(const bf16 *p) {
    halves v;
    std::memcpy(&v, p, 32);
    return widen_bf16(v);
}
inline floats widen(const fp16 *p) {
    halves v;
    std::memcpy(&v, p, 32);
    return widen_fp16(v);
}

// One value; in a loop over adjacent ones compilers make plain vector code of it.
inline float widened(bf16 x) {
    const std::uint32_t bits = static_cast<std::uint32_t>(x.bits) << 16;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

// The first n of 16 lanes; the others are `fill`.
template <class T> inline floats load(const T *p, long n, T fill = T{}) {
    if (n >= LANES) return widen(p);
    T lanes[LANES];
    for (T &lane : lanes) lane = fill;
    std::memcpy(lanes, p, static_cast<std::size_t>(n) * sizeof(T));
    return widen(lanes);
}

inline void store(float *p, floats v, long n = LANES) { std::memcpy(p, &v, n >= LANES ? 64 : static_cast<std::size_t>(n) * 4); }
inline void store(bf16 *p, floats v, long n = LANES) {
    const halves h = narrow_bf16(v);
    std::memcpy(p, &h, n >= LANES ? 32 : static_cast<std::size_t>(n) * 2);
}
inline void store(fp16 *p, floats v, long n = LANES) {
    const halves h = narrow_fp16(v);
    std::memcpy(p, &h, n >= LANES ? 32 : static_cast<std::size_t>(n) * 2);
}

// As `store`; returns what was stored.
inline floats store_rounded(float *p, floats v, long n = LANES) { return store(p, v, n), v; }
inline floats store_rounded(bf16 *p, floats v, long n = LANES) {
    const halves h = narrow_bf16(v);
    std::memcpy(p, &h, n >= LANES ? 32 : static_cast<std::size_t>(n) * 2);
    return widen_bf16(h);
}
inline floats store_rounded(fp16 *p, floats v, long n = LANES) {
    const halves h = narrow_fp16(v);
    std::memcpy(p, &h, n >= LANES ? 32 : static_cast<std::size_t>(n) * 2);
    return widen_fp16(h);
}

// Values as a tensor of T would hold them.
template <class T> inline floats round_to(floats v) {
    if constexpr (sizeof(T) == 4) return v;
    else if constexpr (std::is_same_v<T, bf16>) return widen_bf16(narrow_bf16(v));
    else return widen_fp16(narrow_fp16(v));
}

// One fixed tree: lanes 8 apart, then 4, 2, 1.
inline float sum(floats v) {
    float x[LANES];
    std::memcpy(x, &v, 64);
    for (int width = 8; width > 0; width /= 2)
        for (int i = 0; i < width; i++) x[i] += x[i + width];
    return x[0];
}

inline floats select(ints mask, floats yes, floats no) {
    return reinterpret_cast<floats>((mask & reinterpret_cast<ints>(yes)) | (~mask & reinterpret_cast<ints>(no)));
}
inline floats vmax(floats a, floats b) { return select(a > b, a, b); }
inline floats vmin(floats a, floats b) { return select(a < b, a, b); }

// e^x within 2 ulp: x = n ln 2 + r with ln 2 in two parts (Cody and Waite), e^r by its series to the 7th power on |r| <= ln 2 / 2,
// then n added to the exponent. Below -87.3 the result is 0 (no subnormals), above 88.7 infinity; NaN stays NaN.
inline floats exp(floats x) {
    const floats clamped = vmin(vmax(x, splat(-87.33654f)), splat(88.72283f));
    const floats magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
    const floats shifted = fma(clamped, splat(1.44269504f), magic);
    const floats n = shifted - magic;
    floats r = fma(n, splat(-0.693359375f), clamped);
    r = fma(n, splat(2.12194440e-4f), r);
    floats p = splat(1.9841270e-4f);
    p = fma(p, r, splat(1.3888889e-3f));
    p = fma(p, r, splat(8.3333333e-3f));
    p = fma(p, r, splat(4.1666667e-2f));
    p = fma(p, r, splat(1.6666667e-1f));
    p = fma(p, r, splat(0.5f));
    p = fma(p, r, splat(1.0f));
    p = fma(p, r, splat(1.0f));
    // n may be 128 at the upper end: scaled in two steps.
    const ints exponent = __builtin_convertvector(n, ints);
    const ints half = exponent >> 1;
    const floats first = reinterpret_cast<floats>((half + 127) << 23), second = reinterpret_cast<floats>((exponent - half + 127) << 23);
    floats result = p * first * second;
    result = select(x < splat(-87.33654f), splat(0.0f), result);
    result = select(x > splat(88.72283f), splat(__builtin_inff()), result);
    return select(x == x, result, x);
}

inline floats magnitude(floats x) { return reinterpret_cast<floats>(reinterpret_cast<ints>(x) & 0x7FFFFFFF); }

// Within 3 ulp. Near 0 x + x^3 p(x^2), p fitted on |x| <= 0.63; elsewhere 1 - 2 / (e^(2 |x|) + 1) with x's sign.
inline floats tanh(floats x) {
    const floats a = magnitude(x), z = x * x;
    floats p = splat(-0.00566078f);
    p = fma(p, z, splat(0.020602f));
    p = fma(p, z, splat(-0.05372923f));
    p = fma(p, z, splat(0.13331329f));
    p = fma(p, z, splat(-0.33333278f));
    const floats near = fma(x * z, p, x), far = splat(1.0f) - splat(2.0f) / (exp(a + a) + splat(1.0f));
    return select(a < splat(0.63f), near, select(x < splat(0.0f), -far, far));
}

// x times the normal distribution's share below x: half of erfc(-x / sqrt 2), where erfc(t) = e^(-t^2) p(1 / (1 + 0.4 t)) for t >= 0, p fitted
// to 3e-8 for t <= 10.
inline floats gelu(floats x) {
    const floats t = magnitude(x) * splat(0.70710678f), s = splat(1.0f) / fma(t, splat(0.4f), splat(1.0f));
    floats p = splat(0.02869574574920611f);
    p = fma(p, s, splat(-0.07474887752373195f));
    p = fma(p, s, splat(-0.06368671168668846f));
    p = fma(p, s, splat(0.27578898478884323f));
    p = fma(p, s, splat(-0.0685675111577817f));
    p = fma(p, s, splat(0.26863805746271996f));
    p = fma(p, s, splat(0.17741619183102647f));
    p = fma(p, s, splat(0.23135517141271575f));
    p = fma(p, s, splat(0.22508257404729892f));
    p = fma(p, s, splat(2.640531200276408e-05f));
    const floats tail = p * exp(-(t * t));
    return x * splat(0.5f) * select(x < splat(0.0f), tail, splat(2.0f) - tail);
}

inline floats sigmoid(floats x) { return splat(1.0f) / (splat(1.0f) + exp(-x)); }

}  // namespace understudy
