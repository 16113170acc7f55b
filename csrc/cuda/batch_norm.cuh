// Kernels of the batch norm, in plain CUDA C++: nvcc compiles them, and g++ runs the same text under tests/emulation.
//
//   batch_norm_channels   a table or a gradient, one thread a channel
//   batch_norm_follow     running statistics, the same
#pragma once

#include "../batch_norm.h"
#include "launch.h"

namespace aliasfused {

template <typename Op>
__global__ void __launch_bounds__(block_threads) batch_norm_channels(const __grid_constant__ Op op) {
  const index_t c = static_cast<index_t>(blockIdx.x) * block_threads + threadIdx.x;
  if (c < op.channels) op.channel(c);
}

// `batches` has one writer. Where all read it (an average), there is one block, whose threads have read it by then.
__global__ void __launch_bounds__(block_threads) batch_norm_follow(const __grid_constant__ BatchNormFollow op) {
  const index_t batches = op.batches ? *op.batches + 1 : 0;
  __syncthreads();
  const index_t first = static_cast<index_t>(blockIdx.x) * block_threads + threadIdx.x;
  if (first == 0 && op.batches) *op.batches = batches;
  const double factor = op.factor(batches);
  for (index_t c = first; c < op.channels; c += static_cast<index_t>(gridDim.x) * block_threads) op.channel(c, factor);
}

}  // namespace aliasfused
