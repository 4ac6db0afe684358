// Collectives between processes of one machine, through memory that all of them have mapped.
//
// Every operation has a number, the same at every rank. A rank writes what it gives into its slot of the operation's half of the memory
// (halves take turns), publishes the number, and waits for the others' numbers. It may write into a half again only once every rank has
// reached the operation before: then nobody reads that half any more. Numbers go round after 2^32; differences are what counts.
//
// A rank that waits spins for a while, then sleeps on the number it waits for (a futex; elsewhere it yields), and looks now and then whether
// the group is broken or the process that it waits for is gone.
#include <cerrno>
#include <csignal>
#include <ctime>

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include <sched.h>
#include <sys/types.h>
#include <unistd.h>
#ifdef __linux__
#include <linux/futex.h>
#include <sys/syscall.h>
#endif

#include "pool.h"
#include "simd.h"

namespace understudy {
namespace {

constexpr int MOST_RANKS = 64;
constexpr long LINE = 64;

struct alignas(64) Rank {
    std::atomic<std::uint32_t> number;   // of the latest operation that it has published
    std::atomic<std::uint32_t> sleepers;
    std::atomic<std::int32_t> process;   // 0: not there yet
    std::int64_t bytes[2];               // what it gave, by half
};

struct alignas(64) Header {
    std::int64_t size, capacity, spins;
    std::atomic<std::int32_t> broken;    // 1 + the rank that is to blame
};

struct Group {
    Header *header;
    Rank *ranks;
    char *data;

    explicit Group(char *base)
        : header(reinterpret_cast<Header *>(base)), ranks(reinterpret_cast<Rank *>(base + sizeof(Header))),
          data(base + sizeof(Header) + MOST_RANKS * sizeof(Rank)) {}

