// Strip algorithm. For a strip of kStrip rows the similarities to all keys are computed once, exponentiated in place,
// and used three times: for the row sums, for the row side of the gradient (sum_j E_ij k_j) and, once the row sums are
// known, for the key side (sum_i c_i E_ij u_i). Keys are cut into blocks; a block belongs to one thread, which also
// owns the gradient rows of its keys, so no sum ever depends on the number of threads.
//
// E is held transposed, [key, row of the strip]: then no transposed copy of the keys is needed.
#include "../info_nce.h"

#include <omp.h>

#include "simd.h"

namespace hellm::cpu::HELLM_ISA {
namespace {

constexpr int64_t kBlock = 240;  // keys a block: a multiple of the tile height, its E stays in the second-level cache
constexpr int64_t kGroup = 12;   // keys whose E is computed while it is in the first-level cache
constexpr double kLog2E = 1.4426950408889634;
// Below it exp((s - 1) / t) can underflow, and the row maximum must be found first.
constexpr double kFixedShiftTemperature = 0.025;

template <typename T>
struct Problem {
  const InfoNceArguments& arguments;
  int64_t stride;        // dim rounded up to whole vectors
  int64_t strip;         // rows a strip
  int64_t blocks_a_view, num_blocks;
  bool gradients, find_maximum;
  T exponent_scale;      // log2(e) / t
  T *unit[2], *norm[2];  // anchor, positive
  T* grad[2];            // [num_keys, stride] each
  T* similarity;         // [num_blocks, kBlock, strip], E transposed; one block a thread without gradients
  T* partial_sum;        // [num_blocks, strip]
  T* partial_maximum;    // [num_blocks, strip]
  T* partial_key;        // [num_blocks, strip, stride]: sum_j E_ij k_j of the block
  T* pending;            // [strip, stride]: row side of the gradient of this strip's anchors
  T* row_weight;         // [strip]: row_grad_i sigmoid_i

