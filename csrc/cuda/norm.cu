// noise_conditioned_norm in two kernels, for every target, layout, shape and alignment: `stats` reads the tensor once and writes
// the moments of each slab of pixels; `apply` merges them, redoes the small reduction across the channels, and reads once more
// (norm_pool.cu does that for a norm and its 5×5 mean).
#include "norm_coefficients.cuh"
#include "norm_tile.cuh"

namespace sgm::cuda {
namespace {

// grid (N · slabs, channel blocks)
template <class T, int V, bool NHWC>
__global__ void __launch_bounds__(kNormThreads, 2) stats_kernel(const BiasedNorm s, const Tiling t) {
  using Tile = Tile<T, V, kPortablePacks, NHWC>;
  const int64_t n = blockIdx.x / t.slabs;
  const int slab = static_cast<int>(blockIdx.x % t.slabs);
  const int width = t.groups * Tile::kChannels, first = static_cast<int>(blockIdx.y) * width;
  float* mean = shared_floats() + Tile::kScratch;  // [width], of the slab so far
  float* m2 = mean + width;                        // [width]
  const int packs = slab_packs(t, slab, s.pixels / Tile::kPixels);
  for (int k = 0; k * t.tile < packs; ++k) {
    Tile tile(s, t, n, slab * t.tiles + k, blockIdx.y);
    if (s.sum)
      tile.load_sum(s);
    else
      tile.load(s.x);
    tile.moments(shared_floats(), [&](int c, const Moments& m) {
      Moments all = m;
      if (k) {
        const Moments before{static_cast<float>(k * t.tile * Tile::kPixels), mean[c], m2[c]};
        all = merge(2, [&](int i) { return i ? m : before; });
      }
      mean[c] = all.mean, m2[c] = all.m2;
    });
  }
  float* moments = s.moments + blockIdx.x * int64_t{2} * s.channels + first;
  for (int c = threadIdx.x; c < min(width, s.channels - first); c += kNormThreads) {
    moments[c] = mean[c] + s.lacks(first + c);
    moments[s.channels + c] = m2[c];
  }
}

// grid (N · slabs, channel blocks)
template <class T, int V, bool NHWC>
__global__ void __launch_bounds__(kNormThreads, 2) apply_kernel(const BiasedNorm s, const Tiling t) {
  using Tile = Tile<T, V, kPortablePacks, NHWC>;
  const int64_t n = blockIdx.x / t.slabs;
  const int slab = static_cast<int>(blockIdx.x % t.slabs), packs = s.pixels / Tile::kPixels;
  const void* x = s.sum ? s.sum : s.x;
  Tile tile(s, t, n, slab * t.tiles, blockIdx.y);
  tile.load(x);  // on its way while the moments are merged
  const float* coef = coefficients<Tile::kChannels, Tile::kPixels>(s, t, n);
  tile.apply(coef, s.activation, s.y);
  for (int k = 1; k * t.tile < slab_packs(t, slab, packs); ++k) {
    Tile next(s, t, n, slab * t.tiles + k, blockIdx.y);
    next.load(x);
    next.apply(coef, s.activation, s.y);
  }
}

template <class T, int V, bool NHWC>
cudaError_t launch_both(const BiasedNorm& s, int64_t batch, int dtype, bool pool, void* stream) {
  using Tile = Tile<T, V, kPortablePacks, NHWC>;
  const Tiling t = portable_tiling(s.channels, s.pixels, V, NHWC);
  const int width = t.groups * Tile::kChannels;
  const size_t stats_bytes = sizeof(float) * (Tile::kScratch + 2 * width), apply_bytes = coefficient_bytes(s, width);
  if (apply_bytes > kMaxSharedBytes) return cudaErrorInvalidValue;
  const dim3 grid(static_cast<unsigned>(batch * t.slabs), t.channel_blocks);
  const cudaError_t error = launch(stats_kernel<T, V, NHWC>, grid, kNormThreads, stats_bytes, 1, stream, s, t);
  if (error != cudaSuccess) return error;
  if (pool) return norm_pool(s, batch, dtype, NHWC, V, t, stream);
  return launch(apply_kernel<T, V, NHWC>, grid, kNormThreads, apply_bytes, 1, stream, s, t);
}

}  // namespace

cudaError_t norm_portable(const BiasedNorm& s, int64_t batch, int dtype, bool nhwc, int vector, bool pool, void* stream) {
  return with_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    constexpr int V = 16 / sizeof(T);
    if (vector > 1) return nhwc ? launch_both<T, V, true>(s, batch, dtype, pool, stream) : launch_both<T, V, false>(s, batch, dtype, pool, stream);
    return nhwc ? launch_both<T, 1, true>(s, batch, dtype, pool, stream) : launch_both<T, 1, false>(s, batch, dtype, pool, stream);
  });
}

}  // namespace sgm::cuda
