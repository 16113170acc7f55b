// Blur and subsample, and its adjoint, on a CPU. Both are the same two steps for every row of the result: a weighted sum of
// a few source rows into a buffer that stays in the first-level cache, then a weighted sum of a few of its columns. Which
// rows and columns, and with which taps, is what Axis says of an output (forward) or of an input (adjoint).
//
// A pixel passes through `pre` as it is loaded: pre.row(unit, c) when the lanes of a unit are neighbours of channel c,
// pre.pixel(unit, c) when they are the channels from c on, in the order in which Lanes<T> loads them.
#include <cstdlib>

#include "kernels.h"
#include "simd.h"

namespace aliasfused {
namespace AF_ISA {
namespace {

struct Identity {
  template <typename U>
  U row(U u, index_t) const {
    return u;
  }
  template <typename U>
  U pixel(U u, index_t) const {
    return u;
  }
};

index_t round_up(index_t n, index_t multiple) { return (n + multiple - 1) / multiple * multiple; }
index_t min(index_t a, index_t b) { return a < b ? a : b; }
index_t max(index_t a, index_t b) { return a > b ? a : b; }

// Memory of one thread for the length of one call.
template <typename E>
struct Scratch {
  E* data;
  explicit Scratch(index_t n) : data(static_cast<E*>(std::aligned_alloc(64, round_up(max(n, 1) * sizeof(E), 64)))) {}
  ~Scratch() { std::free(data); }
  Scratch(const Scratch&) = delete;
};

template <bool ADJOINT>
index_t results(const Axis& axis) {
  return ADJOINT ? axis.in : axis.out;
}

// visit(source, tap) for everything that result o of an axis is a sum of.
template <bool ADJOINT, typename Visit>
inline void sources_of(const Axis& axis, index_t o, Visit&& visit) {
  if constexpr (ADJOINT)
    axis.outputs_of(o, visit);
  else
    axis.inputs_of(o, visit);
}

// No result of an axis is a sum of more terms than this.
template <bool ADJOINT>
index_t most_terms(const Axis& axis) {
  if (!ADJOINT) return axis.taps;
  const index_t before = max(-axis.first(), 0), after = max(axis.last() - axis.in, 0), per_position = axis.taps / axis.stride + 1;
  switch (axis.border) {
    case Border::zeros:
      return per_position;
    case Border::replicate:
      return (1 + before + after) * per_position;
    default:
      return (3 + 2 * ((before + after) / max(axis.in - 1, 1) + 1)) * per_position;
  }
}

// The sources [lo, hi) to keep at hand for results [begin, end): all they read, but for what the border brings from elsewhere.
struct Range {
  index_t lo, hi;
};
template <bool ADJOINT>
Range buffered(const Axis& axis, index_t begin, index_t end) {
  if (!ADJOINT) {
    const index_t lo = min(max(begin * axis.stride - axis.before, 0), axis.in);
    return {lo, max(lo, min((end - 1) * axis.stride + axis.taps - axis.before, axis.in))};
  }
  const index_t after = max(axis.last() - axis.in, 0);
  const index_t lo = min(max(begin + axis.before - axis.taps, 0) / axis.stride, axis.out);
  return {begin ? lo : 0, max(lo, min((end + axis.before + (end == axis.in) * after) / axis.stride + 1, axis.out))};
}
// No n results of an adjoint need more at hand.
inline index_t buffered_by(const Axis& axis, index_t n) {
  return (n + axis.taps + axis.before + max(axis.last() - axis.in, 0)) / axis.stride + 4;
}

// A weighted sum of `count` arrays: of source rows, or of buffered columns. A weight is a number, or for taps per channel
// points to one weight for every channel.
template <typename E, typename W>
struct Terms {
  const E** source;
  W* weight;
  int count = 0;
  void add(const E* s, W w) {
    source[count] = s;
    weight[count++] = w;
  }
};

template <typename E, typename W>
struct TermsScratch {
  Scratch<const E*> source;
  Scratch<W> weight;
  explicit TermsScratch(index_t most) : source(most), weight(most) {}
  Terms<E, W> terms() { return {source.data, weight.data}; }
};

template <typename acc>
inline Unit<acc> weighted(Unit<acc> u, acc w, index_t) {
  return {u.a * w, u.b * w};
}
template <typename acc>
inline Unit<acc> weighted(Unit<acc> u, const acc* w, index_t c) {
  return {u.a * Vector<acc>::load(w + c), u.b * Vector<acc>::load(w + c + Vector<acc>::lanes)};
}

// One unit, at channel c, of the sum of M arrays (M = 0: of t.count arrays).
template <int M, typename E, typename W, typename Load>
inline auto sum_unit(const Terms<E, W>& t, index_t c, Load&& load) {
  auto sum = weighted(load(t.source[0]), t.weight[0], c);
  const int count = M ? M : t.count;
#pragma GCC unroll 8
  for (int m = 1; m < count; ++m) {
    const auto u = weighted(load(t.source[m]), t.weight[m], c);
    sum.a += u.a, sum.b += u.b;
  }
  return sum;
}

// each(M) with the count of terms as a compile-time number, 0 for many.
constexpr int most_unrolled = 8;

template <int M = most_unrolled, typename E, typename W, typename Each>
inline void unrolled(const Terms<E, W>& t, Each&& each) {
  if constexpr (M == 0) {
    each(std::integral_constant<int, 0>{});
  } else {
    if (t.count == M)
      each(std::integral_constant<int, M>{});
    else
      unrolled<M - 1>(t, each);
  }
}

// ---- memory in rows (NCHW): the lanes are columns ----

// A row of pixels of type T, `stride` elements apart.
template <typename T>
inline Unit<acc_t<T>> load_row(const T* p, index_t stride, int n) {
  if (stride == 1) return n >= Lanes<T>::unit ? Lanes<T>::load(p) : Lanes<T>::load(p, n);
  T gathered[Lanes<T>::unit] = {};
  for (int i = 0; i < n && i < Lanes<T>::unit; ++i) gathered[i] = p[i * stride];
  return Lanes<T>::load(gathered);
}

// Sums of source rows over columns [lo, hi), unit by unit: store(column - lo, unit in T's order).
template <typename T, typename Pre, typename Store>
inline void sum_rows(const Terms<T, acc_t<T>>& t, index_t lo, index_t hi, index_t stride, const Pre& pre, index_t c, Store&& store) {
  using acc = acc_t<T>;
  constexpr int unit = Lanes<T>::unit;
  if (t.count == 0) {  // every source lies in a border of zeros
    for (index_t x = lo; x < hi; x += unit) store(x - lo, Unit<acc>{});
    return;
  }
  if (stride != 1) {
    for (index_t x = lo; x < hi; x += unit) {
      const int n = min(hi - x, unit);
      store(x - lo, sum_unit<0>(t, c, [&](const T* row) { return pre.row(load_row(row + x * stride, stride, n), c); }));
    }
    return;
  }
  unrolled(t, [&](auto m) {
    index_t x = lo;
    for (; x + unit <= hi; x += unit)
      store(x - lo, sum_unit<m>(t, c, [&](const T* row) { return pre.row(Lanes<T>::load(row + x), c); }));
    if (x < hi) {
      const int n = hi - x;
      store(x - lo, sum_unit<m>(t, c, [&](const T* row) { return pre.row(Lanes<T>::load(row + x, n), c); }));
    }
  });
}

// The sum of source rows at one column.
template <typename T, typename Pre>
acc_t<T> sum_rows_at(const Terms<T, acc_t<T>>& t, index_t x, index_t stride, const Pre& pre, index_t c) {
  acc_t<T> sum = 0;
  for (int m = 0; m < t.count; ++m) sum += t.weight[m] * pre.row(Unit<acc_t<T>>{{widen(t.source[m][x * stride])}, {}}, c).a[0];
  return sum;
}

// Columns by permutation: one vector of results whose sources lie in two neighbouring vectors of the buffer is a sum of
// permutations of these, and every border and parity is in the lane numbers.
template <typename acc>
struct Pattern {
  using V = Vector<acc>;
  static constexpr int most_terms = 16;
  index_t base;   // first source
  index_t span;   // last source - first source
  int terms = 0;  // 0: it does not fit
  bool wide;      // takes two vectors
  typename V::index lane[most_terms];
  typename V::type weight[most_terms];

