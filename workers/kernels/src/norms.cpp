// RMSNorm and LayerNorm.
#include <cmath>

#include "pool.h"
#include "rows.h"

namespace understudy {
namespace {

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

// A weight of T meets the normed value rounded to T, a float32 one (where T is not) the value itself.
template <class T, class W> void normalize(const T *x, const W *weight, T *y, long h, float sum_of_squares, float eps) {
    const floats scale = splat(1.0f / std::sqrt(sum_of_squares / static_cast<float>(h) + eps));
    by_lanes(h, [&](long i, long left) { store(y + i, load(weight + i, left) * round_to<W>(load(x + i, left) * scale), left); });
}

template <class T, class W> void layer_norm(const T *x, const W *weight, const W *bias, T *y, long h, float eps) {
    const float n = static_cast<float>(h), mean = row_sum(h, [&](long i, long left) { return load(x + i, left); }) / n;
    const float squared = row_sum(h, [&](long i, long left) {
        float lanes[LANES] = {};
        store(lanes, load(x + i, left) - splat(mean), left);  // beyond the row's end 0 stays
        const floats v = widen(lanes);
        return v * v;
    });
    const floats scale = splat(1.0f / std::sqrt(squared / n + eps));
    by_lanes(h, [&](long i, long left) {
        floats v = (load(x + i, left) - splat(mean)) * scale * load(weight + i, left);
        if (bias) v = v + load(bias + i, left);
        store(y + i, v, left);
    });
}

// f(a value of the dtype, a value of the weight's).
template <class F> void by_dtypes(int dtype, int wide, F &&f) {
    by_dtype(dtype, [&](auto type) {
        if (wide) f(type, float{});
        else f(type, type);
    });
}

}  // namespace
}  // namespace understudy

using namespace understudy;

// All strides count elements.

// `wide`: the weight is float32, whatever the dtype.
extern "C" void understudy_rms_norm(int dtype, int wide, const void *x, long x_stride, const void *weight, void *y, long rows, long h, float eps) {
    by_dtypes(dtype, wide, [&](auto type, auto weights) {
        using T = decltype(type);
        using W = decltype(weights);
        parallel(rows, rows_per_piece(h), [&](long begin, long end) {
            for (long r = begin; r < end; r++) {
                const T *row = static_cast<const T *>(x) + r * x_stride;
                normalize(row, static_cast<const W *>(weight), static_cast<T *>(y) + r * h, h, squares(row, h), eps);
            }
        });
    });
}

extern "C" void understudy_add_rms_norm(int dtype, int wide, const void *x, long x_stride, void *residual, long residual_stride, const void *weight,
                                        void *y, long rows, long h, float eps) {
    by_dtypes(dtype, wide, [&](auto type, auto weights) {
        using T = decltype(type);
        using W = decltype(weights);
        parallel(rows, rows_per_piece(h), [&](long begin, long end) {
            for (long r = begin; r < end; r++) {
                T *sums = static_cast<T *>(residual) + r * residual_stride;
                const float squared = add_squares(static_cast<const T *>(x) + r * x_stride, sums, h);
                normalize(sums, static_cast<const W *>(weight), static_cast<T *>(y) + r * h, h, squared, eps);
            }
        });
    });
}

// bias: null where there is none.
extern "C" void understudy_layer_norm(int dtype, int wide, const void *x, long x_stride, const void *weight, const void *bias, void *y, long rows,
                                      long h, float eps) {
    by_dtypes(dtype, wide, [&](auto type, auto weights) {
        using T = decltype(type);
        using W = decltype(weights);
        parallel(rows, rows_per_piece(h), [&](long begin, long end) {
            for (long r = begin; r < end; r++)
                layer_norm(static_cast<const T *>(x) + r * x_stride, static_cast<const W *>(weight), static_cast<const W *>(bias),
                           static_cast<T *>(y) + r * h, h, eps);
        });
    });
}
