// What a blur by predicted filters is told, whichever device runs it: plain data, no torch and no CUDA type.
//
//   y[n,c,i,j] = sum_p sum_q w[n,g,p,q,i,j] x~[n,c, s_h i + p - r, s_w j + q - r],   g = c / (C / groups),  r = k / 2
//
// with k odd, x~ = x extended by the border rule, and w the logits of (i,j) themselves, or their softmax over the k^2 of a group
// or over all groups' together. The gradients:
//
//   dx      = sum over the outputs that read a pixel, of w dy
//   dw      = sum over the channels of a group, of dy x~
//   dlogits = dw, or w (dw - sum w dw) with the sum over what the softmax is over
//
// The logits of output (i,j) may lie in a map of the size of x at (s_h i, s_w j); the gradient is zero elsewhere in it.
#pragma once

#include "blur_pool.h"

namespace aliasfused {

enum class Normalize : int { group, joint, none };

enum class AdaptiveResult : int { y, dx, dlogits };

struct AdaptiveBlurPool {
  Dtype dtype;
  Normalize normalize;
  AdaptiveResult result;
  index_t batch, channels;
  int groups;
  Axis rows, cols;     // of both the taps are k, and `before` is r
  const void* x;       // of y and dlogits
  const void* dy;      // of dx and dlogits
  const void* logits;  // (batch, groups * k * k, rows.out, cols.out); channel g k^2 + p k + q
  void* dst;
  Strides x_stride, dy_stride, logits_stride, dst_stride;
  int span_h, span_w;  // what an output has of dlogits, the rest of it zeros: 1 x 1, or the strides if logits are of all positions
};

}  // namespace aliasfused
