// General kernels of a blur with a prologue, in plain CUDA C++: nvcc compiles them, and g++ runs the same text under
// tests/emulation. Tuned ones are in max_lanes.cuh and max_up.cuh.
//
//   max_blur_any    y, one thread a result
//   max_blur_grad   dx, one thread a pixel
//   max_blur_sums   the channels' sums, one block a channel
//
// Neither z nor its gradient is ever in memory: whoever needs a value of them works it out, and does not round it to the
// dtype. Sums run in a fixed order and no result has two writers, so a repeated call gives the same bits.
#pragma once

#include "../max_blur_pool.h"
#include "act.cuh"
#include "any.cuh"

namespace aliasfused {

struct Span {
  index_t begin, end;
};

// Positions of an axis of `size` that the window at i of `kernel` positions covers, `before` of them ahead of i.
__device__ inline Span covered(index_t i, index_t before, int kernel, index_t size) {
  const index_t begin = i - before, end = begin + kernel;
  return {begin < 0 ? 0 : begin, end < size ? end : size};
}

// One channel of one image of x, and what becomes of it.
template <typename scalar_t>
struct Prepared {
  using acc = acc_t<scalar_t>;
  const Prologue& pre;
  const scalar_t* x;
  index_t step_h, step_w;
  acc center = 0, scale = 1, shift = 0;
  Activation<acc> act;

  __device__ Prepared(const Prologue& pre, const void* map, const Strides& s, index_t channels, index_t n, index_t c)
      : pre(pre), x(static_cast<const scalar_t*>(map) + n * s.n + c * s.c), step_h(s.h), step_w(s.w), act(pre) {
    const acc* affine = static_cast<const acc*>(pre.affine);
    if (affine) center = affine[c], scale = affine[channels + c], shift = affine[2 * channels + c];
  }

  __device__ acc centred(index_t h, index_t w) const { return static_cast<acc>(x[h * step_h + w * step_w]) - center; }
  // Joined by name, so that it is so everywhere, and pixels of one value stay so (see curved).
  __device__ acc u(index_t h, index_t w) const { return std::fma(centred(h, w), scale, shift); }
  __device__ acc v(index_t h, index_t w) const { return act.value(u(h, w)); }

  __device__ Span rows_of(index_t i) const { return covered(i, pre.top, pre.kernel_h, pre.height); }
  __device__ Span cols_of(index_t j) const { return covered(j, pre.left, pre.kernel_w, pre.width); }

  __device__ acc z(index_t i, index_t j) const {
    const Span rows = rows_of(i), cols = cols_of(j);
    acc best = static_cast<acc>(-INFINITY);
    for (index_t h = rows.begin; h < rows.end; ++h)
      for (index_t w = cols.begin; w < cols.end; ++w) {
        const acc value = v(h, w);
        if (beats(value, best)) best = value;
      }
    return best;
  }

  // z as the source of a blur.
  struct Row {
    const Prepared source;
    index_t i;
    __device__ acc operator()(index_t j) const { return source.z(i, j); }
  };
  __device__ Row row(index_t i) const { return {*this, i}; }

