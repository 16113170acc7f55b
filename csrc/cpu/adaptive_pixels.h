// Blurs by predicted filters where the channels of a pixel lie side by side (NHWC): pixel by pixel, vectors of channels.
#pragma once

#include "filters.h"
#include "kernels.h"
#include "memory.h"

namespace aliasfused {
namespace AF_ISA {
namespace {

template <typename T>
struct AdaptivePixels {
  using acc = acc_t<T>;
  using V = Vector<acc>;
  using Numbers = typename V::type;
  static constexpr int lanes = V::lanes;

  const AdaptiveBlurPool& op;
  const Filters<T>& filters;
  FilterRows<T> rows;
  const Axis &down = op.rows, &along = op.cols;
  const int k = down.taps, taps = k * k;
  const index_t per_group = op.channels / op.groups;

  Scratch<T> zeros{op.channels};              // a pixel beyond a border of zeros
  Scratch<index_t> reads{along.out * k + 1};  // forward: which column a tap of every output reads, or -1
  const index_t most_cols = most_terms<true>(along), most_rows = most_terms<true>(down);
  Scratch<index_t> begins{along.in + 1}, outputs, tap;  // adjoint: which outputs read every column, by which tap
  Scratch<index_t> place{most_rows}, tap_row{most_rows};
  Scratch<const T*> source{max(taps, most_cols* most_rows)};
  Scratch<const acc*> weight{max(taps, most_cols* most_rows)};
  Scratch<acc> dw;

  AdaptivePixels(const AdaptiveBlurPool& of, const Filters<T>& filters, index_t most)
      : op(of),
        filters(filters),
        rows(filters, most),
        outputs(op.result == AdaptiveResult::dx ? along.in * most_cols : 0),
        tap(op.result == AdaptiveResult::dx ? along.in * most_cols : 0),
        dw(op.result == AdaptiveResult::dlogits ? filters.elements : 0) {
    std::memset(zeros.data, 0, op.channels * sizeof(T));
    for (index_t j = 0; j < along.out; ++j)
      for (int q = 0; q < k; ++q) reads.data[j * k + q] = along.source(j * along.stride + q - along.before);
    if (op.result != AdaptiveResult::dx) return;
    index_t count = 0;
    for (index_t w = 0; w < along.in; ++w) {
      begins.data[w] = count;
      along.outputs_of(w, [&](index_t j, int q) { outputs.data[count] = j, tap.data[count++] = q; });
    }
    begins.data[along.in] = count;
  }

  void run(index_t n, index_t begin, index_t end) {
    rows.forget();
    if (op.result == AdaptiveResult::dx) return adjoint(n, begin, end);
    for (index_t i = begin; i < end; ++i) {
      const acc* w = rows.at(rows.find(n, i));
      for (index_t j = 0; j < along.out; ++j) {
        for (int p = 0; p < k; ++p) {
          const index_t h = down.source(i * down.stride + p - down.before);
          for (int q = 0; q < k; ++q) {
            const index_t column = reads.data[j * k + q];
            source.data[p * k + q] = h < 0 || column < 0 ? zeros.data : pixel(op.x, op.x_stride, n, h, column);
          }
        }
        if (op.result == AdaptiveResult::y) {
          T* y = static_cast<T*>(op.dst) + n * op.dst_stride.n + i * op.dst_stride.h + j * op.dst_stride.w;
          for (int t = 0; t < taps; ++t) weight.data[t] = w + t * filters.pitch + j;
          if (k == 3) blend<9>(taps, y);
          else if (k == 5) blend<25>(taps, y);
          else blend<0>(taps, y);
        } else {
          const T* dy = pixel(op.dy, op.dy_stride, n, i, j);
          if (k == 3) correlate<9>(dy, j);
          else if (k == 5) correlate<25>(dy, j);
          else correlate<0>(dy, j);
        }
      }
      if (op.result == AdaptiveResult::dlogits) filters.differentiate(w, dw.data + filters.margin, n, i);
    }
  }

 private:
  static const T* pixel(const void* map, const Strides& s, index_t n, index_t h, index_t w) {
    return static_cast<const T*>(map) + n * s.n + h * s.h + w * s.w;
  }

