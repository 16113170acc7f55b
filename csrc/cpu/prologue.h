// What happens to a map before it is blurred, row by row, and to its gradient afterwards. A row is so many pixels of so many
// channels in the order of memory: all channels of a pixel side by side (NHWC), or one channel (NCHW).
#pragma once

#include "act.h"
#include "highest.h"
#include "memory.h"
#include "rows.h"

namespace aliasfused {
namespace AF_ISA {
namespace {

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
  // Gradients of x as vectors that are whole lines of a cache bypass it where it cannot hold x and them.
  bool bypass = 2 * op.blur.batch * op.blur.channels * pre.height * pre.width * index_t(sizeof(T)) > cached_bytes;

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

  // act of some elements of x, and what `put` does with it.
  template <typename A, typename Put>
  INLINED void activate(const A act, const Tables& tables, const T* x, index_t elements, index_t c, Put&& put) const {
    const bool affine = tables.affine;
    each(elements, c, affine, [&](index_t e, int n, index_t k) INLINED {
      Vec<acc> u = load_upto(x + e, n);
      if (affine) u = tables.affine_of(k)(u);
      put(e, act.value(u), n);
    });
  }
  template <typename A>
  NOINLINED void activate_alone(const A act, const Tables& tables, const T* x, index_t elements, index_t c, T* z) const {
    activate(act, tables, x, elements, c, [=](index_t e, Vec<acc> v, int n) INLINED { store_upto(z + e, v, n); });
  }
  // v of a row of x.
  template <typename A>
  NOINLINED void activate_row(const A act, const Tables& tables, const T* x, index_t c, acc* v) const {
    activate(act, tables, x, row, c, [=](index_t e, Vec<acc> value, int) INLINED { V::store(v + e, value); });
  }
  // -inf around a row that begins at v + left.
  void surround(acc* v) const {
    for (index_t e = 0; e < left; ++e) v[e] = -acc(__builtin_inf());
    for (index_t e = left + row; e < extended + lanes; ++e) v[e] = -acc(__builtin_inf());
  }

  // A maximum may be taken of x itself where that makes no difference: if x < y then v(x) <= v(y), and where v(x) = v(y) neither
  // has a slope.
  bool is_monotone() const { return !pre.affine && (pre.act == Act::none || pre.act == Act::relu || pre.act == Act::relu6); }

  static constexpr int ahead = 16384;  // bytes that are asked for before they are read

  // Forward, maxima are taken across rows first: each pixel of v is loaded once for all windows that it is in side by side.

  // highest: of n pixels, from `begin` on, of `rows` rows, which are those of v, or those of x and activated afterwards.
  template <int ROWS, typename A, typename E>
  NOINLINED static void across_rows(const A act, const E* const* of, int rows, index_t begin, index_t n, acc* highest) {
    const int height = ROWS ? ROWS : rows;
    const E* from[ROWS ? ROWS : 1];
    for (int a = 0; a < ROWS; ++a) from[a] = of[a];
    const E* const newest = of[height - 1];
    const auto some = [=](index_t e, auto&& load_from) INLINED {
      if (std::is_same_v<E, T>) __builtin_prefetch(reinterpret_cast<const char*>(newest + e) + ahead, 0, 2);
      Vec<acc> m = load_from((ROWS ? from[0] : of[0]) + e);
#pragma GCC unroll 4
      for (int a = 1; a < height; ++a) m = higher(load_from((ROWS ? from[ROWS ? a : 0] : of[a]) + e), m);
      V::store(highest + e, act.value(m));
    };
    index_t e = begin;
    const index_t end = begin + n;
    for (; e + lanes <= end; e += lanes) some(e, [](const E* p) INLINED { return Lanes<E>::load_vector(p); });
    if (e < end) some(e, [left = static_cast<int>(end - e)](const E* p) INLINED { return Lanes<E>::load_vector(p, left); });
  }
  // z, rounded: the maximum of k pixels.
  template <int K>
  NOINLINED static void along_row(const acc* v, int k, index_t n, index_t step, T* z) {
    const int width = K ? K : k;
    const auto put = [=](index_t e, int some) INLINED {
      Vec<acc> m = V::load(v + e);
#pragma GCC unroll 4
      for (int b = 1; b < width; ++b) m = higher(V::load(v + e + b * step), m);
      store_upto(z + e, m, some);
    };
    index_t e = 0;
    for (; e + lanes <= n; e += lanes) put(e, lanes);
    if (e < n) put(e, static_cast<int>(n - e));
  }

  // For gradients a maximum is taken along rows first, then across them; each keeps the order in which equals are decided. Which
  // pixel of its row a maximum is, and which row, are numbers in bytes; -1 is none.

