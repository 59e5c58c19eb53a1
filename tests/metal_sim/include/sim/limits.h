// <metal_limits>.
namespace metal {

template <class T>
struct numeric_limits;

#define SIM_INTEGER(T, smallest, largest, bits)                \
  template <>                                                  \
  struct numeric_limits<T> {                                   \
    static constexpr constant bool is_integer = true;          \
    static constexpr constant int digits = bits;               \
    static constexpr T min() {                                 \
      return smallest;                                         \
    }                                                          \
    static constexpr T max() {                                 \
      return largest;                                          \
    }                                                          \
    static constexpr T lowest() {                              \
      return smallest;                                         \
    }                                                          \
  };
SIM_INTEGER(bool, false, true, 1)
SIM_INTEGER(char, (char)-128, 127, 7)
SIM_INTEGER(signed char, -128, 127, 7)
SIM_INTEGER(uchar, 0, 255, 8)
SIM_INTEGER(short, -32768, 32767, 15)
SIM_INTEGER(ushort, 0, 65535, 16)
SIM_INTEGER(int, -2147483647 - 1, 2147483647, 31)
SIM_INTEGER(uint, 0, 4294967295u, 32)
SIM_INTEGER(long, -9223372036854775807L - 1, 9223372036854775807L, 63)
SIM_INTEGER(ulong, 0, 18446744073709551615UL, 64)
#undef SIM_INTEGER

#define SIM_FLOAT(T, smallest, largest, step)                  \
  template <>                                                  \
  struct numeric_limits<T> {                                   \
    static constexpr constant bool is_integer = false;         \
    static constexpr T min() {                                 \
      return (T)smallest;                                      \
    }                                                          \
    static constexpr T max() {                                 \
      return (T)largest;                                       \
    }                                                          \
    static constexpr T lowest() {                              \
      return (T)-largest;                                      \
    }                                                          \
    static constexpr T epsilon() {                             \
      return (T)step;                                          \
    }                                                          \
    static constexpr T infinity() {                            \
      return (T)__builtin_inff();                              \
    }                                                          \
    static constexpr T quiet_NaN() {                           \
      return (T)__builtin_nanf("");                            \
    }                                                          \
  };
SIM_FLOAT(float, 0x1p-126f, 0x1.fffffep127f, 0x1p-23f)
SIM_FLOAT(half, 0x1p-14f, 65504.0f, 0x1p-10f)
SIM_FLOAT(bfloat, 0x1p-126f, 0x1.fep127f, 0x1p-7f)
#undef SIM_FLOAT

} // namespace metal
