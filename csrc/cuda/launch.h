// How kernels are launched: written once, without creating, waiting for or remembering anything.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "../blur_pool.h"

namespace aliasfused {

constexpr int block_threads = 256;

// Run enough blocks for one thread per item; nullptr or the error.
template <typename... Params, typename... Args>
const char* launch(void (*kernel)(Params...), long long items, void* stream, const Args&... args) {
  const long long blocks = (items + block_threads - 1) / block_threads;
  if (blocks > 0x7fffffffLL) return "too many elements for one launch";
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(block_threads);
  config.stream = static_cast<cudaStream_t>(stream);
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, args...);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

// call(a number of the type that kernels know by this name).
template <typename Call>
const char* with_dtype(Dtype dtype, Call&& call) {
  switch (dtype) {
    case Dtype::float32: return call(float{});
    case Dtype::bfloat16: return call(__nv_bfloat16{});
    case Dtype::float16: return call(__half{});
    case Dtype::float64: return call(double{});
  }
  return "an unknown dtype";
}

}  // namespace aliasfused
