// Rows of memory, adjoint: rows of the source, then columns of their sums.
#pragma once

#include "strips.h"

namespace aliasfused {
namespace AF_ISA {
namespace {

template <typename T>
struct Adjoint : PlanesBase<T> {
  using Base = PlanesBase<T>;
  using Base::op, Base::window;
  using typename Base::acc, typename Base::V;
  static constexpr index_t goal = 8192;  // results

  const index_t in_w, out_w;  // of the blur: the result is in_w wide
  const int k, s, past;       // of the rows; the source rows before its own that a row reads
  int together = 1;           // short rows of the result that are made as one
  static constexpr int together_blocks = 4, tuned_terms = 4;
  Cut cut;
  index_t held, plane_pitch, phase_pitch;  // buffered source rows of a plane, and their elements

  explicit Adjoint(const BlurPool& o)
      : Base{o},
        in_w(o.cols.in),
        out_w(o.cols.out),
        k(o.rows.taps),
        s(o.rows.stride),
        past((k - 1) / s),
        cut(op.rows.in, max(8, goal / in_w), op.rows.in * in_w, goal) {
    held = (cut.rows - 1) / s + 2 + past;
    plane_pitch = held * out_w;
    phase_pitch = round_up(cut.planes * plane_pitch, V::lanes) + 2 * window;
    if (is_tuned<acc> && s == 2 && cut.strips == 1 && k > 1 && past < tuned_terms && out_w <= V::lanes)
      together = min(2 * (V::lanes / out_w), together_blocks * V::lanes / in_w / 2 * 2);
    if (together < 2) together = 1;
  }

  // A row that the border shows once more: its sum is made anew.
  struct Term {
    index_t row;
    acc weight;
  };
  struct Shown {
    index_t row, first, terms;  // its terms are [first, first + terms)
    bool near;                  // all of them lie where any row of its place finds its own
  };
  struct Group {
    static constexpr int later = 2;  // source rows after its own that a row can read, where a border shows it once more
    index_t source[2];
    bool regular;  // every lane has the terms of its phase and no others
    typename V::type weight[2][later + tuned_terms];
    typename V::index mask[2][later + tuned_terms];
  };
  struct Memory {
    Columns<acc> columns;
    List<Group> groups;
    List<Shown> borders;
    List<Term> terms_of_borders;
    List<index_t> offset;
    List<acc> tap;                 // phase after phase
    List<index_t>* rows_of_strip;  // where each row of the result finds its sums; made when first met
    ZeroedScratch<acc> source, sums;
    index_t channel = -1;
    bool together = false;
    int terms = 0;  // of every block, where there are three or less: one at either end, and one that is repeated between
    explicit Memory(const Adjoint& a)
        : rows_of_strip(new List<index_t>[a.cut.strips]),
          source(a.phase_pitch + (a.past + 2 * tuned_terms) * a.out_w),
          sums(a.s * a.phase_pitch) {}
    ~Memory() { delete[] rows_of_strip; }
  };

  const List<index_t>& prepare(Memory& m, const Piece& piece) const {
    if (m.channel < 0 || (op.per_channel && m.channel != piece.c)) {
      m.channel = piece.c;
      m.together = together > 1 && build_together(m, piece.c);
      if (m.together) return m.rows_of_strip[0];
      build(m.columns, this->taps_w(piece.c));
      m.terms = three_blocks(m.columns);
      const acc* taps = this->taps_h(piece.c);
      m.offset.clear(), m.tap.clear(), m.borders.clear(), m.terms_of_borders.clear();
      for (int phase = 0; phase < s; ++phase)
        for (int p = phase; p < k; p += s) m.offset.add() = (past - p / s) * out_w, m.tap.add() = taps[p];
      const index_t reach = max(max(-op.rows.first(), op.rows.last() - op.rows.in), 0);
      for (index_t h = 0; reach && op.rows.border != Border::zeros && h < op.rows.in;
           h = h == reach ? max(h + 1, op.rows.in - 1 - reach) : h + 1)
        add_border(m, h, taps);
    }
    List<index_t>& row = m.rows_of_strip[piece.begin / cut.rows];
    if (m.together || row.size()) return row;
    Slots slot(s, phase_pitch, out_w);
    for (index_t u = (piece.begin + op.rows.before) % s; u > 0; --u) slot.next();
    for (index_t h = piece.begin; h < piece.end; ++h, slot.next()) row.add() = slot.at;
    return row;
  }

