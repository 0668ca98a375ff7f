// noise_conditioned_norm in one pass (sm_90 and later, NHWC): a thread-block cluster holds one sample, its pixels split over the
// blocks and packed in registers; the blocks exchange their moments through distributed shared memory. One read, one write.
#include "cluster.cuh"
#include "norm_coefficients.cuh"
#include "norm_tile.cuh"

namespace sgm::cuda {
namespace {

// grid (N · cluster), clusters of t.slabs
template <class T, int PER>
__global__ void __launch_bounds__(kNormThreads, PER * sizeof(T) > 32 ? 1 : PER * sizeof(T) > 16 ? 2 : 3) cluster_kernel(const Norm s, const Tiling t) {
#ifdef SGM_CLUSTERS
  constexpr int V = 16 / sizeof(T);
  Cluster cluster;
  const int64_t n = blockIdx.x / t.slabs;
  using Tile = Tile<T, V, PER, true>;
  Tile tile(s, t, n, cluster.rank(), 0);
  if (s.sum)
    tile.load_sum(s);
  else
    tile.load(s.x);

  const int channels = s.channels;
  float* warps = shared_floats();
  float* part = warps + kNormThreads / 32;  // [2][C]: mean and M2 of this block's pixels, read by the whole cluster
  float* mean = part + 2 * channels;        // [C]: of the sample
  float* coef = mean + channels;            // [3][C]
  float* m2 = coef + 3 * channels;          // [C]: of the sample, where the scratch of `moments` was
  for (int c = threadIdx.x; c < channels; c += kNormThreads) fetch_parameters(s, n, c, coef + c, channels);
  tile.moments(coef + 3 * channels, [&](int c, const Moments& m) { part[c] = m.mean, part[channels + c] = m.m2; });
  cluster.arrive();
  cluster.wait();
  for (int c = threadIdx.x; c < channels; c += kNormThreads) {
    const Moments all = merge(t.slabs, [&](int rank) {
      const float* p = cluster.peer(part, rank);
      const int pixels = max(0, min(t.tile, s.pixels - rank * t.tile));
      return Moments{static_cast<float>(pixels), p[c], p[channels + c]};
    });
    mean[c] = all.mean;
    m2[c] = all.m2;
  }
  cluster.arrive();  // done with the peers' memory; they must be done with ours before this block ends
  __syncthreads();
  Spread across{};
  if (s.alpha) across = spread(mean, channels, warps);
  for (int c = threadIdx.x; c < channels; c += kNormThreads) {
    const Moments own{static_cast<float>(s.pixels), mean[c], m2[c]};
    fold(s, s.group ? group_moments(s, c, mean, m2) : own, across, coef + c, channels);
  }
  __syncthreads();
  tile.apply(coef, s.activation, s.y);
  cluster.wait();
#endif
}

}  // namespace

cudaError_t norm_cluster(const Norm& s, int64_t batch, int dtype, const ClusterPlan& plan, void* stream) {
  return with_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    const auto kernel = plan.packs == 8 ? cluster_kernel<T, 8> : cluster_kernel<T, 16>;
    return launch(kernel, dim3(static_cast<unsigned>(batch * plan.t.slabs)), kNormThreads,
                  cluster_shared_bytes(s.channels, 16 / sizeof(T)), plan.t.slabs, stream, s, plan.t);
  });
}

}  // namespace sgm::cuda
