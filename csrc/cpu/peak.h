// The most multiplications and additions that one core does a second: the roof that bench/ measures a network against.
#pragma once
#include <cstdint>

#include "isa.h"

namespace sgm {
// Runs `rounds` rounds of independent multiply-adds on registers alone; returns how many operations (2 a multiply-add)
// they were. bf16: dot products of bfloat16 pairs, where there is an instruction for them, else float32.
SGM_DECLARE_PER_ISA(int64_t, multiply_adds, (bool bf16, int64_t rounds))
}  // namespace sgm
