// How the threads of the noise and update kernels share out one sample [C, H, W]. Noise is drawn by quads of elements in
// [C, H, W] order, whatever the layout, so a thread's patch is a whole number of quads, and its accesses are as wide as that allows.
#pragma once

#include "../noise.h"
#include "device.cuh"

namespace sgm::cuda {

constexpr int kThreads = 256;  // of a block of the noise and update kernels

__device__ __forceinline__ void normals(const Words& w, float (&z)[4]) {
  normal2(w.w0, w.w1, z[0], z[1]);
  normal2(w.w2, w.w3, z[2], z[3]);
}

// 4 consecutive pixels × C channels: C quads; NCHW: one access per channel; NHWC: 4·C consecutive elements, C accesses.
// C = 1 also serves any [C, H, W] whose tensors are all NCHW, seen as one plane.
template <int C>
struct PixelPatch {
  static constexpr int kQuads = C;
  int64_t first, pixels;

  static __host__ __device__ int64_t count(int64_t channels, int64_t pixels) { return (C == 1 ? channels * pixels : pixels) / 4; }
  __host__ __device__ PixelPatch(int64_t i, int64_t, int64_t pixels) : first(4 * i), pixels(pixels) {}
  __device__ uint32_t quad(int q) const { return static_cast<uint32_t>((q * pixels + first) / 4); }

  template <class T>
  __device__ void load(const T* p, bool nhwc, float (&v)[C][4]) const {
    if (nhwc) {
#pragma unroll
      for (int j = 0; j < C; ++j) {
        float four[4];
        Pack<T, 4> pack;
        pack.load(p + first * C + 4 * j);
        pack.unpack(four);
#pragma unroll
        for (int k = 0; k < 4; ++k) v[(4 * j + k) % C][(4 * j + k) / C] = four[k];
      }
    } else {
#pragma unroll
      for (int c = 0; c < C; ++c) {
        Pack<T, 4> pack;
        pack.load(p + c * pixels + first);
        pack.unpack(v[c]);
      }
    }
  }

  __device__ void store(float* p, bool nhwc, const float (&v)[C][4]) const {
#pragma unroll
    for (int j = 0; j < C; ++j) {
      float four[4];
#pragma unroll
      for (int k = 0; k < 4; ++k) four[k] = nhwc ? v[(4 * j + k) % C][(4 * j + k) / C] : v[j][k];
      Pack<float, 4> pack;
      pack.pack(four);
      pack.store(p + (nhwc ? first * C + 4 * j : j * pixels + first));
    }
  }
};

// One quad of any shape, layout and alignment, element by element; the last quad may be short.
struct ElementPatch {
  static constexpr int kQuads = 1;
  int64_t first, channels, pixels;

  static __host__ __device__ int64_t count(int64_t channels, int64_t pixels) { return (channels * pixels + 3) / 4; }
  __host__ __device__ ElementPatch(int64_t i, int64_t channels, int64_t pixels) : first(4 * i), channels(channels), pixels(pixels) {}
  __device__ uint32_t quad(int) const { return static_cast<uint32_t>(first / 4); }
  __device__ bool inside(int k) const { return first + k < channels * pixels; }
  __device__ int64_t offset(int k, bool nhwc) const {
    const int64_t element = first + k;
    return nhwc ? element % pixels * channels + element / pixels : element;
  }

  template <class T>
  __device__ void load(const T* p, bool nhwc, float (&v)[1][4]) const {
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      float one[1] = {};
      Pack<T, 1> pack;
      if (inside(k)) {
        pack.load(p + offset(k, nhwc));
        pack.unpack(one);
      }
      v[0][k] = one[0];
    }
  }

  __device__ void store(float* p, bool nhwc, const float (&v)[1][4]) const {
#pragma unroll
    for (int k = 0; k < 4; ++k)
      if (inside(k)) p[offset(k, nhwc)] = v[0][k];
  }
};

// Calls f with (an object of) the widest patch type that a set of tensors allows, and with the number of patches in a sample.
template <class F>
cudaError_t with_patch(int64_t channels, int64_t pixels, bool any_nhwc, bool all_aligned, F f) {
  const auto call = [&](auto patch) { return f(patch, decltype(patch)::count(channels, pixels)); };
  if (all_aligned && !any_nhwc && channels * pixels % 4 == 0) return call(PixelPatch<1>(0, channels, pixels));
  if (all_aligned && channels == 3 && pixels % 4 == 0) return call(PixelPatch<3>(0, channels, pixels));
  return call(ElementPatch(0, channels, pixels));
}

// grid.y for one sample; what lies beyond it is reached by striding.
inline unsigned chunks(int64_t patches) {
  const int64_t blocks = (patches + kThreads - 1) / kThreads;
  return static_cast<unsigned>(blocks < 1 ? 1 : blocks > 65535 ? 65535 : blocks);
}

}  // namespace sgm::cuda
