// Layers that move pixels and compute nothing.
#pragma once
#include "pointwise.h"

namespace sgm::SGM_ISA::executor {

static void nearest(const Run& run, const Layer& layer) {
  const Tensor &in = run.tensor(layer.input), &out = run.tensor(layer.output);
  const int down = out.height / in.height, right = out.width / in.width;
  for_each_row(run, layer, [&](int image, int h, int c) {
    const float* x = run.data(layer.input, image) + (int64_t)(h / down) * in.width * in.padded + c;
    float* y = run.data(layer.output, image) + (int64_t)h * out.width * out.padded + c;
    for (int w = 0; w < out.width; w++) store(y + (int64_t)w * out.padded, load(x + (int64_t)(w / right) * in.padded));
  });
}

static void concat(const Run& run, const Layer& layer) {
  const Tensor &a = run.tensor(layer.input), &b = run.tensor(layer.second), &out = run.tensor(layer.output);
  for_each_row(run, layer, [&](int image, int h, int c) {
    const float* first = run.data(layer.input, image) + (int64_t)h * a.width * a.padded;
    const float* second = run.data(layer.second, image) + (int64_t)h * b.width * b.padded;
    float* y = run.data(layer.output, image) + (int64_t)h * out.width * out.padded;
    for (int w = 0; w < out.width; w++, first += a.padded, second += b.padded, y += out.padded) {
      if (c + kWidth <= a.channels) store(y + c, load(first + c));
      else
        for (int k = c; k < c + kWidth; k++)
          y[k] = k < a.channels ? first[k] : k < out.channels ? second[k - a.channels] : 0.f;
    }
  });
}

}  // namespace sgm::SGM_ISA::executor
