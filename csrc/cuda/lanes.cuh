// How the blurs of stride 2 and K taps, K known to the compiler, are shared out among threads.
//
// A thread owns a few results side by side, its Lane, in every row of a strip: `load` fetches what they need of a source row,
// `filter` sums it along the columns, each pixel prepared as Pre says. Which positions and taps that are, borders included, is
// settled before the first row. Positions are 32-bit.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "any.cuh"

namespace aliasfused {

// N neighbours in memory, moved by one instruction.
template <typename scalar_t, int N>
struct alignas(sizeof(scalar_t) * N) Pack {
  scalar_t v[N];
};

HOST_DEVICE inline void round_pair(const float* a, float* to) { to[0] = a[0], to[1] = a[1]; }
__device__ inline void round_pair(const float* a, __half* to) { *reinterpret_cast<__half2*>(to) = __floats2half2_rn(a[0], a[1]); }
__device__ inline void round_pair(const float* a, __nv_bfloat16* to) {
  *reinterpret_cast<__nv_bfloat162*>(to) = __floats2bfloat162_rn(a[0], a[1]);
}

template <int N, typename scalar_t>
__device__ inline void store(const float (&value)[N], scalar_t* to) {
  Pack<scalar_t, N> pack;
  if constexpr (N == 1) {
    pack.v[0] = static_cast<scalar_t>(value[0]);
  } else {
#pragma unroll
    for (int i = 0; i < N; i += 2) round_pair(value + i, pack.v + i);
  }
  *reinterpret_cast<Pack<scalar_t, N>*>(to) = pack;
}

// Which results a thread owns: consecutive threads take `tile` neighbouring groups of channels, then the groups of columns,
// so that whatever the layout and however small the map, blocks are full and a warp's addresses adjoin.
struct Walk {
  uint32_t tile, cols, tiles, strips, threads;
  int begin, end, rows;  // the rows there are (of the adjoint: pairs of rows), and how many a strip has
  // Where sums are wanted, of `channels`: each block has one tile of these, at so many of the positions. Else 0.
  uint32_t in_block = 0, positions = 0, channels = 0;

  // False for threads beyond the last. Units of a lane's channels and columns; [first, last) are its strip's rows.
  __device__ bool place(index_t& n, int& c, int& col, int& first, int& last) const {
    uint32_t index;
    if (in_block) {
      const uint32_t row = threadIdx.x / tile;
      index = blockIdx.x / tiles * in_block + row;
      c = static_cast<int>(blockIdx.x % tiles * tile + threadIdx.x % tile);
      if (row >= in_block || index >= positions || static_cast<uint32_t>(c) >= channels) return false;
      col = static_cast<int>(index % cols);
      index /= cols;
    } else {
      index = blockIdx.x * block_threads + threadIdx.x;
      if (index >= threads) return false;
      const uint32_t in_tile = index % tile;
      index /= tile;
      col = static_cast<int>(index % cols);
      index /= cols;
      c = static_cast<int>(index % tiles * tile + in_tile);
      index /= tiles;
    }
    first = begin + static_cast<int>(index % strips) * rows;
    last = first + rows < end ? first + rows : end;
    n = index / strips;
    return true;
  }

  // parts[share, i, channel] = the sums of a block's sum[i], over threads that own the same C channels.
  template <int N, int C>
  __device__ void add_up(const float (&sum)[N][C], double* parts, int c) const {
    __shared__ double partial[block_threads];
    const unsigned row = threadIdx.x / tile;
#pragma unroll
    for (int i = 0; i < N; ++i)
#pragma unroll
      for (int v = 0; v < C; ++v) {
        double total = sum[i][v];
        for (unsigned left = in_block; left > 1;) {
          const unsigned half = (left + 1) / 2;
          if (row >= half && row < left) partial[threadIdx.x - half * tile] = total;
          __syncthreads();
          if (row < left - half) total += partial[threadIdx.x];
          __syncthreads();
          left = half;
        }
        if (row == 0 && static_cast<uint32_t>(c) < channels)
          parts[(static_cast<index_t>(blockIdx.x / tiles) * N + i) * channels * C + c * C + v] = total;
      }
  }
};

template <int K>
struct Taps {
  float h[K], w[K];
};

// One axis of D^T as taps per position of x: position h is the sum over d of at(h)[d] times y[first(h) + d]. The K positions
// at either end have rows of their own, into which their mirrored or repeated taps are folded. Where a position has fewer taps than there
// is room for, the rest are 0 and still multiplied: an infinity in y may show as NaN one position further than its taps reach.
// K is odd: an even filter is one that begins with a 0.
template <int K>
struct Stencils {
  static_assert(K % 2 == 1);
  static constexpr int size = K / 2 + 1;
  float row[2 * K + 2][size];
  int in, before;

