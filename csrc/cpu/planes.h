// Memory in rows (NCHW): the lanes are columns.
#pragma once

#include "columns.h"
#include "kernels.h"

namespace aliasfused {
namespace AF_ISA {
namespace {

// The sum of source rows at one column.
template <typename T, typename Pre>
acc_t<T> sum_rows_at(const T* src, const Terms<acc_t<T>>& t, index_t x, index_t stride, const Pre& pre, index_t c) {
  if (t.count == 0) return 0;
  const auto first = [](const T* p) { return load<false>(p); };
  return sum_terms<0>(t, c, [&](index_t row) { return pre.row(gathered(src + row + x * stride, 1, 1, first), c); })[0];
}

template <typename T, bool ADJOINT, typename Pre>
struct Planes {
  using acc = acc_t<T>;
  using V = Vector<acc>;
  static constexpr int unit = Lanes<T>::unit;
  static constexpr index_t most_cols = 64 * V::lanes;  // results of one pass over a row
  static constexpr int most_rows = 32;                 // rows of one pass
  static constexpr index_t buffer_goal = 4096;         // elements

  const BlurPool& op;
  Pre pre;
  index_t out_rows = results<ADJOINT>(op.rows), out_cols = results<ADJOINT>(op.cols);
  bool permute = ADJOINT || (op.cols.in <= 2 * V::lanes && op.cols.out <= 2 * V::lanes);
  index_t phase_pitch = min(out_cols, most_cols) + op.cols.taps / op.cols.stride + 2 * unit;
  index_t pitch =
      permute ? round_up(ADJOINT ? min(op.cols.out, buffered_by(op.cols, min(out_cols, most_cols))) : op.cols.in, V::lanes) + V::lanes
              : phase_pitch * op.cols.stride;
  // Rows of one pass: enough to spread the cost of its set-up.
  int strip = max(1, min(most_rows, buffer_goal / pitch));

  // What depends on the taps: shared by all threads, or rebuilt by each for every channel.
  struct Tables {
    AxisTerms<ADJOINT, acc> rows;
    Columns<ADJOINT, acc> columns;
    const acc* taps_w;
    explicit Tables(const BlurPool& op) : rows(op.rows, op.src_stride.h) {}
    void build(const Planes& planes, index_t c) {
      const BlurPool& op = planes.op;
      taps_w = static_cast<const acc*>(op.taps_w) + c * op.cols.taps;
      rows.set_taps(static_cast<const acc*>(op.taps_h) + c * op.rows.taps);
      if (planes.permute) columns.build(op.cols, taps_w);
    }
  };

  // A row of the result, and the plane that it is made from.
  struct Row {
    index_t n, c, o;
    const T* src;
    bool roomy;  // whole vectors may be read at the end of every row of the plane: what follows is still the tensor
  };
  void enter(Row& r) const {
    const Strides& s = op.src_stride;
    r.src = static_cast<const T*>(op.src) + r.n * s.n + r.c * s.c;
    r.roomy = (op.batch - 1 - r.n) * s.n + (op.channels - 1 - r.c) * s.c >= unit;
  }
  Row row_at(index_t item) const {
    Row r{item / out_rows / op.channels, item / out_rows % op.channels, item % out_rows, nullptr, false};
    enter(r);
    return r;
  }
  INLINED void advance(Row& r, index_t by = 1) const {
    for (r.o += by; r.o >= out_rows; enter(r)) {
      r.o -= out_rows;
      if (++r.c == op.channels) r.c = 0, ++r.n;
    }
  }

  using Finder = typename AxisTerms<ADJOINT, acc>::Finder;

  // Some rows from `row` on, and of these some columns.
  struct Piece {
    Row row;
    int rows;
    index_t begin, end;
    acc* buffer;  // sums of source rows
    T* results;   // row after row without a gap; whole vectors are stored, each row over the excess of the one before
  };

  // Rows [begin, end) of the result, which is contiguous.
  void run(index_t begin, index_t end, Tables& tables) const {
    const Finder terms(tables.rows);
    const Scratch<acc> buffer(strip * pitch);
    const Scratch<T> results(strip * min(out_cols, most_cols) + unit);
    const bool bypass = bypasses_caches<T>(op);
    Row row = row_at(begin);
    for (index_t item = begin; item < end;) {
      if (op.per_channel && (item == begin || row.o == 0)) tables.build(*this, row.c);
      const int rows = min(min(strip, end - item), op.per_channel ? out_rows - row.o : strip);
      for (index_t j = 0; j < out_cols; j += most_cols) {
        const Piece piece{row, rows, j, min(j + most_cols, out_cols), buffer.data, results.data};
        if (permute) by_permutation(piece, terms, tables);
        else if constexpr (!ADJOINT) by_phase(piece, terms, tables.taps_w);
        T* dst = static_cast<T*>(op.dst) + item * out_cols + j;
        const index_t width = piece.end - j;
        if (width == out_cols) flush(dst, results.data, rows * width, bypass);
        else
          for (int r = 0; r < rows; ++r) flush(dst + r * out_cols, results.data + r * width, width, bypass);
      }
      item += rows;
      advance(row, rows);
    }
    settle();
  }

