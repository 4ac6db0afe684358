#include "linear.h"

#include <malloc.h>
#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <memory>
#include <vector>

#include "pool.h"

namespace understudy {

const Kernels &kernels_of(const Linear &linear) {
    if (linear.family == AMX) return *amx_kernels();
    if (linear.family == AVX512BF16) return *avx512bf16_kernels();
    return *generic_kernels(linear.dtype);
}

void *stream_memory(std::size_t bytes) {
    const std::size_t huge = std::size_t{2} << 20, align = bytes >= huge ? huge : 64;
    const std::size_t size = (bytes + align - 1) / align * align;
    void *memory = std::aligned_alloc(align, std::max(size, align));
#ifdef MADV_HUGEPAGE
    if (memory && align == huge) madvise(memory, size, MADV_HUGEPAGE);  // a hint: without it reading is slower, not wrong
#endif
    return memory;
}

Cut::Cut(const Linear &linear, long m) {
    const Kernels &kernels = kernels_of(linear);
    const long most = kernels.row_block(linear, m), even = (m + most - 1) / most;
    block = even > 1 ? ((m + even - 1) / even + 31) / 32 * 32 : m;
    blocks = (m + block - 1) / block;
    // Few rows: the weights are read once, in pieces worth taking. Many: rectangles that fit the cache, some for each thread.
    if (m <= 32) {
        pieces = std::max(linear.panels * linear.panel_bytes >> 18, std::min(linear.panels, 8L * threads()));
    } else {
        const long least = std::max((linear.panels + kernels.panel_block - 1) / kernels.panel_block, (4L * threads() + blocks - 1) / blocks);
        pieces = (least + threads() - 1) / threads() * threads();
    }
    grain = std::max<long>(1, linear.panels / std::max<long>(pieces, 1));
    pieces = (linear.panels + grain - 1) / grain;
}

void multiply(const Linear &linear, const Rows &rows) {
    if (rows.m <= 0) return;
    const Kernels &kernels = kernels_of(linear);
    const Cut cut(linear, rows.m);
    const long bytes = size_of(linear.dtype);
    parallel(cut.blocks * cut.pieces, 1, [&](long from, long to) {
        for (long piece = from; piece < to; piece++) {
            const long row = piece / cut.pieces * cut.block, panel = piece % cut.pieces * cut.grain;
            const Rows part{static_cast<const char *>(rows.x) + row * rows.x_stride * bytes, rows.x_stride,
                            static_cast<char *>(rows.y) + row * rows.y_stride * bytes, rows.y_stride, std::min(cut.block, rows.m - row)};
            kernels.multiply(linear, part, panel, std::min(panel + cut.grain, linear.panels));
        }
    });
}

namespace {

constexpr long LARGE = 1 << 20;  // bytes; what is smaller tends to stay in a cache, from where reading takes less time than decoding

bool allocate_panels(Linear &linear, long panel_bytes) {
    linear.panel_bytes = panel_bytes;
    linear.packed = static_cast<char *>(stream_memory(static_cast<std::size_t>(linear.panels * panel_bytes)));
    return linear.packed;
}

bool copy_bias(Linear &linear, const void *bias) {
    const long columns = linear.panels * linear.width;
    linear.bias = static_cast<float *>(stream_memory(static_cast<std::size_t>(columns) * sizeof(float)));
    if (!linear.bias) return false;
    std::fill_n(linear.bias, columns, 0.0f);
    for (long i = 0; i < linear.n; i += LANES) {
        const long left = linear.n - i;
        floats v;
        if (linear.dtype == FLOAT32) v = load(static_cast<const float *>(bias) + i, left);
        else if (linear.dtype == BFLOAT16) v = load(static_cast<const bf16 *>(bias) + i, left);
        else v = load(static_cast<const fp16 *>(bias) + i, left);
        store(linear.bias + i, v, left);
    }
    return true;
}

// Packs in twelve bits. Where too many blocks would have to be kept as they are, it frees what it made and clears `coded`. False: no memory.
bool pack_coded(Linear &linear, const Kernels &kernels, const void *w, long w_stride) {
    const long blocks = linear.raw_bytes / BLOCK_RAW, most = linear.panels * blocks / 16;
    if (!allocate_panels(linear, coded_bytes(linear.raw_bytes))) return false;
    std::vector<std::vector<std::int32_t>> kept(static_cast<std::size_t>(linear.panels));
    std::vector<std::vector<std::uint16_t>> values(kept.size());
    std::atomic<long> count{0};
    parallel(linear.panels, 1, [&](long from, long to) {
        auto *raw = static_cast<std::uint16_t *>(scratch(static_cast<std::size_t>(linear.raw_bytes)));
        for (long panel = from; panel < to && count <= most; panel++) {
            auto &own = kept[static_cast<std::size_t>(panel)];
            kernels.pack(linear, w, w_stride, panel, reinterpret_cast<char *>(raw));
            encode(raw, blocks, linear.packed + panel * linear.panel_bytes, own);
            auto &whole = values[static_cast<std::size_t>(panel)];
            for (const std::int32_t block : own) whole.insert(whole.end(), raw + block * BLOCK, raw + (block + 1) * BLOCK);
            count += static_cast<long>(own.size());
        }
    });
    if (count > most) {
        std::free(linear.packed);
        linear.packed = nullptr;
        linear.coded = false;
        return true;
    }
    linear.kept.start.push_back(0);
    for (std::size_t panel = 0; panel < kept.size(); panel++) {
        linear.kept.block.insert(linear.kept.block.end(), kept[panel].begin(), kept[panel].end());
        linear.kept.values.insert(linear.kept.values.end(), values[panel].begin(), values[panel].end());
        linear.kept.start.push_back(static_cast<std::int64_t>(linear.kept.block.size()));
    }
    return true;
}

}  // namespace
}  // namespace understudy

