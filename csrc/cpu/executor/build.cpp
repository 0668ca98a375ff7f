// Describing a network to the executor, and its parameters.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <stdexcept>

#include "cpu/executor/executor.h"
#include "cpu/executor/internal.h"
#include "cpu/executor/pack.h"
#include "cpu/executor/sizes.h"

namespace sgm::executor {
namespace {

bool sized(const Tensor& t, int64_t channels, int height, int width) {
  return t.channels == channels && t.height == height && t.width == width;
}

// Without an output it is the last: the score.
bool conv_fits(const Conv& c, const Tensor& in, const Tensor* out) {
  const auto size = [&](int n, Side before, Side after) {
    const int64_t room = static_cast<int64_t>(c.up) * (n - 1) + c.pad[before] + c.pad[after] - static_cast<int64_t>(c.dilation) * (c.kernel - 1);
    return c.pool ? n / 2 : room < 0 ? 0 : room / c.stride + 1;
  };
  const int64_t height = size(in.height, kTop, kBottom), width = size(in.width, kLeft, kRight);
  if (c.c_in != in.channels) return false;
  if (!out) return c.stride == 1 && c.up == 1 && c.groups == 1 && !c.pool && height > 0 && width > 0;
  return out->channels == c.c_out && out->height == height && out->width == width;
}

// Whether the image holds what its border repeats.
bool border_fits(const Conv& c, const Tensor& in) {
  if (c.border == Border::zeros || c.border == Border::replicate) return true;
  const int spare = c.border == Border::reflect ? 1 : 0;
  return std::max(c.pad[kTop], c.pad[kBottom]) <= in.height - spare && std::max(c.pad[kLeft], c.pad[kRight]) <= in.width - spare;
}

// Whether every pixel of `small`, repeated a whole number of times and cropped, makes `large`.
bool repeats(const Tensor& small, const Tensor& large) {
  const auto fits = [](int few, int many) { return (few - 1) * ((many + few - 1) / few) < many; };
  return fits(small.height, large.height) && fits(small.width, large.width);
}

struct Takes {
  bool input, second, output, add, prologue;
};

Takes what_it_takes(Op op) {
  switch (op) {
    case Op::load: return {false, false, true, true, false};
    case Op::embed: return {false, false, true, false, false};
    case Op::store: return {true, false, false, false, true};
    case Op::store_gradient: return {true, true, false, false, false};
    case Op::conv: case Op::activate: case Op::mean_pool: case Op::mean_pool5: case Op::max_pool5: case Op::slope:
      return {true, false, true, true, true};
    case Op::norm_backward: return {true, true, true, true, true};
    case Op::upsample: case Op::nearest: case Op::block_sum: case Op::spread: case Op::slice: return {true, false, true, true, false};
    case Op::concat: return {true, true, true, true, false};
    case Op::attention: case Op::linear_attention: return {true, false, true, false, false};
    case Op::channel_norm: return {true, false, true, true, true};
    case Op::attention_backward: return {true, true, true, false, false};
    case Op::noise_features: case Op::waves: case Op::constant: return {false, false, true, false, false};
    case Op::potential: case Op::reshape: return {true, false, true, false, false};
    case Op::store_potential: return {true, true, false, false, false};
    case Op::affine_backward: return {true, true, true, true, true};
    case Op::film_backward: return {true, true, true, false, true};
  }
  return {};
}

bool shape_follows(Op op, const Tensor& in, const Tensor* second, const Tensor& out) {
  switch (op) {
    case Op::activate: case Op::mean_pool5: case Op::max_pool5: case Op::channel_norm: return sized(out, in.channels, in.height, in.width);
    case Op::mean_pool: return sized(out, in.channels, in.height / 2, in.width / 2);
    case Op::upsample: return out.channels == in.channels;
    case Op::nearest: return out.channels == in.channels && repeats(in, out);
    case Op::block_sum: return out.channels == in.channels && repeats(out, in);
    case Op::slope: case Op::potential: return sized(out, in.channels, in.height, in.width);
    case Op::reshape: return times(in.channels, in.height, in.width) == times(out.channels, out.height, out.width);
    case Op::film_backward: return sized(out, 2 * in.channels, 1, 1) && sized(*second, in.channels, in.height, in.width);
    case Op::norm_backward: case Op::affine_backward: return sized(out, in.channels, in.height, in.width) && sized(*second, in.channels, in.height, in.width);
    case Op::attention: case Op::linear_attention: return in.channels % 3 == 0 && out.channels <= in.channels / 3 && sized(out, out.channels, in.height, in.width);
    case Op::attention_backward:
      return in.channels % 3 == 0 && second->channels <= in.channels / 3 && sized(*second, second->channels, in.height, in.width) &&
             sized(out, in.channels, in.height, in.width);
    case Op::spread: return sized(in, out.channels, (out.height + 1) / 2, (out.width + 1) / 2);
    case Op::slice: return sized(out, out.channels, in.height, in.width);
    case Op::concat:
      return sized(in, in.channels, out.height, out.width) && sized(*second, out.channels - in.channels, out.height, out.width);
    default: return true;
  }
}

}  // namespace

int Executor::tensor(int channels, int height, int width) {
  const auto lock = describing("tensor");
  check_shape("a tensor's", channels, height, width);
  tensors_.push_back({channels, static_cast<int>(round_up(channels, backend_.width)), height, width, 0, -1});
  return static_cast<int>(tensors_.size()) - 1;
}

int Executor::norm(const NormShape& n) {
  const auto lock = describing("norm");
  within("a norm's channels", n.channels, 1, kMaxChannels), within("a norm's levels", n.levels, 0, kMaxLevels);
  if (n.groups < 0 || (n.groups && n.channels % n.groups))
    refuse("channels must divide into groups, got " + std::to_string(n.channels) + " and " + std::to_string(n.groups));
  if (n.has_alpha && (n.channels < 2 || n.groups != n.channels))
    refuse("a norm with alpha needs channels >= 2, each its own group, got " + std::to_string(n.channels) + " in " +
           std::to_string(n.groups) + " groups");
  if (n.by_pixel && (n.groups < 1 || n.has_alpha)) refuse("a norm by pixel needs groups >= 1 and no alpha");
  if (!(n.eps >= 0) || !(n.floor >= 0) || !(n.after >= 0))
    refuse("a norm's eps, floor and after must be at least 0, got " + std::to_string(n.eps) + ", " + std::to_string(n.floor) + ", " +
           std::to_string(n.after));
  if (n.source >= 0 && (n.groups || n.levels || n.source >= static_cast<int>(tensors_.size()) || !sized(tensors_[n.source], 2 * n.channels, 1, 1)))
    refuse("a norm's source needs groups = 0, no levels and a tensor of 2 * channels numbers");
  norm_tables_.resize(norms_.size());  // drops that of a norm() that failed
  norm_tables_.emplace_back(times(std::max(n.levels, 1), 3, n.channels));
  norms_.push_back({n.channels, n.groups, n.levels ? int64_t{3} * n.channels : 0, n.has_alpha, static_cast<float>(n.eps), nullptr,
                    n.source, n.by_pixel, n.centred, static_cast<float>(n.floor), static_cast<float>(n.after)});
  if (n.levels) set_levels(n.levels);
  return static_cast<int>(norms_.size()) - 1;
}

int Executor::conv(const ConvShape& s) {
  static_assert(kMaxKernel * kMaxKernel == kMaxTaps);
  const auto lock = describing("conv");
  within("c_in", s.c_in, 1, kMaxChannels), within("c_out", s.c_out, 1, kMaxChannels);
  within("kernel", s.kernel, 1, kMaxKernel), within("dilation", s.dilation, 1, kMaxSide), within("stride", s.stride, 1, kMaxSide);
  within("up", s.up, 1, kMaxKernel), within("levels", s.levels, 0, kMaxLevels);
  for (const int pad : s.pad) within("padding", pad, 0, kMaxSide);
  if (s.groups < 1 || s.c_in % s.groups || s.c_out % s.groups)
    refuse("groups must divide c_in and c_out, got " + std::to_string(s.groups) + ", " + std::to_string(s.c_in) + ", " + std::to_string(s.c_out));
  if (s.up > 1 && (s.stride != 1 || s.border != Border::zeros)) refuse("up > 1 needs stride 1 and a border of zeros");
  const bool plain = s.kernel == 3 && s.dilation == 1 && s.stride == 1 && s.up == 1 && s.groups == 1;
  if (s.pool && !(plain && std::all_of(s.pad, s.pad + 4, [](int pad) { return pad == 1; })))
    refuse("pool needs an ordinary 3x3 convolution with padding 1");
  Conv conv{};
  conv.c_in = s.c_in, conv.c_out = s.c_out, conv.kernel = s.kernel, conv.dilation = s.dilation, conv.stride = s.stride;
  conv.up = s.up, conv.groups = s.groups, conv.border = s.border, conv.pool = s.pool, conv.bias_row = s.levels;
  std::copy(s.pad, s.pad + 4, conv.pad);
  convs_.push_back(conv);
  if (s.levels) set_levels(s.levels);
  return static_cast<int>(convs_.size()) - 1;
}

int Executor::heads(int count, int size, double scale, int memory) {
  const auto lock = describing("heads");
  within("heads", count, 1, kMaxChannels), within("a head's size", size, 1, kMaxChannels), within("memory", memory, 0, kMaxSide);
  if (!std::isfinite(scale)) refuse("attention needs a finite scale, got " + std::to_string(scale));
  tokens_.resize(heads_.size());  // drops those of a heads() that failed
  tokens_.emplace_back(times(2, count, memory, size));
  heads_.push_back({count, size, static_cast<float>(scale), memory, nullptr});
  return static_cast<int>(heads_.size()) - 1;
}

// What only the layers of a gradient ask for.
void Executor::check_gradient(const Layer& l, const std::string& where) const {
  if (l.op == Op::slope || l.op == Op::norm_backward) {
    const Norm& norm = norms_[l.norm];
    const bool known = l.activation == Activation::silu || l.activation == Activation::none;
    if ((l.op == Op::slope) != (norm.groups == 0) || norm.has_alpha || !known) refuse(where + "no gradient of that norm and activation");
  }
  if (l.op == Op::slice && (l.first < 0 || int64_t{l.first} + tensors_[l.output].channels > tensors_[l.input].channels))
    refuse(where + "its input has " + std::to_string(tensors_[l.input].channels) + " channels");
  if (l.op == Op::attention_backward && tensors_[l.input].channels % (3 * backend_.width))
    refuse(where + "q, k and v need " + std::to_string(backend_.width) + " channels or multiples of it");
  const Embedding& e = embedding_;
  const auto embedded = [&](int id) {
    return e.channels && sized(tensors_[id], times(e.channels, 1 + 2 * e.octaves, e.patch, e.patch), e.height / e.patch, e.width / e.patch);
  };
  if ((l.op == Op::embed && !embedded(l.output)) || (l.op == Op::store_gradient && !(embedded(l.input) && embedded(l.second))))
    refuse(where + "it needs embedding() and a tensor of that shape");
}

// What only some layers ask for.
void Executor::check_detail(const Layer& l, const std::string& where) const {
  if (l.norm >= 0 && norms_[l.norm].by_pixel != (l.op == Op::channel_norm)) refuse(where + "a norm by pixel is for channel_norm, which takes no other");
  if (l.activation == Activation::clip && !(l.slope >= 0)) refuse(where + "the limit of clip must be at least 0, got " + std::to_string(l.slope));
  if (l.conv >= 0 && !border_fits(convs_[l.conv], tensors_[l.input])) refuse(where + "its padding repeats more than its input holds");
  if (l.heads < 0) return;
  const Heads& heads = heads_[l.heads];
  if (static_cast<int64_t>(heads.count) * heads.size != tensors_[l.output].channels)
    refuse(where + std::to_string(heads.count) + " heads of " + std::to_string(heads.size) + " channels do not make " +
           std::to_string(tensors_[l.output].channels));
}

void Executor::layer(Op op, int input, int second, int output, const std::vector<Addend>& add, const Details& d) {
  const auto lock = describing("layer");
  const std::string where = "layer " + std::to_string(layers_.size()) + ": ";
  const auto is_index = [](int i, size_t n) { return i >= 0 && i < static_cast<int>(n); };
  const Takes takes = what_it_takes(op);
  const bool convolves = op == Op::conv || op == Op::store, attends = op == Op::attention || op == Op::linear_attention;
  const bool of_norm = op == Op::slope || op == Op::norm_backward || op == Op::channel_norm;
  if ((takes.input && !is_index(input, tensors_.size())) || (takes.output && !is_index(output, tensors_.size())) ||
      (takes.second && !is_index(second, tensors_.size())) || (convolves && !is_index(d.conv, convs_.size())) ||
      (attends && !is_index(d.heads, heads_.size())) || ((d.norm >= 0 || of_norm) && !is_index(d.norm, norms_.size())) ||
      add.size() > 2 || (!add.empty() && !takes.add))
    throw std::out_of_range(where + "no such tensor, norm, conv or heads, or more addends than it takes");
  Layer l{op, takes.input ? input : -1, takes.second ? second : -1, takes.output ? output : -1, {-1, -1}, {}, d.norm, d.activation,
          static_cast<float>(d.slope), convolves ? d.conv : -1, attends ? d.heads : -1, static_cast<float>(d.scale),
          static_cast<float>(d.shift), d.first};
  for (size_t i = 0; i < add.size(); ++i) {
    const Tensor &a = tensors_.at(add[i].first), &o = tensors_[output];
    if (a.channels != o.channels || a.height != o.height || a.width != o.width) refuse(where + "an addend has another shape than the output");
    l.add[i] = add[i].first, l.add_scale[i] = static_cast<float>(add[i].second);
  }
  if (!takes.prologue && (d.norm >= 0 || d.activation != Activation::none)) refuse(where + "it takes no norm and no activation");
  if (d.norm >= 0 && norms_[d.norm].channels != tensors_[input].channels)
    refuse(where + "the norm has " + std::to_string(norms_[d.norm].channels) + " channels, its input " +
           std::to_string(tensors_[input].channels));
  check_gradient(l, where), check_potential(l, where);
  if (convolves ? !conv_fits(convs_[d.conv], tensors_[input], takes.output ? &tensors_[output] : nullptr)
                : takes.input && takes.output && !shape_follows(op, tensors_[input], takes.second ? &tensors_[second] : nullptr, tensors_[output]))
    refuse(where + "the output's shape does not follow from its inputs");
  check_detail(l, where);
  layers_.push_back(l);
}

namespace {

void check_size(const char* name, int64_t size, int64_t want) {
  if (size != want) refuse(std::string(name) + " must have " + std::to_string(want) + " floats, got " + std::to_string(size));
}

}  // namespace

void Executor::set_conv(int index, Array weight, Array bias) {
  const auto lock = alone();
  Conv& c = convs_.at(index);
  if (state_ != State::planned || !weights_[index].size())
    throw std::logic_error("set_conv() before plan(), or of a convolution that no layer uses");
  check_size("weight", weight.size, static_cast<int64_t>(c.c_out) * (c.c_in / c.groups) * c.kernel * c.kernel);
  Buffer& kept = biases_[index];
  const int64_t rows = c.bias_row ? kept.size() / c.bias_row : 1;
  if (bias.data) check_size("bias", bias.size, rows * c.c_out);
  std::memset(kept.data(), 0, static_cast<size_t>(kept.size()) * sizeof(float));
  for (int64_t row = 0; bias.data && row < rows; ++row)
    std::copy(bias.data + row * c.c_out, bias.data + (row + 1) * c.c_out, kept.data() + row * c.bias_row);
  bool last = false;
  int padded = 0;
  for (const Layer& l : layers_)
    if (l.conv == index) last = l.op == Op::store, padded = tensors_[l.input].padded;
  if (last) pack_last(c, padded, weight.data, weights_[index].data());
  else if (c.depthwise) pack_depthwise(c, padded, weight.data, weights_[index].data());
  else pack(c, c.vectors * backend_.width, weight.data, weights_[index].data());
  c.weights = weights_[index].data(), c.bias = biases_[index].data();
}

void Executor::set_heads(int index, Array tokens) {
  const auto lock = alone();
  Buffer& kept = tokens_.at(index);
  check_size("tokens", tokens.size, kept.size());
  std::copy(tokens.data, tokens.data + tokens.size, kept.data());
  heads_[index].tokens = kept.data();
}

void Executor::set_norm(int index, Array table) {
  const auto lock = alone();
  Norm& norm = norms_.at(index);
  std::vector<float>& kept = norm_tables_[index];
  check_size("table", table.size, static_cast<int64_t>(kept.size()));
  std::copy(table.data, table.data + table.size, kept.begin());
  norm.table = kept.data();
}

void Executor::set_sigmas(Array sigmas) {
  const auto lock = alone();
  if (sigmas.size < 1 || (!sigmas_.empty() && sigmas.size != static_cast<int64_t>(sigmas_.size())))
    refuse("sigmas must have " + (sigmas_.empty() ? "at least 1 float" : std::to_string(sigmas_.size()) + " floats") +
           ", got " + std::to_string(sigmas.size));
  const int64_t levels = within("the number of sigmas", sigmas.size, 1, kMaxLevels);
  sigmas_.assign(sigmas.data, sigmas.data + sigmas.size);
  set_levels(levels);
}

void Executor::set_levels(int64_t levels) { levels_ = static_cast<int>(levels_ ? std::min<int64_t>(levels_, levels) : levels); }

}  // namespace sgm::executor
