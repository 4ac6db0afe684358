// Attention in float32 on any CPU; 16-bit pages are widened once per tile and span.
#include <vector>

#include "attention_core.h"

namespace understudy::attention {
namespace {

struct Float {
  using Elem = float;
  using Word = float;
  using Vector = Lanes;
  static constexpr long kUnit = 1;
  static Lanes load(const float *p) { return Lanes::load(p); }
  static void add(Lanes &sum, const Lanes &x, float w) {
#pragma GCC unroll 4
    for (int i = 0; i < kRegs; i++) sum.r[i] = fma(x.r[i], splat(w), sum.r[i]);
  }
  static Lanes part(const Lanes &x, long, long, long) { return x; }
  static void weights(const Lanes &x, float *p) { x.store(p); }
};

void widen_half(const uint16_t *from, float *to, long count) {
  long i = 0;
#if defined(__AVX512F__)
  for (; i + 16 <= count; i += 16) _mm512_storeu_ps(to + i, _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(from + i))));
#elif defined(__F16C__)
  for (; i + 8 <= count; i += 8) _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(from + i))));
#endif
  for (; i < count; i++) to[i] = from_f16(from[i]);
}

// [rows][width][2] in pairs to [2 rows][width]
void widen_pairs(const uint16_t *from, float *to, long rows, long width) {
  for (long r = 0; r < rows; r++) {
    const uint16_t *pairs = from + r * width * 2;
    float *even = to + r * width * 2, *odd = even + width;
    for (long i = 0; i < width; i++) {
      even[i] = from_bf16(pairs[2 * i]);
      odd[i] = from_bf16(pairs[2 * i + 1]);
    }
  }
}

}  // namespace

void walk_generic(const Tile &t, long begin, long end, State st) {
  thread_local Scratch queries, pages;
  thread_local std::vector<const float *> q;
  q.resize(t.n);
  const long vk = k_bytes(t.D, t.dtype);
  const long values = t.Dv * kBlock;
  if (t.dtype == kFloat32) {
    float *copy = t.latent ? pages.get<float>(kSpan * values) : nullptr;
    for (long i = 0; i < t.n; i++) q[i] = static_cast<const float *>(t.rows[i].q);
    walk<Float>(t, q.data(), begin, end, st, [&](long b, long block, const float **k, const float **v) {
      *k = reinterpret_cast<const float *>(t.page(block));
      *v = reinterpret_cast<const float *>(t.page(block) + vk);
      if (!copy) return;
      latent_values(*k, copy + b * values, t.L, t.Dv, 1);
      *v = copy + b * values;
    });
    return;
  }
  float *wide_q = queries.get<float>(t.n * t.D);
  for (long i = 0; i < t.n; i++) {
    for (long d = 0; d < t.D; d++) wide_q[i * t.D + d] = load_as(t.dtype, t.rows[i].q, d);
    q[i] = wide_q + i * t.D;
  }
  const long each = (t.D + t.Dv) * kBlock;
  float *wide = pages.get<float>(kSpan * each);
  walk<Float>(t, q.data(), begin, end, st, [&](long b, long block, const float **k, const float **v) {
    const uint16_t *page = reinterpret_cast<const uint16_t *>(t.page(block));
    float *to = wide + b * each;
    if (t.dtype == kFloat16) {
      widen_half(page, to, t.latent ? t.D * kBlock : each);
    } else {
      widen_pairs(page, to, t.D / 2, kBlock);
      if (!t.latent) widen_pairs(page + t.D * kBlock, to + t.D * kBlock, kBlock / 2, t.Dv);
    }
    if (t.latent) latent_values(to, to + t.D * kBlock, t.L, t.Dv, 1);
    *k = to;
    *v = to + t.D * kBlock;
  });
}

}  // namespace understudy::attention
