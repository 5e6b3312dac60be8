// What of the attention kernel touches shared memory, a tile of queries and two stages of keys: copies, and the products
// of tensor cores.
#pragma once

#include "common.cuh"

namespace hellm {

template <int kWidth, int kParts>
struct AttentionShared {
  using Tile = AttentionTile<kWidth, kParts>;
  static constexpr int kQueryPart = Tile::kQueries * Tile::kPitch, kKeyPart = Tile::kKeys * Tile::kPitch;
  unsigned char* memory;
  __device__ __forceinline__ Half* query(int part) const { return reinterpret_cast<Half*>(memory) + part * kQueryPart; }
  __device__ __forceinline__ Half* key(int stage, int part) const {
    return reinterpret_cast<Half*>(memory) + kParts * kQueryPart + (stage * kParts + part) * kKeyPart;
  }
  // [kKeys] scale, then bias, then maximum, then id of a stage
  __device__ __forceinline__ float* scale(int stage) const {
    return reinterpret_cast<float*>(key(2, 0)) + stage * 4 * Tile::kKeys;
  }
  __device__ __forceinline__ float* bias(int stage) const { return scale(stage) + Tile::kKeys; }
  __device__ __forceinline__ float* maximum(int stage) const { return scale(stage) + 2 * Tile::kKeys; }
  __device__ __forceinline__ int* id(int stage) const { return reinterpret_cast<int*>(scale(stage) + 3 * Tile::kKeys); }
};

// Copies rows of halves to shared memory in the background; row(i) is the source row or -1 for zeros.
template <int kWidth, int kRows, int kThreads, typename Row>
__device__ __forceinline__ void copy_rows(Half* to, const void* from, Row row) {
  constexpr int kPieces = kWidth / 8;
  for (int i = threadIdx.x; i < kRows * kPieces; i += kThreads) {
    const int64 source = row(i / kPieces);
    const Half* const piece = static_cast<const Half*>(from) + (source < 0 ? 0 : source) * kWidth + i % kPieces * 8;
    ptx::copy_16(to + i / kPieces * (kWidth + 8) + i % kPieces * 8, piece, source >= 0);
  }
}

// Of one tile of queries; every warp has kQueries / 4 of them to itself.
template <int kWidth, int kParts, bool kOutput, Weights kWeights>
struct AttentionProducts {
  static constexpr bool kMaximum = kWeights == kRunning || kWeights == kRunningBiased;
  // Queries and keys were keys and queries before, and the same bits must come out.
  static constexpr bool kSwapped = kWeights == kByKeyBiased;
  using Tile = AttentionTile<kWidth, kParts>;
  static constexpr int kBands = Tile::kQueries / 64;  // of 16 queries a warp
  static constexpr int kKeyBands = Tile::kKeys / 8, kColumnBands = kWidth / 8, kDepth = kWidth / 16;
  static constexpr bool kHoldQueries = kWidth <= 64 && kParts == 1;

  const AttentionShared<kWidth, kParts> shared{ptx::dynamic_shared()};
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  float out[kBands][kOutput ? kColumnBands : 1][4];
  unsigned held[kHoldQueries ? kBands : 1][kHoldQueries ? kDepth : 1][4];

  // Rows of a band as the left operand: 16 queries, 16 columns.
  __device__ __forceinline__ void query_operand(unsigned (&a)[4], int band, int part, int depth) {
    const int row = (warp * kBands + band) * 16 + lane % 16;
    ptx::load_matrices(a, shared.query(part) + row * Tile::kPitch + depth * 16 + lane / 16 * 8);
  }

  __device__ __forceinline__ void hold_queries() {
    if constexpr (kHoldQueries) {
#pragma unroll
      for (int b = 0; b < kBands; ++b) {
#pragma unroll
        for (int k = 0; k < kDepth; ++k) query_operand(held[b][k], b, 0, k);
      }
    }
  }

