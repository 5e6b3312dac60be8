#include "limits.h"

#include <omp.h>

#include "interruption.h"
#include "simd.h"

namespace hellm::cpu::HELLM_ISA {
namespace {

constexpr int64_t kPiece = 1 << 16;  // steps, or rows that are read, between two questions whether to end
constexpr int64_t kPieceRows = 64;   // rows that are written between them
constexpr int64_t kPrefetch = 24;    // rows ahead
constexpr int kPanel = 8;            // vectors of a row that are summed together

// out = rows index[begin] .. index[end - 1] of the table, added up: kVectors vectors of their columns.
template <int kVectors>
inline __attribute__((always_inline)) void gather_panel(const GatherArguments& a, int64_t begin, int64_t end,
                                                        int64_t column, float* out, bool streamed,
                                                        Interruption& interruption) {
  constexpr int kWidth = kLanes<float>;
  Vector<float> sum[kVectors] = {};
  for (int64_t n = begin; n < end;) {
    const int64_t stop = end - n <= kPiece ? end : n + kPiece;
    if (stop < end && interruption.after(kPiece * a.dim)) return;
    for (; n < stop; ++n) {
      const float* const ahead = a.x + a.index[n + kPrefetch < a.count ? n + kPrefetch : n] * a.dim + column;
#pragma GCC unroll 8
      for (int line = 0; line < kVectors * kVectorBytes; line += 64) {
        __builtin_prefetch(reinterpret_cast<const char*>(ahead) + line);
      }
      const float* const row = a.x + a.index[n] * a.dim + column;
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) sum[v] += load(row + v * kWidth);
    }
  }
#pragma GCC unroll 8
  for (int v = 0; v < kVectors; ++v) {
    float* const target = out + column + v * kWidth;
    if (streamed) stream(target, sum[v]);
    else store(target, sum[v]);
  }
}

}  // namespace

void multiply_adds(const MultiplyAddArguments& a, Interruption& interruption) {
  // As many chains as a tile of the products has: they hide the latency of one another.
  constexpr int kChains = kTileRows * kTileVectors;
  const double of_a_step = 2.0 * kChains * kLanes<float>;
  float result = 0;
#pragma omp parallel num_threads(a.num_threads) reduction(+ : result)
  {
    const int64_t steps = int64_t(a.operations / (of_a_step * omp_get_num_threads()) + 0.5);
    const Vector<float> factor = broadcast(a.factor), term = broadcast(a.start);
    Vector<float> sum[kChains];
#pragma GCC unroll 32
    for (int chain = 0; chain < kChains; ++chain) sum[chain] = broadcast(a.start * float(chain));
    for (int64_t done = 0; done < steps && !interruption.after(kPiece * int64_t(of_a_step)); done += kPiece) {
      const int64_t piece = steps - done < kPiece ? steps - done : kPiece;
      for (int64_t step = 0; step < piece; ++step) {
#pragma GCC unroll 32
        for (int chain = 0; chain < kChains; ++chain) sum[chain] = sum[chain] * factor + term;
      }
    }
#pragma GCC unroll 32
    for (int chain = 0; chain < kChains; ++chain) result += sum[chain][0];
  }
  *a.result = result;
}

void gathers(const GatherArguments& a, Interruption& interruption) {
  constexpr int kWidth = kLanes<float>;
  const int64_t whole = a.count / a.num_rows, more = a.count % a.num_rows;
  const bool streamed = is_streamed(a.out, a.num_rows * a.dim, a.dim);
#pragma omp parallel num_threads(a.num_threads)
  {
    const int64_t thread = omp_get_thread_num(), threads = omp_get_num_threads();
    const int64_t last = a.num_rows * (thread + 1) / threads;
    for (int64_t r = a.num_rows * thread / threads; r < last; ++r) {
      if (r % kPieceRows == 0 && interruption.after(kPieceRows * (whole + 1) * a.dim)) break;
      const int64_t begin = whole * r + (r < more ? r : more), end = begin + whole + (r < more);
      float* const out = a.out + r * a.dim;
      int64_t column = 0;
      for (; column + kPanel * kWidth <= a.dim; column += kPanel * kWidth)
        gather_panel<kPanel>(a, begin, end, column, out, streamed, interruption);
      for (; column + 4 * kWidth <= a.dim; column += 4 * kWidth)
        gather_panel<4>(a, begin, end, column, out, streamed, interruption);
      for (; column + kWidth <= a.dim; column += kWidth)
        gather_panel<1>(a, begin, end, column, out, streamed, interruption);
      for (; column < a.dim; ++column) {
        out[column] = 0;
        for (int64_t n = begin; n < end; ++n) out[column] += a.x[a.index[n] * a.dim + column];
      }
    }
    if (streamed) end_stream();
  }
}

}  // namespace hellm::cpu::HELLM_ISA
