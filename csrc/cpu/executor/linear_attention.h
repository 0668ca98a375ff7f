// Linear attention over the pixels of an image (Shen et al. 2021): a head's keys and values meet in one small matrix.
#pragma once
#include "attention.h"
#include "heads.h"

namespace sgm::SGM_ISA::executor {

// One head of one image. In scratch: keys and values [memory + pixels][columns], the context [size][columns], queries and
// answers [kLanes][columns].
struct LinearHead {
  const HeadLayout& at;
  const float* image;
  int head;
  float* scratch;
  static constexpr int kLanes = kQueryVectors * kWidth;
  int columns() const { return (at.heads.size + kWidth - 1) / kWidth * kWidth; }
  float* keys() const { return scratch; }
  float* values() const { return keys() + (int64_t)at.keys * columns(); }
  float* context() const { return values() + (int64_t)at.keys * columns(); }
  float* queries() const { return context() + (int64_t)at.heads.size * columns(); }

  // Channels of one pixel, zeros behind them.
  void copy(const float* from, float* to) const {
    memcpy(to, from, at.heads.size * sizeof(float));
    memset(to + at.heads.size, 0, (columns() - at.heads.size) * sizeof(float));
  }

  // context = scale·softmax(k)·vᵀ, the softmax over the pixels.
  void make_context() const {
    const int n = columns();
    for (int i = 0; i < at.keys; i++) copy(at.row(image, 0, head, i), keys() + (int64_t)i * n), copy(at.row(image, 1, head, i), values() + (int64_t)i * n);
    float* const share = queries();  // of each channel: scale over the sum of its weights
    for (int c = 0; c < n; c += kWidth) {
      Vec most = load(keys() + c), sum = Vec{};
      for (int i = 1; i < at.keys; i++) {
        const Vec v = load(keys() + (int64_t)i * n + c);
        most = v > most ? v : most;
      }
      for (int i = 0; i < at.keys; i++) {
        float* const k = keys() + (int64_t)i * n + c;
        const Vec e = exp2_bounded(1.44269504f * (load(k) - most));
        store(k, e);
        sum += e;
      }
      store(share + c, at.heads.scale / sum);
    }
    product(at.heads.size, n, keys(), 1, n, values(), n, at.keys, 1.f, context(), n);
    for (int d = 0; d < at.heads.size; d++)
      for (int c = 0; c < n; c += kWidth) store(context() + (int64_t)d * n + c, load(context() + (int64_t)d * n + c) * share[d]);
  }

  // Rows [first, first + rows) of contextᵀ·softmax(q), the softmax over the head's channels: a lane is a pixel.
  void answer(int first, int rows, float* out, int stride) const {
    const int size = at.heads.size;
    float *const q = queries(), *const result = q + (int64_t)size * kLanes;
    for (int i = 0; i < kLanes; i++) {
      const float* x = image + (int64_t)(first + least(i, rows - 1)) * at.in.padded + head * size;
      for (int c = 0; c < size; c += 16) __builtin_prefetch(x + (int64_t)kLanes * at.in.padded + c);  // of the next block
      for (int c = 0; c < size; c++) q[c * kLanes + i] = x[c];
    }
    for (int j = 0; j < kLanes; j += kWidth) {
      Vec most = load(q + j), sum = Vec{};
      for (int c = 1; c < size; c++) most = load(q + c * kLanes + j) > most ? load(q + c * kLanes + j) : most;
      for (int c = 0; c < size; c++) {
        const Vec e = exp2_bounded(1.44269504f * (load(q + c * kLanes + j) - most));
        store(q + c * kLanes + j, e);
        sum += e;
      }
      const Vec share = 1.f / sum;
      for (int c = 0; c < size; c++) store(q + c * kLanes + j, load(q + c * kLanes + j) * share);
    }
    float* const to = out + (int64_t)first * stride + head * size;
    const bool whole = size % kWidth == 0;  // else a row's last vector would spill into the next head
    product(rows, columns(), q, 1, kLanes, context(), columns(), size, 1.f, whole ? to : result, whole ? stride : columns());
    for (int i = 0; i < rows && !whole; i++) memcpy(to + (int64_t)i * stride, result + (int64_t)i * columns(), size * sizeof(float));
  }
};

// Members split the heads.
static void linear_attention(const Run& run, const Layer& layer) {
  const Tensor &in = run.tensor(layer.input), &out = run.tensor(layer.output);
  const Heads& heads = run.program.heads[layer.heads];
  const HeadLayout at(heads, in);
  const int pixels = in.height * in.width;
  float* const scratch = run.workspace.products + run.member.rank * run.workspace.products_stride;
  int first, last;
  run.share(heads.count, first, last);
  for (int image = 0; image < run.images; image++) {
    float* const y = run.data(layer.output, image);
    for (int head = first; head < last; head++) {
      const LinearHead one{at, run.data(layer.input, image), head, scratch};
      one.make_context();
      for (int row = 0; row < pixels; row += LinearHead::kLanes) one.answer(row, least(LinearHead::kLanes, pixels - row), y, out.padded);
    }
    if (first < last && last == heads.count)
      for (int i = 0; i < pixels; i++)
        for (int c = out.channels; c < out.padded; c++) y[(int64_t)i * out.padded + c] = 0.f;
  }
  run.wait();
  if (out.moments >= 0) for_each_row(run, layer, [](int, int, int) {});
}

}  // namespace sgm::SGM_ISA::executor
