// act(x G^T) * (x U^T): gate and up of some columns are made side by side and multiplied while they are still in the core's cache, so that the
// [T, 2F] between them never goes to memory. Both are rounded to the dtype first: the bits are those of the two linears and understudy_gated_act.
#include "gated.h"

#include <algorithm>
#include <atomic>

#include "pool.h"

namespace understudy {
namespace {

constexpr long GROUP = 8;  // panels of gate and of up whose results wait in the cache

template <class T> bool gated_half(int act, const Linear &gate, const Linear &up, const Rows &rows) {
    const Kernels &kernels = kernels_of(gate);
    const Cut cut(gate, rows.m);
    const long width = GROUP * gate.width;
    std::atomic<bool> memory{true};
    parallel(cut.blocks * cut.pieces, 1, [&](long from, long to) {
        thread_local Workspace workspace;
        const long size = cut.block * width * static_cast<long>(sizeof(T));
        char *gates = workspace.get(static_cast<std::size_t>(2 * size)), *ups = gates + size;
        if (!gates) {
            memory = false;
            return;
        }
        for (long piece = from; piece < to; piece++) {
            const long row = piece / cut.pieces * cut.block, m = std::min(cut.block, rows.m - row);
            const long first = piece % cut.pieces * cut.grain, last = std::min(first + cut.grain, gate.panels);
            const T *x = static_cast<const T *>(rows.x) + row * rows.x_stride;
            T *y = static_cast<T *>(rows.y) + row * rows.y_stride;
            for (long panel = first; panel < last; panel += GROUP) {
                const long end = std::min(panel + GROUP, last), column = panel * gate.width;
                // Panels write at their columns of a whole row: the group's first column is the buffer's.
                const auto at = [&](char *buffer) { return Rows{x, rows.x_stride, reinterpret_cast<T *>(buffer) - column, width, m}; };
                kernels.multiply(gate, at(gates), panel, end);
                kernels.multiply(up, at(ups), panel, end);
                gated_rows(act, reinterpret_cast<const T *>(gates), reinterpret_cast<const T *>(ups), width, y + column, rows.y_stride, m,
                         std::min(end * gate.width, gate.n) - column);
            }
        }
    });
    return memory;
}

}  // namespace
}  // namespace understudy

using namespace understudy;

// gate and up: [F, K] of one family and dtype; y [m, F]. 0; 2: no memory.
extern "C" int understudy_gated(int act, const Linear *gate, const Linear *up, const void *x, long x_stride, void *y, long y_stride, long m) {
    if (m <= 0) return 0;
    const auto function = gate->dtype == FLOAT32 ? gated_half<float> : gate->dtype == BFLOAT16 ? gated_half<bf16> : gated_half<fp16>;
    return function(act, *gate, *up, Rows{x, x_stride, y, y_stride, m}) ? 0 : 2;
}
