// Activations and their slopes, on vectors. Elementary functions of floats are polynomials, within a few units in the last
// place; those of doubles are the C library's, lane by lane.
#pragma once

#include "../max_blur_pool.h"
#include "simd.h"

namespace aliasfused {
namespace AF_ISA {
namespace {

template <typename acc>
using Vec = typename Vector<acc>::type;

template <typename acc>
INLINED inline Vec<acc> all(double value) {
  return Vec<acc>{} + acc(value);
}

template <typename F>
INLINED inline Vec<double> by_lane(Vec<double> v, F&& f) {
  for (int i = 0; i < Vector<double>::lanes; ++i) v[i] = f(v[i]);
  return v;
}

// first x^n + ... + last.
template <typename... C>
INLINED inline Vec<float> polynomial(Vec<float> x, float first, C... rest) {
  Vec<float> sum = all<float>(first);
  ((sum = sum * x + float(rest)), ...);
  return sum;
}

// e^x = 2^n e^r with |r| <= ln 2 / 2, and 2^n in two factors, so that neither overflows before the product does.
INLINED inline Vec<float> exponential(Vec<float> x) {
  using I = Vector<float>::index;
  const Vec<float> clipped = x > 128.0f ? all<float>(128) : x < -128.0f ? all<float>(-128) : x;
  const Vec<float> shifted = clipped * 1.44269504f + 12582912.0f;  // rounds: the sum has no bits behind the point
  const Vec<float> n = shifted - 12582912.0f;
  const Vec<float> r = (clipped - n * 0.693359375f) + n * 2.12194440e-4f;
  Vec<float> p = polynomial(r, 1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1);
  p = (p * r) * r + r + 1.0f;
  const I whole = (I)shifted - 0x4b400000, half = whole >> 1;
  const Vec<float> y = p * (Vec<float>)((half + 127) << 23) * (Vec<float>)((whole - half + 127) << 23);
  return x == x ? y : x;
}
INLINED inline Vec<double> exponential(Vec<double> x) {
  return by_lane(x, [](double v) { return __builtin_exp(v); });
}

// log(1 + x) for x >= 0: the logarithm of the rounded sum, mended by what rounding took from it.
INLINED inline Vec<float> logarithm_1p(Vec<float> x) {
  using I = Vector<float>::index;
  const Vec<float> u = x + 1.0f;
  const I bits = (I)u - 0x3f3504f3;
  const I exponent = bits >> 23;
  const Vec<float> f = (Vec<float>)((bits & 0x7fffff) + 0x3f3504f3) - 1.0f, s = f / (f + 2.0f), z = s * s;
  const Vec<float> n = __builtin_convertvector(exponent, Vec<float>);
  const Vec<float> p = polynomial(z, 2.0 / 11, 2.0 / 9, 2.0 / 7, 2.0 / 5, 2.0 / 3);
  const Vec<float> y = n * 0.693147181f + (s * 2.0f + s * z * p) + (x - (u - 1.0f)) / u;
  return x < 3e38f ? y : x;
}
INLINED inline Vec<double> logarithm_1p(Vec<double> x) {
  return by_lane(x, [](double v) { return __builtin_log1p(v); });
}

// The normal distribution's cumulative function. For floats: erfc(s) = t e^(-s^2) P(t) with t = 2 / (2 + s), P fitted on
// 0 <= s <= 10 (relative error 4e-8), s = |x| / sqrt 2.
INLINED inline Vec<float> normal_cdf(Vec<float> x) {
  const Vec<float> s = (x < 0.0f ? -x : x) * 0.70710678f, t = 2.0f / (s + 2.0f);
  const Vec<float> p = polynomial(t, 0.01741728186607361, -0.149758979678154, 0.48775002360343933, -0.7434301972389221, 0.47784703969955444,
                                  -0.12613776326179504, 0.2342408001422882, 0.2369822859764099, 0.2830328643321991, 0.28205665946006775);
  const Vec<float> tail = p * t * exponential(-s * s) * 0.5f;
  return x < 0.0f ? tail : 1.0f - tail;
}
INLINED inline Vec<double> normal_cdf(Vec<double> x) {
  return by_lane(x, [](double v) { return 0.5 * __builtin_erfc(v * -0.70710678118654752440); });
}

// A number of the type of u's lanes.
template <typename V>
INLINED inline auto constant(V u, double value) {
  return std::remove_cv_t<std::remove_reference_t<decltype(u[0])>>(value);
}

template <typename V>
INLINED inline V sigmoid(V x) {
  return 1 / (exponential(-x) + 1);
}

// v = act(u), and the gradient of u out of g, that of v. Where an activation has a corner, its slope there is the one that torch
// takes; where it is flat, u gets 0 whatever g is.
struct Identical {
  template <typename V>
  INLINED V value(V u) const {
    return u;
  }
  template <typename V>
  INLINED V gradient(V, V g) const {
    return g;
  }
};
struct Relu {
  template <typename V>
  INLINED V value(V u) const {
    return u <= 0 ? V{} : u;
  }
  template <typename V>
  INLINED V gradient(V u, V g) const {
    return u <= 0 ? V{} : g;
  }
};
struct Relu6 {
  template <typename V>
  INLINED V value(V u) const {
    return u <= 0 ? V{} : u >= 6 ? V{} + 6 : u;
  }
  template <typename V>
  INLINED V gradient(V u, V g) const {
    return u <= 0 ? V{} : u >= 6 ? V{} : g;
  }
};
struct LeakyRelu {
  double a, b;
  template <typename V>
  INLINED V value(V u) const {
    return u > 0 ? u : u * constant(u, a);
  }
  template <typename V>
  INLINED V gradient(V u, V g) const {
    return u > 0 ? g : g * constant(u, a);
  }
};
struct Silu {
  template <typename V>
  INLINED V value(V u) const {
    return u / (exponential(-u) + 1);
  }
  template <typename V>
  INLINED V gradient(V u, V g) const {
    const V s = sigmoid(u);
    return g * (s * (u * (1 - s) + 1));
  }
};
struct Gelu {
  template <typename V>
  INLINED V value(V u) const {
    return u * normal_cdf(u);
  }
  template <typename V>
  INLINED V gradient(V u, V g) const {
    return g * (normal_cdf(u) + u * exponential(u * u * -constant(u, 0.5)) * constant(u, 0.39894228040143267794));
  }
};
struct GeluTanh {
  // tanh(w) = 1 - 2 / (e^(2w) + 1)
  template <typename V>
  INLINED static V tanh_of(V u) {
    const V w2 = u * (u * u * constant(u, 0.044715) + 1) * constant(u, 1.59576912160573071176);
    return 1 - 2 / (exponential(w2) + 1);
  }
  template <typename V>
  INLINED V value(V u) const {
    return u * (tanh_of(u) + 1) * constant(u, 0.5);
  }
  template <typename V>
  INLINED V gradient(V u, V g) const {
    const auto half = constant(u, 0.5);
    const V t = tanh_of(u), inner = (u * u * constant(u, 3 * 0.044715) + 1) * constant(u, 0.79788456080286535588);
    return g * ((t + 1) * half + u * (1 - t * t) * inner * half);
  }
};
struct Hardswish {
  template <typename V>
  INLINED V value(V u) const {
    return u <= -3 ? V{} : u >= 3 ? u : u * (u + 3) / 6;
  }
  template <typename V>
  INLINED V gradient(V u, V g) const {
    return u <= -3 ? V{} : u >= 3 ? g : g * ((u * 2 + 3) / 6);
  }
};
struct Softplus {
  double a, b;  // beta, threshold
  template <typename V>
  INLINED V value(V u) const {
    const auto beta = constant(u, a);
    return u * beta > constant(u, b) ? u : logarithm_1p(exponential(u * beta)) / beta;
  }
  template <typename V>
  INLINED V gradient(V u, V g) const {
    const auto beta = constant(u, a);
    return u * beta > constant(u, b) ? g : g * sigmoid(u * beta);
  }
};

// Any other than the most usual ones: reached through a pointer, which costs little beside what it computes.
template <typename acc>
struct OtherAct {
  const Prologue& pre;
  Vec<acc> (*value_of)(const Prologue&, Vec<acc>);
  Vec<acc> (*gradient_of)(const Prologue&, Vec<acc>, Vec<acc>);
  INLINED Vec<acc> value(Vec<acc> u) const { return value_of(pre, u); }
  INLINED Vec<acc> gradient(Vec<acc> u, Vec<acc> g) const { return gradient_of(pre, u, g); }

