// bf16 with AMX tiles (tdpbf16ps). A panel of 32 columns holds, for each 32 of k, two tiles: 16 pairs of k by 16 columns by two values.
// Up to 32 rows by 32 columns of sums stay in four tiles. A last k block that is not whole is padded with zeros in the packed weight, and the
// rows' ends are copied beside zeros, so that nothing beyond a row is read.
#include "linear.h"

#if defined(__AMX_BF16__) && defined(__AVX512BF16__) && defined(__AVX512BW__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <algorithm>

#include "pool.h"

namespace understudy {

#if defined(__AMX_BF16__) && defined(__AVX512BF16__) && defined(__AVX512BW__) && defined(__linux__)
namespace {

constexpr long WIDTH = 32, K_BLOCK = 32, TILE = 1024;  // TILE: bytes

long k_blocks(long k) { return (k + K_BLOCK - 1) / K_BLOCK; }

long panel_bytes(long k) { return k_blocks(k) * 2 * TILE; }

void pack(const Linear &linear, const void *w, long w_stride, long panel, char *to) {
    const auto *source = static_cast<const std::uint16_t *>(w);
    auto *out = reinterpret_cast<std::uint16_t *>(to);
    std::memset(out, 0, static_cast<std::size_t>(linear.raw_bytes));
    const long columns = std::min(WIDTH, linear.n - panel * WIDTH);
    for (long j = 0; j < columns; j++) {
        const std::uint16_t *row = source + (panel * WIDTH + j) * w_stride;
        std::uint16_t *column = out + j / 16 * 512 + j % 16 * 2;
        for (long k = 0; k < linear.k; k++) column[k / 32 * 1024 + k % 32 / 2 * 32 + k % 2] = row[k];
    }
}

// Tiles 0-3: sums (rows 0-15 and 16-31, columns 0-15 and 16-31); 4, 5: rows of x; 6, 7: weights.
struct alignas(64) TileConfig {
    std::uint8_t palette = 1, start_row = 0, reserved[14] = {};
    std::uint16_t bytes[16] = {};
    std::uint8_t rows[16] = {};

    explicit TileConfig(int m) {
        const auto upper = static_cast<std::uint8_t>(std::min(m, 16)), lower = static_cast<std::uint8_t>(std::max(m - 16, 1));
        const std::uint8_t each[8] = {upper, upper, lower, lower, upper, lower, 16, 16};
        for (int tile = 0; tile < 8; tile++) {
            bytes[tile] = 64;
            rows[tile] = each[tile];
        }
    }
};

// The compiler's tile instructions do not say which memory they read: what they are to read is written before this.
inline void written() { asm volatile("" ::: "memory"); }

// Loads the configuration for m rows (1 .. 32) unless it is loaded.
class Tiles {
  public:
    ~Tiles() { _tile_release(); }
    void configure(int m) {
        if (m == current_) return;
        current_ = m;
        const TileConfig config(m);
        written();
        _tile_loadconfig(&config);
    }

  private:
    int current_ = 0;
};

template <bool LOWER> inline void k_step(const char *x, long x_bytes, const char *w) {
    _tile_loadd(6, w, 64);
    _tile_loadd(4, x, x_bytes);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, w + TILE, 64);
    _tile_dpbf16ps(1, 4, 7);
    if constexpr (LOWER) {
        _tile_loadd(5, x + 16 * x_bytes, x_bytes);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
}

// Sums of a finished block on their way to y, a row at a time between the next block's multiplications: reading what a tile has just
// stored would stall.
struct Pending {
    const float *sums = nullptr;  // four tiles
    std::uint16_t *y = nullptr;
    long y_stride = 0, row = 0, m = 0;
    __mmask32 columns = 0;
    alignas(64) float bias[32] = {};

