// Memory in rows (NCHW): the lanes are columns.
//
// The columns are filtered where the large map is, so that each of its pixels is loaded or stored once; the rows where the
// small one is. Forward: columns, then rows; adjoint: rows, then columns. In between, sums lie in a buffer by phase: row u of
// the extended map (u = 0 is the first that any output reads) belongs to phase u % stride, so that one tap meets neighbouring
// rows of one phase, and whole planes are filtered as one long row.
#pragma once

#include "columns.h"
#include "kernels.h"

namespace aliasfused {
namespace AF_ISA {
namespace {

// Some rows of a plane, or some whole planes of one image after the other.
struct Piece {
  index_t n, c;
  int planes;
  index_t begin, end;  // rows of the result
  bool roomy;          // whole windows may be read at the end of every row: what follows is still the tensor
};

// Lines of sums, `pitch` elements apart in a plane.
struct Lines {
  index_t planes, plane_pitch, lines, pitch, length;
};

// How planes are cut into pieces.
struct Cut {
  index_t rows;    // of the result in a strip
  index_t strips;  // of a plane
  int planes;      // in a piece, where a plane is one strip

  Cut(index_t all_rows, index_t most_rows, index_t elements_of_plane, index_t goal) {
    strips = (all_rows + most_rows - 1) / most_rows;
    rows = (all_rows + strips - 1) / strips;
    strips = (all_rows + rows - 1) / rows;
    planes = strips == 1 ? min(max(goal / max(elements_of_plane, 1), 1), 64) : 1;
  }
};

// Where rows u = 0, 1, ... of the extended map lie in a buffer by phase.
struct Slots {
  const int stride;
  const index_t phase_pitch, pitch;
  index_t phase = 0, at = 0, of_first_phase = 0;
  Slots(int s, index_t phases, index_t rows) : stride(s), phase_pitch(phases), pitch(rows) {}
  INLINED void next() {
    if (++phase < stride) at += phase_pitch;
    else phase = 0, at = of_first_phase += pitch;
  }
};

template <typename T>
struct PlanesBase {
  using acc = acc_t<T>;
  using V = Vector<acc>;
  static constexpr int window = 2 * V::lanes;
  const BlurPool& op;

  const acc* taps_h(index_t c) const { return static_cast<const acc*>(op.taps_h) + (op.per_channel ? c * op.rows.taps : 0); }
  const acc* taps_w(index_t c) const { return static_cast<const acc*>(op.taps_w) + (op.per_channel ? c * op.cols.taps : 0); }
  const T* plane(index_t n, index_t c) const { return static_cast<const T*>(op.src) + n * op.src_stride.n + c * op.src_stride.c; }
  // Up to n elements of a row, in natural order.
  INLINED typename V::type load_some(const T* p, index_t n) const {
    if (op.src_stride.w != 1) return gathered(p, op.src_stride.w, n, [](const T* copy) INLINED { return Lanes<T>::load_vector(copy); });
    return n >= V::lanes ? Lanes<T>::load_vector(p) : Lanes<T>::load_vector(p, n);
  }
  // to[x] = the sum of M terms from `from` + x, for `lines` lines in each of `planes`. Leaves like this one take what they need
  // by value: a store of a vector may touch anything that is reached through a pointer.
  template <int M, typename To>
  NOINLINED static void sum_lines(const Terms<acc> t, const acc* from, To* to, Lines n) {
    const acc* source[M ? M : 1];
    acc weight[M ? M : 1];
    for (int m = 0; m < M; ++m) source[m] = from + t.offset[m], weight[m] = t.weight[m];
    for (index_t q = 0; q < n.planes; ++q)
      for (index_t l = 0; l < n.lines; ++l, to += n.length) {
        const index_t start = q * n.plane_pitch + l * n.pitch;
        for (index_t x = 0; x < n.length; x += V::lanes) {
          typename V::type sum{};
          if constexpr (M > 0) {
            sum = V::load(source[0] + start + x) * weight[0];
#pragma GCC unroll 9
            for (int m = 1; m < M; ++m) sum += V::load(source[m] + start + x) * weight[m];
          } else {
            for (int m = 0; m < t.count; ++m) sum += V::load(from + t.offset[m] + start + x) * t.weight[m];
          }
          Lanes<To>::store_vector(to + x, sum);
        }
      }
  }
};

template <typename T, typename Pre>
struct Forward : PlanesBase<T> {
  using Base = PlanesBase<T>;
  using typename Base::acc, typename Base::V;
  using Base::op, Base::window;
  static constexpr index_t goal = 6144;  // buffered sums

