// The soft cap of scores, for every walk.
#include "attention_core.h"
#include "simd.h"

namespace understudy::attention {

void cap_scores(float *s, const float *end, float cap) {
  for (; s < end; s += LANES) understudy::store(s, understudy::tanh(understudy::widen(s) * understudy::splat(cap)));
}

}  // namespace understudy::attention
