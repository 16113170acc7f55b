// For the launchers of kernels of stride 2: which lanes an op's maps have room for, and how results are shared out among threads.
#pragma once

#include <algorithm>
#include <cstdint>

#include "lanes.cuh"

namespace aliasfused {

constexpr int most_rows = 16;                // of a strip; a strip begins by reading rows that its neighbour reads too
constexpr index_t enough_threads = 1 << 17;  // to fill a large GPU
constexpr index_t int_limit = 0x7fffffff;
constexpr int tile_bytes = 128;  // of channels, where a thread has a pack of them, for neighbours; more would leave a block fewer columns

template <typename scalar_t>
constexpr int vector = 16 / static_cast<int>(sizeof(scalar_t));  // 16 bytes are the widest load

// A tensor that a kernel reads or writes.
template <typename scalar_t>
struct Map {
  const void* data;
  const Strides& stride;
  index_t batch, channels, height, width;

  // Whether packs of n elements, along the channels or along a row, lie aligned.
  bool packs_channels(int n) const { return packs(n) && channels % n == 0 && stride.c == 1 && whole(n, width, stride.w); }
  bool packs_columns(int n) const { return packs(n) && width % n == 0 && stride.w == 1 && whole(n, channels, stride.c); }

 private:
  static bool whole(int n, index_t size, index_t stride) { return size == 1 || stride % n == 0; }
  bool packs(int n) const {
    return reinterpret_cast<uintptr_t>(data) % (n * sizeof(scalar_t)) == 0 && whole(n, batch, stride.n) && whole(n, height, stride.h);
  }
};

// Whether the tuned kernels of K taps know such an axis.
template <int K>
bool is_tuned(const Axis& axis) {
  return axis.stride == 2 && axis.before < K && axis.last() - axis.in < K && axis.in <= int_limit / 4;
}

// How results are shared out, in units of a lane's channels and columns, whose `tile` neighbouring channels adjoin.
inline Walk walk_of(index_t batch, index_t channels, index_t columns, index_t tile, int first, int end) {
  const index_t across = batch * channels * columns, height = end - first;
  tile = channels % tile == 0 ? tile : channels;
  index_t strips = (height + most_rows - 1) / most_rows;
  while (across * strips < enough_threads && 4 * strips <= height) strips *= 2;
  const index_t rows = (height + strips - 1) / strips;
  strips = (height + rows - 1) / rows;
  const auto narrow = [](index_t value) { return static_cast<uint32_t>(value); };
  return {narrow(tile), narrow(columns),       narrow(channels / tile), narrow(strips), narrow(across * strips), first,
          end,          static_cast<int>(rows)};
}

}  // namespace aliasfused
