// Runs the emulated kernels on buffers without a spare byte: the sanitizers see each access outside them, and each result
// must have been written.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <type_traits>
#include <vector>

#include "cuda/act.cuh"
#include "cuda/adaptive_blur_pool.h"
#include "cuda/batch_norm.h"
#include "cuda/blur_pool.h"
#include "cuda/channel_moments.h"
#include "cuda/max_blur_pool.h"
#include "cuda_bf16.h"
#include "cuda_fp16.h"

using namespace aliasfused;

namespace {

// Exactly `count` elements, at the alignment of a GPU allocation and all of one value.
template <typename scalar_t>
struct Buffer {
  scalar_t* data;
  size_t count;
  Buffer(size_t count, float value) : count(count) {
    void* memory = nullptr;
    if (posix_memalign(&memory, 256, count * sizeof(scalar_t)) != 0) std::abort();
    data = static_cast<scalar_t*>(memory);
    for (size_t i = 0; i < count; ++i) data[i] = static_cast<scalar_t>(value);
  }
  ~Buffer() { std::free(data); }
  Buffer(const Buffer&) = delete;
  void expect_written(const char* what) const {
    for (size_t i = 0; i < count; ++i)
      if (std::isnan(static_cast<double>(static_cast<acc_t<scalar_t>>(data[i])))) {
        std::fprintf(stderr, "%s: element %zu was not written\n", what, i);
        std::exit(1);
      }
  }
};

Strides layout(bool channels_last, index_t c, index_t h, index_t w) {
  return channels_last ? Strides{h * w * c, 1, w * c, c} : Strides{c * h * w, h * w, w, 1};
}

int cases = 0;

template <typename scalar_t>
void run(Dtype dtype, index_t c, index_t h, index_t w, int k, int stride, Border border, bool channels_last) {
  using acc = acc_t<scalar_t>;
  const index_t n = 2, before = (k - 1) / 2;
  const Axis rows{h, (h + k - 1 - k) / stride + 1, before, k, stride, border};
  const Axis cols{w, (w + k - 1 - k) / stride + 1, before, k, stride, border};
  const auto elements = [&](index_t rows, index_t cols) { return static_cast<size_t>(n * c * rows * cols); };
  Buffer<acc> taps(k, 1.0f / k), channel_taps(c * k, 1.0f / k);
  for (const bool adjoint : {false, true})
    for (const bool per_channel : {false, true}) {
      const index_t sh = adjoint ? rows.out : h, sw = adjoint ? cols.out : w, dh = adjoint ? h : rows.out, dw = adjoint ? w : cols.out;
      Buffer<scalar_t> src(elements(sh, sw), 1), dst(elements(dh, dw), NAN);
      const acc* used = per_channel ? channel_taps.data : taps.data;
      const Strides from = layout(channels_last, c, sh, sw), to = layout(channels_last, c, dh, dw);
      const BlurPool op{dtype, adjoint, n, c, rows, cols, src.data, dst.data, from, to, used, used, per_channel};
      if (blur_pool_cuda(op, nullptr)) std::abort();
      dst.expect_written(blur_pool_cuda_kernel(op));
      ++cases;
    }
  // A fiber for each thread makes these the slow ones, and they know no K.
  if (k != 3) return;
  for (const int axis : {0, 1}) {
    Buffer<scalar_t> x(elements(h, w), 1), dy(elements(rows.out, cols.out), 1);
    Buffer<acc> dst(c * k, NAN);
    const Strides dy_stride = layout(channels_last, c, rows.out, cols.out), x_stride = layout(channels_last, c, h, w);
    const TapsGrad op{dtype, n, c, rows, cols, axis, dy.data, x.data, dy_stride, x_stride, channel_taps.data, dst.data};
    if (taps_grad_cuda(op, nullptr)) std::abort();
    dst.expect_written("taps_grad");
    ++cases;
  }
}

// A maximum over kh x kw that sees as far beyond x as it may, or as is usual, then a blur of k taps.
template <typename scalar_t>
void run_step(Dtype dtype, Act act, index_t c, index_t h, index_t w, int kh, int kw, int k, int stride, Border border, bool channels_last,
              bool usual = false) {
  using acc = acc_t<scalar_t>;
  const index_t n = 2, before = (k - 1) / 2;
  const auto axis = [&](index_t in) { return Axis{in, (in - 1) / stride + 1, before, k, stride, border}; };
  const int top = usual ? (kh - 1) / 2 : kh - 1, left = usual ? (kw - 1) / 2 : kw - 1;
  const Axis rows = axis(h + 2 * top - kh + 1), cols = axis(w + 2 * left - kw + 1);
  if (rows.in < 1 || cols.in < 1) return;
  const auto elements = [&](index_t rows, index_t cols) { return static_cast<size_t>(n * c * rows * cols); };
  Buffer<acc> taps(k, 1.0f / k), affine(3 * c, 1), correction(2 * c, 1), sums(2 * c, NAN);
  Buffer<scalar_t> x(elements(h, w), 1), y(elements(rows.out, cols.out), NAN), dy(elements(rows.out, cols.out), 1), dx(elements(h, w), NAN);
  const Strides small = layout(channels_last, c, rows.out, cols.out), large = layout(channels_last, c, h, w);
  MaxBlurPool op{};
  op.blur = {dtype, false, n, c, rows, cols, x.data, y.data, large, small, taps.data, taps.data, false};
  op.pre = {act, 0.5, 2, affine.data, kh, kw, top, left, h, w};
  if (max_blur_pool_cuda(op, nullptr, nullptr)) std::abort();
  y.expect_written(max_blur_pool_cuda_kernel(op));
  op.blur.adjoint = true, op.blur.src = dy.data, op.blur.dst = dx.data, op.blur.src_stride = small, op.blur.dst_stride = large;
  op.x = x.data, op.x_stride = large, op.correction = correction.data;
  if (max_blur_pool_cuda(op, nullptr, nullptr)) std::abort();
  dx.expect_written(max_blur_pool_cuda_kernel(op));
  op.blur.dst = nullptr, op.sums = sums.data;
  Buffer<double> scratch(max_blur_pool_scratch(op), NAN);
  if (max_blur_pool_cuda(op, scratch.data, nullptr)) std::abort();
  sums.expect_written(max_blur_pool_cuda_kernel(op)), scratch.expect_written("shares of sums");
  cases += 3;
}

template <typename scalar_t>
void run_moments(Dtype dtype, index_t c, index_t h, index_t w, bool channels_last) {
  const index_t n = 2;
  Buffer<scalar_t> x(static_cast<size_t>(n * c * h * w), 1);
  Buffer<double> moments(3 * c, NAN);
  const ChannelMoments op{dtype, n, c, h, w, x.data, layout(channels_last, c, h, w), moments.data};
  Buffer<double> scratch(channel_moments_scratch(op), NAN);
  if (channel_moments_cuda(op, scratch.data, nullptr)) std::abort();
  moments.expect_written(channel_moments_cuda_kernel(op)), scratch.expect_written("moments_parts");
  ++cases;
}

template <typename scalar_t>
void run_norm(index_t c) {
  const bool wide = sizeof(scalar_t) == 8;
  Buffer<double> moments(3 * c, 2);
  Buffer<scalar_t> row(c, 1), table(3 * c, NAN), mean(c, 1), var(c, 1), correction(2 * c, NAN), dweight(c, NAN), dbias(c, NAN);
  index_t batches = 3;
  const Numbers statistics{moments.data, true}, numbers{row.data, wide}, made{table.data, wide}, none{};
  for (const Numbers& count : {none, numbers})
    if (batch_norm_cuda(BatchNormTable{c, 1, statistics, numbers, count, count, count, made}, nullptr)) std::abort();
  table.expect_written("batch_norm_channels");
  for (const bool average : {false, true})
    if (batch_norm_cuda(BatchNormFollow{c, average, 0.1, statistics, {mean.data, wide}, {var.data, wide}, &batches}, nullptr)) std::abort();
  mean.expect_written("batch_norm_follow"), var.expect_written("batch_norm_follow");
  if (batch_norm_cuda(BatchNormGradient{c, 1, made, statistics, made, {correction.data, wide}, {dweight.data, wide}, {dbias.data, wide}},
                      nullptr))
    std::abort();
  correction.expect_written("batch_norm_channels"), dweight.expect_written("batch_norm_channels");
  dbias.expect_written("batch_norm_channels");
  cases += 5;
}

template <typename scalar_t>
void run_adaptive(Dtype dtype, Normalize normalize, index_t c, int groups, index_t h, index_t w, int k, int stride, Border border,
                  bool channels_last) {
  const index_t n = 2, taps = groups * k * k;
  const auto axis = [&](index_t in) { return Axis{in, (in - 1) / stride + 1, k / 2, k, stride, border}; };
  const Axis rows = axis(h), cols = axis(w);
  const size_t pixels = n * h * w, outputs = n * rows.out * cols.out;
  Buffer<scalar_t> x(c * pixels, 1), dx(c * pixels, NAN), dy(c * outputs, 1), y(c * outputs, NAN);
  Buffer<scalar_t> logits(taps * outputs, 1), dlogits(taps * outputs, NAN), everywhere(taps * pixels, NAN);
  const Strides large = layout(channels_last, c, h, w), small = layout(channels_last, c, rows.out, cols.out);
  const Strides filters = layout(channels_last, taps, rows.out, cols.out);
  AdaptiveBlurPool op{dtype, normalize, AdaptiveResult::y, n,     c, groups, rows, cols, x.data, dy.data, logits.data, y.data,
                      large, small,     filters,           small, 1, 1};
  if (adaptive_blur_pool_cuda(op, nullptr)) std::abort();
  y.expect_written("adaptive_down");
  op.result = AdaptiveResult::dx, op.x = nullptr, op.dst = dx.data, op.dst_stride = large;
  if (adaptive_blur_pool_cuda(op, nullptr)) std::abort();
  dx.expect_written("adaptive_up");
  op.result = AdaptiveResult::dlogits, op.x = x.data, op.dst = dlogits.data, op.dst_stride = filters;
  if (adaptive_blur_pool_cuda(op, nullptr)) std::abort();
  dlogits.expect_written("adaptive_grad");
  op.dst = everywhere.data, op.dst_stride = layout(channels_last, taps, h, w), op.span_h = op.span_w = stride;
  if (adaptive_blur_pool_cuda(op, nullptr)) std::abort();
  everywhere.expect_written("adaptive_grad among zeros");
  cases += 4;
}

}  // namespace

