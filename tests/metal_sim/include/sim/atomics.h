// Atomics, relaxed. Threads run one at a time here, so plain accesses do; __sim_atomic tells the
// race detector, whose access flags are 1 for reading and 2 for writing.
#undef atomic_int
#undef atomic_uint
#undef atomic_float
#undef atomic_bool
#undef memory_order
#undef memory_order_relaxed
#define atomic_int __sim_atomic_int
#define atomic_uint __sim_atomic_uint
#define atomic_float __sim_atomic_float
#define atomic_bool __sim_atomic_bool
#define memory_order __sim_memory_order
#define memory_order_relaxed __sim_memory_order_relaxed

namespace metal {

enum memory_order { memory_order_relaxed = 0 };

template <class T>
struct atomic {
  static_assert(
      is_same_v<T, int> || is_same_v<T, uint> || is_same_v<T, float> || is_same_v<T, bool> ||
          is_same_v<T, ulong>,
      "Metal has no atomic of this type");
  T value;
};
typedef atomic<int> atomic_int;
typedef atomic<uint> atomic_uint;
typedef atomic<float> atomic_float;
typedef atomic<bool> atomic_bool;

#define SIM_FETCH(SPACE, name, expression)                                                \
  template <class T, class U>                                                             \
  SIM_UNCHECKED T atomic_fetch_##name##_explicit(                                         \
      volatile SPACE atomic<T>* p, U operand, memory_order, SIM_SITE) {                   \
    __sim_atomic((ulong)p, sizeof(T), 3, site);                                           \
    T old = p->value, x = (T)operand;                                                     \
    p->value = (T)(expression);                                                           \
    return old;                                                                           \
  }
#define SIM_ATOMICS(SPACE)                                                                \
  template <class T>                                                                      \
  SIM_UNCHECKED T atomic_load_explicit(                                                   \
      const volatile SPACE atomic<T>* p, memory_order, SIM_SITE) {                        \
    __sim_atomic((ulong)p, sizeof(T), 1, site);                                           \
    return p->value;                                                                      \
  }                                                                                       \
  template <class T, class U>                                                             \
  SIM_UNCHECKED void atomic_store_explicit(                                               \
      volatile SPACE atomic<T>* p, U x, memory_order, SIM_SITE) {                         \
    __sim_atomic((ulong)p, sizeof(T), 2, site);                                           \
    p->value = (T)x;                                                                      \
  }                                                                                       \
  SIM_FETCH(SPACE, add, old + x)                                                          \
  SIM_FETCH(SPACE, sub, old - x)                                                          \
  SIM_FETCH(SPACE, max, old < x ? x : old)                                                \
  SIM_FETCH(SPACE, min, x < old ? x : old)                                                \
  SIM_FETCH(SPACE, or, old | x)                                                           \
  SIM_FETCH(SPACE, and, old & x)                                                          \
  template <class T, class U>                                                             \
  SIM_UNCHECKED T atomic_exchange_explicit(                                               \
      volatile SPACE atomic<T>* p, U x, memory_order, SIM_SITE) {                         \
    __sim_atomic((ulong)p, sizeof(T), 3, site);                                           \
    T old = p->value;                                                                     \
    p->value = (T)x;                                                                      \
    return old;                                                                           \
  }                                                                                       \
  template <class T>                                                                      \
  SIM_UNCHECKED bool atomic_compare_exchange_weak_explicit(                               \
      volatile SPACE atomic<T>* p,                                                        \
      thread T* expected,                                                                 \
      T desired,                                                                          \
      memory_order,                                                                       \
      memory_order,                                                                       \
      SIM_SITE) {                                                                         \
    __sim_atomic((ulong)p, sizeof(T), 3, site);                                           \
    T old = p->value;                                                                     \
    if (__builtin_memcmp(&old, expected, sizeof(T)) == 0) {                               \
      p->value = desired;                                                                 \
      return true;                                                                        \
    }                                                                                     \
    *expected = old;                                                                      \
    return false;                                                                         \
  }
SIM_ATOMICS(device)
SIM_ATOMICS(threadgroup)
#undef SIM_ATOMICS
#undef SIM_FETCH

} // namespace metal
