// What the kernels of a blur by predicted filters have in common: which pixels and channels a thread owns, how these are loaded,
// which outputs read a pixel, and weights made of logits.
#pragma once

#include <cmath>

#include "../adaptive_blur_pool.h"
#include "any.cuh"
#include "lanes.cuh"

namespace aliasfused {

// What a block owns, and how many blocks there are along each axis. Positions are 32-bit.
struct Tile {
  bool channels_last;             // the order of threads
  int rows, cols, groups, lanes;  // pixels, groups of channels, chunks of each group
  int channels, chunks;           // of a group
  unsigned row_tiles, col_tiles, group_tiles, lane_tiles;
};

// What a thread owns. The threads of a warp own neighbours in memory, whichever its layout.
struct Seat {
  index_t n;
  int top, left, first_group;  // where the tile begins
  int h, w, pixel, q, lane, chunk;
  bool inside;

  __device__ Seat(const Tile& tile, int height, int width) {
    unsigned block = blockIdx.x, rest = threadIdx.x;
    const auto take = [](unsigned& index, unsigned size) {
      const int taken = static_cast<int>(index % size);
      index /= size;
      return taken;
    };
    chunk = take(block, tile.lane_tiles) * tile.lanes, first_group = take(block, tile.group_tiles) * tile.groups;
    left = take(block, tile.col_tiles) * tile.cols, top = take(block, tile.row_tiles) * tile.rows, n = block;
    if (tile.channels_last) lane = take(rest, tile.lanes), q = take(rest, tile.groups), pixel = rest;
    else pixel = take(rest, tile.rows * tile.cols), lane = take(rest, tile.lanes), q = rest;
    chunk += lane, h = top + pixel / tile.cols, w = left + pixel % tile.cols;
    inside = pixel < tile.rows * tile.cols && q < tile.groups && h < height && w < width;
  }
};

// V channels of a group of a map: one pack where they lie side by side and aligned; else `chunks` channels apart, so that what
// the neighbours own adjoins.
template <typename scalar_t, int V, bool PACKED>
struct Chunk {
  using acc = acc_t<scalar_t>;
  const scalar_t* data;
  index_t step, step_h, step_w;
  int live;  // of the V

  __device__ Chunk(const void* map, const Strides& s, const Tile& tile, index_t n, int group, int chunk)
      : step(PACKED ? 1 : tile.chunks * s.c), step_h(s.h), step_w(s.w) {
    live = PACKED ? V : (tile.channels - chunk + tile.chunks - 1) / tile.chunks;
    const index_t channel = static_cast<index_t>(group) * tile.channels + chunk * (PACKED ? V : 1);
    data = static_cast<const scalar_t*>(map) + n * s.n + channel * s.c;
  }

  __device__ void load(int h, int w, bool there, acc (&to)[V]) const {
    const scalar_t* from = data + h * step_h + w * step_w;
    Pack<scalar_t, V> raw{};
    if constexpr (PACKED) {
      if (there) raw = *reinterpret_cast<const Pack<scalar_t, V>*>(from);
    } else {
#pragma unroll
      for (int v = 0; v < V; ++v)
        if (there && v < live) raw.v[v] = from[v * step];
    }
#pragma unroll
    for (int v = 0; v < V; ++v) to[v] = static_cast<acc>(raw.v[v]);
  }

  __device__ void store(const acc (&value)[V], int h, int w) const {
    scalar_t* to = const_cast<scalar_t*>(data) + h * step_h + w * step_w;
    if constexpr (PACKED) {
      aliasfused::store(value, to);
    } else {
#pragma unroll
      for (int v = 0; v < V; ++v)
        if (v < live) to[v * step] = static_cast<scalar_t>(value[v]);
    }
  }
};

// An Axis of window.h in 32 bits, as 64-bit division is slow.
struct Side {
  int in, out, before, taps, stride;
  Border border;

  __device__ explicit Side(const Axis& axis)
      : in(static_cast<int>(axis.in)),
        out(static_cast<int>(axis.out)),
        before(static_cast<int>(axis.before)),
        taps(axis.taps),
        stride(axis.stride),
        border(axis.border) {}

  // Index of x that output o reads with tap p; -1 where that is zero.
  __device__ int source(int o, int p) const { return extended_source(o * stride + p - before, in, border); }

  // outputs_of, in whose text `visit` is once.
  template <typename Visit>
  __device__ void outputs_of(int h, Visit&& visit) const {
    const int last = (out - 1) * stride + taps - before, after = last > in ? last - in : 0, reach = before > after ? before : after;
    const bool near = border != Border::zeros && (h <= reach || h >= in - 1 - reach);
    for (int i = 0; i <= (near ? before + after : 0); ++i) {
      const int t = i == 0 ? h : i <= before ? -i : in + i - before - 1;
      if (i > 0 && extended_source(t, in, border) != h) continue;
      for (int o = (t + before) / stride, p = (t + before) % stride; p < taps; p += stride, --o)
        if (o >= 0 && o < out) visit(o, p);
    }
  }
};

// `size` outputs of an axis from `first` on; where the border wraps, modulo all that there are.
struct Outputs {
  int first, all, size;

