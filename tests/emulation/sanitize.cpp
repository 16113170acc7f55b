// Runs the emulated kernels on buffers without a spare byte: the sanitizers see each access outside them, and each result
// must have been written.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <type_traits>
#include <vector>

#include "cuda/blur_pool.h"
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
  std::printf("%d cases\n", cases);
}
