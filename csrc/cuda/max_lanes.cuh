// Lanes of blur_down for maps that something stands before: an affine and an activation, a maximum.
#pragma once

#include <type_traits>

#include "act.cuh"
#include "lanes.cuh"

namespace aliasfused {

// What pixels pass through; those that are `early` do so before a maximum is taken of them, the others after it.

// x itself or its relu. Neither changes which of two pixels is larger, so that a maximum is of pixels as they lie in memory.
struct Plain {
  Prologue told;
  static constexpr bool early = false;

  template <int CHANNELS>
  struct At {
    float floor;
    __device__ At(const Plain& pre, int) : floor(pre.told.act == Act::relu ? 0 : NAN) {}
    __device__ float operator()(float x, int) const { return x <= floor ? floor : x; }
  };
};

// An affine, which may turn channels round, and an activation that is straight: a maximum is of their values.
struct Affine {
  Prologue told;
  index_t channels;
  static constexpr bool early = true;

  template <int CHANNELS>
  struct At {
    float center[CHANNELS], scale[CHANNELS], shift[CHANNELS];
    Straight act;

    __device__ At(const Affine& pre, int c) : act(pre.told) {
      const float* table = static_cast<const float*>(pre.told.affine);
#pragma unroll
      for (int i = 0; i < CHANNELS; ++i) {
        center[i] = table ? table[c + i] : 0;
        scale[i] = table ? table[pre.channels + c + i] : 1;
        shift[i] = table ? table[2 * pre.channels + c + i] : 0;
      }
    }
    __device__ float u(float x, int i) const { return std::fma(x - center[i], scale[i], shift[i]); }
    __device__ float operator()(float x, int i) const { return act.value(u(x, i)); }
  };
};

// The larger of two, or nan where one of them is.
__device__ inline float larger(float a, float b) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  float most;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(most) : "f"(a), "f"(b));
  return most;
#else
  return a > b || a != a ? a : b;
#endif
}
__device__ inline __half larger(__half a, __half b) { return __hmax_nan(a, b); }
__device__ inline __nv_bfloat16 larger(__nv_bfloat16 a, __nv_bfloat16 b) { return __hmax_nan(a, b); }
__device__ inline __half2 larger(__half2 a, __half2 b) { return __hmax2_nan(a, b); }
__device__ inline __nv_bfloat162 larger(__nv_bfloat162 a, __nv_bfloat162 b) { return __hmax2_nan(a, b); }

// What of a pack is compared at once.
template <typename T>
struct Unit {
  using pair = T;
};
template <>
struct Unit<__half> {
  using pair = __half2;
};
template <>
struct Unit<__nv_bfloat16> {
  using pair = __nv_bfloat162;
};

template <typename T, int N>
__device__ inline Pack<T, N> larger(const Pack<T, N>& a, const Pack<T, N>& b) {
  using unit = std::conditional_t<N % 2 == 0, typename Unit<T>::pair, T>;
  Pack<T, N> most;
#pragma unroll
  for (int i = 0; i < static_cast<int>(sizeof(most) / sizeof(unit)); ++i)
    reinterpret_cast<unit*>(most.v)[i] = larger(reinterpret_cast<const unit*>(a.v)[i], reinterpret_cast<const unit*>(b.v)[i]);
  return most;
}

// Rows of z, the maximum over W x W pixels of x. One is the larger of W rows of x, each of which, of(h), is the maxima over W of its
// columns; all but one of these were those of the row before. Beyond the border of x its last row stands for what is not there:
// it is in every window that reaches so far.
template <int W, typename Line>
struct Falling {
  Line kept[W - 1];
  int next = -0x40000000;

  template <typename Of>
  __device__ Line row(int h, Of&& of) {
    if (h != next)
#pragma unroll
      for (int a = 0; a < W - 1; ++a) kept[a] = of(h + a);
    const Line newest = of(h + W - 1);
    Line most = newest;
#pragma unroll
    for (int a = 0; a < W - 1; ++a) most = larger(most, kept[a]);
#pragma unroll
    for (int a = 0; a < W - 1; ++a) kept[a] = a + 1 < W - 1 ? kept[a + 1 < W - 1 ? a + 1 : 0] : newest;
    next = h + 1;
    return most;
  }
};

