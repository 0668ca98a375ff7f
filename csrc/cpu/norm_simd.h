// float32 vectors of the instruction set this file is compiled for, on GCC/Clang vector extensions: any target that has
// them, SSE2 to AVX-512 and Arm, shares one source. Include inside the namespace of the instruction set.
// Intrinsics appear only where the extensions have no word for it: fma, f16 and bf16 conversion.
//
// No #pragma once: included once per namespace. The includer has <cstdint>, <cstring>, <utility>; x86: <immintrin.h>.

#if defined(__AVX512F__)
constexpr int kWidth = 16;
#elif defined(__AVX2__)
constexpr int kWidth = 8;
#else
constexpr int kWidth = 4;
#endif

typedef float Vec __attribute__((vector_size(4 * kWidth)));
typedef int32_t VecInt __attribute__((vector_size(4 * kWidth)));
typedef uint32_t VecBits __attribute__((vector_size(4 * kWidth)));
typedef uint16_t VecHalf __attribute__((vector_size(2 * kWidth)));

#define SGM_INLINE static inline __attribute__((always_inline))

SGM_INLINE Vec splat(float v) { return Vec{} + v; }
SGM_INLINE Vec fma(Vec a, Vec b, Vec c) {
#if defined(__AVX512F__)
  return (Vec)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
  return (Vec)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__aarch64__)
  return (Vec)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
  return a * b + c;
#endif
}

// The second argument where either is NaN; GCC 12 does not see these in a > b ? a : b for AVX-512.
SGM_INLINE Vec max(Vec a, Vec b) {
#if defined(__AVX512F__)
  return (Vec)_mm512_maskz_max_ps(0xffff, (__m512)a, (__m512)b);
#else
  return a > b ? a : b;
#endif
}
SGM_INLINE Vec min(Vec a, Vec b) {
#if defined(__AVX512F__)
  return (Vec)_mm512_maskz_min_ps(0xffff, (__m512)a, (__m512)b);
#else
  return a < b ? a : b;
#endif
}

template <int kStep, int... kLane>
SGM_INLINE Vec add_lanes(Vec v, std::integer_sequence<int, kLane...>) {
  return v + __builtin_shufflevector(v, v, (kLane ^ kStep)...);
}
SGM_INLINE float sum(Vec v) {  // pairwise over the lanes
  constexpr auto lanes = std::make_integer_sequence<int, kWidth>{};
  if constexpr (kWidth > 8) v = add_lanes<8>(v, lanes);
  if constexpr (kWidth > 4) v = add_lanes<4>(v, lanes);
  v = add_lanes<2>(v, lanes);
  return v[0] + v[1];
}
SGM_INLINE VecInt first_lanes(int64_t count) {  // −1 in lanes 0 … count−1, else 0
  VecInt lane;
  for (int i = 0; i < kWidth; ++i) lane[i] = i;
  return lane < int32_t(count < kWidth ? count : kWidth);
}

SGM_INLINE VecBits zero_extend(VecHalf v) {  // GCC 12 makes five instructions of the convertvector
#if defined(__AVX512F__)
  return (VecBits)_mm512_maskz_cvtepu16_epi32(0xffff, (__m256i)v);
#elif defined(__AVX2__)
  return (VecBits)_mm256_cvtepu16_epi32((__m128i)v);
#else
  return __builtin_convertvector(v, VecBits);
#endif
}

// Element types: Raw is what kWidth elements look like in memory; widen and narrow (round to nearest even) are
// IEEE conversions, and NaN stays NaN.
struct Float32 {
  using Element = float;
  using Raw = Vec;
  static constexpr bool kHalf = false;
  SGM_INLINE Vec widen(Raw v) { return v; }
  SGM_INLINE Raw narrow(Vec v) { return v; }
};

struct BFloat16 {
  using Element = uint16_t;
  using Raw = VecHalf;
  static constexpr bool kHalf = true;
  SGM_INLINE Vec widen(Raw v) { return (Vec)(zero_extend(v) << 16); }
  SGM_INLINE Raw narrow(Vec v) {
#if defined(__AVX512BF16__)  // flushes denormals (below 1.2e-38) to 0, the one difference from the code below
    return (Raw)_mm512_cvtneps_pbh((__m512)v);
#else
    VecBits bits = (VecBits)v;
    VecBits rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
    return __builtin_convertvector((v == v ? rounded : bits | 0x400000u) >> 16, VecHalf);
#endif
  }
};

