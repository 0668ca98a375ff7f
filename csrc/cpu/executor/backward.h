// Gradients of a norm with its activation, and of the activation alone. docs/cdm.md; csrc/cpu/norm_backward.h is the
// stand-alone op, on NCHW and with gradients of γ and β.
#pragma once
#include "pointwise.h"

namespace sgm::SGM_ISA::executor {

template <Activation kActivation>
SGM_INLINE Vec slope(Vec y) {
  static_assert(kActivation == Activation::none || kActivation == Activation::silu);
  if constexpr (kActivation == Activation::none) return splat(1.f);
  const Vec low = y > -87.f ? y : splat(-87.f);
  const Vec s = 1.f / (exp_bounded(-(low < 87.f ? low : splat(87.f))) + 1.f);
  return s * (1.f + y * (1.f - s));
}

// output = γ(level)·activation′(input), of silu or none
template <Activation kActivation>
static void slope_of(const Run& run, const Layer& layer) {
  const Affine table = fold_norm(run, layer);
  const Tensor& t = run.tensor(layer.output);
  for_each_row(run, layer, [&](int image, int h, int c) {
    const int64_t offset = (int64_t)h * t.width * t.padded + c;
    const float* x = run.data(layer.input, image) + offset;
    float* y = run.data(layer.output, image) + offset;
    const Vec gamma = load(table.scale(image, c));
    for (int64_t i = 0; i < (int64_t)t.width * t.padded; i += t.padded) store(y + i, gamma * slope<kActivation>(load(x + i)));
  });
}

static void slope_layer(const Run& run, const Layer& layer) {
  if (layer.activation == Activation::silu) slope_of<Activation::silu>(run, layer);
  else slope_of<Activation::none>(run, layer);
}

// x̂ = r·(x − pivot) + b, and y = γ·x̂ + β that the activation meets.
struct Standardised {
  Vec pivot, r, b, gamma, beta;
  SGM_INLINE Standardised read(const float* p, int64_t stride) {
    return {load(p), load(p + stride), load(p + 2 * stride), load(p + 3 * stride), load(p + 4 * stride)};
  }
  inline __attribute__((always_inline)) Vec operator()(Vec x) const { return (x - pivot) * r + b; }
};

// Of one image, into this member's scratch: five rows of `padded` floats.
static const float* standardise(const Run& run, const Layer& layer, int image) {
  const Norm& norm = run.program.norms[layer.norm];
  const Tensor& t = run.tensor(layer.input);
  const float* kept = run.moments(layer.input, image);
  const float* table = norm.table + (norm.row ? run.batch.level[image] * norm.row : 0);
  float* const rows = run.workspace.affine + run.member.rank * run.workspace.affine_stride;
  memset(rows, 0, 5 * t.padded * sizeof(float));  // channels beyond the norm's stay zero
  memcpy(rows, kept, norm.channels * sizeof(float));
  fold_groups(norm, kept, t.padded, t.height * t.width, nullptr, rows + t.padded, rows + 2 * t.padded);
  memcpy(rows + 3 * t.padded, table, norm.channels * sizeof(float));
  memcpy(rows + 4 * t.padded, table + 2 * norm.channels, norm.channels * sizeof(float));
  return rows;
}

// With h = γ·act′(y)·dy: dx = r·(h − mean(h) − x̂·mean(h·x̂)), means over the group. h waits in the output, the sums of
// each channel in the output's moments, until every member has its own.
template <Activation kActivation>
static void norm_backward_of(const Run& run, const Layer& layer) {
  const Tensor& t = run.tensor(layer.input);
  const int64_t line = (int64_t)t.width * t.padded;
  int first, last;
  run.share(t.padded / kWidth, first, last);
  first *= kWidth, last *= kWidth;
  for (int image = 0; image < run.images; image++) {
    const float *rows = standardise(run, layer, image), *x = run.data(layer.input, image), *dy = run.data(layer.second, image);
    float *const out = run.data(layer.output, image), *const sums = run.moments(layer.output, image);
    for (int c = first; c < last; c += kWidth) {
      const Standardised xhat = Standardised::read(rows + c, t.padded);
      Vec sum = Vec{}, product = Vec{};
      for (int64_t row = c; row < line * t.height; row += line) {
        Vec row_sum = Vec{}, row_product = Vec{};
        for (int64_t i = row; i < row + line; i += t.padded) {
          const Vec n = xhat(load(x + i)), h = xhat.gamma * load(dy + i) * slope<kActivation>(xhat.gamma * n + xhat.beta);
          store(out + i, h);
          row_sum += h, row_product += h * n;
        }
        sum += row_sum, product += row_product;
      }
      store(sums + c, sum), store(sums + t.padded + c, product);
    }
  }
  run.wait();
  const Norm& norm = run.program.norms[layer.norm];
  const int size = norm.channels / norm.groups;
  const double share = 1. / ((double)size * t.height * t.width);
  for (int image = 0; image < run.images; image++) {
    const float *rows = standardise(run, layer, image), *x = run.data(layer.input, image), *sums = run.moments(layer.output, image);
    float* const out = run.data(layer.output, image);
    const float* add[2];
    for (int a = 0; a < 2; a++) add[a] = layer.add[a] < 0 ? nullptr : run.data(layer.add[a], image);
    for (int c = first; c < last; c += kWidth) {
      float means[2][kWidth] = {};
      for (int k = c; k < least(c + kWidth, norm.channels); k++)
        for (int j = 0; j < 2; j++) {
          double sum = 0;
          for (int q = 0; q < size; q++) sum += sums[j * t.padded + k / size * size + q];
          means[j][k - c] = (float)(sum * share);
        }
      const Standardised xhat = Standardised::read(rows + c, t.padded);
      const Vec mean = load(means[0]), product = load(means[1]);
      for (int64_t i = c; i < line * t.height; i += t.padded) {
        Vec v = xhat.r * ((load(out + i) - mean) - xhat(load(x + i)) * product);
        for (int a = 0; a < 2; a++)
          if (add[a]) v += load(add[a] + i) * layer.add_scale[a];
        store(out + i, v);
      }
    }
  }
  run.wait();
}

static void norm_backward(const Run& run, const Layer& layer) {
  if (layer.activation == Activation::silu) norm_backward_of<Activation::silu>(run, layer);
  else norm_backward_of<Activation::none>(run, layer);
}

// γ and β of one image: rows of ones and zeros where there is no norm.
struct Map {
  const float *gamma, *beta;
  inline __attribute__((always_inline)) Vec scale(int c) const { return gamma ? load(gamma + c) : splat(1.f); }
  inline __attribute__((always_inline)) Vec operator()(Vec x, int c) const { return gamma ? x * load(gamma + c) + load(beta + c) : x; }
};

template <Activation kActivation>
static void affine_backward_of(const Run& run, const Layer& layer) {
  const Tensor& t = run.tensor(layer.output);
  const Affine table = fold_norm(run, layer);
  for_each_row(run, layer, [&](int image, int h, int c) {
    const int64_t offset = (int64_t)h * t.width * t.padded + c;
    const float *x = run.data(layer.input, image) + offset, *dy = run.data(layer.second, image) + offset;
    float* const out = run.data(layer.output, image) + offset;
    const Map map{table.scale(image, 0), table.shift(image, 0)};
    for (int64_t i = 0; i < (int64_t)t.width * t.padded; i += t.padded)
      store(out + i, map.scale(c) * load(dy + i) * slope<kActivation>(map(load(x + i), c)));
  });
}

static void affine_backward(const Run& run, const Layer& layer) {
  if (layer.activation == Activation::silu) affine_backward_of<Activation::silu>(run, layer);
  else affine_backward_of<Activation::none>(run, layer);
}

// In γ: Σ x·act′(γ·x + β)·dy over the pixels; in β the same without x.
static void film_backward(const Run& run, const Layer& layer) {
  const Tensor &t = run.tensor(layer.input), &to = run.tensor(layer.output);
  const Affine table = fold_norm(run, layer);
  int first, last;
  run.share(t.padded / kWidth, first, last);
  for (int image = 0; image < run.images; image++) {
    const float *x = run.data(layer.input, image), *dy = run.data(layer.second, image);
    float* const out = run.data(layer.output, image);
    const Map map{table.scale(image, 0), table.shift(image, 0)};
    for (int c = first * kWidth; c < last * kWidth; c += kWidth) {
      Vec sums[2] = {};
      for (int64_t i = c; i < (int64_t)t.height * t.width * t.padded; i += t.padded) {
        const Vec v = load(x + i), h = load(dy + i) * (layer.activation == Activation::silu ? slope<Activation::silu>(map(v, c)) : splat(1.f));
        sums[0] += h * v, sums[1] += h;
      }
      for (int k = 0; k < 2; k++)
        for (int q = c; q < least(c + kWidth, t.channels); q++) out[k * t.channels + q] = sums[k][q - c];
    }
    if (run.member.rank == 0)
      for (int q = to.channels; q < to.padded; q++) out[q] = 0;
  }
  run.wait();
}

}  // namespace sgm::SGM_ISA::executor
