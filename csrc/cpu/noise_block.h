// Blocks of noise on the CPU. Loops over csrc/noise.h that the compiler turns into vectors; include it from *_isa.cpp only.
#pragma once

#include <cstdint>

#include "cpu/pieces.h"
#include "noise.h"
#include "update.h"

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace sgm::SGM_ISA {
namespace {

// Philox on one 32-bit word in each 64-bit lane: a 32×32→64 multiplication is then one instruction with nothing to
// shuffle, and its two halves serve as they are. Upper halves may hold anything.
#if defined(__AVX512F__)
constexpr int kLanes = 8;
using Lanes = __m512i;
inline Lanes multiply(Lanes a, Lanes b) { return _mm512_mul_epu32(a, b); }
inline Lanes exclusive_or(Lanes a, Lanes b, Lanes c) { return _mm512_ternarylogic_epi64(a, b, c, 0x96); }
inline Lanes high(Lanes a) { return _mm512_srli_epi64(a, 32); }
inline Lanes spread(uint32_t v) { return _mm512_set1_epi64(v); }
inline Lanes ramp() { return _mm512_set_epi64(7, 6, 5, 4, 3, 2, 1, 0); }
inline Lanes plus(Lanes a, Lanes b) { return _mm512_add_epi64(a, b); }
inline void store_low(uint32_t* p, Lanes a) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi64_epi32(a)); }
#elif defined(__AVX2__)
constexpr int kLanes = 4;
using Lanes = __m256i;
inline Lanes multiply(Lanes a, Lanes b) { return _mm256_mul_epu32(a, b); }
inline Lanes exclusive_or(Lanes a, Lanes b, Lanes c) { return _mm256_xor_si256(_mm256_xor_si256(a, b), c); }
inline Lanes high(Lanes a) { return _mm256_srli_epi64(a, 32); }
inline Lanes spread(uint32_t v) { return _mm256_set1_epi64x(v); }
inline Lanes ramp() { return _mm256_set_epi64x(3, 2, 1, 0); }
inline Lanes plus(Lanes a, Lanes b) { return _mm256_add_epi64(a, b); }
inline void store_low(uint32_t* p, Lanes a) {
  const __m256i packed = _mm256_permutevar8x32_epi32(a, _mm256_set_epi32(7, 5, 3, 1, 6, 4, 2, 0));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
}
#elif defined(__SSE2__)
constexpr int kLanes = 2;
using Lanes = __m128i;
inline Lanes multiply(Lanes a, Lanes b) { return _mm_mul_epu32(a, b); }
inline Lanes exclusive_or(Lanes a, Lanes b, Lanes c) { return _mm_xor_si128(_mm_xor_si128(a, b), c); }
inline Lanes high(Lanes a) { return _mm_srli_epi64(a, 32); }
inline Lanes spread(uint32_t v) { return _mm_set1_epi64x(v); }
inline Lanes ramp() { return _mm_set_epi64x(1, 0); }
inline Lanes plus(Lanes a, Lanes b) { return _mm_add_epi64(a, b); }
inline void store_low(uint32_t* p, Lanes a) { _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_shuffle_epi32(a, 0x08)); }
#endif

// w[j][i] = word j of quad first + i·stride, for i in [0, n); n is a multiple of 16.
inline void fill_words(const Draw& d, uint32_t first, uint32_t stride, int n, uint32_t (*__restrict w)[kBlock]) {
#if defined(__SSE2__)
  constexpr int kWays = 2;  // independent chains, to hide the multiplier's latency
  const Lanes m0 = spread(kPhiloxM0), m1 = spread(kPhiloxM1);
  for (int i = 0; i < n; i += kWays * kLanes) {
    Lanes c0[kWays], c1[kWays], c2[kWays], c3[kWays];
    for (int j = 0; j < kWays; ++j) {
      const uint32_t base = first + static_cast<uint32_t>(i + j * kLanes) * stride;
      c0[j] = plus(spread(base), multiply(ramp(), spread(stride)));
      c1[j] = spread(d.c1), c2[j] = spread(d.c2), c3[j] = spread(d.c3);
    }
    uint32_t k0 = d.k0, k1 = d.k1;
    for (int round = 0; round < 10; ++round, k0 += kPhiloxW0, k1 += kPhiloxW1) {
      for (int j = 0; j < kWays; ++j) {
        const Lanes p0 = multiply(c0[j], m0), p1 = multiply(c2[j], m1);
        c0[j] = exclusive_or(high(p1), c1[j], spread(k0));
        c2[j] = exclusive_or(high(p0), c3[j], spread(k1));
        c1[j] = p1, c3[j] = p0;
      }
    }
    for (int j = 0; j < kWays; ++j) {
      const int at = i + j * kLanes;
      store_low(w[0] + at, c0[j]), store_low(w[1] + at, c1[j]), store_low(w[2] + at, c2[j]), store_low(w[3] + at, c3[j]);
    }
  }
#else
  for (int i = 0; i < n; ++i) {
    const Words q = words(d, first + static_cast<uint32_t>(i) * stride);
    w[0][i] = q.w0, w[1][i] = q.w1, w[2][i] = q.w2, w[3][i] = q.w3;
  }
#endif
}

// z[j·kBlock + i] = value j of quad first + i·stride, for i in [0, n), n <= kBlock. What lies beyond n is overwritten too.
inline void noise_planes(const Draw& d, Kind kind, uint32_t first, uint32_t stride, int n, float* __restrict z) {
  alignas(64) uint32_t w[4][kBlock];
  n = (n + 15) & ~15;  // whole vectors
  fill_words(d, first, stride, n, w);
  if (kind == Kind::uniform) {
    for (int j = 0; j < 4; ++j)
      for (int i = 0; i < n; ++i) z[j * kBlock + i] = uniform(w[j][i]);
    return;
  }
  for (int j = 0; j < 4; j += 2)
    for (int i = 0; i < n; ++i) normal2(w[j][i], w[j + 1][i], z[j * kBlock + i], z[(j + 1) * kBlock + i]);
}

// z[0 … 4n) = the elements of quads first … first + n − 1, n <= kBlock.
inline void noise_flat(const Draw& d, Kind kind, uint32_t first, int n, float* __restrict z) {
  alignas(64) float planes[4 * kBlock];
  noise_planes(d, kind, first, 1, n, planes);
  for (int i = 0; i < n; ++i)
    for (int j = 0; j < 4; ++j) z[4 * i + j] = planes[j * kBlock + i];
}

}  // namespace
}  // namespace sgm::SGM_ISA
