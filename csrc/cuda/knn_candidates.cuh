// Exact nearest rows: similarities of halves choose candidates, which are then ranked by similarities summed in double.
// The k-th best of the halves cannot be off by more than `slack` / 2, so whoever is within `slack` of it is a candidate
// and nobody else can be among the k best. A row with too many candidates in a panel is compared with all rows instead.
#pragma once

#include "common.cuh"

namespace hellm {

// Grid [ceil(padded_rows / warps)]: a warp has one row. A row that is all zero becomes NaN, which no comparison chooses.
__global__ void __launch_bounds__(kRowThreads) knn_unit_kernel(const KnnParameters p) {
  const int64 row = int64(blockIdx.x) * (kRowThreads / 32) + threadIdx.x / 32;
  if (row >= p.padded_rows) return;
  const int lane = threadIdx.x % 32;
  double square = 0;
  for (int64 c = lane; row < p.rows && c < p.dim; c += 32) {
    const double x = load_one(p.x, p.storage, row * p.dim + c);
    square += x * x;
  }
  square = warp_sum(square);
  const double inverse = square > 0 ? 1.0 / sqrt(square) : 0.0;
  if (lane == 0 && row < p.rows) p.inverse_norm[row] = inverse;
  for (int64 c = lane; c < p.padded_dim; c += 32) {
    const float x = row < p.rows && c < p.dim ? load_one(p.x, p.storage, row * p.dim + c) : 0.0f;
    Half half;
    narrow(inverse > 0 ? float(x * inverse) : __uint_as_float(0x7fc00000u), half);
    static_cast<Half*>(p.unit)[row * p.padded_dim + c] = half;
  }
}

// Every lane gets the similarity of two rows, neither all zero: the same bits whichever kernel asks.
__device__ __forceinline__ float exact_similarity(const KnnParameters& p, int64 row, int64 other) {
  double sum = 0;
  for (int64 c = threadIdx.x % 32; c < p.dim; c += 32) {
    const double x = load_one(p.x, p.storage, row * p.dim + c), y = load_one(p.x, p.storage, other * p.dim + c);
    sum += x * y;
  }
  return float(warp_sum(sum) * p.inverse_norm[row] * p.inverse_norm[other]);
}

// Rows with their similarities, in the shared memory of a block.
struct Candidates {
  float* value;  // [kMostCandidates]
  int* index;    // [kMostCandidates]
  int* count;    // [1]: may be more than there is room for

  __device__ __forceinline__ void add(float similarity, int64 row) const {
    const int at = atomicAdd(count, 1);
    if (at >= kMostCandidates) return;
    value[at] = similarity;
    index[at] = int(row);
  }

  // The best `keep` to the front in order, lower index first among equals; however they came in.
  __device__ __forceinline__ void sort(int keep) const {
    constexpr int kEach = kMostCandidates / kKnnThreads;
    const int all = *count;
    float own[kEach];
    int row[kEach], rank[kEach];
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const int at = threadIdx.x + i * kKnnThreads;
      rank[i] = all;
      if (at >= all) continue;
      own[i] = value[at];
      row[i] = index[at];
      rank[i] = 0;
      for (int j = 0; j < all; ++j) rank[i] += value[j] > own[i] || (value[j] == own[i] && index[j] < row[i]);
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      if (rank[i] >= keep || rank[i] >= all) continue;
      value[rank[i]] = own[i];
      index[rank[i]] = row[i];
    }
    if (threadIdx.x == 0) *count = all < keep ? all : keep;
    __syncthreads();
  }

  __device__ __forceinline__ void store(const KnnParameters& p, int64 row) const {
    for (int i = threadIdx.x; i < p.k; i += kKnnThreads) {
      p.index[row * p.k + i] = i < *count ? index[i] : -1;
      p.similarity[row * p.k + i] = i < *count ? value[i] : 0.0f;
    }
  }
};

__device__ __forceinline__ Candidates candidates() {
  unsigned char* const memory = ptx::dynamic_shared();
  float* const value = reinterpret_cast<float*>(memory);
  int* const index = reinterpret_cast<int*>(value + kMostCandidates);
  return {value, index, index + kMostCandidates};
}

// Similarities summed in double of the candidates of a row whose values are at least `bound`; the best k to the output.
__device__ __forceinline__ void rank(const KnnParameters& p, const Candidates& c, int64 row, float bound) {
  const int found = *c.count;
  for (int i = threadIdx.x / 32; i < found; i += kKnnThreads / 32) {
    // Beyond the bound nothing can be among the best: last, for the same order every time.
    const float exact = c.value[i] >= bound ? exact_similarity(p, row, c.index[i]) : -infinity();
    if (threadIdx.x % 32 == 0) c.value[i] = exact;
  }
  __syncthreads();
  c.sort(p.k);
  c.store(p, row);
}

// Grid [rows]: a crowded row against all rows. Most blocks have nothing to do.
__global__ void __launch_bounds__(kKnnThreads) knn_crowded_kernel(const KnnParameters p) {
  const int64 row = blockIdx.x;
  if (!p.crowded[row]) return;
  const Candidates c = candidates();
  constexpr int kStep = kMostCandidates - kMostNeighbours;
  if (threadIdx.x == 0) *c.count = 0;
  __syncthreads();
  for (int64 first = 0; first < p.rows; first += kStep) {
    const int64 end = first + kStep < p.rows ? first + kStep : p.rows;
    for (int64 other = first + threadIdx.x / 32; other < end; other += kKnnThreads / 32) {
      if (!(p.inverse_norm[other] > 0)) continue;
      const float exact = exact_similarity(p, row, other);
      if (threadIdx.x % 32 == 0) c.add(exact, other);
    }
    __syncthreads();
    c.sort(p.k);
  }
  c.store(p, row);
}

}  // namespace hellm
