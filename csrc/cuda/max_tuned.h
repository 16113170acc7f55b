// Which tuned kernels of a blur with a prologue run, and with what; each direction is compiled by itself. Plain C++ to host code.
#pragma once

#include "../max_blur_pool.h"

namespace aliasfused {

enum class MaxKernel { any, element, nhwc, nchw };

// What was chosen; any where no tuned kernel knows the op. With a stream that may be null, and `run`, it is queued too.
struct Chosen {
  MaxKernel kernel = MaxKernel::any;
  const char* error = nullptr;
};
Chosen max_down(const MaxBlurPool& op, bool run, void* stream);

// Of dx, or where there are `sums` of these, through a scratch of so many doubles.
Chosen max_up(const MaxBlurPool& op, bool run, double* scratch, void* stream);
index_t max_up_scratch(const MaxBlurPool& op);

// The window of a maximum that kernels are tuned for, or 0.
inline int tuned_window(const Prologue& pre) { return pre.kernel_h == pre.kernel_w && pre.kernel_h <= 3 ? pre.kernel_h : 0; }

}  // namespace aliasfused
