// One piece of memory in 64 lanes of 32 bits: lane ← (lane ^ word)·odd, its upper half folded into the lower, which is one
// to one in the lane and in the word. Compiled several times (isa.h); nothing outside sgm::SGM_ISA is called.
#include "isa.h"

#include <cstdint>

namespace sgm::SGM_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kWidth = 16;
#elif defined(__AVX2__)
constexpr int kWidth = 8;
#else
constexpr int kWidth = 4;
#endif
constexpr int kLanes = 64, kVectors = kLanes / kWidth, kBlock = 4 * kLanes;  // a block in bytes
constexpr int64_t kPage = 4096;
using Lanes = uint32_t __attribute__((vector_size(4 * kWidth)));

struct State {
  Lanes lanes[kVectors];
};

__attribute__((always_inline)) inline void take(State& state, const char* block) {
#pragma GCC unroll 16
  for (int i = 0; i < kVectors; ++i) {
    Lanes words;
    __builtin_memcpy(&words, block + i * sizeof(Lanes), sizeof(Lanes));
    Lanes& lane = state.lanes[i];
    lane = (lane ^ words) * 0x9e3779b1u;
    lane ^= lane >> 15;
  }
}

}  // namespace

uint64_t digest_piece(const void* data, int64_t size) {
  State state;
  for (int i = 0; i < kVectors; ++i)
    for (int j = 0; j < kWidth; ++j) state.lanes[i][j] = 0x85ebca6bu * static_cast<uint32_t>(kWidth * i + j + 1);
  const char* byte = static_cast<const char*>(data);
  int64_t at = 0;
  for (; at + kBlock <= size; at += kBlock) {
#pragma GCC unroll 4
    for (int line = 0; line < kBlock; line += 64) __builtin_prefetch(byte + at + kPage + line);
    if (at % kPage == 0) __builtin_prefetch(byte + at + 4 * kPage);  // so that its address is translated by then
    take(state, byte + at);
  }
  if (at < size) {
    char rest[kBlock] = {};
    __builtin_memcpy(rest, byte + at, size - at);
    take(state, rest);
  }
  uint64_t pairs[kLanes / 2], hash = static_cast<uint64_t>(size);
  __builtin_memcpy(pairs, state.lanes, sizeof pairs);
  for (const uint64_t pair : pairs) {
    hash = (hash ^ pair) * 0x9e3779b97f4a7c15u;
    hash ^= hash >> 32;
  }
  return hash;
}

}  // namespace sgm::SGM_ISA
