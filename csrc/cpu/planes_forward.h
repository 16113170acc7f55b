// Rows of memory, forward: columns of the source, then rows of their sums.
#pragma once

#include "strips.h"

namespace aliasfused {
namespace AF_ISA {
namespace {

template <typename T, typename Pre>
struct Forward : PlanesBase<T> {
  using Base = PlanesBase<T>;
  using Base::op, Base::window;
  using typename Base::acc, typename Base::V;
  static constexpr index_t goal = 6144;  // buffered sums

  const Pre& pre;
  const index_t in_w, out_w, in_pitch;  // in_pitch: from row to row
  const int k, s;                       // of the rows
  index_t in_block;                     // results of a block
  int together = 1;                     // short rows that are filtered as one
  index_t pitch, phase_pitch = 0, plane_pitch = 0;
  Cut cut;

  Forward(const BlurPool& o, const Pre& p)
      : Base{o}, pre(p), in_w(o.cols.in), out_w(o.cols.out), in_pitch(o.src_stride.h), k(o.rows.taps), s(o.rows.stride), cut(cut_of()) {}

  Cut cut_of() {
    const index_t fit = (window - op.cols.taps) / op.cols.stride + 1;
    in_block = in_w > window && op.cols.taps <= window && fit >= V::lanes / 2 ? min(fit, V::lanes) : V::lanes;
    if (op.src_stride.w == 1 && in_w <= in_pitch && in_w <= window && s <= 2 && op.rows.in * out_w <= goal)
      together = max(1, min((window - in_w) / in_pitch + 1, V::lanes / out_w) / s * s);
    pitch = together > 1 || out_w <= in_block ? out_w : round_up(out_w, V::lanes) + V::lanes;
    // As many rows as keep what two strips both need small.
    const Cut c(op.rows.out, max(8, (goal / pitch - k) / s), op.rows.out * s * pitch, goal);
    phase_pitch = round_up((c.rows + (k - 1) / s) * pitch, V::lanes) + V::lanes;
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
    struct Strip {
      List<Step> steps;
      List<index_t> zeros;  // rows of the buffer
    };
    Strip* strips;      // made when first met
    List<index_t> tap;  // where the first row of each tap is
    ZeroedScratch<acc> buffer;
    index_t channel = -1;
    explicit Memory(const Forward& f) : strips(new Strip[f.cut.strips]), buffer(f.cut.planes * f.plane_pitch + window) {
      for (int p = 0; p < f.k; ++p) tap.add() = f.slot(p);
    }
    ~Memory() { delete[] strips; }
  };

  const typename Memory::Strip& prepare(Memory& m, const Piece& piece) const {
    if (m.channel < 0 || (op.per_channel && m.channel != piece.c)) {
      m.channel = piece.c;
      build(m.columns, this->taps_w(piece.c));
    }
    typename Memory::Strip& strip = m.strips[piece.begin / cut.rows];
    if (strip.steps.size() || strip.zeros.size()) return strip;
    const index_t first = piece.begin * s - op.rows.before, n = (piece.end - piece.begin - 1) * s + k;
    Slots slot(s, phase_pitch, pitch);
    for (index_t u = 0; u < n; ++u, slot.next()) {
      if (slot.phase >= k) continue;
      const index_t h = op.rows.source(first + u), to = slot.at;
      if (h < 0) {
        strip.zeros.add() = to;
        continue;
      }
      const bool inside = together > 1 && h == first + u && h + together <= op.rows.in && u + together <= n;
      if (inside)
        for (int i = 1; i < together; ++i, ++u) slot.next();
      strip.steps.add() = {h, to, inside && s == 2 ? this->slot(u - together + 2) : s * phase_pitch};
    }
    return strip;
  }