    long size() const { return header->size; }
    char *slot(std::uint32_t number, long rank) const { return data + ((number & 1) * header->size + rank) * header->capacity; }
};

enum Outcome : int { DONE = 0, BROKEN = 1, GONE = 2, LATE = 3 };

inline void pause_cpu() {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

void sleep_on(std::atomic<std::uint32_t> &word, std::uint32_t seen, long milliseconds) {
#ifdef __linux__
    timespec time{milliseconds / 1000, milliseconds % 1000 * 1000000};
    syscall(SYS_futex, reinterpret_cast<std::uint32_t *>(&word), FUTEX_WAIT, seen, &time, nullptr, 0);
#else
    if (word.load() == seen) sched_yield();
#endif
}

void wake(std::atomic<std::uint32_t> &word) {
#ifdef __linux__
    syscall(SYS_futex, reinterpret_cast<std::uint32_t *>(&word), FUTEX_WAKE, INT32_MAX, nullptr, nullptr, 0);
#endif
}

std::int64_t now_ms() {
    timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec * 1000LL + time.tv_nsec / 1000000;
}

bool reached(const Rank &rank, std::uint32_t number) {
    return static_cast<std::int32_t>(rank.number.load(std::memory_order_acquire) - number) >= 0;
}

// Until `rank` has published `number`. `limit_ms` 0: as long as it takes.
Outcome wait_for(const Group &group, long rank, std::uint32_t number, long limit_ms) {
    Rank &other = group.ranks[rank];
    for (long i = 0; i < group.header->spins; i++) {
        if (reached(other, number)) return DONE;
        pause_cpu();
    }
    const std::int64_t begin = now_ms();
    while (!reached(other, number)) {
        if (group.header->broken.load()) return BROKEN;
        other.sleepers.fetch_add(1);
        const std::uint32_t seen = other.number.load();
        if (static_cast<std::int32_t>(seen - number) < 0) sleep_on(other.number, seen, 50);
        other.sleepers.fetch_sub(1);
        if (reached(other, number)) break;
        const std::int32_t process = other.process.load();
        if (process && kill(process, 0) != 0 && errno == ESRCH) return GONE;
        if (limit_ms && now_ms() - begin > limit_ms) return LATE;
    }
    return group.header->broken.load() ? BROKEN : DONE;
}

// `culprit` becomes the rank that is gone, late, or to blame.
Outcome wait_all(const Group &group, long self, std::uint32_t number, long limit_ms, long *culprit) {
    for (long rank = 0; rank < group.size(); rank++) {
        if (rank == self) continue;
        const Outcome outcome = wait_for(group, rank, number, limit_ms);
        if (outcome == DONE) continue;
        std::int32_t none = 0;
        if (outcome != BROKEN) group.header->broken.compare_exchange_strong(none, static_cast<std::int32_t>(rank + 1));
        *culprit = group.header->broken.load() - 1;
        return outcome;
    }
    return DONE;
}

void publish(const Group &group, long rank, std::uint32_t number) {
    Rank &mine = group.ranks[rank];
    mine.number.store(number);
    if (mine.sleepers.load()) wake(mine.number);
}

constexpr long MOST_SUMMED = 16;

// y [columns] of one row = the slots' sum over their tree, plus bias, rounded once.
template <class In, class Out> void sum_row(const In *const *parts, long count, Out *y, const float *bias, long columns) {
    for (long c = 0; c < columns; c += LANES) {
        floats sums[MOST_SUMMED];
        for (long p = 0; p < count; p++) sums[p] = load(parts[p] + c, columns - c);
        for (long step = 1; step < count; step *= 2)
            for (long a = 0; a + step < count; a += 2 * step) sums[a] = sums[a] + sums[a + step];
        if (bias) sums[0] = sums[0] + load(bias + c, columns - c);
        store(y + c, sums[0], columns - c);
    }
}

template <class In, class Out>
void sum_rows(const char *const *parts, long count, void *y, const float *bias, long rows, long columns) {
    parallel(rows, std::max<long>(1, 8192 / columns), [&](long begin, long end) {
        for (long row = begin; row < end; row++) {
            const In *each[MOST_SUMMED];
            for (long p = 0; p < count; p++) each[p] = reinterpret_cast<const In *>(parts[p]) + row * columns;
            sum_row(each, count, static_cast<Out *>(y) + row * columns, bias, columns);
        }
    });
}

template <class F> bool by_pair(int in, int out, F &&f) {
    if (in == out && in == FLOAT32) return f(float{}, float{}), true;
    if (in == BFLOAT16 && out == BFLOAT16) return f(bf16{}, bf16{}), true;
    if (in == FLOAT16 && out == FLOAT16) return f(fp16{}, fp16{}), true;
    if (in == FLOAT32 && out == BFLOAT16) return f(float{}, bf16{}), true;
    if (in == FLOAT32 && out == FLOAT16) return f(float{}, fp16{}), true;
    return false;
}

}  // namespace
}  // namespace understudy

using namespace understudy;

// Bytes of memory for `size` ranks that give at most `capacity` bytes at a time (a multiple of 64); 0: that cannot be.
extern "C" long understudy_group_bytes(long size, long capacity) {
    if (size < 1 || size > MOST_SUMMED || capacity < LINE || capacity % LINE) return 0;
    return static_cast<long>(sizeof(Header) + MOST_RANKS * sizeof(Rank)) + 2 * size * capacity;
}

// Of zeroed memory, by rank 0. `spins`: how often a rank looks before it sleeps.
extern "C" void understudy_group_make(char *base, long size, long capacity, long spins) {
    Group group(base);
    group.header->size = size;
    group.header->spins = spins;
    group.header->capacity = capacity;
}

// This process is that rank.
extern "C" void understudy_group_join(char *base, long rank) { Group(base).ranks[rank].process.store(getpid()); }

// How many ranks are there.
extern "C" long understudy_group_joined(char *base) {
    const Group group(base);
    long count = 0;
    for (long rank = 0; rank < group.size(); rank++) count += group.ranks[rank].process.load() != 0;
    return count;
}

// Nobody waits any longer. `rank` is to blame.
extern "C" void understudy_group_break(char *base, long rank) {
    const Group group(base);
    std::int32_t none = 0;
    group.header->broken.compare_exchange_strong(none, static_cast<std::int32_t>(rank + 1));
    for (long r = 0; r < group.size(); r++) wake(group.ranks[r].number);
}

// Waits until this rank's half of operation `number` may be written to; its address, or null with `outcome` and `culprit`.
extern "C" char *understudy_group_slot(char *base, long rank, std::uint32_t number, long limit_ms, int *outcome, long *culprit) {
    const Group group(base);
    *outcome = wait_all(group, rank, number - 1, limit_ms, culprit);
    return *outcome == DONE ? group.slot(number, rank) : nullptr;
}

// What this rank wrote into its slot, `bytes` of it, is there for the others.
extern "C" void understudy_group_publish(char *base, long rank, std::uint32_t number, long bytes) {
    const Group group(base);
    group.ranks[rank].bytes[number & 1] = bytes;
    publish(group, rank, number);
}

// Waits for `of` (-1: everybody else) to publish `number`.
extern "C" int understudy_group_wait(char *base, long rank, long of, std::uint32_t number, long limit_ms, long *culprit) {
    const Group group(base);
    if (of < 0) return wait_all(group, rank, number, limit_ms, culprit);
    const Outcome outcome = wait_for(group, of, number, limit_ms);
    *culprit = outcome == BROKEN ? group.header->broken.load() - 1 : of;
    return outcome;
}

// Where `of` wrote in operation `number`, and how many bytes.
extern "C" const char *understudy_group_given(char *base, long of, std::uint32_t number, long *bytes) {
    const Group group(base);
    *bytes = group.ranks[of].bytes[number & 1];
    return group.slot(number, of);
}

// y = sum over ranks of x [rows, columns] (adjacent elements, at most the capacity), in operation `number`. 4: no such pair of dtypes.
extern "C" int understudy_group_sum(char *base, long rank, std::uint32_t number, int in, const void *x, int out, void *y, const float *bias,
                                    long rows, long columns, long limit_ms, long *culprit) {
    const Group group(base);
    int outcome = DONE;
    char *mine = understudy_group_slot(base, rank, number, limit_ms, &outcome, culprit);
    if (!mine) return outcome;
    const long bytes = rows * columns * size_of(static_cast<Dtype>(in));
    if (mine != x) std::memcpy(mine, x, static_cast<std::size_t>(bytes));
    understudy_group_publish(base, rank, number, bytes);
    outcome = wait_all(group, rank, number, limit_ms, culprit);
    if (outcome != DONE) return outcome;
    const char *parts[MOST_SUMMED];
    for (long r = 0; r < group.size(); r++) parts[r] = group.slot(number, r);
    const bool known = by_pair(in, out, [&](auto from, auto to) {
        sum_rows<decltype(from), decltype(to)>(parts, group.size(), y, bias, rows, columns);
    });
    return known ? DONE : 4;
}

// The same over parts of this process alone: y = their sum over the tree, plus bias. 4: no such pair, or too many parts.
extern "C" int understudy_tree_sum(int in, const char *const *parts, long count, int out, void *y, const float *bias, long rows, long columns) {
    if (count < 1 || count > MOST_SUMMED) return 4;
    const bool known = by_pair(in, out, [&](auto from, auto to) {
        sum_rows<decltype(from), decltype(to)>(parts, count, y, bias, rows, columns);
    });
    if (!known && out == FLOAT32) {
        if (in == BFLOAT16) return sum_rows<bf16, float>(parts, count, y, bias, rows, columns), 0;
        if (in == FLOAT16) return sum_rows<fp16, float>(parts, count, y, bias, rows, columns), 0;
    }
    return known ? 0 : 4;
}
