namespace metal {

enum class mem_flags : uint {
  mem_none = 0,
  mem_device = 1,
  mem_threadgroup = 2,
  mem_texture = 4,
  mem_threadgroup_imageblock = 8,
  mem_object_data = 16
};
constexpr mem_flags operator|(mem_flags a, mem_flags b) {
  return (mem_flags)((uint)a | (uint)b);
}

SIM_INLINE void threadgroup_barrier(mem_flags flags, SIM_SITE) {
  __sim_threadgroup_barrier((uint)flags, site);
}
SIM_INLINE void simdgroup_barrier(mem_flags flags, SIM_SITE) {
  __sim_simdgroup_barrier((uint)flags, site);
}

} // namespace metal
