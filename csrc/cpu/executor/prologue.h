// What a layer does to its input while reading it: the affine map of a norm, then an activation.
#pragma once
#include "activation.h"
#include "groups.h"

namespace sgm::SGM_ISA::executor {

// Which of n pixels (or rows) stands at i, −1: a zero.
SGM_INLINE int source(Border border, int i, int n) {
  if (i >= 0 && i < n) return i;
  int s = -1;
  if (border == Border::replicate) s = i < 0 ? 0 : n - 1;
  if (border == Border::circular) s = i < 0 ? i + n : i - n;
  if (border == Border::reflect) s = i < 0 ? -i : 2 * (n - 1) - i;
  return s < n ? s : -1;
}

// Pixels ahead of which memory is asked for. A channel vector of a row lies a pixel apart from the next, which no prefetcher of
// the processor follows far: it stops at every page.
constexpr int kAhead = 32;

// dst[i] = activation(a·(src[i] − pivot) + b) for `count` vectors, or activation(src[i]) without a norm.
template <class Element>
using RowFunction = void (*)(const float* src, int64_t src_stride, typename Element::Type* dst, int64_t dst_stride,
                             int count, const float* pivot, const float* a, const float* b, float slope);

template <class Element, bool kAffine, Activation kActivation>
static void prologue_row(const float* src, int64_t src_stride, typename Element::Type* dst, int64_t dst_stride, int count,
                         const float* pivot, const float* a, const float* b, float slope) {
  const Vec centre = kAffine ? load(pivot) : Vec{}, scale = kAffine ? load(a) : Vec{}, shift = kAffine ? load(b) : Vec{};
  for (int i = 0; i < count; i++) {
    __builtin_prefetch(src + (i + kAhead) * src_stride);
    Vec v = load(src + i * src_stride);
    if constexpr (kAffine) v = (v - centre) * scale + shift;
    Element::put(dst + i * dst_stride, activate<kActivation>(v, slope));
  }
}

template <class Element, bool kAffine>
static RowFunction<Element> row_function_of(Activation activation) {
#define SGM_ROW(NAME) prologue_row<Element, kAffine, Activation::NAME>
  static constexpr RowFunction<Element> table[kActivations] = {
      SGM_ROW(none),      SGM_ROW(elu),  SGM_ROW(relu),    SGM_ROW(silu),       SGM_ROW(gelu),
      SGM_ROW(gelu_tanh), SGM_ROW(tanh), SGM_ROW(sigmoid), SGM_ROW(leaky_relu), SGM_ROW(clip)};
#undef SGM_ROW
  return table[(int)activation];
}

template <class Element>
static RowFunction<Element> row_function(bool affine, Activation activation) {
  return affine ? row_function_of<Element, true>(activation) : row_function_of<Element, false>(activation);
}

// The norm of a layer, folded: y = a·(x − pivot) + b, each [images][padded]; null pointers without a norm. The pivot is a
// value of x near its mean (Moments), without which |mean|/std of the digits would be lost.
struct Affine {
  const float *pivots = nullptr, *a = nullptr, *b = nullptr;
  int padded = 0;
  const float* pivot(int image, int channel) const { return pivots ? pivots + (int64_t)image * padded + channel : nullptr; }
  const float* scale(int image, int channel) const { return a ? a + (int64_t)image * padded + channel : nullptr; }
  const float* shift(int image, int channel) const { return b ? b + (int64_t)image * padded + channel : nullptr; }
};

// a = γ·rstd, b = γ·(α·ms − (mean − pivot)·rstd) + β, where ms is the mean, standardised across channels (unbiased variance).
// Every member folds for itself: cheaper than a barrier.
static Affine fold_norm(const Run& run, const Layer& layer) {
  const Tensor& t = run.tensor(layer.input);
  if (layer.norm < 0) return {nullptr, nullptr, nullptr, t.padded};
  const Norm& norm = run.program.norms[layer.norm];
  const Workspace& w = run.workspace;
  float* const a = w.affine + run.member.rank * w.affine_stride;
  float* const b = a + w.affine_stride / kAffineRows;
  float* const pivots = b + w.affine_stride / kAffineRows;
  const int channels = norm.channels;
  const int pixels = t.height * t.width;
  const double share = 1. / pixels;
  for (int image = 0; image < run.images; image++) {
    float* const ai = a + (int64_t)image * t.padded;
    float* const bi = b + (int64_t)image * t.padded;
    float* const pivoti = pivots + (int64_t)image * t.padded;
    for (int c = channels; c < t.padded; c++) ai[c] = bi[c] = 0.f;
    const float* gamma = norm.source < 0 ? norm.table + (norm.row ? run.batch.level[image] * norm.row : 0) : run.data(norm.source, image);
    const float *alpha = gamma + channels, *beta = norm.source < 0 ? alpha + channels : alpha;
    if (norm.groups == 0) {  // no statistics
      memset(pivoti, 0, t.padded * sizeof(float));
      memcpy(ai, gamma, channels * sizeof(float));
      memcpy(bi, beta, channels * sizeof(float));
      continue;
    }
    const float *const kept = run.moments(layer.input, image), *squares = kept + 3 * t.padded;
    memcpy(pivoti, kept, t.padded * sizeof(float));
    if (norm.groups != channels) {
      fold_groups(norm, kept, t.padded, pixels, gamma, ai, bi);
      continue;
    }
    double centre = 0, spread = 0;
    if (norm.has_alpha) {
      for (int c = 0; c < channels; c++) centre += mean_of(kept, t.padded, share, c);
      centre /= channels;
      for (int c = 0; c < channels; c++) {
        const double d = mean_of(kept, t.padded, share, c) - centre;
        spread += d * d;
      }
      spread /= channels - 1;
    }
    const float across = norm.has_alpha ? (float)(1 / __builtin_sqrt(spread + norm.eps)) : 0.f;
    for (int c = 0; c < channels; c++) {
      const double mean = mean_of(kept, t.padded, share, c);
      const float rstd = 1.f / __builtin_sqrtf(squares[c] / (float)pixels + norm.eps);
      ai[c] = gamma[c] * rstd;
      bi[c] = gamma[c] * (alpha[c] * ((float)(mean - centre) * across) - (float)(mean - kept[c]) * rstd) + beta[c];
    }
  }
  return {pivots, a, b, t.padded};
}

// A layer's prologue, ready to read rows of its input.
template <class Element>
struct Reader {
  Affine affine;
  RowFunction<Element> function;
  float slope;
  Reader(const Run& run, const Layer& layer)
      : affine(fold_norm(run, layer)), function(row_function<Element>(affine.a, layer.activation)), slope(layer.slope) {}
  // `count` vectors of channels c … of an image
  void operator()(const float* src, int64_t src_stride, typename Element::Type* dst, int64_t dst_stride, int count, int image, int c) const {
    function(src, src_stride, dst, dst_stride, count, affine.pivot(image, c), affine.scale(image, c), affine.shift(image, c), slope);
  }
};

}  // namespace sgm::SGM_ISA::executor