  HOST_DEVICE int first(int h) const { return (h + before) / 2 - K / 2; }
  HOST_DEVICE const float* at(int h) const { return row[h < K ? h : h >= in - K ? h - in + 2 * K : 2 * K + (h + before) % 2]; }

  // Pairs of positions, 2 i - before and its successor, that read the same y: the first, and one beyond the last.
  HOST_DEVICE int first_pair() const { return before / 2; }
  HOST_DEVICE int end_pair() const { return (in - 1 + before) / 2 + 1; }

  // For K or K - 1 taps. False if some output lies outside these windows, as for wrapped borders and wide pads.
  bool build(const Axis& axis, const float* taps) {
    const int zeros = K - axis.taps;
    in = static_cast<int>(axis.in), before = static_cast<int>(axis.before) + zeros;
    bool fits = true;
    for (int r = 0; r < 2 * K + 2; ++r)
      for (int d = 0; d < size; ++d) row[r][d] = 0;
    for (int p = zeros; p < K; ++p) row[2 * K + p % 2][K / 2 - p / 2] = taps[p - zeros];
    for (int h = 0; h < in; h = h + 1 == K && in - K > K ? in - K : h + 1)
      axis.outputs_of(h, [&](index_t o, int p) {
        const index_t d = o - first(h);
        if (d < 0 || d >= size) fits = false;
        else row[h < K ? h : h - in + 2 * K][d] += taps[p];
      });
    return fits;
  }
};

__device__ inline int clamp(int position, int size) { return position < 0 ? 0 : position < size ? position : size - 1; }

// V adjoining channels of one column, N terms each: NHWC, and with V = 1 any layout, in both directions.
template <typename scalar_t, int N, int V, typename Prepare = Identity>
struct Channels {
  using Pre = Prepare;
  static constexpr int values = V, columns = 1, channels = V, ahead = 1, blocks = N <= 5 && !Pre::early ? 3 : 2;
  struct Raw {
    Pack<scalar_t, V> x[N];
  };
  const index_t step;
  typename Pre::template At<V> pre;
  int offset[N];
  float tap[N];

  // A term that does not exist has tap 0 and stands on a neighbour: where that is infinite, 0 becomes nan.
  template <int K>
  __device__ Channels(const BlurPool& op, const Taps<K>& taps, const Pre& pre, int c, int col) : step(op.src_stride.h), pre(pre, c) {
    const int in = static_cast<int>(op.cols.in);
#pragma unroll
    for (int q = 0; q < N; ++q) {
      const int t = 2 * col + q - static_cast<int>(op.cols.before), w = extended_source(t, in, op.cols.border);
      tap[q] = w < 0 ? 0 : taps.w[q];
      offset[q] = static_cast<int>((w < 0 ? clamp(t, in) : w) * op.src_stride.w);
    }
  }
  template <int K>
  __device__ Channels(const BlurPool& op, const Stencils<K>& stencils, int col) : step(op.src_stride.h), pre(Pre{}, 0) {
    const float* row = stencils.at(col);
#pragma unroll
    for (int d = 0; d < N; ++d) {
      tap[d] = row[d];
      offset[d] = static_cast<int>(clamp(stencils.first(col) + d, static_cast<int>(op.cols.out)) * op.src_stride.w);
    }
  }

  __device__ Raw load(const scalar_t* src, int row) const {
    Raw raw;
#pragma unroll
    for (int d = 0; d < N; ++d) raw.x[d] = *reinterpret_cast<const Pack<scalar_t, V>*>(src + row * step + offset[d]);
    return raw;
  }

