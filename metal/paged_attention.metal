// Attention of a few rows of each sequence (one in a decode, up to 8) to the positions of their own
// sequence, which lie in blocks anywhere in the pool.
//
// A threadgroup takes one work item (a run of one sequence's keys), one KV head, and up to QUERIES
// queries, which are the heads of the KV head's group in each row. It reads every K and V once.
//
// LANES lanes hold a row of K or V between them, so a SIMD group has 32 / LANES rows in flight, and
// each lane KEYS of them: a step of a SIMD group. Scores are summed over the lanes by a butterfly
// that halves their number each time, which leaves every lane with a few finished scores and a
// single exponential each, instead of all scores in all lanes.
//
// Loads run ahead: K of the next step is fetched as soon as its registers are free, then V, which has
// other registers if it is codes.
//
// If APPEND, each sequence has one row, whose K and V come as inputs: they are put into the pool (in
// place, see write_kv) and are where the softmax of their sequence's last run begins. Not into a
// quantised one.
//
// in:  q [rows][HEADS][K_DIM], k [rows][KV_HEADS][K_DIM], v [rows][KV_HEADS][V_DIM] (anything
//      unless APPEND), k_pool, v_pool, block_tables [sequences][width],
//      work [items][8]: sequence, first key (of a block), end, first row of the partial results,
//      the sequence's first row, number of rows and of positions, 0;
//      ints: width, window; floats: scale, softcap; sinks [HEADS]; after
// out: out [rows][HEADS][V_DIM], or [partial rows][HEADS][V_DIM] to be merged if SPLIT;
//      stats likewise with 2 for V_DIM: a score (times log2 e) that the largest one exceeds by MARGIN
//      at most, and the sum of the exponentials, relative to it

constexpr int HEADS = KV_HEADS * GROUP;
constexpr int THREADS = SIMD_GROUPS * 32;
constexpr int ROWS_AT_ONCE = 32 / LANES;
constexpr int STEP = ROWS_AT_ONCE * KEYS;
constexpr int STRIDE = SIMD_GROUPS * STEP;
constexpr int K_SHARE = K_DIM / LANES;
constexpr int V_SHARE = V_DIM / LANES;
constexpr int SCORES = PADDED_QUERIES * KEYS;
constexpr int OWN = SCORES > LANES ? SCORES / LANES : 1;     // finished scores of a lane
constexpr int COPIES = SCORES < LANES ? LANES / SCORES : 1;  // lanes that hold the same score
constexpr int QUERY_LANES = LANES / PADDED_QUERIES;          // lanes with scores of one query
constexpr int K_PIECES = K_SHARE / K_WIDTH;
constexpr int V_PIECES = V_SHARE / V_WIDTH;
constexpr bool K_CODES = K_BITS < 16;
constexpr bool V_CODES = V_BITS < 16;
// A lane's i-th query is number i ^ own_query: as long as lanes exchange scores of queries, all of them
// give the upper half away. Not if some queries are padding, nor for a row to append.
constexpr bool TURNED = QUERIES == PADDED_QUERIES && !APPEND;
// How far scores may exceed what their exponentials are relative to, which seldom changes so.
constexpr float MARGIN = 8.0f;
typedef mlxpage::Share<KV, K_BITS, K_GROUP, K_PIECES, K_WIDTH, LANES> KShare;
typedef mlxpage::Share<KV, V_BITS, V_GROUP, V_PIECES, V_WIDTH, LANES> VShare;

const int thread_index = int(thread_position_in_threadgroup.x);
const int simd_group = int(simdgroup_index_in_threadgroup);
const int simd_lane = int(thread_index_in_simdgroup);
const int lane = simd_lane % LANES;
const int key_group = simd_lane / LANES;

const int item = int(threadgroup_position_in_grid.x);
const int kv_head = int(threadgroup_position_in_grid.y) % KV_HEADS;
const int first_query = int(threadgroup_position_in_grid.y) / KV_HEADS * QUERIES;
const device int* own = work + item * 8;
const int sequence = own[0];
const int begin = own[1];
const int run_end = own[2];
const int partial_start = own[3];
const int row_start = own[4];
const int rows = own[5];
const int context = own[6];
const int end = APPEND ? min(run_end, context - 1) : run_end;  // of the keys in the pool
const int num_queries = rows * GROUP - first_query;
if (num_queries <= 0) {
  return;
}
const device int* table = block_tables + long(sequence) * ints[0];
const int window = ints[1];
const device uint* k_blocks = (const device uint*)k_pool;
const device uint* v_blocks = (const device uint*)v_pool;

