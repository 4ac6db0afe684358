// Sixteen floats, one per position of a block, in as many registers as the CPU needs; and numbers of 16 bits.
//
// Every fused multiply-add is written as one, and no product stands where a compiler could fuse it with a sum in one inlined copy and
// not in another: a row's bits must not depend on which copy of a loop computed it.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

namespace understudy::attention {

#if defined(__AVX512F__)
typedef float Reg __attribute__((vector_size(64)));
typedef int32_t IntReg __attribute__((vector_size(64)));
#elif defined(__AVX2__)
typedef float Reg __attribute__((vector_size(32)));
typedef int32_t IntReg __attribute__((vector_size(32)));
#else
typedef float Reg __attribute__((vector_size(16)));
typedef int32_t IntReg __attribute__((vector_size(16)));
#endif
constexpr int kWidth = sizeof(Reg) / 4;
constexpr int kRegs = 16 / kWidth;

inline Reg splat(float x) { return x - Reg{}; }
inline Reg fma(Reg a, Reg b, Reg c) {
#if defined(__AVX512F__)
  return (Reg)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__) && defined(__FMA__)
  return (Reg)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__ARM_NEON) && defined(__aarch64__)
  return (Reg)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
  return a * b + c;  // no fused instruction is used here, so there is nothing to tell apart
#endif
}
// b where a is not a number
inline Reg larger(Reg a, Reg b) {
#if defined(__AVX512F__)
  return (Reg)_mm512_max_ps((__m512)a, (__m512)b);
#else
  return a > b ? a : b;
#endif
}
// 2^x for x up to 127; far below, 0. Relative error 2e-7 or, where the result is rounded to 16 bits anyway, 3e-6.
template <bool Coarse = false> inline Reg exp2(Reg x) {
#if defined(__AVX512F__)
  Reg n = (Reg)_mm512_roundscale_ps((__m512)x, 0);
#else
  const Reg low = splat(-126.f), magic = splat(12582912.f);  // 1.5 * 2^23: adding it rounds to an integer
  Reg y = larger(low, x);
  Reg n = (y + magic) - magic;
  const Reg given = x;
  x = y;
#endif
  Reg f = x - n, p;
  if (Coarse) {
    p = fma(splat(9.570101434e-3f), f, splat(5.591786028e-2f));
    p = fma(p, f, splat(2.402474484e-1f));
    p = fma(p, f, splat(6.931218147e-1f));
  } else {
    p = fma(splat(1.327647152e-3f), f, splat(9.675541331e-3f));
    p = fma(p, f, splat(5.550713275e-2f));
    p = fma(p, f, splat(2.402211972e-1f));
    p = fma(p, f, splat(6.931469671e-1f));
  }
  p = fma(p, f, splat(1.f));
#if defined(__AVX512F__)
  return (Reg)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
  IntReg e = (__builtin_convertvector(n, IntReg) + 127) << 23;
  Reg power;
  std::memcpy(&power, &e, sizeof power);
  p = p * power;  // a power of two: exact
  return given <= low ? Reg{} : p;
#endif
}
inline float largest(Reg x) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps((__m512)x);
#else
  float m = x[0];
  for (int i = 1; i < kWidth; i++) m = x[i] > m ? x[i] : m;
  return m;
#endif
}
inline float exp2(float x) { return exp2(splat(x))[0]; }

struct Lanes {
  Reg r[kRegs];
  static Lanes load(const float *p) {
    Lanes x;
#pragma GCC unroll 4
    for (int i = 0; i < kRegs; i++) std::memcpy(&x.r[i], p + i * kWidth, sizeof(Reg));
    return x;
  }
  static Lanes all(float v) {
    Lanes x;
#pragma GCC unroll 4
    for (int i = 0; i < kRegs; i++) x.r[i] = splat(v);
    return x;
  }
  void store(float *p) const {
#pragma GCC unroll 4
    for (int i = 0; i < kRegs; i++) std::memcpy(p + i * kWidth, &r[i], sizeof(Reg));
  }
};

// Numbers of 16 bits. Rounding is to nearest, ties to even; not-a-numbers stay so.
inline float from_bf16(uint16_t h) {
  uint32_t u = uint32_t(h) << 16;
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}
inline uint16_t to_bf16(float f) {
  uint32_t u;
  std::memcpy(&u, &f, 4);
  uint32_t rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
  return uint16_t((u & 0x7fffffff) > 0x7f800000 ? (u >> 16) | 0x40 : rounded);
}
inline float from_f16(uint16_t h) {
#if defined(__F16C__)
  return _cvtsh_ss(h);
#elif defined(__aarch64__)
  __fp16 x;
  std::memcpy(&x, &h, 2);
  return float(x);
#else
  // Moves exponent and mantissa into place and lets one multiplication correct the bias, subnormals included.
  uint32_t magnitude = uint32_t(h & 0x7fff) << 13, sign = uint32_t(h & 0x8000) << 16;
  float f;
  std::memcpy(&f, &magnitude, 4);
  f *= 0x1p112f;
  uint32_t u;
  std::memcpy(&u, &f, 4);
  if ((h & 0x7c00) == 0x7c00) u = 0x7f800000 | uint32_t(h & 0x3ff) << 13;
  u |= sign;
  std::memcpy(&f, &u, 4);
  return f;
#endif
}
inline uint16_t to_f16(float f) {
#if defined(__F16C__)
  return uint16_t(_cvtss_sh(f, 0));
#elif defined(__aarch64__)
  __fp16 x = __fp16(f);
  uint16_t h;
  std::memcpy(&h, &x, 2);
  return h;
#else
  uint32_t u;
  std::memcpy(&u, &f, 4);
  uint32_t sign = (u >> 16) & 0x8000, a = u & 0x7fffffff;
  if (a > 0x7f800000) return uint16_t(sign | 0x7e00);
  if (a >= 0x477ff000) return uint16_t(sign | 0x7c00);  // rounds to infinity
  if (a < 0x38800000) {                                 // subnormal: adding 0.5 leaves multiples of 2^-24 in the last bits
    float m;
    std::memcpy(&m, &a, 4);
    m += 0.5f;
    std::memcpy(&a, &m, 4);
    return uint16_t(sign | (a - 0x3f000000));
  }
  return uint16_t(sign | ((a - 0x38000000 + 0xfff + ((a >> 13) & 1)) >> 13));
#endif
}
inline float load_as(int dtype, const void *p, long i) {
  if (dtype == 0) return static_cast<const float *>(p)[i];
  uint16_t h = static_cast<const uint16_t *>(p)[i];
  return dtype == 1 ? from_bf16(h) : from_f16(h);
}
inline void store_as(int dtype, void *p, long i, float x) {
  if (dtype == 0)
    static_cast<float *>(p)[i] = x;
  else
    static_cast<uint16_t *>(p)[i] = dtype == 1 ? to_bf16(x) : to_f16(x);
}

}  // namespace understudy::attention
