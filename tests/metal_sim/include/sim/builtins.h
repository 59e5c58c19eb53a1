// What MLX's own headers take from the insides of Apple's: the __metal_* builtins of bf16_math.h,
// and os_log, which says nothing here.

#define SIM_BUILTIN1(name)                      \
  SIM_INLINE float __metal_##name(float x, int) { \
    return metal::precise::name(x);             \
  }
SIM_BUILTIN1(acos)
SIM_BUILTIN1(acosh)
SIM_BUILTIN1(asin)
SIM_BUILTIN1(asinh)
SIM_BUILTIN1(atan)
SIM_BUILTIN1(atanh)
SIM_BUILTIN1(ceil)
SIM_BUILTIN1(cos)
SIM_BUILTIN1(cosh)
SIM_BUILTIN1(cospi)
SIM_BUILTIN1(exp)
SIM_BUILTIN1(exp2)
SIM_BUILTIN1(exp10)
SIM_BUILTIN1(fabs)
SIM_BUILTIN1(floor)
SIM_BUILTIN1(fract)
SIM_BUILTIN1(log)
SIM_BUILTIN1(log2)
SIM_BUILTIN1(log10)
SIM_BUILTIN1(rint)
SIM_BUILTIN1(round)
SIM_BUILTIN1(rsqrt)
SIM_BUILTIN1(sin)
SIM_BUILTIN1(sinh)
SIM_BUILTIN1(sinpi)
SIM_BUILTIN1(sqrt)
SIM_BUILTIN1(tan)
SIM_BUILTIN1(tanh)
SIM_BUILTIN1(tanpi)
SIM_BUILTIN1(trunc)
#undef SIM_BUILTIN1

#define SIM_BUILTIN2(name)                                 \
  SIM_INLINE float __metal_##name(float x, float y, int) { \
    return metal::precise::name(x, y);                     \
  }
SIM_BUILTIN2(atan2)
SIM_BUILTIN2(divide)
SIM_BUILTIN2(fmax)
SIM_BUILTIN2(fmin)
SIM_BUILTIN2(fmod)
SIM_BUILTIN2(pow)
SIM_BUILTIN2(powr)
#undef SIM_BUILTIN2

SIM_INLINE float __metal_fma(float a, float b, float c) {
  return __builtin_fmaf(a, b, c);
}
SIM_INLINE float __metal_nextafter(float a, float b) {
  return nextafterf(a, b);
}
SIM_INLINE float __metal_fmax3(float a, float b, float c, int) {
  return metal::max3(a, b, c);
}
SIM_INLINE float __metal_fmin3(float a, float b, float c, int) {
  return metal::min3(a, b, c);
}
SIM_INLINE float __metal_fmedian3(float a, float b, float c, int) {
  return metal::max(metal::min(a, b), metal::min(metal::max(a, b), c));
}
SIM_INLINE float __metal_frexp(float x, thread int* e) {
  return frexpf(x, e);
}
SIM_INLINE float __metal_ldexp(float x, int e, int) {
  return ldexpf(x, e);
}
SIM_INLINE ushort __metal_get_simdgroup_size(ushort) {
  return 32;
}
SIM_INLINE ushort __metal_get_thread_index_in_simdgroup(ushort) {
  return (ushort)__sim_lane();
}

#define SIM_BUILTIN_SIMD(name)                \
  template <class T>                          \
  SIM_INLINE T __metal_##name(T v, SIM_SITE) { \
    return metal::name(v, site);              \
  }
SIM_BUILTIN_SIMD(simd_max)
SIM_BUILTIN_SIMD(simd_min)
SIM_BUILTIN_SIMD(simd_sum)
SIM_BUILTIN_SIMD(simd_product)
SIM_BUILTIN_SIMD(simd_prefix_exclusive_product)
SIM_BUILTIN_SIMD(simd_prefix_exclusive_sum)
SIM_BUILTIN_SIMD(simd_prefix_inclusive_product)
SIM_BUILTIN_SIMD(simd_prefix_inclusive_sum)
#undef SIM_BUILTIN_SIMD
// MLX has a simd_xor for bfloat, which nothing calls.
template <class T>
SIM_INLINE T __metal_simd_xor(T v) {
  return v;
}

#define SIM_BUILTIN_SHUFFLE(name)                       \
  template <class T>                                    \
  SIM_INLINE T __metal_##name(T v, ushort n, SIM_SITE) { \
    return metal::name(v, n, site);                     \
  }
SIM_BUILTIN_SHUFFLE(simd_broadcast)
SIM_BUILTIN_SHUFFLE(simd_shuffle)
SIM_BUILTIN_SHUFFLE(simd_shuffle_down)
SIM_BUILTIN_SHUFFLE(simd_shuffle_up)
SIM_BUILTIN_SHUFFLE(simd_shuffle_xor)
SIM_BUILTIN_SHUFFLE(simd_shuffle_rotate_down)
SIM_BUILTIN_SHUFFLE(simd_shuffle_rotate_up)
#undef SIM_BUILTIN_SHUFFLE

#define SIM_BUILTIN_FILL(name)                                          \
  template <class T>                                                    \
  SIM_INLINE T __metal_##name(T v, T filling, ushort n, ushort, SIM_SITE) { \
    return metal::name(v, filling, n, site);                            \
  }
SIM_BUILTIN_FILL(simd_shuffle_and_fill_down)
SIM_BUILTIN_FILL(simd_shuffle_and_fill_up)
#undef SIM_BUILTIN_FILL

namespace metal {

struct os_log {
  constexpr os_log(const constant char*, const constant char*) {}
  constexpr os_log(const constant char*, const constant char*) constant {}
  template <typename... A>
  void log_debug(const constant char*, A...) const thread {}
  template <typename... A>
  void log_debug(const constant char*, A...) const constant {}
};

} // namespace metal
