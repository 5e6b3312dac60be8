// Softmax cross-entropy over a catalogue around two passes of attention, the target apart from the sum: tables to halves,
// losses and the side of hidden after the first, that of the items after the second.
#pragma once

#include "parameters.cuh"

namespace hellm {

// Two tables of rows as 16-bit operands of the tensor cores: each over a power of two of its own, which brings its
// largest entry to the top of the range of halves, so that rows of a 2^18th of its size still have float32 accuracy.
struct TableParameters {
  const void* x[2];          // [rows, dim]: hidden, items
  void *high[2], *low[2];    // Half [rows, width], zero padded; low or null: x = size (high + low)
  float* warp_maximum;       // [2, kMaximumWarps] of the finite entries
  float* size;               // [2]
  double* temperature;       // [1]: what makes similarities of halves logits, 1 / (size_0 size_1)
  unsigned* weight_maximum;  // [1]; set to 0
  int64 rows[2], dim;
  int storage;
};

constexpr int kMaximumWarps = 1024;  // of each table, to fill the processors

// One row of the cross-entropy, from what attention over the other items left.
struct ItemRowParameters {
  AttentionParameters attention;
  const void *hidden, *items;                 // [rows, dim], [num_items, dim]
  const int64* target;                        // [rows]
  const float* bias;                          // [num_items] or null
  const float* row_grad;                      // [rows] or null: loss only
  float* row_loss;                            // [rows]
  void* grad_hidden;                          // [rows, dim] or null
  float* weight;                              // [rows]: row_grad (1 - share of the target); null without a second pass
  float *key_scale, *key_bias, *key_maximum;  // [rows]
  const float* size;                          // [2]
  unsigned* weight_maximum;
  int64 rows, dim;
  int storage, blocks;  // blocks: of the attention kernel
};

struct ItemGradientParameters {
  AttentionParameters attention;  // of the second pass
  const void* hidden;             // [rows, dim]
  void* grad_items;               // [num_items, dim]
  float* grad_bias;               // [num_items] or null
  const float* weight;            // [rows]
  const float* size;              // [2]
  const int64* row_order;         // [rows] the rows by target
  const int64* row_begin;         // [num_items + 1] where those of an item begin
  int64 num_items, dim;
  int storage, blocks;
};

}  // namespace hellm

#if defined(__CUDACC__)
#include "attention_rows.cuh"

namespace hellm {

constexpr int kHalfExponent = 15;  // halves end below 2^16
constexpr int kLeastExponent = -100;

// 2^n of -126 <= n <= 127.
__device__ __forceinline__ float power_of_two(int n) { return __uint_as_float(unsigned(127 + n) << 23); }

// Every lane gets the largest size of the finite entries of every kMaximumWarps-th piece of 32.
__device__ __forceinline__ float largest_entry(const void* x, int storage, int64 count, int64 first) {
  constexpr int kStep = 32 * kMaximumWarps;
  float largest = 0;
#pragma unroll 1
  for (int64 i = first; i < count; i += 4 * kStep) {
    float size[4];  // four loads on their way at once
#pragma unroll
    for (int j = 0; j < 4; ++j) size[j] = i + j * kStep < count ? fabsf(load_one(x, storage, i + j * kStep)) : 0.0f;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if (size[j] < infinity()) largest = fmaxf(largest, size[j]);
    }
  }
  return warp_maximum(largest);
}

// Grid [kMaximumWarps / warps, 2]: a table for each blockIdx.y.
__global__ void __launch_bounds__(kRowThreads) table_maximum_kernel(const TableParameters p) {
  const int warp = int(blockIdx.x) * (kRowThreads / 32) + threadIdx.x / 32, table = blockIdx.y;
  const int64 count = (table ? p.rows[1] : p.rows[0]) * p.dim, first = warp * 32 + threadIdx.x % 32;
  const float largest = largest_entry(table ? p.x[1] : p.x[0], p.storage, count, first);
  if (threadIdx.x % 32 == 0) p.warp_maximum[table * kMaximumWarps + warp] = largest;
}

