#include "cpu/norm_backward.h"

#include "cpu/pool.h"

namespace sgm {

void norm_backward(const NormBackward& a) {
  const auto group = SGM_PICK(norm_backward_group);
  parallel_for(a.samples * a.groups, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) group(a, i / a.groups, i % a.groups);
  });
}

}  // namespace sgm
