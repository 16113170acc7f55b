// Pixels (NHWC) at stride 2: a window of column sums stays in registers while it slides along a stretch of a row, so that
// nothing is buffered and each source pixel is loaded once for the stretch.
#pragma once

#include "memory.h"

namespace aliasfused {
namespace AF_ISA {
namespace {

constexpr int most_slid = 7;  // taps

// What all stretches of a row share. All channels are done at once, unit by unit; the last unit overlaps the one before it
// rather than being a partial one.
template <typename T, typename Pre>
struct Slide {
  using acc = acc_t<T>;
  static constexpr int unit = Lanes<T>::unit;
  Pre pre;
  index_t channels, src_pitch, dst_pitch;
  T* dst;
  bool bypass;

  // one(c) for the first channel of every unit.
  template <typename One>
  INLINED void each_unit(One&& one) const {
    for (index_t c = 0; c < channels; c += unit) one(min(c, channels - unit));
  }
  // The sum of the rows' pixels `at` elements from their starts, the channels from c on; `prepared` is pre.pixel(c).
  template <int M, typename Prepared>
  INLINED static Unit<acc> column(const Sources<M, acc, T>& rows, index_t at, index_t c, const Prepared& prepared) {
    return rows.sum(at + c, c, [=](const T* p) INLINED { return prepared(Lanes<T>::load(p)); });
  }
  INLINED void put(index_t o, index_t c, Unit<acc> sum) const {
    T* const to = dst + o * dst_pitch + c;
    if (bypass) return Lanes<T>::stream(to, sum);
    own_soon(to, unit * sizeof(T));
    Lanes<T>::store(to, sum);
  }
};

// A row filter of K taps and the K sums it is over, moved on by N columns at a time.
template <typename acc, int K>
struct Window {
  Unit<acc> sum[K];
  acc weight[K];

  INLINED explicit Window(const acc* taps) : sum{} {
    for (int p = 0; p < K; ++p) weight[p] = taps[p];
  }
};

// Results [begin, end): column t of the extended row lies `extended[t]` elements from its start, or is zero (-1).
template <int M, int K, typename T, typename Pre>
NOINLINED Ahead slide_forward(const Sources<M, acc_t<T>, T> rows, const Slide<T, Pre> slide, const acc_t<T>* taps, const index_t* extended,
                              index_t begin, index_t end, Ahead ahead) {
  using acc = acc_t<T>;
  constexpr int fresh = K < 2 ? K : 2;
  Window<acc, K> window(taps);
  Unit<acc>(&sum)[K] = window.sum;
  slide.each_unit([&](index_t c) INLINED {
    const auto prepared = slide.pre.pixel(c);
    const auto column = [&](index_t t) INLINED { return extended[t] < 0 ? Unit<acc>{} : slide.column(rows, extended[t], c, prepared); };
#pragma GCC unroll 7
    for (int i = fresh; i < K; ++i) sum[i] = column(2 * begin + i - fresh);
    for (index_t o = begin; o < end; ++o) {
      ahead();
#pragma GCC unroll 7
      for (int i = 0; i < K; ++i) sum[i] = i + fresh < K ? sum[i + fresh] : column(2 * o + i);
      Unit<acc> result = weighted(sum[0], window.weight[0], c);
#pragma GCC unroll 7
      for (int p = 1; p < K; ++p) add(result, weighted(sum[p], window.weight[p], c));
      slide.put(o, c, result);
    }
  });
  return ahead;
}

// For every q in [begin, end) results 2 q - before and the one after it, which are sums over columns q, q - 1, ...: the
// window, the newest first. No border adds to them.
template <int M, int K, typename T, typename Pre>
NOINLINED Ahead slide_adjoint(const Sources<M, acc_t<T>, T> rows, const Slide<T, Pre> slide, const acc_t<T>* taps, index_t before,
                              index_t begin, index_t end, Ahead ahead) {
  using acc = acc_t<T>;
  constexpr int reach = (K + 1) / 2;
  Window<acc, K> window(taps);
  Unit<acc>(&sum)[K] = window.sum;
  slide.each_unit([&](index_t c) INLINED {
    const auto prepared = slide.pre.pixel(c);
    const auto column = [&](index_t q) INLINED { return slide.column(rows, q * slide.src_pitch, c, prepared); };
#pragma GCC unroll 7
    for (int i = 0; i < reach - 1; ++i) sum[i] = column(begin - 1 - i);
    for (index_t q = begin; q < end; ++q) {
      ahead();
#pragma GCC unroll 7
      for (int i = reach - 1; i > 0; --i) sum[i] = sum[i - 1];
      sum[0] = column(q);
#pragma GCC unroll 2
      for (int phase = 0; phase < 2; ++phase) {
        Unit<acc> result = {};
        if (phase < K) result = weighted(sum[0], window.weight[phase], c);
#pragma GCC unroll 7
        for (int p = phase + 2; p < K; p += 2) add(result, weighted(sum[p / 2], window.weight[p], c));
        slide.put(2 * q + phase - before, c, result);
      }
    }
  });
  return ahead;
}

// Results [0, first) and [last, n), which borders add to, whatever terms(o) says they are a sum of: sums of the `edge_count`
// columns that they need, `pitch` elements apart.
template <int M, typename T, typename Pre, typename Finder>
NOINLINED void put_edges(const Sources<M, acc_t<T>, T> rows, const Slide<T, Pre> slide, const Finder& terms, index_t pitch,
                         const index_t* edge, index_t edge_count, index_t first, index_t last, index_t n, acc_t<T>* sums) {
  using acc = acc_t<T>;
  slide.each_unit([&](index_t c) INLINED {
    const auto prepared = slide.pre.pixel(c);
    for (index_t i = 0; i < edge_count; ++i)
      Lanes<acc>::store(sums + edge[i] * pitch, slide.column(rows, edge[i] * slide.src_pitch, c, prepared));
    for (index_t o = first ? 0 : last; o < n; o = o + 1 == first ? last : o + 1) {
      const Terms<acc> columns = terms(o);
      Unit<acc> sum = {};
      if (columns.count) sum = sum_terms<0>(columns, c, [=](index_t at) INLINED { return Lanes<acc>::load(sums + at); });
      slide.put(o, c, sum);
    }
  });
}

// f(K) with the number of taps as a compile-time number.
template <typename F>
INLINED inline auto slid(int taps, F&& f) {
  switch (taps) {
    case 1: return f(std::integral_constant<int, 1>{});
    case 2: return f(std::integral_constant<int, 2>{});
    case 3: return f(std::integral_constant<int, 3>{});
    case 4: return f(std::integral_constant<int, 4>{});
    case 5: return f(std::integral_constant<int, 5>{});
    case 6: return f(std::integral_constant<int, 6>{});
    default: return f(std::integral_constant<int, most_slid>{});
  }
}

}  // namespace
}  // namespace AF_ISA
}  // namespace aliasfused