    void step() {
        if (row == m) return;
        const float *low = sums + (row / 16 * 2 * 16 + row % 16) * 16, *high = low + 16 * 16;
        const __m512 a = _mm512_add_ps(_mm512_load_ps(low), _mm512_load_ps(bias));
        const __m512 b = _mm512_add_ps(_mm512_load_ps(high), _mm512_load_ps(bias + 16));
        _mm512_mask_storeu_epi16(y + row * y_stride, columns, (__m512i)_mm512_cvtne2ps_pbh(b, a));
        row++;
    }
    void finish() {
        while (row < m) step();
    }
};

void load_sums(const float *sums, bool lower) {
    _tile_loadd(0, sums, 64);
    _tile_loadd(1, sums + 256, 64);
    if (lower) {
        _tile_loadd(2, sums + 512, 64);
        _tile_loadd(3, sums + 768, 64);
    }
}

void store_sums(float *sums, bool lower) {
    _tile_stored(0, sums, 64);
    _tile_stored(1, sums + 256, 64);
    if (lower) {
        _tile_stored(2, sums + 512, 64);
        _tile_stored(3, sums + 768, 64);
    }
}

// Memory that will be read soon, asked for in small portions between multiplications: `count` stretches of `width` bytes, `stride` apart.
struct Ahead {
    const char *base = nullptr;
    long width = 0, stride = 0, count = 0, portion = 0, at = 0;

    // All of it within `steps` steps.
    void plan(const char *from, long bytes, long apart, long times, long steps) {
        *this = Ahead{from, bytes, apart, times, 0, 0};
        portion = ((bytes + 63) / 64 * times + steps - 1) / steps;
    }
    void step() {
        for (long i = 0; i < portion && count > 0; i++) {
            _mm_prefetch(base + at, _MM_HINT_T1);
            at += 64;
            if (at >= width) {
                at = 0;
                base += stride;
                count--;
            }
        }
    }
};

constexpr long UNITS = 2 * TILE / BLOCK_RAW;  // blocks of coded weights in a k block of a panel
constexpr long AHEAD = 8 * 1024;              // bytes of weights asked for before they are used, where they come from memory

// Adds k blocks [begin, end) of up to 32 rows (x: the first of them) and one panel, whose values for them begin at w, to the tiles of sums.
template <bool LOWER, bool STREAM>
void add_k(const Linear &linear, const char *x, long x_bytes, long m, const char *w, long begin, long end, Pending &pending, Ahead *ahead) {
    const long whole = std::min(end, linear.k / K_BLOCK);
    for (long k = begin; k < whole; k++, w += 2 * TILE) {
        if constexpr (STREAM)
            for (long line = 0; line < 2 * TILE; line += 64) _mm_prefetch(w + AHEAD + line, _MM_HINT_T0);
        k_step<LOWER>(x + k * 64, x_bytes, w);
        pending.step();
        ahead[0].step();
        ahead[1].step();
    }
    if (whole < end) {
        alignas(64) char last[32][64] = {};
        for (long i = 0; i < m; i++) std::memcpy(last[i], x + i * x_bytes + whole * 64, static_cast<std::size_t>(linear.k % K_BLOCK) * 2);
        written();
        k_step<LOWER>(last[0], 64, w);
    }
}

// One thread's rectangle of rows and panels. Where k is long and rows are many, k is taken in chunks, so that what is read again stays in the
// core's cache; the sums wait in memory as the float32 that they are, so a chunk's end leaves no trace in them.
class Rectangle {
  public:
    Rectangle(const Linear &linear, const Rows &rows, long begin, long end)
        : linear_(linear), rows_(rows), begin_(begin), end_(end), row_blocks_((rows.m + 31) / 32), chunks_(k_chunks(linear.k, rows.m)) {
        // Sums that wait: of each panel and block of rows; where rows are few, of one panel; a single block's stay in the tiles.
        const long waiting = rows.m <= FEW_ROWS ? (linear.coded && row_blocks_ > 1 ? row_blocks_ : 0) : chunks_ > 1 ? (end - begin) * row_blocks_ : 0;
        const long values = !linear.coded ? 0 : rows.m <= FEW_ROWS ? CODED_CHUNK : GROUP * chunk();  // k blocks of panels, decoded
        if (!waiting && !values) return;
        auto *memory = static_cast<char *>(scratch(static_cast<std::size_t>(waiting * 4 + values * 2) * TILE));
        partial_ = reinterpret_cast<float *>(memory);
        decoded_ = memory + waiting * 4 * TILE;
    }

