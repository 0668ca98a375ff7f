// The compiled form of a network: flat arrays of plain structs, built by executor.cpp, run by executor_isa.cpp.
//
// Plain data only. executor_isa.cpp is compiled once per instruction set, so a header it shares with the rest may not
// define an inline function or instantiate a standard template: the linker keeps one copy of such a symbol, and the
// copy could be the AVX-512 one.
#pragma once
#include <cstdint>

#include "isa.h"

namespace sgm::executor {

constexpr int kMaxOctaves = 16;
constexpr int kMaxTaps = 49;

// Activations are float32 [n][height][width][padded], padded = channels rounded up to a vector; the padding is finite, and no
// weight meets it.
struct Tensor {
  int channels, padded, height, width;
  int64_t offset;   // floats an image, into the arena
  int64_t moments;  // floats an image, into the moments buffer: kMomentRows rows [padded]; -1: not kept
};

enum class Op : int {
  load,       // output = scale·x + shift, x the network's input [n][channels][height][width]
  conv,       // output = conv(prologue(input)) + bias + Σ add, after an optional 2×2 mean
  activate,   // output = prologue(input)
  mean_pool,  // output = 2×2 mean of prologue(input), stride 2
  mean_pool5, // output = 5×5 mean of prologue(input), stride 1, padding counted as zeros
  max_pool5,  // output = 5×5 maximum of prologue(input), stride 1
  upsample,   // output = bilinear(input), corners aligned, + Σ add
  nearest,    // output = input, each pixel repeated to a whole multiple of the size, cropped, + Σ add
  concat,     // output = the channels of input, then those of second
  store,      // score = conv(prologue(input)) + bias, [n][channels][height][width], optionally divided by σ(level)

  // Of classifiers whose score is a gradient in their input (sgm_engine/executors/native/gradient.py):
  embed,      // output = u = scale(level)·x + shift(level), sin and cos of it, patches of pixels folded into channels
  attention,  // output = softmax(scale·qᵀk)·v over the pixels, head by head; input: q, k, v, each a third
  slope,      // output = γ(level)·activation′(input)
  norm_backward,       // output = gradient in input of Σ second·prologue(input), + Σ add
  attention_backward,  // output = gradient in input of Σ second·attention(input)
  spread,     // output = input at every second pixel of every second row, zeros between
  block_sum,  // output = Σ over the pixels that nearest made of one, + Σ add
  slice,      // output = channels first, first + 1, … of input, + Σ add
  store_gradient,  // score = gradient in x of what has the gradient input in second, which embed made, + its affine part

  linear_attention,  // output = contextᵀ·softmax(q), context = softmax(k)·vᵀ: of q over a head's channels, of k over the pixels
  channel_norm,      // output = activation(γ·x̂ + β) + Σ add, x̂ normalised at each pixel across channels

