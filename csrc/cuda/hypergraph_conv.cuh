// Sparse row gathers: every row of the output is summed by one owner, in an order fixed by the matrix alone.
#pragma once

#include "parameters.cuh"

namespace hellm {

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
// Up to kLongRow entries of a row are added one after another; more are kLongGroups sums of every kLongGroups-th entry,
// added one after another, and those of a hub likewise in each of its chunks, whose sums are then added in the same way.
// Nothing of this depends on the columns of a thread: the same bits come out of every width, pitch and alignment.
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

}  // namespace hellm

#if defined(__CUDACC__)
#include "common.cuh"

namespace hellm {

constexpr int kBatch = 4;  // rows of x on their way at once

// sum += the entries first, first + step, ... below last, columns [column, column + kCount).
template <typename A, typename X, int kCount>
__device__ __forceinline__ void add_entries(const Gather& p, int64 first, int64 last, int step, int64 column,
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
      if (index[k] >= 0) row[k] = Vector<X, kCount>::load(x + index[k] * p.x_pitch);
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
__device__ __forceinline__ void finish_row(const Gather& p, int64 row, int64 column, A (&sum)[kCount]) {
  const A *out_scale = static_cast<const A*>(p.out_scale), *diagonal = static_cast<const A*>(p.diagonal);
  const A* const diagonal_scale = static_cast<const A*>(p.diagonal_scale);
  const A scale = A(p.factor) * (out_scale ? out_scale[row] : A(1));
#pragma unroll
  for (int i = 0; i < kCount; ++i) sum[i] *= scale;
  if (p.self) {
    const A own = diagonal ? -diagonal[row] * (diagonal_scale ? diagonal_scale[row] : A(1)) * scale : A(p.self_factor);
    A self[kCount];
    load_any(p.self, p.self_storage, row * p.self_pitch + column, self);
#pragma unroll
    for (int i = 0; i < kCount; ++i) sum[i] += own * self[i];
  }
  store_any(p.out, p.out_storage, row * p.out_pitch + column, sum);
}

// Sum of the sums of kLongGroups groups, in their order; the first of them gets it. `shared` [kGatherThreads * kCount].
template <typename A, int kCount>
__device__ __forceinline__ void add_groups(A* shared, int lanes, A (&sum)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) shared[threadIdx.x * kCount + i] = sum[i];
  __syncthreads();
  if (threadIdx.x / lanes % kLongGroups != 0) return;
  for (int other = 1; other < kLongGroups; ++other) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) sum[i] += shared[(threadIdx.x + other * lanes) * kCount + i];
  }
}

// The hub that a chunk belongs to: the last one whose chunks begin at or before it.
__device__ __forceinline__ int64 hub_of_chunk(const Gather& p, int64 chunk) {
  int64 low = 0, high = p.num_hubs - 1;
  while (low < high) {
    const int64 middle = (low + high + 1) / 2;
    if (p.hub_chunk_begin[middle] <= chunk) low = middle;
    else high = middle - 1;
  }
  return low;
}

// Grid [blocks, ceil(dim / (lanes kCount))]: `lanes` threads are a group and share entries, kCount columns each. The
// blocks of a side: its shared ones, with a chunk of a hub or a long row for each kLongGroups groups, then those with a
// short row for each group. As many blocks a processor as go without spills: loads wait for memory, not for registers.
template <typename A, typename X, int kCount>
__global__ void __launch_bounds__(kGatherThreads, sizeof(X) == 4 ? 4 : 3)
    gather_kernel(const GatherParameters parameters) {
  __shared__ A shared[kGatherThreads * kCount];
  const int side = int(blockIdx.x) >= parameters.first_blocks;
  const Gather& p = parameters.side[side];
  const int block = int(blockIdx.x) - side * parameters.first_blocks;
  const int lanes = parameters.lanes, group = threadIdx.x / lanes, groups = kGatherThreads / lanes;
  const int64 column = (int64(blockIdx.y) * lanes + threadIdx.x % lanes) * kCount;
  const int shared_blocks = parameters.shared_blocks[side];
  const bool together = block < shared_blocks;
  int64 place, end = p.rows, chunk = -1;
  if (together) {
    place = (int64(block) * groups + group) / kLongGroups;
    if (place < p.num_hub_chunks) chunk = place;
    place = chunk >= 0 ? hub_of_chunk(p, chunk) : place - p.num_hub_chunks + p.num_hubs;
    end = p.num_long;
  } else {
    place = p.num_long + int64(block - shared_blocks) * groups + group;
  }
  const bool present = place < end && column < parameters.dim;
  int64 row = 0;
  A sum[kCount] = {};
  if (present) {
    row = p.row_order[place];
    int64 first = p.indptr[row], last = p.indptr[row + 1];
    if (chunk >= 0) {
      first += (chunk - p.hub_chunk_begin[place]) * kHubChunk;
      if (last > first + kHubChunk) last = first + kHubChunk;
    }
    const int own = together ? group % kLongGroups : 0;
    add_entries<A, X>(p, first + own, last, together ? kLongGroups : 1, column, sum);
  }
  if (together) add_groups(shared, lanes, sum);
  if (!present || (together && group % kLongGroups != 0)) return;
  if (chunk >= 0) store_as<A>(p.partial, chunk * parameters.dim + column, sum);
  else finish_row(p, row, column, sum);
}

