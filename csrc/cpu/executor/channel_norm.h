// Norms across the channels of a pixel: LayerNorm, RMSNorm and their kin.
#pragma once
#include "pointwise.h"

namespace sgm::SGM_ISA::executor {

// Sums f(v) over channels [first, last) of a pixel, lane by lane; what a vector holds beyond them counts as nothing.
template <class F>
SGM_INLINE float sum_channels(const float* x, int first, int last, const F& f) {
  Vec sum = Vec{};
  int c = first;
  for (; c + kWidth <= last; c += kWidth) sum += f(load(x + c));
  float total = horizontal_sum(sum);
  if (c < last) {
    float rest[kWidth] = {}, kept = 0;
    memcpy(rest, x + c, (last - c) * sizeof(float));
    store(rest, f(load(rest)));
    for (int i = 0; i < last - c; i++) kept += rest[i];
    total += kept;
  }
  return total;
}

// y = γ·(x − mean)/(after + √(max(variance, floor) + eps)) + β of a row of pixels, group by group of channels. In scratch:
// [2][width] means and scales, all scales of a row at once.
static void normalise_row(const Norm& norm, const float* table, const float* x, float* y, int width, int stride, float* scratch) {
  const int size = norm.channels / norm.groups;
  const float share = 1.f / (float)size, *gamma = table, *beta = table + 2 * norm.channels;
  float *const means = scratch, *const scales = scratch + width;
  for (int first = 0; first < norm.channels; first += size) {
    const int last = first + size;
    for (int i = 0; i < width; i++) {
      const float* pixel = x + (int64_t)i * stride;
      const float mean = norm.centred ? sum_channels(pixel, first, last, [](Vec v) { return v; }) * share : 0.f;
      means[i] = mean;
      scales[i] = sum_channels(pixel, first, last, [&](Vec v) { return (v - mean) * (v - mean); }) * share;
    }
    for (int i = 0; i < width; i++)
      scales[i] = 1.f / (norm.after + __builtin_sqrtf((scales[i] < norm.floor ? norm.floor : scales[i]) + norm.eps));
    for (int i = 0; i < width; i++) {
      const float *from = x + (int64_t)i * stride, mean = means[i], scale = scales[i];
      float* const to = y + (int64_t)i * stride;
      int c = first;
      for (; c + kWidth <= last; c += kWidth) store(to + c, load(gamma + c) * ((load(from + c) - mean) * scale) + load(beta + c));
      for (; c < last; c++) to[c] = gamma[c] * ((from[c] - mean) * scale) + beta[c];
    }
  }
}

// Members split the rows of pixels: a pixel needs all its channels.
static void channel_norm(const Run& run, const Layer& layer) {
  const Tensor& t = run.tensor(layer.output);
  const Norm& norm = run.program.norms[layer.norm];
  const RowFunction<Float> activation = row_function<Float>(false, layer.activation);
  int first, last;
  run.share(t.height, first, last);
  for (int image = 0; image < run.images; image++) {
    const float *table = norm.table + (norm.row ? run.batch.level[image] * norm.row : 0), *x = run.data(layer.input, image);
    float* const y = run.data(layer.output, image);
    for (int h = first; h < last; h++) {
      const int64_t row = (int64_t)h * t.width * t.padded;
      normalise_row(norm, table, x + row, y + row, t.width, t.padded, run.workspace.rows + run.member.rank * run.workspace.rows_stride);
      for (int i = 0; i < t.width; i++)
        for (int c = t.channels; c < t.padded; c++) y[row + (int64_t)i * t.padded + c] = 0.f;
      if (layer.activation != Activation::none)
        activation(y + row, kWidth, y + row, kWidth, t.width * t.padded / kWidth, nullptr, nullptr, nullptr, layer.slope);
    }
  }
  run.wait();
  if (layer.add[0] >= 0 || t.moments >= 0) for_each_row(run, layer, [](int, int, int) {});
}

}  // namespace sgm::SGM_ISA::executor
