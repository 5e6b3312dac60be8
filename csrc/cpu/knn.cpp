// Similarities of a strip of rows to a block of rows at a time; a candidate is looked at only if it beats the worst
// neighbour that its row holds, which a vector comparison tells for many rows at once.
#include "../knn.h"

#include <omp.h>

#include "simd.h"

namespace hellm::cpu::HELLM_ISA {
namespace {

constexpr double kGrain = 1e6;  // operations a thread
constexpr int64_t kStrip = 96;
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
  int64_t start, count, k;
  T* best;         // [count, k]
  int64_t* index;  // [count, k]
  T* worst;        // [kStrip]: best[k - 1] of each row, +inf for padding
};

template <typename T>
void select(const T* s, int64_t first, int64_t keys, const T* norm, const Strip<T>& strip) {
  for (int64_t j = 0; j < keys; ++j) {
    if (!(norm[first + j] > 0)) continue;
    const T* similarity = s + j * kStrip;
    for (int64_t i = 0; i < kStrip; i += kLanes<T>) {
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
void run(const KnnArguments& a) {
  const int64_t n = a.num_rows, stride = (a.dim + kLanes<T> - 1) / kLanes<T> * kLanes<T>;
  constexpr T kNone = T(-1e30);
  Buffer<T> unit(n * stride), norm(n);
  const int threads = useful_threads(a.num_threads, 2.0 * double(n) * double(n) * double(a.dim), kGrain);
#pragma omp parallel num_threads(threads)
  {
#pragma omp for schedule(static)
    for (int64_t row = 0; row < n; ++row) {
      norm[row] = T(normalize_row(static_cast<const S*>(a.x) + row * a.dim, a.dim, stride, unit + row * stride));
    }
    Buffer<T> memory(a.dim * kStrip + kBlock * kStrip + kStrip);
    T* const query = memory;
    T* const similarity = query + a.dim * kStrip;
    T* const worst = similarity + kBlock * kStrip;
#pragma omp for schedule(dynamic, 1)
    for (int64_t start = 0; start < n; start += kStrip) {
      const int64_t count = n - start < kStrip ? n - start : kStrip;
      const Strip<T> strip{start, count, a.k, static_cast<T*>(a.similarity) + start * a.k, a.index + start * a.k, worst};
      for (int64_t i = 0; i < kStrip; ++i) {
        const bool searching = i < count && norm[start + i] > 0;
        worst[i] = searching ? kNone : T(1e30);
        for (int64_t k = 0; k < a.dim; ++k) query[k * kStrip + i] = searching ? unit[(start + i) * stride + k] : T(0);
      }
      for (int64_t i = 0; i < count * a.k; ++i) {
        strip.best[i] = kNone;
        strip.index[i] = -1;
      }
      for (int64_t first = 0; first < n; first += kBlock) {
        const int64_t keys = n - first < kBlock ? n - first : kBlock;
        multiply<false>(keys, kStrip, a.dim, unit + first * stride, stride, 1, query, kStrip, similarity, kStrip);
        select(static_cast<const T*>(similarity), first, keys, static_cast<const T*>(norm), strip);
      }
      for (int64_t i = 0; i < count * a.k; ++i) {
        if (strip.index[i] < 0) strip.best[i] = T(0);
      }
    }
  }
}

}  // namespace

void knn(const KnnArguments& a) { HELLM_BY_DTYPE(run, a) }

}  // namespace hellm::cpu::HELLM_ISA
