// What is decided once: the algorithm of each convolution, and where each tensor lies.
#include <algorithm>
#include <stdexcept>

#include "cpu/executor/executor.h"
#include "cpu/executor/internal.h"
#include "cpu/executor/sizes.h"
#include "cpu/pool.h"

namespace sgm::executor {
namespace {

std::vector<Strip> make_strips(int height, int width, int dilation, bool pool) {
  std::vector<Strip> strips;
  int pixels = 0;
  for (int r = 0; r < std::min(dilation, height); ++r)
    for (int c = 0; c < std::min(dilation, width); ++c) {
      const int h = (height - r + dilation - 1) / dilation, w = (width - c + dilation - 1) / dilation;
      for (int row = 0; row < h; row += kTile) {
        strips.push_back({r, c, h, w, row, (w + kTile - 1) / kTile, pixels});
        const int rows = std::min(kTile, h - row);
        pixels += pool ? (rows / 2) * (w / 2) : rows * w;
      }
    }
  return strips;
}

int total_tiles(const std::vector<Strip>& strips) {
  int tiles = 0;
  for (const Strip& s : strips) tiles += s.tiles;
  return tiles;
}

// The taps of each phase, and the phases of an output of height × width.
void make_taps(const Conv& conv, int height, int width, std::vector<Tap>& taps, std::vector<Phase>& phases) {
  const int side = conv.pool ? 4 : conv.kernel;  // a 3×3 convolution and a 2×2 mean: one 4×4, stride 2
  for (int row = 0; row < conv.up; ++row)
    for (int col = 0; col < conv.up; ++col) {
      const int first = static_cast<int>(taps.size());
      for (int r = 0; r < side; ++r)
        for (int c = 0; c < side; ++c) {
          const int down = row + r * conv.dilation - conv.pad[kTop], right = col + c * conv.dilation - conv.pad[kLeft];
          if (down % conv.up == 0 && right % conv.up == 0) taps.push_back({down / conv.up, right / conv.up, r * side + c});
        }
      const auto count = [&](int n, int from) { return (n - from + conv.up - 1) / conv.up; };
      phases.push_back({row, col, count(height, row), count(width, col), first, static_cast<int>(taps.size())});
    }
}

// What the taps reach beyond an input of height × width.
void make_rim(Conv& conv, int height, int width) {
  for (int p = 0; p < conv.phase_count; ++p)
    for (int t = conv.phases[p].first; t < conv.phases[p].last; ++t) {
      const Phase& phase = conv.phases[p];
      const Tap& tap = conv.taps[t];
      const int reach[4] = {-tap.row, (phase.height - 1) * conv.stride + tap.row - (height - 1), -tap.col,
                            (phase.width - 1) * conv.stride + tap.col - (width - 1)};
      for (int i = 0; i < 4; ++i) conv.rim[i] = std::max(conv.rim[i], reach[i]);
    }
}

// The input channels of each block: those of the groups that its outputs belong to. Returns how many the widest sums.
int make_firsts(const Conv& conv, int width, std::vector<int>& firsts) {
  const int of_input = conv.c_in / conv.groups, of_output = conv.c_out / conv.groups;
  int widest = 0;
  for (int block = 0; block < conv.blocks; ++block) {
    const int begin = std::min(block * width, conv.c_out - 1) / of_output, end = (std::min((block + 1) * width, conv.c_out) - 1) / of_output;
    firsts.push_back(begin * of_input);
    widest = std::max(widest, (end - begin + 1) * of_input);
  }
  return widest;
}

}  // namespace

// The multiplications of both algorithms a pair of channels, with what the tiles cost beside them. Winograd reads 36
// weights where direct reads 9: with few tiles that is most of its time. bf16 counts as where an instruction multiplies pairs,
// so that every instruction set chooses alike.
bool Executor::prefers_winograd(const Conv& conv, int height, int width) const {
  if (precision_ == Precision::direct || conv.kernel != 3 || conv.stride != 1 || conv.up != 1 || conv.groups != 1) return false;
  if (std::any_of(conv.pad, conv.pad + 4, [&](int pad) { return pad != conv.dilation; })) return false;
  if (conv.border != Border::zeros && conv.dilation != 1) return false;
  if (precision_ == Precision::winograd) return true;
  const auto live = [&](int n) {  // (output, tap) pairs inside the image along one axis
    return n + 2 * std::max(0, n - conv.dilation);
  };
  const double pixels = conv.pool ? 4.0 * height * width : static_cast<double>(live(height)) * live(width);
  const double tiles = total_tiles(make_strips(height, width, conv.dilation, conv.pool));
  const double transforms = (conv.bf16 ? 12.0 : 6.0) * (1.0 / conv.c_out + 1.0 / conv.c_in);
  const double small = 4.0 / batch_;  // tiles that the weights' traffic is worth
  return kPoints * (tiles * (1 + transforms) + small) < pixels;
}

// The algorithm of a layer's convolution, and room for its weights.
void Executor::plan_conv(const Layer& layer, bool loaded) {
  Conv& c = convs_[layer.conv];
  if (weights_[layer.conv].size()) refuse("a convolution is used by two layers");
  const Tensor& in = tensors_[layer.input];
  const bool last = layer.op == Op::store;
  const int team = std::max(1, num_threads() / batch_), width = backend_.width;
  c.depthwise = !last && c.groups > 1 && c.groups == c.c_in && c.c_in == c.c_out;
  c.bf16 = precision_ == Precision::bfloat16 && !last && !loaded && !c.depthwise;
  c.winograd = !last && prefers_winograd(c, in.height, in.width);
  const int vectors = static_cast<int>(round_up(c.c_out, width)) / width;
  c.vectors = 1;
  for (int v = 2; v <= backend_.max_vectors; v *= 2)
    if (vectors % v == 0 && vectors / v >= std::min(team, vectors) && (c.groups == 1 || c.c_out / c.groups % (v * width) == 0)) c.vectors = v;
  c.blocks = vectors / c.vectors;
  const int widest = make_firsts(c, c.vectors * width, firsts_[layer.conv]);
  c.c_step = c.bf16 ? static_cast<int>(round_up(widest, 2)) : widest;
  for (int& first : firsts_[layer.conv]) first = std::min(first, in.padded - c.c_step);
  c.first = firsts_[layer.conv].data();
  if (c.winograd) {
    strips_[layer.conv] = make_strips(in.height, in.width, c.dilation, c.pool);
    c.strips = strips_[layer.conv].data();
    c.strip_count = static_cast<int>(strips_[layer.conv].size());
    c.tiles = total_tiles(strips_[layer.conv]);
  } else {
    const int reach = c.dilation * (c.kernel - 1);  // of the last one, whose output is no tensor
    const int height = last ? in.height + c.pad[kTop] + c.pad[kBottom] - reach : tensors_[layer.output].height;
    const int columns = last ? in.width + c.pad[kLeft] + c.pad[kRight] - reach : tensors_[layer.output].width;
    if (c.pool) c.stride = 2;
    make_taps(c, height, columns, taps_[layer.conv], phases_[layer.conv]);
    c.taps = taps_[layer.conv].data(), c.phases = phases_[layer.conv].data();
    c.tap_count = static_cast<int>(taps_[layer.conv].size()), c.phase_count = static_cast<int>(phases_[layer.conv].size());
    make_rim(c, in.height, in.width);
  }
  const int64_t taps = c.winograd ? kPoints : c.tap_count;
  const int64_t columns = last ? c.c_out : c.depthwise ? 1 : static_cast<int64_t>(c.blocks) * c.vectors * width;
  const int64_t channels = last || c.depthwise ? in.padded : c.c_step;
  weights_[layer.conv] = Buffer(times(taps, channels, columns) / (c.bf16 ? 2 : 1) + width);
  const int64_t row = round_up(c.c_out, backend_.max_vectors * width), rows = c.bias_row ? c.bias_row : 1;
  biases_[layer.conv] = Buffer(times(rows, row));
  if (c.bias_row) c.bias_row = row;
}

// Room for the statistics that a layer reads, and for the matrices of an attention.
void Executor::plan_memory(const Layer& layer) {
  const int64_t width = backend_.width;
  if (layer.norm >= 0 && norms_[layer.norm].groups && !norms_[layer.norm].by_pixel) tensors_[layer.input].moments = 0;
  if (layer.op == Op::norm_backward) tensors_[layer.output].moments = 0;  // sums that its members share
  if (layer.op == Op::attention_backward) {
    const Tensor& in = tensors_[layer.input];
    const int64_t pixels = static_cast<int64_t>(in.height) * in.width, line = round_up(pixels, width) + width;
    matrices_size_ = std::max(matrices_size_, times(2, in.channels / 3 + pixels, line));
  }
  if (layer.heads < 0) return;
  const Heads& heads = heads_[layer.heads];
  const Tensor& in = tensors_[layer.input];
  const int64_t keys = heads.memory + static_cast<int64_t>(in.height) * in.width, columns = round_up(heads.size, width);
  scores_size_ = std::max(scores_size_, layer.op == Op::attention ? times(heads.size, 3 * kQueryVectors * width + 1)
                                                                  : times(columns, 2 * keys + heads.size + 2 * kQueryVectors * width));
}

// One layer writes the score, the last, and what reads x reads all of it.
void Executor::check_ends() const {
  const auto ends = [&](Op first, Op last) { return layers_.front().op == first && layers_.back().op == last; };
  if (layers_.empty() || !(ends(Op::load, Op::store) || ends(Op::embed, Op::store_gradient) || ends(Op::noise_features, Op::store_potential) || ends(Op::noise_features, Op::store)))
    refuse("the first layer must be a load and the last a store, an embed and a store_gradient, or noise_features and a store or a store_potential");
  const Tensor x = sample();
  for (size_t i = 0; i < layers_.size(); ++i) {
    const Layer& l = layers_[i];
    if ((l.op == Op::store || l.op == Op::store_gradient || l.op == Op::store_potential) && i + 1 < layers_.size())
      refuse("layer " + std::to_string(i) + ": only the last layer may store the score");
    if (l.op == Op::noise_features && i) refuse("layer " + std::to_string(i) + ": noise_features must be the first");
    if (l.op != Op::load && l.op != Op::embed) continue;
    const Tensor& t = tensors_[l.output];
    if (l.op != layers_[0].op || (l.op == Op::load && (t.channels != x.channels || t.height != x.height || t.width != x.width)))
      refuse("layer " + std::to_string(i) + ": it must read x as the first layer does, in the same shape");
  }
}

void Executor::plan() {
  const auto lock = describing("plan");
  check_ends();
  state_ = State::failed;  // until the end
  weights_.resize(convs_.size()), biases_.resize(convs_.size());
  strips_.resize(convs_.size()), taps_.resize(convs_.size()), phases_.resize(convs_.size()), firsts_.resize(convs_.size());
  std::vector<bool> loaded(tensors_.size()), unmeasured(tensors_.size());
  for (const Layer& layer : layers_) {
    if (layer.op == Op::load || layer.op == Op::embed || layer.op == Op::noise_features) loaded[layer.output] = true;
    if (layer.norm >= 0 && norms_[layer.norm].groups && !norms_[layer.norm].by_pixel && unmeasured[layer.input])
      refuse("a norm of what norm_backward or attention_backward wrote, which keep no statistics");
    if (layer.op == Op::norm_backward || layer.op == Op::attention_backward) unmeasured[layer.output] = true;
    plan_memory(layer);
    if (layer.conv >= 0) plan_conv(layer, loaded[layer.input]);
  }
  plan_arena();
  state_ = State::planned;
}

// Each tensor takes the lowest place that is free from its first layer to its last.
void Executor::plan_arena() {
  const auto source_of = [&](const Layer& l) { return l.norm < 0 ? -1 : norms_[l.norm].source; };
  std::vector<int> last_use(tensors_.size(), -1);
  for (size_t i = 0; i < layers_.size(); ++i)
    for (int t : {layers_[i].input, layers_[i].second, layers_[i].output, layers_[i].add[0], layers_[i].add[1], source_of(layers_[i])})
      if (t >= 0) last_use[t] = static_cast<int>(i);
  struct Place {
    int64_t begin, end;
    int last_use;
  };
  std::vector<Place> places;
  std::vector<bool> placed(tensors_.size());
  for (size_t i = 0; i < layers_.size(); ++i) {
    const int id = layers_[i].output;
    places.erase(std::remove_if(places.begin(), places.end(), [&](const Place& p) { return p.last_use < static_cast<int>(i); }),
                 places.end());
    for (int t : {layers_[i].input, layers_[i].second, layers_[i].add[0], layers_[i].add[1], source_of(layers_[i])})
      if (t >= 0 && !placed[t]) refuse("layer " + std::to_string(i) + " reads a tensor that no layer wrote");
    if (id < 0) continue;
    if (placed[id]) refuse("layer " + std::to_string(i) + " writes a tensor for the second time");
    Tensor& t = tensors_[id];
    const int64_t size = round_up(times(t.padded, t.height, t.width), 16) + 16;
    std::sort(places.begin(), places.end(), [](const Place& a, const Place& b) { return a.begin < b.begin; });
    int64_t begin = 0;
    for (const Place& p : places) {
      if (p.begin - begin >= size) break;
      begin = p.end;
    }
    t.offset = begin;
    placed[id] = true;
    places.push_back({begin, begin + size, last_use[id]});
    arena_size_ = std::max(arena_size_, times(begin + size));
    if (t.moments == 0) {
      t.moments = moments_size_;
      moments_size_ += kMomentRows * t.padded;
    }
  }
}

}  // namespace sgm::executor