// This lane's share of its rows of one step. Past the end it reads the last rows again; of codes also
// the rest of their block, whatever that is. Where elements would be, a row may just be written.
const int last_rows = (end - 1) / KEYS * KEYS;
const int group_begin = begin + simd_group * STEP + key_group * KEYS;
KShare key_shares[KEYS];
VShare value_shares[KEYS];
int next_key = min(group_begin, last_rows);
int next_block = 0;
if (begin < end) {  // not only a row to append
  const long head = uint(table[next_key / BLOCK_SIZE] * KV_HEADS + kv_head);
  const uint offset = uint(next_key) % BLOCK_SIZE;
#pragma unroll
  for (int i = 0; i < KEYS; i++) {
    const int at = min(i, end - 1 - next_key);
    mlxpage::load<BLOCK_SIZE>(
        key_shares[i], k_blocks + head * K_HEAD, offset, K_CODES ? i : at, lane);
    mlxpage::load<BLOCK_SIZE>(
        value_shares[i], v_blocks + head * V_HEAD, offset, V_CODES ? i : at, lane);
  }
  next_key = min(group_begin + STRIDE, last_rows);
  next_block = table[next_key / BLOCK_SIZE];
}

// The row to append, fetched now: the last SIMD group, which has the least of the keys to do, puts it
// into the pool and begins with it.
const bool appends = APPEND && run_end == context && simd_group == SIMD_GROUPS - 1;
KShare new_k;
VShare new_v;
if (appends) {
  const long from = long(row_start) * KV_HEADS + kv_head;
  mlxpage::load<BLOCK_SIZE>(new_k, (const device uint*)(k + from * K_DIM), 0, 0, lane);
  mlxpage::load<BLOCK_SIZE>(new_v, (const device uint*)(v + from * V_DIM), 0, 0, lane);
}

const int own_query = lane / QUERY_LANES;  // whose scores this lane finishes

// The queries, in the lanes' shares, scaled so that exp2 takes their products.
const float scale = SOFTCAP ? floats[0] / floats[1] : floats[0] * mlxpage::LOG2_E;
float queries[QUERIES][K_SHARE];
float query_sums[QUERIES][K_PIECES];  // for what is added to all codes of a piece
float sums[QUERIES][V_SHARE];
float added[QUERIES][V_PIECES];  // to all sums of a piece
#pragma unroll
for (int i = 0; i < QUERIES; i++) {
  const int query = first_query + min(TURNED ? i ^ own_query : i, num_queries - 1);
  const int row = row_start + query / GROUP;
  const device T* from = q + (long(row) * HEADS + kv_head * GROUP + query % GROUP) * K_DIM;
#pragma unroll
  for (int j = 0; j < K_SHARE; j++) {
    queries[i][j] = float(from[(j / K_WIDTH * LANES + lane) * K_WIDTH + j % K_WIDTH]) * scale;
  }
#pragma unroll
  for (int j = 0; j < V_SHARE; j++) {
    sums[i][j] = 0.0f;
  }
#pragma unroll
  for (int piece = 0; piece < K_PIECES; piece++) {
    query_sums[i][piece] = 0.0f;
#pragma unroll
    for (int j = 0; j < K_WIDTH; j++) {
      query_sums[i][piece] += queries[i][piece * K_WIDTH + j];
      queries[i][piece * K_WIDTH + j] *= mlxpage::unit<K_BITS>(j);
    }
  }
#pragma unroll
  for (int piece = 0; piece < V_PIECES; piece++) {
    added[i][piece] = 0.0f;
  }
}

// The scores that this lane finishes: of its own query, of OWN keys in a row.
const int own_key = key_group * KEYS + lane % QUERY_LANES / COPIES * OWN;
const int position = context - rows + (first_query + min(own_query, num_queries - 1)) / GROUP;
const int last_key = min(position, end - 1);
const int first_key = position - window;  // exclusive
float largest = mlxpage::LOWEST;
float total = 0.0f;

