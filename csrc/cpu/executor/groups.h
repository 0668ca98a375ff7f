// GroupNorm from the statistics of channels.
#pragma once
#include "vec.h"

namespace sgm::SGM_ISA::executor {

// a = γ·rstd, b = γ·rstd·(pivot − mean) + β with the mean and rstd of each channel's group: the merge of its channels'
// moments, in double precision, where |mean| ≫ std costs nothing that counts. `kept`: Tensor::moments.
static void fold_groups(const Norm& norm, const float* kept, int padded, int pixels, const float* table, float* a, float* b) {
  const float *pivot = kept, *mean = kept + padded, *squares = mean + padded, *gamma = table, *beta = table + 2 * norm.channels;
  const int size = norm.channels / norm.groups;
  for (int first = 0; first < norm.channels; first += size) {
    double centre = 0, spread = 0;
    for (int c = first; c < first + size; c++) centre += (double)pivot[c] + mean[c];
    centre /= size;
    for (int c = first; c < first + size; c++) {
      const double d = (double)pivot[c] + mean[c] - centre;
      spread += squares[c] + pixels * d * d;
    }
    const double rstd = 1 / __builtin_sqrt(spread / ((double)size * pixels) + norm.eps);
    for (int c = first; c < first + size; c++) {
      a[c] = (float)(gamma[c] * rstd);
      b[c] = (float)(gamma[c] * rstd * (pivot[c] - centre) + beta[c]);
    }
  }
}

}  // namespace sgm::SGM_ISA::executor
