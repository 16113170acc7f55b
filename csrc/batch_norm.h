// What a batch norm works out per channel, whichever device does it: plain data and arithmetic in double, no torch and no CUDA
// type. `moments` are those of channel_moments.h, `table`, `sums` and `correction` those of max_blur_pool.h.
#pragma once

#include <cmath>

#include "window.h"

namespace aliasfused {

// Numbers in float32 or float64, without gaps; none of them where there is no data.
struct Numbers {
  void* data;
  bool wide;  // float64

  HOST_DEVICE double operator[](index_t i) const { return wide ? static_cast<const double*>(data)[i] : static_cast<const float*>(data)[i]; }
  HOST_DEVICE double rounded(double value) const { return wide ? value : static_cast<float>(value); }
  HOST_DEVICE void set(index_t i, double value) const {
    if (wide) static_cast<double*>(data)[i] = value;
    else static_cast<float*>(data)[i] = static_cast<float>(value);
  }
};

HOST_DEVICE inline double inverse_deviation(double var, double eps) { return 1 / std::sqrt(var + eps); }

// scale = weight / sqrt(var + eps), shift = bias; the mean is split into what pixels hold, which is subtracted from them, and
// the rest, which joins the shift.
struct BatchNormTable {
  index_t channels;
  double eps;
  Numbers mean, var, count, weight, bias;  // with a count, var is the sum of so many squared distances
  Numbers table;

  HOST_DEVICE void channel(index_t c) const {
    const double variance = count.data ? var[c] / count[c] : var[c], invstd = inverse_deviation(variance, eps);
    const double scale = weight.data ? invstd * weight[c] : invstd, center = table.rounded(mean[c]);
    const double rest = (center - mean[c]) * scale;
    table.set(c, center), table.set(channels + c, scale), table.set(2 * channels + c, bias.data ? rest + bias[c] : rest);
  }
};

// Running statistics move towards the batch's by `momentum`, or stay the plain average of all batches.
struct BatchNormFollow {
  index_t channels;
  bool average;
  double momentum;
  Numbers moments, mean, var;
  index_t* batches;  // how many there were, or null; whoever calls channel() counts this one first

  HOST_DEVICE double factor(index_t batches_so_far) const { return average ? 1 / static_cast<double>(batches_so_far) : momentum; }
  HOST_DEVICE void channel(index_t c, double factor) const {
    const double unbiased = moments[2 * channels + c] / (moments[c] - 1);
    mean.set(c, mean[c] * (1 - factor) + moments[channels + c] * factor);
    var.set(c, var[c] * (1 - factor) + unbiased * factor);
  }
};

// S0 = sums[0] and S1, of distances from the mean and not from what is subtracted in its place, make
//
//   dweight = S1 / sqrt(var + eps),  dbias = S0,  dx = du scale + correction[0] + correction[1] (x - center)
struct BatchNormGradient {
  index_t channels;
  double eps;
  Numbers sums, moments, table;
  Numbers correction, dweight, dbias;

  HOST_DEVICE void channel(index_t c) const {
    const double count = moments[c] > 0 ? moments[c] : 1;  // an empty batch has gradients: zero
    const double invstd = inverse_deviation(moments[2 * channels + c] / count, eps);
    const double scale = table[channels + c], off = table[c] - moments[channels + c];
    const double first = sums[c], second = sums[channels + c] + off * first;
    const double slope = -scale * invstd * invstd * second / count;
    correction.set(c, slope * off - scale * first / count), correction.set(channels + c, slope);
    dweight.set(c, second * invstd), dbias.set(c, first);
  }
};

}  // namespace aliasfused
