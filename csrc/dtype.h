// Element types of tensors, with the numbers that Python passes (kernels/cpu.py).
#pragma once

namespace sgm {

enum class Dtype : int { float32 = 0, bfloat16 = 1, float16 = 2 };

}  // namespace sgm
