// Sparse hypergraph convolution and bipartite propagation: every output row is one gather with one owner.
#pragma once

#include "dtype.h"

namespace hellm {

// A sparse matrix [rows, columns] in CSR; null values are ones. A: float, or double for kFloat64.
struct Csr {
  const int64_t* indptr;   // [rows + 1]
  const int32_t* indices;  // [nnz]
  const void* values;      // A [nnz] or null
  // Read on GPUs only; see RowSchedule of hellm/hypergraph.py.
  const int32_t* row_order = nullptr;        // [rows]: hubs, other long rows, short rows
  const int32_t* hub_chunk_begin = nullptr;  // [num_hubs + 1]
  int64_t num_hubs = 0, num_long = 0, num_hub_chunks = 0;
};

// out = matrix x
struct IncidenceProductArguments {
  const void* x;  // [columns, dim]
  Csr matrix;
  void* out;  // [rows, dim]
  int64_t rows, dim;
  DType dtype;
  int num_threads;
  void* workspace = nullptr;  // GPUs: A [num_hub_chunks, dim]
};

// num_layers times x <- out_scale * (H (edge_scale * H^T (in_scale * x)) - diagonal * in_scale * x); null scales are ones.
struct HypergraphConvArguments {
  const void* x;                                             // [num_vertices, dim]
  Csr vertex;                                                // H
  Csr edge;                                                  // H^T
  const void *in_scale, *edge_scale, *out_scale, *diagonal;  // A [num_vertices], edge_scale [num_hyperedges]
  void* out;                                                 // [num_vertices, dim]
  void* workspace;  // A [num_hyperedges + (num_vertices if num_layers > 1), dim]; on GPUs see cuda/plan.h
  int64_t num_vertices, num_hyperedges, dim;
  int num_layers;  // >= 1
  DType dtype;
  int num_threads;
  int64_t slab_bytes = 0;  // GPUs: tables larger than this are worked through by slabs of columns
};

// Mean of layers 0..num_layers of user <- user_scale * R (item_scale * item), item <- item_scale * R^T (user_scale * user).
struct BipartitePropagateArguments {
  const void *user_x, *item_x;          // [num_users, dim], [num_items, dim]
  Csr user;                             // R
  Csr item;                             // R^T
  const void *user_scale, *item_scale;  // A [num_users], A [num_items]
  void *user_out, *item_out;
  void* workspace;  // A [2 * (num_users + num_items), dim]; on GPUs see cuda/plan.h
  int64_t num_users, num_items, dim;
  int num_layers;  // >= 1
  DType dtype;
  int num_threads;
  int64_t slab_bytes = 0;  // GPUs: tables larger than this are worked through by slabs of columns
};

}  // namespace hellm