  // Results [o, o + lanes) of the axis.
  template <bool ADJOINT>
  void build(const Axis& axis, index_t o, const acc* taps) {
    const int used = min(V::lanes, results<ADJOINT>(axis) - o);
    index_t source[V::lanes][most_terms], lo = axis.in + axis.out, hi = 0;
    acc tap[V::lanes][most_terms];
    int count[V::lanes], largest = 0, smallest = most_terms;
    for (int i = 0; i < used; ++i) {
      int n = 0;
      sources_of<ADJOINT>(axis, o + i, [&](index_t from, int p) {
        if (n < most_terms) source[i][n] = from, tap[i][n] = taps[p];
        ++n;
        lo = min(lo, from), hi = max(hi, from);
      });
      count[i] = n;
      largest = max(largest, n), smallest = min(smallest, n);
    }
    terms = 0;
    if (largest > most_terms || smallest == 0 || hi - lo >= 2 * V::lanes) return;
    base = lo, span = hi - lo, wide = span >= V::lanes, terms = largest;
    // A lane of fewer terms shares its last tap out over the rest: to add zero times a pixel would spread its inf or nan.
    for (int m = 0; m < terms; ++m)
      for (int i = 0; i < V::lanes; ++i) {
        const int last = i < used ? count[i] - 1 : 0, from = min(m, last);
        lane[m][i] = i < used ? source[i][from] - base : 0;
        weight[m][i] = i >= used ? 0 : m < last ? tap[i][m] : tap[i][last] / (terms - last);
      }
  }

