// The norm's two sweeps over a sample, compiled once per instruction set: see norm.h for the formula.
//
// statistics reads x from memory, once; apply finds the sample still in L2 and writes y = act((x − mean)·scale + shift).
// x − mean comes first because A·x + B would cancel where |mean| ≫ std, and shift makes up for what float32 cannot hold
// of the mean. The workspace of a sample is four rows of padded(C) floats:
//   mean     μ rounded to float32
//   rest     what the rounding took from μ
//   scale    Σ(x − μ)² after statistics, γ·rsqrt(var + eps) in apply
//   shift    γ·α·ms + β − rest·scale, from apply on
// With groups, merge gives every channel of a group the group's μ, and the group's Σ(x − μ)² divided by its channels.
// Blocks of channels read each other's mean and rest, so these two stay as statistics left them.
#include "cpu/norm.h"

#include <cstring>
#include <utility>
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace sgm::SGM_ISA {
namespace {
#include "cpu/norm_simd.h"

struct Workspace {
  float *mean, *rest, *scale, *shift;
  Workspace(const Norm& a, int64_t n) {
    const int64_t row = Norm::padded(a.channels);
    mean = a.workspace + n * 4 * row, rest = mean + row, scale = rest + row, shift = scale + row;
  }
};

// What the norm sees of the input: x, or x + residual rounded to Type, which is stored on the way.
template <class Type, bool kResidual>
struct Input {
  using Element = typename Type::Element;
  const Element *x, *residual;
  Element* total;
  Input(const Norm& a, int64_t offset)
      : x((const Element*)a.x + offset),
        residual(kResidual ? (const Element*)a.residual + offset : nullptr),
        total(kResidual ? (Element*)a.total + offset : nullptr) {}
  template <class Lanes>
  Vec take(int64_t i, Lanes lanes) const {
    Vec v = load<Type>(x + i, lanes);
    if (!kResidual) return v;
    v += load<Type>(residual + i, lanes);
    store<Type>(total + i, v, lanes);
    return Type::widen(Type::narrow(v));
  }
  const Element* taken() const { return kResidual ? total : x; }
};

// [N, C, P]: a plane mostly fits L1, so two passes cost one; the second also finds what is left of the mean.
template <class Type, bool kResidual>
void statistics_planes(const Norm& a, int64_t n, int64_t begin, int64_t end) {
  const Workspace w(a, n);
  for (int64_t c = begin; c < end; ++c) {
    const Input<Type, kResidual> input(a, (n * a.channels + c) * a.pixels);
    Vec total[4]{};
    for_each_vector(a.pixels, [&](int64_t i, auto lanes, int j) { total[j] += input.take(i, lanes); });
    const float mean = sum((total[0] + total[1]) + (total[2] + total[3])) / a.pixels;
    Vec left[4]{}, square[4]{};
    for_each_vector(a.pixels, [&](int64_t i, auto lanes, int j) {
      Vec d = keep(load<Type>(input.taken() + i, lanes) - mean, lanes);
      left[j] += d;
      square[j] = fma(d, d, square[j]);
    });
    const float rest = sum((left[0] + left[1]) + (left[2] + left[3]));
    w.mean[c] = mean;
    w.rest[c] = rest / a.pixels;
    w.scale[c] = sum((square[0] + square[1]) + (square[2] + square[3])) - rest * (rest / a.pixels);
  }
}

// [N, P, C]: a few rows of one vector of channels are a block in registers, centred there; blocks merge by Chan's
// formula. All is relative to the first pixel (kept in `shift`), and the running sum is compensated (Knuth's two-sum): so
// neither a mean ≫ std nor many pixels cost the mean its last digits.
constexpr int kRows = kWidth == 16 ? 16 : 8;  // what the registers hold
// Rows lie too far apart for the hardware to see a stream, so this many elements ahead memory is prefetched in order.
constexpr int kAhead = 8192;

SGM_INLINE Vec sum_of(const Vec* v, int count) {  // pairwise where the count is known to be even
  Vec total[2]{};
#pragma GCC unroll 16
  for (int i = 0; i < count; ++i) total[i % 2] += v[i];
  return total[0] + total[1];
}

template <class Type, bool kResidual, class Lanes>
SGM_INLINE void merge_rows(const Norm& a, const Workspace& w, const Input<Type, kResidual>& input, int64_t p, int rows,
                           int64_t c, Lanes lanes) {
  Vec v[kRows]{}, square{};
  const typename Type::Element* ahead = input.x + p * a.channels + c * rows + kAhead;
#pragma GCC unroll 16
  for (int i = 0; i < rows; ++i) {
    v[i] = input.take((p + i) * a.channels + c, lanes);
    __builtin_prefetch(ahead + i * kWidth, 0, 2);
  }
  if (p == 0) store(w.shift + c, v[0]);
  const Vec pivot = load(w.shift + c);
#pragma GCC unroll 16
  for (int i = 0; i < rows; ++i) v[i] -= pivot;
  const Vec block = sum_of(v, rows), block_mean = block * (1.0f / rows);
#pragma GCC unroll 16
  for (int i = 0; i < rows; ++i) {
    const Vec d = v[i] - block_mean;
    square = fma(d, d, square);
  }
  if (p > 0) {
    const Vec before = load(w.mean + c), delta = block_mean - before * (1.0f / p);
    square += fma(delta * delta, splat(float(p) * rows / float(p + rows)), load(w.scale + c));
    const Vec after = before + block, kept = after - before;
    store(w.rest + c, load(w.rest + c) + ((before - (after - kept)) + (block - kept)));
    store(w.mean + c, after);
  } else {
    store(w.rest + c, Vec{});
    store(w.mean + c, block);
  }
  store(w.scale + c, square);
}

template <class Type, bool kResidual>
void statistics_rows(const Norm& a, int64_t n, int64_t begin, int64_t end) {
  const Workspace w(a, n);
  const Input<Type, kResidual> input(a, n * a.channels * a.pixels);
  auto sweep = [&](int64_t p, int rows) __attribute__((always_inline)) {
    int64_t c = begin;
    for (; c + kWidth <= end; c += kWidth) merge_rows(a, w, input, p, rows, c, All{});
    if (c < end) merge_rows(a, w, input, p, rows, c, First{int(end - c)});
  };
  int64_t p = 0;
  for (; p + kRows <= a.pixels; p += kRows) sweep(p, kRows);
  if (p < a.pixels) sweep(p, int(a.pixels - p));
  for (int64_t c = begin; c < end; ++c) {
    const double mean = w.shift[c] + (w.mean[c] + double(w.rest[c])) / double(a.pixels);
    w.mean[c] = float(mean);
    w.rest[c] = float(mean - w.mean[c]);
  }
}

template <class F>
SGM_INLINE double sum_over(int64_t n, F f) {  // f(0) + … + f(n − 1), in four chains
  double total[4]{};
  int64_t i = 0;
  for (; i + 4 <= n; i += 4)
    for (int j = 0; j < 4; ++j) total[j] += f(i + j);
  for (; i < n; ++i) total[0] += f(i);
  return (total[0] + total[1]) + (total[2] + total[3]);
}

// Turns what the statistics left into what apply needs, for channels [begin, end). In double: it is a C·P-th of the
// work, and what is wrong here is wrong in a whole plane.
void fold(const Norm& a, int64_t n, int64_t begin, int64_t end) {
  const Workspace w(a, n);
  double centre = 0, scale = 0;  // ms = (μ − centre)·scale
  if (a.alpha) {
    centre = sum_over(a.channels, [&](int64_t c) { return w.mean[c] + double(w.rest[c]); }) / a.channels;
    const double square = sum_over(a.channels, [&](int64_t c) {
      const double d = w.mean[c] + double(w.rest[c]) - centre;
      return d * d;
    });
    scale = 1.0 / __builtin_sqrt(square / (a.channels - 1) + 1e-5);
  }
  const int64_t level = a.level ? a.level[n] : 0;
  const float* gamma = a.gamma ? a.gamma + level * a.gamma_stride : nullptr;
  const float* alpha = a.alpha ? a.alpha + level * a.alpha_stride : nullptr;
  const float* beta = a.beta ? a.beta + level * a.beta_stride : nullptr;
  const double pixels = double(a.pixels), eps = a.eps;
  for (int64_t c = begin; c < end; ++c) {
    const double rest = w.rest[c], g = gamma ? gamma[c] : 1.0f;
    const double rescale = g / __builtin_sqrt(w.scale[c] / pixels + eps);
    const double ms = alpha ? alpha[c] * ((w.mean[c] + rest - centre) * scale) : 0.0;
    w.scale[c] = float(rescale);
    w.shift[c] = float(g * ms + (beta ? beta[c] : 0.0f) - rest * rescale);
  }
}

template <Activation kActivation, bool kHalf>
SGM_INLINE Vec activate(Vec y) {
  const Vec zero{};
  if (kActivation == Activation::relu) return max(zero, y);
  if (kActivation == Activation::elu) {
    const Exp e = exp_parts<kHalf>(max(splat(-87.0f), y));
    return y > zero ? y : fma(e.scale, e.p, e.scale - 1.0f);
  }
  if (kActivation == Activation::silu) {
    // e^88.7 is ∞, and silu(−88.7) then −0, as good as exact.
    const Exp e = exp_parts<kHalf>(max(splat(-87.0f), min(splat(88.7f), -y)));
    return y / (1.0f + e.scale * (1.0f + e.p));
  }
  return y;
}

template <class Type, Activation kActivation>
void apply_planes(const Norm& a, int64_t n, int64_t begin, int64_t end) {
  using Element = typename Type::Element;
  const Workspace w(a, n);
  for (int64_t c = begin; c < end; ++c) {
    const int64_t offset = (n * a.channels + c) * a.pixels;
    const Element* x = (const Element*)(a.residual ? a.total : a.x) + offset;
    Element* y = (Element*)a.y + offset;
    const Vec mean = splat(w.mean[c]), scale = splat(w.scale[c]), shift = splat(w.shift[c]);
    for_each_vector(a.pixels, [&](int64_t i, auto lanes, int) {
      const Vec v = fma(load<Type>(x + i, lanes) - mean, scale, shift);
      store<Type>(y + i, activate<kActivation, Type::kHalf>(v), lanes);
    });
  }
}

template <class Type, Activation kActivation>
void apply_rows(const Norm& a, int64_t n, int64_t begin, int64_t end) {
  using Element = typename Type::Element;
  const Workspace w(a, n);
  const int64_t channels = a.channels, offset = n * channels * a.pixels;
  const Element* x = (const Element*)(a.residual ? a.total : a.x) + offset;
  Element* y = (Element*)a.y + offset;
  for (int64_t p = 0; p < a.pixels; ++p) {
    auto column = [&](int64_t c, auto lanes) __attribute__((always_inline)) {
      const int64_t at = p * channels + c;
      const Vec mean = load(w.mean + c), scale = load(w.scale + c), shift = load(w.shift + c);
      const Vec v = fma(load<Type>(x + at, lanes) - mean, scale, shift);
      store<Type>(y + at, activate<kActivation, Type::kHalf>(v), lanes);
    };
    int64_t c = begin;
    for (; c + kWidth <= end; c += kWidth) column(c, All{});
    if (c < end) column(c, First{int(end - c)});
  }
}

template <class Type>
void statistics_of(const Norm& a, int64_t n, int64_t begin, int64_t end) {
  if (a.channels_last)
    return a.residual ? statistics_rows<Type, true>(a, n, begin, end) : statistics_rows<Type, false>(a, n, begin, end);
  a.residual ? statistics_planes<Type, true>(a, n, begin, end) : statistics_planes<Type, false>(a, n, begin, end);
}

template <class Type, Activation kActivation>
void apply_activation(const Norm& a, int64_t n, int64_t begin, int64_t end) {
  (a.channels_last ? apply_rows<Type, kActivation> : apply_planes<Type, kActivation>)(a, n, begin, end);
}

template <class Type>
void apply_of(const Norm& a, int64_t n, int64_t begin, int64_t end) {
  fold(a, n, begin, end);
  switch (a.activation) {
    case Activation::none: return apply_activation<Type, Activation::none>(a, n, begin, end);
    case Activation::elu: return apply_activation<Type, Activation::elu>(a, n, begin, end);
    case Activation::relu: return apply_activation<Type, Activation::relu>(a, n, begin, end);
    case Activation::silu: return apply_activation<Type, Activation::silu>(a, n, begin, end);
  }
}

}  // namespace

// Chan's formula for parts of equal count. In double, like fold.
void norm_merge(const Norm& a, int64_t n) {
  const Workspace w(a, n);
  const int64_t size = a.channels / a.groups;
  for (int64_t first = 0; first < a.channels; first += size) {
    const auto mean_of = [&](int64_t i) { return w.mean[first + i] + double(w.rest[first + i]); };
    const double mean = sum_over(size, mean_of) / size;
    const double between = sum_over(size, [&](int64_t i) { return (mean_of(i) - mean) * (mean_of(i) - mean); });
    const double within = sum_over(size, [&](int64_t i) { return double(w.scale[first + i]); });
    const double square = (within + between * a.pixels) / size;
    for (int64_t c = first; c < first + size; ++c) {
      w.mean[c] = float(mean);
      w.rest[c] = float(mean - w.mean[c]);
      w.scale[c] = float(square);
    }
  }
}

void norm_statistics(const Norm& a, int64_t n, int64_t begin, int64_t end) {
  SGM_BY_TYPE(norm_statistics, statistics_of, a, n, begin, end);
}

void norm_apply(const Norm& a, int64_t n, int64_t begin, int64_t end) { SGM_BY_TYPE(norm_apply, apply_of, a, n, begin, end); }

}  // namespace sgm::SGM_ISA
