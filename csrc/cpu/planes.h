// Memory in rows (NCHW), piece after piece.
#pragma once

#include "planes_adjoint.h"
#include "planes_forward.h"

namespace aliasfused {
namespace AF_ISA {
namespace {

template <typename T, bool ADJOINT, typename Pre>
void blur_planes(const BlurPool& op, const Parallel& parallel, const Pre& pre) {
  const auto side = [&] {
    if constexpr (ADJOINT) return Adjoint<T>(op);
    else return Forward<T, Pre>(op, pre);
  }();
  using Side = std::remove_cv_t<decltype(side)>;
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
