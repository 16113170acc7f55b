// Activations and their slopes. Which one it is, is known when the kernel runs: all threads of it take the same branch, and
// nine activations are not nine times as many kernels. Where an activation has a corner, its slope there is the one that torch
// takes; where it is flat, u gets 0 whatever g is.
#pragma once

#include <cmath>

#include "../max_blur_pool.h"
#include "launch.h"

namespace aliasfused {

// 1 / (1 + e^-u) and its slope. Of the two exponentials that there are, this takes the one that does not overflow, so that
// neither the value for negative u nor the slope is a difference of rounded numbers.
template <typename acc>
struct Logistic {
  acc value, slope;
  __device__ explicit Logistic(acc u) {
    const acc e = std::exp(-std::fabs(u)), whole = 1 / (1 + e);
    value = u < 0 ? e * whole : whole;
    slope = e * whole * whole;
  }
};

template <typename acc>
__device__ inline acc normal_cdf(acc u) {
  return acc(0.5) * std::erfc(u * acc(-0.70710678118654752440));
}

// (1 + tanh(w)) / 2 is the logistic function of 2 w, for w = sqrt(2 / pi) (u + 0.044715 u^3).
template <typename acc>
__device__ inline acc gelu_tanh_argument(acc u) {
  return u * (u * u * acc(0.044715) + 1) * acc(1.59576912160573071176);
}

// The activations that are more than a choice. Not inlined: the maximum compares values of pixels that are computed at
// different places of a kernel, where products and sums might be joined differently; the values of equal pixels are equal.
template <typename acc>
__device__ __attribute__((noinline)) acc curved(Act act, acc u, acc a, acc b) {
  switch (act) {
    case Act::silu: return u / (1 + std::exp(-u));
    case Act::gelu: return u * normal_cdf(u);
    case Act::gelu_tanh: return u / (1 + std::exp(-gelu_tanh_argument(u)));
    case Act::hardswish: return u <= -3 ? 0 : u >= 3 ? u : u * (u + 3) / 6;
    case Act::softplus: return u * a > b ? u : std::log1p(std::exp(u * a)) / a;
    default: return u;
  }
}

template <typename acc>
struct Activation {
  Act act;
  acc a, b;  // leaky_relu: slope; softplus: beta, threshold
  __device__ explicit Activation(const Prologue& pre) : act(pre.act), a(static_cast<acc>(pre.a)), b(static_cast<acc>(pre.b)) {}

  __device__ acc value(acc u) const {
    switch (act) {
      case Act::none: return u;
      case Act::relu: return u <= 0 ? 0 : u;
      case Act::relu6: return u <= 0 ? 0 : u >= 6 ? 6 : u;
      case Act::leaky_relu: return u > 0 ? u : u * a;
      default: return curved(act, u, a, b);
    }
  }

  // The gradient of u out of g, that of v.
  __device__ acc gradient(acc u, acc g) const {
    switch (act) {
      case Act::none: return g;
      case Act::relu: return u <= 0 ? 0 : g;
      case Act::relu6: return u <= 0 || u >= 6 ? 0 : g;
      case Act::leaky_relu: return u > 0 ? g : g * a;
      case Act::hardswish: return u <= -3 ? 0 : u >= 3 ? g : g * ((u * 2 + 3) / 6);
      case Act::softplus: return u * a > b ? g : g * Logistic<acc>(u * a).value;
      case Act::silu: {
        const Logistic<acc> s(u);
        return g * (s.value + u * s.slope);
      }
      case Act::gelu: return g * (normal_cdf(u) + u * std::exp(u * u * acc(-0.5)) * acc(0.39894228040143267794));
      case Act::gelu_tanh: {
        const Logistic<acc> s(gelu_tanh_argument(u));
        return g * (s.value + u * s.slope * (u * u * acc(3 * 0.044715) + 1) * acc(1.59576912160573071176));
      }
    }
    return g;
  }
};

// Those that are straight on either side of 0 and flat beyond `top`, if any, without a branch: for these kernels are tuned.
struct Straight {
  bool flat;     // for negative u, where leaky_relu has the slope a
  float a, top;  // a is 1 for others, and nothing beyond a top that is nan

  static bool is(Act act) { return act == Act::none || act == Act::relu || act == Act::relu6 || act == Act::leaky_relu; }
  __device__ explicit Straight(const Prologue& pre)
      : flat(pre.act == Act::relu || pre.act == Act::relu6),
        a(pre.act == Act::leaky_relu ? static_cast<float>(pre.a) : 1),
        top(pre.act == Act::relu6 ? 6 : NAN) {}

  __device__ float value(float u) const {
    const float low = flat ? 0 : u * a;
    return u <= 0 ? low : u >= top ? top : u;
  }
  __device__ float gradient(float u, float g) const {
    const bool low = flat ? u <= 0 : !(u > 0);
    return low ? (flat ? 0 : g * a) : u >= top ? 0 : g;
  }
  // What a maximum may compare in place of values: where two of these differ and values do not, none of them has a slope.
  __device__ float rank(float u) const { return u > 0 ? u : u * a; }
};

}  // namespace aliasfused