  template <int M>
  typename V::type apply(const acc* buffer) const {
    const auto low = V::load(buffer), high = wide ? V::load(buffer + V::lanes) : low;
    const auto term = [&](int m) {
      return weight[m] * (wide ? __builtin_shuffle(low, high, lane[m]) : __builtin_shuffle(low, lane[m]));
    };
    auto sum = term(0);
    const int count = M ? M : terms;
#pragma GCC unroll 8
    for (int m = 1; m < count; ++m) sum += term(m);
    return sum;
  }
};

// The patterns of a whole row: the blocks in the interior share one, those near its ends have their own.
template <bool ADJOINT, typename acc>
struct Columns {
  using V = Vector<acc>;
  static constexpr int most_patterns = 12;
  Pattern<acc> pattern[most_patterns];
  index_t blocks, interior_begin, interior_end;  // in blocks of V::lanes results
  int step;                                      // sources from one interior block to the next
  bool fits;

  void build(const Axis& axis, const acc* taps) {
    const index_t n = results<ADJOINT>(axis);
    blocks = (n + V::lanes - 1) / V::lanes;
    interior_begin = interior_end = blocks;
    step = V::lanes / axis.stride;
    if (ADJOINT && V::lanes % axis.stride == 0) {
      // Interior: no tap is cut off at either end of the axis, no border position shows one of these pixels.
      const index_t reach = max(max(-axis.first(), axis.last() - axis.in), 0);
      const index_t first = max(reach + 1, axis.taps - 1 - axis.before);
      const index_t last = min(axis.in - 1 - reach, axis.out * axis.stride - axis.before);
      interior_begin = min(round_up(first, V::lanes) / V::lanes, blocks);
      interior_end = max(interior_begin, last / V::lanes);
    }
    fits = patterns() <= most_patterns;
    if (!fits) return;
    for (index_t b = 0; b < blocks; b = b == interior_begin ? max(interior_end, b + 1) : b + 1) at(b).template build<ADJOINT>(axis, b * V::lanes, taps);
  }

  index_t patterns() const { return blocks - max(interior_end - interior_begin - 1, 0); }
  bool interior(index_t b) const { return b >= interior_begin && b < interior_end; }
  const Pattern<acc>& at(index_t b) const { return const_cast<Columns*>(this)->at(b); }
  Pattern<acc>& at(index_t b) {
    return pattern[b <= interior_begin ? b : b < interior_end ? interior_begin : b - max(interior_end - interior_begin - 1, 0)];
  }
};

// Columns by phase, forward and for any row: source t of the extended row goes to phase t % stride, so that tap q of
// neighbouring results reads neighbouring elements of one phase.
template <int K, int S, typename acc, typename Store>
inline void sum_phases(const acc* phases, index_t pitch, const acc* taps, int k, int stride, index_t n, Store&& store) {
  using V = Vector<acc>;
  const int taps_count = K ? K : k, s = S ? S : stride;
  for (index_t j = 0; j < n; j += 2 * V::lanes) {
    Unit<acc> sum;
#pragma GCC unroll 8
    for (int q = 0; q < taps_count; ++q) {
      const acc* p = phases + (q % s) * pitch + q / s + j;
      const auto a = V::load(p) * taps[q], b = V::load(p + V::lanes) * taps[q];
      if (q == 0)
        sum = {a, b};
      else
        sum.a += a, sum.b += b;
    }
    store(j, sum);
  }
}

template <typename T>
inline void store_unit(T* p, Unit<acc_t<T>> natural, index_t n) {
  const auto u = from_natural<T>(natural);
  if (n >= Lanes<T>::unit)
    Lanes<T>::store(p, u);
  else
    Lanes<T>::store(p, u, n);
}

template <typename T>
inline void store_row(T* p, index_t stride, Unit<acc_t<T>> natural, index_t n) {
  if (stride == 1) return store_unit(p, natural, n);
  T copy[Lanes<T>::unit];
  store_unit(copy, natural, Lanes<T>::unit);
  for (int i = 0; i < n && i < Lanes<T>::unit; ++i) p[i * stride] = copy[i];
}

template <typename T, bool ADJOINT, typename Pre>
struct Planes {
  using acc = acc_t<T>;
  using V = Vector<acc>;
  static constexpr int unit = Lanes<T>::unit;
  static constexpr index_t tile = 64 * V::lanes;  // results of one pass over a row

