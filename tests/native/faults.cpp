// Planted failures: of everything that random networks take from the heap and of every thread that they start, while they
// are described, planned, run and chained, and by the noise and the update, each fails once.
//
//   faults NETWORKS [THREADS [FIRST]]    0: each gave an error, and the same call made again was right; 1: one did not
//
// What takes 20 s hangs. Only calls of csrc are made to fail, not the test's own.
#define SGM_FAILING
#include "failing.h"

#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>

#include "classifier.h"
#include "cpu/pool.h"
#include "network.h"
#include "update.h"

namespace {

using Floats = std::vector<float>;

// Two ops that start the pool. Returns what they wrote.
Floats ops() {
  const int64_t batch = 3, pixels = 4096, row[] = {0, 0, 0}, stop[] = {1, 1, 1}, seed[] = {1, 2, 3}, id[] = {0, 1, 2};
  const float coef[] = {1, 0.5f, 0.1f, 0};
  const int32_t draw[] = {7};
  Floats noise(batch * pixels, NAN), x(batch * pixels, 1);
  failing::retried([&] { sgm::noise_fill({{batch, 1, pixels}, noise.data(), false, seed, id, 1, 0, sgm::Kind::normal}); });
  sgm::Update u{};
  u.shape = {batch, 1, pixels}, u.x = u.out = x.data(), u.score = noise.data(), u.score_dtype = sgm::Dtype::float32;
  u.coef = coef, u.draw = draw, u.rows = 1, u.row = row, u.stop = stop, u.seed = seed, u.sample_id = id;
  failing::retried([&] { sgm::set_num_threads(2); });
  failing::retried([&] { sgm::langevin_update(u); });
  return x;
}

// All that is made to fail. One answer, whatever has failed on the way.
template <class Kind>
Floats all(unsigned seed, int threads) {
  Kind network(seed, sgm::executor::Precision::float32);
  failing::retried([&] { sgm::set_num_threads(threads); });
  Floats found = network.run();
  for (const Floats& more : {network.chain(), network.first(1)}) found.insert(found.end(), more.begin(), more.end());
  failing::retried([&] { sgm::set_num_threads(threads); });
  const Floats last = ops();
  found.insert(found.end(), last.begin(), last.end());
  return found;
}

// Places that failed, or −1.
template <class Kind>
long places(unsigned seed, int threads) {
  const Floats want = all<Kind>(seed, threads);
  for (long place = 0;; ++place) {
    alarm(20);
    failing::arm(place);
    Floats found;
    bool abandoned = false;
    try {
      found = all<Kind>(seed, threads);
    } catch (const failing::Abandoned&) {  // a plan that failed: another network must be right
      abandoned = true;
    } catch (const std::exception& error) {
      return std::fprintf(stderr, "place %ld: made again, it fails: %s\n", place, error.what()), -1;
    }
    const bool fired = failing::disarm();
    if (!fired) return place;
    if (failing::errors != 1) return std::fprintf(stderr, "place %ld: %d errors for 1 failure\n", place, failing::errors), -1;
    if (abandoned) found = all<Kind>(seed, threads);
    if (found.size() != want.size() || std::memcmp(found.data(), want.data(), want.size() * sizeof(float)))
      return std::fprintf(stderr, "place %ld: the call made again gives other bits\n", place), -1;
  }
}

}  // namespace

int main(int argc, char** argv) {
  const int networks = argc > 1 ? std::atoi(argv[1]) : 2, threads = argc > 2 ? std::atoi(argv[2]) : 4;
  const int first = argc > 3 ? std::atoi(argv[3]) : 0;
  long total = 0;
  std::signal(SIGALRM, [](int) { std::fputs("a place hangs\n", stderr), _exit(1); });
  for (int seed = first; seed < first + networks; ++seed)
    for (const bool gradient : {false, true}) {
      const long found = (gradient ? places<classifier::Classifier> : places<network::Network>)(static_cast<unsigned>(seed), threads);
      if (found < 0) return std::fprintf(stderr, "%s %d\n", gradient ? "gradient" : "network", seed), 1;
      total += found;
    }
  std::printf("%ld failures, %ld of them threads that did not start: an error each, and right when made again\n", total, failing::threads.load());
}
