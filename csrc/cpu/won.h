// The gradient of v out of that of its maxima over windows of 2 x 2 or 3 x 3, in one pass over both: who has won is decided
// anew in registers, which costs less than to keep it.
//
// A window takes what it has to give (g) to one of its rows, and there to one of its pixels. Windows are met row by row. What
// one gives to rows below its first is owed to them until these are the first row of a window; what it gives there to pixels
// behind its first is owed likewise. A row of windows so makes one row of results: the first that they see.
#pragma once

#include "highest.h"
#include "memory.h"

namespace aliasfused {
namespace AF_ISA {
namespace {

template <typename T, bool PIXELS>
struct Won {
  using acc = acc_t<T>;
  using V = Vector<acc>;
  static constexpr int lanes = V::lanes, most = 3;

  // Of a row: pixels, windows, channels, and by how many pixels the first window begins ahead of the first pixel.
  index_t width, windows, channels, left;
  index_t pitch = round_up((width + left) * channels, lanes) + 2 * lanes;
  ZeroedScratch<acc> rows_below{(most - 1) * pitch}, pixels_behind{PIXELS ? (most - 1) * (channels + lanes) : 0};
  ZeroedScratch<T> nothing{windows * channels};  // the gradient of windows that there are not

  void forget() { std::memset(rows_below.data, 0, (most - 1) * pitch * sizeof(acc)); }

  // The rows that a row of windows sees, pixel -left of which is element 0; those before `first` are no rows of x. With BORDER
  // what is no pixel is -inf, whole vectors can be read, and (planes) one ahead of the row.
  template <int K, typename E, bool BORDER>
  struct Seen {
    const E* row[K];
    int first = 0;
  };
  // How far it is to the next row of all.
  struct Pitches {
    index_t seen, to;
  };
  // For `rows` rows of windows, and of results: the gradient of v, but 0 where v <= flat. Planes, without BORDER: roomy, if whole
  // vectors can be read at the end of every row.
  template <int K, typename E, bool BORDER, typename To>
  void gradient(acc flat, const Seen<K, E, BORDER>& seen, const T* g, index_t rows, To* to, Pitches pitches, bool roomy, bool bypass) {
    const bool whole_lines = reinterpret_cast<uintptr_t>(to) % 64 == 0 && (PIXELS ? channels : rows > 1 ? pitches.to : lanes) % lanes == 0;
    const auto run = [&](auto whole) {
      gather<K, whole>(flat, seen, g ? g : nothing.data, rows, pitches, windows, width, channels, left, rows_below.data + lanes, pitch,
                       pixels_behind.data, to, bypass && whole_lines);
    };
    PIXELS || BORDER || roomy ? run(std::true_type{}) : run(std::false_type{});
  }

 private:
  using Where = decltype(beat(Vec<acc>{}, Vec<acc>{}));
  INLINED static Where first_lanes(int n) {
#if defined(__AVX512BW__)
    if constexpr (sizeof(acc) == 4) return Lanes<float>::first(n);
    else
#endif
      return iota<acc>(0, 1) < n;
  }
  INLINED static int limited(index_t n, index_t most) { return static_cast<int>(max(min(n, most), 0)); }

