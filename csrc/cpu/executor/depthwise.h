// Depthwise convolution: every channel by a kernel of its own. FIR filters of up- and downsampling are such layers.
#pragma once
#include "direct.h"
#include "pointwise.h"

namespace sgm::SGM_ISA::executor {

// kPixels outputs of one phase, side by side: rows[t] is where the first of them reads tap t.
template <int kPixels>
SGM_INLINE void depthwise_pixels(const float* const* rows, int64_t step, const float* const* weights, int taps, Vec bias,
                                 float* out, int64_t out_step) {
  Vec sum[kPixels];
  SGM_UNROLL for (int i = 0; i < kPixels; i++) sum[i] = bias;
  for (int t = 0; t < taps; t++) {
    const Vec w = load(weights[t]);
    SGM_UNROLL for (int i = 0; i < kPixels; i++) sum[i] += load(rows[t] + i * step) * w;
  }
  SGM_UNROLL for (int i = 0; i < kPixels; i++) store(out + i * out_step, sum[i]);
}

static void depthwise(const Run& run, const Layer& layer, const Conv& conv) {
  constexpr int kPixels = 4;
  const Padded p = pad_input<Float>(run, layer, conv);
  const Tensor& out = run.tensor(layer.output);
  const int64_t step = (int64_t)conv.stride * p.channels, out_step = (int64_t)conv.up * out.padded;
  for_each_row(run, layer, [&](int image, int h, int c) {
    const float* src = run.workspace.padded + image * p.image() + c;
    float* const row = run.data(layer.output, image) + (int64_t)h * out.width * out.padded + c;
    const Vec bias = load(conv.bias + run.bias_row(conv, image) + c);
    for (int f = h % conv.up * conv.up; f < (h % conv.up + 1) * conv.up; f++) {
      const Phase& phase = conv.phases[f];
      const float *rows[kMaxTaps], *weights[kMaxTaps];
      const int taps = phase.last - phase.first;
      for (int t = 0; t < taps; t++) {
        const Tap& tap = conv.taps[phase.first + t];
        rows[t] = src + ((int64_t)(h / conv.up * conv.stride + tap.row + conv.rim[kTop]) * p.width + tap.col + conv.rim[kLeft]) * p.channels;
        weights[t] = (const float*)conv.weights + (int64_t)tap.index * p.channels + c;
      }
      float* y = row + (int64_t)phase.col * out.padded;
      int w = 0;
      for (; w + kPixels <= phase.width; w += kPixels, y += kPixels * out_step) {
        depthwise_pixels<kPixels>(rows, step, weights, taps, bias, y, out_step);
        for (int t = 0; t < taps; t++) rows[t] += kPixels * step;
      }
      for (; w < phase.width; w++, y += out_step) {
        depthwise_pixels<1>(rows, step, weights, taps, bias, y, out_step);
        for (int t = 0; t < taps; t++) rows[t] += step;
      }
    }
  });
}

}  // namespace sgm::SGM_ISA::executor
