// Multi-head attention over the pixels of an image.
//
// A lane is a query: a block of queries meets the keys a few at a time, each a scalar to all lanes, and keeps its sums of
// values. So the weights never leave the registers, and keys and values are read where they lie. With m = 0 in place of the
// largest score, 2^(score − m) is exact enough while all |scores| stay small; where a bound does not promise it, m is found
// first. Blocks lie at fixed places, and sums run by key: bits do not depend on who computes.
#pragma once
#include "attention.h"

namespace sgm::SGM_ISA::executor {

constexpr int kKeys = kRegisters == 32 ? 8 : 4;      // that meet a block at once
constexpr int kChannels = kRegisters == 32 ? 4 : 2;  // whose sums run side by side: one waits for its last product
constexpr int kQueryBlock = kQueryVectors * kWidth;
constexpr int kKeyTile = 256;                        // keys whose values are summed before they join the others
constexpr float kSmallScore = 60.f;                  // 2^60 · keys · values stay far inside a float, and so does 2^−60

// Where the keys and values of an image lie.
struct HeadLayout {
  const Heads& heads;
  const Tensor& in;
  int third, keys;
  HeadLayout(const Heads& heads, const Tensor& in)
      : heads(heads), in(in), third(in.channels / 3), keys(heads.memory + in.height * in.width) {}

  // Key (part 0) or value (part 1) `index` of a head: `size` floats.
  const float* row(const float* image, int part, int head, int index) const {
    if (index < heads.memory) return heads.tokens + (((int64_t)part * heads.count + head) * heads.memory + index) * heads.size;
    return image + (int64_t)(index - heads.memory) * in.padded + (part + 1) * third + head * heads.size;
  }
};

// 2^x for |x| < 126 (Cephes exp2f; the exponent is added to the bits of the float).
SGM_INLINE Vec exp2_bounded(Vec x) {
  const Vec rounded = x + 12582912.f, f = x - (rounded - 12582912.f);  // 1.5·2²³: the integer lies in the low bits
  Vec p = f * 1.535336188e-4f + 1.339887440e-3f;
  p = p * f + 9.618437357e-3f;
  p = p * f + 5.550332471e-2f;
  p = p * f + 2.402264791e-1f;
  p = p * f + 6.931472029e-1f;
  p = p * f + 1.f;
  return (Vec)((IntVec)p + ((IntVec)rounded << 23));
}

// kVectors × kWidth queries of one head. In scratch [size][kVectors × kWidth] each: queries times scale·log₂e, sums of values
// over a tile of keys, and over all of them.
template <int kVectors>
struct QueryBlock {
  static constexpr int kLanes = kVectors * kWidth;
  const HeadLayout& at;
  const float* image;
  int head;
  float *queries, *part, *sums;
  QueryBlock(const HeadLayout& at, const float* image, int head, float* scratch)
      : at(at), image(image), head(head), queries(scratch), part(queries + at.heads.size * kLanes), sums(part + at.heads.size * kLanes) {}

  void read_queries(int first, int rows) const {
    const float scale = at.heads.scale * 1.44269504f;
    for (int i = 0; i < kLanes; i++) {
      const float* q = image + (int64_t)(first + least(i, rows - 1)) * at.in.padded + head * at.heads.size;
      for (int c = 0; c < at.heads.size; c++) queries[c * kLanes + i] = scale * q[c];
    }
  }

  // Whether Σ |query|·greatest, a bound of every |score|, is small.
  bool is_small(const float* greatest) const {
    Vec bound[kVectors] = {};
    for (int c = 0; c < at.heads.size; c++)
      SGM_UNROLL for (int j = 0; j < kVectors; j++) {
        const Vec q = load(queries + c * kLanes + j * kWidth);
        bound[j] += (q < 0.f ? -q : q) * greatest[c];
      }
    bool small = true;
    SGM_UNROLL for (int j = 0; j < kVectors; j++) small = small && horizontal_max(bound[j]) < kSmallScore;
    return small;
  }

