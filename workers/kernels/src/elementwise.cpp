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

// Reads the row once, a stretch at a time, then looks only into the first stretch that holds the greatest value.
template <class T> std::int64_t first_max(const T *x, long n) {
    constexpr long STRETCH = 4096;
    float best = -std::numeric_limits<float>::infinity();
    long place = 0;
    for (long from = 0; from < n; from += STRETCH) {
        const long end = std::min(from + STRETCH, n);
        floats top[2] = {splat(lowest<float>()), splat(lowest<float>())}, odd = splat(0.0f);
        for (long i = from; i < end; i += LANES) {
            const floats v = load(x + i, end - i, lowest<T>());
            top[i / LANES % 2] = vmax(v, top[i / LANES % 2]);
            odd = select(v == v, odd, v);
        }
        const float nan = sum(odd), most = largest(vmax(top[0], top[1]));
        if (nan != nan) return find(x, from, end, nan);
        if (most > best) {
            best = most;
            place = from;
        }
    }
    return find(x, place, n, best);
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
    by_dtype(dtype, [&](auto type) {
        using T = decltype(type);
        parallel(rows, rows_per_piece(n), [&](long begin, long end) {
            for (long r = begin; r < end; r++) out[r] = first_max(static_cast<const T *>(logits) + r * stride, n);
        });
    });
}
