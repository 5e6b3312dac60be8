// What each kernel gets, by value: read alike by nvcc, NVRTC and the host compiler that fills it in. No host headers.
#pragma once

namespace hellm {

using int64 = long long;

enum Storage : int { kStoreFloat32 = 0, kStoreFloat64 = 1, kStoreBFloat16 = 2, kStoreFloat16 = 3 };  // as DType

// out_r = factor * out_scale_r * sum_c value_rc in_scale_c x_c + own_r * self_r with
// own_r = diagonal ? -diagonal_r diagonal_scale_r factor out_scale_r : self_factor.
// Null factors are ones; without `self` there is no own term. A pitch is the number of values from row to row.
struct Gather {
  const void* x;               // X [columns, dim]
  const int64* indptr;         // [rows + 1]
  const int* indices;          // [nnz]
  const int* row_order;        // [rows]: hubs, other long rows, short rows
  const int* hub_chunk_begin;  // [num_hubs + 1]
  const void* values;          // A [nnz] or null
  const void* in_scale;        // A [columns] or null
  const void* out_scale;       // A [rows] or null
  const void* self;            // [rows, dim] or null
  const void* diagonal;        // A [rows] or null
  const void* diagonal_scale;  // A [rows] or null
  void* out;                   // [rows, dim]
  void* partial;               // A [num_hub_chunks, dim]
  int64 rows, num_hubs, num_long, num_hub_chunks;
  int64 x_pitch, self_pitch, out_pitch;
  double factor, self_factor;
  int self_storage, out_storage;
};

// One or two independent gathers of one width in one launch.
struct GatherParameters {
  Gather side[2];
  int64 dim;
  int first_blocks;      // that serve side 0; the others serve side 1
  int shared_blocks[2];  // those of a side that come first and take long rows and chunks of hubs
  int lanes;             // threads that share a row: a power of two <= kMostLanes
};

constexpr int kGatherThreads = 256;
constexpr int kRowThreads = 128;  // kernels with a warp for each row
// Up to so many entries of a row are added one after another; more are kLongGroups sums of every kLongGroups-th entry,
// added one after another, and those of a hub likewise in each of its chunks, whose sums are then added in the same way.
// Nothing of this depends on the columns of a thread: the same bits come out of every width, pitch and alignment.
constexpr int kLongRow = 64;
constexpr int kLongGroups = 16;
constexpr int kMostLanes = kGatherThreads / kLongGroups;
constexpr int kHubEntries = 1024;  // more entries: by chunks, over the whole grid
constexpr int kHubChunk = 512;     // entries

// Some columns of every row, packed.
struct PackParameters {
  const void* x;  // X [rows, x_pitch]
  void* out;      // X [rows, dim]
  int64 rows, dim, x_pitch;
  int lanes;
};

// The rows of a view on the unit sphere, as 16-bit operands of the tensor cores.
struct NormalizeParameters {
  const void* x[2];          // [rows, dim]: anchor, positive
  void* high;                // Half [2, rows, width], zero padded
  void* low;                 // Half [2, rows, width] or null: what `high` rounds away
  float* inverse_norm;       // [2, rows]; 0 for a row that is all zero
  unsigned* weight_maximum;  // [1]; set to 0
  int64 rows, dim;
  int width, storage;
};

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

// One row of the loss, from what attention over its negatives left.
struct RowParameters {
  AttentionParameters attention;
  const void *anchor, *positive;  // [num_keys, dim]
  const float* inverse_norm;      // [2, num_keys]
  const float* row_grad;          // [rows] or null: loss only
  float *row_loss, *row_slope;    // [rows]
  float* weight;                  // [rows]: row_grad sigmoid
  float *key_scale, *key_bias;    // [rows]
  unsigned* weight_maximum;
  int64 num_keys, rows, dim;
  int storage, blocks;  // blocks: of the attention kernel
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

// Two tables of rows as 16-bit operands of the tensor cores: each over a power of two of its own, which brings its
// largest entry to the top of the range of halves, so that rows of a 2^18th of its size still have float32 accuracy.
struct TableParameters {
  const void* x[2];          // [rows, dim]: hidden, items
  void *high[2], *low[2];    // Half [rows, width], zero padded; low or null: x = size (high + low)
  float* warp_maximum;       // [2, kMaximumWarps] of the finite entries
  float* size;               // [2]
  double* temperature;       // [1]: what makes similarities of halves logits, 1 / (size_0 size_1)
  unsigned* weight_maximum;  // [1]; set to 0
  int64 rows[2], dim;
  int storage;
};

constexpr int kMaximumWarps = 1024;  // of each table, to fill the processors

// One row of the cross-entropy, from what attention over the other items left.
struct ItemRowParameters {
  AttentionParameters attention;
  const void *hidden, *items;                 // [rows, dim], [num_items, dim]
  const int64* target;                        // [rows]
  const float* bias;                          // [num_items] or null
  const float* row_grad;                      // [rows] or null: loss only
  float* row_loss;                            // [rows]
  void* grad_hidden;                          // [rows, dim] or null
  float* weight;                              // [rows]: row_grad (1 - share of the target); null without a second pass
  float *key_scale, *key_bias, *key_maximum;  // [rows]
  const float* size;                          // [2]
  unsigned* weight_maximum;
  int64 rows, dim;
  int storage, blocks;  // blocks: of the attention kernel
};

struct ItemGradientParameters {
  AttentionParameters attention;  // of the second pass
  const void* hidden;             // [rows, dim]
  void* grad_items;               // [num_items, dim]
  float* grad_bias;               // [num_items] or null
  const float* weight;            // [rows]
  const float* size;              // [2]
  const int64* row_order;         // [rows] the rows by target
  const int64* row_begin;         // [num_items + 1] where those of an item begin
  int64 num_items, dim;
  int storage, blocks;
};

// Nearest neighbours: rows on the unit sphere as halves for the products, and what is chosen from panels of these or, of
// narrow rows, from tile after tile.
struct KnnParameters {
  const void* x;         // [rows, dim]
  void* unit;            // Half [padded_rows, padded_dim]: NaN for a row that is all zero or padding
  double* inverse_norm;  // [rows]; 0 for a row that is all zero
  const float* panel;    // [panel_rows, padded_rows]: similarities of halves
  int64* index;          // [rows, k]
  float* similarity;     // [rows, k]
  int* crowded;          // [rows]: whether more candidates were near the k-th than there is room for
  float* kept_value;     // [blocks, kQueries, kKnnKept + kKeys] of the tiles that are looked through
  int* kept_index;
  int* chosen;      // [rows, kKnnKept]
  int* num_chosen;  // [rows]
  int64 rows, dim, padded_rows, padded_dim, first_row;
  float slack;  // similarities of halves of two rows are wrong by less than half of it
  int k, storage;
};

constexpr int kKnnThreads = 256;
constexpr int kMostNeighbours = 128;  // at most a neighbour for two threads
constexpr int kMostCandidates = 1024;
// Where tiles are looked through: candidates of a row that stay, neighbours at most, blocks as kAttentionBlocks.
constexpr int kKnnKept = 64;
constexpr int kMostScanned = 32;
constexpr int kScanBlocks = 3;

// 2^15: brings weights <= 1 to the top of the range of 16-bit floats.
constexpr float kWeightShift = 15.0f;

}  // namespace hellm
