#include "cpu/executor/executor.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <new>
#include <stdexcept>
#include <thread>

#include "cpu/executor/pack.h"
#include "cpu/pool.h"
#include "update.h"

namespace sgm::executor {
namespace {

constexpr int kTileFloats = 16384;  // tiles × channels of one Winograd plane: 36 planes stay near the second-level cache
constexpr int kMicroBatch = 8;      // images one team carries through a layer together

int round_up(int n, int unit) { return (n + unit - 1) / unit * unit; }
int64_t round_up64(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

[[noreturn]] void refuse(const std::string& message) { throw std::invalid_argument(message); }

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

std::vector<Tap> make_taps(int kernel, int dilation, bool pool) {
  std::vector<Tap> taps;
  const int low = pool ? -1 : -(kernel / 2), high = pool ? 2 : kernel / 2;
  for (int r = low; r <= high; ++r)
    for (int c = low; c <= high; ++c) taps.push_back({r * dilation, c * dilation});
  return taps;
}

}  // namespace

struct Barrier {
  explicit Barrier(int size) : size(size) {}
  const int size;
  std::atomic<int> arrived{0}, generation{0};
};

void wait(Barrier* barrier) {
  const int generation = barrier->generation.load(std::memory_order_relaxed);
  if (barrier->arrived.fetch_add(1, std::memory_order_acq_rel) == barrier->size - 1) {
    barrier->arrived.store(0, std::memory_order_relaxed);
    barrier->generation.store(generation + 1, std::memory_order_release);
    return;
  }
  for (int spin = 0; barrier->generation.load(std::memory_order_acquire) == generation; ++spin)
    if (spin > 1000) std::this_thread::yield();
}

Buffer::Buffer(int64_t floats) : size_(floats) {
  if (floats) data_.reset(static_cast<float*>(::operator new(static_cast<size_t>(floats) * sizeof(float), std::align_val_t{64})));
}

void Buffer::Free::operator()(float* p) const { ::operator delete(p, std::align_val_t{64}); }

struct Executor::Team {
  Team(int size) : barrier(size) {}
  Barrier barrier;
  Workspace workspace{};
  bool stop = false;
  std::vector<Buffer> buffers;
  float* allocate(int64_t floats) {
    buffers.emplace_back(std::max<int64_t>(floats, 1) + 64);
    return buffers.back().data();
  }
};

Executor::Executor(int batch, Precision precision)
    : batch_(batch), precision_(precision), backend_(SGM_PICK(executor_backend)()) {
  if (batch < 1) refuse("batch must be at least 1, got " + std::to_string(batch));
  if (precision == Precision::bfloat16 && !backend_.bf16)
    refuse(std::string("precision='bfloat16' needs a CPU with AVX512_BF16; the instruction set in use is ") + name(isa()) +
           ": use precision='float32'");
}

Executor::~Executor() = default;

int Executor::tensor(int channels, int height, int width) {
  if (channels < 1 || height < 1 || width < 1)
    refuse("a tensor needs channels, height, width >= 1, got " + std::to_string(channels) + ", " + std::to_string(height) +
           ", " + std::to_string(width));
  tensors_.push_back({channels, round_up(channels, backend_.width), height, width, 0, -1});
  return static_cast<int>(tensors_.size()) - 1;
}

int Executor::norm(int channels, int levels, bool per_level, bool has_alpha, double eps) {
  if (has_alpha && channels < 2) refuse("a norm with alpha needs channels >= 2, got " + std::to_string(channels));
  const int rows = per_level ? levels : 1;
  if (per_level) levels_ = levels_ ? std::min(levels_, levels) : levels;
  norm_tables_.emplace_back(static_cast<size_t>(rows) * 3 * channels);
  norms_.push_back({channels, per_level ? 3 * channels : 0, has_alpha, static_cast<float>(eps), nullptr});
  return static_cast<int>(norms_.size()) - 1;
}

int Executor::conv(int c_in, int c_out, int kernel, int dilation, bool pool) {
  if (kernel != 1 && kernel != 3) refuse("kernel must be 1 or 3, got " + std::to_string(kernel));
  if (dilation < 1) refuse("dilation must be at least 1, got " + std::to_string(dilation));
  if (pool && (kernel != 3 || dilation != 1)) refuse("pool needs an undilated 3x3 convolution");
  Conv conv{};
  conv.c_in = c_in, conv.c_out = c_out, conv.kernel = kernel, conv.dilation = dilation, conv.pool = pool;
  convs_.push_back(conv);
  return static_cast<int>(convs_.size()) - 1;
}

void Executor::layer(Op op, int input, int output, const std::vector<int>& add, int norm, Activation activation, int conv,
                     double scale, double shift) {
  if (planned_) throw std::logic_error("layer() after plan()");
  const auto is_index = [](int i, size_t n) { return i >= 0 && i < static_cast<int>(n); };
  const bool reads = op != Op::load, writes = op != Op::store, convolves = op == Op::conv || op == Op::store;
  if ((reads && !is_index(input, tensors_.size())) || (writes && !is_index(output, tensors_.size())) ||
      (convolves && !is_index(conv, convs_.size())) || (norm >= 0 && !is_index(norm, norms_.size())) || add.size() > 2)
    throw std::out_of_range("layer " + std::to_string(layers_.size()) + ": no such tensor, norm or conv, or more than two addends");
  Layer l{op, reads ? input : -1, writes ? output : -1, {-1, -1}, norm, activation, convolves ? conv : -1,
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
    bool fits = c.c_in == in.channels;
    if (writes) {
      const Tensor& out = tensors_[output];
      fits = fits && c.c_out == out.channels && out.height == (c.pool ? in.height / 2 : in.height) &&
             out.width == (c.pool ? in.width / 2 : in.width);
    }
    if (!fits) refuse("layer " + std::to_string(layers_.size()) + ": the convolution does not fit its tensors");
  }
  layers_.push_back(l);
}

// The multiplications of both algorithms a pair of channels, with what the tiles cost beside them. Winograd reads 36
// weights where direct reads 9: with few tiles that is most of its time.
bool Executor::prefers_winograd(const Conv& conv, int height, int width) const {
  if (precision_ == Precision::direct || conv.kernel != 3) return false;
  if (precision_ == Precision::winograd) return true;
  const auto live = [&](int n) {  // (output, tap) pairs inside the image along one axis
    return n + 2 * std::max(0, n - conv.dilation);
  };
  const double pixels = conv.pool ? 4.0 * height * width : static_cast<double>(live(height)) * live(width);
  const double tiles = total_tiles(make_strips(height, width, conv.dilation, conv.pool));
  const double transforms = (conv.bf16 ? 2.0 : 1.0) * (8.0 / conv.c_out + 8.0 / conv.c_in);
  const double small = 8.0 / batch_;  // tiles that the weights' traffic is worth
  return kPoints * (tiles * (1 + transforms) + small) < pixels;
}

void Executor::plan() {
  if (planned_) throw std::logic_error("plan() twice");
  planned_ = true;
  weights_.resize(convs_.size()), biases_.resize(convs_.size());
  strips_.resize(convs_.size()), taps_.resize(convs_.size());
  const int team = std::max(1, num_threads() / batch_);
  std::vector<bool> loaded(tensors_.size());

  if (layers_.empty() || layers_.front().op != Op::load || layers_.back().op != Op::store)
    refuse("the first layer must be a load, the last a store");
  for (const Layer& layer : layers_) {
    if (layer.op == Op::load) loaded[layer.output] = true;
    if (layer.norm >= 0) tensors_[layer.input].moments = 0;
    if (layer.conv < 0) continue;
    Conv& c = convs_[layer.conv];
    if (c.weights) refuse("a convolution is used by two layers");
    const Tensor& in = tensors_[layer.input];
    const bool last = layer.op == Op::store;
    c.bf16 = precision_ == Precision::bfloat16 && !last && !loaded[layer.input];
    c.c_step = c.bf16 ? round_up(c.c_in, 2) : c.c_in;
    c.winograd = !last && prefers_winograd(c, in.height, in.width);
    const int vectors = round_up(c.c_out, backend_.width) / backend_.width;
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
      taps_[layer.conv] = make_taps(c.kernel, c.dilation, c.pool);
      c.taps = taps_[layer.conv].data();
      c.tap_count = static_cast<int>(taps_[layer.conv].size());
      c.stride = c.pool ? 2 : 1;
      c.pad_before = -c.taps[0].row;
      c.pad_after = c.taps[c.tap_count - 1].row;
    }
    const int64_t taps = c.winograd ? kPoints : c.tap_count;
    const int64_t columns = last ? c.c_out : static_cast<int64_t>(c.blocks) * c.vectors * backend_.width;
    const int64_t channels = last ? in.padded : c.c_step;
    weights_[layer.conv] = Buffer(taps * channels * columns / (c.bf16 ? 2 : 1) + backend_.width);
    biases_[layer.conv] = Buffer(round_up(c.c_out, backend_.width) + backend_.max_vectors * backend_.width);
    c.weights = weights_[layer.conv].data();
    c.bias = biases_[layer.conv].data();
  }
  for (size_t i = 0; i < norms_.size(); ++i) norms_[i].table = norm_tables_[i].data();

