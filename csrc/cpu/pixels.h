// Memory in pixels (NHWC): the lanes are channels.
#pragma once

#include "kernels.h"
#include "memory.h"

namespace aliasfused {
namespace AF_ISA {
namespace {

template <typename T, bool ADJOINT, typename W, typename Pre>
struct Pixels {
  using acc = acc_t<T>;
  static constexpr int unit = Lanes<T>::unit;
  static constexpr index_t buffer_goal = 8192;  // elements: what the first-level cache holds beside the source rows

  const BlurPool& op;
  Pre pre;
  index_t out_rows = results<ADJOINT>(op.rows), out_cols = results<ADJOINT>(op.cols);
  index_t in_cols = ADJOINT ? op.cols.out : op.cols.in;
  // A pass over a row takes all its columns and as many channels as the buffer holds, but at least 256 channels, so that
  // memory is read in long runs; then fewer columns.
  index_t some_channels = min(round_up(op.channels, unit), max(256, buffer_goal / max(in_cols, 1) / unit * unit));
  index_t some_cols = max(op.cols.stride, ADJOINT ? buffer_goal / some_channels * op.cols.stride - op.cols.taps
                                                  : (buffer_goal / some_channels - op.cols.taps) / op.cols.stride);
  index_t pitch = some_channels;
  bool bypass = bypasses_caches<T>(op) && op.channels * sizeof(T) % 64 == 0 && reinterpret_cast<uintptr_t>(op.dst) % 64 == 0;

  index_t buffer_cols() const {
    const index_t n = min(some_cols, out_cols);
    return min(in_cols, ADJOINT ? buffered_by(op.cols, n) : n * op.cols.stride + op.cols.taps);
  }

  using AllTerms = AxisTerms<ADJOINT, W>;

  void run(index_t begin, index_t end, const AllTerms& all_rows, const AllTerms& all_cols) const {
    const typename AllTerms::Finder rows(all_rows), cols(all_cols);
    const Scratch<acc> buffer((buffer_cols() + 2) * pitch + unit);
    for (index_t item = begin; item < end; ++item) {
      const index_t o = item % out_rows, n = item / out_rows;
      const T* src = static_cast<const T*>(op.src) + n * op.src_stride.n;
      T* dst = static_cast<T*>(op.dst) + n * op.dst_stride.n + o * op.dst_stride.h;
      const Terms<W> terms = rows(o);
      Ahead ahead = ahead_of(src, terms);
      for (index_t c = 0; c < op.channels; c += some_channels)
        for (index_t j = 0; j < out_cols; j += some_cols)
          columns(src + c * op.src_stride.c, terms, cols, buffer.data, c, min(some_channels, op.channels - c), j,
                  min(j + some_cols, out_cols), dst + c, ahead);
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

  // Channels [c, c + channels) of results [begin, end) of a row.
  void columns(const T* src, const Terms<W>& rows, const typename AllTerms::Finder& cols, acc* buffer, index_t c, index_t channels,
               index_t begin, index_t end, T* dst, Ahead& ahead) const {
    const Range at_hand = buffered<ADJOINT>(op.cols, begin, end);
    const index_t lo = at_hand.lo * pitch, hi = at_hand.hi * pitch;
    sum_pixels(src, rows, c, channels, at_hand.lo, at_hand.hi, buffer);
    acc *elsewhere = buffer + buffer_cols() * pitch, *total = elsewhere + pitch;
    for (index_t o = begin; o < end; ++o) {
      const Terms<W> terms = cols(o);
      T* pixel = dst + o * op.dst_stride.w;
      bool all_at_hand = terms.count > 0;
      for (int m = 0; m < terms.count; ++m) all_at_hand &= terms.offset[m] >= lo && terms.offset[m] < hi;
      if (all_at_hand) {
        unrolled<is_tuned<W>>(terms.count, [&](auto m) INLINED {
          // By value, for a store may touch anything that is reached through a pointer.
          const Sources<m, W, acc> sources(terms, buffer - lo);
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
        continue;
      }
      for (index_t u = 0; u < pitch; ++u) total[u] = 0;
      for (int m = 0; m < terms.count; ++m) {
        sum_pixels(src, rows, c, channels, terms.offset[m] / pitch, terms.offset[m] / pitch + 1, elsewhere);
        for (index_t u = 0; u < pitch; u += unit) {
          Unit<acc> sum = Lanes<acc>::load(total + u);
          add(sum, weighted(Lanes<acc>::load(elsewhere + u), terms.weight[m], c + u));
          Lanes<acc>::store(total + u, sum);
        }
      }
      for (index_t u = 0; u < channels; u += unit) {
        const auto v = Lanes<acc>::load(total + u);
        channels - u >= unit ? Lanes<T>::store(pixel + u, v) : Lanes<T>::store(pixel + u, v, channels - u);
      }
    }
  }

  // Sums of source rows at columns [lo, hi), in the lane order of T.
  void sum_pixels(const T* src, const Terms<W>& rows, index_t c, index_t channels, index_t lo, index_t hi, acc* buffer) const {
    if (rows.count == 0) {
      for (index_t i = 0; i < (hi - lo) * pitch; ++i) buffer[i] = 0;
      return;
    }
    const index_t stride = op.src_stride.c, next = op.src_stride.w;
    // Whole pixels that follow each other in memory are one long run.
    const bool is_run = !op.per_channel && stride == 1 && next == channels && channels == pitch;
    const index_t pixels = is_run ? 1 : hi - lo, length = is_run ? (hi - lo) * channels : channels;
    unrolled<is_tuned<W>>(rows.count, [&](auto m) INLINED {
      for (index_t x = 0; x < pixels; ++x) {
        const Sources<m, W, T> sources(rows, src + (lo + x) * next);
        acc* const to = buffer + x * pitch;
        const index_t n = length, first = c, in_run = is_run ? channels : n;
        const Pre how = pre;
        const auto at = [=](index_t u, index_t from, auto&& load) INLINED {
          const index_t channel = first + u % in_run;
          Lanes<acc>::store(to + u, sources.sum(from, channel, [&](const T* p) INLINED { return how.pixel(load(p), channel); }));
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

template <typename T, bool ADJOINT, typename Pre>
void blur_pixels(const BlurPool& op, const Parallel& parallel, const Pre& pre) {
  using acc = acc_t<T>;
  const auto run = [&](const auto* taps_h, const auto* taps_w) INLINED {
    using W = std::remove_cv_t<std::remove_reference_t<decltype(*taps_h)>>;
    const Pixels<T, ADJOINT, W, Pre> pixels{op, pre};
    AxisTerms<ADJOINT, W> rows(op.rows, op.src_stride.h), cols(op.cols, pixels.pitch);
    rows.set_taps(taps_h), cols.set_taps(taps_w);
    parallel(op.batch * pixels.out_rows, max(1, grain_pixels / max(op.cols.in * op.channels, 1)),
             [&](index_t begin, index_t end) INLINED { pixels.run(begin, end, rows, cols); });
  };
  if (op.per_channel) {
    const ChannelTaps<T> taps_h(op.taps_h, op.channels, op.rows.taps), taps_w(op.taps_w, op.channels, op.cols.taps);
    run(taps_h.rows.data, taps_w.rows.data);
  } else {
    run(static_cast<const acc*>(op.taps_h), static_cast<const acc*>(op.taps_w));
  }
}

}  // namespace
}  // namespace AF_ISA
}  // namespace aliasfused
