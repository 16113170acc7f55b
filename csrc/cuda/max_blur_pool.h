// The CUDA side of the blur with a prologue as host code sees it: plain C++. Work is queued on `stream` (a cudaStream_t) and
// nothing waits.
#pragma once

#include "../max_blur_pool.h"

namespace aliasfused {

// nullptr, or why it could not run. x and y must have elements.
const char* max_blur_pool_cuda(const MaxBlurPool& op, void* stream);

}  // namespace aliasfused