  // The arena: each tensor takes the lowest place that is free from its first layer to its last.
  std::vector<int> last_use(tensors_.size(), -1);
  for (size_t i = 0; i < layers_.size(); ++i)
    for (int t : {layers_[i].input, layers_[i].output, layers_[i].add[0], layers_[i].add[1]})
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
    if (layers_[i].input >= 0 && !placed[layers_[i].input]) refuse("layer " + std::to_string(i) + " reads a tensor that no layer wrote");
    if (id < 0) continue;
    if (placed[id]) refuse("layer " + std::to_string(i) + " writes a tensor for the second time");
    Tensor& t = tensors_[id];
    const int64_t size = round_up64(static_cast<int64_t>(t.padded) * t.height * t.width, 16) + 16;
    std::sort(places.begin(), places.end(), [](const Place& a, const Place& b) { return a.begin < b.begin; });
    int64_t begin = 0;
    for (const Place& p : places) {
      if (p.begin - begin >= size) break;
      begin = p.end;
    }
    t.offset = begin;
    placed[id] = true;
    places.push_back({begin, begin + size, last_use[id]});
    arena_size_ = std::max(arena_size_, begin + size);
    if (t.moments == 0) {
      t.moments = moments_size_;
      moments_size_ += 3 * t.padded;
    }
  }
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

void Executor::check_level(int64_t level, const char* name, int64_t index) const {
  if (levels_ && (level < 0 || level >= levels_))
    throw std::out_of_range(std::string(name) + "[" + std::to_string(index) + "] must be in [0, " + std::to_string(levels_) +
                            "), got " + std::to_string(level));
}

void Executor::check_chain(const Chain& chain, int64_t steps) const {
  for (int b = 0; b < chain.slots; ++b) {
    const int64_t end = std::min(chain.stop[b], chain.row[b] + steps);
    if (chain.row[b] < end && (chain.row[b] < 0 || end > chain.rows))
      throw std::out_of_range("slot " + std::to_string(b) + " would run rows " + std::to_string(chain.row[b]) + " to " +
                              std::to_string(end - 1) + ", but the table has rows 0 to " + std::to_string(chain.rows - 1));
    for (int64_t r = chain.row[b]; r < end; ++r) {
      check_level(chain.level[r], "level", r);
      if (!chain.previous && chain.coef[4 * r + 3] != 0) refuse("coef[" + std::to_string(r) + "] has d != 0, but previous is absent");
    }
  }
}

Program Executor::program() const {
  return {layers_.data(), static_cast<int>(layers_.size()), tensors_.data(), norms_.data(), convs_.data(),
          sigmas_.empty() ? nullptr : sigmas_.data()};
}

int64_t Executor::sample_size() const {
  const Tensor& x = tensors_[layers_.front().output];
  return static_cast<int64_t>(x.channels) * x.height * x.width;
}

void Executor::prepare_teams(int images) {
  const int threads = num_threads();
  const int teams = std::min(threads, images), size = threads / teams;
  const int capacity = std::min((std::max(images, batch_) + teams - 1) / teams, kMicroBatch);
  if (static_cast<int>(teams_.size()) >= teams && team_size_ == size && team_capacity_ >= capacity) return;
  teams_.clear();
  team_size_ = size, team_capacity_ = capacity;
  int64_t planes = 0, products = 0, rows = 0, affine = 0;
  for (const Layer& layer : layers_) {
    if (layer.input < 0) continue;
    const Tensor& in = tensors_[layer.input];
    affine = std::max<int64_t>(affine, in.padded);
    rows = std::max<int64_t>(rows, 6LL * (in.width + 8) * backend_.width);
    if (layer.conv < 0) continue;
    const Conv& c = convs_[layer.conv];
    if (c.winograd) {
      int strip = 0;
      for (int i = 0; i < c.strip_count; ++i) strip = std::max(strip, c.strips[i].tiles);
      const int64_t tiles = std::min(std::max(kTileFloats / in.padded, strip), capacity * c.tiles);
      planes = std::max(planes, kPoints * (tiles * in.padded + 32));
      products = std::max(products, kPoints * (tiles * c.vectors * backend_.width + 16));
    } else {
      const int border = c.pad_before + c.pad_after;
      planes = std::max(planes, static_cast<int64_t>(capacity) * (in.height + border) * (in.width + border) * in.padded);
    }
  }
  const int64_t aligned_rows = round_up64(rows, 16) + 16, aligned_products = round_up64(products, 16) + 16;
  const int64_t affine_floats = 3 * capacity * affine;
  for (int i = 0; i < teams; ++i) {
    auto team = std::make_unique<Team>(size);
    Workspace& w = team->workspace;
    w.capacity = capacity, w.tile_capacity = kTileFloats;
    w.arena = team->allocate(arena_size_ * capacity);
    w.moments = team->allocate(moments_size_ * capacity);
    w.planes = w.padded = team->allocate(planes);
    w.products = team->allocate(aligned_products * size), w.products_stride = aligned_products;
    w.rows = team->allocate(aligned_rows * size), w.rows_stride = aligned_rows;
    w.affine = team->allocate(affine_floats * size), w.affine_stride = affine_floats;
    teams_.push_back(std::move(team));
  }
}

// Splits the samples over teams and each team's share into micro-batches: body(team, member, first, last) for each.
template <class Body>
void Executor::run_teams(int samples, const Body& body) {
  if (!planned_) throw std::logic_error("run before plan()");
  if (samples < 1) return;
  prepare_teams(samples);
  struct Job {
    Executor& executor;
    const Body& body;
    int samples, teams;
  } job{*this, body, samples, std::min(num_threads(), samples)};
  run_workers(job.teams * team_size_, [](void* context, int worker) {
    const Job& j = *static_cast<Job*>(context);
    const int size = j.executor.team_size_, index = worker / size;
    Team& team = *j.executor.teams_[index];
    const auto share = [&](int i) { return static_cast<int>(static_cast<int64_t>(j.samples) * i / j.teams); };
    for (int first = share(index), end = share(index + 1); first < end; first += team.workspace.capacity)
      j.body(team, Member{worker % size, size, &team.barrier}, first, std::min(first + team.workspace.capacity, end));
  }, &job);
}

void Executor::run(const float* x, const int64_t* level, float* score, int images) {
  for (int i = 0; i < images; ++i) check_level(level[i], "level", i);
  const Program program = this->program();
  run_teams(images, [&](Team& team, const Member& member, int first, int last) {
    int slot[kMicroBatch];
    for (int i = first; i < last; ++i) slot[i - first] = i;
    backend_.forward(program, team.workspace, member, {last - first, slot, x, false, level + first, score});
  });
}

namespace {

// What b (twice) and c of an adaptive row are multiplied by: 1 over the root mean square of the sample's score.
float inverse_rms(const float* score, int64_t n) {
  double sums[8] = {};
  for (int64_t i = 0; i < n; ++i) sums[i % 8] += static_cast<double>(score[i]) * score[i];
  double sum = 0;
  for (const double s : sums) sum += s;
  return static_cast<float>(1 / std::sqrt(sum / static_cast<double>(n)));
}

}  // namespace

void Executor::run_steps(const Chain& chain, int64_t steps, const std::function<bool()>& stop_requested) {
  check_chain(chain, steps);
  const Program program = this->program();
  const int64_t size = sample_size(), channels = tensors_[layers_.front().output].channels;
  const auto update_range = SGM_PICK(update_range);
  std::atomic<bool> stopping{false};
  run_teams(chain.slots, [&](Team& team, const Member& member, int first, int last) {
    const auto barrier = [&] {
      if (member.size > 1) wait(member.barrier);
    };
    Update update{};
    update.shape = {last - first, channels, size / channels};
    update.x = update.out = chain.x + first * size, update.x_nhwc = update.out_nhwc = chain.nhwc;
    update.score = chain.score + first * size, update.score_dtype = Dtype::float32;
    update.coef = chain.coef, update.draw = chain.draw, update.rows = chain.rows;
    update.row = chain.row + first, update.stop = chain.stop + first;
    update.seed = chain.seed + first, update.sample_id = chain.sample_id + first, update.bad_row = chain.bad_row + first;
    if (chain.previous) update.previous = chain.previous + first * size, update.previous_nhwc = chain.nhwc, update.keep = chain.keep;
    if (chain.gain) update.gain = chain.gain + first;
    const int64_t pieces = (last - first) * update_pieces(update);
    for (int64_t step = 0; step < steps; ++step) {
      int slot[kMicroBatch], live = 0;
      int64_t level[kMicroBatch];
      for (int b = first; b < last; ++b)
        if (chain.row[b] < chain.stop[b]) level[live] = chain.level[chain.row[b]], slot[live++] = b;
      if (live == 0) return;
      backend_.forward(program, team.workspace, member, {live, slot, chain.x, chain.nhwc, level, chain.score});
      if (chain.gain && member.rank == 0)
        for (int i = 0; i < live; ++i) {
          const int b = slot[i];
          chain.gain[b] = chain.adaptive[chain.row[b]] ? inverse_rms(chain.score + b * size, size) : 1;
        }
      if (chain.gain) barrier();
      update_range(update, pieces * member.rank / member.size, pieces * (member.rank + 1) / member.size);
      barrier();
      if (member.rank == 0) {
        advance_rows(last - first, chain.row + first, chain.stop + first);
        if (&team == teams_[0].get() && stop_requested && stop_requested()) stopping = true;
        team.stop = stopping;  // one answer for the whole team
      }
      barrier();
      if (team.stop) return;
    }
  });
}

int64_t Executor::bytes() const {
  int64_t floats = 0;
  for (const Buffer& b : weights_) floats += b.size();
  for (const Buffer& b : biases_) floats += b.size();
  for (const auto& t : norm_tables_) floats += static_cast<int64_t>(t.size());
  for (const auto& team : teams_)
    for (const Buffer& b : team->buffers) floats += b.size();
  return floats * static_cast<int64_t>(sizeof(float));
}

std::string Executor::algorithm(int index) const {
  const Conv& c = convs_.at(index);
  return std::string(c.winograd ? "winograd" : "direct") + (c.bf16 ? " bfloat16" : " float32");
}

}  // namespace sgm::executor
