// How a token's experts are chosen: `workers.model.spec.Route`.
#include <algorithm>
#include <cmath>
#include <limits>

#include "pool.h"
#include "rows.h"

namespace understudy {

enum Scoring : int { SOFTMAX = 0, SIGMOID = 1, CHOSEN_SOFTMAX = 2 };

// As `workers.kernels.native` lays it out.
struct Route {
    std::int32_t top_k, scoring, renormalize, groups, top_groups, top2;
    float scale;
};

namespace {

// Makes place[0 .. count) the greatest of values[0 .. n), greatest first, of equals the lower one.
void greatest(const float *values, long n, std::int32_t *place, long count) {
    for (long j = 0; j < count; j++) {
        long best = -1;
        for (long e = 0; e < n; e++) {
            const bool taken = std::find(place, place + j, static_cast<std::int32_t>(e)) != place + j;
            if (!taken && (best < 0 || values[e] > values[best])) best = e;
        }
        place[j] = static_cast<std::int32_t>(best);
    }
}

template <class T> void score(int scoring, const T *logits, float *p, long experts) {
    if (scoring == SOFTMAX) {
        const float shift = row_max(logits, experts), total = exp_sum(logits, experts, shift);
        by_lanes(experts, [&](long i, long left) { store(p + i, exp(load(logits + i, left) - splat(shift)) / splat(total), left); });
    } else if (scoring == SIGMOID) {
        by_lanes(experts, [&](long i, long left) { store(p + i, sigmoid(load(logits + i, left)), left); });
    } else {
        by_lanes(experts, [&](long i, long left) { store(p + i, load(logits + i, left), left); });
    }
}

// Experts of groups that are not among the best become -infinity. `best` has room for `groups` ids, `marks` for as many scores.
void close_groups(const Route &route, float *choice, long experts, float *marks, std::int32_t *best) {
    const long size = experts / route.groups;
    for (long g = 0; g < route.groups; g++) {
        const float *of = choice + g * size;
        std::int32_t two[2];
        greatest(of, size, two, std::min(2L, size));
        marks[g] = route.top2 && size > 1 ? of[two[0]] + of[two[1]] : of[two[0]];
    }
    greatest(marks, route.groups, best, route.top_groups);
    for (long g = 0; g < route.groups; g++)
        if (std::find(best, best + route.top_groups, static_cast<std::int32_t>(g)) == best + route.top_groups)
            std::fill(choice + g * size, choice + (g + 1) * size, -std::numeric_limits<float>::infinity());
}

// Softmax over the chosen ones' logits.
void softmax(float *weights, long k) {
    const float most = *std::max_element(weights, weights + k);
    float total = 0.0f;
    for (long j = 0; j < k; j++) {
        weights[j] = exp(splat(weights[j] - most))[0];
        total += weights[j];
    }
    for (long j = 0; j < k; j++) weights[j] /= total;
}

// `p` has room for 4 * experts.
template <class T> void choose(const Route &route, const T *logits, const float *bias, std::int32_t *ids, float *weights, long experts, float *p) {
    score(route.scoring, logits, p, experts);
    const float *choice = p;
    if (bias || route.groups > 1) {
        float *changed = p + experts;
        for (long e = 0; e < experts; e++) changed[e] = bias ? p[e] + bias[e] : p[e];
        if (route.groups > 1) close_groups(route, changed, experts, changed + experts, reinterpret_cast<std::int32_t *>(changed + 2 * experts));
        choice = changed;
    }
    greatest(choice, experts, ids, route.top_k);
    float chosen = 0.0f;
    for (long j = 0; j < route.top_k; j++) {
        weights[j] = p[ids[j]];
        chosen += weights[j];
    }
    if (route.scoring == CHOSEN_SOFTMAX) softmax(weights, route.top_k);
    else if (route.renormalize)
        for (long j = 0; j < route.top_k; j++) weights[j] /= chosen + 1e-20f;  // sigmoids may all be 0
    for (long j = 0; j < route.top_k; j++) weights[j] *= route.scale;
}

}  // namespace
}  // namespace understudy

using namespace understudy;

// logits [rows, experts] of that dtype, bias float32 [experts] or null -> ids, weights [rows, top_k]
extern "C" void understudy_route(int dtype, const Route *route, const void *logits, long stride, const float *bias, std::int32_t *ids, float *weights,
                                 long rows, long experts) {
    by_dtype(dtype, [&](auto type) {
        using T = decltype(type);
        const long k = route->top_k;
        parallel(rows, rows_per_piece(experts * k), [&](long begin, long end) {
            auto *p = static_cast<float *>(scratch(static_cast<std::size_t>(4 * experts) * sizeof(float)));
            for (long r = begin; r < end; r++)
                choose(*route, static_cast<const T *>(logits) + r * stride, bias, ids + r * k, weights + r * k, experts, p);
        });
    });
}
