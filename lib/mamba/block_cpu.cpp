// What lies between the matrix products of a Mamba block on a CPU, each in one pass over memory,
// forward and backward: the norm, the causal convolution with its SiLU, the residual, and the loss.
//
// Numbers are read and written in float or bfloat16 as they lie; the rows of a tensor may be parts
// of longer rows. Sums are float, and what is in a share of work does not depend on the number of
// threads: two runs give the same digits, on any number of cores.
#include "simd.h"
#include <vector>

namespace {
constexpr long SHARE = 64;    // rows in a share of work
// rows that the convolution takes at a time: they and their gradients fit the first cache
constexpr long NEAR = 16;
constexpr int MOST_TAPS = 8;  // of a convolution

inline long smaller(long a, long b) { return a < b ? a : b; }
inline long up(long a, long b) { return (a + b - 1) / b; }

// 1 / rms of a row of floats
float inverse_rms(const float* x, long width, float eps) {
  vec sum = {};
  for (long i = 0; i < width; i += W) {
    vec v = load(x + i, width - i);
    sum += v * v;
  }
  return 1.f / std::sqrt(total(sum) / width + eps);
}

// u = x / rms(x) * weight
template <class T>
void norm_rows(long rows, long width, float eps, int threads, const float* x, const float* weight,
               T* u) {
#pragma omp parallel for schedule(static) num_threads(threads)
  for (long r = 0; r < rows; r++) {
    const float* row = x + r * width;
    vec scale = splat(inverse_rms(row, width, eps));
    for (long i = 0; i < width; i += W) {
      long n = width - i;
      store(u + r * width + i, load(row + i, n) * scale * load(weight + i, n), n);
    }
  }
}

// dx = dy + scale (weight du - x^ mean(weight du x^)) with x^ = x scale; the parts of dweight a
// share.
template <class T>
void norm_rows_back(long rows, long width, float eps, int threads, const float* x,
                    const float* weight, const T* du, const float* dy, float* dx, float* parts) {
#pragma omp parallel for schedule(static) num_threads(threads)
  for (long share = 0; share < up(rows, SHARE); share++) {
    float* dweight = parts + share * width;
    std::memset(dweight, 0, width * sizeof(float));
    for (long r = share * SHARE; r < smaller((share + 1) * SHARE, rows); r++) {
      const float* row = x + r * width;
      const T* du_row = du + r * width;
      vec scale = splat(inverse_rms(row, width, eps)), along = {};
      for (long i = 0; i < width; i += W) {
        long n = width - i;
        vec hat = load(row + i, n) * scale, g = load(du_row + i, n);
        along += g * load(weight + i, n) * hat;
        store(dweight + i, load(dweight + i, n) + g * hat, n);
      }
      vec mean = splat(total(along) / width);
      for (long i = 0; i < width; i += W) {
        long n = width - i;
        vec hat = load(row + i, n) * scale;
        vec through = scale * (load(du_row + i, n) * load(weight + i, n) - hat * mean);
        store(dx + r * width + i, dy ? load(dy + r * width + i, n) + through : through, n);
      }
    }
  }
}

// y = x + out, the residual in floats
template <class T>
void add_all(long count, int threads, const float* x, const T* out, float* y) {
#pragma omp parallel for schedule(static) num_threads(threads)
  for (long i = 0; i < count; i += W)
    store(y + i, load(x + i, count - i) + load(out + i, count - i), count - i);
}
}  // namespace

// The causal depthwise convolution with its SiLU:
//   v[t] = bias + sum over k of taps[k] x[t - K + 1 + k],   y[t] = v[t] sigmoid(v[t])
extern "C" struct Convolution {  // lib/mamba/block_cpu.py has the same fields in the same order
  long batch, length, channels, taps;
  int threads;
  long x_row, dx_row;                         // from one step of x, of dx, to the next, in numbers
  const void* x;                              // (B, L, D)
  // (K, D); (D,) or null; (B, K-1, D), the inputs before step 0
  const float *weight, *bias, *before;
  void* y;                                    // (B, L, D)
  const void* dy;                             // the backward pass
  void* dx;
  float *dbefore, *parts;  // parts (shares, K + 1, D): gradients of the taps, then of the bias
};

