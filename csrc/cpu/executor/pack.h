// Weights in the order in which the kernels read them.
#pragma once
#include "cpu/executor/program.h"

namespace sgm::executor {

// [c_out][c_in / groups][kernel][kernel] → conv.weights' layout (program.h), `columns` output channels a block. Winograd weights
// are transformed in double precision; for a 2×2 mean after a direct convolution, the 3×3 kernel becomes a 4×4 one.
void pack(const Conv& conv, int columns, const float* weight, float* packed);

// Depthwise: [taps][padded].
void pack_depthwise(const Conv& conv, int padded, const float* weight, float* packed);

// The last convolution: [c_out][taps][padded].
void pack_last(const Conv& conv, int padded, const float* weight, float* packed);

}  // namespace sgm::executor
