// The register tiles of linear_generic.cpp on CPUs with AVX2 and without AVX-512: vectors of eight, because compilers keep arrays of wider
// ones in memory. A panel is four parts of 16 columns, each [k][16], so that one row takes all four at once (eight sums under way hide the
// latency of a multiply-add) and six rows take one after another. Each output is one chain of multiply-adds in ascending k, whatever the tile.
#pragma once
#include <algorithm>

#include "linear.h"

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__) && !defined(__AVX512F__)
#define UNDERSTUDY_LINEAR_AVX2

namespace understudy::avx2 {

constexpr int PART = 16, PARTS = 4, ROWS = 6;
constexpr long WIDTH = PART * PARTS;

inline __m256 widen8(const float *p) { return _mm256_loadu_ps(p); }
inline __m256 widen8(const bf16 *p) {
    const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i *>(p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}
inline __m256 widen8(const fp16 *p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i *>(p))); }

template <class T> void pack(const Linear &linear, const void *w, long w_stride, long panel) {
    const auto *source = static_cast<const T *>(w);
    auto *out = reinterpret_cast<T *>(linear.packed + panel * linear.panel_bytes);
    std::memset(out, 0, static_cast<std::size_t>(linear.panel_bytes));
    const long columns = std::min(WIDTH, linear.n - panel * WIDTH);
    for (long j = 0; j < columns; j++) {
        const T *row = source + (panel * WIDTH + j) * w_stride;
        T *to = out + j / PART * linear.k * PART + j % PART;
        for (long k = 0; k < linear.k; k++) to[k * PART] = row[k];
    }
}

// R rows by P parts of a panel, from part `first` on.
template <class T, int R, int P> void tile(const Linear &linear, const float *x, long x_stride, T *y, long y_stride, long panel, long first) {
    const T *w = reinterpret_cast<const T *>(linear.packed + panel * linear.panel_bytes) + first * linear.k * PART;
    const long part = linear.k * PART;
    __m256 sums[R][P][2];
#pragma GCC unroll 8
    for (int i = 0; i < R; i++)
#pragma GCC unroll 4
        for (int p = 0; p < P; p++) sums[i][p][0] = sums[i][p][1] = _mm256_setzero_ps();
    for (long k = 0; k < linear.k; k++, w += PART) {
#pragma GCC unroll 4
        for (int p = 0; p < P; p++) {
            const __m256 left = widen8(w + p * part), right = widen8(w + p * part + 8);
            _mm_prefetch(reinterpret_cast<const char *>(w + p * part) + 1024, _MM_HINT_T0);
#pragma GCC unroll 8
            for (int i = 0; i < R; i++) {
                const __m256 value = _mm256_broadcast_ss(x + i * x_stride + k);
                sums[i][p][0] = _mm256_fmadd_ps(value, left, sums[i][p][0]);
                sums[i][p][1] = _mm256_fmadd_ps(value, right, sums[i][p][1]);
            }
        }
    }
    alignas(64) float out[R][P][PART];  // not the sums themselves: an array that is indexed at run time lies in memory, in the loop above too
#pragma GCC unroll 8
    for (int i = 0; i < R; i++)
#pragma GCC unroll 4
        for (int p = 0; p < P; p++) {
            _mm256_store_ps(out[i][p], sums[i][p][0]);
            _mm256_store_ps(out[i][p] + 8, sums[i][p][1]);
        }
    for (int i = 0; i < R; i++) {
        for (int p = 0; p < P; p++) {
            const long at = panel * WIDTH + (first + p) * PART;
            if (at >= linear.n) break;
            floats value = widen(out[i][p]);
            if (linear.bias) value += widen(linear.bias + at);
            store(y + i * y_stride + at, value, linear.n - at);
        }
    }
}

// R rows by a whole panel, as many parts at a time as the registers hold.
template <class T, int R> void strip(const Linear &linear, const float *x, long x_stride, T *y, long y_stride, long panel) {
    constexpr int P = R == 1 ? 4 : R <= 3 ? 2 : 1;
    const long parts = std::min<long>(PARTS, (linear.n - panel * WIDTH + PART - 1) / PART);
    long first = 0;
    for (; first + P <= parts; first += P) tile<T, R, P>(linear, x, x_stride, y, y_stride, panel, first);
    for (; first < parts; first++) tile<T, R, 1>(linear, x, x_stride, y, y_stride, panel, first);
}

// Many rows: each part stays in the cache while all rows pass it.
template <class T> void block(const Linear &linear, const float *x, long x_stride, T *y, long y_stride, long m, long panel) {
    const long parts = std::min<long>(PARTS, (linear.n - panel * WIDTH + PART - 1) / PART);
    for (long part = 0; part < parts; part++)
        for (long row = 0; row < m; row += ROWS)
            tile<T, ROWS, 1>(linear, x + row * x_stride, x_stride, y + row * y_stride, y_stride, panel, part);
}

template <class T> void panel_times_rows(const Linear &linear, const float *x, long x_stride, T *y, long y_stride, long m, long panel) {
    static constexpr decltype(&strip<T, 1>) strips[] = {nullptr, strip<T, 1>, strip<T, 2>, strip<T, 3>, strip<T, 4>, strip<T, 5>};
    const long whole = m / ROWS * ROWS, left = m - whole;
    block(linear, x, x_stride, y, y_stride, whole, panel);
    if (left) strips[left](linear, x + whole * x_stride, x_stride, y + whole * y_stride, y_stride, panel);
}

}  // namespace understudy::avx2
#endif
