// Which blur kernel runs, and with what.
#include "blur_pool.cuh"

#include <utility>

#include "blur_pool.h"
#include "tuned.h"

namespace aliasfused {
namespace {

enum class Kernel { any, element, nhwc, nchw_pair, nchw };
constexpr const char* names[] = {"any", "element", "nhwc", "nchw_pair", "nchw"};

index_t dst_height(const BlurPool& op) { return op.adjoint ? op.rows.in : op.rows.out; }
index_t dst_width(const BlurPool& op) { return op.adjoint ? op.cols.in : op.cols.out; }

// What the kernels of K taps and stride 2 are told.
template <typename scalar_t, int K>
struct Tuned {
  static constexpr int ODD = K | 1, V = vector<scalar_t>;
  Kernel kernel = Kernel::any;
  Taps<K> taps;
  Stencils<ODD> rows, cols;

  explicit Tuned(const BlurPool& op) {
    if (!is_tuned<K>(op.rows) || !is_tuned<K>(op.cols)) return;
    const index_t src_width = op.adjoint ? op.cols.out : op.cols.in, strips = (dst_height(op) + 1) / most_rows + 1;
    if (src_width * op.src_stride.w > int_limit || op.batch * op.channels * dst_width(op) * strips > int_limit) return;
    std::copy_n(static_cast<const float*>(op.taps_h), K, taps.h);
    std::copy_n(static_cast<const float*>(op.taps_w), K, taps.w);
    if (op.adjoint && !(rows.build(op.rows, taps.h) && cols.build(op.cols, taps.w))) return;
    const Map<scalar_t> x{
        op.adjoint ? op.dst : op.src, op.adjoint ? op.dst_stride : op.src_stride, op.batch, op.channels, op.rows.in, op.cols.in};
    const Map<scalar_t> y{
        op.adjoint ? op.src : op.dst, op.adjoint ? op.src_stride : op.dst_stride, op.batch, op.channels, op.rows.out, op.cols.out};
    // Whether RowDown or RowUp of so many pairs can run: the usual padding, and rows that are whole packs.
    const auto rows_of_pairs = [&](int pairs) {
      return op.cols.before == (K - 1) / 2 && 2 * op.cols.out == op.cols.in && x.packs_columns(2 * pairs) &&
             (op.adjoint || y.packs_columns(pairs));
    };
    if (rows_of_pairs(V / 2)) kernel = Kernel::nchw;
    else if (x.packs_channels(V) && y.packs_channels(V)) kernel = Kernel::nhwc;
    else if (rows_of_pairs(1)) kernel = Kernel::nchw_pair;
    else kernel = Kernel::element;
  }

  const char* run(const BlurPool& op, void* stream) const {
    constexpr int N = ODD / 2 + 1;
    switch (kernel) {
      case Kernel::nchw: return run_lanes<RowDown<scalar_t, K, V / 2>, RowUp<scalar_t, ODD, V / 2>>(op, stream);
      case Kernel::nhwc: return run_lanes<Channels<scalar_t, K, V>, Channels<scalar_t, N, V>>(op, stream);
      case Kernel::nchw_pair: return run_lanes<RowDown<scalar_t, K, 1>, RowUp<scalar_t, ODD, 1>>(op, stream);
      default: return run_lanes<Channels<scalar_t, K, 1>, Channels<scalar_t, N, 1>>(op, stream);
    }
  }

 private:
  template <typename Down, typename Up>
  const char* run_lanes(const BlurPool& op, void* stream) const {
    if (!op.adjoint) {
      const Walk walk = walk_of<Down>(op, 0, static_cast<int>(op.rows.out));
      return launch(blur_down<scalar_t, K, Down>, walk.threads, stream, op, taps, walk, Identity{});
    }
    const Walk walk = walk_of<Up>(op, rows.first_pair(), rows.end_pair());
    return launch(blur_up<scalar_t, ODD, Up>, walk.threads, stream, op, rows, cols, walk);
  }

  template <typename Lane>
  static Walk walk_of(const BlurPool& op, int first, int end) {
    const index_t tile = op.dst_stride.c == 1 ? tile_bytes / 16 : 1;
    return aliasfused::walk_of(op.batch, op.channels / Lane::channels, dst_width(op) / Lane::columns, tile, first, end);
  }
};

// call(integral_constant K) for the filter lengths that have kernels of their own; false for other ops.
template <typename Call, int... I>
bool with_taps(const BlurPool& op, Call&& call, std::integer_sequence<int, I...>) {
  if (op.dtype == Dtype::float64 || op.per_channel || op.rows.taps != op.cols.taps) return false;
  return ((op.rows.taps == I + 2 && (call(std::integral_constant<int, I + 2>{}), true)) || ...);
}
using TunedTaps = std::make_integer_sequence<int, 6>;  // 2 ... 7

template <typename scalar_t, typename Call>
bool with_tuned(const BlurPool& op, Call&& call) {
  if constexpr (sizeof(scalar_t) == 8) return false;
  else return with_taps(op, [&](auto k) { call(Tuned<scalar_t, decltype(k)::value>(op)); }, TunedTaps{});
}

template <typename scalar_t, typename T>
const char* run_any(const BlurPool& op, const T& taps, void* stream) {
  const index_t items = op.batch * op.channels * dst_height(op) * dst_width(op);
  return launch(op.adjoint ? blur_any<scalar_t, true, T, Identity> : blur_any<scalar_t, false, T, Identity>, items, stream, op, taps,
                Identity{});
}

}  // namespace

const char* blur_pool_cuda(const BlurPool& op, void* stream) {
  return with_dtype(op.dtype, [&](auto zero) -> const char* {
    using scalar_t = decltype(zero);
    using acc = acc_t<scalar_t>;
    if (op.per_channel) {
      const ChannelTaps<acc> taps{static_cast<const acc*>(op.taps_h), static_cast<const acc*>(op.taps_w), op.rows.taps, op.cols.taps};
      return run_any<scalar_t>(op, taps, stream);
    }
    const char* error = nullptr;
    bool done = false;
    with_tuned<scalar_t>(op, [&](const auto& tuned) {
      done = tuned.kernel != Kernel::any;
      if (done) error = tuned.run(op, stream);
    });
    if (done) return error;
    return with_shared_taps<acc>(op, [&](const auto& taps) { return run_any<scalar_t>(op, taps, stream); });
  });
}

const char* taps_grad_cuda(const TapsGrad& op, void* stream) {
  const index_t numbers = op.channels * (op.axis == 0 ? op.rows.taps : op.cols.taps);
  return with_dtype(
      op.dtype, [&](auto zero) { return launch(taps_grad<decltype(zero), Identity>, numbers * block_threads, stream, op, Identity{}); });
}

const char* blur_pool_cuda_kernel(const BlurPool& op) {
  return with_dtype(op.dtype, [&](auto zero) {
    Kernel kernel = Kernel::any;
    with_tuned<decltype(zero)>(op, [&](const auto& tuned) { kernel = tuned.kernel; });
    return names[static_cast<int>(kernel)];
  });
}

}  // namespace aliasfused
