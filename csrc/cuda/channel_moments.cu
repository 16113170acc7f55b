// Which kernels of the channel moments run, and with what.
#include "channel_moments.cuh"

#include "channel_moments.h"

namespace aliasfused {
namespace {

enum class Kernel { element, nhwc, nchw };
constexpr const char* names[] = {"element", "nhwc", "nchw"};

constexpr index_t enough_blocks = 132 * 4;  // to fill a large GPU
constexpr index_t least_turns = 2;          // of packs_ahead; for less it is not worth while to merge another share

index_t divide_up(index_t a, index_t b) { return (a + b - 1) / b; }

template <typename scalar_t>
struct Plan {
  static constexpr int V = 16 / static_cast<int>(sizeof(scalar_t));  // 16 bytes are the widest load
  Kernel kernel = Kernel::element;
  Scan scan;
  index_t shares;

  explicit Plan(const ChannelMoments& op) : scan{op.x, op.batch, op.height, op.width, op.channels, op.x_stride} {
    Strides& s = scan.stride;
    join(scan.height, s.h, scan.width, s.w);
    if (scan.height == 1) join(scan.batch, s.n, scan.width, s.w);
    const auto whole = [](index_t size, index_t stride) { return size == 1 || stride % V == 0; };
    const bool aligned = reinterpret_cast<uintptr_t>(op.x) % 16 == 0 && whole(scan.batch, s.n) && whole(scan.height, s.h);
    const bool channels_last = s.c < s.w;
    if (aligned && s.c == 1 && op.channels % V == 0 && whole(scan.width, s.w)) kernel = Kernel::nhwc, scan.columns /= V, s.c = V;
    else if (aligned && s.w == 1 && scan.width % V == 0 && whole(op.channels, s.c)) kernel = Kernel::nchw, scan.width /= V, s.w = V;

    // A block's threads in NHWC: 128 bytes of channels, as in the blurs, then positions.
    const index_t widest = kernel == Kernel::nhwc ? 8 : kernel == Kernel::element && channels_last ? 32 : 1;
    scan.tiles = divide_up(scan.columns, widest);
    scan.tile = static_cast<unsigned>(divide_up(scan.columns, scan.tiles));
    scan.rows = block_threads / scan.tile;
    const index_t turn = scan.rows * (kernel == Kernel::element ? packs_ahead<1> : packs_ahead<V>);
    const index_t positions = scan.batch * scan.height * scan.width, most = divide_up(enough_blocks, scan.tiles);
    scan.share = std::max(least_turns, divide_up(divide_up(positions, most), turn)) * turn;
    shares = divide_up(positions, scan.share);

    scan.jump_w = scan.rows % scan.width, scan.jump_h = scan.rows / scan.width % scan.height;
    scan.jump = scan.rows / scan.width / scan.height * s.n + scan.jump_h * s.h + scan.jump_w * s.w;
    scan.wrap_w = s.h - scan.width * s.w, scan.wrap_h = s.n - scan.height * s.h;
  }

  const char* run(index_t channels, double* parts, void* stream) const {
    const index_t threads = shares * scan.tiles * block_threads;
    switch (kernel) {
      case Kernel::nhwc: return launch(moments_parts<scalar_t, V, V>, threads, stream, scan, parts, channels);
      case Kernel::nchw: return launch(moments_parts<scalar_t, V, 1>, threads, stream, scan, parts, channels);
      default: return launch(moments_parts<scalar_t, 1, 1>, threads, stream, scan, parts, channels);
    }
  }

 private:
  // The outer axis into the inner one, where it continues it.
  static void join(index_t& outer, index_t outer_stride, index_t& inner, index_t& inner_stride) {
    if (inner == 1) inner_stride = outer_stride;
    else if (outer != 1 && outer_stride != inner * inner_stride) return;
    inner *= outer, outer = 1;
  }
};

}  // namespace

index_t channel_moments_scratch(const ChannelMoments& op) {
  index_t shares = 0;
  with_dtype(op.dtype, [&](auto zero) {
    shares = Plan<decltype(zero)>(op).shares;
    return nullptr;
  });
  return shares > 1 ? shares * 3 * op.channels : 0;
}

const char* channel_moments_cuda(const ChannelMoments& op, double* scratch, void* stream) {
  return with_dtype(op.dtype, [&](auto zero) {
    const Plan<decltype(zero)> plan(op);
    const char* error = plan.run(op.channels, plan.shares > 1 ? scratch : op.moments, stream);
    if (error || plan.shares == 1) return error;
    const index_t blocks = divide_up(op.channels, merge_tile);
    return launch(moments_merge, blocks * block_threads, stream, scratch, plan.shares, op.channels, op.moments);
  });
}

const char* channel_moments_cuda_kernel(const ChannelMoments& op) {
  return with_dtype(op.dtype, [&](auto zero) { return names[static_cast<int>(Plan<decltype(zero)>(op).kernel)]; });
}

}  // namespace aliasfused
