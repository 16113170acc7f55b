// The CUDA side of the blur as host code sees it: plain C++. Work is queued on `stream` (a cudaStream_t) and nothing waits.
#pragma once

#include "../blur_pool.h"

namespace aliasfused {

// nullptr, or why it could not run. dst must have elements.
const char* blur_pool_cuda(const BlurPool& op, void* stream);
const char* taps_grad_cuda(const TapsGrad& op, void* stream);

// Name of the kernel that blur_pool_cuda runs for this op.
const char* blur_pool_cuda_kernel(const BlurPool& op);

}  // namespace aliasfused
