// InfoNCE around two passes of attention: rows to the unit sphere, losses after the first, gradients after the second.
// A warp has one row; lane l its columns l, l + 32, ...
#pragma once

#include "attention.cuh"

namespace hellm {

// Columns of a row, zero beyond dim.
template <int kColumns>
__device__ __forceinline__ void load_row(const void* x, int storage, int64 row, int64 dim, float factor,
                                         float (&value)[kColumns]) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int i = 0; i < kColumns; ++i) {
    value[i] = lane + 32 * i < dim ? load_one(x, storage, row * dim + lane + 32 * i) * factor : 0.0f;
  }
}

template <int kColumns>
__device__ __forceinline__ float dot(const float (&a)[kColumns], const float (&b)[kColumns]) {
  float sum = 0;
#pragma unroll
  for (int i = 0; i < kColumns; ++i) sum += a[i] * b[i];
  return warp_sum(sum);
}

template <int kColumns>
__device__ __forceinline__ void store_halves(void* high, void* low, int64 row, const float (&value)[kColumns]) {
  const int64 first = row * (32 * kColumns) + threadIdx.x % 32;
#pragma unroll
  for (int i = 0; i < kColumns; ++i) {
    Half top, rest;
    narrow(value[i], top);
    static_cast<Half*>(high)[first + 32 * i] = top;
    if (!low) continue;
    narrow(value[i] - widen<float>(top), rest);
    static_cast<Half*>(low)[first + 32 * i] = rest;
  }
}

// Grid [ceil(rows / warps), 2]: a view for each blockIdx.y.
template <int kWidth>
__global__ void __launch_bounds__(kRowThreads) normalize_kernel(const NormalizeParameters p) {
  const int64 row = int64(blockIdx.x) * (kRowThreads / 32) + threadIdx.x / 32, view = blockIdx.y;
  if (row == 0 && view == 0 && threadIdx.x == 0) *p.weight_maximum = 0;
  if (row >= p.rows) return;
  float x[kWidth / 32];
  load_row(view ? p.x[1] : p.x[0], p.storage, row, p.dim, 1.0f, x);
  const float norm = sqrtf(dot(x, x)), inverse = norm > 0 ? 1.0f / norm : norm == 0 ? 0.0f : norm;
#pragma unroll
  for (int i = 0; i < kWidth / 32; ++i) x[i] *= inverse;
  store_halves(p.high, p.low, view * p.rows + row, x);
  if (threadIdx.x % 32 == 0) p.inverse_norm[view * p.rows + row] = inverse;
}

// Grid [ceil(rows / warps)], after the first pass: loss, its weight and slope, and the row as a key of the second pass.
template <int kWidth>
__global__ void __launch_bounds__(kRowThreads) info_nce_row_kernel(const RowParameters p) {
  constexpr int kColumns = kWidth / 32;
  const int64 r = int64(blockIdx.x) * (kRowThreads / 32) + threadIdx.x / 32;
  if (r >= p.rows) return;
  const AttentionParameters& a = p.attention;
  const int64 key = a.query_rows ? a.query_rows[r] : r;
  const int lane = threadIdx.x % 32;
  const RowPieces pieces(a, p.blocks, 0, r);

  float top = pieces.whole() ? a.maximum[r] : -infinity(), sum = pieces.whole() ? a.sum[r] : 0.0f;
  for (int64 b = pieces.first; b <= pieces.last && !pieces.whole(); ++b) {
    top = fmaxf(top, a.slot_maximum[pieces.place(a, b)]);
  }
  float mean[kColumns] = {};
  if (pieces.whole() && p.row_grad) load_row(a.out[0], kStoreFloat32, r, kWidth, 1.0f, mean);
  for (int64 b = pieces.first; b <= pieces.last && !pieces.whole(); ++b) {
    const int64 place = pieces.place(a, b);
    const float share = top == -infinity() ? 0.0f : exp2f(a.slot_maximum[place] - top);
    sum += a.slot_sum[place] * share;
    if (!p.row_grad) continue;
    float piece[kColumns];
    load_row(a.slot_out, kStoreFloat32, place, kWidth, share, piece);
#pragma unroll
    for (int i = 0; i < kColumns; ++i) mean[i] += piece[i];
  }

  float u[kColumns], v[kColumns];
  load_row(p.anchor, p.storage, key, p.dim, p.inverse_norm[key], u);
  load_row(p.positive, p.storage, key, p.dim, p.inverse_norm[p.num_keys + key], v);
  const float aligned = dot(u, v), temperature = float(*a.temperature);
  // No negatives: the loss is 0 and so is its slope. Not a number stays one.
  const bool none = !(sum > 0);
  const float lse = none ? 0.0f : top + log2f(sum) - kWeightShift;
  const float margin = lse * kLn2 - aligned / temperature;
  if (lane == 0) {
    p.row_loss[r] = none ? (sum == 0 ? 0.0f : sum) : fmaxf(margin, 0.0f) + log1pf(expf(-fabsf(margin)));
  }
  if (!p.row_grad) return;

  const float weight = none ? 0.0f : p.row_grad[r] / (1.0f + expf(-margin));
  const float inverse = none ? 0.0f : 1.0f / sum, sign = weight < 0 ? -1.0f : 1.0f;
#pragma unroll
  for (int i = 0; i < kColumns; ++i) mean[i] *= inverse;
  const float towards = dot(mean, u);
#pragma unroll
  for (int i = 0; i < kColumns; ++i) {
    a.out[0][r * kWidth + lane + 32 * i] = weight * (mean[i] - v[i]);
    u[i] *= sign;
  }
  store_halves(p.key_high, p.key_low, r, u);
  if (lane != 0) return;
  p.row_slope[r] = weight * (towards - aligned);
  p.weight[r] = weight;
  p.key_scale[r] = sign * kLog2E / temperature;
  p.key_bias[r] = weight == 0 ? -infinity() : log2f(fabsf(weight)) - lse;
  atomicMax(p.weight_maximum, __float_as_uint(fabsf(weight)));  // of integers: the same in any order
}

