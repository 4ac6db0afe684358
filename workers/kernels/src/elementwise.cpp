// Embedding, log-probabilities, the greatest logit.
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "pool.h"
#include "rows.h"

namespace understudy {
namespace {

constexpr long COLUMNS = 8192;  // of a long row that one piece takes; part of the order of summation

template <class T> void log_softmax(const T *logits, long stride, float *out, long rows, long n) {
    const long parts = (n + COLUMNS - 1) / COLUMNS;
    std::vector<float> most(static_cast<std::size_t>(rows * parts)), sums(most.size()), logs(static_cast<std::size_t>(rows));
    const auto width = [&](long part) { return std::min(COLUMNS, n - part * COLUMNS); };
    parallel(rows * parts, 1, [&](long begin, long end) {
        for (long i = begin; i < end; i++) most[i] = row_max(logits + i / parts * stride + i % parts * COLUMNS, width(i % parts));
    });
    for (long r = 0; r < rows; r++) most[r * parts] = *std::max_element(&most[r * parts], &most[r * parts] + parts);
    parallel(rows * parts, 1, [&](long begin, long end) {
        for (long i = begin; i < end; i++)
            sums[i] = exp_sum(logits + i / parts * stride + i % parts * COLUMNS, width(i % parts), most[i / parts * parts]);
    });
    for (long r = 0; r < rows; r++) {
        double total = 0.0;
        for (long part = 0; part < parts; part++) total += static_cast<double>(sums[r * parts + part]);
        logs[r] = static_cast<float>(std::log(total));
    }
    parallel(rows * parts, 1, [&](long begin, long end) {
        for (long i = begin; i < end; i++) {
            const long r = i / parts, at = i % parts * COLUMNS, left = width(i % parts);
            for (long c = 0; c < left; c += LANES)
                store(out + r * n + at + c, (load(logits + r * stride + at + c, left - c) - splat(most[r * parts])) - splat(logs[r]), left - c);
        }
    });
}

// The first place in [from, n) whose value equals `wanted`; of a NaN, the first NaN.
template <class T> std::int64_t find(const T *x, long from, long n, float wanted) {
    for (long i = from; i < n; i += LANES) {
        float lanes[LANES];
        store(lanes, load(x + i, n - i));
        for (long j = 0; j < std::min<long>(LANES, n - i); j++)
            if (lanes[j] == wanted || (lanes[j] != lanes[j] && wanted != wanted)) return i + j;
    }
    return from;
}

// The greatest value of a stretch; a NaN where there is one.
template <class T> float stretch_max(const T *x, long n) {
    floats top[2] = {splat(lowest<float>()), splat(lowest<float>())}, odd = splat(0.0f);
    for (long i = 0; i < n; i += LANES) {
        const floats v = load(x + i, n - i, lowest<T>());
        top[i / LANES % 2] = vmax(v, top[i / LANES % 2]);
        odd = select(v == v, odd, v);
    }
    const float nan = sum(odd);
    return nan != nan ? nan : largest(vmax(top[0], top[1]));
}

// The same on the values' bits, which compilers make plain vector code of: as integers they are in order once a negative one's are turned.
template <> float stretch_max(const bf16 *x, long n) {
    std::int16_t top = std::numeric_limits<std::int16_t>::min(), beyond = 0;
    for (long i = 0; i < n; i++) {
        const auto bits = static_cast<std::int16_t>(x[i].bits);
        const auto key = static_cast<std::int16_t>(bits ^ ((bits >> 15) & 0x7fff)), size = static_cast<std::int16_t>(bits & 0x7fff);
        top = std::max(top, key);
        beyond = std::max(beyond, size);
    }
    if (beyond > 0x7f80) return std::numeric_limits<float>::quiet_NaN();
    return widened(bf16{static_cast<std::uint16_t>(top ^ ((top >> 15) & 0x7fff))});
}

// The threads read each row once, a stretch at a time; then only the first stretch that holds the greatest value is looked into.
template <class T> void first_max(const T *logits, long stride, std::int64_t *out, long rows, long n) {
    const long parts = (n + COLUMNS - 1) / COLUMNS;
    std::vector<float> most(static_cast<std::size_t>(rows * parts));
    parallel(rows * parts, std::max<long>(1, COLUMNS / n), [&](long begin, long end) {
        for (long i = begin; i < end; i++) {
            const long at = i % parts * COLUMNS;
            most[static_cast<std::size_t>(i)] = stretch_max(logits + i / parts * stride + at, std::min(COLUMNS, n - at));
        }
    });
    for (long r = 0; r < rows; r++) {
        const float *own = &most[static_cast<std::size_t>(r * parts)];
        long best = 0;
        for (long part = 0; part < parts && own[best] == own[best]; part++)
            if (own[part] > own[best] || own[part] != own[part]) best = part;
        const long at = best * COLUMNS;
        out[r] = at + find(logits + r * stride + at, 0, std::min(COLUMNS, n - at), own[best]);
    }
}

}  // namespace
}  // namespace understudy

using namespace understudy;

// All strides count elements; `dtype` is that of every tensor whose type is not named.

// 0, or 1 when an id is outside of the table.
extern "C" int understudy_embed(const void *table, long row_bytes, long vocabulary, const std::int64_t *ids, void *y, long rows) {
    if (std::any_of(ids, ids + rows, [&](std::int64_t id) { return id < 0 || id >= vocabulary; })) return 1;
    for (long r = 0; r < rows; r++)
        std::memcpy(static_cast<char *>(y) + r * row_bytes, static_cast<const char *>(table) + ids[r] * row_bytes, static_cast<std::size_t>(row_bytes));
    return 0;
}

extern "C" void understudy_logprobs(int dtype, const void *logits, long stride, float *out, long rows, long n) {
    by_dtype(dtype, [&](auto type) { log_softmax(static_cast<const decltype(type) *>(logits), stride, out, rows, n); });
}

// The place of each row's greatest value, the first of equals. A NaN is greater than any number.
extern "C" void understudy_argmax(int dtype, const void *logits, long stride, std::int64_t *out, long rows, long n) {
    by_dtype(dtype, [&](auto type) { first_max(static_cast<const decltype(type) *>(logits), stride, out, rows, n); });
}
