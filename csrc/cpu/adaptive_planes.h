// Blurs by predicted filters whose groups have few channels, in any layout but NHWC: channel by channel, vectors of columns.
// Rows of x, or of the gradient of x, are taken apart into as many phases as the stride has, so that the pixels which a tap reads
// for neighbouring outputs are neighbours.
#pragma once

#include "filters.h"
#include "kernels.h"
#include "memory.h"

namespace aliasfused {
namespace AF_ISA {
namespace {

template <typename T>
struct AdaptivePlanes {
  using acc = acc_t<T>;
  using V = Vector<acc>;
  using Numbers = typename V::type;
  static constexpr int lanes = V::lanes, unit = Lanes<T>::unit;

  const AdaptiveBlurPool& op;
  const Filters<T>& filters;
  FilterRows<T> rows;
  const Axis &down = op.rows, &along = op.cols;
  const int k = down.taps, taps = k * k;
  const index_t per_group = op.channels / op.groups;
  const index_t extended = max((along.out - 1) * along.stride + k, along.in + 2 * along.before);  // columns of x~
  const index_t phase = round_up(extended / along.stride + 1, lanes) + 2 * unit, line = along.stride * phase;

  int slots = 1;                                     // of lines, a power of two
  Scratch<acc> lines{(slots_for(k, slots)) * line};  // of x~, in phases: as many rows as a filter has; or a row of its gradient
  Scratch<index_t> at_row{slots};                    // which
  ZeroedScratch<acc> row{round_up(along.stride * phase + filters.pitch, lanes)};  // of results
  Scratch<acc> results;  // rows of dy as the filters lie, or the filters' gradients
  // Where x~ has its border: the place in a line or in a row, and the column it shows, or -1; and which row of x its rows show.
  Scratch<index_t> offsets{k}, border_place{extended - along.in}, border_source{extended - along.in},
      source{(down.out - 1) * down.stride + k};
  Scratch<const acc*> from, weights;
  Scratch<index_t> begins, places, tap_rows;  // adjoint: what every row of the item is gathered of

  AdaptivePlanes(const AdaptiveBlurPool& of, const Filters<T>& filters, index_t most, index_t results_of_item)
      : op(of),
        filters(filters),
        rows(filters, most),
        results(op.result == AdaptiveResult::dx        ? most * filters.pitch
                : op.result == AdaptiveResult::dlogits ? most * filters.elements
                                                       : 0),
        from(most_terms<true>(down) + k),
        weights(most_terms<true>(down) + k),
        begins(results_of_item + 1),
        places(adjoint_terms(results_of_item)),
        tap_rows(adjoint_terms(results_of_item)) {
    for (int q = 0; q < k; ++q) offsets.data[q] = q % along.stride * phase + q / along.stride;
    std::memset(lines.data, 0, slots * line * sizeof(acc));
    const index_t r = along.before, beyond = extended - along.in;
    for (index_t e = 0; e < beyond; ++e) {
      const index_t t = e < r ? e : along.in + e;
      border_place.data[e] = t % along.stride * phase + t / along.stride, border_source.data[e] = along.source(t - r);
    }
    for (index_t t = 0; t < (down.out - 1) * down.stride + k; ++t) source.data[t] = down.source(t - down.before);
  }
  static int slots_for(int k, int& slots) {
    while (slots < k) slots *= 2;
    return slots;
  }
  index_t adjoint_terms(index_t rows) const { return op.result == AdaptiveResult::dx ? rows * most_terms<true>(down) : 0; }