// Neighbours in a row that are not moved together.
template <typename T, int N>
struct Neighbours {
  T v[N];
};
template <typename T, int N>
__device__ inline Neighbours<T, N> larger(const Neighbours<T, N>& a, const Neighbours<T, N>& b) {
  Neighbours<T, N> most;
#pragma unroll
  for (int i = 0; i < N; ++i) most.v[i] = larger(a.v[i], b.v[i]);
  return most;
}
template <typename T, int N, int M>
struct Packs {
  Pack<T, N> x[M];
};
template <typename T, int N, int M>
__device__ inline Packs<T, N, M> larger(const Packs<T, N, M>& a, const Packs<T, N, M>& b) {
  Packs<T, N, M> most;
#pragma unroll
  for (int i = 0; i < M; ++i) most.x[i] = larger(a.x[i], b.x[i]);
  return most;
}

// Channels of z: V adjoining channels of one output column, for which K columns of z are needed.
template <typename scalar_t, int K, int V, int W, typename Prepare>
struct MaxChannels {
  using Pre = Prepare;
  using T = std::conditional_t<Pre::early, float, scalar_t>;
  static constexpr int values = V, columns = 1, channels = V, ahead = 1, blocks = 2;
  using Raw = Packs<T, V, K>;
  const Strides& stride;
  typename Pre::template At<V> pre;
  const int height, width, top;
  int first[K];  // column of x at which the window of a column of z begins
  bool adjoin;
  float tap[K];
  Falling<W, Raw> falling;

  __device__ MaxChannels(const BlurPool& op, const Taps<K>& taps, const Pre& pre, int c, int col)
      : stride(op.src_stride),
        pre(pre, c),
        height(static_cast<int>(pre.told.height)),
        width(static_cast<int>(pre.told.width)),
        top(static_cast<int>(pre.told.top)),
        adjoin(true) {
    const int in = static_cast<int>(op.cols.in);
#pragma unroll
    for (int q = 0; q < K; ++q) {
      const int t = 2 * col + q - static_cast<int>(op.cols.before), j = extended_source(t, in, op.cols.border);
      tap[q] = j < 0 ? 0 : taps.w[q];
      first[q] = (j < 0 ? clamp(t, in) : j) - static_cast<int>(pre.told.left);
      adjoin = adjoin && first[q] == first[0] + q;
    }
  }

  __device__ Raw load(const scalar_t* src, int row) {
    return falling.row(row - top, [&](int h) { return line(src + clamp(h, height) * stride.h); });
  }

  __device__ void filter(const Raw& raw, float (&out)[V]) const {
#pragma unroll
    for (int v = 0; v < V; ++v) {
      out[v] = 0;
#pragma unroll
      for (int q = 0; q < K; ++q) {
        const float z = static_cast<float>(raw.x[q].v[v]);
        out[v] += tap[q] * (Pre::early ? z : pre(z, v));
      }
    }
  }

 private:
  __device__ Pack<T, V> pixel(const scalar_t* row, int w) const {
    const auto raw = *reinterpret_cast<const Pack<scalar_t, V>*>(row + clamp(w, width) * stride.w);
    if constexpr (!Pre::early) {
      return raw;
    } else {
      Pack<T, V> value;
#pragma unroll
      for (int v = 0; v < V; ++v) value.v[v] = pre(static_cast<float>(raw.v[v]), v);
      return value;
    }
  }

  __device__ Raw line(const scalar_t* row) const {
    Raw most;
    if (adjoin) {
      Pack<T, V> x[K + W - 1];
#pragma unroll
      for (int e = 0; e < K + W - 1; ++e) x[e] = pixel(row, first[0] + e);
#pragma unroll
      for (int q = 0; q < K; ++q) {
        most.x[q] = x[q];
#pragma unroll
        for (int b = 1; b < W; ++b) most.x[q] = larger(most.x[q], x[q + b]);
      }
    } else {
#pragma unroll
      for (int q = 0; q < K; ++q) {
        most.x[q] = pixel(row, first[q]);
#pragma unroll
        for (int b = 1; b < W; ++b) most.x[q] = larger(most.x[q], pixel(row, first[q] + b));
      }
    }
    return most;
  }
};