  void rows(int part, int first, const float* (&to)[kKeys]) const {
    for (int i = 0; i < kKeys; i++) to[i] = at.row(image, part, head, least(first + i, at.keys - 1));
  }

  SGM_INLINE void scores(const QueryBlock& block, const float* const (&keys)[kKeys], Vec (&score)[kKeys][kVectors]) {
    SGM_UNROLL for (int i = 0; i < kKeys; i++) SGM_UNROLL for (int j = 0; j < kVectors; j++) score[i][j] = Vec{};
    for (int c = 0; c < block.at.heads.size; c++) {
      Vec q[kVectors];
      SGM_UNROLL for (int j = 0; j < kVectors; j++) q[j] = load(block.queries + c * kLanes + j * kWidth);
      SGM_UNROLL for (int i = 0; i < kKeys; i++) {
        const float k = keys[i][c];
        SGM_UNROLL for (int j = 0; j < kVectors; j++) score[i][j] += q[j] * k;
      }
    }
  }

  void find_highest(Vec (&high)[kVectors]) const {
    for (int first = 0; first < at.keys; first += kKeys) {
      const float* keys[kKeys];
      Vec score[kKeys][kVectors];
      rows(0, first, keys);
      scores(*this, keys, score);
      if (first == 0) SGM_UNROLL for (int j = 0; j < kVectors; j++) high[j] = score[0][j];
      SGM_UNROLL for (int i = 0; i < kKeys; i++) SGM_UNROLL for (int j = 0; j < kVectors; j++)
          high[j] = score[i][j] > high[j] ? score[i][j] : high[j];
    }
  }

  template <int kCount>
  SGM_INLINE void add_values(float* part, const float* const (&values)[kKeys], int c, const Vec (&weight)[kKeys][kVectors]) {
    Vec sum[kCount][kVectors];
    SGM_UNROLL for (int d = 0; d < kCount; d++) SGM_UNROLL for (int j = 0; j < kVectors; j++)
        sum[d][j] = load(part + d * kLanes + j * kWidth);
    SGM_UNROLL for (int i = 0; i < kKeys; i++) SGM_UNROLL for (int d = 0; d < kCount; d++) {
      const float v = values[i][c + d];
      SGM_UNROLL for (int j = 0; j < kVectors; j++) sum[d][j] += weight[i][j] * v;
    }
    SGM_UNROLL for (int d = 0; d < kCount; d++) SGM_UNROLL for (int j = 0; j < kVectors; j++)
        store(part + d * kLanes + j * kWidth, sum[d][j]);
  }

  // part += Σ 2^(score − high)·value over kKeys keys, or the first `count` of them, and their weights to `total`. Small
  // scores have high = 0; of others those below −126 weigh what 2^−126 is.
  template <bool kSmall, bool kFull>
  SGM_INLINE void meet(const QueryBlock& block, int first, int count, const Vec (&high)[kVectors], Vec (&total)[kVectors]) {
    const float *keys[kKeys], *values[kKeys];
    Vec weight[kKeys][kVectors];
    block.rows(0, first, keys), block.rows(1, first, values);
    scores(block, keys, weight);
    SGM_UNROLL for (int i = 0; i < kKeys; i++) SGM_UNROLL for (int j = 0; j < kVectors; j++) {
      Vec x = weight[i][j];
      if (!kSmall) x -= high[j], x = x < -126.f ? splat(-126.f) : x;
      weight[i][j] = kFull || i < count ? exp2_bounded(x) : Vec{};
      total[j] += weight[i][j];
    }
    int c = 0;
    for (; c + kChannels <= block.at.heads.size; c += kChannels) add_values<kChannels>(block.part + c * kLanes, values, c, weight);
    for (; c < block.at.heads.size; c++) add_values<1>(block.part + c * kLanes, values, c, weight);
  }