// One warp: the powers of two of both tables, and what goes with them.
__global__ void __launch_bounds__(32) table_size_kernel(const TableParameters p) {
  double product = 1;
#pragma unroll
  for (int table = 0; table < 2; ++table) {
    float largest = 0;
#pragma unroll 8
    for (int i = threadIdx.x; i < kMaximumWarps; i += 32) {
      largest = fmaxf(largest, p.warp_maximum[table * kMaximumWarps + i]);
    }
    const int exponent = int(__float_as_uint(warp_maximum(largest)) >> 23) - 126;  // every entry is less than 2 to this
    const float size = power_of_two((exponent < kLeastExponent ? kLeastExponent : exponent) - kHalfExponent);
    product *= double(size);
    if (threadIdx.x == 0) p.size[table] = size;
  }
  if (threadIdx.x != 0) return;
  *p.temperature = 1.0 / product;
  *p.weight_maximum = 0;
}

// Grid [ceil(rows / warps), 2]: a table for each blockIdx.y.
template <int kWidth>
__global__ void __launch_bounds__(kRowThreads) table_halves_kernel(const TableParameters p) {
  const int64 row = int64(blockIdx.x) * (kRowThreads / 32) + threadIdx.x / 32;
  const int table = blockIdx.y;
  if (row >= (table ? p.rows[1] : p.rows[0])) return;
  float x[kWidth / 32];
  load_row(table ? p.x[1] : p.x[0], p.storage, row, p.dim, 1.0f / p.size[table], x);  // a power of two
  store_halves(table ? p.high[1] : p.high[0], table ? p.low[1] : p.low[0], row, x);
}

// Grid [ceil(rows / warps)], after the first pass. Up to 80 registers: left to itself the compiler takes 32 and spills.
template <int kWidth>
__global__ void __launch_bounds__(kRowThreads, 6) item_row_kernel(const ItemRowParameters p) {
  constexpr int kColumns = kWidth / 32;
  const int64 r = int64(blockIdx.x) * (kRowThreads / 32) + threadIdx.x / 32;
  if (r >= p.rows) return;
  const AttentionParameters& a = p.attention;
  // Nobody looked at the targets on the host: a row whose item does not exist has no loss.
  const bool exists = p.target[r] >= 0 && p.target[r] < a.keys;
  const int64 target = exists ? p.target[r] : 0;
  const int lane = threadIdx.x % 32;
  SoftmaxRow<kColumns> row;
  row.collect(a, p.blocks, r, p.grad_hidden);
  float hidden[kColumns], item[kColumns];
  load_row(p.hidden, p.storage, r, p.dim, 1.0f, hidden);
  load_row(p.items, p.storage, target, p.dim, 1.0f, item);
  const float aligned = exists ? dot(hidden, item) + (p.bias ? p.bias[target] : 0.0f) : not_a_number();
  // No other item: the loss is 0 and so is its gradient. Not a number stays one.
  const bool none = exists && row.sum == 0;
  const float margin = row.lse() * kLn2 - aligned;
  if (lane == 0) p.row_loss[r] = none ? 0.0f : softplus(margin);
  if (!p.row_grad) return;

  const float weight = none ? 0.0f : p.row_grad[r] / (1.0f + expf(-margin));
  if (p.grad_hidden) {
    const float factor = none ? 0.0f : p.size[1] / row.sum;
#pragma unroll
    for (int i = 0; i < kColumns; ++i) {
      if (lane + 32 * i >= p.dim) continue;
      const float value[1] = {weight * (row.mean[i] * factor - item[i])};
      store_any(p.grad_hidden, p.storage, r * p.dim + lane + 32 * i, value);
    }
  }
  if (!p.weight) return;
  if (lane != 0) return;
  p.weight[r] = weight;
  p.key_scale[r] = copysignf(kLog2E / float(*a.temperature), weight);
  p.key_bias[r] = weight == 0 ? -infinity() : log2f(fabsf(weight)) - (log2f(row.sum) - kWeightShift);
  p.key_maximum[r] = none ? 0.0f : row.top;
  atomicMax(p.weight_maximum, __float_as_uint(fabsf(weight)));  // of integers: the same in any order
}

