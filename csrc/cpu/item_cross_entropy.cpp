// Strip algorithm, as in info_nce.cpp: the logits of a strip of rows are computed once and used three times, for the
// row sums, for the row side of the gradient (sum_j E_ij e_j) and, once the row sums are known, for the item side
// (sum_i c_i E_ij h_i). That is 6 N I D operations. Items are cut into blocks; a block, and the gradient rows of its
// items, is the work of one thread at a time, whichever is free: no sum depends on who does it.
//
// Logits are not bounded, so every block exponentiates below its own row maximum, E_ij = exp(s_ij - m_ib), and its sums
// are brought to the common maximum M_i by r_ib = exp(m_ib - M_i): one number a row and block instead of a sweep of its
// own. E is held transposed, [item, row of the strip]: then no transposed copy of the items is needed.
//
// A bias is one more column of the items, beside a one in every row of hidden.
#include "../item_cross_entropy.h"

#include <omp.h>

#include <limits>

#include "interruption.h"
#include "simd.h"

namespace hellm::cpu::HELLM_ISA {
namespace {

constexpr int64_t kBlock = 240;  // items a block: a multiple of the tile height, its E stays in the second-level cache
constexpr int64_t kStrip = 96;   // rows a strip at most
constexpr double kGrain = 2e7;   // operations a thread: two waits a strip are cheap only beside that much
constexpr double kLog2E = 1.4426950408889634;

template <typename T>
struct Problem {
  const ItemCrossEntropyArguments& arguments;
  Interruption& interruption;
  int64_t depth;   // dim, and one more with a bias
  int64_t stride;  // depth rounded up to whole vectors
  int64_t strip;   // rows a strip
  int64_t num_blocks;
  const T* items;      // [num_items, stride], zero padded
  T* grad_items;       // [num_items, stride] or null
  T* exponential;      // [num_blocks, kBlock, strip], E transposed; with grad_items
  T* partial_sum;      // [num_blocks, strip]: sum_j E_ij of the block
  T* partial_maximum;  // [num_blocks, strip]: m_ib
  T* ratio;            // [num_blocks, strip]: r_ib
  T* partial_item;     // [num_blocks, strip, stride]: sum_j E_ij e_j of the block; with grad_hidden
  T* weight;           // [strip]: row_grad_i (1 - p_it)
  T* coefficient;      // [strip]: weight_i / sum_i

  int64_t first_item(int64_t block) const { return block * kBlock; }
  int64_t items_of(int64_t block) const {
    const int64_t left = arguments.num_items - first_item(block);
    return left < kBlock ? left : kBlock;
  }
};

template <typename T>
struct Scratch {  // of one thread
  T* hidden;      // [strip, stride]
  T* query;       // [depth, strip]: the same, transposed
  T* weighted;    // [strip, stride]: c_i r_ib h_i
  T* block;       // [kBlock, strip]: E where it is not kept
  T* row;         // [stride]

