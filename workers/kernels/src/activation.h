// Activations, and the elementwise part of a gated feed-forward.
#pragma once
#include "simd.h"

namespace understudy {

enum Act : int { SILU = 0, GELU = 1, GELU_TANH = 2, RELU = 3, CLAMPED = 4 };  // CLAMPED: of pairs only

template <int ACT> inline floats activate(floats x) {
    if constexpr (ACT == SILU) return x * sigmoid(x);
    else if constexpr (ACT == GELU) return gelu(x);
    else if constexpr (ACT == GELU_TANH) {
        const floats inner = fma(x * x * x, splat(0.044715f), x) * splat(0.79788456f);  // sqrt(2 / pi)
        return x * splat(0.5f) * (splat(1.0f) + tanh(inner));
    } else return vmax(splat(0.0f), x);
}

template <int ACT> inline floats gated(floats gate, floats up) {
    if constexpr (ACT == CLAMPED) {  // the bound comes first, so that a NaN stays
        gate = vmin(splat(7.0f), gate);
        up = vmax(splat(-7.0f), vmin(splat(7.0f), up));
        return gate * sigmoid(gate * splat(1.702f)) * (up + splat(1.0f));
    } else {
        return activate<ACT>(gate) * up;
    }
}

// f(an integral constant).
template <class F> void by_act(int act, F &&f) {
    if (act == SILU) f(std::integral_constant<int, SILU>{});
    else if (act == GELU) f(std::integral_constant<int, GELU>{});
    else if (act == GELU_TANH) f(std::integral_constant<int, GELU_TANH>{});
    else if (act == RELU) f(std::integral_constant<int, RELU>{});
    else f(std::integral_constant<int, CLAMPED>{});
}

// y = gated(gate, up) for a rectangle of rows by columns; y may be gate. Strides count elements.
template <class T> void gated_rows(int act, const T *gate, const T *up, long stride, T *y, long y_stride, long rows, long columns) {
    by_act(act, [&](auto kind) {
        for (long i = 0; i < rows; i++)
            for (long c = 0; c < columns; c += LANES)
                store(y + i * y_stride + c, gated<decltype(kind)::value>(load(gate + i * stride + c, columns - c), load(up + i * stride + c, columns - c)),
                      columns - c);
    });
}

}  // namespace understudy
