// A block's tile: channels × pixels of one sample, packed in registers.
#pragma once

#include <type_traits>

#include "moments.cuh"

namespace sgm::cuda {

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

  // v += b at the channels of a pack, b [C]; read from a cache for each pack: beside those no registers are left for it.
  __device__ __forceinline__ void add(const float* b, float (&v)[V]) const {
    constexpr int kWide = kChannels % 4 == 0 ? 4 : 1;
    b += (blockIdx.y * t.groups + group) * kChannels;
#pragma unroll
    for (int j = 0; j < kChannels; j += kWide) {
      Pack<float, kWide> pack;
      float w[kWide];
      pack.load(b + j);
      pack.unpack(w);
#pragma unroll
      for (int k = 0; k < (NHWC ? kWide : V); ++k) v[j + k] += w[NHWC ? k : 0];
    }
  }

  // before(x + residual), with their biases if it has any, each of the two rounded to T, kept, and written to `sum`. Some packs of the
  // residual are fetched at a time: `sum` may be the residual, so that no load moves above a store by itself.
  template <class AnyNorm>
  __device__ __forceinline__ void load_sum(const AnyNorm& s) {
    constexpr bool kBiased = std::is_same_v<AnyNorm, BiasedNorm>;
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
            if constexpr (kBiased) {
              if (s.bias) add(s.bias, v);
              if (s.residual_bias) add(s.residual_bias, v);
            }
            pack.pack(v);
          } else if constexpr (kBiased) {
            if (s.bias) {
              pack.unpack(v);
              add(s.bias, v);
              pack.pack(v);
            }
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

}  // namespace sgm::cuda
