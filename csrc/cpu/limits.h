// What a processor can do at most: loops without anything but the work that is counted. Benchmarks hold the operators
// against them.
#pragma once

#include <cstdint>

namespace hellm {

// Fused multiply-adds of float32 in registers; products and sums where the instruction set cannot fuse them.
struct MultiplyAddArguments {
  double operations;    // in all threads, two a lane and instruction
  float start, factor;  // what they compute with
  float* result;        // of any value
  int num_threads;
};

// Rows of float32 from a table, added up in registers: so many, one after the other, for each row that is written.
struct GatherArguments {
  const float* x;        // [any, dim]
  const int32_t* index;  // [count]
  float* out;            // [num_rows, dim], each the sum of count / num_rows rows, the first ones of one more
  int64_t count, dim, num_rows;
  int num_threads;
};

}  // namespace hellm
