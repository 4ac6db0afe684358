// Attention in bfloat16 with AMX tiles: sixteen rows at once, for one decoded row as for a prompt.
//
// A K page is what a tile of the right-hand side wants, 32 components at a time. V goes through a copy of one span, so that two pages make
// one tile, and what no row sees is zero there: it may hold anything, and 0 * NaN is NaN.
#include "attention.h"
#ifdef UNDERSTUDY_ATTENTION_AMX
#include <vector>

#include "attention_pairs.h"

namespace understudy::attention {
namespace {

constexpr long kGroup = 16;                   // rows of a tile
constexpr long kPair = 2 * kBlock;            // positions of a tile of V
constexpr long kWords = kPositions / 2;       // pairs of positions in a span

// The intrinsics do not tell the compiler which memory they read and write: this does.
inline void fence() { asm volatile("" ::: "memory"); }

// Tiles 0-3: sums; 4: left, 5: right; 6 and 7: left and right for the last components of D, where they are fewer than 32.
class Tiles {
 public:
  explicit Tiles(long tail) : tail_(tail) {}
  ~Tiles() { _tile_release(); }
  Tiles(const Tiles &) = delete;
  Tiles &operator=(const Tiles &) = delete;
  void configure(long m) {
    if (m == rows_) return;
    rows_ = m;
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t bytes[16] = {};
      uint8_t rows[16] = {};
    } config;
    for (int i = 0; i < 8; i++) {
      config.bytes[i] = 64;
      config.rows[i] = uint8_t(m);
    }
    config.rows[5] = config.rows[7] = 16;
    if (tail_) {
      config.bytes[6] = uint16_t(tail_ * 2);
      config.rows[7] = uint8_t(tail_ / 2);
    }
    fence();
    _tile_loadconfig(&config);
  }

 private:
  long tail_, rows_ = 0;
};

struct Memory {
  uint16_t *q;    // [n][D]
  uint16_t *v;    // [kWords][Dv][2]: V of a span
  float *s;       // [kGroup][kPositions]
  int32_t *p;     // [kGroup][kWords]
};

// s[.][16 * b ..] = q . k for the blocks [b, end).
void dot(const uint16_t *q, const uint16_t *const *k, long b, long end, long D, float *s) {
  const long stride = D * 2, whole = D / 32 * 32;
  for (; b + 4 <= end; b += 4) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (long d = 0; d < whole; d += 32) {
      _tile_loadd(4, q + d, stride);
      _tile_loadd(5, k[b] + d * 16, 64);
      _tile_dpbf16ps(0, 4, 5);
      _tile_loadd(5, k[b + 1] + d * 16, 64);
      _tile_dpbf16ps(1, 4, 5);
      _tile_loadd(5, k[b + 2] + d * 16, 64);
      _tile_dpbf16ps(2, 4, 5);
      _tile_loadd(5, k[b + 3] + d * 16, 64);
      _tile_dpbf16ps(3, 4, 5);
    }
    if (whole < D) {
      _tile_loadd(6, q + whole, stride);
      _tile_loadd(7, k[b] + whole * 16, 64);
      _tile_dpbf16ps(0, 6, 7);
      _tile_loadd(7, k[b + 1] + whole * 16, 64);
      _tile_dpbf16ps(1, 6, 7);
      _tile_loadd(7, k[b + 2] + whole * 16, 64);
      _tile_dpbf16ps(2, 6, 7);
      _tile_loadd(7, k[b + 3] + whole * 16, 64);
      _tile_dpbf16ps(3, 6, 7);
    }
    _tile_stored(0, s + b * 16, kPositions * 4);
    _tile_stored(1, s + b * 16 + 16, kPositions * 4);
    _tile_stored(2, s + b * 16 + 32, kPositions * 4);
    _tile_stored(3, s + b * 16 + 48, kPositions * 4);
  }
  for (; b < end; b++) {
    _tile_zero(0);
    for (long d = 0; d < whole; d += 32) {
      _tile_loadd(4, q + d, stride);
      _tile_loadd(5, k[b] + d * 16, 64);
      _tile_dpbf16ps(0, 4, 5);
    }
    if (whole < D) {
      _tile_loadd(6, q + whole, stride);
      _tile_loadd(7, k[b] + whole * 16, 64);
      _tile_dpbf16ps(0, 6, 7);
    }
    _tile_stored(0, s + b * 16, kPositions * 4);
  }
}

