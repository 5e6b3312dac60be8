// One GPU block at a time on the CPU: every thread is a fibre, and what threads do together waits until all are there.
// Compiled in front of the kernels' own text, in place of csrc/cuda/ptx.cuh and of what nvcc and NVRTC have built in.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#define __CUDACC__
#define HELLM_PTX_CUH
#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static

struct uint3_ { unsigned x, y, z; };
extern uint3_ threadIdx, blockIdx, gridDim;

namespace emulated {

// A kernel, from its parameters.
using Call = std::function<void(const void*)>;

template <typename Parameters>
Call call(void (*kernel)(Parameters)) {
  return [=](const void* parameters) { kernel(*static_cast<const Parameters*>(parameters)); };
}

inline std::map<std::string, Call>& kernels() {
  static std::map<std::string, Call> all;
  return all;
}

struct AddKernels {
  AddKernels(std::initializer_list<std::pair<const std::string, Call>> more) { kernels().insert(more); }
};

// As csrc/cuda/kernels.h has them for nvcc.
#define HELLM_KERNEL(...) {#__VA_ARGS__, emulated::call(&__VA_ARGS__)}
#define HELLM_JOINED(left, right) left##right
#define HELLM_NAMED(name, number) HELLM_JOINED(name, number)
#define HELLM_KERNELS(...)                                                         \
  namespace hellm {                                                                \
  static const emulated::AddKernels HELLM_NAMED(kAdded, __COUNTER__){__VA_ARGS__}; \
  }

constexpr int kStack = 256 * 1024;

// Deposits of the threads of one warp or block in a common operation; the last to come computes for all.
struct Meeting {
  int arrived = 0;
  unsigned long generation = 0;
};

// A context starts a fibre; from then on it goes by jumps, as a change of context asks the kernel for the signal mask.
struct Thread {
  ucontext_t context;
  jmp_buf place;
  std::unique_ptr<char[]> stack;
  bool started = false, done = false;
  const Meeting* awaited = nullptr;  // with the others of its warp or block, until its generation is over
  unsigned long generation = 0;

  bool waits() const { return awaited && awaited->generation == generation; }
};

extern std::vector<Thread> threads;
extern int current;
extern jmp_buf scheduler;
extern Meeting warp_meeting[64], block_meeting;
extern void* deposit[2048];

inline void yield() {
  if (!_setjmp(threads[current].place)) _longjmp(scheduler, 1);
}

// `combine(deposits)` runs once, when all `size` threads have come.
template <typename Combine>
void meet(Meeting& meeting, int first, int size, void* mine, Combine combine) {
  deposit[current] = mine;
  const unsigned long generation = meeting.generation;
  if (++meeting.arrived == size) {
    combine(deposit + first);
    meeting.arrived = 0;
    ++meeting.generation;
    return;
  }
  threads[current].awaited = &meeting;
  threads[current].generation = generation;
  yield();
  threads[current].awaited = nullptr;
}

template <typename Combine>
void meet_warp(void* mine, Combine combine) {
  const int warp = current / 32;
  meet(warp_meeting[warp], warp * 32, 32, mine, combine);
}

template <typename Combine>
void meet_block(void* mine, Combine combine) {
  meet(block_meeting, 0, int(threads.size()), mine, combine);
}

inline float half_to_float(uint16_t bits) {
  const int exponent = bits >> 10 & 31, mantissa = bits & 1023;
  const float sign = bits >> 15 ? -1.0f : 1.0f;
  if (exponent == 31) return mantissa ? NAN : sign * INFINITY;
  return sign * (exponent ? std::ldexp(1024.0f + float(mantissa), exponent - 25) : std::ldexp(float(mantissa), -24));
}

inline uint16_t float_to_half(float value) {
  const uint16_t sign = std::signbit(value) ? 0x8000 : 0;
  if (std::isnan(value)) return 0x7fff;
  const float size = std::fabs(value);
  if (size == 0) return sign;
  if (size >= 65520.0f) return sign | 0x7c00;
  int exponent;
  std::frexp(size, &exponent);
  const int scale = exponent < -13 ? 24 : 11 - exponent;           // subnormals have a fixed step
  const long mantissa = std::lrint(std::ldexp(size, scale));       // to nearest, ties to even
  if (exponent < -13) return uint16_t(sign | mantissa);
  return uint16_t(sign | (((exponent + 14) << 10) + (mantissa - 1024)));
}

}  // namespace emulated

