// What functions of a row share: walking it by vectors, and sums over it. A sum over a row has one order that depends on the row's length
// alone: lane l of accumulator a adds the elements 64 i + 16 a + l, then a fixed tree.
#pragma once
#include <algorithm>
#include <cstring>
#include <limits>

#include "simd.h"

namespace understudy {

template <class F> void by_dtype(int dtype, F &&f) {
    if (dtype == FLOAT32) f(float{});
    else if (dtype == BFLOAT16) f(bf16{});
    else f(fp16{});
}

// Rows per piece, so that a piece is worth taking.
inline long rows_per_piece(long row_length) { return std::max<long>(1, 4096 / std::max<long>(row_length, 1)); }

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

template <class T> T lowest();
template <> inline float lowest<float>() { return -std::numeric_limits<float>::infinity(); }
template <> inline bf16 lowest<bf16>() { return bf16{0xFF80}; }
template <> inline fp16 lowest<fp16>() { return fp16{0xFC00}; }

inline float largest(floats v) {
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

}  // namespace understudy
