// The kernel under every convolution: out[row][k] = Σ_tap Σ_c in[row + tap][c] · weights[tap][c][k].
//
// A row is a pixel (direct convolution) or a tile at one Winograd point (one tap). The sum of an output runs over taps,
// then channels, in one accumulator: its bits depend on nothing else, so neither batch nor thread split can change them.
#pragma once
#include "vec.h"

namespace sgm::SGM_ISA::executor {

constexpr int kMaxVectors = kRegisters == 32 ? 4 : 2;                // output vectors a block
constexpr int kAccumulators = kRegisters == 32 ? 24 : 12;
constexpr int kMaxRows = 12;
constexpr int max_rows(int vectors) { return kAccumulators / vectors < kMaxRows ? kAccumulators / vectors : kMaxRows; }

constexpr int kLeastRows = max_rows(kMaxVectors);  // what every number of vectors holds, once or more

// Called at each channel of a tap for the same channel of the next one: with few rows a network waits for its weights.
template <int kBytes>
SGM_INLINE void prefetch(const void* p) {
  SGM_UNROLL for (int i = 0; i < kBytes; i += 64) __builtin_prefetch((const char*)p + i, 0, 2);
}

// One channel step of kRows × kVectors accumulators.
template <int kRows, int kVectors>
SGM_INLINE void accumulate(Vec (&sum)[kRows][kVectors], const float* const (&in)[kRows], const float* weights, int channels) {
  for (int c = 0; c < channels; c++, weights += kVectors * kWidth) {
    Vec w[kVectors];
    SGM_UNROLL for (int j = 0; j < kVectors; j++) w[j] = load(weights + j * kWidth);
    prefetch<kVectors * kWidth * 4>(weights + (int64_t)channels * kVectors * kWidth);
    SGM_UNROLL for (int i = 0; i < kRows; i++) {
      const float value = in[i][c];
      SGM_UNROLL for (int j = 0; j < kVectors; j++) sum[i][j] += w[j] * value;
    }
  }
}

// As above for pairs of bfloat16: first the second channel of each pair, then the first, every sum rounded to float32. That is
// the order of vdpbf16ps. A product is exact in float32, so all instruction sets give the same bits, but for denormals: only
// vdpbf16ps takes and makes zeros in their place.
#ifdef __AVX512BF16__
template <int kRows, int kVectors>
SGM_INLINE void accumulate(Vec (&sum)[kRows][kVectors], const uint16_t* const (&in)[kRows], const uint16_t* weights,
                           int channels) {
  for (int c = 0; c < channels; c += 2, weights += 2 * kVectors * kWidth) {
    __m512bh w[kVectors];
    SGM_UNROLL for (int j = 0; j < kVectors; j++) w[j] = (__m512bh)_mm512_loadu_si512(weights + j * 2 * kWidth);
    prefetch<kVectors * kWidth * 4>(weights + (int64_t)channels * kVectors * kWidth);
    SGM_UNROLL for (int i = 0; i < kRows; i++) {
      int32_t pair;
      memcpy(&pair, in[i] + c, 4);
      const __m512bh value = (__m512bh)_mm512_set1_epi32(pair);
      SGM_UNROLL for (int j = 0; j < kVectors; j++) sum[i][j] = _mm512_dpbf16_ps(sum[i][j], w[j], value);
    }
  }
}
#else
SGM_INLINE Vec expand(const uint16_t* pairs, bool second) {
  BitsVec bits;
  memcpy(&bits, pairs, sizeof bits);
  return (Vec)(second ? bits & 0xffff0000u : bits << 16);
}

template <int kRows, int kVectors>
SGM_INLINE void accumulate(Vec (&sum)[kRows][kVectors], const float* const (&in)[kRows], const uint16_t* weights, int channels) {
  for (int c = 0; c < channels; c += 2, weights += 2 * kVectors * kWidth) {
    prefetch<kVectors * kWidth * 4>(weights + (int64_t)channels * kVectors * kWidth);
    SGM_UNROLL for (int second = 1; second >= 0; second--) {
      Vec w[kVectors];
      SGM_UNROLL for (int j = 0; j < kVectors; j++) w[j] = expand(weights + j * 2 * kWidth, second);
      SGM_UNROLL for (int i = 0; i < kRows; i++) {
        const float value = in[i][c + second];
        SGM_UNROLL for (int j = 0; j < kVectors; j++) sum[i][j] += w[j] * value;
      }
    }
  }
}
#endif

// in + rows[i] is row i; tap t reads tap_offset[t] further on, with the weights of tap tap_index[t].
template <class Element>
using KernelFunction = void (*)(const typename Element::Type* in, const int64_t* rows, int taps, const int64_t* tap_offset,
                                const int* tap_index, const typename Element::Weight* weights, int channels, float* out);

template <class Element, int kRows, int kVectors>
static void kernel(const typename Element::Type* in, const int64_t* rows, int taps, const int64_t* tap_offset,
                   const int* tap_index, const typename Element::Weight* weights, int channels, float* out) {
  Vec sum[kRows][kVectors];
  SGM_UNROLL for (int i = 0; i < kRows; i++) SGM_UNROLL for (int j = 0; j < kVectors; j++) sum[i][j] = Vec{};
  for (int t = 0; t < taps; t++) {
    const typename Element::Type* row[kRows];
    SGM_UNROLL for (int i = 0; i < kRows; i++) row[i] = in + tap_offset[t] + rows[i];
    accumulate<kRows, kVectors>(sum, row, weights + (int64_t)tap_index[t] * channels * kVectors * kWidth, channels);
  }
  SGM_UNROLL for (int i = 0; i < kRows; i++) SGM_UNROLL for (int j = 0; j < kVectors; j++)
      store(out + (i * kVectors + j) * kWidth, sum[i][j]);
}

// The kernel for `rows` rows of `vectors` output vectors; null where the registers do not hold them.
template <class E>
static KernelFunction<E> kernel_function(int vectors, int rows) {
#define SGM_ROWS(V) \
  nullptr, kernel<E, 1, V>, kernel<E, 2, V>, kernel<E, 3, V>, kernel<E, 4, V>, kernel<E, 5, V>, kernel<E, 6, V>
#define SGM_MORE_ROWS(V) \
  SGM_ROWS(V), kernel<E, 7, V>, kernel<E, 8, V>, kernel<E, 9, V>, kernel<E, 10, V>, kernel<E, 11, V>, kernel<E, 12, V>
  static constexpr KernelFunction<E> one[] = {SGM_MORE_ROWS(1)};
#if defined(__AVX512F__) || defined(__aarch64__)
  static constexpr KernelFunction<E> two[] = {SGM_MORE_ROWS(2)};
  static constexpr KernelFunction<E> four[] = {SGM_ROWS(4)};
  return vectors == 1 ? one[rows] : vectors == 2 ? two[rows] : four[rows];
#else
  static constexpr KernelFunction<E> two[] = {SGM_ROWS(2)};
  return vectors == 1 ? one[rows] : two[rows];
#endif
#undef SGM_ROWS
#undef SGM_MORE_ROWS
}

}  // namespace sgm::SGM_ISA::executor
