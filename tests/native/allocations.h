// Counts what the program takes from the heap, except under the sanitizers that replace the allocator themselves.
#pragma once
#include <atomic>
#include <cstddef>
#include <cstdlib>
#include <new>

namespace allocations {
inline std::atomic<long> count{0};
}

#if !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
namespace allocations {
inline void* take(std::size_t size, std::size_t alignment) {
  ++count;
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
