// How noise_conditioned_norm is cut into blocks: plain C++, no device needed.
#pragma once

#include <algorithm>
#include <cstdint>
#include <initializer_list>

namespace sgm::cuda {

constexpr int kNormThreads = 256;
constexpr int kMaxSharedBytes = 48 * 1024;  // what a kernel gets without asking for more
constexpr int kMaxCluster = 8;              // the largest size that every device with clusters has
constexpr int kPortablePacks = 8;           // packs a thread holds: one access each

constexpr int kMaxSlabs = 64;               // every block of `apply` merges the moments of all the slabs of its sample

// A block's tile: `groups` packs along the channels × `lanes` along the pixels, each thread taking packs `lanes` apart.
struct Tiling {
  int groups, lanes;
  int tile;            // packs along the pixels in one tile
  int tiles;           // tiles along the pixels in one slab, which is a block's work
  int slabs;           // slabs along the pixels
  int channel_blocks;  // tiles along the channels
};

inline int divide_up(int a, int b) { return (a + b - 1) / b; }

// Floats of shared memory that the merging of a tile's moments takes.
constexpr int scratch_floats(int pack_channels) { return 2 * pack_channels * (kNormThreads + 32); }

// vector: elements of a pack, along the channels for NHWC and along the pixels for NCHW.
inline Tiling portable_tiling(int channels, int pixels, int vector, bool nhwc) {
  Tiling t{};
  const int across = nhwc ? channels / vector : channels, along = nhwc ? pixels : pixels / vector;
  t.groups = nhwc ? (across < kNormThreads ? across : kNormThreads) : kNormThreads / 32;
  t.lanes = kNormThreads / t.groups;
  t.tile = t.lanes * kPortablePacks;
  t.tiles = divide_up(along, t.tile * kMaxSlabs);
  t.slabs = divide_up(along, t.tile * t.tiles);
  t.channel_blocks = divide_up(across, t.groups);
  return t;
}

// The most slabs that any width of packs makes: narrow ones split the channels into blocks before they split the pixels.
inline int most_slabs(int channels, int pixels, bool nhwc) {
  int most = 0;
  for (const int vector : {1, 4, 8})
    if ((nhwc ? channels : pixels) % vector == 0) most = std::max(most, portable_tiling(channels, pixels, vector, nhwc).slabs);
  return most;
}

// The one-pass kernel: a cluster of t.slabs blocks holds a whole NHWC sample in registers, `packs` a thread.
struct ClusterPlan {
  Tiling t;
  int packs;  // 8 or 16; 0: the shape does not fit, use the portable kernels
};

inline int64_t cluster_shared_bytes(int channels, int vector) {
  return int64_t{4} * (scratch_floats(vector) + 6 * channels + kNormThreads / 32);
}

// The smallest cluster that keeps a thread at 8 packs; a larger one while that leaves multiprocessors idle; 16 packs as a last
// resort. (Not measured on a device yet.)
inline ClusterPlan cluster_plan(int64_t batch, int channels, int pixels, int vector, int multiprocessors) {
  ClusterPlan plan{};
  Tiling& t = plan.t;
  t.groups = channels / vector;
  if (channels % vector != 0 || t.groups > kNormThreads || cluster_shared_bytes(channels, vector) > kMaxSharedBytes) return plan;
  t.lanes = kNormThreads / t.groups;
  t.channel_blocks = t.tiles = t.slabs = 1;
  while (t.slabs < kMaxCluster && divide_up(pixels, t.slabs) > t.lanes * 8) t.slabs *= 2;
  while (t.slabs < kMaxCluster && batch * t.slabs * 2 <= multiprocessors && divide_up(pixels, t.slabs * 2) >= t.lanes) t.slabs *= 2;
  t.tile = divide_up(pixels, t.slabs);
  const int packs = divide_up(t.tile, t.lanes);
  plan.packs = packs <= 8 ? 8 : packs <= 16 ? 16 : 0;
  return plan;
}

}  // namespace sgm::cuda
