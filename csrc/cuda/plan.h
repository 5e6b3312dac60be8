// Launch plans: which kernels an operator runs, in which order, on which grids. Plain C++ in every build, so that the
// same plan drives the kernels nvcc compiled, those NVRTC compiles at first use, and the tests' emulation of both.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <stdexcept>
#include <string>

namespace hellm::cuda {

// Errors of the arguments end the plan before its first launch.
struct Launch {
  std::string kernel;  // as in kernels.h
  unsigned grid[3];
  unsigned threads;        // of a block
  unsigned shared_bytes;   // dynamic shared memory
  const void* parameters;  // the kernel's only argument, by value
  std::size_t parameter_bytes;
};

using Queue = std::function<void(const Launch&)>;

template <typename Parameters>
void enqueue(const Queue& queue, std::string kernel, int64_t grid_x, int64_t grid_y, unsigned threads,
             unsigned shared_bytes, const Parameters& parameters) {
  if (grid_x == 0 || grid_y == 0) return;
  if (grid_x > 0x7fffffff || grid_y > 0xffff) {
    throw std::invalid_argument("grid of " + std::to_string(grid_x) + " x " + std::to_string(grid_y) +
                                " blocks is more than a GPU takes, for " + kernel);
  }
  queue({std::move(kernel),
         {unsigned(grid_x), unsigned(grid_y), 1},
         threads,
         shared_bytes,
         &parameters,
         sizeof(Parameters)});
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Consecutive parts of the workspace, each on a boundary of 256 bytes.
class Workspace {
 public:
  explicit Workspace(void* begin) : begin_(static_cast<char*>(begin)) {}
  template <typename T>
  T* take(int64_t count) {
    T* const part = reinterpret_cast<T*>(begin_ + used_);
    used_ += ceil_div(count * int64_t(sizeof(T)), 256) * 256;
    return part;
  }
  int64_t used() const { return used_; }

 private:
  char* begin_;
  int64_t used_ = 0;
};

}  // namespace hellm::cuda
