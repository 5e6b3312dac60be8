// Similarities of a strip of rows to a block of rows at a time; a candidate is looked at only if it beats the worst
// neighbour that its row holds, which a vector comparison tells for many rows at once.
#include "../knn.h"

#include <omp.h>

#include "interruption.h"
#include "simd.h"

namespace hellm::cpu::HELLM_ISA {
namespace {

constexpr double kGrain = 1e6;  // operations a thread
constexpr int64_t kWidestStrip = 96;
constexpr int64_t kBlock = 240;

// The k best of one row, best first. Candidates come in ascending index, so an equal one never displaces an earlier.
template <typename T>
inline void insert(T value, int64_t candidate, T* best, int64_t* index, int64_t k) {
  int64_t at = k - 1;
  for (; at > 0 && best[at - 1] < value; --at) {
    best[at] = best[at - 1];
    index[at] = index[at - 1];
  }
  best[at] = value;
  index[at] = candidate;
}

template <typename T>
struct Strip {
  int64_t rows, k;
  T* best;         // [count, k]
  int64_t* index;  // [count, k]
  T* worst;        // [rows]: best[k - 1] of each row, +inf for padding
};

template <typename T>
void select(const T* s, int64_t first, int64_t keys, const bool* present, const Strip<T>& strip) {
  for (int64_t j = 0; j < keys; ++j) {
    if (!present[first + j]) continue;
    const T* similarity = s + j * strip.rows;
    for (int64_t i = 0; i < strip.rows; i += kLanes<T>) {
      const auto better = load(similarity + i) > load(strip.worst + i);
      bool any = false;
      for (int lane = 0; lane < kLanes<T>; ++lane) any |= better[lane] != 0;
      if (!any) continue;
      for (int64_t row = i; row < i + kLanes<T>; ++row) {
        if (!(similarity[row] > strip.worst[row])) continue;
        insert(similarity[row], first + j, strip.best + row * strip.k, strip.index + row * strip.k, strip.k);
        strip.worst[row] = strip.best[row * strip.k + strip.k - 1];
      }
    }
  }
}

template <typename T, typename S>
void run(const KnnArguments& a, Interruption& interruption) {
  const int64_t n = a.num_rows, stride = (a.dim + kLanes<T> - 1) / kLanes<T> * kLanes<T>;
  const int64_t rows = strip_rows<T>(n, stride, kWidestStrip);
  constexpr T kNone = T(-1e30);
  const int threads = useful_threads(a.num_threads, 2.0 * double(n) * double(n) * double(a.dim), kGrain);
  const int64_t scratch_size = (a.dim + kBlock + 1) * rows;
  Buffer<T> unit(n * stride), scratch(threads * scratch_size);
  Buffer<bool> present(n);
#pragma omp parallel num_threads(threads)
  {
#pragma omp for schedule(static)
    for (int64_t row = 0; row < n; ++row) {
      if (interruption.after(a.dim)) continue;
      present[row] = normalize_row(static_cast<const S*>(a.x) + row * a.dim, a.dim, stride, unit + row * stride);
    }
    T* const query = scratch + omp_get_thread_num() * scratch_size;
    T* const similarity = query + a.dim * rows;
    T* const worst = similarity + kBlock * rows;
#pragma omp for schedule(dynamic, 1)
    for (int64_t start = 0; start < n; start += rows) {
      if (interruption.requested()) continue;
      const int64_t count = n - start < rows ? n - start : rows;
      const Strip<T> strip{rows, a.k, static_cast<T*>(a.similarity) + start * a.k, a.index + start * a.k, worst};
      for (int64_t i = 0; i < rows; ++i) {
        const bool searching = i < count && present[start + i];
        worst[i] = searching ? kNone : T(1e30);
        for (int64_t k = 0; k < a.dim; ++k) query[k * rows + i] = searching ? unit[(start + i) * stride + k] : T(0);
      }
      for (int64_t i = 0; i < count * a.k; ++i) {
        strip.best[i] = kNone;
        strip.index[i] = -1;
      }
      for (int64_t first = 0; first < n && !interruption.after(kBlock * rows * a.dim); first += kBlock) {
        const int64_t keys = n - first < kBlock ? n - first : kBlock;
        multiply<false>(keys, rows, a.dim, unit + first * stride, stride, 1, query, rows, similarity, rows);
        select(static_cast<const T*>(similarity), first, keys, static_cast<const bool*>(present), strip);
      }
      for (int64_t i = 0; i < count * a.k; ++i) {
        if (strip.index[i] < 0) strip.best[i] = T(0);
      }
    }
  }
}

}  // namespace

void knn(const KnnArguments& a, Interruption& interruption) { HELLM_BY_DTYPE(run, a, interruption) }

}  // namespace hellm::cpu::HELLM_ISA
