// Instruction sets: a file named *_isa.cpp is compiled once for each of them, with SGM_ISA defined as the name, and
// puts everything it defines into namespace sgm::SGM_ISA. One is chosen at run time.
//
//   foo.h         SGM_DECLARE_PER_ISA(void, foo, (float* x, int64_t n))
//   foo_isa.cpp   namespace sgm::SGM_ISA { void foo(float* x, int64_t n) { … } }
//   caller        SGM_PICK(foo)(x, n)
//
// SGM_DECLARE_UP_TO_AVX512 in place of the first: what AVX512_BF16 adds is of no use to foo, and avx512 serves there
// (setup.py, NO_BF16).
//
// An inline function or template that is not in sgm::SGM_ISA (std::vector included) must not reach such a file's object:
// the linker keeps one copy of it, perhaps the AVX-512 one, for everybody. tests/test_build.py looks for that.
// SGM_GENERIC_ONLY leaves one set, as on other processors, for builds that have to be quick.
#pragma once

#if defined(__x86_64__) && !defined(SGM_GENERIC_ONLY)
#define SGM_ISAS(X) X(generic) X(avx2) X(avx512) X(avx512_bf16)
#else
#define SGM_ISAS(X) X(generic)
#endif

namespace sgm {

#define SGM_ENUMERATOR(isa) isa,
enum class Isa : int { SGM_ISAS(SGM_ENUMERATOR) };
#undef SGM_ENUMERATOR
#define SGM_ONE(isa) +1
constexpr int kIsas = 0 SGM_ISAS(SGM_ONE);
#undef SGM_ONE

const char* name(Isa isa);
bool supported(Isa isa);             // by this CPU
Isa isa();                           // in use: $SGM_ISA, else the best supported; throws std::invalid_argument
void set_isa(const char* isa_name);  // for tests; throws std::invalid_argument

}  // namespace sgm

#if defined(__x86_64__) && !defined(SGM_GENERIC_ONLY)
#define SGM_DECLARE_PER_ISA(result, function, arguments) \
  namespace generic { result function arguments; }       \
  namespace avx2 { result function arguments; }          \
  namespace avx512 { result function arguments; }        \
  namespace avx512_bf16 { result function arguments; }
#define SGM_DECLARE_UP_TO_AVX512(result, function, arguments) \
  namespace generic { result function arguments; }            \
  namespace avx2 { result function arguments; }               \
  namespace avx512 { result function arguments; }             \
  namespace avx512_bf16 { using avx512::function; }
#define SGM_PICK(function)                                                                                    \
  ([]() -> decltype(&::sgm::generic::function) {                                                              \
    constexpr decltype(&::sgm::generic::function) table[] = {                                                 \
        ::sgm::generic::function, ::sgm::avx2::function, ::sgm::avx512::function, ::sgm::avx512_bf16::function}; \
    return table[static_cast<int>(::sgm::isa())];                                                             \
  }())
#else
#define SGM_DECLARE_PER_ISA(result, function, arguments) \
  namespace generic { result function arguments; }
#define SGM_DECLARE_UP_TO_AVX512 SGM_DECLARE_PER_ISA
#define SGM_PICK(function) (&::sgm::generic::function)
#endif
