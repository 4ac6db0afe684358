// The gated experts of one layer. Rows are sorted by expert, so that each chosen expert's weights are read once and no other's at all;
// gate and up with the activation between, then down, then every row's weighted outputs are added in the order of its slots.
#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <type_traits>
#include <vector>

#include "linear.h"
#include "pool.h"
#include "gated.h"

namespace understudy {

struct Experts {
    std::vector<Linear *> gate, up, down;
    int act;
};

namespace {

constexpr long WIDE = 32;  // columns added at a time
typedef float eight __attribute__((vector_size(32)));
typedef std::uint32_t eight_words __attribute__((vector_size(32)));
typedef std::uint16_t eight_halves __attribute__((vector_size(16)));

// Slot s = t * k + j of the gate's choice stands at place[s] among the rows sorted by expert; expert e has rows [start[e], start[e + 1]).
struct Order {
    std::vector<long> start, place;

    Order(const std::int32_t *ids, long slots, long experts) : start(experts + 1, 0), place(slots) {
        for (long s = 0; s < slots; s++) start[ids[s] + 1]++;
        for (long e = 0; e < experts; e++) start[e + 1] += start[e];
        std::vector<long> next(start.begin(), start.end() - 1);
        for (long s = 0; s < slots; s++) place[s] = next[ids[s]]++;
    }
};

// y = the sum over slots j, in order, of weights[j] * row_of(j), rounded once. The one place where slots are added: experts that were
// computed elsewhere have the bits of those that were computed here.
template <class T, class RowOf> void add_slots(RowOf &&row_of, T *y, const float *weights, long k, long h) {
    long c = 0;
    for (; std::is_same_v<T, bf16> && c + WIDE <= h; c += WIDE) {  // as below, in a shape that compilers keep in registers
        eight sums[WIDE / 8] = {};
        for (long j = 0; j < k; j++) {
            const T *row = row_of(j) + c;
            const float w = weights[j];
            for (long i = 0; i < WIDE / 8; i++) {
                eight_halves bits;
                std::memcpy(&bits, row + 8 * i, sizeof bits);
                sums[i] = sums[i] + eight{w, w, w, w, w, w, w, w} * reinterpret_cast<eight>(__builtin_convertvector(bits, eight_words) << 16);
            }
        }
        for (long i = 0; i < WIDE; i += LANES) store(y + c + i, widen(reinterpret_cast<const float *>(sums) + i), LANES);
    }
    for (; c < h; c += LANES) {
        floats sum = splat(0.0f);
        for (long j = 0; j < k; j++) sum = sum + splat(weights[j]) * load(row_of(j) + c, h - c);
        store(y + c, sum, h - c);
    }
}

template <class T> void combine(const void *slots, void *y, const float *weights, long t, long k, long h) {
    parallel(t, 16, [&](long begin, long end) {
        for (long i = begin; i < end; i++) {
            const T *row = static_cast<const T *>(slots) + i * k * h;
            add_slots([&](long j) { return row + j * h; }, static_cast<T *>(y) + i * h, weights + i * k, k, h);
        }
    });
}

// Calls f(expert, first panel, last panel + 1) for all panels of all experts that have rows.
template <class F> void each_chosen(const std::vector<Linear *> &linears, const Order &order, F &&f) {
    std::vector<long> chosen;
    for (std::size_t e = 0; e < linears.size(); e++)
        if (order.start[e + 1] > order.start[e]) chosen.push_back(static_cast<long>(e));
    if (chosen.empty()) return;
    const Linear &any = *linears[0];
    const long rows = order.start.back() / static_cast<long>(chosen.size());  // a typical expert's
    const long least = rows <= 32 ? (1L << 16) / any.panel_bytes : std::min<long>(4, any.panels / threads());
    const long grain = std::max<long>(1, least), pieces = (any.panels + grain - 1) / grain;
    parallel(static_cast<long>(chosen.size()) * pieces, 1, [&](long from, long to) {
        for (long piece = from; piece < to; piece++) {
            const long panel = piece % pieces * grain;
            f(chosen[static_cast<std::size_t>(piece / pieces)], panel, std::min(panel + grain, any.panels));
        }
    });
}

// Slot s takes row rows[s] of x, or row s / k where `rows` is null.
template <class T>
bool run(const Experts &experts, const void *x, long x_stride, const std::int32_t *rows, void *y, long y_stride, const std::int32_t *ids,
         const float *weights, long t, long k) {
    const Linear &first = *experts.gate[0];
    const long h = first.k, f = first.n, slots = t * k;
    if (slots == 0) return true;
    thread_local Workspace workspace;
    const long row_h = h * static_cast<long>(sizeof(T)), row_f = f * static_cast<long>(sizeof(T));
    const auto padded = [](long bytes) { return (bytes + 63) / 64 * 64; };
    char *input = workspace.get(static_cast<std::size_t>(2 * padded(slots * row_h) + 2 * padded(slots * row_f)));
    if (!input) return false;
    char *gate = input + padded(slots * row_h), *up = gate + padded(slots * row_f), *output = up + padded(slots * row_f);
    const Order order(ids, slots, static_cast<long>(experts.gate.size()));
    parallel(slots, 64, [&](long begin, long end) {
        for (long s = begin; s < end; s++) {
            const long row = rows ? rows[s] : s / k;
            std::memcpy(input + order.place[s] * row_h, static_cast<const T *>(x) + row * x_stride, static_cast<std::size_t>(row_h));
        }
    });
    const Kernels &kernels = kernels_of(first);
    each_chosen(experts.gate, order, [&](long e, long begin, long end) {
        const long row = order.start[e], m = order.start[e + 1] - row;
        kernels.multiply(*experts.gate[e], Rows{input + row * row_h, h, gate + row * row_f, f, m}, begin, end);
        kernels.multiply(*experts.up[e], Rows{input + row * row_h, h, up + row * row_f, f, m}, begin, end);
        const long column = begin * first.width;
        T *gates = reinterpret_cast<T *>(gate + row * row_f) + column;
        gated_rows(experts.act, gates, reinterpret_cast<const T *>(up + row * row_f) + column, f, gates, f, m, std::min(end * first.width, f) - column);
    });
    each_chosen(experts.down, order, [&](long e, long begin, long end) {
        const long row = order.start[e], m = order.start[e + 1] - row;
        kernels.multiply(*experts.down[e], Rows{gate + row * row_f, f, output + row * row_h, h, m}, begin, end);
    });
    parallel(t, 16, [&](long begin, long end) {
        for (long i = begin; i < end; i++) {
            const T *computed = reinterpret_cast<const T *>(output);
            const long *place = &order.place[i * k];
            add_slots([&](long j) { return computed + place[j] * h; }, static_cast<T *>(y) + i * y_stride, weights + i * k, k, h);
        }
    });
    return true;
}

}  // namespace
}  // namespace understudy

