// The gradient of y = act(γ·x̂ + β), x̂ = (x − μ)·r, r = rsqrt(var + eps), μ and var (biased) over a group's channels and
// pixels (group norm, arXiv 1803.08494), on raw pointers. With h = dy·act'(y), sums over a group of m = C/G·P elements:
//   dx = r·(γ·h − (Σ γ·h + x̂·Σ γ·h·x̂)/m)      dγ = Σ h·x̂      dβ = Σ h
// Nothing is checked or allocated here; kernels/ops.py does both.
#pragma once
#include <cstdint>

#include "cpu/norm.h"

namespace sgm {

struct NormBackward {
  const void* x;   // [samples, channels, pixels] of dtype, as dy and dx
  const void* dy;
  void* dx;
  const float* gamma;  // [channels]; may be null, as beta
  const float* beta;
  float* dgamma;  // [samples, channels]: each sample's own part
  float* dbeta;
  int64_t samples, channels, pixels, groups;
  float eps;
  Dtype dtype;
  Activation activation;
};

SGM_DECLARE_PER_ISA(void, norm_backward_group, (const NormBackward& norm, int64_t n, int64_t group))

void norm_backward(const NormBackward& norm);  // the whole batch, on the pool

}  // namespace sgm
