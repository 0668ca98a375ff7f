#include <algorithm>

#include "cpu/noise_block.h"
#include "cpu/pieces.h"
#include "update.h"

#if defined(__F16C__)
#include <immintrin.h>
#endif

namespace sgm::SGM_ISA {
namespace {

// Distinct rows of one loop never overlap, though out may be x itself.
#if defined(__clang__)
#define SGM_INDEPENDENT _Pragma("clang loop vectorize(assume_safety)")
#else
#define SGM_INDEPENDENT _Pragma("GCC ivdep")
#endif

inline float from_bf16(uint16_t h) { return from_bits(static_cast<uint32_t>(h) << 16); }

inline float from_f16(uint16_t h) {  // exact, without float16 instructions
  const uint32_t magnitude = (h & 0x7FFFu) << 13, sign = (h & 0x8000u) << 16;
  const float subnormal = from_bits(magnitude + (113u << 23)) - 0x1p-14f;
  const uint32_t rebias = magnitude >= (31u << 23) ? 224u << 23 : 112u << 23;  // infinity and NaN, or normal
  return from_bits((magnitude < (1u << 23) ? to_bits(subnormal) : magnitude + rebias) | sign);
}

// n values from a tensor of some dtype at offset, offset + stride, …
inline void load(const void* data, Dtype dtype, int64_t offset, int64_t stride, int n, float* __restrict to) {
  const float* f = static_cast<const float*>(data) + offset;
  const uint16_t* h = static_cast<const uint16_t*>(data) + offset;
  if (dtype == Dtype::float32) {
    for (int i = 0; i < n; ++i) to[i] = f[i * stride];
  } else if (dtype == Dtype::bfloat16) {
    if (stride == 1) for (int i = 0; i < n; ++i) to[i] = from_bf16(h[i]);
    else for (int i = 0; i < n; ++i) to[i] = from_bf16(h[i * stride]);
  } else {
    int i = 0;
#if defined(__F16C__)
    if (stride == 1)
      for (; i + 8 <= n; i += 8) _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(h + i))));
#endif
    for (; i < n; ++i) to[i] = from_f16(h[i * stride]);
  }
}

struct Row {
  float a, b, c, d, e, f;
  bool keeps() const { return e != 0 || f != 0; }
};

// out[i] for i in [0, n); returns the largest |out[i]| as bits, so that >= 0x7F800000 means "not finite".
template <bool kNoise, bool kPrevious>
inline int32_t step(Row k, int n, const float* x, const float* s, const float* z, const float* previous, float* out) {
  int32_t largest = 0;
  SGM_INDEPENDENT
  for (int i = 0; i < n; ++i) {
    float t = mul_add(k.b, s[i], mul(k.a, x[i]));
    if (kNoise) t = mul_add(k.c, z[i], t);
    if (kPrevious) t = mul_add(k.d, previous[i], t);
    out[i] = t;
    largest = std::max(largest, static_cast<int32_t>(to_bits(t) & 0x7FFFFFFFu));
  }
  return largest;
}

inline int32_t step(Row k, int n, const float* x, const float* s, const float* z, const float* previous, float* out) {
  if (k.c != 0 && previous) return step<true, true>(k, n, x, s, z, previous, out);
  if (k.c != 0) return step<true, false>(k, n, x, s, z, previous, out);
  if (previous) return step<false, true>(k, n, x, s, z, previous, out);
  return step<false, false>(k, n, x, s, z, previous, out);
}

inline void keep(Row k, int n, const float* x, const float* s, float* out) {
  SGM_INDEPENDENT
  for (int i = 0; i < n; ++i) out[i] = mul_add(k.f, s[i], mul(k.e, x[i]));
}

