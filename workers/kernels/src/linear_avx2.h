// The register tiles of linear_generic.cpp on CPUs with AVX2 and without AVX-512: vectors of eight, because compilers keep arrays of wider
// ones in memory. A panel is four parts of 16 columns, each [k][16], so that one row takes all four at once (eight sums under way hide the
// latency of a multiply-add) and six rows take one after another. k is walked in chunks whose weights stay in the first cache while all rows
// pass; sums wait in memory between chunks as the float32 that they are. Each output is one chain of multiply-adds in ascending k, whatever
// the tile and the chunk.
#pragma once
#include <algorithm>

#include "coded.h"
#include "linear.h"
#include "pool.h"

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__) && !defined(__AVX512F__)
#define UNDERSTUDY_LINEAR_AVX2

namespace understudy::avx2 {

constexpr int PART = 16, PARTS = 4, ROWS = 6;
constexpr long WIDTH = PART * PARTS;
constexpr long GROUP = BLOCK / PART;  // of k, that lie in one block of coded weights
constexpr long CHUNK = 256;           // of k
constexpr long AHEAD = 2048;          // bytes of each part's blocks that are asked for before they are read

// Up to so many rows decode in their registers; more read what was decoded once for all of them.
constexpr long FEW = ROWS;

// Rows that the registers hold beside P parts.
template <int P> constexpr int MOST = P == 1 ? ROWS : P == 2 ? 3 : 1;

constexpr long groups(long k) { return (k + GROUP - 1) / GROUP; }

// Values of a part: whole groups, the last one padded with zeros.
constexpr long part_size(long k) { return groups(k) * GROUP * PART; }

// Where column j of a part lies among its 16: the halves of a bfloat16 vector become two vectors of floats by a shift and by a mask.
template <class T> constexpr long place(long j) { return std::is_same_v<T, bf16> ? j % 8 * 2 + j / 8 : j; }

struct Columns {
    __m256 left, right;
};

inline Columns widen16(__m256i bits) {
    const __m256i upper = _mm256_set1_epi32(static_cast<int>(0xffff0000));
    return {_mm256_castsi256_ps(_mm256_slli_epi32(bits, 16)), _mm256_castsi256_ps(_mm256_and_si256(bits, upper))};
}
inline Columns widen16(const float *p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline Columns widen16(const bf16 *p) { return widen16(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(p))); }
inline Columns widen16(const fp16 *p) {
    const auto *halves = reinterpret_cast<const __m128i *>(p);
    return {_mm256_cvtph_ps(_mm_loadu_si128(halves)), _mm256_cvtph_ps(_mm_loadu_si128(halves + 1))};
}

template <class T> void pack(const Linear &linear, const void *w, long w_stride, long panel, char *to) {
    const auto *source = static_cast<const T *>(w);
    auto *out = reinterpret_cast<T *>(to);
    std::memset(out, 0, static_cast<std::size_t>(linear.raw_bytes));
    const long columns = std::min(WIDTH, linear.n - panel * WIDTH), size = part_size(linear.k);
    for (long j = 0; j < columns; j++) {
        const T *row = source + (panel * WIDTH + j) * w_stride;
        T *column = out + j / PART * size + place<T>(j % PART);
        for (long k = 0; k < linear.k; k++) column[k * PART] = row[k];
    }
}

template <class T> constexpr long panel_bytes(long k) { return PARTS * part_size(k) * static_cast<long>(sizeof(T)); }

// A stretch of k of some parts of a panel: where its values lie, those of a part `apart` from the next one's; or its coded blocks. While k is
// walked, what lies from `ahead` on is asked for, `pace` bytes for each k; a coded tile asks for its own parts, and then for the next panel's.
struct Stretch {
    const Linear &linear;
    long panel, part, k, count;
    const void *values;
    long apart;
    const char *ahead;
    long pace;
    bool follows;  // whether the next panel's turn comes after this one's
};

template <int R, int P> using Sums = __m256[R][P][2];

template <int R, int P> inline __attribute__((always_inline)) void load_sums(Sums<R, P> &sums, const float *from) {
#pragma GCC unroll 8
    for (int i = 0; i < R; i++)
#pragma GCC unroll 4
        for (int p = 0; p < P; p++) {
            sums[i][p][0] = _mm256_load_ps(from + (i * P + p) * PART);
            sums[i][p][1] = _mm256_load_ps(from + (i * P + p) * PART + 8);
        }
}

template <int R, int P> inline __attribute__((always_inline)) void store_sums(const Sums<R, P> &sums, float *to) {
#pragma GCC unroll 8
    for (int i = 0; i < R; i++)
#pragma GCC unroll 4
        for (int p = 0; p < P; p++) {
            _mm256_store_ps(to + (i * P + p) * PART, sums[i][p][0]);
            _mm256_store_ps(to + (i * P + p) * PART + 8, sums[i][p][1]);
        }
}

// Adds one k of part p: x points at its value in the first of the rows.
template <int R, int P> inline __attribute__((always_inline)) void add(Sums<R, P> &sums, int p, const Columns &columns, const float *x, long x_stride) {
#pragma GCC unroll 8
    for (int i = 0; i < R; i++) {
        const __m256 value = _mm256_broadcast_ss(x + i * x_stride);
        sums[i][p][0] = _mm256_fmadd_ps(value, columns.left, sums[i][p][0]);
        sums[i][p][1] = _mm256_fmadd_ps(value, columns.right, sums[i][p][1]);
    }
}

// Adds a stretch to the sums of R rows by P parts, [R][P][16]. x: [R, count].
template <class T, int R, int P> void tile(const Stretch &stretch, const float *x, long x_stride, float *out) {
    const T *w = static_cast<const T *>(stretch.values);
    Sums<R, P> sums;
    load_sums<R, P>(sums, out);
    for (long k = 0; k < stretch.count; k++, w += PART) {
#pragma GCC unroll 4
        for (int p = 0; p < P; p++) {
            _mm_prefetch(stretch.ahead + p * stretch.apart * static_cast<long>(sizeof(T)) + k * stretch.pace, _MM_HINT_T0);
            add<R, P>(sums, p, widen16(w + p * stretch.apart), x + k, x_stride);
        }
    }
    store_sums<R, P>(sums, out);
}

// The same of a coded panel: what is decoded goes from register to register, beside the multiplications of the block before.
template <int R, int P> void coded_tile(const Stretch &stretch, const float *x, long x_stride, float *out) {
    const Linear &linear = stretch.linear;
    const Reader reader(linear.panel(stretch.panel));
    const long apart = groups(linear.k), begin = stretch.part * apart + stretch.k / GROUP, count = groups(stretch.count), whole = stretch.count / GROUP;
    const long within = stretch.follows ? std::max<long>(0, count - AHEAD / BLOCK_BYTES) : count;
    KeptBlocks kept[P];
    for (long p = 0; p < P; p++) kept[p] = KeptBlocks(linear, stretch.panel, begin + p * apart, begin + p * apart + count);
    Sums<R, P> sums;
    load_sums<R, P>(sums, out);
    for (long group = 0; group < count; group++) {
        const long ahead = group < within ? AHEAD : AHEAD + linear.panel_bytes - apart * BLOCK_BYTES;
        long stop = group < within ? std::min(within, whole) : whole;  // up to here groups are whole and none of their blocks is kept apart
        for (const KeptBlocks &each : kept) stop = std::min(stop, each.next());
        for (; group < stop; group++) {
#pragma GCC unroll 4
            for (int p = 0; p < P; p++) {
                const long block = begin + p * apart + group;
                reader.prefetch(block, ahead);
                const Values values = reader.read(block);
#pragma GCC unroll 4
                for (int i = 0; i < GROUP; i++) add<R, P>(sums, p, widen16(values.part[i]), x + group * GROUP + i, x_stride);
            }
        }
        if (group == count) break;
#pragma GCC unroll 4
        for (int p = 0; p < P; p++) {
            const Values values = kept[p].next() == group ? kept[p].take() : reader.read(begin + p * apart + group);
#pragma GCC unroll 4
            for (int i = 0; i < GROUP; i++)
                if (group * GROUP + i < stretch.count) add<R, P>(sums, p, widen16(values.part[i]), x + group * GROUP + i, x_stride);
        }
    }
    store_sums<R, P>(sums, out);
}

// Adds the bias to the sums of some rows by P parts, from part `first` on, and hands them over.
template <class T> void finish(const Linear &linear, const float *sums, long parts, T *y, long y_stride, long m, long panel, long first) {
    for (long i = 0; i < m; i++) {
        for (long p = 0; p < parts; p++) {
            const long at = panel * WIDTH + (first + p) * PART;
            if (at >= linear.n) break;
            floats value = widen(sums + (i * parts + p) * PART);
            if (linear.bias) value += widen(linear.bias + at);
            store(y + i * y_stride + at, value, linear.n - at);
        }
    }
}

using Tile = void (*)(const Stretch &stretch, const float *x, long x_stride, float *out);

// The tile of R rows, or of as many as the registers hold beside P parts.
template <class T, int R, int P> Tile tile_of(bool coded) {
    constexpr int rows = std::min(R, MOST<P>);
    if constexpr (std::is_same_v<T, bf16>) return coded ? coded_tile<rows, P> : tile<T, rows, P>;
    else return tile<T, rows, P>;
}

// All rows by P parts of a panel. `sums`: [m][P][16].
template <class T, int P> void strip(const Linear &linear, const float *x, long x_stride, long m, long panel, long first, float *sums, bool follows = false) {
    const bool coded = linear.coded && m <= FEW, aside = linear.coded && !coded;
    const Tile most = tile_of<T, ROWS, P>(coded);
    const long left = m % MOST<P>, size = part_size(linear.k), chunk = m > MOST<P> || aside ? CHUNK : linear.k;
    const Tile last = left == 1 ? tile_of<T, 1, P>(coded) : left == 2 ? tile_of<T, 2, P>(coded) : left == 3 ? tile_of<T, 3, P>(coded)
                    : left == 4 ? tile_of<T, 4, P>(coded) : tile_of<T, 5, P>(coded);
    alignas(64) std::uint16_t decoded[P == 1 ? CHUNK * PART : 1];
    std::fill_n(sums, m * P * PART, 0.0f);
    for (long k = 0; k < linear.k; k += chunk) {
        Stretch stretch{linear, panel, first, k, std::min(chunk, linear.k - k), decoded, size, nullptr, 0, follows};
        const long block = first * groups(linear.k) + k / GROUP;
        if (aside) {
            decode(linear, panel, block, block + groups(stretch.count), decoded, 0);
            stretch.ahead = linear.panel(panel) + BOOK_BYTES + (block + groups(stretch.count)) * BLOCK_BYTES;
            stretch.pace = BLOCK_BYTES / GROUP;
        } else if (!coded) {
            stretch.values = reinterpret_cast<const T *>(linear.panel(panel)) + first * size + k * PART;
            stretch.ahead = static_cast<const char *>(stretch.values) + 1024;
            stretch.pace = PART * sizeof(T);
        }
        long row = 0;
        for (; row + MOST<P> <= m; row += MOST<P>) most(stretch, x + row * x_stride + k, x_stride, sums + row * P * PART);
        if (left) last(stretch, x + row * x_stride + k, x_stride, sums + row * P * PART);
    }
}

// Floats that panel_times_rows needs for its sums.
constexpr long sums_size(long m) { return std::max<long>(m, 2) * 2 * PART; }  // one row by four parts, three by two, or all by one

template <class T> void panel_times_rows(const Linear &linear, const float *x, long x_stride, T *y, long y_stride, long m, long panel, bool follows, float *sums) {
    const long parts = std::min<long>(PARTS, (linear.n - panel * WIDTH + PART - 1) / PART);
    long first = 0;
    if (m == 1 && parts == PARTS) {
        strip<T, PARTS>(linear, x, x_stride, m, panel, first, sums, follows);
        finish(linear, sums, PARTS, y, y_stride, m, panel, first);
        first = PARTS;
    }
    for (; m <= 3 && first + 2 <= parts; first += 2) {
        strip<T, 2>(linear, x, x_stride, m, panel, first, sums);
        finish(linear, sums, 2, y, y_stride, m, panel, first);
    }
    for (; first < parts; first++) {
        strip<T, 1>(linear, x, x_stride, m, panel, first, sums);
        finish(linear, sums, 1, y, y_stride, m, panel, first);
    }
}

}  // namespace understudy::avx2
#endif
