/* A clock that jumps, for LD_PRELOAD: several times a second, the time of day is another one, from 1970 to 2076, an
   hour or a second off, or right. The monotonic clock goes on as it must.

   HELLM_CLOCK_SEED chooses the jumps; without it, or after clock_jumps(0), the clock is right. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/time.h>
#include <time.h>

static const long jumps[] = {-1774000000, -86400, -3600, -1, 0, 1, 3600, 86400, 1577000000};
static uint64_t seed;

__attribute__((constructor)) static void start(void) {
  const char* given = getenv("HELLM_CLOCK_SEED");
  seed = given ? strtoull(given, 0, 10) : 0;
}

void clock_jumps(uint64_t given) { seed = given; }

static int right(clockid_t clock, struct timespec* now) {
  static int (*next)(clockid_t, struct timespec*);
  if (!next) next = (int (*)(clockid_t, struct timespec*))dlsym(RTLD_NEXT, "clock_gettime");
  return next(clock, now);
}

int clock_gettime(clockid_t clock, struct timespec* now) {
  const int code = right(clock, now);
  if (code || !seed || (clock != CLOCK_REALTIME && clock != CLOCK_REALTIME_COARSE)) return code;
  const uint64_t slot = (uint64_t)now->tv_sec * 8 + (uint64_t)now->tv_nsec / 125000000;
  uint64_t hash = (slot + seed * 0x9e3779b97f4a7c15u) * 0xbf58476d1ce4e5b9u;
  hash ^= hash >> 31;
  now->tv_sec += jumps[hash % (sizeof(jumps) / sizeof(jumps[0]))];
  if (now->tv_sec < 0) now->tv_sec = 0;
  return 0;
}

int gettimeofday(struct timeval* restrict now, void* restrict zone) {
  struct timespec found;
  (void)zone;
  clock_gettime(CLOCK_REALTIME, &found);
  now->tv_sec = found.tv_sec;
  now->tv_usec = found.tv_nsec / 1000;
  return 0;
}

time_t time(time_t* where) {
  struct timespec found;
  clock_gettime(CLOCK_REALTIME, &found);
  if (where) *where = found.tv_sec;
  return found.tv_sec;
}
