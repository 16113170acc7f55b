// The max-blur-pool ops as torch calls them: arguments in, output allocated, the device's kernel called.
#include "max_blur_pool.h"

#include "cpu/dispatch.h"
#include "tensor.h"
#ifdef ALIASFUSED_CUDA
#include "cuda/device.h"
#include "cuda/max_blur_pool.h"
#endif

namespace aliasfused {
namespace {

using OptionalTensor = std::optional<Tensor>;
using Floats = std::vector<double>;

struct OnCpu {
  static void run(const MaxBlurPool& op, const Tensor&) { cpu_kernels().max_blur_pool(op, parallel()); }
};

#ifdef ALIASFUSED_CUDA
struct OnCuda {
  static void run(const MaxBlurPool& op, const Tensor& t) {
    const index_t size = max_blur_pool_scratch(op);
    const Tensor scratch = size ? torch::stable::new_empty(t, {size}, ScalarType::Double) : Tensor();
    double* const parts = size ? static_cast<double*>(scratch.data_ptr()) : nullptr;
    on_device(t, [&](void* stream) { return max_blur_pool_cuda(op, parts, stream); });
  }
};
#endif

Act act_of(const std::string& name, const Floats& args) {
  static const char* const names[] = {"none", "relu", "relu6", "silu", "gelu", "gelu_tanh", "hardswish", "leaky_relu", "softplus"};
  for (int i = 0; i < 9; ++i)
    if (name == names[i]) {
      const size_t count = static_cast<Act>(i) == Act::leaky_relu ? 1 : static_cast<Act>(i) == Act::softplus ? 2 : 0;
      STD_TORCH_CHECK(args.size() == count, "aliasfused: act '", name, "' takes ", count, " numbers in act_args, got ", args.size());
      return static_cast<Act>(i);
    }
  STD_TORCH_CHECK(false, "aliasfused: act must be one of none, relu, relu6, silu, gelu, gelu_tanh, hardswish, leaky_relu, softplus, got '",
                  name, "'");
}

// (rows, channels) numbers in the accumulation type of x, on its device.
Tensor table(const Tensor& values, int64_t rows, const Tensor& x, const char* name) {
  const auto wanted = x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  STD_TORCH_CHECK(values.dim() == 2 && values.size(0) == rows && values.size(1) == x.size(1) && values.scalar_type() == wanted &&
                      values.device() == x.device(),
                  "aliasfused: ", name, " must be a (", rows, ", ", x.size(1), ") tensor of ",
                  wanted == ScalarType::Double ? "float64" : "float32", " on the device of x");
  return torch::stable::contiguous(values);
}

int64_t prepared(const char* name, int64_t size, int64_t kernel, int64_t before, int64_t after) {
  STD_TORCH_CHECK(size >= 1 && kernel >= 1 && kernel < 128 && before >= 0 && after >= 0 && before < kernel && after < kernel &&
                      size + before + after >= kernel,
                  "aliasfused: a maximum over ", kernel, " of ", name, " ", size, " with padding (", before, ", ", after,
                  ") is none: the padding must be less than the window, and the window no more than the padded map, which has pixels");
  return size + before + after - kernel + 1;
}

// The arguments that all ops have in common, checked, and what of them must stay alive during the call.
struct Call {
  HostTaps h, w;
  Tensor affine;
  MaxBlurPool op;

  Call(const Tensor& x, const OptionalTensor& per_channel, const std::string& act, const Floats& args, const Ints& kernel,
       const Ints& max_padding, const Floats& taps_h, const Floats& taps_w, const Ints& stride, const Ints& padding,
       const std::string& pad_mode)
      : h(taps_h, dtype_of(x)), w(taps_w, dtype_of(x)), op() {
    check_4d(x, "x");
    STD_TORCH_CHECK(kernel.size() == 2 && max_padding.size() == 4,
                    "aliasfused: kernel must be (h, w) and max_padding (left, right, top, bottom)");
    if (per_channel) affine = table(*per_channel, 3, x, "affine");
    const Geometry g(prepared("height", x.size(2), kernel[0], max_padding[2], max_padding[3]),
                     prepared("width", x.size(3), kernel[1], max_padding[0], max_padding[1]), taps_h.size(), taps_w.size(), stride, padding,
                     pad_mode);
    op.blur.dtype = dtype_of(x), op.blur.batch = x.size(0), op.blur.channels = x.size(1);
    op.blur.rows = g.rows, op.blur.cols = g.cols, op.blur.taps_h = h.data, op.blur.taps_w = w.data;
    op.pre.act = act_of(act, args), op.pre.a = args.empty() ? 0 : args[0], op.pre.b = args.size() < 2 ? 0 : args[1];
    op.pre.affine = per_channel ? affine.data_ptr() : nullptr;
    op.pre.kernel_h = static_cast<int>(kernel[0]), op.pre.kernel_w = static_cast<int>(kernel[1]);
    op.pre.top = max_padding[2], op.pre.left = max_padding[0], op.pre.height = x.size(2), op.pre.width = x.size(3);
  }