  void build(Columns<acc>& columns, const acc* taps) const {
    const Axis& axis = op.cols;
    columns.clear();
    if (together > 1) {
      // Rows of one phase side by side.
      const int each = together / s * out_w;
      return columns.template add<T>(0, 1, s * each, (together - 1) * in_pitch + in_w, [&](int i, auto&& visit) INLINED {
        const index_t row = i % each / out_w * s + i / each;
        axis.inputs_of(i % out_w, [&](index_t x, int q) INLINED { visit(row * in_pitch + x, taps[q]); });
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
    const typename Memory::Strip& strip = prepare(m, piece);
    const T* src = this->plane(piece.n, piece.c);
    const Strides& stride = op.src_stride;
    // Asked for on the way: the rows of the next piece.
    const index_t ahead = (cut.strips == 1 ? piece.planes * stride.c : (piece.end - piece.begin) * s * stride.h) * sizeof(T);
    const bool whole = stride.w == 1 && (in_w >= window || piece.roomy);
    for (index_t b = 0; b < m.columns.blocks.size(); ++b) {
      const auto& block = m.columns.blocks[b];
      if (!whole || !block.single) {
        sum_part_by_part(piece, m, strip, block);
        continue;
      }
      const Across across{src,
                          m.buffer.data,
                          piece.planes,
                          stride.c,
                          plane_pitch,
                          stride.h,
                          &strip.steps[0],
                          strip.steps.size(),
                          m.columns.pattern[block.pattern],
                          block.repeats,
                          block.result,
                          m.columns.source_step,
                          m.columns.result_step,
                          ahead,
                          piece.c};
      unrolled<is_tuned<acc>>(across.pattern.terms, [&](auto terms) INLINED {
        // Short rows: half a vector is stored, which costs less where it straddles cache lines.
        if (together > 1 && s == 2) sum_columns<terms, 2>(across, together / 2 * out_w, pre);
        else together == 1 && out_w <= V::lanes / 2 ? sum_columns<terms, 1>(across, 0, pre) : sum_columns<terms, 0>(across, 0, pre);
      });
    }
    for (int q = 0; q < piece.planes; ++q)
      for (index_t i = 0; i < strip.zeros.size(); ++i)
        std::memset(m.buffer.data + q * plane_pitch + strip.zeros[i], 0, out_w * sizeof(acc));

    const Terms<acc> terms{&m.tap[0], this->taps_h(piece.c), k};
    const index_t rows = piece.end - piece.begin;
    const Lines lines =
        pitch == out_w ? Lines{piece.planes, plane_pitch, 1, 0, rows * out_w} : Lines{piece.planes, plane_pitch, rows, pitch, out_w};
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
    for (index_t q = 0; q < a.planes; ++q, plane += a.plane_stride, sums += a.plane_pitch) {
      const auto prepared = pre.row(a.channel + q);
      for (const Step *step = a.steps, *end = step + a.rows; step < end; ++step) {
        const T* p = plane + step->row * a.row_stride;
        acc *to = sums + step->to, *other = HALVES == 2 ? sums + step->other : nullptr;
        for (index_t r = a.repeats; r > 0; --r, p += a.source_step, to += a.result_step) {
          __builtin_prefetch(reinterpret_cast<const char*>(p) + a.ahead, 0, 2);
          if (sizeof(T) > 2) __builtin_prefetch(reinterpret_cast<const char*>(p) + a.ahead + 64, 0, 2);
          const Unit<acc> u = prepared(Lanes<T>::load(p));
          const auto v = sum({in_register(u.a), in_register(u.b)});
          HALVES ? V::store_half(to, v) : V::store(to, v);
          if (HALVES == 2) V::store_half(other, __builtin_shuffle(v, shift));
        }
      }
    }
  }

  // The same where windows end early, where there are several, or where pixels are apart.
  void sum_part_by_part(const Piece& piece, const Memory& m, const typename Memory::Strip& strip,
                        const typename Columns<acc>::Block& block) const {
    const index_t stride = op.src_stride.w;
    for (int q = 0; q < piece.planes; ++q) {
      const auto prepared = pre.row(piece.c + q);
      for (index_t i = 0; i < strip.steps.size(); ++i) {
        const Step& step = strip.steps[i];
        const T* row = this->plane(piece.n, piece.c + q) + step.row * op.src_stride.h;
        acc* sums = m.buffer.data + q * plane_pitch;
        const index_t limit = in_pitch * (min(together, op.rows.in - step.row) - 1) + in_w;
        for (index_t r = 0; r < block.repeats; ++r) {
          typename V::type v{};
          for (index_t w = 0; w < block.patterns; ++w) {
            const Pattern<acc>& pattern = m.columns.pattern[block.pattern + w];
            const index_t x = pattern.base + r * m.columns.source_step, n = min(limit - x, window);
            const T* p = row + x * stride;
            v += pattern.part(prepared(stride != 1  ? gathered(p, stride, n, [](const T* copy) { return Lanes<T>::load(copy); })
                                       : n < window ? Lanes<T>::load(p, n)
                                                    : Lanes<T>::load(p)));
          }
          V::store(sums + step.to + block.result + r * m.columns.result_step, v);
          if (together > 1 && s == 2)
            for (int lane = together / 2 * out_w; lane < V::lanes; ++lane) sums[step.other + lane - together / 2 * out_w] = v[lane];
        }
      }
    }
  }
};

}  // namespace
}  // namespace AF_ISA
}  // namespace aliasfused
