// Blur and subsample, and its adjoint, on a CPU. Both are the same two steps for every row of the result: a weighted sum of
// a few source rows, and a weighted sum of a few columns of such sums, which stay in the first-level cache or in registers
// (slide.h); planes.h takes columns first where those are the large map's. Which rows and columns, and with which taps, is what Axis says
// of an output (forward) or of an input (adjoint).
//
// Forward, a pixel passes through `pre` as it is loaded: pre.row(c) is what a unit passes through whose lanes are neighbours of
// channel c, pre.pixel(c) where they are the channels from c on, in the order in which Lanes<T> loads them.
#include "planes.h"
#include "taps_grad.h"

namespace aliasfused {
namespace AF_ISA {
namespace {

struct Identity {
  INLINED Identity row(index_t) const { return {}; }
  INLINED Identity pixel(index_t) const { return {}; }
  template <typename U>
  INLINED U operator()(U u) const {
    return u;
  }
};

// Taps per channel that are the same for all need not be taken channel by channel.
template <typename acc>
bool is_shared(const void* taps, index_t channels, int k) {
  const size_t bytes = k * sizeof(acc);
  const char* p = static_cast<const char*>(taps);
  for (index_t c = 1; c < channels; ++c)
    if (std::memcmp(p, p + c * bytes, bytes)) return false;
  return true;
}

template <typename T>
void blur_pool_of(BlurPool op, const Parallel& parallel) {
  using acc = acc_t<T>;
  if (op.per_channel)
    op.per_channel = !is_shared<acc>(op.taps_h, op.channels, op.rows.taps) || !is_shared<acc>(op.taps_w, op.channels, op.cols.taps);
  const bool pixels = is_pixels(op);
  const Identity pre;
  const index_t rows = op.batch * (op.adjoint ? op.rows.in : op.rows.out);
  const auto run = [&](auto adjoint) {
    if (!pixels) blur_planes<T, adjoint>(op, parallel, pre);
    else if (op.per_channel) blur_pixels_per_channel<T, adjoint>(op, parallel, pre, 0, rows);
    else blur_pixels<T, adjoint>(op, parallel, pre, 0, rows);
  };
  op.adjoint ? run(std::true_type{}) : run(std::false_type{});
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

void blur_rows(const BlurPool& op, index_t begin, index_t end) {
  by_dtype(op.dtype, [&](auto zero) INLINED {
    using T = decltype(zero);
    BlurPool part = op;
    part.dst = static_cast<T*>(op.dst) - begin * op.dst_stride.h;
    const Identity pre;
    op.adjoint ? blur_pixels<T, true>(part, serial, pre, begin, end) : blur_pixels<T, false>(part, serial, pre, begin, end);
  });
}

void taps_grad(const TapsGrad& op, const Parallel& parallel) {
  by_dtype(op.dtype, [&](auto zero) INLINED { taps_grad_of<decltype(zero)>(op, parallel); });
}

}  // namespace AF_ISA
}  // namespace aliasfused
