// Layers that move pixels and compute nothing.
#pragma once
#include "pointwise.h"

namespace sgm::SGM_ISA::executor {

// How often nearest repeats a pixel.
SGM_INLINE int factor_of(int small, int large) { return (large + small - 1) / small; }

static void nearest(const Run& run, const Layer& layer) {
  const Tensor &in = run.tensor(layer.input), &out = run.tensor(layer.output);
  const int down = factor_of(in.height, out.height), right = factor_of(in.width, out.width);
  for_each_row(run, layer, [&](int image, int h, int c) {
    const float* x = run.data(layer.input, image) + (int64_t)(h / down) * in.width * in.padded + c;
    float* y = run.data(layer.output, image) + (int64_t)h * out.width * out.padded + c;
    for (int w = 0; w < out.width; w++) {
      __builtin_prefetch(y + (int64_t)(w + kAhead) * out.padded, 1);
      store(y + (int64_t)w * out.padded, load(x + (int64_t)(w / right) * in.padded));
    }
  });
}

static void concat(const Run& run, const Layer& layer) {
  const Tensor &a = run.tensor(layer.input), &b = run.tensor(layer.second), &out = run.tensor(layer.output);
  for_each_row(run, layer, [&](int image, int h, int c) {
    const float* first = run.data(layer.input, image) + (int64_t)h * a.width * a.padded;
    const float* second = run.data(layer.second, image) + (int64_t)h * b.width * b.padded;
    float* y = run.data(layer.output, image) + (int64_t)h * out.width * out.padded;
    for (int w = 0; w < out.width; w++, first += a.padded, second += b.padded, y += out.padded) {
      const float* const whole = c + kWidth <= a.channels ? first + c : c >= a.channels ? second + (c - a.channels) : nullptr;
      if (whole && c + kWidth <= out.channels) {
        __builtin_prefetch(whole + (int64_t)kAhead * (c < a.channels ? a : b).padded);
        __builtin_prefetch(y + c + (int64_t)kAhead * out.padded, 1);
        store(y + c, load(whole));
      } else
        for (int k = c; k < c + kWidth; k++)
          y[k] = k < a.channels ? first[k] : k < out.channels ? second[k - a.channels] : 0.f;
    }
  });
}

// The transpose of nearest.
static void block_sum(const Run& run, const Layer& layer) {
  const Tensor &in = run.tensor(layer.input), &out = run.tensor(layer.output);
  const int down = factor_of(out.height, in.height), right = factor_of(out.width, in.width);
  for_each_row(run, layer, [&](int image, int h, int c) {
    const float* x = run.data(layer.input, image) + c;
    float* y = run.data(layer.output, image) + (int64_t)h * out.width * out.padded + c;
    for (int w = 0; w < out.width; w++) {
      Vec sum = Vec{};
      for (int i = h * down; i < least((h + 1) * down, in.height); i++)
        for (int j = w * right; j < least((w + 1) * right, in.width); j++) sum += load(x + ((int64_t)i * in.width + j) * in.padded);
      store(y + (int64_t)w * out.padded, sum);
    }
  });
}

// Zeros between: the transpose of a convolution of stride 2 is an ordinary one of this.
static void spread(const Run& run, const Layer& layer) {
  const Tensor &in = run.tensor(layer.input), &out = run.tensor(layer.output);
  for_each_row(run, layer, [&](int image, int h, int c) {
    const float* x = run.data(layer.input, image) + (int64_t)(h / 2) * in.width * in.padded + c;
    float* y = run.data(layer.output, image) + (int64_t)h * out.width * out.padded + c;
    for (int w = 0; w < out.width; w++)
      store(y + (int64_t)w * out.padded, (h | w) & 1 ? Vec{} : load(x + (int64_t)(w / 2) * in.padded));
  });
}

static void slice(const Run& run, const Layer& layer) {
  const Tensor &in = run.tensor(layer.input), &out = run.tensor(layer.output);
  for_each_row(run, layer, [&](int image, int h, int c) {
    const float* x = run.data(layer.input, image) + (int64_t)h * in.width * in.padded + layer.first + c;
    float* y = run.data(layer.output, image) + (int64_t)h * out.width * out.padded + c;
    for (int w = 0; w < out.width; w++, x += in.padded, y += out.padded) {
      if (c + kWidth <= out.channels) store(y, load(x));
      else
        for (int k = 0; k < kWidth; k++) y[k] = c + k < out.channels ? x[k] : 0.f;
    }
  });
}

static void constant(const Run& run, const Layer& layer) {
  const Tensor& t = run.tensor(layer.output);
  for_each_row(run, layer, [&](int image, int h, int c) {
    const int64_t offset = (int64_t)h * t.width * t.padded + c;
    const float* x = run.program.constants[layer.first] + offset;
    float* y = run.data(layer.output, image) + offset;
    for (int64_t i = 0; i < (int64_t)t.width * t.padded; i += t.padded) store(y + i, load(x + i));
  });
}

// The numbers of an image pixel by pixel, in pixels of another number of channels.
static void reshape(const Run& run, const Layer& layer) {
  const Tensor &in = run.tensor(layer.input), &out = run.tensor(layer.output);
  for (int image = run.member.rank; image < run.images; image += run.member.size) {
    const float* x = run.data(layer.input, image);
    float* y = run.data(layer.output, image);
    int from = 0, to = 0;  // channels of the pixels at x and y
    for (int left = out.channels * out.height * out.width; left;) {
      const int count = least(in.channels - from, out.channels - to);
      memcpy(y + to, x + from, count * sizeof(float));
      left -= count, from += count, to += count;
      if (from == in.channels) from = 0, x += in.padded;
      if (to < out.channels) continue;
      memset(y + to, 0, (out.padded - to) * sizeof(float));
      to = 0, y += out.padded;
    }
  }
  run.wait();
}

}  // namespace sgm::SGM_ISA::executor
