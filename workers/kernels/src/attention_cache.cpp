// Writes keys and values into pages: rotated from a step's rows, or a whole block at once; and reads blocks back.
#include <cmath>
#include <cstring>

#include "attention.h"
#include "attention_lanes.h"
#include "pool.h"
#include "simd.h"

namespace understudy::attention {
namespace {

// x * factor, rounded to the dtype, times weight, rounded again: what Hugging Face models compute. `wide`: the weight is float32, and the
// product alone is rounded.
void norm(float *x, const void *weight, bool wide, float eps, long D, int dtype) {
  float lanes[16] = {};
  for (long d = 0; d < D; d++) lanes[d % 16] += x[d] * x[d];
  float sum = 0;
  for (float s : lanes) sum += s;
  float factor = 1.f / std::sqrt(sum / float(D) + eps);
  auto rounded = [&](float y) {
    if (dtype == kBFloat16) return from_bf16(to_bf16(y));
    return dtype == kFloat16 ? from_f16(to_f16(y)) : y;
  };
  for (long d = 0; d < D; d++)
    x[d] = wide ? rounded(x[d] * factor * load_as(kFloat32, weight, d)) : rounded(rounded(x[d] * factor) * load_as(dtype, weight, d));
}

// (x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin) of the two halves.
void rotate(float *x, const float *cos, const float *sin, long half) {
  for (long d = 0; d < half; d++) {
    float a = x[d], b = x[d + half];
    x[d] = a * cos[d] - b * sin[d];
    x[d + half] = b * cos[d] + a * sin[d];
  }
}

template <class T> T as(float x, int dtype);
template <> float as<float>(float x, int) { return x; }
template <> uint16_t as<uint16_t>(float x, int dtype) { return dtype == kBFloat16 ? to_bf16(x) : to_f16(x); }

// The same on a row of bfloat16 without a norm, sixteen at a time; `half` is a multiple of 16.
void rotate_bf16(const bf16 *x, bf16 *y, const float *cos, const float *sin, long half) {
  for (long d = 0; d < half; d += LANES) {
    const floats a = understudy::widen(x + d), b = understudy::widen(x + half + d), c = understudy::widen(cos + d), s = understudy::widen(sin + d);
    understudy::store(y + d, a * c - b * s);
    understudy::store(y + half + d, b * c + a * s);
  }
}

// One head without a norm: the first 2 * half of D components rotated, the others as they are. `x` has room for D.
template <class T> void turn(const T *from, T *to, const float *cos, const float *sin, long half, long D, int dtype, float *x) {
  std::memcpy(to + 2 * half, from + 2 * half, static_cast<size_t>(D - 2 * half) * sizeof(T));
  if (dtype == kBFloat16 && half % LANES == 0) return rotate_bf16(reinterpret_cast<const bf16 *>(from), reinterpret_cast<bf16 *>(to), cos, sin, half);
  for (long d = 0; d < 2 * half; d++) x[d] = load_as(dtype, from, d);
  rotate(x, cos, sin, half);
  for (long d = 0; d < 2 * half; d++) to[d] = as<T>(x[d], dtype);
}

// A step's rows and where they go. cos, sin: [.., R / 2] by `rope`, the row of the tables of each row.
struct Write {
  const void *qkv, *q_norm, *k_norm;
  bool q_wide, k_wide;  // the norm's weight is float32
  void *q, *layer;
  const float *cos, *sin;
  long R;
  const int64_t *rope, *positions;
  const int32_t *row_seq, *table;
  long width, heads, kv_heads, D;
  float eps;
  int dtype;
};

// `x` has room for 2 D.
template <class T> void write_row(const Write &w, long t, float *x) {
  const long D = w.D, Dv = round_up(D, 16), half = w.R / 2, unit = unit_of(w.dtype), page = page_bytes(D, false, w.dtype);
  const long position = w.positions[t], slot = position % kBlock;
  const T *row = static_cast<const T *>(w.qkv) + t * (w.heads + 2 * w.kv_heads) * D;
  const float *cos = half ? w.cos + w.rope[t] * half : nullptr, *sin = half ? w.sin + w.rope[t] * half : nullptr;
  auto prepare = [&](long head, const void *weight, bool wide, T *to) {
    if (!weight) return turn(row + head * D, to, cos, sin, half, D, w.dtype, x);
    for (long d = 0; d < D; d++) x[d] = load_as(w.dtype, row, head * D + d);
    norm(x, weight, wide, w.eps, D, w.dtype);
    rotate(x, cos, sin, half);
    for (long d = 0; d < D; d++) to[d] = as<T>(x[d], w.dtype);
  };
  for (long h = 0; h < w.heads; h++) prepare(h, w.q_norm, w.q_wide, static_cast<T *>(w.q) + (t * w.heads + h) * D);
  const long block = w.table[w.row_seq[t] * w.width + position / kBlock];
  T *key = reinterpret_cast<T *>(x + D);
  for (long g = 0; g < w.kv_heads; g++) {
    T *k = reinterpret_cast<T *>(static_cast<uint8_t *>(w.layer) + (block * w.kv_heads + g) * page), *v = k + D * kBlock;
    prepare(w.heads + g, w.k_norm, w.k_wide, key);
    const T *value = row + (w.heads + w.kv_heads + g) * D;
    T *k_at = k + k_index(0, slot, unit), *v_at = v + v_index(0, slot, Dv, unit);
    for (long d = 0; d < D; d += unit) std::memcpy(k_at + d * kBlock, key + d, static_cast<size_t>(unit) * sizeof(T));
    for (long d = 0; d < D; d++) v_at[d * unit] = value[d];
  }
}

// A step's rows of latents: q_rope [T, heads, R], k_rope [T, R], latent [T, L].
struct LatentWrite {
  const void *q_rope, *k_rope, *latent;
  void *q, *layer;
  const float *cos, *sin;
  const int64_t *rope, *positions;
  const int32_t *row_seq, *table;
  long width, heads, R, L;
  int dtype;
};

// `x` has room for 2 R.
template <class T> void write_latent_row(const LatentWrite &w, long t, float *x) {
  const long D = w.L + w.R, half = w.R / 2, unit = unit_of(w.dtype), position = w.positions[t];
  const float *cos = w.cos + w.rope[t] * half, *sin = w.sin + w.rope[t] * half;
  for (long h = 0; h < w.heads; h++) {
    const long at = (t * w.heads + h) * w.R;
    turn(static_cast<const T *>(w.q_rope) + at, static_cast<T *>(w.q) + at, cos, sin, half, w.R, w.dtype, x);
  }
  T *key = reinterpret_cast<T *>(x + w.R);
  turn(static_cast<const T *>(w.k_rope) + t * w.R, key, cos, sin, half, w.R, w.dtype, x);
  const long block = w.table[w.row_seq[t] * w.width + position / kBlock];
  T *page = reinterpret_cast<T *>(static_cast<uint8_t *>(w.layer) + block * page_bytes(D, true, w.dtype));
  const T *latent = static_cast<const T *>(w.latent) + t * w.L;
  for (long d = 0; d < D; d++) page[k_index(d, position % kBlock, unit)] = d < w.L ? latent[d] : key[d - w.L];
}

// One head's page from or to [16][D], K then V (null where the page has none).
template <class T> void copy_page(T *page, T *k, T *v, long D, long unit, bool store) {
  const long Dv = round_up(D, 16);
  for (long p = 0; p < kBlock; p++)
    for (long d = 0; d < D; d++) {
      const auto copy = [&](T &inside, T &outside) { store ? inside = outside : outside = inside; };
      copy(page[k_index(d, p, unit)], k[p * D + d]);
      if (v) copy(page[D * kBlock + v_index(d, p, Dv, unit)], v[p * D + d]);
    }
}

template <class T> void copy_block(uint8_t *block, T *k, T *v, long kv_heads, long D, int dtype, bool store) {
  for (long g = 0; g < kv_heads; g++) {
    T *page = reinterpret_cast<T *>(block + g * page_bytes(D, !v, dtype));
    copy_page(page, k + g * kBlock * D, v ? v + g * kBlock * D : nullptr, D, unit_of(dtype), store);
  }
}

// Whole pages, moved fast, to or from a value: K [16][D], then V [16][D] of one head and layer.
//
// K of float32 and bf16 is a transposition of words of 32 bits ([16][W] <-> [W][16]), eight by eight in registers.
typedef uint32_t Words __attribute__((vector_size(32)));

inline Words load_words(const uint8_t *p) {
  Words x;
  std::memcpy(&x, p, sizeof x);
  return x;
}

inline void transpose(Words (&r)[8]) {
  Words t[8], u[8];
  for (int i = 0; i < 8; i += 2) {
    t[i] = __builtin_shufflevector(r[i], r[i + 1], 0, 8, 1, 9, 4, 12, 5, 13);
    t[i + 1] = __builtin_shufflevector(r[i], r[i + 1], 2, 10, 3, 11, 6, 14, 7, 15);
  }
  for (int i = 0; i < 8; i += 4)
    for (int j = 0; j < 2; j++) {
      u[i + 2 * j] = __builtin_shufflevector(t[i + j], t[i + j + 2], 0, 1, 8, 9, 4, 5, 12, 13);
      u[i + 2 * j + 1] = __builtin_shufflevector(t[i + j], t[i + j + 2], 2, 3, 10, 11, 6, 7, 14, 15);
    }
  for (int j = 0; j < 4; j++) {
    r[j] = __builtin_shufflevector(u[j], u[j + 4], 0, 1, 2, 3, 8, 9, 10, 11);
    r[j + 4] = __builtin_shufflevector(u[j], u[j + 4], 4, 5, 6, 7, 12, 13, 14, 15);
  }
}

// to[c][r] = from[r][c] of `rows` by `columns` words; both lie without gaps.
void transpose_words(const uint8_t *from, uint8_t *to, long rows, long columns) {
  for (long c = 0; c < columns; c += 8)
    for (long r = 0; r < rows; r += 8) {
      const long height = rows - r < 8 ? rows - r : 8, width = columns - c < 8 ? columns - c : 8;
      if (height == 8 && width == 8) {
        Words x[8];
        for (long i = 0; i < 8; i++) x[i] = load_words(from + ((r + i) * columns + c) * 4);
        transpose(x);
        for (long i = 0; i < 8; i++) std::memcpy(to + ((c + i) * rows + r) * 4, &x[i], sizeof x[i]);
      } else {
        for (long i = 0; i < height; i++)
          for (long j = 0; j < width; j++) std::memcpy(to + ((c + j) * rows + r + i) * 4, from + ((r + i) * columns + c + j) * 4, 4);
      }
    }
}

// V of bf16: pairs of rows [2][D] <-> [D][2].
void interleave(const uint16_t *__restrict a, const uint16_t *__restrict b, uint16_t *__restrict pairs, long D) {
  for (long d = 0; d < D; d++) {
    pairs[2 * d] = a[d];
    pairs[2 * d + 1] = b[d];
  }
}

void separate(const uint16_t *__restrict pairs, uint16_t *__restrict a, uint16_t *__restrict b, long D) {
  for (long d = 0; d < D; d++) {
    a[d] = pairs[2 * d];
    b[d] = pairs[2 * d + 1];
  }
}

void move_page(uint8_t *page, uint8_t *value, long D, bool latent, int dtype, bool store) {
  const long size = element(dtype), bytes = k_bytes(D, dtype), Dv = round_up(D, 16);
  if (dtype == kFloat16) {
    auto *inside = reinterpret_cast<uint16_t *>(page), *k = reinterpret_cast<uint16_t *>(value);
    copy_page(inside, k, latent ? nullptr : k + kBlock * D, D, 1, store);
    return;
  }
  const long words = D * size / 4;
  store ? transpose_words(value, page, kBlock, words) : transpose_words(page, value, words, kBlock);
  if (latent) return;
  uint8_t *inside = page + bytes, *outside = value + bytes;
  if (dtype == kBFloat16) {
    auto *pairs = reinterpret_cast<uint16_t *>(inside), *rows = reinterpret_cast<uint16_t *>(outside);
    for (long p = 0; p < kBlock; p += 2)
      store ? interleave(rows + p * D, rows + (p + 1) * D, pairs + p * Dv, D) : separate(pairs + p * Dv, rows + p * D, rows + (p + 1) * D, D);
  } else {
    for (long p = 0; p < kBlock; p++) {
      uint8_t *a = inside + p * Dv * size, *b = outside + p * D * size;
      store ? std::memcpy(a, b, static_cast<size_t>(D * size)) : std::memcpy(b, a, static_cast<size_t>(D * size));
    }
  }
}

}  // namespace
}  // namespace understudy::attention

