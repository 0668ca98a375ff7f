// Random networks of the layers that score networks are made of, from load to store.
#pragma once
#include <algorithm>

#include "subject.h"

namespace network {

using namespace subject;

struct Network : Subject {
  std::vector<int> ids;                    // tensors so far
  std::vector<std::vector<Image>> values;  // of those, in every image
  struct Weights {
    int conv;
    std::vector<float> weight, bias;
  };
  struct Table {
    int norm;
    reference::Norm norm64;
    int channels;
  };
  std::vector<Weights> weights;
  std::vector<Table> tables;

  Network(unsigned seed, Precision precision)
      : Subject(seed, precision) {
    const int channels = random.from(1, 4), height = 2 * random.from(2, 7), width = 2 * random.from(2, 7);
    x = random.normals(static_cast<size_t>(images) * channels * height * width, 1);
    std::vector<Image> loaded;
    for (int i = 0; i < images; ++i) {
      level.push_back(random.below(kLevels));
      loaded.emplace_back(channels, height, width);
      const float* source = x.data() + static_cast<size_t>(i) * loaded[0].v.size();
      for (size_t j = 0; j < loaded[i].v.size(); ++j) loaded[i].v[j] = 2 * static_cast<double>(source[j]) - 1;
    }
    const int first = executor.tensor(channels, height, width);
    executor.layer(Op::load, -1, -1, first, {}, -1, Activation::none, -1, 2, -1);
    ids.push_back(first), values.push_back(loaded);
    for (int layers = random.from(3, 9); layers > 0; --layers) add_layer();
    int last = static_cast<int>(ids.size()) - 1;
    while (shape(last).height != height || shape(last).width != width) --last;
    const int norm = add_norm(last), conv = add_conv(last, channels, 3, 1, 1, 1, false);
    const auto activation = static_cast<Activation>(random.below(4));
    executor.layer(Op::store, ids[last], -1, -1, {}, norm, activation, conv, 1, 0);
    for (int i = 0; i < images; ++i) score.push_back(convolved(prologue(last, i, norm, activation), 3, 1, 1, 1));
    executor.plan();
    pack();
  }

  void pack() {
    for (const Weights& w : weights) executor.set_conv(w.conv, array(w.weight), array(w.bias));
    for (const Table& t : tables) executor.set_norm(t.norm, array(t.norm64.table));
  }

  const Image& shape(int at) const { return values[at][0]; }

  int add_norm(int at) {
    if (random.below(2)) return -1;
    const int channels = shape(at).channels, kind = random.below(4);
    reference::Norm n{channels, kLevels, random.below(2) == 1, false, 0.1, {}};
    if (kind == 0) n.groups = 0;
    if (kind == 1) n.groups = channels % 4 == 0 ? channels / 4 : channels % 3 == 0 ? channels / 3 : 1;
    if (kind == 2) n.has_alpha = channels > 1;
    n.table = random.normals(static_cast<size_t>(n.per_level ? kLevels : 1) * 3 * channels, 0.7f);
    tables.push_back({executor.norm(channels, n.groups, kLevels, n.per_level, n.has_alpha, n.eps), n, channels});
    return tables.back().norm;
  }

  int add_conv(int at, int c_out, int kernel, int dilation, int stride, int padding, bool pool) {
    const int c_in = shape(at).channels, taps = kernel * kernel;
    const float scale = 1 / std::sqrt(static_cast<float>(c_in * taps));
    weights.push_back({executor.conv(c_in, c_out, kernel, dilation, stride, padding, pool),
                       random.normals(static_cast<size_t>(c_in) * c_out * taps, scale), random.normals(c_out, 0.3f)});
    return weights.back().conv;
  }

  Image prologue(int at, int image, int norm, Activation activation) const {
    Image y = values[at][image];
    if (norm >= 0) y = reference::normalise(y, tables.back().norm64, level[image]);
    for (double& v : y.v) v = reference::activation(activation, v);
    return y;
  }