// Grid [blocks, panels]: each kLongGroups groups add the chunks of a hub.
template <typename A, int kCount>
__global__ void __launch_bounds__(kGatherThreads, 4) hub_store_kernel(const GatherParameters parameters) {
  __shared__ A shared[kGatherThreads * kCount];
  const int side = int(blockIdx.x) >= parameters.first_blocks;
  const Gather& p = parameters.side[side];
  const int block = int(blockIdx.x) - side * parameters.first_blocks;
  const int lanes = parameters.lanes, group = threadIdx.x / lanes, groups = kGatherThreads / lanes;
  const int64 column = (int64(blockIdx.y) * lanes + threadIdx.x % lanes) * kCount;
  const int64 hub = (int64(block) * groups + group) / kLongGroups;
  const bool present = hub < p.num_hubs && column < parameters.dim;
  A sum[kCount] = {};
  if (present) {
    const int64 end = p.hub_chunk_begin[hub + 1];
    for (int64 chunk = p.hub_chunk_begin[hub] + group % kLongGroups; chunk < end; chunk += kLongGroups) {
      A part[kCount];
      load_as<A>(p.partial, chunk * parameters.dim + column, part);
#pragma unroll
      for (int i = 0; i < kCount; ++i) sum[i] += part[i];
    }
  }
  add_groups(shared, lanes, sum);
  if (present && group % kLongGroups == 0) finish_row(p, p.row_order[hub], column, sum);
}

// Grid [ceil(rows / groups), panels].
template <typename X, int kCount>
__global__ void __launch_bounds__(kGatherThreads) pack_kernel(const PackParameters p) {
  const int64 row = int64(blockIdx.x) * (kGatherThreads / p.lanes) + threadIdx.x / p.lanes;
  const int64 column = (int64(blockIdx.y) * p.lanes + threadIdx.x % p.lanes) * kCount;
  if (row >= p.rows || column >= p.dim) return;
  const auto values = Vector<X, kCount>::load(static_cast<const X*>(p.x) + row * p.x_pitch + column);
  values.store(static_cast<X*>(p.out) + row * p.dim + column);
}

}  // namespace hellm
#endif

#if defined(HELLM_KERNELS)
// The gathers for every storage type, with accesses of 16 bytes and of one value.
HELLM_KERNELS(HELLM_KERNEL(gather_kernel<float, float, 4>),
              HELLM_KERNEL(gather_kernel<float, float, 1>),
              HELLM_KERNEL(gather_kernel<float, BFloat16, 8>),
              HELLM_KERNEL(gather_kernel<float, BFloat16, 1>),
              HELLM_KERNEL(gather_kernel<float, Half, 8>),
              HELLM_KERNEL(gather_kernel<float, Half, 1>),
              HELLM_KERNEL(gather_kernel<double, double, 2>),
              HELLM_KERNEL(gather_kernel<double, double, 1>),
              HELLM_KERNEL(pack_kernel<float, 4>),
              HELLM_KERNEL(pack_kernel<float, 1>),
              HELLM_KERNEL(pack_kernel<BFloat16, 8>),
              HELLM_KERNEL(pack_kernel<BFloat16, 1>),
              HELLM_KERNEL(pack_kernel<Half, 8>),
              HELLM_KERNEL(pack_kernel<Half, 1>),
              HELLM_KERNEL(pack_kernel<double, 2>),
              HELLM_KERNEL(pack_kernel<double, 1>),
              HELLM_KERNEL(hub_store_kernel<float, 4>),
              HELLM_KERNEL(hub_store_kernel<float, 1>),
              HELLM_KERNEL(hub_store_kernel<double, 2>),
              HELLM_KERNEL(hub_store_kernel<double, 1>))
#endif
