// Counts what the program takes from the heap, except under the sanitizers that replace the allocator themselves: there
// only with SGM_FAILING, where what is watched may fail (failing.h), and SGM_HOSTILE, where `most` bytes are the limit.
#pragma once
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <new>

namespace allocations {
inline std::atomic<long> count{0};
inline std::size_t most = SIZE_MAX;
inline thread_local bool watched = false;
inline std::atomic<long> left{-1};  // that are watched and succeed before the one that fails; −1: none does
inline bool fails() { return watched && left >= 0 && left-- == 0; }
}  // namespace allocations

#if defined(SGM_FAILING) || defined(SGM_HOSTILE) || !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
namespace allocations {
inline void* take(std::size_t size, std::size_t alignment) {
  ++count;
  if (size > most || fails()) throw std::bad_alloc();
  void* p = std::aligned_alloc(alignment, (size + alignment - 1) / alignment * alignment);
  return p ? p : throw std::bad_alloc();
}
}  // namespace allocations

#ifdef __GNUC__
#pragma GCC diagnostic ignored "-Wmismatched-new-delete"  // inlined, GCC sees free() of what new gave, but not whose new
#endif
void* operator new(std::size_t size) { return allocations::take(size, alignof(std::max_align_t)); }
void* operator new(std::size_t size, std::align_val_t alignment) { return allocations::take(size, static_cast<std::size_t>(alignment)); }
void operator delete(void* p) noexcept { std::free(p); }
void operator delete(void* p, std::size_t) noexcept { std::free(p); }
void operator delete(void* p, std::align_val_t) noexcept { std::free(p); }
void operator delete(void* p, std::size_t, std::align_val_t) noexcept { std::free(p); }
#endif
