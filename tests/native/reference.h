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
  bool centred = true;       // of a norm by pixel
  double floor = 0, after = 0;
};

constexpr double kSlope = 0.7;  // of leaky_relu, and the limit of clip

inline double activation(sgm::executor::Activation kind, double x) {
  using sgm::executor::Activation;
  switch (kind) {
    case Activation::elu: return x < 0 ? std::expm1(x) : x;
    case Activation::relu: return std::max(x, 0.0);
    case Activation::silu: return x / (1 + std::exp(-x));
    case Activation::gelu: return x * std::erfc(-x / std::sqrt(2.0)) / 2;
    case Activation::gelu_tanh: return x / 2 * (1 + std::tanh(std::sqrt(2 / std::acos(-1.0)) * (x + 0.044715 * x * x * x)));
    case Activation::tanh: return std::tanh(x);
    case Activation::sigmoid: return 1 / (1 + std::exp(-x));
    case Activation::leaky_relu: return x < 0 ? kSlope * x : x;
    case Activation::clip: return std::min(std::max(x, -kSlope), kSlope);
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

// The norm of each pixel's channels, group by group.
inline Image normalise_pixels(const Image& x, const Norm& norm, int64_t level) {
  const int n = x.channels, size = n / norm.groups;
  const float* gamma = norm.table.data() + (norm.per_level ? level * 3 * n : 0);
  return fill(x, [&](int c, int h, int w) {
    const int first = c / size * size;
    double mean = 0, square = 0;
    for (int i = first; norm.centred && i < first + size; ++i) mean += x.at(i, h, w) / size;
    for (int i = first; i < first + size; ++i) square += (x.at(i, h, w) - mean) * (x.at(i, h, w) - mean) / size;
    return gamma[c] * (x.at(c, h, w) - mean) / (norm.after + std::sqrt(std::max(square, norm.floor) + norm.eps)) + gamma[2 * n + c];
  });
}

// What stands at (h, w) of x and its border.
inline double bordered(const Image& x, sgm::executor::Border border, int c, int h, int w) {
  using sgm::executor::Border;
  const auto inside = [&](int i, int n) {
    if (border == Border::replicate) return std::min(std::max(i, 0), n - 1);
    if (border == Border::circular) return (i + n) % n;
    return i < 0 ? -i : i >= n ? 2 * (n - 1) - i : i;
  };
  if (border == Border::zeros) return x.has(h, w) ? x.at(c, h, w) : 0;
  return x.at(c, inside(h, x.height), inside(w, x.width));
}

// bias: one row, of the image's level.
inline Image convolve(const Image& x, const std::vector<float>& weight, const float* bias, const sgm::executor::ConvShape& s) {
  using namespace sgm::executor;
  const auto size = [&](int n, int before, int after) {
    return (s.up * (n - 1) + before + after - s.dilation * (s.kernel - 1)) / s.stride + 1;
  };
  const int of_input = s.c_in / s.groups, of_output = s.c_out / s.groups;
  return fill(Image(s.c_out, size(x.height, s.pad[kTop], s.pad[kBottom]), size(x.width, s.pad[kLeft], s.pad[kRight])), [&](int k, int h, int w) {
    double sum = bias ? bias[k] : 0;
    for (int c = 0; c < of_input; ++c)
      for (int r = 0; r < s.kernel; ++r)
        for (int q = 0; q < s.kernel; ++q) {
          const int row = h * s.stride + r * s.dilation - s.pad[kTop], column = w * s.stride + q * s.dilation - s.pad[kLeft];
          if (row % s.up || column % s.up) continue;
          sum += bordered(x, s.border, k / of_output * of_input + c, row / s.up, column / s.up) *
                 weight[((static_cast<size_t>(k) * of_input + c) * s.kernel + r) * s.kernel + q];
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

struct Heads {
  int count, size;
  double scale;
  int memory;
  std::vector<float> tokens;  // [keys, values][count][memory][size]
};

// Key (part 0) or value (part 1), channel c of a head, at memory and then the pixels.
inline double of_head(const Image& x, const Heads& heads, int part, int head, int index, int c) {
  if (index < heads.memory) return heads.tokens[((static_cast<size_t>(part) * heads.count + head) * heads.memory + index) * heads.size + c];
  const size_t channel = (part + 1) * (x.channels / 3) + head * heads.size + c;
  return x.v[channel * x.height * x.width + index - heads.memory];
}

// softmax(scale·qᵀk)·v over the pixels, head by head.
inline Image attention(const Image& x, const Heads& heads) {
  const int pixels = x.height * x.width, keys = heads.memory + pixels;
  Image y(heads.count * heads.size, x.height, x.width);
  std::vector<double> weight(keys);
  for (int head = 0; head < heads.count; ++head)
    for (int i = 0; i < pixels; ++i) {
      double sum = 0, most = -1e300;
      for (int j = 0; j < keys; ++j) {
        weight[j] = 0;
        for (int c = 0; c < heads.size; ++c)
          weight[j] += heads.scale * x.v[static_cast<size_t>(head * heads.size + c) * pixels + i] * of_head(x, heads, 0, head, j, c);
        most = std::max(most, weight[j]);
      }
      for (double& w : weight) sum += w = std::exp(w - most);
      for (int c = 0; c < heads.size; ++c)
        for (int j = 0; j < keys; ++j)
          y.v[static_cast<size_t>(head * heads.size + c) * pixels + i] += weight[j] / sum * of_head(x, heads, 1, head, j, c);
    }
  return y;
}

// scale·contextᵀ·softmax(q), context = softmax(k)·vᵀ.
inline Image linear_attention(const Image& x, const Heads& heads) {
  const int pixels = x.height * x.width, keys = heads.memory + pixels, n = heads.size;
  Image y(heads.count * n, x.height, x.width);
  for (int head = 0; head < heads.count; ++head) {
    std::vector<double> context(static_cast<size_t>(n) * n), q(n);
    for (int d = 0; d < n; ++d) {
      double sum = 0;
      for (int j = 0; j < keys; ++j) sum += std::exp(of_head(x, heads, 0, head, j, d));
      for (int e = 0; e < n; ++e)
        for (int j = 0; j < keys; ++j)
          context[static_cast<size_t>(d) * n + e] += std::exp(of_head(x, heads, 0, head, j, d)) / sum * of_head(x, heads, 1, head, j, e);
    }
    for (int i = 0; i < pixels; ++i) {
      double sum = 0;
      for (int d = 0; d < n; ++d) sum += q[d] = std::exp(x.v[static_cast<size_t>(head * n + d) * pixels + i]);
      for (int d = 0; d < n; ++d)
        for (int e = 0; e < n; ++e)
          y.v[static_cast<size_t>(head * n + e) * pixels + i] += heads.scale * q[d] / sum * context[static_cast<size_t>(d) * n + e];
    }
  }
  return y;
}

}  // namespace reference
