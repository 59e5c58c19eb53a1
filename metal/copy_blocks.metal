// Copies whole blocks within the pools, in place (see write_kv). No block may be a source and a
// target, or twice a target.
//
// in:  k_pool, v_pool, pairs [copies][2] source and target block, ints: copies; after
// out: fence [8]

constexpr int K_PIECES = KV_HEADS * BLOCK_SIZE * K_DIM / WIDTH;
constexpr int PIECES = K_PIECES + KV_HEADS * BLOCK_SIZE * V_DIM / WIDTH;
constexpr int WORDS = WIDTH * int(sizeof(KV)) / 4;

const long index = long(thread_position_in_grid.x);
if (index < 8) {
  fence[index] = 1;
}
const int piece = int(index % PIECES);
const int copy = int(index / PIECES);
if (copy >= ints[0]) {
  return;
}
const long source = pairs[copy * 2];
const long target = pairs[copy * 2 + 1];
uint words[WORDS];
if (piece < K_PIECES) {
  const long start = long(piece) * WIDTH;
  const long size = long(K_PIECES) * WIDTH;
  mlxpage::load_words((const device uint*)(k_pool + source * size + start), words);
  mlxpage::store_words((device uint*)(k_pool + target * size + start), words);
} else {
  const long start = long(piece - K_PIECES) * WIDTH;
  const long size = long(PIECES - K_PIECES) * WIDTH;
  mlxpage::load_words((const device uint*)(v_pool + source * size + start), words);
  mlxpage::store_words((device uint*)(v_pool + target * size + start), words);
}
