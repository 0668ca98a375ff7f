// Moments of the pixels of a channel, and of the channels of a sample. They are centred: in a thread about one of its values
// (norm_tile.cuh), then merged by Chan's formula (Chan, Golub, LeVeque 1979).
#pragma once

#include "norm.cuh"

namespace sgm::cuda {

struct Moments {
  float count, mean, m2;
};

// The moments of a union from those of its parts, as deviations from the first part's mean: few digits are lost if the means
// are large. The first part must not be empty unless all are; an empty one must have a finite mean, which a union of empty ones has.
template <class Part>
__device__ __forceinline__ Moments merge(int parts, Part part) {
  const float pivot = part(0).mean;
  float count = 0, offset = 0, m2 = 0;
  for (int i = 0; i < parts; ++i) {
    const Moments p = part(i);
    count += p.count;
    offset += p.count * (p.mean - pivot);
  }
  offset = count > 0 ? offset / count : 0.0f;
  for (int i = 0; i < parts; ++i) {
    const Moments p = part(i);
    const float d = (p.mean - pivot) - offset;
    m2 += p.m2 + p.count * d * d;
  }
  return {count, pivot + offset, m2};
}

// The sum of v over the block, for every thread, in a fixed order. warps: [kNormThreads / 32] in shared memory.
__device__ __forceinline__ float block_sum(float v, float* warps) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) v += __shfl_xor_sync(0xffffffffu, v, offset);
  __syncthreads();  // the previous sum has been read
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = v;
  __syncthreads();
  float sum = 0;
#pragma unroll
  for (int i = 0; i < kNormThreads / 32; ++i) sum += warps[i];
  return sum;
}

struct Spread {
  float mean, inverse;  // m, 1/√(v + 1e-5)
};

// Across the channels: mean [channels] in shared memory, written before a barrier.
__device__ __forceinline__ Spread spread(const float* mean, int channels, float* warps) {
  const float pivot = mean[0];
  float sum = 0, squares = 0;
  for (int c = threadIdx.x; c < channels; c += kNormThreads) sum += mean[c] - pivot;
  const float m = pivot + block_sum(sum, warps) / static_cast<float>(channels);
  for (int c = threadIdx.x; c < channels; c += kNormThreads) squares += (mean[c] - m) * (mean[c] - m);
  const float v = block_sum(squares, warps) / static_cast<float>(channels - 1);
  return {m, 1.0f / sqrtf(v + 1e-5f)};
}

// The moments of the group that channel c is in: mean, m2 [C], of each channel's pixels.
__device__ __forceinline__ Moments group_moments(const Norm& s, int c, const float* mean, const float* m2) {
  const int first = c - c % s.group;
  return merge(s.group, [&](int i) { return Moments{static_cast<float>(s.pixels), mean[first + i], m2[first + i]}; });
}

}  // namespace sgm::cuda