using namespace understudy;

extern "C" void understudy_linear_free(Linear *linear) {
    if (!linear) return;
    std::free(linear->packed);
    std::free(linear->bias);
    delete linear;
}

// Asks the C library to keep freed memory up to 1 GB instead of handing it back: a step's activations would else be fresh pages in every
// layer, and clearing those takes as long as some of the products that fill them.
extern "C" void understudy_keep_memory() {
#ifdef __GLIBC__
    mallopt(M_MMAP_THRESHOLD, 32 << 20);  // the largest it takes
    mallopt(M_TRIM_THRESHOLD, 1 << 30);
    mallopt(M_TOP_PAD, 64 << 20);
#endif
}

// Whether this build, on this CPU, has the family.
extern "C" int understudy_has_family(int family) {
    if (family == AMX) return amx_kernels() != nullptr;
    if (family == AVX512BF16) return avx512bf16_kernels() != nullptr;
    return family == GENERIC;
}

// Packs w [n, k] (rows w_stride elements apart) and bias [n] (or null), both of that dtype. Null when there is no memory.
extern "C" Linear *understudy_linear_new(int family, int dtype, const void *w, long n, long k, long w_stride, const void *bias, int packing) {
    std::unique_ptr<Linear, decltype(&understudy_linear_free)> linear(new Linear{}, understudy_linear_free);
    linear->family = static_cast<Family>(family);
    linear->dtype = static_cast<Dtype>(dtype);
    linear->n = n;
    linear->k = k;
    const Kernels &kernels = kernels_of(*linear);
    linear->width = kernels.width;
    linear->panels = (n + kernels.width - 1) / kernels.width;
    linear->raw_bytes = kernels.panel_bytes(k);
    if (bias && !copy_bias(*linear, bias)) return nullptr;
    linear->coded = kernels.decodes && (packing == CODED || (packing == AUTO && linear->panels * linear->raw_bytes >= LARGE));
    if (linear->coded) {
        if (!pack_coded(*linear, kernels, w, w_stride)) return nullptr;
        if (linear->coded) return linear.release();
    }
    if (!allocate_panels(*linear, linear->raw_bytes)) return nullptr;
    parallel(linear->panels, 1, [&](long from, long to) {
        for (long panel = from; panel < to; panel++) kernels.pack(*linear, w, w_stride, panel, linear->packed + panel * linear->panel_bytes);
    });
    return linear.release();
}

// Bytes that a linear occupies.
extern "C" long understudy_linear_bytes(const Linear *linear) {
    return linear->panels * linear->panel_bytes + static_cast<long>(linear->kept.values.size() * sizeof(std::uint16_t));
}

extern "C" void understudy_linear(const Linear *linear, const void *x, long x_stride, void *y, long y_stride, long m) {
    multiply(*linear, Rows{x, x_stride, y, y_stride, m});
}
