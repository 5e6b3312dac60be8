// The shared memory of the attention kernel: a tile of queries, and two stages of keys.
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

}  // namespace hellm
