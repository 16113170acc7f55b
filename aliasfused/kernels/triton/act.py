"""Activations and their slopes: csrc/cpu/act.h for Triton, by names and numbers that are compile-time constants."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def sigmoid(t):
    """1 / (1 + e^-t) and its slope, both without a power that overflows or a difference that cancels."""
    e = tl.exp(-tl.abs(t))
    return tl.where(t < 0, e, 1.0) / (e + 1.0), e / ((e + 1.0) * (e + 1.0))


@triton.jit
def log1p(e):
    """log(1 + e) for e >= 0: the logarithm of the rounded sum, mended by what rounding took from it."""
    rounded = e + 1.0
    return tl.log(rounded) + (e - (rounded - 1.0)) / rounded


@triton.jit
def normal_cdf(u):
    return tl.erf(u * 0.7071067811865476) * 0.5 + 0.5


@triton.jit
def twice_tanh_of(u):
    """2 w of gelu_tanh, u (1 + tanh w) / 2 = u sigmoid(2 w)."""
    return u * (u * u * 0.044715 + 1.0) * 1.5957691216057308


@triton.jit
def value(u, PRE: tl.constexpr):
    """v = act(u). The numbers: leaky_relu (slope,), softplus (beta, threshold)."""
    # Triton 3.6 passes on no attribute that is a string or a tuple, so that whoever wants one takes it out itself.
    ACT: tl.constexpr = PRE.act
    NUMBERS: tl.constexpr = PRE.numbers
    if ACT == "relu":
        u = tl.where(u <= 0, 0.0, u)
    if ACT == "relu6":
        u = tl.where(u <= 0, 0.0, tl.where(u >= 6, 6.0, u))
    if ACT == "leaky_relu":
        u = tl.where(u > 0, u, u * NUMBERS[0])
    if ACT == "silu":
        u = u * sigmoid(u)[0]
    if ACT == "gelu":
        u = u * normal_cdf(u)
    if ACT == "gelu_tanh":
        u = u * sigmoid(twice_tanh_of(u))[0]
    if ACT == "hardswish":
        u = tl.where(u <= -3, 0.0, tl.where(u >= 3, u, u * (u + 3.0) / 6.0))
    if ACT == "softplus":
        t = u * NUMBERS[0]
        u = tl.where(t > NUMBERS[1], u, (tl.where(t > 0, t, 0.0) + log1p(tl.exp(-tl.abs(t)))) / NUMBERS[0])
    return u


@triton.jit
def pulled_back(u, g, PRE: tl.constexpr):
    """The gradient of u out of g, that of v; at a corner with the slope that torch takes, and 0 where act is flat, whatever g is."""
    ACT: tl.constexpr = PRE.act
    NUMBERS: tl.constexpr = PRE.numbers
    result = g
    if ACT == "relu":
        result = tl.where(u <= 0, 0.0, g)
    if ACT == "relu6":
        result = tl.where((u <= 0) | (u >= 6), 0.0, g)
    if ACT == "leaky_relu":
        result = tl.where(u > 0, g, g * NUMBERS[0])
    if ACT == "silu":
        part, bell = sigmoid(u)
        result = g * (part + u * bell)
    if ACT == "gelu":
        result = g * (normal_cdf(u) + u * tl.exp(u * u * -0.5) * 0.3989422804014327)
    if ACT == "gelu_tanh":
        part, bell = sigmoid(twice_tanh_of(u))
        result = g * (part + u * bell * (u * u * (3 * 0.044715) + 1.0) * 1.5957691216057308)
    if ACT == "hardswish":
        result = tl.where(u <= -3, 0.0, tl.where(u >= 3, g, g * ((u * 2.0 + 3.0) / 6.0)))
    if ACT == "softplus":
        t = u * NUMBERS[0]
        result = tl.where(t > NUMBERS[1], g, g * sigmoid(t)[0])
    return result
