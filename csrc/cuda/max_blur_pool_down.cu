// Which tuned kernels blur a prepared map, and with what.
#include "blur_pool.cuh"
#include "max_lanes.cuh"
#include "max_tuned.h"
#include "tuned.h"

namespace aliasfused {
namespace {

template <typename scalar_t, int K, int W, typename Pre>
struct Down {
  static constexpr int V = vector<scalar_t>, wide = W == 1 ? V : W == 3 && Pre::early ? 2 : V / 2;
  using Row = std::conditional_t<W == 1, RowDown<scalar_t, K, V / 2, Pre>, MaxRow<scalar_t, K, V / 2, W == 1 ? 2 : W, Pre>>;
  template <int C>
  using Columns = std::conditional_t<W == 1, Channels<scalar_t, K, C, Pre>, MaxChannels<scalar_t, K, C, W == 1 ? 2 : W, Pre>>;

  static MaxKernel kernel(const MaxBlurPool& op) {
    const BlurPool& blur = op.blur;
    const Axis& cols = blur.cols;
    if (!is_tuned<K>(blur.rows) || !is_tuned<K>(cols) || op.pre.width > int_limit / 4 || op.pre.height > int_limit / 4 ||
        op.pre.width * blur.src_stride.w > int_limit || blur.batch * blur.channels * cols.out * (blur.rows.out / most_rows + 1) > int_limit)
      return MaxKernel::any;
    const Map<scalar_t> x{blur.src, blur.src_stride, blur.batch, blur.channels, op.pre.height, op.pre.width};
    const Map<scalar_t> y{blur.dst, blur.dst_stride, blur.batch, blur.channels, blur.rows.out, cols.out};
    const bool usual = cols.before == (K - 1) / 2 && op.pre.left == (W - 1) / 2 && 2 * cols.out == op.pre.width;
    const bool bordered =
        W == 1 || (cols.border != Border::circular && op.pre.width - cols.in <= 1 && cols.in <= op.pre.width && cols.in > K);
    if (usual && bordered && x.packs_columns(V) && y.packs_columns(V / 2)) return MaxKernel::nchw;
    return x.packs_channels(wide) && y.packs_channels(wide) ? MaxKernel::nhwc : MaxKernel::element;
  }

  static Chosen run(const MaxBlurPool& op, const Pre& pre, bool run, void* stream) {
    const MaxKernel found = kernel(op);
    if (!run || found == MaxKernel::any) return {found, nullptr};
    return {found, found == MaxKernel::nchw   ? queue<Row>(op.blur, pre, stream)
                   : found == MaxKernel::nhwc ? queue<Columns<wide>>(op.blur, pre, stream)
                                              : queue<Columns<1>>(op.blur, pre, stream)};
  }

 private:
  template <typename Lane>
  static const char* queue(const BlurPool& blur, const Pre& pre, void* stream) {
    Taps<K> taps;
    std::copy_n(static_cast<const float*>(blur.taps_h), K, taps.h);
    std::copy_n(static_cast<const float*>(blur.taps_w), K, taps.w);
    const index_t tile = blur.dst_stride.c == 1 ? tile_bytes / (Lane::channels == 1 ? 16 : Lane::channels * sizeof(scalar_t)) : 1;
    const Walk walk =
        walk_of(blur.batch, blur.channels / Lane::channels, blur.cols.out / Lane::columns, tile, 0, static_cast<int>(blur.rows.out));
    return launch(blur_down<scalar_t, K, Lane>, walk.threads, stream, blur, taps, walk, pre);
  }
};

template <typename scalar_t, int K, int W>
Chosen with_pre(const MaxBlurPool& op, bool run, void* stream) {
  if (!op.pre.affine && (op.pre.act == Act::none || op.pre.act == Act::relu))
    return Down<scalar_t, K, W, Plain>::run(op, Plain{op.pre}, run, stream);
  return Down<scalar_t, K, W, Affine>::run(op, Affine{op.pre, op.blur.channels}, run, stream);
}

template <typename scalar_t, int K>
Chosen with_window(const MaxBlurPool& op, bool run, void* stream) {
  switch (tuned_window(op.pre)) {
    case 1: return with_pre<scalar_t, K, 1>(op, run, stream);
    case 2: return with_pre<scalar_t, K, 2>(op, run, stream);
    case 3: return with_pre<scalar_t, K, 3>(op, run, stream);
    default: return {};
  }
}

}  // namespace

Chosen max_down(const MaxBlurPool& op, bool run, void* stream) {
  if (!Straight::is(op.pre.act) || op.blur.rows.taps != op.blur.cols.taps) return {};
  Chosen chosen;
  with_dtype(op.blur.dtype, [&](auto zero) -> const char* {
    using scalar_t = decltype(zero);
    if constexpr (sizeof(scalar_t) < 8) {
      if (op.blur.rows.taps == 3) chosen = with_window<scalar_t, 3>(op, run, stream);
      if (op.blur.rows.taps == 4) chosen = with_window<scalar_t, 4>(op, run, stream);
    }
    return nullptr;
  });
  return chosen;
}

}  // namespace aliasfused