  __device__ __forceinline__ void similarities(int stage, float (&s)[kBands][kKeyBands][4]) {
#pragma unroll
    for (int b = 0; b < kBands; ++b) {
#pragma unroll
      for (int j = 0; j < kKeyBands; ++j) {
#pragma unroll
        for (int i = 0; i < 4; ++i) s[b][j][i] = 0;
      }
    }
    const int key_row = lane % 8 + lane / 16 * 8, key_column = lane / 8 % 2 * 8;
#pragma unroll
    for (int k = 0; k < kDepth; ++k) {
      unsigned a[kParts][kBands][4];
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
#pragma unroll
        for (int b = 0; b < kBands; ++b) {
          if constexpr (!kHoldQueries) query_operand(a[part][b], b, part, k);
        }
      }
#pragma unroll
      for (int j = 0; j < kKeyBands; j += 2) {
        unsigned keys[kParts][4];
#pragma unroll
        for (int part = 0; part < kParts; ++part) {
          ptx::load_matrices(keys[part],
                             shared.key(stage, part) + (j * 8 + key_row) * Tile::kPitch + k * 16 + key_column);
        }
#pragma unroll
        for (int b = 0; b < kBands; ++b) {
          if constexpr (kHoldQueries) {
            ptx::multiply_16x8x16(s[b][j], held[b][k], keys[0][0], keys[0][1]);
            ptx::multiply_16x8x16(s[b][j + 1], held[b][k], keys[0][2], keys[0][3]);
          } else {
            // The small products first: low x high, high x low, high x high.
#pragma unroll
            for (int pair = kParts == 2 ? 2 : 0; pair >= 0; --pair) {
              const int left = pair == (kSwapped ? 1 : 2) ? 1 : 0, right = pair == (kSwapped ? 2 : 1) ? 1 : 0;
              ptx::multiply_16x8x16(s[b][j], a[left][b], keys[right][0], keys[right][1]);
              ptx::multiply_16x8x16(s[b][j + 1], a[left][b], keys[right][2], keys[right][3]);
            }
          }
        }
      }
    }
  }

  // Signs of the weights of two keys, as bits of a pair of halves.
  __device__ __forceinline__ unsigned key_signs(int stage, int band) const {
    const Vector<float, 2> scale = Vector<float, 2>::load(shared.scale(stage) + band * 8 + lane % 4 * 2);
    return (__float_as_uint(scale[0]) >> 16 & 0x8000) | (__float_as_uint(scale[1]) & 0x80000000);
  }

  __device__ __forceinline__ void add_values(int stage, const float (&s)[kBands][kKeyBands][4]) {
    unsigned weight[kParts][kBands][kKeyBands / 2][4];
#pragma unroll
    for (int b = 0; b < kBands; ++b) {
#pragma unroll
      for (int j = 0; j < kKeyBands; ++j) {
        const unsigned signs = kMaximum ? 0 : key_signs(stage, j);
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const float first = s[b][j][2 * h], second = s[b][j][2 * h + 1];
          const unsigned high = ptx::pack_halves(first, second);
          weight[0][b][j / 2][j % 2 * 2 + h] = high ^ signs;
          if constexpr (kParts == 2) {
            const float first_rest = first - ptx::from_half((unsigned short)(high & 0xffff));
            const float second_rest = second - ptx::from_half((unsigned short)(high >> 16));
            weight[1][b][j / 2][j % 2 * 2 + h] = ptx::pack_halves(first_rest, second_rest) ^ signs;
          }
        }
      }
    }
#pragma unroll
    for (int c = 0; c < kColumnBands; c += 2) {
      // Tensor cores truncate when they add, which over all keys would be 1e-4 of the sum: a tile is summed by itself.
      float fresh[kBands][2][4] = {};
#pragma unroll
      for (int k = 0; k < kKeyBands / 2; ++k) {
        unsigned value[kParts][4];
#pragma unroll
        for (int part = 0; part < kParts; ++part) {
          const int row = k * 16 + lane % 16;
          ptx::load_matrices_transposed(value[part],
                                        shared.key(stage, part) + row * Tile::kPitch + c * 8 + lane / 16 * 8);
        }
#pragma unroll
        for (int b = 0; b < kBands; ++b) {
#pragma unroll
          for (int pair = kParts == 2 ? 2 : 0; pair >= 0; --pair) {
            const int left = pair == 2 ? 1 : 0, right = pair == 1 ? 1 : 0;
#pragma unroll
            for (int n = 0; n < 2; ++n) {
              ptx::multiply_16x8x16(fresh[b][n], weight[left][b][k], value[right][2 * n], value[right][2 * n + 1]);
            }
          }
        }
      }
#pragma unroll
      for (int b = 0; b < kBands; ++b) {
#pragma unroll
        for (int n = 0; n < 2; ++n) {
#pragma unroll
          for (int i = 0; i < 4; ++i) out[b][c + n][i] += fresh[b][n][i];
        }
      }
    }
  }
};

}  // namespace hellm
