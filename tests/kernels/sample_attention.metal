  // Paged attention for one token per sequence: a threadgroup per (query head, sequence), whose
  // SIMD-groups take turns at the tokens and then put their parts together.
  const int head = int(threadgroup_position_in_grid.x);
  const int seq = int(threadgroup_position_in_grid.y);
  const int lane = int(thread_index_in_simdgroup);
  const int sg = int(simdgroup_index_in_threadgroup);
  const int kvh = head / GQA;
  const int n = lens[seq];

  float q[EPT];
  float o[EPT];
  for (int i = 0; i < EPT; ++i) {
    q[i] = scale[0] * float(queries[(seq * NH + head) * D + lane * EPT + i]);
    o[i] = 0.0f;
  }
  float m = -3.0e38f;
  float l = 0.0f;
  for (int t = sg; t < n; t += NSG) {
    const int page = tables[seq * MAXP + t / PS];
    const int base = ((page * HK + kvh) * PS + t % PS) * D + lane * EPT;
    float s = 0.0f;
    for (int i = 0; i < EPT; ++i) {
      s += q[i] * float(kcache[base + i]);
    }
    s = simd_sum(s);
    const float mn = max(m, s);
    const float f = exp(m - mn);
    const float p = exp(s - mn);
    m = mn;
    l = l * f + p;
    for (int i = 0; i < EPT; ++i) {
      o[i] = o[i] * f + p * float(vcache[base + i]);
    }
  }
  threadgroup float sm[NSG];
  threadgroup float sl[NSG];
  threadgroup float so[NSG * D];
  if (lane == 0) {
    sm[sg] = m;
    sl[sg] = l;
  }
  for (int i = 0; i < EPT; ++i) {
    so[sg * D + lane * EPT + i] = o[i];
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  float gm = -3.0e38f;
  for (int j = 0; j < NSG; ++j) {
    gm = max(gm, sm[j]);
  }
  float gl = 0.0f;
  for (int j = 0; j < NSG; ++j) {
    gl += sl[j] * exp(sm[j] - gm);
  }
  for (int d = int(thread_index_in_threadgroup); d < D; d += NSG * 32) {
    float acc = 0.0f;
    for (int j = 0; j < NSG; ++j) {
      acc += so[j * D + d] * exp(sm[j] - gm);
    }
    out[(seq * NH + head) * D + d] = T(gl > 0.0f ? acc / gl : 0.0f);
  }
