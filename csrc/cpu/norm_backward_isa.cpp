// One group of one sample lies together in memory and mostly fits L1 or L2, so that four sweeps cost little more than one:
// mean, variance, the sums of h and h·x̂ of each channel, and dx. act'(y) is computed twice rather than kept.
#include "cpu/norm_backward.h"

#include <cstring>
#include <utility>
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace sgm::SGM_ISA {
namespace {
#include "cpu/norm_simd.h"

SGM_INLINE float sum_of(const Vec* v) { return sum((v[0] + v[1]) + (v[2] + v[3])); }

// dy·d act(y)/dy, in float32 for every type, as the sums are. As PyTorch: where y is NaN, relu and elu let dy through,
// and where relu is 0 even a dy that is not finite is 0.
template <Activation kActivation>
SGM_INLINE Vec through(Vec dy, Vec y) {
  const Vec zero{};
  if (kActivation == Activation::relu) return y <= zero ? zero : dy;
  if (kActivation == Activation::elu) {
    const Exp e = exp_parts<false>(max(splat(-87.0f), min(zero, y)));
    return y <= zero ? dy * fma(e.scale, e.p, e.scale) : dy;
  }
  if (kActivation == Activation::silu) {
    const Exp e = exp_parts<false>(max(splat(-87.0f), min(splat(88.7f), -y)));
    const Vec s = 1.0f / (1.0f + e.scale * (1.0f + e.p));
    return dy * (s * fma(y, 1.0f - s, splat(1.0f)));
  }
  return dy;
}

template <class Type, Activation kActivation>
void backward(const NormBackward& a, int64_t n, int64_t group) {
  using Element = typename Type::Element;
  const int64_t size = a.channels / a.groups, first = group * size, elements = size * a.pixels;
  const int64_t offset = (n * a.channels + first) * a.pixels;
  const Element *x = (const Element*)a.x + offset, *dy = (const Element*)a.dy + offset;
  Element* dx = (Element*)a.dx + offset;

  Vec total[4]{};
  for_each_vector(elements, [&](int64_t i, auto lanes, int j) { total[j] += load<Type>(x + i, lanes); });
  const float mean = sum_of(total) / elements;
  Vec left[4]{}, square[4]{};
  for_each_vector(elements, [&](int64_t i, auto lanes, int j) {
    const Vec d = keep(load<Type>(x + i, lanes) - mean, lanes);
    left[j] += d;
    square[j] = fma(d, d, square[j]);
  });
  const float rest = sum_of(left) / elements;  // what the rounding of the mean left over
  const float variance = sum_of(square) / elements - rest * rest;
  const float r = 1.0f / __builtin_sqrtf(variance + a.eps);

  // h and x̂ of element i of channel c, the same in both sweeps.
  const auto each = [&](int64_t c, auto f) __attribute__((always_inline)) {
    const Vec gamma = splat(a.gamma ? a.gamma[first + c] : 1.0f), beta = splat(a.beta ? a.beta[first + c] : 0.0f);
    for_each_vector(a.pixels, [&](int64_t i, auto lanes, int j) {
      const int64_t at = c * a.pixels + i;
      const Vec xhat = ((load<Type>(x + at, lanes) - mean) - rest) * r;
      const Vec h = through<kActivation>(load<Type>(dy + at, lanes), fma(gamma, xhat, beta));
      f(at, lanes, j, gamma, h, xhat);  // dy, and so h, is 0 beyond the end
    });
  };
  double sum_h = 0, sum_hx = 0;  // Σ γ·h, Σ γ·h·x̂
  for (int64_t c = 0; c < size; ++c) {
    Vec part_h[4]{}, part_hx[4]{};
    each(c, [&](int64_t, auto, int j, Vec, Vec h, Vec xhat) __attribute__((always_inline)) {
      part_h[j] += h;
      part_hx[j] = fma(h, xhat, part_hx[j]);
    });
    const float dbeta = sum_of(part_h), dgamma = sum_of(part_hx), gamma = a.gamma ? a.gamma[first + c] : 1.0f;
    a.dbeta[n * a.channels + first + c] = dbeta;
    a.dgamma[n * a.channels + first + c] = dgamma;
    sum_h += double(gamma) * dbeta;
    sum_hx += double(gamma) * dgamma;
  }
  const Vec mean_h = splat(float(sum_h / elements)), mean_hx = splat(float(sum_hx / elements));
  for (int64_t c = 0; c < size; ++c)
    each(c, [&](int64_t at, auto lanes, int, Vec gamma, Vec h, Vec xhat) __attribute__((always_inline)) {
      store<Type>(dx + at, (gamma * h - fma(xhat, mean_hx, mean_h)) * r, lanes);
    });
}

template <class Type>
void backward_of(const NormBackward& a, int64_t n, int64_t group) {
  switch (a.activation) {
    case Activation::none: return backward<Type, Activation::none>(a, n, group);
    case Activation::elu: return backward<Type, Activation::elu>(a, n, group);
    case Activation::relu: return backward<Type, Activation::relu>(a, n, group);
    case Activation::silu: return backward<Type, Activation::silu>(a, n, group);
  }
}

}  // namespace

void norm_backward_group(const NormBackward& a, int64_t n, int64_t group) {
  SGM_BY_TYPE(norm_backward_group, backward_of, a, n, group);
}

}  // namespace sgm::SGM_ISA
