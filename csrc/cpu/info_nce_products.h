// One call of the strip algorithm (info_nce.cpp), what a thread has for itself, and the three products that it is made of.
// Below the highest precision unit rows are held, and E and W multiplied, in 16 bits: in fixed point (fixed_point.h), or in
// bfloat16 where there are tiles for it (bfloat16_tiles.h). Exponentials and sums are float32.
#pragma once

#include "../info_nce.h"

#include <type_traits>

#include "bfloat16_tiles.h"
#include "fixed_point.h"
#include "interruption.h"
#include "simd.h"

namespace hellm::cpu::HELLM_ISA {
namespace {

// U is the type of the unit rows: T, int16_t in fixed point, or BFloat16.
template <typename U>
constexpr bool kFixed = std::is_same<U, int16_t>::value;
template <typename U>
constexpr bool kTiles = std::is_same<U, BFloat16>::value;
template <typename U>
constexpr bool k16Bit = kFixed<U> || kTiles<U>;

// Keys a block, whole tiles: its E stays in the second-level cache. Keys whose E is made at a time.
template <typename U>
constexpr int64_t kBlock = kTiles<U> ? 256 : 240;
template <typename U>
constexpr int64_t kKeys = kTiles<U> ? kTileDepth : kGroup;
// What strips and the columns of unit rows are a multiple of.
template <typename T, typename U>
constexpr int64_t kWhole = kTiles<U> ? kTileDepth : kLanes<T>;

template <typename T, typename U>
struct Problem {
  const InfoNceArguments& arguments;
  Interruption& interruption;
  int64_t stride;  // dim rounded up to whole vectors or tiles
  int64_t strip;   // rows a strip
  int64_t blocks_a_view, num_blocks;
  bool gradients, find_maximum;
  bool symmetric;      // the anchor's own view goes by triangles; only the positive view has blocks
  T exponent_scale;    // log2(e) / t
  U* unit[2];          // anchor, positive: [num_keys, stride]
  U* across[2];        // 16 bits: the units of each panel of keys transposed, [panels, stride, panel[view]]
  int64_t panel[2];    // keys a panel: those that row_side is given at a time
  T* grad[2];          // [num_keys, stride] each
  U* kept;             // with gradients, E transposed: [num_blocks, kBlock, strip]; fixed point: with its keys in pairs
  T* kept_scale;       // fixed point: [num_blocks, strip], which undoes that factor's scale and kUnit
  T* partial_sum;      // [num_blocks, strip]
  T* partial_maximum;  // [num_blocks, strip]
  T* partial_key;      // [num_blocks, strip, stride]: sum_j E_ij k_j of the block
  T* pending;          // [strip, stride]: row side of the gradient of this strip's anchors
  T* row_weight;       // [strip]: row_grad_i sigmoid_i
  T* own_weight;       // [num_keys]: sum of the row_weight of the rows whose own key it is
  T* intra_sum;        // [num_keys], symmetric: sum_j E_ij over the anchor's own view
  T* intra_part;       // [kTriangleGroups, num_keys], symmetric: what the groups of strips add to it
  T* coefficient;      // [num_keys], symmetric: c_i of the rows of finished strips
  T* intra_key;        // [num_keys / (kTriangleStrips strip), strip, stride], symmetric: sum_j W_ij u_j

  int64_t row(int64_t r) const { return arguments.rows ? arguments.rows[r] : r; }
  // Blocks run over the positive view first, then over the anchor view.
  int view(int64_t block) const { return block < blocks_a_view ? 1 : 0; }
  int64_t first_key(int64_t block) const { return (block % blocks_a_view) * kBlock<U>; }
  int64_t keys(int64_t block) const {
    const int64_t left = arguments.num_keys - first_key(block);
    return left < kBlock<U> ? left : kBlock<U>;
  }
};

template <typename T, typename U>
struct Scratch {    // of one thread
  U* query;         // [stride, strip]: unit anchors of the strip, transposed; 16 bits: [stride / 2, strip, 2]
  U* own;           // 16 bits: unit anchors of the strip, [strip / 2, stride, 2]
  U* packed;        // 16 bits: [kBlock, strip], weights as a factor
  U* by_rows;       // tiles: [kBlock, strip], weights as the left factor of key_side, where they are not kept
  U* own_weighted;  // tiles: c_i u_i, [strip / 2, stride, 2]
  T* shift;         // [strip], in units of the exponent
  T* coefficient;   // [strip]: c_i = row_grad_i sigmoid_i / sum_i
  T* weighted;      // floating point: [strip, stride], c_i u_i; fixed point: [strip], c_i times what undoes E's scale
  T* block;         // [kBlock, strip], where E is not kept as it is
  T* scale;         // fixed point: [strip], of the factor
  T* product;       // 16 bits: [stride, strip]
  T* unit_scale;    // fixed point: [strip], of the product of two units
  T* sum;           // fixed point: [strip], of the absolute weights of a right factor
  T* largest;       // fixed point: [strip], of them