  const BlurPool& op;
  Pre pre;
  index_t out_rows = results<ADJOINT>(op.rows), out_cols = results<ADJOINT>(op.cols);
  bool permute = ADJOINT || (op.cols.in <= 2 * V::lanes && op.cols.out <= 2 * V::lanes);

  index_t buffer_size() const {
    const index_t n = min(out_cols, tile);
    if (!ADJOINT) return n * op.cols.stride + op.cols.taps + (2 * op.cols.stride + 2) * unit;
    return min(op.cols.out, buffered_by(op.cols, n)) + 2 * unit;
  }

  void run(index_t begin, index_t end, Columns<ADJOINT, acc>& columns) const {
    TermsScratch<T, acc> scratch(most_terms<ADJOINT>(op.rows));
    Scratch<acc> buffer(buffer_size());
    index_t plane = -1;
    const acc *taps_h = nullptr, *taps_w = nullptr;
    for (index_t item = begin; item < end; ++item) {
      const index_t o = item % out_rows, n = item / out_rows / op.channels, c = item / out_rows % op.channels;
      if (item / out_rows != plane) {
        plane = item / out_rows;
        taps_h = static_cast<const acc*>(op.taps_h) + op.per_channel * c * op.rows.taps;
        taps_w = static_cast<const acc*>(op.taps_w) + op.per_channel * c * op.cols.taps;
        if (op.per_channel && permute) columns.build(op.cols, taps_w);
      }
      const T* src = static_cast<const T*>(op.src) + n * op.src_stride.n + c * op.src_stride.c;
      T* dst = static_cast<T*>(op.dst) + n * op.dst_stride.n + c * op.dst_stride.c + o * op.dst_stride.h;
      auto rows = scratch.terms();
      sources_of<ADJOINT>(op.rows, o, [&](index_t h, int p) { rows.add(src + h * op.src_stride.h, taps_h[p]); });
      for (index_t j = 0; j < out_cols; j += tile) {
        const index_t last = min(j + tile, out_cols);
        if (permute)
          by_permutation(rows, c, taps_w, columns, buffer.data, j, last, dst);
        else if constexpr (!ADJOINT)
          by_phase(rows, c, taps_w, buffer.data, j, last, dst);
      }
    }
  }

  // Results [begin, end) of a row, begin a multiple of the tile.
  void by_permutation(const Terms<T, acc>& rows, index_t c, const acc* taps, const Columns<ADJOINT, acc>& columns, acc* buffer,
                      index_t begin, index_t end, T* dst) const {
    const Axis& axis = op.cols;
    const Range at_hand = buffered<ADJOINT>(axis, begin, end);
    const index_t lo = at_hand.lo, hi = at_hand.hi;
    sum_rows<T>(rows, lo, hi, op.src_stride.w, pre, c,
                [&](index_t x, Unit<acc> u) { const auto v = to_natural<T>(u); V::store(buffer + x, v.a), V::store(buffer + x + V::lanes, v.b); });

    const auto one = [&](index_t b) {
      if (columns.fits) {
        const auto& pattern = columns.at(b);
        const index_t base = pattern.base + (columns.interior(b) ? (b - columns.interior_begin) * columns.step : 0);
        if (pattern.terms && base >= lo && base + pattern.span < hi) return pattern.template apply<0>(buffer + base - lo);
      }
      return lane_by_lane(rows, c, taps, b * V::lanes, buffer, lo, hi);
    };
    const index_t first = begin / V::lanes, blocks = (end + V::lanes - 1) / V::lanes;
    index_t b = first;
    const auto by_unit = [&](index_t stop) {
      for (; b < stop; b += 2)
        store_row(dst + b * V::lanes * op.dst_stride.w, op.dst_stride.w, Unit<acc>{one(b), b + 1 < blocks ? one(b + 1) : typename V::type{}},
                  end - b * V::lanes);
    };
    // Whole units of the interior in one loop that keeps its pattern in registers.
    const index_t inner_begin = min(round_up(max(columns.interior_begin, first) - first, 2) + first, blocks);
    const index_t inner_end = min(columns.interior_end, end / V::lanes);
    if (columns.fits && inner_begin + 1 < inner_end && columns.at(inner_begin).terms && columns.at(inner_begin).terms <= 8) {
      by_unit(inner_begin);
      const auto& pattern = columns.at(b);
      const acc* p = buffer + pattern.base - lo + (b - columns.interior_begin) * columns.step;
      const index_t units = (inner_end - b) / 2;
      inner<8>(pattern, p, columns.step, units, dst + b * V::lanes * op.dst_stride.w);
      b += 2 * units;
    }
    by_unit(blocks);
  }

