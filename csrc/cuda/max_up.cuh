// Gradients through a blur with a prologue: stride 2, a filter of K taps and a maximum over W x W, both known to the compiler.
//
//   max_up     dx, or the channels' sums as shares of them; a thread owns C channels of P columns and slides down a strip of rows
//   sum_parts  the shares added up
//
// Sums run in a fixed order and no result has two writers, so a repeated call gives the same bits.
#pragma once

#include "max_lanes.cuh"

namespace aliasfused {

// What becomes of a thread's pixels. Its columns of x lie among X, its windows are Z columns of z, of which P are its own.
template <typename scalar_t, int K, int W, int C, int P>
struct Ascent {
  static constexpr int N = Stencils<K>::size, Z = P + W - 1, X = P + 2 * (W - 1);
  // Where a thread owns a pack of columns, their parity is known, hence how far a window of y is from the first.
  static constexpr bool row = P > 1 && C == 1;
  static constexpr int odd = (K / 2 + (W - 1) / 2 + W - 1) % 2;
  static constexpr int step(int z) { return (odd + z) / 2; }
  static constexpr int reads = row ? step(Z - 1) + N : Z * N;

  struct Dy {
    Pack<scalar_t, C> y[reads];
  };
  struct Line {
    Pack<scalar_t, row ? P : C> own[row ? 1 : P];
    Pack<scalar_t, C> side[2 * (W - 1) + 1];
  };
  // Of a row of x in each window: the largest, and at[b] has a bit for the window if it is the one in its column b + 1.
  struct Best {
    float most[Z][C];
    unsigned at[W];
  };
  static constexpr unsigned bit(int z, int c) { return 1u << (z * C + c); }

  const MaxBlurPool& op;
  const int width, col;
  Straight act;
  float center[C], scale[C], shift[C], tap[Z][N];
  bool there[Z];
  int at_y[reads], at_side[2 * (W - 1) + 1];

  __device__ Ascent(const MaxBlurPool& op, const Stencils<K>& stencils, int c, int col)
      : op(op), width(static_cast<int>(op.pre.width)), col(col), act(op.pre) {
    const float* table = static_cast<const float*>(op.pre.affine);
    const index_t channels = op.blur.channels;
#pragma unroll
    for (int i = 0; i < C; ++i) {
      center[i] = table ? table[c + i] : 0;
      scale[i] = table ? table[channels + c + i] : 1;
      shift[i] = table ? table[2 * channels + c + i] : 0;
    }
    const int before = col - (W - 1) + static_cast<int>(op.pre.left);  // the column of z whose window ends in col
#pragma unroll
    for (int z = 0; z < Z; ++z) {
      const int j = before + z;
      there[z] = j >= 0 && j < op.blur.cols.in;
      const float* taps = stencils.at(there[z] ? j : 0);
#pragma unroll
      for (int d = 0; d < N; ++d) tap[z][d] = taps[d];
    }
#pragma unroll
    for (int i = 0; i < reads; ++i) {
      const int j = row ? stencils.first(before) + i : stencils.first(before + i / N) + i % N;
      at_y[i] = static_cast<int>(clamp(j, static_cast<int>(op.blur.cols.out)) * op.blur.src_stride.w);
    }
#pragma unroll
    for (int i = 0; i < 2 * (W - 1); ++i)
      at_side[i] = static_cast<int>(clamp(col - (W - 1) + (i < W - 1 ? i : i + P), width) * op.x_stride.w);
  }

  __device__ Dy load_dy(const scalar_t* dy, int o) const {
    const scalar_t* from = dy + clamp(o, static_cast<int>(op.blur.rows.out)) * op.blur.src_stride.h;
    Dy raw;
#pragma unroll
    for (int i = 0; i < reads; ++i) raw.y[i] = *reinterpret_cast<const Pack<scalar_t, C>*>(from + at_y[i]);
    return raw;
  }

  __device__ void filter(const Dy& raw, float (&g)[Z][C]) const {
#pragma unroll
    for (int z = 0; z < Z; ++z)
#pragma unroll
      for (int c = 0; c < C; ++c) {
        float sum = 0;
#pragma unroll
        for (int d = 0; d < N; ++d) sum += tap[z][d] * static_cast<float>(raw.y[row ? step(z) + d : z * N + d].v[c]);
        g[z][c] = there[z] ? sum : 0;
      }
  }

  // Row h of x, or where there is none another.
  __device__ Line load(const scalar_t* x, int h) const {
    const scalar_t* from = x + clamp(h, static_cast<int>(op.pre.height)) * op.x_stride.h;
    Line line;
#pragma unroll
    for (int i = 0; i < (row ? 1 : P); ++i)
      line.own[i] = *reinterpret_cast<const Pack<scalar_t, row ? P : C>*>(from + (row ? col : clamp(col + i, width)) * op.x_stride.w);
#pragma unroll
    for (int i = 0; i < 2 * (W - 1); ++i) line.side[i] = *reinterpret_cast<const Pack<scalar_t, C>*>(from + at_side[i]);
    return line;
  }

