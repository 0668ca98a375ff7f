// Describing the ends of a network whose score is a gradient (embed.h, potential.h) to the executor, and their tables.
#include <algorithm>
#include <stdexcept>
#include <utility>
#include <vector>

#include "cpu/executor/executor.h"
#include "cpu/executor/internal.h"
#include "cpu/executor/sizes.h"

namespace sgm::executor {

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

void Executor::potential(int channels, int height, int width, int classes, int waves, int potentials) {
  const auto lock = describing("potential");
  if (potential_.channels) throw std::logic_error("potential() twice");
  check_shape("a potential's", channels, height, width);
  within("classes", classes, 3, kMaxLevels), within("waves", waves, 1, kMaxChannels), within("potentials", potentials, 1, kMaxChannels);
  if (height % 4 || width % 4) refuse("height and width must divide by 4, got " + std::to_string(height) + ", " + std::to_string(width));
  const int64_t size = times(channels, height, width);
  times(size, size + 4LL * classes);
  potential_ = {};
  potential_.channels = channels, potential_.height = height, potential_.width = width, potential_.size = static_cast<int>(size);
  potential_.classes = classes, potential_.waves = waves, potential_.potentials = potentials;
  potential_.stride = times(kPotentialRows, size) + 2 * classes + 2;
  const int64_t padded = round_up(16 * channels, backend_.width);
  within("the numbers of its planes", times(padded, size), 1, INT32_MAX);
  for (int c = 0; c < channels; ++c)
    for (int h = 0; h < height; ++h)
      for (int w = 0; w < width; ++w)
        potential_places_.push_back(static_cast<int>((int64_t{h} / 2 * (width / 2) + w / 2) * padded + 4 * c + h % 2 * 2 + w % 2));
  potential_.place = potential_places_.data();
}

int Executor::constant(int channels, int height, int width) {
  const auto lock = describing("constant");
  check_shape("a constant's", channels, height, width);
  const int padded = static_cast<int>(round_up(channels, backend_.width));
  constants_.push_back({channels, padded, height, width, 0, -1});
  constant_values_.emplace_back(times(padded, height, width) + backend_.width), constant_data_.push_back(nullptr);
  return static_cast<int>(constants_.size()) - 1;
}

void Executor::check_potential(const Layer& l, const std::string& where) const {
  const Potential& p = potential_;
  const auto sized = [&](int id, int64_t channels, int height, int width) {
    const Tensor& t = tensors_[id];
    return t.channels == channels && t.height == height && t.width == width;
  };
  const auto folded = [&](int id, int64_t planes) { return p.channels && sized(id, 4 * planes * p.channels, p.height / 2, p.width / 2); };
  const auto waves = [&](int id) { return p.channels && sized(id, p.waves, 1, 1); };
  const bool fits = l.op == Op::noise_features    ? folded(l.output, 4)
                    : l.op == Op::waves           ? waves(l.output)
                    : l.op == Op::potential       ? folded(l.input, p.potentials)
                    : l.op == Op::store_potential ? folded(l.input, 4) && waves(l.second)
                                                  : true;
  if (!fits) refuse(where + "it needs potential() and tensors of its shapes");
  if (l.op == Op::constant) {
    const bool known = l.first >= 0 && l.first < static_cast<int>(constants_.size());
    if (!known || !sized(l.output, constants_[l.first].channels, constants_[l.first].height, constants_[l.first].width))
      refuse(where + "no such constant, or one of another shape");
  }
  if (l.op != Op::affine_backward && l.op != Op::film_backward) return;
  const bool film = l.norm >= 0 && norms_[l.norm].source >= 0, plain = l.norm < 0 || norms_[l.norm].groups == 0;
  const bool known = l.activation == Activation::silu || l.activation == Activation::none;
  if (!known || !plain || (l.op == Op::film_backward && !film)) refuse(where + "no gradient of that norm and activation");
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

void Executor::set_potential(const double* table, int64_t size) {
  const auto lock = alone();
  Potential& p = potential_;
  if (!p.channels) throw std::logic_error("set_potential() before potential()");
  const int64_t d = p.size, k = p.classes, fixed = d + d * d + 3 * k + k * p.waves + 4 * k * d, level = 3 + p.potentials;
  if (size < fixed + level || (size - fixed) % level || (p.mean && size != static_cast<int64_t>(potential_table_.size())))
    refuse("the table of a potential must have " + std::to_string(fixed) + " numbers and " + std::to_string(level) + " a level, got " + std::to_string(size));
  const int64_t levels = within("the levels of a potential", (size - fixed) / level, 1, kMaxLevels);
  for (int64_t i = 0; i < levels; ++i)
    if (const double own = table[fixed + i * level]; !(own >= 0 && own < k)) refuse("a level's class must be in [0, " + std::to_string(k) + ")");
  potential_table_.assign(table, table + size);
  const double* at = potential_table_.data();
  const auto take = [&](int64_t count) { return std::exchange(at, at + count); };
  p.mean = take(d);
  potential_basis_.assign(at, at + d * d), at += d * d, p.basis = potential_basis_.data();
   p.constant = take(k), p.log_noise = take(k), p.signal = take(k), p.wave = take(k * p.waves);
  p.precision = take(k * d), p.shifted = take(k * d), p.share = take(k * d), p.centre = take(k * d), p.levels = at;
  set_levels(levels);
}

void Executor::set_constant(int index, Array values) {
  const auto lock = alone();
  const Tensor& t = constants_.at(index);
  Buffer& kept = constant_values_[index];
  const int64_t pixels = int64_t{t.height} * t.width;
  if (values.size != pixels * t.channels) refuse("a constant must have " + std::to_string(pixels * t.channels) + " floats, got " + std::to_string(values.size));
  std::fill(kept.data(), kept.data() + kept.size(), 0.f);
  for (int64_t i = 0; i < pixels; ++i) std::copy(values.data + i * t.channels, values.data + (i + 1) * t.channels, kept.data() + i * t.padded);
  constant_data_[index] = kept.data();
}

}  // namespace sgm::executor
