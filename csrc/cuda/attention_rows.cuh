// Rows before and after attention: loads, halves, and the pieces in which the attention kernel left them.
// A warp has one row; lane l its columns l, l + 32, ...
#pragma once

#include "attention.cuh"

namespace hellm {

// Columns of a row, zero beyond dim.
template <int kColumns>
__device__ __forceinline__ void load_row(const void* x, int storage, int64 row, int64 dim, float factor,
                                         float (&value)[kColumns]) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int i = 0; i < kColumns; ++i) {
    value[i] = lane + 32 * i < dim ? load_one(x, storage, row * dim + lane + 32 * i) * factor : 0.0f;
  }
}

template <int kColumns>
__device__ __forceinline__ float dot(const float (&a)[kColumns], const float (&b)[kColumns]) {
  float sum = 0;
#pragma unroll
  for (int i = 0; i < kColumns; ++i) sum += a[i] * b[i];
  return warp_sum(sum);
}

template <int kColumns>
__device__ __forceinline__ void store_halves(void* high, void* low, int64 row, const float (&value)[kColumns]) {
  const int64 first = row * (32 * kColumns) + threadIdx.x % 32;
#pragma unroll
  for (int i = 0; i < kColumns; ++i) {
    Half top, rest;
    narrow(value[i], top);
    static_cast<Half*>(high)[first + 32 * i] = top;
    if (!low) continue;
    narrow(value[i] - widen<float>(top), rest);
    static_cast<Half*>(low)[first + 32 * i] = rest;
  }
}

// Where the attention kernel left a row: what block `first` made of it in the output, and where its tile was cut, what
// those after it up to `last` made in their slots.
struct RowPieces {
  int64 first, last, local;

  __device__ __forceinline__ RowPieces(const AttentionParameters& p, int blocks, int view, int64 query) {
    const int64 tiles = p.key_tiles * p.key_views, units = p.query_tiles * p.query_views * tiles;
    const int64 tile = view * p.query_tiles + query / p.tile_queries;
    local = query % p.tile_queries;
    first = ((tile * tiles + 1) * blocks - 1) / units;
    last = ((tile + 1) * tiles * blocks - 1) / units;
  }
  // Row of the slots for the piece of a block.
  __device__ __forceinline__ int64 place(const AttentionParameters& p, int64 block) const {
    return block * p.tile_queries + local;
  }
};

// What attention below a running maximum left of a query.
template <int kColumns>
struct SoftmaxRow {
  float top, sum, mean[kColumns];  // mean: times sum

  __device__ __forceinline__ void collect(const AttentionParameters& a, int blocks, int64 r, bool with_mean) {
    const RowPieces pieces(a, blocks, 0, r);
    top = a.maximum[r];
    for (int64 b = pieces.first + 1; b <= pieces.last; ++b) top = fmaxf(top, a.slot_maximum[pieces.place(a, b)]);
    sum = 0;
#pragma unroll
    for (int i = 0; i < kColumns; ++i) mean[i] = 0;
    for (int64 b = pieces.first; b <= pieces.last; ++b) {
      const bool starts = b == pieces.first;
      const int64 place = starts ? r : pieces.place(a, b);
      const float maximum = (starts ? a.maximum : a.slot_maximum)[place];
      const float share = top == -infinity() ? 0.0f : exp2f(maximum - top);
      sum += (starts ? a.sum : a.slot_sum)[place] * share;
      if (!with_mean) continue;
      float piece[kColumns];
      load_row(starts ? a.out[0] : a.slot_out, kStoreFloat32, place, 32 * kColumns, share, piece);
#pragma unroll
      for (int i = 0; i < kColumns; ++i) mean[i] += piece[i];
    }
  }
  // In base 2.
  __device__ __forceinline__ float lse() const { return top + log2f(sum) - kWeightShift; }
};

// What attention with the scale and bias of each key left of a query; total: of its weights, where they are kept.
template <int kColumns>
__device__ __forceinline__ void collect_sum(const AttentionParameters& a, int blocks, int view, int64 query,
                                            float (&sum)[kColumns], float* total = nullptr) {
  const RowPieces pieces(a, blocks, view, query);
  load_row(view ? a.out[1] : a.out[0], kStoreFloat32, query, 32 * kColumns, 1.0f, sum);
  if (total) *total = a.sum[query];
  for (int64 b = pieces.first + 1; b <= pieces.last; ++b) {
    const int64 place = pieces.place(a, b);
    float piece[kColumns];
    load_row(a.slot_out, kStoreFloat32, place, 32 * kColumns, 1.0f, piece);
#pragma unroll
    for (int i = 0; i < kColumns; ++i) sum[i] += piece[i];
    if (total) *total += a.slot_sum[place];
  }
}

// sum += what add(n, sum) adds for each n of [begin, end), the list of this thread's warp. All warps of a block must come,
// one without a list with an empty one: they share the long lists, and add their parts in the order of the warps.
template <int kValues, typename Add>
__device__ __forceinline__ void sum_lists(int64 begin, int64 end, float (&sum)[kValues], Add add) {
  constexpr int kWarps = kRowThreads / 32;
  __shared__ int64 first[kWarps], last[kWarps];
  __shared__ float part[kWarps][kValues][32];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const bool is_long = end - begin > kLongRow;
  if (!is_long) {
#pragma unroll 4
    for (int64 n = begin; n < end; ++n) add(n, sum);
  }
  if (lane == 0) {
    first[warp] = begin;
    last[warp] = end;
  }
  if (!__syncthreads_or(is_long)) return;
  for (int owner = 0; owner < kWarps; ++owner) {
    if (last[owner] - first[owner] <= kLongRow) continue;
    float own[kValues] = {};
#pragma unroll 4
    for (int64 n = first[owner] + warp; n < last[owner]; n += kWarps) add(n, own);
#pragma unroll
    for (int i = 0; i < kValues; ++i) part[warp][i][lane] = own[i];
    __syncthreads();
    for (int other = 0; other < kWarps && warp == owner; ++other) {
#pragma unroll
      for (int i = 0; i < kValues; ++i) sum[i] += part[other][i][lane];
    }
    __syncthreads();
  }
}

__device__ __forceinline__ float softplus(float x) { return fmaxf(x, 0.0f) + log1pf(expf(-fabsf(x))); }

}  // namespace hellm
