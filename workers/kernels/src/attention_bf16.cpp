// Attention in bfloat16 with AVX-512's dot product of pairs.
#include "attention.h"
#ifdef __AVX512BF16__
#include <vector>

#include "attention_pairs.h"

namespace understudy::attention {

void walk_avx512bf16(const Tile &t, long begin, long end, State st) {
  thread_local std::vector<const int32_t *> q;
  q.resize(t.n);
  for (long i = 0; i < t.n; i++) q[i] = static_cast<const int32_t *>(t.rows[i].q);
  const long vk = k_bytes(t.D, t.dtype), values = t.Dv * kBlock;
  thread_local Scratch copies;
  uint16_t *copy = t.latent ? copies.get<uint16_t>(kSpan * values) : nullptr;
  walk<Pairs>(t, q.data(), begin, end, st, [&](long b, long block, const uint16_t **k, const uint16_t **v) {
    *k = reinterpret_cast<const uint16_t *>(t.page(block));
    *v = reinterpret_cast<const uint16_t *>(t.page(block) + vk);
    if (!copy) return;
    latent_values(*k, copy + b * values, t.L, t.Dv, Pairs::kUnit);
    *v = copy + b * values;
  });
}

}  // namespace understudy::attention
#endif
