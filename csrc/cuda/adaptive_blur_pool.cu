// Which kernels of a blur by predicted filters run, and with what.
#include "adaptive_blur_pool.cuh"

#include <algorithm>

#include "adaptive_blur_pool.h"

namespace aliasfused {
namespace {

constexpr int most_taps = 63;    // along an axis; what reads a row of a tile then has fewer than most_softmaxes
constexpr int most_at_once = 8;  // chunks that neighbouring threads own where channels are neighbours: 128 bytes

constexpr index_t int_limit = 0x7fffffff;

template <typename scalar_t>
constexpr int vector = 16 / static_cast<int>(sizeof(scalar_t));  // 16 bytes are the widest load

index_t divide_up(index_t a, index_t b) { return (a + b - 1) / b; }

// n in pieces of the same size, at most so long.
int piece(index_t n, index_t most) { return static_cast<int>(divide_up(n, divide_up(n, most))); }

// Filters that have kernels of their own. The rest share one in each dtype, as few would notice what more of them bring, and
// everybody how long they take to compile.
bool is_tuned(const AdaptiveBlurPool& op) { return op.dtype != Dtype::float64 && (op.rows.taps == 3 || op.rows.taps == 5); }

// Whether each chunk of a map of this size is a pack of V elements.
template <typename scalar_t>
bool packed(const AdaptiveBlurPool& op, const void* map, const Strides& s, index_t height, index_t width) {
  constexpr int V = vector<scalar_t>;
  const auto whole = [](index_t size, index_t stride) { return size == 1 || stride % V == 0; };
  return reinterpret_cast<uintptr_t>(map) % 16 == 0 && s.c == 1 && whole(op.batch, s.n) && whole(height, s.h) && whole(width, s.w);
}

template <typename scalar_t>
bool packed(const AdaptiveBlurPool& op) {
  if (!is_tuned(op) || op.channels / op.groups % vector<scalar_t> != 0) return false;
  const bool dx = op.result == AdaptiveResult::dx, y = op.result == AdaptiveResult::y;
  return packed<scalar_t>(op, dx ? op.dst : op.x, dx ? op.dst_stride : op.x_stride, op.rows.in, op.cols.in) &&
         packed<scalar_t>(op, y ? op.dst : op.dy, y ? op.dst_stride : op.dy_stride, op.rows.out, op.cols.out);
}

Tile tile_of(const AdaptiveBlurPool& op, int V) {
  const bool dx = op.result == AdaptiveResult::dx, dlogits = op.result == AdaptiveResult::dlogits;
  const bool joint = op.normalize == Normalize::joint;
  const Strides& s = dlogits ? op.x_stride : op.dst_stride;
  Tile tile{};
  tile.channels_last = s.c < s.w;
  tile.channels = static_cast<int>(op.channels / op.groups), tile.chunks = static_cast<int>(divide_up(tile.channels, V));
  tile.lanes = std::min(tile.chunks, tile.channels_last ? most_at_once : most_at_once / 2);
  // Groups share cache lines in NHWC, and a softmax over all of them in every layout.
  tile.groups = tile.channels_last || joint ? std::min(op.groups, most_at_once / tile.lanes) : 1;
  const index_t height = dx ? op.rows.in : op.rows.out, width = dx ? op.cols.in : op.cols.out;
  const int pixels = block_threads / (tile.lanes * tile.groups);
  tile.cols = piece(width, std::min(pixels, tile.channels_last ? 8 : 32));
  tile.rows = piece(height, pixels / tile.cols);
  tile.lanes = std::min(tile.chunks, block_threads / (tile.rows * tile.cols * tile.groups));
  const auto tiles = [](index_t n, int of) { return static_cast<unsigned>(divide_up(n, of)); };
  tile.row_tiles = tiles(height, tile.rows), tile.col_tiles = tiles(width, tile.cols);
  tile.group_tiles = dlogits && joint ? 1 : tiles(op.groups, tile.groups);
  tile.lane_tiles = dlogits ? 1 : tiles(tile.chunks, tile.lanes);
  return tile;
}

template <typename scalar_t, int K, int V, bool PACKED>
const char* run(const AdaptiveBlurPool& op, void* stream) {
  const Tile tile = tile_of(op, V);
  const index_t tiles = index_t{tile.row_tiles} * tile.col_tiles * tile.group_tiles * tile.lane_tiles;
  if (tiles > int_limit) return "too many elements for one launch";
  const index_t threads = op.batch * tiles * block_threads;
  switch (op.result) {
    case AdaptiveResult::y: return launch(adaptive_down<scalar_t, K, V, PACKED>, threads, stream, op, tile);
    case AdaptiveResult::dx: return launch(adaptive_up<scalar_t, K, V, PACKED>, threads, stream, op, tile);
    default: return launch(adaptive_grad<scalar_t, K, V, PACKED>, threads, stream, op, tile);
  }
}

template <typename scalar_t, int V, bool PACKED>
const char* run_tuned(const AdaptiveBlurPool& op, void* stream) {
  return op.rows.taps == 3 ? run<scalar_t, 3, V, PACKED>(op, stream) : run<scalar_t, 5, V, PACKED>(op, stream);
}

}  // namespace

const char* adaptive_blur_pool_cuda(const AdaptiveBlurPool& op, void* stream) {
  if (op.rows.taps > most_taps || op.cols.taps != op.rows.taps) return "filters have k x k taps with k of at most 63";
  if (op.rows.in > int_limit / 4 || op.cols.in > int_limit / 4 || op.channels > int_limit) return "too long an axis for this kernel";
  return with_dtype(op.dtype, [&](auto zero) -> const char* {
    using scalar_t = decltype(zero);
    if constexpr (sizeof(scalar_t) < 8)
      if (is_tuned(op))
        return packed<scalar_t>(op) ? run_tuned<scalar_t, vector<scalar_t>, true>(op, stream) : run_tuned<scalar_t, 8, false>(op, stream);
    return run<scalar_t, 0, sizeof(scalar_t) < 8 ? 8 : 4, false>(op, stream);
  });
}

const char* adaptive_blur_pool_cuda_kernel(const AdaptiveBlurPool& op) {
  return with_dtype(op.dtype, [&](auto zero) { return packed<decltype(zero)>(op) ? "nhwc" : "element"; });
}

}  // namespace aliasfused
