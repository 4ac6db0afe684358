// The walk of a tile over its pages, for a core that says how many values one multiply-add takes (`kUnit`) and how it does so.
// Rows go in fours that share the loads of K and V; what a row computes does not depend on the other three.
#pragma once
#include <algorithm>

#include "attention.h"
#include "attention_lanes.h"

namespace understudy::attention {

// Each s becomes tanh(cap * s).
void cap_scores(float *s, const float *end, float cap);

constexpr int kRows = 4;                                                       // rows that share loads
constexpr int kColumns = kRegs == 1 ? 4 : 1;                                   // vectors of 16 components at once


// One row over the positions [lo, hi) of a span. `s` holds q . k from position 0 of the span on, in whole blocks. Raises the maximum,
// rescales what was summed and leaves the weights in `p`. `Full` (all of the span) only lets the compiler unroll.
template <class Core, bool Full>
__attribute__((noinline)) void softmax_of(float *s, typename Core::Word *p, long lo, long hi, float scale, float *m, float *l, float *acc,
                                          long Dv) {
  const long b0 = Full ? 0 : lo / kBlock, b1 = Full ? kSpan : (hi + kBlock - 1) / kBlock;
  for (long j = b0 * kBlock; j < lo; j++) s[j] = kNone;
  for (long j = hi; j < b1 * kBlock; j++) s[j] = kNone;
  Reg top[2] = {splat(*m), splat(*m)};
#pragma GCC unroll 8
  for (long b = b0; b < b1; b++) {
    Lanes x = Lanes::load(s + b * kBlock);
    for (int i = 0; i < kRegs; i++) top[b % 2] = larger(top[b % 2], x.r[i]);
  }
  const float mx = largest(larger(top[0], top[1]));
  if (mx != *m) {
    float c = exp2((*m - mx) * scale);
    for (int i = 0; i < 16; i++) l[i] *= c;
    for (long d = 0; d < Dv; d++) acc[d] *= c;
    *m = mx;
  }
  Lanes sum = Lanes::load(l);
  const Reg factor = splat(scale), shift = splat(-mx * scale);
#pragma GCC unroll 8
  for (long b = b0; b < b1; b++) {
    Lanes x = Lanes::load(s + b * kBlock);
    for (int i = 0; i < kRegs; i++) {
      x.r[i] = exp2<Core::kUnit == 2>(fma(x.r[i], factor, shift));
      sum.r[i] = sum.r[i] + x.r[i];
    }
    Core::weights(x, p + b * (kBlock / Core::kUnit));
  }
  sum.store(l);
}
template <class Core>
inline void softmax(float *s, typename Core::Word *p, long lo, long hi, float scale, float cap, float *m, float *l, float *acc, long Dv) {
  if (cap != 0) cap_scores(s + lo / kBlock * kBlock, s + round_up(hi, kBlock), cap);
  if (lo == 0 && hi == kPositions)
    softmax_of<Core, true>(s, p, lo, hi, scale, m, l, acc, Dv);
  else
    softmax_of<Core, false>(s, p, lo, hi, scale, m, l, acc, Dv);
}

// s[i][16 * b ..] = q[i] . k of block b, for B blocks side by side.
template <class Core, int R, int B>
inline void dot(const typename Core::Word *const *q, const typename Core::Elem *const *k, long steps, float *s) {
  Lanes sum[R][B];
  for (int i = 0; i < R; i++)
    for (int b = 0; b < B; b++) sum[i][b] = Lanes::all(0);
  for (long d = 0; d < steps; d++) {
    typename Core::Vector kk[B];
    for (int b = 0; b < B; b++) kk[b] = Core::load(k[b] + d * kBlock * Core::kUnit);
    for (int i = 0; i < R; i++)
      for (int b = 0; b < B; b++) Core::add(sum[i][b], kk[b], q[i][d]);
  }
  for (int i = 0; i < R; i++)
    for (int b = 0; b < B; b++) sum[i][b].store(s + i * kPositions + b * kBlock);
}

// acc[i][16 * c ..] += weights . v over the blocks [b0, b1) of a span, all visible, for N vectors of components.
template <class Core, int R, int N>
inline void weigh(const typename Core::Word *p, const typename Core::Elem *const *v, long b0, long b1, float *const *acc, long c, long Dv) {
  constexpr long steps = kBlock / Core::kUnit;
  Lanes sum[R][N];
  for (int i = 0; i < R; i++)
    for (int n = 0; n < N; n++) sum[i][n] = Lanes::load(acc[i] + (c + n) * 16);
  for (long b = b0; b < b1; b++) {
    const typename Core::Elem *at = v[b] + c * 16 * Core::kUnit;
#pragma GCC unroll 1  // unrolled whole, it runs out of registers
    for (long j = 0; j < steps; j++) {
      typename Core::Vector vv[N];
      for (int n = 0; n < N; n++) vv[n] = Core::load(at + (j * Dv + n * 16) * Core::kUnit);
      for (int i = 0; i < R; i++)
        for (int n = 0; n < N; n++) Core::add(sum[i][n], vv[n], p[i * (kPositions / Core::kUnit) + b * steps + j]);
    }
  }
  for (int i = 0; i < R; i++)
    for (int n = 0; n < N; n++) sum[i][n].store(acc[i] + (c + n) * 16);
}

template <class Core, int R>
void weigh_all(const typename Core::Word *p, const typename Core::Elem *const *v, long b0, long b1, float *const *acc, long Dv) {
  long c = 0;
  for (; c + kColumns <= Dv / 16; c += kColumns) weigh<Core, R, kColumns>(p, v, b0, b1, acc, c, Dv);
  for (; c < Dv / 16; c++) weigh<Core, R, 1>(p, v, b0, b1, acc, c, Dv);
}

// One row over one block of which it sees the positions [lo, hi): what it does not see may hold anything.
template <class Core>
void weigh_part(const typename Core::Word *p, const typename Core::Elem *v, long lo, long hi, float *acc, long Dv) {
  for (long c = 0; c < Dv / 16; c++) {
    Lanes sum = Lanes::load(acc + c * 16);
    for (long j = lo / Core::kUnit; j * Core::kUnit < hi; j++)
      Core::add(sum, Core::part(Core::load(v + (j * Dv + c * 16) * Core::kUnit), j * Core::kUnit, lo, hi), p[j]);
    sum.store(acc + c * 16);
  }
}

// R rows over one span that begins at block `span`; `k` and `v` are its pages, those from b0 to b1 (counted from the span) are there.
template <class Core, int R>
void group(const Tile &t, long at, const typename Core::Word *const *q, long span, long b0, long b1, const typename Core::Elem *const *k,
           const typename Core::Elem *const *v, State st) {
  constexpr long words = kPositions / Core::kUnit;
  long lo[R], hi[R], begin = kPositions, end = 0;  // of the span, in positions
  for (int i = 0; i < R; i++) {
    const Row &row = t.rows[at + i];
    lo[i] = std::max(row.first - span * kBlock, b0 * kBlock);
    hi[i] = std::min(row.last + 1 - span * kBlock, b1 * kBlock);
    if (lo[i] < hi[i]) begin = std::min(begin, lo[i]), end = std::max(end, hi[i]);
  }
  if (begin >= end) return;
  alignas(64) float s[R][kPositions];
  alignas(64) typename Core::Word p[R][words];
  long b = begin / kBlock, stop = (end + kBlock - 1) / kBlock, steps = t.D / Core::kUnit;
  constexpr int side = kRegs == 1 || R == 1 ? 2 : 1;
  for (; b + side <= stop; b += side) dot<Core, R, side>(q, k + b, steps, s[0] + b * kBlock);
  if (b < stop) dot<Core, R, 1>(q, k + b, steps, s[0] + b * kBlock);
  float *acc[R];
  long full0 = 0, full1 = kSpan;  // blocks that every row sees whole
  for (int i = 0; i < R; i++) {
    acc[i] = st.acc + (at + i) * t.Dv;
    if (lo[i] < hi[i]) softmax<Core>(s[i], p[i], lo[i], hi[i], t.scale, t.cap, st.m + at + i, st.l + (at + i) * 16, acc[i], t.Dv);
    full0 = std::max(full0, (lo[i] + kBlock - 1) / kBlock);
    full1 = std::min(full1, hi[i] / kBlock);
  }
  auto alone = [&](int i, long from, long to) {
    for (long b = from; b < to; b++) {
      long x = std::max(lo[i] - b * kBlock, 0L), y = std::min(hi[i] - b * kBlock, kBlock);
      if (x == 0 && y == kBlock)
        weigh_all<Core, 1>(p[i], v, b, b + 1, acc + i, t.Dv);
      else if (x < y)
        weigh_part<Core>(p[i] + b * (kBlock / Core::kUnit), v[b], x, y, acc[i], t.Dv);
    }
  };
  if (full0 >= full1) full0 = full1 = stop;
  for (int i = 0; i < R; i++) alone(i, begin / kBlock, full0);
  if (full0 < full1) weigh_all<Core, R>(p[0], v, full0, full1, acc, t.Dv);
  for (int i = 0; i < R; i++) alone(i, full1, stop);
}

// `pages(b, k, v)` gives the two halves of block b's page.
template <class Core, class Pages>
void walk(const Tile &t, const typename Core::Word *const *q, long begin, long end, State st, Pages &&pages) {
  std::fill(st.m, st.m + t.n, kNone);
  std::fill(st.l, st.l + t.n * 16, 0.f);
  std::fill(st.acc, st.acc + t.n * t.Dv, 0.f);
  begin = std::max(begin, t.rows[0].first / kBlock);
  end = std::min(end, t.rows[t.n - 1].last / kBlock + 1);
  const typename Core::Elem *k[kSpan], *v[kSpan];
  for (long span = begin / kSpan * kSpan; span < end; span += kSpan) {
    long b0 = std::max(begin - span, 0L), b1 = std::min(end - span, kSpan);
    for (long b = b0; b < b1; b++) pages(b, span + b, &k[b], &v[b]);
    long r = 0;
    for (; r + kRows <= t.n; r += kRows) group<Core, kRows>(t, r, q + r, span, b0, b1, k, v, st);
    if (t.n - r == 3) group<Core, 3>(t, r, q + r, span, b0, b1, k, v, st);
    if (t.n - r == 2) group<Core, 2>(t, r, q + r, span, b0, b1, k, v, st);
    if (t.n - r == 1) group<Core, 1>(t, r, q + r, span, b0, b1, k, v, st);
  }
}

}  // namespace understudy::attention
