// The emulated CUDA kernels as a Python module: addresses and numbers in, memory written.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cmath>
#include <stdexcept>
#include <tuple>

#include "cuda/adaptive_blur_pool.h"
#include "cuda/batch_norm.h"
#include "cuda/blur_pool.h"
#include "cuda/channel_moments.h"
#include "cuda/max_blur_pool.h"
#include "cuda_bf16.h"
#include "cuda_fp16.h"

using namespace aliasfused;

namespace {

Axis axis_of(const std::array<index_t, 6>& a) {
  return {a[0], a[1], a[2], static_cast<int>(a[3]), static_cast<int>(a[4]), static_cast<Border>(a[5])};
}

Strides strides_of(const std::array<index_t, 4>& s) { return {s[0], s[1], s[2], s[3]}; }

void check(const char* error) {
  if (error) throw std::runtime_error(error);
}

void* at(uintptr_t address) { return reinterpret_cast<void*>(address); }

ChannelMoments moments_of(int dtype, const std::array<index_t, 4>& shape, uintptr_t x, const std::array<index_t, 4>& stride) {
  return {static_cast<Dtype>(dtype), shape[0], shape[1], shape[2], shape[3], at(x), strides_of(stride), nullptr};
}

// An address and whether it is of float64.
using Row = std::pair<uintptr_t, bool>;
Numbers numbers(const Row& row) { return {at(row.first), row.second}; }

}  // namespace