  __device__ void filter(const Raw& raw, float (&out)[V]) const {
#pragma unroll
    for (int v = 0; v < V; ++v) {
      out[v] = 0;
#pragma unroll
      for (int d = 0; d < N; ++d) out[v] += tap[d] * pre(static_cast<float>(raw.x[d].v[v]), v);
    }
  }
};

// NCHW forward: P adjoining outputs of a row. Their 2P inputs are one aligned load; the K - 2 beyond are remapped one by one.
template <typename scalar_t, int K, int P, typename Prepare = Identity>
struct RowDown {
  using Pre = Prepare;
  static constexpr int values = P, columns = P, channels = 1, ahead = 2, blocks = K <= 5 && !Pre::early ? 3 : 2;
  static constexpr int left = (K - 1) / 2, halo = K - 2;
  struct Raw {
    Pack<scalar_t, 2 * P> middle;
    scalar_t side[halo + 1];
  };
  const index_t step;
  typename Pre::template At<1> pre;
  int offset, side[halo + 1];
  float tap[K];

  __device__ RowDown(const BlurPool& op, const Taps<K>& taps, const Pre& pre, int c, int col)
      : step(op.src_stride.h), pre(pre, c), offset(2 * col) {
#pragma unroll
    for (int i = 0; i < halo; ++i)
      side[i] = extended_source(offset - left + i + (i < left ? 0 : 2 * P), static_cast<int>(op.cols.in), op.cols.border);
#pragma unroll
    for (int q = 0; q < K; ++q) tap[q] = taps.w[q];
  }

  __device__ Raw load(const scalar_t* src, int row) const {
    const scalar_t* line = src + row * step;
    Raw raw;
    raw.middle = *reinterpret_cast<const Pack<scalar_t, 2 * P>*>(line + offset);
#pragma unroll
    for (int i = 0; i < halo; ++i) raw.side[i] = line[side[i] < 0 ? 0 : side[i]];
    return raw;
  }

  __device__ void filter(const Raw& raw, float (&out)[P]) const {
    float x[2 * P + halo];
#pragma unroll
    for (int i = 0; i < 2 * P; ++i) x[left + i] = pre(static_cast<float>(raw.middle.v[i]), 0);
#pragma unroll
    for (int i = 0; i < halo; ++i) x[i < left ? i : i + 2 * P] = side[i] < 0 ? 0 : pre(static_cast<float>(raw.side[i]), 0);
#pragma unroll
    for (int v = 0; v < P; ++v) {
      out[v] = 0;
#pragma unroll
      for (int q = 0; q < K; ++q) out[v] += tap[q] * x[2 * v + q];
    }
  }
};

// NCHW adjoint: P even and P odd columns of dx side by side, one aligned store, from the few dy they share.
template <typename scalar_t, int K, int P>
struct RowUp {
  static constexpr int values = 2 * P, columns = 2 * P, channels = 1, ahead = 1;
  static constexpr int left = (K - 1) / 2, size = Stencils<K>::size;
  static constexpr int step(int e) { return (e + left) / 2 - left / 2; }  // how far column e's window is from column 0's
  static constexpr int reads = step(2 * P - 1) + size;
  struct Raw {
    scalar_t y[reads];
  };
  const index_t step_h;
  int offset[reads];
  float tap[2 * P][size];

  __device__ RowUp(const BlurPool& op, const Stencils<K>& stencils, int col) : step_h(op.src_stride.h) {
#pragma unroll
    for (int i = 0; i < reads; ++i)
      offset[i] = static_cast<int>(clamp(stencils.first(col) + i, static_cast<int>(op.cols.out)) * op.src_stride.w);
#pragma unroll
    for (int e = 0; e < 2 * P; ++e) {
      const float* row = stencils.at(col + e);
#pragma unroll
      for (int d = 0; d < size; ++d) tap[e][d] = row[d];
    }
  }

  __device__ Raw load(const scalar_t* src, int row) const {
    Raw raw;
#pragma unroll
    for (int i = 0; i < reads; ++i) raw.y[i] = src[row * step_h + offset[i]];
    return raw;
  }

  __device__ void filter(const Raw& raw, float (&out)[2 * P]) const {
    float y[reads];
#pragma unroll
    for (int i = 0; i < reads; ++i) y[i] = static_cast<float>(raw.y[i]);
#pragma unroll
    for (int e = 0; e < 2 * P; ++e) {
      out[e] = 0;
#pragma unroll
      for (int d = 0; d < size; ++d) out[e] += tap[e][d] * y[step(e) + d];
    }
  }
};

}  // namespace aliasfused