  const Pre& pre;
  const index_t in_w, out_w;
  const int k, s;    // of the rows
  index_t in_block;  // results of a block
  int together = 1;  // short rows that are filtered as one
  index_t pitch, phase_pitch = 0, plane_pitch = 0;
  Cut cut;

  Forward(const BlurPool& o, const Pre& p)
      : Base{o}, pre(p), in_w(o.cols.in), out_w(o.cols.out), k(o.rows.taps), s(o.rows.stride), cut(cut_of()) {}

  Cut cut_of() {
    const index_t fit = (window - op.cols.taps) / op.cols.stride + 1;
    in_block = in_w > window && op.cols.taps <= window && fit >= V::lanes / 2 ? min(fit, V::lanes) : V::lanes;
    if (op.src_stride.w == 1 && op.src_stride.h == in_w && s <= 2 && op.rows.in * out_w <= goal)
      together = max(1, min(window / in_w, V::lanes / out_w) / s * s);
    pitch = together > 1 || out_w <= in_block ? out_w : out_w + V::lanes;
    // As many rows as keep what two strips both need small.
    const Cut c(op.rows.out, max(8, (goal / pitch - k) / s), op.rows.out * s * pitch, goal);
    phase_pitch = (c.rows + (k - 1) / s) * pitch + V::lanes;
    plane_pitch = s * phase_pitch + V::lanes;  // the rest: for rows that nobody reads
    return c;
  }
  index_t slot(index_t u) const { return u % s * phase_pitch + u / s * pitch; }

  // `together` rows from `row` on: their sums go to a row of the buffer for each phase.
  struct Step {
    index_t row, to, other;
  };
  struct Memory {
    Columns<acc> columns;
    List<Step> steps;
    List<index_t> zeros;  // rows of the buffer
    List<index_t> tap;    // where the first row of each tap is
    Scratch<acc> buffer;
    index_t begin = -1, end = -1, channel = -1;
    explicit Memory(const Forward& f) : buffer(f.cut.planes * f.plane_pitch + window) {
      for (int p = 0; p < f.k; ++p) tap.add() = f.slot(p);
    }
  };

  void prepare(Memory& m, const Piece& piece) const {
    if (m.channel < 0 || (op.per_channel && m.channel != piece.c)) {
      m.channel = piece.c;
      build(m.columns, this->taps_w(piece.c));
    }
    if (m.begin == piece.begin && m.end == piece.end) return;
    m.begin = piece.begin, m.end = piece.end;
    m.steps.clear(), m.zeros.clear();
    const index_t first = piece.begin * s - op.rows.before, n = (piece.end - piece.begin - 1) * s + k;
    Slots slot(s, phase_pitch, pitch);
    for (index_t u = 0; u < n; ++u, slot.next()) {
      if (slot.phase >= k) continue;
      const index_t h = op.rows.source(first + u), to = slot.at;
      if (h < 0) {
        m.zeros.add() = to;
        continue;
      }
      const bool inside = together > 1 && h == first + u && h + together <= op.rows.in && u + together <= n;
      if (inside)
        for (int i = 1; i < together; ++i, ++u) slot.next();
      m.steps.add() = {h, to, inside && s == 2 ? this->slot(u - together + 2) : s * phase_pitch};
    }
  }

