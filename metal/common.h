// What the kernels share. Words that both Metal and cuda.h know; names of their own namespace.
//
// A pool is [num_blocks + 1][KV_HEADS][BLOCK_SIZE][head_dim], one of K and one of V for each layer:
// the positions that a block holds of one head are a single run of memory.

namespace mlxpage {

// Below every score, and finite: the difference of two of them is no NaN.
constexpr constant float LOWEST = -1e30f;
constexpr constant float LOG2_E = 1.44269504088896341f;

// -- vectors: 4, 8 or 16 bytes in one load, kept packed until they are used --

// For what a kernel reads once; cuda.h has another.
#ifndef LOAD_ONCE
#define LOAD_ONCE(from) (*(from))
#endif

METAL_FUNC void load_words(const device uint* from, thread uint (&words)[1]) {
  words[0] = from[0];
}

METAL_FUNC void load_words(const device uint* from, thread uint (&words)[2]) {
  const uint2 v = LOAD_ONCE((const device uint2*)from);
  words[0] = v.x;
  words[1] = v.y;
}

METAL_FUNC void load_words(const device uint* from, thread uint (&words)[4]) {
  const uint4 v = LOAD_ONCE((const device uint4*)from);
  words[0] = v.x;
  words[1] = v.y;
  words[2] = v.z;
  words[3] = v.w;
}

METAL_FUNC void store_words(device uint* to, const thread uint (&words)[1]) {
  to[0] = words[0];
}

METAL_FUNC void store_words(device uint* to, const thread uint (&words)[2]) {
  uint2 v;
  v.x = words[0];
  v.y = words[1];
  *(device uint2*)to = v;
}

METAL_FUNC void store_words(device uint* to, const thread uint (&words)[4]) {
  uint4 v;
  v.x = words[0];
  v.y = words[1];
  v.z = words[2];
  v.w = words[3];
  *(device uint4*)to = v;
}

// -- the elements in a word, by the type of the pool --

template <typename T>
struct Word;

template <>
struct Word<float> {
  static METAL_FUNC void unpack(uint word, thread float* to) {
    to[0] = as_type<float>(word);
  }
};

template <>
struct Word<half> {
  static METAL_FUNC void unpack(uint word, thread float* to) {
    const half2 pair = as_type<half2>(word);
    to[0] = float(pair.x);
    to[1] = float(pair.y);
  }
};

template <>
struct Word<bfloat16_t> {
  static METAL_FUNC void unpack(uint word, thread float* to) {
    to[0] = as_type<float>(word << 16);
    to[1] = as_type<float>(word & 0xffff0000u);
  }
};

// One lane's share of a row: WIDTH elements from each of PIECES runs of LANES * WIDTH elements.
template <typename T, int PIECES, int WIDTH, int LANES>
struct Share {
  uint words[PIECES][WIDTH * sizeof(T) / 4];
};

template <typename T, int PIECES, int WIDTH, int LANES>
METAL_FUNC void load(thread Share<T, PIECES, WIDTH, LANES>& share, const device T* row, int lane) {
#pragma unroll
  for (int piece = 0; piece < PIECES; piece++) {
    load_words((const device uint*)(row + (piece * LANES + lane) * WIDTH), share.words[piece]);
  }
}

template <typename T, int PIECES, int WIDTH, int LANES>
METAL_FUNC void store(
    const thread Share<T, PIECES, WIDTH, LANES>& share, device T* row, int lane) {
#pragma unroll
  for (int piece = 0; piece < PIECES; piece++) {
    store_words((device uint*)(row + (piece * LANES + lane) * WIDTH), share.words[piece]);
  }
}

template <typename T, int PIECES, int WIDTH, int LANES>
METAL_FUNC void unpack(const thread Share<T, PIECES, WIDTH, LANES>& share, thread float* to) {
  constexpr int ELEMENTS = 4 / int(sizeof(T));  // in a word
#pragma unroll
  for (int piece = 0; piece < PIECES; piece++) {
#pragma unroll
    for (int word = 0; word < WIDTH / ELEMENTS; word++) {
      Word<T>::unpack(share.words[piece][word], to + piece * WIDTH + word * ELEMENTS);
    }
  }
}

} // namespace mlxpage