  template <int M>
  void inner(const Pattern<acc>& pattern, const acc* p, int step, index_t units, T* dst) const {
    if (pattern.terms < M) {
      if constexpr (M > 1) inner<M - 1>(pattern, p, step, units, dst);
      return;
    }
    const Pattern<acc> local = pattern;
    for (index_t i = 0; i < units; ++i, p += 2 * step) {
      const Unit<acc> u{local.template apply<M>(p), local.template apply<M>(p + step)};
      store_row(dst + i * unit * op.dst_stride.w, op.dst_stride.w, u, unit);
    }
  }

  typename V::type lane_by_lane(const Terms<T, acc>& rows, index_t c, const acc* taps, index_t o, const acc* buffer, index_t lo, index_t hi) const {
    typename V::type v{};
    for (int i = 0; i < V::lanes && o + i < out_cols; ++i)
      sources_of<ADJOINT>(op.cols, o + i, [&](index_t x, int q) {
        v[i] += taps[q] * (x >= lo && x < hi ? buffer[x - lo] : sum_rows_at(rows, x, op.src_stride.w, pre, c));
      });
    return v;
  }

  // Results [begin, end) of a row, forward.
  void by_phase(const Terms<T, acc>& rows, index_t c, const acc* taps, acc* buffer, index_t begin, index_t end, T* dst) const {
    const Axis& axis = op.cols;
    const int s = axis.stride, k = axis.taps;
    const index_t first = begin * s - axis.before, last = (end - 1) * s + k - axis.before;  // of the extended row
    const Range at_hand = buffered<ADJOINT>(axis, begin, end);
    const index_t lo = at_hand.lo, hi = at_hand.hi;
    const index_t pitch = (last - first) / s + 1 + 2 * unit;
    const auto phase = [&](index_t t) { return buffer + (t - first) % s * pitch + (t - first) / s; };

    if (s == 1) {
      sum_rows<T>(rows, lo, hi, op.src_stride.w, pre, c, [&](index_t x, Unit<acc> u) {
        const auto v = to_natural<T>(u);
        acc* p = phase(lo) + x;
        V::store(p, v.a), V::store(p + V::lanes, v.b);
      });
    } else if (s == 2) {
      acc *even = phase(lo), *odd = phase(lo + 1);
      sum_rows<T>(rows, lo, hi, op.src_stride.w, pre, c, [&](index_t x, Unit<acc> u) {
        const auto v = Lanes<T>::is_split ? u : split(u);
        V::store(even + x / 2, v.a), V::store(odd + x / 2, v.b);
      });
    } else {
      sum_rows<T>(rows, lo, hi, op.src_stride.w, pre, c, [&](index_t x, Unit<acc> u) {
        const auto v = to_natural<T>(u);
        for (int i = 0; i < V::lanes; ++i) {
          if (x + i < hi - lo) *phase(lo + x + i) = v.a[i];
          if (x + V::lanes + i < hi - lo) *phase(lo + x + V::lanes + i) = v.b[i];
        }
      });
    }
    const auto fill = [&](index_t t) {
      const index_t x = axis.source(t);
      *phase(t) = x < 0 ? acc(0) : x >= lo && x < hi ? *phase(x) : sum_rows_at(rows, x, op.src_stride.w, pre, c);
    };
    for (index_t t = first; t < min(lo, last); ++t) fill(t);
    for (index_t t = max(hi, first); t < last; ++t) fill(t);

    const auto store = [&](index_t j, Unit<acc> u) {
      store_row(dst + (begin + j) * op.dst_stride.w, op.dst_stride.w, u, end - begin - j);
    };
    const index_t n = end - begin;
    if (s == 2) {
      switch (k) {
        case 2: return sum_phases<2, 2>(buffer, pitch, taps, k, s, n, store);
        case 3: return sum_phases<3, 2>(buffer, pitch, taps, k, s, n, store);
        case 4: return sum_phases<4, 2>(buffer, pitch, taps, k, s, n, store);
        case 5: return sum_phases<5, 2>(buffer, pitch, taps, k, s, n, store);
        case 6: return sum_phases<6, 2>(buffer, pitch, taps, k, s, n, store);
        case 7: return sum_phases<7, 2>(buffer, pitch, taps, k, s, n, store);
      }
    }
    sum_phases<0, 0>(buffer, pitch, taps, k, s, n, store);
  }
};

// Rows of planes are handed to threads in pieces of at least this many pixels.
constexpr index_t grain_pixels = 1 << 15;

template <typename T, bool ADJOINT, typename Pre>
void blur_planes(const BlurPool& op, const Parallel& parallel, const Pre& pre) {
  using acc = acc_t<T>;
  const Planes<T, ADJOINT, Pre> planes{op, pre};
  const index_t items = op.batch * op.channels * planes.out_rows;
  Columns<ADJOINT, acc> shared;
  if (planes.permute && !op.per_channel) shared.build(op.cols, static_cast<const acc*>(op.taps_w));
  parallel(items, max(1, grain_pixels / max(op.cols.in, 1)), [&](index_t begin, index_t end) {
    if (op.per_channel && planes.permute) {
      Columns<ADJOINT, acc> own;
      planes.run(begin, end, own);
    } else {
      planes.run(begin, end, shared);
    }
  });
}

// ---- memory in pixels (NHWC): the lanes are channels ----

template <typename T, bool ADJOINT, typename W, typename Pre>
struct Pixels {
  using acc = acc_t<T>;
  static constexpr int unit = Lanes<T>::unit;
  static constexpr index_t buffer_goal = 8192;  // elements: what the first-level cache holds beside the source rows