// Grid [ceil(num_keys / warps), 2]: grad_z = (g - <g, z> z) / (t |z|) with g the gradient in the unit row z.
template <int kWidth>
__global__ void __launch_bounds__(kRowThreads) info_nce_gradient_kernel(const GradientParameters p) {
  constexpr int kColumns = kWidth / 32;
  const int64 key = int64(blockIdx.x) * (kRowThreads / 32) + threadIdx.x / 32;
  if (key >= p.num_keys) return;
  const int view = blockIdx.y, lane = threadIdx.x % 32;
  const AttentionParameters& a = p.attention;

  float g[kColumns] = {};
  if (view == 1 || p.intra_view_negatives) {
    const int query_view = p.intra_view_negatives ? view : 0;
    const RowPieces pieces(a, p.blocks, query_view, key);
    if (pieces.whole()) load_row(query_view ? a.out[1] : a.out[0], kStoreFloat32, key, kWidth, 1.0f, g);
    for (int64 b = pieces.first; b <= pieces.last && !pieces.whole(); ++b) {
      float piece[kColumns];
      load_row(a.slot_out, kStoreFloat32, pieces.place(a, b), kWidth, 1.0f, piece);
#pragma unroll
      for (int i = 0; i < kColumns; ++i) g[i] += piece[i];
    }
    const float unit = __uint_as_float(*a.weight_maximum) * exp2f(-kWeightShift);
#pragma unroll
    for (int i = 0; i < kColumns; ++i) g[i] *= unit;
  }

  float u[kColumns], z[kColumns];
  load_row(p.x[0], p.storage, key, p.dim, p.inverse_norm[key], u);
  const float inverse_norm = p.inverse_norm[view * p.num_keys + key];
  load_row(view ? p.x[1] : p.x[0], p.storage, key, p.dim, inverse_norm, z);
  const int64 begin = p.row_order ? p.row_begin[key] : key, end = p.row_order ? p.row_begin[key + 1] : key + 1;
  for (int64 n = begin; n < end; ++n) {
    const int64 r = p.row_order ? p.row_order[n] : n;
    const float weight = p.weight[r];
#pragma unroll
    for (int i = 0; i < kColumns; ++i) g[i] += view == 0 ? p.row_out[r * kWidth + lane + 32 * i] : -weight * u[i];
  }
  const float along = dot(g, z), factor = inverse_norm / float(*a.temperature);
#pragma unroll
  for (int i = 0; i < kColumns; ++i) {
    if (lane + 32 * i >= p.dim) continue;
    const float value[1] = {(g[i] - along * z[i]) * factor};
    store_any(view ? p.grad[1] : p.grad[0], p.storage, key * p.dim + lane + 32 * i, value);
  }
}

}  // namespace hellm
