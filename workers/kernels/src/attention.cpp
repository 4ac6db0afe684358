// Attention over a paged cache: cuts a step into tiles, walks them on the pool, folds segments.
#include "attention.h"

#include <algorithm>
#include <atomic>
#include <memory>
#include <vector>

#include "attention_lanes.h"
#include "pool.h"

namespace understudy::attention {
namespace {

constexpr long kTileRows = 128;

struct Step {
  const uint8_t *q;
  uint8_t *out;
  const uint8_t *layer;
  const int64_t *positions;
  const int32_t *row_start, *table;
  long sequences, width, heads, kv_heads, D, window;
  float scale;
  const float *sinks;  // [heads], or null
  float softcap;       // 0: none
  long latent;         // components of a value where pages hold keys alone, else 0
  int dtype;
  Walk walk;
  long L() const { return latent ? latent : D; }
  long first_visible(long position) const { return window ? std::max(0L, position - window + 1) : 0; }
};

// Rows [begin, end) of a sequence for one KV head, over the segments [segment, segments_end) of the cache.
struct Item {
  int32_t sequence, kv_head;
  long begin, end, segment, segments_end;
  long job = -1;  // of a tile that several items share
};

// A tile whose segments are walked apart: the partial results, and how many are still missing.
struct Job {
  long offset, first, count;
  std::atomic<long> missing;
};

// into = into followed by next: softmaxes over two parts of the positions become one over both. Never inlined: one order of operations.
__attribute__((noinline)) void fold(State into, State next, long row, long Dv, float scale) {
  float a = into.m[row], b = next.m[row], m = std::max(a, b), x = exp2((a - m) * scale), y = exp2((b - m) * scale);
  Reg xx = splat(x), yy = splat(y);
  auto combine = [&](float *to, const float *from, long count) {
    for (long i = 0; i < count; i += 16) {
      Lanes s = Lanes::load(to + i), n = Lanes::load(from + i);
      for (int r = 0; r < kRegs; r++) s.r[r] = fma(n.r[r], yy, s.r[r] * xx);
      s.store(to + i);
    }
  };
  into.m[row] = m;
  combine(into.l + row * 16, next.l + row * 16, 16);
  combine(into.acc + row * Dv, next.acc + row * Dv, Dv);
}

// Takes one segment's result into what came before it; rows that do not see the segment stay as they are.
void take(const Tile &t, State into, State next, long segment) {
  constexpr long positions = kSegment * kBlock;
  for (long i = 0; i < t.n; i++) {
    const Row &row = t.rows[i];
    if (segment < row.first / positions || segment > row.last / positions) continue;
    if (segment > row.first / positions) {
      fold(into, next, i, t.Dv, t.scale);
    } else {
      into.m[i] = next.m[i];
      std::copy_n(next.l + i * 16, 16, into.l + i * 16);
      std::copy_n(next.acc + i * t.Dv, t.Dv, into.acc + i * t.Dv);
    }
  }
}

__attribute__((noinline)) void finish(const Tile &t, State st) {
  for (long i = 0; i < t.n; i++) {
    float sum = 0;
    for (int j = 0; j < 16; j++) sum += st.l[i * 16 + j];
    if (t.sinks) sum += exp2(std::min(t.rows[i].sink - st.m[i] * t.scale, 127.f));
    float inverse = 1.f / sum;
    for (long d = 0; d < t.L; d++) store_as(t.dtype, t.rows[i].out, d, st.acc[i * t.Dv + d] * inverse + 0.f);  // never -0
  }
}

Tile tile_of(const Step &s, const Item &item, std::vector<Row> &rows) {
  const long rep = s.heads / s.kv_heads, bytes = element(s.dtype);
  constexpr float log2e = 1.44269504f;
  rows.clear();
  for (long t = item.begin; t < item.end; t++)
    for (long h = item.kv_head * rep; h < (item.kv_head + 1) * rep; h++) {
      long at = (t * s.heads + h) * bytes;
      rows.push_back({s.q + at * s.D, s.out + at * s.L(), s.first_visible(s.positions[t]), long(s.positions[t]), s.sinks ? s.sinks[h] * log2e : 0.f});
    }
  const long page = page_bytes(s.D, s.latent != 0, s.dtype);
  return {rows.data(), long(rows.size()), s.layer + item.kv_head * page, s.table + item.sequence * s.width,
          s.kv_heads * page, s.D, s.L(), round_up(s.L(), 16), s.latent != 0, s.sinks != nullptr,
          (s.softcap != 0 ? s.softcap : s.scale) * log2e, s.softcap != 0 ? s.scale / s.softcap : 0.f, s.dtype};
}

void run(const Step &s, const Item &item, std::unique_ptr<Job[]> &jobs, float *partials) {
  thread_local std::vector<Row> rows;
  thread_local Scratch scratch;
  Tile t = tile_of(s, item, rows);
  const long size = round_up(State::floats(t.n, t.Dv), 16);
  if (item.job >= 0) {
    Job &job = jobs[item.job];
    auto part = [&](long segment) { return State::at(partials + job.offset + (segment - job.first) * size, t.n); };
    s.walk(t, item.segment * kSegment, (item.segment + 1) * kSegment, part(item.segment));
    if (job.missing.fetch_sub(1, std::memory_order_acq_rel) > 1) return;
    for (long g = job.first + 1; g < job.first + job.count; g++) take(t, part(job.first), part(g), g);
    finish(t, part(job.first));
    return;
  }
  float *memory = scratch.get<float>(2 * size);
  State whole = State::at(memory, t.n), next = State::at(memory + size, t.n);
  if (item.segments_end - item.segment == 1) {
    s.walk(t, item.segment * kSegment, item.segments_end * kSegment, whole);
  } else {
    for (long g = item.segment; g < item.segments_end; g++) {
      s.walk(t, g * kSegment, (g + 1) * kSegment, next);
      take(t, whole, next, g);
    }
  }
  finish(t, whole);
}

// Tiles of up to `kTileRows` rows, those that see most first, so that threads end together.
std::vector<Item> cut(const Step &s) {
  const long rep = s.heads / s.kv_heads, most = std::max(1L, kTileRows / rep);
  std::vector<Item> items;
  for (long q = 0; q < s.sequences; q++)
    for (long end = s.row_start[q + 1]; end > s.row_start[q];) {
      long begin = std::max<long>(s.row_start[q], end - most);
      long segment = s.first_visible(s.positions[begin]) / (kSegment * kBlock), last = s.positions[end - 1] / (kSegment * kBlock);
      for (long g = 0; g < s.kv_heads; g++) items.push_back({int32_t(q), int32_t(g), begin, end, segment, last + 1});
      end = begin;
    }
  auto cost = [&](const Item &i) { return (i.end - i.begin) * (s.positions[i.end - 1] + 1 - s.first_visible(s.positions[i.begin])); };
  std::stable_sort(items.begin(), items.end(), [&](const Item &a, const Item &b) { return cost(a) > cost(b); });
  return items;
}

// Where there are few tiles, their segments become items of their own. The sums are the same either way.
std::vector<Item> split(const Step &s, const std::vector<Item> &tiles, std::unique_ptr<Job[]> &jobs, long *floats) {
  jobs.reset(new Job[tiles.size()]);
  std::vector<Item> items;
  long offset = 0, job = 0;
  for (const Item &tile : tiles) {
    long count = tile.segments_end - tile.segment;
    if (count == 1) {
      items.push_back(tile);
      continue;
    }
    jobs[job].offset = offset;
    jobs[job].first = tile.segment;
    jobs[job].count = count;
    jobs[job].missing.store(count, std::memory_order_relaxed);
    long rows = (tile.end - tile.begin) * (s.heads / s.kv_heads);
    offset += count * round_up(State::floats(rows, round_up(s.L(), 16)), 16);
    for (long g = tile.segment; g < tile.segments_end; g++) {
      items.push_back({tile.sequence, tile.kv_head, tile.begin, tile.end, g, g + 1, job});
    }
    job++;
  }
  *floats = offset;
  return items;
}

// Latents of AMX take the walk of AVX-512: tiles know pages of K and V only.
Walk walk_of(int isa, int dtype, bool latent) {
#ifdef UNDERSTUDY_ATTENTION_AMX
  if (dtype == kBFloat16 && isa == kAmx && !latent) return walk_amx;
#endif
#ifdef __AVX512BF16__
  if (dtype == kBFloat16 && isa != kGeneric) return walk_avx512bf16;
#endif
  (void)isa, (void)dtype, (void)latent;
  return walk_generic;
}

}  // namespace
}  // namespace understudy::attention

