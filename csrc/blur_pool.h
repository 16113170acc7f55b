// What a blur is told, whichever device runs it: plain data, no torch and no CUDA type.
#pragma once

#include "window.h"

namespace aliasfused {

enum class Dtype : int { float32, bfloat16, float16, float64 };

// Strides in elements.
struct Strides {
  index_t n, c, h, w;
};

// dst = D src with D the blur of (rows, cols), or dst = D^T src: `rows` and `cols` always describe D itself, with
// rows.in x cols.in the map that is blurred and rows.out x cols.out the blurred one.
struct BlurPool {
  Dtype dtype;
  bool adjoint;
  index_t batch, channels;
  Axis rows, cols;
  const void* src;
  void* dst;
  Strides src_stride, dst_stride;
  // acc_t taps: k numbers shared by all channels on the host (channel stride 0), or (channels, k) where the data is.
  const void* taps_h;
  const void* taps_w;
  bool per_channel;
};

// dst[c, p] = sum over n, i, j of dy[n,c,i,j] times (x~ shifted to tap p along `axis`, blurred by `other` along the other
// axis)[n,c,i,j]; dst is (channels, k) contiguous acc_t, other (channels, k') contiguous acc_t.
struct TapsGrad {
  Dtype dtype;
  index_t batch, channels;
  Axis rows, cols;
  int axis;
  const void* dy;
  const void* x;
  Strides dy_stride, x_stride;
  const void* other;
  void* dst;
};

}  // namespace aliasfused
