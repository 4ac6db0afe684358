// A pool of threads for the kernels of this library.
//
// parallel(n, grain, f) calls f(begin, end) over [0, n) in pieces of `grain` (the last may be shorter), which threads take one by one as
// they come free, so that a core lent to another process delays one piece and not the step. The calling thread takes part, and the call
// returns when every piece is done. Which thread runs a piece must never change a bit of the result. Idle threads spin for a bounded time,
// then sleep. Calls from inside a piece, or while another thread's call is running, run in the calling thread alone.
#pragma once
#include <cstddef>
#include <type_traits>

namespace understudy {

using Piece = void (*)(void *context, long begin, long end);

void run_pieces(long n, long grain, Piece piece, void *context);

// How many threads share the work, the caller included.
int threads();

// Memory of the calling thread, aligned to 64 bytes, kept until the thread ends and only ever grown. A later call may return the same
// memory (or free it, when larger is asked for): one user at a time in each thread.
void *scratch(std::size_t bytes);

template <class F> void parallel(long n, long grain, F &&f) {
    using Function = std::remove_reference_t<F>;
    run_pieces(
        n, grain, [](void *context, long begin, long end) { (*static_cast<Function *>(context))(begin, end); },
        const_cast<void *>(static_cast<const void *>(&f)));
}

}  // namespace understudy

// `count` threads from now on (the caller included); 0: one for each CPU this process may run on.
extern "C" void understudy_set_threads(int count);
extern "C" int understudy_threads();
// How long an idle thread spins before it sleeps.
extern "C" void understudy_set_spin(double microseconds);
