// Sparse hypergraph convolution and bipartite propagation: every output row is one gather with one owner.
#pragma once

#include "dtype.h"

namespace hellm {

// A sparse matrix [rows, columns] in CSR; null values are ones. A: float, or double for kFloat64.
struct Csr {
  const int64_t* indptr;   // [rows + 1]
  const int32_t* indices;  // [nnz]
  const void* values;      // A [nnz] or null
  int64_t num_entries = 0, longest_row = 0;  // read on GPUs only
};

// out = matrix x
struct IncidenceProductArguments {
  const void* x;  // [columns, dim]
  Csr matrix;
  void* out;      // [rows, dim]
  int64_t rows, dim;
  DType dtype;
  int num_threads;
  void* hub_workspace = nullptr;  // GPUs, for hubs: A [2 * ceil(nnz / 2048), dim], nnz the larger
};

// num_layers times x <- out_scale * (H (edge_scale * H^T (in_scale * x)) - diagonal * in_scale * x); null scales are ones.
struct HypergraphConvArguments {
  const void* x;  // [num_vertices, dim]
  Csr vertex;     // H
  Csr edge;       // H^T
  const void *in_scale, *edge_scale, *out_scale, *diagonal;  // A [num_vertices], edge_scale [num_hyperedges]
  void* out;        // [num_vertices, dim]
  void* workspace;  // A [num_hyperedges + (num_vertices if num_layers > 1), dim]
  int64_t num_vertices, num_hyperedges, dim;
  int num_layers;  // >= 1
  DType dtype;
  int num_threads;
  void* hub_workspace = nullptr;  // GPUs, for hubs: A [2 * ceil(nnz / 2048), dim], nnz the larger
};

// Mean of layers 0..num_layers of user <- user_scale * R (item_scale * item), item <- item_scale * R^T (user_scale * user).
struct BipartitePropagateArguments {
  const void *user_x, *item_x;  // [num_users, dim], [num_items, dim]
  Csr user;                     // R
  Csr item;                     // R^T
  const void *user_scale, *item_scale;  // A [num_users], A [num_items]
  void *user_out, *item_out;
  void* workspace;  // A [3 * (num_users + num_items), dim]
  int64_t num_users, num_items, dim;
  int num_layers;  // >= 1
  DType dtype;
  int num_threads;
  void* hub_workspace = nullptr;  // GPUs, for hubs: A [2 * ceil(nnz / 2048), dim], nnz the larger
};

}  // namespace hellm
