// Copies whole blocks into the pools, in place (see write_kv): from other arrays of such blocks, or
// from the pools themselves, where no block may be a source and a target then. No block may be a
// target twice.
//
// in:  k_from, v_from, k_pool, v_pool, pairs [copies][2] source and target block, ints: copies; after
// out: fence [8]

constexpr int WORDS = 4;  // of a thread
constexpr int K_PIECES = KV_HEADS * K_HEAD / WORDS;
constexpr int V_PIECES = KV_HEADS * V_HEAD / WORDS;

const long index = long(thread_position_in_grid.x);
if (index < 8) {
  fence[index] = 1;
}
const int piece = int(index % (K_PIECES + V_PIECES));
const int copy = int(index / (K_PIECES + V_PIECES));
if (copy >= ints[0]) {
  return;
}
const long source = pairs[copy * 2];
const long target = pairs[copy * 2 + 1];
uint words[WORDS];
if (piece < K_PIECES) {
  const long from = source * K_PIECES + piece;
  const long to = target * K_PIECES + piece;
  mlxpage::load_words((const device uint*)k_from + from * WORDS, words);
  mlxpage::store_words((device uint*)k_pool + to * WORDS, words);
} else {
  const long from = source * V_PIECES + piece - K_PIECES;
  const long to = target * V_PIECES + piece - K_PIECES;
  mlxpage::load_words((const device uint*)v_from + from * WORDS, words);
  mlxpage::store_words((device uint*)v_pool + to * WORDS, words);
}
