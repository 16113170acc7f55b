// The moments of every channel, on a CPU. Pixels are summed in vectors, as differences from a pivot: the mean of those ahead
// or, for the first ones, of a few of themselves. (A single pixel may lie far from all others.) After `pixels_of_sum` of them
// to a lane, sums go on in double.
#include "kernels.h"
#include "rows.h"

namespace aliasfused {
namespace AF_ISA {
namespace {

constexpr index_t item_elements = 1 << 16;  // that are summed one after the other

// Sums about a pivot, a lane each.
template <typename acc>
struct Sums {
  typename Vector<acc>::type pivot, sum, square;
  INLINED void add(typename Vector<acc>::type x) {
    const auto d = x - pivot;
    sum += d, square += d * d;
  }
};

// Pixels of one channel, in a run.
template <typename T>
struct Run {
  using acc = acc_t<T>;
  using V = Vector<acc>;
  static constexpr int unit = Lanes<T>::unit, lanes = V::lanes;

  static void add(const T* p, index_t n, Moments& m) {
    constexpr index_t most = pixels_of_sum * unit;
    for (; n > 0; p += most, n -= most) m.merge(some(p, min(n, most)));
  }

 private:
  NOINLINED static Moments some(const T* p, index_t n) {
    const index_t whole = n / unit;
    const int rest = static_cast<int>(n % unit);
    const Unit<acc> first = whole ? Lanes<T>::load(p) : Lanes<T>::load(p, rest);
    const auto pivot = typename V::type{} + static_cast<acc>(across(first.a, first.b) / static_cast<double>(min(n, unit)));
    Sums<acc> a{pivot, {}, {}}, b = a;
    for (index_t i = 0; i < whole; ++i) {
      const Unit<acc> x = Lanes<T>::load(p + i * unit);
      a.add(x.a), b.add(x.b);
    }
    if (rest) {
      // The lanes beyond the last pixel see the pivot.
      const Unit<acc> x = Lanes<T>::load(p + whole * unit, rest), lane = from_natural<T>(Unit<acc>{number(0), number(lanes)});
      a.add(lane.a < static_cast<acc>(rest) ? x.a : pivot), b.add(lane.b < static_cast<acc>(rest) ? x.b : pivot);
    }
    const double count = static_cast<double>(n), sum = across(a.sum, b.sum);
    return {count, pivot[0] + sum / count, across(a.square, b.square) - sum * sum / count};
  }

  // The sum over all lanes.
  INLINED static double across(typename V::type a, typename V::type b) {
    typedef double Wide __attribute__((vector_size(64)));
    typedef acc Narrow __attribute__((vector_size(8 * sizeof(acc))));
    Narrow parts[unit / 8];
    std::memcpy(parts, &a, sizeof a), std::memcpy(reinterpret_cast<char*>(parts) + sizeof a, &b, sizeof b);
    Wide w{};
    for (const Narrow& part : parts) w += __builtin_convertvector(part, Wide);
    return ((w[0] + w[4]) + (w[1] + w[5])) + ((w[2] + w[6]) + (w[3] + w[7]));
  }
  INLINED static typename V::type number(int start) {
    typename V::type v;
    for (int i = 0; i < lanes; ++i) v[i] = static_cast<acc>(start + i);
    return v;
  }
};

// Pixels whose channels lie side by side, in runs. Means and squared distances go to (2, channels) doubles.
template <typename T>
struct Pixels {
  using acc = acc_t<T>;
  using V = Vector<acc>;
  static constexpr int unit = Lanes<T>::unit, lanes = V::lanes, together = 4, first_few = 8;

  // Of every channel the sums about its pivot, in the order of units.
  index_t channels, pitch = round_up(channels, unit);
  Scratch<acc> pivot{pitch}, sum{pitch}, square{pitch};

  void add(const T* p, index_t n, double& count, double* mean) const {
    if (count == 0) start(p, min(n, first_few));
    for (; n > 0; p += pixels_of_sum * channels, n -= pixels_of_sum) {
      const index_t some = min(n, pixels_of_sum);
      index_t i = 0;
      for (; i + together <= some; i += together) pixels<together>(p + i * channels);
      for (; i < some; ++i) pixels<1>(p + i * channels);
      merge(static_cast<double>(some), count, mean, mean + channels);
      count += static_cast<double>(some);
    }
  }

 private:
  // f(c, load) for every unit of channels.
  template <typename F>
  INLINED void each(F&& f) const {
    index_t c = 0;
    for (; c + unit <= channels; c += unit) f(c, [](const T* p) INLINED { return Lanes<T>::load(p); });
    if (c < channels) f(c, [rest = static_cast<int>(channels - c)](const T* p) INLINED { return Lanes<T>::load(p, rest); });
  }
  INLINED static void put(acc* to, typename V::type a, typename V::type b) { V::store(to, a), V::store(to + lanes, b); }

  NOINLINED void start(const T* p, index_t n) const {
    each([&](index_t c, auto load) INLINED {
      Unit<acc> total{};
      for (index_t i = 0; i < n; ++i) {
        const Unit<acc> x = load(p + i * channels + c);
        total.a += x.a, total.b += x.b;
      }
      const acc share = 1 / static_cast<acc>(n);
      put(pivot.data + c, total.a * share, total.b * share);
      put(sum.data + c, typename V::type{}, typename V::type{}), put(square.data + c, typename V::type{}, typename V::type{});
    });
  }

