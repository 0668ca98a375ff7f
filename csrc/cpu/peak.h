// The most multiplications and additions that one core does a second: the roof that bench/ measures a network against.
#pragma once
#include <cstdint>

#include "isa.h"

namespace sgm {
// Runs `rounds` rounds of independent multiply-adds on registers alone; returns how many operations (2 a multiply-add)
// they were, 0 if this instruction set has no bfloat16 dot product.
SGM_DECLARE_PER_ISA(int64_t, multiply_adds, (bool bf16, int64_t rounds))
}  // namespace sgm
