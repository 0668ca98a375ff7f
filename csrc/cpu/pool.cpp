#include "cpu/pool.h"

#include <sched.h>
#include <unistd.h>

#include <condition_variable>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <system_error>
#include <thread>
#include <vector>

namespace sgm {
namespace {

constexpr int kSpins = 2000;  // about 40 µs of pauses before a thread goes to sleep

inline void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

thread_local bool inside = false;

int default_threads() {
  if (const char* text = std::getenv("SGM_NUM_THREADS"); text && *text) {
    char* end = nullptr;
    const long n = std::strtol(text, &end, 10);
    if (*end || n < 1 || n > 4096)
      throw std::invalid_argument(std::string("SGM_NUM_THREADS must be an integer from 1 to 4096, got '") + text + "'");
    return static_cast<int>(n);
  }
#if defined(__linux__)
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof set, &set) == 0) return CPU_COUNT(&set);
#endif
  const unsigned n = std::thread::hardware_concurrency();
  return n ? static_cast<int>(n) : 1;
}

class Pool {
 public:
  ~Pool() { stop(); }

  void start(int threads) {  // the caller is one of them; on an error, the destructor ends those that have started
    threads_.reserve(threads);
    try {
      for (int worker = 1; worker < threads; ++worker) threads_.emplace_back([this, worker] { loop(worker); });
    } catch (const std::system_error& error) {
      throw std::runtime_error("cannot start thread " + std::to_string(threads_.size() + 2) + " of " + std::to_string(threads) + " (" +
                               error.code().message() + "): set SGM_NUM_THREADS to fewer, or raise the limit of processes or memory");
    }
  }

  void stop() {
    {
      std::lock_guard<std::mutex> lock(sleep_);
      stopping_ = true;
      epoch_.fetch_add(1, std::memory_order_release);
    }
    wake_.notify_all();
    for (std::thread& thread : threads_) thread.join();
  }

  void run(int workers, void (*body)(void*, int), void* context) {
    body_ = body, context_ = context, workers_ = workers;
    running_.store(static_cast<int>(threads_.size()), std::memory_order_relaxed);
    {
      std::lock_guard<std::mutex> lock(sleep_);  // a thread about to sleep either sees the epoch or gets the call
      epoch_.fetch_add(1, std::memory_order_release);
    }
    if (sleepers_.load(std::memory_order_relaxed) > 0) wake_.notify_all();
    inside = true;
    body(context, 0);
    inside = false;
    for (int spin = 0; running_.load(std::memory_order_acquire) > 0; ++spin) {
      if (spin < kSpins) {
        pause();
      } else {
        std::this_thread::yield();
      }
    }
  }

 private:
  void loop(int worker) {
    inside = true;
    for (uint64_t seen = 0;;) {
      for (int spin = 0; spin < kSpins && epoch_.load(std::memory_order_acquire) == seen; ++spin) pause();
      if (epoch_.load(std::memory_order_acquire) == seen) {
        std::unique_lock<std::mutex> lock(sleep_);
        sleepers_.fetch_add(1, std::memory_order_relaxed);
        wake_.wait(lock, [&] { return epoch_.load(std::memory_order_acquire) != seen; });
        sleepers_.fetch_sub(1, std::memory_order_relaxed);
      }
      ++seen;
      if (stopping_) return;
      if (worker < workers_) body_(context_, worker);
      running_.fetch_sub(1, std::memory_order_release);
    }
  }

  std::vector<std::thread> threads_;
  std::mutex sleep_;
  std::condition_variable wake_;
  std::atomic<uint64_t> epoch_{0};  // calls so far; a change starts one
  std::atomic<int> running_{0};     // threads that have not finished the current call
  std::atomic<int> sleepers_{0};
  bool stopping_ = false;
  void (*body_)(void*, int) = nullptr;
  void* context_ = nullptr;
  int workers_ = 0;
};

// Never destroyed: threads that sleep at exit are ended by the system, and a forked child has none to join.
struct State {
  std::mutex mutex;  // held for the length of a call
  std::atomic<int> threads{0};
  std::atomic<pid_t> owner{0};  // the process that started the threads
  Pool* pool = nullptr;
};

State& state() {
  static State* s = new State;
  return *s;
}

}  // namespace

bool in_worker() { return inside; }

void refuse_fork() {
  const pid_t owner = state().owner.load(std::memory_order_relaxed);
  if (owner != 0 && owner != getpid())
    throw std::runtime_error("sgm_engine was used before fork(), so its threads are missing in this process (pid " +
                             std::to_string(getpid()) + "): start worker processes with the 'spawn' method, for example "
                             "multiprocessing.set_start_method('spawn')");
}

int num_threads() {
  State& s = state();
  int n = s.threads.load(std::memory_order_relaxed);
  if (n != 0) return n;
  const int own = default_threads();
  return s.threads.compare_exchange_strong(n, own) ? own : n;
}

void set_num_threads(int n) {
  if (n < 1 || n > 4096) throw std::invalid_argument("n must be from 1 to 4096, got " + std::to_string(n));
  if (inside) throw std::logic_error("set_num_threads inside the pool");
  refuse_fork();
  State& s = state();
  std::lock_guard<std::mutex> lock(s.mutex);
  delete s.pool;
  s.pool = nullptr;
  s.owner.store(0, std::memory_order_relaxed);
  s.threads.store(n, std::memory_order_relaxed);
}

Hold::Hold() {
  if (inside) throw std::logic_error("Hold inside the pool");
  refuse_fork();
  State& s = state();
  lock_ = std::unique_lock<std::mutex>(s.mutex);
  threads_ = num_threads();
  if (s.pool) return;
  auto pool = std::make_unique<Pool>();
  pool->start(threads_);
  s.pool = pool.release();
  s.owner.store(getpid(), std::memory_order_relaxed);
}

void Hold::run(int workers, void (*body)(void*, int), void* context) {
  if (workers > threads_)
    throw std::invalid_argument("workers must be at most num_threads() = " + std::to_string(threads_) + ", got " + std::to_string(workers));
  state().pool->run(workers, body, context);
}

}  // namespace sgm
