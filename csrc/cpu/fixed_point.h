// Matrix products of 16-bit fixed-point numbers with exact 32-bit sums: one instruction multiplies and adds twice as
// many of them as of float32, on every x86 processor.
//
// Two kinds of factors are enough for a loss over unit rows. Units are rows times kUnit. Weights, of any sign, are scaled
// so that the absolute ones of a sum add up to kWeight, or to less where one of them would be above kWeight / 2, more than
// 16 bits hold. Then no sum overflows, whatever its length: two units give at most kUnit^2 (Cauchy-Schwarz), weights and
// units kWeight kUnit; both are below 2^31, by 3% for the half units of 2,000 weights. Rounding costs half a unit: of a row
// of length kUnit, and of each weight of a sum of kWeight.
//
// An instruction takes its factors in pairs that are neighbours along the sum: the pair (k, k + 1) of row r of the left
// matrix lies at [r, k], the pair of column c of the right one at [k / 2, c, 2].
#pragma once

#include "dispatch.h"
#include "simd.h"

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace hellm::cpu::HELLM_ISA {

#if defined(__SSE2__)
constexpr bool kPairsAreFast = true;
#else
constexpr bool kPairsAreFast = false;
#endif

// Rows and vectors of a tile whose sums, with one row of factors and a temporary, fill the registers.
#if defined(__AVX512F__)
constexpr int kFixedRows = 6, kFixedVectors = 4;
#else
constexpr int kFixedRows = 3, kFixedVectors = 4;
#endif

constexpr float kUnit = 32000;
constexpr float kWeight = 65000;
constexpr float kLeastSum = 1e-30f;  // added to every sum, so that none divides by zero

typedef int32_t PairOf16 __attribute__((may_alias, aligned(2)));

inline Int load_pairs(const int16_t* p) {
  typedef int32_t Unaligned __attribute__((vector_size(kVectorBytes), aligned(2), may_alias));
  return *reinterpret_cast<const Unaligned*>(p);
}
inline void store_pairs(int16_t* p, Int v) {
  typedef int32_t Unaligned __attribute__((vector_size(kVectorBytes), aligned(2), may_alias));
  *reinterpret_cast<Unaligned*>(p) = v;
}

// Of each pair a0 b0 + a1 b1.
inline Int multiply_pairs(Int a, Int b) {
#if defined(__AVX512BW__)
  return reinterpret_cast<Int>(_mm512_madd_epi16(reinterpret_cast<__m512i>(a), reinterpret_cast<__m512i>(b)));
#elif defined(__AVX2__)
  return reinterpret_cast<Int>(_mm256_madd_epi16(reinterpret_cast<__m256i>(a), reinterpret_cast<__m256i>(b)));
#elif defined(__SSE2__)
  return reinterpret_cast<Int>(_mm_madd_epi16(reinterpret_cast<__m128i>(a), reinterpret_cast<__m128i>(b)));
#else
  return (a << 16 >> 16) * (b << 16 >> 16) + (a >> 16) * (b >> 16);
#endif
}

// sum + a0 b0 + a1 b1 of each pair. Written out, as the files are compiled for processors without the instruction too.
template <bool kFused>
inline Int add_pairs(Int sum, Int a, Int b) {
#if defined(__AVX512F__)
  if constexpr (kFused) {
    asm("vpdpwssd %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
    return sum;
  }
#elif defined(__AVX2__)
  if constexpr (kFused) {
    asm("%{vex%} vpdpwssd %2, %1, %0" : "+x"(sum) : "x"(a), "xm"(b));
    return sum;
  }
#endif
  return sum + multiply_pairs(a, b);
}

// x rounded to an integer, |x| < 2^15, in the low half of each lane; the high half is to be ignored.
inline Int to_fixed(Vector<float> x) { return reinterpret_cast<Int>(x + broadcast(12582912.0f)); }  // 1.5 * 2^23

inline Int pair(Int first, Int second) {
  return (first & 0xffff) | reinterpret_cast<Int>(reinterpret_cast<Word>(second) << 16);
}

// C[r, v] (+)= scale sum_k A[r, k] B[k, v], the scale of a row or of a column.
template <bool kFused, int kRows, int kColumns, bool kRowScale, bool kAccumulate>
inline __attribute__((always_inline)) void fixed_tile(const int16_t* __restrict a, int64_t a_row,
                                                      const int16_t* __restrict b, int64_t b_depth,
                                                      const float* __restrict scale, float* __restrict c, int64_t c_row,
                                                      int64_t depth) {
  constexpr int kWidth = kLanes<float>;
  Int sum[kRows][kColumns] = {};
  for (int64_t k = 0; k < depth; k += 2) {
    Int column[kColumns];
#pragma GCC unroll 8
    for (int v = 0; v < kColumns; ++v) column[v] = load_pairs(b + 2 * v * kWidth);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const Int value = *reinterpret_cast<const PairOf16*>(a + r * a_row + k) - Int{};
#pragma GCC unroll 8
      for (int v = 0; v < kColumns; ++v) sum[r][v] = add_pairs<kFused>(sum[r][v], value, column[v]);
    }
    b += 2 * b_depth;
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < kColumns; ++v) {
      float* const to = c + r * c_row + v * kWidth;
      const Vector<float> factor = kRowScale ? broadcast(scale[r]) : load(scale + v * kWidth);
      const Vector<float> value = __builtin_convertvector(sum[r][v], Vector<float>) * factor;
      store(to, kAccumulate ? load(to) + value : value);
    }
}

template <bool kFused, int kRows, int kColumns, bool kRowScale, bool kAccumulate>
inline void fixed_tile_of(int rows, int vectors, const int16_t* a, int64_t a_row, const int16_t* b, int64_t b_depth,
                          const float* scale, float* c, int64_t c_row, int64_t depth) {
  if constexpr (kRows > 1) {
    if (rows < kRows) {
      return fixed_tile_of<kFused, kRows - 1, kColumns, kRowScale, kAccumulate>(rows, vectors, a, a_row, b, b_depth,
                                                                                scale, c, c_row, depth);
    }
  }
  if constexpr (kColumns > 1) {
    if (vectors < kColumns) {
      return fixed_tile_of<kFused, kRows, kColumns - 1, kRowScale, kAccumulate>(rows, vectors, a, a_row, b, b_depth,
                                                                                scale, c, c_row, depth);
    }
  }
  fixed_tile<kFused, kRows, kColumns, kRowScale, kAccumulate>(a, a_row, b, b_depth, scale, c, c_row, depth);
}

template <bool kFused, bool kRowScale, bool kAccumulate>
inline void fixed_panels(int64_t rows, int64_t columns, int64_t depth, const int16_t* a, int64_t a_row,
                         const int16_t* b, int64_t b_depth, const float* scale, float* c, int64_t c_row,
                         Ahead<false> next_read, Ahead<true> next_written) {
  constexpr int kWidth = kLanes<float>;
  const int64_t panel = kFixedVectors * kWidth;
  const int64_t tiles = (rows + kFixedRows - 1) / kFixedRows * ((columns + panel - 1) / panel);
  const int64_t read = (next_read.lines() + tiles - 1) / tiles, written = (next_written.lines() + tiles - 1) / tiles;
  for (int64_t column = 0; column < columns; column += kFixedVectors * kWidth) {
    const int64_t vectors = (columns - column) / kWidth;
    const int wide = int(vectors < kFixedVectors ? vectors : kFixedVectors);
    for (int64_t row = 0; row < rows; row += kFixedRows) {
      const int height = int(rows - row < kFixedRows ? rows - row : kFixedRows);
      next_read.fetch(read);
      next_written.fetch(written);
      fixed_tile_of<kFused, kFixedRows, kFixedVectors, kRowScale, kAccumulate>(
          height, wide, a + row * a_row, a_row, b + 2 * column, b_depth, scale + (kRowScale ? row : column),
          c + row * c_row + column, c_row, depth);
    }
  }
}

// C [rows, columns] (+)= A [rows, depth] B [depth, columns] with scale [rows] or [columns]; columns is a multiple of the
// vector width, an odd depth is followed by a zero in one of the factors. What is read and written next is fetched.
template <bool kRowScale, bool kAccumulate>
inline void fixed_multiply(int64_t rows, int64_t columns, int64_t depth, const int16_t* a, int64_t a_row,
                           const int16_t* b, int64_t b_depth, const float* scale, float* c, int64_t c_row,
                           Ahead<false> next_read = {}, Ahead<true> next_written = {}) {
  const auto panels = fused_pairs(kVectorBytes) ? fixed_panels<true, kRowScale, kAccumulate>
                                                : fixed_panels<false, kRowScale, kAccumulate>;
  panels(rows, columns, depth, a, a_row, b, b_depth, scale, c, c_row, next_read, next_written);
}

// unit [stride] = kUnit x [dim] / |x|, zero padded; false for a row that is all zero.
template <typename S>
inline bool normalize_row(const S* x, int64_t dim, int64_t stride, int16_t* unit) {
  const double norm = length(x, dim).norm, scale = norm > 0 ? double(kUnit) / norm : 0.0;
  for (int64_t k = 0; k < dim; ++k) unit[k] = int16_t(__builtin_lrint(double(to_float(x[k])) * scale));
  for (int64_t k = dim; k < stride; ++k) unit[k] = 0;
  return norm > 0;
}

inline Vector<float> absolute(Vector<float> x) {
  return reinterpret_cast<Vector<float>>(reinterpret_cast<Int>(x) & 0x7fffffff);
}

// Sums and largest ones of absolute weights, and what kWeight stands for beside them.
struct Total {
  Vector<float> sum, largest;
  void add(Vector<float> absolute) {
    sum += absolute;
    largest = absolute > largest ? absolute : largest;
  }
  Vector<float> whole() const {
    const Vector<float> twice = largest + largest;
    return (sum > twice ? sum : twice) + kLeastSum;
  }
};

// Right factor with the rows as depth: pairs [rows / 2, columns, 2] of x [rows, columns], column c times kWeight over
// the whole of its sums and largest [columns]; scale [columns] undoes it and kUnit.
inline void pack_weights(const float* x, int64_t rows, int64_t columns, const float* sums, const float* largest,
                         int16_t* pairs, float* scale) {
  for (int64_t column = 0; column < columns; column += kLanes<float>) {
    const Vector<float> whole = Total{load(sums + column), load(largest + column)}.whole();
    store(scale + column, whole * broadcast(1 / (kWeight * kUnit)));
    const Vector<float> factor = broadcast(kWeight) / whole;
    for (int64_t row = 0; row < rows; row += 2) {
      const float* from = x + row * columns + column;
      const Vector<float> second = row + 1 < rows ? load(from + columns) : Vector<float>{};
      store_pairs(pairs + row * columns + 2 * column, pair(to_fixed(load(from) * factor), to_fixed(second * factor)));
    }
  }
}

typedef int16_t Shorts __attribute__((vector_size(kVectorBytes / 2)));
typedef int16_t UnalignedShorts __attribute__((vector_size(kVectorBytes / 2), aligned(2), may_alias));

// One row of a left factor: packed [columns] of x [columns] times kWeight over the whole of its total, here by lanes.
// Returns the scale that undoes it and kUnit.
inline float pack_weight_row(const float* x, int64_t columns, const Total& total, int16_t* packed) {
  const float sum = join_lanes(total.sum, [](auto a, auto b) { return a + b; });
  const float largest = join_lanes(total.largest, [](auto a, auto b) { return a > b ? a : b; });
  const float whole = (sum > 2 * largest ? sum : 2 * largest) + kLeastSum;
  const Vector<float> factor = broadcast(kWeight / whole);
  for (int64_t column = 0; column < columns; column += kLanes<float>) {
    *reinterpret_cast<UnalignedShorts*>(packed + column) =
        __builtin_convertvector(to_fixed(load(x + column) * factor), Shorts);
  }
  return whole / (kWeight * kUnit);
}

// Left factor with the columns as depth: packed [rows, columns] of x [rows, columns], with scale [rows].
inline void pack_weight_rows(const float* x, int64_t rows, int64_t columns, int16_t* packed, float* scale) {
  for (int64_t row = 0; row < rows; ++row, x += columns, packed += columns) {
    Total total = {};
    for (int64_t column = 0; column < columns; column += kLanes<float>) total.add(absolute(load(x + column)));
    scale[row] = pack_weight_row(x, columns, total, packed);
  }
}

// The same of a right factor: x is pairs [rows / 2, columns, 2] times factor [columns]. row [2, columns] is scratch.
inline void repack_weight_rows(const int16_t* pairs, int64_t rows, int64_t columns, const float* factor, float* row,
                               int16_t* packed, float* scale) {
  for (int64_t r = 0; r < rows; r += 2, pairs += 2 * columns, packed += 2 * columns) {
    Total total[2] = {};
    for (int64_t column = 0; column < columns; column += kLanes<float>) {
      const Int both = load_pairs(pairs + 2 * column), parts[2] = {both << 16 >> 16, both >> 16};
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half) {
        const Vector<float> value = __builtin_convertvector(parts[half], Vector<float>) * load(factor + column);
        total[half].add(absolute(value));
        store(row + half * columns + column, value);
      }
    }
    for (int half = 0; half < 2 && r + half < rows; ++half) {
      scale[r + half] = pack_weight_row(row + half * columns, columns, total[half], packed + half * columns);
    }
  }
}

// to [columns, rows] (+)= from [rows, columns] transposed; both are multiples of 4.
template <bool kAccumulate>
inline void transpose(const float* from, int64_t rows, int64_t columns, float* to) {
  for (int64_t row = 0; row < rows; row += 4) {
    for (int64_t column = 0; column < columns; column += 4) {
      const float* const corner = from + row * columns + column;
      float* const out = to + column * rows + row;
#if defined(__SSE2__)
      __m128 line[4];
      for (int k = 0; k < 4; ++k) line[k] = _mm_loadu_ps(corner + k * columns);
      _MM_TRANSPOSE4_PS(line[0], line[1], line[2], line[3]);
      for (int k = 0; k < 4; ++k) {
        float* const place = out + k * rows;
        _mm_storeu_ps(place, kAccumulate ? _mm_add_ps(_mm_loadu_ps(place), line[k]) : line[k]);
      }
#else
      for (int k = 0; k < 4; ++k) {
        for (int j = 0; j < 4; ++j) {
          const float value = corner[j * columns + k];
          out[k * rows + j] = kAccumulate ? out[k * rows + j] + value : value;
        }
      }
#endif
    }
  }
}

}  // namespace hellm::cpu::HELLM_ISA
