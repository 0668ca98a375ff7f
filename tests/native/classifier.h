// Random networks whose score is a gradient in their input: the layers of sgm_engine/executors/native/gradient.py, written out.
// Differences of the way forward in double precision say what the way back must give.
#pragma once
#include <functional>

#include "subject.h"

namespace classifier {

using namespace subject;

constexpr int kHead = 16;  // channels of q, k and v: what the longest vector divides

struct Classifier : Subject {
  using Map = std::function<Image(const Image&)>;
  std::vector<std::function<int(int)>> back;  // gradient of a layer's output → of its input, a tensor each
  std::vector<Map> forward;                   // what the layers compute of one image
  std::vector<std::function<void()>> packs;
  int at = 0;         // the last tensor
  Image now{1, 1, 1};  // its shape

  Classifier(unsigned seed, Precision precision) : Subject(seed, precision) {
    const int channels = random.from(1, 2), patch = random.from(1, 2), height = patch * random.from(1, 5), width = patch * random.from(1, 5);
    const std::vector<int> octaves(random.below(3), random.from(0, 2));
    x = random.normals(static_cast<size_t>(images) * channels * height * width, 1);
    std::vector<double> table;
    for (int i = 0; i < 5 * kLevels; ++i) table.push_back(random.normal());
    executor.embedding(channels, height, width, patch, octaves);
    const int planes = channels * (1 + 2 * static_cast<int>(octaves.size()));
    now = Image(planes * patch * patch, height / patch, width / patch);
    const int embedded = at = executor.tensor(now.channels, now.height, now.width);
    executor.layer(Op::embed, -1, -1, at, {}, {});
    forward.push_back([=](const Image& u) {
      return reference::fill(Image(planes * patch * patch, height / patch, width / patch), [&](int c, int h, int w) {
        const int plane = c / (patch * patch), wave = plane / channels;
        const double v = u.at(plane % channels, h * patch + c / patch % patch, w * patch + c % patch);
        if (wave == 0) return v;
        const double angle = std::ldexp(std::acos(-1.0), octaves[(wave - 1) / 2]) * v;
        return wave % 2 ? std::sin(angle) : std::cos(angle);
      });
    });
    add_conv(3, 1);
    for (int layers = random.from(1, 4); layers > 0; --layers) add_layer();

    std::vector<float> rows = random.normals(static_cast<size_t>(kLevels) * 3 * now.channels, 0.5f);
    const int norm = executor.norm({now.channels, 0, kLevels}), count = now.channels;
    int gradient = executor.tensor(now.channels, now.height, now.width);
    executor.layer(Op::slope, at, -1, gradient, {}, details(norm, Activation::silu));
    for (size_t i = back.size(); i-- > 0;) gradient = back[i](gradient);
    executor.layer(Op::store_gradient, gradient, embedded, -1, {}, {});
    executor.plan();
    executor.set_embedding(table.data(), static_cast<int64_t>(table.size()));
    executor.set_norm(norm, array(rows));
    pack();

    for (int i = 0; i < images; ++i) {
      level.push_back(random.below(kLevels));
      const double* t = table.data() + 5 * level[i];
      Image own(channels, height, width), u = own;
      const size_t size = own.v.size();
      for (size_t j = 0; j < size; ++j) own.v[j] = x[i * size + j], u.v[j] = t[0] * own.v[j] + t[1];
      const auto value = [&] {  // Σ γ(level)·silu over channels and pixels
        Image y = u;
        for (const Map& f : forward) y = f(y);
        double sum = 0;
        for (size_t j = 0; j < y.v.size(); ++j)
          sum += rows[level[i] * 3 * count + j / (y.height * y.width)] * reference::activation(Activation::silu, y.v[j]);
        return sum;
      };
      score.emplace_back(channels, height, width);
      for (double& v : score[i].v) v = NAN;
      for (int tries = 0; tries < 4; ++tries) {
        const size_t j = random.below(static_cast<int>(size));
        const double kept = u.v[j], step = 1e-5;
        const auto moved = [&](double by) { return u.v[j] = kept + by, value(); };
        const double slope = (moved(step) - moved(-step)) / (2 * step);
        u.v[j] = kept;
        score[i].v[j] = t[2] * slope + t[3] * own.v[j] + t[4];
      }
    }
  }

  void pack() {
    for (const auto& f : packs) f();
  }

  int tensor(const Image& shape) { return executor.tensor(shape.channels, shape.height, shape.width); }

  int emit(Op op, int input, int second, const Image& shape, const std::vector<int>& add = {}, int norm = -1,
           Activation activation = Activation::none, int conv = -1, int first = 0, int heads = -1) {
    const int id = tensor(shape);
    std::vector<Addend> addends;
    for (const int a : add) addends.push_back({a, 1});
    Details d = details(norm, activation, conv, heads);
    d.first = first;
    executor.layer(op, input, second, id, addends, d);
    return id;
  }

  // A convolution of conv's kernel turned round, of what spread puts zeros into if it has stride 2.
  void add_conv(int kernel, int stride) { add_conv(random.from(2, 21), kernel, stride, false, false); }