  // WHOLE: whole vectors can be read everywhere.
  template <int K, bool WHOLE, typename E, bool BORDER, typename To>
  NOINLINED static void gather(acc flat, Seen<K, E, BORDER> seen, const T* g, index_t rows, Pitches pitches, index_t windows, index_t width,
                               index_t channels, index_t left, acc* below, index_t pitch, acc* behind, To* to, bool streams) {
    const index_t step = PIXELS ? channels : 1;
    const Vec<acc> zero{};
    // Planes: the last vector of results, which is not whole as a rule.
    const index_t last = left + (width - 1) / lanes * lanes, end = left + width, inside_end = min(end, windows);
    const int of_last = static_cast<int>(end - last), windows_of_last = limited(windows - last, of_last);
    int pixels_of_last[K];
    for (int b = 0; b < K; ++b) pixels_of_last[b] = limited(windows + K - 1 - b - last, of_last);
    for (; rows > 0; --rows, g += windows * channels, to += pitches.to) {
      const auto put = [=](index_t e, int n, Vec<acc> v) INLINED {
        if (e < left * step) return;
        To* const p = to + (e - left * step);
#if defined(__AVX512BW__)
        if constexpr (sizeof(To) == 4)
          if (streams && n == lanes) return _mm512_stream_ps(p, v);
#endif
        if (!streams) own_soon(p, lanes * sizeof(To));
        store_upto(p, v, n);
      };
      // n windows from element e on, that have `given` to give; `owed` takes what is for the pixels behind, and says what is for
      // these. At an edge, there(b): how many have a pixel b; forced(b): where all before pixel b are none.
      const auto some = [=](auto at_edge, index_t e, int n, Vec<acc> given, auto&& there, auto&& forced, auto&& owed) INLINED {
        const auto from = [=](int a, int b)
                              INLINED { return load_upto(seen.row[a] + e + b * step, !at_edge || (WHOLE && !PIXELS) ? lanes : there(b)); };
        Where pixel[K], row[K];
        const Vec<acc> first = from(0, 0);
        Vec<acc> best = first;
#pragma GCC unroll 4
        for (int b = 1; b < K; ++b) {
          const Vec<acc> v = from(0, b);
          pixel[b] = beat(v, best);
          if (at_edge && BORDER) pixel[b] |= forced(b);
          best = where(pixel[b], v, best);
        }
#pragma GCC unroll 4
        for (int a = 1; a < K; ++a) {
          Vec<acc> v = from(a, 0);
#pragma GCC unroll 4
          for (int b = 1; b < K; ++b) v = higher(from(a, b), v);
          row[a] = beat(v, best);
          if (BORDER && at_edge && a <= seen.first) row[a] |= first_lanes(lanes);
          best = where(row[a], v, best);
        }
        Vec<acc> to_row[K], to_pixel[K];
#pragma GCC unroll 4
        for (int a = K - 1; a > 0; --a) to_row[a] = where(row[a], given, zero), given = where(row[a], zero, given);
        Vec<acc> won = Lanes<acc>::load_vector(below + e) + given;
#pragma GCC unroll 4
        for (int a = 1; a < K; ++a) {
          if (a + 1 < K) to_row[a] += Lanes<acc>::load_vector(below + a * pitch + e);
          store_upto(below + (a - 1) * pitch + e, to_row[a], PIXELS ? n : lanes);  // planes: with what follows, which is 0
        }
#pragma GCC unroll 4
        for (int b = K - 1; b > 0; --b) to_pixel[b] = where(pixel[b], won, zero), won = where(pixel[b], zero, won);
        put(e, n, first <= flat ? zero : won + owed(to_pixel));
      };
      const auto all = [](int) INLINED { return lanes; };
      const auto none = [](int) INLINED { return Where{}; };
      const std::true_type edge;
      const std::false_type inside;
      const bool all_rows = !BORDER || seen.first == 0;

      if constexpr (PIXELS) {
        const index_t of_pixel = channels + lanes;
        for (index_t k = 0; k < (K - 1) * of_pixel; ++k) behind[k] = 0;
        for (index_t w = 0; w < width + left; ++w) {
          const auto forced = [=](int b) INLINED { return first_lanes(w + b <= left ? lanes : 0); };
          for (index_t k = 0; k < channels; k += lanes) {
            const int n = static_cast<int>(min(lanes, channels - k));
            const auto owed = [=](const auto& next) INLINED {
              const Vec<acc> here = V::load(behind + k);
#pragma GCC unroll 4
              for (int b = 1; b < K; ++b)
                V::store(behind + (b - 1) * of_pixel + k, b + 1 < K ? V::load(behind + b * of_pixel + k) + next[b] : next[b]);
              return here;
            };
            const index_t e = w * channels + k;
            __builtin_prefetch(reinterpret_cast<const char*>(seen.row[K - 1] + e) + ahead, 0, 2);
            const auto there = [=](int b) INLINED { return w + b < windows + K - 1 ? n : 0; };
            if (n < lanes || w < left || w >= windows || !all_rows) {
              const Vec<acc> given = w < windows ? load_upto(g + e, n) : zero;
              some(edge, e, n, given, there, forced, owed);
            } else {
              some(inside, e, lanes, Lanes<T>::load_vector(g + e), all, none, owed);
            }
          }
        }
      } else {
        Vec<acc> before[K] = {};
        const auto owed = [&](const auto& next) INLINED {
          Vec<acc> here{};
#pragma GCC unroll 4
          for (int b = 1; b < K; ++b) here += __builtin_shuffle(before[b], next[b], iota<acc>(lanes - b, 1)), before[b] = next[b];
          return here;
        };
        // Results begin with whole vectors; the windows ahead of them are the last lanes of a vector.
        for (index_t e = left ? left - lanes : 0; e < end; e += lanes) {
          __builtin_prefetch(reinterpret_cast<const char*>(seen.row[K - 1] + e) + ahead, 0, 2);
          if (all_rows && e >= left && e + lanes <= inside_end) {
            some(inside, e, lanes, Lanes<T>::load_vector(g + e), all, none, owed);
            continue;
          }
          const bool is_last = e == last, is_ahead = e < left;
          const Vec<acc> given = is_ahead
                                     ? __builtin_shuffle(zero, load_upto(g, limited(windows, left)), iota<acc>(static_cast<int>(left), 1))
                                     : load_upto(g + e, is_last ? windows_of_last : limited(windows - e, lanes));
          const auto there = [=](int b) INLINED { return is_last ? pixels_of_last[b] : limited(windows + K - 1 - b - e, lanes); };
          const auto forced = [=](int b) INLINED { return first_lanes(is_ahead ? lanes - b + 1 : 0); };
          some(edge, e, is_last ? of_last : lanes, given, there, forced, owed);
        }
      }
      for (int a = 0; a < K; ++a) seen.row[a] += pitches.seen;
    }
  }
  static constexpr int ahead = 16384;  // bytes that are asked for before they are read
};

}  // namespace
}  // namespace AF_ISA
}  // namespace aliasfused