// acc += p . v over the pairs of blocks [j0, j1).
void weigh(const int32_t *p, const uint16_t *v, long j0, long j1, float *acc, long Dv) {
  const long stride = Dv * 4;
  long c = 0;
  for (; c + 64 <= Dv; c += 64) {
    _tile_loadd(0, acc + c, stride);
    _tile_loadd(1, acc + c + 16, stride);
    _tile_loadd(2, acc + c + 32, stride);
    _tile_loadd(3, acc + c + 48, stride);
    for (long j = j0; j < j1; j++) {
      const uint16_t *at = v + (j * 16 * Dv + c) * 2;
      _tile_loadd(4, p + j * 16, kWords * 4);
      _tile_loadd(5, at, stride);
      _tile_dpbf16ps(0, 4, 5);
      _tile_loadd(5, at + 32, stride);
      _tile_dpbf16ps(1, 4, 5);
      _tile_loadd(5, at + 64, stride);
      _tile_dpbf16ps(2, 4, 5);
      _tile_loadd(5, at + 96, stride);
      _tile_dpbf16ps(3, 4, 5);
    }
    _tile_stored(0, acc + c, stride);
    _tile_stored(1, acc + c + 16, stride);
    _tile_stored(2, acc + c + 32, stride);
    _tile_stored(3, acc + c + 48, stride);
  }
  for (; c < Dv; c += 16) {
    _tile_loadd(0, acc + c, stride);
    for (long j = j0; j < j1; j++) {
      _tile_loadd(4, p + j * 16, kWords * 4);
      _tile_loadd(5, v + (j * 16 * Dv + c) * 2, stride);
      _tile_dpbf16ps(0, 4, 5);
    }
    _tile_stored(0, acc + c, stride);
  }
}

// m rows from `at` on over the positions [lo, hi) of a span (what any of the tile's rows sees there).
void group(const Tile &t, long at, long m, long span, long lo, long hi, const uint16_t *const *k, const Memory &memory, Tiles &tiles, State st) {
  const long base = span * kBlock;
  lo = std::max(lo, t.rows[at].first - base);
  hi = std::min(hi, t.rows[at + m - 1].last + 1 - base);
  if (lo >= hi) return;
  tiles.configure(m);
  fence();
  dot(memory.q + at * t.D, k, lo / kBlock, (hi + kBlock - 1) / kBlock, t.D, memory.s);
  fence();
  const long j0 = lo / kPair, j1 = (hi + kPair - 1) / kPair;
  for (long i = 0; i < m; i++) {
    const Row &row = t.rows[at + i];
    const long from = std::max(lo, row.first - base), to = std::min(hi, row.last + 1 - base);
    int32_t *p = memory.p + i * kWords;
    // Whole blocks are written by `softmax`; the rest of the tiles is zero.
    const long b0 = from / kBlock, b1 = (to + kBlock - 1) / kBlock;
    if (from >= to) {
      std::fill(p + j0 * 16, p + j1 * 16, 0);
      continue;
    }
    std::fill(p + j0 * 16, p + b0 * 8, 0);
    std::fill(p + b1 * 8, p + j1 * 16, 0);
    softmax<Pairs>(memory.s + i * kPositions, p, from, to, t.scale, t.cap, st.m + at + i, st.l + (at + i) * 16, st.acc + (at + i) * t.Dv, t.Dv);
  }
  fence();
  weigh(memory.p, memory.v, j0, j1, st.acc + at * t.Dv, t.Dv);
  fence();
}

