// One token through a whole Mamba language model on a CPU: what `MambaLM.step` in lib/mamba/model.py does.
//
// At batch 1 a step reads every weight once and computes little, so its time is that of reading
// them. They lie as they are read (`pack` in lib/mamba/step_cpu.py): a matrix in tiles of 16 outputs, a
// tile as one row of 16 numbers for each input, so that a product is one straight read of memory.
//
// The channels are cut into slabs. A thread owns some slabs through a whole layer. Where a projection
// needs all channels (x_proj, out_proj) each slab gives its part of the sum and the parts are added
// in one order, so there are two barriers a layer, and the digits are the same on any number of
// threads. What every channel needs (the residual, its norm) each thread keeps for itself.
#include "simd.h"
#include <cstdlib>
#ifdef _OPENMP
#include <omp.h>
#endif

namespace {
struct Sizes { long rows, vocab, width, layers, channels, states, taps, rank, slabs; };

inline long tiles(long n) { return (n + W - 1) / W; }

// How the packed numbers of a layer follow on each other; all counts in floats.
struct Plan {
  Sizes s;
  long G, M, P, V;  // tiles of channels, of the residual, of x_proj's outputs, of the vocabulary
  long norm, in, in_bias, conv, xp, dt, A, D, out, out_bias, layer;
  explicit Plan(const Sizes& sizes) : s(sizes) {
    G = tiles(s.channels); M = tiles(s.width); P = tiles(s.rank + 2 * s.states); V = tiles(s.vocab);
    norm = 0;
    in = norm + M * W;                         // per channel tile: x (width, 16), then z (width, 16)
    in_bias = in + G * 2 * s.width * W;        // per channel tile: x (16), z (16)
    conv = in_bias + G * 2 * W;                // per channel tile: taps (K, 16), bias (16)
    xp = conv + G * (s.taps + 1) * W;          // per slab, per tile of outputs: (its channels, 16)
    dt = xp + G * W * P * W;                   // per channel tile: (rank, 16), bias (16)
    A = dt + G * (s.rank + 1) * W;             // per channel tile: (N, 16), times log2(e)
    D = A + G * s.states * W;
    out = D + G * W;                           // per slab, per tile of outputs: (its channels, 16)
    out_bias = out + G * W * M * W;
    layer = out_bias + M * W;
  }
  long first(long slab) const { return slab * G / s.slabs; }  // its first tile of channels
  long all() const { return s.layers * layer + M * W + V * s.width * W; }
  long conv_state() const { return s.rows * G * (s.taps - 1) * W; }  // of one layer
  long h_state() const { return s.rows * G * s.states * W; }
  long shared() const { return s.rows * W * (2 * G + s.slabs * (P + M)); }
  long own() const { return s.rows * W * (2 * M + P + 1); }  // of one thread
};

// out[r] = start + tile' in[r], for R rows at once: the tile (n, 16) is read once.
template <int R>
inline void rows_of_tile(const float* tile, long n, const float* in, long in_stride, vec start, float* out, long out_stride) {
  vec even[R], odd[R];  // two sums a row, because the next product need not wait for the last
  for (int r = 0; r < R; r++) { even[r] = start; odd[r] = vec{}; }
  long k = 0;
  for (; k + 2 <= n; k += 2) {
    vec a = load(tile + k * W), b = load(tile + (k + 1) * W);
    for (int r = 0; r < R; r++) {
      even[r] += a * splat(in[r * in_stride + k]);
      odd[r] += b * splat(in[r * in_stride + k + 1]);
    }
  }
  if (k < n)
    for (int r = 0; r < R; r++) even[r] += load(tile + k * W) * splat(in[r * in_stride + k]);
  for (int r = 0; r < R; r++) store(out + r * out_stride, even[r] + odd[r]);
}

inline void product(const float* tile, long n, const float* in, long in_stride, vec start, float* out, long out_stride, long rows) {
  long r = 0;
  for (; r + 4 <= rows; r += 4) rows_of_tile<4>(tile, n, in + r * in_stride, in_stride, start, out + r * out_stride, out_stride);
  for (; r < rows; r++) rows_of_tile<1>(tile, n, in + r * in_stride, in_stride, start, out + r * out_stride, out_stride);
}

// u = x / rms(x) * weight; behind the width there are zeros.
inline void rms_norm(const float* x, const float* weight, const Plan& p, float eps, float* u) {
  for (long r = 0; r < p.s.rows; r++) {
    vec sum = {};
    for (long i = 0; i < p.M * W; i += W) sum += load(x + r * p.M * W + i) * load(x + r * p.M * W + i);
    vec scale = splat(1.f / std::sqrt(total(sum) / p.s.width + eps));
    for (long i = 0; i < p.M * W; i += W) store(u + r * p.M * W + i, load(x + r * p.M * W + i) * scale * load(weight + i));
  }
}

// From the norm to each slab's part of x_proj: in_proj, the convolution, SiLU.
void before_scan(const Plan& p, const float* w, long slab, const float* u, float* window, float* x, float* z, float* part) {
  const Sizes& s = p.s;
  long begin = p.first(slab), end = p.first(slab + 1), n = (end - begin) * W, K = s.taps;
  for (long g = begin; g < end; g++) {
    const float* in = w + p.in + g * 2 * s.width * W;
    const float* bias = w + p.in_bias + g * 2 * W;
    const float* conv = w + p.conv + g * (K + 1) * W;
    product(in, s.width, u, p.M * W, load(bias), x + g * W, p.G * W, s.rows);
    product(in + s.width * W, s.width, u, p.M * W, load(bias + W), z + g * W, p.G * W, s.rows);
    for (long r = 0; r < s.rows; r++) {
      float* before = window + (r * p.G + g) * (K - 1) * W;
      float* here = x + (r * p.G + g) * W;
      vec now = load(here), y = load(conv + K * W) + now * load(conv + (K - 1) * W);
      for (long k = 0; k < K - 1; k++) {
        y += load(before + k * W) * load(conv + k * W);
        store(before + k * W, k + 2 < K ? load(before + (k + 1) * W) : now);
      }
      store(here, y * sigmoid(y));
    }
  }
  for (long j = 0; j < p.P; j++)
    product(w + p.xp + begin * W * p.P * W + j * n * W, n, x + begin * W, p.G * W, vec{}, part + j * W, p.P * W, s.rows);
}

// From delta, B and C to each slab's part of out_proj: dt_proj, the recurrence, the gate.
void scan_and_after(const Plan& p, const float* w, long slab, const float* low, float* state, float* x, const float* z,
                    float* temp, float* part) {
  const Sizes& s = p.s;
  long begin = p.first(slab), end = p.first(slab + 1), n = (end - begin) * W;
  for (long g = begin; g < end; g++) {
    const float* dt = w + p.dt + g * (s.rank + 1) * W;
    const float* A = w + p.A + g * s.states * W;
    product(dt, s.rank, low, p.P * W, load(dt + s.rank * W), temp, W, s.rows);
    for (long r = 0; r < s.rows; r++) {
      const float* B = low + r * p.P * W + s.rank;
      const float* C = B + s.states;
      float* h = state + (r * p.G + g) * s.states * W;
      float* here = x + (r * p.G + g) * W;
      vec delta = softplus(load(temp + r * W)), u = load(here), du = delta * u, y = u * load(w + p.D + g * W);
      for (long k = 0; k < s.states; k++) {
        vec next = exp2v(delta * load(A + k * W)) * load(h + k * W) + du * splat(B[k]);
        store(h + k * W, next);
        y += next * splat(C[k]);
      }
      vec gate = load(z + (r * p.G + g) * W);
      store(here, y * gate * sigmoid(gate));
    }
  }
  for (long j = 0; j < p.M; j++)
    product(w + p.out + begin * W * p.M * W + j * n * W, n, x + begin * W, p.G * W, vec{}, part + j * W, p.M * W, s.rows);
}

// to = from + the slabs' parts, in their order; the parts lie (slabs, n)
inline void add_parts(float* to, const float* from, const float* parts, long slabs, long n) {
  for (long i = 0; i < n; i += W) {
    vec sum = load(from + i);
    for (long slab = 0; slab < slabs; slab++) sum += load(parts + slab * n + i);
    store(to + i, sum);
  }
}

// What one of `threads` threads does of a step.
void work(const Plan& p, const float* weights, const float* embeddings, float eps, const long* tokens, float* windows,
          float* states, float* scratch, float* logits, long thread, long threads) {
  const Sizes& s = p.s;
  float *x = scratch, *z = x + s.rows * p.G * W, *x_parts = z + s.rows * p.G * W, *out_parts = x_parts + s.slabs * s.rows * p.P * W;
  float *stream = scratch + p.shared() + thread * p.own(), *u = stream + s.rows * p.M * W, *low = u + s.rows * p.M * W;
  float *temp = low + s.rows * p.P * W;
  long begin = thread * s.slabs / threads, end = (thread + 1) * s.slabs / threads;
  for (long r = 0; r < s.rows; r++) {
    for (long i = 0; i < p.M * W; i++) stream[r * p.M * W + i] = i < s.width ? embeddings[tokens[r] * s.width + i] : 0.f;
  }
  for (long layer = 0; layer < s.layers; layer++) {
    const float* w = weights + layer * p.layer;
    rms_norm(stream, w + p.norm, p, eps, u);
    for (long slab = begin; slab < end; slab++)
      before_scan(p, w, slab, u, windows + layer * p.conv_state(), x, z, x_parts + slab * s.rows * p.P * W);
#pragma omp barrier
    std::memset(low, 0, s.rows * p.P * W * sizeof(float));
    add_parts(low, low, x_parts, s.slabs, s.rows * p.P * W);
    for (long slab = begin; slab < end; slab++)
      scan_and_after(p, w, slab, low, states + layer * p.h_state(), x, z, temp, out_parts + slab * s.rows * p.M * W);
#pragma omp barrier
    for (long r = 0; r < s.rows; r++)
      for (long i = 0; i < p.M * W; i += W) store(stream + r * p.M * W + i, load(stream + r * p.M * W + i) + load(w + p.out_bias + i));
    add_parts(stream, stream, out_parts, s.slabs, s.rows * p.M * W);
  }
  const float* last = weights + s.layers * p.layer;
  rms_norm(stream, last, p, eps, u);
  for (long j = thread * p.V / threads; j < (thread + 1) * p.V / threads; j++) {
    product(last + p.M * W + j * s.width * W, s.width, u, p.M * W, vec{}, temp, W, s.rows);
    for (long r = 0; r < s.rows; r++)
      store(logits + r * s.vocab + j * W, load(temp + r * W), int(s.vocab - j * W < W ? s.vocab - j * W : W));
  }
}
}  // namespace

