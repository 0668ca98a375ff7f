// The library's entry points that belong to no single kernel: which norm runs where, and what an error code means.
#include "norm.cuh"

namespace {

using namespace sgm::cuda;

struct Device {
  int major, multiprocessors;
};

cudaError_t current_device(Device* device) {
  int index = 0;
  cudaError_t error = cudaGetDevice(&index);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&device->major, cudaDevAttrComputeCapabilityMajor, index);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&device->multiprocessors, cudaDevAttrMultiProcessorCount, index);
  return error;
}

}  // namespace

SGM_API const char* sgm_cuda_error(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

// Floats of workspace that sgm_cuda_norm may write, whatever the device.
SGM_API int64_t sgm_cuda_norm_workspace(int64_t batch, int channels, int pixels, int nhwc) {
  return batch * most_slabs(channels, pixels, nhwc != 0) * 2 * channels;
}

// variant: 0 the one-pass cluster kernel where it can run, else the portable ones; 1 portable; 2 cluster, or an error.
// bias, residual_bias: [C], added to x and residual; or null. strides: of a level's row of γ, α, β. groups: 0, or of GroupNorm.
// width: of the image. pool: y is the norm's 5×5 mean, and y is neither x nor sum; the portable kernels then, as with biases.
// Returns a cudaError_t.
SGM_API int sgm_cuda_norm(const void* x, const void* residual, void* y, void* sum, const float* bias, const float* residual_bias, int dtype,
                          int nhwc, const float* gamma, const float* alpha, const float* beta, int64_t gamma_stride, int64_t alpha_stride,
                          int64_t beta_stride, const int64_t* level, int before, int activation, float eps, int64_t batch, int channels,
                          int pixels, int width, int groups, int pool, float* workspace, int variant, void* stream) {
  const Norm plain{x,     residual,  y,        sum,    gamma, alpha,     beta, gamma_stride, alpha_stride, beta_stride,
                   level, workspace, channels, pixels, width, groups ? channels / groups : 0, eps, before, activation};
  const BiasedNorm s{plain, bias, residual_bias, sum || !(alpha || groups) ? nullptr : bias};
  const int widest = dtype == kFloat32 ? 4 : 8;
  const bool whole = (nhwc ? channels : pixels) % widest == 0 && aligned(bias, 16) && aligned(residual_bias, 16);
  const bool wide = whole && aligned(x, 16) && aligned(residual, 16) && aligned(y, 16) && aligned(sum, 16);
  if (variant != 1 && nhwc && wide && !pool && !s.lacking && !(sum && (bias || residual_bias))) {
    Device device{};
    if (const cudaError_t error = current_device(&device)) return error;
    const ClusterPlan plan = cluster_plan(batch, channels, pixels, widest, device.multiprocessors);
    if (device.major >= 9 && plan.packs) return norm_cluster(plain, batch, dtype, plan, stream);
  }
  if (variant == 2) return cudaErrorNotSupported;
  return norm_portable(s, batch, dtype, nhwc != 0, wide && (nhwc || !pool) ? widest : 1, pool != 0, stream);
}
