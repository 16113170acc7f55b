// Vectors of one instruction set. This file and everything that includes it is compiled once per instruction set, inside a
// namespace of that name (AF_ISA), so that no inline function of one can be linked into another.
//
// Data moves in units of two vectors. The lanes of a unit are in memory order ("natural") for all types but bfloat16, whose
// even elements fill the first vector and odd ones the second ("split"): that costs one shift and one mask, no shuffle,
// and is the order in which stride 2 wants them.
#pragma once

#include <cstring>
#include <type_traits>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "../window.h"

namespace aliasfused {
namespace AF_ISA {

#if defined(__AVX512BW__)
constexpr int vector_bytes = 64;
#else
constexpr int vector_bytes = 32;
#endif

struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

template <typename acc>
struct Vector {
  static constexpr int lanes = vector_bytes / sizeof(acc);
  using lane_index = std::conditional_t<sizeof(acc) == 8, int64_t, int32_t>;
  typedef acc type __attribute__((vector_size(vector_bytes)));
  typedef acc unaligned __attribute__((vector_size(vector_bytes), aligned(sizeof(acc)), may_alias));
  typedef lane_index index __attribute__((vector_size(vector_bytes)));

  static type load(const acc* p) { return *reinterpret_cast<const unaligned*>(p); }
  static void store(acc* p, type v) { *reinterpret_cast<unaligned*>(p) = v; }
};

template <typename acc>
struct Unit {
  typename Vector<acc>::type a, b;
};

// The index vector start, start + step, ...
template <typename acc>
inline typename Vector<acc>::index iota(int start, int step) {
  typename Vector<acc>::index v;
  for (int i = 0; i < Vector<acc>::lanes; ++i) v[i] = start + step * i;
  return v;
}

template <typename acc>
inline Unit<acc> split(Unit<acc> u) {
  return {__builtin_shuffle(u.a, u.b, iota<acc>(0, 2)), __builtin_shuffle(u.a, u.b, iota<acc>(1, 2))};
}

template <typename acc>
inline Unit<acc> interleave(Unit<acc> u) {
  typename Vector<acc>::index low, high;
  for (int i = 0; i < Vector<acc>::lanes; ++i) {
    low[i] = i / 2 + (i % 2) * Vector<acc>::lanes;
    high[i] = low[i] + Vector<acc>::lanes / 2;
  }
  return {__builtin_shuffle(u.a, u.b, low), __builtin_shuffle(u.a, u.b, high)};
}

// Loads and stores of whole and partial units (n elements; the lanes beyond are zero).
template <typename T>
struct Lanes;

// Elements that are accumulated as they are: float and double.
template <typename acc>
struct WideLanes {
  using V = Vector<acc>;
  static constexpr int unit = 2 * V::lanes;
  static constexpr bool is_split = false;
  static Unit<acc> load(const acc* p) { return {V::load(p), V::load(p + V::lanes)}; }
  static void store(acc* p, Unit<acc> u) { V::store(p, u.a), V::store(p + V::lanes, u.b); }
  static Unit<acc> load(const acc* p, int n) {
    acc copy[unit] = {};
    std::memcpy(copy, p, n * sizeof(acc));
    return load(copy);
  }
  static void store(acc* p, Unit<acc> u, int n) {
    acc copy[unit];
    store(copy, u);
    std::memcpy(p, copy, n * sizeof(acc));
  }
};

template <>
struct Lanes<double> : WideLanes<double> {};

template <>
struct Lanes<float> : WideLanes<float> {
#if defined(__AVX512BW__)
  using WideLanes::load;
  using WideLanes::store;
  static __mmask16 first(int n) { return n >= 16 ? 0xffff : n <= 0 ? 0 : (1u << n) - 1; }
  static Unit<float> load(const float* p, int n) {
    return {_mm512_maskz_loadu_ps(first(n), p), _mm512_maskz_loadu_ps(first(n - 16), p + 16)};
  }
  static void store(float* p, Unit<float> u, int n) {
    _mm512_mask_storeu_ps(p, first(n), u.a);
    _mm512_mask_storeu_ps(p + 16, first(n - 16), u.b);
  }
#elif defined(__AVX2__)
  using WideLanes::load;
  using WideLanes::store;
  static __m256i first(int n) { return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7)); }
  static Unit<float> load(const float* p, int n) {
    return {_mm256_maskload_ps(p, first(n)), _mm256_maskload_ps(p + 8, first(n - 8))};
  }
  static void store(float* p, Unit<float> u, int n) {
    _mm256_maskstore_ps(p, first(n), u.a);
    _mm256_maskstore_ps(p + 8, first(n - 8), u.b);
  }
#endif
};

// A unit of 16-bit elements as one vector of bits.
struct HalfBits {
  using V = Vector<float>;
  using Bits = V::index;
  static constexpr int unit = 2 * V::lanes;
  typedef V::lane_index unaligned __attribute__((vector_size(vector_bytes), aligned(2), may_alias));
  static Bits load(const void* p) { return *static_cast<const unaligned*>(p); }
  static void store(void* p, Bits v) { *static_cast<unaligned*>(p) = v; }
#if defined(__AVX512BW__)
  static __mmask32 first(int n) { return n >= 32 ? 0xffffffffu : (1u << n) - 1; }
  static Bits load(const void* p, int n) { return (Bits)_mm512_maskz_loadu_epi16(first(n), p); }
  static void store(void* p, Bits v, int n) { _mm512_mask_storeu_epi16(p, first(n), (__m512i)v); }
#else
  static Bits load(const void* p, int n) {
    uint16_t copy[unit] = {};
    std::memcpy(copy, p, n * 2);
    return load(copy);
  }
  static void store(void* p, Bits v, int n) {
    uint16_t copy[unit];
    store(copy, v);
    std::memcpy(p, copy, n * 2);
  }
#endif
};

