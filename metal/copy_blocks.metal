// Copies whole blocks within the pools, in place (see write_kv). No block may be a source and a
// target, or twice a target.
//
// in:  k_pool, v_pool, pairs [copies][2] source and target block, ints: copies; after
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
  device uint* blocks = (device uint*)k_pool;
  mlxpage::load_words(blocks + (source * K_PIECES + piece) * WORDS, words);
  mlxpage::store_words(blocks + (target * K_PIECES + piece) * WORDS, words);
} else {
  device uint* blocks = (device uint*)v_pool;
  mlxpage::load_words(blocks + (source * V_PIECES + piece - K_PIECES) * WORDS, words);
  mlxpage::store_words(blocks + (target * V_PIECES + piece - K_PIECES) * WORDS, words);
}