  void differentiate(const Tensor& dy, const Tensor& x) {
    check_dy(dy, x, op.blur.rows.out, op.blur.cols.out);
    op.blur.adjoint = true, op.blur.src = dy.data_ptr(), op.blur.src_stride = strides_of(dy);
    op.x = x.data_ptr(), op.x_stride = strides_of(x);
  }
};

template <typename Device>
Tensor fwd(Tensor x, OptionalTensor affine, std::string act, Floats act_args, Ints kernel, Ints max_padding, Floats taps_h, Floats taps_w,
           Ints stride, Ints padding, std::string pad_mode) {
  Call call(x, affine, act, act_args, kernel, max_padding, taps_h, taps_w, stride, padding, pad_mode);
  BlurPool& blur = call.op.blur;
  Tensor y = empty_4d(x, x.size(0), x.size(1), blur.rows.out, blur.cols.out, is_channels_last(x));
  if (y.numel() == 0) return y;
  blur.src = x.data_ptr(), blur.src_stride = strides_of(x), blur.dst = y.data_ptr(), blur.dst_stride = strides_of(y);
  Device::run(call.op, x);
  return y;
}

template <typename Device>
Tensor bwd(Tensor dy, Tensor x, OptionalTensor affine, OptionalTensor correction, std::string act, Floats act_args, Ints kernel,
           Ints max_padding, Floats taps_h, Floats taps_w, Ints stride, Ints padding, std::string pad_mode) {
  Call call(x, affine, act, act_args, kernel, max_padding, taps_h, taps_w, stride, padding, pad_mode);
  call.differentiate(dy, x);
  Tensor dx = empty_4d(x, x.size(0), x.size(1), x.size(2), x.size(3), is_channels_last(x)), held;
  if (dx.numel() == 0) return dx;
  if (correction) held = table(*correction, 2, x, "correction"), call.op.correction = held.data_ptr();
  call.op.blur.dst = dx.data_ptr(), call.op.blur.dst_stride = strides_of(dx);
  Device::run(call.op, x);
  return dx;
}

template <typename Device>
Tensor sums(Tensor dy, Tensor x, OptionalTensor affine, std::string act, Floats act_args, Ints kernel, Ints max_padding, Floats taps_h,
            Floats taps_w, Ints stride, Ints padding, std::string pad_mode) {
  Call call(x, affine, act, act_args, kernel, max_padding, taps_h, taps_w, stride, padding, pad_mode);
  call.differentiate(dy, x);
  const Tensor like =
      torch::stable::new_zeros(x, {2, x.size(1)}, x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float);
  if (dy.numel() == 0) return like;
  call.op.sums = like.data_ptr();
  Device::run(call.op, x);
  return like;
}

template <typename Device>
void register_ops(torch::stable::detail::StableLibrary& m) {
  m.impl("max_blur_pool_fwd", TORCH_BOX(&fwd<Device>));
  m.impl("max_blur_pool_bwd", TORCH_BOX(&bwd<Device>));
  m.impl("max_blur_pool_sums", TORCH_BOX(&sums<Device>));
}

STABLE_TORCH_LIBRARY_IMPL(aliasfused, CPU, m) { register_ops<OnCpu>(m); }
#ifdef ALIASFUSED_CUDA
STABLE_TORCH_LIBRARY_IMPL(aliasfused, CUDA, m) { register_ops<OnCuda>(m); }
#endif

}  // namespace
}  // namespace aliasfused