  // Of classifiers of potentials (potential.h):
  noise_features,   // output = planes of the noise in x, 2×2 pixels as channels
  waves,            // output = how much noise that is, as a few numbers
  potential,        // output = gradient in input, a, of Σ w(level)·⟨y, a⟩
  store_potential,  // score = gradient in x, given those in the planes (input) and in the waves (second)
  constant,         // output = a constant
  reshape,          // output = the numbers of input in another shape: pixel by pixel, each with its channels
  affine_backward,  // output = gradient in input of Σ second·prologue(input), no statistics in it, + Σ add
  film_backward,    // output = gradient in the γ and β that a tensor gave to the prologue
};

enum class Activation : int { none, elu, relu, silu, gelu, gelu_tanh, tanh, sigmoid, leaky_relu, clip };
constexpr int kActivations = 10;

// What a convolution finds beyond the image.
enum class Border : int { zeros, reflect, replicate, circular };
enum Side { kTop, kBottom, kLeft, kRight };

// The prologue of a layer: normalise, then activate, while the input is read.
struct Layer {
  Op op;
  int input, second, output;  // tensors
  int add[2];         // tensors, -1: none
  float add_scale[2];  // what they are multiplied by
  int norm;           // -1: none
  Activation activation;
  float slope;        // of leaky_relu below 0; the limit of clip
  int conv;           // -1: none
  int heads;          // -1: none
  float scale, shift;
  int first;          // slice
};

// y = gamma·(x̂ + alpha·ms) + beta (SPEC: InstanceNorm++); rows of `row` floats, one a level, or one row for all. x̂ is
// normalised by channel (groups = channels), by group of channels, or not at all (groups = 0: x̂ = x).
struct Norm {
  int channels, groups;
  int64_t row;         // 0: the same parameters at every level
  bool has_alpha;
  float eps;
  const float* table;  // [levels or 1][3][channels]: gamma, alpha, beta
  int source;          // a tensor of γ, then β, for each image; −1: the table
  // channel_norm: x̂ = (x − mean)/(after + √(max(variance, floor) + eps)) of a pixel's group of channels; centred: with the mean
  bool by_pixel, centred;
  float floor, after;
};

// Attention: q, k and v hold `count` heads of `size` channels each, one head after another.
struct Heads {
  int count, size;
  float scale;
  int memory;           // keys and values before those of the pixels
  const float* tokens;  // [keys, values][count][memory][size]
};

// One strip: a row of Winograd tiles of one dilation phase. A phase (r, c) is the sub-image of pixels (r + i·d, c + j·d).
struct Strip {
  int phase_row, phase_col;  // position of the sub-image
  int height, width;         // of the sub-image
  int row;                   // first output row of the tiles, in the sub-image
  int tiles;
  int pixels_before;         // outputs of the image in earlier strips
};

struct Tap {
  int row, col;  // of the input, relative to where the output pixel begins
  int index;     // of its weights
};

// Outputs (up·i + row, up·j + col) of a convolution: those that read the same taps. One phase unless pixels were spread.
struct Phase {
  int row, col, height, width;
  int first, last;  // taps
};

// What embed makes of x [channels][height][width]: planes u, then sin(2ⁿ·π·u) and cos(2ⁿ·π·u) of each octave n, and of
// each plane patch² channels, one for each pixel of a patch.
struct Embedding {
  int channels, height, width, patch, octaves;
  int octave[kMaxOctaves];
  const double* table;  // [levels][5]: scale, shift; gradient, slope, offset: score = gradient·∇ᵤ + slope·x + offset
};

// A Gaussian base with what is read of it: doubles, D = size = channels·height·width. A level: its class, scale and shift
// of x, then w of the potentials.
struct Potential {
  int channels, height, width, size, classes, waves, potentials;
  const double* mean;                                          // [D]
  const float* basis;                                          // [D][D], columns orthonormal
  const double *constant, *log_noise, *signal, *wave;          // [classes]; wave [classes][waves]
  const double *precision, *shifted, *share, *centre;          // [classes][D]
  const double* levels;                                        // [levels][3 + potentials]
  const int* place;                                            // [D]: of pixel j in the planes, as y
  int64_t stride;                                              // doubles of an image's scratch
};

struct Conv {
  int c_in, c_out;         // true channel counts
  int c_step;              // input channels summed: those of a block's groups, rounded up to even for bf16
  int kernel, dilation, stride, up, groups;
  int pad[4];              // top, bottom, left, right: round the input, spread by up − 1 zeros between pixels
  Border border;
  bool pool;               // followed by a 2×2 mean
  bool winograd, bf16, depthwise;
  int vectors, blocks;     // output channels = blocks × vectors × vector width
  const void* weights;     // [blocks][taps][c_step][vectors × width], bf16: [...][c_step / 2][vectors × width][2]; depthwise: [taps][channels]
  const float* bias;       // [levels or 1][blocks × vectors × width], zeros where there is none
  int64_t bias_row;        // floats a level, 0: the same at every level
  const int* first;        // [blocks]: the first input channel that a block sums
  const Strip* strips;     // winograd
  int strip_count, tiles;  // winograd, an image
  const Tap* taps;         // direct
  int tap_count;
  const Phase* phases;
  int phase_count;
  int rim[4];              // top, bottom, left, right: what the taps reach beyond the input
};

struct Program;
struct Workspace;
struct Member;
struct Batch;
// A convolution in bfloat16. AVX512_BF16 has this one of its own; the rest of its forward is AVX-512's.
using Convolve = void (*)(const Program&, const Workspace&, const Member&, const Batch&, const Layer&, const Conv&);

struct Program {
  const Layer* layers;
  int layer_count;
  const Tensor* tensors;
  const Norm* norms;
  const Conv* convs;
  const Heads* heads;
  const float* sigmas;  // [levels], or null: the score is not divided
  Embedding embedding;
  Potential potential;
  const float* const* constants;
  Convolve convolve_bf16;  // the backend's
};

// Scratch of one team; sizes from executor.cpp.
struct Workspace {
  int capacity;       // images
  float* arena;
  float* moments;
  int tile_capacity;  // floats of one Winograd plane: tiles × channels stay below it
  float* planes;      // transformed input [36][tiles][c_in], float or Bf16::Type; attention.h's matrices
  float* products;    // [members][36][tiles][vectors × width]; heads.h's block of queries
  float* padded;      // activated input with its border, float or Bf16::Type
  float* rows;        // [members] rows of one channel vector under transformation
  double* potential;  // [capacity] images of a Potential: potential.h
  float* affine;      // [members][kAffineRows][capacity][channels]: a, b, pivot of the folded norm; also γ, β
  int64_t products_stride, rows_stride, affine_stride;  // floats a member
};

struct Barrier;
void wait(Barrier* barrier);

// One member of a team. Members split the channels of every layer, so no result depends on the team's size.
struct Member {
  int rank, size;
  Barrier* barrier;
};

// What one evaluation reads and writes: `images` of the samples in x, score and level, image i being sample slot[i].
struct Batch {
  int images;
  const int* slot;
  const float* x;  // [samples][channels][height][width], or [samples][height][width][channels] if nhwc
  bool nhwc;
  const int64_t* level;  // [images], each inside the tables
  float* score;          // [samples][channels][height][width]
};

using Forward = void (*)(const Program&, const Workspace&, const Member&, const Batch&);

// One instruction set's build of executor_isa.cpp.
struct Backend {
  int width;        // floats a vector
  int max_vectors;  // output vectors a block: 4, else 2
  Forward forward;
  Convolve convolve_bf16;
};

constexpr int kPotentialRows = 9;  // potential.h: rows of D of an image's scratch, before 2·classes + 2 more
constexpr int kTile = 4, kPoints = 36;
constexpr int kQueryVectors = 2;  // heads.h, linear_attention.h: of queries that are answered together
constexpr int kAffineRows = 5;
constexpr int kMomentRows = 4;  // pivot, Σ(x − pivot), what that sum lost to rounding, Σ(x − mean)²

}  // namespace sgm::executor

namespace sgm {
SGM_DECLARE_PER_ISA(executor::Backend, executor_backend, ())
}
