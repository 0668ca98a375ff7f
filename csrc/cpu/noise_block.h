// Blocks of noise on the CPU. Loops over csrc/noise.h that the compiler turns into vectors; include it from *_isa.cpp only.
#pragma once

#include <cstdint>

#include "cpu/pieces.h"
#include "noise.h"
#include "update.h"

namespace sgm::SGM_ISA {
namespace {

// z[j·kBlock + i] = value j of quad first + i·stride, for i in [0, n), n <= kBlock. What lies beyond n is overwritten too.
inline void noise_planes(const Draw& d, Kind kind, uint32_t first, uint32_t stride, int n, float* __restrict z) {
  alignas(64) uint32_t w[4][kBlock];
  n = (n + 15) & ~15;  // whole vectors
  for (int i = 0; i < n; ++i) {
    const Words q = words(d, first + static_cast<uint32_t>(i) * stride);
    w[0][i] = q.w0, w[1][i] = q.w1, w[2][i] = q.w2, w[3][i] = q.w3;
  }
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
