// Numbers that lie along one axis of memory put along another: vectors are turned in registers, as many as each has lanes.
#pragma once

#include "terms.h"

namespace aliasfused {
namespace AF_ISA {
namespace {

// Of as many vectors as a vector has lanes, whose lanes fall into GROUPS neighbouring parts of the same size: afterwards lane i
// of v[g] is the sum over part g of what v[i] was. With as many parts as lanes nothing is added: the vectors are transposed.
template <int GROUPS, typename acc, int WIDTH = Vector<acc>::lanes>
INLINED inline void gather_parts(typename Vector<acc>::type* v) {
  if constexpr (WIDTH > 1) {
    constexpr int lanes = Vector<acc>::lanes;
    constexpr bool apart = WIDTH > lanes / GROUPS;
    constexpr int found = apart ? lanes / WIDTH : GROUPS;  // parts that are told apart so far, of WIDTH vectors each
    typename Vector<acc>::index low, high;
    for (int i = 0; i < lanes; ++i) {
      low[i] = i / (WIDTH / 2) * WIDTH + i % (WIDTH / 2);
      high[i] = low[i] + WIDTH / 2;
    }
    typename Vector<acc>::type halves[lanes];
#pragma GCC unroll 16
    for (int f = 0; f < found; ++f)
#pragma GCC unroll 16
      for (int i = 0; i < WIDTH / 2; ++i) {
        const auto a = v[f * WIDTH + 2 * i], b = v[f * WIDTH + 2 * i + 1];
        const auto first = __builtin_shuffle(a, b, low), second = __builtin_shuffle(a, b, high);
        if (apart) halves[f * WIDTH + i] = first, halves[f * WIDTH + WIDTH / 2 + i] = second;
        else halves[f * (WIDTH / 2) + i] = first + second;
      }
#pragma GCC unroll 16
    for (int i = 0; i < (apart ? lanes : found * WIDTH / 2); ++i) v[i] = halves[i];
    gather_parts<GROUPS, acc, WIDTH / 2>(v);
  }
}

// to[j * to_step + i] = from[i * from_step + j], for i < rows and j < cols.
template <typename From, typename To>
NOINLINED void turn(const From* from, index_t from_step, To* to, index_t to_step, index_t rows, index_t cols, index_t ahead = 0) {
  using acc = acc_t<From>;
  constexpr int lanes = Vector<acc>::lanes;
  for (index_t i = 0; i < rows; i += lanes)
    for (index_t j = 0; j < cols; j += lanes) {
      const int height = static_cast<int>(min(rows - i, lanes)), width = static_cast<int>(min(cols - j, lanes));
      typename Vector<acc>::type v[lanes];
      const From* source = from + i * from_step + j;
      To* target = to + j * to_step + i;
      if (height == lanes && width == lanes) {
#pragma GCC unroll 16
        for (int a = 0; a < lanes; ++a) v[a] = Lanes<From>::load_vector(source + a * from_step);
      } else {
#pragma GCC unroll 16
        for (int a = 0; a < lanes; ++a)
          v[a] = a < height ? Lanes<From>::load_vector(source + a * from_step, width) : typename Vector<acc>::type{};
      }
#pragma GCC unroll 16
      for (int a = 0; a < lanes; ++a) __builtin_prefetch(source + a * from_step + ahead, 0, 2);
      gather_parts<lanes, acc>(v);
      if (height == lanes) {
#pragma GCC unroll 16
        for (int a = 0; a < lanes; ++a)
          if (a < width) Lanes<To>::store_vector(target + a * to_step, v[a]);
      } else {
#pragma GCC unroll 16
        for (int a = 0; a < lanes; ++a)
          if (a < width) Lanes<To>::store_vector(target + a * to_step, v[a], height);
      }
    }
}

// Rows of a map with the channels of a pixel side by side, as R: where they lie, or copied and kept until others are wanted.
template <typename T, typename R>
struct PixelRows {
  T* const map;
  const Strides stride;
  const index_t height, width, channels;
  const bool in_place = std::is_same_v<T, R> && stride.c == 1;
  // Pixels of copies lie an odd number of cache lines apart, so that they do not all fall on the same lines of a cache.
  const index_t step = in_place ? stride.w : (round_up(channels * sizeof(R), 128) + 64) / sizeof(R), slots;
  Scratch<R> copies{in_place ? 0 : slots * width * step};
  Scratch<index_t> holds{slots}, used{slots};
  index_t clock = 0;

  // As many rows are at hand at a time as there are slots.
  PixelRows(const void* of, const Strides& strides, index_t rows, index_t columns, index_t all_channels, index_t at_a_time)
      : map(static_cast<T*>(const_cast<void*>(of))),
        stride(strides),
        height(rows),
        width(columns),
        channels(all_channels),
        slots(at_a_time) {
    for (index_t i = 0; i < slots; ++i) holds.data[i] = -1, used.data[i] = 0;
  }

  const R* read(index_t n, index_t h) {
    if (in_place) return here(n, h);
    index_t slot = 0;
    for (index_t i = 0; i < slots; ++i) {
      if (holds.data[i] == n * height + h) slot = i;
      else if (holds.data[slot] != n * height + h && used.data[i] < used.data[slot]) slot = i;
    }
    used.data[slot] = ++clock;
    R* to = copies.data + slot * width * step;
    if (holds.data[slot] == n * height + h) return to;
    holds.data[slot] = n * height + h;
    const T* from = map + n * stride.n + h * stride.h;
    if (stride.w == 1) turn(from, stride.c, to, step, channels, width, stride.h);
    else
      for (index_t w = 0; w < width; ++w)
        for (index_t c = 0; c < channels; ++c)
          if constexpr (std::is_same_v<R, acc_t<T>>) to[w * step + c] = widen(from[w * stride.w + c * stride.c]);
    return to;
  }

  // A row to be written, and when it is.
  R* write(index_t n, index_t h) { return in_place ? here(n, h) : copies.data; }
  void written(index_t n, index_t h) {
    if (in_place) return;
    T* to = map + n * stride.n + h * stride.h;
    if (stride.w == 1) return turn(copies.data, step, to, stride.c, width, channels);
    constexpr int lanes = Vector<acc_t<T>>::lanes;
    for (index_t w = 0; w < width; ++w)
      for (index_t c = 0; c < channels; c += lanes) {
        const auto v = Lanes<R>::load_vector(copies.data + w * step + c);
        if (c + lanes <= channels) Lanes<T>::store_vector(to + w * stride.w + c, v);
        else Lanes<T>::store_vector(to + w * stride.w + c, v, static_cast<int>(channels - c));
      }
  }

 private:
  R* here(index_t n, index_t h) const { return reinterpret_cast<R*>(map + n * stride.n + h * stride.h); }
};

}  // namespace
}  // namespace AF_ISA
}  // namespace aliasfused
