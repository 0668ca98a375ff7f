// Direct convolution with any taps: 1×1, strided, grouped, transposed, dilated 3×3 and, for 3×3 followed by a 2×2 mean, the
// equal strided 4×4.
#pragma once
#include "gemm.h"
#include "prologue.h"

namespace sgm::SGM_ISA::executor {

// The input after its prologue, with what its border reads as: [images][height + rim][width + rim][padded].
struct Padded {
  int height, width, channels;
  int64_t image() const { return (int64_t)height * width * channels; }
};

template <class Element>
static Padded pad_input(const Run& run, const Layer& layer, const Conv& conv) {
  using T = typename Element::Type;
  const Reader<Element> read_row(run, layer);
  const Tensor& in = run.tensor(layer.input);
  const int left = conv.rim[kLeft], c_in = in.padded;
  const Padded p{in.height + conv.rim[kTop] + conv.rim[kBottom], in.width + left + conv.rim[kRight], c_in};
  int first, last;
  run.share(c_in / kWidth, first, last);
  for (int image = 0; image < run.images; image++) {
    T* row = (T*)run.workspace.padded + image * p.image();
    const float* src = run.data(layer.input, image);
    for (int h = -conv.rim[kTop]; h < in.height + conv.rim[kBottom]; h++, row += (int64_t)p.width * c_in) {
      const int y = source(conv.border, h, in.height);
      for (int c = first * kWidth; c < last * kWidth; c += kWidth) {
        T* const inside = row + (int64_t)left * c_in + c;
        if (y >= 0) read_row(src + (int64_t)y * in.width * c_in + c, c_in, inside, c_in, in.width, image, c);
        const auto fill = [&](int w) {
          const int x = y < 0 ? -1 : source(conv.border, w, in.width);
          if (x < 0) Element::put(inside + (int64_t)w * c_in, Vec{});
          else memcpy(inside + (int64_t)w * c_in, inside + (int64_t)x * c_in, kWidth * sizeof(T));
        };
        for (int w = -left; w < (y < 0 ? in.width : 0); w++) fill(w);
        for (int w = in.width; w < in.width + conv.rim[kRight]; w++) fill(w);
      }
    }
  }
  run.wait();
  return p;
}

// One block of output channels, at the pixels of one phase.
template <class Element>
static void direct_phase(const Run& run, const Layer& layer, const Conv& conv, const Padded& p, const Phase& phase, int block, int image) {
  using T = typename Element::Type;
  using Weight = typename Element::Weight;
  const Tensor &in = run.tensor(layer.input), &out = run.tensor(layer.output);
  const int width = conv.vectors * kWidth, pixels = phase.height * phase.width;
  const int groups = (pixels + kLeastRows - 1) / kLeastRows, taken = max_rows(conv.vectors) / kLeastRows;
  const auto boundary = [&](int g) { return (int)((int64_t)pixels * least(g, groups) / groups); };
  const Weight* weights = (const Weight*)conv.weights + (int64_t)block * conv.tap_count * conv.c_step * width;
  const T* src = (const T*)run.workspace.padded + image * p.image() + conv.first[block];
  float* const target = run.data(layer.output, image);
  float* const kept = conv.up == 1 ? run.moments(layer.output, image) : nullptr;
  const int64_t next = (int64_t)kLeastRows * taken * conv.up * out.padded;  // from an output to that of the next group
  alignas(64) float result[kAccumulators * kWidth];
  for (int g = 0; g < groups; g += taken) {
    const int begin = boundary(g), end = boundary(g + taken);
    const int top = begin / phase.width * conv.stride, bottom = (end - 1) / phase.width * conv.stride;
    int64_t rows[kMaxRows], offset[kMaxTaps], at[kMaxRows];  // at: where an output pixel lies
    int index[kMaxTaps], taps = 0;
    for (int i = begin; i < end; i++) {
      const int h = i / phase.width, w = i % phase.width;
      rows[i - begin] = ((int64_t)(h * conv.stride + conv.rim[kTop]) * p.width + w * conv.stride + conv.rim[kLeft]) * p.channels;
      at[i - begin] = ((int64_t)(h * conv.up + phase.row) * out.width + w * conv.up + phase.col) * out.padded;
    }
    for (int t = phase.first; t < phase.last; t++) {
      const Tap& tap = conv.taps[t];
      const bool outside = bottom + tap.row < 0 || top + tap.row >= in.height || tap.col >= in.width ||
                           (phase.width - 1) * conv.stride + tap.col < 0;
      if (outside && conv.border == Border::zeros) continue;  // it only meets zeros
      offset[taps] = ((int64_t)tap.row * p.width + tap.col) * p.channels;
      index[taps++] = tap.index;
    }
    kernel_function<Element>(conv.vectors, end - begin)(src, rows, taps, offset, index, weights, conv.c_step, result);
    for (int j = 0; j < conv.vectors; j++) {
      const int k = block * width + j * kWidth;
      if (k >= out.padded) break;
      const Vec bias = load(conv.bias + run.bias_row(conv, image) + k);
      for (int i = 0; i < end - begin; i++) {
        Vec v = load(result + i * width + j * kWidth) + bias;
        for (int a = 0; a < 2; a++) {
          if (layer.add[a] < 0) continue;
          const float* const add = run.data(layer.add[a], image) + at[i] + k;
          __builtin_prefetch(add + next);
          v += load(add) * layer.add_scale[a];
        }
        __builtin_prefetch(target + at[i] + k + next, 1);
        store(target + at[i] + k, v);
      }
      if (!kept) continue;
      Moments moments = begin ? Moments::read(kept + k, out.padded) : Moments::start(Vec{});
      for (int i = g; i < least(g + taken, groups); i++)  // each group for itself, however many the kernel takes
        moments.add(target + (int64_t)boundary(i) * out.padded + k, out.padded, boundary(i), boundary(i + 1) - boundary(i));
      moments.write(kept + k, out.padded);
    }
  }
}

// Images of one pixel, as linear layers have: the rows of the kernel are images, which read the weights together.
template <class Element>
static void direct_images(const Run& run, const Layer& layer, const Conv& conv, const Padded& p, int block) {
  const int padded = run.tensor(layer.output).padded, width = conv.vectors * kWidth, most = max_rows(conv.vectors);
  const typename Element::Type* const src = (const typename Element::Type*)run.workspace.padded + conv.first[block];
  const auto* weights = (const typename Element::Weight*)conv.weights + (int64_t)block * conv.c_step * width;
  const int64_t no_offset = 0;
  alignas(64) float result[kAccumulators * kWidth];
  for (int begin = 0; begin < run.images; begin += most) {
    const int count = least(most, run.images - begin);
    int64_t rows[kMaxRows];
    for (int i = 0; i < count; i++) rows[i] = (int64_t)(begin + i) * p.channels;
    kernel_function<Element>(conv.vectors, count)(src, rows, 1, &no_offset, &conv.taps[0].index, weights, conv.c_step, result);
    for (int i = 0; i < count; i++)
      for (int k = block * width; k < least((block + 1) * width, padded); k += kWidth) {
        Vec v = load(result + i * width + k - block * width) + load(conv.bias + run.bias_row(conv, begin + i) + k);
        for (int a = 0; a < 2; a++)
          if (layer.add[a] >= 0) v += load(run.data(layer.add[a], begin + i) + k) * layer.add_scale[a];
        store(run.data(layer.output, begin + i) + k, v);
      }
  }
}

template <class Element>
static void direct(const Run& run, const Layer& layer, const Conv& conv) {
  const Padded p = pad_input<Element>(run, layer, conv);
  const Tensor& out = run.tensor(layer.output);
  const bool one_pixel = p.height * p.width * out.height * out.width == 1 && conv.tap_count == 1 && out.moments < 0;
  int first, last;
  run.share(conv.blocks, first, last);
  for (int block = first; block < last; block++) {
    if (one_pixel) direct_images<Element>(run, layer, conv, p, block);
    for (int image = 0; image < run.images && !one_pixel; image++) {
      for (int i = 0; i < conv.phase_count; i++) direct_phase<Element>(run, layer, conv, p, conv.phases[i], block, image);
      float* const kept = run.moments(layer.output, image);
      if (conv.up == 1 || !kept) continue;  // the pixels of a phase are no rows: count them once all are there
      const int width = conv.vectors * kWidth, row = out.width * out.padded;
      for (int k = block * width; k < least((block + 1) * width, out.padded); k += kWidth) {
        Moments moments = Moments::start(Vec{});
        for (int h = 0; h < out.height; h++) moments.add(run.data(layer.output, image) + (int64_t)h * row + k, out.padded, h * out.width, out.width);
        moments.write(kept + k, out.padded);
      }
    }
  }
  run.wait();
}

}  // namespace sgm::SGM_ISA::executor