  // Whether the pixel (h, w), of this value, is what window (i, j) has for its maximum: the last to beat all those ahead of it.
  __device__ bool wins(index_t h, index_t w, acc value, index_t i, index_t j) const {
    const Span rows = rows_of(i), cols = cols_of(j);
    for (index_t a = rows.begin; a < rows.end; ++a)
      for (index_t b = cols.begin; b < cols.end; ++b) {
        if (a == h && b == w) continue;
        const bool ahead = a < h || (a == h && b < w);
        const acc other = v(a, b);
        if (ahead ? !beats(value, other) : beats(other, value)) return false;
      }
    return true;
  }
};

// What pixel (h, w) of x collects of D^T dy in the windows that it has won, back through its activation.
template <typename scalar_t, typename Taps>
__device__ inline acc_t<scalar_t> du(const BlurPool& op, const Taps& taps, const Prepared<scalar_t>& x, index_t n, index_t c, index_t h,
                                     index_t w) {
  using acc = acc_t<scalar_t>;
  const Prologue& pre = x.pre;
  const Plane<scalar_t, Identity> dy(op.src, op.src_stride, n, c, Identity{});
  // Pixels and windows that see each other do so from either side: the windows lie mirrored.
  const Span rows = covered(h, pre.kernel_h - 1 - pre.top, pre.kernel_h, op.rows.in);
  const Span cols = covered(w, pre.kernel_w - 1 - pre.left, pre.kernel_w, op.cols.in);
  const acc u = x.u(h, w), value = x.act.value(u);
  acc won = 0;
  for (index_t i = rows.begin; i < rows.end; ++i)
    for (index_t j = cols.begin; j < cols.end; ++j)
      if (x.wins(h, w, value, i, j)) won += blurred<true>(op, taps.rows(c), taps.cols(c), dy, i, j);
  return x.act.gradient(u, won);
}

template <typename scalar_t, typename Taps>
__global__ void __launch_bounds__(block_threads) max_blur_any(const __grid_constant__ MaxBlurPool op, const __grid_constant__ Taps taps) {
  const BlurPool& blur = op.blur;
  Place at;
  if (!at.find(blur.batch, blur.channels, blur.rows.out, blur.cols.out, blur.dst_stride)) return;
  const Prepared<scalar_t> x(op.pre, blur.src, blur.src_stride, blur.channels, at.n, at.c);
  const auto sum = blurred<false>(blur, taps.rows(at.c), taps.cols(at.c), x, at.h, at.w);
  static_cast<scalar_t*>(blur.dst)[at.offset(blur.dst_stride)] = static_cast<scalar_t>(sum);
}

template <typename scalar_t, typename Taps>
__global__ void __launch_bounds__(block_threads) max_blur_grad(const __grid_constant__ MaxBlurPool op, const __grid_constant__ Taps taps) {
  using acc = acc_t<scalar_t>;
  const BlurPool& blur = op.blur;
  Place at;
  if (!at.find(blur.batch, blur.channels, op.pre.height, op.pre.width, blur.dst_stride)) return;
  const Prepared<scalar_t> x(op.pre, op.x, op.x_stride, blur.channels, at.n, at.c);
  acc dx = du(blur, taps, x, at.n, at.c, at.h, at.w) * x.scale;
  const acc* correction = static_cast<const acc*>(op.correction);
  if (correction) dx += correction[at.c] + correction[blur.channels + at.c] * x.centred(at.h, at.w);
  static_cast<scalar_t*>(blur.dst)[at.offset(blur.dst_stride)] = static_cast<scalar_t>(dx);
}

// Block c: its threads share out the pixels of channel c, then their sums are added pairwise. In double, as a channel may have
// millions of pixels whose sum is small.
template <typename scalar_t, typename Taps>
__global__ void __launch_bounds__(block_threads) max_blur_sums(const __grid_constant__ MaxBlurPool op, const __grid_constant__ Taps taps) {
  using acc = acc_t<scalar_t>;
  const BlurPool& blur = op.blur;
  const index_t c = blockIdx.x;
  double sum[2] = {};
  for (index_t pixel = threadIdx.x; pixel < blur.batch * op.pre.height * op.pre.width; pixel += block_threads) {
    index_t n = pixel;
    const index_t w = split(n, op.pre.width), h = split(n, op.pre.height);
    const Prepared<scalar_t> x(op.pre, op.x, op.x_stride, blur.channels, n, c);
    const acc value = du(blur, taps, x, n, c, h, w);
    sum[0] += value, sum[1] += value * x.centred(h, w);
  }
  block_sum(sum);
  if (threadIdx.x != 0) return;
  acc* sums = static_cast<acc*>(op.sums);
  sums[c] = static_cast<acc>(sum[0]), sums[blur.channels + c] = static_cast<acc>(sum[1]);
}

}  // namespace aliasfused