  void build(Columns<acc>& columns, const acc* taps) const {
    const Axis& axis = op.cols;
    columns.clear();
    if (together > 1) {
      // Rows of one phase side by side.
      const int each = together / s * out_w;
      return columns.template add<T>(0, 1, s * each, together * in_w, [&](int i, auto&& visit) INLINED {
        const index_t row = i % each / out_w * s + i / each;
        axis.inputs_of(i % out_w, [&](index_t x, int q) INLINED { visit(row * in_w + x, taps[q]); });
      });
    }
    // Interior: no tap sees a border, and no window is cut off at the end of the row.
    const index_t step = in_block * axis.stride, reach = (in_block - 1) * axis.stride + axis.taps;
    const index_t interior = (axis.before + step - 1) / step;
    const index_t ends = reach <= window ? window : reach + window;
    const index_t repeats = axis.in + axis.before < ends ? 0 : min((axis.in + axis.before - ends) / step + 1, out_w / in_block) - interior;
    columns.result_step = in_block, columns.source_step = step;
    for (index_t j = 0; j < out_w;) {
      const index_t blocks = j == interior * in_block && repeats > 0 ? repeats : 1;
      columns.template add<T>(j, blocks, min(in_block, out_w - j), in_w, [&](int i, auto&& visit) INLINED {
        axis.inputs_of(j + i, [&](index_t x, int q) INLINED { visit(x, taps[q]); });
      });
      j += blocks * in_block;
    }
  }

  void run(const Piece& piece, Memory& m, T* results, Outflow<T>& out) const {
    prepare(m, piece);
    const T* src = this->plane(piece.n, piece.c);
    const Strides& stride = op.src_stride;
    // Asked for on the way: the rows of the next piece.
    const index_t ahead = (cut.strips == 1 ? piece.planes * stride.c : (piece.end - piece.begin) * s * stride.h) * sizeof(T);
    const bool whole = stride.w == 1 && (in_w >= window || piece.roomy);
    for (index_t b = 0; b < m.columns.blocks.size(); ++b) {
      const auto& block = m.columns.blocks[b];
      if (!whole || !block.single) {
        sum_part_by_part(piece, m, block);
        continue;
      }
      const Across across{src, m.buffer.data, piece.planes, stride.c, plane_pitch, stride.h, &m.steps[0], m.steps.size(), m.columns.pattern[block.pattern],
                          block.repeats, block.result, m.columns.source_step, m.columns.result_step, ahead, piece.c};
      unrolled<is_tuned<acc>>(across.pattern.terms, [&](auto terms) INLINED {
        // Short rows: half a vector is stored, which costs less where it straddles cache lines.
        if (together > 1 && s == 2) sum_columns<terms, 2>(across, together / 2 * out_w, pre);
        else together == 1 && out_w <= V::lanes / 2 ? sum_columns<terms, 1>(across, 0, pre) : sum_columns<terms, 0>(across, 0, pre);
      });
    }
    for (int q = 0; q < piece.planes; ++q)
      for (index_t i = 0; i < m.zeros.size(); ++i) std::memset(m.buffer.data + q * plane_pitch + m.zeros[i], 0, out_w * sizeof(acc));

    const Terms<acc> terms{&m.tap[0], this->taps_h(piece.c), k};
    const index_t rows = piece.end - piece.begin;
    const Lines lines = pitch == out_w ? Lines{piece.planes, plane_pitch, 1, 0, rows * out_w} : Lines{piece.planes, plane_pitch, rows, pitch, out_w};
    (void)out;
    unrolled<is_tuned<acc>>(k, [&](auto count) INLINED { Base::template sum_lines<count>(terms, m.buffer.data, results, lines); });
  }

