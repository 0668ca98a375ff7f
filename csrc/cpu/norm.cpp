// The norm's division of labour: whole samples while each thread has one, so that a sample stays in its core's L2
// between the two sweeps; what is left over is divided by channels, so that threads help at N = 1 too.
#include "cpu/norm.h"

#include "cpu/pool.h"

namespace sgm {

void norm(const Norm& a) {
  const auto statistics = SGM_PICK(norm_statistics);
  const auto merge = SGM_PICK(norm_merge);
  const auto apply = SGM_PICK(norm_apply);
  const int64_t threads = num_threads();
  const int64_t whole = a.samples - a.samples % threads;
  parallel_for(whole, 1, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      statistics(a, n, 0, a.channels);
      if (a.groups) merge(a, n);
      apply(a, n, 0, a.channels);
    }
  });

  const int64_t units = (a.channels + 15) / 16;  // of 16 channels
  const int64_t blocks = units < threads ? units : threads;
  auto in_blocks = [&](auto sweep) {
    parallel_for((a.samples - whole) * blocks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t block = i % blocks;
        const int64_t stop = 16 * (units * (block + 1) / blocks);
        sweep(a, whole + i / blocks, 16 * (units * block / blocks), stop < a.channels ? stop : a.channels);
      }
    });
  };
  in_blocks(statistics);
  if (a.groups)
    parallel_for(a.samples - whole, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) merge(a, whole + i);
    });
  in_blocks(apply);
}

}  // namespace sgm
