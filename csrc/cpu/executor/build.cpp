// Describing a network to the executor, and its parameters.
#include <algorithm>
#include <cstring>
#include <stdexcept>

#include "cpu/executor/executor.h"
#include "cpu/executor/internal.h"
#include "cpu/executor/pack.h"

namespace sgm::executor {

int Executor::tensor(int channels, int height, int width) {
  if (channels < 1 || height < 1 || width < 1)
    refuse("a tensor needs channels, height, width >= 1, got " + std::to_string(channels) + ", " + std::to_string(height) +
           ", " + std::to_string(width));
  tensors_.push_back({channels, static_cast<int>(round_up(channels, backend_.width)), height, width, 0, -1});
  return static_cast<int>(tensors_.size()) - 1;
}

int Executor::norm(int channels, int groups, int levels, bool per_level, bool has_alpha, double eps) {
  if (channels < 1 || groups < 0 || (groups && channels % groups))
    refuse("channels must divide into groups, got " + std::to_string(channels) + " and " + std::to_string(groups));
  if (has_alpha && (channels < 2 || groups != channels))
    refuse("a norm with alpha needs channels >= 2, each its own group, got " + std::to_string(channels) + " in " +
           std::to_string(groups) + " groups");
  const int rows = per_level ? levels : 1;
  if (per_level) levels_ = levels_ ? std::min(levels_, levels) : levels;
  norm_tables_.emplace_back(static_cast<size_t>(rows) * 3 * channels);
  norms_.push_back({channels, groups, per_level ? 3 * channels : 0, has_alpha, static_cast<float>(eps), nullptr});
  return static_cast<int>(norms_.size()) - 1;
}

int Executor::conv(int c_in, int c_out, int kernel, int dilation, int stride, int padding, bool pool) {
  if (kernel < 1 || kernel * kernel > kMaxTaps) refuse("kernel must be from 1 to 7, got " + std::to_string(kernel));
  if (dilation < 1) refuse("dilation must be at least 1, got " + std::to_string(dilation));
  if (stride < 1) refuse("stride must be at least 1, got " + std::to_string(stride));
  if (padding < 0 || 2 * padding > dilation * (kernel - 1))
    refuse("padding must not make the output larger than the input, got " + std::to_string(padding));
  if (pool && (kernel != 3 || dilation != 1 || stride != 1 || padding != 1)) refuse("pool needs an undilated 3x3 convolution");
  Conv conv{};
  conv.c_in = c_in, conv.c_out = c_out, conv.kernel = kernel, conv.dilation = dilation, conv.pool = pool;
  conv.stride = stride, conv.pad_before = conv.pad_after = padding;
  convs_.push_back(conv);
  return static_cast<int>(convs_.size()) - 1;
}

void Executor::layer(Op op, int input, int second, int output, const std::vector<int>& add, int norm, Activation activation,
                     int conv, double scale, double shift) {
  if (planned_) throw std::logic_error("layer() after plan()");
  const auto is_index = [](int i, size_t n) { return i >= 0 && i < static_cast<int>(n); };
  const bool reads = op != Op::load, writes = op != Op::store, convolves = op == Op::conv || op == Op::store;
  if ((reads && !is_index(input, tensors_.size())) || (writes && !is_index(output, tensors_.size())) ||
      (op == Op::concat && !is_index(second, tensors_.size())) || (convolves && !is_index(conv, convs_.size())) || (norm >= 0 && !is_index(norm, norms_.size())) || add.size() > 2)
    throw std::out_of_range("layer " + std::to_string(layers_.size()) + ": no such tensor, norm or conv, or more than two addends");
  Layer l{op, reads ? input : -1, op == Op::concat ? second : -1, writes ? output : -1, {-1, -1}, norm, activation, convolves ? conv : -1,
          static_cast<float>(scale), static_cast<float>(shift)};
  for (size_t i = 0; i < add.size(); ++i) {
    const Tensor &a = tensors_.at(add[i]), &o = tensors_[output];
    if (a.channels != o.channels || a.height != o.height || a.width != o.width)
      refuse("layer " + std::to_string(layers_.size()) + ": an addend has another shape than the output");
    l.add[i] = add[i];
  }
  if (norm >= 0 && norms_[norm].channels != tensors_[input].channels)
    refuse("layer " + std::to_string(layers_.size()) + ": the norm has " + std::to_string(norms_[norm].channels) +
           " channels, its input " + std::to_string(tensors_[input].channels));
  if (convolves) {
    const Conv& c = convs_[conv];
    const Tensor& in = tensors_[input];
    const auto size = [&](int n) {
      const int room = n + 2 * c.pad_before - c.dilation * (c.kernel - 1) - 1;
      return c.pool ? n / 2 : room < 0 ? 0 : room / c.stride + 1;
    };
    const int height = size(in.height), width = size(in.width);
    const Tensor out = writes ? tensors_[output] : Tensor{c.c_out, 0, in.height, in.width, 0, -1};
    if (c.c_in != in.channels || c.c_out != out.channels || height != out.height || width != out.width ||
        (!writes && c.stride != 1))
      refuse("layer " + std::to_string(layers_.size()) + ": the convolution does not fit its tensors");
  }
  const auto sized = [&](int id, int channels, int height, int width) {
    const Tensor& t = tensors_[id];
    return t.channels == channels && t.height == height && t.width == width;
  };
  const bool same_size = op == Op::activate || op == Op::mean_pool5 || op == Op::max_pool5;
  bool fits = true;
  if (reads && writes) {
    const Tensor &in = tensors_[input], &out = tensors_[output];
    if (same_size) fits = sized(output, in.channels, in.height, in.width);
    if (op == Op::mean_pool) fits = sized(output, in.channels, in.height / 2, in.width / 2);
    if (op == Op::upsample) fits = out.channels == in.channels;
    if (op == Op::nearest) fits = sized(output, in.channels, out.height / in.height * in.height, out.width / in.width * in.width);
    if (op == Op::concat) fits = sized(second, out.channels - in.channels, out.height, out.width) && sized(input, in.channels, out.height, out.width);
  }
  if (!fits) refuse("layer " + std::to_string(layers_.size()) + ": the output's shape does not follow from its inputs");
  layers_.push_back(l);
}

void Executor::set_conv(int index, const float* weight, const float* bias) {
  const Conv& c = convs_.at(index);
  if (!planned_ || !c.weights) throw std::logic_error("set_conv() before plan(), or of a convolution that no layer uses");
  const int columns = c.blocks * c.vectors * backend_.width;
  std::memset(biases_[index].data(), 0, static_cast<size_t>(columns) * sizeof(float));
  if (bias) std::memcpy(biases_[index].data(), bias, static_cast<size_t>(c.c_out) * sizeof(float));
  bool last = false;
  int padded = 0;
  for (const Layer& l : layers_)
    if (l.conv == index) last = l.op == Op::store, padded = tensors_[l.input].padded;
  if (last) pack_last(c, padded, weight, weights_[index].data());
  else pack(c, c.vectors * backend_.width, weight, weights_[index].data());
}

void Executor::set_norm(int index, const float* gamma, const float* alpha, const float* beta, int64_t row) {
  const Norm& norm = norms_.at(index);
  std::vector<float>& table = norm_tables_[index];
  const int64_t channels = norm.channels, rows = static_cast<int64_t>(table.size()) / (3 * channels);
  const float* sources[3] = {gamma, alpha, beta};
  const float defaults[3] = {1, 0, 0};
  for (int64_t r = 0; r < rows; ++r)
    for (int part = 0; part < 3; ++part)
      for (int64_t c = 0; c < channels; ++c)
        table[(r * 3 + part) * channels + c] = sources[part] ? sources[part][r * row + c] : defaults[part];
}

void Executor::set_sigmas(const float* sigmas, int levels) {
  sigmas_.assign(sigmas, sigmas + levels);
  levels_ = levels_ ? std::min(levels_, levels) : levels;
}

}  // namespace sgm::executor
