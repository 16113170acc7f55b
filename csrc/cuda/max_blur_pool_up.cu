// Which tuned kernels find gradients through a prepared map, and with what.
#include "max_up.cuh"

#include "max_tuned.h"
#include "tuned.h"

namespace aliasfused {
namespace {

constexpr index_t divide_up(index_t a, index_t b) { return (a + b - 1) / b; }

// A window of several pixels is looked at for each of the columns that a thread owns and W - 1 more; what it keeps of them lives in
// registers, so that the wider the window the fewer are owned.
template <typename scalar_t, int K, int W>
struct Up {
  static constexpr int V = vector<scalar_t>;
  static constexpr int row = W == 1 ? V : W == 2 ? 4 : V / 2, channels = W == 1 ? 4 : 2, columns = W == 2 ? 2 : 1;
  MaxKernel kernel = MaxKernel::any;
  Stencils<K> rows, cols;
  Walk walk;
  index_t shares = 0;

  explicit Up(const MaxBlurPool& op) {
    const BlurPool& blur = op.blur;
    const Prologue& pre = op.pre;
    const int taps = blur.cols.taps;
    if (!is_tuned<K>(blur.rows) || !is_tuned<K>(blur.cols) || pre.width > int_limit / 4 || pre.height > int_limit / 4 ||
        pre.width * op.x_stride.w > int_limit || blur.cols.out * blur.src_stride.w > int_limit ||
        blur.batch * blur.channels * pre.width * (pre.height / most_rows + 1) > int_limit ||
        !rows.build(blur.rows, static_cast<const float*>(blur.taps_h)) || !cols.build(blur.cols, static_cast<const float*>(blur.taps_w)))
      return;
    const Map<scalar_t> x{op.x, op.x_stride, blur.batch, blur.channels, pre.height, pre.width};
    const Map<scalar_t> dx{
        op.sums ? op.x : blur.dst, op.sums ? op.x_stride : blur.dst_stride, blur.batch, blur.channels, pre.height, pre.width};
    const Map<scalar_t> dy{blur.src, blur.src_stride, blur.batch, blur.channels, blur.rows.out, blur.cols.out};
    const bool usual = blur.cols.before == (taps - 1) / 2 && pre.left == (W - 1) / 2;
    if (usual && x.packs_columns(row) && dx.packs_columns(row)) kernel = MaxKernel::nchw;
    else if (x.packs_channels(channels) && dx.packs_channels(channels) && dy.packs_channels(channels)) kernel = MaxKernel::nhwc;
    else kernel = MaxKernel::element;

    const int c = kernel == MaxKernel::nhwc ? channels : 1, p = kernel == MaxKernel::nhwc ? columns : kernel == MaxKernel::nchw ? row : 1;
    const index_t tile = dx.stride.c == 1 ? tile_bytes / (c == 1 ? 16 : c * sizeof(scalar_t)) : 1, groups = blur.channels / c;
    const int first = static_cast<int>((pre.top + rows.before) / 2),
              end = static_cast<int>((pre.height - 1 + pre.top + rows.before) / 2) + 1;
    walk = walk_of(blur.batch, groups, divide_up(pre.width, p), tile, first, end);
    if (!op.sums) return;
    walk.tile = static_cast<uint32_t>(std::min(tile, groups)), walk.tiles = static_cast<uint32_t>(divide_up(groups, walk.tile));
    walk.channels = static_cast<uint32_t>(groups), walk.positions = walk.threads / walk.channels;
    walk.in_block = block_threads / walk.tile, shares = divide_up(walk.positions, walk.in_block);
  }

  const char* run(const MaxBlurPool& op, double* parts, void* stream) const {
    switch (kernel) {
      case MaxKernel::nchw: return queue<1, row>(op, parts, stream);
      case MaxKernel::nhwc: return queue<channels, columns>(op, parts, stream);
      default: return queue<1, 1>(op, parts, stream);
    }
  }

 private:
  template <int C, int P>
  const char* queue(const MaxBlurPool& op, double* parts, void* stream) const {
    if (!op.sums) return launch(max_up<scalar_t, K, W, C, P>, walk.threads, stream, op, rows, cols, walk, static_cast<double*>(nullptr));
    const char* error = launch(max_up<scalar_t, K, W, C, P>, shares * walk.tiles * block_threads, stream, op, rows, cols, walk, parts);
    if (error) return error;
    const index_t count = 2 * op.blur.channels;
    return launch(sum_parts, divide_up(count, 8) * block_threads, stream, parts, shares, count, static_cast<float*>(op.sums));
  }
};

// call(what kernels are told), where there are any for this op.
template <typename Call>
void with_up(const MaxBlurPool& op, Call&& call) {
  const int taps = op.blur.rows.taps;
  if (!Straight::is(op.pre.act) || taps != op.blur.cols.taps || taps < 2 || taps > 5) return;
  with_dtype(op.blur.dtype, [&](auto zero) -> const char* {
    using scalar_t = decltype(zero);
    if constexpr (sizeof(scalar_t) < 8) {
      const auto with_taps = [&](auto k) {
        constexpr int K = decltype(k)::value;
        switch (tuned_window(op.pre)) {
          case 1: return call(Up<scalar_t, K, 1>(op));
          case 2: return call(Up<scalar_t, K, 2>(op));
          case 3: return call(Up<scalar_t, K, 3>(op));
        }
      };
      if (taps <= 3) with_taps(std::integral_constant<int, 3>{});
      else with_taps(std::integral_constant<int, 5>{});
    }
    return nullptr;
  });
}

}  // namespace

Chosen max_up(const MaxBlurPool& op, bool run, double* scratch, void* stream) {
  Chosen chosen;
  with_up(op, [&](const auto& up) {
    chosen.kernel = up.kernel;
    if (run && up.kernel != MaxKernel::any) chosen.error = up.run(op, scratch, stream);
  });
  return chosen;
}

index_t max_up_scratch(const MaxBlurPool& op) {
  index_t size = 0;
  if (op.sums) with_up(op, [&](const auto& up) { size = up.shares * 2 * op.blur.channels; });
  return size;
}

}  // namespace aliasfused
