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

inline bool is_known(float v) { return v == v; }

inline int count_known(int n, const float* known) {
  int count = 0;
  for (int i = 0; i < n; ++i) count += is_known(known[i]);
  return count;
}

// out[i] ← known[i] + sigma·z[i] where that is known; sigma 0: known[i]. Returns the largest |out[i]|, as step does.
template <bool kNoise>
inline int32_t impose(float sigma, int n, const float* known, const float* z, float* out) {
  int32_t largest = 0;
  SGM_INDEPENDENT
  for (int i = 0; i < n; ++i) {
    float t = known[i];
    if (kNoise) t = mul_add(sigma, z[i], t);
    t = is_known(known[i]) ? t : out[i];
    out[i] = t;
    largest = std::max(largest, static_cast<int32_t>(to_bits(t) & 0x7FFFFFFFu));
  }
  return largest;
}

inline void lower(int64_t* target, int64_t value) {
  int64_t seen = __atomic_load_n(target, __ATOMIC_RELAXED);
  while (value < seen && !__atomic_compare_exchange_n(target, &seen, value, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
  }
}

// What is done with a run of one sample's elements and their noise, noise(draw): fill_noise writes it, the update uses it.
struct Fill {
  const NoiseFill& f;
  int64_t sample = 0;  // offset of the sample
  Draw draw{};

  void begin(int64_t slot) {
    sample = slot * f.shape.sample();
    draw = make_draw(f.seed[slot], f.sample_id[slot], f.draw, f.stream);
  }
  bool live(int64_t) const { return true; }
  bool noisy() const { return true; }
  Kind kind() const { return f.kind; }

  template <class Noise>
  void run(int64_t offset, int n, const Noise& noise) {
    const float* z = noise(draw);
    std::copy(z, z + n, f.out + sample + offset);
  }
  template <class Noise>
  void pixels(int64_t channel, int64_t pixel, int n, const Noise& noise) {
    const float* z = noise(draw);
    float* out = f.out + sample + (f.nhwc ? pixel * f.shape.channels + channel : channel * f.shape.pixels + pixel);
    const int64_t stride = f.nhwc ? f.shape.channels : 1;
    for (int i = 0; i < n; ++i) out[i * stride] = z[i];
  }
};

struct Step {
  const Update& u;
  int64_t slot = 0, sample = 0;
  Row k{};
  float sigma = 0;  // of known pixels
  Draw draw{}, known_draw{};

  void begin(int64_t slot_) {
    slot = slot_, sample = slot * u.shape.sample();
    const float* c = u.coef + 4 * u.row[slot];
    const float* e = u.keep ? u.keep + 2 * u.row[slot] : nullptr;
    k = {c[0], c[1], c[2], c[3], e ? e[0] : 0, e ? e[1] : 0};
    if (u.gain) k.b = mul(mul(k.b, u.gain[slot]), u.gain[slot]), k.c = mul(k.c, u.gain[slot]);
    const auto of = [&](const int32_t* draws, uint32_t stream) {
      return make_draw(u.seed[slot], u.sample_id[slot], static_cast<uint32_t>(draws[u.row[slot]]), stream);
    };
    draw = of(u.draw, kSampleStream);
    if (u.known) sigma = u.known_sigma[u.row[slot]], known_draw = of(u.known_draw, kInpaintStream);
  }
  bool live(int64_t b) const { return !u.stop || u.row[b] < u.stop[b]; }
  bool noisy() const { return k.c != 0; }
  Kind kind() const { return Kind::normal; }

  float* previous() const { return k.d != 0 ? u.previous : nullptr; }

  void finish(int32_t largest) {
    if (largest >= 0x7F800000 && u.bad_row) lower(u.bad_row + slot, u.row[slot]);
  }

  template <class Noise>
  int32_t advance(int n, const float* x, const float* s, const float* p, float* out, const Noise& noise) const {
    return step(k, n, x, s, k.c != 0 ? noise(draw) : nullptr, p, out);
  }

  // Inpainting. Where all is known the row is not needed, where nothing is, neither is the noise of known pixels. Not
  // inlined, so that the loops of a plain update compile as without it.
  template <class Noise>
  __attribute__((noinline)) int32_t advance(int n, const float* x, const float* s, const float* p, const float* known, int64_t stride,
                                            float* out, const Noise& noise) const {  // n <= kTilePixels
    alignas(64) float gathered[kTilePixels];
    if (stride != 1) load(known, Dtype::float32, 0, stride, n, gathered), known = gathered;
    const int held = count_known(n, known);
    const int32_t largest = held < n ? advance(n, x, s, p, out, noise) : 0;
    if (held == 0) return largest;
    return sigma != 0 ? impose<true>(sigma, n, known, noise(known_draw), out) : impose<false>(0, n, known, nullptr, out);
  }

  template <class Noise>
  void run(int64_t offset, int n, const Noise& noise) {  // n <= 4·kBlock
    offset += sample;
    alignas(64) float converted[4 * kBlock];
    const float* s = static_cast<const float*>(u.score) + offset;
    if (u.score_dtype != Dtype::float32) load(u.score, u.score_dtype, offset, 1, n, converted), s = converted;
    const float* p = previous();
    alignas(64) float kept[4 * kBlock];
    if (k.keeps()) keep(k, n, u.x + offset, s, kept);  // before out, which may be x, is written
    p = p ? p + offset : nullptr;
    finish(u.known ? advance(n, u.x + offset, s, p, u.known + offset, 1, u.out + offset, noise)
                   : advance(n, u.x + offset, s, p, u.out + offset, noise));
    if (k.keeps()) std::copy(kept, kept + n, u.previous + offset);
  }

  template <class Noise>
  void pixels(int64_t channel, int64_t pixel, int n, const Noise& noise) {  // n <= kTilePixels
    const auto at = [&](bool nhwc) { return sample + (nhwc ? pixel * u.shape.channels + channel : channel * u.shape.pixels + pixel); };
    const auto stride = [&](bool nhwc) { return nhwc ? u.shape.channels : int64_t{1}; };
    alignas(64) float x[kTilePixels], s[kTilePixels], p[kTilePixels], out[kTilePixels];
    load(u.x, Dtype::float32, at(u.x_nhwc), stride(u.x_nhwc), n, x);
    load(u.score, u.score_dtype, at(u.score_nhwc), stride(u.score_nhwc), n, s);
    if (previous()) load(u.previous, Dtype::float32, at(u.previous_nhwc), stride(u.previous_nhwc), n, p);
    const float* before = previous() ? p : nullptr;
    finish(u.known ? advance(n, x, s, before, u.known + at(u.out_nhwc), stride(u.out_nhwc), out, noise) : advance(n, x, s, before, out, noise));
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
    action.begin(slot);
    for (; piece < last; ++piece) {
      const int64_t i = piece - slot * cut.per_sample;
      if (cut.order == Order::flat) {
        const int64_t first = i * cut.run;
        const int n = static_cast<int>(std::min(cut.run, shape.sample() - first));
        action.run(first, n, [&](const Draw& draw) {
          noise_flat(draw, action.kind(), static_cast<uint32_t>(first / 4), (n + 3) / 4, z);
          return z;
        });
      } else if (cut.order == Order::quads) {
        const int64_t stride = shape.pixels / 4;
        for (int64_t c = 0; c < shape.channels; c += kBlock) {
          const int n = static_cast<int>(std::min<int64_t>(kBlock, shape.channels - c));
          if (action.noisy())
            noise_planes(action.draw, action.kind(), static_cast<uint32_t>(c * stride + i), static_cast<uint32_t>(stride), n, z);
          for (int j = 0; j < 4; ++j) action.run((4 * i + j) * shape.channels + c, n, [&](const Draw&) { return z + j * kBlock; });
        }
      } else {
        const int64_t tiles = (shape.pixels + kTilePixels - 1) / kTilePixels;
        const int64_t channel = i / tiles, pixel = i % tiles * kTilePixels, element = channel * shape.pixels + pixel;
        const int n = static_cast<int>(std::min<int64_t>(kTilePixels, shape.pixels - pixel)), skip = static_cast<int>(element % 4);
        action.pixels(channel, pixel, n, [&](const Draw& draw) {
          noise_flat(draw, action.kind(), static_cast<uint32_t>(element / 4), (skip + n + 3) / 4, z);
          return z + skip;
        });
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