// RowDown of z. The columns of z beyond either border are among those that the first and the last thread of a row have anyway.
template <typename scalar_t, int K, int P, int W, typename Prepare>
struct MaxRow {
  using Pre = Prepare;
  using T = std::conditional_t<Pre::early, float, scalar_t>;
  static constexpr int values = P, columns = P, channels = 1, ahead = 1, blocks = 2;
  static constexpr int left = (K - 1) / 2, size = 2 * P + K - 2;       // columns of z, from 2 col - left on
  static constexpr int lead = left + (W - 1) / 2, all = size + W - 1;  // of x, from 2 col - lead on
  using Raw = Neighbours<T, size>;
  const index_t step;
  typename Pre::template At<1> pre;
  const Border border;
  const int height, width, top, offset, end;  // end: how many of the columns of z lie ahead of its border
  float tap[K];
  Falling<W, Raw> falling;

  __device__ MaxRow(const BlurPool& op, const Taps<K>& taps, const Pre& pre, int c, int col)
      : step(op.src_stride.h),
        pre(pre, c),
        border(op.cols.border),
        height(static_cast<int>(pre.told.height)),
        width(static_cast<int>(pre.told.width)),
        top(static_cast<int>(pre.told.top)),
        offset(2 * col),
        end(static_cast<int>(op.cols.in) - offset + left) {
#pragma unroll
    for (int q = 0; q < K; ++q) tap[q] = taps.w[q];
  }

  __device__ Raw load(const scalar_t* src, int row) {
    Raw z = falling.row(row - top, [&](int h) { return line(src + clamp(h, height) * step); });
    if (offset == 0)
#pragma unroll
      for (int i = 0; i < left; ++i) z.v[i] = border == Border::reflect ? z.v[2 * left - i] : z.v[left];
    // The border of z is that of x or one column ahead of it.
    if (end <= 2 * P + left) mirror<2 * P + left - 1>(z, end == 2 * P + left - 1), mirror<2 * P + left>(z, end == 2 * P + left);
    return z;
  }

  __device__ void filter(const Raw& raw, float (&out)[P]) const {
    float x[size];
#pragma unroll
    for (int i = 0; i < size; ++i) {
      const float z = static_cast<float>(raw.v[i]);
      const bool zero = border == Border::zeros && ((i < left && offset == 0) || i >= end);
      x[i] = zero ? 0 : Pre::early ? z : pre(z, 0);
    }
#pragma unroll
    for (int v = 0; v < P; ++v) {
      out[v] = 0;
#pragma unroll
      for (int q = 0; q < K; ++q) out[v] += tap[q] * x[2 * v + q];
    }
  }

 private:
  template <int END>
  __device__ void mirror(Raw& z, bool here) const {
#pragma unroll
    for (int i = END; i < size; ++i)
      if (here) z.v[i] = border == Border::reflect ? z.v[2 * END - 2 - i] : z.v[END - 1];
  }

  __device__ T pixel(scalar_t raw) const {
    if constexpr (Pre::early) return pre(static_cast<float>(raw), 0);
    else return raw;
  }

  __device__ Raw line(const scalar_t* row) const {
    const auto middle = *reinterpret_cast<const Pack<scalar_t, 2 * P>*>(row + offset);
    T x[all];
#pragma unroll
    for (int e = 0; e < all; ++e)
      x[e] = pixel(e >= lead && e < lead + 2 * P ? middle.v[e >= lead && e < lead + 2 * P ? e - lead : 0]
                                                 : row[clamp(offset - lead + e, width)]);
    Raw most;
#pragma unroll
    for (int i = 0; i < size; ++i) {
      most.v[i] = x[i];
#pragma unroll
      for (int b = 1; b < W; ++b) most.v[i] = larger(most.v[i], x[i + b]);
    }
    return most;
  }
};

}  // namespace aliasfused
