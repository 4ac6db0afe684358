// y = x W^T + b with packed weights. Three families of kernels share one form; a process uses one family for all row counts, and each
// sums an output over the whole of k in ascending order in one float32 accumulator, so that its bits depend on its own row and column alone.
//
// Weights are packed once into panels of some columns, each in the order in which its kernel reads it, so that a panel is one stream of memory.
#pragma once
#include <cstdint>

#include "coded.h"
#include "simd.h"

namespace understudy {

enum Family : int { GENERIC = 0, AVX512BF16 = 1, AMX = 2 };
enum Packing : int { RAW = 0, AUTO = 1, CODED = 2 };

struct Linear {
    Family family;
    Dtype dtype;
    long n, k;
    long width;        // columns of a panel
    long panels;       // ceil(n / width)
    long raw_bytes;    // of a panel as the family packs it; a multiple of BLOCK_RAW
    long panel_bytes;  // of a panel as it is kept; a multiple of 64
    char *packed;
    float *bias;       // [panels * width], or null
    bool coded;        // whether panels are kept in twelve bits (coded.h), and
    Kept kept;         // what of them is not

    const char *panel(long index) const { return packed + index * panel_bytes; }
};

// A block of rows. `stride` counts elements; within a row elements are adjacent.
struct Rows {
    const void *x;
    long x_stride;
    void *y;
    long y_stride;
    long m;
};

// What a family provides. `pack` fills one panel, at `to`, from w [n, k]; `multiply` computes all rows for panels [begin, end) in the calling thread.
struct Kernels {
    long width;
    long (*panel_bytes)(long k);
    void (*pack)(const Linear &linear, const void *w, long w_stride, long panel, char *to);
    void (*multiply)(const Linear &linear, const Rows &rows, long begin, long end);
    // For the cache: rows that one call should get when m are to be done, and panels.
    long (*row_block)(const Linear &linear, long m);
    long panel_block;
    bool decodes;  // whether it takes coded panels
};

const Kernels *generic_kernels(Dtype dtype);
const Kernels *avx512bf16_kernels();  // null where this build or this CPU lacks them
const Kernels *amx_kernels();

const Kernels &kernels_of(const Linear &linear);

#ifdef UNDERSTUDY_CODED
// Blocks [begin, end) of a coded panel, as they were packed. Meanwhile the blocks that lie `ahead` bytes further on are asked for (0: none).
void decode(const Linear &linear, long panel, long begin, long end, std::uint16_t *out, long ahead);

// The blocks within [begin, end) of a panel that are kept apart, one after another.
class KeptBlocks {
  public:
    KeptBlocks() = default;
    KeptBlocks(const Linear &linear, long panel, long begin, long end);

    // How far after `begin` the next one is; where there is none, beyond any end.
    long next() const { return at_ < end_ ? kept_->block[static_cast<std::size_t>(at_)] - begin_ : kNone; }
    Values take() {
        Values values;
        std::memcpy(&values, kept_->values.data() + at_++ * BLOCK, sizeof values);
        return values;
    }

  private:
    static constexpr long kNone = 1L << 40;
    const Kept *kept_ = nullptr;
    long begin_ = 0, at_ = 0, end_ = 0;
};
#endif

// Memory for something that is read as one stream: aligned to 2 MiB and on huge pages where it is large. Null when there is none.
void *stream_memory(std::size_t bytes);

// How m rows and a weight's panels are cut into rectangles for the threads: `blocks` of `block` rows by `pieces` of `grain` panels.
struct Cut {
    long block, blocks, grain, pieces;

    Cut(const Linear &linear, long m);
};

// The family's kernel over rows and panels, shared among the threads.
void multiply(const Linear &linear, const Rows &rows);

}  // namespace understudy
