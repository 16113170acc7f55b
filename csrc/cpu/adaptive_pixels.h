// Blurs by predicted filters pixel by pixel, vectors of channels: where the channels of a pixel lie side by side (NHWC), or of
// rows that are copied so (NCHW), which costs less than vectors of columns do: rows are short, and read once for all taps.
#pragma once

#include "filters.h"
#include "kernels.h"
#include "turn.h"

namespace aliasfused {
namespace AF_ISA {
namespace {

// Rows of x and dy are of R: T where all lie as they are wanted, else the accumulator.
template <typename T, typename R>
struct AdaptivePixels {
  using acc = acc_t<T>;
  using V = Vector<acc>;
  using Numbers = typename V::type;
  static constexpr int lanes = V::lanes, unit = 2 * lanes, most_together = 9;

  const AdaptiveBlurPool& op;
  const Filters<T>& filters;
  FilterRows<T> rows;
  const Axis &down = op.rows, &along = op.cols;
  const int k = down.taps, taps = k * k;
  const bool adjoint = op.result == AdaptiveResult::dx, dlogits = op.result == AdaptiveResult::dlogits;
  const index_t per_group = op.channels / op.groups, group_step = taps * filters.pitch;
  const bool paired = 2 * per_group == lanes && op.groups % 2 == 0;  // two groups fill a vector

  const index_t most_rows = adjoint ? most_terms<true>(down) : k, most_cols = adjoint ? most_terms<true>(along) : k;
  PixelRows<T, R> x{op.x, op.x_stride, down.in, along.in, op.channels, adjoint ? 0 : k};
  PixelRows<T, R> dy{op.dy, op.dy_stride, down.out, along.out, op.channels, adjoint ? most_rows : dlogits ? 1 : 0};
  PixelRows<T, R> to{op.dst, op.dst_stride, adjoint ? down.in : down.out, adjoint ? along.in : along.out, op.channels, dlogits ? 0 : 1};

  Scratch<R> zeros{op.channels};  // a pixel beyond a border of zeros
  Scratch<const R*> of_rows{most_rows};
  Scratch<const acc*> row_weights{most_rows};
  Scratch<index_t> reads{along.out * k};  // which column a tap of every output reads, or -1
  Scratch<index_t> begins{along.in + 1}, outputs{adjoint ? along.in * most_cols : 0}, tap{adjoint ? along.in * most_cols : 0};
  // What a result is made of: as many outputs side by side as there are lanes for the filters' gradients, else one pixel.
  Scratch<const R*> source{most_rows * most_cols * (dlogits ? lanes : 1)};
  Scratch<const acc*> weight{most_rows * most_cols};
  Scratch<acc> dw{dlogits ? filters.elements : 0}, products{dlogits ? most_together * lanes * lanes : 0};

  AdaptivePixels(const AdaptiveBlurPool& of, const Filters<T>& of_all, index_t most) : op(of), filters(of_all), rows(of_all, most) {
    std::memset(zeros.data, 0, op.channels * sizeof(R));
    if (dlogits) std::memset(products.data, 0, most_together * lanes * lanes * sizeof(acc));
    for (index_t j = 0; j < along.out; ++j)
      for (int q = 0; q < k; ++q) reads.data[j * k + q] = along.source(j * along.stride + q - along.before);
    if (!adjoint) return;
    index_t count = 0;
    for (index_t w = 0; w < along.in; ++w) {
      begins.data[w] = count;
      along.outputs_of(w, [&](index_t j, int q) { outputs.data[count] = j, tap.data[count++] = q; });
    }
    begins.data[along.in] = count;
  }

  void run(index_t n, index_t begin, index_t end) {
    rows.forget();
    for (index_t i = begin; i < end; ++i) {
      if (dlogits) {
        differentiate(n, i);
        continue;
      }
      R* row = to.write(n, i);
      if (adjoint) gather(n, i, row);
      else blur(n, i, row);
      to.written(n, i);
    }
  }

