// Nearest neighbours of narrow rows without a matrix of similarities: each tile of them is looked through where it was
// made. Of a row those are kept that are within `slack` of its k-th best so far, which is no better than the k-th best of
// all: nobody is missed. Where that leaves too many, they are ranked on the spot, and k of them stay.
#pragma once

#include "attention_products.cuh"
#include "knn_candidates.cuh"

namespace hellm {

// One tile of queries; every warp has kQueries / 4 of them, and what is kept of them, to itself.
template <int kWidth>
struct KnnScan : AttentionProducts<kWidth, 1, false, kRunning> {
  using Products = AttentionProducts<kWidth, 1, false, kRunning>;
  using typename Products::Tile;
  using Products::kBands, Products::kKeyBands, Products::lane, Products::shared, Products::warp;
  static constexpr int kRows = 16 * kBands;                                 // of a warp
  static constexpr int kRoom = kKnnKept + Tile::kKeys, kEach = kRoom / 32;  // a tile of keys may be kept whole

  const KnnParameters& p;
  float* const least;  // [kQueries] shared: what a similarity must reach to be kept
  int* const count;    // [kQueries] shared: how many are kept
  float* const value;  // [kQueries, kRoom]
  int* const index;    // [kQueries, kRoom]
  int first_query;

  __device__ __forceinline__ KnnScan(const KnnParameters& parameters, float* shared_least, int* shared_count)
      : p(parameters),
        least(shared_least),
        count(shared_count),
        value(parameters.kept_value + int64(blockIdx.x) * Tile::kQueries * kRoom),
        index(parameters.kept_index + int64(blockIdx.x) * Tile::kQueries * kRoom) {}

  __device__ __forceinline__ void copy(Half* to, int first, bool keys) {
    const auto row = [&](int i) -> int64 { return first + i < p.rows ? first + i : -1; };
    if (keys) copy_rows<kWidth, Tile::kKeys, Tile::kThreads>(to, p.unit, row);
    else copy_rows<kWidth, Tile::kQueries, Tile::kThreads>(to, p.unit, row);
  }

  __device__ __forceinline__ void begin(int tile) {
    first_query = tile * Tile::kQueries;
    copy(shared.query(0), first_query, false);
    if (lane < kRows) {
      least[warp * kRows + lane] = -infinity();
      count[warp * kRows + lane] = 0;
    }
    __syncwarp();
  }

  __device__ __forceinline__ void load_keys(int first, int stage) {
    copy(shared.key(stage, 0), first, true);
    ptx::commit_copies();
  }

  // Row of this warp's whose similarities this lane has in half h of a band.
  __device__ __forceinline__ int row_of(int band, int h) const {
    return warp * kRows + band * 16 + h * 8 + lane / 4;
  }

