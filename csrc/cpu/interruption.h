// The early end of a kernel.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>

namespace hellm::cpu {

// One call of a kernel. Its threads ask between pieces of work, each of far less than a second, and skip what is left
// once the answer was yes; what the kernel has written is then worthless. Compiled once, for every instruction set.
class Interruption {
 public:
  // wanted: asked now and then in the thread that called the kernel; null is never.
  explicit Interruption(bool (*wanted)());

  // Whether to end, asked after about so many operations. The calling thread must be thread 0 of the region.
  bool after(int64_t operations);
  bool requested() const { return requested_.load(std::memory_order_relaxed); }

  // For loops that all threads must leave together: each calls settle(), between two barriers of a round, and reads
  // settled() after the second one.
  void settle();
  bool settled() const { return settled_; }

 private:
  using Clock = std::chrono::steady_clock;

  bool (*const wanted_)();
  std::atomic<bool> requested_{false};
  bool settled_ = false;
  int64_t operations_ = 0;
  Clock::time_point due_;
};

}  // namespace hellm::cpu
