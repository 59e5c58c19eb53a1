// <metal_type_traits>.
namespace metal {

template <class T, T v>
struct integral_constant {
  static constexpr constant T value = v;
  using value_type = T;
  using type = integral_constant;
  constexpr operator T() const {
    return v;
  }
};
using true_type = integral_constant<bool, true>;
using false_type = integral_constant<bool, false>;
template <bool B>
using bool_constant = integral_constant<bool, B>;

template <class A, class B>
struct is_same : false_type {};
template <class A>
struct is_same<A, A> : true_type {};
template <class A, class B>
constexpr constant bool is_same_v = is_same<A, B>::value;

template <bool B, class T = void>
struct enable_if {};
template <class T>
struct enable_if<true, T> {
  using type = T;
};
template <bool B, class T = void>
using enable_if_t = typename enable_if<B, T>::type;

template <bool B, class T, class F>
struct conditional {
  using type = T;
};
template <class T, class F>
struct conditional<false, T, F> {
  using type = F;
};
template <bool B, class T, class F>
using conditional_t = typename conditional<B, T, F>::type;

template <class T>
struct remove_const {
  using type = T;
};
template <class T>
struct remove_const<const T> {
  using type = T;
};
template <class T>
struct remove_volatile {
  using type = T;
};
template <class T>
struct remove_volatile<volatile T> {
  using type = T;
};
template <class T>
struct remove_cv {
  using type = __remove_cv(T);
};
template <class T>
using remove_cv_t = typename remove_cv<T>::type;
template <class T>
struct remove_reference {
  using type = __remove_reference_t(T);
};
template <class T>
using remove_reference_t = typename remove_reference<T>::type;

template <class T>
struct remove_addrspace {
  using type = __remove_cv(T);
};
template <class T>
struct remove_addrspace<device T> {
  using type = T;
};
template <class T>
struct remove_addrspace<threadgroup T> {
  using type = T;
};
template <class T>
struct remove_addrspace<thread T> {
  using type = T;
};
template <class T>
struct remove_addrspace<constant T> {
  using type = const T;
};
template <class T>
using remove_addrspace_t = typename remove_addrspace<T>::type;

template <class T>
struct remove_pointer {
  using type = T;
};
template <class T>
struct remove_pointer<device T*> {
  using type = T;
};
template <class T>
struct remove_pointer<threadgroup T*> {
  using type = T;
};
template <class T>
struct remove_pointer<thread T*> {
  using type = T;
};
template <class T>
using remove_pointer_t = typename remove_pointer<T>::type;

template <class T>
struct is_pointer : false_type {};
template <class T>
struct is_pointer<device T*> : true_type {};
template <class T>
struct is_pointer<thread T*> : true_type {};
template <class T>
struct is_pointer<threadgroup T*> : true_type {};

template <class A, class B>
struct is_convertible : bool_constant<__is_convertible_to(A, B)> {};
template <class A, class B>
constexpr constant bool is_convertible_v = is_convertible<A, B>::value;

template <class...>
struct conjunction : true_type {};
template <class B>
struct conjunction<B> : B {};
template <class B, class... R>
struct conjunction<B, R...> : conditional_t<bool(B::value), conjunction<R...>, B> {};
template <class...>
struct disjunction : false_type {};
template <class B>
struct disjunction<B> : B {};
template <class B, class... R>
struct disjunction<B, R...> : conditional_t<bool(B::value), B, disjunction<R...>> {};
template <class... B>
using _disjunction = disjunction<B...>;
template <class... B>
using _conjunction = conjunction<B...>;
template <class B>
struct negation : bool_constant<!bool(B::value)> {};

// 1: an integer, 2: a floating-point number.
template <class T>
struct __sim_kind {
  static constexpr constant int value = 0;
};
#define SIM_KIND(T, kind)                          \
  template <>                                      \
  struct __sim_kind<T> {                           \
    static constexpr constant int value = kind;    \
  };
SIM_KIND(bool, 1)
SIM_KIND(char, 1)
SIM_KIND(signed char, 1)
SIM_KIND(uchar, 1)
SIM_KIND(short, 1)
SIM_KIND(ushort, 1)
SIM_KIND(int, 1)
SIM_KIND(uint, 1)
SIM_KIND(long, 1)
SIM_KIND(ulong, 1)
SIM_KIND(float, 2)
SIM_KIND(half, 2)
SIM_KIND(bfloat, 2)
#undef SIM_KIND

template <class T>
struct is_integral : bool_constant<__sim_kind<remove_cv_t<T>>::value == 1> {};
template <class T>
struct is_floating_point : bool_constant<__sim_kind<remove_cv_t<T>>::value == 2> {};
template <class T>
struct is_arithmetic : bool_constant<__sim_kind<remove_cv_t<T>>::value != 0> {};
template <class T>
struct is_scalar : is_arithmetic<T> {};
template <class T>
struct is_signed : bool_constant<(T(-1) < T(0))> {};
template <class T>
struct is_unsigned : bool_constant<!(T(-1) < T(0))> {};

#define SIM_VALUE(name) \
  template <class T>    \
  constexpr constant bool name##_v = name<T>::value;
SIM_VALUE(is_integral)
SIM_VALUE(is_floating_point)
SIM_VALUE(is_arithmetic)
SIM_VALUE(is_scalar)
SIM_VALUE(is_signed)
SIM_VALUE(is_unsigned)
SIM_VALUE(is_pointer)
#undef SIM_VALUE

} // namespace metal
