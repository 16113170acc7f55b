// What happens to a map before it is blurred, row by row, and to its gradient afterwards. A row is so many pixels of so many
// channels in the order of memory: all channels of a pixel side by side (NHWC), or one channel (NCHW).
#pragma once

#include "act.h"
#include "memory.h"
#include "rows.h"

namespace aliasfused {
namespace AF_ISA {
namespace {

// The higher of two, or what is nan; of equals the second.
INLINED inline Vec<float> higher(Vec<float> a, Vec<float> b) {
#if defined(__AVX512BW__)
  return a != a ? a : (Vec<float>)_mm512_max_ps(a, b);
#elif defined(__AVX2__)
  return a != a ? a : (Vec<float>)_mm256_max_ps(a, b);
#else
  return (a > b) | (a != a) ? a : b;
#endif
}
INLINED inline Vec<double> higher(Vec<double> a, Vec<double> b) { return (a > b) | (a != a) ? a : b; }

// v in the lanes whose byte is `number`, elsewhere 0. (Compilers widen bytes one by one.)
INLINED inline Vec<float> where_equal(const int8_t* bytes, int number, Vec<float> v) {
#if defined(__AVX512BW__)
  const __m128i all = _mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes));
  return _mm512_maskz_mov_ps(_mm_cmpeq_epi8_mask(all, _mm_set1_epi8(static_cast<char>(number))), v);
#elif defined(__AVX2__)
  const __m128i all = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(bytes));
  const __m128i equal = _mm_cmpeq_epi8(all, _mm_set1_epi8(static_cast<char>(number)));
  return _mm256_and_ps(_mm256_castsi256_ps(_mm256_cvtepi8_epi32(equal)), v);
#else
  for (int i = 0; i < Vector<float>::lanes; ++i) v[i] = bytes[i] == number ? v[i] : 0;
  return v;
#endif
}
INLINED inline Vec<double> where_equal(const int8_t* bytes, int number, Vec<double> v) {
  for (int i = 0; i < Vector<double>::lanes; ++i) v[i] = bytes[i] == number ? v[i] : 0;
  return v;
}

// (x - center) * scale + shift, a vector of channels.
template <typename acc>
struct Affine {
  Vec<acc> center, scale, shift;
  INLINED Vec<acc> operator()(Vec<acc> x) const { return (x - center) * scale + shift; }
};

template <typename T, bool PIXELS>
struct PrologueRows {
  using acc = acc_t<T>;
  using V = Vector<acc>;
  using Bits = typename V::index;
  static constexpr int lanes = V::lanes;

  const MaxBlurPool& op;
  const Prologue& pre = op.pre;
  index_t channels = PIXELS ? op.blur.channels : 1;  // of a row
  index_t row = pre.width * channels;                // elements
  index_t z_row = op.blur.cols.in * channels, z_rows = op.blur.rows.in;
  index_t reach = (pre.kernel_w - 1) * channels;  // by what a window is wider than a pixel
  index_t left = pre.left * channels;
  index_t extended = z_row + reach;  // a row of v with its border
  bool has_max = pre.kernel_h > 1 || pre.kernel_w > 1;

  MapRows<T> rows_of(const void* x, const Strides& s) const { return {x, s, pre.height, pre.width, channels}; }

  // The tables of one call: (3, channels) affine and (2, channels) correction, rows padded to whole vectors.
  struct Tables {
    index_t pitch;
    Scratch<acc> values;
    const bool affine, correction;
    explicit Tables(const MaxBlurPool& op)
        : pitch(round_up(op.blur.channels, lanes) + lanes),
          values(5 * pitch),
          affine(op.pre.affine != nullptr),
          correction(op.correction != nullptr) {
      const index_t n = op.blur.channels;
      for (index_t c = 0; c < pitch; ++c)
        for (int i = 0; i < 5; ++i) {
          const acc* from = static_cast<const acc*>(i < 3 ? op.pre.affine : op.correction);
          const bool there = c < n && (i < 3 ? affine : correction);
          values.data[i * pitch + c] = there ? from[(i < 3 ? i : i - 3) * n + c] : acc(i == 1);
        }
    }
    // Of channel c: for all lanes, or with PIXELS for the channels from c on.
    INLINED Vec<acc> at(int i, index_t c) const {
      const acc* p = values.data + i * pitch + c;
      return PIXELS ? V::load(p) : Vec<acc>{} + *p;
    }
    INLINED Affine<acc> affine_of(index_t c) const { return {at(0, c), at(1, c), at(2, c)}; }
  };