  __device__ static scalar_t own(const Line& line, int p, int c) { return row ? line.own[0].v[row ? p : 0] : line.own[row ? 0 : p].v[c]; }
  __device__ float centred(const Line& line, int p, int c) const { return static_cast<float>(own(line, p, c)) - center[c]; }

  __device__ Best best(const Line& line, int h) const {
    const bool is_row = h >= 0 && h < op.pre.height;
    Best found{};
#pragma unroll
    for (int c = 0; c < C; ++c) {
      float rank[X];
#pragma unroll
      for (int e = 0; e < X; ++e) {
        const int w = col - (W - 1) + e, p = e - (W - 1);
        const scalar_t raw = p >= 0 && p < P ? own(line, p >= 0 && p < P ? p : 0, c) : line.side[p < 0 ? e : p < P ? 0 : e - P].v[c];
        rank[e] = act.rank(std::fma(static_cast<float>(raw) - center[c], scale[c], shift[c]));
        if (p < 0) rank[e] = w < 0 ? -INFINITY : rank[e];
        if (p >= (row ? P : 1)) rank[e] = w >= width ? -INFINITY : rank[e];
      }
#pragma unroll
      for (int z = 0; z < Z; ++z) {
        float most = rank[z];
        int place = 0;
#pragma unroll
        for (int b = 1; b < W; ++b) {
          // What lies ahead of the first column is no pixel, whatever this one is worth.
          const bool take = beats(rank[z + b], most) || (z + b <= W - 1 && col - (W - 1) + z + b == 0);
          most = take ? rank[z + b] : most, place = take ? b : place;
        }
#pragma unroll
        for (int b = 1; b < W; ++b)
          if (place == b) found.at[b - 1] |= bit(z, c);
        found.most[z][c] = is_row ? most : -INFINITY;
      }
    }
    return found;
  }