  // One block of all rows of a piece.
  struct Across {
    const T* src;
    acc* sums;
    index_t planes, plane_stride, plane_pitch, row_stride;
    const Step* steps;
    index_t rows;
    const Pattern<acc>& pattern;
    index_t repeats, result, source_step, result_step, ahead, channel;
  };
  template <int M, int HALVES>
  NOINLINED static void sum_columns(const Across a, int others, const Pre pre) {
    const typename Pattern<acc>::template Held<M, true> sum(a.pattern);
    typename V::index shift = iota<acc>(0, 1) + others;
    for (int i = 0; i < V::lanes; ++i) shift[i] = min(shift[i], V::lanes - 1);
    const T* plane = a.src + a.pattern.base;
    acc* sums = a.sums + a.result;
    for (index_t q = 0; q < a.planes; ++q, plane += a.plane_stride, sums += a.plane_pitch)
      for (const Step *step = a.steps, *end = step + a.rows; step < end; ++step) {
        const T* p = plane + step->row * a.row_stride;
        acc *to = sums + step->to, *other = HALVES == 2 ? sums + step->other : nullptr;
        for (index_t r = a.repeats; r > 0; --r, p += a.source_step, to += a.result_step) {
          __builtin_prefetch(reinterpret_cast<const char*>(p) + a.ahead, 0, 2);
          if (sizeof(T) > 2) __builtin_prefetch(reinterpret_cast<const char*>(p) + a.ahead + 64, 0, 2);
          const Unit<acc> u = pre.row(Lanes<T>::load(p), a.channel + q);
          const auto v = sum({in_register(u.a), in_register(u.b)});
          HALVES ? V::store_half(to, v) : V::store(to, v);
          if (HALVES == 2) V::store_half(other, __builtin_shuffle(v, shift));
        }
      }
  }

  // The same where windows end early, where there are several, or where pixels are apart.
  void sum_part_by_part(const Piece& piece, const Memory& m, const typename Columns<acc>::Block& block) const {
    const index_t stride = op.src_stride.w;
    for (int q = 0; q < piece.planes; ++q)
      for (index_t i = 0; i < m.steps.size(); ++i) {
        const Step& step = m.steps[i];
        const T* row = this->plane(piece.n, piece.c + q) + step.row * op.src_stride.h;
        acc* sums = m.buffer.data + q * plane_pitch;
        const index_t limit = in_w * min(together, op.rows.in - step.row);
        for (index_t r = 0; r < block.repeats; ++r) {
          typename V::type v{};
          for (index_t w = 0; w < block.patterns; ++w) {
            const Pattern<acc>& pattern = m.columns.pattern[block.pattern + w];
            const index_t x = pattern.base + r * m.columns.source_step, n = min(limit - x, window);
            const T* p = row + x * stride;
            v += pattern.part(pre.row(stride != 1 ? gathered(p, stride, n, [](const T* copy) { return Lanes<T>::load(copy); })
                                      : n < window ? Lanes<T>::load(p, n)
                                                   : Lanes<T>::load(p),
                                      piece.c + q));
          }
          V::store(sums + step.to + block.result + r * m.columns.result_step, v);
          if (together > 1 && s == 2)
            for (int lane = together / 2 * out_w; lane < V::lanes; ++lane) sums[step.other + lane - together / 2 * out_w] = v[lane];
        }
      }
  }
};

template <typename T, typename Pre>
struct Adjoint : PlanesBase<T> {
  using Base = PlanesBase<T>;
  using typename Base::acc, typename Base::V;
  using Base::op, Base::window;
  static constexpr index_t goal = 8192;  // results

  const Pre& pre;
  const index_t in_w, out_w;  // of the blur: the result is in_w wide
  const int k, s, past;       // of the rows; the source rows before its own that a row reads
  int together = 1;           // short rows of the result that are made as one
  static constexpr int together_blocks = 4, tuned_terms = 4;
  Cut cut;
  index_t held, plane_pitch, phase_pitch;  // buffered source rows of a plane, and their elements

  Adjoint(const BlurPool& o, const Pre& p)
      : Base{o}, pre(p), in_w(o.cols.in), out_w(o.cols.out), k(o.rows.taps), s(o.rows.stride), past((k - 1) / s),
        cut(op.rows.in, max(8, goal / in_w), op.rows.in * in_w, goal) {
    held = (cut.rows - 1) / s + 2 + past;
    plane_pitch = held * out_w;
    phase_pitch = round_up(cut.planes * plane_pitch, V::lanes) + 2 * window;
    if (is_tuned<acc> && s == 2 && cut.strips == 1 && k > 1 && past < tuned_terms && out_w <= V::lanes) together = min(2 * (V::lanes / out_w), together_blocks * V::lanes / in_w / 2 * 2);
    if (together < 2) together = 1;
  }