  int three_blocks(Columns<acc>& columns) const {
    const auto& blocks = columns.blocks;
    bool fits = is_tuned<acc> && blocks.size() <= 3;
    for (index_t b = 0; fits && b < blocks.size(); ++b)
      fits = blocks[b].single && !columns.pattern[b].wide && (blocks[b].repeats == 1 || (b == 1 && blocks.size() == 3));
    const int terms = fits ? columns.even_out() : 0;
    return terms <= tuned_terms ? terms : 0;
  }

  void add_border(Memory& m, index_t h, const acc* taps) const {
    const index_t own = (h + op.rows.before) / s, first = m.terms_of_borders.size();
    bool near = true;
    op.rows.outputs_of(h, [&](index_t o, int p) INLINED {
      near &= own - past <= o && o <= own;
      for (index_t t = first; t < m.terms_of_borders.size(); ++t)
        if (m.terms_of_borders[t].row == o) {
          m.terms_of_borders[t].weight += taps[p];
          return;
        }
      m.terms_of_borders.add() = {o, taps[p]};
    });
    const index_t terms = m.terms_of_borders.size() - first;
    m.borders.add() = {h, first, terms, near && terms > 0};
  }

  // Short rows: `together` rows of the result are sums of two vectors, one for the rows of either phase, side by side. These
  // are sums of vectors of source rows, each lane with the weight of its own row.
  bool build_together(Memory& m, index_t channel) const {
    Columns<acc>& columns = m.columns;
    columns.clear();
    const acc *taps_w = this->taps_w(channel), *taps_h = this->taps_h(channel);
    for (int b = 0; b < together_blocks; ++b) {
      columns.template add<acc>(0, 1, max(min(V::lanes, together * in_w - b * V::lanes), 0), window, [&](int lane, auto&& visit) INLINED {
        const index_t row = (b * V::lanes + lane) / in_w, x = (b * V::lanes + lane) % in_w;
        op.cols.outputs_of(x, [&](index_t from, int q) INLINED { visit(row % 2 * V::lanes + row / 2 * out_w + from, taps_w[q]); });
      });
      if (!columns.blocks[b].single) return false;
    }
    const int terms = past + 1;
    m.groups.clear();
    // A border can show a pixel to a result that has all its own terms already.
    const int terms_of_columns = columns.even_out();
    if (terms_of_columns != terms && terms_of_columns != terms + 1) return false;
    bool fits = true;
    // The source rows that run() has at hand: a border with more padding than usual can show a pixel to others.
    const index_t lo = op.rows.before / 2 - past, hi = (op.rows.in - 1 + op.rows.before) / 2 + 1;
    for (index_t h = 0; h < op.rows.in; h += together) {
      Group& group = m.groups.add();
      std::memset(static_cast<void*>(&group), 0, sizeof group);
      group.regular = true;
      for (int v = 0; v < 2; ++v) {
        const index_t own = (h + v + op.rows.before) / 2;
        group.source[v] = (own - op.rows.before / 2 + past) * out_w;
        for (int i = 0; 2 * i + v < together && h + 2 * i + v < op.rows.in; ++i)
          op.rows.outputs_of(h + 2 * i + v, [&](index_t o, int p) INLINED {
            const index_t t = own + i - o;
            fits &= -group.later <= t && t < tuned_terms && lo <= o && o < hi;
            group.regular &= 0 <= t && t < terms - fewer(v);
            for (index_t j = 0; fits && j < out_w; ++j)
              group.weight[v][group.later + t][i * out_w + j] += taps_h[p], group.mask[v][group.later + t][i * out_w + j] = -1;
          });
      }
    }
    return fits;
  }
  // Of an odd number of taps, one phase has one less.
  int fewer(int v) const { return k % 2 && (v + op.rows.before) % 2; }