inline void lower(int64_t* target, int64_t value) {
  int64_t seen = __atomic_load_n(target, __ATOMIC_RELAXED);
  while (value < seen && !__atomic_compare_exchange_n(target, &seen, value, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
  }
}

// What is done with a run of one sample's elements and their noise: fill_noise writes it, the update uses it.
struct Fill {
  const NoiseFill& f;
  int64_t sample = 0;  // offset of the sample

  Draw begin(int64_t slot) {
    sample = slot * f.shape.sample();
    return make_draw(f.seed[slot], f.sample_id[slot], f.draw, f.stream);
  }
  bool live(int64_t) const { return true; }
  bool noisy() const { return true; }
  Kind kind() const { return f.kind; }

  void run(int64_t offset, int n, const float* z) { std::copy(z, z + n, f.out + sample + offset); }
  void pixels(int64_t channel, int64_t pixel, int n, const float* z) {
    float* out = f.out + sample + (f.nhwc ? pixel * f.shape.channels + channel : channel * f.shape.pixels + pixel);
    const int64_t stride = f.nhwc ? f.shape.channels : 1;
    for (int i = 0; i < n; ++i) out[i * stride] = z[i];
  }
};

struct Step {
  const Update& u;
  int64_t slot = 0, sample = 0;
  Row k{};

  Draw begin(int64_t slot_) {
    slot = slot_, sample = slot * u.shape.sample();
    const float* c = u.coef + 4 * u.row[slot];
    const float* e = u.keep ? u.keep + 2 * u.row[slot] : nullptr;
    k = {c[0], c[1], c[2], c[3], e ? e[0] : 0, e ? e[1] : 0};
    if (u.gain) k.b = mul(mul(k.b, u.gain[slot]), u.gain[slot]), k.c = mul(k.c, u.gain[slot]);
    return make_draw(u.seed[slot], u.sample_id[slot], static_cast<uint32_t>(u.draw[u.row[slot]]), 0);
  }
  bool live(int64_t b) const { return !u.stop || u.row[b] < u.stop[b]; }
  bool noisy() const { return k.c != 0; }
  Kind kind() const { return Kind::normal; }

  void finish(int32_t largest) {
    if (largest >= 0x7F800000 && u.bad_row) lower(u.bad_row + slot, u.row[slot]);
  }
  float* previous() const { return k.d != 0 ? u.previous : nullptr; }

  void run(int64_t offset, int n, const float* z) {  // n <= 4·kBlock
    offset += sample;
    alignas(64) float converted[4 * kBlock];
    const float* s = static_cast<const float*>(u.score) + offset;
    if (u.score_dtype != Dtype::float32) load(u.score, u.score_dtype, offset, 1, n, converted), s = converted;
    const float* p = previous();
    alignas(64) float kept[4 * kBlock];
    if (k.keeps()) keep(k, n, u.x + offset, s, kept);  // before out, which may be x, is written
    finish(step(k, n, u.x + offset, s, z, p ? p + offset : nullptr, u.out + offset));
    if (k.keeps()) std::copy(kept, kept + n, u.previous + offset);
  }

  void pixels(int64_t channel, int64_t pixel, int n, const float* z) {  // n <= kTilePixels
    const auto at = [&](bool nhwc) { return sample + (nhwc ? pixel * u.shape.channels + channel : channel * u.shape.pixels + pixel); };
    const auto stride = [&](bool nhwc) { return nhwc ? u.shape.channels : int64_t{1}; };
    alignas(64) float x[kTilePixels], s[kTilePixels], p[kTilePixels], out[kTilePixels];
    load(u.x, Dtype::float32, at(u.x_nhwc), stride(u.x_nhwc), n, x);
    load(u.score, u.score_dtype, at(u.score_nhwc), stride(u.score_nhwc), n, s);
    if (previous()) load(u.previous, Dtype::float32, at(u.previous_nhwc), stride(u.previous_nhwc), n, p);
    finish(step(k, n, x, s, z, previous() ? p : nullptr, out));
    float* to = u.out + at(u.out_nhwc);
    for (int i = 0; i < n; ++i) to[i * stride(u.out_nhwc)] = out[i];
    if (!k.keeps()) return;
    keep(k, n, x, s, p);
    to = u.previous + at(u.previous_nhwc);
    for (int i = 0; i < n; ++i) to[i * stride(u.previous_nhwc)] = p[i];
  }
};

template <class Action>
void range(const Shape& shape, const Cut& cut, Action action, int64_t begin, int64_t end) {
  alignas(64) float z[4 * kBlock + 16];
  for (int64_t piece = begin; piece < end;) {
    const int64_t slot = piece / cut.per_sample, last = std::min(end, (slot + 1) * cut.per_sample);
    if (!action.live(slot)) {
      piece = last;
      continue;
    }
    const Draw draw = action.begin(slot);
    for (; piece < last; ++piece) {
      const int64_t i = piece - slot * cut.per_sample;
      if (cut.order == Order::flat) {
        const int64_t first = i * kBlock;
        const int n = static_cast<int>(std::min<int64_t>(4 * kBlock, shape.sample() - 4 * first));
        if (action.noisy()) noise_flat(draw, action.kind(), static_cast<uint32_t>(first), (n + 3) / 4, z);
        action.run(4 * first, n, z);
      } else if (cut.order == Order::quads) {
        const int64_t stride = shape.pixels / 4;
        for (int64_t c = 0; c < shape.channels; c += kBlock) {
          const int n = static_cast<int>(std::min<int64_t>(kBlock, shape.channels - c));
          if (action.noisy())
            noise_planes(draw, action.kind(), static_cast<uint32_t>(c * stride + i), static_cast<uint32_t>(stride), n, z);
          for (int j = 0; j < 4; ++j) action.run((4 * i + j) * shape.channels + c, n, z + j * kBlock);
        }
      } else {
        const int64_t tiles = (shape.pixels + kTilePixels - 1) / kTilePixels;
        const int64_t channel = i / tiles, pixel = i % tiles * kTilePixels, element = channel * shape.pixels + pixel;
        const int n = static_cast<int>(std::min<int64_t>(kTilePixels, shape.pixels - pixel)), skip = static_cast<int>(element % 4);
        if (action.noisy()) noise_flat(draw, action.kind(), static_cast<uint32_t>(element / 4), (skip + n + 3) / 4, z);
        action.pixels(channel, pixel, n, z + skip);
      }
    }
  }
}

}  // namespace

void update_range(const Update& u, int64_t begin, int64_t end) { range(u.shape, cut(u), Step{u}, begin, end); }
void noise_range(const NoiseFill& f, int64_t begin, int64_t end) { range(f.shape, cut(f), Fill{f}, begin, end); }

void philox_range(const uint32_t* counter, const uint32_t* key, uint32_t* out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    const Words w = philox4x32({counter[i], counter[n + i], counter[2 * n + i], counter[3 * n + i]}, key[i], key[n + i]);
    out[i] = w.w0, out[n + i] = w.w1, out[2 * n + i] = w.w2, out[3 * n + i] = w.w3;
  }
}

}  // namespace sgm::SGM_ISA
