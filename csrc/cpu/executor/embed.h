// The two ends of a network whose score is the gradient in its input: x to the classifier's input, and the way back.
//
// 2ⁿ·π·u reaches hundreds of turns, so u and its turns are counted in double precision; what is left of a turn is float.
#pragma once
#include "pointwise.h"

namespace sgm::SGM_ISA::executor {

constexpr double kHalfPi = 1.5707963267948966;

// sin and cos of `halves`·π/2; anything but numbers below 2⁵¹ gives something finite, or NaN.
SGM_INLINE void sin_cos(double halves, float& sine, float& cosine) {
  const double rounded = halves + 6755399441055744.;  // 1.5·2⁵²: the integer lies in the low bits
  int64_t bits;
  memcpy(&bits, &rounded, 8);
  const float x = (float)((halves - (rounded - 6755399441055744.)) * kHalfPi), z = x * x;  // |x| ≤ π/4: Taylor, to 1e-9
  const float s = x + x * z * (-1.f / 6 + z * (1.f / 120 + z * (-1.f / 5040 + z * (1.f / 362880))));
  const float c = 1.f + z * (-.5f + z * (1.f / 24 + z * (-1.f / 720 + z * (1.f / 40320 - z * (1.f / 3628800)))));
  const float first = bits & 1 ? c : s, second = bits & 1 ? s : c;
  sine = bits & 2 ? -first : first;
  cosine = (bits + 1) & 2 ? -second : second;
}

// Where pixel (h, w) of plane `plane` lies in the embedded tensor.
SGM_INLINE int64_t embedded_at(const Embedding& e, const Tensor& t, int plane, int h, int w) {
  const int channel = (plane * e.patch + h % e.patch) * e.patch + w % e.patch;
  return ((int64_t)(h / e.patch) * t.width + w / e.patch) * t.padded + channel;
}

// body(x, table, h, w, channel, where the score goes) for every element of this member's rows of every image.
template <class Body>
SGM_INLINE void for_each_element(const Run& run, const Body& body) {
  const Embedding& e = run.program.embedding;
  const int64_t pixels = (int64_t)e.height * e.width, channel_step = run.batch.nhwc ? 1 : pixels;
  const int64_t pixel_step = run.batch.nhwc ? e.channels : 1;
  int first, last;  // rows of patches, so that a member writes pixels of its own
  run.share(e.height / e.patch, first, last);
  for (int image = 0; image < run.images; image++) {
    const int64_t sample = run.batch.slot[image] * pixels * e.channels;
    const double* table = e.table + 5 * run.batch.level[image];
    for (int c = 0; c < e.channels; c++)
      for (int h = first * e.patch; h < last * e.patch; h++)
        for (int w = 0; w < e.width; w++) {
          const int64_t pixel = (int64_t)h * e.width + w;
          body(image, (double)run.batch.x[sample + c * channel_step + pixel * pixel_step], table, c, h, w, sample + c * pixels + pixel);
        }
  }
  run.wait();
}

static void embed(const Run& run, const Layer& layer) {
  const Embedding& e = run.program.embedding;
  const Tensor& t = run.tensor(layer.output);
  int first, last;
  run.share(t.height, first, last);
  for (int image = 0; image < run.images; image++)
    memset(run.data(layer.output, image) + (int64_t)first * t.width * t.padded, 0, (size_t)(last - first) * t.width * t.padded * sizeof(float));
  for_each_element(run, [&](int image, double x, const double* table, int c, int h, int w, int64_t) {
    float* const y = run.data(layer.output, image);
    const double u = table[0] * x + table[1];
    y[embedded_at(e, t, c, h, w)] = (float)u;
    for (int i = 0; i < e.octaves; i++)
      sin_cos(2 * u * (1 << e.octave[i]), y[embedded_at(e, t, (2 * i + 1) * e.channels + c, h, w)],
              y[embedded_at(e, t, (2 * i + 2) * e.channels + c, h, w)]);
  });
  if (t.moments >= 0) for_each_row(run, layer, [](int, int, int) {});
}

// second holds the sines and cosines that the gradient needs.
static void store_gradient(const Run& run, const Layer& layer) {
  const Embedding& e = run.program.embedding;
  const Tensor& t = run.tensor(layer.input);
  for_each_element(run, [&](int image, double x, const double* table, int c, int h, int w, int64_t to) {
    const float *g = run.data(layer.input, image), *y = run.data(layer.second, image);
    double sum = g[embedded_at(e, t, c, h, w)];
    for (int i = 0; i < e.octaves; i++) {
      const int64_t sine = embedded_at(e, t, (2 * i + 1) * e.channels + c, h, w), cosine = embedded_at(e, t, (2 * i + 2) * e.channels + c, h, w);
      sum += 2 * kHalfPi * (1 << e.octave[i]) * ((double)g[sine] * y[cosine] - (double)g[cosine] * y[sine]);
    }
    run.batch.score[to] = (float)(table[2] * sum + (table[3] * x + table[4]));
  });
}

}  // namespace sgm::SGM_ISA::executor
