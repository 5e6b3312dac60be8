// Convolution as two gathers a layer. A row of the output is summed by one thread in the stored order of its entries.
#include "../hypergraph_conv.h"

#include <omp.h>

#include "interruption.h"
#include "simd.h"

namespace hellm::cpu::HELLM_ISA {
namespace {

constexpr int64_t kPrefetch = 24;  // neighbours ahead
constexpr int kChunksAThread = 8;
constexpr int64_t kPieceRows = 64, kPieceEntries = 1 << 16;  // between two questions whether to end
constexpr double kGrain = 5e5;                               // operations a thread and gather

// out_r = out_scale_r * sum_c value_rc in_scale_c x_c + (self_scale_r or self_constant) * self_r. Null scales are ones;
// there is no self term where `self` is null, and then no self_scale.
template <typename A>
struct Factors {
  const A *values, *in_scale, *out_scale, *self_scale;
  A self_constant;
  bool is_result;  // the output is what the operator gives, and is not gathered from
  A scale(int64_t row) const { return out_scale ? out_scale[row] : A(1); }
  A own(int64_t row) const { return self_scale ? self_scale[row] : self_constant; }
};

// One row of the output, or a panel of its columns.
template <typename A, typename X, typename Self, typename Out>
struct Row {
  const int32_t* index;  // [count]
  const A* values;       // [count] or null
  int64_t count, dim;
  int64_t ahead;  // last entry that may be prefetched, of this row or a later one; counted from `index`
  const A* in_scale;
  const X* x;
  const Self* self;  // or null
  Out* out;
  A out_scale, self_scale;
  bool streamed;
  Interruption& interruption;

  A weight(int64_t n) const { return (values ? values[n] : A(1)) * (in_scale ? in_scale[index[n]] : A(1)); }
};

// End of the piece of a row's entries that begins at `begin`; the same where there is nothing more to do.
template <typename A, typename X, typename Self, typename Out>
inline int64_t piece_end(const Row<A, X, Self, Out>& row, int64_t begin) {
  if (row.count - begin <= kPieceEntries) return row.count;
  return row.interruption.after(kPieceEntries * kLanes<A>) ? begin : begin + kPieceEntries;
}

template <int kVectors, bool kWeighted, typename A, typename X, typename Self, typename Out>
inline __attribute__((always_inline)) void gather_panel(const Row<A, X, Self, Out>& row, int64_t column) {
  constexpr int kWidth = kLanes<A>;
  Vector<A> sum[kVectors] = {};
  for (int64_t n = 0, end = piece_end(row, 0); n < end; end = piece_end(row, end))
    for (; n < end; ++n) {
      // Past the end of the row too: rows are short, and the next one's neighbours are wanted soon.
      const X* ahead = row.x + row.index[n + kPrefetch < row.ahead ? n + kPrefetch : row.ahead] * row.dim + column;
#pragma GCC unroll 8
      for (int line = 0; line < kVectors * kWidth * int(sizeof(X)); line += 64)
        __builtin_prefetch(reinterpret_cast<const char*>(ahead) + line);
      const X* source = row.x + row.index[n] * row.dim + column;
      if (kWeighted) {
        const A weight = row.weight(n);
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) sum[v] += weight * load_as<A>(source + v * kWidth);
      } else {
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) sum[v] += load_as<A>(source + v * kWidth);
      }
    }
#pragma GCC unroll 8
  for (int v = 0; v < kVectors; ++v) {
    Vector<A> value = sum[v] * row.out_scale;
    if (row.self) value += row.self_scale * load_as<A>(row.self + column + v * kWidth);
    if constexpr (std::is_same<A, Out>::value) {
      if (row.streamed) {
        stream(row.out + column + v * kWidth, value);
        continue;
      }
    }
    store_as<A>(row.out + column + v * kWidth, value);
  }
}

template <typename A, typename X, typename Self, typename Out>
inline void gather_element(const Row<A, X, Self, Out>& row, int64_t column) {
  A sum = 0;
  for (int64_t n = 0, end = piece_end(row, 0); n < end; end = piece_end(row, end)) {
    for (; n < end; ++n) sum += row.weight(n) * A(to_float(row.x[row.index[n] * row.dim + column]));
  }
  sum *= row.out_scale;
  if (row.self) sum += row.self_scale * A(to_float(row.self[column]));
  from_float(sum, row.out[column]);
}

