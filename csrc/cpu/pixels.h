// Memory in pixels (NHWC): the lanes are channels.
#pragma once

#include "kernels.h"
#include "slide.h"

namespace aliasfused {
namespace AF_ISA {
namespace {

template <typename T, bool ADJOINT, typename W, typename Pre>
struct Pixels {
  using acc = acc_t<T>;
  using AllTerms = AxisTerms<ADJOINT, W>;
  using Finder = typename AllTerms::Finder;
  static constexpr int unit = Lanes<T>::unit;
  static constexpr index_t stretch = 8;      // of a row, that a window slides along before it takes the next channels
  static constexpr index_t a_buffer = 8192;  // elements: what the first-level cache holds beside the source rows

  const BlurPool& op;
  Pre pre;
  index_t out_rows = results<ADJOINT>(op.rows), out_cols = results<ADJOINT>(op.cols);
  index_t in_cols = ADJOINT ? op.cols.out : op.cols.in;
  // As many channels at once as the buffer holds for a row, but at least 256, so that memory is read in long runs.
  index_t some_channels = min(round_up(op.channels, unit), max(256, a_buffer / max(in_cols, 1) / unit * unit));
  bool slides = is_tuned<W> && op.src_stride.c == 1 && op.channels >= unit && op.cols.stride == 2 && op.cols.taps <= most_slid;
  bool bypass = bypasses_caches<T>(op) && op.channels * sizeof(T) % 64 == 0 && reinterpret_cast<uintptr_t>(op.dst) % 64 == 0;

  void run(index_t begin, index_t end, const AllTerms& all_rows, const AllTerms& all_cols) const {
    const Finder rows(all_rows), cols(all_cols);
    const Stretches stretches(*this, cols);
    const Scratch<acc> sums(in_cols * some_channels + unit);
    for (index_t item = begin; item < end; ++item) {
      const index_t o = item % out_rows, n = item / out_rows;
      const T* src = static_cast<const T*>(op.src) + n * op.src_stride.n;
      T* dst = static_cast<T*>(op.dst) + n * op.dst_stride.n + o * op.dst_stride.h;
      const Terms<W> terms = rows(o);
      Ahead ahead = ahead_of(src, terms);
      if constexpr (is_tuned<W>) {
        if (stretches.begin < stretches.end && terms.count) {
          slide(src, terms, cols, stretches, sums.data, dst, ahead);
          continue;
        }
      }
      for (index_t c = 0; c < op.channels; c += some_channels) {
        const index_t channels = min(some_channels, op.channels - c);
        sum_columns(src + c * op.src_stride.c, terms, c, channels, sums.data);
        put(cols, sums.data, c, channels, dst + c, ahead);
      }
    }
    settle();
  }

  // The source rows that follow those of `terms`, in shares for each unit of the result.
  Ahead ahead_of(const T* src, const Terms<W>& terms) const {
    if (op.src_stride.c != 1 || terms.count == 0) return {nullptr, 0};
    const index_t newest = max(terms.offset[0], terms.offset[terms.count - 1]);
    const index_t bytes = (ADJOINT ? op.rows.out : op.rows.in) * op.src_stride.h / out_rows * index_t(sizeof(T));
    return {reinterpret_cast<const char*>(src + newest + op.src_stride.h), bytes * unit / max(out_cols * op.channels, 1)};
  }

  // Where a window can slide along a row, if anywhere.
  struct Stretches {
    index_t begin = 0, end = 0;   // forward: results; adjoint: columns that are the newest of a window, for two results each
    index_t first = 0, last = 0;  // adjoint: borders add to the results before and from here on ...
    index_t edge_columns = 0;     // ... which are sums over this many columns,
    Scratch<index_t> at;          // namely these; forward: where each extended column lies in a source row, or -1

