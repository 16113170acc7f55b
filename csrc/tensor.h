// The only header that knows torch's stable ABI: checks, outputs in the input's memory format, threads.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <string>
#include <vector>

#include "blur_pool.h"

namespace aliasfused {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline Dtype dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return Dtype::float32;
    case ScalarType::BFloat16: return Dtype::bfloat16;
    case ScalarType::Half: return Dtype::float16;
    case ScalarType::Double: return Dtype::float64;
    default: STD_TORCH_CHECK(false, "aliasfused: the tensor must be float32, bfloat16, float16 or float64");
  }
}

inline Strides strides_of(const Tensor& t) { return {t.stride(0), t.stride(1), t.stride(2), t.stride(3)}; }

// Whether torch would call a 4-D tensor's memory format channels_last (Tensor::suggest_memory_format).
inline bool is_channels_last(const Tensor& t) {
  if (t.stride(1) == 0) return false;
  int64_t least = 0;
  for (const int d : {1, 3, 2, 0}) {
    if (t.size(d) == 0 || t.stride(d) < least) return false;
    if (d == 0 && least == t.stride(1)) return false;
    least = t.stride(d) * t.size(d);
  }
  return true;
}

// An uninitialised 4-D tensor of the dtype and device of `like`.
inline Tensor empty_4d(const Tensor& like, int64_t n, int64_t c, int64_t h, int64_t w, bool channels_last) {
  // As torch does it: where there is nothing to address, contiguous strides count sizes of zero as one.
  const auto at_least_1 = [](int64_t size) { return size > 1 ? size : 1; };
  const std::array<int64_t, 4> sizes{n, c, h, w};
  const std::array<int64_t, 4> strides = channels_last ? std::array<int64_t, 4>{h * w * c, 1, w * c, c}
                                                       : std::array<int64_t, 4>{at_least_1(c) * at_least_1(h) * at_least_1(w),
                                                                                at_least_1(h) * at_least_1(w), at_least_1(w), 1};
  int32_t dtype, device_type, device_index;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(like.get(), &dtype));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &device_index));
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(4, sizes.data(), strides.data(), dtype, device_type, device_index, &handle));
  return Tensor(handle);
}

inline Border border_of(const std::string& pad_mode) {
  if (pad_mode == "reflect") return Border::reflect;
  if (pad_mode == "replicate") return Border::replicate;
  if (pad_mode == "circular") return Border::circular;
  STD_TORCH_CHECK(pad_mode == "zeros", "aliasfused: pad_mode must be 'reflect', 'replicate', 'zeros' or 'circular', got '", pad_mode, "'");
  return Border::zeros;
}

// One axis of a blur from what the op was told; the raw ops are public, so they check for themselves.
inline Axis axis_of(const char* name, int64_t in, int64_t before, int64_t after, int64_t taps, int64_t stride, Border border) {
  STD_TORCH_CHECK(in >= 1 && taps >= 1 && stride >= 1 && before >= 0 && after >= 0 && taps < (1 << 30) && stride < (1 << 30),
                  "aliasfused: ", name, " of ", in, " with padding (", before, ", ", after, "), ", taps, " taps and stride ", stride,
                  " is not a blur: all must be at least 1, the padding at least 0");
  STD_TORCH_CHECK(in + before + after >= taps, "aliasfused: ", name, " of ", in, " with padding (", before, ", ", after,
                  ") is shorter than the ", taps, " taps");
  return {in, (in + before + after - taps) / stride + 1, before, static_cast<int>(taps), static_cast<int>(stride), border};
}

using Ints = std::vector<int64_t>;

// Both axes of a blur of h x w pixels.
struct Geometry {
  Axis rows, cols;
  Geometry(int64_t h, int64_t w, int64_t kh, int64_t kw, const Ints& stride, const Ints& padding, const std::string& pad_mode)
      : rows(), cols() {
    STD_TORCH_CHECK(stride.size() == 2 && padding.size() == 4, "aliasfused: stride must be (h, w) and padding (left, right, top, bottom)");
    const Border border = border_of(pad_mode);
    rows = axis_of("height", h, padding[2], padding[3], kh, stride[0], border);
    cols = axis_of("width", w, padding[0], padding[1], kw, stride[1], border);
  }
};

// Taps that are numbers, as kernels take them: on the host, in the accumulation type.
struct HostTaps {
  std::vector<float> single;
  const void* data;
  HostTaps(const std::vector<double>& taps, Dtype dtype) : single(taps.begin(), taps.end()) {
    data = dtype == Dtype::float64 ? static_cast<const void*>(taps.data()) : single.data();
  }
};

inline void check_4d(const Tensor& t, const char* name) {
  STD_TORCH_CHECK(t.dim() == 4, "aliasfused: ", name, " must have four dimensions (N, C, H, W), got ", t.dim());
}

// dy is to be a gradient of x blurred to h x w pixels.
inline void check_dy(const Tensor& dy, const Tensor& x, int64_t h, int64_t w) {
  check_4d(dy, "dy");
  STD_TORCH_CHECK(dy.size(0) == x.size(0) && dy.size(1) == x.size(1) && dy.size(2) == h && dy.size(3) == w &&
                      dy.scalar_type() == x.scalar_type() && dy.device() == x.device(),
                  "aliasfused: dy must be like the blurred x: its dtype and device, ", x.size(0), " x ", x.size(1), " x ", h, " x ", w);
}

}  // namespace aliasfused
