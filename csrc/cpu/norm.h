// noise_conditioned_norm on raw pointers: act(γ·(x̂ + α·ms) + β), InstanceNorm++ (NCSN, arXiv 1907.05600, appendix A).
//   x̂  = (x − μ)·rsqrt(var + eps)         μ, var: mean and biased variance of sample n, channel c over its pixels
//   ms = (μ − m)·rsqrt(v + 1e-5)           m, v: mean and unbiased variance of μ over the channels of sample n
// With groups μ and var are over the pixels of all channels of the group (group norm, arXiv 1803.08494), and α is null.
// Nothing is checked or allocated here; kernels/ops.py does both.
#pragma once
#include <cstdint>

#include "dtype.h"
#include "isa.h"

namespace sgm {

enum class Activation : int { none = 0, elu = 1, relu = 2, silu = 3 };

struct Norm {
  // x, residual, y, total: [samples, channels, pixels], or [samples, pixels, channels] if channels_last; all of dtype.
  // residual (may be null): total = x + residual, rounded to dtype, is written and then normalized in place of x.
  const void* x;
  const void* residual;
  void* y;
  void* total;
  // γ, α, β: row level[n] of a table with this row stride, in elements, or one row for all (level null). Each may be null.
  const float* gamma;
  const float* alpha;
  const float* beta;
  int64_t gamma_stride, alpha_stride, beta_stride;
  const int64_t* level;  // [samples]
  float* workspace;      // [samples, 4, padded(channels)] float32, need not be initialised
  int64_t samples, channels, pixels;
  float eps;
  Dtype dtype;
  Activation activation;
  bool channels_last;
  int64_t groups = 0;  // of channels, dividing them evenly; 0: each channel has its own statistics

  static int64_t padded(int64_t channels) { return (channels + 15) / 16 * 16; }
  static int64_t workspace_size(int64_t channels) { return 4 * padded(channels); }  // of one sample
};

// Statistics and apply work on channels [begin, end) of sample n; begin is a multiple of 16. All channels of a sample must
// have been through norm_statistics before any goes through norm_apply; with groups, norm_merge comes between the two, once
// a sample. How the channels are divided does not change a bit of the result.
SGM_DECLARE_PER_ISA(void, norm_statistics, (const Norm& norm, int64_t n, int64_t begin, int64_t end))
SGM_DECLARE_PER_ISA(void, norm_merge, (const Norm& norm, int64_t n))
SGM_DECLARE_PER_ISA(void, norm_apply, (const Norm& norm, int64_t n, int64_t begin, int64_t end))

void norm(const Norm& norm);  // the whole batch, on the pool

}  // namespace sgm
