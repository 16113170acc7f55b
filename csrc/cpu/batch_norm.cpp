// What a batch norm works out per channel, on a CPU: few numbers, on the caller's thread.
#include "kernels.h"

namespace aliasfused {
namespace AF_ISA {

void batch_norm_table(const BatchNormTable& op) {
  for (index_t c = 0; c < op.channels; ++c) op.channel(c);
}

void batch_norm_follow(const BatchNormFollow& op) {
  const double factor = op.factor(op.batches ? ++*op.batches : 0);
  for (index_t c = 0; c < op.channels; ++c) op.channel(c, factor);
}

void batch_norm_gradient(const BatchNormGradient& op) {
  for (index_t c = 0; c < op.channels; ++c) op.channel(c);
}

}  // namespace AF_ISA
}  // namespace aliasfused
