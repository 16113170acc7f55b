// The moments of every channel, on a CPU. Pixels are summed in vectors, as differences from a pivot: the mean of those ahead
// or of a few of themselves. (A single pixel may lie far from all others.) After `pixels_of_sum` of them to a lane, sums go on
// in double.
#include <algorithm>

#include "kernels.h"
#include "rows.h"

namespace aliasfused {
namespace AF_ISA {
namespace {

constexpr index_t item_elements = 1 << 16;  // that are summed one after the other
constexpr index_t run_elements = 1 << 12;   // that should lie together
constexpr index_t most_planes = 16;         // to a run

// Sums about a pivot, a lane each.
template <typename acc>
struct Sums {
  typename Vector<acc>::type pivot, sum, square;
  INLINED void add(typename Vector<acc>::type x) {
    const auto d = x - pivot;
    sum += d, square += d * d;
  }
};

// Pixels of one channel, in runs. Sums go on from one to the next, for a plane may have few.
template <typename T>
struct Run {
  using acc = acc_t<T>;
  using V = Vector<acc>;
  static constexpr int unit = Lanes<T>::unit, lanes = V::lanes;

  void add(const T* p, index_t n) {
    while (n > 0) {
      if (units == 0) start(p, min(n, unit));
      const index_t some = min(n, (pixels_of_sum - units) * unit);
      sum(p, some);
      p += some, n -= some;
      if (units == pixels_of_sum) merge();
    }
  }
  Moments finish() {
    if (units) merge();
    return all;
  }

 private:
  Moments all{};
  index_t units = 0, pixels = 0;  // that are in the sums
  Sums<acc> a, b;

  void start(const T* p, index_t n) {
    const Unit<acc> first = n == unit ? Lanes<T>::load(p) : Lanes<T>::load(p, static_cast<int>(n));
    const auto pivot = typename V::type{} + static_cast<acc>(across(first.a, first.b) / static_cast<double>(n));
    a = b = Sums<acc>{pivot, {}, {}};
  }

  INLINED void sum(const T* p, index_t n) {
    const index_t whole = n / unit;
    const int rest = static_cast<int>(n % unit);
    Sums<acc> even = a, odd = b;
    for (index_t i = 0; i < whole; ++i) {
      const Unit<acc> x = Lanes<T>::load(p + i * unit);
      even.add(x.a), odd.add(x.b);
    }
    if (rest) {
      // The lanes beyond the last pixel see the pivot.
      const Unit<acc> x = Lanes<T>::load(p + whole * unit, rest), lane = from_natural<T>(Unit<acc>{number(0), number(lanes)});
      even.add(lane.a < static_cast<acc>(rest) ? x.a : a.pivot), odd.add(lane.b < static_cast<acc>(rest) ? x.b : b.pivot);
    }
    a = even, b = odd;
    units += whole + (rest > 0), pixels += n;
  }

