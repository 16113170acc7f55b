// The CUDA side of the channel moments as host code sees it: plain C++. Work is queued on `stream` (a cudaStream_t) and nothing
// waits.
#pragma once

#include "../channel_moments.h"

namespace aliasfused {

// How many doubles of the device's memory channel_moments_cuda wants for this op, x and its strides included; often none.
index_t channel_moments_scratch(const ChannelMoments& op);

// nullptr, or why it could not run. x must have elements.
const char* channel_moments_cuda(const ChannelMoments& op, double* scratch, void* stream);

// Name of the kernel that channel_moments_cuda runs for this op.
const char* channel_moments_cuda_kernel(const ChannelMoments& op);

}  // namespace aliasfused
