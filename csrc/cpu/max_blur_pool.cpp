// A prologue (affine, activation, maximum), then a blur, and their gradients, on a CPU. Neither the prepared map z nor the
// gradient of z ever reaches memory as a whole: some planes (NCHW) or rows of an image (NHWC) of it, in a buffer that a cache
// holds, lie between the rows of prologue.h and the blur's own kernels; or, where pixels can be prepared as these load them,
// not even that.
#include "activated.h"
#include "pixels.h"
#include "planes.h"
#include "prologue.h"
#include "won.h"

namespace aliasfused {
namespace AF_ISA {
namespace {

// Elements of z at a time.
constexpr index_t buffered_pixels = 1 << 17, buffered_planes = 1 << 16;
constexpr index_t most_run = 2048;  // pixels that are one step ahead of the next step

// Rows of v (or whatever else) of which the last few are at hand.
template <typename E>
struct Ring {
  index_t pitch;
  int n;
  Scratch<E> data;
  Ring(int rows, index_t elements) : pitch(round_up(elements, 64)), n(rows), data(pitch * rows) {}
  E* operator[](index_t row) const { return data.data + row % n * pitch; }
};

struct Range {
  index_t lo, hi;
};

// Rows [lo, hi) of z that rows [begin, end) of y are sums of.
Range read_by(const Axis& rows, index_t begin, index_t end) {
  Range range{rows.in, 0};
  for (index_t o = begin; o < end; ++o)
    rows.inputs_of(o, [&](index_t h, int) { range.lo = min(range.lo, h), range.hi = max(range.hi, h + 1); });
  return range.lo < range.hi ? range : Range{0, 0};
}

template <typename T, bool PIXELS, typename A>
struct Side {
  using acc = acc_t<T>;
  using V = Vector<acc>;
  using Rows = PrologueRows<T, PIXELS>;

  const MaxBlurPool& op;
  const A act;
  const Rows rows{op};
  const typename Rows::Tables tables{op};
  const BlurPool& blur = op.blur;
  const Prologue& pre = op.pre;
  // An item is some rows of an image's results, or some whole planes.
  index_t result_rows = blur.adjoint ? pre.height : blur.rows.out;
  index_t planes_of_item = PIXELS ? 1 : max(1, buffered_planes / max(blur.rows.in * blur.cols.in, 1));
  index_t rows_of_item = PIXELS ? max(4, buffered_pixels / max(rows.z_row * (blur.adjoint ? 1 : blur.rows.stride), 1)) : result_rows;
  index_t strips = (result_rows + rows_of_item - 1) / rows_of_item;
  index_t planes = PIXELS ? blur.batch : blur.batch * blur.channels;
  index_t items = PIXELS ? planes * strips : (planes + planes_of_item - 1) / planes_of_item;

  // f(k) with the size of a window as a compile-time number where it is a usual one, else 0.
  template <typename F>
  INLINED static void sized(int k, F&& f) {
    if constexpr (is_tuned<acc>) {
      if (k == 2) return f(std::integral_constant<int, 2>{});
      if (k == 3) return f(std::integral_constant<int, 3>{});
    }
    f(std::integral_constant<int, 0>{});
  }