  template <int N>
  NOINLINED void pixels(const T* p) const {
    const auto sums = [&](index_t c)
                          INLINED { return Sums<acc>{V::load(pivot.data + c), V::load(sum.data + c), V::load(square.data + c)}; };
    each([&](index_t c, auto load) INLINED {
      Sums<acc> a = sums(c), b = sums(c + lanes);
#pragma GCC unroll 4
      for (int i = 0; i < N; ++i) {
        const Unit<acc> x = load(p + i * channels + c);
        a.add(x.a), b.add(x.b);
      }
      put(sum.data + c, a.sum, b.sum), put(square.data + c, a.square, b.square);
    });
  }

  // The sums of n pixels, with what `count` pixels have had.
  NOINLINED void merge(double n, double count, double* mean, double* m2) const {
    const double one = 1 / n, share = n / (count + n), both = count * share;
    for (index_t start = 0; start < channels; start += unit)
      for (index_t i = 0; i < min(channels - start, unit); ++i) {
        const index_t c = start + i, at = start + (Lanes<T>::is_split ? i / 2 + i % 2 * lanes : i);
        const double s = sum.data[at], d = pivot.data[at] + s * one - mean[c];
        mean[c] += d * share;
        m2[c] += square.data[at] - s * s * one + d * d * both;
        pivot.data[at] = static_cast<acc>(mean[c]), sum.data[at] = square.data[at] = 0;
      }
  }
};

template <typename T, bool PIXELS>
void moments_of(const ChannelMoments& op, const Parallel& parallel) {
  const MapRows<T> x{op.x, op.x_stride, op.height, op.width, PIXELS ? op.channels : 1};
  // An item is some rows of an image, or of a plane.
  const index_t rows_of_item = max(1, item_elements / x.elements), bands = (op.height + rows_of_item - 1) / rows_of_item;
  const index_t maps = PIXELS ? op.batch : op.batch * op.channels, items = maps * bands;
  const index_t numbers = PIXELS ? 2 * op.channels : 2;
  const Scratch<double> parts(items * numbers);  // a mean and a sum of squared distances, or as many as channels
  const bool one_run = x.follow_each_other();
  parallel(items, max(1, item_elements / (min(rows_of_item, op.height) * x.elements)), [&](index_t begin, index_t end) {
    const Pixels<T> sums{PIXELS ? op.channels : 0};
    const Scratch<T> copy(x.elements);
    for (index_t item = begin; item < end; ++item) {
      const index_t map = item / bands, lo = item % bands * rows_of_item, hi = min(lo + rows_of_item, op.height);
      const index_t n = PIXELS ? map : map / op.channels, c = PIXELS ? 0 : map % op.channels, together = one_run ? hi - lo : 1;
      double* part = parts.data + item * numbers;
      for (index_t i = 0; i < numbers; ++i) part[i] = 0;
      Moments m{};
      for (index_t h = lo; h < hi; h += together) {
        const T* row = x.row(n, c, h, copy.data);
        if (PIXELS) sums.add(row, together * op.width, m.n, part);
        else Run<T>::add(row, together * op.width, m);
      }
      if (!PIXELS) part[0] = m.mean, part[1] = m.m2;
    }
  });
  const double count = static_cast<double>(op.batch * op.height * op.width);
  for (index_t c = 0; c < op.channels; ++c) {
    // f(pixels, mean, squared distances) of every part of this channel.
    const auto each = [&](auto&& f) INLINED {
      for (index_t n = 0; n < op.batch; ++n)
        for (index_t band = 0; band < bands; ++band) {
          const double* part = parts.data + ((PIXELS ? n : n * op.channels + c) * bands + band) * numbers + (PIXELS ? c : 0);
          f(static_cast<double>(min(rows_of_item, op.height - band * rows_of_item) * op.width), part[0], part[numbers / 2]);
        }
    };
    double sum = 0, m2 = 0;
    each([&](double n, double mean, double) INLINED { sum += n * mean; });
    const double whole = sum / count;
    each([&](double n, double mean, double squares) INLINED { m2 += squares + n * (mean - whole) * (mean - whole); });
    op.moments[c] = count, op.moments[op.channels + c] = whole, op.moments[2 * op.channels + c] = m2;
  }
}

template <typename T>
void moments_of(const ChannelMoments& op, const Parallel& parallel) {
  op.channels > 1 && op.x_stride.c == 1 ? moments_of<T, true>(op, parallel) : moments_of<T, false>(op, parallel);
}

}  // namespace

void channel_moments(const ChannelMoments& op, const Parallel& parallel) {
  switch (op.dtype) {
    case Dtype::float32: return moments_of<float>(op, parallel);
    case Dtype::bfloat16: return moments_of<bfloat16>(op, parallel);
    case Dtype::float16: return moments_of<float16>(op, parallel);
    case Dtype::float64: return moments_of<double>(op, parallel);
  }
}

}  // namespace AF_ISA
}  // namespace aliasfused
