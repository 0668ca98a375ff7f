// langevin_update: x ← a·x + b·score + c·z (+ d·previous), every slot at its own row of the plan's table; then, where the
// row says so, previous ← e·x + f·score of the old x. A slot's gain, where there is one, scales b (twice) and c.
// Known pixels (inpainting) become known + σ·z instead, what the next row's network is to see of them.
// One read of x, one of score, one write; z is made in registers. Each product and each sum is rounded on its own
// (--fmad=false, and intrinsics in the shared headers), so the result equals every other backend's bit for bit.
#include "device.cuh"
#include "pixels.cuh"

namespace sgm::cuda {
namespace {

struct Update {
  const float* x;            // [B, C, H, W], as are the next three; each NCHW or NHWC
  const void* score;
  float* previous;           // or null
  float* out;                // x itself in place
  const float* coef;         // [R, 4]: a, b, c, d
  const int32_t* draw;       // [R]
  int64_t* row;              // [B]
  const int64_t* stop;       // [B]; null: every slot is live
  const int64_t* seed;       // [B]
  const int64_t* sample_id;  // [B]
  int64_t* bad_row;          // [B], or null
  const float* keep;         // [R, 2]: e, f; or null
  const float* gain;         // [B], or null
  const float* known;        // [B, C, H, W] in the layout of out, NaN where a pixel is not known; or null
  const float* known_sigma;  // [R]
  const int32_t* known_draw; // [R]
  int64_t channels, pixels;  // C, H·W
  bool x_nhwc, score_nhwc, previous_nhwc, out_nhwc, advance;
};

// The blocks of a slot count their arrivals in the upper bits of its row, so the last one, alone, advances it: no other
// buffer, and nothing to reset before a graph's next replay. The row itself is the lower bits.
constexpr int kArrivals = 40;

__device__ __forceinline__ int64_t current_row(const int64_t* row) {
  return *reinterpret_cast<const volatile int64_t*>(row) & ((int64_t{1} << kArrivals) - 1);
}

__device__ __forceinline__ void arrive(int64_t* row, int64_t current, unsigned blocks) {
  const auto before = atomicAdd(reinterpret_cast<unsigned long long*>(row), 1ull << kArrivals);
  if (before >> kArrivals == blocks - 1) *reinterpret_cast<volatile int64_t*>(row) = current + 1;
}

__device__ __forceinline__ bool is_known(float v) { return v == v; }

__device__ __forceinline__ int count_known(const float (&v)[4]) { return is_known(v[0]) + is_known(v[1]) + is_known(v[2]) + is_known(v[3]); }

__device__ __forceinline__ bool finite(float v) { return (to_bits(v) & 0x7f800000u) != 0x7f800000u; }

// grid (B, chunks); a thread's unit of work is a Patch: 4 pixels × C channels, or one quad of elements. kKnown: u.known is there.
template <class Patch, class Score, bool kKnown>
__global__ void __launch_bounds__(kThreads) update_kernel(const Update u) {
  const int64_t slot = blockIdx.x;
  const int64_t row = current_row(u.row + slot);
  if (u.stop && row >= u.stop[slot]) return;  // idle

  const float gain = u.gain ? u.gain[slot] : 1.0f;
  const float a = u.coef[4 * row], b = mul(mul(u.coef[4 * row + 1], gain), gain), c = mul(u.coef[4 * row + 2], gain);
  const float d = u.previous ? u.coef[4 * row + 3] : 0.0f;
  const float e = u.keep ? u.keep[2 * row] : 0.0f, f = u.keep ? u.keep[2 * row + 1] : 0.0f;
  const bool keeps = e != 0 || f != 0;
  const Draw noise = make_draw(u.seed[slot], u.sample_id[slot], static_cast<uint32_t>(u.draw[row]), kSampleStream);
  const float sigma = kKnown ? u.known_sigma[row] : 0.0f;
  const uint32_t known_draw = kKnown ? static_cast<uint32_t>(u.known_draw[row]) : 0;
  const Draw known_noise = make_draw(u.seed[slot], u.sample_id[slot], known_draw, kInpaintStream);
  const int64_t start = slot * u.channels * u.pixels;
  bool good = true;
  for (int64_t i = blockIdx.y * int64_t{kThreads} + threadIdx.x; i < Patch::count(u.channels, u.pixels); i += int64_t{kThreads} * gridDim.y) {
    const Patch patch(i, u.channels, u.pixels);
    float known[Patch::kQuads][4] = {};
    if (kKnown) {
      patch.load(u.known + start, u.out_nhwc, known);
#pragma unroll
      for (int q = 0; q < Patch::kQuads; ++q) {
        if (sigma == 0 || count_known(known[q]) == 0) continue;
        float z[4];
        normals(words(known_noise, patch.quad(q)), z);
#pragma unroll
        for (int k = 0; k < 4; ++k) known[q][k] = add(known[q][k], mul(sigma, z[k]));  // a NaN stays one
      }
    }
    float x[Patch::kQuads][4], score[Patch::kQuads][4], previous[Patch::kQuads][4] = {};
    patch.load(u.x + start, u.x_nhwc, x);
    patch.load(static_cast<const Score*>(u.score) + start, u.score_nhwc, score);
    if (d != 0) patch.load(u.previous + start, u.previous_nhwc, previous);
#pragma unroll
    for (int q = 0; q < Patch::kQuads; ++q) {
      float z[4] = {};
      if (c != 0 && !(kKnown && count_known(known[q]) == 4)) normals(words(noise, patch.quad(q)), z);
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        float t = mul(a, x[q][k]);
        t = add(t, mul(b, score[q][k]));
        if (c != 0) t = add(t, mul(c, z[k]));
        if (d != 0) t = add(t, mul(d, previous[q][k]));
        if (keeps) previous[q][k] = add(mul(e, x[q][k]), mul(f, score[q][k]));
        x[q][k] = kKnown && is_known(known[q][k]) ? known[q][k] : t;
        good &= finite(x[q][k]);
      }
    }
    patch.store(u.out + start, u.out_nhwc, x);
    if (keeps) patch.store(u.previous + start, u.previous_nhwc, previous);
  }
  if (!good && u.bad_row) atomicMin(reinterpret_cast<long long*>(u.bad_row + slot), static_cast<long long>(row));
  if (!u.advance) return;
  __syncthreads();  // every thread of the block has read the row
  if (threadIdx.x == 0) arrive(u.row + slot, row, gridDim.y);
}

}  // namespace
}  // namespace sgm::cuda