  // What one thread needs for a row of z, or for one of dx.
  struct Memory {
    Ring<acc> v;               // rows of x, activated; for gradients one of them, with -inf around it,
    Ring<acc> highest;         // and the maxima along rows; or the maxima across rows, with -inf around them
    Ring<int8_t> column, row;  // of the winner
    Scratch<acc> won, part;
    ZeroedScratch<acc> dv;
    Scratch<T> copy;
    Scratch<const acc*> highest_rows;
    Scratch<const int8_t*> winner_rows;
    Scratch<const T*> gradient_rows, source_rows;
    Won<T, PIXELS> square;
    Scratch<acc> no_row;  // -inf
    index_t end = -1;     // the row of x after the last one met
    Memory(const Side& s, bool adjoint)
        : v(adjoint && !s.in_squares ? 1 : s.pre.kernel_h, s.in_runs || s.as_it_is ? 0 : V::lanes + s.max_elements(true)),
          highest(adjoint ? s.pre.kernel_h : 1, s.max_elements(!s.in_squares)),
          column(s.pre.kernel_h, s.max_elements(adjoint && !s.in_squares)),
          row(s.pre.kernel_h, s.max_elements(adjoint && !s.in_squares)),
          won(s.max_elements(adjoint && !s.in_squares)),
          part(adjoint ? 2 * (round_up(s.rows.channels, s.rows.lanes) + s.rows.lanes) : 0),
          dv(s.max_elements(adjoint)),
          copy(s.rows.row),
          highest_rows(s.pre.kernel_h),
          winner_rows(s.pre.kernel_h),
          gradient_rows(s.pre.kernel_h),
          source_rows(s.pre.kernel_h),
          square{s.pre.width, s.in_squares ? s.blur.cols.in : 0, s.in_squares ? s.rows.channels : 0, s.pre.left},
          no_row(adjoint && s.in_squares && !s.as_it_is ? v.pitch : 0) {
      if (!adjoint || !s.in_squares || s.as_it_is) return;
      for (index_t e = 0; e < v.pitch; ++e) no_row.data[e] = -acc(__builtin_inf());
      for (int h = 0; h < v.n; ++h) std::memcpy(v[h], no_row.data, V::lanes * sizeof(acc));
    }
  };
  index_t max_elements(bool needed) const {
    if (!needed || !rows.has_max) return 0;
    return (in_runs ? most_run : rows.extended) + rows.reach + 2 * rows.lanes;
  }

  // The rows of x that row j of z is of: met(h) for those not met before. To be called for rising j.
  template <typename Met>
  Range window(Memory& m, index_t j, Met&& met) const {
    const index_t lo = max(j - pre.top, 0), hi = min(j - pre.top + pre.kernel_h, pre.height);
    for (index_t h = max(m.end, lo); h < hi; ++h) met(h);
    m.end = hi;
    return {lo, hi};
  }

  // Which pixels the maxima of row j of z are.
  void winners(Memory& m, const MapRows<T>& x, index_t n, index_t c, index_t j) const {
    const Range in = window(m, j, [&](index_t h) {
      const T* const pixels = x.row(n, c, h, m.copy.data);
      const auto along = [&](const auto* v) {
        Rows::along(v, rows.z_row, rows.channels, pre.kernel_w, pre.left, m.highest[h], m.column[h]);
      };
      if (rows.is_monotone() && rows.extended == rows.row) return along(pixels);
      rows.activate_row(act, tables, pixels, c, m.v[h] + rows.left);
      rows.surround(m.v[h]);
      along(m.v[h]);
    });
    for (index_t h = in.lo; h < in.hi; ++h) m.highest_rows.data[h - in.lo] = m.highest[h];
    const int count = static_cast<int>(in.hi - in.lo), first = static_cast<int>(in.lo - (j - pre.top));
    Rows::across(m.highest_rows.data, count, first, rows.z_row, m.row[j]);
  }

