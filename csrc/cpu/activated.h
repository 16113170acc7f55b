// What a pixel passes through as a blur loads it: an affine of its channel and the activations that cost next to nothing.
#pragma once

#include "act.h"
#include "terms.h"

namespace aliasfused {
namespace AF_ISA {
namespace {

// u, but no less than `low` and no more than `high`; what is nan stays so.
INLINED inline Vec<float> clamped(Vec<float> u, Vec<float> low, Vec<float> high) {
#if defined(__AVX512BW__)
  return _mm512_min_ps(high, _mm512_max_ps(low, u));
#elif defined(__AVX2__)
  return _mm256_min_ps(high, _mm256_max_ps(low, u));
#else
  u = u < low ? low : u;
  return u > high ? high : u;
#endif
}

// none, relu and relu6, after an affine or without.
template <typename T, bool AFFINE>
struct Activated {
  using V = Vector<float>;
  const float* table;  // center, scale and shift of every channel, `pitch` apart; a whole unit can be read from any of them on
  index_t pitch;
  float low, high;

  // In registers, whatever is stored meanwhile.
  struct Prepared {
    Unit<float> center, scale, shift;
    V::type low, high;
    INLINED Unit<float> operator()(Unit<float> x) const {
      if (AFFINE) x = {(x.a - center.a) * scale.a + shift.a, (x.b - center.b) * scale.b + shift.b};
      return {clamped(x.a, low, high), clamped(x.b, low, high)};
    }
  };
  INLINED Prepared row(index_t c) const {
    return prepared([=](int i) INLINED {
      const auto number = V::type{} + table[i * pitch + c];
      return Unit<float>{number, number};
    });
  }
  INLINED Prepared pixel(index_t c) const {
    return prepared([=](int i) INLINED { return from_natural<T>(Lanes<float>::load(table + i * pitch + c)); });
  }

 private:
  template <typename Of>
  INLINED Prepared prepared(Of&& of) const {
    Prepared p;
    p.low = V::type{} + low, p.high = V::type{} + high;
    if constexpr (AFFINE) p.center = of(0), p.scale = of(1), p.shift = of(2);
    return p;
  }
};

// f of what pixels pass through, if that is one of these.
template <typename T, typename F>
bool as_loaded(const Prologue& pre, index_t channels, F&& f) {
  constexpr float infinity = __builtin_inff();
  if (pre.act != Act::none && pre.act != Act::relu && pre.act != Act::relu6) return false;
  const float low = pre.act == Act::none ? -infinity : 0, high = pre.act == Act::relu6 ? 6 : infinity;
  const index_t pitch = round_up(channels, Lanes<T>::unit) + Lanes<T>::unit;
  const Scratch<float> table(pre.affine ? 3 * pitch : 0);
  for (index_t i = 0; pre.affine && i < 3 * pitch; ++i)
    table.data[i] = i % pitch < channels ? static_cast<const float*>(pre.affine)[i / pitch * channels + i % pitch] : 0;
  if (pre.affine) f(Activated<T, true>{table.data, pitch, low, high});
  else f(Activated<T, false>{nullptr, 0, low, high});
  return true;
}

}  // namespace
}  // namespace AF_ISA
}  // namespace aliasfused
