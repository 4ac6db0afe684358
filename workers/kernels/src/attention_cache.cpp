// Writes keys and values into pages: rotated from a step's rows, or a whole block at once; and reads blocks back.
#include <cmath>

#include "attention.h"
#include "attention_lanes.h"
#include "pool.h"
#include "simd.h"

namespace understudy::attention {
namespace {

long unit_of(int dtype) { return dtype == kBFloat16 ? 2 : 1; }
long k_index(long d, long position, long unit) { return (d / unit * kBlock + position) * unit + d % unit; }
long v_index(long d, long position, long Dv, long unit) { return (position / unit * Dv + d) * unit + position % unit; }

// x * factor, rounded to the dtype, times weight, rounded again: what Hugging Face models compute.
void norm(float *x, const void *weight, float eps, long D, int dtype) {
  float lanes[16] = {};
  for (long d = 0; d < D; d++) lanes[d % 16] += x[d] * x[d];
  float sum = 0;
  for (float s : lanes) sum += s;
  float factor = 1.f / std::sqrt(sum / float(D) + eps);
  auto rounded = [&](float y) {
    if (dtype == kBFloat16) return from_bf16(to_bf16(y));
    return dtype == kFloat16 ? from_f16(to_f16(y)) : y;
  };
  for (long d = 0; d < D; d++) x[d] = rounded(rounded(x[d] * factor) * load_as(dtype, weight, d));
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

struct Write {
  const void *qkv, *q_norm, *k_norm;
  void *q, *layer;
  const float *cos, *sin;
  const int64_t *positions;
  const int32_t *row_seq, *table;
  long width, heads, kv_heads, D;
  float eps;
  int dtype;
};

// `x` has room for 2 D.
template <class T> void write_row(const Write &w, long t, float *x) {
  const long D = w.D, Dv = round_up(D, 16), half = D / 2, unit = unit_of(w.dtype), page = page_bytes(D, w.dtype);
  const long position = w.positions[t], slot = position % kBlock;
  const T *row = static_cast<const T *>(w.qkv) + t * (w.heads + 2 * w.kv_heads) * D;
  const float *cos = w.cos + position * half, *sin = w.sin + position * half;
  const bool vectors = w.dtype == kBFloat16 && half % LANES == 0;
  auto prepare = [&](long head, const void *weight, T *to) {
    if (vectors && !weight) return rotate_bf16(reinterpret_cast<const bf16 *>(row + head * D), reinterpret_cast<bf16 *>(to), cos, sin, half);
    for (long d = 0; d < D; d++) x[d] = load_as(w.dtype, row, head * D + d);
    if (weight) norm(x, weight, w.eps, D, w.dtype);
    rotate(x, cos, sin, half);
    for (long d = 0; d < D; d++) to[d] = as<T>(x[d], w.dtype);
  };
  for (long h = 0; h < w.heads; h++) prepare(h, w.q_norm, static_cast<T *>(w.q) + (t * w.heads + h) * D);
  const long block = w.table[w.row_seq[t] * w.width + position / kBlock];
  T *key = reinterpret_cast<T *>(x + D);
  for (long g = 0; g < w.kv_heads; g++) {
    T *k = reinterpret_cast<T *>(static_cast<uint8_t *>(w.layer) + (block * w.kv_heads + g) * page), *v = k + D * kBlock;
    prepare(w.heads + g, w.k_norm, key);
    const T *value = row + (w.heads + w.kv_heads + g) * D;
    T *k_at = k + k_index(0, slot, unit), *v_at = v + v_index(0, slot, Dv, unit);
    for (long d = 0; d < D; d += unit) std::memcpy(k_at + d * kBlock, key + d, static_cast<size_t>(unit) * sizeof(T));
    for (long d = 0; d < D; d++) v_at[d * unit] = value[d];
  }
}

// One head's page from or to [16][D], K then V.
template <class T> void copy_page(T *page, T *k, T *v, long D, long unit, bool store) {
  const long Dv = round_up(D, 16);
  for (long p = 0; p < kBlock; p++)
    for (long d = 0; d < D; d++) {
      T &kp = page[k_index(d, p, unit)], &vp = page[D * kBlock + v_index(d, p, Dv, unit)];
      T &kc = k[p * D + d], &vc = v[p * D + d];
      if (store)
        kp = kc, vp = vc;
      else
        kc = kp, vc = vp;
    }
}

template <class T> void copy_block(uint8_t *block, T *k, T *v, long kv_heads, long D, int dtype, bool store) {
  for (long g = 0; g < kv_heads; g++) {
    T *page = reinterpret_cast<T *>(block + g * page_bytes(D, dtype));
    copy_page(page, k + g * kBlock * D, v + g * kBlock * D, D, unit_of(dtype), store);
  }
}

}  // namespace
}  // namespace understudy::attention

using namespace understudy::attention;

extern "C" {

// qkv [rows, (heads + 2 kv_heads) D] -> q [rows, heads, D]; k and v go to the pages of `layer` at each row's position.
// cos, sin: float32 [context, D / 2]; norms: [D] in the dtype, or null.
void attention_write(const void *qkv, void *q, void *layer, const void *q_norm, const void *k_norm, float eps, const float *cos,
                     const float *sin, const int64_t *positions, const int32_t *row_seq, const int32_t *table, long rows, long width,
                     long heads, long kv_heads, long D, int dtype) {
  Write w{qkv, q_norm, k_norm, q, layer, cos, sin, positions, row_seq, table, width, heads, kv_heads, D, eps, dtype};
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

// One block of one layer to (store = 0) or from (store = 1) k and v in the order [kv_heads, 16, D].
void attention_copy_block(void *block, void *k, void *v, long kv_heads, long D, int dtype, int store) {
  uint8_t *at = static_cast<uint8_t *>(block);
  if (dtype == kFloat32)
    copy_block(at, static_cast<float *>(k), static_cast<float *>(v), kv_heads, D, dtype, store);
  else
    copy_block(at, static_cast<uint16_t *>(k), static_cast<uint16_t *>(v), kv_heads, D, dtype, store);
}
}
