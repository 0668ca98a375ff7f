// The noise generator, for CPU and CUDA: docs/noise.md is its specification, kernels/noise.py its definition in NumPy.
// Philox4x32-10 and a Box–Muller transform made of exactly rounded operations, so that every build gives the same bits.
// Compile with -ffp-contract=off: a product fused into a sum would change them. (The device code cannot be fused.)
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define SGM_HD static __host__ __device__ __forceinline__
#else
#define SGM_HD static inline __attribute__((always_inline))
#endif

namespace sgm {

#if defined(__CUDA_ARCH__)
SGM_HD float mul(float a, float b) { return __fmul_rn(a, b); }
SGM_HD float add(float a, float b) { return __fadd_rn(a, b); }
SGM_HD float root(float a) { return __fsqrt_rn(a); }
SGM_HD float from_bits(uint32_t u) { return __uint_as_float(u); }
SGM_HD uint32_t to_bits(float f) { return __float_as_uint(f); }
#else
SGM_HD float mul(float a, float b) { return a * b; }
SGM_HD float add(float a, float b) { return a + b; }
SGM_HD float root(float a) { return std::sqrt(a); }
SGM_HD float from_bits(uint32_t u) { float f; std::memcpy(&f, &u, 4); return f; }
SGM_HD uint32_t to_bits(float f) { uint32_t u; std::memcpy(&u, &f, 4); return u; }
#endif
SGM_HD float mul_add(float a, float b, float c) { return add(mul(a, b), c); }  // two roundings

struct Words {
  uint32_t w0, w1, w2, w3;
};

constexpr uint32_t kPhiloxM0 = 0xD2511F53u, kPhiloxM1 = 0xCD9E8D57u;  // multipliers (Salmon et al., SC 2011)
constexpr uint32_t kPhiloxW0 = 0x9E3779B9u, kPhiloxW1 = 0xBB67AE85u;  // key increments

SGM_HD Words philox4x32(Words c, uint32_t k0, uint32_t k1) {
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = static_cast<uint64_t>(kPhiloxM0) * c.w0;
    const uint64_t p1 = static_cast<uint64_t>(kPhiloxM1) * c.w2;
    c = {static_cast<uint32_t>(p1 >> 32) ^ c.w1 ^ k0, static_cast<uint32_t>(p1),
         static_cast<uint32_t>(p0 >> 32) ^ c.w3 ^ k1, static_cast<uint32_t>(p0)};
    k0 += kPhiloxW0;
    k1 += kPhiloxW1;
  }
  return c;
}

constexpr uint32_t kSampleStream = 0, kInpaintStream = 0x01000000u;  // STREAM of kernels/noise.py

// What the words of one draw of one sample depend on, besides element / 4.
struct Draw {
  uint32_t k0, k1;      // seed
  uint32_t c1, c2, c3;  // draw, sample id low, sample id high ^ stream
};

SGM_HD Draw make_draw(int64_t seed, int64_t sample_id, uint32_t draw, uint32_t stream) {
  const uint64_t key = static_cast<uint64_t>(seed), id = static_cast<uint64_t>(sample_id);
  return {static_cast<uint32_t>(key), static_cast<uint32_t>(key >> 32), draw, static_cast<uint32_t>(id),
          static_cast<uint32_t>(id >> 32) ^ stream};
}

SGM_HD Words words(const Draw& d, uint32_t quad) {  // quad = element / 4
  return philox4x32({quad, d.c1, d.c2, d.c3}, d.k0, d.k1);
}

// [0, 1), a multiple of 2^-24
SGM_HD float uniform(uint32_t w) { return mul(static_cast<float>(static_cast<int32_t>(w >> 8)), 0x1p-24f); }

// −2·ln(u), u = (k + 1)·2^-24, k < 2^24. Cephes logf: u = m·2^e with m in [√½, √2), a polynomial in m − 1.
SGM_HD float neg2log(uint32_t k) {
  const uint32_t i = to_bits(static_cast<float>(static_cast<int32_t>(k + 1))) - 0x3F3504F3u;  // minus the bits of √½
  const float e = static_cast<float>((static_cast<int32_t>(i) >> 23) - 24);
  const float f = add(from_bits((i & 0x7FFFFFu) + 0x3F3504F3u), -1.0f);
  const float z = mul(f, f);
  float p = 7.0376836292e-2f;
  p = mul_add(p, f, -1.1514610310e-1f);
  p = mul_add(p, f, 1.1676998740e-1f);
  p = mul_add(p, f, -1.2420140846e-1f);
  p = mul_add(p, f, 1.4249322787e-1f);
  p = mul_add(p, f, -1.6668057665e-1f);
  p = mul_add(p, f, 2.0000714765e-1f);
  p = mul_add(p, f, -2.4999993993e-1f);
  p = mul_add(p, f, 3.3333331174e-1f);
  float y = mul(mul(f, z), p);
  y = mul_add(e, -2.12194440e-4f, y);  // ln 2 = 0.693359375 − 2.12194440e-4
  y = mul_add(z, -0.5f, y);
  return mul(-2.0f, mul_add(e, 0.693359375f, add(f, y)));
}

// cos and sin of 2π·w/2^32: quadrant q and remainder in [−π/4, π/4) from the bits, Cephes polynomials.
SGM_HD void cos_sin(uint32_t w, float& cosine, float& sine) {
  const uint32_t q = (w + 0x20000000u) >> 30;
  const int32_t r = static_cast<int32_t>(w - (q << 30));                     // [−2^29, 2^29)
  const float x = mul(static_cast<float>(r >> 5), 4.6813380050e-08f);        // 2π/2^27
  const float z = mul(x, x);
  float s = -1.9515295891e-4f;
  s = mul_add(s, z, 8.3321608736e-3f);
  s = mul_add(s, z, -1.6666654611e-1f);
  s = mul_add(s, mul(z, x), x);
  float c = 2.443315711809948e-5f;
  c = mul_add(c, z, -1.388731625493765e-3f);
  c = mul_add(c, z, 4.166664568298827e-2f);
  c = mul_add(c, mul(z, z), mul_add(z, -0.5f, 1.0f));
  const bool odd = q & 1;
  cosine = from_bits(to_bits(odd ? s : c) ^ (((q + 1) & 2) << 30));
  sine = from_bits(to_bits(odd ? c : s) ^ ((q & 2) << 30));
}

// Box–Muller on a pair of words.
SGM_HD void normal2(uint32_t w0, uint32_t w1, float& z0, float& z1) {
  const float r = root(neg2log(w0 >> 8));
  float c, s;
  cos_sin(w1, c, s);
  z0 = mul(r, c);
  z1 = mul(r, s);
}

}  // namespace sgm
