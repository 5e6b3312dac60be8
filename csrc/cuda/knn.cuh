// Nearest neighbours from panels of similarities; those of narrow rows come without, see knn_scan.cuh.
#pragma once

#include "parameters.cuh"

namespace hellm {

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

}  // namespace hellm

#if defined(__CUDACC__)
#include "knn_scan.cuh"

namespace hellm {

// The k-th largest of the threads' own maxima: k similarities at least are no smaller. -infinity for fewer.
__device__ __forceinline__ float kth_maximum(const Candidates& c, float own, int k) {
  c.value[threadIdx.x] = own;
  if (threadIdx.x == 0) *c.count = 0;
  __syncthreads();
  int rank = 0;
  for (int i = 0; i < kKnnThreads; ++i) {
    rank += c.value[i] > own || (c.value[i] == own && i < int(threadIdx.x));
  }
  if (rank == k - 1) c.value[kKnnThreads] = own;
  __syncthreads();
  const float found = c.value[kKnnThreads];
  __syncthreads();
  return found;
}

// Grid [panel_rows]: a block has one row of a panel.
__global__ void __launch_bounds__(kKnnThreads) knn_select_kernel(const KnnParameters p) {
  using Piece = Vector<float, 4>;
  const int64 row = p.first_row + blockIdx.x;
  const float* const panel = p.panel + int64(blockIdx.x) * p.padded_rows;
  const Candidates c = candidates();
  float own = -infinity();
  for (int64 i = 4 * threadIdx.x; i < p.padded_rows; i += 4 * kKnnThreads) {
    const Piece piece = Piece::load(panel + i);
    own = fmaxf(own, fmaxf(fmaxf(piece[0], piece[1]), fmaxf(piece[2], piece[3])));
  }
  const float least = kth_maximum(c, own, p.k) - p.slack;
  for (int64 i = 4 * threadIdx.x; i < p.padded_rows; i += 4 * kKnnThreads) {
    const Piece piece = Piece::load(panel + i);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if (piece[j] >= least) c.add(piece[j], i + j);
    }
  }
  __syncthreads();
  const bool crowded = *c.count > kMostCandidates;
  if (threadIdx.x == 0) p.crowded[row] = crowded;
  if (crowded) return;
  c.sort(kMostCandidates);

  const float bound = *c.count > p.k ? c.value[p.k - 1] - p.slack : -infinity();
  __syncthreads();
  rank(p, c, row, bound);
}

}  // namespace hellm
#endif

#if defined(HELLM_KERNELS)
// Nearest neighbours: from panels whose matrix product is torch's, or of narrow rows by tiles.
HELLM_KERNELS(HELLM_KERNEL(knn_unit_kernel),
              HELLM_KERNEL(knn_select_kernel),
              HELLM_KERNEL(knn_crowded_kernel),
              HELLM_KERNEL(knn_scan_kernel<64>),
              HELLM_KERNEL(knn_scan_kernel<128>),
              HELLM_KERNEL(knn_scan_kernel<256>),
              HELLM_KERNEL(knn_rank_kernel))
#endif