  void build(Columns<acc>& columns, const acc* taps) const {
    const Axis& axis = op.cols;
    columns.clear();
    const index_t in_block = max(1, V::lanes / axis.stride) * axis.stride;
    // Interior: no tap is cut off at either end of the row, and no border shows one of these pixels.
    const index_t reach = max(max(-axis.first(), axis.last() - axis.in), 0);
    const index_t first = max(reach + 1, axis.taps - 1 - axis.before), last = min(in_w - 1 - reach, out_w * axis.stride - axis.before);
    const index_t interior = (first + in_block - 1) / in_block;
    const index_t repeats = in_block > V::lanes || last < V::lanes ? 0 : (last - V::lanes) / in_block + 1 - interior;
    columns.result_step = in_block, columns.source_step = in_block / axis.stride;
    for (index_t i = 0; i < in_w;) {
      const index_t blocks = i == interior * in_block && repeats > 0 ? repeats : 1;
      columns.template add<acc>(i, blocks, min(V::lanes, in_w - i), index_t(1) << 62, [&](int lane, auto&& visit) INLINED {
        axis.outputs_of(i + lane, [&](index_t from, int q) INLINED { visit(from, taps[q]); });
      });
      i += blocks * min(in_block, V::lanes);
    }
  }

  void run(const Piece& piece, Memory& m, T* results, Outflow<T>& out) const {
    const List<index_t>& row = prepare(m, piece);
    const T* src = this->plane(piece.n, piece.c);
    const Strides& stride = op.src_stride;
    // Source rows, zero where there are none.
    const index_t first = (piece.begin + op.rows.before) / s - past, last = (piece.end - 1 + op.rows.before) / s + 1;
    const index_t begin = min(max(first, 0), op.rows.out), end = max(begin, min(last, op.rows.out));
    const bool dense = stride.w == 1 && stride.h == out_w;
    const index_t lines = dense ? 1 : end - begin, line = dense ? (end - begin) * out_w : out_w;
    const index_t span = cut.strips == 1 ? piece.planes * stride.c : (end - begin) * stride.h;
    const Ahead ahead_of{reinterpret_cast<const char*>(src + begin * stride.h + span),
                         span * index_t(sizeof(T)) / (piece.planes * (piece.end - piece.begin))};
    acc* source = m.source.data + tuned_terms * out_w;  // masked vectors begin ahead of it
    const Widen widen{src + begin * stride.h,
                      source + (begin - first) * out_w,
                      stride.c,
                      plane_pitch,
                      stride.h,
                      out_w,
                      lines,
                      line,
                      cut.strips == 1 ? plane_pitch - (end - begin) * out_w : (last - end) * out_w};
    std::memset(source, 0, (begin - first) * out_w * sizeof(acc));
    if (stride.w == 1) widen_planes(widen, piece.planes);
    else widen_lines(widen, piece.planes, [&](const T* p, index_t x, index_t n) INLINED { return this->load_some(p + x * stride.w, n); });
    const index_t rows = piece.end - piece.begin;
    Spread all{m.sums.data, results, piece.planes, plane_pitch, &row[0], rows, in_w, &m.columns.pattern[0], together, 0, 0, 0, 0, ahead_of};
    if (m.together) {
      all.sums = source;
      all.ahead.share *= together;
      all.groups = &m.groups[0], all.out_w = out_w;
      return by_terms(past + 1, [&](auto terms) INLINED {
        const auto columns = [&](auto n) INLINED {
          if (fewer(0)) spread_together<terms, n, 1>(all, out);
          else fewer(1) ? spread_together<terms, n, 2>(all, out) : spread_together<terms, n, 0>(all, out);
        };
        if (all.pattern->terms == terms) columns(terms);
        else columns(std::integral_constant<int, terms + 1>{});
      });
    }
    sum_rows(piece, m, row, source - first * out_w, src);
    if (m.terms) {
      const auto& blocks = m.columns.blocks;
      const auto& interior = blocks[blocks.size() == 3 ? 1 : 0];
      all.repeats = blocks.size() == 3 ? interior.repeats : 0;
      all.first = blocks[blocks.size() == 3 ? 1 : 0].result, all.last = blocks[blocks.size() - 1].result;
      all.source_step = m.columns.source_step, all.result_step = m.columns.result_step;
      all.blocks = blocks.size();
      return unrolled<is_tuned<acc>>(m.terms, [&](auto terms) INLINED { spread_rows<terms>(all, out); });
    }
    spread_part_by_part(piece, m, row, results);
  }

