// bf16 with AVX-512's dot product of pairs (vdpbf16ps). A panel of 64 columns holds, for each pair of k, 64 columns of two values; a register
// tile is up to 6 rows by 64 columns. An odd k is padded with a zero pair's half. Where weights are coded, k is walked in chunks that are
// decoded once for all rows; sums wait in memory between chunks as the float32 that they are.
#include "linear.h"

#include <algorithm>

#include "pool.h"

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

inline void store_row(std::uint16_t *y, const float *sums, const float *bias, long columns) {
    for (long j = 0; j < 4 && 16 * j < columns; j++) {
        const __m512 sum = _mm512_loadu_ps(sums + 16 * j), value = bias ? _mm512_add_ps(sum, _mm512_loadu_ps(bias + 16 * j)) : sum;
        const long left = std::min<long>(16, columns - 16 * j);
        _mm256_mask_storeu_epi16(y + 16 * j, static_cast<__mmask16>((1u << left) - 1), (__m256i)_mm512_cvtneps_pbh(value));
    }
}

// A stretch of a panel: `pairs` of k from `first` on, whose values begin at `w`. What lies from `ahead` on is asked for meanwhile, `pace` bytes
// for each pair.
struct Stretch {
    const std::uint16_t *w;
    long first, pairs;
    const char *ahead;
    long pace;
};

// Adds a stretch to the sums of R rows, [R][64]. x: the first row's beginning.
template <int R> void tile(const Linear &linear, const Stretch &stretch, const std::uint16_t *x, long x_stride, float *out) {
    const std::uint16_t *w = stretch.w;
    const char *ahead = stretch.ahead;
    const long end = stretch.first + stretch.pairs, whole = std::min(end, linear.k / 2);
    __m512 sums[R][4];
#pragma GCC unroll 8
    for (int i = 0; i < R; i++)
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) sums[i][j] = _mm512_loadu_ps(out + i * WIDTH + 16 * j);
    const auto step = [&](const auto &input) __attribute__((always_inline)) {
        __m512bh columns[4];
        for (int j = 0; j < 4; j++) {
            columns[j] = (__m512bh)_mm512_loadu_si512(w + 32 * j);
            _mm_prefetch(ahead + 64 * j, _MM_HINT_T0);
        }
#pragma GCC unroll 8
        for (int i = 0; i < R; i++) {
            const __m512bh value = (__m512bh)_mm512_set1_epi32(input(i));
#pragma GCC unroll 4
            for (int j = 0; j < 4; j++) sums[i][j] = _mm512_dpbf16_ps(sums[i][j], columns[j], value);
        }
        w += 2 * WIDTH;
        ahead += stretch.pace;
    };
    for (long k = stretch.first; k < whole; k++) {
        step([&](int i) {
            int pair;
            std::memcpy(&pair, x + i * x_stride + 2 * k, 4);
            return pair;
        });
    }
    if (whole < end) step([&](int i) { return static_cast<int>(x[i * x_stride + linear.k - 1]); });
#pragma GCC unroll 8
    for (int i = 0; i < R; i++)
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) _mm512_storeu_ps(out + i * WIDTH + 16 * j, sums[i][j]);
}

// All rows by the stretch. sums: [m][64]
void add(const Linear &linear, const Stretch &stretch, const Rows &rows, float *sums) {
    static constexpr decltype(&tile<1>) tiles[] = {nullptr, tile<1>, tile<2>, tile<3>, tile<4>, tile<5>, tile<6>};
    for (long row = 0; row < rows.m;) {
        const long left = rows.m - row, count = left == 7 || left == 8 ? 4 : std::min<long>(left, 6);
        tiles[count](linear, stretch, static_cast<const std::uint16_t *>(rows.x) + row * rows.x_stride, rows.x_stride, sums + row * WIDTH);
        row += count;
    }
}

constexpr long CHUNK = 32;  // pairs of k that are decoded, and then multiplied from the first cache
constexpr long AHEAD = 12;  // pairs of values that are asked for before they are read

void panel_times_rows(const Linear &linear, const Rows &rows, long panel, float *sums) {
    const long pairs = (linear.k + 1) / 2;
    std::memset(sums, 0, static_cast<std::size_t>(rows.m * WIDTH) * sizeof(float));
    if (!linear.coded) {
        const auto *w = reinterpret_cast<const std::uint16_t *>(linear.panel(panel));
        add(linear, Stretch{w, 0, pairs, reinterpret_cast<const char *>(w + AHEAD * 2 * WIDTH), 4 * WIDTH}, rows, sums);
    } else {
        constexpr long blocks = 2 * WIDTH / BLOCK;  // of a pair
        alignas(64) std::uint16_t decoded[CHUNK * 2 * WIDTH];
        for (long first = 0; first < pairs; first += CHUNK) {
            const long count = std::min(CHUNK, pairs - first);
            // One tile takes no longer than decoding: memory is asked while that goes on. More of them ask for the next chunk.
            decode(linear, panel, first * blocks, (first + count) * blocks, decoded, rows.m <= 6 ? CHUNK * blocks * BLOCK_BYTES : 0);
            const char *next = linear.panel(panel) + BOOK_BYTES + (first + CHUNK) * blocks * BLOCK_BYTES;
            add(linear, Stretch{decoded, first, count, next, rows.m <= 6 ? 0 : blocks * BLOCK_BYTES}, rows, sums);
        }
    }
    const long columns = std::min(WIDTH, linear.n - panel * WIDTH);
    const float *bias = linear.bias ? linear.bias + panel * WIDTH : nullptr;
    for (long i = 0; i < rows.m; i++) store_row(static_cast<std::uint16_t *>(rows.y) + i * rows.y_stride + panel * WIDTH, sums + i * WIDTH, bias, columns);
}

void multiply(const Linear &linear, const Rows &rows, long begin, long end) {
    auto *sums = static_cast<float *>(scratch(static_cast<std::size_t>(rows.m * WIDTH) * sizeof(float)));
    for (long panel = begin; panel < end; panel++) panel_times_rows(linear, rows, panel, sums);
}

// Half of a cache of 1 MB; a panel of the other operand passes by.
long row_block(const Linear &linear, long) { return std::max<long>(48, (1L << 19) / (linear.k * 2) / 6 * 6); }

constexpr Kernels kernels{WIDTH, panel_bytes, pack, multiply, row_block, 4, true};

}  // namespace

const Kernels *avx512bf16_kernels() { return &kernels; }
#else
const Kernels *avx512bf16_kernels() { return nullptr; }
#endif

}  // namespace understudy
