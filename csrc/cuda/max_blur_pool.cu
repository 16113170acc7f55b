// Which kernels of a blur with a prologue run, and with what.
#include "max_blur_pool.cuh"

#include "max_blur_pool.h"
#include "max_tuned.h"

namespace aliasfused {
namespace {

const char* run_any(const MaxBlurPool& op, void* stream) {
  const BlurPool& blur = op.blur;
  const index_t planes = blur.batch * blur.channels;
  return with_dtype(blur.dtype, [&](auto zero) {
    using scalar_t = decltype(zero);
    return with_shared_taps<acc_t<scalar_t>>(blur, [&](const auto& taps) {
      using Taps = std::decay_t<decltype(taps)>;
      if (!blur.adjoint) return launch(max_blur_any<scalar_t, Taps>, planes * blur.rows.out * blur.cols.out, stream, op, taps);
      if (op.sums) return launch(max_blur_sums<scalar_t, Taps>, blur.channels * block_threads, stream, op, taps);
      return launch(max_blur_grad<scalar_t, Taps>, planes * op.pre.height * op.pre.width, stream, op, taps);
    });
  });
}

Chosen choose(const MaxBlurPool& op, bool run, double* scratch, void* stream) {
  return op.blur.adjoint ? max_up(op, run, scratch, stream) : max_down(op, run, stream);
}

}  // namespace

index_t max_blur_pool_scratch(const MaxBlurPool& op) { return max_up_scratch(op); }

const char* max_blur_pool_cuda(const MaxBlurPool& op, double* scratch, void* stream) {
  const Chosen chosen = choose(op, true, scratch, stream);
  return chosen.kernel == MaxKernel::any ? run_any(op, stream) : chosen.error;
}

const char* max_blur_pool_cuda_kernel(const MaxBlurPool& op) {
  constexpr const char* names[] = {"any", "element", "nhwc", "nchw"};
  return names[static_cast<int>(choose(op, false, nullptr, nullptr).kernel)];
}

}  // namespace aliasfused