  const BlurPool& op;
  Pre pre;
  const W* taps_h;  // per tap: the number, or where the channels' numbers begin
  const W* taps_w;
  index_t out_rows = results<ADJOINT>(op.rows), out_cols = results<ADJOINT>(op.cols);
  index_t in_cols = ADJOINT ? op.cols.out : op.cols.in;
  // A pass over a row takes all its columns and as many channels as the buffer holds, but at least 256 channels, so that
  // memory is read in long runs; then fewer columns.
  index_t some_channels = min(round_up(op.channels, unit), max(256, buffer_goal / max(in_cols, 1) / unit * unit));
  index_t some_cols = max(op.cols.stride, ADJOINT ? buffer_goal / some_channels * op.cols.stride - op.cols.taps
                                                  : (buffer_goal / some_channels - op.cols.taps) / op.cols.stride);

  index_t buffer_cols() const {
    const index_t n = min(some_cols, out_cols);
    return ADJOINT ? min(in_cols, buffered_by(op.cols, n)) : min(in_cols, n * op.cols.stride + op.cols.taps);
  }

  void run(index_t begin, index_t end) const {
    TermsScratch<T, W> row_scratch(most_terms<ADJOINT>(op.rows));
    TermsScratch<acc, W> col_scratch(most_terms<ADJOINT>(op.cols));
    Scratch<acc> buffer((buffer_cols() + 2) * some_channels + unit);
    for (index_t item = begin; item < end; ++item) {
      const index_t o = item % out_rows, n = item / out_rows;
      const T* src = static_cast<const T*>(op.src) + n * op.src_stride.n;
      T* dst = static_cast<T*>(op.dst) + n * op.dst_stride.n + o * op.dst_stride.h;
      for (index_t c = 0; c < op.channels; c += some_channels) {
        const index_t channels = min(some_channels, op.channels - c);
        auto rows = row_scratch.terms();
        sources_of<ADJOINT>(op.rows, o, [&](index_t h, int p) { rows.add(src + h * op.src_stride.h + c * op.src_stride.c, taps_h[p]); });
        for (index_t j = 0; j < out_cols; j += some_cols)
          columns(rows, col_scratch, buffer.data, c, channels, j, min(j + some_cols, out_cols), dst + c);
      }
    }
  }