// Layouts are bits: 1 x, 2 score, 4 previous, 8 out is NHWC. Returns a cudaError_t.
SGM_API int sgm_cuda_langevin_update(const float* x, const void* score, int score_dtype, const float* coef, const int32_t* draw, int64_t* row,
                                     const int64_t* stop, const int64_t* seed, const int64_t* sample_id, int64_t* bad_row,
                                     float* previous, const float* keep, const float* gain, const float* known, const float* known_sigma,
                                     const int32_t* known_draw, float* out, int64_t batch, int64_t channels, int64_t pixels, int layouts,
                                     int advance, void* stream) {
  using namespace sgm::cuda;
  const Update u{x,       score,   previous,          out,  coef, draw, row, stop, seed, sample_id, bad_row, keep, gain,
                 known,   known_sigma, known_draw,    channels, pixels,
                 (layouts & 1) != 0, (layouts & 2) != 0, (layouts & 4) != 0, (layouts & 8) != 0, advance != 0};
  const size_t score_bytes = score_dtype == kFloat32 ? 16 : 8;
  const bool all_aligned = aligned(x, 16) && aligned(out, 16) && aligned(previous, 16) && aligned(known, 16) && aligned(score, score_bytes);
  return with_dtype(score_dtype, [&](auto zero) {
    return with_patch(channels, pixels, layouts != 0, all_aligned, [&](auto patch, int64_t patches) {
      const auto kernel = known ? update_kernel<decltype(patch), decltype(zero), true> : update_kernel<decltype(patch), decltype(zero), false>;
      return launch(kernel, dim3(static_cast<unsigned>(batch), chunks(patches)), kThreads, 0, 1, stream, u);
    });
  });
}
