// The one gate of sizes: what a network may be, and every product of its sizes. Below these limits no int of the kernels
// overflows; beyond them an error in words, before anything is allocated.
#pragma once
#include <cstdint>

#include "cpu/executor/internal.h"

namespace sgm::executor {

constexpr int64_t kMaxChannels = 1 << 20;
constexpr int64_t kMaxSide = 1 << 16;          // height, width; dilation, stride and padding
constexpr int64_t kMaxPixels = 1 << 27;        // of an image
constexpr int64_t kMaxLevels = 1 << 24;
constexpr int64_t kMaxFloats = int64_t{1} << 40;  // of a buffer
constexpr int kMaxKernel = 7;

inline int within(const char* name, int64_t value, int64_t low, int64_t high) {
  if (value < low || value > high)
    refuse(std::string(name) + " must be from " + std::to_string(low) + " to " + std::to_string(high) + ", got " + std::to_string(value));
  return static_cast<int>(value);
}

// The product of numbers that are at least 0: of floats that a network needs somewhere.
template <class... Numbers>
int64_t times(Numbers... numbers) {
  int64_t product = 1;
  bool large = false;
  (..., (large |= __builtin_mul_overflow(product, static_cast<int64_t>(numbers), &product)));
  if (large || product > kMaxFloats)
    refuse("the network is too large: it would need a buffer of more than " + std::to_string(kMaxFloats) + " floats; make its images or channels smaller");
  return product;
}

inline void check_shape(const char* what, int channels, int height, int width) {
  const std::string of = std::string(what) + " ";
  within((of + "channels").c_str(), channels, 1, kMaxChannels);
  within((of + "height").c_str(), height, 1, kMaxSide), within((of + "width").c_str(), width, 1, kMaxSide);
  within((of + "height * width").c_str(), int64_t{height} * width, 1, kMaxPixels);
}

}  // namespace sgm::executor
