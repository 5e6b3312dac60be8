// Sparse row gathers: every row of the output is summed by one owner, in an order fixed by the matrix alone.
#pragma once

#include "common.cuh"

namespace hellm {

constexpr int kBatch = 4;  // rows of x on their way at once

// sum += the entries first, first + step, ... below last, columns [column, column + kCount).
template <typename A, typename X, int kCount>
__device__ __forceinline__ void add_entries(const GatherParameters& p, int64 first, int64 last, int step, int64 column,
                                            A (&sum)[kCount]) {
  const A *values = static_cast<const A*>(p.values), *in_scale = static_cast<const A*>(p.in_scale);
  const X* const x = static_cast<const X*>(p.x) + column;
  for (int64 n = first; n < last; n += int64(kBatch) * step) {
    int index[kBatch];
    A weight[kBatch];
    Vector<X, kCount> row[kBatch];
#pragma unroll
    for (int k = 0; k < kBatch; ++k) index[k] = n + int64(k) * step < last ? p.indices[n + int64(k) * step] : -1;
#pragma unroll
    for (int k = 0; k < kBatch; ++k) {
      if (index[k] >= 0) row[k] = Vector<X, kCount>::load(x + index[k] * p.dim);
    }
#pragma unroll
    for (int k = 0; k < kBatch; ++k) {
      weight[k] = values && index[k] >= 0 ? values[n + int64(k) * step] : A(1);
      if (in_scale && index[k] >= 0) weight[k] *= in_scale[index[k]];
    }
#pragma unroll
    for (int k = 0; k < kBatch; ++k) {
      if (index[k] < 0) continue;
#pragma unroll
      for (int i = 0; i < kCount; ++i) sum[i] += weight[k] * widen<A>(row[k][i]);
    }
  }
}

// The scales, the own term and the store.
template <typename A, int kCount>
__device__ __forceinline__ void finish_row(const GatherParameters& p, int64 row, int64 column, A (&sum)[kCount]) {
  const A *out_scale = static_cast<const A*>(p.out_scale), *diagonal = static_cast<const A*>(p.diagonal);
  const A* const diagonal_scale = static_cast<const A*>(p.diagonal_scale);
  const A scale = A(p.factor) * (out_scale ? out_scale[row] : A(1));
#pragma unroll
  for (int i = 0; i < kCount; ++i) sum[i] *= scale;
  if (p.self) {
    const A own = diagonal ? -diagonal[row] * (diagonal_scale ? diagonal_scale[row] : A(1)) * scale : A(p.self_factor);
    A self[kCount];
    load_any(p.self, p.self_storage, row * p.dim + column, self);
#pragma unroll
    for (int i = 0; i < kCount; ++i) sum[i] += own * self[i];
  }
  store_any(p.out, p.out_storage, row * p.dim + column, sum);
}

// Sum of the groups' sums, in their order; group 0 gets it. `shared` [kGatherThreads * kCount].
template <typename A, int kCount>
__device__ __forceinline__ void add_groups(A* shared, int lanes, A (&sum)[kCount]) {
  const int group = threadIdx.x / lanes, lane = threadIdx.x % lanes, groups = kGatherThreads / lanes;
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kCount; ++i) shared[threadIdx.x * kCount + i] = sum[i];
  __syncthreads();
  if (group != 0) return;
  for (int other = 1; other < groups; ++other) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) sum[i] += shared[(other * lanes + lane) * kCount + i];
  }
}

