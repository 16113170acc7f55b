// What every result is: a weighted sum of a few sources along each axis, as Axis says of an output (forward) or of an
// input (adjoint).
#pragma once

#include <cstdlib>
#include "simd.h"

namespace aliasfused {
namespace AF_ISA {
namespace {

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
// Of which lanes are read that nobody fills. What they make goes nowhere, but what lies in memory may be tiny as floating-point
// numbers go, and some processors take a hundred times as long for those.
template <typename E>
struct ZeroedScratch : Scratch<E> {
  explicit ZeroedScratch(index_t n) : Scratch<E>(n) { std::memset(this->data, 0, max(n, 1) * sizeof(E)); }
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

// M terms in registers (M = 0: t.count, where they are), beginning at `base`.
template <int M, typename W, typename T>
struct Sources {
  const T* at[M ? M : 1];
  W weight[M ? M : 1];
  const T* base;
  Terms<W> all;
  INLINED Sources(const Terms<W>& t, const T* p) : base(p), all(t) {
    for (int m = 0; m < M; ++m) at[m] = p + t.offset[m], weight[m] = t.weight[m];
  }
  // The sum `u` elements on, at channel c.
  template <typename Load>
  INLINED auto sum(index_t u, index_t c, Load&& load) const {
    if constexpr (M == 0) {
      return sum_terms<0>(all, c, [&](index_t offset) INLINED { return load(base + offset + u); });
    } else {
      auto sum = weighted(load(at[0] + u), weight[0], c);
#pragma GCC unroll 9
      for (int m = 1; m < M; ++m) add(sum, weighted(load(at[m] + u), weight[m], c));
      return sum;
    }
  }
};

}  // namespace
}  // namespace AF_ISA
}  // namespace aliasfused