  // Elements of the memory of each type.
  static int64_t size(const Problem<T, U>& p) { return p.strip * (6 + kBlock<U> + 2 * p.stride); }
  static int64_t factors_size(const Problem<T, U>& p) {
    const int64_t units = p.strip * p.stride, weights = kBlock<U> * p.strip;
    return kTiles<U> ? 3 * units + 2 * weights : kFixed<U> ? 2 * units + weights : units;
  }
  Scratch(const Problem<T, U>& p, T* memory, U* factors)
      : query(factors), own(query + (k16Bit<U> ? p.strip * p.stride : 0)),
        packed(own + (k16Bit<U> ? p.strip * p.stride : 0)), by_rows(packed + (kTiles<U> ? kBlock<U> * p.strip : 0)),
        own_weighted(by_rows + (kTiles<U> ? kBlock<U> * p.strip : 0)), shift(memory), coefficient(shift + p.strip),
        weighted(coefficient + p.strip), block(weighted + p.strip * p.stride), scale(block + kBlock<U> * p.strip),
        product(scale + p.strip), unit_scale(product + p.strip * p.stride), sum(unit_scale + p.strip),
        largest(sum + p.strip) {}
};

template <typename T, typename U>
inline T unit(U u) {
  if constexpr (kFixed<U>) return T(u) * T(1 / kUnit);
  else return T(to_float(u));
}

// The unit anchors of a strip, as the right factors of similarities and, in 16 bits, of key_side.
template <typename T, typename U>
void load_queries(const Problem<T, U>& p, int64_t start, int64_t count, const Scratch<T, U>& scratch) {
  constexpr int64_t step = k16Bit<U> ? 2 : 1;
  for (int64_t i = 0; i < p.strip; ++i) {
    const U* u = i < count ? p.unit[0] + p.row(start + i) * p.stride : nullptr;
    for (int64_t k = 0; k < p.stride; ++k) {
      const U value = u ? u[k] : U{0};
      scratch.query[(k / step * p.strip + i) * step + k % step] = value;
      if (k16Bit<U>) scratch.own[(i / 2 * p.stride + k) * 2 + i % 2] = value;
    }
  }
}

// s [keys, strip]: the strip's rows against `keys` rows of a view from `first` on, of which `following` come next.
template <typename T, typename U>
void similarities(const Problem<T, U>& p, int view, int64_t first, int64_t keys, int64_t following, int64_t start,
                  int64_t count, const Scratch<T, U>& scratch, T* s) {
  const U* const unit = p.unit[view] + first * p.stride;
  if constexpr (kFixed<U>) {
    fixed_multiply<false, false>(keys, p.strip, p.stride, unit, p.stride, scratch.query, p.strip, scratch.unit_scale, s,
                                 p.strip);
  } else if constexpr (kTiles<U>) {
    const int64_t next = following < kKeys<U> ? following : kKeys<U>;
    tile_multiply<false>(keys, p.strip, p.stride, unit, p.stride, scratch.query, p.strip, s, p.strip,
                         Ahead<false>(unit, keys, p.stride, next, p.stride));
  } else {
    multiply<false>(keys, p.strip, p.arguments.dim, unit, p.stride, 1, scratch.query, p.strip, s, p.strip, following);
  }
  // A row's own anchor is no negative, and its positive stands outside the sum.
  const bool all = p.arguments.rows == nullptr;
  const int64_t begin = all && first > start ? first - start : 0;
  const int64_t end = all && first + keys < start + count ? first + keys - start : count;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t own = p.row(start + i) - first;
    if (own >= 0 && own < keys) s[own * p.strip + i] = T(-1e30);
  }
}

// Weights in 16 bits, as key_side takes them. Fixed point: a right factor, pairs [keys / 2, strip, 2] and scale [strip];
// tiles: [keys, strip].
template <typename T, typename U>
struct Factor {
  U* weights;
  T* scale;
};

// Where tiles have the weights of a block's keys from `key` on; by_rows is of the block, or null if there are none.
template <typename T, typename U>
TileFactor<U> tile_factor(const Problem<T, U>& p, const Scratch<T, U>& scratch, U* by_rows, int64_t key) {
  if (!kTiles<U> || by_rows == nullptr) return {};
  return {scratch.packed + key * p.strip, by_rows + key * p.strip};
}

// out [strip, stride] (+)= sum_j w_ji k_j over `keys` keys of a view from `first` on; w [keys, strip]. In fixed point w,
// whose absolute sums over the keys are `sum` and largest scratch.largest, becomes `factor`; tiles have it in
// scratch.packed.
template <bool kAccumulate, typename T, typename U>
void row_side(const Problem<T, U>& p, int view, int64_t first, int64_t keys, const T* w, const T* sum,
              const Factor<T, U>& factor, const Scratch<T, U>& scratch, T* out) {
  if constexpr (kFixed<U>) {
    pack_weights(w, keys, p.strip, sum, scratch.largest, factor.weights, factor.scale);
    fixed_multiply<false, false>(p.stride, p.strip, keys, p.across[view] + first * p.stride, p.panel[view],
                                 factor.weights, p.strip, factor.scale, scratch.product, p.strip);
    transpose<kAccumulate>(scratch.product, p.stride, p.strip, out);
  } else if constexpr (kTiles<U>) {
    tile_multiply<false>(p.stride, p.strip, whole_tiles(keys), p.across[view] + first * p.stride, p.panel[view],
                         scratch.packed, p.strip, scratch.product, p.strip);
    transpose<kAccumulate>(scratch.product, p.stride, p.strip, out);
  } else {
    multiply<kAccumulate>(p.strip, p.stride, keys, w, 1, p.strip, p.unit[view] + first * p.stride, p.stride, out,
                          p.stride);
  }
}

// grad [keys, stride] += sum_i w_ji u_i over the strip's rows in fixed point; pack(key, group) makes the left factor of
// some keys, of which `next(key, group)` is fetched before.
template <typename T, typename U, typename Pack, typename Next>
void fixed_key_side(const Problem<T, U>& p, int64_t keys, const Scratch<T, U>& scratch, T* grad, Pack pack, Next next) {
  for (int64_t key = 0; key < keys; key += kGroup) {
    const int64_t left = keys - key, group = left < kGroup ? left : kGroup;
    const int64_t behind = left - group < kGroup ? left - group : kGroup;
    pack(key, group);
    fixed_multiply<true, true>(group, p.stride, p.strip, scratch.packed, p.strip, scratch.own, p.stride, scratch.scale,
                               grad + key * p.stride, p.stride, next(key + group, behind),
                               Ahead<true>(grad, key + group, p.stride, behind, p.stride));
  }
}

// grad [keys, stride] += sum_i weights_ji own_i over the strip's rows by tiles, weights [keys, strip].
template <typename T, typename U>
void tile_key_side(const Problem<T, U>& p, int64_t keys, const U* weights, const U* own, T* grad) {
  for (int64_t key = 0; key < keys; key += kKeys<U>) {
    const int64_t left = keys - key, group = left < kKeys<U> ? left : kKeys<U>;
    const int64_t behind = left - group < kKeys<U> ? left - group : kKeys<U>;
    tile_multiply<true>(group, p.stride, p.strip, weights + key * p.strip, p.strip, own, p.stride,
                        grad + key * p.stride, p.stride, Ahead<false>(weights, key + group, p.strip, behind, p.strip),
                        Ahead<true>(grad, key + group, p.stride, behind, p.stride));
  }
}

// grad [keys, stride] += sum_i c_i E_ij u_i over the strip's rows, of the E that is kept of a block.
template <typename T, typename U>
void kept_key_side(const Problem<T, U>& p, int64_t block, const Scratch<T, U>& scratch, T* grad) {
  const U* const kept = p.kept + block * kBlock<U> * p.strip;
  if constexpr (kFixed<U>) {
    const T* const scale = p.kept_scale + block * p.strip;
    for (int64_t i = 0; i < p.strip; ++i) scratch.weighted[i] = scratch.coefficient[i] * scale[i] * kUnit;
    const auto pack = [&](int64_t key, int64_t group) {
      repack_weight_rows(kept + key * p.strip, group, p.strip, scratch.weighted, scratch.block, scratch.packed,
                         scratch.scale);
    };
    const auto next = [&](int64_t key, int64_t group) {
      return Ahead<false>(kept, key / 2, 2 * p.strip, (group + 1) / 2, 2 * p.strip);
    };
    fixed_key_side(p, p.keys(block), scratch, grad, pack, next);
  } else if constexpr (kTiles<U>) {
    tile_key_side(p, p.keys(block), kept, scratch.own_weighted, grad);
  } else {
    multiply<true>(p.keys(block), p.stride, p.strip, kept, p.strip, 1, scratch.weighted, p.stride, grad, p.stride);
  }
}

// grad [keys, stride] += sum_i w_ji u_i over the strip's rows; w [keys, strip], which tiles have in scratch.by_rows.
template <typename T, typename U>
void key_side(const Problem<T, U>& p, int64_t keys, int64_t start, int64_t count, const T* w,
              const Scratch<T, U>& scratch, T* grad) {
  if constexpr (kFixed<U>) {
    const auto pack = [&](int64_t key, int64_t group) {
      pack_weight_rows(w + key * p.strip, group, p.strip, scratch.packed, scratch.scale);
    };
    const auto next = [](int64_t, int64_t) { return Ahead<false>(); };
    fixed_key_side(p, keys, scratch, grad, pack, next);
  } else if constexpr (kTiles<U>) {
    tile_key_side(p, keys, scratch.by_rows, scratch.own, grad);
  } else {
    multiply<true>(keys, p.stride, count, w, p.strip, 1, p.unit[0] + start * p.stride, p.stride, grad, p.stride);
  }
}

}  // namespace
}  // namespace hellm::cpu::HELLM_ISA
