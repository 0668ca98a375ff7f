// An executor that is told wrong things now and then: of a random network's description, every call may come with one of
// its numbers replaced. It must be refused, or make a network that computes something within its buffers.
#pragma once
#include <algorithm>
#include <climits>
#include <cstdint>
#include <random>
#include <stdexcept>
#include <vector>

#include "allocations.h"
#include "cpu/executor/executor.h"

namespace hostile {

using namespace sgm::executor;
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
  std::vector<Shape> tensors, convs;  // of a convolution: c_out, c_in / groups, taps
  std::vector<ConvShape> shapes;
  std::vector<int> rows;  // of a bias
  std::vector<int64_t> tables, tokens;
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

  int norm(const NormShape& shape) {
    return either([&](bool wrong) {
      NormShape s = shape;
      if (wrong) spoil(s.channels, s.groups, s.levels, s.has_alpha, s.by_pixel);
      const int id = Base::norm(s);
      return tables.push_back(int64_t{std::max(s.levels, 1)} * 3 * s.channels), id;
    });
  }

  int conv(const ConvShape& shape) {
    return either([&](bool wrong) {
      ConvShape s = shape;
      if (wrong) spoil(s.c_in, s.c_out, s.kernel, s.dilation, s.stride, s.up, s.groups, s.pad[below(4)], s.pool, s.levels);
      const int id = Base::conv(s);
      return convs.push_back({s.c_out, s.c_in / s.groups, s.kernel * s.kernel}), rows.push_back(std::max(s.levels, 1)), shapes.push_back(s), id;
    });
  }

  int heads(int count, int size, double scale, int memory) {
    return either([&](bool wrong) {
      int n = count, s = size, m = memory;
      if (wrong) spoil(n, s, m);
      const int id = Base::heads(n, s, scale, m);
      return tokens.push_back(int64_t{2} * n * s * m), id;
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

  void layer(Op op, int input, int second, int output, const std::vector<Addend>& add, const Details& details) {
    either([&](bool wrong) {
      Op o = op;
      int in = input, two = second, out = output;
      Details d = details;
      std::vector<Addend> a = add;
      if (wrong && below(2)) o = static_cast<Op>(below(static_cast<int>(Op::channel_norm) + 1));
      else if (wrong && below(4) == 0) a.push_back({below(static_cast<int>(tensors.size()) + 2) - 1, 1});
      else if (wrong && below(2)) in = below(static_cast<int>(tensors.size()));
      else if (wrong) spoil(in, two, out, d.norm, d.conv, d.heads, d.first);
      Base::layer(o, in, two, out, a, d);
      if (o == Op::load && !x.channels) x = tensors[out];
      if (o != Op::store) return;
      const ConvShape& s = shapes[d.conv];
      const int reach = s.dilation * (s.kernel - 1);
      score = {s.c_out, tensors[in].height + s.pad[0] + s.pad[1] - reach, tensors[in].width + s.pad[2] + s.pad[3] - reach};
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
    const std::vector<float> weight(convs.at(conv).size(), 0.1f), bias(int64_t{rows[conv]} * convs[conv].channels, 0.1f);
    Base::set_conv(conv, {weight.data(), static_cast<int64_t>(weight.size())}, {bias.data(), static_cast<int64_t>(bias.size())});
  }
  void set_heads(int heads, Array) {
    const std::vector<float> given(tokens.at(heads), 0.5f);
    Base::set_heads(heads, {given.data(), static_cast<int64_t>(given.size())});
  }
  void set_norm(int norm, Array) {
    const std::vector<float> table(tables.at(norm), 0.5f);
    Base::set_norm(norm, {table.data(), static_cast<int64_t>(table.size())});
  }
};

}  // namespace hostile