  // Rows [lo, hi) of z, from channel c of image n on.
  void prepare(Memory& m, index_t n, index_t c, index_t lo, index_t hi, T* z) const {
    m.end = -1;
    const MapRows<T> x = rows.rows_of(blur.src, blur.src_stride);
    if (!rows.has_max) {
      const index_t together = x.follow_each_other() ? hi - lo : 1;
      for (index_t j = lo; j < hi; j += together, z += together * rows.z_row)
        rows.activate_alone(act, tables, x.row(n, c, j, m.copy.data), together * rows.row, c, z);
      return;
    }
    const bool as_it_is = rows.is_monotone() && x.whole();
    acc* const highest = m.highest[0];
    rows.surround(highest);
    for (index_t j = lo; j < hi; ++j, z += rows.z_row) {
      const Range in = window(m, j, [&](index_t h) {
        if (!as_it_is) rows.activate_row(act, tables, x.row(n, c, h, m.copy.data), c, m.v[h]);
      });
      const int count = static_cast<int>(in.hi - in.lo);
      for (index_t h = in.lo; h < in.hi; ++h) {
        if (as_it_is) m.source_rows.data[h - in.lo] = x.row(n, c, h, nullptr);
        else m.highest_rows.data[h - in.lo] = m.v[h];
      }
      for (index_t e = 0, done = 0; e < rows.row; e += most_run) {
        const index_t some = min(most_run, rows.row - e);
        as_it_is ? across(act, m.source_rows.data, count, e, some, highest + rows.left)
                 : across(Identical{}, m.highest_rows.data, count, e, some, highest + rows.left);
        const bool last = e + some == rows.row;
        if (last) rows.surround(highest);  // again, as whole vectors were stored
        const index_t there = last ? rows.z_row : max(done, (rows.left + e + some - rows.reach) / rows.lanes * rows.lanes);
        along(highest + done, there - done, z + done);
        done = there;
      }
    }
  }
  // highest: of n pixels of some rows, from element e of these on.
  template <typename How, typename E>
  void across(const How how, const E* const* of, int count, index_t e, index_t n, acc* highest) const {
    sized(count, [&](auto k) INLINED { Rows::template across_rows<k>(how, of, count, e, n, highest); });
  }
  void along(const acc* highest, index_t n, T* z) const {
    sized(pre.kernel_w, [&](auto k) INLINED { Rows::template along_row<k>(highest, pre.kernel_w, n, rows.channels, z); });
  }

  // Nothing lies around x.
  bool is_inside = rows.extended == rows.row && rows.z_rows == pre.height - pre.kernel_h + 1;
  // Gradients of maxima over squares of which every one has a pixel: by the kernel of its own, of x itself where that will do.
  bool in_squares = is_tuned<acc> && blur.adjoint && pre.kernel_h == pre.kernel_w && (pre.kernel_h == 2 || pre.kernel_h == 3) &&
                    pre.left < pre.kernel_w && pre.top < pre.kernel_h && blur.cols.in - pre.left <= pre.width &&
                    rows.z_rows - pre.top <= pre.height;
  // dx is of v and of what that has won: no other activation or affine, no sums.
  bool alone = rows.is_monotone() && pre.act != Act::relu6 && blur.dst && !op.sums && !op.correction;
  bool as_it_is = in_squares && alone && is_inside && pre.kernel_h == 2 && rows.rows_of(nullptr, op.x_stride).whole();
  // Planes that follow each other, and maxima with nothing around them: all rows are one run, and z has the width of x. What
  // begins in the last columns or rows of a plane is no window's, and nobody reads it.
  index_t x_plane = pre.height * pre.width;
  bool in_runs = !PIXELS && !blur.adjoint && rows.has_max && is_inside && rows.is_monotone() && follow_each_other(blur.src_stride);
  bool follow_each_other(const Strides& s) const {
    return rows.rows_of(nullptr, s).follow_each_other() && (blur.channels == 1 || s.c == x_plane) &&
           (blur.batch == 1 || s.n == blur.channels * x_plane);
  }
  // z of the n pixels from x on.
  void prepare_run(Memory& m, const T* x, index_t n, T* z) const {
    const index_t reach = (pre.kernel_h - 1) * pre.width + rows.reach;
    std::memset(z + n - reach, 0, reach * sizeof(T));
    for (; n > reach; x += most_run, z += most_run, n -= most_run) {
      const index_t some = min(most_run, n - reach);
      for (int a = 0; a < pre.kernel_h; ++a) m.source_rows.data[a] = x + a * pre.width;
      across(act, m.source_rows.data, pre.kernel_h, 0, some + rows.reach, m.highest[0]);
      V::store(m.highest[0] + some + rows.reach, Vec<acc>{});  // as `along` reads on
      along(m.highest[0], some, z);
    }
  }

