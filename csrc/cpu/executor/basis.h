// Sums over the eigenbasis of a Gaussian base, for all images of a team at once, and the scratch that they leave behind.
//
// What u is compared with is summed in double precision: logits lie thousands apart, and their differences of 1e-3 say how
// much noise there is. Members split sums by their results, so no result depends on the team.
#pragma once
#ifdef __AVX__
#include <immintrin.h>
#endif

#include "pointwise.h"

namespace sgm::SGM_ISA::executor {

constexpr int kDoubles = kWidth / 2;
typedef double DoubleVec __attribute__((vector_size(kDoubles * 8)));
typedef double UnalignedDoubleVec __attribute__((vector_size(kDoubles * 8), aligned(8), may_alias));

SGM_INLINE DoubleVec load(const double* p) { return *(const UnalignedDoubleVec*)p; }
SGM_INLINE void store(double* p, DoubleVec v) { *(UnalignedDoubleVec*)p = v; }

// As many floats in double precision.
SGM_INLINE DoubleVec widened(const float* p) {
#if defined(__AVX512F__)
  return (DoubleVec)_mm512_cvtps_pd(_mm256_loadu_ps(p));
#elif defined(__AVX__)
  return (DoubleVec)_mm256_cvtps_pd(_mm_loadu_ps(p));
#else
  return DoubleVec{p[0], p[1]};
#endif
}

SGM_INLINE double total(DoubleVec all) {
  double sum = 0;
  for (int k = 0; k < kDoubles; k++) sum += all[k];
  return sum;
}

SGM_INLINE double dot(const double* a, const double* b, int n) {  // n divides by 16
  DoubleVec even = {}, odd = {};
  for (int i = 0; i < n; i += 2 * kDoubles) even += load(a + i) * load(b + i), odd += load(a + i + kDoubles) * load(b + i + kDoubles);
  return total(even + odd);
}

// Rows of an image's scratch, `size` doubles each, and the classes behind them.
enum PotentialRow { kU, kZ, kShare, kNoise, kNear, kFar, kSlope, kInner, kSingle };
static_assert(kSingle + 1 == kPotentialRows);

struct Scratch {
  const Potential& p;
  double* at;
  double* row(PotentialRow row) const { return at + (int64_t)row * p.size; }
  double* classes() const { return at + (int64_t)kPotentialRows * p.size; }
  double& inverse() const { return classes()[p.classes]; }   // 1/n̂
  double& white() const { return classes()[p.classes + 1]; }  // of the signal
  float* single() const { return (float*)row(kSingle); }
  double* slopes() const { return classes() + p.classes + 2; }
};

SGM_INLINE Scratch scratch(const Run& run, int image) {
  const Potential& p = run.program.potential;
  return {p, run.workspace.potential + image * p.stride};
}

constexpr int kBasisRows = 4;      // the number of pixels divides by 16

struct Double {
  using Number = double;
  using Vector = DoubleVec;
  static constexpr int kLanes = kDoubles;
  SGM_INLINE Vector read(const float* p) { return widened(p); }
};
struct Single {
  using Number = float;
  using Vector = Vec;
  static constexpr int kLanes = kWidth;
  SGM_INLINE Vector read(const float* p) { return load(p); }
};

// A few rows of the basis at a time serve a few images, so that each number of it is read once for them.
template <class Precision, int kImages>
SGM_INLINE void into_basis_of(const Run& run, int image, int j, PotentialRow from, const double* centre, PotentialRow to, int first, int last) {
  using Number = typename Precision::Number;
  using Vector = typename Precision::Vector;
  const Potential& p = run.program.potential;
  const float* const row = p.basis + (int64_t)j * p.size;
  Number *y[kImages], v[kImages][kBasisRows];
  SGM_UNROLL for (int n = 0; n < kImages; n++) {
    const Scratch s = scratch(run, image + n);
    y[n] = (Number*)s.row(to);
    SGM_UNROLL for (int k = 0; k < kBasisRows; k++) v[n][k] = (Number)(s.row(from)[j + k] - (centre ? centre[j + k] : 0));
  }
  for (int i = first; i < last; i += Precision::kLanes) {
    Vector sums[kImages];
    SGM_UNROLL for (int n = 0; n < kImages; n++) sums[n] = j ? load(y[n] + i) : Vector{};
    SGM_UNROLL for (int k = 0; k < kBasisRows; k++) {
      const Vector of = Precision::read(row + (int64_t)k * p.size + i);
      SGM_UNROLL for (int n = 0; n < kImages; n++) sums[n] += of * v[n][k];
    }
    SGM_UNROLL for (int n = 0; n < kImages; n++) store(y[n] + i, sums[n]);
  }
}

// to = Vᵀ·(from − centre) of every image; rows of the scratch, `to` of numbers of that precision.
template <class Precision>
static void into_basis(const Run& run, PotentialRow from, const double* centre, PotentialRow to) {
  const Potential& p = run.program.potential;
  int first, last;
  run.share(p.size / 16, first, last);
  first *= 16, last *= 16;
  for (int j = 0; j < p.size; j += kBasisRows)
    for (int image = 0; image < run.images;)
      if (image + 4 <= run.images) into_basis_of<Precision, 4>(run, image, j, from, centre, to, first, last), image += 4;
      else into_basis_of<Precision, 1>(run, image, j, from, centre, to, first, last), image++;
  run.wait();
}

// body(image, j, (V·single)_j) for the pixels of this member, in single precision: sums of which nothing is taken away.
template <int kImages, class Body>
SGM_INLINE void out_of_basis_of(const Run& run, int image, int j, const Body& body) {
  const Potential& p = run.program.potential;
  const float *const row = p.basis + (int64_t)j * p.size, *x[kImages];
  SGM_UNROLL for (int n = 0; n < kImages; n++) x[n] = scratch(run, image + n).single();
  Vec sums[kImages][kBasisRows] = {};
  for (int i = 0; i < p.size; i += kWidth)
    SGM_UNROLL for (int k = 0; k < kBasisRows; k++) {
      const Vec of = load(row + (int64_t)k * p.size + i);
      SGM_UNROLL for (int n = 0; n < kImages; n++) sums[n][k] += of * load(x[n] + i);
    }
  for (int n = 0; n < kImages; n++)
    for (int k = 0; k < kBasisRows; k++) body(image + n, j + k, (double)horizontal_sum(sums[n][k]));
}

template <class Body>
SGM_INLINE void out_of_basis(const Run& run, const Body& body) {
  int first, last;
  run.share(run.program.potential.size / kBasisRows, first, last);
  for (int j = first * kBasisRows; j < last * kBasisRows; j += kBasisRows)
    for (int image = 0; image < run.images;)
      if (image + 4 <= run.images) out_of_basis_of<4>(run, image, j, body), image += 4;
      else out_of_basis_of<1>(run, image, j, body), image++;
  run.wait();
}

}  // namespace sgm::SGM_ISA::executor
