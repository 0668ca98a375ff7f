// Products of small matrices, and the gradient of one-head attention over the pixels of an image. Members split rows; what
// another member reads is behind a barrier. The weights are computed again for the gradient rather than kept.
#pragma once
#include "pointwise.h"

namespace sgm::SGM_ISA::executor {

// out[i][j] = scale·Σ_k a[i·a_row + k·a_step]·b[k·b_step + j] for kRows rows and kVectors vectors of j.
template <int kRows, int kVectors>
SGM_INLINE void product_block(const float* a, int64_t a_row, int64_t a_step, const float* b, int64_t b_step, int depth,
                              float scale, float* out, int64_t out_row) {
  Vec sum[kRows][kVectors];
  SGM_UNROLL for (int i = 0; i < kRows; i++) SGM_UNROLL for (int j = 0; j < kVectors; j++) sum[i][j] = Vec{};
  for (int k = 0; k < depth; k++) {
    Vec column[kVectors];
    SGM_UNROLL for (int j = 0; j < kVectors; j++) column[j] = load(b + k * b_step + j * kWidth);
    SGM_UNROLL for (int i = 0; i < kRows; i++) {
      const float value = a[i * a_row + k * a_step];
      SGM_UNROLL for (int j = 0; j < kVectors; j++) sum[i][j] += column[j] * value;
    }
  }
  SGM_UNROLL for (int i = 0; i < kRows; i++) SGM_UNROLL for (int j = 0; j < kVectors; j++)
      store(out + i * out_row + j * kWidth, sum[i][j] * scale);
}

template <int kVectors>
static void product_columns(int rows, const float* a, int64_t a_row, int64_t a_step, const float* b, int64_t b_step,
                            int depth, float scale, float* out, int64_t out_row) {
  constexpr int kRows = 4;
  int i = 0;
  for (; i + kRows <= rows; i += kRows)
    product_block<kRows, kVectors>(a + i * a_row, a_row, a_step, b, b_step, depth, scale, out + i * out_row, out_row);
  for (; i < rows; i++) product_block<1, kVectors>(a + i * a_row, a_row, a_step, b, b_step, depth, scale, out + i * out_row, out_row);
}

// The same for `rows` rows and `columns` columns, a multiple of the vector.
static void product(int rows, int columns, const float* a, int64_t a_row, int64_t a_step, const float* b, int64_t b_step,
                    int depth, float scale, float* out, int64_t out_row) {
  int j = 0;
  for (; j + 2 * kWidth <= columns; j += 2 * kWidth)
    product_columns<2>(rows, a, a_row, a_step, b + j, b_step, depth, scale, out + j, out_row);
  if (j < columns) product_columns<1>(rows, a, a_row, a_step, b + j, b_step, depth, scale, out + j, out_row);
}

// softmax of `count` numbers in place; the rest of the last vector becomes 0.
static void softmax(float* row, int count) {
  const int end = (count + kWidth - 1) / kWidth * kWidth;
  for (int i = count; i < end; i++) row[i] = row[0];
  Vec most = load(row);
  for (int i = kWidth; i < end; i += kWidth) most = load(row + i) > most ? load(row + i) : most;
  float top = most[0];
  for (int i = 1; i < kWidth; i++) top = most[i] > top ? most[i] : top;
  for (int i = 0; i < end; i += kWidth) {
    const Vec v = load(row + i) - top;
    store(row + i, exp_bounded(v > -87.f ? v : splat(-87.f)));
  }
  for (int i = count; i < end; i++) row[i] = 0.f;
  Vec sum = Vec{};
  for (int i = 0; i < end; i += kWidth) sum += load(row + i);
  const float share = 1.f / horizontal_sum(sum);
  for (int i = 0; i < end; i += kWidth) store(row + i, load(row + i) * share);
}

// The matrices of one image: q, k, v [pixels][head] within rows of in.padded; scratch rows of `line` floats.
struct Attention {
  int pixels, head, line, columns;  // head: channels, rounded up; line: pixels, rounded up, off the powers of two
  int64_t step;                     // floats a pixel of q, k, v
  float scale;
  Attention(const Tensor& in, int channels)
      : pixels(in.height * in.width), head(in.channels / 3), line(0), columns((pixels + kWidth - 1) / kWidth * kWidth),
        step(in.padded), scale(1.f / __builtin_sqrtf((float)channels)) {
    line = columns + kWidth;
  }

  // This member's share of out[c][pixel] = of[pixel][c], zeros behind the last pixel.
  void transpose(const Run& run, const float* of, float* out) const {
    int first, last;
    run.share(head, first, last);
    for (int c = first; c < last; c++)
      for (int i = 0; i < columns; i++) out[(int64_t)c * line + i] = i < pixels ? of[i * step + c] : 0.f;
  }
  // Rows [first, last) of softmax(scale·q·kᵀ).
  void weights(int first, int last, const float* q, const float* keys, float* out) const {
    product(last - first, columns, q + first * step, step, 1, keys, line, head, scale, out + (int64_t)first * line, line);
    for (int i = first; i < last; i++) softmax(out + (int64_t)i * line, pixels);
  }
};

// With A = softmax(scale·q·kᵀ) and dA = dy·vᵀ: dS = scale·A∘(dA − Σ_row A∘dA), dq = dS·k, dk = dSᵀ·q, dv = Aᵀ·dy.
static void attention_backward(const Run& run, const Layer& layer) {
  const Tensor &in = run.tensor(layer.input), &given = run.tensor(layer.second);
  const Attention at(in, given.channels);
  float* const keys = run.workspace.planes;                  // [head][line]
  float* const values = keys + (int64_t)at.head * at.line;   // [head][line]
  float* const weights = values + (int64_t)at.head * at.line;  // [pixels][line]
  float* const slopes = weights + (int64_t)at.pixels * at.line;
  int first, last;
  run.share(at.pixels, first, last);
  for (int image = 0; image < run.images; image++) {
    const float *q = run.data(layer.input, image), *k = q + at.head, *v = k + at.head, *dy = run.data(layer.second, image);
    float* const dq = run.data(layer.output, image);
    at.transpose(run, k, keys), at.transpose(run, v, values);
    run.wait();
    at.weights(first, last, q, keys, weights);
    product(last - first, at.columns, dy + (int64_t)first * given.padded, given.padded, 1, values, at.line, given.channels,
            1.f, slopes + (int64_t)first * at.line, at.line);
    for (int i = first; i < last; i++) {
      const float* a = weights + (int64_t)i * at.line;
      float* s = slopes + (int64_t)i * at.line;
      Vec sum = Vec{};
      for (int j = 0; j < at.columns; j += kWidth) sum += load(a + j) * load(s + j);
      const float mean = horizontal_sum(sum);
      for (int j = 0; j < at.columns; j += kWidth) store(s + j, load(a + j) * (load(s + j) - mean) * at.scale);
    }
    product(last - first, at.head, slopes + (int64_t)first * at.line, at.line, 1, k, at.step, at.pixels, 1.f, dq + first * at.step, at.step);
    run.wait();
    product(last - first, at.head, slopes + first, 1, at.line, q, at.step, at.pixels, 1.f, dq + first * at.step + at.head, at.step);
    for (int i = first; i < last; i++)  // of channels beyond dy's, there is nothing
      memset(dq + i * at.step + 2 * at.head, 0, at.head * sizeof(float));
    product(last - first, given.padded, weights + first, 1, at.line, dy, given.padded, at.pixels, 1.f, dq + first * at.step + 2 * at.head, at.step);
    run.wait();
  }
}

}  // namespace sgm::SGM_ISA::executor
