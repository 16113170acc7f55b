// Blurs by predicted filters and their gradients, on a CPU. An item is some rows of an image's results, all channels of them:
// the filters that they want are made once, into memory that a cache holds.
#include "adaptive_pixels.h"
#include "adaptive_planes.h"

namespace aliasfused {
namespace AF_ISA {
namespace {

constexpr index_t filter_bytes = 256 << 10;  // of an item

template <typename T>
void adaptive_blur_pool_of(const AdaptiveBlurPool& op, const Parallel& parallel) {
  const Filters<T> filters{op};
  const bool adjoint = op.result == AdaptiveResult::dx;
  const index_t results = adjoint ? op.rows.in : op.rows.out, stride = adjoint ? op.rows.stride : 1;
  // The same pieces whatever the number of threads; some for every one of them where there are rows enough.
  const index_t fit = max(1, filter_bytes / (filters.elements * index_t(sizeof(acc_t<T>)))) * stride;
  const index_t rows = min(fit, max(stride, op.batch * results / 16)), bands = (results + rows - 1) / rows;
  const auto beside = [](const Strides& s) { return s.c == 1; };
  const bool in_place = op.channels > 1 && (op.result == AdaptiveResult::dlogits || beside(op.dst_stride)) &&
                        (!op.x || beside(op.x_stride)) && (!op.dy || beside(op.dy_stride));
  const bool pixels = 2 * (op.channels / op.groups) >= Vector<acc_t<T>>::lanes;  // groups with channels enough for vectors
  const auto each = [&](auto& side) {
    return [&](index_t begin, index_t end) {
      for (index_t item = begin; item < end; ++item) {
        const index_t lo = item % bands * rows;
        side.run(item / bands, lo, min(lo + rows, results));
      }
    };
  };
  parallel(op.batch * bands, 1, [&](index_t begin, index_t end) {
    // dx wants the filters of every output that reads its rows: in the worst case, of borders far away, all there are.
    const index_t reach = (rows + 2 * op.rows.taps) / op.rows.stride + 2;
    const index_t most = adjoint ? min(op.rows.out, 3 * reach + 2 * op.rows.taps + (op.rows.before >= op.rows.in ? op.rows.out : 0)) : rows;
    if (in_place) {
      AdaptivePixels<T, T> side{op, filters, most};
      each(side)(begin, end);
    } else if (pixels) {
      AdaptivePixels<T, acc_t<T>> side{op, filters, most};
      each(side)(begin, end);
    } else {
      AdaptivePlanes<T> side{op, filters, most, rows};
      each(side)(begin, end);
    }
  });
}

}  // namespace

void adaptive_blur_pool(const AdaptiveBlurPool& op, const Parallel& parallel) {
  switch (op.dtype) {
    case Dtype::float32: return adaptive_blur_pool_of<float>(op, parallel);
    case Dtype::bfloat16: return adaptive_blur_pool_of<bfloat16>(op, parallel);
    case Dtype::float16: return adaptive_blur_pool_of<float16>(op, parallel);
    case Dtype::float64: return adaptive_blur_pool_of<double>(op, parallel);
  }
}

}  // namespace AF_ISA
}  // namespace aliasfused
