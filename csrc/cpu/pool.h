// The thread pool of every CPU kernel. No OpenMP: its threads do not survive fork(), and a forked child would hang.
#pragma once

#include <atomic>
#include <cstdint>
#include <mutex>

namespace sgm {

int num_threads();           // $SGM_NUM_THREADS, else the CPUs of this process's affinity mask
void set_num_threads(int n); // throws std::invalid_argument unless n >= 1

// The pool, for as long as this lives: other threads wait, and the number of threads stays what it is.
//
// Throws std::runtime_error if a thread cannot be started, after which there is no pool and the next Hold tries again, and
// in a forked child; std::logic_error from inside a body.
class Hold {
 public:
  Hold();
  int threads() const { return threads_; }
  // Calls body(context, worker) once for each worker in [0, workers), all at the same time; worker 0 is the caller.
  // workers <= threads(). The body must not throw.
  void run(int workers, void (*body)(void* context, int worker), void* context);

 private:
  std::unique_lock<std::mutex> lock_;
  int threads_;
};

// Throws std::runtime_error in a child that was forked after the pool had started.
void refuse_fork();

// True inside a body of Hold::run.
bool in_worker();

// f(begin, end) over consecutive pieces of [0, n), `grain` long but for the last, each handed to whichever thread is
// free. Which thread runs a piece must not matter to its result. Runs in the caller when it is inside the pool already.
template <class F>
void parallel_for(int64_t n, int64_t grain, F f) {
  const int64_t pieces = (n + grain - 1) / grain;
  if (pieces <= 1 || num_threads() == 1 || in_worker()) {
    if (n > 0) f(int64_t{0}, n);
    return;
  }
  struct Job {
    F& f;
    int64_t n, grain;
    std::atomic<int64_t> next;
  } job{f, n, grain, {0}};
  Hold pool;
  pool.run(static_cast<int>(pieces < pool.threads() ? pieces : pool.threads()), [](void* context, int) {
    Job& j = *static_cast<Job*>(context);
    for (int64_t begin; (begin = j.next.fetch_add(j.grain, std::memory_order_relaxed)) < j.n;)
      j.f(begin, begin + j.grain < j.n ? begin + j.grain : j.n);
  }, &job);
}

}  // namespace sgm
