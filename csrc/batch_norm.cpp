// The ops of the batch norm as torch calls them: arguments in, outputs allocated, the device's kernel called.
#include "batch_norm.h"

#include "cpu/dispatch.h"
#include "tensor.h"
#ifdef ALIASFUSED_CUDA
#include "cuda/batch_norm.h"
#include "cuda/device.h"
#endif

namespace aliasfused {
namespace {

using OptionalTensor = std::optional<Tensor>;

struct OnCpu {
  static void run(const BatchNormTable& op, const Tensor&) { cpu_kernels().batch_norm_table(op); }
  static void run(const BatchNormFollow& op, const Tensor&) { cpu_kernels().batch_norm_follow(op); }
  static void run(const BatchNormGradient& op, const Tensor&) { cpu_kernels().batch_norm_gradient(op); }
};

#ifdef ALIASFUSED_CUDA
struct OnCuda {
  template <typename Op>
  static void run(const Op& op, const Tensor& t) {
    on_device(t, [&](void* stream) { return batch_norm_cuda(op, stream); });
  }
};
#endif

Numbers numbers(const Tensor& t) { return {t.data_ptr(), t.scalar_type() == ScalarType::Double}; }

// A tensor's numbers as kernels take them, and what of them must stay alive during the call.
struct Held {
  Tensor own, held;

  Held() = default;
  // Of a dtype that kernels know.
  Held(const Tensor& t, ScalarType dtype) : own(t), held(t) {
    if (t.scalar_type() == dtype && t.is_contiguous()) return;
    held = torch::stable::new_empty(t, t.sizes(), dtype);
    torch::stable::copy_(held, t);
  }
  // One row, if `rows` is 0, or as many, of a number for every channel.
  Held(const Tensor& t, int64_t rows, int64_t channels, const Tensor& like, const char* name)
      : Held(t, t.scalar_type() == ScalarType::Float ? ScalarType::Float : ScalarType::Double) {
    const int64_t last = rows ? 1 : 0;
    STD_TORCH_CHECK(t.dim() == last + 1 && (!rows || t.size(0) == rows) && t.size(last) == channels && t.device() == like.device(),
                    "aliasfused: ", name, " must have the shape (", rows ? std::to_string(rows) + ", " : "", channels, rows ? ")" : ",)",
                    " and lie on the device of the statistics");
  }
  Numbers operator*() const { return held.defined() ? numbers(held) : Numbers{}; }
  // What was written goes where it came from.
  void settle() {
    if (held.get() != own.get()) torch::stable::copy_(own, held);
  }
};

Held optional(const OptionalTensor& t, const Tensor& like, const char* name) { return t ? Held(*t, 0, like.size(0), like, name) : Held(); }

template <typename Device>
Tensor table(Tensor mean, Tensor var, OptionalTensor count, OptionalTensor weight, OptionalTensor bias, double eps, bool wide) {
  STD_TORCH_CHECK(mean.dim() == 1, "aliasfused: mean must have one dimension (C,), got ", mean.dim());
  const int64_t channels = mean.size(0);
  const Held held[] = {Held(mean, 0, channels, mean, "mean"), Held(var, 0, channels, mean, "var"), optional(count, mean, "count"),
                       optional(weight, mean, "weight"), optional(bias, mean, "bias")};
  Tensor result = torch::stable::new_empty(mean, {3, channels}, wide ? ScalarType::Double : ScalarType::Float);
  if (channels) Device::run(BatchNormTable{channels, eps, *held[0], *held[1], *held[2], *held[3], *held[4], numbers(result)}, mean);
  return result;
}

template <typename Device>
void follow(Tensor running_mean, Tensor running_var, OptionalTensor num_batches_tracked, Tensor moments, std::optional<double> momentum) {
  STD_TORCH_CHECK(running_mean.dim() == 1, "aliasfused: running_mean must have one dimension (C,), got ", running_mean.dim());
  STD_TORCH_CHECK(!num_batches_tracked || (num_batches_tracked->numel() == 1 && num_batches_tracked->device() == running_mean.device()),
                  "aliasfused: num_batches_tracked must be one number on the device of the statistics");
  STD_TORCH_CHECK(momentum || num_batches_tracked, "aliasfused: without a momentum batches must be counted by num_batches_tracked");
  const int64_t channels = running_mean.size(0);
  if (channels == 0) return;
  Held mean(running_mean, 0, channels, running_mean, "running_mean"), var(running_var, 0, channels, running_mean, "running_var");
  const Held source(moments, 3, channels, running_mean, "moments");
  Held batches;
  if (num_batches_tracked) batches = Held(*num_batches_tracked, ScalarType::Long);
  Device::run(BatchNormFollow{channels, !momentum, momentum.value_or(0), *source, *mean, *var, static_cast<index_t*>((*batches).data)},
              running_mean);
  mean.settle(), var.settle(), batches.settle();
}

template <typename Device>
std::tuple<Tensor, Tensor, Tensor> gradient(Tensor sums, Tensor moments, Tensor table, double eps) {
  STD_TORCH_CHECK(table.dim() == 2, "aliasfused: table must have two dimensions (3, C), got ", table.dim());
  STD_TORCH_CHECK(table.scalar_type() == ScalarType::Float || table.scalar_type() == ScalarType::Double,
                  "aliasfused: table must be of float32 or float64, as batch_norm_table gives it");
  const int64_t channels = table.size(1);
  const Held held[] = {Held(sums, 2, channels, table, "sums"), Held(moments, 3, channels, table, "moments"),
                       Held(table, 3, channels, table, "table")};
  const auto empty = [&](const auto& shape) { return torch::stable::new_empty(table, shape); };
  const std::vector<int64_t> row{channels}, rows{2, channels};
  Tensor correction = empty(rows), dweight = empty(row), dbias = empty(row);
  if (channels)
    Device::run(BatchNormGradient{channels, eps, *held[0], *held[1], *held[2], numbers(correction), numbers(dweight), numbers(dbias)},
                table);
  return {correction, dweight, dbias};
}

template <typename Device>
void register_ops(torch::stable::detail::StableLibrary& m) {
  m.impl("batch_norm_table", TORCH_BOX(&table<Device>));
  m.impl("batch_norm_follow", TORCH_BOX(&follow<Device>));
  m.impl("batch_norm_gradient", TORCH_BOX(&gradient<Device>));
}

STABLE_TORCH_LIBRARY_IMPL(aliasfused, CPU, m) { register_ops<OnCpu>(m); }
#ifdef ALIASFUSED_CUDA
STABLE_TORCH_LIBRARY_IMPL(aliasfused, CUDA, m) { register_ops<OnCuda>(m); }
#endif

}  // namespace
}  // namespace aliasfused