 private:
  void read_rows(index_t n, index_t i) {
    for (int p = 0; p < k; ++p) {
      const index_t h = down.source(i * down.stride + p - down.before);
      of_rows.data[p] = h < 0 ? nullptr : x.read(n, h);
    }
  }
  void read_pixels(index_t j, const R** to) const {
    for (int p = 0; p < k; ++p)
      for (int q = 0; q < k; ++q) {
        const index_t column = reads.data[j * k + q];
        to[p * k + q] = of_rows.data[p] && column >= 0 ? of_rows.data[p] + column * x.step : zeros.data;
      }
  }

  void blur(index_t n, index_t i, R* row) {
    const acc* w = rows.at(rows.find(n, i));
    read_rows(n, i);
    for (index_t j = 0; j < along.out; ++j) {
      read_pixels(j, source.data);
      for (int t = 0; t < taps; ++t) weight.data[t] = w + t * filters.pitch + j;
      R* y = row + j * to.step;
      if (k == 3) blend<9>(taps, y);
      else if (k == 5) blend<25>(taps, y);
      else blend<0>(taps, y);
    }
  }

  void gather(index_t n, index_t h, R* row) {
    int in_column = 0;
    down.outputs_of(h, [&](index_t i, int p) {
      of_rows.data[in_column] = dy.read(n, i), row_weights.data[in_column++] = rows.at(rows.find(n, i)) + p * k * filters.pitch;
    });
    for (index_t w = 0; w < along.in; ++w) {
      int count = 0;
      for (int a = 0; a < in_column; ++a)
        for (index_t b = begins.data[w]; b < begins.data[w + 1]; ++b) {
          source.data[count] = of_rows.data[a] + outputs.data[b] * dy.step;
          weight.data[count++] = row_weights.data[a] + tap.data[b] * filters.pitch + outputs.data[b];
        }
      R* dx = row + w * to.step;
      switch (count) {
        case 1: blend<1>(count, dx); break;
        case 2: blend<2>(count, dx); break;
        case 4: blend<4>(count, dx); break;
        case 6: blend<6>(count, dx); break;
        case 9: blend<9>(count, dx); break;
        default: blend<0>(count, dx);
      }
    }
  }

  // The channels of a pixel: the sources, each by its group's weight.
  template <int N>
  NOINLINED void blend(int n, R* to) const {
    const int count = N ? N : n;
    if (paired) {
      for (index_t c = 0; c < op.channels; c += lanes) blend_vector<N, true>(count, c, c / per_group * group_step, lanes, to);
      return;
    }
    for (index_t g = 0, c = 0; g < op.groups; ++g) {
      const index_t group = g * group_step, end = c + per_group;
      for (; c + 2 * unit <= end; c += 2 * unit) blend_units<N, 2>(count, c, group, to);
      for (; c + unit <= end; c += unit) blend_units<N, 1>(count, c, group, to);
      if (c + lanes <= end) blend_vector<N>(count, c, group, lanes, to), c += lanes;
      if (c < end) blend_vector<0>(count, c, group, static_cast<int>(end - c), to), c = end;
    }
  }
  // Several at once, so that a sum need not wait for its last term before it takes the next one.
  template <int N, int MANY>
  INLINED void blend_units(int n, index_t c, index_t group, R* to) const {
    const int count = N ? N : n;
    Unit<acc> sums[MANY] = {};
#pragma GCC unroll 25
    for (int t = 0; t < count; ++t) {
      const acc w = weight.data[t][group];
#pragma GCC unroll 2
      for (int u = 0; u < MANY; ++u) {
        const Unit<acc> pixels = Lanes<R>::load(source.data[t] + c + u * unit);
        sums[u].a += w * pixels.a, sums[u].b += w * pixels.b;
      }
    }
#pragma GCC unroll 2
    for (int u = 0; u < MANY; ++u) Lanes<R>::store(to + c + u * unit, sums[u]);
  }
  template <int N, bool PAIRED = false>
  INLINED void blend_vector(int n, index_t c, index_t group, int some, R* to) const {
    const int count = N ? N : n;
    Numbers sum{};
#pragma GCC unroll 25
    for (int t = 0; t < count; ++t) {
      const acc* w = weight.data[t] + group;
      Numbers weights = w[0] - Numbers{};
      if (PAIRED) weights = iota<acc>(0, 1) < lanes / 2 ? weights : w[group_step] - Numbers{};
      sum += weights * (some == lanes ? Lanes<R>::load_vector(source.data[t] + c) : Lanes<R>::load_vector(source.data[t] + c, some));
    }
    if (some == lanes) Lanes<R>::store_vector(to + c, sum);
    else Lanes<R>::store_vector(to + c, sum, some);
  }

