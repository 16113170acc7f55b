// The CUDA side of the blur by predicted filters as host code sees it: plain C++. Work is queued on `stream` (a cudaStream_t)
// and nothing waits.
#pragma once

#include "../adaptive_blur_pool.h"

namespace aliasfused {

// nullptr, or why it could not run. x, y and logits must have elements.
const char* adaptive_blur_pool_cuda(const AdaptiveBlurPool& op, void* stream);

// Name of the kernel that adaptive_blur_pool_cuda runs for this op.
const char* adaptive_blur_pool_cuda_kernel(const AdaptiveBlurPool& op);

}  // namespace aliasfused
