// What the kernels share. Words that both Metal and cuda.h know; names of their own namespace.
//
// A pool is [num_blocks + 1][KV_HEADS][a block of a head], one of K and one of V for each layer. What
// a block holds of one head is a single run of memory: [BLOCK_SIZE][head_dim] elements of T, or, if it
// is quantised, words with [BLOCK_SIZE][head_dim] codes of BITS, then [BLOCK_SIZE][head_dim / GROUP]
// words of a group's scale (lower half) and bias. An element is its code times the scale plus the bias.

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

// -- the elements in a word, by the type of the pool and the bits of an element --

template <typename T>
struct Pair;

template <>
struct Pair<half> {
  static METAL_FUNC void unpack(uint word, thread float* to) {
    const half2 pair = as_type<half2>(word);
    to[0] = float(pair.x);
    to[1] = float(pair.y);
  }
};

template <>
struct Pair<bfloat16_t> {
  static METAL_FUNC void unpack(uint word, thread float* to) {
    to[0] = as_type<float>(word << 16);
    to[1] = as_type<float>(word & 0xffff0000u);
  }
};

template <typename T>
METAL_FUNC uint pack_pair(T low, T high) {
  return uint(as_type<ushort>(low)) | uint(as_type<ushort>(high)) << 16;
}

// The type of scales and biases.
template <typename T>
struct Side {
  typedef T type;
};

template <>
struct Side<float> {
  typedef half type;
};

// Codes: two at a time, as the lowest bits of two numbers of type half. They are subnormal, 2^-24 times
// the code, or 2^-20 times it where it lies 4 bits higher: see `unit`. So two codes take a mask and two
// conversions, and every second pair a shift.
template <typename T, int BITS>
struct Word {
  static METAL_FUNC void unpack(uint word, thread float* to) {
    constexpr uint LOWEST_CODES = ((1u << BITS) - 1u) * 0x10001u;
#pragma unroll
    for (int i = 0; i < 16 / BITS; i++) {
      float codes[2];
      Pair<half>::unpack((word >> i * BITS / 8 * 8) & (LOWEST_CODES << i * BITS % 8), codes);
      to[i] = codes[0];
      to[i + 16 / BITS] = codes[1];
    }
  }
};

// What the i-th code of a word has to be multiplied by, when it's unpacked.
template <int BITS>
METAL_FUNC float unit(int i) {
  return BITS < 16 ? float(1u << (24 - i * BITS % 8)) : 1.0f;
}

// The scale and the bias.
template <typename T>
METAL_FUNC float2 factors(uint side) {
  float scale_and_bias[2];
  Pair<typename Side<T>::type>::unpack(side, scale_and_bias);
  float2 v;
  v.x = scale_and_bias[0];
  v.y = scale_and_bias[1];
  return v;
}

template <>
struct Word<float, 32> {
  static METAL_FUNC void unpack(uint word, thread float* to) {
    to[0] = as_type<float>(word);
  }
};

template <typename T>
struct Word<T, 16> {
  static METAL_FUNC void unpack(uint word, thread float* to) {
    Pair<T>::unpack(word, to);
  }
};

// One lane's share of a row: WIDTH elements from each of PIECES runs of LANES * WIDTH elements, and
// the sides that belong to them.
template <typename T, int BITS, int GROUP, int PIECES, int WIDTH, int LANES>
struct Share {
  uint words[PIECES][WIDTH * BITS / 32];
  uint sides[PIECES];
};

// The row that is `next` behind the one at `offset` of a block of a head. If `next` is a constant, rows
// share their address.
template <int BLOCK_SIZE, typename T, int BITS, int GROUP, int PIECES, int WIDTH, int LANES>
METAL_FUNC void load(
    thread Share<T, BITS, GROUP, PIECES, WIDTH, LANES>& share,
    const device uint* head,
    uint offset,
    int next,
    uint lane) {
  constexpr int ROW = PIECES * LANES * WIDTH * BITS / 32;
  constexpr int SIDES = PIECES * LANES * WIDTH / GROUP;
#pragma unroll
  for (int piece = 0; piece < PIECES; piece++) {
    const uint part = piece * LANES + lane;
    const device uint* words = head + (offset * ROW + part * (WIDTH * BITS / 32));
    load_words(words + next * ROW, share.words[piece]);
    if (BITS < 16) {
      const device uint* sides = head + (offset * SIDES + part * WIDTH / GROUP);
      share.sides[piece] = sides[BLOCK_SIZE * ROW + next * SIDES];
    }
  }
}

