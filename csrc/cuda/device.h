// Running on the device and the stream that torch would run on.
#pragma once

#include <torch/csrc/stable/accelerator.h>

#include "../tensor.h"

// Weak: libtorch has it only where it was built with CUDA, and this object also loads where it was not.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** ret_stream);

namespace aliasfused {

// queue(stream) with the device of t current; its error message, if any, is thrown.
template <typename Queue>
void on_device(const Tensor& t, Queue&& queue) {
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream, "aliasfused: this torch was built without CUDA");
  const int32_t device = t.get_device();
  const torch::stable::accelerator::DeviceGuard guard(device);
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  const char* error = queue(stream);
  STD_TORCH_CHECK(!error, "aliasfused: the CUDA kernel could not be launched: ", error ? error : "");
}

}  // namespace aliasfused
