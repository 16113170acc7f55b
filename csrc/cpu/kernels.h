// What the instruction sets offer to the rest of the library: the same functions, one namespace each.
#pragma once

#include "../adaptive_blur_pool.h"
#include "../batch_norm.h"
#include "../channel_moments.h"
#include "../max_blur_pool.h"

namespace aliasfused {

// Runs body(begin, end) over pieces of [0, items) on torch's threads.
struct Parallel {
  void (*run)(index_t items, index_t grain, void (*body)(index_t, index_t, const void*), const void* context);

  template <typename Body>
  HOST_DEVICE void operator()(index_t items, index_t grain, const Body& body) const {
    run(items, grain, [](index_t begin, index_t end, const void* context) { (*static_cast<const Body*>(context))(begin, end); }, &body);
  }
};

// blur_rows: rows [begin, end) of the result of one image, its channels side by side (NHWC), on the caller's thread; dst is
// where row `begin` goes.
#define ALIASFUSED_CPU_KERNELS(isa)                                  \
  namespace isa {                                                    \
  void blur_pool(const BlurPool&, const Parallel&);                  \
  void blur_rows(const BlurPool&, index_t begin, index_t end);       \
  void taps_grad(const TapsGrad&, const Parallel&);                  \
  void max_blur_pool(const MaxBlurPool&, const Parallel&);           \
  void channel_moments(const ChannelMoments&, const Parallel&);      \
  void batch_norm_table(const BatchNormTable&);                      \
  void batch_norm_follow(const BatchNormFollow&);                    \
  void batch_norm_gradient(const BatchNormGradient&);                \
  void adaptive_blur_pool(const AdaptiveBlurPool&, const Parallel&); \
  }

ALIASFUSED_CPU_KERNELS(baseline)
#if defined(__x86_64__)
ALIASFUSED_CPU_KERNELS(avx2)
ALIASFUSED_CPU_KERNELS(avx512)
ALIASFUSED_CPU_KERNELS(avx512bf16)
#endif
#undef ALIASFUSED_CPU_KERNELS

}  // namespace aliasfused
