// The adaptive-blur-pool ops as torch calls them: arguments in, output allocated, the device's kernel called.
#include "adaptive_blur_pool.h"

#include <algorithm>

#include "cpu/dispatch.h"
#include "tensor.h"
#ifdef ALIASFUSED_CUDA
#include "cuda/adaptive_blur_pool.h"
#include "cuda/device.h"
#endif

namespace aliasfused {
namespace {

struct OnCpu {
  static void run(const AdaptiveBlurPool& op, const Tensor&) { cpu_kernels().adaptive_blur_pool(op, parallel()); }
};

#ifdef ALIASFUSED_CUDA
struct OnCuda {
  static void run(const AdaptiveBlurPool& op, const Tensor& t) {
    on_device(t, [&](void* stream) { return adaptive_blur_pool_cuda(op, stream); });
  }
};
#endif

Normalize normalize_of(const std::string& name) {
  if (name == "group") return Normalize::group;
  if (name == "joint") return Normalize::joint;
  STD_TORCH_CHECK(name == "none", "aliasfused: normalize must be 'group', 'joint' or 'none', got '", name, "'");
  return Normalize::none;
}

// All but the tensors' addresses; `map` is x or dy, whose blurred or unblurred size is h x w.
AdaptiveBlurPool told(const Tensor& map, const Tensor& logits, int64_t k, const Ints& stride, int64_t groups, const std::string& normalize,
                      const std::string& pad_mode, int64_t h, int64_t w) {
  check_4d(map, "x or dy"), check_4d(logits, "logits");
  STD_TORCH_CHECK(k >= 1 && k % 2 == 1 && k < 64, "aliasfused: kernel_size must be odd and from 1 to 63, got ", k);
  STD_TORCH_CHECK(groups >= 1 && map.size(1) % groups == 0, "aliasfused: groups must divide the ", map.size(1), " channels, got ", groups);
  const int64_t r = k / 2;
  // A stride beyond the map keeps the first pixel, as one of its size does, which needs no more memory than the map.
  Ints step = stride;
  for (size_t i = 0; i < step.size() && i < 2; ++i) step[i] = std::min(step[i], std::max<int64_t>(i ? w : h, 1));
  const Geometry g(h, w, k, k, step, {r, r, r, r}, pad_mode);
  const bool kept = logits.size(2) == g.rows.out && logits.size(3) == g.cols.out, all = logits.size(2) == h && logits.size(3) == w;
  STD_TORCH_CHECK(logits.size(0) == map.size(0) && logits.size(1) == groups * k * k && (kept || all) &&
                      logits.scalar_type() == map.scalar_type() && logits.device() == map.device(),
                  "aliasfused: logits must be ", map.size(0), " x ", groups * k * k, " x ", g.rows.out, " x ", g.cols.out,
                  ", at the kept positions, or x ", h, " x ", w, ", at all, with the dtype and device of x");
  AdaptiveBlurPool op{};
  op.dtype = dtype_of(map), op.normalize = normalize_of(normalize), op.batch = map.size(0), op.channels = map.size(1);
  op.groups = static_cast<int>(groups), op.rows = g.rows, op.cols = g.cols;
  op.logits = logits.data_ptr(), op.logits_stride = strides_of(logits);
  op.span_h = kept ? 1 : g.rows.stride, op.span_w = kept ? 1 : g.cols.stride;
  op.logits_stride.h *= op.span_h, op.logits_stride.w *= op.span_w;
  return op;
}

template <typename Device>
Tensor into(AdaptiveBlurPool& op, AdaptiveResult result, Tensor dst, const Tensor& other) {
  op.result = result, op.dst = dst.data_ptr(), op.dst_stride = strides_of(dst);
  // Without channels there is nothing to sum, but a gradient of the logits, which is zero.
  if (dst.numel() != 0 && other.numel() != 0) Device::run(op, dst);
  return dst;
}

template <typename Device>
Tensor fwd(Tensor x, Tensor logits, int64_t k, Ints stride, int64_t groups, std::string normalize, std::string pad_mode) {
  check_4d(x, "x");
  AdaptiveBlurPool op = told(x, logits, k, stride, groups, normalize, pad_mode, x.size(2), x.size(3));
  op.x = x.data_ptr(), op.x_stride = strides_of(x);
  return into<Device>(op, AdaptiveResult::y, empty_4d(x, x.size(0), x.size(1), op.rows.out, op.cols.out, is_channels_last(x)), x);
}

template <typename Device>
Tensor bwd(Tensor dy, Tensor logits, int64_t k, Ints stride, int64_t groups, std::string normalize, std::string pad_mode, int64_t h,
           int64_t w, bool channels_last) {
  AdaptiveBlurPool op = told(dy, logits, k, stride, groups, normalize, pad_mode, h, w);
  check_dy(dy, dy, op.rows.out, op.cols.out);
  op.dy = dy.data_ptr(), op.dy_stride = strides_of(dy);
  return into<Device>(op, AdaptiveResult::dx, empty_4d(dy, dy.size(0), dy.size(1), h, w, channels_last), dy);
}

template <typename Device>
Tensor logits_grad(Tensor dy, Tensor x, Tensor logits, int64_t k, Ints stride, int64_t groups, std::string normalize,
                   std::string pad_mode) {
  check_4d(x, "x");
  AdaptiveBlurPool op = told(x, logits, k, stride, groups, normalize, pad_mode, x.size(2), x.size(3));
  check_dy(dy, x, op.rows.out, op.cols.out);
  op.x = x.data_ptr(), op.x_stride = strides_of(x), op.dy = dy.data_ptr(), op.dy_stride = strides_of(dy);
  Tensor dst = empty_4d(logits, logits.size(0), logits.size(1), logits.size(2), logits.size(3), is_channels_last(logits));
  if (x.numel() == 0) torch::stable::zero_(dst);
  return into<Device>(op, AdaptiveResult::dlogits, dst, x);
}

template <typename Device>
void register_ops(torch::stable::detail::StableLibrary& m) {
  m.impl("adaptive_blur_pool_fwd", TORCH_BOX(&fwd<Device>));
  m.impl("adaptive_blur_pool_bwd", TORCH_BOX(&bwd<Device>));
  m.impl("adaptive_blur_pool_logits_grad", TORCH_BOX(&logits_grad<Device>));
}

STABLE_TORCH_LIBRARY_IMPL(aliasfused, CPU, m) { register_ops<OnCpu>(m); }
#ifdef ALIASFUSED_CUDA
STABLE_TORCH_LIBRARY_IMPL(aliasfused, CUDA, m) { register_ops<OnCuda>(m); }
#endif

}  // namespace
}  // namespace aliasfused
