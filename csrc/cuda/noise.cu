// noise_fill: the generator of docs/noise.md, written to memory.
#include "device.cuh"
#include "pixels.cuh"

namespace sgm::cuda {
namespace {

struct Fill {
  float* out;                // [B, C, H, W], NCHW or NHWC
  const int64_t* seed;       // [B]
  const int64_t* sample_id;  // [B]
  uint32_t draw, stream_tag;
  int64_t channels, pixels;  // C, H·W
  bool nhwc, normal;
};

// grid (B, chunks)
template <class Patch>
__global__ void __launch_bounds__(kThreads) fill_kernel(const Fill f) {
  const int64_t slot = blockIdx.x;
  const Draw draw = make_draw(f.seed[slot], f.sample_id[slot], f.draw, f.stream_tag);
  const int64_t step = int64_t{kThreads} * gridDim.y;
  for (int64_t i = blockIdx.y * int64_t{kThreads} + threadIdx.x; i < Patch::count(f.channels, f.pixels); i += step) {
    const Patch patch(i, f.channels, f.pixels);
    float v[Patch::kQuads][4];
#pragma unroll
    for (int q = 0; q < Patch::kQuads; ++q) {
      const Words w = words(draw, patch.quad(q));
      if (f.normal) {
        normals(w, v[q]);
      } else {
        v[q][0] = uniform(w.w0), v[q][1] = uniform(w.w1), v[q][2] = uniform(w.w2), v[q][3] = uniform(w.w3);
      }
    }
    patch.store(f.out + slot * f.channels * f.pixels, f.nhwc, v);
  }
}

}  // namespace
}  // namespace sgm::cuda

// Returns a cudaError_t.
SGM_API int sgm_cuda_noise_fill(float* out, const int64_t* seed, const int64_t* sample_id, int64_t batch, int64_t channels, int64_t pixels,
                                int nhwc, uint32_t draw, uint32_t stream_tag, int normal, void* stream) {
  using namespace sgm::cuda;
  const Fill f{out, seed, sample_id, draw, stream_tag, channels, pixels, nhwc != 0, normal != 0};
  return with_patch(channels, pixels, f.nhwc, aligned(out, 16), [&](auto patch, int64_t patches) {
    return launch(fill_kernel<decltype(patch)>, dim3(static_cast<unsigned>(batch), chunks(patches)), kThreads, 0, 1, stream, f);
  });
}
