// A whole score network in one native call: a list of layers, its packed weights and its scratch memory.
//
//   tensor(), norm(), conv(), heads(), layer() …   describe the network, in the order of execution
//   plan()                                         choose algorithms, lay out the arena
//   set_conv(), set_norm(), set_sigmas() …         copy and pack parameters; call again after they changed
//   run()                                          x, level → score
//
// Nothing is allocated by run() once it has run with the current number of threads. Every method may be called from any
// thread: one call at a time has the executor, others wait. After an error the next call is right, but for a plan() that
// failed: its executor does nothing.
#pragma once
#include <functional>
#include <memory>
#include <mutex>
#include <new>
#include <string>
#include <utility>
#include <vector>

#include "cpu/executor/program.h"

namespace sgm::executor {

enum class Precision { float32, bfloat16, direct, winograd };  // direct, winograd: float32 by that algorithm where it can

class Buffer {  // floats, aligned to a cache line at least
 public:
  explicit Buffer(int64_t floats = 0);
  float* data() const { return data_.get(); }
  int64_t size() const { return size_; }

 private:
  struct Free {
    std::align_val_t alignment;
    void operator()(float* p) const;
  };
  std::unique_ptr<float, Free> data_;
  int64_t size_;
};

// Slots and tables of a running batch: sgm_engine/executors/slots.py.
struct Chain {
  int slots;
  float* x;  // [slots][channels][height][width] or, if nhwc, [slots][height][width][channels]
  bool nhwc;
  float* score;          // of the last step
  const float* coef;     // [rows][4]
  const int32_t* draw;   // [rows]
  const int64_t* level;  // [rows]
  int64_t rows;
  int64_t* row;  // advanced by one a step while row < stop
  const int64_t *stop, *seed, *sample_id;
  int64_t* bad_row;
  float* previous;       // like x, or null if no plan uses it
  const float* keep;     // [rows][2], or null
  float* gain;           // [slots], or null if no plan has adaptive rows
  const bool* adaptive;  // [rows]
  const float* known;    // like x, or null unless inpainting (csrc/update.h), as the next two, [rows]
  const float* known_sigma;
  const int32_t* known_draw;
};

// A convolution, square; of what is left out: an ordinary one.
struct ConvShape {
  int c_in, c_out, kernel;
  int dilation = 1, stride = 1, up = 1, groups = 1;  // up: zeros between pixels before it, a transposed convolution
  int pad[4] = {};                                   // top, bottom, left, right
  Border border = Border::zeros;
  bool pool = false;  // a 2×2 mean after it
  int levels = 0;     // rows of the bias, 0: one for every level
};

// A norm: see program.h. groups = 0: γ and β alone.
struct NormShape {
  int channels, groups;
  int levels = 0;  // rows of the table, 0: one for every level
  bool has_alpha = false;
  double eps = 0;
  bool by_pixel = false, centred = true;  // channel_norm, with floor and after
  double floor = 0, after = 0;
  int source = -1;  // a tensor [2·channels][1][1] of γ and β: groups = 0, no table
};

using Addend = std::pair<int, double>;  // tensor, and what it is multiplied by

// What a layer is besides its op, its tensors and its addends; -1: none.
struct Details {
  int norm = -1, conv = -1, heads = -1;
  Activation activation = Activation::none;
  double slope = 0;  // leaky_relu, clip
  double scale = 1, shift = 0;
  int first = 0;
};

class Executor {
 public:
  // batch: images a run() is tuned for (algorithms, scratch). It may get fewer, or more in portions.
  Executor(int batch, Precision precision);
  ~Executor();

  int tensor(int channels, int height, int width);
  int norm(const NormShape& shape);
  int conv(const ConvShape& shape);
  int heads(int count, int size, double scale, int memory);
  void layer(Op op, int input, int second, int output, const std::vector<Addend>& add, const Details& details);
  void embedding(int channels, int height, int width, int patch, const std::vector<int>& octaves);  // before an embed layer
  void potential(int channels, int height, int width, int classes, int waves, int potentials);  // before noise_features
  int constant(int channels, int height, int width);
  void plan();

