// Whether ThreadSanitizer, told of OpenMP's order, still finds a race and finds none where there is none:
//
//   openmp_race ordered    sums across a barrier and after a region
//   openmp_race race       the same without the barrier
//   openmp_race locked     a sum of all threads under a lock
//   openmp_race unlocked   the same under a lock for each thread
//   openmp_race pieces     two pieces of a dynamic loop write the same element
#include <cstdio>
#include <cstring>
#include <thread>
#include <vector>

#include <omp.h>

namespace {

constexpr int kThreads = 4, kRounds = 200;

long sums(bool wait) {
  std::vector<long> mine(kThreads), all(kThreads);
#pragma omp parallel num_threads(kThreads)
  {
    const int thread = omp_get_thread_num();
    for (int round = 0; round < kRounds; ++round) {
      mine[thread] += thread + round;
      if (wait) {
#pragma omp barrier
      }
      all[thread] += mine[(thread + 1) % kThreads];
      if (wait) {
#pragma omp barrier
      }
    }
  }
  long sum = 0;
  for (long one : all) sum += one;
  return sum;
}

long locked(bool together) {
  std::vector<omp_lock_t> locks(kThreads);
  for (omp_lock_t& one : locks) omp_init_lock(&one);
  long sum = 0;
#pragma omp parallel num_threads(kThreads)
  {
    omp_lock_t* const lock = &locks[together ? 0 : omp_get_thread_num()];
    for (int round = 0; round < kRounds; ++round) {
      omp_set_lock(lock);
      sum += round;
      omp_unset_lock(lock);
      std::this_thread::yield();
    }
  }
  for (omp_lock_t& one : locks) omp_destroy_lock(&one);
  return sum;
}

long pieces() {
  std::vector<long> all(kThreads);
#pragma omp parallel num_threads(kThreads)
  {
    // Ahead of the loop, so that region and loop are begun by calls of their own, as in the kernels.
    const int thread = omp_get_thread_num();
#pragma omp for schedule(dynamic, 1)
    for (int piece = 0; piece < 10000; ++piece) {
      all[piece % 2] += piece + thread;
      // Else one thread may have done all before others begin.
      std::this_thread::yield();
    }
  }
  return all[0] + all[1];
}

}  // namespace

int main(int count, char** words) {
  const char* const way = count > 1 ? words[1] : "";
  if (std::strcmp(way, "pieces") == 0) {
    std::printf("%ld\n", pieces());
  } else if (std::strstr(way, "locked") != nullptr) {
    std::printf("%ld\n", locked(std::strcmp(way, "locked") == 0));
  } else {
    std::printf("%ld\n", sums(std::strcmp(way, "race") != 0));
  }
  return 0;
}