  // What the rows after a piece will read first.
  Ahead ahead_of(const Piece& piece, const Finder& terms) const {
    Row row = piece.row;
    advance(row, piece.rows);
    if (row.n == op.batch || op.src_stride.w != 1) return {nullptr, 0};
    const Terms<acc> t = terms(row.o);
    const index_t newest = t.count ? max(t.offset[0], t.offset[t.count - 1]) : 0;
    const index_t rows = ADJOINT ? op.rows.out : op.rows.in;
    return {reinterpret_cast<const char*>(row.src + newest), rows * op.src_stride.h / out_rows * index_t(sizeof(T))};
  }

  // The first step: sums of source rows over columns [lo, hi) for every row of a piece, as vectors in natural order or as
  // units in T's order: store(row of the piece, column - lo, sum).
  template <bool by_units, typename Store>
  INLINED void sum_rows(const Piece& piece, const Finder& terms, index_t lo, index_t hi, Store&& store) const {
    constexpr int width = by_units ? unit : V::lanes;
    const index_t stride = op.src_stride.w;
    // Rows a stride of the adjoint apart meet the same taps, so one of them mostly has as many terms as the one before.
    const int step = ADJOINT ? op.rows.stride : 1;
    for (int first = 0; first < min(step, piece.rows); ++first) {
      Row row = piece.row;
      advance(row, first);
      for (int r = first; r < piece.rows;) {
        Terms<acc> t = terms(row.o);
        if (t.count == 0 || stride != 1) {  // a border of zeros, or pixels that must be gathered
          const auto whole = [](const T* p) { return load<by_units>(p); };
          for (index_t x = lo; x < hi; x += width)
            store(r, x - lo,
                  t.count ? sum_terms<0>(
                                t, row.c,
                                [&](index_t from) { return pre.row(gathered(row.src + from + x * stride, stride, hi - x, whole), row.c); })
                          : decltype(whole(row.src)){});
          r += step, advance(row, step);
          continue;
        }
        unrolled<is_tuned<acc>>(t.count, [&](auto m) INLINED {
          const int count = t.count;
          do {
            const index_t end = row.roomy ? lo + round_up(hi - lo, width) : hi;
            index_t x = lo;
            for (; x + width <= end; x += width)
              store(r, x - lo, sum_terms<m>(t, row.c, [&](index_t from) { return pre.row(load<by_units>(row.src + from + x), row.c); }));
            if (x < end)
              store(r, x - lo,
                    sum_terms<m>(t, row.c, [&](index_t from) { return pre.row(load<by_units>(row.src + from + x, end - x), row.c); }));
            r += step, advance(row, step);
            if (r >= piece.rows) break;
            t = terms(row.o);
          } while (t.count == count);
        });
      }
    }
  }

  void by_permutation(const Piece& piece, const Finder& terms, const Tables& tables) const {
    const Range at_hand = buffered<ADJOINT>(op.cols, piece.begin, piece.end);
    const index_t lo = at_hand.lo, hi = at_hand.hi, width = piece.end - piece.begin;
    const Columns<ADJOINT, acc>& columns = tables.columns;
    sum_rows<false>(piece, terms, lo, hi, [&](int r, index_t x, auto v) INLINED { V::store(piece.buffer + r * pitch + x, v); });
    // The last columns first, so that what a vector has in excess is still to be stored in the row below.
    for (index_t first_block = piece.begin / V::lanes, stop = (piece.end + V::lanes - 1) / V::lanes; stop > first_block;) {
      const index_t b = columns.fits ? max(columns.first(stop - 1), first_block) : stop - 1;
      T* to = piece.results + b * V::lanes - piece.begin;
      const auto store = [&](int r, index_t i, auto v) INLINED { Lanes<T>::store_vector(to + r * width + i * V::lanes, v); };
      const Pattern<acc>& pattern = columns.pattern[columns.fits ? columns.slot(b) : 0];
      if (columns.fits && pattern.terms && columns.base(b) >= lo && columns.base(stop - 1) + pattern.span < hi) {
        const acc* from = piece.buffer + columns.base(b) - lo;
        const Ahead ahead = stop - b > 1 || columns.repeats() == 0 ? ahead_of(piece, terms) : Ahead{nullptr, 0};
        unrolled<is_tuned<acc>>(pattern.terms, [&](auto m) INLINED {
          if (pattern.wide()) pattern.template apply<m, true>(from, columns.step, stop - b, pitch, piece.rows, ahead, store);
          else pattern.template apply<m, false>(from, columns.step, stop - b, pitch, piece.rows, ahead, store);
        });
      } else {
        Row here = piece.row;
        for (int r = 0; r < piece.rows; ++r, advance(here))
          for (index_t i = b; i < stop; ++i)
            store(r, i - b, lane_by_lane(here, terms, tables.taps_w, i * V::lanes, piece.buffer + r * pitch, lo, hi));
      }
      stop = b;
    }
  }

