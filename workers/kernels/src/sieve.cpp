// The greatest of y = x W^T for one row, exactly, without reading all of W. Beside the weight lie its columns in eight bits with one scale
// each. What a product of those can be off by is bounded (Cauchy and Schwarz: the norms of what rounding took from a column and from x), so
// that one pass over half of the bytes leaves a few panels in which the greatest can be. Those are computed by the weight's own kernel: the
// winner, and its bits, are those of the whole product.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <vector>

#include "linear.h"
#include "pool.h"

namespace understudy {

#ifdef UNDERSTUDY_CODED
namespace {

constexpr long WIDTH = 64;          // columns of a panel
constexpr long PIECE = 4;           // panels that a thread takes at a time
constexpr long MOST = 4;            // at most one in so many panels is computed again; else the whole product costs less
constexpr float ROUNDING = 1.001f;  // more than what float32 loses in these few operations

}  // namespace

// Panel p: for each pair of k, 64 columns of two values. A value is about scale * q; `error` and `norm` are those of what that leaves of its
// column, and of the column.
struct Sieve {
    const Linear &linear;
    long pairs, panels;
    std::int8_t *q = nullptr;
    std::vector<float> scale, error, norm;

    explicit Sieve(const Linear &l) : linear(l), pairs((l.k + 1) / 2), panels((l.n + WIDTH - 1) / WIDTH) {
        for (auto *each : {&scale, &error, &norm}) each->assign(static_cast<std::size_t>(panels * WIDTH), 0.0f);
    }
    ~Sieve() { std::free(q); }
    Sieve(const Sieve &) = delete;
    Sieve &operator=(const Sieve &) = delete;
};

namespace {

float norm_of(const float *x, long k) {
    double sum = 0.0;
    for (long i = 0; i < k; i++) sum += static_cast<double>(x[i]) * static_cast<double>(x[i]);
    return static_cast<float>(std::sqrt(sum)) * ROUNDING;
}

// x in `levels` steps up and down, rounded; what is left of x stays there. Returns a step's size; 0 where x has nothing but zeros.
template <class T> float quantize(float *x, long k, float levels, T *q) {
    float most = 0.0f;
    for (long i = 0; i < k; i++) most = std::max(most, std::fabs(x[i]));
    const float step = most / levels, inverse = step > 0.0f ? levels / most : 0.0f;
    if (!std::isfinite(inverse)) return std::numeric_limits<float>::quiet_NaN();
    constexpr float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
    for (long i = 0; i < k; i++) {
        const float n = x[i] * inverse + magic - magic;
        q[i] = static_cast<T>(static_cast<int>(n));
        x[i] = x[i] - n * step;
    }
    return step;
}

// False where a value is not finite.
bool fill(Sieve &sieve, const bf16 *w, long w_stride, long panel) {
    const long k = sieve.linear.k, columns = std::min(WIDTH, sieve.linear.n - panel * WIDTH);
    std::vector<float> values(static_cast<std::size_t>(k));
    std::vector<std::int8_t> q(static_cast<std::size_t>(2 * sieve.pairs), 0);
    std::int8_t *out = sieve.q + panel * sieve.pairs * WIDTH * 2;
    std::memset(out, 0, static_cast<std::size_t>(sieve.pairs * WIDTH * 2));
    for (long j = 0; j < columns; j++) {
        const long column = panel * WIDTH + j;
        std::transform(w + column * w_stride, w + column * w_stride + k, values.begin(), widened);
        const auto at = static_cast<std::size_t>(column);
        sieve.norm[at] = norm_of(values.data(), k);
        sieve.scale[at] = quantize(values.data(), k, 127.0f, q.data());
        sieve.error[at] = norm_of(values.data(), k);
        if (!std::isfinite(sieve.norm[at]) || !std::isfinite(sieve.error[at])) return false;
        for (long i = 0; i < sieve.pairs; i++) std::memcpy(out + (i * WIDTH + j) * 2, &q[static_cast<std::size_t>(2 * i)], 2);
    }
    return true;
}

// x as the sieve multiplies it: [pairs] of two 16-bit values.
struct Row {
    std::vector<std::int16_t> q;
    float step = 0, norm = 0, error = 0;

    Row(const bf16 *x, long k) : q(static_cast<std::size_t>((k + 1) / 2 * 2), 0) {
        std::vector<float> values(static_cast<std::size_t>(k));
        std::transform(x, x + k, values.begin(), widened);
        norm = norm_of(values.data(), k);
        if (!std::isfinite(norm)) return;  // so that no NaN becomes an integer
        const float levels = std::floor(std::min(32767.0f, 2.1e9f / (127.0f * static_cast<float>(2 * ((k + 1) / 2)))));  // sums fit 32 bits
        step = quantize(values.data(), k, levels, q.data());
        error = norm_of(values.data(), k);
        if (!std::isfinite(step)) step = 0;
    }
};

void products(const Sieve &sieve, const Row &row, long panel, std::int32_t *out) {
    const std::int8_t *w = sieve.q + panel * sieve.pairs * WIDTH * 2;
    __m256i sums[8];
#pragma GCC unroll 8
    for (int j = 0; j < 8; j++) sums[j] = _mm256_setzero_si256();
    for (long i = 0; i < sieve.pairs; i++, w += 2 * WIDTH) {
        int pair;
        std::memcpy(&pair, &row.q[static_cast<std::size_t>(2 * i)], 4);
        const __m256i x = _mm256_set1_epi32(pair);
        _mm_prefetch(reinterpret_cast<const char *>(w) + 4096, _MM_HINT_T0);
        _mm_prefetch(reinterpret_cast<const char *>(w) + 4096 + 64, _MM_HINT_T0);
#pragma GCC unroll 8
        for (int j = 0; j < 8; j++) {
            const __m256i values = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i *>(w + 16 * j)));
            sums[j] = _mm256_add_epi32(sums[j], _mm256_madd_epi16(values, x));
        }
    }
#pragma GCC unroll 8
    for (int j = 0; j < 8; j++) _mm256_storeu_si256(reinterpret_cast<__m256i *>(out + 8 * j), sums[j]);
}

