// Vectors of the widest registers the translation unit is compiled for, and the matrix-product tile built on them.
//
// Every file that includes this one is compiled once per instruction set (HELLM_ISA) and keeps all its code in the
// namespace of that name: a template shared between the copies would let the linker pick the widest version for all.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <new>
#include <type_traits>

#include "../dtype.h"

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace hellm::cpu::HELLM_ISA {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
constexpr int kTileVectors = 4;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
constexpr int kTileVectors = 2;
#else
constexpr int kVectorBytes = 16;
constexpr int kTileVectors = 2;
#endif
constexpr int kTileRows = 6;
// Rows of a product at a time, a multiple of a tile's: what is made of them is used while it is in the first-level cache.
constexpr int64_t kGroup = 12;
// Longest chain of float32 additions in a product: the error of a sum grows with it.
constexpr int64_t kDepth = 512;

template <typename T>
struct VectorOf {
  typedef T type __attribute__((vector_size(kVectorBytes)));
  typedef T unaligned __attribute__((vector_size(kVectorBytes), aligned(alignof(T)), may_alias));
};
template <typename T>
using Vector = typename VectorOf<T>::type;

typedef int32_t Int __attribute__((vector_size(kVectorBytes)));
typedef uint32_t Word __attribute__((vector_size(kVectorBytes)));  // for bits that may overflow

template <typename T>
constexpr int kLanes = kVectorBytes / int(sizeof(T));

template <typename T>
inline Vector<T> load(const T* p) {
  return *reinterpret_cast<const typename VectorOf<T>::unaligned*>(p);
}
template <typename T>
inline void store(T* p, Vector<T> v) {
  *reinterpret_cast<typename VectorOf<T>::unaligned*>(p) = v;
}
template <typename T>
inline Vector<T> broadcast(T value) {
  return value - Vector<T>{};
}

// All lanes by join(a, b), which takes vectors and numbers: one half with the other until one lane is left.
template <typename Join>
inline float join_lanes(Vector<float> x, Join join) {
#if defined(__SSE2__)
#if defined(__AVX512F__)
  const __m512 all = reinterpret_cast<__m512>(x);
  const __m256 half = join(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1));
  const __m128 four = join(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
#elif defined(__AVX2__)
  const __m256 half = reinterpret_cast<__m256>(x);
  const __m128 four = join(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
#else
  const __m128 four = reinterpret_cast<__m128>(x);
#endif
  const __m128 two = join(four, _mm_movehl_ps(four, four));
  return join(two[0], two[1]);
#else
  float joined = x[0];
  for (int lane = 1; lane < kLanes<float>; ++lane) joined = join(joined, x[lane]);
  return joined;
#endif
}

// Bit by bit, in which lanes a comparison holds.
template <typename M>
inline uint32_t lanes_of(M mask) {
  [[maybe_unused]] constexpr bool kNarrow = sizeof(mask[0]) == 4;
#if defined(__AVX512F__)
  const __m512i bits = reinterpret_cast<__m512i>(mask);
  return kNarrow ? _mm512_movepi32_mask(bits) : _mm512_movepi64_mask(bits);
#elif defined(__AVX2__)
  return kNarrow ? _mm256_movemask_ps(reinterpret_cast<__m256>(mask))
                 : _mm256_movemask_pd(reinterpret_cast<__m256d>(mask));
#elif defined(__SSE2__)
  return kNarrow ? _mm_movemask_ps(reinterpret_cast<__m128>(mask)) : _mm_movemask_pd(reinterpret_cast<__m128d>(mask));
#else
  uint32_t lanes = 0;
  for (int i = 0; i < int(sizeof(M) / sizeof(mask[0])); ++i) lanes |= uint32_t(mask[i] != 0) << i;
  return lanes;
#endif
}

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

inline float to_float(float x) { return x; }
inline double to_float(double x) { return x; }
inline float to_float(BFloat16 x) {
  const uint32_t bits = uint32_t(x.bits) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
inline float to_float(Float16 x) {
#if defined(__F16C__)
  return _cvtsh_ss(x.bits);
#else
  const uint32_t sign = uint32_t(x.bits & 0x8000) << 16, magnitude = x.bits & 0x7fff;
  float value;
  if (magnitude < 0x0400) {  // subnormal: the mantissa counts units of 2^-24
    value = float(magnitude) * 0x1p-24f;
    return sign ? -value : value;
  }
  const uint32_t exponent = magnitude >= 0x7c00 ? 0x7f800000u : (magnitude & 0x7c00u) * 0x2000u + (112u << 23);
  const uint32_t bits = sign | exponent | (magnitude & 0x03ffu) << 13;
  std::memcpy(&value, &bits, 4);
  return value;
#endif
}

inline void from_float(float x, float& out) { out = x; }
inline void from_float(double x, double& out) { out = x; }
// Round to nearest even; NaN stays NaN.
inline void from_float(float x, BFloat16& out) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  out.bits = x != x ? uint16_t(0x7fc0) : uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
inline void from_float(float x, Float16& out) {
#if defined(__F16C__)
  out.bits = _cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT);
#else
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  const uint16_t sign = uint16_t((bits >> 16) & 0x8000);
  bits &= 0x7fffffff;
  if (bits > 0x7f800000) {
    out.bits = sign | 0x7e00;
  } else if (bits >= 0x477ff000) {
    out.bits = sign | 0x7c00;
  } else if (bits < 0x38800000) {  // subnormal: let a float addition do the rounding
    float magnitude;
    std::memcpy(&magnitude, &bits, 4);
    magnitude += 0.5f;
    std::memcpy(&bits, &magnitude, 4);
    out.bits = uint16_t(sign | (bits - 0x3f000000));
  } else {
    bits += 0xc8000fff + ((bits >> 13) & 1);
    out.bits = uint16_t(sign | (bits >> 13));
  }
#endif
}

// One vector of kLanes<A> consecutive elements in the accumulation type A.
template <typename A>
inline Vector<A> load_as(const A* p) {
  return load(p);
}
template <typename A>
inline Vector<A> load_as(const BFloat16* p) {
  typedef uint16_t Half __attribute__((vector_size(kVectorBytes / 2), aligned(2), may_alias));
  const Word bits = __builtin_convertvector(*reinterpret_cast<const Half*>(p), Word) << 16;
  return reinterpret_cast<Vector<A>>(bits);
}
template <typename A>
inline Vector<A> load_as(const Float16* p) {
#if defined(__AVX512F__)
  return reinterpret_cast<Vector<A>>(_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
#elif defined(__F16C__)
  return reinterpret_cast<Vector<A>>(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#else
  Vector<A> v;
  for (int i = 0; i < kLanes<A>; ++i) v[i] = to_float(p[i]);
  return v;
#endif
}

template <typename A>
inline void store_as(A* p, Vector<A> v) {
  store(p, v);
}
template <typename A>
inline void store_as(BFloat16* p, Vector<A> v) {
  typedef uint16_t Half __attribute__((vector_size(kVectorBytes / 2), aligned(2), may_alias));
  const Word bits = reinterpret_cast<Word>(v), rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  *reinterpret_cast<Half*>(p) = __builtin_convertvector(v == v ? rounded : Word{} + 0x7fc0, Half);
}
template <typename A>
inline void store_as(Float16* p, Vector<A> v) {
#if defined(__AVX512F__)
  const __m256i half = _mm512_cvtps_ph(reinterpret_cast<__m512>(v), _MM_FROUND_TO_NEAREST_INT);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), half);
#elif defined(__F16C__)
  const __m128i half = _mm256_cvtps_ph(reinterpret_cast<__m256>(v), _MM_FROUND_TO_NEAREST_INT);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), half);
#else
  for (int i = 0; i < kLanes<A>; ++i) from_float(v[i], p[i]);
#endif
}

