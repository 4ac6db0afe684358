// Activations of rows: alone, of the pairs of a gated feed-forward, and the soft cap of logits.
#include "activation.h"

#include <algorithm>

#include "pool.h"
#include "rows.h"

using namespace understudy;

namespace {

// f(row, first column, columns) over rows of n, in pieces worth taking.
template <class F> void by_stretches(long rows, long n, F &&f) {
    constexpr long STEP = 2048;
    const long parts = (n + STEP - 1) / STEP;
    parallel(rows * parts, std::max<long>(1, 8192 / std::max<long>(n, 1)), [&](long begin, long end) {
        for (long piece = begin; piece < end; piece++) {
            const long first = piece % parts * STEP;
            f(piece / parts, first, std::min(STEP, n - first));
        }
    });
}

template <class T, class F> void each(const void *x, long stride, void *y, long rows, long n, F &&f) {
    by_stretches(rows, n, [&](long row, long first, long count) {
        const T *from = static_cast<const T *>(x) + row * stride + first;
        T *to = static_cast<T *>(y) + row * n + first;
        by_lanes(count, [&](long i, long left) { store(to + i, f(load(from + i, left)), left); });
    });
}

}  // namespace

// gate_up [rows, 2 f] -> y [rows, f]
extern "C" void understudy_gated_act(int dtype, int act, const void *gate_up, long stride, void *y, long rows, long f) {
    by_dtype(dtype, [&](auto type) {
        using T = decltype(type);
        by_stretches(rows, f, [&](long row, long first, long count) {
            const T *gate = static_cast<const T *>(gate_up) + row * stride + first;
            gated_rows(act, gate, gate + f, stride, static_cast<T *>(y) + row * f + first, f, 1, count);
        });
    });
}

extern "C" void understudy_act(int dtype, int act, const void *x, long stride, void *y, long rows, long n) {
    by_dtype(dtype, [&](auto type) {
        by_act(act, [&](auto kind) { each<decltype(type)>(x, stride, y, rows, n, [](floats v) { return activate<decltype(kind)::value>(v); }); });
    });
}

extern "C" void understudy_softcap(int dtype, const void *x, long stride, void *y, long rows, long n, float cap) {
    by_dtype(dtype, [&](auto type) {
        each<decltype(type)>(x, stride, y, rows, n, [&](floats v) { return splat(cap) * tanh(v / splat(cap)); });
    });
}