  template <typename Make>
  static OtherAct by(const Prologue& pre, Make) {
    return {pre, [](const Prologue& p, Vec<acc> u) { return Make{}(p).value(u); },
            [](const Prologue& p, Vec<acc> u, Vec<acc> g) { return Make{}(p).gradient(u, g); }};
  }
};
template <typename A>
struct Plain {
  A operator()(const Prologue&) const { return {}; }
};
template <typename A>
struct WithNumbers {
  A operator()(const Prologue& pre) const { return {pre.a, pre.b}; }
};

// f of the activation.
template <typename acc, typename F>
void with_act(const Prologue& pre, F&& f) {
  using Other = OtherAct<acc>;
  switch (pre.act) {
    case Act::none: return f(Identical{});
    case Act::relu: return f(Relu{});
    case Act::relu6: return f(Other::by(pre, Plain<Relu6>{}));
    case Act::silu: return f(Other::by(pre, Plain<Silu>{}));
    case Act::gelu: return f(Other::by(pre, Plain<Gelu>{}));
    case Act::gelu_tanh: return f(Other::by(pre, Plain<GeluTanh>{}));
    case Act::hardswish: return f(Other::by(pre, Plain<Hardswish>{}));
    case Act::leaky_relu: return f(Other::by(pre, WithNumbers<LeakyRelu>{}));
    case Act::softplus: return f(Other::by(pre, WithNumbers<Softplus>{}));
  }
}

}  // namespace
}  // namespace AF_ISA
}  // namespace aliasfused