// Grid [ceil(rows / groups), ceil(dim / (lanes kCount))]: `lanes` threads share a row, kCount columns each.
template <typename A, typename X, int kCount>
__global__ void __launch_bounds__(kGatherThreads) gather_kernel(const GatherParameters p) {
  __shared__ A shared[kGatherThreads * kCount];
  const int lanes = p.lanes, group = threadIdx.x / lanes, groups = kGatherThreads / lanes;
  const int64 column = (int64(blockIdx.y) * lanes + threadIdx.x % lanes) * kCount;
  const int64 first_row = int64(blockIdx.x) * groups, row = first_row + group;
  const int64 begin = row < p.rows ? p.indptr[row] : 0, count = row < p.rows ? p.indptr[row + 1] - begin : 0;
  if (row < p.rows && count <= kLongRow && column < p.dim) {
    A sum[kCount] = {};
    add_entries<A, X>(p, begin, begin + count, 1, column, sum);
    finish_row(p, row, column, sum);
  }
  if (!__syncthreads_or(count > kLongRow)) return;
  for (int64 r = first_row; r < first_row + groups && r < p.rows; ++r) {
    const int64 first = p.indptr[r], last = p.indptr[r + 1];
    if (last - first <= kLongRow || (p.partial && last - first > kHubEntries)) continue;
    A sum[kCount] = {};
    if (column < p.dim) add_entries<A, X>(p, first + group, last, groups, column, sum);
    add_groups(shared, lanes, sum);
    if (group == 0 && column < p.dim) finish_row(p, r, column, sum);
  }
}

// The row that holds an entry: the last one that begins at or before it.
__device__ __forceinline__ int64 row_of_entry(const GatherParameters& p, int64 entry) {
  int64 low = 0, high = p.rows - 1;
  while (low < high) {
    const int64 middle = (low + high + 1) / 2;
    if (p.indptr[middle] <= entry) low = middle;
    else high = middle - 1;
  }
  return low;
}

// Grid [chunks, panels]. Slot 2 c holds what chunk c adds to the hub of its first entry, 2 c + 1 to that of its last.
// Up to 128 registers: left to itself the compiler takes 48 and spills.
template <typename A, typename X, int kCount>
__global__ void __launch_bounds__(kGatherThreads, 2) hub_partial_kernel(const GatherParameters p) {
  __shared__ A shared[kGatherThreads * kCount];
  const int lanes = p.lanes, group = threadIdx.x / lanes, groups = kGatherThreads / lanes;
  const int64 column = (int64(blockIdx.y) * lanes + threadIdx.x % lanes) * kCount;
  const int64 begin = int64(blockIdx.x) * kHubChunk;
  const int64 end = begin + kHubChunk < p.num_entries ? begin + kHubChunk : p.num_entries;
  int64 previous = -1;
  // Not unrolled: two copies of the sum would spill.
#pragma unroll 1
  for (int slot = 0; slot < 2; ++slot) {
    const int64 row = row_of_entry(p, slot == 0 ? begin : end - 1);
    const int64 row_begin = p.indptr[row], row_end = p.indptr[row + 1];
    if (row_end - row_begin <= kHubEntries || row == previous) continue;
    previous = row;
    const int64 first = row_begin > begin ? row_begin : begin, last = row_end < end ? row_end : end;
    A sum[kCount] = {};
    if (column < p.dim) add_entries<A, X>(p, first + group, last, groups, column, sum);
    add_groups(shared, lanes, sum);
    if (group == 0 && column < p.dim) {
      store_as<A>(p.partial, (2 * int64(blockIdx.x) + slot) * p.dim + column, sum);
    }
  }
}

// Grid as gather_kernel: adds the chunks of every hub in their order.
template <typename A, int kCount>
__global__ void __launch_bounds__(kGatherThreads) hub_store_kernel(const GatherParameters p) {
  const int lanes = p.lanes, groups = kGatherThreads / lanes;
  const int64 column = (int64(blockIdx.y) * lanes + threadIdx.x % lanes) * kCount;
  const int64 row = int64(blockIdx.x) * groups + threadIdx.x / lanes;
  if (row >= p.rows || column >= p.dim) return;
  const int64 begin = p.indptr[row], end = p.indptr[row + 1];
  if (end - begin <= kHubEntries) return;
  A sum[kCount] = {};
  for (int64 chunk = begin / kHubChunk; chunk <= (end - 1) / kHubChunk; ++chunk) {
    A part[kCount];
    load_as<A>(p.partial, (2 * chunk + (chunk * kHubChunk < begin ? 1 : 0)) * p.dim + column, part);
#pragma unroll
    for (int i = 0; i < kCount; ++i) sum[i] += part[i];
  }
  finish_row(p, row, column, sum);
}

}  // namespace hellm
