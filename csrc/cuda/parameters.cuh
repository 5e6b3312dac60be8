// What each kernel gets, by value: read alike by nvcc, NVRTC and the host compiler that fills it in. No host headers.
#pragma once

namespace hellm {

using int64 = long long;

enum Storage : int { kStoreFloat32 = 0, kStoreFloat64 = 1, kStoreBFloat16 = 2, kStoreFloat16 = 3 };  // as DType

// out_r = factor * out_scale_r * sum_c value_rc in_scale_c x_c + own_r * self_r with
// own_r = diagonal ? -diagonal_r diagonal_scale_r factor out_scale_r : self_factor.
// Null factors are ones; without `self` there is no own term.
struct GatherParameters {
  const void* x;          // X [columns, dim]
  const int64* indptr;    // [rows + 1]
  const int* indices;     // [nnz]
  const void* values;     // A [nnz] or null
  const void* in_scale;   // A [columns] or null
  const void* out_scale;  // A [rows] or null
  const void* self;       // [rows, dim] or null
  const void* diagonal;   // A [rows] or null
  const void* diagonal_scale;  // A [rows] or null
  void* out;              // [rows, dim]
  void* partial;          // A [2 * chunks, dim], or null: no row has more than kHubEntries entries
  int64 rows, dim, num_entries;
  double factor, self_factor;
  int self_storage, out_storage;
  int lanes;              // threads that share a row: a power of two <= 32
};

constexpr int kGatherThreads = 256;
constexpr int kRowThreads = 128;    // kernels with a warp for each row
constexpr int kLongRow = 64;        // more entries: the whole block sums the row
constexpr int kHubChunk = 2048;     // entries
constexpr int kHubEntries = 4096;   // more entries: by chunks, over the whole grid; at least two chunks long

// The rows of a view on the unit sphere, as 16-bit operands of the tensor cores.
struct NormalizeParameters {
  const void* x[2];       // [rows, dim]: anchor, positive
  void* high;             // Half [2, rows, width], zero padded
  void* low;              // Half [2, rows, width] or null: what `high` rounds away
  float* inverse_norm;    // [2, rows]; 0 for a row that is all zero
  unsigned* weight_maximum;  // [1]; set to 0
  int64 rows, dim;
  int width, storage;
};

// out_q = sum_k exp2(<query_q, key_k> scale_k + bias_k - shift_q) key_k without the keys that have the id of the query.
// Work is dealt to the blocks in equal runs of (tile of queries, tile of keys). Where a tile of queries is cut, each
// piece goes to a slot of its block: 2 b if it starts inside the tile, 2 b + 1 if it starts with it.
struct AttentionParameters {
  const void *query_high, *query_low;  // Half [query_views, query_stride, width]; low or null
  const int64* query_rows;             // [queries] row of each query (also its id), or null: its number
  const void *key_high, *key_low;      // Half [key_views, keys, width]
  const int64* key_rows;               // [keys] id of each key, or null: its number
  const double* temperature;           // [1]
  const float *key_scale, *key_bias;   // [keys], without a running maximum only
  const unsigned* weight_maximum;      // bits of a float: its log2 is subtracted from every bias
  float* out[2];                       // [queries, width] of each view of the queries
  float *maximum, *sum;                // [queries], with a running maximum only
  float* slot_out;                     // [2 * blocks, kTileQueries, width]
  float *slot_maximum, *slot_sum;      // [2 * blocks, kTileQueries]
  int64 queries, query_stride, keys;
  int64 query_tiles, key_tiles;        // of a view
  int query_views, key_views, tile_queries;
};

// Tiles of the attention kernel for rows of kWidth halves; kParts is 2 where `low` takes part.
template <int kWidth, int kParts>
struct AttentionTile {
  static constexpr int kThreads = 128;
  static constexpr int kQueries = kWidth <= 128 && kParts == 1 ? 128 : 64;
  static constexpr int kKeys = kWidth <= 64 ? 64 : 32;
  static constexpr int kPitch = kWidth + 8;  // halves a row in shared memory: eight rows meet in no bank
  static constexpr int kSharedBytes = kParts * (kQueries + 2 * kKeys) * kPitch * 2 + 2 * kKeys * 3 * 4;
};

// One row of the loss, from what attention over its negatives left.
struct RowParameters {
  AttentionParameters attention;
  const void *anchor, *positive;  // [num_keys, dim]
  const float* inverse_norm;      // [2, num_keys]
  const float* row_grad;          // [rows] or null: loss only
  float *row_loss, *row_slope;    // [rows]
  float* weight;                  // [rows]: row_grad sigmoid
  void *key_high, *key_low;       // Half [rows, width]: the unit anchor, negated where the weight is negative
  float *key_scale, *key_bias;    // [rows]
  unsigned* weight_maximum;
  int64 num_keys, rows, dim;
  int storage, blocks;            // blocks: of the attention kernel
};

struct GradientParameters {
  AttentionParameters attention;  // of the second pass
  const void* x[2];               // [num_keys, dim]: anchor, positive
  void* grad[2];                  // [num_keys, dim]
  const float* inverse_norm;      // [2, num_keys]
  const float* row_out;           // [rows, width]: weight (mean key - positive)
  const float* weight;            // [rows]
  const int64* row_order;         // [rows] the rows of the loss by key, or null: row i belongs to key i
  const int64* row_begin;         // [num_keys + 1] where those of a key begin
  int64 num_keys, dim;
  int storage, blocks, intra_view_negatives;
};

// 2^15: brings weights <= 1 to the top of the range of 16-bit floats.
constexpr float kWeightShift = 15.0f;

}  // namespace hellm
