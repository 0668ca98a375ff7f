// The 5×5 mean of noise_conditioned_norm, stride 1, padding counted as zeros: norm.cu's `apply` for chained residual pooling.
//
//   pool((s − μ)·A + B) = A/25 · Σ (s − μ) + B·n/25,   Σ and n over the taps that lie inside the image
//
// The norm itself is never written. The sums of columns are shared by the five pixels that they belong to; the caches serve the
// reads of s, some eight a pixel. In float32 the mean is taken off first, so a large one costs no digits.
#include "norm_coefficients.cuh"

namespace sgm::cuda {
namespace {

constexpr int kSide = 5, kReach = kSide / 2;
constexpr int kRun = 6;  // pixels of a row that a thread makes, from the sums of kRun + 4 columns of 5
static_assert((kRun + kSide - 1) % kSide == 0);

// grid (N · slabs, channel blocks); a thread takes one pack of V channels (NHWC) or one channel, of every t.lanes-th run of its slab.
template <class T, int V, bool NHWC>
__global__ void __launch_bounds__(kNormThreads, 2) pool_kernel(const BiasedNorm s, const Tiling t) {
  static_assert(NHWC || V == 1);
  constexpr bool kExact = sizeof(T) == 4;  // 16-bit values have no digits to lose in a float32 sum: the mean is taken off after it
  const int64_t n = blockIdx.x / t.slabs;
  const int slab = static_cast<int>(blockIdx.x % t.slabs), thread = static_cast<int>(threadIdx.x);
  const float* coef = coefficients<V, 1>(s, t, n);  // [3][width]
  const int group = NHWC ? thread % t.groups : thread / t.lanes, lane = NHWC ? thread / t.groups : thread % t.lanes;
  const int width = t.groups * V, channel = (static_cast<int>(blockIdx.y) * t.groups + group) * V;
  if (group >= t.groups || lane >= t.lanes || channel >= s.channels) return;
  coef += group * V;  // read where it is needed: registers hold the sums and what is on its way
  const int height = s.pixels / s.width, runs = (s.width + kRun - 1) / kRun;
  const int share = (height * runs + t.slabs - 1) / t.slabs;
  const int stride = NHWC ? s.channels : 1;
  const int64_t start = n * s.channels * s.pixels + (NHWC ? channel : int64_t{channel} * s.pixels);
  const T* x = static_cast<const T*>(s.sum ? s.sum : s.x) + start;
  T* y = static_cast<T*>(s.y) + start;
  for (int run = slab * share + lane; run < min((slab + 1) * share, height * runs); run += t.lanes) {
    const int row = run / runs, begin = run % runs * kRun, end = min(begin + kRun, s.width);
    const int rows = min(row + kReach, height - 1) - max(row - kReach, 0) + 1;
    float sums[kSide][V] = {};  // of the last five columns
#pragma unroll 1
    for (int turn = 0; turn < kRun + kSide - 1; turn += kSide)
#pragma unroll
      for (int i = 0; i < kSide; ++i) {
        const int right = begin + turn + i - kReach, column = right - kReach;  // the column that joins, the pixel that it completes
        const bool inside = right >= 0 && right < s.width;
        const T* middle = x + int64_t{row * s.width + right} * stride;
        Pack<T, V> packs[kSide] = {};  // zeros where there is no pixel
#pragma unroll
        for (int j = 0; j < kSide; ++j)
          if (inside && row + j >= kReach && row + j - kReach < height) packs[j].load(middle + (j - kReach) * s.width * stride);
#pragma unroll
        for (int k = 0; k < V; ++k) sums[i][k] = 0;
#pragma unroll
        for (int j = 0; j < kSide; ++j) {
          float v[V];
          packs[j].unpack(v);
          const bool off = kExact && inside && row + j >= kReach && row + j - kReach < height;
#pragma unroll
          for (int k = 0; k < V; ++k) sums[i][k] += off ? v[k] - coef[k] : v[k];
        }
        if (column < begin || column >= end) continue;
        const float taps = static_cast<float>(rows * (min(right, s.width - 1) - max(column - kReach, 0) + 1));
        float total[V];
#pragma unroll
        for (int k = 0; k < V; ++k) {
          total[k] = sums[0][k] + sums[1][k] + sums[2][k] + sums[3][k] + sums[4][k];
          if (!kExact) total[k] -= coef[k] * taps;
          total[k] = (total[k] * coef[width + k] + coef[2 * width + k] * taps) * (1.0f / (kSide * kSide));
        }
        Pack<T, V> pack;
        pack.pack(total);
        pack.store(y + int64_t{row * s.width + column} * stride);
      }
  }
}

template <class T, int V, bool NHWC>
cudaError_t launch_pool(const BiasedNorm& s, const Tiling& t, int64_t batch, void* stream) {
  const dim3 grid(static_cast<unsigned>(batch * t.slabs), t.channel_blocks);
  return launch(pool_kernel<T, V, NHWC>, grid, kNormThreads, coefficient_bytes(s, t.groups * V), 1, stream, s, t);
}

}  // namespace

// The tiling is that of `stats`, whose moments are read; each of its slabs takes as many runs.
cudaError_t norm_pool(const BiasedNorm& s, int64_t batch, int dtype, bool nhwc, int vector, const Tiling& t, void* stream) {
  return with_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    if (!nhwc) return launch_pool<T, 1, false>(s, t, batch, stream);
    return vector > 1 ? launch_pool<T, 16 / sizeof(T), true>(s, t, batch, stream) : launch_pool<T, 1, true>(s, t, batch, stream);
  });
}

}  // namespace sgm::cuda
