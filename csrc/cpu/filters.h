// The predicted filters of a row of outputs, made of their logits, and the logits' gradient made of the filters'. Whatever the
// layout of the logits, a tap's weights lie side by side along the row, so that a softmax works on vectors of outputs.
#pragma once

#include "../adaptive_blur_pool.h"
#include "act.h"
#include "turn.h"

namespace aliasfused {
namespace AF_ISA {
namespace {

template <typename T>
struct Filters {
  using acc = acc_t<T>;
  using V = Vector<acc>;
  using Numbers = typename V::type;
  static constexpr int lanes = V::lanes;

  const AdaptiveBlurPool& op;
  const int taps = op.rows.taps * op.rows.taps;
  const index_t width = op.cols.out, tables = op.groups * taps;
  // Columns ahead of a row and behind it are zero: whoever gathers may look as far as a filter reaches.
  const index_t margin = round_up(op.cols.taps + lanes, lanes), pitch = 2 * margin + round_up(width, lanes), elements = tables * pitch;

  // Row i of image n: tap t of group g at j is row[(g * taps + t) * pitch + j].
  void make(index_t n, index_t i, acc* row) const {
    const Strides& s = op.logits_stride;
    const T* from = static_cast<const T*>(op.logits) + n * s.n + i * s.h;
    for (index_t t = 0; t < tables; ++t) {
      acc* table = row + t * pitch;
      std::memset(table - margin, 0, margin * sizeof(acc)), std::memset(table + width, 0, (pitch - margin - width) * sizeof(acc));
    }
    if (s.c != 1 || s.w == 1) {
      for (index_t t = 0; t < tables; ++t) load_row(from + t * s.c, row + t * pitch);
    } else {
      turn(from, s.w, row, pitch, width, tables);
    }
    each_softmax([&](index_t first, index_t count) { softmax(row + first * pitch, count); });
  }

  // The logits' gradient of row i of image n out of that of the filters, which it overwrites.
  void differentiate(const acc* row, acc* dw, index_t n, index_t i) const {
    each_softmax([&](index_t first, index_t count) { softmax_gradient(row + first * pitch, dw + first * pitch, count); });
    const Strides& s = op.dst_stride;
    const index_t h = i * op.span_h, below = min(op.span_h, op.rows.in - h) - 1;  // rows of zeros
    T* to = static_cast<T*>(op.dst) + n * s.n + h * s.h;
    // A row of dlogits lies tap by tap, or pixel by pixel, and the next one behind it: there is no third format.
    if (s.w != 1) {
      if (op.span_h * op.span_w > 1) std::memset(to, 0, (1 + below) * s.h * sizeof(T));
      return turn(dw, pitch, to, op.span_w * s.w, tables, width);
    }
    for (index_t t = 0; t < tables; ++t, to += s.c) {
      store_row(dw + t * pitch, to);
      if (below > 0) std::memset(to + s.h, 0, below * s.h * sizeof(T));
    }
  }

 private:
  template <typename F>
  void each_softmax(F&& f) const {
    if (op.normalize == Normalize::joint) f(index_t(0), tables);
    if (op.normalize == Normalize::group)
      for (index_t g = 0; g < op.groups; ++g) f(g * taps, index_t(taps));
  }

  void load_row(const T* from, acc* to) const {
    const index_t step = op.logits_stride.w;
    index_t j = 0;
    if (step == 1) {
      for (; j + lanes <= width; j += lanes) V::store(to + j, Lanes<T>::load_vector(from + j));
      if (j < width) V::store(to + j, Lanes<T>::load_vector(from + j, static_cast<int>(width - j)));
    } else if (step == 2) {
      for (; j < width; j += lanes) {
        const int some = static_cast<int>(min(2 * (width - j) - 1, 2 * lanes));
        const Unit<acc> u = some == 2 * lanes ? Lanes<T>::load(from + 2 * j) : Lanes<T>::load(from + 2 * j, some);
        V::store(to + j, Lanes<T>::is_split ? u.a : split(u).a);
      }
    } else {
      for (; j < width; ++j) to[j] = widen(from[j * step]);
    }
  }
  void store_row(const acc* from, T* to) const {
    index_t j = 0;
    if (op.span_w == 1) {
      for (; j + lanes <= width; j += lanes) Lanes<T>::store_vector(to + j, V::load(from + j));
      if (j < width) Lanes<T>::store_vector(to + j, V::load(from + j), static_cast<int>(width - j));
    } else if (op.span_w == 2) {
      for (; j < width; j += lanes) {
        const Unit<acc> apart{V::load(from + j), Numbers{}}, u = Lanes<T>::is_split ? apart : interleave(apart);
        const index_t some = op.cols.in - 2 * j;
        if (some >= 2 * lanes) Lanes<T>::store(to + 2 * j, u);
        else Lanes<T>::store(to + 2 * j, u, static_cast<int>(some));
      }
    } else {
      std::memset(to, 0, op.cols.in * sizeof(T));
      for (; j < width; ++j) Lanes<T>::store_vector(to + j * op.span_w, Numbers{} + from[j], 1);
    }
  }

  NOINLINED void softmax(acc* z, index_t count) const {
    for (index_t j = 0; j < width; j += lanes) {
      Numbers most = V::load(z + j), sum{};
      for (index_t t = 1; t < count; ++t) {
        const Numbers v = V::load(z + t * pitch + j);
        most = v > most ? v : most;
      }
      for (index_t t = 0; t < count; ++t) {
        const Numbers e = exponential(V::load(z + t * pitch + j) - most);
        sum += e;
        V::store(z + t * pitch + j, e);
      }
      const Numbers share = 1 / sum;
      for (index_t t = 0; t < count; ++t) V::store(z + t * pitch + j, V::load(z + t * pitch + j) * share);
    }
  }
  NOINLINED void softmax_gradient(const acc* w, acc* dw, index_t count) const {
    for (index_t j = 0; j < width; j += lanes) {
      Numbers mean{};
      for (index_t t = 0; t < count; ++t) mean += V::load(w + t * pitch + j) * V::load(dw + t * pitch + j);
      for (index_t t = 0; t < count; ++t) V::store(dw + t * pitch + j, V::load(w + t * pitch + j) * (V::load(dw + t * pitch + j) - mean));
    }
  }
};

// Filters of some rows at a time: those that are asked for, made once.
template <typename T>
struct FilterRows {
  using acc = acc_t<T>;
  const Filters<T>& filters;
  const index_t most;
  Scratch<acc> memory{most * filters.elements};
  Scratch<index_t> where{filters.op.rows.out}, which{most};  // a row's place in memory, or -1; and the row of every place
  index_t count = 0;

  FilterRows(const Filters<T>& of, index_t at_most) : filters(of), most(at_most) { forget(); }
  void forget() {
    for (index_t i = 0; i < filters.op.rows.out; ++i) where.data[i] = -1;
    count = 0;
  }
  // The place of row i of image n.
  index_t find(index_t n, index_t i) {
    if (where.data[i] < 0) {
      filters.make(n, i, at(where.data[i] = count));
      which.data[count++] = i;
    }
    return where.data[i];
  }
  // At the first column.
  acc* at(index_t place) const { return memory.data + place * filters.elements + filters.margin; }
};

}  // namespace
}  // namespace AF_ISA
}  // namespace aliasfused