  // A row that the border shows once more: its sum is made anew.
  struct Term {
    index_t row;
    acc weight;
  };
  struct Border {
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
    List<Border> borders;
    List<Term> terms_of_borders;
    List<index_t> offset;
    List<acc> tap;  // phase after phase
    List<index_t> row;  // where each row of the result finds its sums
    Scratch<acc> source, sums;
    index_t begin = -1, end = -1, channel = -1;
    bool together = false;
    int terms = 0;  // of every block, where there are three or less: one at either end, and one that is repeated between
    explicit Memory(const Adjoint& a) : source(a.phase_pitch + (a.past + 2 * tuned_terms) * a.out_w), sums(a.s * a.phase_pitch) {}
  };

  void prepare(Memory& m, const Piece& piece) const {
    if (m.channel < 0 || (op.per_channel && m.channel != piece.c)) {
      m.channel = piece.c;
      m.together = together > 1 && build_together(m, piece.c);
      if (!m.together) {
        build(m.columns, this->taps_w(piece.c));
        m.terms = three_blocks(m.columns);
      }
      const acc* taps = this->taps_h(piece.c);
      m.offset.clear(), m.tap.clear(), m.borders.clear(), m.terms_of_borders.clear();
      for (int phase = 0; phase < s; ++phase)
        for (int p = phase; p < k; p += s) m.offset.add() = (past - p / s) * out_w, m.tap.add() = taps[p];
      const index_t reach = max(max(-op.rows.first(), op.rows.last() - op.rows.in), 0);
      for (index_t h = 0; reach && op.rows.border != aliasfused::Border::zeros && h < op.rows.in; h = h == reach ? max(h + 1, op.rows.in - 1 - reach) : h + 1)
        add_border(m, h, taps);
    }
    if (m.begin == piece.begin && m.end == piece.end) return;
    m.begin = piece.begin, m.end = piece.end;
    m.row.clear();
    Slots slot(s, phase_pitch, out_w);
    for (index_t u = (piece.begin + op.rows.before) % s; u > 0; --u) slot.next();
    for (index_t h = piece.begin; h < piece.end; ++h, slot.next()) m.row.add() = slot.at;
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
            fits &= -group.later <= t && t < tuned_terms;
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
    prepare(m, piece);
    const T* src = this->plane(piece.n, piece.c);
    const Strides& stride = op.src_stride;
    // Source rows, zero where there are none.
    const index_t first = (piece.begin + op.rows.before) / s - past, last = (piece.end - 1 + op.rows.before) / s + 1;
    const index_t begin = min(max(first, 0), op.rows.out), end = max(begin, min(last, op.rows.out));
    const bool dense = stride.w == 1 && stride.h == out_w;
    const index_t lines = dense ? 1 : end - begin, line = dense ? (end - begin) * out_w : out_w;
    const index_t span = cut.strips == 1 ? piece.planes * stride.c : (end - begin) * stride.h;
    const Ahead ahead_of{reinterpret_cast<const char*>(src + begin * stride.h + span), span * index_t(sizeof(T)) / (piece.planes * (piece.end - piece.begin))};
    acc* source = m.source.data + tuned_terms * out_w;  // masked vectors begin ahead of it
    const Widen widen{src + begin * stride.h, source + (begin - first) * out_w, stride.c, plane_pitch, stride.h, out_w, lines, line,
                      cut.strips == 1 ? plane_pitch - (end - begin) * out_w : (last - end) * out_w, piece.c};
    std::memset(source, 0, (begin - first) * out_w * sizeof(acc));
    if (stride.w == 1) widen_planes(widen, piece.planes, pre);
    else
      widen_lines(widen, piece.planes, [&](const T* p, index_t x, index_t n, index_t c) INLINED { return pre.row(this->load_some(p + x * stride.w, n), c); });
    Spread all{m.sums.data, results, piece.planes, plane_pitch, &m.row[0], piece.end - piece.begin, in_w, &m.columns.pattern[0], together, 0, 0, 0, 0, ahead_of};
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
      unrolled<is_tuned<acc>>(count, [&](auto unrolled_count) INLINED { Base::template sum_lines<unrolled_count>(terms, source, to, lines); });
      n += count;
    }
    for (index_t i = 0; i < m.borders.size(); ++i) {
      const Border& border = m.borders[i];
      if (border.row < piece.begin || border.row >= piece.end) continue;
      acc* to = m.sums.data + m.row[border.row - piece.begin];
      const Term* terms = &m.terms_of_borders[border.first];
      if (border.near) sum_border(source - first * out_w, to, terms, border.terms, piece.planes, plane_pitch, out_w);
      else
        for (int q = 0; q < piece.planes; ++q)
          for (index_t x = 0; x < out_w; x += V::lanes) {
            typename V::type v{};
            for (index_t t = 0; t < border.terms; ++t)
              v += pre.row(this->load_some(src + q * stride.c + terms[t].row * stride.h + x * stride.w, out_w - x), piece.c + q) * terms[t].weight;
            Lanes<acc>::store_vector(to + q * plane_pitch + x, v, min(out_w - x, V::lanes));
          }
    }

