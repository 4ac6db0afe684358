// A pool of threads for kernels. parallel(n, grain, f) calls f(begin, end) over [0, n) in pieces that threads take as they come;
// which thread takes a piece never changes a bit. Threads spin for a bounded time, then sleep, so that an idle engine costs nothing.
#pragma once
namespace understudy {
template <class F> void parallel(long n, long grain, F &&f);  // body: see below (owner: linear kernels)
}
