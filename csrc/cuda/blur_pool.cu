// Which blur kernel runs, and with what.
#include "blur_pool.cuh"

#include <algorithm>
#include <initializer_list>
#include <utility>

#include "blur_pool.h"

namespace aliasfused {
namespace {

enum class Kernel { any, element, nhwc, nchw_pair, nchw };
constexpr const char* names[] = {"any", "element", "nhwc", "nchw_pair", "nchw"};

constexpr int most_rows = 16;                // of a strip; a strip begins by reading K - 2 rows that its neighbour reads too
constexpr index_t enough_threads = 1 << 17;  // to fill a large GPU
constexpr index_t int_limit = 0x7fffffff;

template <typename scalar_t>
constexpr int vector = 16 / static_cast<int>(sizeof(scalar_t));  // 16 bytes are the widest load

index_t dst_height(const BlurPool& op) { return op.adjoint ? op.rows.in : op.rows.out; }
index_t dst_width(const BlurPool& op) { return op.adjoint ? op.cols.in : op.cols.out; }

// The rows that a Walk counts: of y, and for the adjoint pairs of rows 2 i - before and its successor.
int first_row(const BlurPool& op) { return op.adjoint ? static_cast<int>(op.rows.before / 2) : 0; }
int end_row(const BlurPool& op) { return static_cast<int>(op.adjoint ? (op.rows.in - 1 + op.rows.before) / 2 + 1 : op.rows.out); }

// Whether packs of n elements, along the channels or along a row, lie aligned in one of the two maps.
template <typename scalar_t>
bool packed(const BlurPool& op, bool map_x, bool channels, int n) {
  const bool is_src = map_x != op.adjoint;
  const Strides& s = is_src ? op.src_stride : op.dst_stride;
  const auto whole = [n](index_t size, index_t stride) { return size == 1 || stride % n == 0; };
  return reinterpret_cast<uintptr_t>(is_src ? op.src : op.dst) % (n * sizeof(scalar_t)) == 0 && whole(op.batch, s.n) &&
         whole(map_x ? op.rows.in : op.rows.out, s.h) && (channels ? s.c : s.w) == 1 &&
         (channels ? whole(map_x ? op.cols.in : op.cols.out, s.w) && op.channels % n == 0 : whole(op.channels, s.c));
}

// Whether RowDown or RowUp of P can run: the usual padding, and rows that are whole packs.
template <typename scalar_t>
bool row_packed(const BlurPool& op, int pairs) {
  return op.cols.before == (op.cols.taps - 1) / 2 && 2 * op.cols.out == op.cols.in && op.cols.out % pairs == 0 &&
         packed<scalar_t>(op, true, false, 2 * pairs) && (op.adjoint || packed<scalar_t>(op, false, false, pairs));
}

// What the kernels of K taps and stride 2 are told.
template <typename scalar_t, int K>
struct Tuned {
  Kernel kernel = Kernel::any;
  Taps<K> taps;
  Stencils<K> rows, cols;

  explicit Tuned(const BlurPool& op) {
    for (const Axis* axis : {&op.rows, &op.cols})
      if (axis->stride != 2 || axis->before >= K || axis->last() - axis->in >= K || axis->in > int_limit / 4) return;
    const index_t src_width = op.adjoint ? op.cols.out : op.cols.in, strips = (end_row(op) - first_row(op) + most_rows - 1) / most_rows;
    if (src_width * op.src_stride.w > int_limit || op.batch * op.channels * dst_width(op) * strips > int_limit) return;
    std::copy_n(static_cast<const float*>(op.taps_h), K, taps.h);
    std::copy_n(static_cast<const float*>(op.taps_w), K, taps.w);
    if (op.adjoint && !(rows.build(op.rows, taps.h) && cols.build(op.cols, taps.w))) return;
    constexpr int V = vector<scalar_t>;
    if (row_packed<scalar_t>(op, V / 2)) kernel = Kernel::nchw;
    else if (packed<scalar_t>(op, true, true, V) && packed<scalar_t>(op, false, true, V)) kernel = Kernel::nhwc;
    else if (row_packed<scalar_t>(op, 1)) kernel = Kernel::nchw_pair;
    else kernel = Kernel::element;
  }

  const char* run(const BlurPool& op, void* stream) const {
    constexpr int N = Stencils<K>::size, V = vector<scalar_t>;
    switch (kernel) {
      case Kernel::nchw: return run_lanes<RowDown<scalar_t, K, V / 2>, RowUp<scalar_t, K, V / 2>>(op, stream);
      case Kernel::nhwc: return run_lanes<Channels<scalar_t, K, V>, Channels<scalar_t, N, V>>(op, stream);
      case Kernel::nchw_pair: return run_lanes<RowDown<scalar_t, K, 1>, RowUp<scalar_t, K, 1>>(op, stream);
      default: return run_lanes<Channels<scalar_t, K, 1>, Channels<scalar_t, N, 1>>(op, stream);
    }
  }

 private:
  template <typename Down, typename Up>
  const char* run_lanes(const BlurPool& op, void* stream) const {
    if (!op.adjoint) {
      const Walk walk = walk_of<Down>(op);
      return launch(blur_down<scalar_t, K, Down, Identity>, walk.threads, stream, op, taps, walk, Identity{});
    }
    const Walk walk = walk_of<Up>(op);
    return launch(blur_up<scalar_t, K, Up, Identity>, walk.threads, stream, op, rows, cols, walk, Identity{});
  }

  template <typename Lane>
  static Walk walk_of(const BlurPool& op) {
    const index_t channels = op.channels / Lane::channels, columns = dst_width(op) / Lane::columns;
    const index_t across = op.batch * channels * columns, height = end_row(op) - first_row(op);
    // 8 threads are 128 bytes of channels; more would leave fewer columns, and less to share, to a block.
    const index_t tile = op.dst_stride.c != 1 ? 1 : channels % 8 == 0 ? 8 : channels;
    index_t strips = (height + most_rows - 1) / most_rows;
    while (across * strips < enough_threads && 4 * strips <= height) strips *= 2;
    const index_t rows = (height + strips - 1) / strips;
    strips = (height + rows - 1) / rows;
    const auto narrow = [](index_t value) { return static_cast<uint32_t>(value); };
    return {narrow(tile),  narrow(columns), narrow(channels / tile), narrow(strips), narrow(across * strips),
            first_row(op), end_row(op),     static_cast<int>(rows)};
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
