// Shared by build.cpp, plan.cpp and executor.cpp.
#pragma once
#include <cstdint>
#include <stdexcept>
#include <string>

namespace sgm::executor {

inline int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

[[noreturn]] inline void refuse(const std::string& message) { throw std::invalid_argument(message); }

}  // namespace sgm::executor
