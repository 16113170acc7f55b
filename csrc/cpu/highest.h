// Maxima of vectors: the value, or who it is.
#pragma once

#include "act.h"

namespace aliasfused {
namespace AF_ISA {
namespace {

// The lanes in which a pixel beats the best one so far, as the processor holds them; `yes` there, `no` elsewhere.
template <typename V>
INLINED inline auto beat(V value, V best) {
  return (value > best) | (value != value);
}
template <typename Lanes, typename V>
INLINED inline V where(Lanes lanes, V yes, V no) {
  return lanes ? yes : no;
}
#if defined(__AVX512BW__)
INLINED inline __mmask16 beat(Vec<float> value, Vec<float> best) {
  return _mm512_cmp_ps_mask(value, best, _CMP_GT_OQ) | _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
}
INLINED inline Vec<float> where(__mmask16 lanes, Vec<float> yes, Vec<float> no) { return _mm512_mask_mov_ps(no, lanes, yes); }
#endif

// The higher of two, or what is nan; of equals the second.
INLINED inline Vec<float> higher(Vec<float> a, Vec<float> b) {
#if defined(__AVX512BW__)
  return a != a ? a : (Vec<float>)_mm512_max_ps(a, b);
#elif defined(__AVX2__)
  return a != a ? a : (Vec<float>)_mm256_max_ps(a, b);
#else
  return (a > b) | (a != a) ? a : b;
#endif
}
INLINED inline Vec<double> higher(Vec<double> a, Vec<double> b) { return (a > b) | (a != a) ? a : b; }

// sum + v in the lanes whose byte is `number`. (Compilers widen bytes one by one.)
INLINED inline Vec<float> add_where_equal(Vec<float> sum, const int8_t* bytes, int number, Vec<float> v) {
#if defined(__AVX512BW__)
  const __m128i all = _mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes));
  return _mm512_mask_add_ps(sum, _mm_cmpeq_epi8_mask(all, _mm_set1_epi8(static_cast<char>(number))), sum, v);
#elif defined(__AVX2__)
  const __m128i all = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(bytes));
  const __m128i equal = _mm_cmpeq_epi8(all, _mm_set1_epi8(static_cast<char>(number)));
  return sum + _mm256_and_ps(_mm256_castsi256_ps(_mm256_cvtepi8_epi32(equal)), v);
#else
  for (int i = 0; i < Vector<float>::lanes; ++i) sum[i] += bytes[i] == number ? v[i] : 0;
  return sum;
#endif
}
INLINED inline Vec<double> add_where_equal(Vec<double> sum, const int8_t* bytes, int number, Vec<double> v) {
  for (int i = 0; i < Vector<double>::lanes; ++i) sum[i] += bytes[i] == number ? v[i] : 0;
  return sum;
}

// The highest of some values, and which of them it is, as a byte: the first of equals, or the last nan.
template <typename acc>
struct Highest {
  using V = Vector<acc>;
  typedef int8_t Bytes __attribute__((vector_size(V::lanes)));
  Vec<acc> value;
  typename V::index number;

  INLINED Highest(Vec<acc> v, int n) : value(v), number(typename V::index{} + n) {}
  INLINED void meet(Vec<acc> v, int n) {
    const auto wins = beat(v, value);
    value = where(wins, v, value);
    number = wins ? typename V::index{} + n : number;
  }
  INLINED void store_number(int8_t* p) const {
    const Bytes bytes = __builtin_convertvector(number, Bytes);
    std::memcpy(p, &bytes, sizeof bytes);
  }
};
#if defined(__AVX512BW__)
template <>
struct Highest<float> {
  Vec<float> value;
  __m128i number;

  INLINED Highest(Vec<float> v, int n) : value(v), number(_mm_set1_epi8(static_cast<char>(n))) {}
  INLINED void meet(Vec<float> v, int n) {
    const __mmask16 wins = beat(v, value);
    value = where(wins, v, value);
    number = _mm_mask_mov_epi8(number, wins, _mm_set1_epi8(static_cast<char>(n)));
  }
  INLINED void store_number(int8_t* p) const { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), number); }
};
#endif

}  // namespace
}  // namespace AF_ISA
}  // namespace aliasfused