  Image convolved(const Image& x, int kernel, int dilation, int stride, int padding) const {
    return reference::convolve(x, weights.back().weight, weights.back().bias, kernel, dilation, stride, padding);
  }

  void add_layer() {
    const int at = random.below(3) ? static_cast<int>(ids.size()) - 1 : random.below(static_cast<int>(ids.size()));
    const Image in = shape(at);
    auto activation = static_cast<Activation>(random.below(4));
    std::vector<Image> y;
    Op op = Op::conv;
    int norm = -1, conv = -1, second = -1;
    const bool even = in.height % 2 == 0 && in.width % 2 == 0;
    switch (random.below(12)) {
      case 0:
        op = Op::activate, norm = add_norm(at);
        for (int i = 0; i < images; ++i) y.push_back(prologue(at, i, norm, activation));
        break;
      case 1:
        op = random.below(2) ? Op::max_pool5 : Op::mean_pool5, norm = add_norm(at);
        for (int i = 0; i < images; ++i) y.push_back(reference::pool5(prologue(at, i, norm, activation), op == Op::max_pool5));
        break;
      case 2:
        if (!even || in.height < 4 || in.width < 4) return;
        op = Op::mean_pool, norm = add_norm(at);
        for (int i = 0; i < images; ++i) y.push_back(reference::mean_pool(prologue(at, i, norm, activation)));
        break;
      case 3: {
        if (in.height > 14 || in.width > 14) return;
        const bool copies = random.below(2) == 1;
        op = copies ? Op::nearest : Op::upsample, activation = Activation::none;
        for (const Image& v : values[at])
          y.push_back(copies ? reference::nearest(v, 2) : reference::upsample(v, 2 * in.height, 2 * in.width));
        break;
      }
      case 4: {
        const int other = random.below(static_cast<int>(ids.size()));
        if (shape(other).height != in.height || shape(other).width != in.width || in.channels > 40) return;
        op = Op::concat, second = ids[other], activation = Activation::none;
        for (int i = 0; i < images; ++i) y.push_back(reference::concat(values[at][i], values[other][i]));
        break;
      }
      default: {
        const bool pool = even && in.height > 2 && in.width > 2 && random.below(5) == 0;
        const int kernels[] = {1, 3, 3, 3, 3, 4, 5, 7}, kernel = pool ? 3 : kernels[random.below(8)];
        const int dilations[] = {1, 1, 2, 4, 9}, dilation = pool || kernel == 1 ? 1 : dilations[random.below(5)];
        const bool same = pool || kernel == 3 ? pool || random.below(4) > 0 : false;
        const int padding = same ? dilation : random.below(dilation * (kernel - 1) / 2 + 1);
        const int stride = same ? 1 : random.from(1, 2);
        if (std::min(in.height, in.width) + 2 * padding < dilation * (kernel - 1) + 1) return;
        norm = add_norm(at), conv = add_conv(at, random.from(2, 37), kernel, dilation, stride, padding, pool);
        for (int i = 0; i < images; ++i) {
          y.push_back(convolved(prologue(at, i, norm, activation), kernel, dilation, stride, padding));
          if (pool) y[i] = reference::mean_pool(y[i]);
        }
      }
    }
    std::vector<int> add;
    for (size_t other = 0; other < ids.size() && add.size() < 2; ++other)
      if (const Image& o = shape(static_cast<int>(other));
          o.channels == y[0].channels && o.height == y[0].height && o.width == y[0].width && random.below(2)) {
        add.push_back(ids[other]);
        for (int i = 0; i < images; ++i)
          for (size_t j = 0; j < y[i].v.size(); ++j) y[i].v[j] += values[other][i].v[j];
      }
    const int id = executor.tensor(y[0].channels, y[0].height, y[0].width);
    executor.layer(op, ids[at], second, id, add, norm, activation, conv, 1, 0);
    ids.push_back(id), values.push_back(y);
  }
};

}  // namespace network
