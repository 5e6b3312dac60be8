// InfoNCE around two passes of attention: rows to the unit sphere, losses after the first, gradients after the second.
#pragma once

#include "parameters.cuh"

namespace hellm {

// The rows of a view on the unit sphere, as 16-bit operands of the tensor cores.
struct NormalizeParameters {
  const void* x[2];          // [rows, dim]: anchor, positive
  void* high;                // Half [2, rows, width], zero padded
  void* low;                 // Half [2, rows, width] or null: what `high` rounds away
  float* inverse_norm;       // [2, rows]; 0 for a row that is all zero
  unsigned* weight_maximum;  // [1]; set to 0
  int64 rows, dim;
  int width, storage;
};

// One row of the loss, from what attention over its negatives left.
struct RowParameters {
  AttentionParameters attention;
  const void *anchor, *positive;  // [num_keys, dim]
  const float* inverse_norm;      // [2, num_keys]
  const float* row_grad;          // [rows] or null: loss only
  float *row_loss, *row_slope;    // [rows]
  float* weight;                  // [rows]: row_grad sigmoid
  float *key_scale, *key_bias;    // [rows]
  unsigned* weight_maximum;
  int64 num_keys, rows, dim;
  int storage, blocks;  // blocks: of the attention kernel
};

struct GradientParameters {
  AttentionParameters attention;  // of the second pass
  const void* x[2];               // [num_keys, dim]: anchor, positive
  void* grad[2];                  // [num_keys, dim]
  const float* inverse_norm;      // [2, num_keys]
  const float* row_out;           // [rows, width]: weight (mean key - positive)
  const float* weight;            // [rows]
  const int64* row_order;         // [rows] the rows of the loss by key, or null: row i belongs to key i
  const int64* row_begin;         // [num_keys + 1] where those of a key begin
  int64 num_keys, dim;
  int storage, blocks, intra_view_negatives;
};

}  // namespace hellm

#if defined(__CUDACC__)
#include "attention_rows.cuh"

namespace hellm {

constexpr float kLargestInverse = 3e38f;  // rows whose length is no normal float32 number count as longer

// Grid [ceil(rows / warps), 2]: a view for each blockIdx.y.
template <int kWidth>
__global__ void __launch_bounds__(kRowThreads) normalize_kernel(const NormalizeParameters p) {
  const int64 row = int64(blockIdx.x) * (kRowThreads / 32) + threadIdx.x / 32, view = blockIdx.y;
  if (row == 0 && view == 0 && threadIdx.x == 0) *p.weight_maximum = 0;
  if (row >= p.rows) return;
  float x[kWidth / 32];
  load_row(view ? p.x[1] : p.x[0], p.storage, row, p.dim, 1.0f, x);
  // In double: the squares of float32 numbers below 1e-19 or above 1e19 are no float32 numbers.
  double square = 0;
#pragma unroll
  for (int i = 0; i < kWidth / 32; ++i) square += double(x[i]) * double(x[i]);
  const double norm = sqrt(warp_sum(square));
  const float inverse = norm > 1 / kLargestInverse ? float(1 / norm) : norm > 0 ? kLargestInverse : float(norm);
#pragma unroll
  for (int i = 0; i < kWidth / 32; ++i) x[i] *= inverse;
  store_halves(p.high, p.low, view * p.rows + row, x);
  if (threadIdx.x % 32 == 0) p.inverse_norm[view * p.rows + row] = inverse;
}

// Grid [ceil(rows / warps)], after the first pass: loss, its weight and slope, and the row's scale and bias as a key.
template <int kWidth>
__global__ void __launch_bounds__(kRowThreads) info_nce_row_kernel(const RowParameters p) {
  constexpr int kColumns = kWidth / 32;
  const int64 r = int64(blockIdx.x) * (kRowThreads / 32) + threadIdx.x / 32;
  if (r >= p.rows) return;
  const AttentionParameters& a = p.attention;
  const int64 chosen = a.query_rows ? a.query_rows[r] : r;
  // Nobody looked at the rows on the host: one that does not exist has no loss.
  const bool exists = chosen >= 0 && chosen < p.num_keys;
  const int64 key = exists ? chosen : 0;
  const int lane = threadIdx.x % 32;

  SoftmaxRow<kColumns> row;
  row.collect(a, p.blocks, r, p.row_grad);
  float u[kColumns], v[kColumns];
  load_row(p.anchor, p.storage, key, p.dim, p.inverse_norm[key], u);
  load_row(p.positive, p.storage, key, p.dim, p.inverse_norm[p.num_keys + key], v);
  const float aligned = exists ? dot(u, v) : not_a_number(), temperature = float(*a.temperature);
  // No negatives: the loss is 0 and so is its slope. Not a number stays one.
  const bool none = exists && !(row.sum > 0);
  const float lse = none ? 0.0f : row.lse();
  const float margin = lse * kLn2 - aligned / temperature;
  if (lane == 0) {
    p.row_loss[r] = none ? (row.sum == 0 ? 0.0f : row.sum) : softplus(margin);
  }
  if (!p.row_grad) return;

  const float weight = none ? 0.0f : p.row_grad[r] / (1.0f + expf(-margin));
  const float inverse = none ? 0.0f : 1.0f / row.sum;
#pragma unroll
  for (int i = 0; i < kColumns; ++i) row.mean[i] *= inverse;
  const float towards = dot(row.mean, u);
#pragma unroll
  for (int i = 0; i < kColumns; ++i) {
    a.out[0][r * kWidth + lane + 32 * i] = weight * (row.mean[i] - v[i]);
  }
  if (lane != 0) return;
  p.row_slope[r] = weight * (towards - aligned);
  p.weight[r] = weight;
  p.key_scale[r] = copysignf(kLog2E / temperature, weight);
  p.key_bias[r] = weight == 0 ? -infinity() : log2f(fabsf(weight)) - lse;
  atomicMax(p.weight_maximum, __float_as_uint(fabsf(weight)));  // of integers: the same in any order
}

// Grid [ceil(num_keys / warps), 2]: grad_z = (g - <g, z> z) / (t |z|) with g the gradient in the unit row z.
template <int kWidth>
__global__ void __launch_bounds__(kRowThreads) info_nce_gradient_kernel(const GradientParameters p) {
  constexpr int kColumns = kWidth / 32;
  const int64 key = int64(blockIdx.x) * (kRowThreads / 32) + threadIdx.x / 32;
  const bool exists = key < p.num_keys;
  const int view = blockIdx.y, lane = threadIdx.x % 32;
  const AttentionParameters& a = p.attention;

  // Of the rows of the loss that have this key as their own: sum of row_out, or of their weights.
  float own[kColumns] = {};
  const int64 begin = !exists ? 0 : p.row_order ? p.row_begin[key] : key;
  const int64 end = !exists ? 0 : p.row_order ? p.row_begin[key + 1] : key + 1;
  sum_lists(begin, end, own, [&](int64 n, float (&sum)[kColumns]) {
    const int64 r = p.row_order ? p.row_order[n] : n;
    if (view == 1) {
      sum[0] += p.weight[r];
      return;
    }
#pragma unroll
    for (int i = 0; i < kColumns; ++i) sum[i] += p.row_out[r * kWidth + lane + 32 * i];
  });
  if (!exists) return;

  float g[kColumns] = {};
  if (view == 1 || p.intra_view_negatives) {
    const int query_view = p.intra_view_negatives ? view : 0;
    collect_sum(a, p.blocks, query_view, key, g);
    const float unit = __uint_as_float(*a.weight_maximum) * exp2f(-kWeightShift);
#pragma unroll
    for (int i = 0; i < kColumns; ++i) g[i] *= unit;
  }
  float u[kColumns], z[kColumns];
  load_row(p.x[0], p.storage, key, p.dim, p.inverse_norm[key], u);
  const float inverse_norm = p.inverse_norm[view * p.num_keys + key];
  load_row(view ? p.x[1] : p.x[0], p.storage, key, p.dim, inverse_norm, z);
#pragma unroll
  for (int i = 0; i < kColumns; ++i) g[i] += view == 0 ? own[i] : -own[0] * u[i];
  const float along = dot(g, z), factor = inverse_norm / float(*a.temperature);
#pragma unroll
  for (int i = 0; i < kColumns; ++i) {
    if (lane + 32 * i >= p.dim) continue;
    const float value[1] = {(g[i] - along * z[i]) * factor};
    store_any(view ? p.grad[1] : p.grad[0], p.storage, key * p.dim + lane + 32 * i, value);
  }
}

}  // namespace hellm
#endif

