#include "interruption.h"

#include <omp.h>

namespace hellm::cpu {
namespace {

constexpr int64_t kOperations = 1 << 20;  // between two looks at the clock
// To ask takes the interpreter lock, for which a busy thread of Python lets us wait 5 ms.
constexpr std::chrono::milliseconds kInterval(200);

}  // namespace

Interruption::Interruption(bool (*wanted)()) : wanted_(wanted), due_(Clock::now() + kInterval) {}

bool Interruption::after(int64_t operations) {
  if (wanted_ != nullptr && !requested() && omp_get_thread_num() == 0 && (operations_ += operations) >= kOperations) {
    operations_ = 0;
    if (Clock::now() >= due_) {
      if (wanted_()) requested_.store(true, std::memory_order_relaxed);
      due_ = Clock::now() + kInterval;
    }
  }
  return requested();
}

void Interruption::settle() {
  if (omp_get_thread_num() == 0) settled_ = requested();
}

}  // namespace hellm::cpu
