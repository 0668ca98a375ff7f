// The CUDA kernels on a CPU: force-included (g++ -DSGM_CUDA_ON_HOST -include) before each csrc/cuda/*.cu, it stands in for CUDA's
// headers. Every CUDA thread is a fiber that runs until a barrier; shared memory starts as NaN; a barrier that not all of its
// threads reach is fatal. $SGM_HOST_ORDER=reverse runs blocks and threads backwards: a missing barrier then changes the result.
// With $SGM_HOST_DRY nothing runs, and sgm_host_blocks() says how many blocks the last launch would have had along x.
// sgm_host_run_by(f) lets f run every launch instead, of a kernel by its address, with the bytes of its arguments.
// It has the 132 multiprocessors of an H100 or H200, or $SGM_HOST_MULTIPROCESSORS: how work is cut depends on them.
#pragma once

#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <limits>
#include <memory>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorNotSupported = 801 };
enum { cudaDevAttrComputeCapabilityMajor, cudaDevAttrMultiProcessorCount };
inline const char* cudaGetErrorString(cudaError_t e) { return e == cudaSuccess ? "no error" : e == cudaErrorInvalidValue ? "invalid argument" : "not supported"; }
inline cudaError_t cudaGetDevice(int* index) { return *index = 0, cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, int attribute, int) {
  const char* multiprocessors = std::getenv("SGM_HOST_MULTIPROCESSORS");
  *value = attribute == cudaDevAttrComputeCapabilityMajor ? 9 : multiprocessors ? std::atoi(multiprocessors) : 132;
  return cudaSuccess;
}

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct float2 { float x, y; };
struct alignas(8) uint2 { uint32_t x, y; };
struct alignas(16) uint4 { uint32_t x, y, z, w; };
inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }

namespace on_host {

struct Barrier {
  unsigned size = 0, arrived = 0, generation = 0;
};

struct Block {
  dim3 index;
  unsigned rank = 0;
  std::vector<float> shared;
  Barrier barrier;
  std::vector<Barrier> warps;
  std::vector<float> lanes;
};

struct Fiber {
  ucontext_t context;
  Block* block = nullptr;
  unsigned thread = 0, cluster_generation = 0;
  bool done = false;
};

struct Machine {
  ucontext_t scheduler;
  Fiber* fiber = nullptr;
  dim3 grid;
  std::vector<Block> blocks;  // of the running cluster
  Barrier cluster;
  std::function<void()> kernel;
  bool progress = false;
};
inline thread_local Machine machine;
inline unsigned last_blocks = 0;

// (kernel, blocks along x and y, threads of a block, bytes of shared memory, blocks of a cluster, arguments, their bytes) → an error
using Runner = int (*)(const void*, unsigned, unsigned, unsigned, size_t, unsigned, const unsigned char*, size_t);
inline Runner runner = nullptr;

template <class A>
void append(std::vector<unsigned char>& bytes, const A& a) {  // as a kernel's parameters lie
  bytes.resize((bytes.size() + alignof(A) - 1) / alignof(A) * alignof(A) + sizeof(A));
  std::memcpy(bytes.data() + bytes.size() - sizeof(A), &a, sizeof(A));
}

inline void yield() { swapcontext(&machine.fiber->context, &machine.scheduler); }
inline unsigned arrive(Barrier& b) {
  machine.progress = true;
  const unsigned generation = b.generation;
  if (++b.arrived == b.size) b.arrived = 0, ++b.generation;
  return generation;
}
inline void wait(Barrier& b, unsigned generation) {
  while (b.generation == generation) yield();
}
inline void pass(Barrier& b) { wait(b, arrive(b)); }

inline void entry() {
  machine.kernel();
  machine.fiber->done = true;
  machine.progress = true;
  yield();
}

// One cluster: the threads of a block take turns, each from one barrier to the next.
inline void run(const std::vector<dim3>& indices, unsigned threads, size_t shared_bytes, bool reverse) {
  constexpr size_t kStack = 64 * 1024;
  Machine& m = machine;
  m.blocks.assign(indices.size(), {});
  m.cluster = {threads * static_cast<unsigned>(indices.size())};
  std::vector<Fiber> fibers(indices.size() * threads);
  std::unique_ptr<char[]> stacks(new char[fibers.size() * kStack]);
  for (size_t i = 0; i < fibers.size(); ++i) {
    Block& block = m.blocks[i / threads];
    if (i % threads == 0) {
      block.index = indices[i / threads];
      block.rank = static_cast<unsigned>(i / threads);
      block.shared.assign(shared_bytes / sizeof(float), std::numeric_limits<float>::quiet_NaN());
      block.barrier.size = threads;
      block.warps.assign(threads / 32, Barrier{32});
      block.lanes.resize(threads);
    }
    Fiber& f = fibers[i];
    f.block = &block;
    f.thread = static_cast<unsigned>(i % threads);
    getcontext(&f.context);
    f.context.uc_stack.ss_sp = stacks.get() + i * kStack;
    f.context.uc_stack.ss_size = kStack;
    makecontext(&f.context, entry, 0);
  }
  const auto turn = [reverse](size_t i, size_t n) { return reverse ? n - 1 - i : i; };
  for (size_t left = fibers.size(); left;) {
    const size_t before = left;
    bool any = false;
    left = 0;
    for (size_t b = 0; b < indices.size(); ++b) {
      size_t waiting;
      do {  // a block goes on alone for as long as it can
        m.progress = false;
        waiting = 0;
        for (size_t k = 0; k < threads; ++k) {
          Fiber& f = fibers[turn(b, indices.size()) * threads + turn(k, threads)];
          if (f.done) continue;
          m.fiber = &f;
          swapcontext(&m.scheduler, &f.context);
          waiting += !f.done;
        }
        any |= m.progress;
      } while (m.progress && waiting);
      left += waiting;
    }
    if (left && !any && left == before) {
      std::fprintf(stderr, "cuda_on_host: %zu threads wait at a barrier that the others never reach\n", left);
      std::abort();
    }
  }
}

}  // namespace on_host

