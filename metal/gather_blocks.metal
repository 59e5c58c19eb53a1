// Copies the K and V of sequences out of their blocks, in order, for MLX's own attention. Positions
// from a sequence's length on are zero: what its last block holds there may be anything.
//
// A thread takes K_WIDTH elements of a K or V_WIDTH of a V.
//
// in:  k_pool, v_pool, block_tables [sequences][width], lengths [sequences],
//      ints: width, positions of each sequence, sequences; fence
// out: k [sequences][KV_HEADS][positions][K_DIM], v [sequences][KV_HEADS][positions][V_DIM]

constexpr int K_PIECES = K_DIM / K_WIDTH;
constexpr int PIECES = K_PIECES + V_DIM / V_WIDTH;

const long index = long(thread_position_in_grid.x);
const int piece = int(index % PIECES);
const int position = int(index / PIECES % ints[1]);
const int kv_head = int(index / PIECES / ints[1] % KV_HEADS);
const int sequence = int(index / PIECES / ints[1] / KV_HEADS);
if (sequence >= ints[2]) {
  return;
}
const bool exists = position < lengths[sequence];
const int column = exists ? position / BLOCK_SIZE : 0;
const int offset = position % BLOCK_SIZE;
const long block = block_tables[long(sequence) * ints[0] + column];
const long from = block * KV_HEADS + kv_head;
const long to = (long(sequence) * KV_HEADS + kv_head) * ints[1] + position;
if (piece < K_PIECES) {
  const device uint* head = (const device uint*)k_pool + from * K_HEAD;
  mlxpage::read_piece<K_BITS, K_GROUP, BLOCK_SIZE, K_DIM, K_WIDTH>(
      head, exists, offset, piece, k + to * K_DIM);
} else {
  const device uint* head = (const device uint*)v_pool + from * V_HEAD;
  mlxpage::read_piece<V_BITS, V_GROUP, BLOCK_SIZE, V_DIM, V_WIDTH>(
      head, exists, offset, piece - K_PIECES, v + to * V_DIM);
}
