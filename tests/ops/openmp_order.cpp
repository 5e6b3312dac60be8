// Tells ThreadSanitizer how GCC's OpenMP runtime orders threads. The runtime waits by futexes in code that is not
// instrumented, so without this every use of memory across a barrier looks like a race.
//
// Loaded before the runtime, it stands between the kernels and the entry points that they use: what is before a region
// happens before all of its threads, which happen before what is after it; what is before a barrier happens before what
// is after it, and what is before a lock is given back before what follows when it is taken. Nothing else is ordered;
// pieces of a dynamic loop are not, as the standard orders none.
#include <dlfcn.h>

#include <cstdlib>

#include <omp.h>

extern "C" {
void __tsan_acquire(void* address);
void __tsan_release(void* address);
}

namespace {

struct Region {
  void (*function)(void*);
  void* data;
  char begin, end;
  char barriers[2];  // by turns: a thread may be at the next barrier while another still leaves this one
};

thread_local Region* current = nullptr;
thread_local unsigned passed = 0;

template <typename Function>
Function real(const char* name) {
  void* const found = dlsym(RTLD_NEXT, name);
  if (found == nullptr) std::abort();
  return reinterpret_cast<Function>(found);
}

void run(void* argument) {
  Region* const region = static_cast<Region*>(argument);
  Region* const outer = current;
  const unsigned outer_passed = passed;
  current = region;
  passed = 0;
  __tsan_acquire(&region->begin);
  region->function(region->data);
  __tsan_release(&region->end);
  current = outer;
  passed = outer_passed;
}

template <typename Wait>
void across(Wait wait) {
  if (current == nullptr) return wait();
  char* const barrier = &current->barriers[passed++ % 2];
  __tsan_release(barrier);
  wait();
  __tsan_acquire(barrier);
}

}  // namespace

extern "C" {

void GOMP_parallel(void (*function)(void*), void* data, unsigned threads, unsigned flags) {
  static const auto next = real<void (*)(void (*)(void*), void*, unsigned, unsigned)>("GOMP_parallel");
  Region region{function, data, 0, 0, {0, 0}};
  __tsan_release(&region.begin);
  next(run, &region, threads, flags);
  __tsan_acquire(&region.end);
}

void GOMP_barrier() {
  static const auto next = real<void (*)()>("GOMP_barrier");
  across(next);
}

void GOMP_loop_end() {
  static const auto next = real<void (*)()>("GOMP_loop_end");
  across(next);
}

void omp_set_lock(omp_lock_t* lock) {
  static const auto next = real<void (*)(omp_lock_t*)>("omp_set_lock");
  next(lock);
  __tsan_acquire(lock);
}

void omp_unset_lock(omp_lock_t* lock) {
  static const auto next = real<void (*)(omp_lock_t*)>("omp_unset_lock");
  __tsan_release(lock);
  next(lock);
}
}
