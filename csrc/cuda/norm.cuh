// noise_conditioned_norm: what its kernels are given, and their launches.
//
// y = act(γ·((x − μ)·rstd + α·ms) + β): μ and the biased variance over H·W for each (n, c); ms = (μ − m)/√(v + 1e-5) with m and
// v (unbiased) the mean and variance of μ over the channels. With groups, μ and v are those of a group of channels; x may be a
// sum, and activated before the norm. A bias of x is added in that sum; without one, to the means of x alone.
//
//   moments.cuh             mean and M2, merged; across the channels of a sample
//   norm_tile.cuh           a block's tile, channels × pixels of one sample, packed in registers
//   norm_coefficients.cuh   moments and parameters, folded to a centre, a scale and a shift
#pragma once

#include "device.cuh"
#include "norm_plan.h"

namespace sgm::cuda {

enum Activation : int { kNone = 0, kElu = 1, kRelu = 2, kSilu = 3 };  // the codes of csrc/binding.cpp

struct Norm {
  const void* x;                 // [N, C, H, W] of one dtype and layout, as are the next three
  const void* residual;          // or null
  void* y;
  void* sum;                     // before(x + residual), rounded, which is then what is normalised; null if that is x
  const float *gamma, *alpha, *beta;                    // [C], or [L, C] read at level[n]; each or null
  int64_t gamma_stride, alpha_stride, beta_stride;      // of a level's row; 0 for [C]
  const int64_t* level;          // [N], or null
  float* moments;                // portable kernels: [N, slabs, 2, C], mean and M2 of each slab
  int channels, pixels, width;   // C, H·W, W
  int group;                     // channels of a group; 0: each channel by itself
  float eps;
  int before, activation;
};

// For the portable kernels alone: in the one of clusters no registers are left.
struct BiasedNorm : Norm {
  const float *bias, *residual_bias;  // [C], added to x and to residual in `sum`; each or null
  const float* lacking;               // [C], what x lacks without a `sum`, which its moments are given; or null

  __device__ float lacks(int c) const { return lacking ? lacking[c] : 0.0f; }
};

// vector: elements of a pack; 1 for a pool in NCHW.
cudaError_t norm_portable(const BiasedNorm& s, int64_t batch, int dtype, bool nhwc, int vector, bool pool, void* stream);
cudaError_t norm_pool(const BiasedNorm& s, int64_t batch, int dtype, bool nhwc, int vector, const Tiling& t, void* stream);
cudaError_t norm_cluster(const Norm& s, int64_t batch, int dtype, const ClusterPlan& plan, void* stream);

}  // namespace sgm::cuda
