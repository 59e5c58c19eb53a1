// Copies the K and V of sequences out of their blocks, in order, for MLX's own attention. Positions
// from a sequence's length on are zero: what its last block holds there may be anything.
//
// A thread copies WIDTH elements; a head of a position is K_DIM / WIDTH + V_DIM / WIDTH of them.
//
// in:  k_pool, v_pool, block_tables [sequences][width], lengths [sequences],
//      ints: width, positions of each sequence, sequences; fence
// out: k [sequences][KV_HEADS][positions][K_DIM], v [sequences][KV_HEADS][positions][V_DIM]

constexpr int K_PIECES = K_DIM / WIDTH;
constexpr int PIECES = K_PIECES + V_DIM / WIDTH;
constexpr int WORDS = WIDTH * int(sizeof(KV)) / 4;

const long index = long(thread_position_in_grid.x);
const int piece = int(index % PIECES);
const int position = int(index / PIECES % ints[1]);
const int head = int(index / PIECES / ints[1] % KV_HEADS);
const int sequence = int(index / PIECES / ints[1] / KV_HEADS);
if (sequence >= ints[2]) {
  return;
}
const bool exists = position < lengths[sequence];
const int column = exists ? position / BLOCK_SIZE : 0;
const long block = block_tables[long(sequence) * ints[0] + column];
const long from = (block * KV_HEADS + head) * BLOCK_SIZE + position % BLOCK_SIZE;
const long to = (long(sequence) * KV_HEADS + head) * ints[1] + position;
uint words[WORDS];
#pragma unroll
for (int i = 0; i < WORDS; i++) {
  words[i] = 0;
}
if (piece < K_PIECES) {
  if (exists) {
    mlxpage::load_words((const device uint*)(k_pool + from * K_DIM + piece * WIDTH), words);
  }
  mlxpage::store_words((device uint*)(k + to * K_DIM + piece * WIDTH), words);
} else {
  const int start = (piece - K_PIECES) * WIDTH;
  if (exists) {
    mlxpage::load_words((const device uint*)(v_pool + from * V_DIM + start), words);
  }
  mlxpage::store_words((device uint*)(v + to * V_DIM + start), words);
}
