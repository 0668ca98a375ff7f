// How a sample is cut into pieces, by the memory layouts involved. Noise comes in quads of elements that are consecutive
// in [C, H, W] order, so the cheap order of work depends on the layout.
#pragma once

#include <cstdint>

#include "update.h"

namespace sgm {

constexpr int kBlock = 256;        // quads made at once: 4 KiB of noise
constexpr int kTilePixels = 256;   // of a tile, in one channel
constexpr int kFine = kTilePixels;  // elements of a flat piece when inpainting: few are both known and not, which takes two noises
constexpr int64_t kGrain = 8192;   // elements a thread takes at a time, about

enum class Order {
  flat,   // memory is in [C, H, W] order: a piece is `run` consecutive elements
  quads,  // all tensors NHWC, H·W a multiple of 4, many channels: a piece is 4 pixels, all their channels
  tiles,  // anything else: a piece is up to kTilePixels pixels of one channel, elements gathered one by one
};

struct Cut {
  Order order;
  int64_t per_sample, grain, run;
};

inline Cut cut(const Shape& s, bool any_nhwc, bool any_nchw, bool fine = false) {
  const auto grain = [](int64_t elements) { return elements < kGrain ? kGrain / elements : 1; };
  const int64_t run = fine ? kFine : 4 * kBlock;
  if (s.sample() == 0) return {Order::flat, 0, 1, run};
  if (!any_nhwc || s.channels == 1 || s.pixels == 1) return {Order::flat, (s.sample() + run - 1) / run, grain(run), run};
  if (!any_nchw && !fine && s.pixels % 4 == 0 && s.channels >= 16) return {Order::quads, s.pixels / 4, grain(4 * s.channels), run};
  const int64_t width = s.pixels < kTilePixels ? s.pixels : kTilePixels;
  return {Order::tiles, s.channels * ((s.pixels + kTilePixels - 1) / kTilePixels), grain(width), run};
}

inline Cut cut(const Update& u) {
  const bool p = u.previous, pn = p && u.previous_nhwc, pc = p && !u.previous_nhwc;
  return cut(u.shape, u.x_nhwc || u.score_nhwc || u.out_nhwc || pn, !u.x_nhwc || !u.score_nhwc || !u.out_nhwc || pc, u.known);
}

inline Cut cut(const NoiseFill& f) { return cut(f.shape, f.nhwc, !f.nhwc); }

}  // namespace sgm
