// SIMD-group functions. Every lane hands in its value, waits for the others, and computes from all.
namespace metal {

// Metal takes half, float, the 8, 16 and 32-bit integers and vectors of them: no bool, no 64-bit
// integers. MLX's headers add overloads for bfloat and bool.
template <class T, class E = make_scalar_t<T>>
constexpr constant bool __sim_is_simd =
    __sim_kind<E>::value != 0 && sizeof(E) <= 4 && !is_same_v<E, bool> && !is_same_v<T, bfloat>;
template <class T, class E = make_scalar_t<T>>
constexpr constant bool __sim_is_simd_integer = __sim_is_simd<T> && __sim_kind<E>::value == 1;
template <class T>
using __sim_if_simd = enable_if_t<__sim_is_simd<T>>;
template <class T>
using __sim_if_simd_integer = enable_if_t<__sim_is_simd_integer<T>>;

template <class T>
SIM_INLINE thread T& __sim_slot(thread __sim_slots* slots, uint lane) {
  return *(thread T*)(thread void*)&slots->data[lane][0];
}
SIM_INLINE bool __sim_active(thread __sim_slots* slots, uint lane) {
  return (slots->active >> lane) & 1;
}

// Must be used in the SIM_UNCHECKED function that the kernel calls: it takes the return address.
#define SIM_EXCHANGE(value, operation) \
  __sim_exchange(&value, sizeof(value), operation, site, __builtin_return_address(0))

#define SIM_COMBINE(name, expression) \
  struct __sim_##name {               \
    template <class T>                \
    static SIM_INLINE T of(T a, T b) { \
      return (T)(expression);         \
    }                                 \
  };
SIM_COMBINE(sum, a + b)
SIM_COMBINE(product, a* b)
SIM_COMBINE(min, min(a, b))
SIM_COMBINE(max, max(a, b))
SIM_COMBINE(and, a& b)
SIM_COMBINE(or, a | b)
SIM_COMBINE(xor, a ^ b)
#undef SIM_COMBINE

// In the order of a butterfly over the lanes, as hardware does it.
template <class F, class T>
SIM_UNCHECKED T __sim_reduce(T value, const constant char* operation, uint site) {
  thread __sim_slots* slots = SIM_EXCHANGE(value, operation);
  thread T& result = *(thread T*)(thread void*)&slots->result[0];
  if (slots->done) {
    return result;
  }
  T values[32];
  bool active[32];
  for (uint i = 0; i < 32; i++) {
    active[i] = __sim_active(slots, i);
    values[i] = active[i] ? __sim_slot<T>(slots, i) : value;
  }
  for (uint distance = 1; distance < 32; distance *= 2) {
    for (uint i = 0; i < 32; i += 2 * distance) {
      uint j = i + distance;
      if (active[i] && active[j]) {
        values[i] = F::of(values[i], values[j]);
      } else if (active[j]) {
        values[i] = values[j];
        active[i] = true;
      }
    }
  }
  result = values[0];
  slots->done = 1;
  return result;
}

template <class F, class T>
SIM_UNCHECKED T
__sim_prefix(T value, bool inclusive, T identity, const constant char* operation, uint site) {
  thread __sim_slots* slots = SIM_EXCHANGE(value, operation);
  T result = identity;
  for (uint i = 0; i < slots->lane; i++) {
    if (__sim_active(slots, i)) {
      result = F::of(result, __sim_slot<T>(slots, i));
    }
  }
  return inclusive ? F::of(result, value) : result;
}

// From a lane that isn't there the result is undefined in Metal: all bits set here, which floats
// show.
template <class T>
SIM_UNCHECKED T __sim_from(T value, uint source, const constant char* operation, uint site) {
  thread __sim_slots* slots = SIM_EXCHANGE(value, operation);
  if (source < 32 && __sim_active(slots, source)) {
    return __sim_slot<T>(slots, source);
  }
  T undefined;
  __builtin_memset(&undefined, 0xff, sizeof(T));
  return undefined;
}

#define SIM_REDUCE(name, condition)                       \
  template <class T, class = condition<T>>                \
  SIM_INLINE T simd_##name(T value, SIM_SITE) {           \
    return __sim_reduce<__sim_##name>(value, "simd_" #name, site); \
  }
SIM_REDUCE(sum, __sim_if_simd)
SIM_REDUCE(product, __sim_if_simd)
SIM_REDUCE(min, __sim_if_simd)
SIM_REDUCE(max, __sim_if_simd)
SIM_REDUCE(and, __sim_if_simd_integer)
SIM_REDUCE(or, __sim_if_simd_integer)
SIM_REDUCE(xor, __sim_if_simd_integer)
#undef SIM_REDUCE

#define SIM_PREFIX(name, function, inclusive, identity)                                       \
  template <class T, class = __sim_if_simd<T>>                                                \
  SIM_INLINE T simd_prefix_##name(T value, SIM_SITE) {                                        \
    return __sim_prefix<function>(value, inclusive, (T)identity, "simd_prefix_" #name, site); \
  }