  void adjoint(index_t n, index_t begin, index_t end) {
    for (index_t h = begin; h < end; ++h) {
      int in_column = 0;
      down.outputs_of(h, [&](index_t i, int p) { place.data[in_column] = i, tap_row.data[in_column++] = p; });
      for (index_t w = 0; w < along.in; ++w) {
        int count = 0;
        for (int a = 0; a < in_column; ++a) {
          const index_t i = place.data[a];
          const acc* filter = rows.at(rows.find(n, i)) + tap_row.data[a] * k * filters.pitch;
          for (index_t b = begins.data[w]; b < begins.data[w + 1]; ++b) {
            source.data[count] = pixel(op.dy, op.dy_stride, n, i, outputs.data[b]);
            weight.data[count++] = filter + tap.data[b] * filters.pitch + outputs.data[b];
          }
        }
        T* dx = static_cast<T*>(op.dst) + n * op.dst_stride.n + h * op.dst_stride.h + w * op.dst_stride.w;
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
  }

  // The channels of a result: the sources, each by its group's weight.
  template <int N>
  NOINLINED void blend(int n, T* to) const {
    const int count = N ? N : n;
    for (index_t g = 0, c = 0; g < op.groups; ++g) {
      const index_t group = g * taps * filters.pitch, end = c + per_group;
      for (; c < end; c += lanes) {
        const int some = static_cast<int>(min(end - c, lanes));
        Numbers sum{};
        if (some == lanes) {
#pragma GCC unroll 25
          for (int t = 0; t < count; ++t) sum += weight.data[t][group] * Lanes<T>::load_vector(source.data[t] + c);
          Lanes<T>::store_vector(to + c, sum);
        } else {
#pragma GCC unroll 25
          for (int t = 0; t < count; ++t) sum += weight.data[t][group] * Lanes<T>::load_vector(source.data[t] + c, some);
          Lanes<T>::store_vector(to + c, sum, some);
        }
      }
      c = end;
    }
  }

  // The gradient of the filters at column j.
  template <int N>
  NOINLINED void correlate(const T* dy, index_t j) const {
    const int count = N ? N : taps;
    for (index_t g = 0; g < op.groups; ++g) {
      const index_t begin = g * per_group, end = begin + per_group;
      acc* to = dw.data + filters.margin + g * taps * filters.pitch + j;
      constexpr int together = N ? N : 1;
      for (int first = 0; first < count; first += together) {
        Numbers sums[together] = {};
        for (index_t c = begin; c < end; c += lanes) {
          const int some = static_cast<int>(min(end - c, lanes));
          const auto add = [&](auto load) INLINED {
            const Numbers d = load(dy + c);
#pragma GCC unroll 25
            for (int t = 0; t < together; ++t) sums[t] += d * load(source.data[first + t] + c);
          };
          if (some == lanes) add([](const T* p) INLINED { return Lanes<T>::load_vector(p); });
          else add([some](const T* p) INLINED { return Lanes<T>::load_vector(p, some); });
        }
        across(sums, together, to + first * filters.pitch, filters.pitch);
      }
    }
  }
  // The sum over the lanes of every one of some vectors, halves of two to a vector until each is a lane.
  INLINED static void across(Numbers* v, int count, acc* to, index_t step) {
    for (int first = 0; first < count; first += lanes) {
      const int some = count - first < lanes ? count - first : lanes;
      Numbers parts[lanes];
      for (int i = 0; i < lanes; ++i) parts[i] = i < some ? v[first + i] : Numbers{};
      int n = some;
#pragma GCC unroll 4
      for (int width = lanes; width > 1; width /= 2) {
        typename V::index low, high;
        for (int i = 0; i < lanes; ++i) {
          low[i] = i / (width / 2) * width + i % (width / 2);
          high[i] = low[i] + width / 2;
        }
        n = (n + 1) / 2;
        for (int i = 0; i < n; ++i)
          parts[i] = __builtin_shuffle(parts[2 * i], parts[2 * i + 1], low) + __builtin_shuffle(parts[2 * i], parts[2 * i + 1], high);
      }
      for (int i = 0; i < some; ++i) to[(first + i) * step] = parts[0][i];
    }
  }
};

}  // namespace
}  // namespace AF_ISA
}  // namespace aliasfused