    const index_t rows = piece.end - piece.begin;
    if (m.terms) {
      const auto& blocks = m.columns.blocks;
      const auto& interior = blocks[blocks.size() == 3 ? 1 : 0];
      all.repeats = blocks.size() == 3 ? interior.repeats : 0;
      all.first = blocks[blocks.size() == 3 ? 1 : 0].result, all.last = blocks[blocks.size() - 1].result;
      all.source_step = m.columns.source_step, all.result_step = m.columns.result_step;
      all.blocks = blocks.size();
      return unrolled<is_tuned<acc>>(m.terms, [&](auto terms) INLINED { spread_rows<terms>(all, out); });
    }
    // The last columns first: what a vector has in excess is still to be stored in the row below.
    for (index_t b = m.columns.blocks.size() - 1; b >= 0; --b) {
      const auto& block = m.columns.blocks[b];
      const Pattern<acc>* pattern = &m.columns.pattern[block.pattern];
      const Across across{m.sums.data, results + block.result, piece.planes, plane_pitch, &m.row[0], rows, in_w, pattern, block.patterns,
                          block.repeats, m.columns.source_step, m.columns.result_step};
      if (!block.single) {
        spread(across, [&](const acc* from) INLINED {
          typename V::type v{};
          for (index_t w = 0; w < across.patterns; ++w) v += pattern[w].part(Lanes<acc>::load(from + pattern[w].base));
          return v;
        });
        continue;
      }
      unrolled<is_tuned<acc>>(pattern->terms, [&](auto terms) INLINED {
        pattern->wide ? spread_columns<terms, true>(across) : spread_columns<terms, false>(across);
      });
    }
  }

