// Memory in rows (NCHW): the lanes are columns. What both directions share.
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

}  // namespace
}  // namespace AF_ISA
}  // namespace aliasfused