using namespace understudy::attention;

extern "C" {

// qkv [rows, (heads + 2 kv_heads) D] -> q [rows, heads, D]; k and v go to the pages of `layer` at each row's position.
// cos, sin: float32 [.., R / 2], of which row i takes row rope[i]; R = 0: nothing is rotated. norms: [D], or null; in the dtype or, where
// that is `wide`, in float32.
void attention_write(const void *qkv, void *q, void *layer, const void *q_norm, const void *k_norm, int q_wide, int k_wide, float eps,
                     const float *cos, const float *sin, long R, const int64_t *rope, const int64_t *positions, const int32_t *row_seq,
                     const int32_t *table, long rows, long width, long heads, long kv_heads, long D, int dtype) {
  Write w{qkv, q_norm, k_norm, q_wide != 0, k_wide != 0, q, layer, cos, sin, R, rope, positions, row_seq, table, width, heads, kv_heads, D, eps, dtype};
  // A line of a K page holds all its positions: a prompt's pieces take whole blocks, or two threads would write the same lines.
  understudy::parallel(rows, rows >= 64 ? 2 * kBlock : 4, [&](long begin, long end) {
    thread_local Scratch scratch;
    float *x = scratch.get<float>(2 * D);
    for (long t = begin; t < end; t++) {
      if (dtype == kFloat32)
        write_row<float>(w, t, x);
      else
        write_row<uint16_t>(w, t, x);
    }
  });
}

// q_rope [rows, heads, R] -> q, rotated; [latent [rows, L] | rotated k_rope [rows, R]] go to the pages of `layer`.
void attention_write_latent(const void *q_rope, const void *k_rope, const void *latent, void *q, void *layer, const float *cos, const float *sin,
                            const int64_t *rope, const int64_t *positions, const int32_t *row_seq, const int32_t *table, long rows, long width,
                            long heads, long R, long L, int dtype) {
  LatentWrite w{q_rope, k_rope, latent, q, layer, cos, sin, rope, positions, row_seq, table, width, heads, R, L, dtype};
  understudy::parallel(rows, rows >= 64 ? 2 * kBlock : 4, [&](long begin, long end) {
    thread_local Scratch scratch;
    float *x = scratch.get<float>(2 * R);
    for (long t = begin; t < end; t++) {
      if (dtype == kFloat32)
        write_latent_row<float>(w, t, x);
      else
        write_latent_row<uint16_t>(w, t, x);
    }
  });
}

// One block of one layer to (store = 0) or from (store = 1) k and v in the order [kv_heads, 16, D]; of latents v is null.
void attention_copy_block(void *block, void *k, void *v, long kv_heads, long D, int dtype, int store) {
  uint8_t *at = static_cast<uint8_t *>(block);
  if (dtype == kFloat32)
    copy_block(at, static_cast<float *>(k), static_cast<float *>(v), kv_heads, D, dtype, store);
  else
    copy_block(at, static_cast<uint16_t *>(k), static_cast<uint16_t *>(v), kv_heads, D, dtype, store);
}

// `count` blocks of a cache [layers][blocks][kv_heads][page] to (store = 0) or from (store = 1) values [layers][K, V][16][D], of latents
// [layers][16][D], one for each block and KV head: that of head g of blocks[i] lies at memory + offsets[i * kv_heads + g]. With `shared` the
// pool's threads take part.
void attention_move_blocks(void *storage, long layer_bytes, const int64_t *blocks, void *memory, const int64_t *offsets, long count, long layers,
                           long kv_heads, long D, int latent, int dtype, int store, int shared) {
  const long page = page_bytes(D, latent != 0, dtype), part = k_bytes(D, dtype) * (latent ? 1 : 2);
  const auto move = [&](long begin, long end) {
    for (long i = begin; i < end; i++)
      for (long g = 0; g < kv_heads; g++) {
        uint8_t *from = static_cast<uint8_t *>(storage) + (blocks[i] * kv_heads + g) * page;
        uint8_t *value = static_cast<uint8_t *>(memory) + offsets[i * kv_heads + g];
        for (long layer = 0; layer < layers; layer++) move_page(from + layer * layer_bytes, value + layer * part, D, latent != 0, dtype, store != 0);
      }
  };
  if (shared)
    understudy::parallel(count, 1, move);
  else
    move(0, count);
}
}
