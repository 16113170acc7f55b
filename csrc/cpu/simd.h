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

// Helpers and loop bodies: a call would pass vectors through memory.
#define INLINED __attribute__((always_inline))
// Inner loops: alone in their function, they have all its registers.
#define NOINLINED __attribute__((noinline))

namespace aliasfused {
namespace AF_ISA {

#if defined(__AVX512BW__)
constexpr int vector_bytes = 64;
#else
constexpr int vector_bytes = 32;  // emulated by the compiler where the processor's are shorter
#endif
#if defined(__AVX2__)
constexpr bool vector_instructions = true;
#else
constexpr bool vector_instructions = false;
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

  INLINED static type load(const acc* p) { return *reinterpret_cast<const unaligned*>(p); }
  INLINED static void store(acc* p, type v) { *reinterpret_cast<unaligned*>(p) = v; }
  INLINED static void store_half(acc* p, type v) {
#if defined(__AVX512BW__)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_castsi512_si256((__m512i)v));
#elif defined(__AVX2__)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128((__m256i)v));
#else
    std::memcpy(p, &v, sizeof v / 2);
#endif
  }
};

// Loaded once, where the compiler would rather load it again for every use.
template <typename V>
INLINED inline V in_register(V v) {
#if defined(__AVX2__)
  asm("" : "+v"(v));
#endif
  return v;
}

template <typename acc>
struct Unit {
  typename Vector<acc>::type a, b;
};

// The index vector start, start + step, ...
template <typename acc>
INLINED inline typename Vector<acc>::index iota(int start, int step) {
  typename Vector<acc>::index v;
  for (int i = 0; i < Vector<acc>::lanes; ++i) v[i] = start + step * i;
  return v;
}

template <typename acc>
INLINED inline Unit<acc> split(Unit<acc> u) {
  return {__builtin_shuffle(u.a, u.b, iota<acc>(0, 2)), __builtin_shuffle(u.a, u.b, iota<acc>(1, 2))};
}

template <typename acc>
INLINED inline Unit<acc> interleave(Unit<acc> u) {
  typename Vector<acc>::index low, high;
  for (int i = 0; i < Vector<acc>::lanes; ++i) {
    low[i] = i / 2 + (i % 2) * Vector<acc>::lanes;
    high[i] = low[i] + Vector<acc>::lanes / 2;
  }
  return {__builtin_shuffle(u.a, u.b, low), __builtin_shuffle(u.a, u.b, high)};
}

// Loads and stores of whole and partial units (n elements; the lanes beyond are zero), and of single vectors, which are in
// natural order for every type.
template <typename T>
struct Lanes;

// Elements that are accumulated as they are: float and double.
template <typename acc>
struct WideLanes {
  using V = Vector<acc>;
  static constexpr int unit = 2 * V::lanes;
  static constexpr bool is_split = false;
  INLINED static Unit<acc> load(const acc* p) { return {V::load(p), V::load(p + V::lanes)}; }
  INLINED static void store(acc* p, Unit<acc> u) { V::store(p, u.a), V::store(p + V::lanes, u.b); }
  // A store to aligned memory that bypasses the caches, where the processor has one.
  INLINED static void stream(acc* p, Unit<acc> u) {
#if defined(__AVX512BW__)
    _mm512_stream_si512(reinterpret_cast<__m512i*>(p), (__m512i)u.a);
    _mm512_stream_si512(reinterpret_cast<__m512i*>(p + V::lanes), (__m512i)u.b);
#else
    store(p, u);
#endif
  }
  INLINED static void store_natural(acc* p, Unit<acc> u) { store(p, u); }
  INLINED static typename V::type load_vector(const acc* p) { return V::load(p); }
  INLINED static void store_vector(acc* p, typename V::type v) { V::store(p, v); }
  INLINED static typename V::type load_vector(const acc* p, int n) {
    acc copy[V::lanes] = {};
    std::memcpy(copy, p, n * sizeof(acc));
    return V::load(copy);
  }
  INLINED static void store_vector(acc* p, typename V::type v, int n) { std::memcpy(p, &v, n * sizeof(acc)); }
  INLINED static Unit<acc> load(const acc* p, int n) {
    acc copy[unit] = {};
    std::memcpy(copy, p, n * sizeof(acc));
    return load(copy);
  }
  INLINED static void store(acc* p, Unit<acc> u, int n) {
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
  INLINED static __mmask16 first(int n) { return n >= 16 ? 0xffff : n <= 0 ? 0 : (1u << n) - 1; }
  INLINED static Unit<float> load(const float* p, int n) {
    return {_mm512_maskz_loadu_ps(first(n), p), _mm512_maskz_loadu_ps(first(n - 16), p + 16)};
  }
  INLINED static void store(float* p, Unit<float> u, int n) {
    _mm512_mask_storeu_ps(p, first(n), u.a);
    _mm512_mask_storeu_ps(p + 16, first(n - 16), u.b);
  }
  using WideLanes::load_vector;
  using WideLanes::store_vector;
  INLINED static V::type load_vector(const float* p, int n) { return _mm512_maskz_loadu_ps(first(n), p); }
  INLINED static void store_vector(float* p, V::type v, int n) { _mm512_mask_storeu_ps(p, first(n), v); }
#elif defined(__AVX2__)
  using WideLanes::load;
  using WideLanes::store;
  INLINED static __m256i first(int n) { return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7)); }
  INLINED static Unit<float> load(const float* p, int n) {
    return {_mm256_maskload_ps(p, first(n)), _mm256_maskload_ps(p + 8, first(n - 8))};
  }
  INLINED static void store(float* p, Unit<float> u, int n) {
    _mm256_maskstore_ps(p, first(n), u.a);
    _mm256_maskstore_ps(p + 8, first(n - 8), u.b);
  }
  using WideLanes::load_vector;
  using WideLanes::store_vector;
  INLINED static V::type load_vector(const float* p, int n) { return _mm256_maskload_ps(p, first(n)); }
  INLINED static void store_vector(float* p, V::type v, int n) { _mm256_maskstore_ps(p, first(n), v); }
#endif
};