  static int64_t size(const Problem<T>& p) {
    return (2 * p.strip + 1) * p.stride + p.stride * p.strip + kBlock * p.strip;
  }
  Scratch(const Problem<T>& p, T* memory)
      : hidden(memory), query(hidden + p.strip * p.stride), weighted(query + p.stride * p.strip),
        block(weighted + p.strip * p.stride), row(block + kBlock * p.strip) {}
};

// out [stride] = x [dim], then `one_more` if there is a bias, then zeros.
template <typename T, typename S>
void widen_row(const Problem<T>& p, const S* x, T one_more, T* out) {
  const int64_t dim = p.arguments.dim;
  for (int64_t k = 0; k < dim; ++k) out[k] = to_float(x[k]);
  for (int64_t k = dim; k < p.stride; ++k) out[k] = k < p.depth ? one_more : T(0);
}

template <typename T, typename S>
void load_rows(const Problem<T>& p, int64_t start, int64_t count, const Scratch<T>& s) {
  const S* hidden = static_cast<const S*>(p.arguments.hidden);
  std::memset(s.hidden + count * p.stride, 0, (p.strip - count) * p.stride * sizeof(T));
  for (int64_t i = 0; i < count; ++i) {
    widen_row(p, hidden + (start + i) * p.arguments.dim, T(1), s.hidden + i * p.stride);
  }
  for (int64_t k = 0; k < p.depth; ++k) {
    for (int64_t i = 0; i < p.strip; ++i) s.query[k * p.strip + i] = s.hidden[i * p.stride + k];
  }
}

// The logits of a block, without the rows' targets, and their row maxima.
template <typename T>
void block_logits(const Problem<T>& p, int64_t block, int64_t start, int64_t count, const T* query, T* logits) {
  const int64_t strip = p.strip, first = p.first_item(block), num_items = p.items_of(block);
  T* const maximum = p.partial_maximum + block * strip;
  for (int64_t i = 0; i < strip; ++i) maximum[i] = std::numeric_limits<T>::lowest();
  // Few rows have their target in a block, so that they are found once and not for each group.
  int64_t row_of[kStrip], num_own = 0;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t own = p.arguments.target[start + i] - first;
    if (own >= 0 && own < num_items) row_of[num_own++] = i;
  }
  for (int64_t item = 0; item < num_items; item += kGroup) {
    const int64_t left = num_items - item, items = left < kGroup ? left : kGroup;
    if (p.interruption.after(items * strip * p.depth)) return;
    T* const s = logits + item * strip;
    multiply<false>(items, strip, p.depth, p.items + (first + item) * p.stride, p.stride, 1, query, strip, s, strip,
                    left - items);
    for (int64_t n = 0; n < num_own; ++n) {
      const int64_t i = row_of[n], own = p.arguments.target[start + i] - first - item;
      if (own >= 0 && own < items) s[own * strip + i] = -std::numeric_limits<T>::infinity();
    }
    for (int64_t i = 0; i < strip; i += kLanes<T>) {
      Vector<T> top = load(maximum + i);
      for (int64_t j = 0; j < items; ++j) {
        const Vector<T> value = load(s + j * strip + i);
        top = value > top ? value : top;
      }
      store(maximum + i, top);
    }
  }
}

// First half of a strip, for one block: E, row sums, row side of the gradient.
template <typename T>
void sweep_rows(const Problem<T>& p, int64_t block, int64_t start, int64_t count, const Scratch<T>& scratch) {
  const int64_t strip = p.strip, items = p.items_of(block);
  T* const e = p.exponential ? p.exponential + block * kBlock * strip : scratch.block;
  block_logits(p, block, start, count, scratch.query, e);
  if (p.interruption.requested()) return;
  const Vector<T> scale = broadcast(T(kLog2E));
  for (int64_t i = 0; i < strip; i += kLanes<T>) {
    const Vector<T> maximum = load(p.partial_maximum + block * strip + i);
    Vector<T> total = {};
    for (int64_t j = 0; j < items; ++j) {
      const Vector<T> value = exp2((load(e + j * strip + i) - maximum) * scale);
      store(e + j * strip + i, value);
      total += value;
    }
    store(p.partial_sum + block * strip + i, total);
  }
  if (p.partial_item == nullptr) return;
  multiply<false>(strip, p.stride, items, e, 1, strip, p.items + p.first_item(block) * p.stride, p.stride,
                  p.partial_item + block * strip * p.stride, p.stride);
}

// M_i of kLanes rows from i on, and r_ib of every block.
template <typename T>
Vector<T> common_maximum(const Problem<T>& p, int64_t i) {
  Vector<T> top = load(p.partial_maximum + i);
  for (int64_t block = 1; block < p.num_blocks; ++block) {
    const Vector<T> other = load(p.partial_maximum + block * p.strip + i);
    top = other > top ? other : top;
  }
  for (int64_t block = 0; block < p.num_blocks; ++block) {
    const Vector<T> below = load(p.partial_maximum + block * p.strip + i) - top;
    store(p.ratio + block * p.strip + i, exp2(below * broadcast(T(kLog2E))));
  }
  return top;
}

// The gradient of row i: weight_i (sum_j E_ij e_j / sum_i - e_t).
template <typename T, typename S>
void store_row_gradient(const Problem<T>& p, int64_t i, int64_t row, T* sum) {
  std::memset(sum, 0, p.stride * sizeof(T));
  for (int64_t block = 0; block < p.num_blocks; ++block) {
    const T ratio = p.ratio[block * p.strip + i];
    const T* part = p.partial_item + (block * p.strip + i) * p.stride;
    for (int64_t k = 0; k < p.stride; ++k) sum[k] += ratio * part[k];
  }
  const T* own = p.items + p.arguments.target[row] * p.stride;
  S* const out = static_cast<S*>(p.arguments.grad_hidden) + row * p.arguments.dim;
  for (int64_t k = 0; k < p.arguments.dim; ++k) from_float(p.coefficient[i] * sum[k] - p.weight[i] * own[k], out[k]);
}

// The target stands outside the sum: loss = softplus(lse of the others - its logit), p_t = 1 - sigmoid of the same.
template <typename T, typename S>
void finish_row(const Problem<T>& p, int64_t start, int64_t i, T maximum, const Scratch<T>& scratch) {
  const int64_t row = start + i;
  const T *h = scratch.hidden + i * p.stride, *own = p.items + p.arguments.target[row] * p.stride;
  double sum = 0, aligned = 0;
  for (int64_t block = 0; block < p.num_blocks; ++block) {
    sum += double(p.partial_sum[block * p.strip + i]) * double(p.ratio[block * p.strip + i]);
  }
  for (int64_t k = 0; k < p.depth; ++k) aligned += double(h[k]) * double(own[k]);
  const double margin = __builtin_log(sum) + double(maximum) - aligned;
  const double tail = __builtin_log1p(__builtin_exp(margin > 0 ? -margin : margin));
  static_cast<T*>(p.arguments.row_loss)[row] = T((margin > 0 ? margin : 0) + tail);
  if (p.arguments.row_grad == nullptr) return;
  const double weight = double(static_cast<const T*>(p.arguments.row_grad)[row]) / (1 + __builtin_exp(-margin));
  p.weight[i] = T(weight);
  p.coefficient[i] = T(sum == 0 ? 0 : weight / sum);
  if (p.partial_item) store_row_gradient<T, S>(p, i, row, scratch.row);
}

// Second half, for one block: the item side of the gradient.
template <typename T>
void sweep_items(const Problem<T>& p, int64_t block, int64_t start, int64_t count, const Scratch<T>& scratch) {
  const int64_t stride = p.stride, first = p.first_item(block), items = p.items_of(block);
  if (p.interruption.after(items * count * stride)) return;
  for (int64_t i = 0; i < count; ++i) {
    const T factor = p.coefficient[i] * p.ratio[block * p.strip + i];
    for (int64_t k = 0; k < stride; ++k) scratch.weighted[i * stride + k] = factor * scratch.hidden[i * stride + k];
  }
  T* const grad = p.grad_items + first * stride;
  const T* const e = p.exponential + block * kBlock * p.strip;
  if (start == 0) multiply<false>(items, stride, count, e, p.strip, 1, scratch.weighted, stride, grad, stride);
  else multiply<true>(items, stride, count, e, p.strip, 1, scratch.weighted, stride, grad, stride);
  for (int64_t i = 0; i < count; ++i) {
    const int64_t own = p.arguments.target[start + i] - first;
    if (own < 0 || own >= items) continue;
    for (int64_t k = 0; k < stride; ++k) grad[own * stride + k] -= p.weight[i] * scratch.hidden[i * stride + k];
  }
}

template <typename T, typename S>
void store_item_gradient(const Problem<T>& p, int64_t item) {
  const int64_t dim = p.arguments.dim;
  const T* grad = p.grad_items + item * p.stride;
  S* const out = static_cast<S*>(p.arguments.grad_items) + item * dim;
  for (int64_t k = 0; k < dim; ++k) from_float(grad[k], out[k]);
  if (p.arguments.grad_bias) static_cast<T*>(p.arguments.grad_bias)[item] = grad[dim];
}

template <typename T, typename S>
void run_thread(const Problem<T>& p, const Scratch<T>& scratch, int thread, int threads) {
  const int64_t num_rows = p.arguments.num_rows;
  for (int64_t start = 0; start < num_rows; start += p.strip) {
    if (p.interruption.settled()) break;
    const int64_t count = num_rows - start < p.strip ? num_rows - start : p.strip;
    load_rows<T, S>(p, start, count, scratch);
#pragma omp for schedule(dynamic, 1)
    for (int64_t block = 0; block < p.num_blocks; ++block) sweep_rows(p, block, start, count, scratch);
    p.interruption.settle();
    for (int64_t i = kLanes<T> * thread; i < count; i += kLanes<T> * threads) {
      const Vector<T> maximum = common_maximum(p, i);
      for (int64_t lane = 0; lane < kLanes<T> && i + lane < count; ++lane) {
        finish_row<T, S>(p, start, i + lane, maximum[lane], scratch);
      }
    }
#pragma omp barrier
    if (!p.grad_items) continue;
#pragma omp for schedule(dynamic, 1)
    for (int64_t block = 0; block < p.num_blocks; ++block) sweep_items(p, block, start, count, scratch);
  }
}

template <typename T, typename S>
void run(const ItemCrossEntropyArguments& a, Interruption& interruption) {
  const int64_t depth = a.dim + (a.bias ? 1 : 0), stride = (depth + kLanes<T> - 1) / kLanes<T> * kLanes<T>;
  const int64_t num_blocks = (a.num_items + kBlock - 1) / kBlock;
  const bool need_hidden = a.row_grad && a.grad_hidden;
  const bool need_items = a.row_grad && (a.grad_items || a.grad_bias);
  // Wide strips reuse each item more often; E of a strip should stay below 16 MiB.
  const int64_t most = num_blocks * kBlock * kStrip * int64_t(sizeof(T)) <= (int64_t(16) << 20) ? kStrip : kStrip / 2;
  const int64_t strip = strip_rows<T>(a.num_rows, stride, most);
  // With nothing to convert or pad, the caller's tables serve as they are.
  const bool in_place = sizeof(S) == sizeof(T) && stride == a.dim;

  Buffer<T> items(in_place ? 1 : a.num_items * stride), grad(need_items && !in_place ? a.num_items * stride : 1);
  Buffer<T> exponential(need_items ? num_blocks * kBlock * strip : 1);
  Buffer<T> partial(3 * num_blocks * strip), partial_item(need_hidden ? num_blocks * strip * stride : 1);
  Buffer<T> row(2 * strip);
  // clang-format off
  const Problem<T> p{a, interruption, depth, stride, strip, num_blocks,
                     in_place ? static_cast<const T*>(a.item_embedding) : items,
                     !need_items ? nullptr : in_place ? static_cast<T*>(a.grad_items) : grad,
                     need_items ? static_cast<T*>(exponential) : nullptr,
                     partial, partial + num_blocks * strip, partial + 2 * num_blocks * strip,
                     need_hidden ? static_cast<T*>(partial_item) : nullptr, row, row + strip};
  // clang-format on

  const double operations = 6.0 * double(a.num_rows) * double(a.num_items) * double(a.dim);
  const int threads = useful_threads(a.num_threads, operations, kGrain);
  const int64_t scratch_size = Scratch<T>::size(p);
  Buffer<T> scratch(threads * scratch_size);
#pragma omp parallel num_threads(threads)
  {
    if (!in_place) {
#pragma omp for schedule(static)
      for (int64_t item = 0; item < a.num_items; ++item) {
        if (interruption.after(a.dim)) continue;
        const T bias = a.bias ? static_cast<const T*>(a.bias)[item] : T(0);
        widen_row(p, static_cast<const S*>(a.item_embedding) + item * a.dim, bias, items + item * stride);
      }
    }
    const int thread = omp_get_thread_num();
    run_thread<T, S>(p, Scratch<T>(p, scratch + thread * scratch_size), thread, omp_get_num_threads());
#pragma omp barrier
    if (p.grad_items && !in_place) {
#pragma omp for schedule(static)
      for (int64_t item = 0; item < a.num_items; ++item) {
        if (!interruption.after(a.dim)) store_item_gradient<T, S>(p, item);
      }
    }
  }
}

}  // namespace

void item_cross_entropy(const ItemCrossEntropyArguments& a, Interruption& interruption) {
  HELLM_BY_DTYPE(run, a, interruption)
}

}  // namespace hellm::cpu::HELLM_ISA