  // The sums of every row, by phase; `source` is where row 0 would be. Then again those that the border shows once more.
  void sum_rows(const Piece& piece, Memory& m, const List<index_t>& row, const acc* source, const T* src) const {
    const index_t first = (piece.begin + op.rows.before) / s - past;
    for (int phase = 0, n = 0; phase < s; ++phase) {
      const int count = (k - phase + s - 1) / s;
      acc* to = m.sums.data + phase * phase_pitch;
      const index_t width = piece.planes * plane_pitch;
      if (phase >= k) {
        std::memset(to, 0, width * sizeof(acc));
        continue;
      }
      const Terms<acc> terms{&m.offset[n], &m.tap[n], count};
      const Lines lines{1, 0, 1, 0, width};
      unrolled<is_tuned<acc>>(
          count, [&](auto unrolled_count) INLINED { Base::template sum_lines<unrolled_count>(terms, source + first * out_w, to, lines); });
      n += count;
    }
    for (index_t i = 0; i < m.borders.size(); ++i) {
      const Shown& border = m.borders[i];
      if (border.row < piece.begin || border.row >= piece.end) continue;
      acc* to = m.sums.data + row[border.row - piece.begin];
      const Term* terms = &m.terms_of_borders[border.first];
      if (border.near) sum_border(source, to, terms, border.terms, piece.planes, plane_pitch, out_w);
      else
        for (int q = 0; q < piece.planes; ++q)
          for (index_t x = 0; x < out_w; x += V::lanes) {
            typename V::type v{};
            for (index_t t = 0; t < border.terms; ++t)
              v += this->load_some(src + q * op.src_stride.c + terms[t].row * op.src_stride.h + x * op.src_stride.w, out_w - x) *
                   terms[t].weight;
            Lanes<acc>::store_vector(to + q * plane_pitch + x, v, min(out_w - x, V::lanes));
          }
    }
  }

  NOINLINED static void sum_border(const acc* source, acc* to, const Term* terms, index_t count, index_t planes, index_t pitch,
                                   index_t out_w) {
    for (index_t q = 0; q < planes; ++q, source += pitch, to += pitch)
      for (index_t x = 0; x < out_w; x += V::lanes) {
        auto v = V::load(source + terms[0].row * out_w + x) * terms[0].weight;
        for (index_t t = 1; t < count; ++t) v += V::load(source + terms[t].row * out_w + x) * terms[t].weight;
        Lanes<acc>::store_vector(to + x, v, min(out_w - x, V::lanes));
      }
  }

  // Lines of every plane to floats, each plane with `zeros` elements after it and before the next.
  struct Widen {
    const T* src;
    acc* to;
    index_t plane_stride, plane_pitch, stride, pitch, lines, length, zeros;
  };
  template <typename Load>
  INLINED static void widen_lines(const Widen a, index_t planes, Load&& load) {
    const T* plane = a.src;
    acc* sums = a.to;
    for (index_t q = 0; q < planes; ++q, plane += a.plane_stride, sums += a.plane_pitch) {
      const T* p = plane;
      acc* to = sums;
      for (index_t l = 0; l < a.lines; ++l, p += a.stride, to += a.pitch)
        for (index_t x = 0; x < a.length; x += V::lanes) V::store(to + x, load(p, x, a.length - x));
      for (index_t x = 0; x < a.zeros; x += V::lanes) V::store(sums + a.lines * a.length + x, typename V::type{});
    }
  }
  NOINLINED static void widen_planes(const Widen a, index_t planes) {
    widen_lines(a, planes, [=](const T* p, index_t x, index_t n) INLINED {
      return n >= V::lanes ? Lanes<T>::load_vector(p + x) : Lanes<T>::load_vector(p + x, n);
    });
  }