    Stretches(const Pixels& row, const Finder& cols)
        : at(!row.slides ? 0
             : ADJOINT   ? row.in_cols
                         : row.op.cols.last() - row.op.cols.first()) {
      if (!row.slides) return;
      const Axis& axis = row.op.cols;
      if (!ADJOINT) {
        end = axis.out;
        for (index_t t = axis.first(); t < axis.last(); ++t) {
          const index_t source = axis.source(t);
          at.data[t - axis.first()] = source < 0 ? source : source * row.op.src_stride.w;
        }
        return;
      }
      // Column q is the newest for results 2 q - before and the next one. Those in [lo, hi) are free of borders.
      const index_t before = axis.before, after = max(axis.last() - axis.in, 0);
      const bool wraps = axis.border == Border::circular, open = axis.border == Border::zeros;
      const index_t lo = open ? 0 : (wraps ? after : before) + 1, hi = open ? axis.in : axis.in - 1 - (wraps ? before : after);
      begin = max((lo + before + 1) / 2, (axis.taps - 1) / 2), end = min(axis.out, (hi + before) / 2);
      if (begin >= end) return;
      first = 2 * begin - before, last = 2 * end - before;
      for (index_t q = 0; q < axis.out; ++q) at.data[q] = 0;
      for (index_t o = 0; o < axis.in; ++o) {
        const Terms<W> terms = cols(o);
        for (int m = 0; m < terms.count && is_edge(o); ++m) at.data[terms.offset[m] / row.some_channels] = 1;
      }
      for (index_t q = 0; q < axis.out; ++q)
        if (at.data[q]) at.data[edge_columns++] = q;
      if (2 * edge_columns > axis.out) end = begin;  // then most sums would be computed twice
    }
    bool is_edge(index_t o) const { return o < first || o >= last; }
  };

  // All results of a row, most of them from a sliding window.
  void slide(const T* src, const Terms<W>& rows, const Finder& cols, const Stretches& stretches, acc* sums, T* dst, Ahead ahead) const {
    const Slide<T, Pre> how{pre, op.channels, op.src_stride.w, op.dst_stride.w, dst, bypass};
    const acc* taps = static_cast<const acc*>(op.taps_w);
    const auto run = [&](auto k, auto m) INLINED {
      const Sources<m, W, T> sources(rows, src);
      for (index_t o = stretches.begin; o < stretches.end; o += stretch) {
        const index_t end = min(o + stretch, stretches.end);
        if constexpr (ADJOINT) ahead = slide_adjoint<m, k>(sources, how, taps, op.cols.before, o, end, ahead);
        else ahead = slide_forward<m, k>(sources, how, taps, stretches.at.data, o, end, ahead);
      }
    };
    slid(op.cols.taps, [&](auto k) INLINED {
      if constexpr (ADJOINT) unrolled<true>(rows.count, [&](auto m) INLINED { run(k, m); });
      else rows.count == k ? run(k, k) : run(k, std::integral_constant<int, 0>{});
    });
    if constexpr (ADJOINT) {
      unrolled<true>(rows.count, [&](auto m) INLINED {
        put_edges<m>(Sources<m, W, T>(rows, src), how, cols, some_channels, stretches.at.data, stretches.edge_columns, stretches.first,
                     stretches.last, out_cols, sums);
      });
    }
  }

  // All results of a row, for `channels` channels from c on, from the sums of its columns.
  void put(const Finder& cols, const acc* sums, index_t c, index_t channels, T* dst, Ahead& ahead) const {
    for (index_t o = 0; o < out_cols; ++o) {
      const Terms<W> terms = cols(o);
      T* const pixel = dst + o * op.dst_stride.w;
      if (terms.count == 0) {
        for (index_t u = 0; u < channels; ++u) pixel[u] = T{};
        continue;
      }
      unrolled<is_tuned<W>>(terms.count, [&](auto m) INLINED {
        // By value, for a store may touch anything that is reached through a pointer.
        const Sources<m, W, acc> sources(terms, sums);
        const bool past_caches = bypass;
        const index_t n = channels, first = c;
        Ahead next = ahead;
        T* const to = pixel;
        const auto sum = [=](index_t u)
                             INLINED { return sources.sum(u, first + u, [](const acc* p) INLINED { return Lanes<acc>::load(p); }); };
        index_t u = 0;
        for (; u + unit <= n; u += unit) {
          next();
          past_caches ? Lanes<T>::stream(to + u, sum(u)) : Lanes<T>::store(to + u, sum(u));
        }
        if (u < n) Lanes<T>::store(to + u, sum(u), n - u);
        ahead = next;
      });
    }
  }

