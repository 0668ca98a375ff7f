#include "cpu/executor/executor.h"

#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <climits>
#include <cmath>
#include <new>
#include <stdexcept>
#include <thread>

#include "cpu/executor/internal.h"
#include "cpu/executor/sizes.h"
#include "cpu/pool.h"
#include "update.h"

namespace sgm::executor {
namespace {

constexpr int kTileFloats = 16384;  // tiles × channels of one Winograd plane: 36 planes stay near the second-level cache
constexpr size_t kHugePage = 2 << 20;
constexpr int kMicroBatch = 8;      // images one team carries through a layer together

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

// Large buffers ask for huge pages: a network's weights pass through in one sweep, and cost a walk of the page tables for
// every 4 KiB otherwise.
Buffer::Buffer(int64_t floats) : size_(floats) {
  if (!floats) return;
  const size_t bytes = static_cast<size_t>(floats) * sizeof(float);
  const std::align_val_t alignment{bytes < kHugePage ? 64 : kHugePage};
  data_ = {static_cast<float*>(::operator new(bytes, alignment)), Free{alignment}};
#ifdef MADV_HUGEPAGE
  if (bytes >= kHugePage) madvise(data_.get(), bytes, MADV_HUGEPAGE);  // a wish: refused, all works as well
#endif
}

void Buffer::Free::operator()(float* p) const { ::operator delete(p, alignment); }

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
  within("batch", batch, 1, INT_MAX);
}

Executor::~Executor() = default;

std::unique_lock<std::mutex> Executor::alone() const {
  std::unique_lock<std::mutex> lock(mutex_, std::try_to_lock);
  if (!lock) refuse_fork(), lock.lock();  // in a forked child, who holds it may be gone
  return lock;
}

std::unique_lock<std::mutex> Executor::describing(const char* method) {
  auto lock = alone();
  if (state_ != State::open) throw std::logic_error(std::string(method) + "() after plan()");
  return lock;
}

std::unique_lock<std::mutex> Executor::running() {
  auto lock = alone();
  if (state_ != State::planned) throw std::logic_error("run before plan(), or after one that failed");
  if (complete_) return lock;
  if (embedding_.channels && !embedding_.table) throw std::logic_error("run before set_embedding()");
  if ((potential_.channels && !potential_.mean) || std::count(constant_data_.begin(), constant_data_.end(), nullptr))
    throw std::logic_error("run before set_potential() or set_constant()");
  for (const Layer& l : layers_) {
    if (l.conv >= 0 && !convs_[l.conv].weights) throw std::logic_error("run before set_conv() of convolution " + std::to_string(l.conv));
    if (l.heads >= 0 && heads_[l.heads].memory && !heads_[l.heads].tokens) throw std::logic_error("run before set_heads() of heads " + std::to_string(l.heads));
    if (l.norm >= 0 && norms_[l.norm].source < 0 && !norms_[l.norm].table) throw std::logic_error("run before set_norm() of norm " + std::to_string(l.norm));
  }
  complete_ = true;
  return lock;
}

void Executor::check_level(int64_t level, const char* name, int64_t index) const {
  if (levels_ && (level < 0 || level >= levels_))
    throw std::out_of_range(std::string(name) + "[" + std::to_string(index) + "] must be in [0, " + std::to_string(levels_) +
                            "), got " + std::to_string(level));
}

void Executor::check_chain(const Chain& chain, int64_t steps) const {
  const Layer& last = layers_.back();
  const Tensor x = sample();
  if (last.op == Op::store) {
    const Phase& score = phases_[last.conv][0];
    if (convs_[last.conv].c_out != x.channels || score.height != x.height || score.width != x.width) refuse("the score must have the shape of x");
  }
  for (int b = 0; b < chain.slots; ++b) {
    const int64_t row = chain.row[b], stop = chain.stop[b];
    if (row >= stop || steps < 1) continue;
    const int64_t end = row < 0 ? row + 1 : row + std::min(steps, stop - row);
    if (row < 0 || end > chain.rows)
      throw std::out_of_range("slot " + std::to_string(b) + " would run rows " + std::to_string(row) + " to " + std::to_string(end - 1) +
                              ", but the table has rows 0 to " + std::to_string(chain.rows - 1));
    check_sample_id(b, chain.sample_id[b]);
    for (int64_t r = row; r < end; ++r) {
      check_level(chain.level[r], "level", r);
      if (!chain.previous && chain.coef[4 * r + 3] != 0) refuse("coef[" + std::to_string(r) + "] has d != 0, but previous is absent");
    }
  }
}

Program Executor::program() const {
  return {layers_.data(), static_cast<int>(layers_.size()), tensors_.data(), norms_.data(), convs_.data(), heads_.data(),
          sigmas_.empty() ? nullptr : sigmas_.data(), embedding_, potential_, constant_data_.data(), backend_.convolve_bf16};
}

Tensor Executor::sample() const {  // the shape of x
  if (layers_.front().op == Op::load) return tensors_[layers_.front().output];
  if (const Potential& p = potential_; p.channels) return {p.channels, 0, p.height, p.width, 0, -1};
  return {embedding_.channels, 0, embedding_.height, embedding_.width, 0, -1};
}

void Executor::prepare_teams(int images, int threads) {
  const int teams = std::min(threads, images), size = threads / teams;
  const int capacity = static_cast<int>(std::min<int64_t>((int64_t{std::max(images, batch_)} + teams - 1) / teams, kMicroBatch));
  if (static_cast<int>(teams_.size()) >= teams && team_size_ == size && team_capacity_ >= capacity) return;
  teams_.clear();
  int64_t planes = matrices_size_, products = scores_size_, rows = 0, affine = 0;
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
      planes = std::max(planes, times(kPoints, times(tiles, in.padded) + 32));
      products = std::max(products, times(kPoints, times(tiles, c.vectors, backend_.width) + 16));
    } else {
      const int64_t height = in.height + c.rim[kTop] + c.rim[kBottom], width = in.width + c.rim[kLeft] + c.rim[kRight];
      planes = std::max(planes, times(capacity, height, width, in.padded));
    }
  }
  const int64_t aligned_rows = round_up(rows, 16) + 16, aligned_products = round_up(products, 16) + 16;
  const int64_t affine_floats = times(kAffineRows, capacity, affine);
  std::vector<std::unique_ptr<Team>> made;
  for (int i = 0; i < teams; ++i) {
    auto team = std::make_unique<Team>(size);
    Workspace& w = team->workspace;
    w.capacity = capacity, w.tile_capacity = kTileFloats;
    w.arena = team->allocate(times(arena_size_, capacity));
    w.moments = team->allocate(times(moments_size_, capacity));
    w.planes = w.padded = team->allocate(planes);
    w.products = team->allocate(aligned_products * size), w.products_stride = aligned_products;
    w.potential = reinterpret_cast<double*>(team->allocate(times(2, capacity, potential_.stride)));
    w.rows = team->allocate(aligned_rows * size), w.rows_stride = aligned_rows;
    w.affine = team->allocate(affine_floats * size), w.affine_stride = affine_floats;
    made.push_back(std::move(team));
  }
  teams_ = std::move(made), team_size_ = size, team_capacity_ = capacity;
}

