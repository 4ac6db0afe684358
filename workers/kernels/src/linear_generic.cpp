// float32, and bfloat16 or float16 widened to float32 as they are read, on any CPU: one multiply-add after another for each output.
// A panel holds for each k its columns' values; a register tile is some rows by a panel.
#include "linear.h"

#include <algorithm>

#include "linear_avx2.h"
#include "pool.h"

namespace understudy {
namespace {

#ifdef UNDERSTUDY_LINEAR_AVX2
using avx2::pack;
using avx2::panel_bytes;
using avx2::panel_times_rows;
using avx2::ROWS;
using avx2::sums_size;
using avx2::WIDTH;
constexpr long L2_SHARE = 1L << 18, PANELS = 1;
template <class T> constexpr bool DECODES = std::is_same_v<T, bf16>;
#else
#ifdef __AVX512F__
constexpr int VECTORS = 4, ROWS = 6;  // 24 of 32 registers hold sums
#else
constexpr int VECTORS = 1, ROWS = 4;
#endif
constexpr long WIDTH = VECTORS * LANES, L2_SHARE = 1L << 19, PANELS = 4;
template <class T> constexpr bool DECODES = false;
#endif

#ifndef UNDERSTUDY_LINEAR_AVX2
template <class T> long panel_bytes(long k) { return k * WIDTH * static_cast<long>(sizeof(T)); }

template <class T> void pack(const Linear &linear, const void *w, long w_stride, long panel, char *to) {
    const auto *source = static_cast<const T *>(w);
    auto *out = reinterpret_cast<T *>(to);
    std::memset(out, 0, static_cast<std::size_t>(linear.raw_bytes));
    const long columns = std::min(WIDTH, linear.n - panel * WIDTH);
    for (long j = 0; j < columns; j++) {
        const T *row = source + (panel * WIDTH + j) * w_stride;
        for (long k = 0; k < linear.k; k++) out[k * WIDTH + j] = row[k];
    }
}

template <class T, int R> void tile(const Linear &linear, const float *x, long x_stride, T *y, long y_stride, long panel) {
    const T *w = reinterpret_cast<const T *>(linear.panel(panel));
    floats sums[R][VECTORS];
    for (auto &row : sums)
        for (floats &value : row) value = splat(0.0f);
    for (long k = 0; k < linear.k; k++, w += WIDTH) {
        floats columns[VECTORS];
        for (int j = 0; j < VECTORS; j++) columns[j] = widen(w + LANES * j);
        __builtin_prefetch(reinterpret_cast<const char *>(w) + 4096);
#pragma GCC unroll 8
        for (int i = 0; i < R; i++) {
            const floats value = splat(x[i * x_stride + k]);
#pragma GCC unroll 4
            for (int j = 0; j < VECTORS; j++) sums[i][j] = fma(value, columns[j], sums[i][j]);
        }
    }
    const long columns = std::min(WIDTH, linear.n - panel * WIDTH);
    for (int i = 0; i < R; i++) {
        for (long j = 0; j < VECTORS && j * LANES < columns; j++) {
            const long at = panel * WIDTH + j * LANES;
            const floats value = linear.bias ? sums[i][j] + widen(linear.bias + at) : sums[i][j];
            store(y + i * y_stride + at, value, columns - j * LANES);
        }
    }
}

constexpr long sums_size(long) { return 0; }  // they stay in registers

template <class T> void panel_times_rows(const Linear &linear, const float *x, long x_stride, T *y, long y_stride, long m, long panel, bool, float *) {
    static constexpr decltype(&tile<T, 1>) tiles[] = {nullptr, tile<T, 1>, tile<T, 2>, tile<T, 3>, tile<T, 4>, tile<T, 5>, tile<T, 6>};
    for (long row = 0; row < m;) {
        const long left = m - row, count = std::min<long>(left, ROWS);
        tiles[count](linear, x + row * x_stride, x_stride, y + row * y_stride, y_stride, panel);
        row += count;
    }
}
#endif

template <class T> void widen_row(const T *x, float *to, long k) {
    for (long i = 0; i < k; i += LANES) store(to + i, load(x + i, k - i));
}

template <> void widen_row(const bf16 *x, float *to, long k) {  // faster: one row's weights are read in little more time
    for (long i = 0; i < k; i++) to[i] = widened(x[i]);
}

template <class T> void multiply(const Linear &linear, const Rows &rows, long begin, long end) {
    constexpr bool COPIES = sizeof(T) != 4;
    const long wide = COPIES ? (linear.k + LANES - 1) / LANES * LANES : 0;
    auto *sums = static_cast<float *>(scratch(static_cast<std::size_t>(rows.m * wide + sums_size(rows.m)) * sizeof(float)));
    const float *x = nullptr;
    long x_stride = 0;
    if constexpr (!COPIES) {
        x = static_cast<const float *>(rows.x);
        x_stride = rows.x_stride;
    } else {
        float *copy = sums + sums_size(rows.m);
        for (long i = 0; i < rows.m; i++) widen_row(static_cast<const T *>(rows.x) + i * rows.x_stride, copy + i * wide, linear.k);
        x = copy;
        x_stride = wide;
    }
    T *y = static_cast<T *>(rows.y);
    for (long panel = begin; panel < end; panel++) panel_times_rows(linear, x, x_stride, y, rows.y_stride, rows.m, panel, panel + 1 < end, sums);
}

// Half of a core's second cache; a panel of the other operand passes by.
long row_block(const Linear &linear, long) { return std::max<long>(8 * ROWS, L2_SHARE / (linear.k * 4) / ROWS * ROWS); }

template <class T> constexpr Kernels kernels{WIDTH, panel_bytes<T>, pack<T>, multiply<T>, row_block, PANELS, DECODES<T>};

}  // namespace

const Kernels *generic_kernels(Dtype dtype) {
    if (dtype == FLOAT32) return &kernels<float>;
    return dtype == BFLOAT16 ? &kernels<bf16> : &kernels<fp16>;
}

}  // namespace understudy
