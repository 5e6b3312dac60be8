// Launch plans of knn: before the matrix products, after each of their panels, and at the end.
#include "../knn.h"

#include "parameters.cuh"
#include "plan.h"

namespace hellm::cuda {
namespace {

constexpr unsigned kSharedBytes = kMostCandidates * 8 + 16;

KnnParameters parameters_of(const KnnArguments& a) {
  if (a.k > kMostNeighbours || a.num_rows >= int64_t(1) << 31) {
    throw std::invalid_argument("knn takes k of at most " + std::to_string(kMostNeighbours) +
                                " and fewer than 2^31 rows on a GPU, got " + std::to_string(a.k) + " and " +
                                std::to_string(a.num_rows));
  }
  KnnParameters p{};
  p.x = a.x;
  p.unit = a.unit;
  p.inverse_norm = a.inverse_norm;
  p.panel = a.panel;
  p.index = reinterpret_cast<int64*>(a.index);
  p.similarity = static_cast<float*>(a.similarity);
  p.crowded = a.crowded;
  p.rows = a.num_rows;
  p.dim = a.dim;
  p.padded_rows = (a.num_rows + 7) / 8 * 8;
  p.padded_dim = (a.dim + 7) / 8 * 8;
  p.first_row = a.first_row;
  // Rounding both rows to halves costs 2^-10 of the product of their lengths, 2^-24 a column below the range of normal
  // halves, and float32 sums 2^-23 a column; the rest is for second orders and for ties of float32.
  p.slack = 2.0f * (1.0f / 1024 + float(a.dim + 16) / 4194304);
  p.k = int(a.k);
  p.storage = int(a.dtype);
  return p;
}

}  // namespace

void knn_unit(const KnnArguments& a, const Queue& queue) {
  const KnnParameters p = parameters_of(a);
  const int64_t warps = kRowThreads / 32;
  enqueue(queue, "knn_unit_kernel", (p.padded_rows + warps - 1) / warps, 1, kRowThreads, 0, p);
}

void knn_select(const KnnArguments& a, const Queue& queue) {
  enqueue(queue, "knn_select_kernel", a.panel_rows, 1, kKnnThreads, kSharedBytes, parameters_of(a));
}

void knn_crowded(const KnnArguments& a, const Queue& queue) {
  enqueue(queue, "knn_crowded_kernel", a.num_rows, 1, kKnnThreads, kSharedBytes, parameters_of(a));
}

}  // namespace hellm::cuda
