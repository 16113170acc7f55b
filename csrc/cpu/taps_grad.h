// Gradient of the taps of one axis, per channel. For every output: dy times what each tap of that axis sees, which is x summed
// along the other axis. Sums run over a row in vectors of the accumulation type, over rows in float64, and in the same order
// whatever the number of threads.
#pragma once

#include "pixels.h"
#include "strips.h"

namespace aliasfused {
namespace AF_ISA {
namespace {

// What each output of an axis reads.
struct Inputs {
  struct Input {
    index_t source;
    int tap;
  };
  List<Input> all;
  List<index_t> start;
  explicit Inputs(const Axis& axis) {
    for (index_t o = 0; o < axis.out; ++o) {
      start.add() = all.size();
      axis.inputs_of(o, [&](index_t source, int p) INLINED { all.add() = {source, p}; });
    }
    start.add() = all.size();
  }
  // visit(source, tap) for output o.
  template <typename Visit>
  INLINED void of(index_t o, Visit&& visit) const {
    for (index_t i = start[o]; i < start[o + 1]; ++i) visit(all[i].source, all[i].tap);
  }
};

template <typename acc>
INLINED inline double total(typename Vector<acc>::type v) {
  double sum = 0;
  for (int i = 0; i < Vector<acc>::lanes; ++i) sum += v[i];
  return sum;
}

// Memory in rows: the lanes are columns.
template <typename T>
struct TapsGradOfPlanes {
  using acc = acc_t<T>;
  using V = Vector<acc>;
  const TapsGrad& op;
  const Inputs rows{op.rows};
  index_t out_w = op.cols.out, in_w = op.cols.in;
  index_t pitch = round_up(out_w + op.cols.taps / op.cols.stride + 1, V::lanes) + 2 * V::lanes;  // of a phase, and of a row of sums

  static void widen_row(const T* p, index_t stride, index_t n, acc* to) {
    for (index_t x = 0; x < n; x += V::lanes) {
      const index_t left = n - x;
      V::store(to + x, stride != 1
                           ? gathered(p + x * stride, stride, left, [](const T* copy) INLINED { return Lanes<T>::load_vector(copy); })
                       : left >= V::lanes ? Lanes<T>::load_vector(p + x)
                                          : Lanes<T>::load_vector(p + x, left));
    }
  }

  // A row, extended by its border, to phases: what tap q sees at output j is phases[q % stride * pitch + q / stride + j].
  void split_row(const acc* row, acc* phases) const {
    const Axis& axis = op.cols;
    const index_t first = axis.first(), last = axis.last(), end = min(axis.in, last);
    const auto put = [&](index_t t) INLINED {
      const index_t from = axis.source(t);
      phases[(t - first) % axis.stride * pitch + (t - first) / axis.stride] = from < 0 ? acc(0) : row[from];
    };
    index_t t = first;
    for (; t < min(max(first, 0), last); ++t) put(t);
    if (axis.stride == 2)
      for (; t + 2 * V::lanes <= end; t += 2 * V::lanes) {
        const Unit<acc> u = split(Unit<acc>{V::load(row + t), V::load(row + t + V::lanes)});
        const index_t at = (t - first) / 2, odd = (t - first) % 2;
        V::store(phases + odd * pitch + at, u.a), V::store(phases + (1 - odd) * pitch + at + odd, u.b);
      }
    for (; t < last; ++t) put(t);
  }
  const acc* seen(const acc* phases, int q) const { return phases + q % op.cols.stride * pitch + q / op.cols.stride; }

  // sum += the products of n elements.
  INLINED static void dot(const acc* a, const acc* b, index_t n, typename V::type& sum) {
    for (index_t x = 0; x < n; x += V::lanes)
      sum += n - x >= V::lanes ? V::load(a + x) * V::load(b + x)
                               : Lanes<acc>::load_vector(a + x, n - x) * Lanes<acc>::load_vector(b + x, n - x);
  }