  int64_t row(int64_t r) const { return arguments.rows ? arguments.rows[r] : r; }
  // Blocks run over the positive view first, then over the anchor view.
  int view(int64_t block) const { return block < blocks_a_view ? 1 : 0; }
  int64_t first_key(int64_t block) const { return (block % blocks_a_view) * kBlock; }
  int64_t keys(int64_t block) const {
    const int64_t left = arguments.num_keys - first_key(block);
    return left < kBlock ? left : kBlock;
  }
};

template <typename T>
struct Scratch {  // of one thread
  T* query;       // [dim, strip]: unit anchors of the strip, transposed
  T* shift;       // [strip], in units of the exponent
  T* weighted;    // [strip, stride]: c_i u_i
  T* block;       // [kBlock, strip], where E is not kept
};

template <typename T>
void transpose_queries(const Problem<T>& p, int64_t start, int64_t count, T* query) {
  for (int64_t i = 0; i < p.strip; ++i) {
    const T* u = i < count ? p.unit[0] + p.row(start + i) * p.stride : nullptr;
    for (int64_t k = 0; k < p.arguments.dim; ++k) query[k * p.strip + i] = u ? u[k] : T(0);
  }
}

// s [keys, strip] for the keys of a block from `key` on.
template <typename T>
void similarities(const Problem<T>& p, int64_t block, int64_t key, int64_t keys, int64_t start, int64_t count,
                  const T* query, T* s) {
  const int64_t first = p.first_key(block) + key;
  multiply<false>(keys, p.strip, p.arguments.dim, p.unit[p.view(block)] + first * p.stride, p.stride, 1, query, p.strip,
                  s, p.strip);
  // A row's own anchor is no negative, and its positive stands outside the sum.
  for (int64_t i = 0; i < count; ++i) {
    const int64_t own = p.row(start + i) - first;
    if (own >= 0 && own < keys) s[own * p.strip + i] = T(-1e30);
  }
}

template <typename T>
void block_maximum(const Problem<T>& p, int64_t block, const T* s) {
  T* maximum = p.partial_maximum + block * p.strip;
  for (int64_t i = 0; i < p.strip; i += kLanes<T>) {
    Vector<T> top = broadcast(T(-1e30));
    for (int64_t j = 0; j < p.keys(block); ++j) {
      const Vector<T> value = load(s + j * p.strip + i);
      top = value > top ? value : top;
    }
    store(maximum + i, top);
  }
}

// S of a group of keys to E, added to the row sums.
template <typename T>
void exponentiate(const Problem<T>& p, int64_t keys, const T* shift, T* s, T* sum) {
  const Vector<T> scale = broadcast(p.exponent_scale);
  for (int64_t i = 0; i < p.strip; i += kLanes<T>) {
    const Vector<T> offset = load(shift + i);
    Vector<T> total = load(sum + i);
    for (int64_t j = 0; j < keys; ++j) {
      const Vector<T> e = exp2(load(s + j * p.strip + i) * scale - offset);
      store(s + j * p.strip + i, e);
      total += e;
    }
    store(sum + i, total);
  }
}

// First half of a strip, for one block: E, row sums, row side of the gradient.
template <typename T>
void sweep_rows(const Problem<T>& p, int64_t block, int64_t start, int64_t count, const Scratch<T>& scratch) {
  T* s = p.gradients ? p.similarity + block * kBlock * p.strip : scratch.block;
  T* sum = p.partial_sum + block * p.strip;
  std::memset(sum, 0, p.strip * sizeof(T));
  for (int64_t key = 0; key < p.keys(block); key += kGroup) {
    const int64_t left = p.keys(block) - key, keys = left < kGroup ? left : kGroup;
    similarities(p, block, key, keys, start, count, scratch.query, s + key * p.strip);
    exponentiate(p, keys, scratch.shift, s + key * p.strip, sum);
  }
  if (!p.gradients) return;
  multiply<false>(p.strip, p.stride, p.keys(block), s, 1, p.strip,
                  p.unit[p.view(block)] + p.first_key(block) * p.stride, p.stride,
                  p.partial_key + block * p.strip * p.stride, p.stride);
}

template <typename T>
struct RowResult {
  double sum, sigmoid, aligned, loss;
};

// Row i of the strip, from the partial sums of all blocks in their order.
template <typename T>
RowResult<T> finish_row(const Problem<T>& p, int64_t i, int64_t row, T shift) {
  double sum = 0, aligned = 0;
  for (int64_t block = 0; block < p.num_blocks; ++block) sum += double(p.partial_sum[block * p.strip + i]);
  const T *u = p.unit[0] + row * p.stride, *v = p.unit[1] + row * p.stride;
  for (int64_t k = 0; k < p.arguments.dim; ++k) aligned += double(u[k]) * double(v[k]);
  if (!(sum > 0)) return {0, 0, aligned, sum == 0 ? 0.0 : sum};
  const double margin = __builtin_log(sum) + double(shift) / kLog2E - aligned / p.arguments.temperature;
  const double tail = __builtin_log1p(__builtin_exp(margin > 0 ? -margin : margin));
  return {sum, 1 / (1 + __builtin_exp(-margin)), aligned, (margin > 0 ? margin : 0) + tail};
}

// Second half: c_i of every row (each thread for itself), the loss and row side of the rows of one thread.
template <typename T>
void finish_rows(const Problem<T>& p, int64_t start, int64_t count, int thread, int threads, const Scratch<T>& s) {
  const T* row_grad = static_cast<const T*>(p.arguments.row_grad);
  for (int64_t i = 0; i < p.strip; ++i) {
    T* weighted = s.weighted + i * p.stride;
    if (i >= count) {
      if (p.gradients) std::memset(weighted, 0, p.stride * sizeof(T));
      continue;
    }
    const bool mine = i % threads == thread;
    if (!p.gradients && !mine) continue;
    const int64_t row = p.row(start + i);
    const RowResult<T> result = finish_row(p, i, row, s.shift[i]);
    if (mine) static_cast<T*>(p.arguments.row_loss)[start + i] = T(result.loss);
    if (!p.gradients) continue;
    const T *u = p.unit[0] + row * p.stride, *v = p.unit[1] + row * p.stride;
    const double weight = double(row_grad[start + i]) * result.sigmoid;
    const double inverse = result.sum > 0 ? 1 / result.sum : 0;
    const T c = T(weight * inverse);
    for (int64_t k = 0; k < p.stride; ++k) weighted[k] = c * u[k];
    if (!mine) continue;
    p.row_weight[i] = T(weight);
    T* pending = p.pending + i * p.stride;
    for (int64_t k = 0; k < p.stride; ++k) pending[k] = T(0);
    for (int64_t block = 0; block < p.num_blocks; ++block) {
      const T* part = p.partial_key + (block * p.strip + i) * p.stride;
      for (int64_t k = 0; k < p.stride; ++k) pending[k] += part[k];
    }
    double towards = 0;
    for (int64_t k = 0; k < p.stride; ++k) {
      const double mean_key = double(pending[k]) * inverse;
      towards += mean_key * double(u[k]);
      pending[k] = T(weight * (mean_key - double(v[k])));
    }
    static_cast<T*>(p.arguments.row_slope)[start + i] = T(weight * (towards - result.aligned));
  }
}

template <typename T>
void sweep_keys(const Problem<T>& p, int64_t block, const T* weighted) {
  multiply<true>(p.keys(block), p.stride, p.strip, p.similarity + block * kBlock * p.strip, p.strip, 1, weighted,
                 p.stride, p.grad[p.view(block)] + p.first_key(block) * p.stride, p.stride);
}

// The rows' own share, after the key side of the strip is complete. One thread: rows may repeat.
template <typename T>
void add_pending(const Problem<T>& p, int64_t start, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    const int64_t row = p.row(start + i);
    const T* u = p.unit[0] + row * p.stride;
    for (int64_t k = 0; k < p.stride; ++k) {
      p.grad[0][row * p.stride + k] += p.pending[i * p.stride + k];
      p.grad[1][row * p.stride + k] -= p.row_weight[i] * u[k];
    }
  }
}

template <typename T>
void set_shift(const Problem<T>& p, T* shift) {
  for (int64_t i = 0; i < p.strip; ++i) {
    T maximum = T(1);
    if (p.find_maximum) {
      maximum = p.partial_maximum[i];
      for (int64_t block = 1; block < p.num_blocks; ++block) {
        const T other = p.partial_maximum[block * p.strip + i];
        maximum = other > maximum ? other : maximum;
      }
    }
    shift[i] = maximum * p.exponent_scale;
  }
}

template <typename T>
void run_thread(const Problem<T>& p, int thread, int threads) {
  const int64_t dim = p.arguments.dim, num_rows = p.arguments.num_rows;
  const int64_t scratch_size = dim * p.strip + p.strip + p.strip * p.stride + kBlock * p.strip;
  Buffer<T> memory(scratch_size);
  T* const query = memory;
  T* const shift = query + dim * p.strip;
  T* const weighted = shift + p.strip;
  const Scratch<T> scratch{query, shift, weighted, weighted + p.strip * p.stride};
  const int64_t begin = p.num_blocks * thread / threads, end = p.num_blocks * (thread + 1) / threads;

  for (int64_t start = 0; start < num_rows; start += p.strip) {
    const int64_t count = num_rows - start < p.strip ? num_rows - start : p.strip;
    transpose_queries(p, start, count, scratch.query);
    if (p.find_maximum) {
      for (int64_t block = begin; block < end; ++block) {
        similarities(p, block, 0, p.keys(block), start, count, scratch.query, scratch.block);
        block_maximum(p, block, scratch.block);
      }
#pragma omp barrier
    }
    set_shift(p, scratch.shift);
    for (int64_t block = begin; block < end; ++block) sweep_rows(p, block, start, count, scratch);
#pragma omp barrier
    finish_rows(p, start, count, thread, threads, scratch);
    if (p.gradients)
      for (int64_t block = begin; block < end; ++block) sweep_keys(p, block, scratch.weighted);
#pragma omp barrier
    if (p.gradients && thread == 0) add_pending(p, start, count);
  }
}

// d loss / d z = (g - <g, u> u) / (t |z|) with g the gradient in the unit row; 0 for a row that is all zero.
template <typename T, typename S>
void store_gradient(const Problem<T>& p, int view, int64_t row, S* out) {
  T* g = p.grad[view] + row * p.stride;
  const T* u = p.unit[view] + row * p.stride;
  double along = 0;
  for (int64_t k = 0; k < p.stride; ++k) along += double(g[k]) * double(u[k]);
  const double norm = double(p.norm[view][row]);
  const T scale = norm > 0 ? T(1 / (norm * p.arguments.temperature)) : T(0);
  for (int64_t k = 0; k < p.arguments.dim; ++k) from_float((g[k] - T(along) * u[k]) * scale, out[row * p.arguments.dim + k]);
}

template <typename T, typename S>
void run(const InfoNceArguments& a) {
  const int64_t n = a.num_keys, stride = (a.dim + kLanes<T> - 1) / kLanes<T> * kLanes<T>;
  const int64_t blocks_a_view = (n + kBlock - 1) / kBlock;
  const int64_t num_blocks = blocks_a_view * (a.intra_view_negatives ? 2 : 1);
  const bool gradients = a.row_grad != nullptr;
  // Wide strips reuse each key more often; E of a strip should stay below 16 MiB.
  const int64_t strip = num_blocks * kBlock * 96 * int64_t(sizeof(T)) <= (int64_t(16) << 20) ? 96 : 48;
  // With nothing to pad, the caller's gradients serve as the accumulators.
  const bool in_place = sizeof(S) == sizeof(T) && stride == a.dim;

  Buffer<T> unit(2 * n * stride), norm(2 * n);
  Buffer<T> grad(gradients && !in_place ? 2 * n * stride : 1);
  Buffer<T> similarity(gradients ? num_blocks * kBlock * strip : 1);
  Buffer<T> partial(2 * num_blocks * strip), partial_key(gradients ? num_blocks * strip * stride : 1);
  Buffer<T> pending(strip * stride), row_weight(strip);
  T* const outside[2] = {static_cast<T*>(a.grad_anchor), static_cast<T*>(a.grad_positive)};
  const Problem<T> p{a, stride, strip, blocks_a_view, num_blocks, gradients,
                     a.temperature < kFixedShiftTemperature, T(kLog2E / a.temperature),
                     {unit, unit + n * stride}, {norm, norm + n},
                     {in_place ? outside[0] : grad, in_place ? outside[1] : grad + n * stride},
                     similarity, partial, partial + num_blocks * strip, partial_key, pending, row_weight};
  const S* const views[2] = {static_cast<const S*>(a.anchor), static_cast<const S*>(a.positive)};
  S* const outputs[2] = {static_cast<S*>(a.grad_anchor), static_cast<S*>(a.grad_positive)};

#pragma omp parallel num_threads(a.num_threads)
  {
    for (int view = 0; view < 2; ++view) {
#pragma omp for schedule(static)
      for (int64_t row = 0; row < n; ++row) {
        normalize_row(views[view] + row * a.dim, a.dim, stride, p.unit[view] + row * stride, p.norm[view] + row);
        if (gradients) std::memset(p.grad[view] + row * stride, 0, stride * sizeof(T));
      }
    }
    run_thread(p, omp_get_thread_num(), omp_get_num_threads());
#pragma omp barrier
    if (gradients) {
      for (int view = 0; view < 2; ++view) {
#pragma omp for schedule(static)
        for (int64_t row = 0; row < n; ++row) store_gradient(p, view, row, outputs[view]);
      }
    }
  }
}

}  // namespace

void info_nce(const InfoNceArguments& a) {
  if (a.num_rows == 0 && a.row_grad == nullptr) return;
  HELLM_BY_DTYPE(run, a)
}

}  // namespace hellm::cpu::HELLM_ISA