template <bool kWeighted, typename A, typename X, typename Self, typename Out>
void gather_row(const Row<A, X, Self, Out>& row) {
  constexpr int kWidth = kLanes<A>;
  int64_t column = 0;
  for (; column + 8 * kWidth <= row.dim; column += 8 * kWidth) gather_panel<8, kWeighted>(row, column);
  for (; column + 4 * kWidth <= row.dim; column += 4 * kWidth) gather_panel<4, kWeighted>(row, column);
  for (; column + kWidth <= row.dim; column += kWidth) gather_panel<1, kWeighted>(row, column);
  for (; column < row.dim; ++column) gather_element(row, column);
}

// First row of a chunk, so that chunks hold about equally many rows plus entries.
inline int64_t chunk_begin(const int64_t* indptr, int64_t rows, int64_t chunk, int64_t chunks) {
  if (chunk == chunks) return rows;
  const int64_t target = (rows + indptr[rows]) * chunk / chunks;
  int64_t low = 0, high = rows;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (middle + indptr[middle] < target) low = middle + 1;
    else high = middle;
  }
  return low;
}

// Inside a parallel region; ends with its barrier.
template <typename A, typename X, typename Self, typename Out>
void gather(const Csr& matrix, int64_t rows, int64_t dim, const X* x, const Self* self, Out* out, const Factors<A>& f,
            Interruption& interruption) {
  const int64_t chunks = int64_t(omp_get_num_threads()) * kChunksAThread;
  const bool streamed = f.is_result && is_streamed(out, rows * dim, dim);
#pragma omp for schedule(dynamic, 1)
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    const int64_t end = chunk_begin(matrix.indptr, rows, chunk + 1, chunks);
    const int64_t last = matrix.indptr[end] - 1;
    for (int64_t r = chunk_begin(matrix.indptr, rows, chunk, chunks); r < end;) {
      const int64_t piece = end - r < kPieceRows ? end : r + kPieceRows;
      if (interruption.after((matrix.indptr[piece] - matrix.indptr[r] + piece - r) * (dim + 1))) break;
      for (; r < piece; ++r) {
        const int64_t first = matrix.indptr[r];
        // clang-format off
        const Row<A, X, Self, Out> row{matrix.indices + first, f.values ? f.values + first : nullptr,
                                       matrix.indptr[r + 1] - first, dim, last - first, f.in_scale, x,
                                       self ? self + r * dim : nullptr, out + r * dim, f.scale(r), f.own(r),
                                       streamed, interruption};
        // clang-format on
        if (f.values || f.in_scale) gather_row<true>(row);
        else gather_row<false>(row);
      }
    }
    if (streamed) end_stream();
  }
}

inline int gather_threads(int requested, const Csr& matrix, int64_t rows, int64_t dim) {
  return useful_threads(requested, 2.0 * double(matrix.indptr[rows] + rows) * double(dim), kGrain);
}

template <typename A, typename S>
void run_product(const IncidenceProductArguments& a, Interruption& interruption) {
  const Factors<A> plain{static_cast<const A*>(a.matrix.values), nullptr, nullptr, nullptr, A(0), true};
  const int threads = gather_threads(a.num_threads, a.matrix, a.rows, a.dim);
#pragma omp parallel num_threads(threads)
  gather(a.matrix, a.rows, a.dim, static_cast<const S*>(a.x), static_cast<const S*>(nullptr), static_cast<S*>(a.out),
         plain, interruption);
}