    void run() {
        if (rows_.m > FEW_ROWS) {
            run_blocked();
        } else if (linear_.coded) {
            run_coded();
        } else {
            for (long panel = begin_; panel < end_; panel++)
                for (long row = 0; row < rows_.m; row += 32) block(row, panel, linear_.panel(panel), 0, k_blocks(linear_.k), row == 0, nullptr);
        }
        pending_.finish();
    }

    static constexpr long FEW_ROWS = 128;  // up to here a panel is read once and its rows go by
    static constexpr long GROUP = 4;       // panels that stay in the cache while all rows go by
    static constexpr long CODED_CHUNK = 8;  // k blocks that are decoded, and then multiplied from the first cache, where rows are few

    static long k_chunks(long k, long m) { return m <= FEW_ROWS || k <= 1280 ? 1 : (k + 1279) / 1280; }

  private:
    long chunk() const { return (k_blocks(linear_.k) + chunks_ - 1) / chunks_; }  // of k, in blocks

    // A chunk of a panel is decoded once for all blocks of rows, whose sums wait between chunks.
    void run_coded() {
        const long blocks = k_blocks(linear_.k);
        for (long panel = begin_; panel < end_; panel++)
            for (long k = 0; k < blocks; k += CODED_CHUNK) {
                const long k_end = std::min(k + CODED_CHUNK, blocks);
                decode(linear_, panel, k * UNITS, k_end * UNITS, reinterpret_cast<std::uint16_t *>(decoded_), AHEAD);
                written();
                for (long row = 0; row < rows_.m; row += 32)
                    block(row, panel, decoded_, k, k_end, false, row_blocks_ > 1 ? partial_ + row / 32 * TILE : nullptr);
            }
    }

    // While a group of panels is multiplied, the next group's chunk comes in, and so do the rows' next chunks.
    void run_blocked() {
        const long blocks = k_blocks(linear_.k), size = chunk(), x_bytes = rows_.x_stride * 2;
        for (long k = 0; k < blocks; k += size) {
            const long k_end = std::min(k + size, blocks), steps = row_blocks_ * (k_end - k);
            if (k_end < blocks) {
                const long next = std::min(size, blocks - k_end);
                ahead_[1].plan(static_cast<const char *>(rows_.x) + k_end * 64, next * 64, x_bytes, rows_.m, steps * (end_ - begin_));
            }
            for (long group = begin_; group < end_; group += GROUP) {
                const long group_end = std::min(group + GROUP, end_);
                if (group_end < end_)
                    ahead_weights(group_end, k, k_end, steps * (group_end - group));
                else if (k_end < blocks)
                    ahead_weights(begin_, k_end, std::min(k_end + size, blocks), steps * (group_end - group));
                const bool first = !linear_.coded && k == 0 && group == begin_;
                const long apart = linear_.coded ? size * 2 * TILE : linear_.raw_bytes;
                const char *w = linear_.coded ? decoded_ : linear_.panel(group) + k * 2 * TILE;
                if (linear_.coded) decode_group(group, group_end, k, k_end, apart);
                for (long row = 0; row < rows_.m; row += 32)
                    for (long panel = group; panel < group_end; panel++) {
                        float *waiting = chunks_ > 1 ? partial_ + ((panel - begin_) * row_blocks_ + row / 32) * TILE : nullptr;
                        block(row, panel, w + (panel - group) * apart, k, k_end, first && row == 0, waiting);
                    }
            }
        }
    }