using namespace understudy::attention;

extern "C" {

// Bytes of one page: 16 positions of one KV head, K and V; of latents K alone.
long attention_page_bytes(long D, int latent, int dtype) { return page_bytes(D, latent != 0, dtype); }

// q [T, heads, D], out [T, heads, L]; layer: its pages; table int32 [sequences, width]; window 0: none. latent 0: pages hold K and V, and L is
// D; else L. sinks float32 [heads] or null. softcap 0: none.
void attention(const void *q, void *out, const void *layer, const int64_t *positions, const int32_t *row_start, const int32_t *table,
               long sequences, long width, long heads, long kv_heads, long D, long window, float scale, const float *sinks,
               float softcap, long latent, int dtype, int isa) {
  Step s{static_cast<const uint8_t *>(q), static_cast<uint8_t *>(out), static_cast<const uint8_t *>(layer), positions, row_start, table,
         sequences, width, heads, kv_heads, D, window, scale, sinks, softcap, latent, dtype, walk_of(isa, dtype, latent != 0)};
  thread_local Scratch partials;
  std::vector<Item> items = cut(s);
  std::unique_ptr<Job[]> jobs;
  float *memory = nullptr;
  if (long threads = understudy::threads(); threads > 1 && long(items.size()) < 4 * threads) {
    long floats = 0;
    items = split(s, items, jobs, &floats);
    memory = partials.get<float>(floats + 1);
  }
  understudy::parallel(long(items.size()), 1, [&](long begin, long end) {
    for (long i = begin; i < end; i++) run(s, items[i], jobs, memory);
  });
}
}
