// What every CUDA source of the library shares: dtypes, wide accesses and launches.
// tests/cuda_on_host.h replaces the middle of this file, so that the kernels also run, slowly, on a CPU.
#pragma once

#include <cstddef>
#include <cstdint>

#ifndef SGM_CUDA_ON_HOST
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

namespace sgm::cuda {

struct BFloat16 { uint16_t bits; };
struct Float16 { uint16_t bits; };

// All shared memory is dynamic: one array, carved up by the kernel.
__device__ __forceinline__ float* shared_floats() {
  extern __shared__ float4 shared[];
  return reinterpret_cast<float*>(shared);
}

template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 blocks, unsigned threads, size_t shared_bytes, unsigned cluster, void* stream,
                   Arguments... arguments) {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {cluster, 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = blocks;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &attribute;
  config.numAttrs = cluster > 1 ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

// Two 16-bit floats ↔ one register; the first is the lower half.
__device__ __forceinline__ float2 unpack_word(BFloat16, uint32_t word) {
  return {__uint_as_float(word << 16), __uint_as_float(word & 0xffff0000u)};
}
__device__ __forceinline__ uint32_t pack_word(BFloat16, float lo, float hi) {
  const __nv_bfloat162 both = __floats2bfloat162_rn(lo, hi);
  return *reinterpret_cast<const uint32_t*>(&both);
}
__device__ __forceinline__ float2 unpack_word(Float16, uint32_t word) { return __half22float2(*reinterpret_cast<const __half2*>(&word)); }
__device__ __forceinline__ uint32_t pack_word(Float16, float lo, float hi) {
  const __half2 both = __floats2half2_rn(lo, hi);
  return *reinterpret_cast<const uint32_t*>(&both);
}

// Spelt out, because the compiler splits a 16-byte store whose address it has strength-reduced.
__device__ __forceinline__ void store_words(void* p, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(p)), "r"(a), "r"(b), "r"(c), "r"(d) : "memory");
}

// As __expf, but what would be subnormal is 0, which saves three instructions.
__device__ __forceinline__ float rough_exp(float v) {
  float power;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(v * 1.4426950408889634f));
  return power;
}

// Hides a register's value from the optimizer, which would otherwise keep a packed word's two floats alive beside it.
__device__ __forceinline__ void opaque(uint32_t& word) { asm volatile("" : "+r"(word)); }

}  // namespace sgm::cuda
#endif

namespace sgm::cuda {

enum DType : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };  // as in csrc/cpu/norm.h

// V consecutive elements as they lie in memory, moved by one access of at most 16 bytes.
template <class T, int V>
struct Pack {
  static constexpr bool kWhole = V * sizeof(T) >= 4;  // else one 16-bit element, in the lower half of the word
  static constexpr int kWords = kWhole ? V * sizeof(T) / 4 : 1;
  static_assert(kWords <= 4 && (!kWhole || kWords * 4 == V * static_cast<int>(sizeof(T))));
  uint32_t word[kWords];

  __device__ __forceinline__ void load(const T* p) {
    if constexpr (kWords == 4) {
      const uint4 four = *reinterpret_cast<const uint4*>(p);
      word[0] = four.x, word[1] = four.y, word[2] = four.z, word[3] = four.w;
    } else if constexpr (kWords == 2) {
      const uint2 two = *reinterpret_cast<const uint2*>(p);
      word[0] = two.x, word[1] = two.y;
    } else if constexpr (kWhole) {
      word[0] = *reinterpret_cast<const uint32_t*>(p);
    } else {
      word[0] = p->bits;
    }
  }
  __device__ __forceinline__ void store(T* p) const {
    if constexpr (kWords == 4) store_words(p, word[0], word[1], word[2], word[3]);
    else if constexpr (kWords == 2) *reinterpret_cast<uint2*>(p) = {word[0], word[1]};
    else if constexpr (kWhole) *reinterpret_cast<uint32_t*>(p) = word[0];
    else p->bits = static_cast<uint16_t>(word[0]);
  }
  __device__ __forceinline__ void unpack(float (&v)[V]) const {
#pragma unroll
    for (int i = 0; i < kWords; ++i)
      if constexpr (sizeof(T) == 4) {
        v[i] = __uint_as_float(word[i]);
      } else {
        const float2 both = unpack_word(T{}, word[i]);
        v[2 * i] = both.x;
        if constexpr (kWhole) v[2 * i + 1] = both.y;
      }
  }
  __device__ __forceinline__ void pack(const float (&v)[V]) {
#pragma unroll
    for (int i = 0; i < kWords; ++i)
      if constexpr (sizeof(T) == 4) word[i] = __float_as_uint(v[i]);
      else word[i] = pack_word(T{}, v[2 * i], kWhole ? v[2 * i + kWhole] : 0.0f);
  }
  __device__ __forceinline__ void keep_packed() {
#pragma unroll
    for (int i = 0; i < kWords; ++i) opaque(word[i]);
  }
};

#define SGM_API extern "C" __attribute__((visibility("default")))

inline bool aligned(const void* p, size_t bytes) { return reinterpret_cast<uintptr_t>(p) % bytes == 0; }

// Calls f with a value of the type of a dtype code.
template <class F>
cudaError_t with_dtype(int dtype, F f) {
  switch (dtype) {
    case kFloat32: return f(float{});
    case kBFloat16: return f(BFloat16{});
    case kFloat16: return f(Float16{});
    default: return cudaErrorInvalidValue;
  }
}

}  // namespace sgm::cuda