  NOINLINED static void sum_border(const acc* source, acc* to, const Term* terms, index_t count, index_t planes, index_t pitch, index_t out_w) {
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
    index_t plane_stride, plane_pitch, stride, pitch, lines, length, zeros, channel;
  };
  template <typename Load>
  INLINED static void widen_lines(const Widen a, index_t planes, Load&& load) {
    const T* plane = a.src;
    acc* sums = a.to;
    for (index_t q = 0; q < planes; ++q, plane += a.plane_stride, sums += a.plane_pitch) {
      const T* p = plane;
      acc* to = sums;
      for (index_t l = 0; l < a.lines; ++l, p += a.stride, to += a.pitch)
        for (index_t x = 0; x < a.length; x += V::lanes) {
          V::store(to + x, load(p, x, a.length - x, a.channel + q));
        }
      for (index_t x = 0; x < a.zeros; x += V::lanes) V::store(sums + a.lines * a.length + x, typename V::type{});
    }
  }
  NOINLINED static void widen_planes(const Widen a, index_t planes, const Pre pre) {
    widen_lines(a, planes, [=](const T* p, index_t x, index_t n, index_t c) INLINED {
      return pre.row(n >= V::lanes ? Lanes<T>::load_vector(p + x) : Lanes<T>::load_vector(p + x, n), c);
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
          const Unit<acc> u = group->regular ? Unit<acc>{rows(0, M - (FEWER == 1)), rows(1, M - (FEWER == 2))}
                                             : Unit<acc>{masked_rows(0), masked_rows(1)};
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
      const auto at = [](const acc* p) INLINED { const auto v = in_register(V::load(p)); return Unit<acc>{v, v}; };
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

  struct Across {
    const acc* sums;
    T* results;
    index_t planes, plane_pitch;
    const index_t* row;
    index_t rows, in_w;
    const Pattern<acc>* pattern;
    index_t patterns, repeats, source_step, result_step;
  };
  template <typename Sum>
  INLINED static void spread(const Across a, Sum&& sum) {
    const acc* sums = a.sums;
    T* line = a.results;
    for (index_t q = 0; q < a.planes; ++q, sums += a.plane_pitch)
      for (const index_t *row = a.row, *end = row + a.rows; row < end; ++row, line += a.in_w) {
        const acc* from = sums + *row;
        T* to = line;
        for (index_t r = a.repeats; r > 0; --r, from += a.source_step, to += a.result_step) Lanes<T>::store_vector(to, sum(from));
      }
  }
  template <int M, bool WIDE>
  NOINLINED static void spread_columns(const Across a) {
    const typename Pattern<acc>::template Held<M, WIDE> sum(*a.pattern);
    const index_t base = a.pattern->base;
    spread(a, [=](const acc* from) INLINED { return sum({in_register(V::load(from + base)), WIDE ? in_register(V::load(from + base + V::lanes)) : typename V::type{}}); });
  }
};

template <typename T, bool ADJOINT, typename Pre>
void blur_planes(const BlurPool& op, const Parallel& parallel, const Pre& pre) {
  using Side = std::conditional_t<ADJOINT, Adjoint<T, Pre>, Forward<T, Pre>>;
  const Side side(op, pre);
  const Cut& cut = side.cut;
  const index_t out_rows = results<ADJOINT>(op.rows), out_cols = results<ADJOINT>(op.cols), planes = op.batch * op.channels;
  parallel(planes * cut.strips, max(1, grain_pixels / max(cut.rows * (ADJOINT ? op.cols.in : op.cols.in * op.rows.stride), 1)),
           [&](index_t begin, index_t end) {
             typename Side::Memory memory(side);
             const Scratch<T> buffer(cut.planes * cut.rows * out_cols + 4 * Lanes<T>::unit);
             const bool bypass = bypasses_caches<T>(op);
             for (index_t item = begin; item < end;) {
               const index_t plane = item / cut.strips, strip = item % cut.strips;
               const Strides& s = op.src_stride;
               Piece piece{plane / op.channels, plane % op.channels, 1, strip * cut.rows, min((strip + 1) * cut.rows, out_rows), false};
               if (!op.per_channel && cut.strips == 1) piece.planes = min(min(cut.planes, end - item), op.channels - piece.c);
               if (piece.planes > 1 && plane + piece.planes == planes) --piece.planes;  // the last one may have no room
               const index_t last = plane + piece.planes - 1;
               piece.roomy = (op.batch - 1 - last / op.channels) * s.n + (op.channels - 1 - last % op.channels) * s.c >= Lanes<T>::unit;
               T* dst = static_cast<T*>(op.dst) + (plane * out_rows + piece.begin) * out_cols;
               T* results = Outflow<T>::stage(buffer.data, dst);
               Outflow<T> out(results, dst, bypass);
               side.run(piece, memory, results, out);
               out.finish(piece.planes * (piece.end - piece.begin) * out_cols);
               item += piece.planes;
             }
             settle();
           });
}

}  // namespace
}  // namespace AF_ISA
}  // namespace aliasfused
