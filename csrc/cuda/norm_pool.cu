// The 5×5 mean of noise_conditioned_norm, stride 1, padding counted as zeros: norm.cu's `apply` for chained residual pooling.
//
//   pool((s − μ)·A + B) = A/25 · Σ (s − μ) + B·n/25,   Σ and n over the taps that lie inside the image
//
// The norm itself is never written; the caches serve the 25 reads of s. The mean is taken off first, so a large one costs no digits.
#include "norm.cuh"

namespace sgm::cuda {
namespace {

// grid (N · slabs, channel blocks); a thread takes one pack of V channels (NHWC) or one channel, of every t.lanes-th pixel.
template <class T, int V, bool NHWC>
__global__ void __launch_bounds__(kNormThreads, 2) pool_kernel(const Norm s, const Tiling t) {
  static_assert(NHWC || V == 1);
  const int64_t n = blockIdx.x / t.slabs;
  const int slab = static_cast<int>(blockIdx.x % t.slabs), thread = static_cast<int>(threadIdx.x);
  const float* coef = coefficients<V, 1>(s, t, n);  // [3][width]
  const int group = NHWC ? thread % t.groups : thread / t.lanes, lane = NHWC ? thread / t.groups : thread % t.lanes;
  const int width = t.groups * V, channel = (static_cast<int>(blockIdx.y) * t.groups + group) * V;
  if (group >= t.groups || lane >= t.lanes || channel >= s.channels) return;
  float centre[V], scale[V], shift[V];
#pragma unroll
  for (int k = 0; k < V; ++k) {
    const int c = group * V + k;
    centre[k] = coef[c], scale[k] = coef[width + c] * 0.04f, shift[k] = coef[2 * width + c] * 0.04f;
  }
  const int height = s.pixels / s.width, first = slab * t.tile * t.tiles, last = min(first + t.tile * t.tiles, s.pixels);
  const int stride = NHWC ? s.channels : 1;
  const int64_t start = n * s.channels * s.pixels + (NHWC ? channel : int64_t{channel} * s.pixels);
  const T* x = static_cast<const T*>(s.sum ? s.sum : s.x) + start;
  T* y = static_cast<T*>(s.y) + start;
  for (int pixel = first + lane; pixel < last; pixel += t.lanes) {
    const int row = pixel / s.width, column = pixel % s.width;
    float total[V] = {};
    int taps = 0;
    for (int r = max(row - 2, 0); r <= min(row + 2, height - 1); ++r)
      for (int c = max(column - 2, 0); c <= min(column + 2, s.width - 1); ++c, ++taps) {
        Pack<T, V> pack;
        pack.load(x + int64_t{r * s.width + c} * stride);
        float v[V];
        pack.unpack(v);
#pragma unroll
        for (int k = 0; k < V; ++k) total[k] += v[k] - centre[k];
      }
#pragma unroll
    for (int k = 0; k < V; ++k) total[k] = total[k] * scale[k] + shift[k] * static_cast<float>(taps);
    Pack<T, V> pack;
    pack.pack(total);
    pack.store(y + int64_t{pixel} * stride);
  }
}

template <class T, int V, bool NHWC>
cudaError_t launch_pool(const Norm& s, const Tiling& t, int64_t batch, void* stream) {
  const dim3 grid(static_cast<unsigned>(batch * t.slabs), t.channel_blocks);
  return launch(pool_kernel<T, V, NHWC>, grid, kNormThreads, coefficient_bytes(s, t.groups * V), 1, stream, s, t);
}

}  // namespace

// The tiling is that of `stats`, by single pixels.
cudaError_t norm_pool(const Norm& s, int64_t batch, int dtype, bool nhwc, int vector, const Tiling& t, void* stream) {
  return with_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    if (!nhwc) return launch_pool<T, 1, false>(s, t, batch, stream);
    return vector > 1 ? launch_pool<T, 16 / sizeof(T), true>(s, t, batch, stream) : launch_pool<T, 1, true>(s, t, batch, stream);
  });
}

}  // namespace sgm::cuda
