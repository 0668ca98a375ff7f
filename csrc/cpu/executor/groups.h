// GroupNorm from the statistics of channels.
#pragma once
#include "vec.h"

namespace sgm::SGM_ISA::executor {

SGM_INLINE double mean_of(const float* kept, int padded, double share, int c) {  // share: 1 / pixels
  return kept[c] + ((double)kept[padded + c] + kept[2 * padded + c]) * share;
}

// a = γ·rstd, b = γ·rstd·(pivot − mean) + β with the mean and rstd of each channel's group: the merge of its channels'
// moments, in double precision, where |mean| ≫ std costs nothing that counts. `kept`: Tensor::moments. table null: γ 1, β 0.
static void fold_groups(const Norm& norm, const float* kept, int padded, int pixels, const float* table, float* a, float* b) {
  const float *squares = kept + 3 * padded, *gamma = table, *beta = table ? table + 2 * norm.channels : nullptr;
  const int size = norm.channels / norm.groups;
  const double share = 1. / pixels;
  for (int first = 0; first < norm.channels; first += size) {
    double centre = 0, spread = 0;
    for (int c = first; c < first + size; c++) centre += mean_of(kept, padded, share, c);
    centre /= size;
    for (int c = first; c < first + size; c++) {
      const double d = mean_of(kept, padded, share, c) - centre;
      spread += squares[c] + pixels * d * d;
    }
    const double rstd = 1 / __builtin_sqrt(spread / ((double)size * pixels) + norm.eps);
    for (int c = first; c < first + size; c++) {
      const double scale = gamma ? gamma[c] * rstd : rstd;
      a[c] = (float)scale;
      b[c] = (float)(scale * (kept[c] - centre) + (beta ? beta[c] : 0));
    }
  }
}

}  // namespace sgm::SGM_ISA::executor
