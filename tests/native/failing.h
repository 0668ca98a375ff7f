// An allocator and a start of threads that fail where they are told to, and an executor each of whose calls is made again
// after a failure. Included before allocations.h, whose allocator it stands for.
#pragma once
#include <dlfcn.h>
#include <pthread.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <stdexcept>
#include <string>

#include "allocations.h"
#include "cpu/executor/executor.h"

namespace failing {

inline int errors = 0;                // that the failures armed so far have raised
inline std::atomic<long> threads{0};  // starts that failed
struct Abandoned {};                  // thrown for a plan that failed

inline void arm(long place) { errors = 0, allocations::left = place; }
inline bool disarm() { return allocations::left.exchange(-1) < 0; }  // whether it has failed

struct Watch {
  Watch() { allocations::watched = true; }
  ~Watch() { allocations::watched = false; }
};

// call(), made again if it fails. An error is bad_alloc, or says that a thread did not start.
template <class Call>
auto retried(Call call) {
  for (;; ++errors) try {
      const Watch watch;
      return call();
    } catch (const std::bad_alloc&) {
    } catch (const std::runtime_error& error) {
      if (std::string(error.what()).find("cannot start thread") == std::string::npos) throw;
    }
}

struct Executor : sgm::executor::Executor {
  using Base = sgm::executor::Executor;
  using Base::Base;
  int tensor(int channels, int height, int width) { return retried([&] { return Base::tensor(channels, height, width); }); }
  int norm(const sgm::executor::NormShape& shape) { return retried([&] { return Base::norm(shape); }); }
  int conv(const sgm::executor::ConvShape& shape) { return retried([&] { return Base::conv(shape); }); }
  int heads(int count, int size, double scale, int memory) { return retried([&] { return Base::heads(count, size, scale, memory); }); }
  void layer(sgm::executor::Op op, int input, int second, int output, const std::vector<sgm::executor::Addend>& add,
             const sgm::executor::Details& details) {
    retried([&] { Base::layer(op, input, second, output, add, details); });
  }
  void embedding(int channels, int height, int width, int patch, const std::vector<int>& octaves) {
    retried([&] { Base::embedding(channels, height, width, patch, octaves); });
  }
  void plan() {
    const int before = errors;
    try {
      retried([&] { Base::plan(); });
    } catch (const std::logic_error&) {
      if (errors == before) throw;
    }
    if (errors == before) return;
    try {
      Base::run(nullptr, nullptr, nullptr, 1);
    } catch (const std::logic_error&) {
      throw Abandoned();
    }
  }
  void set_conv(int conv, Array weight, Array bias) { retried([&] { Base::set_conv(conv, weight, bias); }); }
  void set_heads(int heads, Array tokens) { retried([&] { Base::set_heads(heads, tokens); }); }
  void set_norm(int norm, Array table) { retried([&] { Base::set_norm(norm, table); }); }
  void set_embedding(const double* table, int64_t size) { retried([&] { Base::set_embedding(table, size); }); }
  void run(const float* x, const int64_t* level, float* score, int images) { retried([&] { Base::run(x, level, score, images); }); }
  void run_steps(const sgm::executor::Chain& chain, int64_t steps, const std::function<bool()>& stop) {
    retried([&] { Base::run_steps(chain, steps, stop); });
  }
};

}  // namespace failing

// Found before that of the C library, by libstdc++ as well.
extern "C" int pthread_create(pthread_t* thread, const pthread_attr_t* attributes, void* (*start)(void*), void* argument) {
  using Create = int (*)(pthread_t*, const pthread_attr_t*, void* (*)(void*), void*);
  static const Create create = reinterpret_cast<Create>(dlsym(RTLD_NEXT, "pthread_create"));
  if (allocations::fails()) return ++failing::threads, EAGAIN;
  return create(thread, attributes, start, argument);
}