  // Channels [c, c + channels) of results [begin, end) of a row.
  void columns(const Terms<T, W>& rows, TermsScratch<acc, W>& scratch, acc* buffer, index_t c, index_t channels, index_t begin,
               index_t end, T* dst) const {
    const index_t pitch = round_up(channels, unit);
    const Range at_hand = buffered<ADJOINT>(op.cols, begin, end);
    const index_t lo = at_hand.lo, hi = at_hand.hi;
    sum_pixels(rows, c, channels, lo, hi, buffer, pitch);
    acc *elsewhere = buffer + buffer_cols() * pitch, *total = elsewhere + pitch;
    for (index_t o = begin; o < end; ++o) {
      auto terms = scratch.terms();
      bool all_at_hand = true;
      sources_of<ADJOINT>(op.cols, o, [&](index_t x, int q) {
        all_at_hand &= x >= lo && x < hi;
        terms.add(buffer + (x - lo) * pitch, taps_w[q]);
      });
      T* pixel = dst + o * op.dst_stride.w;
      if (all_at_hand && terms.count) {
        unrolled(terms, [&](auto m) {
          index_t u = 0;
          for (; u + unit <= channels; u += unit)
            Lanes<T>::store(pixel + u, sum_unit<m>(terms, c + u, [&](const acc* p) { return Lanes<acc>::load(p + u); }));
          if (u < channels)
            Lanes<T>::store(pixel + u, sum_unit<m>(terms, c + u, [&](const acc* p) { return Lanes<acc>::load(p + u); }), channels - u);
        });
        continue;
      }
      for (index_t u = 0; u < pitch; ++u) total[u] = 0;
      sources_of<ADJOINT>(op.cols, o, [&](index_t x, int q) {
        sum_pixels(rows, c, channels, x, x + 1, elsewhere, pitch);
        for (index_t u = 0; u < pitch; u += unit) {
          const auto v = weighted(Lanes<acc>::load(elsewhere + u), taps_w[q], c + u), sum = Lanes<acc>::load(total + u);
          Lanes<acc>::store(total + u, {sum.a + v.a, sum.b + v.b});
        }
      });
      for (index_t u = 0; u < channels; u += unit) {
        const auto v = Lanes<acc>::load(total + u);
        channels - u >= unit ? Lanes<T>::store(pixel + u, v) : Lanes<T>::store(pixel + u, v, channels - u);
      }
    }
  }