inline void __syncthreads() { emulated::meet_block(nullptr, [](void**) {}); }

inline void __syncwarp() { emulated::meet_warp(nullptr, [](void**) {}); }

inline int __syncthreads_or(int value) {
  emulated::meet_block(&value, [](void** all) {
    int any = 0;
    for (std::size_t i = 0; i < emulated::threads.size(); ++i) any |= *static_cast<int*>(all[i]);
    for (std::size_t i = 0; i < emulated::threads.size(); ++i) *static_cast<int*>(all[i]) = any;
  });
  return value;
}

inline int __any_sync(unsigned, int value) {
  emulated::meet_warp(&value, [](void** all) {
    int any = 0;
    for (int i = 0; i < 32; ++i) any |= *static_cast<int*>(all[i]) != 0;
    for (int i = 0; i < 32; ++i) *static_cast<int*>(all[i]) = any;
  });
  return value;
}

inline unsigned __ballot_sync(unsigned, bool value) {
  struct Slot { bool value; unsigned all; } slot{value, 0};
  emulated::meet_warp(&slot, [](void** all) {
    unsigned bits = 0;
    for (int i = 0; i < 32; ++i) bits |= unsigned(static_cast<Slot*>(all[i])->value) << i;
    for (int i = 0; i < 32; ++i) static_cast<Slot*>(all[i])->all = bits;
  });
  return slot.all;
}

inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline int __ffs(unsigned bits) { return __builtin_ffs(int(bits)); }

template <typename T>
inline T __shfl_xor_sync(unsigned, T value, int mask) {
  struct Slot { T value; int mask; } slot{value, mask};
  emulated::meet_warp(&slot, [](void** all) {
    T old[32];
    for (int i = 0; i < 32; ++i) old[i] = static_cast<Slot*>(all[i])->value;
    for (int i = 0; i < 32; ++i) static_cast<Slot*>(all[i])->value = old[i ^ static_cast<Slot*>(all[i])->mask];
  });
  return slot.value;
}

inline unsigned atomicMax(unsigned* to, unsigned value) {
  const unsigned old = *to;
  if (value > old) *to = value;
  return old;
}

inline int atomicAdd(int* to, int value) {
  const int old = *to;
  *to += value;
  return old;
}

