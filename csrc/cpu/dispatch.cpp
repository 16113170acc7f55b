#include "dispatch.h"

#include <torch/csrc/stable/ops.h>

#include <cstdlib>
#include <string>

namespace aliasfused {
namespace {

bool always() { return true; }

struct Isa {
  CpuKernels kernels;
  bool (*supported)();
};

#if defined(__x86_64__)
bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("f16c");
}
#endif

#define ALIASFUSED_CPU_KERNELS(isa) \
  {#isa,                            \
   isa::blur_pool,                  \
   isa::taps_grad,                  \
   isa::max_blur_pool,              \
   isa::channel_moments,            \
   isa::batch_norm_table,           \
   isa::batch_norm_follow,          \
   isa::batch_norm_gradient,        \
   isa::adaptive_blur_pool}

const Isa isas[] = {
#if defined(__x86_64__)
    {ALIASFUSED_CPU_KERNELS(avx512bf16), [] { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }},
    {ALIASFUSED_CPU_KERNELS(avx512), has_avx512},
    {ALIASFUSED_CPU_KERNELS(avx2),
     [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"); }},
#endif
    {ALIASFUSED_CPU_KERNELS(baseline), always},
};

const CpuKernels& choose() {
  const char* wanted = std::getenv("ALIASFUSED_CPU_ISA");
  for (const Isa& isa : isas)
    if (isa.supported() && (!wanted || std::string(wanted) == isa.kernels.name)) return isa.kernels;
  STD_TORCH_CHECK(false, "aliasfused: ALIASFUSED_CPU_ISA must name an instruction set of this processor out of ", cpu_isas(), ", got '",
                  wanted, "'");
}

void run_on_torch_threads(index_t items, index_t grain, void (*body)(index_t, index_t, const void*), const void* context) {
  torch::stable::parallel_for(0, items, grain, [&](index_t begin, index_t end) { body(begin, end, context); });
}

}  // namespace

const CpuKernels& cpu_kernels() {
  static const CpuKernels& chosen = choose();
  return chosen;
}

const char* cpu_isas() {
#if defined(__x86_64__)
  return "avx512bf16,avx512,avx2,baseline";
#else
  return "baseline";
#endif
}

const Parallel& parallel() {
  static const Parallel on_torch_threads{run_on_torch_threads};
  return on_torch_threads;
}

}  // namespace aliasfused