struct Float16 {
  using Element = uint16_t;
  using Raw = VecHalf;
  static constexpr bool kHalf = true;
  SGM_INLINE Vec widen(Raw v) {
#if defined(__AVX512F__)
    return (Vec)_mm512_maskz_cvtph_ps(0xffff, (__m256i)v);
#elif defined(__F16C__)
    return (Vec)_mm256_cvtph_ps((__m128i)v);
#else
    VecBits wide = zero_extend(v);
    VecBits magnitude = (wide & 0x7fffu) << 13;
    Vec scaled = (Vec)magnitude * 0x1p112f;  // re-biases the exponent, denormals included
    VecBits finite = (VecBits)scaled, special = magnitude | 0x7f800000u;
    return (Vec)((magnitude >= 0x0f800000u ? special : finite) | (wide & 0x8000u) << 16);
#endif
  }
  SGM_INLINE Raw narrow(Vec v) {
#if defined(__AVX512F__)
    return (Raw)_mm512_maskz_cvtps_ph(0xffff, (__m512)v, _MM_FROUND_TO_NEAREST_INT);
#elif defined(__F16C__)
    return (Raw)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT);
#else
    VecBits bits = (VecBits)v, magnitude = bits & 0x7fffffffu;
    VecBits normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
    VecBits denormal = (VecBits)((Vec)magnitude + 0.5f) - 0x3f000000u;  // the addition rounds at 2^-24
    VecBits result = magnitude < 0x38800000u ? denormal : normal;
    result = magnitude >= 0x47800000u ? VecBits{} + 0x7c00u : result;
    result = magnitude > 0x7f800000u ? VecBits{} + 0x7e00u : result;
    return __builtin_convertvector(result | ((bits >> 16) & 0x8000u), VecHalf);
#endif
  }
};

// Memory: a whole vector, or its first lanes: what is not loaded reads as 0, what is not stored stays untouched.
struct All {};
struct First {
  int count;
};
template <class Type>
SGM_INLINE Vec load(const typename Type::Element* p, All = {}) {
  typename Type::Raw raw;
  memcpy(&raw, p, sizeof raw);
  return Type::widen(raw);
}
template <class Type>
SGM_INLINE Vec load(const typename Type::Element* p, First lanes) {
  typename Type::Raw raw{};
  memcpy(&raw, p, lanes.count * sizeof *p);
  return Type::widen(raw);
}
template <class Type>
SGM_INLINE void store(typename Type::Element* p, Vec v, All = {}) {
  typename Type::Raw raw = Type::narrow(v);
  memcpy(p, &raw, sizeof raw);
}
template <class Type>
SGM_INLINE void store(typename Type::Element* p, Vec v, First lanes) {
  typename Type::Raw raw = Type::narrow(v);
  memcpy(p, &raw, lanes.count * sizeof *p);
}
SGM_INLINE Vec load(const float* p) { return load<Float32>(p); }
SGM_INLINE void store(float* p, Vec v) { store<Float32>(p, v); }

// e^x = 2^n·(1 + p) with n = round(x / ln 2), r = x − n·ln 2, |r| ≤ 0.35, p = e^r − 1 = r + r²·q(r): exact to the last
// place near 0. q is a minimax fit of the relative error of p: 1.4e-8, or 2.1e-5 where the result is rounded to 16 bits.
// NaN stays NaN; x must lie in [−87, 88.7].
struct Exp {
  Vec scale, p;
};
template <bool kHalf>
SGM_INLINE Exp exp_parts(Vec x) {
  const float shift = 12582912.0f + 127.0f;  // 1.5·2^23 rounds to an integer in the low bits; 127: exponent bias
  Vec shifted = fma(x, splat(1.44269504f), splat(shift));
  const Vec n = shifted - shift;
#if defined(__FMA__) || defined(__aarch64__)
  const Vec r = fma(n, splat(-0.693147181f), x);
#else  // n·0.693359375 is exact
  const Vec r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
#endif
  Vec q;
  if (kHalf) {
    q = fma(splat(0.0416099578f), r, splat(0.167497113f));
    q = fma(q, r, splat(0.500016570f));
  } else {
    q = fma(splat(0.00138825166f), r, splat(0.00836654752f));
    q = fma(q, r, splat(0.0416672006f));
    q = fma(q, r, splat(0.166665435f));
    q = fma(q, r, splat(0.499999970f));
  }
  return {(Vec)((VecBits)shifted << 23), fma(q, r * r, r)};
}

// f(i, lanes, j) for a run of n elements, four vectors (j = 0 … 3) at a time, then single ones.
template <class F>
SGM_INLINE void for_each_vector(int64_t n, F f) {
  int64_t i = 0;
  for (; i + 4 * kWidth <= n; i += 4 * kWidth)
    for (int j = 0; j < 4; ++j) f(i + j * kWidth, All{}, j);
  for (; i + kWidth <= n; i += kWidth) f(i, All{}, 0);
  if (i < n) f(i, First{int(n - i)}, 1);
}

SGM_INLINE Vec keep(Vec v, All) { return v; }
SGM_INLINE Vec keep(Vec v, First lanes) { return first_lanes(lanes.count) ? v : Vec{}; }

// Returns of<type of a>(a, …). AVX512_BF16 is of use to bfloat16 alone: ``function`` of avx512 serves the others there.
#if defined(SGM_AVX512_BF16)
#define SGM_BY_TYPE(function, of, a, ...)                                                        \
  if ((a).dtype != Dtype::bfloat16) return ::sgm::avx512::function(a, __VA_ARGS__); \
  return of<BFloat16>(a, __VA_ARGS__)
#else
#define SGM_BY_TYPE(function, of, a, ...)                         \
  switch ((a).dtype) {                                            \
    case Dtype::float32: return of<Float32>(a, __VA_ARGS__);      \
    case Dtype::bfloat16: return of<BFloat16>(a, __VA_ARGS__);    \
    case Dtype::float16: return of<Float16>(a, __VA_ARGS__);      \
  }
#endif
