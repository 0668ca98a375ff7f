#include "cpu/executor/pack.h"

#include <cmath>
#include <cstring>
#include <stdexcept>

#include "cpu/pool.h"

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

constexpr int kColumns = 64;  // the most output channels of a block: 4 vectors of 16

using Row = double[kColumns];  // one number for each output channel of a block

void transform_winograd(const Row* w, int columns, Row* out) {  // [3][3] → [6][6] = G w Gᵀ
  static const WeightTransform transform;
  const auto& g = transform.g;
  Row half[6][3];
  for (int i = 0; i < 6; ++i)
    for (int c = 0; c < 3; ++c)
      for (int k = 0; k < columns; ++k) half[i][c][k] = g[i][0] * w[c][k] + g[i][1] * w[3 + c][k] + g[i][2] * w[6 + c][k];
  for (int i = 0; i < 6; ++i)
    for (int j = 0; j < 6; ++j)
      for (int k = 0; k < columns; ++k)
        out[6 * i + j][k] = half[i][0][k] * g[j][0] + half[i][1][k] * g[j][1] + half[i][2][k] * g[j][2];
}

void widen_for_pool(const Row* w, int columns, Row* out) {  // [3][3] → [4][4]: the mean of its four shifts
  for (int i = 0; i < 16; ++i)
    for (int k = 0; k < columns; ++k) out[i][k] = 0;
  for (int shift = 0; shift < 4; ++shift)
    for (int r = 0; r < 3; ++r)
      for (int c = 0; c < 3; ++c)
        for (int k = 0; k < columns; ++k) out[(r + shift / 2) * 4 + c + shift % 2][k] += 0.25 * w[3 * r + c][k];
}

// The kernel from channel c of those that a block sums to output channel k; null: zeros.
const float* source(const Conv& conv, const float* weight, int block, int k, int c) {
  const int of_group = conv.c_in / conv.groups, own = conv.first[block] + c - k / (conv.c_out / conv.groups) * of_group;
  if (k >= conv.c_out || own < 0 || own >= of_group) return nullptr;
  return weight + (static_cast<int64_t>(k) * of_group + own) * conv.kernel * conv.kernel;
}

// The kernels of input channel c to every output channel of a block.
void pack_block(const Conv& conv, int columns, const float* weight, float* packed, int block, int c) {
  const int source_taps = conv.kernel * conv.kernel, taps = conv.winograd ? kPoints : conv.tap_count;
  Row given[kMaxTaps], made[kPoints];  // a widened kernel has 16 taps, fewer than kPoints
  for (int column = 0; column < columns; ++column) {
    const float* w = source(conv, weight, block, block * columns + column, c);
    for (int t = 0; t < source_taps; ++t) given[t][column] = w ? w[t] : 0;
  }
  const Row* values = conv.winograd || conv.pool ? made : given;
  if (conv.winograd) transform_winograd(given, columns, made);
  else if (conv.pool) widen_for_pool(given, columns, made);
  for (int t = 0; t < taps; ++t) {
    const int64_t tap = static_cast<int64_t>(block) * taps + t;
    if (conv.bf16) {
      uint16_t* out = reinterpret_cast<uint16_t*>(packed) + (tap * (conv.c_step / 2) + c / 2) * columns * 2 + c % 2;
      for (int k = 0; k < columns; ++k) out[2 * k] = to_bf16(static_cast<float>(values[t][k]));
    } else {
      float* out = packed + (tap * conv.c_step + c) * columns;
      for (int k = 0; k < columns; ++k) out[k] = static_cast<float>(values[t][k]);
    }
  }
}

}  // namespace

void pack(const Conv& conv, int columns, const float* weight, float* packed) {
  if (columns > kColumns) throw std::logic_error("pack: a block of more than 64 output channels");
  parallel_for(static_cast<int64_t>(conv.blocks) * conv.c_step, 64, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      pack_block(conv, columns, weight, packed, static_cast<int>(i / conv.c_step), static_cast<int>(i % conv.c_step));
  });
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