template <typename T, int BITS, int GROUP, int PIECES, int WIDTH, int LANES>
METAL_FUNC void store(
    const thread Share<T, BITS, GROUP, PIECES, WIDTH, LANES>& share,
    device uint* head,
    int offset,
    int lane) {
  constexpr int ROW = PIECES * LANES * WIDTH * BITS / 32;
#pragma unroll
  for (int piece = 0; piece < PIECES; piece++) {
    const int part = piece * LANES + lane;
    store_words(head + offset * ROW + part * (WIDTH * BITS / 32), share.words[piece]);
  }
}

// Elements, or of codes what makes elements by the `unit` of each and the `factors` of each piece.
template <typename T, int BITS, int GROUP, int PIECES, int WIDTH, int LANES>
METAL_FUNC void unpack(
    const thread Share<T, BITS, GROUP, PIECES, WIDTH, LANES>& share, thread float* to) {
  constexpr int ELEMENTS = 32 / BITS;  // in a word
#pragma unroll
  for (int piece = 0; piece < PIECES; piece++) {
#pragma unroll
    for (int word = 0; word < WIDTH / ELEMENTS; word++) {
      Word<T, BITS>::unpack(share.words[piece][word], to + piece * WIDTH + word * ELEMENTS);
    }
  }
}

// Makes codes of a group, the nearest ones to its scale and bias as they are stored.
template <typename T, int BITS, int GROUP>
METAL_FUNC void quantise(const device T* group, device uint* codes, device uint* side) {
  typedef typename Side<T>::type S;
  constexpr float MOST = float((1u << BITS % 32) - 1u);
  float low = float(group[0]);
  float high = low;
  float broken = low * 0.0f;  // what isn't finite leaves none of the group finite
#pragma unroll 4
  for (int i = 1; i < GROUP; i++) {
    const float element = float(group[i]);
    low = min(low, element);
    high = max(high, element);
    broken += element * 0.0f;
  }
  const S bias = S(low + broken);
  const S scale = S(max((high - low) / MOST, 1e-7f));
  side[0] = pack_pair(scale, bias);
#pragma unroll 4
  for (int word = 0; word < GROUP * BITS / 32; word++) {
    uint packed = 0;
#pragma unroll
    for (int i = 0; i < 32 / BITS; i++) {
      const float code = (float(group[word * (32 / BITS) + i]) - float(bias)) / float(scale);
      packed |= uint(min(max(rint(code), 0.0f), MOST)) << (i * BITS);
    }
    codes[word] = packed;
  }
}

// -- pieces of a row, of WIDTH elements each --

// From a row [DIM] to `offset` of a block of a head. A piece of codes is a group.
template <int BITS, int GROUP, int BLOCK_SIZE, int DIM, int WIDTH, typename T>
METAL_FUNC void write_piece(const device T* row, device uint* head, int offset, int piece) {
  device uint* to = head + offset * (DIM * BITS / 32);
  if (BITS < 16) {
    device uint* sides = head + BLOCK_SIZE * (DIM * BITS / 32) + offset * (DIM / GROUP);
    quantise<T, BITS, GROUP>(row + piece * GROUP, to + piece * (GROUP * BITS / 32), sides + piece);
  } else {
    uint words[WIDTH * BITS / 32];
    load_words((const device uint*)(row + piece * WIDTH), words);
    store_words(to + piece * (WIDTH * BITS / 32), words);
  }
}

// From `offset` of a block of a head to a row [DIM]; zeros if there is no such position.
template <int BITS, int GROUP, int BLOCK_SIZE, int DIM, int WIDTH, typename T>
METAL_FUNC void read_piece(
    const device uint* head, bool exists, int offset, int piece, device T* row) {
  Share<T, BITS, GROUP, 1, WIDTH, DIM / WIDTH> share;
  if (exists) {
    load<BLOCK_SIZE>(share, head, offset, 0, piece);
  } else {
#pragma unroll
    for (int i = 0; i < WIDTH * BITS / 32; i++) {
      share.words[0][i] = 0;
    }
    share.sides[0] = 0;
  }
  if (BITS < 16) {
    float elements[WIDTH];
    unpack(share, elements);
    const float2 by = factors<T>(share.sides[0]);
#pragma unroll
    for (int i = 0; i < WIDTH; i++) {
      row[piece * WIDTH + i] = T(elements[i] * unit<BITS>(i) * by.x + by.y);
    }
  } else {
    store_words((device uint*)(row + piece * WIDTH), share.words[0]);
  }
}

} // namespace mlxpage