    void decode_group(long group, long group_end, long k, long k_end, long apart) {
        for (long panel = group; panel < group_end; panel++) {
            auto *to = reinterpret_cast<std::uint16_t *>(decoded_ + (panel - group) * apart);
            decode(linear_, panel, k * UNITS, k_end * UNITS, to, group == begin_ && k == 0 ? AHEAD : 0);
        }
        written();
    }

    void ahead_weights(long panel, long k, long k_end, long steps) {
        const long bytes = linear_.coded ? UNITS * BLOCK_BYTES : 2 * TILE;  // of a k block
        ahead_[0].plan(linear_.panel(panel) + (linear_.coded ? BOOK_BYTES : 0) + k * bytes, (k_end - k) * bytes, linear_.panel_bytes,
                       std::min(GROUP, end_ - panel), steps);
    }

    // One block of rows by k blocks [k_begin, k_end) of a panel, whose values for them begin at w. Sums that are not finished go to `partial`, or
    // stay in the tiles where it is null.
    void block(long row, long panel, const char *w, long k_begin, long k_end, bool stream, float *partial) {
        const long m = std::min<long>(32, rows_.m - row);
        const bool lower = m > 16;
        tiles_.configure(static_cast<int>(m));
        if (k_begin > 0) {
            if (partial) load_sums(partial, lower);
        } else {
            _tile_zero(0);
            _tile_zero(1);
            _tile_zero(2);
            _tile_zero(3);
        }
        const auto add = stream ? (lower ? add_k<true, true> : add_k<false, true>) : (lower ? add_k<true, false> : add_k<false, false>);
        add(linear_, static_cast<const char *>(rows_.x) + row * rows_.x_stride * 2, rows_.x_stride * 2, m, w, k_begin, k_end, pending_, ahead_);
        if (k_end < k_blocks(linear_.k)) {
            if (partial) store_sums(partial, lower);
            return;
        }
        pending_.finish();
        turn_ = !turn_;
        store_sums(sums_[turn_], lower);
        hand_over(row, m, panel);
    }

    void hand_over(long row, long m, long panel) {
        const long columns = std::min(WIDTH, linear_.n - panel * WIDTH);
        pending_.sums = sums_[turn_];
        pending_.y = static_cast<std::uint16_t *>(rows_.y) + row * rows_.y_stride + panel * WIDTH;
        pending_.y_stride = rows_.y_stride;
        pending_.row = 0;
        pending_.m = m;
        pending_.columns = static_cast<__mmask32>(columns == 32 ? ~0u : (1u << columns) - 1);
        if (linear_.bias) std::memcpy(pending_.bias, linear_.bias + panel * WIDTH, sizeof pending_.bias);
    }

    const Linear &linear_;
    const Rows &rows_;
    long begin_, end_, row_blocks_, chunks_;
    float *partial_ = nullptr;
    char *decoded_ = nullptr;
    alignas(64) float sums_[2][32 * 32];
    bool turn_ = false;
    Pending pending_;
    Ahead ahead_[2];
    Tiles tiles_;
};

void multiply(const Linear &linear, const Rows &rows, long begin, long end) { Rectangle(linear, rows, begin, end).run(); }

// Rows of which a chunk of k, with the float32 sums of a piece and two groups of weights, fits a cache of 2 MB.
long row_block(const Linear &linear, long m) { return Rectangle::k_chunks(linear.k, m) > 1 ? 256 : std::max<long>(64, (1L << 19) / (linear.k * 2) / 32 * 32); }

constexpr Kernels kernels{WIDTH, panel_bytes, pack, multiply, row_block, 32, true};

// The kernel saves tile registers only for processes that asked for them (ARCH_REQ_XCOMP_PERM, XTILEDATA).
bool permitted() {
    static const bool granted = __builtin_cpu_supports("avx512f") && syscall(SYS_arch_prctl, 0x1023, 18) == 0;
    return granted;
}

}  // namespace

const Kernels *amx_kernels() { return permitted() ? &kernels : nullptr; }
#else
const Kernels *amx_kernels() { return nullptr; }
#endif

}  // namespace understudy
