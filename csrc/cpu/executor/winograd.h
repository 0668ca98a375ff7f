// Winograd F(4×4, 3×3) (Lavin & Gray 2015) at the points 0, ±√½, ±√2, ∞, which halve the error of 0, ±1, ±2, ∞.
//
// Y = Aᵀ[(G g Gᵀ) ⊙ (Bᵀ d B)]A: 36 products a tile of 16 outputs in place of 144. A dilated convolution is d² ordinary
// ones, each on the pixels of one phase. Layer by layer, in chunks of tiles that stay in cache:
//   input → 36 planes [tiles][c_in] → 36 products [tiles][block of c_out] → output.
#pragma once
#include "gemm.h"
#include "prologue.h"

namespace sgm::SGM_ISA::executor {

constexpr int kPatch = kTile + 2;  // inputs of a tile, a side
constexpr float kRootHalf = 0.70710678118654752f, kRootTwo = 1.41421356237309505f;

// Bᵀ d
SGM_INLINE void transform_input(const Vec (&d)[kPatch], Vec (&out)[kPatch]) {
  const Vec even1 = d[4] - 2.f * d[2], odd1 = kRootHalf * (d[3] - 2.f * d[1]);
  const Vec even2 = d[4] - 0.5f * d[2], odd2 = kRootTwo * (d[3] - 0.5f * d[1]);
  out[0] = (d[0] + d[4]) - 2.5f * d[2];
  out[1] = even1 + odd1;
  out[2] = even1 - odd1;
  out[3] = even2 + odd2;
  out[4] = even2 - odd2;
  out[5] = (d[1] + d[5]) - 2.5f * d[3];
}

// Aᵀ m
SGM_INLINE void transform_output(const Vec (&m)[kPatch], Vec (&out)[kTile]) {
  const Vec sum1 = m[1] + m[2], difference1 = m[1] - m[2], sum2 = m[3] + m[4], difference2 = m[3] - m[4];
  out[0] = m[0] + (sum1 + sum2);
  out[1] = kRootTwo * difference2 + kRootHalf * difference1;
  out[2] = 2.f * sum2 + 0.5f * sum1;
  out[3] = (2.f * kRootTwo * difference2 + 0.5f * kRootHalf * difference1) + m[5];
}

// Strips [first, last) of the batch, counted through its images.
struct Chunk {
  int first, last, tiles;
};

// Planes are padded: at a distance of a multiple of 4 KiB the 36 stores of a tile would share one cache set.
SGM_INLINE int64_t plane_stride(int tiles, int channels) { return (int64_t)tiles * channels + 32; }
SGM_INLINE int64_t product_stride(int tiles, int channels) { return (int64_t)tiles * channels + 16; }

template <class Element>
static void input_planes(const Run& run, const Layer& layer, const Conv& conv, const Chunk& chunk, const Reader<Float>& read_row) {
  using T = typename Element::Type;
  const Tensor& in = run.tensor(layer.input);
  const int64_t stride = plane_stride(chunk.tiles, in.padded), line = (int64_t)in.padded * conv.dilation;
  float* const rows = run.workspace.rows + run.member.rank * run.workspace.rows_stride;
  int first, last;
  run.share(in.padded / kWidth, first, last);
  for (int c = first * kWidth; c < last * kWidth; c += kWidth) {
    T* plane = (T*)run.workspace.planes + c;
    for (int g = chunk.first; g < chunk.last; g++) {
      const int image = g / conv.strip_count;
      const Strip& s = conv.strips[g % conv.strip_count];
      const int columns = kTile * s.tiles + 2;
      const int64_t pitch = (int64_t)columns * kWidth;
      int r = 0;
      if (g > chunk.first && s.row > 0) {  // the strip above came just before: its last two rows are our first
        memcpy(rows, rows + kTile * pitch, 2 * pitch * sizeof(float));
        r = 2;
      }
      for (; r < kPatch; r++) {
        float* const row = rows + r * pitch;
        const int y = source(conv.border, s.row - 1 + r, s.height);
        if (y < 0) {
          memset(row, 0, pitch * sizeof(float));
          continue;
        }
        const float* src = run.data(layer.input, image) + c +
                           ((int64_t)(s.phase_row + y * conv.dilation) * in.width + s.phase_col) * in.padded;
        read_row(src, line, row + kWidth, kWidth, s.width, image, c);
        memset(row + (s.width + 1) * kWidth, 0, (columns - s.width - 1) * kWidth * sizeof(float));
        const int left = source(conv.border, -1, s.width), right = source(conv.border, s.width, s.width);
        store(row, left < 0 ? Vec{} : load(row + (left + 1) * kWidth));
        if (right >= 0) store(row + (s.width + 1) * kWidth, load(row + (right + 1) * kWidth));
      }
      for (int t = 0; t < s.tiles; t++, plane += in.padded) {
        const float* patch = rows + (int64_t)t * kTile * kWidth;
        Vec half[kPatch][kPatch];
        SGM_UNROLL for (int j = 0; j < kPatch; j++) {
          Vec column[kPatch], out[kPatch];
          SGM_UNROLL for (int i = 0; i < kPatch; i++) column[i] = load(patch + i * pitch + j * kWidth);
          transform_input(column, out);
          SGM_UNROLL for (int i = 0; i < kPatch; i++) half[i][j] = out[i];
        }
        SGM_UNROLL for (int i = 0; i < kPatch; i++) {
          Vec out[kPatch];
          transform_input(half[i], out);
          SGM_UNROLL for (int j = 0; j < kPatch; j++) Element::put(plane + (i * kPatch + j) * stride, out[j]);
        }
      }
    }
  }
}

// products[point][tile][k] of one block of output channels
template <class Element>
static void multiply_planes(const Run& run, const Conv& conv, int block, const Chunk& chunk, int channels, float* products) {
  using T = typename Element::Type;
  using Weight = typename Element::Weight;
  const int width = conv.vectors * kWidth, most_rows = max_rows(conv.vectors);
  const int groups = (chunk.tiles + most_rows - 1) / most_rows;  // of nearly equal size
  const int64_t no_offset = 0;
  const int no_tap = 0;
  int64_t rows[kMaxRows];
  for (int i = 0; i < kMaxRows; i++) rows[i] = (int64_t)i * channels;
  for (int point = 0; point < kPoints; point++) {
    const T* plane = (const T*)run.workspace.planes + point * plane_stride(chunk.tiles, channels);
    const Weight* weights = (const Weight*)conv.weights + ((int64_t)block * kPoints + point) * conv.c_step * width;
    float* out = products + point * product_stride(chunk.tiles, width);
    for (int g = 0, t = 0; g < groups; g++) {
      const int end = (int)((int64_t)chunk.tiles * (g + 1) / groups);
      kernel_function<Element>(conv.vectors, end - t)(plane + (int64_t)t * channels, rows, 1, &no_offset, &no_tap, weights,
                                                conv.c_step, out + (int64_t)t * width);
      t = end;
    }
  }
}

// Adds residuals, stores one output vector and returns it.
SGM_INLINE Vec finish(Vec v, const float* const (&add)[2], const float (&scale)[2], float* out, int64_t offset, int64_t next) {
  if (add[0]) v += load(add[0] + offset) * scale[0], __builtin_prefetch(add[0] + offset + next);
  if (add[1]) v += load(add[1] + offset) * scale[1], __builtin_prefetch(add[1] + offset + next);
  __builtin_prefetch(out + offset + next, 1);
  store(out + offset, v);
  return v;
}

template <bool kPool>
static void output_block(const Run& run, const Layer& layer, const Conv& conv, int block, const Chunk& chunk,
                         const float* products) {
  const Tensor& out = run.tensor(layer.output);
  const int width = conv.vectors * kWidth, d = conv.dilation;
  const int64_t stride = product_stride(chunk.tiles, width), k_step = out.padded;
  for (int j = 0; j < conv.vectors; j++) {
    const int k = (block * conv.vectors + j) * kWidth;
    if (k >= out.padded) return;
    const float* product = products + j * kWidth;
    Moments moments = Moments::start(Vec{});
    for (int g = chunk.first; g < chunk.last; g++) {
      const int image = g / conv.strip_count, index = g % conv.strip_count;
      const Strip& s = conv.strips[index];
      float* const kept = run.moments(layer.output, image);
      const Vec bias = load(conv.bias + run.bias_row(conv, image) + k);
      if (index > 0 && g == chunk.first && kept) moments = Moments::read(kept + k, out.padded);
      const float* const add[2] = {layer.add[0] < 0 ? nullptr : run.data(layer.add[0], image) + k,
                                   layer.add[1] < 0 ? nullptr : run.data(layer.add[1], image) + k};
      float* const target = run.data(layer.output, image) + k;
      const int tile_rows = least(kTile, s.height - s.row);
      int before = s.pixels_before;
      for (int t = 0; t < s.tiles; t++, product += width) {
        const int tile_columns = least(kTile, s.width - kTile * t);
        Vec half[kTile][kPatch], y[kTile][kTile];
        SGM_UNROLL for (int q = 0; q < kPatch; q++) {
          Vec m[kPatch], column[kTile];
          SGM_UNROLL for (int p = 0; p < kPatch; p++) m[p] = load(product + (p * kPatch + q) * stride);
          transform_output(m, column);
          SGM_UNROLL for (int p = 0; p < kTile; p++) half[p][q] = column[p];
        }
        SGM_UNROLL for (int p = 0; p < kTile; p++) transform_output(half[p], y[p]);
        constexpr int kSide = kPool ? kTile / 2 : kTile;
        const int rows = kPool ? tile_rows / 2 : tile_rows, columns = kPool ? tile_columns / 2 : tile_columns;
        const int64_t origin = kPool ? ((int64_t)(s.row / 2) * out.width + 2 * t) * k_step
                                     : ((int64_t)(s.phase_row + s.row * d) * out.width + s.phase_col + kTile * t * d) * k_step;
        const int64_t row_step = (int64_t)d * out.width * k_step, column_step = (int64_t)d * k_step;
        const int64_t next = t + 1 < s.tiles ? kSide * column_step : (int64_t)kSide * (row_step - t * column_step);
        if constexpr (kPool) {
          SGM_UNROLL for (int p = 0; p < kSide; p++) SGM_UNROLL for (int q = 0; q < kSide; q++)
              y[p][q] = 0.25f * ((y[2 * p][2 * q] + y[2 * p + 1][2 * q]) + (y[2 * p][2 * q + 1] + y[2 * p + 1][2 * q + 1]));
        }
        const auto each = [&](const auto& visit) __attribute__((always_inline)) {  // the outputs inside the image
          SGM_UNROLL for (int p = 0; p < kSide; p++) {
            if (p >= rows) break;
            SGM_UNROLL for (int q = 0; q < kSide; q++) {
              if (q >= columns) break;
              visit(y[p][q], origin + p * row_step + q * column_step);
            }
          }
        };
        each([&](Vec& v, int64_t at) __attribute__((always_inline)) { v = finish(v + bias, add, layer.add_scale, target, at, next); });
        const int count = rows * columns;
        if (!kept || !count) continue;
        const float share = 1.f / (float)count;
        Vec sum = Vec{}, squares = Vec{};
        if (before == 0) {
          const Vec first = y[0][0];
          each([&](const Vec& v, int64_t) __attribute__((always_inline)) { sum += v - first; });
          moments = Moments::start(first + sum * share);
          sum = Vec{};
        }
        each([&](Vec& v, int64_t) __attribute__((always_inline)) { sum += v -= moments.pivot; });
        const Vec mean = sum * share;
        each([&](const Vec& v, int64_t) __attribute__((always_inline)) { squares += (v - mean) * (v - mean); });
        moments.merge(sum, squares, before, count);
        before += count;
      }
      if (kept && (g + 1 == chunk.last || index + 1 == conv.strip_count)) moments.write(kept + k, out.padded);
    }
  }
}

template <class Element>
static void winograd(const Run& run, const Layer& layer, const Conv& conv) {
  const Reader<Float> read_row(run, layer);
  const int channels = run.tensor(layer.input).padded, strips = run.images * conv.strip_count;
  const int total = run.images * conv.tiles;
  int limit = most(run.workspace.tile_capacity / channels, 1);
  const int chunks = (total + limit - 1) / limit;
  limit = least(limit, (total + chunks - 1) / chunks + conv.strips[0].tiles);  // of nearly equal size
  float* const products = run.workspace.products + run.member.rank * run.workspace.products_stride;
  int first_block, last_block;
  run.share(conv.blocks, first_block, last_block);
  for (int g = 0; g < strips;) {
    Chunk chunk{g, g, 0};
    while (chunk.last < strips) {
      const int tiles = conv.strips[chunk.last % conv.strip_count].tiles;
      if (chunk.last > g && chunk.tiles + tiles > limit) break;
      chunk.tiles += tiles, chunk.last++;
    }
    input_planes<Element>(run, layer, conv, chunk, read_row);
    run.wait();
    for (int block = first_block; block < last_block; block++) {
      multiply_planes<Element>(run, conv, block, chunk, channels, products);
      if (conv.pool) output_block<true>(run, layer, conv, block, chunk, products);
      else output_block<false>(run, layer, conv, block, chunk, products);
    }
    run.wait();
    g = chunk.last;
  }
}

}  // namespace sgm::SGM_ISA::executor
