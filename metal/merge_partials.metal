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
const int rows = row_starts[sequence + 1] - row_start;
const int partial_start = partial_starts[sequence];
const int runs = (partial_starts[sequence + 1] - partial_start) / rows;
const long first = long(partial_start + row - row_start) * HEADS + head;
const long stride = long(rows) * HEADS;  // from one run to the next

// A lane takes every 32nd run.
const float sink = SINKS ? float(sinks[head]) * mlxpage::LOG2_E : mlxpage::LOWEST;
float largest = sink;
for (int run = lane; run < runs; run += 32) {
  largest = max(largest, stats[(first + run * stride) * 2]);
}
for (int mask = 16; mask > 0; mask /= 2) {
  largest = max(largest, simd_shuffle_xor(largest, ushort(mask)));
}
float total = SINKS && lane == 0 ? fast::exp2(sink - largest) : 0.0f;
for (int run = lane; run < runs; run += 32) {
  const long at = (first + run * stride) * 2;
  total += fast::exp2(stats[at] - largest) * stats[at + 1];
}
for (int mask = 16; mask > 0; mask /= 2) {
  total += simd_shuffle_xor(total, ushort(mask));
}

// A lane takes every 32nd element.
constexpr int SHARE = (V_DIM + 31) / 32;
float sums[SHARE];
#pragma unroll
for (int i = 0; i < SHARE; i++) {
  sums[i] = 0.0f;
}
#pragma unroll 4
for (int run = 0; run < runs; run++) {
  const long at = first + run * stride;
  const float weight = fast::exp2(stats[at * 2] - largest);
#pragma unroll
  for (int i = 0; i < SHARE; i++) {
    const int element = min(lane + i * 32, V_DIM - 1);
    sums[i] += weight * partials[at * V_DIM + element];
  }
}
#pragma unroll
for (int i = 0; i < SHARE; i++) {
  const int element = lane + i * 32;
  if (element < V_DIM) {
    out[(long(row) * HEADS + head) * V_DIM + element] = T(sums[i] / total);
  }
}
