// The CUDA side of the batch norm as host code sees it: plain C++. Work is queued on `stream` (a cudaStream_t) and nothing
// waits.
#pragma once

#include "../batch_norm.h"

namespace aliasfused {

// nullptr, or why it could not run. There must be channels.
const char* batch_norm_cuda(const BatchNormTable& op, void* stream);
const char* batch_norm_cuda(const BatchNormFollow& op, void* stream);
const char* batch_norm_cuda(const BatchNormGradient& op, void* stream);

}  // namespace aliasfused
