// 64 bits that say what memory holds: a copy of weights is packed again when those of its source have changed.
#pragma once
#include <cstddef>
#include <cstdint>

#include "isa.h"

namespace sgm {

struct Bytes {
  const void* data;
  int64_t size;
};

// out[i]: of memory[i], the order of its bytes and their number. The same on every instruction set and number of threads.
// One changed 32-bit word always changes it; two different contents share it by chance, 2⁻³² at the worst (words of one
// lane alone) and 2⁻⁶⁴ where many words differ. Not made to resist somebody who looks for a collision.
void digest(const Bytes* memory, int64_t count, uint64_t* out);

inline uint64_t mix(uint64_t hash, uint64_t word) {
  hash = (hash ^ word) * 0x9e3779b97f4a7c15u;
  return hash ^ hash >> 32;
}

SGM_DECLARE_UP_TO_AVX512(uint64_t, digest_piece, (const void* data, int64_t size))

}  // namespace sgm