// A unit of 16-bit elements as one vector of bits.
struct HalfBits {
  using V = Vector<float>;
  using Bits = V::index;
  static constexpr int unit = 2 * V::lanes;
  typedef V::lane_index unaligned __attribute__((vector_size(vector_bytes), aligned(2), may_alias));
  INLINED static Bits load(const void* p) { return *static_cast<const unaligned*>(p); }
  INLINED static void store(void* p, Bits v) { *static_cast<unaligned*>(p) = v; }
#if defined(__AVX512BW__)
  INLINED static __mmask32 first(int n) { return n >= 32 ? 0xffffffffu : (1u << n) - 1; }
  INLINED static Bits load(const void* p, int n) { return (Bits)_mm512_maskz_loadu_epi16(first(n), p); }
  INLINED static void store(void* p, Bits v, int n) { _mm512_mask_storeu_epi16(p, first(n), (__m512i)v); }
#else
  INLINED static Bits load(const void* p, int n) {
    uint16_t copy[unit] = {};
    std::memcpy(copy, p, n * 2);
    return load(copy);
  }
  INLINED static void store(void* p, Bits v, int n) {
    uint16_t copy[unit];
    store(copy, v);
    std::memcpy(p, copy, n * 2);
  }
#endif
};

// What bfloat16 and float16 share: a unit is one vector of bits, a single vector half of one.
template <typename Self, typename T>
struct HalfLanes {
  using V = Vector<float>;
  using Bits = HalfBits::Bits;
  typedef uint16_t HalfVector __attribute__((vector_size(vector_bytes / 2)));
  typedef HalfVector unaligned_half __attribute__((aligned(2), may_alias));
  static constexpr int unit = HalfBits::unit;

  INLINED static Unit<float> load(const T* p) { return Self::widen(HalfBits::load(p)); }
  INLINED static Unit<float> load(const T* p, int n) { return Self::widen(HalfBits::load(p, n)); }
  INLINED static void store(T* p, Unit<float> u) { HalfBits::store(p, Self::narrow(u)); }
  INLINED static void store(T* p, Unit<float> u, int n) { HalfBits::store(p, Self::narrow(u), n); }
  INLINED static void stream(T* p, Unit<float> u) {
#if defined(__AVX512BW__)
    _mm512_stream_si512(reinterpret_cast<__m512i*>(p), (__m512i)Self::narrow(u));
#else
    store(p, u);
#endif
  }
  // A unit in natural order, whatever the order of the other functions.
  INLINED static void store_natural(T* p, Unit<float> u) {
#if defined(__AVX512BF16__)
    if constexpr (Self::is_split) return HalfBits::store(p, (Bits)_mm512_cvtne2ps_pbh(u.b, u.a));
#endif
    store_vector(p, u.a), store_vector(p + V::lanes, u.b);
  }
  INLINED static V::type load_vector(const T* p) { return Self::widen(*reinterpret_cast<const unaligned_half*>(p)); }
  INLINED static void store_vector(T* p, V::type v) { *reinterpret_cast<unaligned_half*>(p) = Self::narrow(v); }
#if defined(__AVX512BW__)
  INLINED static __mmask16 first(int n) { return n >= 16 ? 0xffff : (1u << n) - 1; }
  INLINED static V::type load_vector(const T* p, int n) { return Self::widen((HalfVector)_mm256_maskz_loadu_epi16(first(n), p)); }
  INLINED static void store_vector(T* p, V::type v, int n) { _mm256_mask_storeu_epi16(p, first(n), (__m256i)Self::narrow(v)); }
#else
  INLINED static V::type load_vector(const T* p, int n) {
    HalfVector bits = {};
    std::memcpy(&bits, p, n * 2);
    return Self::widen(bits);
  }
  INLINED static void store_vector(T* p, V::type v, int n) {
    const HalfVector bits = Self::narrow(v);
    std::memcpy(p, &bits, n * 2);
  }
#endif
};