// Copies V of the positions [lo, hi) of a span; the rest of its pairs of blocks becomes zero. True where all of it is finite.
bool copy_values(const Tile &t, long span, long lo, long hi, uint16_t *to) {
  const __m512i exponent = _mm512_set1_epi16(0x7f80);
  __mmask32 odd = 0;
  for (long pair = lo / kPair * 16; pair < (hi + kPair - 1) / kPair * 16; pair++) {
    const long position = pair * 2;
    const uint32_t mask = (position >= lo && position < hi ? 0xffffu : 0u) | (position + 1 >= lo && position + 1 < hi ? 0xffff0000u : 0u);
    uint16_t *row = to + pair * t.Dv * 2;
    if (!mask) {
      std::memset(row, 0, t.Dv * 4);
      continue;
    }
    const uint16_t *v = reinterpret_cast<const uint16_t *>(t.page(span + pair / 8)) + t.D * kBlock + pair % 8 * t.Dv * 2;
    for (long d = 0; d < t.Dv * 2; d += 32) {
      __m512i x = _mm512_and_si512(_mm512_loadu_si512(v + d), _mm512_set1_epi32(int32_t(mask)));
      odd |= _mm512_cmpeq_epi16_mask(_mm512_and_si512(x, exponent), exponent);
      _mm512_storeu_si512(row + d, x);
    }
  }
  return !odd;
}

// Rows [a, b) of the tile over one span.
void walk_span(const Tile &t, long a, long b, long span, long begin, long end, const Memory &memory, Tiles &tiles, State st) {
  const long base = span * kBlock;
  const long lo = std::max(std::max(begin, span) * kBlock, t.rows[a].first) - base;
  const long hi = std::min(std::min(end, span + kSpan) * kBlock, t.rows[b - 1].last + 1) - base;
  if (lo >= hi) return;
  const bool finite = copy_values(t, span, lo, hi, memory.v);
  const bool all_see_all = t.rows[b - 1].first - base <= lo && t.rows[a].last + 1 - base >= hi;
  if (!finite && !all_see_all && b - a > 1) {  // what one row must not see would reach its sums as 0 * infinity
    for (long i = a; i < b; i++) walk_span(t, i, i + 1, span, begin, end, memory, tiles, st);
    return;
  }
  const uint16_t *k[kSpan];
  for (long i = lo / kBlock; i < (hi + kBlock - 1) / kBlock; i++) k[i] = reinterpret_cast<const uint16_t *>(t.page(span + i));
  for (long i = a; i < b; i += kGroup) group(t, i, std::min(kGroup, b - i), span, lo, hi, k, memory, tiles, st);
}

}  // namespace

void walk_amx(const Tile &t, long begin, long end, State st) {
  thread_local Scratch scratch;
  std::fill(st.m, st.m + t.n, kNone);
  std::fill(st.l, st.l + t.n * 16, 0.f);
  std::fill(st.acc, st.acc + t.n * t.Dv, 0.f);
  const long q_bytes = round_up(t.n * t.D * 2, 64), v_bytes = kWords * t.Dv * 4;
  uint8_t *at = scratch.get<uint8_t>(q_bytes + v_bytes + kGroup * kPositions * 4 + kGroup * kWords * 4);
  Memory memory;
  memory.s = reinterpret_cast<float *>(at);
  memory.p = reinterpret_cast<int32_t *>(memory.s + kGroup * kPositions);
  memory.v = reinterpret_cast<uint16_t *>(memory.p + kGroup * kWords);
  memory.q = memory.v + v_bytes / 2;
  for (long i = 0; i < t.n; i++) std::memcpy(memory.q + i * t.D, t.rows[i].q, t.D * 2);
  Tiles tiles(t.D % 32);
  begin = std::max(begin, t.rows[0].first / kBlock);
  end = std::min(end, t.rows[t.n - 1].last / kBlock + 1);
  for (long span = begin / kSpan * kSpan; span < end; span += kSpan) walk_span(t, 0, t.n, span, begin, end, memory, tiles, st);
}

}  // namespace understudy::attention
#endif
