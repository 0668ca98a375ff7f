#include "isa.h"

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

namespace sgm {
namespace {

#define SGM_STRING(isa) #isa,
constexpr const char* kNames[] = {SGM_ISAS(SGM_STRING)};
#undef SGM_STRING

Isa parse(const char* wanted, const char* origin) {
  std::string known;
  for (int i = 0; i < kIsas; ++i) {
    if (std::strcmp(wanted, kNames[i]) != 0) {
      known += known.empty() ? kNames[i] : std::string("|") + kNames[i];
      continue;
    }
    if (!supported(static_cast<Isa>(i)))
      throw std::invalid_argument(std::string(origin) + "=" + wanted + ": this CPU lacks it; leave it out for the best one it has");
    return static_cast<Isa>(i);
  }
  throw std::invalid_argument(std::string(origin) + " must be " + known + ", got '" + wanted + "'");
}

Isa choose() {
  const char* wanted = std::getenv("SGM_ISA");
  if (wanted && *wanted) return parse(wanted, "SGM_ISA");
  int best = 0;
  for (int i = 0; i < kIsas; ++i)
    if (supported(static_cast<Isa>(i))) best = i;
  return static_cast<Isa>(best);
}

std::atomic<int> current{-1};

}  // namespace

const char* name(Isa isa) { return kNames[static_cast<int>(isa)]; }

bool supported(Isa isa) {
#if defined(__x86_64__) && !defined(SGM_GENERIC_ONLY)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  switch (isa) {
    case Isa::generic: return true;
    case Isa::avx2: return avx2;
    case Isa::avx512: return avx512;
    case Isa::avx512_bf16: return avx512 && __builtin_cpu_supports("avx512bf16");
  }
#endif
  return isa == Isa::generic;
}

Isa isa() {
  int i = current.load(std::memory_order_relaxed);
  if (i < 0) current.store(i = static_cast<int>(choose()), std::memory_order_relaxed);
  return static_cast<Isa>(i);
}

void set_isa(const char* isa_name) { current.store(static_cast<int>(parse(isa_name, "isa")), std::memory_order_relaxed); }

}  // namespace sgm