// Splits the samples over teams and each team's share into micro-batches: body(team, member, first, last) for each.
template <class Body>
void Executor::run_teams(int samples, const Body& body) {
  if (samples < 1) return;
  within("images", samples, 1, INT_MAX - kMicroBatch);
  Hold pool;
  prepare_teams(samples, pool.threads());
  struct Job {
    Executor& executor;
    const Body& body;
    int samples, teams;
  } job{*this, body, samples, std::min(pool.threads(), samples)};
  pool.run(job.teams * team_size_, [](void* context, int worker) {
    const Job& j = *static_cast<Job*>(context);
    const int size = j.executor.team_size_, index = worker / size;
    Team& team = *j.executor.teams_[index];
    const auto share = [&](int i) { return static_cast<int>(static_cast<int64_t>(j.samples) * i / j.teams); };
    for (int first = share(index), end = share(index + 1); first < end; first += team.workspace.capacity)
      j.body(team, Member{worker % size, size, &team.barrier}, first, std::min(first + team.workspace.capacity, end));
  }, &job);
}

void Executor::run(const float* x, const int64_t* level, float* score, int images) {
  const auto lock = running();
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
  const auto lock = running();
  check_chain(chain, steps);
  const Program program = this->program();
  const Tensor sample = this->sample();
  const int64_t channels = sample.channels, size = channels * sample.height * sample.width;
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
    if (chain.known) update.known = chain.known + first * size, update.known_sigma = chain.known_sigma, update.known_draw = chain.known_draw;
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
  const auto lock = alone();
  int64_t floats = 0;
  for (const Buffer& b : weights_) floats += b.size();
  for (const Buffer& b : biases_) floats += b.size();
  for (const Buffer& b : tokens_) floats += b.size();
  for (const auto& t : norm_tables_) floats += static_cast<int64_t>(t.size());
  for (const auto& team : teams_)
    for (const Buffer& b : team->buffers) floats += b.size();
  return floats * static_cast<int64_t>(sizeof(float));
}

std::string Executor::algorithm(int index) const {
  const auto lock = alone();
  const Conv& c = convs_.at(index);
  return std::string(c.winograd ? "winograd" : c.depthwise ? "depthwise" : "direct") + (c.bf16 ? " bfloat16" : " float32");
}

}  // namespace sgm::executor
