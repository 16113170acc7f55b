// Blur kernels in plain CUDA C++: nvcc compiles them, and g++ runs the same text under tests/emulation.
//
//   blur_any    every op, one thread a result, its windows walked by window.h
//   blur_down   dst = D src   } stride 2, K taps known to the compiler: a thread owns a Lane of results (lanes.cuh) and
//   blur_up     dst = D^T src } slides down a strip of rows, so that it filters each source row along the columns once
//   taps_grad   gradient of the taps, one block a number
//
// Sums run in a fixed order and no result has two writers, so a repeated call gives the same bits.
#pragma once

#include "../blur_pool.h"
#include "any.cuh"
#include "lanes.cuh"

namespace aliasfused {

// ---- every op

template <typename scalar_t, bool ADJOINT, typename Taps, typename Pre>
__global__ void __launch_bounds__(block_threads)
    blur_any(const __grid_constant__ BlurPool op, const __grid_constant__ Taps taps, const Pre pre) {
  Place at;
  if (!at.find(op.batch, op.channels, ADJOINT ? op.rows.in : op.rows.out, ADJOINT ? op.cols.in : op.cols.out, op.dst_stride)) return;
  const Plane<scalar_t, Pre> src(op.src, op.src_stride, at.n, at.c, pre);
  const auto sum = blurred<ADJOINT>(op, taps.rows(at.c), taps.cols(at.c), src, at.h, at.w);
  static_cast<scalar_t*>(op.dst)[at.offset(op.dst_stride)] = static_cast<scalar_t>(sum);
}

// ---- stride 2, K shared taps

template <typename scalar_t, int K, typename Lane>
__global__ void __launch_bounds__(block_threads, Lane::blocks)
    blur_down(const __grid_constant__ BlurPool op, const __grid_constant__ Taps<K> taps, const __grid_constant__ Walk walk,
              const __grid_constant__ typename Lane::Pre pre) {
  constexpr int M = (K + 1) / 2, V = Lane::values, AHEAD = Lane::ahead;  // M outputs have a pair of rows in common
  index_t n;
  int c, col, begin, end;
  if (!walk.place(n, c, col, begin, end)) return;
  c *= Lane::channels, col *= Lane::columns;
  const int in = static_cast<int>(op.rows.in), before = static_cast<int>(op.rows.before);
  const Strides &s = op.src_stride, &d = op.dst_stride;
  const scalar_t* __restrict__ src = static_cast<const scalar_t*>(op.src) + n * s.n + c * s.c;
  scalar_t* __restrict__ dst = static_cast<scalar_t*>(op.dst) + n * d.n + c * d.c + col * d.w + begin * d.h;
  Lane lane(op, taps, pre, c, col);

  float sum[M][V] = {};  // sum[a]: the output begun a pairs of rows ago
  for (int i = begin; i < end + M - 1; i += AHEAD) {
    typename Lane::Raw raw[2 * AHEAD];
    bool live[2 * AHEAD];
#pragma unroll
    for (int r = 0; r < 2 * AHEAD; ++r) {
      const int row = extended_source(2 * i + r - before, in, op.rows.border);
      live[r] = row >= 0;
      raw[r] = lane.load(src, live[r] ? row : 0);
    }
#pragma unroll
    for (int b = 0; b < AHEAD; ++b) {
      float x[2][V];
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        lane.filter(raw[2 * b + r], x[r]);
#pragma unroll
        for (int v = 0; v < V; ++v) x[r][v] = live[2 * b + r] ? x[r][v] : 0;
      }
#pragma unroll
      for (int a = M - 1; a >= 0; --a)
#pragma unroll
        for (int v = 0; v < V; ++v) {
          float t = taps.h[2 * a] * x[0][v];
          if (a > 0) t += sum[a > 0 ? a - 1 : 0][v];
          if (2 * a + 1 < K) t += taps.h[2 * a + 1 < K ? 2 * a + 1 : 0] * x[1][v];
          sum[a][v] = t;
        }
      const int o = i + b - (M - 1);
      if (o >= begin && o < end) {
        store(sum[M - 1], dst);
        dst += d.h;
      }
    }
  }
}

