// The CUDA side of the blur with a prologue as host code sees it: plain C++. Work is queued on `stream` (a cudaStream_t) and
// nothing waits.
#pragma once

#include "../max_blur_pool.h"

namespace aliasfused {

// How many doubles of the device's memory max_blur_pool_cuda wants for this op; none but for sums.
index_t max_blur_pool_scratch(const MaxBlurPool& op);

// nullptr, or why it could not run. x and y must have elements. Of the gradients it finds one at a time: the sums, where they are
// asked for, or dx.
const char* max_blur_pool_cuda(const MaxBlurPool& op, double* scratch, void* stream);

// Name of the kernel that max_blur_pool_cuda runs for this op.
const char* max_blur_pool_cuda_kernel(const MaxBlurPool& op);

}  // namespace aliasfused
