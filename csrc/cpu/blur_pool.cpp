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
INLINED inline void sources_of(const Axis& axis, index_t o, Visit&& visit) {
  if constexpr (ADJOINT) axis.outputs_of(o, visit);
  else axis.inputs_of(o, visit);
}

// No result of an axis is a sum of more terms than this.
template <bool ADJOINT>
index_t most_terms(const Axis& axis) {
  if (!ADJOINT) return axis.taps;
  const index_t before = max(-axis.first(), 0), after = max(axis.last() - axis.in, 0), per_position = axis.taps / axis.stride + 1;
  switch (axis.border) {
    case Border::zeros: return per_position;
    case Border::replicate: return (1 + before + after) * per_position;
    default: return (3 + 2 * ((before + after) / max(axis.in - 1, 1) + 1)) * per_position;
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

// A weighted sum of `count` arrays, `offset` elements from a common origin: of source rows, or of buffered columns. A
// weight is a number, or for taps per channel points to one number for every channel.
template <typename W>
struct Terms {
  const index_t* offset;
  const W* weight;
  int count;
};

// The terms of every result of an axis whose sources lie `spacing` elements apart: a table, unless the axis is so long
// that a table would be out of proportion; then they are found one at a time in the caller's scratch.
template <bool ADJOINT, typename W>
class AxisTerms {
 public:
  AxisTerms(const Axis& axis, index_t spacing)
      : axis_(axis),
        spacing_(spacing),
        most_(most_terms<ADJOINT>(axis)),
        tabled_(results<ADJOINT>(axis) * most_ <= 1 << 18),
        start_(tabled_ ? results<ADJOINT>(axis) + 1 : 0),
        offset_(tabled_ ? results<ADJOINT>(axis) * most_ : 0),
        weight_(tabled_ ? results<ADJOINT>(axis) * most_ : 0) {}

  void set_taps(const W* taps) {
    taps_ = taps;
    index_t n = 0;
    for (index_t o = 0; tabled_ && o < results<ADJOINT>(axis_); ++o) {
      start_.data[o] = n;
      n += find(o, offset_.data + n, weight_.data + n);
    }
    if (tabled_) start_.data[results<ADJOINT>(axis_)] = n;
  }

  struct Finder {
    const AxisTerms& all;
    Scratch<index_t> offset;
    Scratch<W> weight;
    explicit Finder(const AxisTerms& terms)
        : all(terms), offset(terms.tabled_ ? 0 : terms.most_), weight(terms.tabled_ ? 0 : terms.most_) {}
    Terms<W> operator()(index_t o) const {
      if (!all.tabled_) return {offset.data, weight.data, all.find(o, offset.data, weight.data)};
      const index_t start = all.start_.data[o];
      return {all.offset_.data + start, all.weight_.data + start, static_cast<int>(all.start_.data[o + 1] - start)};
    }
  };

 private:
  int find(index_t o, index_t* offset, W* weight) const {
    int n = 0;
    sources_of<ADJOINT>(axis_, o, [&](index_t source, int p) INLINED { offset[n] = source * spacing_, weight[n++] = taps_[p]; });
    return n;
  }

  const Axis& axis_;
  index_t spacing_, most_;
  bool tabled_;
  const W* taps_ = nullptr;
  Scratch<index_t> start_, offset_;
  Scratch<W> weight_;
};

// Loops of known length are worth their code where vectors are real ones, for float sums.
template <typename acc>
constexpr bool is_tuned = vector_instructions && sizeof(acc) == 4;

// f(N) with n as a compile-time number, 0 for any above 9 and where it is not worth it.
template <bool TUNED, typename F>
INLINED inline void unrolled(int n, F&& f) {
  if constexpr (!TUNED) return f(std::integral_constant<int, 0>{});
  switch (n) {
    case 1: return f(std::integral_constant<int, 1>{});
    case 2: return f(std::integral_constant<int, 2>{});
    case 3: return f(std::integral_constant<int, 3>{});
    case 4: return f(std::integral_constant<int, 4>{});
    case 5: return f(std::integral_constant<int, 5>{});
    case 6: return f(std::integral_constant<int, 6>{});
    case 7: return f(std::integral_constant<int, 7>{});
    case 8: return f(std::integral_constant<int, 8>{});
    case 9: return f(std::integral_constant<int, 9>{});
    default: return f(std::integral_constant<int, 0>{});
  }
}

template <typename V>
INLINED inline V weighted(V v, acc_t<std::remove_cv_t<std::remove_reference_t<decltype(v[0])>>> w, index_t) {
  return v * w;
}
template <typename acc>
INLINED inline Unit<acc> weighted(Unit<acc> u, acc w, index_t) {
  return {u.a * w, u.b * w};
}
template <typename acc>
INLINED inline Unit<acc> weighted(Unit<acc> u, const acc* w, index_t c) {
  return {u.a * Vector<acc>::load(w + c), u.b * Vector<acc>::load(w + c + Vector<acc>::lanes)};
}
template <typename V>
INLINED inline void add(V& sum, V v) {
  sum += v;
}
template <typename acc>
INLINED inline void add(Unit<acc>& sum, Unit<acc> u) {
  sum.a += u.a, sum.b += u.b;
}

// The sum of M terms (M = 0: of t.count), each loaded by load(offset), at channel c.
template <int M, typename W, typename Load>
INLINED inline auto sum_terms(const Terms<W>& t, index_t c, Load&& load) {
  auto sum = weighted(load(t.offset[0]), t.weight[0], c);
  const int count = M ? M : t.count;
#pragma GCC unroll 9
  for (int m = 1; m < count; ++m) add(sum, weighted(load(t.offset[m]), t.weight[m], c));
  return sum;
}

// ---- memory in rows (NCHW): the lanes are columns ----

// n pixels, `stride` elements apart, through `load` from a copy without gaps.
template <typename T, typename Load>
INLINED inline auto gathered(const T* p, index_t stride, index_t n, Load&& load) {
  T copy[Lanes<T>::unit] = {};
  for (int i = 0; i < n && i < Lanes<T>::unit; ++i) copy[i] = p[i * stride];
  return load(copy);
}

// Whole or partial vectors in natural order, or units in the order of T.
template <bool by_units, typename T>
INLINED inline auto load(const T* p) {
  if constexpr (by_units) return Lanes<T>::load(p);
  else return Lanes<T>::load_vector(p);
}
template <bool by_units, typename T>
INLINED inline auto load(const T* p, int n) {
  if constexpr (by_units) return Lanes<T>::load(p, n);
  else return Lanes<T>::load_vector(p, n);
}

// The sum of source rows at one column.
template <typename T, typename Pre>
acc_t<T> sum_rows_at(const T* src, const Terms<acc_t<T>>& t, index_t x, index_t stride, const Pre& pre, index_t c) {
  if (t.count == 0) return 0;
  const auto first = [](const T* p) { return load<false>(p); };
  return sum_terms<0>(t, c, [&](index_t row) { return pre.row(gathered(src + row + x * stride, 1, 1, first), c); })[0];
}

// Memory that is about to be read, asked for while the processor is busy with what it has: each step of the work asks for
// `share` bytes more.
struct Ahead {
  const char* next;
  index_t share;
  INLINED void operator()() {
    for (index_t i = 0; i < share; i += 64) __builtin_prefetch(next + i, 0, 2);
    next += share;
  }
};

// Results on their way to memory. Where there are more than a cache holds they bypass it: otherwise every line of them would
// be read before it is written.
constexpr index_t cached_bytes = index_t(24) << 20;

template <typename T>
inline void flush(T* dst, const T* results, index_t n, bool bypass) {
#if defined(__AVX512BW__)
  if (bypass && n * sizeof(T) >= 128) {
    const index_t head = -reinterpret_cast<uintptr_t>(dst) % 64 / sizeof(T);
    std::memcpy(dst, results, head * sizeof(T));
    constexpr index_t line = 64 / sizeof(T);
    index_t i = head;
    for (; i + line <= n; i += line) _mm512_stream_si512(reinterpret_cast<__m512i*>(dst + i), _mm512_loadu_si512(results + i));
    dst += i, results += i, n -= i;
  }
#else
  (void)bypass;
#endif
  std::memcpy(dst, results, n * sizeof(T));
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
  typename V::index lane[most_terms];
  typename V::type weight[most_terms];

  bool wide() const { return span >= V::lanes; }

  // The first `used` lanes; sources_of_lane(i, visit) visits the source and the weight of every term of lane i.
  template <typename SourcesOfLane>
  void build(int used, SourcesOfLane&& sources_of_lane) {
    index_t source[V::lanes][most_terms], lo = index_t(1) << 62, hi = 0;
    acc tap[V::lanes][most_terms];
    int count[V::lanes], largest = 0, smallest = most_terms;
    for (int i = 0; i < used; ++i) {
      int n = 0;
      sources_of_lane(i, [&](index_t from, acc w) INLINED {
        if (n < most_terms) source[i][n] = from, tap[i][n] = w;
        ++n;
        lo = min(lo, from), hi = max(hi, from);
      });
      count[i] = n;
      largest = max(largest, n), smallest = min(smallest, n);
    }
    terms = 0;
    if (largest > most_terms || smallest == 0 || hi - lo >= 2 * V::lanes) return;
    base = lo, span = hi - lo, terms = largest;
    // A lane of fewer terms shares its last tap out over the rest: to add zero times a pixel would spread its inf or nan.
    for (int m = 0; m < terms; ++m)
      for (int i = 0; i < V::lanes; ++i) {
        const int last = i < used ? count[i] - 1 : 0, from = min(m, last);
        lane[m][i] = i < used ? source[i][from] - base : 0;
        weight[m][i] = i >= used ? 0 : m < last ? tap[i][m] : tap[i][last] / (terms - last);
      }
  }

  // M terms in registers, over `blocks` blocks (`step` sources apart) of `rows` buffered rows (`pitch` apart).
  template <int M, bool WIDE, typename Store>
  INLINED void apply(const acc* buffer, index_t step, index_t blocks, index_t pitch, int rows, Ahead ahead, Store&& store) const {
    typename V::index l[M ? M : most_terms];
    typename V::type w[M ? M : most_terms];
    const int count = M ? M : terms;
    for (int m = 0; m < count; ++m) l[m] = lane[m], w[m] = weight[m];
    for (int r = 0; r < rows; ++r) {
      ahead();
      for (index_t b = 0; b < blocks; ++b) {
        const acc* p = buffer + r * pitch + b * step;
        const auto low = V::load(p), high = WIDE ? V::load(p + V::lanes) : low;
        const auto permuted = [&](int m) INLINED { return WIDE ? __builtin_shuffle(low, high, l[m]) : __builtin_shuffle(low, l[m]); };
        auto sum = permuted(0) * w[0];
#pragma GCC unroll 9
        for (int m = 1; m < count; ++m) sum += permuted(m) * w[m];
        store(r, b, sum);
      }
    }
  }
};

// The patterns of a whole row: the blocks in the interior share one, those near its ends have their own.
template <bool ADJOINT, typename acc>
struct Columns {
  using V = Vector<acc>;
  static constexpr int most_patterns = 12;
  Pattern<acc> pattern[most_patterns];
  index_t blocks, interior_begin, interior_end;  // in blocks of V::lanes results
  index_t step;                                  // sources from one interior block to the next
  bool fits;

  void build(const Axis& axis, const acc* taps) {
    blocks = (results<ADJOINT>(axis) + V::lanes - 1) / V::lanes;
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
    fits = blocks - repeats() <= most_patterns;
    for (index_t b = 0; fits && b < blocks; b = b == interior_begin ? b + 1 + repeats() : b + 1)
      pattern[slot(b)].build(min(V::lanes, results<ADJOINT>(axis) - b * V::lanes), [&](int i, auto&& visit) {
        sources_of<ADJOINT>(axis, b * V::lanes + i, [&](index_t from, int p) { visit(from, taps[p]); });
      });
  }

  // Interior blocks beyond the first.
  index_t repeats() const { return max(interior_end - interior_begin - 1, 0); }
  index_t slot(index_t b) const { return b <= interior_begin ? b : b < interior_end ? interior_begin : b - repeats(); }
  index_t base(index_t b) const {
    const bool interior = b >= interior_begin && b < interior_end;
    return pattern[slot(b)].base + (interior ? (b - interior_begin) * step : 0);
  }
  // The first block of those that share the pattern of b.
  index_t first(index_t b) const { return b >= interior_begin && b < interior_end ? interior_begin : b; }
};

// Columns by phase, forward and for any row: source t of the extended row goes to phase t % stride, so that tap q of
// neighbouring results reads neighbouring elements of one phase.
template <int K, int S, typename acc, typename Store>
INLINED inline void sum_phases(const acc* phases, index_t pitch, const acc* taps, int k, int stride, index_t n, Store&& store) {
  using V = Vector<acc>;
  const int count = K ? K : k, s = S ? S : stride;
  for (index_t j = 0; j < n; j += 2 * V::lanes) {
    Unit<acc> sum = {V::load(phases + j) * taps[0], V::load(phases + j + V::lanes) * taps[0]};
#pragma GCC unroll 9
    for (int q = 1; q < count; ++q) {
      const acc* p = phases + (q % s) * pitch + q / s + j;
      sum.a += V::load(p) * taps[q], sum.b += V::load(p + V::lanes) * taps[q];
    }
    store(j, sum);
  }
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
    const bool bypass = op.batch * op.channels * out_rows * out_cols * index_t(sizeof(T)) > cached_bytes;
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
      for (int r = 0; r < rows; ++r) advance(row);
    }
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
    const bool bypass = op.batch * op.channels * to_plane * index_t(sizeof(T)) > cached_bytes;
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

// Threads get pieces of at least this many pixels.
constexpr index_t grain_pixels = 1 << 15;

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

// ---- memory in pixels (NHWC): the lanes are channels ----

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
  bool bypass = op.batch * op.channels * out_rows * out_cols * index_t(sizeof(T)) > cached_bytes&& op.channels * sizeof(T) % 64 == 0 &&
                reinterpret_cast<uintptr_t>(op.dst) % 64 == 0;

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
          const auto sum = [&](index_t u) INLINED {
            return sum_terms<m>(terms, c + u, [&](index_t x) INLINED { return Lanes<acc>::load(buffer + x - lo + u); });
          };
          index_t u = 0;
          for (; u + unit <= channels; u += unit) {
            ahead();
            bypass ? Lanes<T>::stream(pixel + u, sum(u)) : Lanes<T>::store(pixel + u, sum(u));
          }
          if (u < channels) Lanes<T>::store(pixel + u, sum(u), channels - u);
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
        const auto at = [&](index_t u, auto&& load) INLINED {
          const index_t channel = c + (is_run ? u % channels : u);
          const T* p = src + (lo + x) * next + u * stride;
          Lanes<acc>::store(buffer + x * pitch + u,
                            sum_terms<m>(rows, channel, [&](index_t row) INLINED { return pre.pixel(load(p + row), channel); }));
        };
        if (stride != 1) {
          for (index_t u = 0; u < length; u += unit)
            at(u, [&](const T* p)
                      INLINED { return gathered(p, stride, length - u, [](const T* copy) INLINED { return Lanes<T>::load(copy); }); });
          continue;
        }
        index_t u = 0;
        for (; u + unit <= length; u += unit) at(u, [](const T* p) INLINED { return Lanes<T>::load(p); });
        if (u < length) at(u, [&](const T* p) INLINED { return Lanes<T>::load(p, length - u); });
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

template <typename T>
void blur_pool_of(const BlurPool& op, const Parallel& parallel) {
  const bool pixels = op.dst_stride.c == 1 && (op.dst_stride.w != 1 || (op.adjoint ? op.cols.in : op.cols.out) == 1);
  const Identity pre;
  if (op.adjoint) pixels ? blur_pixels<T, true>(op, parallel, pre) : blur_planes<T, true>(op, parallel, pre);
  else pixels ? blur_pixels<T, false>(op, parallel, pre) : blur_planes<T, false>(op, parallel, pre);
}

// ---- gradient of the taps ----

// Per channel, summed in float64 in a fixed order whatever the number of threads.
template <typename T>
void taps_grad_of(const TapsGrad& op, const Parallel& parallel) {
  using acc = acc_t<T>;
  const int kh = op.rows.taps, kw = op.cols.taps;
  const Axis &own = op.axis == 0 ? op.rows : op.cols, &cross = op.axis == 0 ? op.cols : op.rows;
  const auto offset = [&](const Strides& s, index_t along_own, index_t along_cross)
                          INLINED { return op.axis == 0 ? along_own * s.h + along_cross * s.w : along_own * s.w + along_cross * s.h; };
  const index_t work = max(op.batch * op.rows.out * op.cols.out * (kh + kw), 1);
  parallel(op.channels, max(1, grain_pixels / work), [&](index_t begin, index_t end) INLINED {
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
            cross.outputs_of(h, [&](index_t j, int q) INLINED { d += (double)other[q] * widen(dy[offset(op.dy_stride, o, j)]); });
            dy_spread.data[h] = d;
          }
          own.inputs_of(o, [&](index_t line, int p) INLINED {
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
  by_dtype(op.dtype, [&](auto zero) INLINED { blur_pool_of<decltype(zero)>(op, parallel); });
}

void taps_grad(const TapsGrad& op, const Parallel& parallel) {
  by_dtype(op.dtype, [&](auto zero) INLINED { taps_grad_of<decltype(zero)>(op, parallel); });
}

}  // namespace AF_ISA
}  // namespace aliasfused
