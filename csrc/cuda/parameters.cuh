// What the kernels of several operators get, by value: read alike by nvcc, NVRTC and the host compiler that fills it in,
// as the parameters at the head of an operator's device code are. No host headers.
#pragma once

namespace hellm {

using int64 = long long;

enum Storage : int { kStoreFloat32 = 0, kStoreFloat64 = 1, kStoreBFloat16 = 2, kStoreFloat16 = 3 };  // as DType

constexpr int kRowThreads = 128;  // kernels with a warp for each row
constexpr int kLongRow = 64;      // entries of a row that are added one after another; more are added by groups

// How similarities become weights.
enum Weights : int {
  kRunning,        // below the running maximum of the query, over one temperature for all
  kRunningBiased,  // the same, after the bias of each key
  kByKey,          // with the scale and bias of each key, where no weight can be more than 1
  kByKeyBiased,    // kRunningBiased with the roles swapped, below the maximum that it found for each key, and with the
                   // bias of each query; sums of the weights are kept
};

// out_q = sum_k sign(scale_k) exp2(<query_q, key_k> |scale_k| + bias_k - shift_q) key_k without the keys that have the
// id of the query. Work is dealt to the blocks in equal runs of (tile of queries, tile of keys). Where a tile of
// queries is cut, the piece that starts it goes to the output, and each other one to the slot of its block.
struct AttentionParameters {
  const void *query_high, *query_low;  // Half [query_views, query_stride, width]; low or null
  const int64* query_rows;             // [queries] row of each query, or null: its number
  const int64* query_ids;              // [queries] or null: its number
  const void *key_high, *key_low;      // Half [key_views, keys, width], or [key_stride, width] with key_rows
  const int64* key_rows;               // [keys] row of each key, or null: its number
  const int64* key_ids;                // [keys] or null: its number
  const double* temperature;           // [1]
  const float* key_scale;              // [keys], without a running maximum only
  const float* key_bias;               // [keys]; with a running maximum natural and null for zeros, else in base 2
  const float* key_maximum;            // [keys], with kByKeyBiased only
  const float* query_bias;             // [queries] natural, or null: zeros
  const unsigned* weight_maximum;      // bits of a float: its log2 is subtracted from every bias
  float* out[2];                       // [queries, width] of each view of the queries
  float *maximum, *sum;                // [queries], where they are kept
  float* slot_out;                     // [blocks, kTileQueries, width]
  float *slot_maximum, *slot_sum;      // [blocks, kTileQueries]
  int64 queries, query_stride, keys, key_stride;
  int64 query_tiles, key_tiles;  // of a view
  int query_views, key_views, tile_queries;
};

// Tiles of the attention kernel for rows of kWidth halves; kParts is 2 where `low` takes part.
template <int kWidth, int kParts>
struct AttentionTile {
  static constexpr int kThreads = 128;
  static constexpr int kQueries = kWidth <= 128 && kParts == 1 ? 128 : 64;
  static constexpr int kKeys = kWidth <= 64 ? 64 : 32;
  static constexpr int kPitch = kWidth + 8;  // halves a row in shared memory: eight rows meet in no bank
  static constexpr int kSharedBytes = kParts * (kQueries + 2 * kKeys) * kPitch * 2 + 2 * kKeys * 4 * 4;
};

// Blocks of the attention kernel whose registers a processor holds: the kernel is compiled for so many.
constexpr int kAttentionBlocks = 2;

// 2^15: brings weights <= 1 to the top of the range of 16-bit floats.
constexpr float kWeightShift = 15.0f;

}  // namespace hellm
