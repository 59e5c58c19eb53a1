// Writes rows of K and V into their slots of the pool, in place: the pools are inputs whose const is
// cast away, because MLX gives kernels no output that is an input too. MLX doesn't see this write.
// What may not start before it takes `fence`; what must be over before it comes in as `after`.
//
// A thread copies K_WIDTH elements of a K or V_WIDTH of a V, or makes the codes of a group.
//
// in:  k [rows][KV_HEADS][K_DIM], v [rows][KV_HEADS][V_DIM], k_pool, v_pool,
//      slots [rows] block * BLOCK_SIZE + offset, ints: rows; after
// out: fence [8]

constexpr int K_PIECES = K_DIM / (K_BITS < 16 ? K_GROUP : K_WIDTH);
constexpr int PIECES = K_PIECES + V_DIM / (V_BITS < 16 ? V_GROUP : V_WIDTH);

const int index = int(thread_position_in_grid.x);
if (index < 8) {
  fence[index] = 1;
}
const int piece = index % PIECES;
const int kv_head = index / PIECES % KV_HEADS;
const int row = index / PIECES / KV_HEADS;
if (row >= ints[0]) {
  return;
}
const int slot = slots[row];
const long from = long(row) * KV_HEADS + kv_head;
const long to = long(slot / BLOCK_SIZE) * KV_HEADS + kv_head;
const int offset = slot % BLOCK_SIZE;
if (piece < K_PIECES) {
  device uint* head = (device uint*)k_pool + to * K_HEAD;
  mlxpage::write_piece<K_BITS, K_GROUP, BLOCK_SIZE, K_DIM, K_WIDTH>(
      k + from * K_DIM, head, offset, piece);
} else {
  device uint* head = (device uint*)v_pool + to * V_HEAD;
  mlxpage::write_piece<V_BITS, V_GROUP, BLOCK_SIZE, V_DIM, V_WIDTH>(
      v + from * V_DIM, head, offset, piece - K_PIECES);
}
