// Latent attention of one row of each sequence to the positions of its sequence, which lie in blocks
// anywhere in the pool. A position has a single K and V for all heads: its scores are made of both, and
// its values are K.
//
// A threadgroup takes one work item, a run of one sequence's keys. Each of its SIMD groups reads them
// for QUERIES heads of its own; they go on side by side, so that what one has fetched is near for the
// others. Nothing is exchanged between them.
//
// LANES lanes hold K and V of a position between them, so a SIMD group has 32 / LANES of them in
// flight, and each lane KEYS. Scores are summed over the lanes as in paged_attention; those of the next
// step are fetched meanwhile.
//
// in:  q [rows][HEADS][K_DIM], q_v [rows][HEADS][V_DIM], k_pool, v_pool, block_tables and work as in
//      paged_attention, a row each; ints: width; floats: scale, of the products of q alone; after
// out: out [rows][HEADS][K_DIM], or [partial rows][HEADS][K_DIM] to be merged if SPLIT;
//      stats likewise with 2 for K_DIM, as in paged_attention

constexpr int ROWS_AT_ONCE = 32 / LANES;
constexpr int STEP = ROWS_AT_ONCE * KEYS;
constexpr int K_SHARE = K_DIM / LANES;
constexpr int V_SHARE = V_DIM / LANES;
constexpr int SCORES = QUERIES * KEYS;
constexpr int OWN = SCORES > LANES ? SCORES / LANES : 1;     // finished scores of a lane
constexpr int COPIES = SCORES < LANES ? LANES / SCORES : 1;  // lanes that hold the same score
constexpr int QUERY_LANES = LANES / QUERIES;                 // lanes with scores of one query
constexpr int K_PIECES = K_SHARE / K_WIDTH;
constexpr int V_PIECES = V_SHARE / V_WIDTH;
// How far scores may exceed what their exponentials are relative to, which seldom changes so.
constexpr float MARGIN = 8.0f;
typedef mlxpage::Share<KV, K_BITS, K_GROUP, K_PIECES, K_WIDTH, LANES> KShare;
typedef mlxpage::Share<KV, V_BITS, V_GROUP, V_PIECES, V_WIDTH, LANES> VShare;

const int simd_lane = int(thread_index_in_simdgroup);
const int lane = simd_lane % LANES;
const int key_group = simd_lane / LANES;
const int first_query =
    (int(threadgroup_position_in_grid.y) * SIMD_GROUPS + int(simdgroup_index_in_threadgroup))
    * QUERIES;
if (first_query >= HEADS) {
  return;
}
const device int* own = work + int(threadgroup_position_in_grid.x) * 8;
const int begin = own[1];
const int end = own[2];
const int partial_start = own[3];
const int row_start = own[4];
const device int* table = block_tables + long(own[0]) * ints[0];
const device uint* k_blocks = (const device uint*)k_pool;
const device uint* v_blocks = (const device uint*)v_pool;

// This lane's share of its positions of one step. Past the end it reads the last ones again.
const int last_rows = (end - 1) / KEYS * KEYS;
KShare key_shares[KEYS];
VShare value_shares[KEYS];
int next_key = min(begin + key_group * KEYS, last_rows);
long next_block = table[next_key / BLOCK_SIZE];
#pragma unroll
for (int i = 0; i < KEYS; i++) {
  const uint offset = uint(next_key) % BLOCK_SIZE;
  const int at = min(i, end - 1 - next_key);
  mlxpage::load<BLOCK_SIZE>(key_shares[i], k_blocks + next_block * K_HEAD, offset, at, lane);
  mlxpage::load<BLOCK_SIZE>(value_shares[i], v_blocks + next_block * V_HEAD, offset, at, lane);
}
next_key = min(next_key + STEP, last_rows);
next_block = table[next_key / BLOCK_SIZE];

// The queries, in the lanes' shares, scaled so that exp2 takes their products.
const float scale = floats[0] * mlxpage::LOG2_E;
float queries[QUERIES][K_SHARE];
float queries_v[QUERIES][V_SHARE];
float sums[QUERIES][K_SHARE];
#pragma unroll
for (int i = 0; i < QUERIES; i++) {
  const long query = long(row_start) * HEADS + first_query + i;
#pragma unroll
  for (int j = 0; j < K_SHARE; j++) {
    const int element = (j / K_WIDTH * LANES + lane) * K_WIDTH + j % K_WIDTH;
    queries[i][j] = float(q[query * K_DIM + element]) * scale;
    sums[i][j] = 0.0f;
  }
#pragma unroll
  for (int j = 0; j < V_SHARE; j++) {
    const int element = (j / V_WIDTH * LANES + lane) * V_WIDTH + j % V_WIDTH;
    queries_v[i][j] = float(q_v[query * V_DIM + element]) * mlxpage::LOG2_E;
  }
}

// The scores that this lane finishes: of OWN keys in a row.
const int own_key = key_group * KEYS + lane % QUERY_LANES / COPIES * OWN;
float largest = mlxpage::LOWEST;
float total = 0.0f;