  NOINLINED void merge() {
    const double count = static_cast<double>(pixels), sum = across(a.sum, b.sum);
    all.merge({count, a.pivot[0] + sum / count, across(a.square, b.square) - sum * sum / count});
    units = pixels = 0;
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

// Pixels whose channels lie side by side, in runs. Means and squared distances go to (2, pitch) doubles, in the order of units.
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
      merge(static_cast<double>(some), count, mean, mean + pitch);
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
    for (index_t c = 0; c < pitch; ++c) {
      const double s = sum.data[c], d = pivot.data[c] + s * one - mean[c];
      mean[c] += d * share;
      m2[c] += square.data[c] - s * s * one + d * d * both;
      pivot.data[c] = static_cast<acc>(mean[c]), sum.data[c] = square.data[c] = 0;
    }
  }
};

// An axis in parts of so many, of which the last may be short.
struct Parts {
  index_t size, each, count;
  Parts(index_t size, index_t wanted) : size(size), each(max(1, min(size, wanted))), count((size + each - 1) / each) {}
  index_t begin(index_t part) const { return part * each; }
  index_t end(index_t part) const { return min(size, begin(part) + each); }
};

template <typename T, bool PIXELS>
void moments_of(const ChannelMoments& op, const Parallel& parallel) {
  const MapRows<T> x{op.x, op.x_stride, op.height, op.width, PIXELS ? op.channels : 1};
  // An item is some rows of some images, or of some planes of them: the same channels of all.
  const index_t map = op.height * x.elements;
  const Parts planes(PIXELS ? 1 : op.channels, min(most_planes, run_elements / map));
  const Parts images(op.batch, item_elements / (map * planes.each)), rows(op.height, item_elements / x.elements);
  const index_t parts = images.count * rows.count, pitch = PIXELS ? round_up(op.channels, Lanes<T>::unit) : op.channels;
  const Scratch<double> sums((parts + 1) * 2 * pitch);  // means and squared distances of every part, then of all
  const bool one_run = x.follow_each_other();
  // f(row, pixels, plane) for the runs of an item.
  const auto each_run = [&](index_t part, index_t block, T* copy, auto&& f) INLINED {
    const index_t lo = rows.begin(part % rows.count), hi = rows.end(part % rows.count), together = one_run ? hi - lo : 1;
    for (index_t n = images.begin(part / rows.count); n < images.end(part / rows.count); ++n)
      for (index_t c = planes.begin(block); c < planes.end(block); ++c)
        for (index_t h = lo; h < hi; h += together) f(x.row(n, c, h, copy), together * op.width, c - planes.begin(block));
  };
  const index_t grain = max(1, item_elements / (images.each * planes.each * rows.each * x.elements));
  parallel(parts * planes.count, grain, [&](index_t begin, index_t end) {
    const Pixels<T> pixels{PIXELS ? op.channels : 0};
    const Scratch<T> copy(x.elements);
    for (index_t item = begin; item < end; ++item) {
      const index_t part = item / planes.count, block = item % planes.count;
      double* mean = sums.data + part * 2 * pitch;
      if constexpr (PIXELS) {
        std::fill_n(mean, 2 * pitch, 0.0);
        double count = 0;
        each_run(part, block, copy.data, [&](const T* row, index_t n, index_t) INLINED { pixels.add(row, n, count, mean); });
      } else {
        Run<T> runs[most_planes];
        each_run(part, block, copy.data, [&](const T* row, index_t n, index_t plane) INLINED { runs[plane].add(row, n); });
        for (index_t c = planes.begin(block); c < planes.end(block); ++c) {
          const Moments m = runs[c - planes.begin(block)].finish();
          mean[c] = m.mean, mean[pitch + c] = m.m2;
        }
      }
    }
  });
  // f(pixels, their means, their squared distances) for every part.
  const auto each_part = [&](auto&& f) INLINED {
    for (index_t part = 0; part < parts; ++part) {
      const index_t i = part / rows.count, r = part % rows.count;
      const index_t n = (images.end(i) - images.begin(i)) * (rows.end(r) - rows.begin(r)) * op.width;
      f(static_cast<double>(n), sums.data + part * 2 * pitch, sums.data + (part * 2 + 1) * pitch);
    }
  };
  const double count = static_cast<double>(op.batch * op.height * op.width);
  double *mean = sums.data + parts * 2 * pitch, *m2 = mean + pitch;
  std::fill_n(mean, 2 * pitch, 0.0);
  each_part([&](double n, const double* means, const double*) INLINED {
    for (index_t c = 0; c < pitch; ++c) mean[c] += means[c] * n;
  });
  for (index_t c = 0; c < pitch; ++c) mean[c] /= count;
  each_part([&](double n, const double* means, const double* squares) INLINED {
    for (index_t c = 0; c < pitch; ++c) m2[c] += squares[c] + n * (means[c] - mean[c]) * (means[c] - mean[c]);
  });
  for (index_t c = 0; c < op.channels; ++c) {
    constexpr index_t unit = Lanes<T>::unit;
    const index_t i = c % unit, at = PIXELS && Lanes<T>::is_split ? c - i + i / 2 + i % 2 * (unit / 2) : c;
    op.moments[c] = count, op.moments[op.channels + c] = mean[at], op.moments[2 * op.channels + c] = m2[at];
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