  typename V::type lane_by_lane(const Row& row, const Finder& terms, const acc* taps, index_t o, const acc* sums, index_t lo,
                                index_t hi) const {
    typename V::type v{};
    for (int i = 0; i < V::lanes && o + i < out_cols; ++i)
      sources_of<ADJOINT>(op.cols, o + i, [&](index_t x, int q) INLINED {
        v[i] += taps[q] * (x >= lo && x < hi ? sums[x - lo] : sum_rows_at(row.src, terms(row.o), x, op.src_stride.w, pre, row.c));
      });
    return v;
  }

  void by_phase(const Piece& piece, const Finder& terms, const acc* taps) const {
    const Axis& axis = op.cols;
    const int s = axis.stride, k = axis.taps;
    const index_t first = piece.begin * s - axis.before, last = (piece.end - 1) * s + k - axis.before;  // of the extended row
    const Range at_hand = buffered<ADJOINT>(axis, piece.begin, piece.end);
    const index_t lo = at_hand.lo, hi = at_hand.hi, width = piece.end - piece.begin;
    const auto place = [&](index_t t) INLINED { return (t - first) % s * phase_pitch + (t - first) / s; };
    const index_t even = place(lo), odd = place(lo + 1);

    if (s == 1)
      sum_rows<false>(piece, terms, lo, hi, [&](int r, index_t x, auto v) INLINED { V::store(piece.buffer + r * pitch + even + x, v); });
    else if (s == 2)
      sum_rows<true>(piece, terms, lo, hi, [&](int r, index_t x, Unit<acc> u) INLINED {
        const auto v = Lanes<T>::is_split ? u : split(u);
        acc* phases = piece.buffer + r * pitch + x / 2;
        V::store(phases + even, v.a), V::store(phases + odd, v.b);
      });
    else
      sum_rows<false>(piece, terms, lo, hi, [&](int r, index_t x, auto v) INLINED {
        for (int i = 0; i < V::lanes && x + i < hi - lo; ++i) piece.buffer[r * pitch + place(lo + x + i)] = v[i];
      });
    const auto fill = [&](index_t t) INLINED {
      const index_t x = axis.source(t), to = place(t);
      const bool copied = x >= lo && x < hi;
      const index_t from = copied ? place(x) : 0;
      Row here = piece.row;
      for (int r = 0; r < piece.rows; ++r, advance(here)) {
        acc* phases = piece.buffer + r * pitch;
        phases[to] = copied ? phases[from] : x < 0 ? acc(0) : sum_rows_at(here.src, terms(here.o), x, op.src_stride.w, pre, here.c);
      }
    };
    for (index_t t = first; t < min(lo, last); ++t) fill(t);
    for (index_t t = max(hi, first); t < last; ++t) fill(t);

    Ahead ahead = ahead_of(piece, terms);
    const auto columns = [&](auto taps_count, auto stride) INLINED {
      for (int r = 0; r < piece.rows; ++r) {
        ahead();
        sum_phases<taps_count, stride>(piece.buffer + r * pitch, phase_pitch, taps, k, s, width, [&](index_t j, Unit<acc> u) INLINED {
          Lanes<T>::store(piece.results + r * width + j, from_natural<T>(u));
        });
      }
    };
    if (s == 2) unrolled<is_tuned<acc>>(k, [&](auto taps_count) INLINED { columns(taps_count, std::integral_constant<int, 2>{}); });
    else columns(std::integral_constant<int, 0>{}, std::integral_constant<int, 0>{});
  }
};

// Small planes, adjoint: a vector of results may span rows, for all it reads of the source plane still lies in two
// neighbouring vectors. So both axes are one permutation, and many planes share its pattern.
template <typename T, typename Pre>
struct SmallPlanes {
  using acc = acc_t<T>;
  using V = Vector<acc>;
  static constexpr index_t most_patterns = 64, least_planes = 32;
  static constexpr index_t results_goal = 16384 / sizeof(T);

  const BlurPool& op;
  Pre pre;
  index_t from_plane = op.rows.out * op.cols.out, to_plane = op.rows.in * op.cols.in;
  index_t patterns = (to_plane + V::lanes - 1) / V::lanes, pitch = round_up(from_plane, V::lanes) + V::lanes;
  int group = max(1, min(32, results_goal / to_plane));