#define threadIdx (dim3(on_host::machine.fiber->thread))
#define blockIdx (on_host::machine.fiber->block->index)
#define gridDim (on_host::machine.grid)

inline void __syncthreads() { on_host::pass(on_host::machine.fiber->block->barrier); }
inline float __shfl_xor_sync(unsigned, float v, int mask) {
  using on_host::machine;
  on_host::Block& block = *machine.fiber->block;
  const unsigned thread = machine.fiber->thread;
  block.lanes[thread] = v;
  on_host::pass(block.warps[thread / 32]);
  const float other = block.lanes[thread ^ static_cast<unsigned>(mask)];
  on_host::pass(block.warps[thread / 32]);
  return other;
}
template <class T>
T atomicAdd(T* p, T v) { const T before = *p; return *p = before + v, before; }
template <class T>
T atomicMin(T* p, T v) { const T before = *p; return *p = v < before ? v : before, before; }

inline float __uint_as_float(uint32_t u) { float f; std::memcpy(&f, &u, 4); return f; }
inline uint32_t __float_as_uint(float f) { uint32_t u; std::memcpy(&u, &f, 4); return u; }
inline float rough_exp(float v) { return std::exp(v); }
inline float __fdividef(float a, float b) { return a / b; }

extern "C" __attribute__((visibility("default"), used)) inline unsigned sgm_host_blocks() { return on_host::last_blocks; }
extern "C" __attribute__((visibility("default"), used)) inline void sgm_host_run_by(on_host::Runner runner) { on_host::runner = runner; }

namespace sgm::cuda {

struct BFloat16 { uint16_t bits; };
struct Float16 { uint16_t bits; };

inline float* shared_floats() { return on_host::machine.fiber->block->shared.data(); }
inline void opaque(uint32_t&) {}
inline void store_words(void* p, uint32_t a, uint32_t b, uint32_t c, uint32_t d) { *static_cast<uint4*>(p) = {a, b, c, d}; }

// float32 → 16 bits, to nearest even; a NaN stays one.
inline uint32_t bf16_bits(float f) {
  const uint32_t u = __float_as_uint(f);
  return std::isnan(f) ? 0x7fff : (u + 0x7fff + (u >> 16 & 1)) >> 16;
}
inline uint32_t f16_bits(float f) {
  const _Float16 h = static_cast<_Float16>(f);
  uint16_t u;
  std::memcpy(&u, &h, 2);
  return u;
}
inline float f16_value(uint32_t bits) {
  const uint16_t u = static_cast<uint16_t>(bits);
  _Float16 h;
  std::memcpy(&h, &u, 2);
  return static_cast<float>(h);
}
inline float2 unpack_word(BFloat16, uint32_t word) { return {__uint_as_float(word << 16), __uint_as_float(word & 0xffff0000u)}; }
inline uint32_t pack_word(BFloat16, float lo, float hi) { return bf16_bits(lo) | bf16_bits(hi) << 16; }
inline float2 unpack_word(Float16, uint32_t word) { return {f16_value(word), f16_value(word >> 16)}; }
inline uint32_t pack_word(Float16, float lo, float hi) { return f16_bits(lo) | f16_bits(hi) << 16; }

template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, unsigned threads, size_t shared_bytes, unsigned cluster, void*,
                   Arguments... arguments) {
  const char* order = std::getenv("SGM_HOST_ORDER");
  const bool reverse = order && std::strcmp(order, "reverse") == 0;
  if (grid.x == 0 || grid.y == 0 || grid.y > 65535 || threads > 1024 || threads % 32 || shared_bytes > 48 * 1024 || cluster > 8 || grid.x % cluster)
    return cudaErrorInvalidValue;  // as a device would
  on_host::last_blocks = grid.x;
  if (std::getenv("SGM_HOST_DRY")) return cudaSuccess;
  if (on_host::runner) {
    std::vector<unsigned char> bytes;
    (on_host::append(bytes, static_cast<Parameters>(arguments)), ...);
    const void* address = reinterpret_cast<const void*>(kernel);
    return static_cast<cudaError_t>(on_host::runner(address, grid.x, grid.y, threads, shared_bytes, cluster, bytes.data(), bytes.size()));
  }
  on_host::machine.grid = grid;
  on_host::machine.kernel = [&] { kernel(arguments...); };
  const uint64_t clusters = uint64_t{grid.x} / cluster * grid.y;
  for (uint64_t k = 0; k < clusters; ++k) {
    const uint64_t i = reverse ? clusters - 1 - k : k;
    std::vector<dim3> blocks;
    for (unsigned rank = 0; rank < cluster; ++rank) blocks.emplace_back(unsigned(i % (grid.x / cluster)) * cluster + rank, unsigned(i / (grid.x / cluster)));
    on_host::run(blocks, threads, shared_bytes, reverse);
  }
  return cudaSuccess;
}

struct Cluster {
  int rank() const { return static_cast<int>(on_host::machine.fiber->block->rank); }
  const float* peer(float* shared, int rank) const { return on_host::machine.blocks[rank].shared.data() + (shared - shared_floats()); }
  void arrive() { on_host::machine.fiber->cluster_generation = on_host::arrive(on_host::machine.cluster); }
  void wait() { on_host::wait(on_host::machine.cluster, on_host::machine.fiber->cluster_generation); }
};

}  // namespace sgm::cuda
