// What runtime.c offers to kernels.

#define SIM_INLINE \
  __attribute__((always_inline, no_sanitize("alignment", "bounds"))) inline
// Works on the exchanged values of other lanes, which no kernel can reach: no checks in here. Not
// inlined, so that its return address is a place in the kernel.
#define SIM_UNCHECKED \
  __attribute__((                                                                  \
      disable_sanitizer_instrumentation,                                           \
      no_sanitize("thread", "alignment", "bounds", "signed-integer-overflow"),     \
      noinline))

// As a default argument: the line and column of the call. rewrite.py numbers the lines of MLX's own
// headers from 500000 on.
#define SIM_SITE \
  uint site = (uint)__builtin_LINE() << 12 | ((uint)__builtin_COLUMN() & 4095)

struct __sim_slots {
  uint active; // a bit per lane that takes part
  uint done;   // a lane has already computed the result of the group
  uint lane;   // of the caller
  uint unused;
  ulong data[32][8];
  ulong result[8];
};

extern "C" {
void __sim_statement(uint number);
uint __sim_lane();
thread __sim_slots* __sim_exchange(
    const thread void* value,
    uint size,
    const constant char* operation,
    uint site,
    const void* caller);
void __sim_threadgroup_barrier(uint flags, uint site);
void __sim_simdgroup_barrier(uint flags, uint site);
void __sim_misaligned(ulong address, uint alignment, uint site);
ulong __sim_threadgroup(const constant char* name, uint size, uint element, uint site);
void __sim_atomic(ulong address, uint size, uint access, uint site);

float expf(float);
float exp2f(float);
float exp10f(float);
float logf(float);
float log2f(float);
float log10f(float);
float sinf(float);
float cosf(float);
float tanf(float);
float asinf(float);
float acosf(float);
float atanf(float);
float sinhf(float);
float coshf(float);
float tanhf(float);
float asinhf(float);
float acoshf(float);
float atanhf(float);
float atan2f(float, float);
float powf(float, float);
float fmodf(float, float);
float nextafterf(float, float);
float frexpf(float, thread int*);
float ldexpf(float, int);
}

namespace metal {

// What a kernel does at the beginning of a statement. Constant evaluation skips it.
SIM_INLINE constexpr void __sim_at(uint number) {
  if (!__builtin_is_constant_evaluated()) {
    __sim_statement(number);
  }
}

// statements.py puts this around casts of pointers: the compiler's own check leaves out structs.
#define SIM_ALIGNED(SPACE)                                     \
  template <class T>                                           \
  SIM_INLINE SPACE T* __sim_aligned(SPACE T* p, SIM_SITE) {    \
    if ((ulong)p % alignof(T)) {                               \
      __sim_misaligned((ulong)p, alignof(T), site);            \
    }                                                          \
    return p;                                                  \
  }
SIM_ALIGNED(device)
SIM_ALIGNED(constant)
SIM_ALIGNED(threadgroup)
SIM_ALIGNED(thread)
#undef SIM_ALIGNED

// The type of an array's elements, through all its dimensions.
template <class A>
struct __sim_element {
  using type = A;
};
template <class A, size_t N>
struct __sim_element<A[N]> {
  using type = typename __sim_element<A>::type;
};

// `threadgroup T name[N];` becomes a reference to this.
template <class A>
SIM_INLINE threadgroup A& __sim_variable(const constant char* name, SIM_SITE) {
  return *(threadgroup A*)__sim_threadgroup(
      name, sizeof(A), sizeof(typename __sim_element<A>::type), site);
}

} // namespace metal