  void run(index_t begin, index_t end) const {
    const int own = op.axis == 0 ? op.rows.taps : op.cols.taps, cross = op.axis == 0 ? op.cols.taps : op.rows.taps;
    const Scratch<double> sum(own);
    const ZeroedScratch<acc> row(in_w + 2 * V::lanes), dy(out_w + V::lanes), phases(op.cols.stride * pitch),
        sums(op.axis == 0 ? op.rows.in * pitch : in_w + 2 * V::lanes);
    const Scratch<typename V::type> part(own);
    for (index_t c = begin; c < end; ++c) {
      const acc* other = static_cast<const acc*>(op.other) + c * cross;
      for (int p = 0; p < own; ++p) sum.data[p] = 0;
      for (index_t n = 0; n < op.batch; ++n) {
        const T* x = static_cast<const T*>(op.x) + n * op.x_stride.n + c * op.x_stride.c;
        const T* d = static_cast<const T*>(op.dy) + n * op.dy_stride.n + c * op.dy_stride.c;
        if (op.axis == 0)  // every source row along the other axis
          for (index_t h = 0; h < op.rows.in; ++h) {
            widen_row(x + h * op.x_stride.h, op.x_stride.w, in_w, row.data);
            split_row(row.data, phases.data);
            for (index_t j = 0; j < out_w; j += V::lanes) {
              typename V::type v{};
              for (int q = 0; q < cross; ++q) v += V::load(seen(phases.data, q) + j) * other[q];
              V::store(sums.data + h * pitch + j, v);
            }
          }
        for (index_t i = 0; i < op.rows.out; ++i) {
          for (int p = 0; p < own; ++p) part.data[p] = typename V::type{};
          widen_row(d + i * op.dy_stride.h, op.dy_stride.w, out_w, dy.data);
          if (op.axis == 0) {
            rows.of(i, [&](index_t h, int p) INLINED { dot(dy.data, sums.data + h * pitch, out_w, part.data[p]); });
          } else {
            for (index_t w = 0; w < in_w; w += V::lanes) V::store(sums.data + w, typename V::type{});
            rows.of(i, [&](index_t h, int p) INLINED {
              widen_row(x + h * op.x_stride.h, op.x_stride.w, in_w, row.data);
              for (index_t w = 0; w < in_w; w += V::lanes)
                V::store(sums.data + w, V::load(sums.data + w) + V::load(row.data + w) * other[p]);
            });
            split_row(sums.data, phases.data);
            for (int q = 0; q < own; ++q) dot(dy.data, seen(phases.data, q), out_w, part.data[q]);
          }
          for (int p = 0; p < own; ++p) sum.data[p] += total<acc>(part.data[p]);
        }
      }
      for (int p = 0; p < own; ++p) static_cast<acc*>(op.dst)[c * own + p] = sum.data[p];
    }
  }
};

// Memory in pixels: the lanes are channels, a unit of them at a time.
template <typename T>
struct TapsGradOfPixels {
  using acc = acc_t<T>;
  static constexpr int unit = Lanes<T>::unit;
  const TapsGrad& op;
  const Inputs rows{op.rows}, cols{op.cols};
  const ChannelTaps<T> other{op.other, op.channels, op.axis == 0 ? op.cols.taps : op.rows.taps};

  INLINED static Unit<acc> load(const T* p, index_t n) { return n >= unit ? Lanes<T>::load(p) : Lanes<T>::load(p, n); }

  void run(index_t begin, index_t end) const {
    const int own = op.axis == 0 ? op.rows.taps : op.cols.taps;
    const Scratch<Unit<acc>> part(own);
    const Scratch<double> sum(own * unit);
    for (index_t c = begin * unit; c < min(end * unit, op.channels); c += unit) {
      const index_t n_channels = op.channels - c;
      for (int i = 0; i < own * unit; ++i) sum.data[i] = 0;
      for (index_t n = 0; n < op.batch; ++n)
        for (index_t i = 0; i < op.rows.out; ++i) {
          const T* x = static_cast<const T*>(op.x) + n * op.x_stride.n + c;
          const T* dy = static_cast<const T*>(op.dy) + n * op.dy_stride.n + i * op.dy_stride.h + c;
          for (int p = 0; p < own; ++p) part.data[p] = Unit<acc>{};
          for (index_t j = 0; j < op.cols.out; ++j) {
            const Unit<acc> d = load(dy + j * op.dy_stride.w, n_channels);
            const auto add_tap = [&](int tap, auto&& each_of_the_other_axis) INLINED {
              Unit<acc> seen{};
              each_of_the_other_axis([&](index_t h, index_t w, int q) INLINED {
                add(seen, weighted(load(x + h * op.x_stride.h + w * op.x_stride.w, n_channels), other.rows.data[q], c));
              });
              part.data[tap].a += d.a * seen.a, part.data[tap].b += d.b * seen.b;
            };
            if (op.axis == 0)
              rows.of(i, [&](index_t h, int p) INLINED {
                add_tap(p, [&](auto&& visit) INLINED { cols.of(j, [&](index_t w, int q) INLINED { visit(h, w, q); }); });
              });
            else
              cols.of(j, [&](index_t w, int q) INLINED {
                add_tap(q, [&](auto&& visit) INLINED { rows.of(i, [&](index_t h, int p) INLINED { visit(h, w, p); }); });
              });
          }
          for (int p = 0; p < own; ++p) {
            acc natural[unit];
            Lanes<acc>::store(natural, to_natural<T>(part.data[p]));
            for (int lane = 0; lane < unit; ++lane) sum.data[p * unit + lane] += natural[lane];
          }
        }
      for (int p = 0; p < own; ++p)
        for (int lane = 0; lane < min(unit, n_channels); ++lane)
          static_cast<acc*>(op.dst)[(c + lane) * own + p] = sum.data[p * unit + lane];
    }
  }
};

template <typename T>
void taps_grad_of(const TapsGrad& op, const Parallel& parallel) {
  const index_t work = max(op.batch * op.rows.in * op.cols.in, 1);
  if (op.x_stride.c == 1 && op.dy_stride.c == 1 && op.channels > 1) {
    const TapsGradOfPixels<T> pixels{op};
    const index_t units = (op.channels + pixels.unit - 1) / pixels.unit;
    return parallel(units, max(1, grain_pixels / (work * pixels.unit)), [&](index_t begin, index_t end) { pixels.run(begin, end); });
  }
  const TapsGradOfPlanes<T> planes{op};
  parallel(op.channels, max(1, grain_pixels / work), [&](index_t begin, index_t end) { planes.run(begin, end); });
}

}  // namespace
}  // namespace AF_ISA
}  // namespace aliasfused
