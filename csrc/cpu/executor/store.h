// The last convolution, which makes the score.
#pragma once
#include "direct.h"

namespace sgm::SGM_ISA::executor {

// kPixels outputs of the last convolution side by side: sums over taps and channels, lane by lane.
template <int kPixels>
SGM_INLINE void last_pixels(const Conv& conv, const Padded& p, const float* at, const float* weights, float bias, float divisor, float* score) {
  Vec sum[kPixels];
  SGM_UNROLL for (int i = 0; i < kPixels; i++) sum[i] = Vec{};
  for (int t = 0; t < conv.tap_count; t++) {
    const float* pixel = at + ((int64_t)(conv.taps[t].row + conv.rim[kTop]) * p.width + conv.taps[t].col + conv.rim[kLeft]) * p.channels;
    const float* weight = weights + (int64_t)t * p.channels;
    for (int c = 0; c < p.channels; c += kWidth) {
      const Vec w = load(weight + c);
      SGM_UNROLL for (int i = 0; i < kPixels; i++) sum[i] += load(pixel + (int64_t)i * p.channels + c) * w;
    }
  }
  SGM_UNROLL for (int i = 0; i < kPixels; i++) score[i] = (horizontal_sum(sum[i]) + bias) / divisor;
}

// The last convolution: few output channels, so vectors run over the input's. score = (conv + bias) / σ(level).
static void store_score(const Run& run, const Layer& layer, const Conv& conv) {
  constexpr int kPixels = 4;
  const Padded p = pad_input<Float>(run, layer, conv);
  const Phase& out = conv.phases[0];
  int first, last;
  run.share(out.height, first, last);
  for (int image = 0; image < run.images; image++) {
    const float* src = run.workspace.padded + image * p.image();
    float* score = run.batch.score + (int64_t)run.batch.slot[image] * conv.c_out * out.height * out.width;
    const float divisor = run.program.sigmas ? run.program.sigmas[run.batch.level[image]] : 1.f;
    for (int k = 0; k < conv.c_out; k++)
      for (int h = first; h < last; h++) {
        const float *row = src + (int64_t)h * p.width * p.channels, bias = conv.bias[run.bias_row(conv, image) + k];
        const float* weights = (const float*)conv.weights + (int64_t)k * conv.tap_count * p.channels;  // [c_out][taps][padded]
        float* const to = score + ((int64_t)k * out.height + h) * out.width;
        int w = 0;
        for (; w + kPixels <= out.width; w += kPixels) last_pixels<kPixels>(conv, p, row + (int64_t)w * p.channels, weights, bias, divisor, to + w);
        for (; w < out.width; w++) last_pixels<1>(conv, p, row + (int64_t)w * p.channels, weights, bias, divisor, to + w);
      }
  }
  run.wait();
}

}  // namespace sgm::SGM_ISA::executor
