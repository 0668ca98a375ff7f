// Direct convolution with any taps: 1×1, dilated 3×3 and, for 3×3 followed by a 2×2 mean, the equal strided 4×4.
#pragma once
#include "gemm.h"
#include "prologue.h"

namespace sgm::SGM_ISA::executor {

// The input after its prologue, with a border of zeros: [images][height + border][width + border][padded].
struct Padded {
  int height, width, channels;
  int64_t image() const { return (int64_t)height * width * channels; }
};

template <class Element>
static Padded pad_input(const Run& run, const Layer& layer, const Conv& conv) {
  using T = typename Element::Type;
  const Affine affine = fold_norm(run, layer);
  const Tensor& in = run.tensor(layer.input);
  const int border = conv.pad_before + conv.pad_after, c_in = in.padded;
  const Padded p{in.height + border, in.width + border, c_in};
  const RowFunction<Element> read_row = row_function<Element>(affine.a, layer.activation);
  int first, last;
  run.share(c_in / kWidth, first, last);
  for (int image = 0; image < run.images; image++) {
    T* row = (T*)run.workspace.padded + image * p.image();
    const float* src = run.data(layer.input, image);
    for (int h = -conv.pad_before; h < in.height + conv.pad_after; h++, row += (int64_t)p.width * c_in) {
      const bool inside = h >= 0 && h < in.height;
      for (int c = first * kWidth; c < last * kWidth; c += kWidth) {
        for (int w = 0; w < (inside ? conv.pad_before : p.width); w++) Element::put(row + (int64_t)w * c_in + c, Vec{});
        if (!inside) continue;
        read_row(src + (int64_t)h * in.width * c_in + c, c_in, row + (int64_t)conv.pad_before * c_in + c, c_in, in.width,
                 affine.pivot(image, c), affine.scale(image, c), affine.shift(image, c));
        for (int w = conv.pad_before + in.width; w < p.width; w++) Element::put(row + (int64_t)w * c_in + c, Vec{});
      }
    }
  }
  run.wait();
  return p;
}

template <class Element>
static void direct(const Run& run, const Layer& layer, const Conv& conv) {
  using T = typename Element::Type;
  using Weight = typename Element::Weight;
  const Padded p = pad_input<Element>(run, layer, conv);
  const Tensor &in = run.tensor(layer.input), &out = run.tensor(layer.output);
  const int width = conv.vectors * kWidth, pixels = out.height * out.width;
  const int groups = (pixels + kLeastRows - 1) / kLeastRows, taken = max_rows(conv.vectors) / kLeastRows;
  const auto boundary = [&](int g) { return (int)((int64_t)pixels * least(g, groups) / groups); };
  alignas(64) float result[kAccumulators * kWidth];
  int first, last;
  run.share(conv.blocks, first, last);
  for (int block = first; block < last; block++) {
    const Weight* weights = (const Weight*)conv.weights + (int64_t)block * conv.tap_count * conv.c_step * width;
    for (int image = 0; image < run.images; image++) {
      const T* src = (const T*)run.workspace.padded + image * p.image();
      float* const target = run.data(layer.output, image);
      float* const kept = run.moments(layer.output, image);
      for (int g = 0; g < groups; g += taken) {
        const int begin = boundary(g), end = boundary(g + taken);
        const int top = begin / out.width * conv.stride, bottom = (end - 1) / out.width * conv.stride;
        int64_t rows[kMaxRows], offset[kMaxTaps];
        int index[kMaxTaps], taps = 0;
        for (int i = begin; i < end; i++)
          rows[i - begin] = ((int64_t)(i / out.width * conv.stride + conv.pad_before) * p.width +
                             i % out.width * conv.stride + conv.pad_before) * p.channels;
        for (int t = 0; t < conv.tap_count; t++) {  // taps that only meet the border are left out
          const Tap& tap = conv.taps[t];
          if (bottom + tap.row < 0 || top + tap.row >= in.height || tap.col >= in.width || -tap.col >= in.width) continue;
          offset[taps] = ((int64_t)tap.row * p.width + tap.col) * p.channels;
          index[taps++] = t;
        }
        kernel_function<Element>(conv.vectors, end - begin)(src, rows, taps, offset, index, weights, conv.c_step, result);
        for (int j = 0; j < conv.vectors; j++) {
          const int k = block * width + j * kWidth;
          if (k >= out.padded) break;
          const Vec bias = load(conv.bias + k);
          for (int i = begin; i < end; i++) {
            Vec v = load(result + (i - begin) * width + j * kWidth) + bias;
            for (int a = 0; a < 2; a++)
              if (layer.add[a] >= 0) v += load(run.data(layer.add[a], image) + (int64_t)i * out.padded + k);
            store(target + (int64_t)i * out.padded + k, v);
          }
          if (!kept) continue;
          Moments moments = begin ? Moments::read(kept + k, out.padded) : Moments::start(Vec{});
          for (int i = g; i < least(g + taken, groups); i++)  // each group for itself, however many the kernel takes
            moments.add(target + (int64_t)boundary(i) * out.padded + k, out.padded, boundary(i), boundary(i + 1) - boundary(i));
          moments.write(kept + k, out.padded);
        }
      }
    }
  }
  run.wait();
}

// The last convolution: few output channels, so vectors run over the input's. score = (conv + bias) / σ(level).
static void store_score(const Run& run, const Layer& layer, const Conv& conv) {
  const Padded p = pad_input<Float>(run, layer, conv);
  const Tensor& in = run.tensor(layer.input);
  const float* weights = (const float*)conv.weights;  // [c_out][taps][padded]
  int first, last;
  run.share(in.height, first, last);
  for (int image = 0; image < run.images; image++) {
    const float* src = run.workspace.padded + image * p.image();
    float* score = run.batch.score + (int64_t)run.batch.slot[image] * conv.c_out * in.height * in.width;
    for (int k = 0; k < conv.c_out; k++)
      for (int h = first; h < last; h++)
        for (int w = 0; w < in.width; w++) {
          Vec sum = Vec{};
          for (int t = 0; t < conv.tap_count; t++) {
            const float* pixel = src + ((int64_t)(h + conv.taps[t].row + conv.pad_before) * p.width + w +
                                        conv.taps[t].col + conv.pad_before) * p.channels;
            const float* weight = weights + ((int64_t)k * conv.tap_count + t) * in.padded;
            for (int c = 0; c < in.padded; c += kWidth) sum += load(pixel + c) * load(weight + c);
          }
          float value = horizontal_sum(sum) + conv.bias[k];
          if (run.program.sigmas) value /= run.program.sigmas[run.batch.level[image]];
          score[((int64_t)k * in.height + h) * in.width + w] = value;
        }
  }
  run.wait();
}

}  // namespace sgm::SGM_ISA::executor