#if defined(HELLM_KERNELS)
// InfoNCE for each width of the operands; kParts 2 is float32 accuracy.
HELLM_KERNELS(HELLM_KERNEL(normalize_kernel<64>),
              HELLM_KERNEL(normalize_kernel<128>),
              HELLM_KERNEL(normalize_kernel<256>),
              HELLM_KERNEL(attention_kernel<64, 1, kRunning, false>),
              HELLM_KERNEL(attention_kernel<64, 1, kRunning, true>),
              HELLM_KERNEL(attention_kernel<64, 1, kByKey, true>),
              HELLM_KERNEL(attention_kernel<64, 2, kRunning, false>),
              HELLM_KERNEL(attention_kernel<64, 2, kRunning, true>),
              HELLM_KERNEL(attention_kernel<64, 2, kByKey, true>),
              HELLM_KERNEL(attention_kernel<128, 1, kRunning, false>),
              HELLM_KERNEL(attention_kernel<128, 1, kRunning, true>),
              HELLM_KERNEL(attention_kernel<128, 1, kByKey, true>),
              HELLM_KERNEL(attention_kernel<128, 2, kRunning, false>),
              HELLM_KERNEL(attention_kernel<128, 2, kRunning, true>),
              HELLM_KERNEL(attention_kernel<128, 2, kByKey, true>),
              HELLM_KERNEL(attention_kernel<256, 1, kRunning, false>),
              HELLM_KERNEL(attention_kernel<256, 1, kRunning, true>),
              HELLM_KERNEL(attention_kernel<256, 1, kByKey, true>),
              HELLM_KERNEL(info_nce_row_kernel<64>),
              HELLM_KERNEL(info_nce_row_kernel<128>),
              HELLM_KERNEL(info_nce_row_kernel<256>),
              HELLM_KERNEL(info_nce_gradient_kernel<64>),
              HELLM_KERNEL(info_nce_gradient_kernel<128>),
              HELLM_KERNEL(info_nce_gradient_kernel<256>))
#endif
