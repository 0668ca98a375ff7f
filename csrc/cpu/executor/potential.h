// A classifier of potentials (sgm_engine/models/cdm/potential.py) at both ends: what its network reads of x, the seed of the
// gradient, and the way back through the Gaussian base.
#pragma once
#include "basis.h"

namespace sgm::SGM_ISA::executor {

constexpr double kReach = 3;      // σ's from black or white: models/cdm/potential.py
constexpr double kAbsent = 1e-20;  // a class of less weighs nothing
typedef float Four __attribute__((vector_size(16), aligned(4), may_alias));  // 2×2 pixels

// Where pixel j of kind `kind` (y, what is left, two tanh) lies in a tensor of 2×2 pixels as channels.
SGM_INLINE int64_t folded_at(const Potential& p, int kind, int j) { return p.place[j] + kind * 4 * p.channels; }

// logits → p(t | u), 1/n̂ and the mean of the signal
static void potential_classes(const Run& run) {
  const Potential& p = run.program.potential;
  for (int image = run.member.rank; image < run.images; image += run.member.size) {
    const Scratch s = scratch(run, image);
    double *const f = s.classes(), top = f[0], sum = 0, noise = 0, white = 0;
    for (int t = 1; t < p.classes; t++) top = f[t] > top ? f[t] : top;
    for (int t = 0; t < p.classes; t++) sum += f[t] = __builtin_exp(f[t] - top);
    for (int t = 0; t < p.classes; t++) f[t] /= sum, noise += f[t] * p.log_noise[t], white += f[t] * p.signal[t];
    s.inverse() = __builtin_exp(-noise), s.white() = white;
  }
  run.wait();
}

static void noise_features(const Run& run, const Layer& layer) {
  const Potential& p = run.program.potential;
  const Tensor& t = run.tensor(layer.output);
  const int pixels = p.height * p.width;
  int first, last;
  run.share(p.size, first, last);
  for (int image = 0; image < run.images; image++) {
    const double* const level = p.levels + (3 + p.potentials) * run.batch.level[image];
    const float* const x = run.batch.x + (int64_t)run.batch.slot[image] * p.size;
    double* const u = scratch(run, image).row(kU);
    for (int j = first; j < last; j++) u[j] = level[1] * (double)x[run.batch.nhwc ? j % pixels * p.channels + j / pixels : j] + level[2];
  }
  run.wait();
  into_basis<Double>(run, kU, p.mean, kZ);
  run.share(p.classes, first, last);
  for (int c = first; c < last; c++) {
    const double *const precision = p.precision + (int64_t)c * p.size, *const shifted = p.shifted + (int64_t)c * p.size;
    for (int image = 0; image < run.images; image++) {
      const Scratch s = scratch(run, image);
      const double* const z = s.row(kZ);
      DoubleVec even = {}, odd = {};
      const auto term = [&](int i) { return load(z + i) * (load(shifted + i) - 0.5 * load(z + i) * load(precision + i)); };
      for (int i = 0; i < p.size; i += 2 * kDoubles) even += term(i), odd += term(i + kDoubles);
      s.classes()[c] = total(even + odd) - 0.5 * p.constant[c];
    }
  }
  run.wait();
  potential_classes(run);
  run.share(p.size, first, last);
  for (int image = 0; image < run.images; image++) {
    const Scratch s = scratch(run, image);
    double *const share = s.row(kShare), *const inner = s.row(kInner);
    for (int i = first; i < last; i++) share[i] = inner[i] = 0;
    for (int c = 0; c < p.classes; c++) {
      const double weight = s.classes()[c];
      if (weight < kAbsent) continue;
      const double *const of = p.share + (int64_t)c * p.size, *const centre = p.centre + (int64_t)c * p.size;
      for (int i = first; i < last; i++) share[i] += weight * of[i], inner[i] -= weight * centre[i];
    }
    for (int i = first; i < last; i++) s.single()[i] = (float)(inner[i] + share[i] * s.row(kZ)[i]);
  }
  run.wait();
  for (int image = run.member.rank; image < run.images; image += run.member.size)
    if (t.padded > 16 * p.channels) memset(run.data(layer.output, image), 0, (size_t)t.height * t.width * t.padded * sizeof(float));
  run.wait();
  out_of_basis(run, [&](int image, int j, double r) {
    const Scratch s = scratch(run, image);
    float* const out = run.data(layer.output, image);
    const double y = r * s.inverse();
    s.row(kNoise)[j] = y;
    out[folded_at(p, 0, j)] = (float)y, out[folded_at(p, 1, j)] = (float)(s.row(kU)[j] - r);
  });
  run.share(p.size / 16, first, last);
  for (int image = 0; image < run.images; image++)
    for (int j = 16 * first; j < 16 * last; j += kWidth) {
      const Scratch s = scratch(run, image);
      float* const out = run.data(layer.output, image);
      float near[kWidth], far[kWidth];
      for (int k = 0; k < kWidth; k++) {
        const double u = s.row(kU)[j + k], by = s.inverse() / kReach;
        near[k] = (float)((u + s.white()) * by), far[k] = (float)((u - s.white()) * by);
      }
      store(near, tanh_of(load(near))), store(far, tanh_of(load(far)));
      for (int k = 0; k < kWidth; k++) {
        s.row(kNear)[j + k] = near[k], s.row(kFar)[j + k] = far[k];
        out[folded_at(p, 2, j + k)] = near[k], out[folded_at(p, 3, j + k)] = far[k];
      }
    }
  run.wait();
}

// output [waves] = Σ p(t | u)·waves_t
static void waves(const Run& run, const Layer& layer) {
  const Potential& p = run.program.potential;
  const Tensor& t = run.tensor(layer.output);
  for (int image = run.member.rank; image < run.images; image += run.member.size) {
    float* const out = run.data(layer.output, image);
    for (int k = 0; k < t.padded; k++) {
      double sum = 0;
      for (int c = 0; k < p.waves && c < p.classes; c++) sum += scratch(run, image).classes()[c] * p.wave[(int64_t)c * p.waves + k];
      out[k] = (float)sum;
    }
  }
  run.wait();
}

// output = gradient of Σ_m w_m·⟨y, a_m⟩ in a, the input; that in y stays in the scratch. w: of the level.
static void potential(const Run& run, const Layer& layer) {
  const Potential& p = run.program.potential;
  const Tensor& t = run.tensor(layer.input);
  const int fold = 4 * p.channels;
  int first, last;
  run.share(t.height, first, last);
  for (int image = 0; image < run.images; image++) {
    const Scratch s = scratch(run, image);
    const double* const weights = p.levels + (3 + p.potentials) * run.batch.level[image] + 3;
    const float* const a = run.data(layer.input, image);
    float* const out = run.data(layer.output, image);
    for (int h = first; h < last; h++)
      for (int w = 0; w < t.width; w++) {
        const int64_t place = ((int64_t)h * t.width + w) * t.padded;
        for (int k = t.channels; k < t.padded; k++) out[place + k] = 0;
        for (int c = 0; c < p.channels; c++) {
          Four y, sums = {};
          double* slope[4];
          for (int q = 0; q < 4; q++) {
            const int j = (c * p.height + 2 * h + q / 2) * p.width + 2 * w + q % 2;
            y[q] = (float)s.row(kNoise)[j], slope[q] = s.row(kSlope) + j;
          }
          for (int m = 0; m < p.potentials; m++) {
            const int64_t at = place + m * fold + 4 * c;
            const float weight = (float)weights[m];
            *(Four*)(out + at) = weight * y, sums += weight * *(const Four*)(a + at);
          }
          for (int q = 0; q < 4; q++) *slope[q] = sums[q];
        }
      }
  }
  run.wait();
}

// score: the gradient in x, by that in the planes (input) and in the waves (second), in y (scratch) and of the base's density.
static void store_potential(const Run& run, const Layer& layer) {
  const Potential& p = run.program.potential;
  int first, last;
  run.share(p.size, first, last);
  for (int image = 0; image < run.images; image++) {
    const Scratch s = scratch(run, image);
    const float* const g = run.data(layer.input, image);
    double *const noise = s.row(kNoise), *const near = s.row(kNear), *const far = s.row(kFar), *const slope = s.row(kSlope);
    const double by = s.inverse() / kReach;
    for (int j = first; j < last; j++) {
      const double left = g[folded_at(p, 1, j)], of_y = slope[j] + g[folded_at(p, 0, j)], u = s.row(kU)[j];
      const double of_near = g[folded_at(p, 2, j)] * (1 - near[j] * near[j]) * by, of_far = g[folded_at(p, 3, j)] * (1 - far[j] * far[j]) * by;
      slope[j] = of_y * s.inverse() - left;  // in r
      near[j] = of_y * noise[j] + of_near * (u + s.white()) + of_far * (u - s.white());  // in −log n̂
      far[j] = of_near - of_far;  // in the signal
      noise[j] = left + of_near + of_far;  // in u
    }
  }
  run.wait();
  into_basis<Single>(run, kSlope, nullptr, kSingle);  // in what the basis makes r of
  for (int image = run.member.rank; image < run.images; image += run.member.size) {
    const Scratch s = scratch(run, image);
    double of_noise = 0, of_white = 0, mean = 0;
    for (int j = 0; j < p.size; j++) of_noise -= s.row(kNear)[j], of_white += s.row(kFar)[j];
    const float* const of_wave = run.data(layer.second, image);
    double *const z = s.row(kZ), *const inner = s.row(kInner), *const weight = s.classes(), *const of_share = s.row(kFar);
    for (int i = 0; i < p.size; i++) inner[i] = s.single()[i], of_share[i] = inner[i] * z[i];
    double* const of = s.slopes();  // in p(t | u)
    for (int c = 0; c < p.classes; c++) {
      of[c] = 0;
      if (weight[c] < kAbsent) continue;
      double sum = of_noise * p.log_noise[c] + of_white * p.signal[c];
      for (int k = 0; k < p.waves; k++) sum += (double)of_wave[k] * p.wave[(int64_t)c * p.waves + k];
      of[c] = sum + (dot(of_share, p.share + (int64_t)c * p.size, p.size) - dot(inner, p.centre + (int64_t)c * p.size, p.size));
      mean += weight[c] * of[c];
    }
    const int own = (int)p.levels[(3 + p.potentials) * run.batch.level[image]];
    for (int i = 0; i < p.size; i++) inner[i] *= s.row(kShare)[i];  // in z
    for (int c = 0; c < p.classes; c++) {
      const double in_logit = weight[c] < kAbsent && c != own ? 0 : weight[c] * (of[c] - mean) + (c == own);
      if (in_logit == 0) continue;
      const double *const precision = p.precision + (int64_t)c * p.size, *const shifted = p.shifted + (int64_t)c * p.size;
      for (int i = 0; i < p.size; i++) inner[i] += in_logit * (shifted[i] - precision[i] * z[i]);
    }
    for (int i = 0; i < p.size; i++) s.single()[i] = (float)inner[i];
  }
  run.wait();
  out_of_basis(run, [&](int image, int j, double of_base) {
    const double scale = p.levels[(3 + p.potentials) * run.batch.level[image] + 1];
    run.batch.score[(int64_t)run.batch.slot[image] * p.size + j] = (float)(scale * (scratch(run, image).row(kNoise)[j] + of_base));
  });
}

}  // namespace sgm::SGM_ISA::executor
