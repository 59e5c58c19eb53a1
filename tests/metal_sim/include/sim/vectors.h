// Vector types, their constructors, as_type.
namespace metal {

template <class T, int N>
using vec = T __attribute__((ext_vector_type(N)));

// The element type and the number of elements; 0 elements: a scalar.
template <class T>
struct __sim_vector {
  using element = T;
  static constexpr constant int size = 0;
};
#define SIM_VECTOR(T, N)                        \
  template <>                                   \
  struct __sim_vector<vec<T, N>> {              \
    using element = T;                          \
    static constexpr constant int size = N;     \
  };
#define SIM_VECTORS(T) SIM_VECTOR(T, 2) SIM_VECTOR(T, 3) SIM_VECTOR(T, 4)
SIM_VECTORS(char)
SIM_VECTORS(uchar)
SIM_VECTORS(short)
SIM_VECTORS(ushort)
SIM_VECTORS(int)
SIM_VECTORS(uint)
SIM_VECTORS(long)
SIM_VECTORS(ulong)
SIM_VECTORS(float)
SIM_VECTORS(half)
SIM_VECTORS(bfloat)
#undef SIM_VECTORS
#undef SIM_VECTOR

template <class T>
using make_scalar_t = typename __sim_vector<T>::element;
template <class T>
struct make_scalar {
  using type = make_scalar_t<T>;
};

// Tells vector overloads of a function from its scalar ones.
template <class V>
using __sim_if_vector = enable_if_t<(__sim_vector<V>::size > 1)>;

} // namespace metal

#define SIM_NAMES(T)              \
  typedef metal::vec<T, 2> T##2;  \
  typedef metal::vec<T, 3> T##3;  \
  typedef metal::vec<T, 4> T##4;
SIM_NAMES(char)
SIM_NAMES(uchar)
SIM_NAMES(short)
SIM_NAMES(ushort)
SIM_NAMES(int)
SIM_NAMES(uint)
SIM_NAMES(long)
SIM_NAMES(ulong)
SIM_NAMES(float)
SIM_NAMES(half)
SIM_NAMES(bfloat)
#undef SIM_NAMES
// clang has no vectors of bool that other code could index.
typedef metal::vec<uchar, 2> bool2;
typedef metal::vec<uchar, 3> bool3;
typedef metal::vec<uchar, 4> bool4;

namespace metal {

template <class V, int I, class A>
SIM_INLINE constexpr void __sim_put(thread V& result, A value) {
  using element = make_scalar_t<V>;
  if constexpr (__sim_vector<A>::size == 0) {
    result[I] = (element)value;
  } else {
    for (int k = 0; k < __sim_vector<A>::size; k++) {
      result[I + k] = (element)value[k];
    }
  }
}

template <class V, int I>
SIM_INLINE constexpr void __sim_fill(thread V&) {
  static_assert(
      I == __sim_vector<V>::size, "vector constructor: number of components does not match");
}
template <class V, int I, class A, class... R>
SIM_INLINE constexpr void __sim_fill(thread V& result, A value, R... rest) {
  __sim_put<V, I>(result, value);
  __sim_fill<V, I + (__sim_vector<A>::size ? __sim_vector<A>::size : 1)>(result, rest...);
}

// float4(a, b), float4(x), float4(other): clang has no such call for vectors, so rewrite.py turns
// `float4(` into `metal::__sim_make<float4>(`.
template <class V>
SIM_INLINE constexpr V __sim_make() {
  return (V)(make_scalar_t<V>)0;
}
template <class V, class A>
SIM_INLINE constexpr V __sim_make(A value) {
  if constexpr (__sim_vector<A>::size == 0) {
    return (V)(make_scalar_t<V>)value;
  } else {
    static_assert(
        __sim_vector<A>::size == __sim_vector<V>::size, "vector conversion: sizes differ");
    return __builtin_convertvector(value, V);
  }
}
template <class V, class A, class B, class... R>
SIM_INLINE constexpr V __sim_make(A a, B b, R... rest) {
  V result = (V)(make_scalar_t<V>)0;
  __sim_fill<V, 0>(result, a, b, rest...);
  return result;
}

template <class T, class U>
SIM_INLINE constexpr T as_type(U value) {
  static_assert(sizeof(T) == sizeof(U), "as_type: sizes differ");
  return __builtin_bit_cast(T, value);
}

template <class T, int N>
struct array {
  T elements[N];
  SIM_INLINE thread T& operator[](size_t i) thread {
    return elements[i];
  }
  SIM_INLINE const thread T& operator[](size_t i) const thread {
    return elements[i];
  }
};

} // namespace metal
