// Index arithmetic of one axis of a filtered subsampling, in both directions.
//
//   y[o] = sum_p taps[p] * x~[stride*o + p - before],   x~ = x extended by the border rule
//
// A position t of the extended axis x~ is read from index source(t) of x, or is zero. Everything a kernel needs to know
// about borders, parities and odd sizes is in this file; it is plain C++ so that CPU, CUDA and test code share it.
#pragma once

#include <cstdint>

#include "scalar.h"

namespace aliasfused {

using index_t = int64_t;

enum class Border : int { reflect = 0, replicate = 1, zeros = 2, circular = 3 };

HOST_DEVICE inline index_t floor_div(index_t a, index_t b) { return a / b - (a % b != 0 && (a < 0) != (b < 0)); }
HOST_DEVICE inline index_t floor_mod(index_t a, index_t b) { return a - b * floor_div(a, b); }

// Index of x (of n positions) that position t of the extended axis shows; -1 where the extension is zero. In whichever
// integer is wide enough: a kernel's inner loop may know that 32 bits are.
template <typename int_t>
HOST_DEVICE inline int_t extended_source(int_t t, int_t n, Border border) {
  if (t >= 0 && t < n) return t;
  switch (border) {
    case Border::reflect: {
      if (n == 1) return 0;
      const int_t period = 2 * (n - 1), m = t % period, u = m < 0 ? m + period : m;
      return u < n ? u : period - u;
    }
    case Border::replicate: return t < 0 ? 0 : n - 1;
    case Border::circular: {
      const int_t m = t % n;
      return m < 0 ? m + n : m;
    }
    default: return -1;
  }
}

struct Axis {
  index_t in;      // positions of x
  index_t out;     // positions of y
  index_t before;  // positions of x~ ahead of x[0]
  int taps;        // filter length k
  int stride;
  Border border;

  // Index of x that position t of the extended axis shows; -1 where the extension is zero.
  HOST_DEVICE index_t source(index_t t) const { return extended_source(t, in, border); }

  // Positions of the extended axis that any output reads: first() <= t < last().
  HOST_DEVICE index_t first() const { return -before; }
  HOST_DEVICE index_t last() const { return (out - 1) * stride + taps - before; }

  // The forward window of output o: visit(h, p) for every tap p that reads index h of x.
  template <typename Visit>
  HOST_DEVICE void inputs_of(index_t o, Visit&& visit) const {
    for (int p = 0; p < taps; ++p) {
      const index_t h = source(o * stride + p - before);
      if (h >= 0) visit(h, p);
    }
  }

  // Outputs that read position t of the extended axis: visit(o, p), in rising order of p.
  template <typename Visit>
  HOST_DEVICE void outputs_at(index_t t, Visit&& visit) const {
    index_t o = floor_div(t + before, stride);
    for (int p = static_cast<int>(t + before - o * stride); p < taps; p += stride, --o)
      if (o >= 0 && o < out) visit(o, p);
  }

  // The adjoint window of input h: visit(o, p) for every tap p with which output o reads index h of x, the mirrored,
  // repeated or wrapped positions of the border included (the set of all t with source(t) == h).
  template <typename Visit>
  HOST_DEVICE void outputs_of(index_t h, Visit&& visit) const {
    outputs_at(h, visit);
    const index_t reach = before > last() - in ? before : last() - in;
    if (h > reach && h < in - 1 - reach) return;
    switch (border) {
      case Border::reflect: {
        if (in == 1) {
          outside(1, 0, visit);
          break;
        }
        const index_t period = 2 * (in - 1);
        outside(period, h, visit);
        if (h != 0 && h != in - 1) outside(period, period - h, visit);
        break;
      }
      case Border::replicate:
        if (h == 0)
          for (index_t t = first(); t < 0; ++t) outputs_at(t, visit);
        if (h == in - 1)
          for (index_t t = in; t < last(); ++t) outputs_at(t, visit);
        break;
      case Border::circular: outside(in, h, visit); break;
      default: break;
    }
  }

 private:
  // All read positions t = h (mod period) that lie outside x itself.
  template <typename Visit>
  HOST_DEVICE void outside(index_t period, index_t h, Visit&& visit) const {
    for (index_t t = h - period * floor_div(h - first(), period); t < 0; t += period) outputs_at(t, visit);
    for (index_t t = h + period * (1 + floor_div(in - 1 - h, period)); t < last(); t += period) outputs_at(t, visit);
  }
};

}  // namespace aliasfused