namespace {
// One tile of W channels of one row of the batch.
template <class T>
struct Tile {
  const Convolution& c;
  long b, d, n;
  vec tap(long k) const { return load(c.weight + k * c.channels + d, n); }
  vec bias() const { return c.bias ? load(c.bias + d, n) : vec{}; }
  vec input(long t) const {  // those before step 0 are floats
    if (t < 0) return load(c.before + (b * (c.taps - 1) + c.taps - 1 + t) * c.channels + d, n);
    return load((const T*)c.x + (b * c.length + t) * c.x_row + d, n);
  }
  T* of(const void* tensor, long t) const {
    return (T*)tensor + (b * c.length + t) * c.channels + d;
  }
};

// Calls each(t, v, seen) with v[t] and the K inputs that it is made of, the oldest first. K is a
// constant where taps are few, so that they and the inputs stay in registers.
template <int K, class T, class Each>
inline void walk(const Tile<T>& tile, long begin, long end, Each each) {
  vec taps[K], seen[K], bias = tile.bias();
  for (int k = 0; k < K; k++) taps[k] = tile.tap(k);
  for (int k = 1; k < K; k++) seen[k] = tile.input(begin - K + k);
  for (long t = begin; t < end; t++) {
#pragma GCC unroll 8
    for (int k = 1; k < K; k++) seen[k - 1] = seen[k];
    seen[K - 1] = tile.input(t);
    vec v = bias;
#pragma GCC unroll 8
    for (int k = 0; k < K; k++) v += taps[k] * seen[k];
    each(t, v, seen);
  }
}

template <int K, class T>
void convolve_tile(const Tile<T>& tile, long begin, long end) {
  walk<K>(tile, begin, end,
          [&](long t, vec v, const vec*) { store(tile.of(tile.c.y, t), v * sigmoid(v), tile.n); });
}

template <int K, class T>
void convolve_tile_back(const Tile<T>& tile, long begin, long end, float* sums) {
  const Convolution& c = tile.c;
  long last = smaller(end + K - 1, c.length);
  // dv is that of the steps that see this share's inputs
  vec dv[NEAR + K], dtaps[K] = {}, dbias = {}, taps[K];
  for (int k = 0; k < K; k++) taps[k] = tile.tap(k);
  walk<K>(tile, begin, last, [&](long t, vec v, const vec* seen) {
    vec gate = sigmoid(v), one = splat(1.f);
    vec g = load(tile.of(c.dy, t), tile.n) * gate * (one + v * (one - gate));
    dv[t - begin] = g;
    if (t >= end) return;
#pragma GCC unroll 8
    for (int k = 0; k < K; k++) dtaps[k] += g * seen[k];
    dbias += g;
  });
  for (int k = 0; k <= K; k++) {
    float* sum = sums + k * c.channels + tile.d;
    store(sum, load(sum, tile.n) + (k < K ? dtaps[k] : dbias), tile.n);
  }
  // an input goes to the K steps from its own on; the first rows also own the steps before 0
  for (long t = begin ? begin : 1 - K; t < end; t++) {
    vec sum = {};
    for (long later = t < begin ? begin : t; later < smaller(t + K, last); later++)
      sum += taps[K - 1 - later + t] * dv[later - begin];
    if (t < 0)
      store(c.dbefore + (tile.b * (K - 1) + K - 1 + t) * c.channels + tile.d, sum, tile.n);
    else
      store((T*)c.dx + (tile.b * c.length + t) * c.dx_row + tile.d, sum, tile.n);
  }
}

template <int K, class T>
void convolve_all(const Convolution& c) {
#pragma omp parallel for collapse(2) schedule(static) num_threads(c.threads)
  for (long b = 0; b < c.batch; b++)
    for (long begin = 0; begin < c.length; begin += NEAR)
      for (long d = 0; d < c.channels; d += W)
        convolve_tile<K>(Tile<T>{c, b, d, c.channels - d}, begin, smaller(begin + NEAR, c.length));
}

template <int K, class T>
void convolve_all_back(const Convolution& c) {
  long shares = up(c.length, SHARE);
#pragma omp parallel for collapse(2) schedule(static) num_threads(c.threads)
  for (long b = 0; b < c.batch; b++)
    for (long share = 0; share < shares; share++) {
      float* sums = c.parts + (b * shares + share) * (K + 1) * c.channels;
      std::memset(sums, 0, (K + 1) * c.channels * sizeof(float));
      for (long begin = share * SHARE; begin < smaller((share + 1) * SHARE, c.length);
           begin += NEAR)
        for (long d = 0; d < c.channels; d += W)
          convolve_tile_back<K>(Tile<T>{c, b, d, c.channels - d}, begin,
                                smaller(begin + NEAR, c.length), sums);
    }
}

// One function for each number of taps from 1 to MOST_TAPS.
template <class T, int K = 1>
void convolve(const Convolution& c, bool back) {
  if (c.taps == K) return back ? convolve_all_back<K, T>(c) : convolve_all<K, T>(c);
  if constexpr (K < MOST_TAPS) convolve<T, K + 1>(c, back);
}

// The cross entropy of a row of logits with its target, in nats; over the logits comes their
// gradient, softmax minus one at the target. A target below 0 counts nothing.
template <class T>
void entropy(long rows, long vocabulary, int threads, int gradient, T* logits,
             const int64_t* targets, float* losses) {
#pragma omp parallel for schedule(static) num_threads(threads)
  for (long r = 0; r < rows; r++) {
    T* row = logits + r * vocabulary;
    long target = targets[r];
    if (target < 0) {
      losses[r] = 0.f;
      if (gradient) std::memset(row, 0, vocabulary * sizeof(T));
      continue;
    }
    long whole = vocabulary / W * W;  // behind it the numbers are taken one by one
    vec top = splat(-INFINITY), sum = {};
    for (long i = 0; i < whole; i += W) {
      vec v = load(row + i);
      top = v > top ? v : top;
    }
    float highest = top[0];
    for (int lane = 1; lane < W; lane++) highest = std::fmax(highest, top[lane]);
    for (long i = whole; i < vocabulary; i++) highest = std::fmax(highest, load(row + i, 1)[0]);
    float at_target = load(row + target, 1)[0];
    vec shift = splat(highest);
    for (long i = 0; i < whole; i += W) sum += expv(load(row + i) - shift);
    float all = total(sum);
    for (long i = whole; i < vocabulary; i++) all += expv(load(row + i, 1) - shift)[0];
    losses[r] = highest + std::log(all) - at_target;
    if (!gradient) continue;
    vec scale = splat(1.f / all);
    for (long i = 0; i < vocabulary; i += W) {
      long n = vocabulary - i;
      store(row + i, expv(load(row + i, n) - shift) * scale, n);
    }
    store(row + target, load(row + target, 1) - splat(1.f), 1);
  }
}
}  // namespace

