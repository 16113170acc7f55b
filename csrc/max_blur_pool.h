// What a blur with a prologue is told, whichever device runs it: plain data, no torch and no CUDA type.
//
//   u = (x - center_c) * scale_c + shift_c      if there is an affine
//   v = act(u)
//   z = the maximum of v over a window of kernel_h x kernel_w, v being -inf beyond its border
//   y = D z                                     with D the blur of (rows, cols)
//
// and its gradients, du = act'(u) * (what the winners of the maximum collect of D^T dy):
//
//   dx   = du * scale_c + correction[0,c] + correction[1,c] * (x - center_c)
//   sums = for every channel the sums of du and of du * (x - center_c)
#pragma once

#include "blur_pool.h"

namespace aliasfused {

enum class Act : int { none, relu, relu6, silu, gelu, gelu_tanh, hardswish, leaky_relu, softplus };

struct Prologue {
  Act act;
  double a, b;         // leaky_relu: slope; softplus: beta, threshold
  const void* affine;  // acc_t (3, channels): center, scale, shift; or null
  int kernel_h, kernel_w;
  index_t top, left;      // what the maximum sees ahead of x
  index_t height, width;  // of x
};

// `blur` speaks of z, rows.in x cols.in, and of the tensor that is read and the one that is written: x and y, or with
// blur.adjoint dy and dx (null, if only sums are wanted).
struct MaxBlurPool {
  BlurPool blur;
  Prologue pre;
  const void* x;  // of the gradients
  Strides x_stride;
  const void* correction;  // acc_t (2, channels) or null
  void* sums;              // acc_t (2, channels) or null
};

// Which of a window's pixels is its maximum: a nan beats all, the last one all others, and the first of equals wins.
template <typename acc>
HOST_DEVICE inline bool beats(acc value, acc best) {
  return value > best || value != value;
}

}  // namespace aliasfused
