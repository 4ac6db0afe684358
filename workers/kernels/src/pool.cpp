#include "pool.h"

#include <pthread.h>
#include <sched.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <new>
#include <thread>
#include <vector>

namespace understudy {
namespace {

using Clock = std::chrono::steady_clock;

inline void pause_cpu() {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

int available_cpus() {
#ifdef __linux__
    cpu_set_t set;
    if (sched_getaffinity(0, sizeof set, &set) == 0) return CPU_COUNT(&set) > 0 ? CPU_COUNT(&set) : 1;
#endif
    const unsigned n = std::thread::hardware_concurrency();
    return n ? static_cast<int>(n) : 1;
}

thread_local bool inside = false;  // this thread is running a job's pieces as its caller

class Pool {
  public:
    explicit Pool(int count, std::int64_t spin_ns) : count_(count), spin_ns_(spin_ns) {}

    int count() const { return count_.load(std::memory_order_relaxed); }
    std::int64_t spin_ns() const { return spin_ns_.load(std::memory_order_relaxed); }
    void set_spin(std::int64_t ns) { spin_ns_.store(ns, std::memory_order_relaxed); }

    void run(long n, long grain, Piece piece, void *context) {
        if (n <= 0) return;
        if (grain < 1) grain = 1;
        const long pieces = (n + grain - 1) / grain;
        if (pieces == 1 || count() == 1 || pieces > UINT32_MAX || inside || !busy_.try_lock()) return alone(n, grain, piece, context);
        std::lock_guard<std::mutex> held(busy_, std::adopt_lock);
        if (workers_.empty() && !start()) return alone(n, grain, piece, context);
        inside = true;
        piece_ = piece, context_ = context, n_ = n, grain_ = grain, pieces_ = pieces;
        pending_.store(pieces, std::memory_order_relaxed);
        generation_ += 1;
        claims_.store(std::uint64_t{generation_} << 32 | static_cast<std::uint64_t>(pieces));  // publishes the fields above
        if (sleepers_.load() > 0) {
            { std::lock_guard<std::mutex> lock(sleep_); }
            wake_.notify_all();
        }
        while (work(generation_)) {}
        for (int spins = 0; pending_.load(std::memory_order_acquire) > 0; spins++) {
            if (spins < 1024) pause_cpu();
            else std::this_thread::sleep_for(std::chrono::microseconds(20));  // an idle CPU takes over a thread that waits for another
        }
        inside = false;
    }

    void resize(int count) {
        std::lock_guard<std::mutex> held(busy_);
        stop();
        count_.store(count, std::memory_order_relaxed);
    }

    // Joins the threads; the next job starts new ones.
    void stop() {
        stopping_.store(true);
        { std::lock_guard<std::mutex> lock(sleep_); }
        wake_.notify_all();
        for (std::thread &worker : workers_) worker.join();
        workers_.clear();
        stopping_.store(false);
    }

    void close() {
        count_.store(1, std::memory_order_relaxed);
        std::lock_guard<std::mutex> held(busy_);
        stop();
    }

  private:
    static void alone(long n, long grain, Piece piece, void *context) {
        for (long begin = 0; begin < n; begin += grain) piece(context, begin, begin + grain < n ? begin + grain : n);
    }

    bool start() {
        try {
            for (int i = 1; i < count(); i++) workers_.emplace_back([this] { loop(); });
        } catch (const std::system_error &) {  // no more threads to be had: those that started are enough
        }
        return !workers_.empty();
    }

    // Takes and runs one piece of that job; false when none is left. `claims_` holds the job's number and its pieces not yet taken: a
    // claim that succeeds proves that the job is still open, so its fields may be read after it.
    bool work(std::uint32_t generation) {
        std::uint64_t seen = claims_.load(std::memory_order_acquire);
        do {
            if (seen >> 32 != generation || (seen & UINT32_MAX) == 0) return false;
        } while (!claims_.compare_exchange_weak(seen, seen - 1, std::memory_order_acq_rel, std::memory_order_acquire));
        const long begin = (pieces_ - static_cast<long>(seen & UINT32_MAX)) * grain_;
        const long end = begin + grain_ < n_ ? begin + grain_ : n_;
        piece_(context_, begin, end);
        pending_.fetch_sub(1, std::memory_order_release);
        return true;
    }

    bool open() const { return (claims_.load() & UINT32_MAX) != 0; }

    void loop() {
        while (!stopping_.load()) {
            const auto job = static_cast<std::uint32_t>(claims_.load(std::memory_order_acquire) >> 32);
            while (work(job)) {}
            if (spin()) continue;
            std::unique_lock<std::mutex> lock(sleep_);
            sleepers_.fetch_add(1);
            wake_.wait(lock, [this] { return stopping_.load() || open(); });
            sleepers_.fetch_sub(1);
        }
    }

    // True when a piece came up within the time of spinning.
    bool spin() {
        const auto until = Clock::now() + std::chrono::nanoseconds(spin_ns());
        do {
            for (int i = 0; i < 16; i++) {
                if (open() || stopping_.load(std::memory_order_relaxed)) return true;
                pause_cpu();
            }
        } while (Clock::now() < until);
        return false;
    }

    alignas(64) std::atomic<std::uint64_t> claims_{0};
    alignas(64) std::atomic<long> pending_{0};
    alignas(64) Piece piece_ = nullptr;
    void *context_ = nullptr;
    long n_ = 0, grain_ = 1, pieces_ = 0;
    std::uint32_t generation_ = UINT32_MAX - 100;  // of the job; goes round after days of work, and so that tests see it, at first early
    std::atomic<int> count_;
    std::atomic<std::int64_t> spin_ns_;
    std::atomic<int> sleepers_{0};
    std::atomic<bool> stopping_{false};
    std::mutex busy_, sleep_;
    std::condition_variable wake_;
    std::vector<std::thread> workers_;
};

std::atomic<Pool *> current{nullptr};

// A forked child has the parent's memory and none of its threads: it gets a pool of its own, and the parent's is left alone.
void after_fork() {
    if (const Pool *old = current.load()) current.store(new Pool(old->count(), old->spin_ns()));
}

struct Closer {
    ~Closer() { current.load()->close(); }
};

Pool &pool() {
    Pool *made = current.load(std::memory_order_acquire);
    if (made) return *made;
    static std::once_flag once;
    std::call_once(once, [] {
        current.store(new Pool(available_cpus(), 100'000));  // never freed: a thread may outlive main()
        pthread_atfork(nullptr, nullptr, after_fork);
        static Closer closer;
    });
    return *current.load(std::memory_order_acquire);
}

struct Scratch {
    void *memory = nullptr;
    std::size_t bytes = 0;
    ~Scratch() { std::free(memory); }
};

}  // namespace

void run_pieces(long n, long grain, Piece piece, void *context) { pool().run(n, grain, piece, context); }

int threads() { return pool().count(); }

void *scratch(std::size_t bytes) {
    thread_local Scratch own;
    if (own.bytes < bytes) {
        std::free(own.memory);
        own.bytes = (bytes + 4095) / 4096 * 4096;
        own.memory = std::aligned_alloc(64, own.bytes);
        if (!own.memory) std::abort();  // the machine is out of memory, and no caller could go on
    }
    return own.memory;
}

}  // namespace understudy

extern "C" void understudy_set_threads(int count) {
    understudy::pool().resize(count > 0 ? count : understudy::available_cpus());
}
extern "C" int understudy_threads() { return understudy::threads(); }
extern "C" void understudy_set_spin(double microseconds) {
    understudy::pool().set_spin(static_cast<std::int64_t>(microseconds * 1000));
}
