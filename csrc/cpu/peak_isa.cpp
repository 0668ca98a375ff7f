#include "cpu/peak.h"

#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

namespace sgm::SGM_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kWidth = 16, kChains = 24;
#elif defined(__AVX__)
constexpr int kWidth = 8, kChains = 12;
#else
constexpr int kWidth = 4, kChains = 12;
#endif
typedef float Vec __attribute__((vector_size(kWidth * 4)));

// Keeps a register's value alive and unknown, at no cost.
template <class T>
inline __attribute__((always_inline)) void opaque(T& v) {
#if defined(__AVX512F__)
  asm volatile("" : "+v"(v));
#elif defined(__x86_64__)
  asm volatile("" : "+x"(v));
#elif defined(__aarch64__)
  asm volatile("" : "+w"(v));
#else
  asm volatile("" : "+m"(v));
#endif
}

}  // namespace

int64_t multiply_adds(bool bf16, int64_t rounds) {
  Vec sum[kChains] = {};
#ifdef __AVX512BF16__
  if (bf16) {
    const __m512i a = _mm512_set1_epi32(0x3f003f00);
    const __m512bh b = (__m512bh)a;
    for (int64_t i = 0; i < rounds; i++) {
#pragma GCC unroll 24
      for (int j = 0; j < kChains; j++) {
        sum[j] = (Vec)_mm512_dpbf16_ps((__m512)sum[j], (__m512bh)a, b);
        opaque(sum[j]);
      }
    }
    return rounds * kChains * kWidth * 4;
  }
#else
  (void)bf16;
#endif
  Vec a = Vec{} + 0.5f, b = a;
  for (int64_t i = 0; i < rounds; i++) {
#pragma GCC unroll 24
    for (int j = 0; j < kChains; j++) {
      opaque(a);  // a product of its own for each sum
      sum[j] += a * b;
      opaque(sum[j]);
    }
  }
  return rounds * kChains * kWidth * 2;
}

}  // namespace sgm::SGM_ISA