  // f(e, n, c) for vectors of n elements from e on, which are of channel c (and the next ones): whole vectors, but for the end of
  // a row, or where per_channel and PIXELS of a pixel.
  template <typename F>
  INLINED void each(index_t elements, index_t c, bool per_channel, F&& f) const {
    const index_t run = PIXELS && per_channel ? channels : elements;
    for (index_t start = 0; start < elements; start += run) {
      index_t i = 0;
      for (; i + lanes <= run; i += lanes) f(start + i, lanes, PIXELS ? i : c);
      if (i < run) f(start + i, static_cast<int>(run - i), PIXELS ? i : c);
    }
  }
  INLINED static Vec<acc> load(const T* p, int n) { return n == lanes ? Lanes<T>::load_vector(p) : Lanes<T>::load_vector(p, n); }
  INLINED static void store(T* p, Vec<acc> v, int n) { n == lanes ? Lanes<T>::store_vector(p, v) : Lanes<T>::store_vector(p, v, n); }

  // act of some elements of x, and what `put` does with it.
  template <typename A, typename Put>
  INLINED void activate(const A act, const Tables& tables, const T* x, index_t elements, index_t c, Put&& put) const {
    const bool affine = tables.affine;
    each(elements, c, affine, [&](index_t e, int n, index_t k) INLINED {
      Vec<acc> u = load(x + e, n);
      if (affine) u = tables.affine_of(k)(u);
      put(e, act.value(u), n);
    });
  }
  template <typename A>
  NOINLINED void activate_alone(const A act, const Tables& tables, const T* x, index_t elements, index_t c, T* z) const {
    activate(act, tables, x, elements, c, [=](index_t e, Vec<acc> v, int n) INLINED { store(z + e, v, n); });
  }
  // v of a row of x, -inf around it.
  template <typename A>
  NOINLINED void activate_row(const A act, const Tables& tables, const T* x, index_t c, acc* v) const {
    for (index_t e = 0; e < left; ++e) v[e] = -acc(__builtin_inf());
    activate(act, tables, x, row, c, [to = v + left](index_t e, Vec<acc> value, int) INLINED { V::store(to + e, value); });
    for (index_t e = left + row; e < extended + lanes; ++e) v[e] = -acc(__builtin_inf());
  }

  // z, rounded: the maximum of `rows` rows of v and k pixels of each.
  template <int ROWS, int K>
  NOINLINED static void maxima(const acc* const* v, int rows, int k, index_t n, index_t step, T* z) {
    const int height = ROWS ? ROWS : rows, width = K ? K : k;
    const acc* from[ROWS ? ROWS : 1];
    for (int a = 0; a < ROWS; ++a) from[a] = v[a];
    const auto put = [=](index_t e, int some) INLINED {
      Vec<acc> m = V::load((ROWS ? from[0] : v[0]) + e);
#pragma GCC unroll 4
      for (int a = 0; a < height; ++a)
#pragma GCC unroll 4
        for (int b = a ? 0 : 1; b < width; ++b) m = higher(V::load((ROWS ? from[ROWS ? a : 0] : v[a]) + e + b * step), m);
      store(z + e, m, some);
    };
    index_t e = 0;
    for (; e + lanes <= n; e += lanes) put(e, lanes);
    if (e < n) put(e, static_cast<int>(n - e));
  }

  // For gradients a maximum is taken along rows first, then across them; each keeps the order in which equals are decided. Which
  // pixel of its row a maximum is, and which row, are numbers in bytes; -1 is none.

  // highest: of every window of a row of v, and its pixel, of which there is none behind either end.
  template <int K>
  NOINLINED static void along(const acc* v, index_t n, index_t step, int k, index_t pixels_ahead, acc* highest, int8_t* which) {
    const int count = K ? K : k;
    const index_t reach = step * (count - 1);
    const auto some = [=](index_t begin, index_t end, int first) INLINED {
      for (index_t e = begin; e < end; e += lanes) {
        Vec<acc> m = V::load(v + e + first * step);
        Bits best = Bits{} + first;
#pragma GCC unroll 4
        for (int b = first + 1; b < count; ++b) {
          const Vec<acc> value = V::load(v + e + b * step);
          const auto wins = (value > m) | (value != value);
          m = wins ? value : m;
          best = wins ? Bits{} + b : best;
        }
        V::store(highest + e, m);
        store_bytes(which + reach + e, best);
      }
    };
    // Of windows that begin ahead of x the first pixel is the first one in x, should all be -inf.
    const index_t ahead = min(pixels_ahead, n / step);
    for (index_t p = 0; p < ahead; ++p) some(p * step, (p + 1) * step, static_cast<int>(pixels_ahead - p));
    some(ahead * step, n, 0);
    std::memset(which, -1, reach);
    std::memset(which + reach + n, -1, reach + lanes);
  }