  bool may_serve() const { return is_tuned<acc> && !op.per_channel && patterns <= most_patterns && op.batch * op.channels >= least_planes; }

  // Whether every pattern fits.
  bool build(Pattern<acc>* pattern) const {
    AxisTerms<true, acc> all_rows(op.rows, op.cols.out), all_cols(op.cols, 1);
    all_rows.set_taps(static_cast<const acc*>(op.taps_h)), all_cols.set_taps(static_cast<const acc*>(op.taps_w));
    const typename AxisTerms<true, acc>::Finder rows(all_rows), cols(all_cols);
    for (index_t b = 0; b < patterns; ++b) {
      pattern[b].build(min(V::lanes, to_plane - b * V::lanes), [&](int i, auto&& visit) {
        const Terms<acc> h = rows((b * V::lanes + i) / op.cols.in), w = cols((b * V::lanes + i) % op.cols.in);
        for (int m = 0; m < h.count; ++m)
          for (int n = 0; n < w.count; ++n) visit(h.offset[m] + w.offset[n], h.weight[m] * w.weight[n]);
      });
      if (!pattern[b].terms) return false;
    }
    return true;
  }

  void run(index_t begin, index_t end, const Pattern<acc>* pattern) const {
    const Scratch<acc> buffer(group * pitch);
    const Scratch<T> results(group * to_plane + Lanes<T>::unit);
    const bool bypass = bypasses_caches<T>(op);
    for (index_t plane = begin; plane < end; plane += group) {
      const int planes = min(group, end - plane);
      for (int r = 0; r < planes; ++r) widen_plane(plane + r, buffer.data + r * pitch);
      const char* next = static_cast<const char*>(op.src) + (plane + planes) * op.src_stride.c * sizeof(T);
      // The last vector first: what it has in excess is still to be stored in the next plane.
      for (index_t b = patterns - 1; b >= 0; --b) {
        const auto store = [&](int r, index_t, auto v) INLINED { Lanes<T>::store_vector(results.data + r * to_plane + b * V::lanes, v); };
        const Ahead ahead = b == 0 ? Ahead{next, from_plane * index_t(sizeof(T))} : Ahead{nullptr, 0};
        unrolled<is_tuned<acc>>(pattern[b].terms, [&](auto m) INLINED {
          if (pattern[b].wide()) pattern[b].template apply<m, true>(buffer.data + pattern[b].base, 0, 1, pitch, planes, ahead, store);
          else pattern[b].template apply<m, false>(buffer.data + pattern[b].base, 0, 1, pitch, planes, ahead, store);
        });
      }
      flush(static_cast<T*>(op.dst) + plane * to_plane, results.data, planes * to_plane, bypass);
    }
    settle();
  }

  // One source plane, row after row without a gap.
  void widen_plane(index_t plane, acc* to) const {
    const Strides& s = op.src_stride;
    const index_t c = plane % op.channels;
    const T* src = static_cast<const T*>(op.src) + plane / op.channels * s.n + c * s.c;
    const bool dense = s.w == 1 && s.h == op.cols.out;
    const index_t rows = dense ? 1 : op.rows.out, width = dense ? from_plane : op.cols.out;
    for (index_t h = 0; h < rows; ++h)
      for (index_t x = 0; x < width; x += V::lanes) {
        const T* p = src + h * s.h + x * s.w;
        const index_t n = width - x;
        const auto v = s.w != 1        ? gathered(p, s.w, n, [](const T* copy) { return load<false>(copy); })
                       : n >= V::lanes ? load<false>(p)
                                       : load<false>(p, n);
        V::store(to + h * op.cols.out + x, pre.row(v, c));
      }
  }
};

template <typename T, bool ADJOINT, typename Pre>
void blur_planes(const BlurPool& op, const Parallel& parallel, const Pre& pre) {
  using P = Planes<T, ADJOINT, Pre>;
  const P planes{op, pre};
  if constexpr (ADJOINT && is_tuned<acc_t<T>>) {
    const SmallPlanes<T, Pre> small{op, pre};
    const Scratch<Pattern<acc_t<T>>> patterns(small.may_serve() ? small.patterns : 0);
    if (small.may_serve() && small.build(patterns.data))
      return parallel(op.batch * op.channels, max(1, grain_pixels / small.to_plane),
                      [&](index_t begin, index_t end) { small.run(begin, end, patterns.data); });
  }
  typename P::Tables shared(op);
  if (!op.per_channel) shared.build(planes, 0);
  parallel(op.batch * op.channels * planes.out_rows, max(1, grain_pixels / max(op.cols.in, 1)), [&](index_t begin, index_t end) INLINED {
    if (!op.per_channel) return planes.run(begin, end, shared);
    typename P::Tables own(op);
    planes.run(begin, end, own);
  });
}

}  // namespace
}  // namespace AF_ISA
}  // namespace aliasfused
