// Storage types, conversions, wide accesses, warp reductions. NVRTC-safe: no host headers.
#pragma once

#include "parameters.cuh"
#include "ptx.cuh"

namespace hellm {

struct Half {
  unsigned short bits;
};
struct BFloat16 {
  unsigned short bits;
};

constexpr unsigned kAllLanes = 0xffffffffu;
constexpr float kLog2E = 1.44269504088896340736f;
constexpr float kLn2 = 0.69314718055994530942f;

__device__ __forceinline__ float infinity() { return __uint_as_float(0x7f800000u); }
__device__ __forceinline__ float not_a_number() { return __uint_as_float(0x7fc00000u); }

template <typename A>
__device__ __forceinline__ A widen(float x) { return A(x); }
template <typename A>
__device__ __forceinline__ A widen(double x) { return A(x); }
template <typename A>
__device__ __forceinline__ A widen(Half x) { return A(ptx::from_half(x.bits)); }
template <typename A>
__device__ __forceinline__ A widen(BFloat16 x) { return A(__uint_as_float(unsigned(x.bits) << 16)); }

template <typename A>
__device__ __forceinline__ void narrow(A value, float& out) { out = float(value); }
template <typename A>
__device__ __forceinline__ void narrow(A value, double& out) { out = double(value); }
template <typename A>
__device__ __forceinline__ void narrow(A value, Half& out) { out.bits = ptx::to_half(float(value)); }
template <typename A>
__device__ __forceinline__ void narrow(A value, BFloat16& out) { out.bits = ptx::to_bfloat16(float(value)); }

// kCount consecutive values, read and written in pieces of at most 16 bytes; their address is a multiple of a piece.
template <typename T, int kCount>
struct Vector {
  static constexpr int kPiece = kCount * sizeof(T) <= 16 ? kCount : int(16 / sizeof(T));
  struct alignas(kPiece * sizeof(T)) Piece {
    T value[kPiece];
  };
  Piece piece[kCount / kPiece];

  __device__ __forceinline__ static Vector load(const T* from) {
    Vector v;
#pragma unroll
    for (int i = 0; i < kCount / kPiece; ++i) v.piece[i] = reinterpret_cast<const Piece*>(from)[i];
    return v;
  }
  __device__ __forceinline__ void store(T* to) const {
#pragma unroll
    for (int i = 0; i < kCount / kPiece; ++i) reinterpret_cast<Piece*>(to)[i] = piece[i];
  }
  __device__ __forceinline__ T& operator[](int i) { return piece[i / kPiece].value[i % kPiece]; }
  __device__ __forceinline__ const T& operator[](int i) const { return piece[i / kPiece].value[i % kPiece]; }
};

template <typename T, typename A, int kCount>
__device__ __forceinline__ void load_as(const void* x, int64 offset, A (&value)[kCount]) {
  const auto v = Vector<T, kCount>::load(static_cast<const T*>(x) + offset);
#pragma unroll
  for (int i = 0; i < kCount; ++i) value[i] = widen<A>(v[i]);
}

template <typename T, typename A, int kCount>
__device__ __forceinline__ void store_as(void* x, int64 offset, const A (&value)[kCount]) {
  Vector<T, kCount> v;
#pragma unroll
  for (int i = 0; i < kCount; ++i) narrow(value[i], v[i]);
  v.store(static_cast<T*>(x) + offset);
}

// The storage type is the same for a whole launch, so the branch costs nothing where it stands outside the inner loop.
template <typename A, int kCount>
__device__ __forceinline__ void load_any(const void* x, int storage, int64 offset, A (&value)[kCount]) {
  if constexpr (sizeof(A) == 8) {
    load_as<double>(x, offset, value);
  } else {
    if (storage == kStoreFloat32) load_as<float>(x, offset, value);
    else if (storage == kStoreBFloat16) load_as<BFloat16>(x, offset, value);
    else load_as<Half>(x, offset, value);
  }
}

template <typename A, int kCount>
__device__ __forceinline__ void store_any(void* x, int storage, int64 offset, const A (&value)[kCount]) {
  if constexpr (sizeof(A) == 8) {
    store_as<double>(x, offset, value);
  } else {
    if (storage == kStoreFloat32) store_as<float>(x, offset, value);
    else if (storage == kStoreBFloat16) store_as<BFloat16>(x, offset, value);
    else store_as<Half>(x, offset, value);
  }
}

__device__ __forceinline__ float load_one(const void* x, int storage, int64 offset) {
  float value[1];
  load_any(x, storage, offset, value);
  return value[0];
}

// Every lane gets the sum, added in the same order in each.
template <typename A>
__device__ __forceinline__ A warp_sum(A value) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) value += __shfl_xor_sync(kAllLanes, value, step);
  return value;
}

__device__ __forceinline__ float warp_maximum(float value) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) value = fmaxf(value, __shfl_xor_sync(kAllLanes, value, step));
  return value;
}

}  // namespace hellm
