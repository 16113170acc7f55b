// Kernels of the channel moments, in plain CUDA C++: nvcc compiles them, and g++ runs the same text under tests/emulation.
//
//   moments_parts   of a share of the pixels, in some channels, one block
//   moments_merge   the shares of a channel merged, where there are several
//
// x is read in packs of V neighbours: V channels of a pixel, V pixels of a channel, or with V = 1 any layout. Sums run in a
// fixed order and no result has two writers, so a repeated call gives the same bits.
#pragma once

#include "../channel_moments.h"
#include "any.cuh"
#include "lanes.cuh"

namespace aliasfused {

// Where packs lie: at the positions (n, h, w), in columns. Axes of x that continue each other are one, and strides are a pack's.
struct Scan {
  const void* x;
  index_t batch, height, width, columns;
  Strides stride;
  index_t share;                 // how many positions a block reads
  index_t tiles;                 // a block reads one of so many tiles of columns,
  unsigned tile, rows;           // of `tile` columns each, at `rows` positions at a time
  index_t jump, jump_h, jump_w;  // from a position to the one `rows` further on: elements, and along the axes
  index_t wrap_h, wrap_w;        // elements to go beside that where h or w begins anew
};

// How many packs a thread has on their way at once.
template <int V>
constexpr int packs_ahead = V == 1 ? 8 : 4;

// Moments of channels that have as many pixels each.
template <int CHANNELS>
struct Part {
  double n, mean[CHANNELS], m2[CHANNELS];

  __device__ void merge(const Part& other) {
    const double own = n;
#pragma unroll
    for (int c = 0; c < CHANNELS; ++c) {
      Moments all{own, mean[c], m2[c]};
      all.merge({other.n, other.mean[c], other.m2[c]});
      n = all.n, mean[c] = all.mean, m2[c] = all.m2;
    }
  }

  // Merge pairwise those of threads `tile` apart, `rows` of them, into that of the first. Once in a kernel.
  __device__ void merge_rows(unsigned tile, unsigned rows) {
    __shared__ Part slot[block_threads / 2];
    while (rows > 1) {
      const unsigned half = (rows + 1) / 2;
      if (threadIdx.x >= half * tile && threadIdx.x < rows * tile) slot[threadIdx.x - half * tile] = *this;
      __syncthreads();
      if (threadIdx.x < (rows - half) * tile) merge(slot[threadIdx.x]);
      __syncthreads();
      rows = half;
    }
  }

  __device__ void store(double* to, index_t channels) const {
#pragma unroll
    for (int c = 0; c < CHANNELS; ++c) to[c] = n, to[channels + c] = mean[c], to[2 * channels + c] = m2[c];
  }
};

// The positions that a thread reads, one after the other.
struct Trail {
  const Scan& scan;
  index_t at, h, w;

  __device__ Trail(const Scan& scan, index_t column, index_t position) : scan(scan) {
    w = split(position, scan.width), h = split(position, scan.height);
    at = position * scan.stride.n + column * scan.stride.c + h * scan.stride.h + w * scan.stride.w;
  }
  __device__ index_t next() {
    const index_t here = at;
    at += scan.jump, h += scan.jump_h, w += scan.jump_w;
    if (w >= scan.width) at += scan.wrap_w, w -= scan.width, ++h;
    if (h >= scan.height) at += scan.wrap_h, h -= scan.height;
    return here;
  }
};

// What a thread sums in acc: V sums side by side, of at most pixels_of_sum terms each.
template <typename scalar_t, int V, int CHANNELS>
struct Group {
  using acc = acc_t<scalar_t>;
  acc pivot[CHANNELS], sum[V] = {}, square[V] = {};
  int packs = 0;

  template <int N>
  __device__ void add(const scalar_t* __restrict__ x, Trail& trail) {
    Pack<scalar_t, V> raw[N];
#pragma unroll
    for (int i = 0; i < N; ++i) raw[i] = *reinterpret_cast<const Pack<scalar_t, V>*>(x + trail.next());
    if (packs == 0)
#pragma unroll
      for (int c = 0; c < CHANNELS; ++c) pivot[c] = static_cast<acc>(raw[0].v[c]);
#pragma unroll
    for (int i = 0; i < N; ++i)
#pragma unroll
      for (int v = 0; v < V; ++v) {
        const acc d = static_cast<acc>(raw[i].v[v]) - pivot[v % CHANNELS];
        sum[v] += d, square[v] += d * d;
      }
    packs += N;
  }

  __device__ Part<CHANNELS> part() const {
    Part<CHANNELS> part;
    part.n = packs * (V / CHANNELS);
    const double share = 1 / part.n;
#pragma unroll
    for (int c = 0; c < CHANNELS; ++c) {
      double first = 0, second = 0;
#pragma unroll
      for (int v = c; v < V; v += CHANNELS) first += sum[v], second += square[v];
      part.mean[c] = pivot[c] + first * share, part.m2[c] = second - first * first * share;
    }
    return part;
  }
};

// parts[s, :, c] = the moments of the s-th share of channel c. A pack has V elements of CHANNELS channels, V or 1.
template <typename scalar_t, int V, int CHANNELS>
__global__ void __launch_bounds__(block_threads, 2)
    moments_parts(const __grid_constant__ Scan scan, double* __restrict__ parts, const index_t channels) {
  const unsigned row = threadIdx.x / scan.tile;
  index_t share = blockIdx.x;
  const index_t column = split(share, scan.tiles) * scan.tile + threadIdx.x % scan.tile;
  const index_t begin = share * scan.share + row, positions = scan.batch * scan.height * scan.width;
  const index_t end = positions < (share + 1) * scan.share ? positions : (share + 1) * scan.share;
  Part<CHANNELS> part{};
  if (row < scan.rows && column < scan.columns && begin < end) {
    const scalar_t* __restrict__ x = static_cast<const scalar_t*>(scan.x);
    Trail trail(scan, column, begin);
    for (index_t left = (end - begin + scan.rows - 1) / scan.rows; left > 0; left -= pixels_of_sum) {
      const int packs = left < pixels_of_sum ? static_cast<int>(left) : pixels_of_sum;
      Group<scalar_t, V, CHANNELS> group;
      while (group.packs + packs_ahead<V> <= packs) group.template add<packs_ahead<V>>(x, trail);
      while (group.packs < packs) group.template add<1>(x, trail);
      part.merge(group.part());
    }
  }
  part.merge_rows(scan.tile, scan.rows);
  if (row == 0 && column < scan.columns) part.store(parts + share * 3 * channels + column * CHANNELS, channels);
}

constexpr int merge_tile = 4;  // 32 bytes of a share's doubles

// moments[:, c] of parts[s, :, c].
__global__ void __launch_bounds__(block_threads)
    moments_merge(const double* __restrict__ parts, const index_t shares, const index_t channels, double* __restrict__ moments) {
  constexpr int rows = block_threads / merge_tile;
  const index_t row = threadIdx.x / merge_tile, c = static_cast<index_t>(blockIdx.x) * merge_tile + threadIdx.x % merge_tile;
  Part<1> part{};
  if (c < channels)
    for (index_t s = row; s < shares; s += rows) {
      const double* from = parts + s * 3 * channels + c;
      part.merge({from[0], {from[channels]}, {from[2 * channels]}});
    }
  part.merge_rows(merge_tile, rows);
  if (row == 0 && c < channels) part.store(moments + c, channels);
}

}  // namespace aliasfused
