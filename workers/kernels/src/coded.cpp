#include "coded.h"

#include <algorithm>
#include <numeric>

#include "linear.h"

namespace understudy {
namespace {

constexpr int BYTES = 256, BOOK = 16, ABSENT = 255;

// The place of a value's byte in its half of a block, such that Reader's interleaving gives values in order.
int place(int value) { return value < 8 || value >= 24 ? value : value < 16 ? value + 8 : value - 8; }

// The most frequent upper bytes, and the place of each byte among them, ABSENT for the others.
void make_book(const std::uint16_t *values, long count, std::uint8_t (&book)[BOOK], std::uint8_t (&place_of)[BYTES]) {
    long seen[4][BYTES] = {};  // four, so that equal bytes in a row do not wait for each other
    for (long i = 0; i < count; i++) seen[i & 3][values[i] >> 8]++;
    int order[BYTES];
    std::iota(order, order + BYTES, 0);
    for (int b = 0; b < BYTES; b++) seen[0][b] += seen[1][b] + seen[2][b] + seen[3][b];
    std::partial_sort(order, order + BOOK, order + BYTES, [&](int a, int b) { return seen[0][a] != seen[0][b] ? seen[0][a] > seen[0][b] : a < b; });
    std::fill_n(place_of, BYTES, static_cast<std::uint8_t>(ABSENT));
    for (int i = 0; i < BOOK; i++) {
        book[i] = static_cast<std::uint8_t>(order[i]);
        place_of[order[i]] = static_cast<std::uint8_t>(i);
    }
}

}  // namespace

void encode(const std::uint16_t *values, long blocks, char *panel, std::vector<std::int32_t> &kept) {
    std::uint8_t book[BOOK], place_of[BYTES];
    make_book(values, blocks * BLOCK, book, place_of);
    std::memset(panel, 0, BOOK_BYTES);
    std::memcpy(panel, book, sizeof book);
    for (long b = 0; b < blocks; b++) {
        const std::uint16_t *from = values + b * BLOCK;
        auto *bytes = reinterpret_cast<std::uint8_t *>(panel + BOOK_BYTES + b * BLOCK_BYTES), *places = bytes + BLOCK;
        bool absent = false;
        for (int i = 0; i < BLOCK / 2; i++) {
            const std::uint16_t a = from[i], z = from[i + BLOCK / 2];
            const std::uint8_t low = place_of[a >> 8], high = place_of[z >> 8];
            const int at = place(i);
            bytes[at] = static_cast<std::uint8_t>(a);
            bytes[at + BLOCK / 2] = static_cast<std::uint8_t>(z);
            places[at] = static_cast<std::uint8_t>((low & 0x0f) | (high & 0x0f) << 4);
            absent |= low == ABSENT || high == ABSENT;
        }
        if (absent) kept.push_back(static_cast<std::int32_t>(b));
    }
}

#ifdef UNDERSTUDY_CODED
KeptBlocks::KeptBlocks(const Linear &linear, long panel, long begin, long end) : kept_(&linear.kept), begin_(begin) {
    const auto &block = kept_->block;
    const auto first = block.begin() + kept_->start[static_cast<std::size_t>(panel)], last = block.begin() + kept_->start[static_cast<std::size_t>(panel) + 1];
    at_ = std::lower_bound(first, last, begin) - block.begin();
    end_ = std::lower_bound(first, last, end) - block.begin();
}

void decode(const Linear &linear, long panel, long begin, long end, std::uint16_t *out, long ahead) {
    const Reader reader(linear.panel(panel));
    for (long block = begin; block < end; block++) {
        if (ahead) reader.prefetch(block, ahead);
        const Values values = reader.read(block);
        for (int i = 0; i < 4; i++)  // one by one: compilers take a copy of all four through the stack
            _mm256_storeu_si256(reinterpret_cast<__m256i *>(out + (block - begin) * BLOCK + 16 * i), values.part[i]);
    }
    KeptBlocks kept(linear, panel, begin, end);
    for (long next = kept.next(); next < end - begin; next = kept.next()) {
        const Values values = kept.take();
        std::memcpy(out + next * BLOCK, &values, sizeof values);
    }
}
#endif

}  // namespace understudy
