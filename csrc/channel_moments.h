// What the kernels of the channel moments are told, whichever device runs them: plain data, no torch and no CUDA type.
//
//   moments[0,c] = how many pixels channel c has,  n
//   moments[1,c] = their mean,                     m_c = sum x / n
//   moments[2,c] = sum (x - m_c)^2
//
// Pixels are summed in acc_t as differences from a number among them, few to a sum; sums are merged in double:
//
//   n = n_a + n_b,  d = m_b - m_a,  m = m_a + d n_b / n,  M = M_a + M_b + d^2 n_a n_b / n
#pragma once

#include "blur_pool.h"

namespace aliasfused {

struct ChannelMoments {
  Dtype dtype;
  index_t batch, channels, height, width;
  const void* x;
  Strides x_stride;
  double* moments;  // (3, channels), contiguous
};

// The most pixels that are summed in acc_t.
constexpr int pixels_of_sum = 64;

// Of some pixels: how many, their mean, the sum of their squared distances from it.
struct Moments {
  double n, mean, m2;
  HOST_DEVICE void merge(const Moments& other) {
    if (other.n == 0) return;
    const double total = n + other.n, d = other.mean - mean;
    mean += d * (other.n / total);
    m2 += other.m2 + d * d * (n * other.n / total);
    n = total;
  }
};

}  // namespace aliasfused
