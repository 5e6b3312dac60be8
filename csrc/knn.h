// Exact k nearest rows by cosine similarity, by blocks.
#pragma once

#include "dtype.h"

namespace hellm {

// Lower index first among equals; an all-zero row has no neighbours (index -1, similarity 0) and is nobody's.
struct KnnArguments {
  const void* x;     // [num_rows, dim]
  int64_t* index;    // [num_rows, k]
  void* similarity;  // A [num_rows, k], descending; A: float, or double for kFloat64
  int64_t num_rows, dim, k;
  DType dtype;
  int num_threads;
  // Read on GPUs only; num_rows and dim are padded to multiples of eight.
  void* unit = nullptr;            // Half [padded rows, padded dim]
  double* inverse_norm = nullptr;  // [num_rows]
  int* crowded = nullptr;          // [num_rows]
  const float* panel = nullptr;    // [panel_rows, padded rows]: rows first_row... of unit unit^T
  int64_t first_row = 0, panel_rows = 0;
  void* workspace = nullptr;
  int num_processors = 0, shared_bytes = 0;  // shared_bytes: of each
};

}  // namespace hellm