  // Those that read positions [begin, end) of x. A border that mirrors or repeats x shows nothing to outputs further off.
  __device__ static Outputs reading(const Side& side, int begin, int end) {
    end = end < side.in ? end : side.in;
    const int far = begin + side.before - side.taps + 1;
    int from = far > 0 ? (far - 1) / side.stride + 1 : -(-far / side.stride), to = (end - 1 + side.before) / side.stride + 1;
    if (side.border != Border::circular) from = from > 0 ? from : 0, to = to < side.out ? to : side.out;
    else if (to - from + 2 < side.out) --from, ++to;
    else from = 0, to = side.out;
    return {from, side.out, to > from ? to - from : 0};
  }
  __device__ int at(int place) const {
    const int o = first + place;
    return o < 0 ? o + all : o >= all ? o - all : o;
  }
  __device__ int place(int o) const {
    const int d = o - first;
    return d < 0 ? d + all : d >= size ? d - all : d;
  }
};

template <typename acc>
struct Softmax {
  acc max, scale;  // scale is one over the sum
};

// The weights of an op, made of its logits.
template <typename scalar_t, int K>
struct Filters {
  using acc = acc_t<scalar_t>;
  const AdaptiveBlurPool& op;
  int table_groups;  // how many softmaxes a pixel has in a table

  __device__ Filters(const AdaptiveBlurPool& op, const Tile& tile)
      : op(op), table_groups(op.normalize == Normalize::joint ? 1 : tile.groups) {}
  __device__ int size() const { return K ? K : op.rows.taps; }

  __device__ const scalar_t* at(index_t n, int group, int i, int j) const {
    const Strides& s = op.logits_stride;
    return static_cast<const scalar_t*>(op.logits) + n * s.n + static_cast<index_t>(group) * (size() * size()) * s.c + i * s.h + j * s.w;
  }

  __device__ Softmax<acc> softmax(const scalar_t* __restrict__ z, index_t count) const {
    Softmax<acc> all{static_cast<acc>(-INFINITY), 0};
    const index_t step = op.logits_stride.c;
#pragma unroll
    for (index_t t = 0; t < count; ++t) {
      const acc value = static_cast<acc>(z[t * step]);
      all.max = value > all.max ? value : all.max;
    }
#pragma unroll
    for (index_t t = 0; t < count; ++t) all.scale += std::exp(static_cast<acc>(z[t * step]) - all.max);
    all.scale = 1 / all.scale;
    return all;
  }

  // Of `count` rows of outputs from rows.at(begin) on, and all of cols, for the groups of a tile.
  __device__ void tabulate(Softmax<acc>* table, index_t n, int first_group, const Outputs& rows, int begin, int count,
                           const Outputs& cols) const {
    if (op.normalize == Normalize::none) return;
    for (int e = static_cast<int>(threadIdx.x); e < count * cols.size * table_groups; e += block_threads) {
      const int pixel = e / table_groups, group = first_group + e % table_groups;
      const int i = rows.at(begin + pixel / cols.size), j = cols.at(pixel % cols.size);
      if (group >= op.groups) continue;
      if (op.normalize == Normalize::group) table[e] = softmax(at(n, group, i, j), size() * size());
      else table[e] = softmax(at(n, 0, i, j), static_cast<index_t>(op.groups) * size() * size());
    }
  }

  // Of N taps from t on, of logits z, and the table's pixel, in whose tile the group is the q-th.
  template <int N>
  __device__ void weights(const scalar_t* z, int t, const Softmax<acc>* table, int pixel, int q, acc (&weight)[N]) const {
#pragma unroll
    for (int i = 0; i < N; ++i) weight[i] = static_cast<acc>(z[(t + i) * op.logits_stride.c]);
    if (op.normalize == Normalize::none) return;
    const Softmax<acc> all = table[pixel * table_groups + (table_groups == 1 ? 0 : q)];
#pragma unroll
    for (int i = 0; i < N; ++i) weight[i] = std::exp(weight[i] - all.max) * all.scale;
  }
  __device__ acc weight(const scalar_t* z, int t, const Softmax<acc>* table, int pixel, int q) const {
    acc weight[1];
    weights(z, t, table, pixel, q, weight);
    return weight[0];
  }
};

// Columns of x that the taps of an output read: with K known worked out once.
template <int K>
struct Columns {
  int of[K];
  __device__ Columns(const Side& width, int w) {
#pragma unroll
    for (int q = 0; q < K; ++q) of[q] = width.source(w, q);
  }
  __device__ int operator()(int q) const { return of[q]; }
};
template <>
struct Columns<0> {
  Side width;
  int w;
  __device__ Columns(const Side& width, int w) : width(width), w(w) {}
  __device__ int operator()(int q) const { return width.source(w, q); }
};

}  // namespace aliasfused
