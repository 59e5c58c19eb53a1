// Puts the partial results of paged_attention together. A SIMD group takes one head of one row.
//
// in:  partials [partial rows][HEADS][V_DIM] weighted sums, stats [partial rows][HEADS][2] largest
//      score and sum of the exponentials, owners [rows] sequence of each row,
//      row_starts [sequences + 1], partial_starts [sequences + 1], sinks [HEADS], ints: rows
// out: out [rows][HEADS][V_DIM]

const int index = int(threadgroup_position_in_grid.x) * SIMD_GROUPS
    + int(simdgroup_index_in_threadgroup);
const int lane = int(thread_index_in_simdgroup);
const int row = index / HEADS;
const int head = index % HEADS;
if (row >= ints[0]) {
  return;
}
const int sequence = owners[row];
const int row_start = row_starts[sequence];
const long stride = long(row_starts[sequence + 1] - row_start) * HEADS;  // of a run of keys
const long start = long(partial_starts[sequence] + row - row_start) * HEADS + head;
const long end = long(partial_starts[sequence + 1]) * HEADS;

float largest = SINKS ? float(sinks[head]) * mlxpage::LOG2_E : mlxpage::LOWEST;
const float sink = largest;
for (long at = start; at < end; at += stride) {
  largest = max(largest, stats[at * 2]);
}
float total = SINKS ? fast::exp2(sink - largest) : 0.0f;
for (long at = start; at < end; at += stride) {
  total += fast::exp2(stats[at * 2] - largest) * stats[at * 2 + 1];
}
for (int element = lane; element < V_DIM; element += 32) {
  float sum = 0.0f;
  for (long at = start; at < end; at += stride) {
    sum += fast::exp2(stats[at * 2] - largest) * partials[at * V_DIM + element];
  }
  out[(long(row) * HEADS + head) * V_DIM + element] = T(sum / total);
}
