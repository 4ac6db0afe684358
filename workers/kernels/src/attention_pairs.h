// Pairs of bfloat16 with AVX-512's dot product.
#pragma once
#ifdef __AVX512BF16__
#include "attention_core.h"

namespace understudy::attention {

struct Pairs {
  using Elem = uint16_t;
  using Word = int32_t;
  using Vector = __m512bh;
  static constexpr long kUnit = 2;
  static __m512bh load(const uint16_t *p) { return (__m512bh)_mm512_loadu_si512(p); }
  static void add(Lanes &sum, __m512bh x, int32_t w) {
    sum.r[0] = (Reg)_mm512_dpbf16_ps((__m512)sum.r[0], x, (__m512bh)_mm512_set1_epi32(w));
  }
  static __m512bh part(__m512bh x, long at, long lo, long hi) {
    uint32_t mask = (at >= lo && at < hi ? 0xffffu : 0u) | (at + 1 >= lo && at + 1 < hi ? 0xffff0000u : 0u);
    return (__m512bh)_mm512_and_si512((__m512i)x, _mm512_set1_epi32(int32_t(mask)));
  }
  static void weights(const Lanes &x, int32_t *p) {
    _mm256_storeu_si256((__m256i *)p, (__m256i)_mm512_cvtneps_pbh((__m512)x.r[0]));
  }
};

}  // namespace understudy::attention
#endif