  // The logits' gradients of a row. The products of an output stay vectors until those of its neighbours are there: then they
  // are added up across the lanes for all of them at once.
  void differentiate(index_t n, index_t i) {
    const acc* w = rows.at(rows.find(n, i));
    const R* of_dy = dy.read(n, i);
    read_rows(n, i);
    for (index_t first = 0; first < along.out; first += lanes) {
      const index_t some = min(along.out - first, lanes);
      for (index_t j = 0; j < some; ++j) read_pixels(first + j, source.data + j * taps);
      for (index_t g = 0; g < op.groups; g += paired ? 2 : 1) {
        acc* sums = dw.data + filters.margin + g * group_step + first;
        const auto by = [&](auto together) {
          for (int t = 0; t < taps; t += together) {
            multiply<together>(of_dy + first * dy.step, some, t, g * per_group, paired ? lanes : per_group);
            if (paired) add_up<2>(together, sums + t * filters.pitch);
            else add_up<1>(together, sums + t * filters.pitch);
          }
        };
        // Not many more: pixels often lie a multiple of 4 KB apart, and crowd each other out of the nearest cache.
        if (k == 3) by(std::integral_constant<int, 9>{});
        else if (k == 5) by(std::integral_constant<int, 5>{});
        else by(std::integral_constant<int, 1>{});
      }
    }
    filters.differentiate(w, dw.data + filters.margin, n, i);
  }
  // For outputs side by side, dy times what taps from `tap` on read of `size` channels from `begin` on, in as many parts as lanes.
  template <int TOGETHER>
  NOINLINED void multiply(const R* of_dy, index_t outputs, int tap, index_t begin, index_t size) const {
    for (index_t j = 0; j < outputs; ++j) {
      const R* d = of_dy + j * dy.step + begin;
      const R* const* from = source.data + j * taps + tap;
      Numbers sums[TOGETHER] = {};
      const auto add = [&](auto load) INLINED {
        const Numbers of_d = load(d);
#pragma GCC unroll 9
        for (int t = 0; t < TOGETHER; ++t) sums[t] += of_d * load(from[t] + begin);
      };
      index_t c = 0;
      for (; c + unit <= size; c += unit) {
        const Unit<acc> of_d = Lanes<R>::load(d + c);
#pragma GCC unroll 9
        for (int t = 0; t < TOGETHER; ++t) {
          const Unit<acc> pixels = Lanes<R>::load(from[t] + begin + c);
          sums[t] += of_d.a * pixels.a;
          sums[t] += of_d.b * pixels.b;
        }
      }
      if (c + lanes <= size) add([c](const R* p) INLINED { return Lanes<R>::load_vector(p + c); }), c += lanes;
      const int some = static_cast<int>(size - c);
      if (some > 0) add([c, some](const R* p) INLINED { return Lanes<R>::load_vector(p + c, some); });
#pragma GCC unroll 9
      for (int t = 0; t < TOGETHER; ++t) V::store(products.data + (t * lanes + j) * lanes, sums[t]);
    }
  }
  template <int GROUPS>
  NOINLINED void add_up(int count, acc* to) const {
    for (int t = 0; t < count; ++t) {
      Numbers v[lanes];
#pragma GCC unroll 16
      for (int j = 0; j < lanes; ++j) v[j] = V::load(products.data + (t * lanes + j) * lanes);
      gather_parts<GROUPS, acc>(v);
      for (int g = 0; g < GROUPS; ++g) V::store(to + t * filters.pitch + g * group_step, v[g]);
    }
  }
};

}  // namespace
}  // namespace AF_ISA
}  // namespace aliasfused
