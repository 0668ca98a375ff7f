// An executor that is told wrong things now and then: of a random network's description, every call may come with one of
// its numbers replaced. It must be refused, or make a network that computes something within its buffers.
#pragma once
#include <climits>
#include <cstdint>
#include <random>
#include <stdexcept>
#include <vector>

#include "allocations.h"
#include "cpu/executor/executor.h"

namespace hostile {

using sgm::executor::Activation;
using sgm::executor::Op;
using Base = sgm::executor::Executor;

inline std::mt19937 random;  // seeded by the program
inline int wrongs = 0, refusals = 0;
inline int below(int n) { return static_cast<int>(random() % static_cast<unsigned>(n)); }

inline int wrong_int() {
  static const int numbers[] = {-1, 0, 1, 2, 3, 5, 8, 16, 17, 48, 49, 64, 255, 65535, 65536, 65537, 1 << 20, 1 << 27, 1 << 30, INT_MAX - 1, INT_MAX, INT_MIN};
  return numbers[below(sizeof numbers / sizeof *numbers)];
}

struct Shape {
  int channels, height, width;
  int64_t size() const { return int64_t{channels} * height * width; }
};

struct Executor : Base {
  using Base::Base;
  std::vector<Shape> tensors, convs;  // of a convolution: c_out, c_in, kernel
  std::vector<int64_t> tables;
  Shape x{}, score{};  // of a sample

  // call(true) with a wrong number now and then, unless that is refused; else call(false).
  template <class Call>
  auto either(Call call) {
    if (below(12) == 0) {
      ++wrongs;
      try {
        return call(true);
      } catch (const std::logic_error&) {  // invalid_argument and out_of_range too
        ++refusals;
      } catch (const std::bad_alloc&) {
        ++refusals;
      }
    }
    return call(false);
  }

  // One of the numbers, replaced.
  template <class... Numbers>
  static void spoil(Numbers&... numbers) {
    int at = below(sizeof...(numbers));
    (..., (at-- == 0 ? void(numbers = static_cast<Numbers>(wrong_int())) : void()));
  }

  int tensor(int channels, int height, int width) {
    return either([&](bool wrong) {
      Shape s{channels, height, width};
      if (wrong) spoil(s.channels, s.height, s.width);
      const int id = Base::tensor(s.channels, s.height, s.width);
      return tensors.push_back(s), id;
    });
  }

  int norm(int channels, int groups, int levels, bool per_level, bool has_alpha, double eps) {
    return either([&](bool wrong) {
      int c = channels, g = groups, l = levels;
      bool by_level = per_level, alpha = has_alpha;
      if (wrong) spoil(c, g, l, by_level, alpha);
      const int id = Base::norm(c, g, l, by_level, alpha, eps);
      return tables.push_back(int64_t{by_level ? l : 1} * 3 * c), id;
    });
  }

  int conv(int c_in, int c_out, int kernel, int dilation, int stride, int padding, bool pool) {
    return either([&](bool wrong) {
      int in = c_in, out = c_out, k = kernel, d = dilation, s = stride, p = padding;
      bool mean = pool;
      if (wrong) spoil(in, out, k, d, s, p, mean);
      const int id = Base::conv(in, out, k, d, s, p, mean);
      return convs.push_back({out, in, k * k}), id;
    });
  }

  void embedding(int channels, int height, int width, int patch, const std::vector<int>& octaves) {
    either([&](bool wrong) {
      Shape s{channels, height, width};
      int p = patch;
      std::vector<int> o = octaves;
      if (wrong && below(3) == 0) o.resize(below(20), wrong_int());
      else if (wrong) spoil(s.channels, s.height, s.width, p);
      Base::embedding(s.channels, s.height, s.width, p, o);
      x = score = s;
    });
  }

  void layer(Op op, int input, int second, int output, const std::vector<int>& add, int norm, Activation activation, int conv,
             double scale, double shift, int first = 0) {
    either([&](bool wrong) {
      Op o = op;
      int in = input, two = second, out = output, n = norm, c = conv, f = first;
      std::vector<int> a = add;
      if (wrong && below(2)) o = static_cast<Op>(below(static_cast<int>(Op::store_gradient) + 1));
      else if (wrong && below(4) == 0) a.push_back(below(static_cast<int>(tensors.size()) + 2) - 1);
      else if (wrong && below(2)) in = below(static_cast<int>(tensors.size()));
      else if (wrong) spoil(in, two, out, n, c, f);
      Base::layer(o, in, two, out, a, n, activation, c, scale, shift, f);
      if (o == Op::load && !x.channels) x = tensors[out];
      if (o == Op::store) score = {convs[c].channels, tensors[in].height, tensors[in].width};
    });
  }

  void plan() {
    try {
      Base::plan();
    } catch (...) {
      refuses_to_run();
      throw;
    }
    if (below(4) == 0) refuses_to_run();  // before its weights are set
  }

  void refuses_to_run() {
    try {
      Base::run(nullptr, nullptr, nullptr, 1);
    } catch (const std::logic_error&) {
      return;
    }
    throw std::runtime_error("ran without a plan or without weights");
  }

  // Of the right size, whatever they were to be.
  void set_conv(int conv, Array, Array) {
    const std::vector<float> weight(convs.at(conv).size(), 0.1f), bias(convs[conv].channels, 0.1f);
    Base::set_conv(conv, {weight.data(), static_cast<int64_t>(weight.size())}, {bias.data(), static_cast<int64_t>(bias.size())});
  }
  void set_norm(int norm, Array) {
    const std::vector<float> table(tables.at(norm), 0.5f);
    Base::set_norm(norm, {table.data(), static_cast<int64_t>(table.size())});
  }
};

}  // namespace hostile
