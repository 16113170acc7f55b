// Kernels of a blur by predicted filters, in plain CUDA C++: nvcc compiles them, and g++ runs the same text under tests/emulation.
//
//   adaptive_down   y         } a thread owns a Chunk, some channels of a group at a pixel of the result
//   adaptive_up     dx        }
//   adaptive_grad   dlogits     a thread sums over some channels of a group at a pixel of y, then these sums are added up
//
// A block serves a tile of pixels. First its threads leave in shared memory the maximum and the sum of each softmax that the
// tile wants; from then on a weight is one exp, taken once for all channels of a chunk. K taps along each axis are known to the
// compiler, or with K = 0 any. Sums run in a fixed order and no result has two writers, so a repeated call gives the same bits.
#pragma once

#include "adaptive_filters.cuh"

namespace aliasfused {

template <typename scalar_t, int K, int V, bool PACKED>
__global__ void __launch_bounds__(block_threads, sizeof(scalar_t) == 8 || (K == 5 && !PACKED) ? 2 : 3)
    adaptive_down(const __grid_constant__ AdaptiveBlurPool op, const __grid_constant__ Tile tile) {
  using acc = acc_t<scalar_t>;
  __shared__ Softmax<acc> table[block_threads];
  const Filters<scalar_t, K> filters(op, tile);
  const Side height(op.rows), width(op.cols);
  const Seat at(tile, height.out, width.out);
  filters.tabulate(table, at.n, at.first_group, {at.top, height.out, tile.rows}, 0, tile.rows, {at.left, width.out, tile.cols});
  __syncthreads();
  const int group = at.first_group + at.q;
  if (!at.inside || group >= op.groups || at.chunk >= tile.chunks) return;

  const Chunk<scalar_t, V, PACKED> x(op.x, op.x_stride, tile, at.n, group, at.chunk);
  const scalar_t* z = filters.at(at.n, group, at.h, at.w);
  const Columns<K> cols(width, at.w);
  constexpr int N = K ? K : 1;  // taps at once
  acc sum[V] = {};
#pragma unroll(K == 3 ? 3 : 1)
  for (int p = 0; p < filters.size(); ++p) {
    const int row = height.source(at.h, p);
    for (int first = 0; first < filters.size(); first += N) {
      acc weight[N];
      filters.weights(z, p * filters.size() + first, table, at.pixel, at.q, weight);
#pragma unroll
      for (int i = 0; i < N; ++i) {
        const int col = cols(first + i);
        acc value[V];
        x.load(row, col, row >= 0 && col >= 0, value);
#pragma unroll
        for (int v = 0; v < V; ++v) sum[v] += weight[i] * value[v];
      }
    }
  }
  Chunk<scalar_t, V, PACKED>(op.dst, op.dst_stride, tile, at.n, group, at.chunk).store(sum, at.h, at.w);
}

constexpr int most_softmaxes = 1024;  // in the table of adaptive_up: at least those in one row of the outputs that read a tile

template <typename scalar_t, int K, int V, bool PACKED>
__global__ void __launch_bounds__(block_threads, sizeof(scalar_t) == 8 ? 2 : 3)
    adaptive_up(const __grid_constant__ AdaptiveBlurPool op, const __grid_constant__ Tile tile) {
  using acc = acc_t<scalar_t>;
  __shared__ Softmax<acc> table[most_softmaxes];
  const Filters<scalar_t, K> filters(op, tile);
  const Side height(op.rows), width(op.cols);
  const Seat at(tile, height.in, width.in);
  const Outputs rows = Outputs::reading(height, at.top, at.top + tile.rows), cols = Outputs::reading(width, at.left, at.left + tile.cols);
  const int group = at.first_group + at.q;
  const bool live = at.inside && group < op.groups && at.chunk < tile.chunks;
  const Chunk<scalar_t, V, PACKED> dy(op.dy, op.dy_stride, tile, at.n, group, at.chunk);

  acc sum[V] = {};
  const int most_rows = cols.size == 0 ? rows.size : most_softmaxes / (cols.size * filters.table_groups);
  for (int begin = 0; begin < rows.size; begin += most_rows) {
    const int count = rows.size - begin < most_rows ? rows.size - begin : most_rows;
    if (begin > 0) __syncthreads();
    filters.tabulate(table, at.n, at.first_group, rows, begin, count, cols);
    __syncthreads();
    if (live)
      height.outputs_of(at.h, [&](int i, int p) {
        const int place = rows.place(i) - begin;
        if (place < 0 || place >= count) return;
        width.outputs_of(at.w, [&](int j, int q) {
          const scalar_t* z = filters.at(at.n, group, i, j);
          const acc weight = filters.weight(z, p * filters.size() + q, table, place * cols.size + cols.place(j), at.q);
          acc value[V];
          dy.load(i, j, true, value);
#pragma unroll
          for (int v = 0; v < V; ++v) sum[v] += weight * value[v];
        });
      });
  }
  if (live) Chunk<scalar_t, V, PACKED>(op.dst, op.dst_stride, tile, at.n, group, at.chunk).store(sum, at.h, at.w);
}

// dw of a slot, a group at a pixel, is summed by the slot's threads, then by one of them; then so is w dw over the softmax, the
// mean; then all threads write w (dw - mean). Where the mean is of more taps than are at hand, each dw is worked out twice.
template <typename scalar_t, int K, int V, bool PACKED>
__global__ void __launch_bounds__(block_threads, 2)
    adaptive_grad(const __grid_constant__ AdaptiveBlurPool op, const __grid_constant__ Tile tile) {
  using acc = acc_t<scalar_t>;
  constexpr int N = K ? K * K : 8, M = K ? K : 8;  // taps with sums in shared memory, and in registers
  __shared__ Softmax<acc> table[block_threads];
  __shared__ acc dw[N][block_threads], mean[block_threads];
  const Filters<scalar_t, K> filters(op, tile);
  const Side height(op.rows), width(op.cols);
  const Seat at(tile, height.out, width.out);
  const int thread = static_cast<int>(threadIdx.x), slots = tile.rows * tile.cols * tile.groups;
  const int slot = at.pixel * tile.groups + at.q, size = filters.size(), taps = size * size;
  const bool joint = op.normalize == Normalize::joint, linear = op.normalize == Normalize::none, at_hand = K && !joint && !linear;
  const int end_group = joint ? op.groups : at.first_group + 1;
  filters.tabulate(table, at.n, at.first_group, {at.top, height.out, tile.rows}, 0, tile.rows, {at.left, width.out, tile.cols});
  const Columns<K> cols(width, at.w);
  mean[thread] = 0;

  for (int pass = linear || at_hand; pass < 2; ++pass) {
    for (int first = at.first_group; first < end_group; first += tile.groups) {
      // call(its pixel in the tile, its group, the output there) for a slot that exists.
      const auto with_slot = [&](int slot, auto&& call) {
        const int pixel = slot / tile.groups, q = slot % tile.groups;
        const int i = at.top + pixel / tile.cols, j = at.left + pixel % tile.cols;
        if (i < height.out && j < width.out && first + q < op.groups) call(pixel, q, i, j);
      };
      for (int begin = 0; begin < taps; begin += N) {
        for (int chunk = at.chunk; chunk < (at.inside && first + at.q < op.groups ? tile.chunks : 0); chunk += tile.lanes) {
          const Chunk<scalar_t, V, PACKED> x(op.x, op.x_stride, tile, at.n, first + at.q, chunk);
          acc dy[V];
          Chunk<scalar_t, V, PACKED>(op.dy, op.dy_stride, tile, at.n, first + at.q, chunk).load(at.h, at.w, true, dy);
          for (int t = 0; t < N; t += M) {
            acc sum[M] = {};
#pragma unroll
            for (int i = 0; i < M; ++i) {
              const int p = (begin + t + i) / size, q = (begin + t + i) % size, row = height.source(at.h, p), col = cols(K ? i : q);
              acc value[V];
              x.load(row, col, row >= 0 && col >= 0 && begin + t + i < taps, value);
#pragma unroll
              for (int v = 0; v < V; ++v) sum[i] += dy[v] * value[v];
            }
#pragma unroll
            for (int i = 0; i < M; ++i) {
              acc& to = dw[t + i][at.lane * slots + slot];
              to = chunk == at.chunk ? sum[i] : to + sum[i];
            }
          }
        }
        __syncthreads();
        const int count = taps - begin < N ? taps - begin : N;
        if (thread < slots)
          with_slot(thread, [&](int pixel, int q, int i, int j) {
            const scalar_t* z = filters.at(at.n, first + q, i, j);
            for (int t = 0; t < count; ++t) {
              acc whole = 0;
              for (int lane = 0; lane < tile.lanes; ++lane) whole += dw[t][lane * slots + thread];
              dw[t][thread] = whole;
              if (pass == 0 || at_hand) mean[thread] += filters.weight(z, begin + t, table, pixel, q) * whole;
            }
          });
        __syncthreads();
        if (pass == 0) continue;
        const Strides& d = op.dst_stride;
        const bool taps_first = d.c < d.w;
        for (int e = thread; e < count * slots; e += block_threads) {
          const int t = taps_first ? e % count : e / slots, slot = taps_first ? e / count : e % slots;
          with_slot(slot, [&](int pixel, int q, int i, int j) {
            acc value = dw[t][slot];
            if (!linear) value = filters.weight(filters.at(at.n, first + q, i, j), begin + t, table, pixel, q) * (value - mean[slot]);
            const index_t channel = static_cast<index_t>(first + q) * taps + begin + t;
            scalar_t* to = static_cast<scalar_t*>(op.dst) + at.n * d.n + channel * d.c;
            for (int h = i * op.span_h; h < (i + 1) * op.span_h && h < height.in; ++h)
              for (int w = j * op.span_w; w < (j + 1) * op.span_w && w < width.in; ++w)
                to[h * d.h + w * d.w] = static_cast<scalar_t>(h == i * op.span_h && w == j * op.span_w ? value : 0);
          });
        }
        __syncthreads();
      }
    }
    if (pass > 0 || !joint) continue;
    acc whole = 0;
    if (thread < slots)
      for (int q = 0; q < tile.groups; ++q) whole += mean[thread / tile.groups * tile.groups + q];
    __syncthreads();
    mean[thread] = whole;
  }
}

}  // namespace aliasfused
