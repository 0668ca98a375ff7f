// noise_conditioned_norm, the parts that the portable and the cluster kernels share.
//
// y = act(γ·((x − μ)·rstd + α·ms) + β): μ and the biased variance over H·W for each (n, c); ms = (μ − m)/√(v + 1e-5) with m and
// v (unbiased) the mean and variance of μ over the channels. A block holds a tile, channels × pixels of one sample, packed in
// registers. With groups, μ and v are those of a group of channels; x may be a sum, and activated before the norm.
// Moments are centred: in a thread about one of its values, then merged by Chan's formula (Chan, Golub, LeVeque 1979).
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

struct Moments {
  float count, mean, m2;
};

// The moments of a union from those of its parts, as deviations from the first part's mean: few digits are lost if the means
// are large. The first part must not be empty; an empty one must have a finite mean.
template <class Part>
__device__ __forceinline__ Moments merge(int parts, Part part) {
  const float pivot = part(0).mean;
  float count = 0, offset = 0, m2 = 0;
  for (int i = 0; i < parts; ++i) {
    const Moments p = part(i);
    count += p.count;
    offset += p.count * (p.mean - pivot);
  }
  offset /= count;
  for (int i = 0; i < parts; ++i) {
    const Moments p = part(i);
    const float d = (p.mean - pivot) - offset;
    m2 += p.m2 + p.count * d * d;
  }
  return {count, pivot + offset, m2};
}

template <class T, int V>
__device__ __forceinline__ void activate(float (&v)[V], int activation) {
  constexpr bool kExact = sizeof(T) == 4;  // 16-bit results do not need the accurate exponentials
  switch (activation) {
    case kElu:
#pragma unroll
      for (int k = 0; k < V; ++k) v[k] = v[k] > 0 ? v[k] : kExact ? expm1f(v[k]) : rough_exp(v[k]) - 1.0f;
      break;
    case kRelu:
#pragma unroll
      for (int k = 0; k < V; ++k) v[k] = v[k] < 0 ? 0.0f : v[k];  // keeps NaN
      break;
    case kSilu:
#pragma unroll
      for (int k = 0; k < V; ++k) v[k] = kExact ? v[k] / (1.0f + expf(-v[k])) : __fdividef(v[k], 1.0f + rough_exp(-v[k]));
      break;
    default: break;
  }
}

template <class T, int V, int PER, bool NHWC>
struct Tile {
  static constexpr int kChannels = NHWC ? V : 1, kPixels = NHWC ? 1 : V;  // of a pack
  static constexpr int kScratch = scratch_floats(kChannels);

  const Tiling t;
  int full, extra;       // packs along the pixels that every lane has, and lanes that have one more
  int group, lane;
  int count;             // packs of this thread
  int64_t start, step;   // elements
  Pack<T, V> packs[PER];

  __device__ __forceinline__ Tile(const Norm& s, const Tiling& t, int64_t n, int tile, int channel_block) : t(t) {
    const int total = max(0, min(t.tile, s.pixels / kPixels - tile * t.tile));
    full = total / t.lanes, extra = total % t.lanes;
    const int thread = static_cast<int>(threadIdx.x);
    group = NHWC ? thread % t.groups : thread / t.lanes;
    lane = NHWC ? thread / t.groups : thread % t.lanes;
    const int channel = (channel_block * t.groups + group) * kChannels;
    count = group < t.groups && channel < s.channels ? count_of(lane) : 0;
    const int64_t pixel = (int64_t{tile} * t.tile + lane) * kPixels;
    start = n * s.channels * s.pixels + (NHWC ? pixel * s.channels + channel : int64_t{channel} * s.pixels + pixel);
    step = int64_t{t.lanes} * kPixels * (NHWC ? s.channels : 1);
  }

  __device__ __forceinline__ int count_of(int lane) const { return lane < t.lanes ? full + (lane < extra) : 0; }

  __device__ __forceinline__ void load(const void* x) {
#pragma unroll
    for (int i = 0; i < PER; ++i)
      if (i < count) packs[i].load(static_cast<const T*>(x) + start + i * step);
  }

  // before(x + residual), each step rounded to T, kept, and written to `sum`. Some packs of the residual are fetched at a time:
  // `sum` may be the residual, so that no load moves above a store by itself.
  __device__ __forceinline__ void load_sum(const Norm& s) {
    constexpr int kAhead = 4;
    static_assert(PER % kAhead == 0);
    load(s.x);
#pragma unroll
    for (int first = 0; first < PER; first += kAhead) {
      Pack<T, V> other[kAhead];
      if (s.residual)
#pragma unroll
        for (int i = 0; i < kAhead; ++i)
          if (first + i < count) other[i].load(static_cast<const T*>(s.residual) + start + (first + i) * step);
#pragma unroll
      for (int i = 0; i < kAhead; ++i)
        if (first + i < count) {
          Pack<T, V>& pack = packs[first + i];
          float v[V];
          if (s.residual) {
            float r[V];
            pack.unpack(v);
            other[i].unpack(r);
#pragma unroll
            for (int k = 0; k < V; ++k) v[k] += r[k];
            pack.pack(v);
          }
          if (s.before != kNone) {
            pack.unpack(v);
            activate<T>(v, s.before);
            pack.pack(v);
          }
          pack.store(static_cast<T*>(s.sum) + start + (first + i) * step);
        }
    }
  }

