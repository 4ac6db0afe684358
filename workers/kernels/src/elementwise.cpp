// Norms, activations, the gate of a mixture of experts, embedding, log-probabilities. A sum over a row has one order that depends on the row's
// length alone: lane l of accumulator a adds the elements 64 i + 16 a + l, then a fixed tree.
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "pool.h"
#include "simd.h"

namespace understudy {
namespace {

template <class F> void by_dtype(int dtype, F &&f) {
    if (dtype == FLOAT32) f(float{});
    else if (dtype == BFLOAT16) f(bf16{});
    else f(fp16{});
}

// Rows per piece, so that a piece is worth taking.
long rows_per_piece(long row_length) { return std::max<long>(1, 4096 / std::max<long>(row_length, 1)); }

// Sum over [0, n) of term(i, left): 16 values from place i, of which the first `left` are within the row (the others must be 0).
template <class F> float row_sum(long n, F &&term) {
    floats sums[4] = {splat(0.0f), splat(0.0f), splat(0.0f), splat(0.0f)};
    long i = 0;
    for (; i + 64 <= n; i += 64)
        for (int a = 0; a < 4; a++) sums[a] = sums[a] + term(i + 16 * a, 16L);
    for (int a = 0; i < n; i += 16, a++) sums[a] = sums[a] + term(i, n - i);
    return sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

// f(i, left) for each vector of a row of n; `left` is a constant in all but the last.
template <class F> void by_lanes(long n, F &&f) {
    long i = 0;
    for (; i + LANES <= n; i += LANES) f(i, static_cast<long>(LANES));
    if (i < n) f(i, n - i);
}

template <class T> float squares(const T *x, long h) {
    return row_sum(h, [&](long i, long left) {
        const floats v = load(x + i, left);
        return v * v;
    });
}

// residual += x; the sum of what it then holds, squared.
template <class T> float add_squares(const T *x, T *residual, long h) {
    return row_sum(h, [&](long i, long left) {
        const floats v = store_rounded(residual + i, load(residual + i, left) + load(x + i, left), left);
        return v * v;
    });
}

template <class T> void normalize(const T *x, const T *weight, T *y, long h, float sum_of_squares, float eps) {
    const floats scale = splat(1.0f / std::sqrt(sum_of_squares / static_cast<float>(h) + eps));
    by_lanes(h, [&](long i, long left) { store(y + i, load(weight + i, left) * round_to<T>(load(x + i, left) * scale), left); });
}

template <class T> T lowest();
template <> float lowest<float>() { return -std::numeric_limits<float>::infinity(); }
template <> bf16 lowest<bf16>() { return bf16{0xFF80}; }
template <> fp16 lowest<fp16>() { return fp16{0xFC00}; }

float largest(floats v) {
    float lanes[LANES];
    std::memcpy(lanes, &v, 64);
    return *std::max_element(lanes, lanes + LANES);
}

template <class T> float row_max(const T *x, long n) {
    floats best = splat(lowest<float>());
    for (long i = 0; i < n; i += LANES) best = vmax(load(x + i, n - i, lowest<T>()), best);
    return largest(best);
}

// Sum of e^(x - shift).
template <class T> float exp_sum(const T *x, long n, float shift) {
    return row_sum(n, [&](long i, long left) { return exp(load(x + i, left, lowest<T>()) - splat(shift)); });
}

template <class T> void choose(const T *logits, std::int32_t *ids, float *weights, long experts, long k, bool renormalize, float *p) {
    const float shift = row_max(logits, experts), total = exp_sum(logits, experts, shift);
    for (long i = 0; i < experts; i += LANES) store(p + i, exp(load(logits + i, experts - i) - splat(shift)) / splat(total), experts - i);
    float chosen = 0.0f;
    for (long j = 0; j < k; j++) {
        long best = -1;
        for (long e = 0; e < experts; e++) {
            const bool taken = std::find(ids, ids + j, static_cast<std::int32_t>(e)) != ids + j;
            if (!taken && (best < 0 || p[e] > p[best])) best = e;
        }
        ids[j] = static_cast<std::int32_t>(best);
        weights[j] = p[best];
        chosen += p[best];
    }
    if (renormalize)
        for (long j = 0; j < k; j++) weights[j] /= chosen;
}

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

extern "C" void understudy_rms_norm(int dtype, const void *x, long x_stride, const void *weight, void *y, long rows, long h, float eps) {
    by_dtype(dtype, [&](auto type) {
        using T = decltype(type);
        parallel(rows, rows_per_piece(h), [&](long begin, long end) {
            for (long r = begin; r < end; r++) {
                const T *row = static_cast<const T *>(x) + r * x_stride;
                normalize(row, static_cast<const T *>(weight), static_cast<T *>(y) + r * h, h, squares(row, h), eps);
            }
        });
    });
}

extern "C" void understudy_add_rms_norm(int dtype, const void *x, long x_stride, void *residual, long residual_stride, const void *weight, void *y,
                                        long rows, long h, float eps) {
    by_dtype(dtype, [&](auto type) {
        using T = decltype(type);
        parallel(rows, rows_per_piece(h), [&](long begin, long end) {
            for (long r = begin; r < end; r++) {
                T *sums = static_cast<T *>(residual) + r * residual_stride;
                const float squared = add_squares(static_cast<const T *>(x) + r * x_stride, sums, h);
                normalize(sums, static_cast<const T *>(weight), static_cast<T *>(y) + r * h, h, squared, eps);
            }
        });
    });
}

extern "C" void understudy_silu_mul(int dtype, const void *gate_up, long stride, void *y, long rows, long f) {
    by_dtype(dtype, [&](auto type) {
        using T = decltype(type);
        constexpr long STEP = 2048;
        const long parts = (f + STEP - 1) / STEP;
        parallel(rows * parts, std::max<long>(1, 8192 / f), [&](long begin, long end) {
            for (long piece = begin; piece < end; piece++) {
                const T *gate = static_cast<const T *>(gate_up) + piece / parts * stride;
                T *out = static_cast<T *>(y) + piece / parts * f;
                const long first = piece % parts * STEP, last = std::min(first + STEP, f);
                for (long i = first; i < last; i += LANES) {
                    const floats g = load(gate + i, last - i);
                    store(out + i, g * sigmoid(g) * load(gate + f + i, last - i), last - i);
                }
            }
        });
    });
}

extern "C" void understudy_gate(int dtype, const void *logits, long stride, std::int32_t *ids, float *weights, long rows, long experts, long k,
                                int renormalize) {
    by_dtype(dtype, [&](auto type) {
        using T = decltype(type);
        parallel(rows, rows_per_piece(experts * k), [&](long begin, long end) {
            auto *p = static_cast<float *>(scratch(static_cast<std::size_t>(experts) * sizeof(float)));
            for (long r = begin; r < end; r++)
                choose(static_cast<const T *>(logits) + r * stride, ids + r * k, weights + r * k, experts, k, renormalize != 0, p);
        });
    });
}

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
