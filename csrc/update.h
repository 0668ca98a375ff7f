// The Langevin update and the noise that fills a tensor, on raw pointers.
#pragma once

#include <cstdint>

#include "dtype.h"
#include "isa.h"

namespace sgm {

constexpr int64_t kNoBadRow = INT64_MAX;

enum class Kind : int { normal = 0, uniform = 1 };

struct Shape {
  int64_t batch, channels, pixels;  // pixels = H·W
  int64_t sample() const { return channels * pixels; }
};

// Every tensor is dense, [B, C, H, W] in memory (nhwc = false) or [B, H, W, C] (nhwc = true).
struct NoiseFill {
  Shape shape;
  float* out;
  bool nhwc;
  const int64_t *seed, *sample_id;  // [B]
  uint32_t draw, stream;
  Kind kind;
};

// t = a·x; t += b·score; t += c·z; t += d·previous: every product and every sum rounded to float32, terms whose
// coefficient c or d is 0 left out. z is the normal noise of (seed, sample id, draw, stream 0). Where there is a gain,
// b is (b·gain)·gain and c is c·gain. Then previous = e·x, += f·score, of the old x, unless keep is null or e = f = 0.
// Inpainting: where known is no NaN, out is not t but what the next row's network sees there, known + known_sigma·z with
// z of (known_draw, stream inpaint); known itself, as in the samples, after a row whose known_sigma is 0.
struct Update {
  Shape shape;
  const float* x;
  bool x_nhwc;
  const void* score;  // of score_dtype
  bool score_nhwc;
  Dtype score_dtype;
  float* previous;  // or null, if d, e and f are 0 in every live row
  bool previous_nhwc;
  float* out;  // may be x, if of the same layout
  bool out_nhwc;
  const float* coef;        // [rows, 4]: a, b, c, d
  const int32_t* draw;      // [rows], uint32 bits
  int64_t rows;
  const int64_t* row;       // [B]
  const int64_t* stop;      // [B]: a slot with row >= stop is idle, nothing of it is read or written; or null: none is
  const int64_t *seed, *sample_id;  // [B]
  int64_t* bad_row;         // [B]: lowered to the row whose result was not finite; or null
  const float* keep;        // [rows, 2]: e, f; or null
  const float* gain;        // [B], or null
  const float* known;       // as out lies in memory, NaN where a pixel is not known; or null
  const float* known_sigma;   // [rows]
  const int32_t* known_draw;  // [rows], uint32 bits
};

// Throws std::invalid_argument unless 0 <= id < 2^56: higher bits would be those of the stream.
void check_sample_id(int64_t index, int64_t id);

// Throws std::out_of_range if a live slot's row is not in [0, rows), std::invalid_argument if its d, e or f asks for a
// previous that is null or its sample id is none; nothing is written then.
void langevin_update(const Update& update);
void advance_rows(int64_t batch, int64_t* row, const int64_t* stop);  // live slots: row += 1
void noise_fill(const NoiseFill& fill);

// A sample's work comes in pieces; pieces of all samples are numbered through: sample = piece / pieces_per_sample.
int64_t update_pieces(const Update& update);
int64_t noise_pieces(const NoiseFill& fill);
SGM_DECLARE_UP_TO_AVX512(void, update_range, (const Update& update, int64_t begin, int64_t end))
SGM_DECLARE_UP_TO_AVX512(void, noise_range, (const NoiseFill& fill, int64_t begin, int64_t end))

// n counters and keys, planes [4, n] and [2, n], to words [4, n]; for tests.
SGM_DECLARE_UP_TO_AVX512(void, philox_range, (const uint32_t* counter, const uint32_t* key, uint32_t* words, int64_t n))

}  // namespace sgm