  // The windows whose rows are those of `best`, the first of them row h of x: each adds its gradient to that of its winner.
  __device__ void give(const Best (&best)[W], int h, const float (&g)[Z][C], float (&won)[W][P][C]) const {
#pragma unroll
    for (int z = 0; z < Z; ++z)
#pragma unroll
      for (int c = 0; c < C; ++c) {
        float most = best[0].most[z][c];
        bool later[W] = {};  // whether a row is the winner's, of those so far
#pragma unroll
        for (int a = 1; a < W; ++a) {
          later[a] = beats(best[a].most[z][c], most) || h + a == 0;
          most = later[a] ? best[a].most[z][c] : most;
        }
        bool beaten = false;
#pragma unroll
        for (int a = W - 1; a >= 0; --a) {
          const float given = !beaten && (a == 0 || later[a]) ? g[z][c] : 0;
          beaten = beaten || later[a];
          bool first = true;
#pragma unroll
          for (int b = W - 1; b >= 0; --b) {
            const int p = z + b - (W - 1), own = p >= 0 && p < P ? p : 0;
            const bool here = b == 0 ? first : (best[a].at[b > 0 ? b - 1 : 0] & bit(z, c)) != 0;
            first = first && !here;
            if (p >= 0 && p < P) won[a][own][c] += here ? given : 0;
          }
        }
      }
  }
};

template <typename scalar_t, int K, int W, int C, int P>
__global__ void __launch_bounds__(block_threads, 2)
    max_up(const __grid_constant__ MaxBlurPool op, const __grid_constant__ Stencils<K> rows, const __grid_constant__ Stencils<K> cols,
           const __grid_constant__ Walk walk, double* __restrict__ parts) {
  using Lane = Ascent<scalar_t, K, W, C, P>;
  constexpr int N = Lane::N, Z = Lane::Z;
  const BlurPool& blur = op.blur;
  index_t n;
  int c, col, begin, end;
  const bool live = walk.place(n, c, col, begin, end);
  float sum[2][C] = {};
  if (live) {
    const int first_c = c * C;
    col *= P;
    const Lane lane(op, cols, first_c, col);
    const scalar_t* __restrict__ dy = static_cast<const scalar_t*>(blur.src) + n * blur.src_stride.n + first_c * blur.src_stride.c;
    const scalar_t* __restrict__ x = static_cast<const scalar_t*>(op.x) + n * op.x_stride.n + first_c * op.x_stride.c;
    const Strides& d = blur.dst_stride;
    scalar_t* __restrict__ dx = static_cast<scalar_t*>(blur.dst) + n * d.n + first_c * d.c + col * d.w;
    const float* correction = static_cast<const float*>(op.correction);
    float plus[C], times[C];
#pragma unroll
    for (int i = 0; i < C; ++i) {
      plus[i] = correction ? correction[first_c + i] : 0;
      times[i] = correction ? correction[blur.channels + first_c + i] : 0;
    }
    // Windows of rows ahead of the strip reach into it: those of a pair more.
    const int height = static_cast<int>(op.pre.height), top = static_cast<int>(op.pre.top), ahead = W > 1;
    float window[N][Z][C] = {}, won[W][P][C] = {};
    typename Lane::Line line[W];
    typename Lane::Best best[W];
#pragma unroll
    for (int a = 0; a < W - 1; ++a) {
      const int h = 2 * (begin - ahead) - rows.before - top + a;
      line[a + 1] = lane.load(x, h), best[a + 1] = lane.best(line[a + 1], h);
    }
    int o = begin - ahead - K / 2;
    typename Lane::Line next = lane.load(x, 2 * (begin - ahead) - rows.before - top + W - 1);  // on its way while others are looked at
    for (int i = begin - ahead - (N - 1); i < end; ++i, ++o) {
      const typename Lane::Dy raw = lane.load_dy(dy, o);
#pragma unroll
      for (int a = 0; a < N - 1; ++a)
#pragma unroll
        for (int z = 0; z < Z; ++z)
#pragma unroll
          for (int v = 0; v < C; ++v) window[a][z][v] = window[a + 1][z][v];
      lane.filter(raw, window[N - 1]);
      if (i < begin - ahead) continue;
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int row = 2 * i + r - rows.before, h = row - top;  // of z, and of x the row that all windows have seen after this one
        float g[Z][C] = {};
        if (row >= 0 && row < rows.in) {
          const float* tap = rows.at(row);
#pragma unroll
          for (int a = 0; a < N; ++a)
#pragma unroll
            for (int z = 0; z < Z; ++z)
#pragma unroll
              for (int v = 0; v < C; ++v) g[z][v] += tap[a] * window[a][z][v];
        }
#pragma unroll
        for (int a = 0; a < W; ++a) {
          line[a] = a + 1 < W ? line[a + 1 < W ? a + 1 : 0] : next;
          if (W > 1) best[a] = a + 1 < W ? best[a + 1 < W ? a + 1 : 0] : lane.best(next, h + W - 1);
#pragma unroll
          for (int p = 0; p < P; ++p)
#pragma unroll
            for (int v = 0; v < C; ++v) won[a][p][v] = W == 1 ? g[p][v] : a + 1 < W ? won[a + 1 < W ? a + 1 : 0][p][v] : 0;
        }
        next = lane.load(x, h + W);
        if constexpr (W > 1) lane.give(best, h, g, won);
        if (i < begin || h < 0 || h >= height) continue;
        float centred[P * C], result[P * C];
#pragma unroll
        for (int e = 0; e < P * C; ++e) {
          centred[e] = lane.centred(line[0], e / C, e % C);
          result[e] = lane.act.gradient(std::fma(centred[e], lane.scale[e % C], lane.shift[e % C]), won[0][e / C][e % C]);
        }
        if (parts) {
#pragma unroll
          for (int e = 0; e < P * C; ++e)
            if (P == 1 || Lane::row || col + e / C < lane.width) sum[0][e % C] += result[e], sum[1][e % C] += result[e] * centred[e];
          continue;
        }
#pragma unroll
        for (int e = 0; e < P * C; ++e) {
          result[e] *= lane.scale[e % C];
          if (correction) result[e] += plus[e % C] + times[e % C] * centred[e];  // else not even a zero times infinity
        }
        if constexpr (Lane::row) {
          store(result, dx + h * d.h);
        } else {
#pragma unroll
          for (int p = 0; p < P; ++p)
            if (col + p < lane.width) store(*reinterpret_cast<const float (*)[C]>(result + p * C), dx + h * d.h + p * d.w);
        }
      }
    }
  }
  if (parts) walk.add_up(sum, parts, c);
}

// sums[i] = parts[0][i] + parts[1][i] + ..., of `count` each, neighbouring ones by neighbouring threads.
__global__ void __launch_bounds__(block_threads)
    sum_parts(const double* __restrict__ parts, const index_t shares, const index_t count, float* sums) {
  constexpr int tile = 8, rows = block_threads / tile;
  __shared__ double partial[block_threads];
  const int row = static_cast<int>(threadIdx.x) / tile;
  const index_t i = static_cast<index_t>(blockIdx.x) * tile + threadIdx.x % tile;
  double sum = 0;
  if (i < count)
    for (index_t s = row; s < shares; s += rows) sum += parts[s * count + i];
  for (int half = rows / 2; half > 0; half /= 2) {
    partial[threadIdx.x] = sum;
    __syncthreads();
    if (row < half) sum += partial[threadIdx.x + half * tile];
    __syncthreads();
  }
  if (row == 0 && i < count) sums[i] = static_cast<float>(sum);
}

}  // namespace aliasfused