extern "C" {
void norm(int half, long rows, long width, float eps, int threads, const float* x,
          const float* weight, void* u) {
  half ? norm_rows(rows, width, eps, threads, x, weight, (bf16*)u)
       : norm_rows(rows, width, eps, threads, x, weight, (float*)u);
}
void norm_backward(int half, long rows, long width, float eps, int threads, const float* x,
                   const float* weight, const void* du, const float* dy, float* dx, float* parts) {
  half ? norm_rows_back(rows, width, eps, threads, x, weight, (const bf16*)du, dy, dx, parts)
       : norm_rows_back(rows, width, eps, threads, x, weight, (const float*)du, dy, dx, parts);
}
void add(int half, long count, int threads, const float* x, const void* out, float* y) {
  half ? add_all(count, threads, x, (const bf16*)out, y)
       : add_all(count, threads, x, (const float*)out, y);
}
void conv_forward(int half, const Convolution* c) {
  half ? convolve<bf16>(*c, false) : convolve<float>(*c, false);
}
void conv_backward(int half, const Convolution* c) {
  half ? convolve<bf16>(*c, true) : convolve<float>(*c, true);
}
void cross_entropy(int half, long rows, long vocabulary, int threads, int gradient, void* logits,
                   const int64_t* targets, float* losses) {
  half ? entropy(rows, vocabulary, threads, gradient, (bf16*)logits, targets, losses)
       : entropy(rows, vocabulary, threads, gradient, (float*)logits, targets, losses);
}
}
