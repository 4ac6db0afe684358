// bfloat16 weights in twelve bits, without loss. The upper bytes of a panel's weights (sign and upper exponent) are few: a book names the
// sixteen most frequent ones, and a block of 64 values holds for each its lower byte and its upper byte's place in the book (half a byte).
// A block with any other upper byte is kept as it was, beside its panel. A step that is bound by reading weights then takes three quarters of
// the time; what is decoded is what was packed, so that no bit of a result changes. (That exponents carry about 2.6 bits is known from
// DFloat11, arXiv:2504.11651, which stores them in codes of many lengths; one length is decoded by a table in a register.)
#pragma once
#include <cstdint>
#include <cstring>
#include <vector>

#include "simd.h"

#if defined(__AVX2__)
#define UNDERSTUDY_CODED
#endif

namespace understudy {

constexpr long BLOCK = 64;              // values
constexpr long BLOCK_BYTES = 96;        // 64 lower bytes, 32 of places
constexpr long BLOCK_RAW = 2 * BLOCK;   // bytes of a block as it was
constexpr long BOOK_BYTES = 64;         // of which 16 are used

// Blocks that their panel's book cannot write: of panel p those numbered [start[p], start[p + 1]), by place in ascending order.
struct Kept {
    std::vector<std::int64_t> start;
    std::vector<std::int32_t> block;
    std::vector<std::uint16_t> values;  // BLOCK of each
};

constexpr long coded_bytes(long raw_bytes) { return BOOK_BYTES + (raw_bytes / BLOCK_RAW * BLOCK_BYTES + 63) / 64 * 64; }

// Writes `blocks` blocks of values as one panel, and the places of the blocks that must be kept to `kept`.
void encode(const std::uint16_t *values, long blocks, char *panel, std::vector<std::int32_t> &kept);

#ifdef UNDERSTUDY_CODED
// The 64 values of a block, 16 in each vector.
struct Values {
    __m256i part[4];
};

// Reads the blocks of one panel. What it gives for a block that is kept elsewhere means nothing.
class Reader {
  public:
    explicit Reader(const char *panel) : blocks_(panel + BOOK_BYTES) {
        book_ = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i *>(panel)));
    }

    Values read(long block) const {
        const char *at = blocks_ + block * BLOCK_BYTES;
        const __m256i half = _mm256_set1_epi8(0x0f), places = load(at + 64);
        Values values;
        join(load(at), _mm256_and_si256(places, half), values.part);
        join(load(at + 32), _mm256_and_si256(_mm256_srli_epi16(places, 4), half), values.part + 2);
        return values;
    }

    // Asks for the block that lies `bytes` further on.
    void prefetch(long block, long bytes) const {
        const char *at = blocks_ + block * BLOCK_BYTES + bytes;
        _mm_prefetch(at, _MM_HINT_T0);
        _mm_prefetch(at + 64, _MM_HINT_T0);
    }

  private:
    static __m256i load(const char *p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i *>(p)); }

    void join(__m256i lower, __m256i places, __m256i *out) const {
        const __m256i upper = _mm256_shuffle_epi8(book_, places);
        out[0] = _mm256_unpacklo_epi8(lower, upper);
        out[1] = _mm256_unpackhi_epi8(lower, upper);
    }

    const char *blocks_;
    __m256i book_;
};
#endif

}  // namespace understudy
