// What the kernels that serve every op have in common: how they are told the taps, which result a thread owns, a window
// walked by window.h, a sum over a block.
#pragma once

#include <algorithm>
#include <type_traits>

#include "../blur_pool.h"
#include "launch.h"

namespace aliasfused {

template <typename acc, int CAPACITY>
struct SharedTaps {
  acc h[CAPACITY], w[CAPACITY];
  __device__ const acc* rows(index_t) const { return h; }
  __device__ const acc* cols(index_t) const { return w; }
};

template <typename acc>
struct ChannelTaps {
  const acc *h, *w;
  int size_h, size_w;
  __device__ const acc* rows(index_t c) const { return h + c * size_h; }
  __device__ const acc* cols(index_t c) const { return w + c * size_w; }
};

// call(taps) with taps that all channels share as an argument of kernels, of which there may be 32 KB.
template <typename acc, typename Call>
const char* with_shared_taps(const BlurPool& op, Call&& call) {
  const auto up_to = [&](auto capacity) {
    SharedTaps<acc, decltype(capacity)::value> taps{};
    std::copy_n(static_cast<const acc*>(op.taps_h), op.rows.taps, taps.h);
    std::copy_n(static_cast<const acc*>(op.taps_w), op.cols.taps, taps.w);
    return call(taps);
  };
  const int most = std::max(op.rows.taps, op.cols.taps);
  if (most <= 8) return up_to(std::integral_constant<int, 8>{});
  if (most <= 1024) return up_to(std::integral_constant<int, 1024>{});
  return "more than 1024 taps given as numbers; give them as tensors (C, k)";
}

// index % size, leaving index / size behind; 64-bit division is slow and rarely needed.
__device__ inline index_t split(index_t& index, index_t size) {
  const index_t whole = index <= 0xffffffffLL && size <= 0xffffffffLL
                            ? static_cast<index_t>(static_cast<uint32_t>(index) / static_cast<uint32_t>(size))
                            : index / size;
  const index_t rest = index - whole * size;
  index = whole;
  return rest;
}

// The element of a map that a thread owns. The threads of a warp own neighbours in memory, whichever its layout.
struct Place {
  index_t n, c, h, w;

  // False for threads beyond the last element.
  __device__ bool find(index_t batch, index_t channels, index_t height, index_t width, const Strides& stride) {
    const bool channels_last = stride.c < stride.w;
    n = static_cast<index_t>(blockIdx.x) * block_threads + threadIdx.x, c = 0;
    if (n >= batch * channels * height * width) return false;
    if (channels_last) c = split(n, channels);
    w = split(n, width), h = split(n, height);
    if (!channels_last) c = split(n, channels);
    return true;
  }
  __device__ index_t offset(const Strides& s) const { return n * s.n + c * s.c + h * s.h + w * s.w; }
};

// What happens to a pixel between its load and its filter; a border of zeros lies behind it.
struct Identity {
  template <typename acc>
  HOST_DEVICE acc operator()(acc value, index_t /*channel*/) const {
    return value;
  }
  static constexpr bool early = false;
  // For the channels c, c + 1, ... that a thread owns, by their place among these.
  template <int CHANNELS>
  struct At {
    __device__ At(const Identity&, int /*c*/) {}
    __device__ float operator()(float value, int /*place*/) const { return value; }
  };
};

// One channel of one image as a blur reads it.
template <typename scalar_t, typename Pre>
struct Plane {
  const scalar_t* data;
  index_t step_h, step_w, c;
  Pre pre;

  struct Row {
    const scalar_t* data;
    index_t step, c;
    Pre pre;
    __device__ acc_t<scalar_t> operator()(index_t w) const { return pre(static_cast<acc_t<scalar_t>>(data[w * step]), c); }
  };
  __device__ Plane(const void* map, const Strides& s, index_t n, index_t c, const Pre& pre)
      : data(static_cast<const scalar_t*>(map) + n * s.n + c * s.c), step_h(s.h), step_w(s.w), c(c), pre(pre) {}
  __device__ Row row(index_t h) const { return {data + h * step_h, step_w, c, pre}; }
};

// One source row filtered for column w. Not inlined: the adjoint would repeat it at every place where a border visits a row.
// The row comes by value, as it could not stay in registers otherwise.
template <bool ADJOINT, typename acc, typename Row>
__device__ __attribute__((noinline)) acc filtered(const Axis& cols, index_t w, const acc* taps, const Row row) {
  acc line = 0;
  const auto add = [&](index_t col, int q) { line += taps[q] * row(col); };
  if constexpr (ADJOINT) cols.outputs_of(w, add);
  else cols.inputs_of(w, add);
  return line;
}

// D source, or D^T source, at (h, w).
template <bool ADJOINT, typename acc, typename Source>
__device__ inline acc blurred(const BlurPool& op, const acc* taps_h, const acc* taps_w, const Source& source, index_t h, index_t w) {
  acc sum = 0;
  const auto add_row = [&](index_t row, int p) { sum += taps_h[p] * filtered<ADJOINT>(op.cols, w, taps_w, source.row(row)); };
  if constexpr (ADJOINT) op.rows.outputs_of(h, add_row);
  else op.rows.inputs_of(h, add_row);
  return sum;
}

// The sums of N numbers over the threads of a block, added pairwise; for thread 0 alone. Once in a kernel.
template <int N, typename acc>
__device__ inline void block_sum(acc (&sum)[N]) {
  __shared__ acc partial[N][block_threads];
  for (int i = 0; i < N; ++i) partial[i][threadIdx.x] = sum[i];
  for (unsigned half = block_threads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (threadIdx.x < half)
      for (int i = 0; i < N; ++i) partial[i][threadIdx.x] += partial[i][threadIdx.x + half];
  }
  if (threadIdx.x == 0)
    for (int i = 0; i < N; ++i) sum[i] = partial[i][0];
}

}  // namespace aliasfused
