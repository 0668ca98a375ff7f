// The layers of csrc/cpu/executor in double precision, one image at a time, as their formulas read.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "cpu/executor/executor.h"

namespace reference {

struct Image {
  int channels, height, width;
  std::vector<double> v;  // [channels][height][width]
  Image(int c, int h, int w) : channels(c), height(h), width(w), v(static_cast<size_t>(c) * h * w) {}
  double& at(int c, int h, int w) { return v[(static_cast<size_t>(c) * height + h) * width + w]; }
  double at(int c, int h, int w) const { return v[(static_cast<size_t>(c) * height + h) * width + w]; }
  bool has(int h, int w) const { return h >= 0 && h < height && w >= 0 && w < width; }
};

// Calls f(c, h, w, y) for every value of y.
template <class F>
Image fill(Image y, const F& f) {
  for (int c = 0; c < y.channels; ++c)
    for (int h = 0; h < y.height; ++h)
      for (int w = 0; w < y.width; ++w) y.at(c, h, w) = f(c, h, w);
  return y;
}

struct Norm {
  int groups, levels;
  bool per_level, has_alpha;
  double eps;
  std::vector<float> table;  // [levels or 1][3][channels]: gamma, alpha, beta
};

inline double activation(sgm::executor::Activation kind, double x) {
  using sgm::executor::Activation;
  switch (kind) {
    case Activation::elu: return x < 0 ? std::expm1(x) : x;
    case Activation::relu: return std::max(x, 0.0);
    case Activation::silu: return x / (1 + std::exp(-x));
    case Activation::none: break;
  }
  return x;
}

inline Image normalise(const Image& x, const Norm& norm, int64_t level) {
  const int n = x.channels, pixels = x.height * x.width, size = norm.groups ? n / norm.groups : 1;
  std::vector<double> means(n), centre(n, 0.0), rstd(n, 1.0);
  for (int c = 0; c < n; ++c) {
    for (int i = 0; i < pixels; ++i) means[c] += x.v[static_cast<size_t>(c) * pixels + i];
    means[c] /= pixels;
  }
  for (int first = 0; norm.groups && first < n; first += size) {
    double mean = 0, variance = 0;
    for (int c = first; c < first + size; ++c) mean += means[c] / size;
    for (int i = first * pixels; i < (first + size) * pixels; ++i) variance += (x.v[i] - mean) * (x.v[i] - mean);
    for (int c = first; c < first + size; ++c) centre[c] = mean, rstd[c] = 1 / std::sqrt(variance / (size * pixels) + norm.eps);
  }
  double m = 0, v = 0;
  for (double mean : means) m += mean / n;
  for (double mean : means) v += (mean - m) * (mean - m) / std::max(n - 1, 1);
  const float* gamma = norm.table.data() + (norm.per_level ? level * 3 * n : 0);
  const float *alpha = gamma + n, *beta = alpha + n;
  return fill(Image(n, x.height, x.width), [&](int c, int h, int w) {
    const double shift = norm.has_alpha ? alpha[c] * (means[c] - m) / std::sqrt(v + norm.eps) : 0;
    return gamma[c] * ((x.at(c, h, w) - centre[c]) * rstd[c] + shift) + beta[c];
  });
}

inline Image convolve(const Image& x, const std::vector<float>& weight, const std::vector<float>& bias, int kernel, int dilation,
                      int stride, int padding) {
  const auto size = [&](int n) { return (n + 2 * padding - dilation * (kernel - 1) - 1) / stride + 1; };
  return fill(Image(static_cast<int>(bias.size()), size(x.height), size(x.width)), [&](int k, int h, int w) {
    double sum = bias[k];
    for (int c = 0; c < x.channels; ++c)
      for (int r = 0; r < kernel; ++r)
        for (int s = 0; s < kernel; ++s) {
          const int row = h * stride + r * dilation - padding, column = w * stride + s * dilation - padding;
          if (x.has(row, column)) sum += x.at(c, row, column) * weight[((static_cast<size_t>(k) * x.channels + c) * kernel + r) * kernel + s];
        }
    return sum;
  });
}

inline Image mean_pool(const Image& x) {
  return fill(Image(x.channels, x.height / 2, x.width / 2), [&](int c, int h, int w) {
    return (x.at(c, 2 * h, 2 * w) + x.at(c, 2 * h + 1, 2 * w) + x.at(c, 2 * h, 2 * w + 1) + x.at(c, 2 * h + 1, 2 * w + 1)) / 4;
  });
}

inline Image pool5(const Image& x, bool maximum) {
  return fill(x, [&](int c, int h, int w) {
    double sum = 0, best = x.at(c, h, w);
    for (int r = h - 2; r <= h + 2; ++r)
      for (int s = w - 2; s <= w + 2; ++s)
        if (x.has(r, s)) sum += x.at(c, r, s), best = std::max(best, x.at(c, r, s));
    return maximum ? best : sum / 25;
  });
}

inline Image upsample(const Image& x, int height, int width) {
  return fill(Image(x.channels, height, width), [&](int c, int h, int w) {
    const double down = height > 1 ? static_cast<double>(h) * (x.height - 1) / (height - 1) : 0;
    const double right = width > 1 ? static_cast<double>(w) * (x.width - 1) / (width - 1) : 0;
    const int r = static_cast<int>(down), s = static_cast<int>(right);
    const int r1 = std::min(r + 1, x.height - 1), s1 = std::min(s + 1, x.width - 1);
    const double a = x.at(c, r, s) * (1 - (right - s)) + x.at(c, r, s1) * (right - s);
    const double b = x.at(c, r1, s) * (1 - (right - s)) + x.at(c, r1, s1) * (right - s);
    return a * (1 - (down - r)) + b * (down - r);
  });
}

inline Image nearest(const Image& x, int factor) {
  return fill(Image(x.channels, x.height * factor, x.width * factor),
              [&](int c, int h, int w) { return x.at(c, h / factor, w / factor); });
}

inline Image concat(const Image& a, const Image& b) {
  return fill(Image(a.channels + b.channels, a.height, a.width),
              [&](int c, int h, int w) { return c < a.channels ? a.at(c, h, w) : b.at(c - a.channels, h, w); });
}

// softmax(qᵀk/√channels)·v over the pixels of q, k, v: `head` channels each, of v the first `channels`.
inline Image attention(const Image& x, int head, int channels) {
  const int pixels = x.height * x.width;
  const auto value = [&](int c, int i) { return x.v[static_cast<size_t>(c) * pixels + i]; };
  Image y(channels, x.height, x.width);
  for (int i = 0; i < pixels; ++i) {
    std::vector<double> weight(pixels);
    double sum = 0;
    for (int j = 0; j < pixels; ++j) {
      double dot = 0;
      for (int c = 0; c < head; ++c) dot += value(c, i) * value(head + c, j);
      sum += weight[j] = std::exp(dot / std::sqrt(channels));
    }
    for (int c = 0; c < channels; ++c)
      for (int j = 0; j < pixels; ++j) y.v[static_cast<size_t>(c) * pixels + i] += weight[j] / sum * value(2 * head + c, j);
  }
  return y;
}

}  // namespace reference
