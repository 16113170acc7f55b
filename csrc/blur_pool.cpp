// The blur-pool ops as torch calls them: arguments in, output allocated, the device's kernel called.
#include "cpu/dispatch.h"
#include "tensor.h"
#ifdef ALIASFUSED_CUDA
#include "cuda/blur_pool.h"
#include "cuda/device.h"
#endif

namespace aliasfused {
namespace {

struct OnCpu {
  static void run(const BlurPool& op, const Tensor&) { cpu_kernels().blur_pool(op, parallel()); }
  static void run(const TapsGrad& op, const Tensor&) { cpu_kernels().taps_grad(op, parallel()); }
};

#ifdef ALIASFUSED_CUDA
struct OnCuda {
  static void run(const BlurPool& op, const Tensor& t) {
    on_device(t, [&](void* stream) { return blur_pool_cuda(op, stream); });
  }
  static void run(const TapsGrad& op, const Tensor& t) {
    on_device(t, [&](void* stream) { return taps_grad_cuda(op, stream); });
  }
};
#endif

Tensor channel_taps(const Tensor& taps, const Tensor& x, const char* name) {
  const auto wanted = x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  STD_TORCH_CHECK(
      taps.dim() == 2 && taps.size(0) == x.size(1) && taps.size(1) >= 1 && taps.scalar_type() == wanted && taps.device() == x.device(),
      "aliasfused: ", name, " must be a (", x.size(1), ", k) tensor of ", wanted == ScalarType::Double ? "float64" : "float32",
      " on the device of the input");
  return torch::stable::contiguous(taps);
}

template <typename Device>
Tensor blur(const Tensor& src, const Geometry& g, bool adjoint, bool channels_last, const void* taps_h, const void* taps_w,
            bool per_channel) {
  const Axis &rows = g.rows, &cols = g.cols;
  STD_TORCH_CHECK(!adjoint || (src.size(2) == rows.out && src.size(3) == cols.out), "aliasfused: dy of ", src.size(2), " x ", src.size(3),
                  " is not the blurred map of ", rows.in, " x ", cols.in, ", which has ", rows.out, " x ", cols.out);
  Tensor dst = empty_4d(src, src.size(0), src.size(1), adjoint ? rows.in : rows.out, adjoint ? cols.in : cols.out, channels_last);
  if (dst.numel() == 0) return dst;
  Device::run(BlurPool{dtype_of(src), adjoint, src.size(0), src.size(1), rows, cols, src.data_ptr(), dst.data_ptr(), strides_of(src),
                       strides_of(dst), taps_h, taps_w, per_channel},
              src);
  return dst;
}

template <typename Device>
Tensor fwd(Tensor x, std::vector<double> taps_h, std::vector<double> taps_w, Ints stride, Ints padding, std::string pad_mode) {
  check_4d(x, "x");
  const Geometry g(x.size(2), x.size(3), taps_h.size(), taps_w.size(), stride, padding, pad_mode);
  const HostTaps h(taps_h, dtype_of(x)), w(taps_w, dtype_of(x));
  return blur<Device>(x, g, false, is_channels_last(x), h.data, w.data, false);
}

template <typename Device>
Tensor bwd(Tensor dy, std::vector<double> taps_h, std::vector<double> taps_w, Ints stride, Ints padding, std::string pad_mode, int64_t H,
           int64_t W, bool channels_last) {
  check_4d(dy, "dy");
  const Geometry g(H, W, taps_h.size(), taps_w.size(), stride, padding, pad_mode);
  const HostTaps h(taps_h, dtype_of(dy)), w(taps_w, dtype_of(dy));
  return blur<Device>(dy, g, true, channels_last, h.data, w.data, false);
}

template <typename Device>
Tensor taps_fwd(Tensor x, Tensor taps_h, Tensor taps_w, Ints stride, Ints padding, std::string pad_mode) {
  check_4d(x, "x");
  const Tensor h = channel_taps(taps_h, x, "taps_h"), w = channel_taps(taps_w, x, "taps_w");
  const Geometry g(x.size(2), x.size(3), h.size(1), w.size(1), stride, padding, pad_mode);
  return blur<Device>(x, g, false, is_channels_last(x), h.data_ptr(), w.data_ptr(), true);
}

template <typename Device>
Tensor taps_bwd(Tensor dy, Tensor taps_h, Tensor taps_w, Ints stride, Ints padding, std::string pad_mode, int64_t H, int64_t W,
                bool channels_last) {
  check_4d(dy, "dy");
  const Tensor h = channel_taps(taps_h, dy, "taps_h"), w = channel_taps(taps_w, dy, "taps_w");
  const Geometry g(H, W, h.size(1), w.size(1), stride, padding, pad_mode);
  return blur<Device>(dy, g, true, channels_last, h.data_ptr(), w.data_ptr(), true);
}

template <typename Device>
Tensor taps_grad(Tensor dy, Tensor x, Tensor other, int64_t axis, int64_t size, Ints stride, Ints padding, std::string pad_mode) {
  check_4d(dy, "dy");
  check_4d(x, "x");
  STD_TORCH_CHECK(axis == 0 || axis == 1, "aliasfused: axis must be 0 (taps_h) or 1 (taps_w), got ", axis);
  const Tensor cross = channel_taps(other, x, "other");
  const int64_t k = cross.size(1);
  const Geometry g(x.size(2), x.size(3), axis == 0 ? size : k, axis == 0 ? k : size, stride, padding, pad_mode);
  STD_TORCH_CHECK(dy.size(0) == x.size(0) && dy.size(1) == x.size(1) && dy.size(2) == g.rows.out && dy.size(3) == g.cols.out &&
                      dy.scalar_type() == x.scalar_type() && dy.device() == x.device(),
                  "aliasfused: dy must be like the blurred x: its dtype and device, ", x.size(0), " x ", x.size(1), " x ", g.rows.out,
                  " x ", g.cols.out);
  Tensor dst = torch::stable::new_zeros(cross, {x.size(1), size});
  if (dy.numel() == 0 || dst.numel() == 0) return dst;
  Device::run(TapsGrad{dtype_of(x), x.size(0), x.size(1), g.rows, g.cols, static_cast<int>(axis), dy.data_ptr(), x.data_ptr(),
                       strides_of(dy), strides_of(x), cross.data_ptr(), dst.data_ptr()},
              x);
  return dst;
}

template <typename Device>
void register_ops(torch::stable::detail::StableLibrary& m) {
  m.impl("blur_pool_fwd", TORCH_BOX(&fwd<Device>));
  m.impl("blur_pool_bwd", TORCH_BOX(&bwd<Device>));
  m.impl("blur_pool_taps_fwd", TORCH_BOX(&taps_fwd<Device>));
  m.impl("blur_pool_taps_bwd", TORCH_BOX(&taps_bwd<Device>));
  m.impl("blur_pool_taps_grad", TORCH_BOX(&taps_grad<Device>));
}

STABLE_TORCH_LIBRARY_IMPL(aliasfused, CPU, m) { register_ops<OnCpu>(m); }
#ifdef ALIASFUSED_CUDA
STABLE_TORCH_LIBRARY_IMPL(aliasfused, CUDA, m) { register_ops<OnCuda>(m); }
#endif

}  // namespace
}  // namespace aliasfused