template <typename A, typename S>
void run_conv(const HypergraphConvArguments& a, Interruption& interruption) {
  const A *in_scale = static_cast<const A*>(a.in_scale), *out_scale = static_cast<const A*>(a.out_scale);
  const A* const diagonal = static_cast<const A*>(a.diagonal);
  const int64_t n = a.num_vertices, m = a.num_hyperedges;
  Buffer<A> self_scale(diagonal ? n : 0);
  for (int64_t v = 0; diagonal && v < n; ++v) {
    self_scale[v] = -diagonal[v] * (in_scale ? in_scale[v] : A(1)) * (out_scale ? out_scale[v] : A(1));
  }
  const Factors<A> join{
      static_cast<const A*>(a.edge.values), in_scale, static_cast<const A*>(a.edge_scale), nullptr, A(0), false};

  const S* const x = static_cast<const S*>(a.x);
  S* const out = static_cast<S*>(a.out);
  A* const edges = static_cast<A*>(a.workspace);
  A* const layer = edges + m * a.dim;  // each row of it is replaced only after its own old value was read
  const auto self = [&](auto* rows) { return diagonal ? rows : nullptr; };
  const A* const none = nullptr;
  const int threads = gather_threads(a.num_threads, a.vertex, n, a.dim);
#pragma omp parallel num_threads(threads)
  for (int l = 0; l < a.num_layers; ++l) {
    const bool first = l == 0, last = l + 1 == a.num_layers;
    const Factors<A> spread{static_cast<const A*>(a.vertex.values),
                            nullptr,
                            out_scale,
                            diagonal ? static_cast<const A*>(self_scale) : nullptr,
                            A(0),
                            last};
    const A* const from = layer;
    if (first) gather(a.edge, m, a.dim, x, none, edges, join, interruption);
    else gather(a.edge, m, a.dim, from, none, edges, join, interruption);
    const A* const joined = edges;
    if (first && last) gather(a.vertex, n, a.dim, joined, self(x), out, spread, interruption);
    else if (first) gather(a.vertex, n, a.dim, joined, self(x), layer, spread, interruption);
    else if (last) gather(a.vertex, n, a.dim, joined, self(from), out, spread, interruption);
    else gather(a.vertex, n, a.dim, joined, self(from), layer, spread, interruption);
  }
}

// Horner's scheme: L times h <- x + A h gives the sum of layers 0..L, with one table to carry instead of two.
template <typename A, typename S>
void run_propagate(const BipartitePropagateArguments& a, Interruption& interruption) {
  const A *user_scale = static_cast<const A*>(a.user_scale), *item_scale = static_cast<const A*>(a.item_scale);
  const S *user_x = static_cast<const S*>(a.user_x), *item_x = static_cast<const S*>(a.item_x);
  S *user_out = static_cast<S*>(a.user_out), *item_out = static_cast<S*>(a.item_out);
  const int64_t nu = a.num_users, ni = a.num_items;
  A* const tables[2] = {static_cast<A*>(a.workspace), static_cast<A*>(a.workspace) + (nu + ni) * a.dim};
  // The last layer divides by the number of layers: its scales carry the factor.
  const A mean = A(1) / A(a.num_layers + 1);
  Buffer<A> last_scale(nu + ni);
  for (int64_t u = 0; u < nu; ++u) last_scale[u] = user_scale[u] * mean;
  for (int64_t i = 0; i < ni; ++i) last_scale[nu + i] = item_scale[i] * mean;
  const int threads = gather_threads(a.num_threads, a.user, nu, a.dim);
#pragma omp parallel num_threads(threads)
  for (int l = 0; l < a.num_layers; ++l) {
    const bool first = l == 0, last = l + 1 == a.num_layers;
    const Factors<A> to_user{nullptr, item_scale, last ? last_scale : user_scale, nullptr, last ? mean : A(1), last};
    const Factors<A> to_item{nullptr, user_scale,         last ? last_scale + nu : item_scale,
                             nullptr, last ? mean : A(1), last};
    const A *user_h = tables[l % 2], *item_h = user_h + nu * a.dim;
    A *user_next = tables[(l + 1) % 2], *item_next = user_next + nu * a.dim;
    const auto layer = [&](const auto* users, const auto* items, auto* to_users, auto* to_items) {
      gather(a.user, nu, a.dim, items, user_x, to_users, to_user, interruption);
      gather(a.item, ni, a.dim, users, item_x, to_items, to_item, interruption);
    };
    if (first && last) layer(user_x, item_x, user_out, item_out);
    else if (first) layer(user_x, item_x, user_next, item_next);
    else if (last) layer(user_h, item_h, user_out, item_out);
    else layer(user_h, item_h, user_next, item_next);
  }
}

}  // namespace

void incidence_product(const IncidenceProductArguments& a, Interruption& interruption) {
  HELLM_BY_DTYPE(run_product, a, interruption)
}
void hypergraph_conv(const HypergraphConvArguments& a, Interruption& interruption) {
  HELLM_BY_DTYPE(run_conv, a, interruption)
}
void bipartite_propagate(const BipartitePropagateArguments& a, Interruption& interruption) {
  HELLM_BY_DTYPE(run_propagate, a, interruption)
}

}  // namespace hellm::cpu::HELLM_ISA
