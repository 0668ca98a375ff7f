// Random networks through csrc/cpu/executor against double precision, without Python: for sanitizers, for emulators of
// other processors and for planted defects (tests/driver.py).
//
//   driver NETWORKS [PRECISION [THREADS [FIRST]]]    0: all agree, 1: one does not
//
// Every network, of seeds FIRST, FIRST + 1, …, runs alone and inside a chain, on one thread and on THREADS, which must give
// the same bits, beside a caller of another network and beside one of its own that packs its weights again. Once they have run, run() and run_steps() may take no memory.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <thread>

#include "classifier.h"
#include "network.h"
#include "cpu/pool.h"
#include "isa.h"
#include "network.h"

#ifdef SGM_PLANTED  // tests/native/test_native_driver.py builds csrc with factors at this many places
namespace sgm {
float planted[SGM_PLANTED];
}
#endif

using namespace sgm::executor;
using namespace subject;

namespace {

#ifndef SGM_TOLERANCE
#define SGM_TOLERANCE 1e-5  // of a whole network, relative; bfloat16 is checked for memory, not for digits
#endif

bool same(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

// Whether calls like those before, with the same number of threads, take memory.
bool takes_memory(Subject& network) {
  network.taken = 0;
  network.run(), network.chain();
  return network.taken > 0;
}

template <class Kind>
const char* failure(unsigned seed, Precision precision, int threads) {
  Kind network(seed, precision), other(seed, precision);
  sgm::set_num_threads(1);
  const std::vector<float> alone = network.run(), chain = network.chain();
  const double error = network.error(alone);
  if (!(error < (precision == Precision::bfloat16 ? 0.5 : SGM_TOLERANCE))) {
    std::fprintf(stderr, "network %u: error %.3g\n", seed, error);
    return "differs from double precision";
  }
  if (takes_memory(network)) return "takes memory in a call";
  sgm::set_num_threads(threads);
  network.run();
  if (takes_memory(network)) return "takes memory in a call on several threads";
  std::vector<float> beside, few;
  std::thread caller([&] { beside = other.run(), network.pack(), few = network.first(1); });
  const bool as_alone = same(network.run(), alone) && same(network.chain(), chain);
  caller.join();
  const std::vector<float> one(alone.begin(), alone.begin() + static_cast<int64_t>(few.size()));
  return as_alone && same(beside, alone) && same(few, one) ? nullptr : "has other bits on several threads";
}

}  // namespace

int main(int argc, char** argv) {
  const int networks = argc > 1 ? std::atoi(argv[1]) : 20, threads = argc > 3 ? std::atoi(argv[3]) : 3;
  const int start = argc > 4 ? std::atoi(argv[4]) : 0;
  const std::string wanted = argc > 2 ? argv[2] : "float32";
  const char* names[] = {"float32", "bfloat16", "direct", "winograd"};
  int precision = 0;
  while (precision < 4 && wanted != names[precision]) ++precision;
  if (precision == 4) return std::fprintf(stderr, "PRECISION must be float32|bfloat16|direct|winograd\n"), 2;
#ifdef SGM_PLANTED
  for (float& factor : sgm::planted) factor = 1;
  if (const char* place = std::getenv("SGM_PLANT")) sgm::planted[std::atoi(place)] = 1 + 1e-4f;
#endif
  for (int i = start; i < start + networks; ++i)
    for (const bool gradient : {false, true}) {
      const auto fails = gradient ? failure<classifier::Classifier> : failure<network::Network>;
      if (const char* why = fails(static_cast<unsigned>(i), static_cast<Precision>(precision), threads))
        return std::fprintf(stderr, "%s %d, %s, %s: %s\n", gradient ? "gradient" : "network", i, wanted.c_str(), sgm::name(sgm::isa()), why), 1;
    }
  std::printf("%d networks, %s, %s: they agree\n", networks, wanted.c_str(), sgm::name(sgm::isa()));
}
