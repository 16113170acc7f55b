// What the same source needs to be C++ for a CPU and CUDA C++: function qualifiers and the accumulation type.
#pragma once

#ifdef __CUDACC__
#define HOST_DEVICE __host__ __device__
#else
// Always inline: CPU kernels are compiled once per instruction set, and one out-of-line copy would serve them all.
#define HOST_DEVICE __attribute__((always_inline))
#endif

namespace aliasfused {

// Sums are kept in float32, and in float64 for float64 data.
template <typename scalar_t>
struct acc_type {
  using type = float;
};
template <>
struct acc_type<double> {
  using type = double;
};
template <typename scalar_t>
using acc_t = typename acc_type<scalar_t>::type;

}  // namespace aliasfused
