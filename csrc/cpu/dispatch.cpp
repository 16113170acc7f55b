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

const Isa isas[] = {
#if defined(__x86_64__)
    {{"avx512bf16", avx512bf16::blur_pool, avx512bf16::taps_grad, avx512bf16::max_blur_pool, avx512bf16::channel_moments,
      avx512bf16::adaptive_blur_pool},
     [] { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }},
    {{"avx512", avx512::blur_pool, avx512::taps_grad, avx512::max_blur_pool, avx512::channel_moments, avx512::adaptive_blur_pool},
     has_avx512},
    {{"avx2", avx2::blur_pool, avx2::taps_grad, avx2::max_blur_pool, avx2::channel_moments, avx2::adaptive_blur_pool},
     [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"); }},
#endif
    {{"baseline", baseline::blur_pool, baseline::taps_grad, baseline::max_blur_pool, baseline::channel_moments,
      baseline::adaptive_blur_pool},
     always},
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