int main() {
  const index_t sizes[][2] = {{1, 1}, {7, 7}, {9, 14}, {5, 32}, {18, 16}};
  int turn = 0;
  for (const auto& size : sizes)
    for (int k = 1; k <= 8; ++k)
      for (const bool channels_last : {false, true})
        for (const int c : {1, 8}) {
          const Border border = static_cast<Border>(turn++ * 5 / 4 % 4);
          run<float>(Dtype::float32, c, size[0], size[1], k, 2, border, channels_last);
          run<__nv_bfloat16>(Dtype::bfloat16, c, size[0], size[1], k, 2, border, channels_last);
          if (k > 3) continue;
          run<__half>(Dtype::float16, c, size[0], size[1], k, 2, border, channels_last);
          run<double>(Dtype::float64, c, size[0], size[1], k, 1 + k % 3, border, channels_last);
        }
  for (const auto& size : sizes)
    for (int act = 0; act < 9; ++act)
      for (const bool channels_last : {false, true}) {
        const Border border = static_cast<Border>(turn++ * 5 / 4 % 4);
        const int kh = 1 + turn % 3, kw = 1 + turn / 3 % 3, k = 1 + turn % 5, stride = 1 + turn % 3;
        run_step<float>(Dtype::float32, static_cast<Act>(act), 3, size[0], size[1], kh, kw, k, stride, border, channels_last);
        run_step<__nv_bfloat16>(Dtype::bfloat16, static_cast<Act>(act), 1, size[0], size[1], kh, kw, k, 2, border, channels_last);
        if (!Straight::is(static_cast<Act>(act))) continue;
        // What kernels are tuned for.
        for (const int window : {1, 2, 3})
          for (const int taps : {2, 3, 4, 5}) {
            run_step<float>(Dtype::float32, static_cast<Act>(act), 4, size[0], size[1], window, window, taps, 2, border, channels_last,
                            true);
            run_step<__nv_bfloat16>(Dtype::bfloat16, static_cast<Act>(act), 8, size[0], size[1], window, window, taps, 2, border,
                                    channels_last, true);
          }
        if (act % 3) continue;
        run_step<__half>(Dtype::float16, static_cast<Act>(act), 2, size[0], size[1], kw, kh, k, 2, border, channels_last);
        run_step<double>(Dtype::float64, static_cast<Act>(act), 2, size[0], size[1], kh, kw, 9, stride, border, channels_last);
      }
  // The last in several shares, whose last is short.
  const index_t maps[][2] = {{1, 1}, {7, 7}, {9, 16}, {60, 144}};
  for (const auto& size : maps)
    for (const bool channels_last : {false, true})
      for (const int c : {1, 3, 8}) {
        run_moments<float>(Dtype::float32, c, size[0], size[1], channels_last);
        run_moments<__nv_bfloat16>(Dtype::bfloat16, c, size[0], size[1], channels_last);
        run_moments<__half>(Dtype::float16, c, size[0], size[1], channels_last);
        run_moments<double>(Dtype::float64, c, size[0], size[1], channels_last);
      }
  for (const int c : {1, 7, 256, 700}) run_norm<float>(c), run_norm<double>(c);
  for (const auto& size : {sizes[0], sizes[1], sizes[2]})
    for (const int k : {3, 5, 9})
      for (const bool channels_last : {false, true}) {
        const Border border = static_cast<Border>(turn++ * 5 / 4 % 4);
        const Normalize normalize = static_cast<Normalize>(turn / 2 % 3);
        const int stride = 1 + turn % 3, groups = 1 + turn % 2;
        run_adaptive<float>(Dtype::float32, normalize, 8, groups, size[0], size[1], k, stride, border, channels_last);
        run_adaptive<__nv_bfloat16>(Dtype::bfloat16, normalize, 16, groups, size[0], size[1], k, stride, border, channels_last);
        if (k > 3) continue;
        run_adaptive<__half>(Dtype::float16, normalize, 6, groups, size[0], size[1], k, stride, border, channels_last);
        run_adaptive<double>(Dtype::float64, normalize, 2, groups, size[0], size[1], k, stride, border, channels_last);
      }
  std::printf("%d cases\n", cases);
}