  // highest: of every window of a row of v, or of x with nothing around it, and its pixel, of which there is none behind either
  // end.
  template <typename E>
  NOINLINED static void along(const E* v, index_t n, index_t step, int count, index_t pixels_ahead, acc* highest, int8_t* which) {
    const index_t reach = step * (count - 1);
    const auto one = [=](index_t e, int first, auto&& load_from) INLINED {
      if (std::is_same_v<E, T>) __builtin_prefetch(reinterpret_cast<const char*>(v + e) + ahead, 0, 2);
      Highest<acc> best(load_from(v + e + first * step), first);
#pragma GCC unroll 4
      for (int b = first + 1; b < count; ++b) best.meet(load_from(v + e + b * step), b);
      V::store(highest + e, best.value);
      best.store_number(which + reach + e);
    };
    const auto some = [=](index_t begin, index_t end, int first) INLINED {
      index_t e = begin;
      for (; e + lanes <= end; e += lanes) one(e, first, [](const E* p) INLINED { return Lanes<E>::load_vector(p); });
      if (e < end) one(e, first, [left = static_cast<int>(end - e)](const E* p) INLINED { return Lanes<E>::load_vector(p, left); });
    };
    // Of windows that begin ahead of x the first pixel is the first one in x, should all be -inf.
    const index_t ahead = min(pixels_ahead, n / step);
    for (index_t p = 0; p < ahead; ++p) some(p * step, (p + 1) * step, static_cast<int>(pixels_ahead - p));
    some(ahead * step, n, 0);
    V::store(highest + n, Vec<acc>{});  // for those who read whole vectors
    std::memset(which, -1, reach);
    std::memset(which + reach + n, -1, reach + lanes);
  }

  // The row that the highest of `rows` is in, of which the first is called `first`.
  NOINLINED static void across(const acc* const* highest, int rows, int first, index_t n, int8_t* which) {
    for (index_t e = 0; e < n; e += lanes) {
      Highest<acc> best(V::load(highest[0] + e), first);
      for (int a = 1; a < rows; ++a) best.meet(V::load(highest[a] + e), first + a);
      best.store_number(which + e);
    }
  }

  // The gradient of the maxima along a row: what they have won across `count` rows of windows, in which they are row first,
  // first - 1, ... ; and 0 behind either end.
  NOINLINED static void won_across(const int8_t* const* which, const T* const* g, int count, int first, index_t n, index_t reach,
                                   acc* won) {
    const auto some = [=](index_t e, int most) INLINED {
      Vec<acc> sum{};
      for (int i = 0; i < count; ++i) sum = add_where_equal(sum, which[i] + e, first - i, load_upto(g[i] + e, most));
      V::store(won + reach + e, sum);
    };
    for (index_t e = 0; e < reach; ++e) won[e] = 0;
    index_t e = 0;
    for (; e + lanes <= n; e += lanes) some(e, lanes);
    if (e < n) some(e, static_cast<int>(n - e));
    for (e = n + reach; e < n + 2 * reach + lanes; ++e) won[e] = 0;
  }

  // dv: of those what the pixels of the row have won. Its first pixel is pixel `left` of the first window's row.
  NOINLINED static void won_along(const int8_t* which, const acc* won, index_t n, index_t step, int count, index_t left, acc* dv) {
    const index_t start = step * (count - 1) + left;
    for (index_t e = 0; e < n; e += lanes) {
      Vec<acc> sum{};
      for (int b = 0; b < count; ++b) {
        const index_t at = start + e - b * step;
        sum = add_where_equal(sum, which + at, b, V::load(won + at));
      }
      V::store(dv + e, sum);
    }
  }

  // dx of some elements from x and dv; what they add to the channels' sums, in `part` (2, channels), goes to `sums`.
  template <typename A, typename G>
  NOINLINED void gradient(const A act, const Tables& tables, const T* x, const G* dv, index_t elements, index_t c, T* dx, acc* part,
                          double* sums) const {
    const bool per_channel = tables.affine || tables.correction || sums;
    [[maybe_unused]] const bool streams =
        bypass && reinterpret_cast<uintptr_t>(dx) % 64 == 0 && (!PIXELS || !per_channel || channels % lanes == 0);
    const auto put = [=](T* to, Vec<acc> v, int n) INLINED {
#if defined(__AVX512BW__)
      if constexpr (sizeof(T) == 4)
        if (streams && n == lanes) return _mm512_stream_ps(to, v);
#endif
      store_upto(to, v, n);
    };
    const auto given = [=](index_t e, int n) INLINED {
      if constexpr (std::is_same_v<G, T>) return load_upto(dv + e, n);
      else return V::load(dv + e);
    };
    if (!per_channel)
      return each(elements, c, false,
                  [=](index_t e, int n, index_t) INLINED { put(dx + e, act.gradient(load_upto(x + e, n), given(e, n)), n); });
    const index_t pitch = round_up(channels, lanes);
    if (sums)
      for (index_t i = 0; i < 2 * (PIXELS ? pitch : lanes); ++i) part[i] = 0;
    Vec<acc> sum{}, moment{};
    each(elements, c, true, [&](index_t e, int n, index_t k) INLINED {
      const Vec<acc> value = load_upto(x + e, n), center = tables.at(0, k);
      Vec<acc> du = act.gradient(tables.affine ? tables.affine_of(k)(value) : value, given(e, n));
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
      put(dx + e, du, n);
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
