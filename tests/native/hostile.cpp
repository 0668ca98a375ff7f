// Random networks described with wrong numbers, and chains with wrong rows, for the sanitizers to watch (hostile.h).
//
//   hostile NETWORKS [FIRST [SECONDS]]    0: each was refused or ran, 1: something else was thrown
//
// Takes no more than 64 MiB at a time, and 20 s a network.
#define SGM_HOSTILE
#include "hostile.h"

#include <unistd.h>

#include <chrono>
#include <cstdio>
#include <cstdlib>

#include "classifier.h"
#include "cpu/pool.h"
#include "network.h"

namespace {

int ran = 0;

int64_t wrong_row() {
  static const int64_t numbers[] = {0, 1, 2, 3, 4, -1, INT64_MAX, INT64_MIN, INT64_MAX - 1, INT_MAX};
  return numbers[hostile::below(hostile::below(2) ? 4 : 10)];
}

// Runs what was described, in buffers of exactly its sizes.
template <class Kind>
void use(unsigned seed, sgm::executor::Precision precision) {
  Kind network(seed, precision);
  hostile::Executor& e = network.executor;
  const int images = 1 + hostile::below(3);
  if (std::max(e.x.size(), e.score.size()) > 1 << 20) return;
  std::vector<float> x(images * e.x.size(), 0.5f), score(images * e.score.size(), NAN);
  std::vector<int64_t> level(images);
  for (int64_t& l : level) l = hostile::below(8) ? hostile::below(subject::kLevels) : wrong_row();
  e.run(x.data(), level.data(), score.data(), images);
  const float coef[] = {1, 1e-3f, 1e-2f, 0, 1, 1e-3f, 0, 0, 1, 1e-4f, 1e-3f, 0};
  const int32_t draw[] = {1, 2, 3};
  std::vector<int64_t> row(images), stop(images), ids(images), bad(images, INT64_MAX);
  for (int i = 0; i < images; ++i) row[i] = wrong_row(), stop[i] = wrong_row(), ids[i] = wrong_row();
  const int64_t levels[] = {0, 1, hostile::below(4) ? 2 : wrong_row()};
  e.run_steps({images, x.data(), hostile::below(2) == 1, score.data(), coef, draw, levels, 3, row.data(), stop.data(), ids.data(), ids.data(),
               bad.data(), nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr}, wrong_row(), [] { return false; });
  ++ran;
}

}  // namespace

int main(int argc, char** argv) {
  using clock = std::chrono::steady_clock;
  const int networks = argc > 1 ? std::atoi(argv[1]) : 100, first = argc > 2 ? std::atoi(argv[2]) : 0;
  const auto end = clock::now() + std::chrono::seconds(argc > 3 ? std::atoi(argv[3]) : 1 << 20);
  allocations::most = 64 << 20;
  sgm::set_num_threads(3);
  int tried = 0;
  for (int seed = first; seed < first + networks && clock::now() < end; ++seed)
    for (const bool gradient : {false, true}) {
      alarm(20);
      hostile::random.seed(static_cast<unsigned>(seed));
      const auto precision = static_cast<sgm::executor::Precision>(seed % 4);
      ++tried;
      try {
        (gradient ? use<classifier::Classifier> : use<network::Network>)(static_cast<unsigned>(seed), precision);
      } catch (const std::logic_error&) {
      } catch (const std::bad_alloc&) {
      } catch (const std::exception& error) {
        return std::fprintf(stderr, "%s %d: %s\n", gradient ? "gradient" : "network", seed, error.what()), 1;
      }
    }
  std::printf("%d networks with %d wrong numbers: %d of those refused at once, %d networks ran\n", tried, hostile::wrongs, hostile::refusals, ran);
}