  // Rows [begin, end) of dx out of the gradient of z, which begins at row `lo`.
  void finish(Memory& m, index_t n, index_t c, index_t begin, index_t end, const T* g, index_t lo, double* sums) const {
    T* dx = blur.dst ? static_cast<T*>(blur.dst) + n * blur.dst_stride.n + c * blur.dst_stride.c + begin * blur.dst_stride.h : nullptr;
    const MapRows<T> x = rows.rows_of(op.x, op.x_stride);
    const auto put = [&](index_t h, index_t together, const auto* dv) {
      rows.gradient(act, tables, x.row(n, c, h, m.copy.data), dv, together * rows.row, c, dx, m.part.data, sums);
      if (dx) dx += together * rows.row;
    };
    if (!rows.has_max) {
      const index_t together = x.follow_each_other() ? end - begin : 1;
      for (index_t h = begin; h < end; h += together) put(h, together, g + (h - lo) * rows.z_row);
      return;
    }
    if constexpr (is_tuned<acc>) {
      if (in_squares && pre.kernel_h == 2) return squares<2>(m, x, n, c, begin, end, g, lo, dx, put);
      if (in_squares) return squares<3>(m, x, n, c, begin, end, g, lo, dx, put);
    }
    m.end = -1;
    index_t seen = lo;
    for (index_t h = begin; h < end; ++h) {
      const index_t from = max(h + pre.top - pre.kernel_h + 1, 0), to = min(h + pre.top + 1, rows.z_rows);
      for (; seen < to; ++seen) winners(m, x, n, c, seen);
      for (index_t j = from; j < to; ++j)
        m.winner_rows.data[j - from] = m.row[j], m.gradient_rows.data[j - from] = g + (j - lo) * rows.z_row;
      const int count = static_cast<int>(max(to - from, 0)), first = static_cast<int>(h + pre.top - from);
      Rows::won_across(m.winner_rows.data, m.gradient_rows.data, count, first, rows.z_row, rows.reach, m.won.data);
      Rows::won_along(m.column[h], m.won.data, rows.row, rows.channels, pre.kernel_w, rows.left, m.dv.data);
      put(h, 1, m.dv.data);
    }
  }

  // The same for windows of K x K.
  template <int K, typename Put>
  void squares(Memory& m, const MapRows<T>& x, index_t n, index_t c, index_t begin, index_t end, const T* g, index_t lo, T* dx,
               Put&& put) const {
    using Square = Won<T, PIXELS>;
    const index_t pitch = blur.dst_stride.h;
    const acc never = __builtin_nanf(""), flat = pre.act == Act::relu ? acc(0) : never;
    m.square.forget();
    if constexpr (K == 2)
      if (as_it_is) {
        const bool roomy = (blur.batch - 1 - n) * op.x_stride.n + (blur.channels - 1 - c) * op.x_stride.c >= V::lanes;
        const auto some = [&](index_t h, index_t count, const T* given, T* to, bool bypass) {
          typename Square::template Seen<K, T, false> seen;
          for (int a = 0; a < K; ++a) seen.row[a] = x.row(n, c, min(h + a, pre.height - 1), nullptr);
          m.square.gradient(flat, seen, given, count, to, {op.x_stride.h, pitch}, roomy, bypass);
        };
        // A row ahead of the first one is only there for what is owed to others.
        for (index_t h = lo; h < begin; ++h) some(h, 1, g + (h - lo) * rows.z_row, m.copy.data, false);
        const index_t last = min(end, rows.z_rows);
        some(begin, last - begin, g + (begin - lo) * rows.z_row, dx, rows.bypass);
        for (index_t h = max(begin, last); h < end; ++h) some(h, 1, nullptr, dx + (h - begin) * pitch, rows.bypass);
        return;
      }
    index_t met = 0;
    for (index_t j = max(begin + pre.top - K + 1, 0); j < end + pre.top; ++j) {
      const index_t h = j - pre.top;
      const T* const given = j < rows.z_rows ? g + (j - lo) * rows.z_row : nullptr;
      typename Square::template Seen<K, acc, true> seen{{}, static_cast<int>(max(-h, 0))};
      for (int a = 0; a < K; ++a) {
        const index_t r = h + a;
        const bool is_row = r >= 0 && r < pre.height;
        seen.row[a] = (is_row ? m.v[r] : m.no_row.data) + V::lanes;
        if (r < met || !is_row) continue;
        rows.activate_row(act, tables, x.row(n, c, r, m.copy.data), c, m.v[r] + V::lanes + rows.left);
        rows.surround(m.v[r] + V::lanes);
        met = r + 1;
      }
      if constexpr (K == 3)
        if (alone) {
          m.square.gradient(flat, seen, given, 1, h < begin ? m.copy.data : dx + (h - begin) * pitch, {}, true, rows.bypass && h >= begin);
          continue;
        }
      m.square.gradient(never, seen, given, 1, m.dv.data, {}, true, false);
      if (h >= begin) put(h, 1, m.dv.data);
    }
  }

