// Random networks of every layer but the gradients', and what they compute in double precision.
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
    ConvShape shape;
    std::vector<float> weight, bias;
  };
  struct Table {
    int norm;
    reference::Norm norm64;
    int channels;
  };
  std::vector<Weights> weights;
  std::vector<Table> tables;
  std::vector<reference::Heads> heads;

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
    Details loads;
    loads.scale = 2, loads.shift = -1;
    executor.layer(Op::load, -1, -1, first, {}, loads);
    ids.push_back(first), values.push_back(loaded);
    for (int layers = random.from(3, 9); layers > 0; --layers) add_layer();
    int last = static_cast<int>(ids.size()) - 1;
    while (shape(last).height != height || shape(last).width != width) --last;
    ConvShape ends{shape(last).channels, channels, 3, 1, 1, 1, 1, {1, 1, 1, 1}, random_border(shape(last), 1)};
    ends.levels = random.below(2) * kLevels;
    const int norm = add_norm(last), conv = add_conv(ends);
    const Activation activation = random_activation();
    Details stores = details(norm, activation, conv);
    stores.slope = reference::kSlope;
    executor.layer(Op::store, ids[last], -1, -1, {}, stores);
    for (int i = 0; i < images; ++i) score.push_back(convolved(prologue(last, i, norm, activation), i));
    executor.plan();
    pack();
  }

  void pack() {
    for (const Weights& w : weights) executor.set_conv(w.conv, array(w.weight), array(w.bias));
    for (const Table& t : tables) executor.set_norm(t.norm, array(t.norm64.table));
    for (size_t i = 0; i < heads.size(); ++i) executor.set_heads(static_cast<int>(i), array(heads[i].tokens));
  }

  const Image& shape(int at) const { return values[at][0]; }

  int add_norm(int at) {
    return random.below(2) ? -1 : add_norm(at, random.below(4));
  }

  int add_norm(int at, int kind) {
    const int channels = shape(at).channels;
    reference::Norm n{channels, kLevels, random.below(2) == 1, false, 0.1, {}};
    if (kind == 0) n.groups = 0;
    if (kind == 1) n.groups = channels % 4 == 0 ? channels / 4 : channels % 3 == 0 ? channels / 3 : 1;
    if (kind == 2) n.has_alpha = channels > 1;
    n.table = random.normals(static_cast<size_t>(n.per_level ? kLevels : 1) * 3 * channels, 0.7f);
    if (kind == 4) n.groups = channels % 3 ? 1 : 3, n.centred = random.below(2), n.floor = 0.2 * random.below(2), n.after = 0.2 * random.below(2);
    tables.push_back({executor.norm({channels, n.groups, n.per_level ? kLevels : 0, n.has_alpha, n.eps, kind == 4, n.centred, n.floor, n.after}), n, channels});
    return tables.back().norm;
  }

  int add_conv(const ConvShape& s) {
    const int taps = s.kernel * s.kernel, of_group = s.c_in / s.groups;
    const float scale = 1 / std::sqrt(static_cast<float>(of_group * taps));
    weights.push_back({executor.conv(s), s, random.normals(static_cast<size_t>(of_group) * s.c_out * taps, scale),
                       random.normals(static_cast<size_t>(std::max(s.levels, 1)) * s.c_out, 0.3f)});
    return weights.back().conv;
  }

  Activation random_activation() { return static_cast<Activation>(random.below(kActivations)); }

  // One that an image of this size can be padded with by `pad`.
  Border random_border(const Image& in, int pad) {
    const Border border = random.below(2) ? Border::zeros : static_cast<Border>(random.below(4));
    return pad < std::min(in.height, in.width) ? border : Border::zeros;
  }

  // A convolution of `in` that leaves something of it: ordinary, of uneven borders, strided, grouped, depthwise or transposed.
  ConvShape random_conv(const Image& in) {
    const int kernels[] = {1, 3, 3, 3, 3, 4, 5, 7}, dilations[] = {1, 1, 2, 4, 9};
    ConvShape s{in.channels, random.below(2) ? in.channels : random.from(2, 37), kernels[random.below(8)]};
    s.levels = random.below(3) ? 0 : kLevels;
    s.dilation = s.kernel == 1 ? 1 : dilations[random.below(5)];
    s.pool = in.height % 2 == 0 && in.width % 2 == 0 && in.height > 2 && in.width > 2 && random.below(4) == 0;
    if (s.pool) s.kernel = 3, s.dilation = 1;
    if (s.pool || (s.kernel == 3 && random.below(4))) {
      std::fill_n(s.pad, 4, s.dilation);
      s.border = random_border(in, s.dilation);
      return s;
    }
    const int reach = s.dilation * (s.kernel - 1);
    for (int& pad : s.pad) pad = random.below(reach / 2 + 2);
    if (random.below(3) == 0 && std::max(in.height, in.width) < 10) s.up = random.from(2, 3);
    else s.stride = random.from(1, 2), s.border = random_border(in, *std::max_element(s.pad, s.pad + 4));
    const int kind = random.below(3);
    if (kind == 0) s.groups = s.c_out = s.c_in;
    if (kind == 1 && s.c_in % 2 == 0) s.groups = s.c_in % 4 ? 2 : 4, s.c_out = s.groups * random.from(1, 9);
    return s;
  }

  Image prologue(int at, int image, int norm, Activation activation) const {
    Image y = values[at][image];
    if (norm >= 0) y = reference::normalise(y, tables.back().norm64, level[image]);
    for (double& v : y.v) v = reference::activation(activation, v);
    return y;
  }

  Image convolved(const Image& x, int image) const {
    const Weights& w = weights.back();
    return reference::convolve(x, w.weight, w.bias.data() + (w.shape.levels ? level[image] * w.shape.c_out : 0), w.shape);
  }

  // q, k and v of a value, normalised so that no weight is all there is.
  void add_heads() {
    const int at = static_cast<int>(ids.size()) - 1, count = random.from(1, 3), size = random.from(1, 21), memory = random.below(3) * random.below(5);
    const ConvShape s{shape(at).channels, 3 * (count * size + random.below(2)), 1};
    const int norm = add_norm(at, 1), conv = add_conv(s);
    std::vector<Image> y;
    for (int i = 0; i < images; ++i) y.push_back(convolved(prologue(at, i, norm, Activation::none), i));
    push(Op::conv, ids[at], -1, y, details(norm, Activation::none, conv));
    const bool linear = random.below(2);
    heads.push_back({count, size, 0.7 + random.below(2), memory, random.normals(static_cast<size_t>(2) * count * memory * size, 1)});
    const int index = executor.heads(count, size, heads.back().scale, memory);
    for (Image& v : y) v = linear ? reference::linear_attention(v, heads.back()) : reference::attention(v, heads.back());
    push(linear ? Op::linear_attention : Op::attention, ids.back(), -1, y, details(-1, Activation::none, -1, index));
  }

  void add_layer() {
    const int at = random.below(5) ? static_cast<int>(ids.size()) - 1 : random.below(static_cast<int>(ids.size()));
    const Image in = shape(at);
    Activation activation = random_activation();
    std::vector<Image> y;
    Op op = Op::conv;
    int norm = -1, conv = -1, second = -1;
    const bool even = in.height % 2 == 0 && in.width % 2 == 0;
    switch (random.below(17)) {
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
      case 5: case 6: return add_heads();
      case 7: case 8:
        op = Op::channel_norm, norm = add_norm(at, 4);
        for (int i = 0; i < images; ++i) {
          y.push_back(reference::normalise_pixels(values[at][i], tables.back().norm64, level[i]));
          for (double& v : y[i].v) v = reference::activation(activation, v);
        }
        break;
      default: {
        const ConvShape s = random_conv(in);
        const auto left = [&](int n, int pads) { return s.up * (n - 1) + 1 + pads - s.dilation * (s.kernel - 1); };
        if (std::min(left(in.height, s.pad[kTop] + s.pad[kBottom]), left(in.width, s.pad[kLeft] + s.pad[kRight])) < 1) return;
        norm = add_norm(at), conv = add_conv(s);
        for (int i = 0; i < images; ++i) {
          y.push_back(convolved(prologue(at, i, norm, activation), i));
          if (s.pool) y[i] = reference::mean_pool(y[i]);
        }
      }
    }
    std::vector<Addend> add;
    for (size_t other = 0; other < ids.size() && add.size() < 2; ++other)
      if (const Image& o = shape(static_cast<int>(other));
          o.channels == y[0].channels && o.height == y[0].height && o.width == y[0].width && random.below(2)) {
        const double scale = random.below(2) ? 1 : 0.75;
        add.push_back({ids[other], scale});
        for (int i = 0; i < images; ++i)
          for (size_t j = 0; j < y[i].v.size(); ++j) y[i].v[j] += scale * values[other][i].v[j];
      }
    push(op, ids[at], second, y, details(norm, activation, conv), add);
  }

  void push(Op op, int input, int second, const std::vector<Image>& y, Details d, const std::vector<Addend>& add = {}) {
    const int id = executor.tensor(y[0].channels, y[0].height, y[0].width);
    d.slope = reference::kSlope;
    executor.layer(op, input, second, id, add, d);
    ids.push_back(id), values.push_back(y);
  }
};

}  // namespace network
