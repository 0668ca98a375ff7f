// The layers that are not convolutions. Members split the channels, except where a layer has hardly any.
#pragma once
#include "prologue.h"

namespace sgm::SGM_ISA::executor {

// Adds the residuals to one row of an output and counts the row into its moments.
static void finish_row(const Run& run, const Layer& layer, int image, int h, int c) {
  const Tensor& out = run.tensor(layer.output);
  const int64_t offset = (int64_t)h * out.width * out.padded + c;
  float* row = run.data(layer.output, image) + offset;
  for (int a = 0; a < 2; a++) {
    if (layer.add[a] < 0) continue;
    const float* add = run.data(layer.add[a], image) + offset;
    for (int64_t i = 0; i < (int64_t)out.width * out.padded; i += out.padded) store(row + i, load(row + i) + load(add + i) * layer.add_scale[a]);
  }
  float* kept = run.moments(layer.output, image);
  if (!kept) return;
  Moments moments = h ? Moments::read(kept + c, out.padded) : Moments::start(Vec{});
  moments.add(row, out.padded, h * out.width, out.width);
  moments.write(kept + c, out.padded);
}

// output = scale·x + shift; channels beyond the network's are zero
static void load_input(const Run& run, const Layer& layer) {
  const Tensor& out = run.tensor(layer.output);
  const int pixels = out.height * out.width;
  const int64_t channel_step = run.batch.nhwc ? 1 : pixels, pixel_step = run.batch.nhwc ? out.channels : 1;
  if (run.member.rank == 0)
    for (int image = 0; image < run.images; image++) {
      const float* x = run.batch.x + (int64_t)run.batch.slot[image] * out.channels * pixels;
      float* y = run.data(layer.output, image);
      for (int i = 0; i < pixels; i++)
        for (int c = 0; c < out.padded; c++)
          y[(int64_t)i * out.padded + c] = c < out.channels ? x[c * channel_step + i * pixel_step] * layer.scale + layer.shift : 0.f;
      for (int h = 0; h < out.height; h++)
        for (int c = 0; c < out.padded; c += kWidth) finish_row(run, layer, image, h, c);
    }
  run.wait();
}

// Calls row(image, h, c) for every row of the output and every channel vector of this member.
template <class Row>
SGM_INLINE void for_each_row(const Run& run, const Layer& layer, const Row& row) {
  const Tensor& out = run.tensor(layer.output);
  int first, last;
  run.share(out.padded / kWidth, first, last);
  for (int image = 0; image < run.images; image++)
    for (int h = 0; h < out.height; h++)
      for (int c = first * kWidth; c < last * kWidth; c += kWidth) {
        row(image, h, c);
        finish_row(run, layer, image, h, c);
      }
  run.wait();
}

static void activate_layer(const Run& run, const Layer& layer) {
  const Tensor& t = run.tensor(layer.output);
  const Reader<Float> read_row(run, layer);
  for_each_row(run, layer, [&](int image, int h, int c) {
    const int64_t offset = (int64_t)h * t.width * t.padded + c;
    read_row(run.data(layer.input, image) + offset, t.padded, run.data(layer.output, image) + offset, t.padded, t.width,
             image, c);
  });
}

static void mean_pool(const Run& run, const Layer& layer) {
  const Tensor &in = run.tensor(layer.input), &out = run.tensor(layer.output);
  const Reader<Float> read_row(run, layer);
  float* const rows = run.workspace.rows + run.member.rank * run.workspace.rows_stride;  // two input rows
  for_each_row(run, layer, [&](int image, int h, int c) {
    for (int r = 0; r < 2; r++)
      read_row(run.data(layer.input, image) + (int64_t)(2 * h + r) * in.width * in.padded + c, in.padded,
               rows + (int64_t)r * in.width * kWidth, kWidth, in.width, image, c);
    float* y = run.data(layer.output, image) + (int64_t)h * out.width * out.padded + c;
    for (int w = 0; w < out.width; w++) {
      const float *top = rows + 2 * w * kWidth, *bottom = top + (int64_t)in.width * kWidth;
      store(y + (int64_t)w * out.padded, 0.25f * ((load(top) + load(bottom)) + (load(top + kWidth) + load(bottom + kWidth))));
    }
  });
}

// 5×5 windows, stride 1: along the row into a ring of five rows, then down the ring.
template <bool kMaximum>
static void pool5(const Run& run, const Layer& layer) {
  constexpr int kReach = 2, kRing = 2 * kReach + 1;
  const Tensor& t = run.tensor(layer.output);
  const Reader<Float> read_row(run, layer);
  const int64_t row_size = (int64_t)t.width * kWidth;
  float* const ring = run.workspace.rows + run.member.rank * run.workspace.rows_stride;
  float* const line = ring + kRing * row_size;
  const auto combine = [](Vec a, Vec b) {
    if constexpr (kMaximum) return a > b || a != a ? a : b;  // NaN wins, as in PyTorch
    else return a + b;
  };
  int first, last;
  run.share(t.padded / kWidth, first, last);
  for (int image = 0; image < run.images; image++)
    for (int c = first * kWidth; c < last * kWidth; c += kWidth) {
      const float* src = run.data(layer.input, image) + c;
      float* dst = run.data(layer.output, image) + c;
      for (int ready = 0, h = 0; h < t.height; h++) {
        for (; ready < least(h + kReach + 1, t.height); ready++) {
          read_row(src + (int64_t)ready * t.width * t.padded, t.padded, line, kWidth, t.width, image, c);
          float* const out = ring + ready % kRing * row_size;
          for (int w = 0; w < t.width; w++) {
            const int low = most(w - kReach, 0), high = least(w + kReach, t.width - 1);
            Vec v = load(line + low * kWidth);
            for (int q = low + 1; q <= high; q++) v = combine(v, load(line + q * kWidth));
            store(out + w * kWidth, v);
          }
        }
        const int low = most(h - kReach, 0), high = least(h + kReach, t.height - 1);
        for (int w = 0; w < t.width; w++) {
          Vec v = load(ring + low % kRing * row_size + w * kWidth);
          for (int q = low + 1; q <= high; q++) v = combine(v, load(ring + q % kRing * row_size + w * kWidth));
          store(dst + ((int64_t)h * t.width + w) * t.padded, kMaximum ? v : v * (1.f / (kRing * kRing)));
        }
        finish_row(run, layer, image, h, c);
      }
    }
  run.wait();
}

// Bilinear, corners aligned.
static void upsample(const Run& run, const Layer& layer) {
  const Tensor &in = run.tensor(layer.input), &out = run.tensor(layer.output);
  const float scale_h = out.height > 1 ? (float)(in.height - 1) / (float)(out.height - 1) : 0.f;
  const float scale_w = out.width > 1 ? (float)(in.width - 1) / (float)(out.width - 1) : 0.f;
  for_each_row(run, layer, [&](int image, int h, int c) {
    const float at_h = (float)h * scale_h;
    const int h0 = (int)at_h, h1 = least(h0 + 1, in.height - 1);
    const float down = at_h - (float)h0;
    const float* top = run.data(layer.input, image) + (int64_t)h0 * in.width * in.padded + c;
    const float* bottom = run.data(layer.input, image) + (int64_t)h1 * in.width * in.padded + c;
    float* y = run.data(layer.output, image) + (int64_t)h * out.width * out.padded + c;
    for (int w = 0; w < out.width; w++) {
      const float at_w = (float)w * scale_w;
      const int w0 = (int)at_w, w1 = least(w0 + 1, in.width - 1);
      const float right = at_w - (float)w0;
      const int64_t a = (int64_t)w0 * in.padded, b = (int64_t)w1 * in.padded;
      const Vec upper = load(top + a) * (1.f - right) + load(top + b) * right;
      const Vec lower = load(bottom + a) * (1.f - right) + load(bottom + b) * right;
      store(y + (int64_t)w * out.padded, upper * (1.f - down) + lower * down);
    }
  });
}

}  // namespace sgm::SGM_ISA::executor
