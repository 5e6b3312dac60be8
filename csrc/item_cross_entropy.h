// Softmax cross-entropy over a catalogue, without the N x I logits: loss of each row and the gradients asked for.
#pragma once

#include "dtype.h"

namespace hellm {

// loss_i = lse_j(<h_i, e_j> + b_j) - (<h_i, e_t> + b_t), t = target_i; gradients are those of sum_i row_grad_i loss_i.
// Accumulation type A: float, or double for kFloat64.
struct ItemCrossEntropyArguments {
  const void* hidden;          // [num_rows, dim]
  const void* item_embedding;  // [num_items, dim]
  const int64_t* target;       // [num_rows], each in [0, num_items)
  const void* bias;            // A [num_items] or null
  const void* row_grad;        // A [num_rows] or null: no gradients
  void* row_loss;              // A [num_rows]
  void* grad_hidden;           // [num_rows, dim] or null
  void* grad_items;            // [num_items, dim] or null
  void* grad_bias;             // A [num_items]; null without bias or without grad_items
  int64_t num_rows, num_items, dim;
  DType dtype;
  int num_threads;
  // Read on GPUs only, where the precision chooses the products.
  const int64_t* row_order = nullptr;  // [num_rows] stable argsort of `target`; with grad_items
  const int64_t* row_begin = nullptr;  // [num_items + 1] where the rows of each target begin in row_order
  void* workspace = nullptr;           // item_cross_entropy_workspace() bytes
  bool highest_precision = false;
  int num_processors = 0, shared_bytes = 0;  // shared memory of each
};

}  // namespace hellm
