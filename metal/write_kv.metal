// Writes rows of K and V into their slots of the pool, in place: the pools are inputs whose const is
// cast away, because MLX gives kernels no output that is an input too. MLX doesn't see this write.
// What may not start before it takes `fence`; what must be over before it comes in as `after`.
//
// A thread copies WIDTH elements; a head of a row is K_DIM / WIDTH + V_DIM / WIDTH of them.
//
// in:  k [rows][KV_HEADS][K_DIM], v [rows][KV_HEADS][V_DIM], k_pool, v_pool,
//      slots [rows] block * BLOCK_SIZE + offset, ints: rows; after
// out: fence [8]

constexpr int K_PIECES = K_DIM / WIDTH;
constexpr int PIECES = K_PIECES + V_DIM / WIDTH;
constexpr int WORDS = WIDTH * int(sizeof(KV)) / 4;

const int index = int(thread_position_in_grid.x);
if (index < 8) {
  fence[index] = 1;
}
const int piece = index % PIECES;
const int head = index / PIECES % KV_HEADS;
const int row = index / PIECES / KV_HEADS;
if (row >= ints[0]) {
  return;
}
const int slot = slots[row];
const long from = long(row) * KV_HEADS + head;
const long to = (long(slot / BLOCK_SIZE) * KV_HEADS + head) * BLOCK_SIZE + slot % BLOCK_SIZE;
uint words[WORDS];
if (piece < K_PIECES) {
  mlxpage::load_words((const device uint*)(k + from * K_DIM + piece * WIDTH), words);
  mlxpage::store_words((device uint*)(k_pool + to * K_DIM + piece * WIDTH), words);
} else {
  const int start = (piece - K_PIECES) * WIDTH;
  mlxpage::load_words((const device uint*)(v + from * V_DIM + start), words);
  mlxpage::store_words((device uint*)(v_pool + to * V_DIM + start), words);
}
