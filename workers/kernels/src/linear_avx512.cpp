// bf16 with AVX-512's dot product of pairs (vdpbf16ps). A panel of 64 columns holds, for each pair of k, 64 columns of two values; a register
// tile is up to 6 rows by 64 columns. An odd k is padded with a zero pair's half.
#include "linear.h"

#include <algorithm>

namespace understudy {

#if defined(__AVX512BF16__) && defined(__AVX512VL__) && defined(__AVX512BW__)
namespace {

constexpr long WIDTH = 64;

long panel_bytes(long k) { return (k + 1) / 2 * WIDTH * 4; }

void pack(const Linear &linear, const void *w, long w_stride, long panel, char *to) {
    const auto *source = static_cast<const std::uint16_t *>(w);
    auto *out = reinterpret_cast<std::uint16_t *>(to);
    std::memset(out, 0, static_cast<std::size_t>(linear.raw_bytes));
    const long columns = std::min(WIDTH, linear.n - panel * WIDTH);
    for (long j = 0; j < columns; j++) {
        const std::uint16_t *row = source + (panel * WIDTH + j) * w_stride;
        for (long k = 0; k < linear.k; k++) out[k / 2 * WIDTH * 2 + j * 2 + (k & 1)] = row[k];
    }
}

inline void store_row(std::uint16_t *y, const __m512 *sums, const float *bias, long columns) {
    for (long j = 0; j < 4 && 16 * j < columns; j++) {
        const __m512 value = bias ? _mm512_add_ps(sums[j], _mm512_loadu_ps(bias + 16 * j)) : sums[j];
        const long left = std::min<long>(16, columns - 16 * j);
        _mm256_mask_storeu_epi16(y + 16 * j, static_cast<__mmask16>((1u << left) - 1), (__m256i)_mm512_cvtneps_pbh(value));
    }
}

template <int R>
void tile(const Linear &linear, const std::uint16_t *x, long x_stride, std::uint16_t *y, long y_stride, long panel) {
    const auto *w = reinterpret_cast<const std::uint16_t *>(linear.packed + panel * linear.panel_bytes);
    const long pairs = linear.k / 2;
    __m512 sums[R][4];
    for (auto &row : sums)
        for (__m512 &value : row) value = _mm512_setzero_ps();
    const auto step = [&](const auto &input) __attribute__((always_inline)) {
        __m512bh columns[4];
        for (int j = 0; j < 4; j++) {
            columns[j] = (__m512bh)_mm512_loadu_si512(w + 32 * j);
            _mm_prefetch(reinterpret_cast<const char *>(w + 12 * 128 + 32 * j), _MM_HINT_T0);
        }
#pragma GCC unroll 8
        for (int i = 0; i < R; i++) {
            const __m512bh value = (__m512bh)_mm512_set1_epi32(input(i));
#pragma GCC unroll 4
            for (int j = 0; j < 4; j++) sums[i][j] = _mm512_dpbf16_ps(sums[i][j], columns[j], value);
        }
        w += 128;
    };
    for (long k = 0; k < pairs; k++) {
        step([&](int i) {
            int pair;
            std::memcpy(&pair, x + i * x_stride + 2 * k, 4);
            return pair;
        });
    }
    if (linear.k & 1) step([&](int i) { return static_cast<int>(x[i * x_stride + linear.k - 1]); });
    const long columns = std::min(WIDTH, linear.n - panel * WIDTH);
    const float *bias = linear.bias ? linear.bias + panel * WIDTH : nullptr;
    for (int i = 0; i < R; i++) store_row(y + i * y_stride + panel * WIDTH, sums[i], bias, columns);
}

void multiply(const Linear &linear, const Rows &rows, long begin, long end) {
    static constexpr decltype(&tile<1>) tiles[] = {nullptr, tile<1>, tile<2>, tile<3>, tile<4>, tile<5>, tile<6>};
    const auto *x = static_cast<const std::uint16_t *>(rows.x);
    auto *y = static_cast<std::uint16_t *>(rows.y);
    for (long panel = begin; panel < end; panel++) {
        for (long row = 0; row < rows.m;) {
            const long left = rows.m - row, count = left == 7 || left == 8 ? 4 : std::min<long>(left, 6);
            tiles[count](linear, x + row * rows.x_stride, rows.x_stride, y + row * rows.y_stride, rows.y_stride, panel);
            row += count;
        }
    }
}

// Half of a cache of 1 MB; a panel of the other operand passes by.
long row_block(const Linear &linear, long) { return std::max<long>(48, (1L << 19) / (linear.k * 2) / 6 * 6); }

constexpr Kernels kernels{WIDTH, panel_bytes, pack, multiply, row_block, 4, false};

}  // namespace

const Kernels *avx512bf16_kernels() { return &kernels; }
#else
const Kernels *avx512bf16_kernels() { return nullptr; }
#endif

}  // namespace understudy