  void forward(const Parallel& parallel) const {
    parallel(items, 1, [&](index_t begin, index_t end) {
      Memory memory(*this, false);
      const Range most = PIXELS ? longest() : Range{0, blur.rows.in};
      const index_t z_row = in_runs ? pre.width : rows.z_row, z_plane = in_runs ? x_plane : blur.rows.in * z_row;
      const Scratch<T> z(PIXELS ? (most.hi - most.lo) * z_row : planes_of_item * z_plane);
      BlurPool part = blur;
      part.batch = 1;
      Range there{0, 0};
      for (index_t item = begin; item < end; ++item) {
        if constexpr (PIXELS) {
          const Strides& d = blur.dst_stride;
          const index_t n = item / strips, o = item % strips * rows_of_item, last = min(o + rows_of_item, result_rows);
          const Range in = read_by(blur.rows, o, last);
          // What the strip before has read as well is there already, unless a border shows this one rows from far ahead.
          const bool goes_on = o && item > begin && in.lo >= there.lo;
          const index_t had = goes_on ? min(max(there.hi - in.lo, 0), in.hi - in.lo) : 0;
          if (had) std::memmove(z.data, z.data + (in.lo - there.lo) * rows.z_row, had * rows.z_row * sizeof(T));
          prepare(memory, n, 0, in.lo + had, in.hi, z.data + had * rows.z_row);
          there = in;
          part.src = z.data - in.lo * rows.z_row, part.src_stride = {0, 1, rows.z_row, rows.channels};
          part.dst = static_cast<T*>(blur.dst) + n * d.n + o * d.h;
          blur_rows(part, o, last);
        } else {
          const index_t first = item * planes_of_item, some = min(planes_of_item, planes - first);
          if (in_runs) prepare_run(memory, static_cast<const T*>(blur.src) + first * x_plane, some * x_plane, z.data);
          for (index_t q = 0; q < some && !in_runs; ++q)
            prepare(memory, (first + q) / blur.channels, (first + q) % blur.channels, 0, blur.rows.in, z.data + q * z_plane);
          part.channels = some;
          part.src = z.data, part.src_stride = {0, z_plane, z_row, 1};
          const index_t y_plane = blur.rows.out * blur.cols.out;
          part.dst = static_cast<T*>(blur.dst) + first * y_plane, part.dst_stride = {0, y_plane, blur.cols.out, 1};
          blur_pool(part, serial);
        }
      }
    });
  }

