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

std::vector<Tap> make_taps(const Conv& conv) {
  std::vector<Tap> taps;
  const int side = conv.pool ? 4 : conv.kernel;  // a 3×3 convolution and a 2×2 mean: one 4×4, stride 2
  for (int r = 0; r < side; ++r)
    for (int c = 0; c < side; ++c) taps.push_back({r * conv.dilation - conv.pad_before, c * conv.dilation - conv.pad_before});
  return taps;
}

}  // namespace

// The multiplications of both algorithms a pair of channels, with what the tiles cost beside them. Winograd reads 36
// weights where direct reads 9: with few tiles that is most of its time. bf16 counts as where an instruction multiplies pairs,
// so that every instruction set chooses alike.
bool Executor::prefers_winograd(const Conv& conv, int height, int width) const {
  if (precision_ == Precision::direct || conv.kernel != 3 || conv.stride != 1 || conv.pad_before != conv.dilation) return false;
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

// One layer writes the score, the last, and what reads x reads all of it.
void Executor::check_ends() const {
  const auto ends = [&](Op first, Op last) { return layers_.front().op == first && layers_.back().op == last; };
  if (layers_.empty() || !(ends(Op::load, Op::store) || ends(Op::embed, Op::store_gradient)))
    refuse("the first layer must be a load and the last a store, or an embed and a store_gradient");
  const Tensor x = sample();
  for (size_t i = 0; i < layers_.size(); ++i) {
    const Layer& l = layers_[i];
    if ((l.op == Op::store || l.op == Op::store_gradient) && i + 1 < layers_.size())
      refuse("layer " + std::to_string(i) + ": only the last layer may store the score");
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
  strips_.resize(convs_.size()), taps_.resize(convs_.size());
  const int team = std::max(1, num_threads() / batch_);
  std::vector<bool> loaded(tensors_.size()), unmeasured(tensors_.size());
  for (const Layer& layer : layers_) {
    if (layer.op == Op::load || layer.op == Op::embed) loaded[layer.output] = true;
    if (layer.norm >= 0 && norms_[layer.norm].groups) {
      if (unmeasured[layer.input]) refuse("a norm of what norm_backward or attention_backward wrote, which keep no statistics");
      tensors_[layer.input].moments = 0;
    }
    if (layer.op == Op::norm_backward || layer.op == Op::attention_backward) unmeasured[layer.output] = true;
    if (layer.op == Op::norm_backward) tensors_[layer.output].moments = 0;  // sums that its members share
    if (layer.op == Op::attention || layer.op == Op::attention_backward) {
      const Tensor& in = tensors_[layer.input];
      const int64_t pixels = in.height * in.width, line = round_up(pixels, backend_.width) + backend_.width;
      const int64_t rows = in.channels / 3 + pixels;
      matrices_size_ = std::max(matrices_size_, times(layer.op == Op::attention ? rows : 2 * rows, line));
    }
    if (layer.conv < 0) continue;
    Conv& c = convs_[layer.conv];
    if (weights_[layer.conv].size()) refuse("a convolution is used by two layers");
    const Tensor& in = tensors_[layer.input];
    const bool last = layer.op == Op::store;
    c.bf16 = precision_ == Precision::bfloat16 && !last && !loaded[layer.input];
    c.c_step = c.bf16 ? static_cast<int>(round_up(c.c_in, 2)) : c.c_in;
    c.winograd = !last && prefers_winograd(c, in.height, in.width);
    const int vectors = static_cast<int>(round_up(c.c_out, backend_.width)) / backend_.width;
    c.vectors = 1;
    for (int v = 2; v <= backend_.max_vectors; v *= 2)
      if (vectors % v == 0 && vectors / v >= std::min(team, vectors)) c.vectors = v;
    c.blocks = vectors / c.vectors;
    if (c.winograd) {
      strips_[layer.conv] = make_strips(in.height, in.width, c.dilation, c.pool);
      c.strips = strips_[layer.conv].data();
      c.strip_count = static_cast<int>(strips_[layer.conv].size());
      c.tiles = total_tiles(strips_[layer.conv]);
    } else {
      taps_[layer.conv] = make_taps(c);
      c.taps = taps_[layer.conv].data();
      c.tap_count = static_cast<int>(taps_[layer.conv].size());
      if (c.pool) c.stride = 2, c.pad_after = 2;
    }
    const int64_t taps = c.winograd ? kPoints : c.tap_count;
    const int64_t columns = last ? c.c_out : static_cast<int64_t>(c.blocks) * c.vectors * backend_.width;
    const int64_t channels = last ? in.padded : c.c_step;
    weights_[layer.conv] = Buffer(times(taps, channels, columns) / (c.bf16 ? 2 : 1) + backend_.width);
    biases_[layer.conv] = Buffer(round_up(c.c_out, backend_.width) + backend_.max_vectors * backend_.width);
  }

  // The arena: each tensor takes the lowest place that is free from its first layer to its last.
  std::vector<int> last_use(tensors_.size(), -1);
  for (size_t i = 0; i < layers_.size(); ++i)
    for (int t : {layers_[i].input, layers_[i].second, layers_[i].output, layers_[i].add[0], layers_[i].add[1]})
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
    for (int t : {layers_[i].input, layers_[i].second, layers_[i].add[0], layers_[i].add[1]})
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
  state_ = State::planned;
}

}  // namespace sgm::executor