struct Bounds {
    float upper, lower;  // the greatest of a panel's upper bounds, and of its lower ones
};

// Where the float32 sums of a panel's columns lie. `lost`: what summing k products in float32 can lose, for a row and a column of norm 1.
Bounds bounds(const Sieve &sieve, const Row &row, float lost, long panel) {
    alignas(32) std::int32_t sums[WIDTH];
    products(sieve, row, panel, sums);
    Bounds result{-std::numeric_limits<float>::infinity(), -std::numeric_limits<float>::infinity()};
    const long columns = std::min(WIDTH, sieve.linear.n - panel * WIDTH);
    for (long j = 0; j < columns; j++) {
        const auto at = static_cast<std::size_t>(panel * WIDTH + j);
        const float about = sieve.scale[at] * row.step * static_cast<float>(sums[j]);
        const float off = (row.norm * sieve.error[at] + sieve.norm[at] * lost * row.norm + (sieve.norm[at] + sieve.error[at]) * row.error) * ROUNDING + std::fabs(about) * 1e-6f + 1e-30f;
        result.upper = std::max(result.upper, about + off);
        result.lower = std::max(result.lower, about - off);
    }
    return result;
}

// Panels in which the greatest value, rounded to bfloat16, can be; or as one of equals.
std::vector<long> survivors(const Sieve &sieve, const Row &row) {
    const float lost = static_cast<float>(sieve.linear.k + 2) * 0x1p-23f;
    std::vector<Bounds> each(static_cast<std::size_t>(sieve.panels));
    parallel(sieve.panels, PIECE, [&](long begin, long end) {
        for (long panel = begin; panel < end; panel++) each[static_cast<std::size_t>(panel)] = bounds(sieve, row, lost, panel);
    });
    float least = -std::numeric_limits<float>::infinity();
    for (const Bounds &one : each) least = std::max(least, one.lower);
    std::vector<long> found;
    for (long panel = 0; panel < sieve.panels; panel++) {
        const float upper = each[static_cast<std::size_t>(panel)].upper;
        if (!(upper + (std::fabs(upper) + std::fabs(least)) * 0x1p-7f < least)) found.push_back(panel);
    }
    return found;
}

}  // namespace
#else
struct Sieve {};
#endif

}  // namespace understudy

using namespace understudy;

// A sieve of w [n, k] bfloat16 (rows w_stride elements apart), which `linear` was packed from and must outlive it. Null where there is none: no
// such kernels here, a bias, another dtype, a value that is not finite, no memory.
extern "C" Sieve *understudy_sieve_new(const Linear *linear, const void *w, long w_stride) {
#ifdef UNDERSTUDY_CODED
    if (linear->dtype != BFLOAT16 || linear->bias) return nullptr;
    auto sieve = std::make_unique<Sieve>(*linear);
    sieve->q = static_cast<std::int8_t *>(stream_memory(static_cast<std::size_t>(sieve->panels * sieve->pairs * WIDTH * 2)));
    if (!sieve->q) return nullptr;
    std::atomic<bool> finite{true};
    parallel(sieve->panels, 1, [&](long begin, long end) {
        for (long panel = begin; panel < end && finite; panel++)
            if (!fill(*sieve, static_cast<const bf16 *>(w), w_stride, panel)) finite = false;
    });
    return finite ? sieve.release() : nullptr;
#else
    (void)linear, (void)w, (void)w_stride;
    return nullptr;
#endif
}

extern "C" void understudy_sieve_free(Sieve *sieve) { delete sieve; }

// The place of the greatest of x [k] times the weight, the first of equals, and its value. y [n] is written here and there. How many panels were
// computed; or -1: the whole product has to be.
extern "C" long understudy_sieve(const Sieve *sieve, const void *x, void *y, std::int64_t *place, float *value) {
#ifdef UNDERSTUDY_CODED
    const Linear &linear = sieve->linear;
    const Row row(static_cast<const bf16 *>(x), linear.k);
    if (!(row.step > 0.0f)) return -1;
    const std::vector<long> found = survivors(*sieve, row);
    const long count = static_cast<long>(found.size()), own = WIDTH / linear.width;  // of the weight's panels in one of the sieve's
    if (count * MOST > sieve->panels) return -1;
    const Kernels &kernels = kernels_of(linear);
    parallel(count, 1, [&](long begin, long end) {
        for (long i = begin; i < end; i++) {
            const long first = found[static_cast<std::size_t>(i)] * own;
            kernels.multiply(linear, Rows{x, linear.k, y, linear.n, 1}, first, std::min(first + own, linear.panels));
        }
    });
    const auto *values = static_cast<const bf16 *>(y);
    *place = -1;
    for (const long panel : found)
        for (long j = panel * WIDTH; j < std::min(panel * WIDTH + WIDTH, linear.n); j++) {
            const float v = widened(values[j]);
            if (!std::isfinite(v)) return -1;
            if (*place < 0 || v > *value) {
                *place = j;
                *value = v;
            }
        }
    return count;
#else
    (void)sieve, (void)x, (void)y, (void)place, (void)value;
    return -1;
#endif
}