// Grid [ceil(num_items / warps)]: what the rows take from an item, less what those that aim at it give. Up to 64
// registers, as above.
template <int kWidth>
__global__ void __launch_bounds__(kRowThreads, 8) item_gradient_kernel(const ItemGradientParameters p) {
  constexpr int kColumns = kWidth / 32;
  const int64 item = int64(blockIdx.x) * (kRowThreads / 32) + threadIdx.x / 32;
  const bool exists = item < p.num_items;
  const AttentionParameters& a = p.attention;
  const int lane = threadIdx.x % 32;
  float own[kColumns + 1] = {};  // of the rows that aim at the item: weighted sum, and sum of their weights
  const int64 begin = exists ? p.row_begin[item] : 0, end = exists ? p.row_begin[item + 1] : 0;
  sum_lists(begin, end, own, [&](int64 n, float (&sum)[kColumns + 1]) {
    const int64 r = p.row_order[n];
    const float weight = p.weight[r];
    float hidden[kColumns];
    load_row(p.hidden, p.storage, r, p.dim, weight, hidden);
#pragma unroll
    for (int i = 0; i < kColumns; ++i) sum[i] += hidden[i];
    sum[kColumns] += weight;
  });
  if (!exists) return;
  float g[kColumns], total = 0;
  collect_sum(a, p.blocks, 0, item, g, &total);
  const float unit = __uint_as_float(*a.weight_maximum) * exp2f(-kWeightShift), size = p.size[0];
#pragma unroll
  for (int i = 0; i < kColumns; ++i) {
    if (lane + 32 * i >= p.dim) continue;
    const float value[1] = {g[i] * unit * size - own[i]};
    store_any(p.grad_items, p.storage, item * p.dim + lane + 32 * i, value);
  }
  if (p.grad_bias && lane == 0) p.grad_bias[item] = total * unit - own[kColumns];
}

}  // namespace hellm
#endif

#if defined(HELLM_KERNELS)
// item_cross_entropy for each width of the operands; kParts 2 is float32 accuracy.
HELLM_KERNELS(HELLM_KERNEL(table_maximum_kernel),
              HELLM_KERNEL(table_size_kernel),
              HELLM_KERNEL(table_halves_kernel<64>),
              HELLM_KERNEL(table_halves_kernel<128>),
              HELLM_KERNEL(table_halves_kernel<256>),
              HELLM_KERNEL(attention_kernel<64, 1, kRunningBiased, false>),
              HELLM_KERNEL(attention_kernel<64, 1, kRunningBiased, true>),
              HELLM_KERNEL(attention_kernel<64, 1, kByKeyBiased, true>),
              HELLM_KERNEL(attention_kernel<64, 2, kRunningBiased, false>),
              HELLM_KERNEL(attention_kernel<64, 2, kRunningBiased, true>),
              HELLM_KERNEL(attention_kernel<64, 2, kByKeyBiased, true>),
              HELLM_KERNEL(attention_kernel<128, 1, kRunningBiased, false>),
              HELLM_KERNEL(attention_kernel<128, 1, kRunningBiased, true>),
              HELLM_KERNEL(attention_kernel<128, 1, kByKeyBiased, true>),
              HELLM_KERNEL(attention_kernel<128, 2, kRunningBiased, false>),
              HELLM_KERNEL(attention_kernel<128, 2, kRunningBiased, true>),
              HELLM_KERNEL(attention_kernel<128, 2, kByKeyBiased, true>),
              HELLM_KERNEL(attention_kernel<256, 1, kRunningBiased, false>),
              HELLM_KERNEL(attention_kernel<256, 1, kRunningBiased, true>),
              HELLM_KERNEL(attention_kernel<256, 1, kByKeyBiased, true>),
              HELLM_KERNEL(item_row_kernel<64>),
              HELLM_KERNEL(item_row_kernel<128>),
              HELLM_KERNEL(item_row_kernel<256>),
              HELLM_KERNEL(item_gradient_kernel<64>),
              HELLM_KERNEL(item_gradient_kernel<128>),
              HELLM_KERNEL(item_gradient_kernel<256>))
#endif
