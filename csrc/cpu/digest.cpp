#include "cpu/digest.h"

#include <algorithm>
#include <vector>

#include "cpu/pool.h"

namespace sgm {
namespace {

constexpr int64_t kPiece = 1 << 19;  // bytes: what one thread takes at a time
constexpr int64_t kAlone = 1 << 20;  // below it the caller is sooner done than the pool is awake

struct Piece {
  const char* data;
  int64_t size;
};

}  // namespace

void digest(const Bytes* memory, int64_t count, uint64_t* out) {
  std::vector<Piece> pieces;
  int64_t total = 0;
  for (int64_t i = 0; i < count; ++i) {
    for (int64_t at = 0; at < memory[i].size; at += kPiece)
      pieces.push_back({static_cast<const char*>(memory[i].data) + at, std::min(kPiece, memory[i].size - at)});
    total += memory[i].size;
  }
  std::vector<uint64_t> found(pieces.size());
  const auto of_piece = SGM_PICK(digest_piece);
  const auto range = [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) found[i] = of_piece(pieces[i].data, pieces[i].size);
  };
  if (total < kAlone) range(0, static_cast<int64_t>(pieces.size()));
  else parallel_for(static_cast<int64_t>(pieces.size()), 2, range);
  size_t next = 0;
  for (int64_t i = 0; i < count; ++i) {
    out[i] = static_cast<uint64_t>(memory[i].size);
    for (int64_t at = 0; at < memory[i].size; at += kPiece) out[i] = mix(out[i], found[next++]);
  }
}

}  // namespace sgm
