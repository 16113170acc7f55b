// The launchers of the batch norm.
#include "batch_norm.cuh"

#include "batch_norm.h"

namespace aliasfused {

const char* batch_norm_cuda(const BatchNormTable& op, void* stream) {
  return launch(batch_norm_channels<BatchNormTable>, op.channels, stream, op);
}

const char* batch_norm_cuda(const BatchNormFollow& op, void* stream) {
  return launch(batch_norm_follow, op.average ? 1 : op.channels, stream, op);
}

const char* batch_norm_cuda(const BatchNormGradient& op, void* stream) {
  return launch(batch_norm_channels<BatchNormGradient>, op.channels, stream, op);
}

}  // namespace aliasfused
