// Matrix products of bfloat16 numbers with float32 sums by AMX: one instruction multiplies tiles of 16 rows by 32 and of
// 32 by 16 columns. What is multiplied are tiles alone, so that depth and columns are multiples of kTileDepth.
//
// Factors lie as in fixed_point.h: left ones by rows, pairs (k, k + 1) of column c of right ones at [k / 2, c, 2].
#pragma once

#include "dispatch.h"
#include "simd.h"

namespace hellm::cpu::HELLM_ISA {

constexpr int64_t kTileDepth = 32;
constexpr int64_t kTileHeight = 16;

inline int64_t whole_tiles(int64_t size) { return (size + kTileDepth - 1) / kTileDepth * kTileDepth; }

#if defined(__AVX512F__) && defined(__x86_64__)
constexpr bool kHasTiles = true;

// The shapes of this thread's tiles: 0 to 3 are two by two of C, 4 and 5 of A, 6 and 7 of B. Written out, as the files are
// compiled for processors without the instructions too.
class TileShapes {
 public:
  TileShapes() { set(2 * kTileHeight); }
  ~TileShapes() { asm volatile("tilerelease"); }
  TileShapes(const TileShapes&) = delete;
  TileShapes& operator=(const TileShapes&) = delete;

  // For `rows` rows of A and C, up to 32.
  static void set(int64_t rows) {
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {};
    } shapes;
    const uint8_t top = uint8_t(rows < kTileHeight ? rows : kTileHeight);
    const uint8_t bottom = uint8_t(rows > kTileHeight ? rows - kTileHeight : 1);
    const uint8_t heights[8] = {top, top, bottom, bottom, top, bottom, kTileHeight, kTileHeight};
    std::memcpy(shapes.rows, heights, sizeof(heights));
    asm volatile("ldtilecfg %0" ::"m"(shapes));
  }
};

template <int kTile>
inline void load_tile(const void* p, int64_t row_bytes) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(p), "r"(row_bytes), "i"(kTile) : "memory");
}
template <int kTile>
inline void store_tile(void* p, int64_t row_bytes) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(p), "r"(row_bytes), "i"(kTile) : "memory");
}
template <int kTile>
inline void clear_tile() {
  asm volatile("tilezero %%tmm%c0" ::"i"(kTile));
}
template <int kSum, int kLeft, int kRight>
inline void add_tile() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kSum), "i"(kLeft), "i"(kRight));
}

// Two by two tiles of C, or the upper two.
template <bool kTall, bool kAccumulate>
inline void multiply_tiles(const BFloat16* a, int64_t a_row, const BFloat16* b, int64_t b_depth, float* c,
                           int64_t c_row, int64_t depth) {
  const int64_t a_bytes = a_row * int64_t(sizeof(*a)), b_bytes = 2 * b_depth * int64_t(sizeof(*b)),
                c_bytes = c_row * int64_t(sizeof(*c));
  float* const below = c + kTileHeight * c_row;
  if (kAccumulate) {
    load_tile<0>(c, c_bytes), load_tile<1>(c + kTileHeight, c_bytes);
    if (kTall) load_tile<2>(below, c_bytes), load_tile<3>(below + kTileHeight, c_bytes);
  } else {
    clear_tile<0>(), clear_tile<1>();
    if (kTall) clear_tile<2>(), clear_tile<3>();
  }
  for (int64_t k = 0; k < depth; k += kTileDepth, a += kTileDepth, b += kTileDepth * b_depth) {
    load_tile<6>(b, b_bytes);
    load_tile<4>(a, a_bytes);
    add_tile<0, 4, 6>();
    load_tile<7>(b + 2 * kTileHeight, b_bytes);
    add_tile<1, 4, 7>();
    if (!kTall) continue;
    load_tile<5>(a + kTileHeight * a_row, a_bytes);
    add_tile<2, 5, 6>();
    add_tile<3, 5, 7>();
  }
  store_tile<0>(c, c_bytes), store_tile<1>(c + kTileHeight, c_bytes);
  if (kTall) store_tile<2>(below, c_bytes), store_tile<3>(below + kTileHeight, c_bytes);
}

// C [rows, columns] (+)= A [rows, depth] B [depth, columns] within TileShapes. What is read and written next is fetched.
template <bool kAccumulate>
inline void tile_multiply(int64_t rows, int64_t columns, int64_t depth, const BFloat16* a, int64_t a_row,
                          const BFloat16* b, int64_t b_depth, float* c, int64_t c_row, Ahead<false> next_read = {},
                          Ahead<true> next_written = {}) {
  constexpr int64_t kStep = 2 * kTileHeight;
  const int64_t parts = (rows + kStep - 1) / kStep * (columns / kStep);
  const int64_t read = (next_read.lines() + parts - 1) / parts, written = (next_written.lines() + parts - 1) / parts;
  const auto multiply_part = [&](int64_t row, int64_t column) {
    next_read.fetch(read);
    next_written.fetch(written);
    const auto part = rows - row > kTileHeight ? multiply_tiles<true, kAccumulate> : multiply_tiles<false, kAccumulate>;
    part(a + row * a_row, a_row, b + 2 * column, b_depth, c + row * c_row + column, c_row, depth);
  };
  const int64_t whole = rows / kStep * kStep;
  // The longer of the factors is read once.
  if (rows > columns) {
    for (int64_t row = 0; row < whole; row += kStep) {
      for (int64_t column = 0; column < columns; column += kStep) multiply_part(row, column);
    }
  } else {
    for (int64_t column = 0; column < columns; column += kStep) {
      for (int64_t row = 0; row < whole; row += kStep) multiply_part(row, column);
    }
  }
  if (whole == rows) return;
  TileShapes::set(rows - whole);
  for (int64_t column = 0; column < columns; column += kStep) multiply_part(whole, column);
  TileShapes::set(kStep);
}
#else
constexpr bool kHasTiles = false;
class TileShapes;
template <bool kAccumulate, typename... Arguments>
void tile_multiply(Arguments...);
#endif

// A matrix as a right factor and, if by_rows, as a left one.
template <typename U>
struct TileFactor {
  U *pairs, *by_rows;
};

// A vector of columns from `column` on of a matrix [rows, columns], of which value(row) is called in order. Halfway cases
// are rounded away from zero; pairs are filled up with zeros to whole tiles.
template <typename Value>
inline void pack_tiles(int64_t rows, int64_t columns, int64_t column, TileFactor<BFloat16> to, Value value) {
  typedef uint16_t Half __attribute__((vector_size(kVectorBytes / 2), aligned(2), may_alias));
  typedef uint32_t Pairs __attribute__((vector_size(kVectorBytes), aligned(2), may_alias));
  const auto pack = [&](int64_t row) {
    const Word bits = reinterpret_cast<Word>(value(row)) + 0x8000;
    if (to.by_rows) {
      *reinterpret_cast<Half*>(to.by_rows + row * columns + column) = __builtin_convertvector(bits >> 16, Half);
    }
    return bits;
  };
  const int64_t size = whole_tiles(rows);
  for (int64_t row = 0; row < size; row += 2) {
    const Word first = row < rows ? pack(row) >> 16 : Word{};
    const Word second = row + 1 < rows ? pack(row + 1) & 0xffff0000u : Word{};
    *reinterpret_cast<Pairs*>(to.pairs + row * columns + 2 * column) = first | second;
  }
}

}  // namespace hellm::cpu::HELLM_ISA