  void backward(const Parallel& parallel) const {
    // Sums are kept apart for every item, and added up in their order: whoever computes them, the bits are the same.
    const index_t parts = PIXELS ? items * 2 * blur.channels : planes * 2;
    const Scratch<double> sums(op.sums ? parts : 0);
    for (index_t i = 0; op.sums && i < parts; ++i) sums.data[i] = 0;
    parallel(items, 1, [&](index_t begin, index_t end) {
      Memory memory(*this, true);
      const index_t z_plane = blur.rows.in * rows.z_row;
      const Scratch<T> g(PIXELS ? min(rows_of_item + pre.kernel_h - 1, blur.rows.in) * rows.z_row : planes_of_item * z_plane);
      BlurPool part = blur;
      part.batch = 1, part.dst = g.data;
      for (index_t item = begin; item < end; ++item) {
        const Strides& s = blur.src_stride;
        if constexpr (PIXELS) {
          const index_t n = item / strips, h = item % strips * rows_of_item, last = min(h + rows_of_item, result_rows);
          const index_t lo = max(h + pre.top - pre.kernel_h + 1, 0), hi = max(lo, min(last + pre.top, blur.rows.in));
          part.src = static_cast<const T*>(blur.src) + n * s.n;
          part.dst_stride = {0, 1, rows.z_row, rows.channels};
          blur_rows(part, lo, hi);
          finish(memory, n, 0, h, last, g.data, lo, op.sums ? sums.data + item * 2 * blur.channels : nullptr);
        } else {
          const index_t first = item * planes_of_item, some = min(planes_of_item, planes - first);
          // Planes of one image after the other: of each image those that are in this item.
          for (index_t q = 0, more; q < some; q += more) {
            const index_t n = (first + q) / blur.channels, c = (first + q) % blur.channels;
            more = min(some - q, blur.channels - c);
            part.channels = more;
            part.src = static_cast<const T*>(blur.src) + n * s.n + c * s.c;
            part.dst = g.data + q * z_plane, part.dst_stride = {0, z_plane, rows.z_row, 1};
            blur_pool(part, serial);
          }
          for (index_t q = 0; q < some; ++q)
            finish(memory, (first + q) / blur.channels, (first + q) % blur.channels, 0, result_rows, g.data + q * z_plane, 0,
                   op.sums ? sums.data + (first + q) * 2 : nullptr);
        }
      }
      settle();
    });
    if (!op.sums) return;
    acc* total = static_cast<acc*>(op.sums);
    for (index_t c = 0; c < blur.channels; ++c)
      for (int i = 0; i < 2; ++i) {
        double sum = 0;
        for (index_t k = 0; k < (PIXELS ? items : blur.batch); ++k)
          sum += sums.data[PIXELS ? (k * 2 + i) * blur.channels + c : (k * blur.channels + c) * 2 + i];
        total[i * blur.channels + c] = static_cast<acc>(sum);
      }
  }

  // As many rows of z as any item reads.
  Range longest() const {
    Range most{0, 0};
    for (index_t o = 0; o < result_rows; o += rows_of_item) {
      const Range r = read_by(blur.rows, o, min(o + rows_of_item, result_rows));
      if (r.hi - r.lo > most.hi) most.hi = r.hi - r.lo;
    }
    return most;
  }
};

// Without a maximum or a gradient, the blur's own kernels on x, whose pixels are activated as they are loaded.
template <typename T>
bool in_one_go(const MaxBlurPool& op, const Parallel& parallel) {
  const BlurPool& blur = op.blur;
  if (blur.adjoint || op.pre.kernel_h > 1 || op.pre.kernel_w > 1) return false;
  if constexpr (is_tuned<acc_t<T>>)
    return as_loaded<T>(op.pre, blur.channels, [&](const auto& pre) {
      if (is_pixels(blur)) blur_pixels<T, false>(blur, parallel, pre, 0, blur.batch * blur.rows.out);
      else blur_planes<T, false>(blur, parallel, pre);
    });
  return false;
}

template <typename T>
void max_blur_pool_of(const MaxBlurPool& op, const Parallel& parallel) {
  if (in_one_go<T>(op, parallel)) return;
  // The order of the prepared map is that of y, or of dx.
  const Strides& s = op.blur.dst ? op.blur.dst_stride : op.x_stride;
  const bool pixels = op.blur.channels > 1 && s.c == 1;
  with_act<acc_t<T>>(op.pre, [&](auto act) {
    const auto run = [&](const auto& side) { op.blur.adjoint ? side.backward(parallel) : side.forward(parallel); };
    pixels ? run(Side<T, true, decltype(act)>{op, act}) : run(Side<T, false, decltype(act)>{op, act});
  });
}

}  // namespace

void max_blur_pool(const MaxBlurPool& op, const Parallel& parallel) {
  switch (op.blur.dtype) {
    case Dtype::float32: return max_blur_pool_of<float>(op, parallel);
    case Dtype::bfloat16: return max_blur_pool_of<bfloat16>(op, parallel);
    case Dtype::float16: return max_blur_pool_of<float16>(op, parallel);
    case Dtype::float64: return max_blur_pool_of<double>(op, parallel);
  }
}

}  // namespace AF_ISA
}  // namespace aliasfused