  void run(index_t n, index_t begin, index_t end) {
    rows.forget();
    if (op.result == AdaptiveResult::dx) return adjoint(n, begin, end);
    for (index_t i = begin; i < end; ++i) rows.find(n, i);
    const bool forward = op.result == AdaptiveResult::y;
    if (!forward) std::memset(results.data, 0, (end - begin) * filters.elements * sizeof(acc));
    for (index_t c = 0; c < op.channels; ++c) {
      const index_t first = c / per_group * taps * filters.pitch;
      for (int p = 0; p < slots; ++p) at_row.data[p] = -1;
      for (index_t i = begin; i < end; ++i) {
        for (int p = 0; p < k; ++p) from.data[p] = extended_row(n, c, i * down.stride + p);
        const acc* w = rows.at(i - begin) + first;
        if (forward) {
          sized([&](auto K) { weigh<K>(w); });
          put(op.dst, op.dst_stride, n, c, i, row.data, along.out);
        } else {
          get(op.dy, op.dy_stride, n, c, i, row.data);
          acc* dw = results.data + (i - begin) * filters.elements + filters.margin + first;
          sized([&](auto K) { correlate<K>(dw); });
        }
      }
    }
    if (!forward)
      for (index_t i = begin; i < end; ++i)
        filters.differentiate(rows.at(i - begin), results.data + (i - begin) * filters.elements + filters.margin, n, i);
  }

 private:
  template <typename F>
  void sized(F&& f) const {
    if (k == 3) return f(std::integral_constant<int, 3>{});
    if (k == 5) return f(std::integral_constant<int, 5>{});
    f(std::integral_constant<int, 0>{});
  }

  // Row t of x~, in phases.
  const acc* extended_row(index_t n, index_t c, index_t t) {
    const int slot = static_cast<int>(t & (slots - 1));
    acc* to = lines.data + slot * line;
    if (at_row.data[slot] == t) return to;
    at_row.data[slot] = t;
    const index_t h = source.data[t], r = along.before, s = along.stride;
    if (h < 0) {
      std::memset(to, 0, line * sizeof(acc));
      return to;
    }
    const Strides& x = op.x_stride;
    const T* pixels = static_cast<const T*>(op.x) + n * x.n + c * x.c + h * x.h;
    if (x.w == 1 && s <= 2) {
      for (index_t w = 0; w < along.in; w += unit) {
        const int some = static_cast<int>(min(along.in - w, unit));
        const Unit<acc> u = some == unit ? Lanes<T>::load(pixels + w) : Lanes<T>::load(pixels + w, some);
        if (s == 1) {
          const Unit<acc> in_order = to_natural<T>(u);
          V::store(to + w + r, in_order.a), V::store(to + w + r + lanes, in_order.b);
        } else {
          const Unit<acc> apart = Lanes<T>::is_split ? u : split(u);
          V::store(to + r % 2 * phase + (w + r) / 2, apart.a), V::store(to + (r + 1) % 2 * phase + (w + r + 1) / 2, apart.b);
        }
      }
    } else {
      for (index_t ph = 0; ph < s; ++ph)
        for (index_t w = floor_mod(ph - r, s), m = (w + r) / s; w < along.in; w += s, ++m) to[ph * phase + m] = widen(pixels[w * x.w]);
    }
    for (index_t e = 0; e < extended - along.in; ++e) {
      const index_t w = border_source.data[e];
      to[border_place.data[e]] = w < 0 ? acc(0) : widen(pixels[w * x.w]);
    }
    return to;
  }

  // A row of y: taps of the lines `from`.
  template <int K>
  NOINLINED void weigh(const acc* w) const {
    const int size = K ? K : k;
    for (index_t j = 0; j < along.out; j += lanes) {
      Numbers sum{};
#pragma GCC unroll 5
      for (int p = 0; p < size; ++p)
#pragma GCC unroll 5
        for (int q = 0; q < size; ++q) sum += V::load(w + (p * size + q) * filters.pitch + j) * V::load(from.data[p] + offsets.data[q] + j);
      V::store(row.data + j, sum);
    }
  }
  // What a row of dy adds to the gradient of its filters.
  template <int K>
  NOINLINED void correlate(acc* dw) const {
    const int size = K ? K : k;
    for (index_t j = 0; j < along.out; j += lanes) {
      const Numbers dy = V::load(row.data + j);
#pragma GCC unroll 5
      for (int p = 0; p < size; ++p)
#pragma GCC unroll 5
        for (int q = 0; q < size; ++q) {
          acc* to = dw + (p * size + q) * filters.pitch + j;
          V::store(to, V::load(to) + dy * V::load(from.data[p] + offsets.data[q] + j));
        }
    }
  }

