#include "update.h"

#include <stdexcept>
#include <string>

#include "cpu/pieces.h"
#include "cpu/pool.h"

namespace sgm {

int64_t update_pieces(const Update& u) { return cut(u).per_sample; }
int64_t noise_pieces(const NoiseFill& f) { return cut(f).per_sample; }

void check_sample_id(int64_t index, int64_t id) {
  if (id < 0 || id >> 56) throw std::invalid_argument("sample_id must be in [0, 2^56), got " + std::to_string(id) + " at " + std::to_string(index));
}

void langevin_update(const Update& u) {
  for (int64_t b = 0; b < u.shape.batch; ++b) {
    if (u.stop && u.row[b] >= u.stop[b]) continue;
    check_sample_id(b, u.sample_id[b]);
    if (u.row[b] < 0 || u.row[b] >= u.rows)
      throw std::out_of_range("row[" + std::to_string(b) + "] is " + std::to_string(u.row[b]) + ", but the table has rows 0 to " +
                              std::to_string(u.rows - 1) + ": lower stop or lengthen the table");
    if (!u.previous && u.coef[4 * u.row[b] + 3] != 0)
      throw std::invalid_argument("coef[" + std::to_string(u.row[b]) + "] has d != 0, but previous is None: pass the previous term");
    if (!u.previous && u.keep && (u.keep[2 * u.row[b]] != 0 || u.keep[2 * u.row[b] + 1] != 0))
      throw std::invalid_argument("keep[" + std::to_string(u.row[b]) + "] stores into previous, but previous is None: pass a tensor like x");
  }
  const auto range = SGM_PICK(update_range);
  const Cut c = cut(u);
  parallel_for(u.shape.batch * c.per_sample, c.grain, [&](int64_t begin, int64_t end) { range(u, begin, end); });
}

void advance_rows(int64_t batch, int64_t* row, const int64_t* stop) {
  for (int64_t b = 0; b < batch; ++b) row[b] += row[b] < stop[b];
}

void noise_fill(const NoiseFill& f) {
  for (int64_t b = 0; b < f.shape.batch; ++b) check_sample_id(b, f.sample_id[b]);
  const auto range = SGM_PICK(noise_range);
  const Cut c = cut(f);
  parallel_for(f.shape.batch * c.per_sample, c.grain, [&](int64_t begin, int64_t end) { range(f, begin, end); });
}

}  // namespace sgm