  // Each array comes with its number of floats, which must be the right one.
  struct Array {
    const float* data;
    int64_t size;
  };
  void set_conv(int conv, Array weight, Array bias);  // [c_out][c_in / groups][kernel][kernel]; [levels or 1][c_out], or null for zeros
  void set_norm(int norm, Array table);               // [levels or 1][gamma, alpha, beta][channels]
  void set_heads(int heads, Array tokens);            // [keys, values][count][memory][size]
  void set_sigmas(Array sigmas);                      // [levels]: the score is divided by σ(level)
  void set_embedding(const double* table, int64_t size);  // [levels][5]: Embedding

  void set_potential(const double* table, int64_t size);  // Potential's arrays, one after another, in its order
  void set_constant(int constant, Array values);          // [height][width][channels]

  // x, score [images][channels][height][width]; level [images]
  void run(const float* x, const int64_t* level, float* score, int images);
  // `steps` evaluations of every live slot, each followed by the update (csrc/update.h). stop_requested (may be null) is
  // called now and then by the calling thread: true ends the call between two steps, each slot at the row it has reached.
  void run_steps(const Chain& chain, int64_t steps, const std::function<bool()>& stop_requested);

  int64_t bytes() const;             // weights, tables and scratch
  std::string algorithm(int conv) const;  // "winograd" or "direct", and the precision

 private:
  struct Team;
  enum class State { open, failed, planned };
  std::unique_lock<std::mutex> alone() const;
  std::unique_lock<std::mutex> describing(const char* method);  // throws std::logic_error unless the state is open
  std::unique_lock<std::mutex> running();                       // throws std::logic_error unless all is planned and set
  void check_ends() const;
  void check_gradient(const Layer& layer, const std::string& where) const;
  void check_potential(const Layer& layer, const std::string& where) const;
  void check_detail(const Layer& layer, const std::string& where) const;
  void plan_conv(const Layer& layer, bool loaded);
  void plan_memory(const Layer& layer);
  void plan_arena();
  void check_level(int64_t level, const char* name, int64_t index) const;
  void check_chain(const Chain& chain, int64_t steps) const;
  void set_levels(int64_t levels);
  Program program() const;
  Tensor sample() const;
  template <class Body>
  void run_teams(int samples, const Body& body);
  void prepare_teams(int images, int threads);
  bool prefers_winograd(const Conv& conv, int height, int width) const;

  const int batch_;
  const Precision precision_;
  const Backend backend_;
  int levels_ = 0;  // 0: no layer depends on the level
  State state_ = State::open;
  bool complete_ = false;     // every weight is set
  mutable std::mutex mutex_;  // taken before the pool's

  std::vector<Tensor> tensors_;
  std::vector<Layer> layers_;
  std::vector<Norm> norms_;
  std::vector<Conv> convs_;
  std::vector<Heads> heads_;
  std::vector<std::vector<float>> norm_tables_;
  std::vector<Buffer> weights_, biases_, tokens_;
  std::vector<std::vector<Strip>> strips_;
  std::vector<std::vector<Tap>> taps_;
  std::vector<std::vector<Phase>> phases_;
  std::vector<std::vector<int>> firsts_;
  std::vector<float> sigmas_;
  Embedding embedding_{};
  std::vector<double> embedding_table_;
  Potential potential_{};
  std::vector<double> potential_table_;
  std::vector<float> potential_basis_;
  std::vector<int> potential_places_;
  std::vector<Tensor> constants_;  // shapes
  std::vector<Buffer> constant_values_;
  std::vector<const float*> constant_data_;

  int64_t arena_size_ = 0, moments_size_ = 0;  // floats an image
  int64_t matrices_size_ = 0, scores_size_ = 0;  // floats of attention: of a team, of a member
  std::vector<std::unique_ptr<Team>> teams_;
  int team_size_ = 0, team_capacity_ = 0;
};

}  // namespace sgm::executor
