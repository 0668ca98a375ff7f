// The thread pool of every CPU kernel. No OpenMP: its threads do not survive fork(), and a forked child would hang.
#pragma once

#include <atomic>
#include <cstdint>

namespace sgm {

int num_threads();           // $SGM_NUM_THREADS, else the CPUs of this process's affinity mask
void set_num_threads(int n); // throws std::invalid_argument unless n >= 1

// Calls body(context, worker) once for each worker in [0, workers), all at the same time; worker 0 is the caller.
// workers <= num_threads(). The body must not throw. One call at a time has the pool, others wait; a call from inside a
// body throws std::logic_error, and a call in a forked child std::runtime_error.
void run_workers(int workers, void (*body)(void* context, int worker), void* context);

// True inside a body of run_workers.
bool in_worker();

// f(begin, end) over consecutive pieces of [0, n), `grain` long but for the last, each handed to whichever thread is
// free. Which thread runs a piece must not matter to its result. Runs in the caller when it is inside the pool already.
template <class F>
void parallel_for(int64_t n, int64_t grain, F f) {
  const int64_t pieces = (n + grain - 1) / grain;
  const int workers = static_cast<int>(pieces < num_threads() ? pieces : num_threads());
  if (workers <= 1 || in_worker()) {
    if (n > 0) f(int64_t{0}, n);
    return;
  }
  struct Job {
    F& f;
    int64_t n, grain;
    std::atomic<int64_t> next;
  } job{f, n, grain, {0}};
  run_workers(workers, [](void* context, int) {
    Job& j = *static_cast<Job*>(context);
    for (int64_t begin; (begin = j.next.fetch_add(j.grain, std::memory_order_relaxed)) < j.n;)
      j.f(begin, begin + j.grain < j.n ? begin + j.grain : j.n);
  }, &job);
}

}  // namespace sgm