  // All columns of rows in turn.
  struct Spread {
    const acc* sums;
    T* results;
    index_t planes, plane_pitch;
    const index_t* row;
    index_t rows, in_w;
    const Pattern<acc>* pattern;
    index_t together, blocks, repeats, first, last;
    Ahead ahead;
    index_t source_step = 0, result_step = 0, out_w = 0;
    const Group* groups = nullptr;
  };
  // Sums of M rows and N columns; FEWER: of the first (1) or the second (2) vector's rows, one less.
  template <int M, int N, int FEWER>
  NOINLINED static void spread_together(Spread a, Outflow<T>& outflow) {
    if constexpr (M >= 1) {
      using Held = typename Pattern<acc>::template Held<N, true>;
      const Held sum[together_blocks] = {Held(a.pattern[0]), Held(a.pattern[1]), Held(a.pattern[2]), Held(a.pattern[3])};
      const acc* source = a.sums;
      T* plane = a.results;
      Outflow<T> out = outflow;
      const index_t out_w = a.out_w;
      for (index_t q = 0; q < a.planes; ++q, source += a.plane_pitch, plane += a.rows * a.in_w) {
        T* to = plane;
        const Group* group = a.groups;
        for (index_t h = 0; h < a.rows; h += a.together, to += a.together * a.in_w, ++group) {
          const auto rows = [&](int v, int terms) INLINED {
            const acc* p = source + group->source[v];
            const auto* weight = &group->weight[v][group->later];
            auto s = V::load(p) * weight[0];
#pragma GCC unroll 4
            for (int t = 1; t < terms; ++t) s += V::load(p - t * out_w) * weight[t];
            return s;
          };
          const auto masked_rows = [&](int v) INLINED {
            const acc* p = source + group->source[v] + group->later * out_w;
            typename V::type s{};
            for (int t = 0; t < group->later + tuned_terms; ++t)
              s += (typename V::type)((typename V::index)V::load(p - t * out_w) & group->mask[v][t]) * group->weight[v][t];
            return s;
          };
          const Unit<acc> u =
              group->regular ? Unit<acc>{rows(0, M - (FEWER == 1)), rows(1, M - (FEWER == 2))} : Unit<acc>{masked_rows(0), masked_rows(1)};
          Lanes<T>::store_natural(to, {sum[0](u), sum[1](u)});
          Lanes<T>::store_natural(to + window, {sum[2](u), sum[3](u)});
          a.ahead();
          out.pass(to - a.results);
        }
      }
      outflow.next = out.next;
    }
  }
  template <typename F>
  INLINED static void by_terms(int n, F&& f) {
    switch (n) {
      case 1: return f(std::integral_constant<int, 1>{});
      case 2: return f(std::integral_constant<int, 2>{});
      case 3: return f(std::integral_constant<int, 3>{});
      default: return f(std::integral_constant<int, 4>{});
    }
  }
  // A block at either end, and those between, which share a pattern.
  template <int M>
  NOINLINED static void spread_rows(Spread a, Outflow<T>& outflow) {
    if constexpr (M >= 1 && M <= tuned_terms) {
      using Held = typename Pattern<acc>::template Held<M, false>;
      const Held left(a.pattern[0]), interior(a.pattern[a.blocks == 3 ? 1 : 0]), right(a.pattern[a.blocks - 1]);
      const index_t bases[3] = {a.pattern[0].base, a.pattern[a.blocks == 3 ? 1 : 0].base, a.pattern[a.blocks - 1].base};
      const acc* sums = a.sums;
      T* line = a.results;
      Outflow<T> out = outflow;
      const auto at = [](const acc* p) INLINED {
        const auto v = in_register(V::load(p));
        return Unit<acc>{v, v};
      };
      for (index_t q = 0; q < a.planes; ++q, sums += a.plane_pitch)
        for (const index_t *row = a.row, *end = row + a.rows; row < end; ++row, line += a.in_w) {
          const acc* from = sums + *row;
          Lanes<T>::store_vector(line, left(at(from + bases[0])));
          const acc* between = from + bases[1];
          T* to = line + a.first;
          for (index_t r = a.repeats; r > 0; --r, between += a.source_step, to += a.result_step)
            Lanes<T>::store_vector(to, interior(at(between)));
          Lanes<T>::store_vector(line + a.last, right(at(from + bases[2])));
          a.ahead();
          out.pass(line - a.results);
        }
      outflow.next = out.next;
    }
  }

  // The same for any blocks. The last columns first: what a vector has in excess is still to be stored in the row below.
  void spread_part_by_part(const Piece& piece, const Memory& m, const List<index_t>& row, T* results) const {
    const index_t rows = piece.end - piece.begin;
    for (index_t b = m.columns.blocks.size() - 1; b >= 0; --b) {
      const auto& block = m.columns.blocks[b];
      const Pattern<acc>* pattern = &m.columns.pattern[block.pattern];
      for (index_t line = 0; line < piece.planes * rows; ++line)
        for (index_t r = 0; r < block.repeats; ++r) {
          const acc* from = m.sums.data + line / rows * plane_pitch + row[line % rows] + r * m.columns.source_step;
          typename V::type v{};
          for (index_t w = 0; w < block.patterns; ++w) v += pattern[w].part(Lanes<acc>::load(from + pattern[w].base));
          Lanes<T>::store_vector(results + line * in_w + block.result + r * m.columns.result_step, v);
        }
    }
  }
};

}  // namespace
}  // namespace AF_ISA
}  // namespace aliasfused
