// Which kernels of a blur with a prologue run, and with what.
#include "max_blur_pool.cuh"

#include "max_blur_pool.h"

namespace aliasfused {

const char* max_blur_pool_cuda(const MaxBlurPool& op, void* stream) {
  const BlurPool& blur = op.blur;
  const index_t planes = blur.batch * blur.channels;
  return with_dtype(blur.dtype, [&](auto zero) {
    using scalar_t = decltype(zero);
    return with_shared_taps<acc_t<scalar_t>>(blur, [&](const auto& taps) {
      using Taps = std::decay_t<decltype(taps)>;
      if (!blur.adjoint) return launch(max_blur_any<scalar_t, Taps>, planes * blur.rows.out * blur.cols.out, stream, op, taps);
      const char* error = nullptr;
      if (blur.dst) error = launch(max_blur_grad<scalar_t, Taps>, planes * op.pre.height * op.pre.width, stream, op, taps);
      if (!error && op.sums) error = launch(max_blur_sums<scalar_t, Taps>, blur.channels * block_threads, stream, op, taps);
      return error;
    });
  });
}

}  // namespace aliasfused