if (appends) {
  if (key_group == 0 && first_query == 0) {
    const long block = table[(context - 1) / BLOCK_SIZE];
    const long head = block * KV_HEADS + kv_head;
    const int offset = (context - 1) % BLOCK_SIZE;
    mlxpage::store(new_k, (device uint*)k_pool + head * K_HEAD, offset, lane);
    mlxpage::store(new_v, (device uint*)v_pool + head * V_HEAD, offset, lane);
  }
  float elements[K_SHARE];
  mlxpage::unpack(new_k, elements);
#pragma unroll
  for (int i = 0; i < QUERIES; i++) {
    float score = 0.0f;
#pragma unroll
    for (int e = 0; e < K_SHARE; e++) {
      score += queries[i][e] * elements[e];
    }
#pragma unroll
    for (int mask = LANES / 2; mask > 0; mask /= 2) {
      score += simd_shuffle_xor(score, ushort(mask));
    }
    largest = i == own_query ? score : largest;
  }
  if (SOFTCAP) {
    largest = floats[1] * mlxpage::LOG2_E * tanh(largest);
  }
  // Of the lanes and key groups that are added up in the end, one counts it.
  if (key_group == 0) {
    total = lane % QUERY_LANES < COPIES ? 1.0f : 0.0f;
    float values[V_SHARE];
    mlxpage::unpack(new_v, values);
#pragma unroll
    for (int i = 0; i < QUERIES; i++) {
#pragma unroll
      for (int j = 0; j < V_SHARE; j++) {
        sums[i][j] = values[j];
      }
    }
  }
}

