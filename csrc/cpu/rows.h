// The rows of a map in the order of memory: all channels of a pixel side by side (NHWC), or those of one channel (NCHW).
#pragma once

#include "terms.h"

namespace aliasfused {
namespace AF_ISA {
namespace {

template <typename T>
struct MapRows {
  const void* data;
  Strides stride;
  index_t height, width, channels;      // channels: of a row
  index_t elements = width * channels;  // of a row

  // Whether a row lies in memory without gaps, and whether all rows of an image (or plane) do, as one.
  bool whole() const { return (channels == 1 || stride.c == 1) && (width == 1 || stride.w == channels); }
  bool follow_each_other() const { return whole() && (height == 1 || stride.h == elements); }

  // Row h from channel c of image n on, without gaps: where it is, or copied.
  const T* row(index_t n, index_t c, index_t h, T* copy) const {
    const T* p = static_cast<const T*>(data) + n * stride.n + c * stride.c + h * stride.h;
    if (whole()) return p;
    for (index_t w = 0; w < width; ++w)
      for (index_t k = 0; k < channels; ++k) copy[w * channels + k] = p[w * stride.w + k * stride.c];
    return copy;
  }
};

}  // namespace
}  // namespace AF_ISA
}  // namespace aliasfused