SIM_PREFIX(inclusive_sum, __sim_sum, true, 0)
SIM_PREFIX(exclusive_sum, __sim_sum, false, 0)
SIM_PREFIX(inclusive_product, __sim_product, true, 1)
SIM_PREFIX(exclusive_product, __sim_product, false, 1)
#undef SIM_PREFIX

#define SIM_SHUFFLE(name, source)                                 \
  template <class T, class = __sim_if_simd<T>>                    \
  SIM_INLINE T simd_##name(T value, ushort n, SIM_SITE) {         \
    uint lane = __sim_lane();                                     \
    (void)lane;                                                   \
    return __sim_from(value, (uint)(source), "simd_" #name, site); \
  }
SIM_SHUFFLE(broadcast, n)
SIM_SHUFFLE(shuffle, n)
SIM_SHUFFLE(shuffle_xor, lane ^ n)
SIM_SHUFFLE(shuffle_down, lane + n)
SIM_SHUFFLE(shuffle_up, lane - n)
SIM_SHUFFLE(shuffle_rotate_down, (lane + n) & 31)
SIM_SHUFFLE(shuffle_rotate_up, (lane - n) & 31)
#undef SIM_SHUFFLE

template <class T, class = __sim_if_simd<T>>
SIM_INLINE T simd_shuffle_and_fill_down(T value, T filling, ushort n, SIM_SITE) {
  uint source = __sim_lane() + n;
  T inside = __sim_from(value, source & 31, "simd_shuffle_and_fill_down", site);
  T outside = __sim_from(filling, source & 31, "simd_shuffle_and_fill_down", site);
  return source > 31 ? outside : inside;
}
template <class T, class = __sim_if_simd<T>>
SIM_INLINE T simd_shuffle_and_fill_up(T value, T filling, ushort n, SIM_SITE) {
  uint source = __sim_lane() - n;
  T inside = __sim_from(value, source & 31, "simd_shuffle_and_fill_up", site);
  T outside = __sim_from(filling, source & 31, "simd_shuffle_and_fill_up", site);
  return source > 31 ? outside : inside;
}

template <class T, class = __sim_if_simd<T>>
SIM_UNCHECKED T simd_broadcast_first(T value, SIM_SITE) {
  thread __sim_slots* slots = SIM_EXCHANGE(value, "simd_broadcast_first");
  return __sim_slot<T>(slots, (uint)__builtin_ctz(slots->active));
}

struct simd_vote {
  using vote_t = ulong;
  vote_t v;
  explicit constexpr simd_vote(vote_t x = 0) : v(x) {}
  explicit constexpr operator vote_t() const {
    return v;
  }
  bool all() const {
    return v == 0xffffffffUL;
  }
  bool any() const {
    return v != 0;
  }
};

// A bit per active lane whose value isn't 0.
SIM_UNCHECKED inline uint
__sim_ballot(uint value, thread uint& active, const constant char* operation, uint site) {
  thread __sim_slots* slots = SIM_EXCHANGE(value, operation);
  uint result = 0;
  for (uint i = 0; i < 32; i++) {
    if (__sim_active(slots, i) && __sim_slot<uint>(slots, i)) {
      result |= 1u << i;
    }
  }
  active = slots->active;
  return result;
}
SIM_INLINE simd_vote simd_ballot(bool value, SIM_SITE) {
  uint active;
  return simd_vote(__sim_ballot(value, active, "simd_ballot", site));
}
SIM_INLINE bool simd_all(bool value, SIM_SITE) {
  uint active;
  return __sim_ballot(!value, active, "simd_all", site) == 0;
}
SIM_INLINE bool simd_any(bool value, SIM_SITE) {
  uint active;
  return __sim_ballot(value, active, "simd_any", site) != 0;
}
SIM_INLINE bool simd_is_first(SIM_SITE) {
  uint active;
  __sim_ballot(0, active, "simd_is_first", site);
  return __sim_lane() == (uint)__builtin_ctz(active);
}

// Without these, MLX's overloads for bfloat would take what Metal has no function for.
#define SIM_NOT_IN_METAL(name, ...)                                                               \
  template <                                                                                      \
      class T,                                                                                    \
      class = enable_if_t<is_same_v<T, long> || is_same_v<T, ulong> || is_same_v<T, bool>>,       \
      class = void>                                                                               \
  T name(T __VA_ARGS__) = delete;
SIM_NOT_IN_METAL(simd_sum)
SIM_NOT_IN_METAL(simd_product)
SIM_NOT_IN_METAL(simd_min)
SIM_NOT_IN_METAL(simd_max)
SIM_NOT_IN_METAL(simd_shuffle, , ushort)
SIM_NOT_IN_METAL(simd_broadcast, , ushort)
SIM_NOT_IN_METAL(simd_shuffle_xor, , ushort)
#undef SIM_NOT_IN_METAL

template <class T>
using uniform = T;
template <class T>
SIM_INLINE constexpr T make_uniform(T x) {
  return x;
}

} // namespace metal