template <typename scalar_t, int K, typename Lane>
__global__ void __launch_bounds__(block_threads, K <= 3 ? 3 : 2)
    blur_up(const __grid_constant__ BlurPool op, const __grid_constant__ Stencils<K> rows, const __grid_constant__ Stencils<K> cols,
            const __grid_constant__ Walk walk) {
  constexpr int V = Lane::values, N = Stencils<K>::size;
  index_t n;
  int c, col, begin, end;
  if (!walk.place(n, c, col, begin, end)) return;
  c *= Lane::channels, col *= Lane::columns;
  const int out = static_cast<int>(op.rows.out);
  const Strides &s = op.src_stride, &d = op.dst_stride;
  const scalar_t* __restrict__ src = static_cast<const scalar_t*>(op.src) + n * s.n + c * s.c;
  scalar_t* __restrict__ dst = static_cast<scalar_t*>(op.dst) + n * d.n + c * d.c + col * d.w;
  const Lane lane(op, cols, col);

  // Rows 2 i - before and its successor read the same N rows of y, the filtered `window`; the next one is on its way.
  float window[N][V] = {};
  int o = begin - K / 2;
  typename Lane::Raw next = lane.load(src, clamp(o, out));
  for (int i = begin - (N - 1); i < end; ++i, ++o) {
    const typename Lane::Raw raw = next;
    next = lane.load(src, clamp(o + 1, out));
#pragma unroll
    for (int a = 0; a < N - 1; ++a)
#pragma unroll
      for (int v = 0; v < V; ++v) window[a][v] = window[a + 1][v];
    lane.filter(raw, window[N - 1]);
    if (i < begin) continue;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int h = 2 * i + r - rows.before;
      if (h < 0 || h >= rows.in) continue;
      const float* tap = rows.at(h);
      float sum[V] = {};
#pragma unroll
      for (int a = 0; a < N; ++a)
#pragma unroll
        for (int v = 0; v < V; ++v) sum[v] += tap[a] * window[a][v];
      store(sum, dst + h * d.h);
    }
  }
}

// ---- gradient of the taps

// Block (c, p): each warp's lanes run along a row of dy, then the threads' sums are added pairwise.
template <typename scalar_t, typename Pre>
__global__ void __launch_bounds__(block_threads) taps_grad(const __grid_constant__ TapsGrad op, const Pre pre) {
  using acc = acc_t<scalar_t>;
  const bool along_rows = op.axis == 0;
  const Axis &axis = along_rows ? op.rows : op.cols, &cross = along_rows ? op.cols : op.rows;
  const index_t c = blockIdx.x / axis.taps, p = blockIdx.x % axis.taps;
  const Strides &s = op.x_stride, &d = op.dy_stride;
  const acc* other = static_cast<const acc*>(op.other) + c * cross.taps;
  const index_t step = along_rows ? s.h : s.w, cross_step = along_rows ? s.w : s.h;
  acc sum[1] = {};
  for (index_t row = threadIdx.x / 32; row < op.batch * op.rows.out; row += block_threads / 32) {
    index_t n = row;
    const index_t i = split(n, op.rows.out);
    const scalar_t* dy = static_cast<const scalar_t*>(op.dy) + n * d.n + c * d.c + i * d.h;
    const scalar_t* x = static_cast<const scalar_t*>(op.x) + n * s.n + c * s.c;
    for (index_t j = threadIdx.x % 32; j < op.cols.out; j += 32) {
      const index_t from = axis.source((along_rows ? i : j) * axis.stride + p - axis.before);
      if (from < 0) continue;
      acc line = 0;
      cross.inputs_of(along_rows ? j : i,
                      [&](index_t at, int q) { line += other[q] * pre(static_cast<acc>(x[from * step + at * cross_step]), c); });
      sum[0] += static_cast<acc>(dy[j * d.w]) * line;
    }
  }
  block_sum(sum);
  if (threadIdx.x == 0) static_cast<acc*>(op.dst)[c * axis.taps + p] = sum[0];
}

}  // namespace aliasfused