for (int step = begin + simd_group * STEP; step < end; step += STRIDE) {
  // Products, summed over this lane's share.
  float scores[SCORES];
#pragma unroll
  for (int i = 0; i < KEYS; i++) {
    float elements[K_SHARE];
    mlxpage::unpack(key_shares[i], elements);
    float2 by[K_PIECES];
    if (K_CODES) {
#pragma unroll
      for (int piece = 0; piece < K_PIECES; piece++) {
        by[piece] = mlxpage::factors<KV>(key_shares[i].sides[piece]);
      }
    }
#pragma unroll
    for (int j = 0; j < PADDED_QUERIES; j++) {
      const int query = j < QUERIES ? j : 0;
      float sum = 0.0f;
#pragma unroll
      for (int piece = 0; piece < (j < QUERIES ? K_PIECES : 0); piece++) {
        float part = K_CODES ? 0.0f : sum;
#pragma unroll
        for (int e = piece * K_WIDTH; e < (piece + 1) * K_WIDTH; e++) {
          part += queries[query][e] * elements[e];
        }
        sum = K_CODES ? sum + part * by[piece].x + query_sums[query][piece] * by[piece].y : part;
      }
      scores[j * KEYS + i] = sum;
    }
  }

  // The next step's K, and V if it is codes, which are few words. An NVIDIA GPU counts what is on its way
  // for both together: if V were fetched last, the next step would wait for it to begin with K.
  VShare values[KEYS];
#pragma unroll
  for (int i = 0; i < KEYS; i++) {
    values[i] = value_shares[i];
    if (V_CODES && step + STEP > end && step + key_group * KEYS + i >= end) {
#pragma unroll
      for (int piece = 0; piece < V_PIECES; piece++) {
        values[i].sides[piece] = 0;  // what is there may be no number, which no weight makes zero
      }
    }
  }
  const bool more = step + STRIDE < end;
  const long next_head = uint(next_block * KV_HEADS + kv_head);
  const uint next_offset = uint(next_key) % BLOCK_SIZE;
  if (more) {
#pragma unroll
    for (int i = 0; i < KEYS; i++) {
      const int at = K_CODES ? i : min(i, end - 1 - next_key);
      mlxpage::load<BLOCK_SIZE>(key_shares[i], k_blocks + next_head * K_HEAD, next_offset, at, lane);
      if (V_CODES) {
        mlxpage::load<BLOCK_SIZE>(
            value_shares[i], v_blocks + next_head * V_HEAD, next_offset, i, lane);
      }
    }
  }

  // Sum over the lanes: each exchange halves either the scores a lane still holds or, once it has
  // one, adds up.
#pragma unroll
  for (int mask = LANES / 2, count = SCORES; mask > 0; mask /= 2) {
    if (count > 1) {
      count /= 2;
      const bool upper = !(TURNED && mask >= QUERY_LANES) && (lane & mask) != 0;
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
  bool exceeds = false;
#pragma unroll
  for (int i = 0; i < OWN; i++) {
    const int at = step + own_key + i;
    if (SOFTCAP) {
      scores[i] = floats[1] * mlxpage::LOG2_E * tanh(scores[i]);
    }
    scores[i] = at <= last_key && at > first_key ? scores[i] : -INFINITY;
    exceeds = exceeds || scores[i] > largest + MARGIN;
  }
  if (simd_any(exceeds)) {
    float new_largest = largest;
#pragma unroll
    for (int i = 0; i < OWN; i++) {
      new_largest = max(new_largest, scores[i]);
    }
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
      for (int j = 0; j < V_SHARE; j++) {
        sums[i][j] *= of_query;
      }
#pragma unroll
      for (int piece = 0; piece < V_PIECES; piece++) {
        added[i][piece] *= of_query;
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
    float elements[V_SHARE];
    mlxpage::unpack(values[i], elements);
    float2 by[V_PIECES];
    if (V_CODES) {
#pragma unroll
      for (int piece = 0; piece < V_PIECES; piece++) {
        by[piece] = mlxpage::factors<KV>(values[i].sides[piece]);
      }
    }
#pragma unroll
    for (int j = 0; j < QUERIES; j++) {
      const int score = j * KEYS + i;
      const ushort holder = ushort(key_group * LANES + score / OWN * COPIES);
      const float weight = simd_shuffle(scores[score % OWN], holder);
#pragma unroll
      for (int piece = 0; piece < V_PIECES; piece++) {
        const float of_piece = V_CODES ? weight * by[piece].x : weight;
        added[j][piece] += V_CODES ? weight * by[piece].y : 0.0f;
#pragma unroll
        for (int e = piece * V_WIDTH; e < (piece + 1) * V_WIDTH; e++) {
          sums[j][e] += of_piece * elements[e];
        }
      }
    }
  }

  // The next step's V, and the block after it.
  if (more) {
    if (!V_CODES) {
#pragma unroll
      for (int i = 0; i < KEYS; i++) {
        const int at = min(i, end - 1 - next_key);
        mlxpage::load<BLOCK_SIZE>(
            value_shares[i], v_blocks + next_head * V_HEAD, next_offset, at, lane);
      }
    }
    next_key = min(next_key + STRIDE, last_rows);
    next_block = table[next_key / BLOCK_SIZE];
  }
}

// Sums of the SIMD group's rows and lanes, then of the threadgroup's SIMD groups.
#pragma unroll
for (int mask = COPIES; mask < QUERY_LANES; mask *= 2) {
  total += simd_shuffle_xor(total, ushort(mask));
}
#pragma unroll
for (int mask = LANES; mask < 32; mask *= 2) {
  total += simd_shuffle_xor(total, ushort(mask));
}
threadgroup float group_largest[SIMD_GROUPS * PADDED_QUERIES];
threadgroup float group_total[SIMD_GROUPS * PADDED_QUERIES];
threadgroup float group_sums[SIMD_GROUPS * QUERIES * V_DIM];
if (key_group == 0 && lane % QUERY_LANES == 0) {
  group_largest[simd_group * PADDED_QUERIES + own_query] = largest;
  group_total[simd_group * PADDED_QUERIES + own_query] = total;
}
#pragma unroll
for (int i = 0; i < QUERIES; i++) {
#pragma unroll
  for (int j = 0; j < V_SHARE; j++) {
    float sum = sums[i][j] * mlxpage::unit<V_BITS>(j);
    sum = V_CODES ? sum + added[i][j / V_WIDTH] : sum;
#pragma unroll
    for (int mask = LANES; mask < 32; mask *= 2) {
      sum += simd_shuffle_xor(sum, ushort(mask));
    }
    if (key_group == 0) {
      const int element = (j / V_WIDTH * LANES + lane) * V_WIDTH + j % V_WIDTH;
      group_sums[(simd_group * QUERIES + i) * V_DIM + element] = sum;
    }
  }
}
threadgroup_barrier(mem_flags::mem_threadgroup);

for (int i = thread_index; i < min(QUERIES, num_queries) * V_DIM; i += THREADS) {
  const int query = i / V_DIM;
  const int element = i % V_DIM;
  const int head = kv_head * GROUP + (first_query + query) % GROUP;
  float all_largest = SINKS && !SPLIT ? float(sinks[head]) * mlxpage::LOG2_E : mlxpage::LOWEST;
  const float sink = all_largest;
  for (int g = 0; g < SIMD_GROUPS; g++) {
    all_largest = max(all_largest, group_largest[g * PADDED_QUERIES + query]);
  }
  float all_total = SINKS && !SPLIT ? fast::exp2(sink - all_largest) : 0.0f;
  float sum = 0.0f;
  for (int g = 0; g < SIMD_GROUPS; g++) {
    const float weight = fast::exp2(group_largest[g * PADDED_QUERIES + query] - all_largest);
    all_total += weight * group_total[g * PADDED_QUERIES + query];
    sum += weight * group_sums[(g * QUERIES + query) * V_DIM + element];
  }
  const int row = (first_query + query) / GROUP;
  const long at = long((SPLIT ? partial_start : row_start) + row) * HEADS + head;
  out[at * V_DIM + element] = Out(SPLIT ? sum : sum / all_total);
  if (element == 0) {
    stats[at * 2] = all_largest;
    stats[at * 2 + 1] = all_total;
  }
}
