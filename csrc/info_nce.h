// InfoNCE between two views, without the N x N matrix: loss of each row and, if asked, both gradients.
#pragma once

#include "dtype.h"

namespace hellm {

// loss_i = softplus(lse_i - <u_i, v_i> / t), lse_i over the negatives of row i; u, v the L2-normalised views.
// Accumulation type A: float, or double for kFloat64.
struct InfoNceArguments {
  const void* anchor;    // [num_keys, dim]
  const void* positive;  // [num_keys, dim]
  const int64_t* rows;   // [num_rows] or null: all
  const void* row_grad;  // A [num_rows] or null: no gradients
  void* row_loss;        // A [num_rows]
  void* grad_anchor;     // [num_keys, dim] or null, of sum_i row_grad_i loss_i
  void* grad_positive;   // [num_keys, dim] or null
  void* row_slope;       // A [num_rows] or null; its sum is sum_i row_grad_i d loss_i / d (1 / t)
  int64_t num_keys, num_rows, dim;
  double temperature;
  bool intra_view_negatives, highest_precision;
  bool bfloat16_products;  // read on CPUs only: may round unit rows and weights to bfloat16
  DType dtype;
  int num_threads;
  // Read on GPUs only, where the temperature stays on the device.
  const double* device_temperature = nullptr;  // [1]
  const int64_t* row_order = nullptr;          // [num_rows] stable argsort of `rows`, or null with it
  const int64_t* row_begin = nullptr;          // [num_keys + 1] where the rows of each key begin in row_order
  void* workspace = nullptr;                   // info_nce_workspace() bytes
  int num_processors = 0, shared_bytes = 0;    // shared memory of each
};

}  // namespace hellm
