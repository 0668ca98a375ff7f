// Vectors of 4, 8 or 16 floats through GCC vector extensions: the same source is SSE2, AVX2, AVX-512 and NEON code.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstring>
#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

#include "program.h"

#define SGM_INLINE static inline __attribute__((always_inline))
#define SGM_UNROLL _Pragma("GCC unroll 24")

namespace sgm::SGM_ISA::executor {

using namespace ::sgm::executor;

#if defined(__AVX512F__)
constexpr int kWidth = 16;
#elif defined(__AVX__)
constexpr int kWidth = 8;
#else
constexpr int kWidth = 4;
#endif
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kRegisters = 32;
#else
constexpr int kRegisters = 16;
#endif

typedef float Vec __attribute__((vector_size(kWidth * 4)));
typedef int32_t IntVec __attribute__((vector_size(kWidth * 4)));
typedef uint32_t BitsVec __attribute__((vector_size(kWidth * 4)));
typedef float UnalignedVec __attribute__((vector_size(kWidth * 4), aligned(4), may_alias));

SGM_INLINE Vec load(const float* p) { return *(const UnalignedVec*)p; }
SGM_INLINE void store(float* p, Vec v) { *(UnalignedVec*)p = v; }
SGM_INLINE Vec splat(float v) { return v - Vec{}; }  // v − 0 is v, also for −0

SGM_INLINE int least(int a, int b) { return a < b ? a : b; }
SGM_INLINE int most(int a, int b) { return a > b ? a : b; }

SGM_INLINE float horizontal_sum(Vec v) {
  float s[kWidth];
  store(s, v);
  SGM_UNROLL for (int half = kWidth / 2; half; half /= 2)
    SGM_UNROLL for (int i = 0; i < half; i++) s[i] += s[i + half];
  return s[0];
}

SGM_INLINE float horizontal_max(Vec v) {
  float s[kWidth];
  store(s, v);
  SGM_UNROLL for (int half = kWidth / 2; half; half /= 2)
    SGM_UNROLL for (int i = 0; i < half; i++) s[i] = s[i + half] > s[i] ? s[i + half] : s[i];
  return s[0];
}

// e^x for x in [-87, 88] (Cephes expf; the exponent is added to the bits of the float). NaN gives a finite value.
SGM_INLINE Vec exp_bounded(Vec x) {
  const Vec rounded = x * 1.44269504f + 12582912.f;  // 1.5·2²³: the integer lies in the low bits
  const Vec n = rounded - 12582912.f;
  Vec r = x - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  Vec p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + (r + 1.f);
  const IntVec power = ((IntVec)rounded - 0x4b400000 + 127) << 23;
  return p * (Vec)power;
}

// Element types of a convolution: Type of its input, Weight of its weights. Bf16 rounds both to nearest even, NaN staying NaN.
// Its weights lie in pairs of channels; without an instruction for pairs they are expanded in registers, and the rounded input
// is kept as float32: weights stream from memory, the input lies in a cache.
struct Float {
  using Type = float;
  using Weight = float;
  SGM_INLINE void put(float* p, Vec v) { store(p, v); }
};
struct Bf16 {
  using Weight = uint16_t;
#ifdef __AVX512BF16__
  using Type = uint16_t;
  SGM_INLINE void put(uint16_t* p, Vec v) { _mm256_storeu_si256((__m256i*)p, (__m256i)_mm512_cvtneps_pbh((__m512)v)); }
#else
  using Type = float;
  SGM_INLINE void put(float* p, Vec v) {
    const BitsVec bits = (BitsVec)v, rounded = bits + 0x7fffu + (bits >> 16 & 1u);
    store(p, (Vec)((v == v ? rounded : bits | 0x400000u) & 0xffff0000u));
  }
#endif
};

// Running sum and Σ(x − mean)² of a channel vector. Sums are of x − pivot, the pivot being the mean of the image's first
// block, with what each addition lost (Kahan 1965): neither |mean| ≫ std nor a long sum costs digits of the mean. Blocks are
// centred on their own mean, then merged (Chan, Golub & LeVeque 1983).
struct Moments {
  Vec pivot, sum, lost, squares;
  SGM_INLINE Moments start(Vec pivot) { return {pivot, Vec{}, Vec{}, Vec{}}; }
  SGM_INLINE Moments read(const float* p, int padded) {
    return {load(p), load(p + padded), load(p + 2 * padded), load(p + 3 * padded)};
  }
  inline __attribute__((always_inline)) void write(float* p, int padded) const {
    store(p, pivot), store(p + padded, sum), store(p + 2 * padded, lost), store(p + 3 * padded, squares);
  }
  // block_sum: of x − pivot; block_squares: about the block's mean
  inline __attribute__((always_inline)) void merge(Vec block_sum, Vec block_squares, int before, int count) {
    const float share = before ? 1.f / (float)before : 0.f;
    const Vec delta = block_sum * (1.f / (float)count) - sum * share;
    squares += block_squares + delta * delta * ((float)before * (float)count / (float)(before + count));
    const Vec term = block_sum + lost, total = sum + term;
    lost = term - (total - sum);
    sum = total;
  }
  // count values at p, stride floats apart
  inline __attribute__((always_inline)) void add(const float* p, int64_t stride, int before, int count) {
    const float share = 1.f / (float)count;
    if (before == 0) {
      const Vec first = load(p);
      Vec rest = Vec{};
      for (int i = 1; i < count; i++) rest += load(p + i * stride) - first;
      *this = start(first + rest * share);
    }
    Vec block_sum = Vec{}, block_squares = Vec{};
    for (int i = 0; i < count; i++) block_sum += load(p + i * stride) - pivot;
    const Vec block_mean = block_sum * share;
    for (int i = 0; i < count; i++) {
      const Vec d = (load(p + i * stride) - pivot) - block_mean;
      block_squares += d * d;
    }
    merge(block_sum, block_squares, before, count);
  }
};
// What every layer function receives.
struct Run {
  const Program& program;
  const Workspace& workspace;
  const Member& member;
  const Batch& batch;
  const int images;

  const Tensor& tensor(int id) const { return program.tensors[id]; }
  float* data(int id, int image) const {
    const Tensor& t = tensor(id);
    return workspace.arena + t.offset * workspace.capacity + (int64_t)image * t.padded * t.height * t.width;
  }
  float* moments(int id, int image) const {
    const Tensor& t = tensor(id);
    return t.moments < 0 ? nullptr : workspace.moments + t.moments * workspace.capacity + (int64_t)image * kMomentRows * t.padded;
  }
  int64_t bias_row(const Conv& conv, int image) const { return conv.bias_row ? batch.level[image] * conv.bias_row : 0; }
  // this member's share [first, last) of n units
  void share(int n, int& first, int& last) const {
    first = (int)((int64_t)n * member.rank / member.size);
    last = (int)((int64_t)n * (member.rank + 1) / member.size);
  }
  void wait() const {
    if (member.size > 1) ::sgm::executor::wait(member.barrier);
  }
};

}  // namespace sgm::SGM_ISA::executor