  // sums and total over all keys, a tile at a time.
  template <bool kSmall>
  void meet_all(const Vec (&high)[kVectors], Vec (&total)[kVectors]) const {
    const int size = at.heads.size * kLanes;
    for (int tile = 0; tile < at.keys; tile += kKeyTile) {
      const int end = least(tile + kKeyTile, at.keys), whole = end - end % kKeys;
      Vec of_tile[kVectors] = {};
      memset(part, 0, size * sizeof(float));
      for (int key = tile; key < whole; key += kKeys) meet<kSmall, true>(*this, key, kKeys, high, of_tile);
      if (whole < end) meet<kSmall, false>(*this, whole, end - whole, high, of_tile);
      for (int i = 0; i < size; i += kWidth) store(sums + i, load(sums + i) + load(part + i));
      SGM_UNROLL for (int j = 0; j < kVectors; j++) total[j] += of_tile[j];
    }
  }

  // The weighted means of `rows` queries, at out and `stride` floats further on each.
  void run(int first, int rows, const float* greatest, float* out, int stride) const {
    const int size = at.heads.size * kLanes;
    read_queries(first, rows);
    Vec high[kVectors] = {}, total[kVectors] = {};
    memset(sums, 0, size * sizeof(float));
    if (is_small(greatest)) meet_all<true>(high, total);
    else find_highest(high), meet_all<false>(high, total);
    for (int c = 0; c < at.heads.size; c++)
      SGM_UNROLL for (int j = 0; j < kVectors; j++) {
        float* const mean = sums + c * kLanes + j * kWidth;
        store(mean, load(mean) / total[j]);
      }
    for (int i = 0; i < rows; i++)
      for (int c = 0; c < at.heads.size; c++) out[(int64_t)i * stride + c] = sums[c * kLanes + i];
  }
};

// The greatest |key| of each channel of a head.
static void find_greatest(const HeadLayout& at, const float* image, int head, float* greatest) {
  for (int c = 0; c < at.heads.size; c++) greatest[c] = 0.f;
  for (int i = 0; i < at.keys; i++) {
    const float* key = at.row(image, 0, head, i);
    for (int c = 0; c < at.heads.size; c++) {
      const float k = key[c] < 0.f ? -key[c] : key[c];
      greatest[c] = k > greatest[c] ? k : greatest[c];
    }
  }
}

// Members split the blocks of queries, head by head.
static void attention(const Run& run, const Layer& layer) {
  const Tensor &in = run.tensor(layer.input), &out = run.tensor(layer.output);
  const Heads& heads = run.program.heads[layer.heads];
  const HeadLayout at(heads, in);
  const int pixels = in.height * in.width, blocks = (pixels + kQueryBlock - 1) / kQueryBlock;
  float* const scratch = run.workspace.products + run.member.rank * run.workspace.products_stride;
  float* const greatest = scratch + 3 * heads.size * kQueryBlock;
  int first, last;
  run.share(heads.count * blocks, first, last);
  for (int image = 0; image < run.images; image++) {
    const float* const x = run.data(layer.input, image);
    float* const y = run.data(layer.output, image);
    for (int i = first; i < last; i++) {
      const int head = i / blocks, row = i % blocks * kQueryBlock, rows = least(kQueryBlock, pixels - row);
      if (i == first || row == 0) find_greatest(at, x, head, greatest);
      float* const to = y + (int64_t)row * out.padded + head * heads.size;
      if (rows <= kWidth) QueryBlock<1>(at, x, head, scratch).run(row, rows, greatest, to, out.padded);
      else QueryBlock<kQueryVectors>(at, x, head, scratch).run(row, rows, greatest, to, out.padded);
      if (head + 1 == heads.count)
        for (int r = row; r < row + rows; r++)
          for (int c = out.channels; c < out.padded; c++) y[(int64_t)r * out.padded + c] = 0.f;
    }
  }
  run.wait();
  if (out.moments >= 0) for_each_row(run, layer, [](int, int, int) {});
}

}  // namespace sgm::SGM_ISA::executor
