// The gated half of a SwiGLU feed-forward, and what it shares with the experts.
#pragma once
#include <cstdlib>

#include "linear.h"
#include "simd.h"

namespace understudy {

// Memory of the calling thread that is kept from call to call.
struct Workspace {
    char *memory = nullptr;
    std::size_t bytes = 0;
    ~Workspace() { std::free(memory); }
    char *get(std::size_t needed) {
        if (needed > bytes) {
            std::free(memory);
            memory = static_cast<char *>(stream_memory(needed));
            bytes = memory ? needed : 0;
        }
        return memory;
    }
};

// y = silu(gate) * up for a rectangle of rows by columns; y may be gate. Strides count elements.
template <class T> void silu_mul(const T *gate, const T *up, long stride, T *y, long y_stride, long rows, long columns) {
    for (long i = 0; i < rows; i++) {
        for (long c = 0; c < columns; c += LANES) {
            const floats g = load(gate + i * stride + c, columns - c);
            store(y + i * y_stride + c, g * sigmoid(g) * load(up + i * stride + c, columns - c), columns - c);
        }
    }
}

}  // namespace understudy