template <>
struct Lanes<bfloat16> : HalfLanes<Lanes<bfloat16>, bfloat16> {
  static constexpr bool is_split = true;
  typedef uint32_t Unsigned __attribute__((vector_size(vector_bytes)));

  INLINED static Unit<float> widen(Bits v) {
    v = in_register(v);
    return {(V::type)(v << 16), (V::type)(v & (int32_t)0xffff0000)};
  }
  INLINED static V::type widen(HalfVector v) {
#if defined(__AVX512BW__)
    return (V::type)_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)v), 16);
#elif defined(__AVX2__)
    return (V::type)_mm256_slli_epi32(_mm256_cvtepu16_epi32((__m128i)v), 16);
#else
    return (V::type)(__builtin_convertvector(v, Unsigned) << 16);
#endif
  }
#if defined(__AVX512BF16__)
  INLINED static Bits narrow(Unit<float> u) {
    // Natural order out of the conversion, so the split unit is joined first.
    const Unit<float> n = interleave(u);
    return (Bits)_mm512_cvtne2ps_pbh(n.b, n.a);
  }
  INLINED static HalfVector narrow(V::type v) { return (HalfVector)_mm512_cvtneps_pbh(v); }
#else
  // Round to nearest even into the upper 16 bits of each lane; a nan stays one.
  INLINED static Unsigned round(V::type v) {
    const Unsigned u = (Unsigned)v;
    return v == v ? u + 0x7fff + ((u >> 16) & 1) : u | 0x00400000;
  }
  INLINED static Bits narrow(Unit<float> u) { return (Bits)((round(u.a) >> 16) | (round(u.b) & 0xffff0000)); }
  INLINED static HalfVector narrow(V::type v) { return __builtin_convertvector(round(v) >> 16, HalfVector); }
#endif
};

template <>
struct Lanes<float16> : HalfLanes<Lanes<float16>, float16> {
  static constexpr bool is_split = false;

#if defined(__AVX512BW__)
  INLINED static V::type widen(HalfVector v) { return _mm512_cvtph_ps((__m256i)v); }
  INLINED static HalfVector narrow(V::type v) { return (HalfVector)_mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT); }
#elif defined(__F16C__)
  INLINED static V::type widen(HalfVector v) { return _mm256_cvtph_ps((__m128i)v); }
  INLINED static HalfVector narrow(V::type v) { return (HalfVector)_mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT); }
#else
  INLINED static V::type widen(HalfVector v) {
    V::type wide;
    for (int i = 0; i < V::lanes; ++i) {
      _Float16 h;
      const uint16_t bits = v[i];
      std::memcpy(&h, &bits, 2);
      wide[i] = h;
    }
    return wide;
  }
  INLINED static HalfVector narrow(V::type v) {
    HalfVector bits;
    for (int i = 0; i < V::lanes; ++i) {
      const _Float16 h = (_Float16)v[i];
      uint16_t one;
      std::memcpy(&one, &h, 2);
      bits[i] = one;
    }
    return bits;
  }
#endif
  INLINED static Unit<float> widen(Bits v) {
    HalfVector halves[2];
    std::memcpy(halves, &v, sizeof v);
    return {widen(halves[0]), widen(halves[1])};
  }
  INLINED static Bits narrow(Unit<float> u) {
    const HalfVector halves[2] = {narrow(u.a), narrow(u.b)};
    Bits v;
    std::memcpy(&v, halves, sizeof v);
    return v;
  }
};

// A unit in natural order, whatever the order of T's loads, and back.
template <typename T, typename acc>
INLINED inline Unit<acc> to_natural(Unit<acc> u) {
  if constexpr (Lanes<T>::is_split) return interleave(u);
  return u;
}
template <typename T, typename acc>
INLINED inline Unit<acc> from_natural(Unit<acc> u) {
  if constexpr (Lanes<T>::is_split) return split(u);
  return u;
}

template <typename T>
INLINED inline acc_t<T> widen(T v) {
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