  // Sums of source rows at columns [lo, hi), in the lane order of T.
  void sum_pixels(const Terms<T, W>& rows, index_t c, index_t channels, index_t lo, index_t hi, acc* buffer, index_t pitch) const {
    if (rows.count == 0) {
      for (index_t i = 0; i < (hi - lo) * pitch; ++i) buffer[i] = 0;
      return;
    }
    const index_t stride = op.src_stride.c, next = op.src_stride.w;
    // Whole pixels that follow each other in memory are one long run.
    const bool is_run = !op.per_channel && stride == 1 && next == channels && channels % unit == 0;
    const index_t pixels = is_run ? 1 : hi - lo, length = is_run ? (hi - lo) * channels : channels;
    unrolled(rows, [&](auto m) {
      for (index_t x = 0; x < pixels; ++x) {
        const auto at = [&](index_t u, auto&& load) {
          const index_t offset = (lo + x) * next + u * stride, channel = c + (is_run ? u % channels : u);
          Lanes<acc>::store(buffer + x * pitch + u,
                            sum_unit<m>(rows, channel, [&](const T* p) { return pre.pixel(load(p + offset), channel); }));
        };
        if (stride != 1) {
          for (index_t u = 0; u < length; u += unit) at(u, [&](const T* p) { return load_row(p, stride, min(length - u, unit)); });
          continue;
        }
        index_t u = 0;
        for (; u + unit <= length; u += unit) at(u, [](const T* p) { return Lanes<T>::load(p); });
        if (u < length) at(u, [&](const T* p) { return Lanes<T>::load(p, length - u); });
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
      for (index_t c = 0; c < pitch; c += Lanes<T>::unit)
        Lanes<acc>::store(row + c, from_natural<T>(Lanes<acc>::load(row + c)));
    }
  }
};

template <typename T, bool ADJOINT, typename Pre>
void blur_pixels(const BlurPool& op, const Parallel& parallel, const Pre& pre) {
  using acc = acc_t<T>;
  const auto run = [&](const auto* taps_h, const auto* taps_w) {
    const Pixels<T, ADJOINT, std::remove_cv_t<std::remove_reference_t<decltype(*taps_h)>>, Pre> pixels{op, pre, taps_h, taps_w};
    parallel(op.batch * pixels.out_rows, max(1, grain_pixels / max(op.cols.in * op.channels, 1)),
             [&](index_t begin, index_t end) { pixels.run(begin, end); });
  };
  if (op.per_channel) {
    const ChannelTaps<T> taps_h(op.taps_h, op.channels, op.rows.taps), taps_w(op.taps_w, op.channels, op.cols.taps);
    run(taps_h.rows.data, taps_w.rows.data);
  } else {
    run(static_cast<const acc*>(op.taps_h), static_cast<const acc*>(op.taps_w));
  }
}

template <typename T>
void blur_pool_of(const BlurPool& op, const Parallel& parallel) {
  const bool pixels = op.dst_stride.c == 1 && (op.dst_stride.w != 1 || (op.adjoint ? op.cols.in : op.cols.out) == 1);
  const Identity pre;
  if (op.adjoint)
    pixels ? blur_pixels<T, true>(op, parallel, pre) : blur_planes<T, true>(op, parallel, pre);
  else
    pixels ? blur_pixels<T, false>(op, parallel, pre) : blur_planes<T, false>(op, parallel, pre);
}

// ---- gradient of the taps ----

// Per channel, summed in float64 in a fixed order whatever the number of threads.
template <typename T>
void taps_grad_of(const TapsGrad& op, const Parallel& parallel) {
  using acc = acc_t<T>;
  const int kh = op.rows.taps, kw = op.cols.taps;
  const Axis &own = op.axis == 0 ? op.rows : op.cols, &cross = op.axis == 0 ? op.cols : op.rows;
  const auto offset = [&](const Strides& s, index_t along_own, index_t along_cross) {
    return op.axis == 0 ? along_own * s.h + along_cross * s.w : along_own * s.w + along_cross * s.h;
  };
  const index_t work = max(op.batch * op.rows.out * op.cols.out * (kh + kw), 1);
  parallel(op.channels, max(1, grain_pixels / work), [&](index_t begin, index_t end) {
    Scratch<double> sum(own.taps), dy_spread(cross.in);
    for (index_t c = begin; c < end; ++c) {
      const acc* other = static_cast<const acc*>(op.other) + c * cross.taps;
      for (int p = 0; p < own.taps; ++p) sum.data[p] = 0;
      for (index_t n = 0; n < op.batch; ++n) {
        const T* dy = static_cast<const T*>(op.dy) + n * op.dy_stride.n + c * op.dy_stride.c;
        const T* x = static_cast<const T*>(op.x) + n * op.x_stride.n + c * op.x_stride.c;
        for (index_t o = 0; o < own.out; ++o) {
          // The other axis' adjoint of one line of dy, then its product with every line of x that this line's taps read.
          for (index_t h = 0; h < cross.in; ++h) {
            double d = 0;
            cross.outputs_of(h, [&](index_t j, int q) { d += (double)other[q] * widen(dy[offset(op.dy_stride, o, j)]); });
            dy_spread.data[h] = d;
          }
          own.inputs_of(o, [&](index_t line, int p) {
            double d = 0;
            for (index_t h = 0; h < cross.in; ++h) d += dy_spread.data[h] * widen(x[offset(op.x_stride, line, h)]);
            sum.data[p] += d;
          });
        }
      }
      for (int p = 0; p < own.taps; ++p) static_cast<acc*>(op.dst)[c * own.taps + p] = sum.data[p];
    }
  });
}

template <typename Of>
void by_dtype(Dtype dtype, Of&& of) {
  switch (dtype) {
    case Dtype::float32: return of(float{});
    case Dtype::bfloat16: return of(bfloat16{});
    case Dtype::float16: return of(float16{});
    case Dtype::float64: return of(double{});
  }
}

}  // namespace

void blur_pool(const BlurPool& op, const Parallel& parallel) {
  by_dtype(op.dtype, [&](auto zero) { blur_pool_of<decltype(zero)>(op, parallel); });
}

void taps_grad(const TapsGrad& op, const Parallel& parallel) {
  by_dtype(op.dtype, [&](auto zero) { taps_grad_of<decltype(zero)>(op, parallel); });
}

}  // namespace AF_ISA
}  // namespace aliasfused