PYBIND11_MODULE(emulated, m) {
  m.def("blur_pool", [](int dtype, bool adjoint, index_t batch, index_t channels, std::array<index_t, 6> rows, std::array<index_t, 6> cols,
                        uintptr_t src, uintptr_t dst, std::array<index_t, 4> src_stride, std::array<index_t, 4> dst_stride,
                        uintptr_t taps_h, uintptr_t taps_w, bool per_channel) {
    const BlurPool op{static_cast<Dtype>(dtype),
                      adjoint,
                      batch,
                      channels,
                      axis_of(rows),
                      axis_of(cols),
                      at(src),
                      at(dst),
                      strides_of(src_stride),
                      strides_of(dst_stride),
                      at(taps_h),
                      at(taps_w),
                      per_channel};
    check(blur_pool_cuda(op, nullptr));
    return blur_pool_cuda_kernel(op);
  });
  m.def("taps_grad",
        [](int dtype, index_t batch, index_t channels, std::array<index_t, 6> rows, std::array<index_t, 6> cols, int axis, uintptr_t dy,
           uintptr_t x, std::array<index_t, 4> dy_stride, std::array<index_t, 4> x_stride, uintptr_t other, uintptr_t dst) {
          check(taps_grad_cuda({static_cast<Dtype>(dtype), batch, channels, axis_of(rows), axis_of(cols), axis, at(dy), at(x),
                                strides_of(dy_stride), strides_of(x_stride), at(other), at(dst)},
                               nullptr));
        });
  // act: which, and its two numbers; window: the maximum's height and width, what it sees above and left of x, x's height, width.
  m.def("max_blur_pool", [](int dtype, bool adjoint, index_t batch, index_t channels, std::array<index_t, 6> rows,
                            std::array<index_t, 6> cols, uintptr_t src, uintptr_t dst, std::array<index_t, 4> src_stride,
                            std::array<index_t, 4> dst_stride, uintptr_t taps_h, uintptr_t taps_w, std::tuple<int, double, double> act,
                            uintptr_t affine, std::array<index_t, 6> window, uintptr_t x, std::array<index_t, 4> x_stride,
                            uintptr_t correction, uintptr_t sums) {
    MaxBlurPool op{};
    op.blur = {
        static_cast<Dtype>(dtype), adjoint,    batch,      channels, axis_of(rows), axis_of(cols), at(src), at(dst), strides_of(src_stride),
        strides_of(dst_stride),    at(taps_h), at(taps_w), false};
    op.pre = {static_cast<Act>(std::get<0>(act)), std::get<1>(act), std::get<2>(act), at(affine), static_cast<int>(window[0]),
              static_cast<int>(window[1]),        window[2],        window[3],        window[4],  window[5]};
    op.x = at(x), op.x_stride = strides_of(x_stride), op.correction = at(correction), op.sums = at(sums);
    std::vector<double> scratch(max_blur_pool_scratch(op), std::nan(""));
    check(max_blur_pool_cuda(op, scratch.data(), nullptr));
    return max_blur_pool_cuda_kernel(op);
  });
  m.def("channel_moments_scratch", [](int dtype, std::array<index_t, 4> shape, uintptr_t x, std::array<index_t, 4> stride) {
    return channel_moments_scratch(moments_of(dtype, shape, x, stride));
  });
  m.def("channel_moments",
        [](int dtype, std::array<index_t, 4> shape, uintptr_t x, std::array<index_t, 4> stride, uintptr_t moments, uintptr_t scratch) {
          ChannelMoments op = moments_of(dtype, shape, x, stride);
          op.moments = static_cast<double*>(at(moments));
          check(channel_moments_cuda(op, static_cast<double*>(at(scratch)), nullptr));
          return channel_moments_cuda_kernel(op);
        });
  // mean, var, count, weight, bias, table
  m.def("batch_norm_table", [](index_t channels, double eps, std::array<Row, 6> rows) {
    check(batch_norm_cuda(BatchNormTable{channels, eps, numbers(rows[0]), numbers(rows[1]), numbers(rows[2]), numbers(rows[3]),
                                         numbers(rows[4]), numbers(rows[5])},
                          nullptr));
  });
  // moments, mean, var
  m.def("batch_norm_follow", [](index_t channels, bool average, double momentum, std::array<Row, 3> rows, uintptr_t batches) {
    check(batch_norm_cuda(BatchNormFollow{channels, average, momentum, numbers(rows[0]), numbers(rows[1]), numbers(rows[2]),
                                          static_cast<index_t*>(at(batches))},
                          nullptr));
  });
  // sums, moments, table, correction, dweight, dbias
  m.def("batch_norm_gradient", [](index_t channels, double eps, std::array<Row, 6> rows) {
    check(batch_norm_cuda(BatchNormGradient{channels, eps, numbers(rows[0]), numbers(rows[1]), numbers(rows[2]), numbers(rows[3]),
                                            numbers(rows[4]), numbers(rows[5])},
                          nullptr));
  });
  // normalize and result by their numbers in csrc/adaptive_blur_pool.h; what is not read has no address.
  m.def("adaptive_blur_pool", [](int dtype, int normalize, int result, index_t batch, index_t channels, int groups,
                                 std::array<index_t, 6> rows, std::array<index_t, 6> cols, uintptr_t x, uintptr_t dy, uintptr_t logits,
                                 uintptr_t dst, std::array<index_t, 4> x_stride, std::array<index_t, 4> dy_stride,
                                 std::array<index_t, 4> logits_stride, std::array<index_t, 4> dst_stride, std::array<int, 2> span) {
    const AdaptiveBlurPool op{static_cast<Dtype>(dtype),
                              static_cast<Normalize>(normalize),
                              static_cast<AdaptiveResult>(result),
                              batch,
                              channels,
                              groups,
                              axis_of(rows),
                              axis_of(cols),
                              at(x),
                              at(dy),
                              at(logits),
                              at(dst),
                              strides_of(x_stride),
                              strides_of(dy_stride),
                              strides_of(logits_stride),
                              strides_of(dst_stride),
                              span[0],
                              span[1]};
    check(adaptive_blur_pool_cuda(op, nullptr));
    return adaptive_blur_pool_cuda_kernel(op);
  });
  m.def("to_half", [](float v) { return static_cast<float>(__half(v)); });
  m.def("to_bfloat16", [](float v) { return static_cast<float>(__nv_bfloat16(v)); });
}
