// What the driver does with a random network of either kind.
#pragma once
#include <cmath>
#include <cstdint>
#include <random>
#include <vector>

#include "allocations.h"
#include "reference.h"

namespace subject {

using namespace sgm::executor;
using reference::Image;

constexpr int kLevels = 3;
#if defined(SGM_FAILING)
using Executor = failing::Executor;
#elif defined(SGM_HOSTILE)
using Executor = hostile::Executor;
#endif

struct Random {
  std::mt19937 engine;
  explicit Random(unsigned seed) : engine(seed) {}
  int below(int n) { return static_cast<int>(engine() % static_cast<unsigned>(n)); }
  int from(int low, int high) { return low + below(high - low + 1); }
  float normal() { return std::normal_distribution<float>()(engine); }
  std::vector<float> normals(size_t n, float scale) {
    std::vector<float> v(n);
    for (float& x : v) x = scale * normal();
    return v;
  }
};

struct Subject {
  Random random;
  const int images;
  Executor executor;
  std::vector<float> x;
  std::vector<int64_t> level;
  std::vector<Image> score;  // of each image, in double precision
  long taken = 0;            // allocations during calls of the executor

  Subject(unsigned seed, Precision precision)
      : random(seed), images(random.from(1, 4)), executor(random.from(1, 4), precision) {}

  static Details details(int norm, Activation activation, int conv = -1, int heads = -1) {
    Details d;
    d.norm = norm, d.activation = activation, d.conv = conv, d.heads = heads;
    return d;
  }

  static Executor::Array array(const std::vector<float>& v) { return {v.data(), static_cast<int64_t>(v.size())}; }

  std::vector<float> run() {
    std::vector<float> out(x.size(), NAN);
    const long before = allocations::count;
    executor.run(x.data(), level.data(), out.data(), images);
    taken += allocations::count - before;
    return out;
  }

  // The score of the first `count` images, beside other calls.
  std::vector<float> first(int count) {
    std::vector<float> out(x.size() / images * count, NAN);
    executor.run(x.data(), level.data(), out.data(), count);
    return out;
  }

  // A chain of slots at different rows, one of them idle, from x; stops on its own after a few looks.
  std::vector<float> chain() {
    const float coef[] = {1, 1e-3f, 1e-2f, 0, 1, 1e-3f, 0, 0, 1, 1e-4f, 1e-3f, 0};
    const int32_t draw[] = {1, 2, 3};
    const int64_t levels[] = {0, 1, 2};
    std::vector<int64_t> row(images), stop(images, 3), seed(images, 7), id(images), bad(images, INT64_MAX);
    for (int i = 0; i < images; ++i) id[i] = i, row[i] = i % 2;
    stop[images - 1] = 0;
    std::vector<float> state = x, last(x.size());
    const long before = allocations::count;
    executor.run_steps({images, state.data(), false, last.data(), coef, draw, levels, 3, row.data(), stop.data(), seed.data(),
                        id.data(), bad.data(), nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr}, 3, [] { return false; });
    taken += allocations::count - before;
    return state;
  }

  double error(const std::vector<float>& found) const {
    double distance = 0, size = 1e-30;
    for (int i = 0; i < images; ++i)
      for (size_t j = 0; j < score[i].v.size(); ++j) {
        const double want = score[i].v[j], d = found[static_cast<size_t>(i) * score[i].v.size() + j] - want;
        if (std::isnan(want)) continue;  // not computed
        distance += d * d, size += want * want;
      }
    return std::sqrt(distance / size);
  }
};

}  // namespace subject