  // The row that the highest of `rows` is in, of which the first is called `first`.
  template <int K>
  NOINLINED static void across(const acc* const* highest, int rows, int first, index_t n, int8_t* which) {
    const int count = K ? K : rows;
    const acc* from[K ? K : 1];
    for (int a = 0; a < K; ++a) from[a] = highest[a];
    for (index_t e = 0; e < n; e += lanes) {
      Vec<acc> m = V::load((K ? from[0] : highest[0]) + e);
      Bits best = Bits{} + first;
#pragma GCC unroll 4
      for (int a = 1; a < count; ++a) {
        const Vec<acc> value = V::load((K ? from[K ? a : 0] : highest[a]) + e);
        const auto wins = (value > m) | (value != value);
        m = wins ? value : m;
        best = wins ? Bits{} + (first + a) : best;
      }
      store_bytes(which + e, best);
    }
  }

  // The gradient of the maxima along a row: what they have won across `count` rows of windows, in which they are row first,
  // first - 1, ... ; and 0 behind either end.
  template <int K>
  NOINLINED static void won_across(const int8_t* const* which, const T* const* g, int rows, int first, index_t n, index_t reach, acc* won) {
    const int count = K ? K : rows;
    for (index_t e = 0; e < reach; ++e) won[e] = 0;
    for (index_t e = 0; e < n; e += lanes) {
      Vec<acc> sum{};
#pragma GCC unroll 4
      for (int i = 0; i < count; ++i) {
        const Vec<acc> value = load(g[i] + e, static_cast<int>(min(n - e, lanes)));
        sum += where_equal(which[i] + e, first - i, value);
      }
      V::store(won + reach + e, sum);
    }
    for (index_t e = n + reach; e < n + 2 * reach + lanes; ++e) won[e] = 0;
  }

  // dv: of those what the pixels of the row have won. Its first pixel is pixel `left` of the first window's row.
  template <int K>
  NOINLINED static void won_along(const int8_t* which, const acc* won, index_t n, index_t step, int k, index_t left, acc* dv) {
    const int count = K ? K : k;
    const index_t start = step * (count - 1) + left;
    for (index_t e = 0; e < n; e += lanes) {
      Vec<acc> sum{};
#pragma GCC unroll 4
      for (int b = 0; b < count; ++b) {
        const index_t at = start + e - b * step;
        sum += where_equal(which + at, b, V::load(won + at));
      }
      V::store(dv + e, sum);
    }
  }

  typedef int8_t Bytes __attribute__((vector_size(lanes)));
  INLINED static void store_bytes(int8_t* p, Bits bits) {
    const Bytes bytes = __builtin_convertvector(bits, Bytes);
    std::memcpy(p, &bytes, sizeof bytes);
  }
  // dx of some elements from x and dv; what they add to the channels' sums, in `part` (2, channels), goes to `sums`.
  template <typename A, typename G>
  NOINLINED void gradient(const A act, const Tables& tables, const T* x, const G* dv, index_t elements, index_t c, T* dx, acc* part,
                          double* sums) const {
    const bool per_channel = tables.affine || tables.correction || sums;
    const index_t pitch = round_up(channels, lanes);
    if (sums)
      for (index_t i = 0; i < 2 * (PIXELS ? pitch : lanes); ++i) part[i] = 0;
    Vec<acc> sum{}, moment{};
    each(elements, c, per_channel, [&](index_t e, int n, index_t k) INLINED {
      const Vec<acc> value = load(x + e, n), center = tables.at(0, k);
      const Vec<acc> u = tables.affine ? tables.affine_of(k)(value) : value;
      Vec<acc> du = act.slope(u);
      if constexpr (std::is_same_v<G, T>) du *= load(dv + e, n);
      else du *= V::load(dv + e);
      if (sums) {
        for (int i = n; i < lanes; ++i) du[i] = 0;
        const Vec<acc> m = du * (value - center);
        if (PIXELS) {
          V::store(part + k, V::load(part + k) + du);
          V::store(part + pitch + k, V::load(part + pitch + k) + m);
        } else {
          sum += du, moment += m;
        }
      }
      if (!dx) return;
      if (tables.affine) du *= tables.at(1, k);
      if (tables.correction) du += tables.at(3, k) + tables.at(4, k) * (value - center);
      store(dx + e, du, n);
    });
    if (!sums) return;
    if (PIXELS) {
      for (index_t k = 0; k < channels; ++k) sums[k] += part[k], sums[channels + k] += part[pitch + k];
    } else {
      for (int i = 0; i < lanes; ++i) sums[0] += sum[i], sums[1] += moment[i];
    }
  }
};

}  // namespace
}  // namespace AF_ISA
}  // namespace aliasfused
