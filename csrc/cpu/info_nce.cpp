// Strip algorithm. For a strip of kStrip rows the similarities to all keys are computed once, exponentiated in place,
// and used three times: for the row sums, for the row side of the gradient (sum_j E_ij k_j) and, once the row sums are
// known, for the key side (sum_i c_i E_ij u_i). Keys are cut into blocks; a block, and the gradient rows of its keys, is
// the work of one thread at a time, whichever is free: no sum depends on who does it.
//
// E is held transposed, [key, row of the strip]: then products in floating point need no transposed copy of the keys.
//
// Over all rows the anchor's own view needs less: its E is symmetric. Its row sums come first, from the upper triangle.
// Then, strips ascending, the lower triangle is enough: c_j of every earlier row is known, so that
// W_ij = E_ij (c_i + c_j) carries both sides of the gradient of both rows. That is 10 N^2 D operations instead of 12.
//
// Every product is one of three: similarities, row_side and key_side.
#include <omp.h>

#include "info_nce_products.h"

namespace hellm::cpu::HELLM_ISA {
namespace {

constexpr double kGrain = 2e7;  // operations a thread: three waits a strip are cheap only beside that much
constexpr int64_t kTriangleGroups = 16;
constexpr int64_t kTriangleStrips = 4;  // strips of keys whose W u is summed in place, by one thread
constexpr double kLog2E = 1.4426950408889634;
// Below it exp((s - 1) / t) can underflow, and the row maximum must be found first.
constexpr double kFixedShiftTemperature = 0.025;

template <typename T, typename U>
void block_maximum(const Problem<T, U>& p, int64_t block, const T* s) {
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

// What weight(i)(j, s) makes of the similarities s of key j to a vector of rows from i on, added to `sum` and, in fixed
// point, scratch.largest. It replaces s; by tiles it goes to `factor`, if any.
template <typename T, typename U, typename Weight>
void weigh(const Problem<T, U>& p, int64_t keys, const Scratch<T, U>& scratch, T* s, T* sum, TileFactor<U> factor,
           Weight weight) {
  for (int64_t i = 0; i < p.strip; i += kLanes<T>) {
    const auto weight_of = weight(i);
    Vector<T> total = load(sum + i), largest = load(scratch.largest + i);
    const auto next = [&](int64_t j) {
      const Vector<T> w = weight_of(j, load(s + j * p.strip + i));
      if constexpr (kFixed<U>) {
        const Vector<T> size = absolute(w);
        total += size;
        largest = size > largest ? size : largest;
      } else {
        total += w;
      }
      return w;
    };
    if (kTiles<U> && factor.pairs) {
      if constexpr (kTiles<U>) pack_tiles(keys, p.strip, i, factor, next);
    } else {
      for (int64_t j = 0; j < keys; ++j) store(s + j * p.strip + i, next(j));
    }
    store(sum + i, total);
    store(scratch.largest + i, largest);
  }
}

// S of a group of keys to E, added to the row sums.
template <typename T, typename U>
void exponentiate(const Problem<T, U>& p, int64_t keys, const Scratch<T, U>& scratch, T* s, T* sum,
                  TileFactor<U> factor = {}) {
  const Vector<T> scale = broadcast(p.exponent_scale);
  weigh(p, keys, scratch, s, sum, factor, [&](int64_t i) {
    const Vector<T> offset = load(scratch.shift + i);
    return [=](int64_t, Vector<T> similarity) { return exp2(similarity * scale - offset); };
  });
}

// S of a group of the anchor's own keys to W = E (c_i + c_j).
template <typename T, typename U>
void exponentiate_both(const Problem<T, U>& p, int64_t keys, const Scratch<T, U>& scratch, const T* key_coefficient,
                       T* s, TileFactor<U> factor) {
  const Vector<T> scale = broadcast(p.exponent_scale);
  weigh(p, keys, scratch, s, scratch.sum, factor, [&](int64_t i) {
    const Vector<T> offset = load(scratch.shift + i), coefficient = load(scratch.coefficient + i);
    return [=](int64_t j, Vector<T> similarity) {
      return exp2(similarity * scale - offset) * (coefficient + key_coefficient[j]);
    };
  });
}

// First half of a strip, for one block: E, row sums, row side of the gradient.
template <typename T, typename U>
void sweep_rows(const Problem<T, U>& p, int64_t block, int64_t start, int64_t count, const Scratch<T, U>& scratch) {
  U* const kept = p.gradients ? p.kept + block * kBlock<U> * p.strip : nullptr;
  T* s = scratch.block;
  if constexpr (!k16Bit<U>) s = kept ? kept : s;
  T* sum = p.partial_sum + block * p.strip;
  std::memset(sum, 0, p.strip * sizeof(T));
  std::memset(scratch.largest, 0, p.strip * sizeof(T));
  for (int64_t key = 0; key < p.keys(block); key += kKeys<U>) {
    const int64_t left = p.keys(block) - key, keys = left < kKeys<U> ? left : kKeys<U>;
    if (p.interruption.after(2 * keys * p.strip * p.stride)) return;
    T* const group = kTiles<U> ? s : s + key * p.strip;
    similarities(p, p.view(block), p.first_key(block) + key, keys, left - keys, start, count, scratch, group);
    exponentiate(p, keys, scratch, group, sum, tile_factor(p, scratch, kept, key));
  }
  if (!p.gradients) return;
  row_side<false>(p, p.view(block), p.first_key(block), p.keys(block), s, sum,
                  Factor<T, U>{kept, p.kept_scale + block * p.strip}, scratch,
                  p.partial_key + block * p.strip * p.stride);
}

template <typename T>
struct RowResult {
  double sum, sigmoid, aligned, loss;
};

// Row i of the strip, from the partial sums of all blocks in their order.
template <typename T, typename U>
RowResult<T> finish_row(const Problem<T, U>& p, int64_t i, int64_t row, T shift) {
  double sum = 0, aligned = 0;
  for (int64_t block = 0; block < p.num_blocks; ++block) sum += double(p.partial_sum[block * p.strip + i]);
  const U *u = p.unit[0] + row * p.stride, *v = p.unit[1] + row * p.stride;
  for (int64_t k = 0; k < p.arguments.dim; ++k) aligned += double(unit<T>(u[k])) * double(unit<T>(v[k]));
  if (p.symmetric) sum += double(p.intra_sum[row]);
  if (!(sum > 0)) return {0, 0, aligned, sum == 0 ? 0.0 : sum};
  const double margin = __builtin_log(sum) + double(shift) / kLog2E - aligned / p.arguments.temperature;
  const double tail = __builtin_log1p(__builtin_exp(margin > 0 ? -margin : margin));
  return {sum, 1 / (1 + __builtin_exp(-margin)), aligned, (margin > 0 ? margin : 0) + tail};
}

// Second half: c_i of every row (each thread for itself), the loss and row side of the rows of one thread.
template <typename T, typename U>
void finish_rows(const Problem<T, U>& p, int64_t start, int64_t count, int thread, int threads,
                 const Scratch<T, U>& s) {
  const T* row_grad = static_cast<const T*>(p.arguments.row_grad);
  for (int64_t i = 0; i < p.strip; ++i) {
    T* weighted = s.weighted + i * p.stride;
    if (i >= count) {
      if (p.gradients && !kFixed<U>) std::memset(weighted, 0, p.stride * sizeof(T));
      s.coefficient[i] = T(0);
      continue;
    }
    const bool mine = i % threads == thread;
    if (!p.gradients && !mine) continue;
    const int64_t row = p.row(start + i);
    const RowResult<T> result = finish_row(p, i, row, s.shift[i]);
    if (mine) static_cast<T*>(p.arguments.row_loss)[start + i] = T(result.loss);
    if (!p.gradients) continue;
    const U* u = p.unit[0] + row * p.stride;
    const double weight = double(row_grad[start + i]) * result.sigmoid;
    const double inverse = result.sum > 0 ? 1 / result.sum : 0;
    s.coefficient[i] = T(weight * inverse);
    for (int64_t k = 0; k < p.stride && !kFixed<U>; ++k) weighted[k] = s.coefficient[i] * unit<T>(u[k]);
    if (!mine) continue;
    if (p.symmetric) p.coefficient[row] = s.coefficient[i];
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
      towards += mean_key * double(unit<T>(u[k]));
      pending[k] = T(weight * mean_key);
    }
    static_cast<T*>(p.arguments.row_slope)[start + i] = T(weight * (towards - result.aligned));
  }
  if constexpr (kTiles<U>) {
    for (int64_t k = 0; p.gradients && k < p.stride; k += kLanes<T>) {
      pack_tiles(p.strip, p.stride, k, TileFactor<U>{s.own_weighted, nullptr},
                 [&](int64_t i) { return load(s.weighted + i * p.stride + k); });
    }
  }
}

template <typename T, typename U>
void sweep_keys(const Problem<T, U>& p, int64_t block, const Scratch<T, U>& scratch) {
  if (p.interruption.after(p.keys(block) * p.strip * p.stride)) return;
  kept_key_side(p, block, scratch, p.grad[p.view(block)] + p.first_key(block) * p.stride);
}

// Row sums of the anchor's own view, from its upper triangle. Strips are dealt to a fixed number of groups, each with
// its own sums, so that the result does not depend on who does which.
template <typename T, typename U>
void sum_triangle(const Problem<T, U>& p, int64_t group, const Scratch<T, U>& scratch) {
  const int64_t n = p.arguments.num_keys;
  T* const part = p.intra_part + group * n;
  std::memset(part, 0, n * sizeof(T));
  for (int64_t start = group * p.strip; start < n; start += kTriangleGroups * p.strip) {
    const int64_t count = n - start < p.strip ? n - start : p.strip;
    load_queries(p, start, count, scratch);
    T* const sum = scratch.coefficient;
    std::memset(sum, 0, p.strip * sizeof(T));
    for (int64_t first = start, block = start; first < n;) {
      const int64_t end = first < start + count ? start + count : n;
      const int64_t keys = end - first < kKeys<U> ? end - first : kKeys<U>;
      if (p.interruption.after(keys * p.strip * p.stride)) return;
      similarities(p, 0, first, keys, n - first - keys, start, count, scratch, scratch.block);
      exponentiate(p, keys, scratch, scratch.block, sum);
      for (int64_t j = 0; j < keys && first >= start + count; ++j) {
        Vector<T> total = {};
        for (int64_t i = 0; i < p.strip; i += kLanes<T>) total += load(scratch.block + j * p.strip + i);
        for (int lane = 0; lane < kLanes<T>; ++lane) part[first + j] += total[lane];
      }
      first += keys;
      if (first - block < kBlock<U> && first < n) continue;
      // By blocks: a single chain of additions over all keys would lose digits.
      for (int64_t i = 0; i < count; ++i) part[start + i] += sum[i];
      std::memset(sum, 0, p.strip * sizeof(T));
      block = first;
    }
  }
}

template <typename T, typename U>
T* intra_key(const Problem<T, U>& p, int64_t first) {
  return p.intra_key + first / (kTriangleStrips * p.strip) * p.strip * p.stride;
}

// W = E (c_i + c_j) of the strip's rows against the anchors from `first` on, and both sides of its gradient.
template <typename T, typename U>
void sweep_triangle(const Problem<T, U>& p, int64_t first, int64_t keys, int64_t start, int64_t count,
                    const Scratch<T, U>& scratch) {
  const bool own = first == start;  // symmetric in itself: one side gives both
  T* const w = scratch.block;
  const Factor<T, U> factor{kTiles<U> ? scratch.by_rows : scratch.packed, scratch.scale};
  std::memset(scratch.sum, 0, p.strip * sizeof(T));
  std::memset(scratch.largest, 0, p.strip * sizeof(T));
  for (int64_t key = 0; key < keys; key += kKeys<U>) {
    const int64_t group = keys - key < kKeys<U> ? keys - key : kKeys<U>;
    T* const s = kTiles<U> ? w : w + key * p.strip;
    similarities(p, 0, first + key, group, keys - key - group, start, count, scratch, s);
    exponentiate_both(p, group, scratch, own ? scratch.coefficient + key : p.coefficient + first + key, s,
                      tile_factor(p, scratch, factor.weights, key));
  }
  T* const out = intra_key(p, first);
  const bool fresh = first / p.strip % kTriangleStrips == 0;
  if (fresh) row_side<false>(p, 0, first, keys, w, scratch.sum, factor, scratch, out);
  else row_side<true>(p, 0, first, keys, w, scratch.sum, factor, scratch, out);
  if (!own) key_side(p, keys, start, count, w, scratch, p.grad[0] + first * p.stride);
}

// The rows' own share, after the key side of the strip is complete. Chosen rows may repeat, and stay with one thread.
template <typename T, typename U>
void add_pending(const Problem<T, U>& p, int64_t start, int64_t count, int thread, int threads) {
  const int64_t sharing = p.arguments.rows ? 1 : threads;
  for (int64_t i = thread < sharing ? thread : count; i < count; i += sharing) {
    const int64_t row = p.row(start + i);
    T* const grad_u = p.grad[0] + row * p.stride;
    p.own_weight[row] += p.row_weight[i];
    for (int64_t k = 0; k < p.stride; ++k) grad_u[k] += p.pending[i * p.stride + k];
    for (int64_t first = 0; p.symmetric && first <= start; first += kTriangleStrips * p.strip) {
      const T* part = intra_key(p, first) + i * p.stride;
      for (int64_t k = 0; k < p.stride; ++k) grad_u[k] += part[k];
    }
  }
}

template <typename T, typename U>
void set_shift(const Problem<T, U>& p, T* shift) {
  for (int64_t i = 0; i < p.strip; ++i) {
    T maximum = T(1);
    if (p.find_maximum) {
      maximum = p.partial_maximum[i];
      for (int64_t block = 1; block < p.num_blocks; ++block) {
        const T other = p.partial_maximum[block * p.strip + i];
        maximum = other > maximum ? other : maximum;
      }
      // A row without negatives has found only what was masked.
      if (maximum < T(-2)) maximum = T(1);
    }
    shift[i] = maximum * p.exponent_scale;
  }
}

template <typename T, typename U>
void run_thread(const Problem<T, U>& p, const Scratch<T, U>& scratch, int thread, int threads) {
  const int64_t num_rows = p.arguments.num_rows;
  for (int64_t i = 0; i < p.strip; ++i) scratch.unit_scale[i] = T(1 / (kUnit * kUnit));

  if (p.symmetric) {
    set_shift(p, scratch.shift);
#pragma omp for schedule(dynamic, 1)
    for (int64_t group = 0; group < kTriangleGroups; ++group) sum_triangle(p, group, scratch);
#pragma omp for schedule(static)
    for (int64_t row = 0; row < num_rows; ++row) {
      p.intra_sum[row] = T(0);
      for (int64_t group = 0; group < kTriangleGroups; ++group) {
        p.intra_sum[row] += p.intra_part[group * num_rows + row];
      }
    }
  }
  for (int64_t start = 0; start < num_rows && !p.interruption.settled(); start += p.strip) {
    const int64_t count = num_rows - start < p.strip ? num_rows - start : p.strip;
    load_queries(p, start, count, scratch);
    if (p.find_maximum) {
#pragma omp for schedule(dynamic, 1)
      for (int64_t block = 0; block < p.num_blocks; ++block) {
        if (p.interruption.after(p.keys(block) * p.strip * p.stride)) continue;
        similarities(p, p.view(block), p.first_key(block), p.keys(block), 0, start, count, scratch, scratch.block);
        block_maximum(p, block, scratch.block);
      }
    }
    set_shift(p, scratch.shift);
#pragma omp for schedule(dynamic, 1)
    for (int64_t block = 0; block < p.num_blocks; ++block) sweep_rows(p, block, start, count, scratch);
    p.interruption.settle();
    finish_rows(p, start, count, thread, threads, scratch);
    if (!p.gradients) {
#pragma omp barrier
      continue;
    }
    const int64_t triangle = kTriangleStrips * p.strip;
    const int64_t triangles = p.symmetric ? start / triangle + 1 : 0;
#pragma omp for schedule(dynamic, 1)
    for (int64_t part = 0; part < triangles + p.num_blocks; ++part) {
      if (part >= triangles) {
        sweep_keys(p, part - triangles, scratch);
        continue;
      }
      for (int64_t first = part * triangle; first <= start && first < (part + 1) * triangle; first += p.strip) {
        if (p.interruption.after(3 * p.strip * p.strip * p.stride)) break;
        sweep_triangle(p, first, first == start ? count : p.strip, start, count, scratch);
      }
    }
    add_pending(p, start, count, thread, threads);
  }
}

// d loss / d z = (g - <g, u> u) / (t |z|) with g the gradient in the unit row; 0 for a row that is all zero.
//
// The positive's part of g, -own_weight times its unit row, is by far the largest where the views are aligned, and all
// but along u. So it stays out of the sums until here, where the rows are those given and the arithmetic is double.
template <typename T, typename U, typename S>
void store_gradient(const Problem<T, U>& p, int view, int64_t row, const S* const (&views)[2], S* out) {
  const int64_t dim = p.arguments.dim;
  const T* const g = p.grad[view] + row * p.stride;
  const S *const own = views[view] + row * dim, *const positive = views[1 - view] + row * dim;
  const double weight = double(p.own_weight[row]);
  const Length norm = length(own, dim);
  // A row of no loss may have anything for a positive.
  const Length distance = weight == 0 ? Length{0, 1} : length(positive, dim);
  const double pull = distance.norm == 0 ? 0 : weight / distance.norm;
  const auto direction = [&](int64_t k) {
    return norm.norm == 0 ? 0 : double(to_float(own[k])) * norm.scale / norm.norm;
  };
  const auto towards = [&](int64_t k) {
    return double(g[k]) - (pull == 0 ? 0 : pull * (double(to_float(positive[k])) * distance.scale));
  };
  double along = 0;
  for (int64_t k = 0; k < dim; ++k) along += towards(k) * direction(k);
  if (view == 0 && p.symmetric) {
    // So far the slope holds the positive view only. Of the own view, sum_ij c_i E_ij s_ij = sum_ij W_ij s_ij / 2.
    T& slope = static_cast<T*>(p.arguments.row_slope)[row];
    slope = T((along + double(slope)) / 2);
  }
  const double scale = norm.norm == 0 ? 0 : norm.scale / (norm.norm * p.arguments.temperature);
  for (int64_t k = 0; k < dim; ++k) from_float(T((towards(k) - along * direction(k)) * scale), out[row * dim + k]);
}

// The units of panel `panel` of a view transposed, zero where it has no keys.
template <typename T, typename U>
void transpose_panel(const Problem<T, U>& p, int view, int64_t panel) {
  const int64_t size = p.panel[view], first = panel * size;
  U* out = p.across[view] + first * p.stride;
  for (int64_t k = 0; k < p.stride; ++k) {
    for (int64_t j = 0; j < size; ++j) {
      *out++ = first + j < p.arguments.num_keys ? p.unit[view][(first + j) * p.stride + k] : U{0};
    }
  }
}

template <typename T, typename U, typename S>
void run_with(const InfoNceArguments& a, Interruption& interruption) {
  const auto whole = [](int64_t size) { return (size + kWhole<T, U> - 1) / kWhole<T, U> * kWhole<T, U>; };
  const int64_t n = a.num_keys, stride = whole(a.dim);
  const int64_t blocks_a_view = (n + kBlock<U> - 1) / kBlock<U>;
  const bool gradients = a.row_grad != nullptr, find_maximum = a.temperature < kFixedShiftTemperature;
  // A common shift and all rows: then E of the anchor's own view is symmetric.
  const bool symmetric = a.intra_view_negatives && a.rows == nullptr && !find_maximum;
  const int64_t num_blocks = blocks_a_view * (a.intra_view_negatives && !symmetric ? 2 : 1);
  // Wide strips reuse each key more often; E of a strip should stay below 16 MiB.
  constexpr int64_t kStrip = k16Bit<U> ? 192 : 96;
  static_assert(kStrip <= kBlock<U>, "a strip of the anchor's own view is a block of keys");
  const int64_t most =
      num_blocks * kBlock<U> * kStrip * int64_t(sizeof(U)) <= (int64_t(16) << 20) ? kStrip : kStrip / 2;
  const int64_t strip = whole(strip_rows<T>(a.num_rows, stride, most));
  // With nothing to pad, the caller's gradients serve as the accumulators.
  const bool in_place = sizeof(S) == sizeof(T) && stride == a.dim;

  const int64_t panel[2] = {symmetric ? strip : kBlock<U>, kBlock<U>};
  const bool transposed = k16Bit<U> && gradients;
  const int64_t panels[2] = {transposed && a.intra_view_negatives ? (n + panel[0] - 1) / panel[0] : 0,
                             transposed ? blocks_a_view : 0};
  const int64_t across_size[2] = {panels[0] * panel[0] * stride, panels[1] * panel[1] * stride};
  const int64_t grad_size = gradients && !in_place ? n * stride : 0, intra_size = symmetric ? n : 0;

  Buffer<U> unit(2 * n * stride), across(across_size[0] + across_size[1]);
  Buffer<T> grad(2 * grad_size);
  Buffer<U> kept(gradients ? num_blocks * kBlock<U> * strip : 0);
  Buffer<T> kept_scale(gradients && kFixed<U> ? num_blocks * strip : 0);
  Buffer<T> partial(2 * num_blocks * strip), partial_key(gradients ? num_blocks * strip * stride : 0);
  Buffer<T> pending(strip * stride), row_weight(strip), own_weight(gradients ? n : 0);
  Buffer<T> intra((2 + kTriangleGroups) * intra_size);
  Buffer<T> intra_key(symmetric && gradients ? (n / (kTriangleStrips * strip) + 1) * strip * stride : 0);
  T* const outside[2] = {static_cast<T*>(a.grad_anchor), static_cast<T*>(a.grad_positive)};
  // clang-format off
  const Problem<T, U> p{a, interruption, stride, strip, blocks_a_view, num_blocks, gradients, find_maximum, symmetric,
                        T(kLog2E / a.temperature),
                        {unit, unit + n * stride},
                        {across, across + across_size[0]}, {panel[0], panel[1]},
                        {in_place ? outside[0] : grad, in_place ? outside[1] : grad + grad_size},
                        kept, kept_scale, partial, partial + num_blocks * strip, partial_key, pending, row_weight,
                        own_weight, intra, intra + 2 * intra_size, intra + intra_size, intra_key};
  // clang-format on
  const S* const views[2] = {static_cast<const S*>(a.anchor), static_cast<const S*>(a.positive)};
  S* const outputs[2] = {static_cast<S*>(a.grad_anchor), static_cast<S*>(a.grad_positive)};

  const double operations = 12.0 * double(a.num_rows) * double(n) * double(a.dim);
  const int threads = useful_threads(a.num_threads, operations, kGrain);
  const int64_t scratch_size = Scratch<T, U>::size(p), factors_size = Scratch<T, U>::factors_size(p);
  Buffer<T> scratch(threads * scratch_size);
  Buffer<U> factors(threads * factors_size);
#pragma omp parallel num_threads(threads)
  {
    for (int view = 0; view < 2; ++view) {
#pragma omp for schedule(static)
      for (int64_t row = 0; row < n; ++row) {
        if (interruption.after(a.dim)) continue;
        normalize_row(views[view] + row * a.dim, a.dim, stride, p.unit[view] + row * stride);
        if (!gradients) continue;
        std::memset(p.grad[view] + row * stride, 0, stride * sizeof(T));
        p.own_weight[row] = T(0);
      }
    }
    for (int view = 0; view < 2; ++view) {
#pragma omp for schedule(static)
      for (int64_t one = 0; one < panels[view]; ++one) {
        if (!interruption.after(panel[view] * stride)) transpose_panel(p, view, one);
      }
    }
    const int thread = omp_get_thread_num();
    [[maybe_unused]] const std::conditional_t<kTiles<U>, TileShapes, int> shapes{};
    run_thread(p, Scratch<T, U>(p, scratch + thread * scratch_size, factors + thread * factors_size), thread,
               omp_get_num_threads());
#pragma omp barrier
    if (gradients) {
      for (int view = 0; view < 2; ++view) {
#pragma omp for schedule(static)
        for (int64_t row = 0; row < n; ++row) {
          if (!interruption.after(a.dim)) store_gradient(p, view, row, views, outputs[view]);
        }
      }
    }
  }
}

template <typename S>
bool all_finite(const S* x, int64_t size) {
  float sum = 0;  // of zeros and, if any, NaN
  for (int64_t k = 0; k < size; ++k) sum += float(to_float(x[k])) * 0.0f;
  return sum == 0;
}

template <typename T, typename S>
void run(const InfoNceArguments& a, Interruption& interruption) {
  if constexpr (std::is_same<T, float>::value) {
    const auto finite = [&](const void* x) { return all_finite(static_cast<const S*>(x), a.num_keys * a.dim); };
    const bool tiles = kHasTiles && a.bfloat16_products && bfloat16_tiles();
    // Fixed point has no NaN to answer with, and tiles are filled up with zeros, which NaN would spread over.
    if ((tiles || (kPairsAreFast && !a.highest_precision)) && finite(a.anchor) && finite(a.positive)) {
      if constexpr (kHasTiles) {
        if (tiles) return run_with<T, BFloat16, S>(a, interruption);
      }
      if constexpr (kPairsAreFast) return run_with<T, int16_t, S>(a, interruption);
    }
  }
  run_with<T, T, S>(a, interruption);
}

}  // namespace

void info_nce(const InfoNceArguments& a, Interruption& interruption) {
  if (a.num_rows == 0 && a.row_grad == nullptr) return;
  HELLM_BY_DTYPE(run, a, interruption)
}

}  // namespace hellm::cpu::HELLM_ISA