inline unsigned __float_as_uint(float value) {
  unsigned bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

inline float __uint_as_float(unsigned bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

namespace hellm {
namespace ptx {

extern std::vector<unsigned char> shared_memory;
inline unsigned char* dynamic_shared() {
  const auto address = reinterpret_cast<uintptr_t>(shared_memory.data());
  return shared_memory.data() + (16 - address % 16) % 16;
}

inline float from_half(unsigned short bits) { return emulated::half_to_float(bits); }
inline unsigned short to_half(float value) { return emulated::float_to_half(value); }
inline unsigned short to_bfloat16(float value) {
  unsigned bits = __float_as_uint(value);
  if (std::isnan(value)) return 0x7fff;
  bits += 0x7fff + (bits >> 16 & 1);
  return (unsigned short)(bits >> 16);
}
inline unsigned pack_halves(float first, float second) { return unsigned(to_half(second)) << 16 | to_half(first); }
inline float exp2_fast(float x) { return std::exp2(x); }

// The accumulator of tensor cores: they truncate when they add. Fewer bits than the 24 of float32 show where many sums
// go through it.
extern int accumulator_bits;
inline float truncated(double sum) {
  if (sum == 0 || !std::isfinite(sum)) return float(sum);
  int exponent;
  const double mantissa = std::frexp(sum, &exponent);
  return float(std::ldexp(std::trunc(std::ldexp(mantissa, accumulator_bits)), exponent - accumulator_bits));
}

// Operand layouts as in the PTX manual's "Matrix Fragments for mma.m16n8k16": group = lane / 4, pair = lane % 4.
inline void multiply_16x8x16(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  struct Slot { float* c; unsigned a[4], b[2]; } slot{c, {a[0], a[1], a[2], a[3]}, {b0, b1}};
  emulated::meet_warp(&slot, [](void** all) {
    const auto half = [](unsigned bits, int place) { return from_half((unsigned short)(bits >> 16 * place)); };
    float left[16][16], right[16][8];
    for (int lane = 0; lane < 32; ++lane) {
      const Slot& s = *static_cast<Slot*>(all[lane]);
      const int group = lane / 4, pair = lane % 4 * 2;
      for (int r = 0; r < 4; ++r) {
        for (int e = 0; e < 2; ++e) left[group + r % 2 * 8][pair + e + r / 2 * 8] = half(s.a[r], e);
      }
      for (int r = 0; r < 2; ++r) {
        for (int e = 0; e < 2; ++e) right[pair + e + r * 8][group] = half(s.b[r], e);
      }
    }
    for (int lane = 0; lane < 32; ++lane) {
      float* const out = static_cast<Slot*>(all[lane])->c;
      for (int i = 0; i < 4; ++i) {
        const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
        double sum = out[i];
        for (int k = 0; k < 16; ++k) sum += double(left[row][k]) * double(right[k][column]);
        out[i] = truncated(sum);
      }
    }
  });
}

inline void load_matrices_any(unsigned (&out)[4], const void* row, bool transposed) {
  if (reinterpret_cast<uintptr_t>(row) % 16) std::abort();
  struct Slot { unsigned* out; const void* row; bool transposed; } slot{out, row, transposed};
  emulated::meet_warp(&slot, [](void** all) {
    for (int lane = 0; lane < 32; ++lane) {
      Slot& s = *static_cast<Slot*>(all[lane]);
      for (int matrix = 0; matrix < 4; ++matrix) {
        unsigned short value[2];
        for (int e = 0; e < 2; ++e) {
          const int i = s.transposed ? lane % 4 * 2 + e : lane / 4, j = s.transposed ? lane / 4 : lane % 4 * 2 + e;
          value[e] = static_cast<const unsigned short*>(static_cast<Slot*>(all[matrix * 8 + i])->row)[j];
        }
        s.out[matrix] = unsigned(value[1]) << 16 | value[0];
      }
    }
  });
}
inline void load_matrices(unsigned (&out)[4], const void* row) { load_matrices_any(out, row, false); }
inline void load_matrices_transposed(unsigned (&out)[4], const void* row) { load_matrices_any(out, row, true); }

// A copy arrives at the wait and not before, as on a GPU it may: a kernel that reads too early reads old bytes.
struct Copy { void* shared; unsigned char bytes[16]; };
struct Copies { std::vector<Copy> open; std::vector<std::vector<Copy>> groups; };
extern std::vector<Copies> copies;

inline void copy_16(void* shared, const void* global, bool present) {
  if (reinterpret_cast<uintptr_t>(shared) % 16 || (present && reinterpret_cast<uintptr_t>(global) % 16)) std::abort();
  Copy copy{shared, {}};
  if (present) std::memcpy(copy.bytes, global, 16);
  copies[emulated::current].open.push_back(copy);
}
inline void commit_copies() {
  Copies& mine = copies[emulated::current];
  mine.groups.push_back(std::move(mine.open));
  mine.open.clear();
}
template <int kPending>
void wait_copies() {
  Copies& mine = copies[emulated::current];
  while (int(mine.groups.size()) > kPending) {
    for (const Copy& copy : mine.groups.front()) std::memcpy(copy.shared, copy.bytes, 16);
    mine.groups.erase(mine.groups.begin());
  }
}

}  // namespace ptx
}  // namespace hellm