  __device__ __forceinline__ void look(int stage, int first_key) {
    float s[kBands][kKeyBands][4];
    this->similarities(stage, s);
    bool any = false;
#pragma unroll
    for (int b = 0; b < kBands; ++b) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        float top = -infinity();  // a row that is all zero has only NaN, which is no maximum
#pragma unroll
        for (int j = 0; j < kKeyBands; ++j) top = fmaxf(top, fmaxf(s[b][j][2 * h], s[b][j][2 * h + 1]));
        any |= top > -infinity() && top >= least[row_of(b, h)];
      }
    }
    if (__any_sync(kAllLanes, any)) keep(first_key, s);
  }

  __device__ __forceinline__ void keep(int first_key, const float (&s)[kBands][kKeyBands][4]) {
#pragma unroll
    for (int b = 0; b < kBands; ++b) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int row = row_of(b, h);
        const float enough = least[row];
#pragma unroll
        for (int j = 0; j < kKeyBands; ++j) {
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            const int key = first_key + j * 8 + lane % 4 * 2 + i;
            if (!(s[b][j][2 * h + i] >= enough) || key >= p.rows) continue;
            const int at = atomicAdd(&count[row], 1);
            value[row * kRoom + at] = s[b][j][2 * h + i];
            index[row * kRoom + at] = key;
          }
        }
      }
    }
    __syncwarp();
    unsigned full = __ballot_sync(kAllLanes, lane < kRows && count[warp * kRows + lane % kRows] > kKnnKept);
    for (; full; full &= full - 1) {
      const int row = warp * kRows + __ffs(full) - 1;
      drop(row);
      if (count[row] > kKnnKept) rank_kept(row);
    }
  }

  // Of a row with at least k: all but those within `slack` of the k-th.
  __device__ __forceinline__ void drop(int row) {
    const int held = count[row];
    float own[kEach], left[kEach];
    int key[kEach];
#pragma unroll
    for (int e = 0; e < kEach; ++e) {
      const int at = row * kRoom + lane + 32 * e;
      const bool present = lane + 32 * e < held;
      left[e] = own[e] = present ? value[at] : -infinity();
      key[e] = present ? index[at] : 0;
    }
    float kth = 0;
    for (int n = 0; n < p.k; ++n) {
      float best = left[0];
#pragma unroll
      for (int e = 1; e < kEach; ++e) best = fmaxf(best, left[e]);
      kth = warp_maximum(best);
      bool mine = lane == __ffs(__ballot_sync(kAllLanes, best == kth)) - 1;
#pragma unroll
      for (int e = 0; e < kEach; ++e) {
        if (!mine || left[e] != kth) continue;
        left[e] = -infinity();
        mine = false;
      }
    }
    const float enough = fmaxf(least[row], kth - p.slack);
    int kept = 0;
    __syncwarp();
#pragma unroll
    for (int e = 0; e < kEach; ++e) {
      const unsigned staying = __ballot_sync(kAllLanes, own[e] >= enough);
      const int at = row * kRoom + kept + __popc(staying & ((1u << lane) - 1));
      if (own[e] >= enough) {
        value[at] = own[e];
        index[at] = key[e];
      }
      kept += __popc(staying);
    }
    if (lane == 0) {
      count[row] = kept;
      least[row] = enough;
    }
    __syncwarp();
  }

  // The best k of a row, by similarities summed in double. What comes later is wrong by less than half of `slack`.
  __device__ __forceinline__ void rank_kept(int row) {
    const int held = count[row];
    float own[kEach], best = 0;
    int key[kEach];
#pragma unroll
    for (int e = 0; e < kEach; ++e) {
      own[e] = -infinity();
      key[e] = 0x7fffffff;
      for (int n = 32 * e; n < held && n < 32 * e + 32; ++n) {
        const int other = index[row * kRoom + n];
        const float exact = exact_similarity(p, first_query + row, other);
        if (lane != n % 32) continue;
        own[e] = exact;
        key[e] = other;
      }
    }
    __syncwarp();
    for (int n = 0; n < p.k; ++n) {
      best = own[0];
      int nearest = key[0];
      const auto compare = [&](float exact, int other) {
        if (exact < best || (exact == best && other > nearest)) return;
        best = exact;
        nearest = other;
      };
#pragma unroll
      for (int e = 1; e < kEach; ++e) compare(own[e], key[e]);
#pragma unroll
      for (int step = 16; step > 0; step /= 2) {
        const float exact = __shfl_xor_sync(kAllLanes, best, step);
        compare(exact, __shfl_xor_sync(kAllLanes, nearest, step));
      }
#pragma unroll
      for (int e = 0; e < kEach; ++e) {
        if (key[e] == nearest) own[e] = -infinity();
      }
      if (lane == 0) {
        value[row * kRoom + n] = best;
        index[row * kRoom + n] = nearest;
      }
    }
    if (lane == 0) {
      count[row] = p.k;
      least[row] = best - p.slack / 2;
    }
    __syncwarp();
  }

  __device__ __forceinline__ void finish() {
    for (int i = 0; i < kRows; ++i) {
      const int row = warp * kRows + i, query = first_query + row;
      if (query >= p.rows) break;
      if (count[row] > p.k) drop(row);
      const int kept = count[row];
      for (int at = lane; at < kept; at += 32) p.chosen[int64(query) * kKnnKept + at] = index[row * kRoom + at];
      if (lane == 0) p.num_chosen[query] = kept;
    }
    __syncwarp();  // before the next tile begins with nothing
  }
};

// Grid [as many blocks as run at the same time]: a block has every gridDim.x-th tile of queries.
template <int kWidth>
__global__ void __launch_bounds__(128, kScanBlocks) knn_scan_kernel(const KnnParameters p) {
  using Tile = AttentionTile<kWidth, 1>;
  __shared__ float least[Tile::kQueries];
  __shared__ int count[Tile::kQueries];
  KnnScan<kWidth> scan(p, least, count);
  const int tiles = int((p.rows + Tile::kQueries - 1) / Tile::kQueries);
  for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    scan.begin(tile);
    scan.load_keys(0, 0);
    int stage = 0;
    for (int first = 0; first < p.rows; first += Tile::kKeys, stage = 1 - stage) {
      if (first + Tile::kKeys < p.rows) {
        scan.load_keys(first + Tile::kKeys, 1 - stage);
        ptx::wait_copies<1>();
      } else {
        ptx::wait_copies<0>();
      }
      __syncthreads();
      if (first == 0) scan.hold_queries();
      scan.look(stage, first);
      __syncthreads();
    }
    scan.finish();
  }
}

// Grid [rows]: the best of those that were kept.
__global__ void __launch_bounds__(kKnnThreads) knn_rank_kernel(const KnnParameters p) {
  const int64 row = blockIdx.x;
  const int found = p.num_chosen[row];
  const Candidates c = candidates();
  if (threadIdx.x < found) {
    c.value[threadIdx.x] = 0;
    c.index[threadIdx.x] = p.chosen[row * kKnnKept + threadIdx.x];
  }
  if (threadIdx.x == 0) *c.count = found;
  __syncthreads();
  rank(p, c, row, 0);
}

}  // namespace hellm
