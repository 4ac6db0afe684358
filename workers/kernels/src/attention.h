// Attention over a paged cache: what its parts share.
//
// A page holds 16 positions of one KV head, K first, then V. U = 2 for bf16 and 1 for other types, Dv = D rounded up to 16:
//   K [D / U][16][U]    a lane per position, the values that one multiply-add takes side by side
//   V [16 / U][Dv][U]   a lane per component
// A page of latents is K alone, with one KV head: its first components are the values, which a walk copies into the form of V once for a tile
// of rows.
// A cache is [layer][block][KV head][page].
//
// The order of summation, the same for every row wherever it is computed: positions in segments of 64 blocks, each with a softmax of its
// own (folded from left to right); a segment in spans of 8 blocks, after each of which the maximum may rise; both begin at absolute
// positions, so that a row's bits depend on its position and its window alone.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <new>

namespace understudy::attention {

constexpr long kBlock = 16;    // positions of a page
constexpr long kSpan = 8;      // blocks between two looks at the maximum
constexpr long kSegment = 64;  // blocks with one softmax
constexpr long kPositions = kSpan * kBlock;
constexpr float kNone = -1e30f;  // the score of what is not seen: finite, so that differences are numbers

enum Dtype : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };
enum Isa : int { kGeneric = 0, kAvx512Bf16 = 1, kAmx = 2 };

inline long round_up(long x, long to) { return (x + to - 1) / to * to; }
inline long element(int dtype) { return dtype == kFloat32 ? 4 : 2; }
inline long k_bytes(long D, int dtype) { return D * kBlock * element(dtype); }
inline long page_bytes(long D, bool latent, int dtype) { return k_bytes(D, dtype) + (latent ? 0 : round_up(D, 16) * kBlock * element(dtype)); }
inline long unit_of(int dtype) { return dtype == kBFloat16 ? 2 : 1; }
inline long k_index(long d, long position, long unit) { return (d / unit * kBlock + position) * unit + d % unit; }
inline long v_index(long d, long position, long Dv, long unit) { return (position / unit * Dv + d) * unit + position % unit; }

// The values of a page of latents, in the form of V: L components from k [D / U][16][U] to v [16 / U][Dv][U].
template <class T> void latent_values(const T *k, T *v, long L, long Dv, long unit) {
  for (long p = 0; p < kBlock; p++) {
    T *to = v + v_index(0, p, Dv, unit);
    for (long d = 0; d < L; d++) to[d * unit] = k[k_index(d, p, unit)];
    for (long d = L; d < Dv; d++) to[d * unit] = T{};
  }
}

// A query head at one position: sees positions [first, last].
struct Row {
  const void *q;
  void *out;
  long first, last;
  float sink;  // a score that takes weight and has no value, times log2 e; where `Tile::sinks`
};

// Rows of one sequence and one KV head, positions ascending, and the pages that they see.
struct Tile {
  const Row *rows;
  long n;
  const uint8_t *pages;  // of block 0
  const int32_t *table;
  long stride;  // bytes from block to block
  long D, L, Dv;  // components of a key and of a value; the latter rounded up to 16
  bool latent, sinks;
  float scale;  // of scores, times log2 e
  float cap;    // q . k becomes tanh(cap * (q . k)) before that; 0: it stays
  int dtype;
  const uint8_t *page(long block) const { return pages + table[block] * stride; }
};

// Running softmax of each row: maximum of q . k, 16 partial sums, weighted sum of V.
struct State {
  float *m;    // [n]
  float *l;    // [n][16]
  float *acc;  // [n][Dv]
  static long floats(long n, long Dv) { return round_up(n, 16) + n * (16 + Dv); }
  static State at(float *p, long n) { return {p, p + round_up(n, 16), p + round_up(n, 16) + n * 16}; }
};

// Starts `state` anew and walks the blocks [begin, end) of one segment for all rows of the tile.
using Walk = void (*)(const Tile &, long begin, long end, State state);
void walk_generic(const Tile &, long begin, long end, State state);
#ifdef __AVX512BF16__
void walk_avx512bf16(const Tile &, long begin, long end, State state);
#endif
#if defined(__AMX_BF16__) && defined(__AVX512BF16__) && defined(__AVX512BW__) && defined(__linux__)
#define UNDERSTUDY_ATTENTION_AMX  // under the condition of linear_amx.cpp, which asks the kernel for the tiles
void walk_amx(const Tile &, long begin, long end, State state);
#endif

// Memory of one thread that only grows.
class Scratch {
 public:
  Scratch() = default;
  Scratch(const Scratch &) = delete;
  Scratch &operator=(const Scratch &) = delete;
  ~Scratch() { std::free(data_); }
  template <class T> T *get(size_t count) {
    size_t bytes = round_up(long(count * sizeof(T)), 64);
    if (bytes > size_) {
      std::free(data_);
      size_ = 0;
      data_ = std::aligned_alloc(64, bytes);
      if (!data_) throw std::bad_alloc();
      size_ = bytes;
    }
    return static_cast<T *>(data_);
  }

 private:
  void *data_ = nullptr;
  size_t size_ = 0;
};

}  // namespace understudy::attention
