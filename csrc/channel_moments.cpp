// The channel moments as torch calls them: arguments in, output allocated, the device's kernel called.
#include "channel_moments.h"

#include "cpu/dispatch.h"
#include "tensor.h"
#ifdef ALIASFUSED_CUDA
#include "cuda/channel_moments.h"
#include "cuda/device.h"
#endif

namespace aliasfused {
namespace {

struct OnCpu {
  static void run(const ChannelMoments& op, const Tensor&) { cpu_kernels().channel_moments(op, parallel()); }
};

#ifdef ALIASFUSED_CUDA
struct OnCuda {
  static void run(const ChannelMoments& op, const Tensor& x) {
    const Tensor scratch = torch::stable::new_empty(x, {channel_moments_scratch(op)}, ScalarType::Double);
    on_device(x, [&](void* stream) { return channel_moments_cuda(op, static_cast<double*>(scratch.data_ptr()), stream); });
  }
};
#endif

template <typename Device>
Tensor channel_moments(Tensor x) {
  check_4d(x, "x");
  Tensor moments = torch::stable::new_zeros(x, {3, x.size(1)}, ScalarType::Double);
  if (x.numel() == 0) return moments;
  Device::run(
      {dtype_of(x), x.size(0), x.size(1), x.size(2), x.size(3), x.data_ptr(), strides_of(x), static_cast<double*>(moments.data_ptr())}, x);
  return moments;
}

STABLE_TORCH_LIBRARY_IMPL(aliasfused, CPU, m) { m.impl("channel_moments", TORCH_BOX(&channel_moments<OnCpu>)); }
#ifdef ALIASFUSED_CUDA
STABLE_TORCH_LIBRARY_IMPL(aliasfused, CUDA, m) { m.impl("channel_moments", TORCH_BOX(&channel_moments<OnCuda>)); }
#endif

}  // namespace
}  // namespace aliasfused
