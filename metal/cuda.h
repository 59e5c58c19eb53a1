// The words of Metal that the kernels use, in CUDA. kernels/launch.py takes the address spaces out of
// the text and makes `threadgroup` variables `__shared__`; the rest is here.

#include <cuda_bf16.h>
#include <cuda_fp16.h>

typedef unsigned int uint;
typedef unsigned short ushort;
typedef __half half;
typedef __half2 half2;
typedef __nv_bfloat16 bfloat16_t;

#define METAL_FUNC __device__ __forceinline__
#ifndef INFINITY
#define INFINITY __int_as_float(0x7f800000)
#endif

// Threadgroups are one-dimensional.
#define thread_position_in_grid \
  (make_uint3(blockIdx.x * blockDim.x + threadIdx.x, blockIdx.y, blockIdx.z))
#define thread_position_in_threadgroup threadIdx
#define threadgroup_position_in_grid blockIdx
#define thread_index_in_simdgroup (threadIdx.x % 32)
#define simdgroup_index_in_threadgroup (threadIdx.x / 32)

enum class mem_flags { mem_threadgroup };

METAL_FUNC void threadgroup_barrier(mem_flags) {
  __syncthreads();
}

METAL_FUNC float simd_shuffle(float value, ushort lane) {
  return __shfl_sync(0xffffffffu, value, lane);
}

METAL_FUNC float simd_shuffle_xor(float value, ushort mask) {
  return __shfl_xor_sync(0xffffffffu, value, mask);
}

METAL_FUNC bool simd_any(bool value) {
  return __any_sync(0xffffffffu, value);
}

#if __CUDA_ARCH__ >= 800

// Past the first cache, and in lines of 256 bytes into the second: 1 to 3 % of attention. No kernel
// may read so what it has written itself.
METAL_FUNC uint2 load_once(const uint2* from) {
  uint2 v;
  asm("ld.global.L1::no_allocate.L2::256B.v2.u32 {%0, %1}, [%2];"
      : "=r"(v.x), "=r"(v.y)
      : "l"(from));
  return v;
}

METAL_FUNC uint4 load_once(const uint4* from) {
  uint4 v;
  asm("ld.global.L1::no_allocate.L2::256B.v4.u32 {%0, %1, %2, %3}, [%4];"
      : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
      : "l"(from));
  return v;
}

#define LOAD_ONCE(from) load_once(from)

#endif

template <typename To, typename From>
METAL_FUNC To as_type(From from) {
  static_assert(sizeof(To) == sizeof(From), "as_type keeps the size");
  To to;
  memcpy(&to, &from, sizeof(To));
  return to;
}

namespace fast {

// Metal's fast::exp2: one instruction, denormal results are zero.
METAL_FUNC float exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

} // namespace fast
