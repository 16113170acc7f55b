// Which instruction set serves this process.
#pragma once

#include "kernels.h"

namespace aliasfused {

struct CpuKernels {
  const char* name;
  void (*blur_pool)(const BlurPool&, const Parallel&);
  void (*taps_grad)(const TapsGrad&, const Parallel&);
  void (*max_blur_pool)(const MaxBlurPool&, const Parallel&);
  void (*channel_moments)(const ChannelMoments&, const Parallel&);
  void (*batch_norm_table)(const BatchNormTable&);
  void (*batch_norm_follow)(const BatchNormFollow&);
  void (*batch_norm_gradient)(const BatchNormGradient&);
  void (*adaptive_blur_pool)(const AdaptiveBlurPool&, const Parallel&);
};

// The best instruction set of this processor, or the one that the environment variable ALIASFUSED_CPU_ISA names.
const CpuKernels& cpu_kernels();
// The names of all that were built, best first, separated by commas.
const char* cpu_isas();
// torch's thread pool.
const Parallel& parallel();

}  // namespace aliasfused
