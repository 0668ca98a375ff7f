// The affine map of each channel: its moments and the parameters of its level, folded.
#pragma once

#include "moments.cuh"

namespace sgm::cuda {

// Channel c at the level of sample n: coef[0], coef[width], coef[2·width] = α, γ, β, for `fold`; early, while a tile is on its way.
__device__ __forceinline__ void fetch_parameters(const Norm& s, int64_t n, int c, float* coef, int width) {
  const int64_t level = s.level ? s.level[n] : 0;
  coef[0] = s.alpha ? s.alpha[level * s.alpha_stride + c] : 0.0f;
  coef[width] = s.gamma ? s.gamma[level * s.gamma_stride + c] : 1.0f;
  coef[2 * width] = s.beta ? s.beta[level * s.beta_stride + c] : 0.0f;
}

// In place of α, γ, β: centre, scale, shift.
__device__ __forceinline__ void fold(const Norm& s, const Moments& m, const Spread& across, float* coef, int width) {
  const float offset = s.alpha ? coef[0] * ((m.mean - across.mean) * across.inverse) : 0.0f, gamma = coef[width];
  coef[0] = m.mean;
  coef[width] = gamma * (1.0f / sqrtf(m.m2 / m.count + s.eps));
  coef[2 * width] = gamma * offset + coef[2 * width];
}

__device__ __forceinline__ int slab_packs(const Tiling& t, int slab, int packs) { return min(t.tile * t.tiles, packs - slab * t.tile * t.tiles); }

// Shared memory of `coefficients`, for `width` channels a block.
inline size_t coefficient_bytes(const Norm& s, int width) {
  return sizeof(float) * (kNormThreads / 32 + 3 * width + (s.group ? 2 : 1) * s.channels);
}

// [3][t.groups · CHANNELS] in shared memory, for the channels of this block, from the moments that `stats` left. CHANNELS, PIXELS:
// of a pack of `stats`. Ends with a barrier.
template <int CHANNELS, int PIXELS>
__device__ __forceinline__ const float* coefficients(const BiasedNorm& s, const Tiling& t, int64_t n) {
  const int width = t.groups * CHANNELS, first = static_cast<int>(blockIdx.y) * width, packs = s.pixels / PIXELS;
  float* warps = shared_floats();
  float* coef = warps + kNormThreads / 32;
  float* mean = coef + 3 * width;    // [C]
  float* m2 = mean + s.channels;     // [C], with groups
  const auto channel = [&](int c) {
    return merge(t.slabs, [&](int i) {
      const float* p = s.moments + (n * t.slabs + i) * 2 * s.channels + c;
      return Moments{static_cast<float>(slab_packs(t, i, packs) * PIXELS), p[0], p[s.channels]};
    });
  };
  for (int c = threadIdx.x; c < width; c += kNormThreads)
    if (c < s.channels - first)
      fetch_parameters(s, n, first + c, coef + c, width);
    else
      coef[c] = coef[width + c] = coef[2 * width + c] = 0.0f;  // of no channel: threads without a pixel read it
  Spread across{};
  if (s.alpha || s.group) {
    for (int c = threadIdx.x; c < s.channels; c += kNormThreads) {
      const Moments m = channel(c);
      mean[c] = m.mean;
      if (s.group) m2[c] = m.m2;
    }
    __syncthreads();
    if (s.alpha) across = spread(mean, s.channels, warps);
  }
  for (int c = threadIdx.x; c < min(width, s.channels - first); c += kNormThreads) {
    fold(s, s.group ? group_moments(s, first + c, mean, m2) : channel(first + c), across, coef + c, width);
    coef[c] -= s.lacks(first + c);
  }
  __syncthreads();
  return coef;
}

}  // namespace sgm::cuda
