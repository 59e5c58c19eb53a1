// <metal_math>, <metal_common>, <metal_integer>, <metal_relational> and what of <metal_geometric>
// kernels here use. fast:: and precise:: compute the same: a GPU's rounding isn't simulated.
namespace metal {

template <class V>
using __sim_if_float_vector =
    enable_if_t<(__sim_vector<V>::size > 1) && __sim_kind<make_scalar_t<V>>::value == 2>;

// A function of one or two floating-point numbers, for float, half and their vectors. `expression`
// is over the floats x and y.
#define SIM_MATH1(name, expression)                                                      \
  SIM_INLINE float name(float x) {                                                       \
    return expression;                                                                   \
  }                                                                                      \
  SIM_INLINE half name(half a) {                                                         \
    float x = (float)a;                                                                  \
    return (half)(expression);                                                           \
  }                                                                                      \
  template <class V, class = __sim_if_float_vector<V>>                                   \
  SIM_INLINE V name(V a) {                                                               \
    V result;                                                                            \
    for (int i = 0; i < __sim_vector<V>::size; i++) {                                    \
      result[i] = name(a[i]);                                                            \
    }                                                                                    \
    return result;                                                                       \
  }
#define SIM_VECTOR_MATH2(name)                                                           \
  template <class V, class = __sim_if_vector<V>>                                         \
  SIM_INLINE V name(V a, V b) {                                                          \
    V result;                                                                            \
    for (int i = 0; i < __sim_vector<V>::size; i++) {                                    \
      result[i] = name(a[i], b[i]);                                                      \
    }                                                                                    \
    return result;                                                                       \
  }                                                                                      \
  template <class V, class = __sim_if_vector<V>>                                         \
  SIM_INLINE V name(V a, make_scalar_t<V> b) {                                           \
    return name(a, (V)b);                                                                \
  }
#define SIM_MATH2(name, expression)                                                      \
  SIM_INLINE float name(float x, float y) {                                              \
    return expression;                                                                   \
  }                                                                                      \
  SIM_INLINE half name(half a, half b) {                                                 \
    float x = (float)a, y = (float)b;                                                    \
    return (half)(expression);                                                           \
  }                                                                                      \
  SIM_VECTOR_MATH2(name)

#define SIM_MATH                                                                         \
  SIM_MATH1(exp, expf(x))                                                                \
  SIM_MATH1(exp2, exp2f(x))                                                              \
  SIM_MATH1(exp10, exp10f(x))                                                            \
  SIM_MATH1(log, logf(x))                                                                \
  SIM_MATH1(log2, log2f(x))                                                              \
  SIM_MATH1(log10, log10f(x))                                                            \
  SIM_MATH1(sin, sinf(x))                                                                \
  SIM_MATH1(cos, cosf(x))                                                                \
  SIM_MATH1(tan, tanf(x))                                                                \
  SIM_MATH1(asin, asinf(x))                                                              \
  SIM_MATH1(acos, acosf(x))                                                              \
  SIM_MATH1(atan, atanf(x))                                                              \
  SIM_MATH1(sinh, sinhf(x))                                                              \
  SIM_MATH1(cosh, coshf(x))                                                              \
  SIM_MATH1(tanh, tanhf(x))                                                              \
  SIM_MATH1(asinh, asinhf(x))                                                            \
  SIM_MATH1(acosh, acoshf(x))                                                            \
  SIM_MATH1(atanh, atanhf(x))                                                            \
  SIM_MATH1(sqrt, __builtin_sqrtf(x))                                                    \
  SIM_MATH1(rsqrt, 1.0f / __builtin_sqrtf(x))                                            \
  SIM_MATH1(sinpi, sinf(M_PI_F * x))                                                     \
  SIM_MATH1(cospi, cosf(M_PI_F * x))                                                     \
  SIM_MATH1(tanpi, tanf(M_PI_F * x))                                                     \
  SIM_MATH1(fabs, __builtin_fabsf(x))                                                    \
  SIM_MATH1(floor, __builtin_floorf(x))                                                  \
  SIM_MATH1(ceil, __builtin_ceilf(x))                                                    \
  SIM_MATH1(trunc, __builtin_truncf(x))                                                  \
  SIM_MATH1(rint, __builtin_rintf(x))                                                    \
  SIM_MATH1(round, __builtin_roundf(x))                                                  \
  SIM_MATH1(fract, x - __builtin_floorf(x))                                              \
  SIM_MATH1(saturate, x < 0.0f ? 0.0f : x > 1.0f ? 1.0f : x)                             \
  SIM_MATH1(sign, x > 0.0f ? 1.0f : x < 0.0f ? -1.0f : 0.0f)                             \
  SIM_MATH2(pow, powf(x, y))                                                             \
  SIM_MATH2(powr, powf(x, y))                                                            \
  SIM_MATH2(atan2, atan2f(x, y))                                                         \
  SIM_MATH2(divide, x / y)                                                               \
  SIM_MATH2(fmin, __builtin_fminf(x, y))                                                 \
  SIM_MATH2(fmax, __builtin_fmaxf(x, y))                                                 \
  SIM_MATH2(fmod, fmodf(x, y))                                                           \
  SIM_MATH2(copysign, __builtin_copysignf(x, y))                                         \
  SIM_MATH2(nextafter, nextafterf(x, y))                                                 \
  SIM_MATH2(step, y < x ? 0.0f : 1.0f)                                                   \
  SIM_INLINE float fma(float a, float b, float c) {                                      \
    return __builtin_fmaf(a, b, c);                                                      \
  }                                                                                      \
  SIM_INLINE half fma(half a, half b, half c) {                                          \
    return (half)__builtin_fmaf((float)a, (float)b, (float)c);                           \
  }                                                                                      \
  template <class V, class = __sim_if_vector<V>>                                         \
  SIM_INLINE V fma(V a, V b, V c) {                                                      \
    V result;                                                                            \
    for (int i = 0; i < __sim_vector<V>::size; i++) {                                    \
      result[i] = fma(a[i], b[i], c[i]);                                                 \
    }                                                                                    \
    return result;                                                                       \
  }                                                                                      \
  SIM_INLINE float ldexp(float x, int e) {                                               \
    return ldexpf(x, e);                                                                 \
  }

SIM_MATH
namespace fast {
SIM_MATH
}
namespace precise {
SIM_MATH
}
#undef SIM_MATH

#define SIM_MIN_MAX(T, smaller, larger)     \
  SIM_INLINE T min(T a, T b) {              \
    return smaller;                         \
  }                                         \
  SIM_INLINE T max(T a, T b) {              \
    return larger;                          \
  }                                         \
  SIM_INLINE T clamp(T x, T low, T high) {  \
    return min(max(x, low), high);          \
  }
#define SIM_INTEGER_MIN_MAX(T) SIM_MIN_MAX(T, b < a ? b : a, a < b ? b : a)
SIM_INTEGER_MIN_MAX(char)
SIM_INTEGER_MIN_MAX(uchar)
SIM_INTEGER_MIN_MAX(short)
SIM_INTEGER_MIN_MAX(ushort)
SIM_INTEGER_MIN_MAX(int)
SIM_INTEGER_MIN_MAX(uint)
SIM_INTEGER_MIN_MAX(long)
SIM_INTEGER_MIN_MAX(ulong)
SIM_MIN_MAX(float, __builtin_fminf(a, b), __builtin_fmaxf(a, b))
SIM_MIN_MAX(half, (half)min((float)a, (float)b), (half)max((float)a, (float)b))
SIM_VECTOR_MATH2(min)
SIM_VECTOR_MATH2(max)
#undef SIM_INTEGER_MIN_MAX
#undef SIM_MIN_MAX

template <class T>
SIM_INLINE T min3(T a, T b, T c) {
  return min(a, min(b, c));
}
template <class T>
SIM_INLINE T max3(T a, T b, T c) {
  return max(a, max(b, c));
}

SIM_MATH1(abs, __builtin_fabsf(x))
#define SIM_ABS(T)            \
  SIM_INLINE T abs(T x) {     \
    return x < 0 ? -x : x;    \
  }
SIM_ABS(char)
SIM_ABS(short)
SIM_ABS(int)
SIM_ABS(long)
#undef SIM_ABS

SIM_INLINE float mix(float a, float b, float t) {
  return a + (b - a) * t;
}
SIM_INLINE half mix(half a, half b, half t) {
  return a + (b - a) * t;
}

SIM_INLINE bool isnan(float x) {
  return x != x;
}
SIM_INLINE bool isnan(half x) {
  return x != x;
}
SIM_INLINE bool isinf(float x) {
  return __builtin_fabsf(x) == __builtin_inff();
}
SIM_INLINE bool isinf(half x) {
  return isinf((float)x);
}
SIM_INLINE bool isfinite(float x) {
  return __builtin_fabsf(x) < __builtin_inff();
}
SIM_INLINE bool isfinite(half x) {
  return isfinite((float)x);
}
SIM_INLINE bool signbit(float x) {
  return as_type<uint>(x) >> 31;
}

SIM_INLINE uint popcount(uint x) {
  return (uint)__builtin_popcount(x);
}
SIM_INLINE int popcount(int x) {
  return __builtin_popcount((uint)x);
}
SIM_INLINE ulong popcount(ulong x) {
  return (ulong)__builtin_popcountl(x);
}
SIM_INLINE uint clz(uint x) {
  return x ? (uint)__builtin_clz(x) : 32u;
}
SIM_INLINE int clz(int x) {
  return x ? __builtin_clz((uint)x) : 32;
}
SIM_INLINE uint ctz(uint x) {
  return x ? (uint)__builtin_ctz(x) : 32u;
}
SIM_INLINE int ctz(int x) {
  return x ? __builtin_ctz((uint)x) : 32;
}
SIM_INLINE uint mulhi(uint a, uint b) {
  return (uint)(((ulong)a * b) >> 32);
}
SIM_INLINE uint rotate(uint a, uint b) {
  b &= 31;
  return b ? (a << b) | (a >> (32 - b)) : a;
}

template <class T>
SIM_INLINE T select(T a, T b, bool c) {
  return c ? b : a;
}
template <class V, class = __sim_if_vector<V>>
SIM_INLINE bool any(V v) {
  for (int i = 0; i < __sim_vector<V>::size; i++) {
    if (v[i]) {
      return true;
    }
  }
  return false;
}
template <class V, class = __sim_if_vector<V>>
SIM_INLINE bool all(V v) {
  for (int i = 0; i < __sim_vector<V>::size; i++) {
    if (!v[i]) {
      return false;
    }
  }
  return true;
}
template <class V, class = __sim_if_vector<V>>
SIM_INLINE make_scalar_t<V> dot(V a, V b) {
  make_scalar_t<V> sum = a[0] * b[0];
  for (int i = 1; i < __sim_vector<V>::size; i++) {
    sum += a[i] * b[i];
  }
  return sum;
}
template <class V, class = __sim_if_vector<V>>
SIM_INLINE make_scalar_t<V> length(V a) {
  return sqrt(dot(a, a));
}

} // namespace metal
