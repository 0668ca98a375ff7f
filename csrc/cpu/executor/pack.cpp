#include "cpu/executor/pack.h"

#include <cmath>
#include <cstring>

namespace sgm::executor {
namespace {

uint16_t to_bf16(float value) {  // to nearest even; NaN stays NaN
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  if ((bits & 0x7fffffff) > 0x7f800000) return static_cast<uint16_t>(bits >> 16 | 0x40);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// G of F(4×4, 3×3): row i holds 1, p, p² of point p_i over Π_{q≠i}(p_i − p_q); the last row is the point ∞.
struct WeightTransform {
  double g[6][3];
  WeightTransform() {
    const double points[5] = {0, std::sqrt(0.5), -std::sqrt(0.5), std::sqrt(2.0), -std::sqrt(2.0)};
    for (int i = 0; i < 5; ++i) {
      double product = 1;
      for (int q = 0; q < 5; ++q)
        if (q != i) product *= points[i] - points[q];
      for (int power = 0; power < 3; ++power) g[i][power] = std::pow(points[i], power) / product;
    }
    g[5][0] = g[5][1] = 0, g[5][2] = 1;
  }
};

void transform_winograd(const float* w, double* out) {  // [3][3] → [6][6] = G w Gᵀ
  static const WeightTransform transform;
  const auto& g = transform.g;
  double half[6][3];
  for (int i = 0; i < 6; ++i)
    for (int c = 0; c < 3; ++c) half[i][c] = g[i][0] * w[c] + g[i][1] * w[3 + c] + g[i][2] * w[6 + c];
  for (int i = 0; i < 6; ++i)
    for (int j = 0; j < 6; ++j) out[6 * i + j] = half[i][0] * g[j][0] + half[i][1] * g[j][1] + half[i][2] * g[j][2];
}

void widen_for_pool(const float* w, double* out) {  // [3][3] → [4][4]: the mean of its four shifts
  for (int i = 0; i < 16; ++i) out[i] = 0;
  for (int shift = 0; shift < 4; ++shift)
    for (int r = 0; r < 3; ++r)
      for (int c = 0; c < 3; ++c) out[(r + shift / 2) * 4 + c + shift % 2] += 0.25 * w[3 * r + c];
}

}  // namespace

void pack(const Conv& conv, int columns, const float* weight, float* packed) {
  const int source_taps = conv.kernel * conv.kernel, taps = conv.winograd ? kPoints : conv.tap_count;
  static_assert(kMaxTaps >= kPoints);
  double values[kMaxTaps];
  for (int block = 0; block < conv.blocks; ++block)
    for (int c = 0; c < conv.c_step; ++c)
      for (int column = 0; column < columns; ++column) {
        const int k = block * columns + column, of_group = conv.c_in / conv.groups;
        const int own = conv.first[block] + c - k / (conv.c_out / conv.groups) * of_group;  // channel of its group
        if (k >= conv.c_out || own < 0 || own >= of_group) {
          for (int t = 0; t < taps; ++t) values[t] = 0;
        } else {
          const float* w = weight + (static_cast<int64_t>(k) * of_group + own) * source_taps;
          if (conv.winograd) transform_winograd(w, values);
          else if (conv.pool) widen_for_pool(w, values);
          else
            for (int t = 0; t < taps; ++t) values[t] = w[t];
        }
        for (int t = 0; t < taps; ++t) {
          const int64_t tap = static_cast<int64_t>(block) * taps + t;
          const float value = static_cast<float>(values[t]);
          if (conv.bf16)
            reinterpret_cast<uint16_t*>(packed)[((tap * (conv.c_step / 2) + c / 2) * columns + column) * 2 + c % 2] = to_bf16(value);
          else packed[(tap * conv.c_step + c) * columns + column] = value;
        }
      }
}

void pack_depthwise(const Conv& conv, int padded, const float* weight, float* packed) {
  for (int t = 0; t < conv.tap_count; ++t)
    for (int c = 0; c < padded; ++c)
      packed[static_cast<int64_t>(t) * padded + c] = c < conv.c_in ? weight[static_cast<int64_t>(c) * conv.tap_count + t] : 0.f;
}

void pack_last(const Conv& conv, int padded, const float* weight, float* packed) {
  for (int k = 0; k < conv.c_out; ++k)
    for (int t = 0; t < conv.tap_count; ++t)
      for (int c = 0; c < padded; ++c)
        packed[(static_cast<int64_t>(k) * conv.tap_count + t) * padded + c] =
            c < conv.c_in ? weight[(static_cast<int64_t>(k) * conv.c_in + c) * conv.tap_count + t] : 0.f;
}

}  // namespace sgm::executor
