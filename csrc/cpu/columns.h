// Weighted sums of neighbouring columns. A vector of results reads a window of sources, two vectors long: each of its terms
// is a permutation of the window, and every border and parity is in the lane numbers.
#pragma once

#include "memory.h"
#include "terms.h"

namespace aliasfused {
namespace AF_ISA {
namespace {

// A list of plain data (whose memory a standard container would manage in functions shared with other instruction sets).
template <typename E>
class List {
 public:
  List() = default;
  ~List() { std::free(data_); }
  List(const List&) = delete;
  E& add() {
    if (size_ == capacity_) {
      E* grown = static_cast<E*>(std::aligned_alloc(64, round_up((capacity_ = 2 * capacity_ + 8) * sizeof(E), 64)));
      if (size_) std::memcpy(static_cast<void*>(grown), data_, size_ * sizeof(E));
      std::free(data_);
      data_ = grown;
    }
    return data_[size_++];
  }
  void clear() { size_ = 0; }
  index_t size() const { return size_; }
  E& operator[](index_t i) { return data_[i]; }
  const E& operator[](index_t i) const { return data_[i]; }

 private:
  E* data_ = nullptr;
  index_t size_ = 0, capacity_ = 0;
};

template <typename acc>
struct Pattern {
  using V = Vector<acc>;
  static constexpr int most_terms = 16, window = 2 * V::lanes;
  index_t base;  // first source of the window
  int terms;
  bool wide;  // some term lies in the window's second vector
  typename V::index lane[most_terms], mask[most_terms];
  typename V::type weight[most_terms];

  // M terms in registers, where every lane has all of them.
  template <int M, bool WIDE>
  struct Held {
    typename V::index lane[M ? M : most_terms];
    typename V::type weight[M ? M : most_terms];
    int count;
    INLINED explicit Held(const Pattern& p) : count(M ? M : p.terms) {
      for (int m = 0; m < count; ++m) lane[m] = p.lane[m], weight[m] = p.weight[m];
    }
    INLINED typename V::type operator()(Unit<acc> u) const {
      const auto permuted = [&](int m) INLINED { return WIDE ? __builtin_shuffle(u.a, u.b, lane[m]) : __builtin_shuffle(u.a, lane[m]); };
      auto sum = permuted(0) * weight[0];
#pragma GCC unroll 9
      for (int m = 1; m < count; ++m) sum += permuted(m) * weight[m];
      return sum;
    }
  };
  // What this window adds to results that have other windows too: lanes without a term see zero, not a pixel times zero,
  // which an infinite pixel would make a nan.
  typename V::type part(Unit<acc> u) const {
    typename V::type sum{};
    for (int m = 0; m < terms; ++m)
      sum += (typename V::type)((typename V::index)__builtin_shuffle(u.a, u.b, lane[m]) & mask[m]) * weight[m];
    return sum;
  }
};

// The results of a row, in blocks of a vector or less. Blocks in the interior share one pattern.
template <typename acc>
struct Columns {
  using V = Vector<acc>;
  struct Block {
    index_t result, repeats;    // first result; blocks like it, one after the other
    index_t pattern, patterns;  // one for each window
    bool single;                // one window, in which every lane has all its terms
  };
  List<Block> blocks;
  List<Pattern<acc>> pattern;
  index_t result_step = 0, source_step = 0;  // from one repeat to the next

  void clear() { blocks.clear(), pattern.clear(); }

  // Gives every pattern as many terms as the largest has, and returns how many: the last one is shared out.
  int even_out() {
    int most = 0;
    for (index_t i = 0; i < pattern.size(); ++i) most = max(most, pattern[i].terms);
    for (index_t i = 0; i < pattern.size(); ++i) {
      Pattern<acc>& p = pattern[i];
      for (int m = p.terms - 1; 0 <= m && m + 1 < most; ++m) {
        p.lane[m + 1] = p.lane[m], p.mask[m + 1] = p.mask[m];
        p.weight[m] /= acc(2), p.weight[m + 1] = p.weight[m];
      }
      p.terms = most;
    }
    return most;
  }

  // A block of `used` results; terms_of_lane(i, visit) visits the source and the weight of every term of lane i. A window
  // ends at `limit`, where the row is long enough for one, and holds its sources in the lane order of T.
  template <typename T, typename TermsOfLane>
  void add(index_t result, index_t repeats, int used, index_t limit, TermsOfLane&& terms_of_lane) {
    terms.clear();
    for (int i = 0; i < used; ++i) {
      const index_t own = terms.size();
      terms_of_lane(i, [&](index_t source, acc weight) INLINED {
        for (index_t t = own; t < terms.size(); ++t)
          if (terms[t].source == source) {  // a border shows the same pixel twice
            terms[t].weight += weight;
            return;
          }
        terms.add() = {source, weight, i};
      });
    }
    Block& block = blocks.add();
    block = {result, repeats, pattern.size(), 0, true};
    for (index_t left = terms.size(); left || !block.patterns; ++block.patterns) {
      index_t lo = left ? terms[0].source : 0;
      for (index_t t = 0; t < left; ++t) lo = min(lo, terms[t].source);
      Pattern<acc>& p = pattern.add();
      p.base = max(min(lo, limit - p.window), 0);
      p.wide = false;
      int count[V::lanes] = {};
      for (int m = 0; m < p.most_terms; ++m) p.lane[m] = p.mask[m] = typename V::index{}, p.weight[m] = typename V::type{};
      index_t kept = 0;
      for (index_t t = 0; t < left; ++t) {
        const Term term = terms[t];
        const index_t at = term.source - p.base;
        if (at >= p.window || count[term.lane] == p.most_terms) {
          terms[kept++] = term;
          continue;
        }
        const int m = count[term.lane]++, i = term.lane;
        const bool split = Lanes<T>::is_split;
        p.lane[m][i] = split ? at / 2 + at % 2 * V::lanes : at;
        p.mask[m][i] = -1, p.weight[m][i] = term.weight;
        p.wide |= p.lane[m][i] >= V::lanes;
      }
      left = kept;
      p.terms = 0;
      for (int i = 0; i < used; ++i) p.terms = max(p.terms, count[i]), block.single &= count[i] > 0;
      block.single &= left == 0 && block.patterns == 0;
      // A lane of fewer terms shares its last tap out over the rest, and so needs no mask. In halves, which are exact.
      if (block.single)
        for (int i = 0; i < used; ++i) {
          const int last = count[i] - 1;
          for (int m = last; m + 1 < p.terms; ++m) {
            p.lane[m + 1][i] = p.lane[m][i], p.mask[m + 1][i] = -1;
            p.weight[m][i] /= 2, p.weight[m + 1][i] = p.weight[m][i];
          }
        }
    }
  }

 private:
  struct Term {
    index_t source;
    acc weight;
    int lane;
  };
  List<Term> terms;
};

}  // namespace
}  // namespace AF_ISA
}  // namespace aliasfused