template <>
struct Lanes<bfloat16> {
  using Bits = HalfBits::Bits;
  using V = Vector<float>;
  static constexpr int unit = HalfBits::unit;
  static constexpr bool is_split = true;
  static Unit<float> widen(Bits v) { return {(V::type)(v << 16), (V::type)(v & (int32_t)0xffff0000)}; }
  // Round to nearest even into the upper 16 bits of each lane; a NaN stays one.
  static Bits round(V::type v) {
    typedef uint32_t unsigned_bits __attribute__((vector_size(vector_bytes)));
    const unsigned_bits u = (unsigned_bits)v;
    const unsigned_bits rounded = u + 0x7fff + ((u >> 16) & 1);
    return (Bits)(v == v ? rounded : u | 0x00400000);
  }
  static Bits narrow(Unit<float> u) {
    typedef uint32_t unsigned_bits __attribute__((vector_size(vector_bytes)));
    return (Bits)((unsigned_bits)round(u.a) >> 16) | (round(u.b) & (int32_t)0xffff0000);
  }
  static Unit<float> load(const bfloat16* p) { return widen(HalfBits::load(p)); }
  static Unit<float> load(const bfloat16* p, int n) { return widen(HalfBits::load(p, n)); }
  static void store(bfloat16* p, Unit<float> u) { HalfBits::store(p, narrow(u)); }
  static void store(bfloat16* p, Unit<float> u, int n) { HalfBits::store(p, narrow(u), n); }
};

template <>
struct Lanes<float16> {
  using Bits = HalfBits::Bits;
  using V = Vector<float>;
  static constexpr int unit = HalfBits::unit;
  static constexpr bool is_split = false;
#if defined(__AVX512BW__)
  static Unit<float> widen(Bits v) {
    return {_mm512_cvtph_ps(_mm512_castsi512_si256((__m512i)v)), _mm512_cvtph_ps(_mm512_extracti64x4_epi64((__m512i)v, 1))};
  }
  static Bits narrow(Unit<float> u) {
    const __m256i low = _mm512_cvtps_ph(u.a, _MM_FROUND_TO_NEAREST_INT), high = _mm512_cvtps_ph(u.b, _MM_FROUND_TO_NEAREST_INT);
    return (Bits)_mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
  }
#elif defined(__F16C__)
  static Unit<float> widen(Bits v) {
    return {_mm256_cvtph_ps(_mm256_castsi256_si128((__m256i)v)), _mm256_cvtph_ps(_mm256_extracti128_si256((__m256i)v, 1))};
  }
  static Bits narrow(Unit<float> u) {
    const __m128i low = _mm256_cvtps_ph(u.a, _MM_FROUND_TO_NEAREST_INT), high = _mm256_cvtps_ph(u.b, _MM_FROUND_TO_NEAREST_INT);
    return (Bits)_mm256_inserti128_si256(_mm256_castsi128_si256(low), high, 1);
  }
#else
  static Unit<float> widen(Bits v) {
    _Float16 half[unit];
    float wide[unit];
    std::memcpy(half, &v, sizeof half);
    for (int i = 0; i < unit; ++i) wide[i] = half[i];
    return {V::load(wide), V::load(wide + V::lanes)};
  }
  static Bits narrow(Unit<float> u) {
    _Float16 half[unit];
    float wide[unit];
    V::store(wide, u.a), V::store(wide + V::lanes, u.b);
    for (int i = 0; i < unit; ++i) half[i] = (_Float16)wide[i];
    Bits v;
    std::memcpy(&v, half, sizeof half);
    return v;
  }
#endif
  static Unit<float> load(const float16* p) { return widen(HalfBits::load(p)); }
  static Unit<float> load(const float16* p, int n) { return widen(HalfBits::load(p, n)); }
  static void store(float16* p, Unit<float> u) { HalfBits::store(p, narrow(u)); }
  static void store(float16* p, Unit<float> u, int n) { HalfBits::store(p, narrow(u), n); }
};

// A unit in natural order, whatever the order of T's loads, and back.
template <typename T, typename acc>
inline Unit<acc> to_natural(Unit<acc> u) {
  if constexpr (Lanes<T>::is_split) return interleave(u);
  return u;
}
template <typename T, typename acc>
inline Unit<acc> from_natural(Unit<acc> u) {
  if constexpr (Lanes<T>::is_split) return split(u);
  return u;
}

template <typename T>
inline acc_t<T> widen(T v) {
  if constexpr (std::is_same_v<T, bfloat16>) {
    const uint32_t bits = (uint32_t)v.bits << 16;
    float f;
    std::memcpy(&f, &bits, 4);
    return f;
  } else if constexpr (std::is_same_v<T, float16>) {
    _Float16 h;
    std::memcpy(&h, &v.bits, 2);
    return h;
  } else {
    return v;
  }
}

}  // namespace AF_ISA
}  // namespace aliasfused
