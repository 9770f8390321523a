// The causal depthwise convolution and its SiLU on a CPU, forward and backward: memory is read once each
// way, where plain PyTorch goes over it once a tap and once more for the SiLU. Sixteen channels ride in a vector.
//
//   v[t] = bias + sum over k of taps[k] x[t - K + 1 + k],   y[t] = v[t] sigmoid(v[t])
//
// x, y (B, L, D); before (B, K-1, D), the inputs of the steps before 0; taps (K, D); bias (D,) or null.
#include "simd.h"
#include <vector>

namespace {
constexpr long ROWS = 64;  // steps of a share of work: what it reads and keeps fits the cache of a core

struct Sizes { long batch, length, channels, taps; };

// Where the input of step t of row b lies.
inline const float* input(const Sizes& s, const float* x, const float* before, long b, long t) {
  return t < 0 ? before + (b * (s.taps - 1) + s.taps - 1 + t) * s.channels : x + (b * s.length + t) * s.channels;
}

// The inputs that step t sees, the oldest first.
inline void seen(const Sizes& s, const float* x, const float* before, long b, long t, std::vector<const float*>& rows) {
  for (long k = 0; k < s.taps; k++) rows[k] = input(s, x, before, b, t - s.taps + 1 + k);
}

inline vec convolved(const Sizes& s, const std::vector<const float*>& rows, const float* taps, const float* bias, long d, int n) {
  vec v = bias ? load(bias + d, n) : vec{};
  for (long k = 0; k < s.taps; k++) v += load(taps + k * s.channels + d, n) * load(rows[k] + d, n);
  return v;
}
inline int lanes(const Sizes& s, long d) { return int(s.channels - d < W ? s.channels - d : W); }
inline long smaller(long a, long b) { return a < b ? a : b; }
}  // namespace

extern "C" {

void conv_forward(const float* x, const float* taps, const float* bias, const float* before, int threads, long batch,
                  long length, long channels, long K, float* y) {
  Sizes s{batch, length, channels, K};
#pragma omp parallel for collapse(2) schedule(static) num_threads(threads)
  for (long b = 0; b < batch; b++)
    for (long begin = 0; begin < length; begin += ROWS) {
      std::vector<const float*> rows(K);
      for (long t = begin; t < smaller(begin + ROWS, length); t++) {
        seen(s, x, before, b, t, rows);
        for (long d = 0; d < channels; d += W) {
          int n = lanes(s, d);
          vec v = convolved(s, rows, taps, bias, d, n);
          store(y + (b * length + t) * channels + d, v * sigmoid(v), n);
        }
      }
    }
}

// dx, dbefore as x and before; sums (shares of work, K + 1, D): the gradients of the taps, then of the bias,
// still to be summed over the shares. What is in a share does not depend on the number of threads.
void conv_backward(const float* x, const float* taps, const float* bias, const float* before, int threads, long batch,
                   long length, long channels, long K, const float* dy, float* dx, float* dbefore, float* sums) {
  Sizes s{batch, length, channels, K};
  long shares = (length + ROWS - 1) / ROWS;
#pragma omp parallel for collapse(2) schedule(static) num_threads(threads)
  for (long b = 0; b < batch; b++)
    for (long share = 0; share < shares; share++) {
      long begin = share * ROWS, end = smaller(begin + ROWS, length), last = smaller(end + K - 1, length);
      std::vector<float> dv((last - begin) * channels);  // dL/dv of the steps that see this share's inputs
      std::vector<const float*> rows(K);
      for (long t = begin; t < last; t++) {
        seen(s, x, before, b, t, rows);
        for (long d = 0; d < channels; d += W) {
          int n = lanes(s, d);
          vec v = convolved(s, rows, taps, bias, d, n), sig = sigmoid(v), one = splat(1.f);
          store(&dv[(t - begin) * channels + d], load(dy + (b * length + t) * channels + d, n) * sig * (one + v * (one - sig)), n);
        }
      }
      // each input goes to the K steps from its own on; the first share also owns the steps before 0
      for (long t = share ? begin : 1 - K; t < end; t++) {
        float* out = t < 0 ? dbefore + (b * (K - 1) + K - 1 + t) * channels : dx + (b * length + t) * channels;
        long from = t < begin ? begin : t, to = smaller(t + K, last);
        for (long d = 0; d < channels; d += W) {
          int n = lanes(s, d);
          vec sum = {};
          for (long later = from; later < to; later++)
            sum += load(taps + (K - 1 - later + t) * channels + d, n) * load(&dv[(later - begin) * channels + d], n);
          store(out + d, sum, n);
        }
      }
      float* own = sums + (b * shares + share) * (K + 1) * channels;
      for (long k = 0; k <= K; k++)
        for (long d = 0; d < channels; d += W) {
          int n = lanes(s, d);
          vec sum = {};
          for (long t = begin; t < end; t++) {
            vec here = load(&dv[(t - begin) * channels + d], n);
            sum += k < K ? here * load(input(s, x, before, b, t - K + 1 + k) + d, n) : here;
          }
          store(own + k * channels + d, sum, n);
        }
    }
}
}
