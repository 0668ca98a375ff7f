// The activations, by vector.
#pragma once
#include "vec.h"

namespace sgm::SGM_ISA::executor {

// e^x, its exponent held within what exp_bounded takes.
SGM_INLINE Vec exp_held(Vec x) {
  const Vec low = x > -87.f ? x : splat(-87.f);
  return exp_bounded(low < 87.f ? low : splat(87.f));
}

// Near 0 a polynomial (Cephes tanhf), where 1 − 2/(e^2x + 1) would lose the digits of a small x.
SGM_INLINE Vec tanh_of(Vec x) {
  const Vec z = x * x, far = 1.f - 2.f / (exp_held(2.f * x) + 1.f);
  Vec p = z * -5.70498872745e-3f + 2.06390887954e-2f;
  p = p * z - 5.37397155531e-2f;
  p = p * z + 1.33314422036e-1f;
  p = p * z - 3.33332819422e-1f;
  return z >= 0.390625f ? far : x + x * (z * p);
}

// x·Φ(x), the normal distribution by its tail: Φ(−|x|) = e^(−x²/2)·p(t)/2, t = 1/(1 + 0.3275911·|x|/√2) (Abramowitz & Stegun
// 7.1.26; within 8e-8).
SGM_INLINE Vec gelu_of(Vec x) {
  const Vec magnitude = (x < 0.f ? -x : x) * 0.70710678118654752f;
  const Vec t = 1.f / (1.f + 0.3275911f * magnitude);
  Vec p = t * 1.061405429f - 1.453152027f;
  p = p * t + 1.421413741f;
  p = p * t - 0.284496736f;
  p = p * t + 0.254829592f;
  const Vec tail = 0.5f * (p * t * exp_held(-(magnitude * magnitude)));
  return x * (x < 0.f ? tail : 1.f - tail);
}

// slope: of leaky_relu below 0, and the limit of clip. NaN stays NaN.
template <Activation kActivation>
SGM_INLINE Vec activate(Vec x, float slope) {
  if constexpr (kActivation == Activation::elu) return x < 0.f ? exp_bounded(x > -87.f ? x : splat(-87.f)) - 1.f : x;
  if constexpr (kActivation == Activation::relu) return x < 0.f ? Vec{} : x;
  if constexpr (kActivation == Activation::silu) return x / (exp_held(-x) + 1.f);
  if constexpr (kActivation == Activation::gelu) return gelu_of(x);
  if constexpr (kActivation == Activation::gelu_tanh)
    return x / (exp_held(-1.5957691216057308f * (x + 0.044715f * (x * x * x))) + 1.f);
  if constexpr (kActivation == Activation::tanh) return tanh_of(x);
  if constexpr (kActivation == Activation::sigmoid) return x == x ? 1.f / (exp_held(-x) + 1.f) : x;
  if constexpr (kActivation == Activation::leaky_relu) return x < 0.f ? x * slope : x;
  if constexpr (kActivation == Activation::clip) return x > slope ? splat(slope) : x < -slope ? splat(-slope) : x;
  return x;
}

}  // namespace sgm::SGM_ISA::executor
