// The second step of a row in memory order: weighted sums of buffered columns, by permutation or by phase.
#pragma once

#include "memory.h"
#include "terms.h"

namespace aliasfused {
namespace AF_ISA {
namespace {

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

}  // namespace
}  // namespace AF_ISA
}  // namespace aliasfused