// A result too large to be read again from the caches is streamed past them: it is not read before it is written, and
// drives out nothing. Only whole lines are, from a vector's boundary; `end_stream` before another thread may read them.
template <typename T>
inline bool is_streamed(const T* p, int64_t size, int64_t row) {
  constexpr int64_t kLine = 64, kLeast = 6 << 20;  // bytes
  const int64_t width = row * int64_t(sizeof(T));
  return size * int64_t(sizeof(T)) >= kLeast && width % kLine == 0 && reinterpret_cast<uintptr_t>(p) % kLine == 0;
}
template <typename T>
inline void stream(T* p, Vector<T> v) {
#if defined(__AVX512F__)
  _mm512_stream_si512(reinterpret_cast<__m512i*>(p), reinterpret_cast<__m512i>(v));
#elif defined(__AVX2__)
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p), reinterpret_cast<__m256i>(v));
#elif defined(__SSE2__)
  _mm_stream_si128(reinterpret_cast<__m128i*>(p), reinterpret_cast<__m128i>(v));
#else
  store(p, v);
#endif
}
inline void end_stream() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

// 2^x for x <= about 0; exactly 0 below the smallest normal number, NaN for NaN. Relative error 2e-7.
inline Vector<float> exp2(Vector<float> x) {
#if defined(__AVX512F__)
  const __m512 value = reinterpret_cast<__m512>(x);
  const Vector<float> whole =
      reinterpret_cast<Vector<float>>(_mm512_roundscale_ps(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#else
  const Vector<float> magic = broadcast(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const Vector<float> rounded = x + magic, whole = rounded - magic;
#endif
  const Vector<float> f = x - whole;  // in [-1/2, 1/2]; the polynomial is minimax there
  Vector<float> p = 0.00132647266f * f + 0.00967151272f;
  p = p * f + 0.0555073375f;
  p = p * f + 0.240222421f;
  p = p * f + 0.693146978f;
  p = p * f + 1.0f;
#if defined(__AVX512F__)
  const __mmask16 normal = _mm512_cmp_ps_mask(value, _mm512_set1_ps(-126.0f), _CMP_NLT_UQ);
  return reinterpret_cast<Vector<float>>(
      _mm512_maskz_scalef_ps(normal, reinterpret_cast<__m512>(p), reinterpret_cast<__m512>(whole)));
#else
  const Int normal = ~(x < -126.0f);
  const Word exponent = reinterpret_cast<Word>(rounded) << 23;
  return reinterpret_cast<Vector<float>>((reinterpret_cast<Word>(p) + exponent) & reinterpret_cast<Word>(normal));
#endif
}
inline Vector<double> exp2(Vector<double> x) {
  for (int i = 0; i < kLanes<double>; ++i) x[i] = __builtin_exp2(x[i]);
  return x;
}

// What becomes of C: the product, C with the product's terms added one by one, or C plus the product. The last is more
// accurate; the second is faster where C is not in cache, as it is loaded before there is anything to wait for.
enum class Into { kProduct, kChain, kSum };

// C[r, v] from sum_k A(r, k) B[k, v] for kRows rows and kColumns vectors, all in registers.
// A(r, k) = a[r * a_row + k * a_depth]; rows of B and C are b_depth and c_row elements apart.
template <int kRows, int kColumns, Into kInto, typename T>
inline __attribute__((always_inline)) void tile(const T* __restrict a, int64_t a_row, int64_t a_depth,
                                                const T* __restrict b, int64_t b_depth, T* __restrict c, int64_t c_row,
                                                int64_t depth) {
  constexpr int kWidth = kLanes<T>;
  Vector<T> sum[kRows][kColumns];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < kColumns; ++v) {
      sum[r][v] = kInto == Into::kChain ? load(c + r * c_row + v * kWidth) : Vector<T>{};
    }
  for (int64_t k = 0; k < depth; ++k) {
    Vector<T> column[kColumns];
#pragma GCC unroll 8
    for (int v = 0; v < kColumns; ++v) column[v] = load(b + v * kWidth);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const T value = a[r * a_row];
#pragma GCC unroll 8
      for (int v = 0; v < kColumns; ++v) sum[r][v] += value * column[v];
    }
    a += a_depth;
    b += b_depth;
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < kColumns; ++v) {
      T* const to = c + r * c_row + v * kWidth;
      store(to, kInto == Into::kSum ? load(to) + sum[r][v] : sum[r][v]);
    }
}

template <int kColumns, Into kInto, typename T>
inline void tile_rows(int rows, const T* a, int64_t a_row, int64_t a_depth, const T* b, int64_t b_depth, T* c,
                      int64_t c_row, int64_t depth) {
  switch (rows) {
    case 6: return tile<6, kColumns, kInto>(a, a_row, a_depth, b, b_depth, c, c_row, depth);
    case 5: return tile<5, kColumns, kInto>(a, a_row, a_depth, b, b_depth, c, c_row, depth);
    case 4: return tile<4, kColumns, kInto>(a, a_row, a_depth, b, b_depth, c, c_row, depth);
    case 3: return tile<3, kColumns, kInto>(a, a_row, a_depth, b, b_depth, c, c_row, depth);
    case 2: return tile<2, kColumns, kInto>(a, a_row, a_depth, b, b_depth, c, c_row, depth);
    default: return tile<1, kColumns, kInto>(a, a_row, a_depth, b, b_depth, c, c_row, depth);
  }
}

// Rows of a matrix that are wanted soon, fetched a few lines at a time: all at once they would hold up other loads.
template <bool kWritten>
class Ahead {
 public:
  Ahead() : at_(nullptr), stride_(0), width_(0), rows_(0) {}
  template <typename T>
  Ahead(const T* matrix, int64_t row, int64_t stride, int64_t rows, int64_t columns)
      : at_(reinterpret_cast<const char*>(matrix + row * stride)), stride_(stride * int64_t(sizeof(T))),
        width_(columns * int64_t(sizeof(T))), rows_(rows) {}
  int64_t lines() const { return rows_ * ((width_ + 63) / 64); }
  void fetch(int64_t lines) {
    for (; lines > 0 && rows_ > 0; --lines) {
      __builtin_prefetch(at_ + offset_, kWritten, 2);
      offset_ += 64;
      if (offset_ < width_) continue;
      offset_ = 0;
      at_ += stride_;
      --rows_;
    }
  }

 private:
  const char* at_;
  int64_t stride_, width_, rows_, offset_ = 0;
};

// C [rows, columns] from A [rows, depth] B [depth, columns]; columns is a multiple of the vector width.
// Column tiles outside, row tiles inside: a column panel of B stays in the nearest caches.
template <Into kInto, typename T>
inline void multiply_panels(int64_t rows, int64_t columns, int64_t depth, const T* a, int64_t a_row, int64_t a_depth,
                            const T* b, int64_t b_depth, T* c, int64_t c_row, Ahead<false> next_a, Ahead<true> next_c) {
  constexpr int kWidth = kLanes<T>;
  const int64_t tiles = (rows + kTileRows - 1) / kTileRows * ((columns / kWidth + kTileVectors - 1) / kTileVectors);
  const int64_t share_a = (next_a.lines() + tiles - 1) / tiles, share_c = (next_c.lines() + tiles - 1) / tiles;
  for (int64_t column = 0; column < columns;) {
    const int64_t vectors = (columns - column) / kWidth;
    const int wide = int(vectors < kTileVectors ? vectors : kTileVectors);
    for (int64_t row = 0; row < rows; row += kTileRows) {
      const int height = int(rows - row < kTileRows ? rows - row : kTileRows);
      const T *ap = a + row * a_row, *bp = b + column;
      T* cp = c + row * c_row + column;
      next_a.fetch(share_a);
      next_c.fetch(share_c);
      switch (wide) {
#if defined(__AVX512F__)
        case 4: tile_rows<4, kInto>(height, ap, a_row, a_depth, bp, b_depth, cp, c_row, depth); break;
        case 3: tile_rows<3, kInto>(height, ap, a_row, a_depth, bp, b_depth, cp, c_row, depth); break;
#endif
        case 2: tile_rows<2, kInto>(height, ap, a_row, a_depth, bp, b_depth, cp, c_row, depth); break;
        default: tile_rows<1, kInto>(height, ap, a_row, a_depth, bp, b_depth, cp, c_row, depth); break;
      }
    }
    column += wide * kWidth;
  }
}

// C (+)= A B for any depth. Where A is read along its rows, they go by groups, and the next group is fetched meanwhile:
// those of later calls too, of which `following` rows lie behind these in A and C.
template <bool kAccumulate, typename T>
inline void multiply(int64_t rows, int64_t columns, int64_t depth, const T* a, int64_t a_row, int64_t a_depth,
                     const T* b, int64_t b_depth, T* c, int64_t c_row, int64_t following = 0) {
  constexpr Into kFirst = kAccumulate ? Into::kChain : Into::kProduct;
  const int64_t size = a_depth == 1 ? kGroup : rows;
  for (int64_t row = 0; row < rows; row += size, a += size * a_row, c += size * c_row) {
    const int64_t count = rows - row < size ? rows - row : size,
                  left = a_depth == 1 ? rows - row - count + following : 0;
    const int64_t next = left < kGroup ? left : kGroup;
    for (int64_t k = 0; k < depth; k += kDepth) {
      const int64_t block = depth - k < kDepth ? depth - k : kDepth;
      const Ahead<false> next_a(a + k, count, a_row, next, block);
      const Ahead<true> next_c(c, count, c_row, k == 0 ? next : 0, columns);
      const T *ak = a + k * a_depth, *bk = b + k * b_depth;
      if (k == 0)
        multiply_panels<kFirst>(count, columns, block, ak, a_row, a_depth, bk, b_depth, c, c_row, next_a, next_c);
      else
        multiply_panels<Into::kSum>(count, columns, block, ak, a_row, a_depth, bk, b_depth, c, c_row, next_a, next_c);
    }
  }
}

// Rows of a strip: `most`, or fewer where there are fewer or where they would fill 4 MiB; whole vectors, one at least.
template <typename T>
inline int64_t strip_rows(int64_t rows, int64_t stride, int64_t most) {
  constexpr int64_t kWidth = kLanes<T>;
  const int64_t fit = (int64_t(4) << 20) / (stride * int64_t(sizeof(T)) + 1) / kWidth * kWidth;
  const int64_t whole = (rows + kWidth - 1) / kWidth * kWidth, least = whole < fit ? whole : fit;
  return least > most ? most : least < kWidth ? kWidth : least;
}

// Threads worth starting: each should have `grain` operations at least, or waking it costs more than it brings. A build
// that looks for races (HELLM_EVERY_THREAD) starts all, as its inputs are small.
inline int useful_threads(int requested, double operations, double grain) {
#if defined(HELLM_EVERY_THREAD)
  return requested;
#endif
  const double most = operations / grain;
  return most >= requested ? requested : most < 1 ? 1 : int(most);
}

// Uninitialised scratch on a cache-line boundary.
template <typename T>
class Buffer {
 public:
  explicit Buffer(int64_t size) : data_(static_cast<T*>(std::aligned_alloc(64, (size * sizeof(T) + 64) / 64 * 64))) {
    if (data_ == nullptr) throw std::bad_alloc();
  }
  ~Buffer() { std::free(data_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  operator T*() const { return data_; }

 private:
  T* data_;
};

// |x| = norm / scale, squares summed in double. The scale is a power of two: 1, but where a square of float64 would
// over- or underflow.
struct Length {
  double norm, scale;
};

template <typename S>
inline Length length(const S* x, int64_t dim) {
  const auto norm = [=](double scale) {
    double square = 0;
    for (int64_t k = 0; k < dim; ++k) {
      const double value = double(to_float(x[k])) * scale;
      square += value * value;
    }
    return __builtin_sqrt(square);
  };
  const double plain = norm(1.0);
  if (!std::is_same<S, double>::value || (plain > 1e-140 && plain < 1e150)) return {plain, 1.0};
  double largest = 0;
  for (int64_t k = 0; k < dim; ++k) {
    const double value = __builtin_fabs(double(to_float(x[k])));
    largest = value > largest ? value : largest;
  }
  if (largest == 0 || largest > std::numeric_limits<double>::max()) return {plain, 1.0};
  int exponent;
  __builtin_frexp(largest, &exponent);
  const double scale = __builtin_ldexp(1.0, exponent < -1020 ? 1020 : exponent > 1020 ? -1020 : -exponent);
  return {norm(scale), scale};
}

// unit [stride] = x [dim] / |x|, zero padded; false for a row that is all zero.
template <typename T, typename S>
inline bool normalize_row(const S* x, int64_t dim, int64_t stride, T* unit) {
  const auto [norm, scale] = length(x, dim);
  const double inverse = norm > 0 ? 1.0 / norm : 0.0;
  using Value = std::conditional_t<std::is_same<T, double>::value, double, float>;
  for (int64_t k = 0; k < dim; ++k) from_float(Value(double(to_float(x[k])) * scale * inverse), unit[k]);
  for (int64_t k = dim; k < stride; ++k) unit[k] = T{};
  return norm > 0;
}

// Calls run<accumulation type, storage type>(arguments...).
#define HELLM_BY_DTYPE(run, arguments, ...)                                     \
  switch (arguments.dtype) {                                                    \
    case DType::kFloat32: return run<float, float>(arguments, __VA_ARGS__);     \
    case DType::kFloat64: return run<double, double>(arguments, __VA_ARGS__);   \
    case DType::kBFloat16: return run<float, BFloat16>(arguments, __VA_ARGS__); \
    case DType::kFloat16: return run<float, Float16>(arguments, __VA_ARGS__);   \
  }

}  // namespace hellm::cpu::HELLM_ISA
