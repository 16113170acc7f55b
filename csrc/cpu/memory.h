// How pixels come and go: gathered where they do not lie together, asked for ahead of time, written past the caches.
#pragma once

#include "kernels.h"
#include "terms.h"

namespace aliasfused {
namespace AF_ISA {
namespace {

// n pixels, `stride` elements apart, through `load` from a copy without gaps.
template <typename T, typename Load>
INLINED inline auto gathered(const T* p, index_t stride, index_t n, Load&& load) {
  T copy[Lanes<T>::unit] = {};
  for (int i = 0; i < n && i < Lanes<T>::unit; ++i) copy[i] = p[i * stride];
  return load(copy);
}

// Whether the channels of a result's pixel lie side by side (NHWC), rather than the pixels of a row.
inline bool is_pixels(const BlurPool& op) {
  return op.dst_stride.c == 1 && (op.dst_stride.w != 1 || (op.adjoint ? op.cols.in : op.cols.out) == 1);
}

// Whole or partial vectors in natural order, or units in the order of T.
template <bool by_units, typename T>
INLINED inline auto load(const T* p) {
  if constexpr (by_units) return Lanes<T>::load(p);
  else return Lanes<T>::load_vector(p);
}
template <bool by_units, typename T>
INLINED inline auto load(const T* p, int n) {
  if constexpr (by_units) return Lanes<T>::load(p, n);
  else return Lanes<T>::load_vector(p, n);
}

// A vector, or its first n elements: for loops of which only the end is less than whole.
template <typename T>
INLINED inline auto load_upto(const T* p, int n) {
  return n == Vector<acc_t<T>>::lanes ? Lanes<T>::load_vector(p) : Lanes<T>::load_vector(p, n);
}
template <typename T, typename V>
INLINED inline void store_upto(T* p, V v, int n) {
  n == Vector<acc_t<T>>::lanes ? Lanes<T>::store_vector(p, v) : Lanes<T>::store_vector(p, v, n);
}

// Memory that is about to be read, asked for while the processor is busy with what it has: each step of the work asks for
// `share` bytes more.
struct Ahead {
  const char* next;
  index_t share;
  INLINED void operator()() {
    for (index_t i = 0; i < share; i += 64) __builtin_prefetch(next + i, 0, 2);
    next += share;
  }
};

// Asks for the cache lines in which results will lie after the next few, so that stores need not wait for them.
INLINED inline void own_soon(const void* results, int bytes) {
  constexpr int distance = 4096;
  for (int i = 0; i < bytes; i += 64) __builtin_prefetch(static_cast<const char*>(results) + distance + i, 1, 2);
}

// Results on their way to memory. Where sources and results are together more than a cache holds, results bypass it:
// otherwise every line of them would be read before it is written.
constexpr index_t cached_bytes = index_t(48) << 20;
template <typename T>
inline bool bypasses_caches(const BlurPool& op) {
  return op.batch * op.channels * (op.rows.in * op.cols.in + op.rows.out * op.cols.out) * index_t(sizeof(T)) > cached_bytes;
}

// Results in the order of memory, whatever their alignment: they are staged where they will lie within a cache line, so that
// whole lines can go on their way while the rest is still being computed.
template <typename T>
struct Outflow {
  static constexpr index_t line = 64 / sizeof(T), lag = 12 * line;  // what was just stored cannot be loaded yet
  const T* staged;                                                  // lies as dst does
  T* dst;
  index_t next;  // the first element that is still here
  bool bypass;

  static T* stage(T* buffer, const T* dst) { return buffer + reinterpret_cast<uintptr_t>(dst) % 64 / sizeof(T); }
  Outflow(const T* results, T* to, bool bypass_caches)
      : staged(results), dst(to), next(bypass_caches ? -reinterpret_cast<uintptr_t>(to) % 64 / sizeof(T) : 0), bypass(bypass_caches) {}

  // All before `written` is there.
  INLINED void pass(index_t written) {
#if defined(__AVX512BW__)
    if (bypass)
      for (; next + line + lag <= written; next += line) pass_line();
#else
    (void)written;
#endif
  }
  void finish(index_t n) {
    index_t head = 0;
#if defined(__AVX512BW__)
    if (bypass) {
      head = min(n, -reinterpret_cast<uintptr_t>(dst) % 64 / sizeof(T));
      std::memcpy(dst, staged, head * sizeof(T));
      for (; next + line <= n; next += line) pass_line();
      head = max(head, next);
    }
#endif
    if (n > head) std::memcpy(dst + head, staged + head, (n - head) * sizeof(T));
  }

 private:
  INLINED void pass_line() {
#if defined(__AVX512BW__)
    _mm512_stream_si512(reinterpret_cast<__m512i*>(dst + next), _mm512_load_si512(staged + next));
#endif
  }
};

// At the end of a thread's work: what bypassed the caches becomes visible before anything that follows.
inline void settle() {
#if defined(__AVX512BW__)
  _mm_sfence();
#endif
}

// Does all on the caller's thread.
const Parallel serial{
    [](index_t items, index_t, void (*body)(index_t, index_t, const void*), const void* context) { body(0, items, context); }};

// Threads get pieces of at least this many pixels.
constexpr index_t grain_pixels = 1 << 15;

}  // namespace
}  // namespace AF_ISA
}  // namespace aliasfused
