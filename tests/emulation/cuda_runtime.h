// Enough of CUDA to run kernels on a CPU, one thread after the other: g++ finds this header in place of the toolkit's.
//
// Threads run in turn on one fiber, until one reaches __syncthreads(): it stays there with its fiber, and the rest go on in
// a new one. When all threads of the block wait, they are resumed. Threads that meet different numbers of barriers are an
// error. Odd blocks run their threads backwards, so that a kernel which needs an order gives different results.
#pragma once

#include <ucontext.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __grid_constant__
#define __launch_bounds__(...)
#define __shared__ static

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0 };
inline const char* cudaGetErrorString(cudaError_t) { return "an error"; }

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
};

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulation {

constexpr size_t stack_bytes = 256 << 10;

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[stack_bytes]};
  unsigned thread = 0;
};

inline std::vector<std::unique_ptr<Fiber>> fibers;
inline ucontext_t scheduler;
inline Fiber* current = nullptr;
inline std::function<void()> body;
inline unsigned started, finished;

inline void set_thread(unsigned thread) {
  current->thread = thread;
  threadIdx = dim3(thread, 0, 0);
}

inline void run_threads() {
  while (started < blockDim.x) {
    const unsigned turn = started++;
    set_thread(blockIdx.x % 2 ? blockDim.x - 1 - turn : turn);
    body();
    ++finished;
  }
  setcontext(&scheduler);
}

inline void resume(Fiber& fiber) {
  current = &fiber;
  set_thread(fiber.thread);
  swapcontext(&scheduler, &fiber.context);
}

inline void run_block() {
  size_t used = 0;
  for (started = finished = 0; started < blockDim.x;) {
    if (used == fibers.size()) fibers.push_back(std::make_unique<Fiber>());
    Fiber& fiber = *fibers[used++];
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = stack_bytes;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, run_threads, 0);
    resume(fiber);
  }
  while (finished < blockDim.x) {
    if (finished != 0) {
      std::fprintf(stderr, "__syncthreads() was not reached by every thread\n");
      std::abort();
    }
    for (size_t i = 0; i < used; ++i) resume(*fibers[i]);
  }
}

}  // namespace emulation

inline void __syncthreads() { swapcontext(&emulation::current->context, &emulation::scheduler); }

template <typename... Params, typename... Args>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Params...), const Args&... args) {
  blockDim = config->blockDim, gridDim = config->gridDim;
  emulation::body = [&] { kernel(args...); };
  for (unsigned b = 0; b < gridDim.x; ++b) {
    blockIdx = dim3(b, 0, 0);
    emulation::run_block();
  }
  return cudaSuccess;
}