  // Sums of source rows at all columns, in the lane order of T.
  void sum_columns(const T* src, const Terms<W>& rows, index_t c, index_t channels, acc* sums) const {
    const index_t pitch = some_channels;
    if (rows.count == 0) {
      for (index_t i = 0; i < in_cols * pitch; ++i) sums[i] = 0;
      return;
    }
    const index_t stride = op.src_stride.c, next = op.src_stride.w;
    // Whole pixels that follow each other in memory are one long run.
    const bool is_run = !op.per_channel && stride == 1 && next == channels && channels == pitch;
    const index_t pixels = is_run ? 1 : in_cols, length = is_run ? in_cols * channels : channels;
    unrolled<is_tuned<W>>(rows.count, [&](auto m) INLINED {
      for (index_t x = 0; x < pixels; ++x) {
        const Sources<m, W, T> sources(rows, src + x * next);
        acc* const to = sums + x * pitch;
        const index_t n = length, first = c, in_run = is_run ? channels : n;
        const Pre how = pre;
        const auto at = [=](index_t u, index_t from, auto&& load) INLINED {
          const index_t channel = first + u % in_run;
          const auto prepared = how.pixel(channel);
          Lanes<acc>::store(to + u, sources.sum(from, channel, [&](const T* p) INLINED { return prepared(load(p)); }));
        };
        if (stride != 1) {
          for (index_t u = 0; u < n; u += unit)
            at(u, u * stride,
               [&](const T* p) INLINED { return gathered(p, stride, n - u, [](const T* copy) INLINED { return Lanes<T>::load(copy); }); });
          continue;
        }
        index_t u = 0;
        for (; u + unit <= n; u += unit) at(u, u, [](const T* p) INLINED { return Lanes<T>::load(p); });
        if (u < n) at(u, u, [&](const T* p) INLINED { return Lanes<T>::load(p, n - u); });
      }
    });
  }
};

// (k, channels) taps in the lane order of T, from (channels, k) ones.
template <typename T>
struct ChannelTaps {
  using acc = acc_t<T>;
  Scratch<acc> values;
  Scratch<const acc*> rows;
  ChannelTaps(const void* taps, index_t channels, int k) : values(k * round_up(channels, Lanes<T>::unit)), rows(k) {
    const index_t pitch = round_up(channels, Lanes<T>::unit);
    for (int p = 0; p < k; ++p) {
      acc* row = values.data + p * pitch;
      rows.data[p] = row;
      for (index_t c = 0; c < pitch; ++c) row[c] = c < channels ? static_cast<const acc*>(taps)[c * k + p] : acc(0);
      for (index_t c = 0; c < pitch; c += Lanes<T>::unit) Lanes<acc>::store(row + c, from_natural<T>(Lanes<acc>::load(row + c)));
    }
  }
};

// Rows [begin, end) of the results, those of all images counted through, by taps W: a number each, or one for every channel.
template <typename T, bool ADJOINT, typename W, typename Pre>
void blur_pixels_by(const W* taps_h, const W* taps_w, const BlurPool& op, const Parallel& parallel, const Pre& pre, index_t begin,
                    index_t end) {
  const Pixels<T, ADJOINT, W, Pre> pixels{op, pre};
  AxisTerms<ADJOINT, W> rows(op.rows, op.src_stride.h), cols(op.cols, pixels.some_channels);
  rows.set_taps(taps_h), cols.set_taps(taps_w);
  parallel(end - begin, max(1, grain_pixels / max(op.cols.in * op.channels, 1)),
           [&](index_t first, index_t last) INLINED { pixels.run(begin + first, begin + last, rows, cols); });
}
template <typename T, bool ADJOINT, typename Pre>
void blur_pixels(const BlurPool& op, const Parallel& parallel, const Pre& pre, index_t begin, index_t end) {
  const auto *taps_h = static_cast<const acc_t<T>*>(op.taps_h), *taps_w = static_cast<const acc_t<T>*>(op.taps_w);
  blur_pixels_by<T, ADJOINT>(taps_h, taps_w, op, parallel, pre, begin, end);
}
template <typename T, bool ADJOINT, typename Pre>
void blur_pixels_per_channel(const BlurPool& op, const Parallel& parallel, const Pre& pre, index_t begin, index_t end) {
  const ChannelTaps<T> taps_h(op.taps_h, op.channels, op.rows.taps), taps_w(op.taps_w, op.channels, op.cols.taps);
  const auto rows_of = [](const ChannelTaps<T>& taps) { return static_cast<const acc_t<T>* const*>(taps.rows.data); };
  blur_pixels_by<T, ADJOINT>(rows_of(taps_h), rows_of(taps_w), op, parallel, pre, begin, end);
}

}  // namespace
}  // namespace AF_ISA
}  // namespace aliasfused
