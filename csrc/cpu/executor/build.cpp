// Describing a network to the executor, and its parameters.
#include <algorithm>
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

// Without an output it is the last: the score, of the input's size.
bool conv_fits(const Conv& c, const Tensor& in, const Tensor* out) {
  const auto size = [&](int n) {
    const int room = n + 2 * c.pad_before - c.dilation * (c.kernel - 1) - 1;
    return c.pool ? n / 2 : room < 0 ? 0 : room / c.stride + 1;
  };
  const int height = size(in.height), width = size(in.width);
  if (!out) return c.c_in == in.channels && c.stride == 1 && height == in.height && width == in.width;
  return c.c_in == in.channels && sized(*out, c.c_out, height, width);
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
    case Op::attention: return {true, false, true, false, false};
    case Op::attention_backward: return {true, true, true, false, false};
  }
  return {};
}

bool shape_follows(Op op, const Tensor& in, const Tensor* second, const Tensor& out) {
  switch (op) {
    case Op::activate: case Op::mean_pool5: case Op::max_pool5: return sized(out, in.channels, in.height, in.width);
    case Op::mean_pool: return sized(out, in.channels, in.height / 2, in.width / 2);
    case Op::upsample: return out.channels == in.channels;
    case Op::nearest: return out.channels == in.channels && repeats(in, out);
    case Op::block_sum: return out.channels == in.channels && repeats(out, in);
    case Op::slope: return sized(out, in.channels, in.height, in.width);
    case Op::norm_backward: return sized(out, in.channels, in.height, in.width) && sized(*second, in.channels, in.height, in.width);
    case Op::attention: return in.channels % 3 == 0 && out.channels <= in.channels / 3 && sized(out, out.channels, in.height, in.width);
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

int Executor::norm(int channels, int groups, int levels, bool per_level, bool has_alpha, double eps) {
  const auto lock = describing("norm");
  within("a norm's channels", channels, 1, kMaxChannels), within("a norm's levels", levels, 1, kMaxLevels);
  if (groups < 0 || (groups && channels % groups))
    refuse("channels must divide into groups, got " + std::to_string(channels) + " and " + std::to_string(groups));
  if (has_alpha && (channels < 2 || groups != channels))
    refuse("a norm with alpha needs channels >= 2, each its own group, got " + std::to_string(channels) + " in " +
           std::to_string(groups) + " groups");
  if (!(eps >= 0)) refuse("a norm's eps must be at least 0, got " + std::to_string(eps));
  norm_tables_.resize(norms_.size());  // drops that of a norm() that failed
  norm_tables_.emplace_back(times(per_level ? levels : 1, 3, channels));
  norms_.push_back({channels, groups, per_level ? 3 * channels : 0, has_alpha, static_cast<float>(eps), nullptr});
  if (per_level) set_levels(levels);
  return static_cast<int>(norms_.size()) - 1;
}

int Executor::conv(int c_in, int c_out, int kernel, int dilation, int stride, int padding, bool pool) {
  static_assert(kMaxKernel * kMaxKernel == kMaxTaps);
  const auto lock = describing("conv");
  within("c_in", c_in, 1, kMaxChannels), within("c_out", c_out, 1, kMaxChannels);
  within("kernel", kernel, 1, kMaxKernel), within("dilation", dilation, 1, kMaxSide), within("stride", stride, 1, kMaxSide);
  if (padding < 0 || padding > dilation * (kernel - 1) / 2)
    refuse("padding must not make the output larger than the input, got " + std::to_string(padding));
  if (pool && (kernel != 3 || dilation != 1 || stride != 1 || padding != 1)) refuse("pool needs an undilated 3x3 convolution");
  Conv conv{};
  conv.c_in = c_in, conv.c_out = c_out, conv.kernel = kernel, conv.dilation = dilation, conv.pool = pool;
  conv.stride = stride, conv.pad_before = conv.pad_after = padding;
  convs_.push_back(conv);
  return static_cast<int>(convs_.size()) - 1;
}

void Executor::embedding(int channels, int height, int width, int patch, const std::vector<int>& octaves) {
  const auto lock = describing("embedding");
  if (embedding_.channels) throw std::logic_error("embedding() twice");
  check_shape("an embedding's", channels, height, width);
  within("patch", patch, 1, std::min(height, width));
  if (height % patch || width % patch)
    refuse("patch must divide height and width, got " + std::to_string(patch) + " for " + std::to_string(height) + ", " + std::to_string(width));
  within("the number of octaves", static_cast<int64_t>(octaves.size()), 0, kMaxOctaves);
  Embedding e{channels, height, width, patch, static_cast<int>(octaves.size()), {}, nullptr};
  for (size_t i = 0; i < octaves.size(); ++i) e.octave[i] = within("octave n of 2^n", octaves[i], 0, 30);
  embedding_ = e;
}

// What only the layers of a gradient ask for.
void Executor::check_gradient(const Layer& l, const std::string& where) const {
  if (l.op == Op::slope || l.op == Op::norm_backward) {
    const Norm& norm = norms_[l.norm];
    const bool known = l.activation == Activation::silu || (l.op == Op::norm_backward && l.activation == Activation::none);
    if ((l.op == Op::slope) != (norm.groups == 0) || norm.has_alpha || !known) refuse(where + "no gradient of that norm and activation");
  }
  if (l.op == Op::slice && (l.first < 0 || int64_t{l.first} + tensors_[l.output].channels > tensors_[l.input].channels))
    refuse(where + "its input has " + std::to_string(tensors_[l.input].channels) + " channels");
  if ((l.op == Op::attention || l.op == Op::attention_backward) && tensors_[l.input].channels % (3 * backend_.width))
    refuse(where + "q, k and v need " + std::to_string(backend_.width) + " channels or multiples of it");
  const Embedding& e = embedding_;
  const auto embedded = [&](int id) {
    return e.channels && sized(tensors_[id], times(e.channels, 1 + 2 * e.octaves, e.patch, e.patch), e.height / e.patch, e.width / e.patch);
  };
  if ((l.op == Op::embed && !embedded(l.output)) || (l.op == Op::store_gradient && !(embedded(l.input) && embedded(l.second))))
    refuse(where + "it needs embedding() and a tensor of that shape");
}

void Executor::layer(Op op, int input, int second, int output, const std::vector<int>& add, int norm, Activation activation,
                     int conv, double scale, double shift, int first) {
  const auto lock = describing("layer");
  const std::string where = "layer " + std::to_string(layers_.size()) + ": ";
  const auto is_index = [](int i, size_t n) { return i >= 0 && i < static_cast<int>(n); };
  const Takes takes = what_it_takes(op);
  const bool convolves = op == Op::conv || op == Op::store, of_norm = op == Op::slope || op == Op::norm_backward;
  if ((takes.input && !is_index(input, tensors_.size())) || (takes.output && !is_index(output, tensors_.size())) ||
      (takes.second && !is_index(second, tensors_.size())) || (convolves && !is_index(conv, convs_.size())) ||
      ((norm >= 0 || of_norm) && !is_index(norm, norms_.size())) || add.size() > 2 || (!add.empty() && !takes.add))
    throw std::out_of_range(where + "no such tensor, norm or conv, or more addends than it takes");
  Layer l{op, takes.input ? input : -1, takes.second ? second : -1, takes.output ? output : -1, {-1, -1}, norm, activation,
          convolves ? conv : -1, static_cast<float>(scale), static_cast<float>(shift), first};
  for (size_t i = 0; i < add.size(); ++i) {
    const Tensor &a = tensors_.at(add[i]), &o = tensors_[output];
    if (a.channels != o.channels || a.height != o.height || a.width != o.width) refuse(where + "an addend has another shape than the output");
    l.add[i] = add[i];
  }
  if (!takes.prologue && (norm >= 0 || activation != Activation::none)) refuse(where + "it takes no norm and no activation");
  if (norm >= 0 && norms_[norm].channels != tensors_[input].channels)
    refuse(where + "the norm has " + std::to_string(norms_[norm].channels) + " channels, its input " +
           std::to_string(tensors_[input].channels));
  check_gradient(l, where);
  if (convolves ? !conv_fits(convs_[conv], tensors_[input], takes.output ? &tensors_[output] : nullptr)
                : takes.input && takes.output && !shape_follows(op, tensors_[input], takes.second ? &tensors_[second] : nullptr, tensors_[output]))
    refuse(where + "the output's shape does not follow from its inputs");
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
  check_size("weight", weight.size, static_cast<int64_t>(c.c_out) * c.c_in * c.kernel * c.kernel);
  if (bias.data) check_size("bias", bias.size, c.c_out);
  const int columns = c.blocks * c.vectors * backend_.width;
  std::memset(biases_[index].data(), 0, static_cast<size_t>(columns) * sizeof(float));
  if (bias.data) std::memcpy(biases_[index].data(), bias.data, static_cast<size_t>(c.c_out) * sizeof(float));
  bool last = false;
  int padded = 0;
  for (const Layer& l : layers_)
    if (l.conv == index) last = l.op == Op::store, padded = tensors_[l.input].padded;
  if (last) pack_last(c, padded, weight.data, weights_[index].data());
  else pack(c, c.vectors * backend_.width, weight.data, weights_[index].data());
  c.weights = weights_[index].data(), c.bias = biases_[index].data();
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

void Executor::set_embedding(const double* table, int64_t size) {
  const auto lock = alone();
  if (size < 5 || size % 5 || (!embedding_table_.empty() && size != static_cast<int64_t>(embedding_table_.size())))
    refuse("the table of an embedding must have 5 numbers a level, as many as before, got " + std::to_string(size));
  const int64_t levels = within("the levels of an embedding", size / 5, 1, kMaxLevels);
  embedding_table_.assign(table, table + size);
  embedding_.table = embedding_table_.data();
  set_levels(levels);
}

void Executor::set_levels(int64_t levels) { levels_ = static_cast<int>(levels_ ? std::min<int64_t>(levels_, levels) : levels); }

}  // namespace sgm::executor