  // head: of every kHead outputs those that are not zero.
  void add_conv(int c_out, int kernel, int stride, bool normed, bool residual, int head = kHead) {
    const Image in = now;
    const int c_in = in.channels, taps = kernel * kernel, pad = kernel / 2, from = at;
    std::vector<float> w = random.normals(static_cast<size_t>(c_in) * c_out * taps, 1 / std::sqrt(static_cast<float>(c_in * taps)));
    std::vector<float> bias = random.normals(c_out, 0.3f);
    for (int k = 0; k < c_out; ++k)
      if (k % kHead >= head) bias[k] = 0, std::fill_n(w.begin() + static_cast<int64_t>(k) * c_in * taps, c_in * taps, 0.f);
    std::vector<float> turned(w.size());
    for (int k = 0; k < c_out; ++k)
      for (int c = 0; c < c_in; ++c)
        for (int t = 0; t < taps; ++t) turned[(static_cast<size_t>(c) * c_out + k) * taps + t] = w[(static_cast<size_t>(k) * c_in + c) * taps + taps - 1 - t];
    reference::Norm n{c_in % 3 ? 1 : c_in / 3, 1, false, false, 0.1, random.normals(3 * c_in, 0.7f)};
    const int norm = normed ? executor.norm({c_in, n.groups, 0, false, n.eps}) : -1;
    const Activation activation = normed && random.below(4) ? Activation::silu : Activation::none;
    const int conv = executor.conv({c_in, c_out, kernel, 1, stride, 1, 1, {pad, pad, pad, pad}});
    const int other = executor.conv({c_out, c_in, kernel, 1, 1, 1, 1, {pad, pad, pad, pad}});
    now = Image(c_out, (in.height + stride - 1) / stride, (in.width + stride - 1) / stride);
    at = emit(Op::conv, from, -1, now, residual ? std::vector<int>{from} : std::vector<int>{}, norm, activation, conv);
    packs.push_back([=] {
      executor.set_conv(conv, array(w), array(bias)), executor.set_conv(other, array(turned), {nullptr, 0});
      if (normed) executor.set_norm(norm, array(n.table));
    });
    forward.push_back([=](const Image& v) {
      Image y = normed ? reference::normalise(v, n, 0) : v;
      for (double& p : y.v) p = reference::activation(activation, p);
      y = reference::convolve(y, w, bias.data(), {c_in, c_out, kernel, 1, stride, 1, 1, {pad, pad, pad, pad}});
      if (residual)
        for (size_t j = 0; j < y.v.size(); ++j) y.v[j] += v.v[j];
      return y;
    });
    back.push_back([=](int g) {
      const std::vector<int> add = residual ? std::vector<int>{g} : std::vector<int>{};
      const int wide = stride == 2 ? emit(Op::spread, g, -1, Image(c_out, in.height, in.width)) : g;
      if (!normed) return emit(Op::conv, wide, -1, in, add, -1, Activation::none, other);
      const int inner = emit(Op::conv, wide, -1, in, {}, -1, Activation::none, other);
      return emit(Op::norm_backward, from, inner, in, add, norm, activation);
    });
  }

  void add_layer() {
    const Image in = now;
    const int from = at;
    switch (random.below(5)) {
      case 0: return add_conv(random.from(2, 21), random.below(2) ? 3 : 1, 2, true, false);
      case 1: {
        now = Image(in.channels, 2 * in.height - random.below(std::min(in.height, 2)), 2 * in.width);
        const int height = now.height;
        at = emit(Op::nearest, from, -1, now);
        forward.push_back([=](const Image& v) {
          return reference::fill(Image(v.channels, height, 2 * v.width), [&](int c, int h, int w) { return v.at(c, h / 2, w / 2); });
        });
        back.push_back([=](int g) { return emit(Op::block_sum, g, -1, in); });
        return;
      }
      case 2: {
        now = Image(2 * in.channels, in.height, in.width);
        at = emit(Op::concat, from, from, now);
        forward.push_back([](const Image& v) { return reference::concat(v, v); });
        back.push_back([=](int g) {
          const int first = emit(Op::slice, g, -1, in);
          return emit(Op::slice, g, -1, in, {first}, -1, Activation::none, -1, in.channels);
        });
        return;
      }
      case 3: {
        const int channels = random.from(2, kHead);
        add_conv(3 * kHead, 1, 1, true, false, channels);
        const Image qkv = now;
        const int input = at;
        now = Image(channels, in.height, in.width);
        const double scale = 1 / std::sqrt(channels);
        at = emit(Op::attention, input, -1, now, {}, -1, Activation::none, -1, 0, executor.heads(1, channels, scale, 0));
        forward.push_back([=](const Image& v) { return reference::attention(v, {1, channels, scale, 0, {}}); });
        back.push_back([=](int g) { return emit(Op::attention_backward, input, g, qkv); });
        return;
      }
      default: return add_conv(in.channels, 3, 1, true, true);
    }
  }
};

}  // namespace classifier