  // Calls take(c, moments) for each channel c of the tile, counted from 0, in one thread; the same one every time. Ends with a barrier.
  template <class Take>
  __device__ __forceinline__ void moments(float* scratch, Take take) {
    float pivot[V] = {}, thread_mean[kChannels] = {}, thread_m2[kChannels] = {};
    // Deviations d from p, one of the n values: then Σd² ≤ n·M2, and M2 = Σd² − (Σd)²/n keeps all but log₂ n of its bits.
    if (count > 0) packs[0].unpack(pivot);
#pragma unroll
    for (int i = 0; i < PER; ++i)
      if (i < count) {
        float v[V];
        packs[i].unpack(v);
#pragma unroll
        for (int k = 0; k < V; ++k) {
          const float d = v[k] - pivot[NHWC ? k : 0];
          thread_mean[NHWC ? k : 0] += d;
          thread_m2[NHWC ? k : 0] += d * d;
        }
        packs[i].keep_packed();
      }
    const float inverse = count > 0 ? 1.0f / static_cast<float>(count * kPixels) : 0.0f;
#pragma unroll
    for (int j = 0; j < kChannels; ++j) {
      const float offset = thread_mean[j] * inverse;
      thread_m2[j] -= thread_mean[j] * offset;
      thread_mean[j] = pivot[j] + offset;
    }

    // Row stride and slots keep both the writes and the reads below free of bank conflicts.
    constexpr int kStride = kNormThreads + 32 / kChannels;
    const auto slot = [this](int group, int lane) { return NHWC ? lane * t.groups + group : group * (t.lanes + 1) + lane; };
    float* scratch_m2 = scratch + kScratch / 2;
    if (group < t.groups && lane < t.lanes)
#pragma unroll
      for (int j = 0; j < kChannels; ++j) {
        scratch[j * kStride + slot(group, lane)] = thread_mean[j];
        scratch_m2[j * kStride + slot(group, lane)] = thread_m2[j];
      }
    __syncthreads();
    for (int c = threadIdx.x; c < t.groups * kChannels; c += kNormThreads) {
      take(c, merge(t.lanes, [&](int r) {
        const int at = c % kChannels * kStride + slot(c / kChannels, r);
        return Moments{static_cast<float>(count_of(r) * kPixels), scratch[at], scratch_m2[at]};
      }));
    }
    __syncthreads();
  }

  // y = act((x − centre)·scale + shift), coef being [3][groups·kChannels] in shared memory.
  __device__ __forceinline__ void apply(const float* coef, int activation, void* y) {
    const int width = t.groups * kChannels;
    float centre[kChannels], scale[kChannels], shift[kChannels];
#pragma unroll
    for (int j = 0; j < kChannels; ++j) {
      const int c = min(group, t.groups - 1) * kChannels + j;
      centre[j] = coef[c], scale[j] = coef[width + c], shift[j] = coef[2 * width + c];
    }
#pragma unroll
    for (int i = 0; i < PER; ++i)
      if (i < count) {
        float v[V];
        packs[i].unpack(v);
#pragma unroll
        for (int k = 0; k < V; ++k) {
          const int j = NHWC ? k : 0;
          v[k] = (v[k] - centre[j]) * scale[j] + shift[j];
        }
        activate<T>(v, activation);
        packs[i].pack(v);
        packs[i].store(static_cast<T*>(y) + start + i * step);
      }
  }
};

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
__device__ __forceinline__ const float* coefficients(const Norm& s, const Tiling& t, int64_t n) {
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
  for (int c = threadIdx.x; c < min(width, s.channels - first); c += kNormThreads) fetch_parameters(s, n, first + c, coef + c, width);
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
  for (int c = threadIdx.x; c < min(width, s.channels - first); c += kNormThreads)
    fold(s, s.group ? group_moments(s, first + c, mean, m2) : channel(first + c), across, coef + c, width);
  __syncthreads();
  return coef;
}

// vector: elements of a pack; 1 for a pool in NCHW.
cudaError_t norm_portable(const Norm& s, int64_t batch, int dtype, bool nhwc, int vector, bool pool, void* stream);
cudaError_t norm_pool(const Norm& s, int64_t batch, int dtype, bool nhwc, int vector, const Tiling& t, void* stream);
cudaError_t norm_cluster(const Norm& s, int64_t batch, int dtype, const ClusterPlan& plan, void* stream);

}  // namespace sgm::cuda