  void adjoint(index_t n, index_t begin, index_t end) {
    index_t terms = 0;
    for (index_t h = begin; h < end; ++h) {
      begins.data[h - begin] = terms;
      down.outputs_of(h, [&](index_t i, int p) { places.data[terms] = rows.find(n, i), tap_rows.data[terms++] = p * k * filters.pitch; });
    }
    begins.data[end - begin] = terms;
    std::memset(results.data, 0, rows.count * filters.pitch * sizeof(acc));
    for (index_t c = 0; c < op.channels; ++c) {
      const index_t first = c / per_group * taps * filters.pitch;
      for (index_t place = 0; place < rows.count; ++place)
        get(op.dy, op.dy_stride, n, c, rows.which.data[place], results.data + place * filters.pitch + filters.margin);
      for (index_t h = 0; h < end - begin; ++h) {
        int count = 0;
        for (index_t e = begins.data[h]; e < begins.data[h + 1]; ++e) {
          from.data[count] = results.data + places.data[e] * filters.pitch + filters.margin;
          weights.data[count++] = rows.at(places.data[e]) + first + tap_rows.data[e];
        }
        sized([&](auto K) {
          if (along.stride == 2) gather<K, 2>(count);
          else if (along.stride == 1) gather<K, 1>(count);
          else gather<K, 0>(count);
        });
        const index_t r = along.before;
        for (index_t e = 0; e < extended - along.in; ++e)
          if (border_source.data[e] >= 0) row.data[border_source.data[e] + r] += row.data[e < r ? e : along.in + e];
        put(op.dst, op.dst_stride, n, c, begin + h, row.data + r, along.in);
      }
    }
  }
  // A row of the gradient of x~: of `count` rows of filters and dy, phase by phase.
  template <int K, int S>
  NOINLINED void gather(int count) const {
    const int size = K ? K : k, s = S ? S : along.stride;
    const index_t n = extended / s + 1;
    const auto sum = [&](int ph, index_t m) INLINED {
      Numbers total{};
      for (int a = 0; a < count; ++a)
#pragma GCC unroll 5
        for (int q = ph; q < size; q += s)
          total += V::load(weights.data[a] + q * filters.pitch + m - q / s) * V::load(from.data[a] + m - q / s);
      return total;
    };
    if (S == 2) {
      for (index_t m = 0; m < n; m += lanes) {
        const Unit<acc> u = interleave(Unit<acc>{sum(0, m), sum(1, m)});
        V::store(row.data + 2 * m, u.a), V::store(row.data + 2 * m + lanes, u.b);
      }
    } else if (S == 1) {
      for (index_t m = 0; m < n; m += lanes) V::store(row.data + m, sum(0, m));
    } else {
      for (int ph = 0; ph < s; ++ph) {
        for (index_t m = 0; m < n; m += lanes) V::store(lines.data + m, sum(ph, m));
        for (index_t t = ph, m = 0; t < extended; t += s, ++m) row.data[t] = lines.data[m];
      }
    }
  }

  void get(const void* map, const Strides& s, index_t n, index_t c, index_t i, acc* to) const {
    const T* p = static_cast<const T*>(map) + n * s.n + c * s.c + i * s.h;
    index_t j = 0;
    if (s.w == 1) {
      for (; j + lanes <= along.out; j += lanes) V::store(to + j, Lanes<T>::load_vector(p + j));
      if (j < along.out) V::store(to + j, Lanes<T>::load_vector(p + j, static_cast<int>(along.out - j)));
    } else {
      for (; j < along.out; ++j) to[j] = widen(p[j * s.w]);
    }
  }
  void put(void* map, const Strides& s, index_t n, index_t c, index_t h, const acc* values, index_t width) const {
    T* p = static_cast<T*>(map) + n * s.n + c * s.c + h * s.h;
    index_t w = 0;
    if (s.w == 1) {
      for (; w + lanes <= width; w += lanes) Lanes<T>::store_vector(p + w, V::load(values + w));
      if (w < width) Lanes<T>::store_vector(p + w, V::load(values + w), static_cast<int>(width - w));
    } else {
      for (; w < width; ++w) Lanes<T>::store_vector(p + w * s.w, Numbers{} + values[w], 1);
    }
  }
};

}  // namespace
}  // namespace AF_ISA
}  // namespace aliasfused