using namespace understudy;

// `linears`: gate, up and down of each expert, 3 * count of them, which stay the caller's.
extern "C" Experts *understudy_experts_new(Linear *const *linears, long count, int act) {
    Experts *experts = new Experts;
    experts->act = act;
    for (long e = 0; e < count; e++) {
        experts->gate.push_back(linears[3 * e]);
        experts->up.push_back(linears[3 * e + 1]);
        experts->down.push_back(linears[3 * e + 2]);
    }
    return experts;
}

extern "C" void understudy_experts_free(Experts *experts) { delete experts; }

// x [t, H], ids and weights [t, k], y [t, H]. 0; 1: an id names no expert; 2: no memory.
extern "C" int understudy_experts(const Experts *experts, const void *x, long x_stride, void *y, long y_stride, const std::int32_t *ids,
                                  const float *weights, long t, long k) {
    const auto count = static_cast<std::int32_t>(experts->gate.size());
    if (std::any_of(ids, ids + t * k, [&](std::int32_t id) { return id < 0 || id >= count; })) return 1;
    const Dtype dtype = experts->gate[0]->dtype;
    const auto function = dtype == FLOAT32 ? run<float> : dtype == BFLOAT16 ? run<bf16> : run<fp16>;
    return function(*experts, x, x_stride, nullptr, y, y_stride, ids, weights, t, k) ? 0 : 2;
}

// y [slots, H]: expert ids[s] of row rows[s] of x [t, H], as understudy_experts has it for k = 1 and the weight 1. 0; 1: an id names no
// expert; 2: no memory; 3: there is no such row.
extern "C" int understudy_expert_slots(const Experts *experts, const void *x, long x_stride, long t, const std::int32_t *rows,
                                       const std::int32_t *ids, void *y, long y_stride, long slots) {
    const auto count = static_cast<std::int32_t>(experts->gate.size());
    if (std::any_of(ids, ids + slots, [&](std::int32_t id) { return id < 0 || id >= count; })) return 1;
    if (std::any_of(rows, rows + slots, [&](std::int32_t row) { return row < 0 || row >= t; })) return 3;
    const std::vector<float> ones(static_cast<std::size_t>(slots), 1.0f);
    const Dtype dtype = experts->gate[0]->dtype;
    const auto function = dtype == FLOAT32 ? run<float> : dtype == BFLOAT16 ? run<bf16> : run<fp16>;
    return function(*experts, x, x_stride, rows, y, y_stride, ids, ones.data(), slots, 1) ? 0 : 2;
}

// slots [t, k, H], weights [t, k], y [t, H]: what understudy_experts does with the outputs of the chosen experts.
extern "C" void understudy_combine(int dtype, const void *slots, void *y, const float *weights, long t, long k, long h) {
    const auto function = dtype == FLOAT32 ? combine<float> : dtype == BFLOAT16 ? combine<bf16> : combine<fp16>;
    function(slots, y, weights, t, k, h);
}
