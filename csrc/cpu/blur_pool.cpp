// Blur and subsample, and its adjoint, on a CPU. Both are the same two steps for every row of the result: a weighted sum of
// a few source rows into a buffer that stays in the first-level cache, then a weighted sum of a few of its columns. Which
// rows and columns, and with which taps, is what Axis says of an output (forward) or of an input (adjoint).
//
// A pixel passes through `pre` as it is loaded: pre.row(unit, c) when the lanes of a unit are neighbours of channel c,
// pre.pixel(unit, c) when they are the channels from c on, in the order in which Lanes<T> loads them.
#include "pixels.h"
#include "planes.h"

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
