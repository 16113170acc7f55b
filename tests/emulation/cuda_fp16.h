// The 16-bit float of cuda_fp16.h, converted in software with ties to even.
#pragma once

#include "cuda_runtime.h"

struct __half {
  uint16_t bits;
  __half() = default;
  explicit __half(float value) {
    uint32_t u;
    std::memcpy(&u, &value, 4);
    const uint32_t sign = u >> 16 & 0x8000, magnitude = u & 0x7fffffff;
    if (magnitude > 0x7f800000) {
      bits = static_cast<uint16_t>(sign | 0x7fff);
    } else if (magnitude >= 0x47800000) {
      bits = static_cast<uint16_t>(sign | 0x7c00);
    } else {
      // Below 2^-14 the spacing is fixed; above, 13 bits of the significand go. A carry into the exponent is right.
      const int exponent = static_cast<int>(magnitude >> 23), drop = exponent < 113 ? 126 - exponent : 13;
      const uint64_t significand = exponent < 113 ? (magnitude & 0x7fffff) | 0x800000 : magnitude - (112u << 23);
      const uint64_t half = drop > 40 ? 0 : uint64_t{1} << (drop - 1);
      const uint64_t rounded = drop > 40 ? 0 : (significand + half - 1 + (significand >> drop & 1)) >> drop;
      bits = static_cast<uint16_t>(sign | rounded);
    }
  }
  explicit operator float() const {
    const uint32_t exponent = bits >> 10 & 31, fraction = bits & 0x3ff;
    float value;
    if (exponent == 0) {
      value = static_cast<float>(fraction) * 0x1p-24f;
    } else {
      const uint32_t u = (exponent == 31 ? 255u : exponent + 112) << 23 | fraction << 13;
      std::memcpy(&value, &u, 4);
    }
    return bits & 0x8000 ? -value : value;
  }
};

struct alignas(4) __half2 {
  __half x, y;
};
inline __half2 __floats2half2_rn(float a, float b) { return {__half(a), __half(b)}; }
inline __half __hmax_nan(__half a, __half b) {
  const float x = static_cast<float>(a), y = static_cast<float>(b);
  return x > y || x != x ? a : b;
}
inline __half2 __hmax2_nan(__half2 a, __half2 b) { return {__hmax_nan(a.x, b.x), __hmax_nan(a.y, b.y)}; }