extern "C" {

// What the caller must provide, in floats: packed weights, windows and states of all layers, scratch.
void mamba_sizes(const long* sizes, long threads, long* floats) {
  Plan p(*reinterpret_cast<const Sizes*>(sizes));
  floats[0] = p.all(); floats[1] = p.s.layers * p.conv_state(); floats[2] = p.s.layers * p.h_state();
  floats[3] = p.shared() + threads * p.own();
}

// tokens (B,) are read; windows and states move on by one; logits (B, V) are written.
// Returns 0, or 1 and does nothing where a token is not in the vocabulary.
int mamba_step(const long* sizes, float eps, const float* weights, const float* embeddings, float* windows, float* states,
               float* scratch, const long* tokens, float* logits, int threads) {
  Plan p(*reinterpret_cast<const Sizes*>(sizes));
  for (long r = 0; r < p.s.rows; r++) if (tokens[r] < 0 || tokens[r] >= p.s.vocab) return 1;
#ifdef _OPENMP
  if (threads > 1) {
#pragma omp parallel num_threads(threads)
    work(p, weights, embeddings, eps, tokens, windows, states, scratch, logits, omp_get_thread_num(), omp_get_num_threads());
    return 0;
  }
#endif
  work(p, weights, embeddings, eps, tokens, windows, states, scratch, logits, 0, 1);
  return 0;
}
}