for (int step = begin; step < end; step += STEP) {
  // Products, summed over this lane's share.
  float scores[SCORES];
  float elements[KEYS][K_SHARE];
#pragma unroll
  for (int i = 0; i < KEYS; i++) {
    float elements_v[V_SHARE];
    mlxpage::unpack(key_shares[i], elements[i]);
    mlxpage::unpack(value_shares[i], elements_v);
#pragma unroll
    for (int j = 0; j < QUERIES; j++) {
      float sum = 0.0f;
#pragma unroll
      for (int e = 0; e < K_SHARE; e++) {
        sum += queries[j][e] * elements[i][e];
      }
#pragma unroll
      for (int e = 0; e < V_SHARE; e++) {
        sum += queries_v[j][e] * elements_v[e];
      }
      scores[j * KEYS + i] = sum;
    }
  }

  // The next step's K and V, and the block after it.
  if (step + STEP < end) {
#pragma unroll
    for (int i = 0; i < KEYS; i++) {
      const uint offset = uint(next_key) % BLOCK_SIZE;
      const int at = min(i, end - 1 - next_key);
      mlxpage::load<BLOCK_SIZE>(key_shares[i], k_blocks + next_block * K_HEAD, offset, at, lane);
      mlxpage::load<BLOCK_SIZE>(value_shares[i], v_blocks + next_block * V_HEAD, offset, at, lane);
    }
    next_key = min(next_key + STEP, last_rows);
    next_block = table[next_key / BLOCK_SIZE];
  }

  // Sum over the lanes: each exchange halves either the scores a lane still holds or, once it has
  // one, adds up.
#pragma unroll
  for (int mask = LANES / 2, count = SCORES; mask > 0; mask /= 2) {
    if (count > 1) {
      count /= 2;
      const bool upper = (lane & mask) != 0;
#pragma unroll
      for (int i = 0; i < SCORES / 2; i++) {
        if (i < count) {
          const float mine = upper ? scores[i + count] : scores[i];
          const float theirs = upper ? scores[i] : scores[i + count];
          scores[i] = mine + simd_shuffle_xor(theirs, ushort(mask));
        }
      }
    } else {
      scores[0] += simd_shuffle_xor(scores[0], ushort(mask));
    }
  }

  // Softmax so far.
  float step_largest = mlxpage::LOWEST;
#pragma unroll
  for (int i = 0; i < OWN; i++) {
    scores[i] = step + own_key + i < end ? scores[i] : -INFINITY;
    step_largest = max(step_largest, scores[i]);
  }
  if (simd_any(step_largest > largest + MARGIN)) {
    float new_largest = max(largest, step_largest);
#pragma unroll
    for (int mask = QUERY_LANES / 2; mask > 0; mask /= 2) {
      new_largest = max(new_largest, simd_shuffle_xor(new_largest, ushort(mask)));
    }
#pragma unroll
    for (int mask = LANES; mask < 32; mask *= 2) {
      new_largest = max(new_largest, simd_shuffle_xor(new_largest, ushort(mask)));
    }
    const float factor = fast::exp2(largest - new_largest);
    total *= factor;
#pragma unroll
    for (int i = 0; i < QUERIES; i++) {
      const float of_query = simd_shuffle(factor, ushort(i * QUERY_LANES));
#pragma unroll
      for (int j = 0; j < K_SHARE; j++) {
        sums[i][j] *= of_query;
      }
    }
    largest = new_largest;
  }
#pragma unroll
  for (int i = 0; i < OWN; i++) {
    scores[i] = fast::exp2(scores[i] - largest);
    total += scores[i];
  }

  // Values, weighted.
#pragma unroll
  for (int i = 0; i < KEYS; i++) {
#pragma unroll
    for (int j = 0; j < QUERIES; j++) {
      const int score = j * KEYS + i;
      const ushort holder = ushort(key_group * LANES + score / OWN * COPIES);
      const float weight = simd_shuffle(scores[score % OWN], holder);
#pragma unroll
      for (int e = 0; e < K_SHARE; e++) {
        sums[j][e] += weight * elements[i][e];
      }
    }
  }
}

// Sums of the SIMD group's lanes and positions.
#pragma unroll
for (int mask = COPIES; mask < QUERY_LANES; mask *= 2) {
  total += simd_shuffle_xor(total, ushort(mask));
}
#pragma unroll
for (int mask = LANES; mask < 32; mask *= 2) {
  total += simd_shuffle_xor(total, ushort(mask));
}
#pragma unroll
for (int i = 0; i < QUERIES; i++) {
  const long at = long(SPLIT ? partial_start : row_start) * HEADS + first_query + i;
  const float all = simd_shuffle(total, ushort(i * QUERY_LANES));
#pragma unroll
  for (int j = 0; j < K_SHARE; j++) {
    float sum = sums[i][j];
#pragma unroll
    for (int mask = LANES; mask < 32; mask *= 2) {
      sum += simd_shuffle_xor(sum, ushort(mask));
    }
    if (key_group == 0) {
      const int element = (j / K_WIDTH * LANES + lane) * K_WIDTH + j % K_WIDTH;
      out[at * K_DIM + element] = Out(SPLIT ? sum : sum / all);
    }
  }
  if (simd_lane == i * QUERY_LANES) {
    stats[at * 2] = largest;
    stats[at * 2 + 1] = total;
  }
}
