// One token through a whole Mamba language model on a CPU: what `MambaLM.step` in lib/mamba.py does.
//
// For one row a step reads every weight once and computes little, so its time is that of reading
// them. They lie as they are read (`pack` in lib/mamba_cpu.py): a matrix in tiles of 16 outputs, a
// tile as one row of 16 numbers for each input, so that a product is one straight read of memory;
// and in 16 bits each where that is exact.
//
// Where there are many rows, each thread takes some of them through the whole model: nobody waits
// for anybody. Where there are few, all threads share each row. The channels are cut into slabs, and
// a thread owns some slabs through a whole layer. Where a projection needs all channels (x_proj,
// out_proj) each slab gives its part of the sum, and the threads meet twice a layer to add them.
// What every channel needs (the residual, its norm) each thread then keeps for itself. Parts are
// added in one order, so a row has the same digits on any number of threads and beside any others.
#include "simd.h"
#include <algorithm>
#ifdef _OPENMP
#include <atomic>
#include <omp.h>
#include <thread>
#endif

namespace {
constexpr int EACH = 8;  // rows that make it worthwhile for a thread to read all weights by itself

struct Sizes {
  long rows, vocab, width, layers, channels, states, taps, rank, slabs;
  long halves;  // 1 where a weight of a matrix has 16 bits, 0 where it has 32
};

// Vectors that lie one behind the other: v[r] is that of row r, and v[rows] the end of them.
struct Rows {
  float* begin;
  long stride;  // 0: all rows have the same
  float* operator[](long r) const { return begin + r * stride; }
};

inline long tiles(long n) { return (n + W - 1) / W; }

// How the packed numbers of a layer follow on each other; all counts in floats.
struct Plan {
  Sizes s;
  long G, M, P, V;  // tiles of channels, of the residual, of x_proj's outputs, of the vocabulary
  long norm, in, in_bias, conv, xp, dt, A, D, out, out_bias, layer;

  explicit Plan(const Sizes& sizes) : s(sizes) {
    G = tiles(s.channels);
    M = tiles(s.width);
    P = tiles(s.rank + 2 * s.states);
    V = tiles(s.vocab);
    norm = 0;
    in = norm + M * W;                        // per channel tile: x (width, 16), then z (width, 16)
    in_bias = in + G * 2 * tile(s.width);     // per channel tile: x (16), z (16)
    conv = in_bias + G * 2 * W;               // per channel tile: taps (K, 16), bias (16)
    xp = conv + G * (s.taps + 1) * W;         // per slab, per tile of outputs: (its channels, 16)
    dt = xp + P * tile(G * W);                // per channel tile: (rank, 16), bias (16)
    A = dt + G * (tile(s.rank) + W);          // per channel tile: (N, 16), times log2(e)
    D = A + G * s.states * W;
    out = D + G * W;                          // per slab, per tile of outputs: (its channels, 16)
    out_bias = out + M * tile(G * W);
    layer = out_bias + M * W;
  }
  // A tile of n inputs: an even number of them, the last one zero where n is odd.
  long tile(long n) const { return (n + 1) / 2 * (s.halves ? W : 2 * W); }
  long first(long slab) const { return slab * G / s.slabs; }  // its first tile of channels
  long weights() const { return s.layers * layer + M * W + V * tile(s.width); }
  long windows() const { return s.layers * G * s.rows * (s.taps - 1) * W; }
  long states() const { return s.layers * G * s.rows * s.states * W; }
  // Scratch: for each row what a team shares; for each row, and once, what each thread has.
  long shared() const { return W * (2 * G + s.slabs * (P + M)); }
  long own() const { return W * (2 * M + P + 1); }
  long once() const { return 2 * W * (std::max({s.width, s.rank, G * W}) + 1); }
  long scratch(long threads) const { return s.rows * (shared() + threads * own()) + threads * once(); }
};

// ---- products -------------------------------------------------------------------------------

struct Float {
  static void two(const float* tile, long k, vec& even, vec& odd) {
    even = load(tile + k * W);
    odd = load(tile + (k + 1) * W);
  }
};

// Two weights in the place of a float. A half has five bits of exponent where a float has eight: moved
// there it is the number times 2^-112. `pack` has stored it times 2^10, so that none is subnormal.
struct Half {
  static vec widen(ivec half) {
    ivec moved = (half >> 3) & int(0x8FFFE000);
    vec v;
    std::memcpy(&v, &moved, sizeof v);
    return v * splat(0x1p102f);
  }
  static void two(const float* tile, long k, vec& even, vec& odd) {
    ivec both;
    std::memcpy(&both, tile + k / 2 * W, sizeof both);
    even = widen(both << 16);
    odd = widen(both);
  }
};

#ifdef __AVX512F__
constexpr int BLOCK = 8;  // rows whose sums stay in registers
#else
constexpr int BLOCK = 2;
#endif

// out[r] = start[r] + tile' in[r] for R rows at once: the tile (n, 16) is read once.
template <class Weights, int R>
inline void block(const float* tile, long n, Rows in, Rows start, Rows out) {
  vec even[R] = {}, odd[R] = {};  // two sums a row: the next product need not wait for the last
  for (long k = 0; k < n; k += 2) {
    vec a, b;
    Weights::two(tile, k, a, b);
    for (int r = 0; r < R; r++) {
      even[r] += a * splat(in[r][k]);
      odd[r] += b * splat(in[r][k + 1]);
    }
  }
  for (int r = 0; r < R; r++) store(out[r], load(start[r]) + (even[r] + odd[r]));
}

template <class Weights, int R>
inline void blocks(const float* tile, long n, Rows in, Rows start, Rows out, long rows) {
  for (; rows >= R; rows -= R) {
    block<Weights, R>(tile, n, in, start, out);
    in.begin = in[R];
    start.begin = start[R];
    out.begin = out[R];
  }
  if constexpr (R > 1) blocks<Weights, R / 2>(tile, n, in, start, out, rows);
}

// The same for any number of rows. Halves that several blocks read are widened once.
template <class Weights>
void product(const float* tile, long n, Rows in, Rows start, Rows out, long rows, float* wide) {
  if (rows <= BLOCK) return blocks<Weights, BLOCK>(tile, n, in, start, out, rows);
  for (long k = 0; k < n; k += 2) {
    vec a, b;
    Weights::two(tile, k, a, b);
    store(wide + k * W, a);
    store(wide + (k + 1) * W, b);
  }
  blocks<Float, BLOCK>(wide, n, in, start, out, rows);
}

// u = x / rms(x) * weight; behind the width there are zeros.
inline void rms_norm(Rows x, const float* weight, const Plan& p, float eps, Rows u, long rows) {
  for (long r = 0; r < rows; r++) {
    vec sum = {};
    for (long i = 0; i < p.M * W; i += W) sum += load(x[r] + i) * load(x[r] + i);
    vec scale = splat(1.f / std::sqrt(total(sum) / p.s.width + eps));
    for (long i = 0; i < p.M * W; i += W) {
      store(u[r] + i, load(x[r] + i) * scale * load(weight + i));
    }
  }
}

// ---- threads --------------------------------------------------------------------------------

// Where the threads of a team wait for each other. They spin, since a wait lasts microseconds; one
// whose partner has lost its core to another program soon gives up its own.
struct Meeting {
#ifdef _OPENMP
  std::atomic<long> arrived{0}, round{0};
  void wait(long threads) {
    long now = round.load(std::memory_order_relaxed);
    if (arrived.fetch_add(1, std::memory_order_acq_rel) + 1 == threads) {
      arrived.store(0, std::memory_order_relaxed);
      round.store(now + 1, std::memory_order_release);
    }
    for (long spins = 0; round.load(std::memory_order_acquire) == now; spins++) {
      if (spins > 10000) std::this_thread::yield();
    }
  }
#else
  void wait(long) {}
#endif
};

// ---- a step ---------------------------------------------------------------------------------

struct Call {  // what the caller gave, of all rows
  float eps;
  const float *weights, *embeddings;
  float *windows, *states, *scratch;  // (layers, tiles of channels, rows, K-1 or N, 16)
  const long* tokens;
  float* logits;
};

// One thread of a team that takes `rows` rows, from row `first` on, through the model.
template <class Weights>
struct Worker {
  const Plan& p;
  const Call& call;
  long first, rows, thread, threads;
  Rows x, z;                     // (rows, channels): shared by the team, but each thread minds its slabs
  float *x_parts, *out_parts;    // (slabs, rows, 16 P or 16 M): what the team adds
  Rows stream, u, low, delta;    // the residual, its norm, what x_proj gives; a tile of dt_proj's result
  float* wide;

  Worker(const Plan& p, const Call& call, long first, long rows, long thread, long threads, float* scratch)
      : p(p), call(call), first(first), rows(rows), thread(thread), threads(threads) {
    x = {scratch, p.G * W};
    z = {x[rows], p.G * W};
    x_parts = z[rows];
    out_parts = x_parts + p.s.slabs * rows * p.P * W;
    float* own = scratch + rows * (p.shared() + thread * p.own()) + thread * p.once();
    stream = {own, p.M * W};
    u = {stream[rows], p.M * W};
    low = {u[rows], p.P * W};
    delta = {low[rows], W};
    wide = delta[rows];
  }

  void multiply(const float* tile, long n, Rows in, Rows start, Rows out) {
    product<Weights>(tile, n, in, start, out, rows, wide);
  }

  // A sum over all channels, of which a slab has n from `at` on: `count` tiles of outputs. A thread
  // by itself adds to the sum; a team keeps a part a slab, to be added when all have met.
  void add_slab(const float* tile, long n, long at, Rows sum, float* parts, long slab, long count) {
    static const float zeros[W] = {};
    for (long j = 0; j < count; j++) {
      Rows in = {x.begin + at, x.stride};
      Rows out = {(threads > 1 ? parts + slab * rows * sum.stride : sum.begin) + j * W, sum.stride};
      Rows start = threads > 1 ? Rows{const_cast<float*>(zeros), 0} : out;
      multiply(tile + j * p.tile(n), n, in, start, out);
    }
  }
  void add_parts(Rows sum, const float* parts, Meeting& meeting) {
    if (threads == 1) return;
    meeting.wait(threads);
    long n = rows * sum.stride;
    for (long i = 0; i < n; i += W) {
      vec now = load(sum.begin + i);
      for (long slab = 0; slab < p.s.slabs; slab++) now += load(parts + slab * n + i);
      store(sum.begin + i, now);
    }
  }

  // in_proj, the convolution and SiLU for one tile of channels.
  void project_and_convolve(const float* w, long layer, long g) {
    const long width = p.s.width, K = p.s.taps;
    const float* in = w + p.in + g * 2 * p.tile(width);
    float* bias = const_cast<float*>(w) + p.in_bias + g * 2 * W;
    const float* conv = w + p.conv + g * (K + 1) * W;
    multiply(in, width, u, {bias, 0}, {x.begin + g * W, x.stride});
    multiply(in + p.tile(width), width, u, {bias + W, 0}, {z.begin + g * W, z.stride});
    float* window = call.windows + ((layer * p.G + g) * p.s.rows + first) * (K - 1) * W;
    for (long r = 0; r < rows; r++, window += (K - 1) * W) {
      vec now = load(x[r] + g * W);
      vec y = load(conv + K * W) + now * load(conv + (K - 1) * W);
      for (long k = 0; k < K - 1; k++) {
        y += load(window + k * W) * load(conv + k * W);
        store(window + k * W, k + 2 < K ? load(window + (k + 1) * W) : now);
      }
      store(x[r] + g * W, y * sigmoid(y));
    }
  }

  // dt_proj, the recurrence and the gate for one tile of channels.
  void scan_and_gate(const float* w, long layer, long g) {
    const long N = p.s.states, rank = p.s.rank;
    const float* dt = w + p.dt + g * (p.tile(rank) + W);
    const float* A = w + p.A + g * N * W;
    multiply(dt, rank, low, {const_cast<float*>(dt) + p.tile(rank), 0}, delta);
    float* h = call.states + ((layer * p.G + g) * p.s.rows + first) * N * W;
    for (long r = 0; r < rows; r++, h += N * W) {
      const float* B = low[r] + rank;
      const float* C = B + N;
      vec step = softplus(load(delta[r]));
      vec in = load(x[r] + g * W);
      vec y = in * load(w + p.D + g * W);
      in *= step;
      for (long k = 0; k < N; k++) {
        vec next = exp2v(step * load(A + k * W)) * load(h + k * W) + in * splat(B[k]);
        store(h + k * W, next);
        y += next * splat(C[k]);
      }
      vec gate = load(z[r] + g * W);
      store(x[r] + g * W, y * gate * sigmoid(gate));
    }
  }

  void run(Meeting& meeting) {
    const Sizes& s = p.s;
    const long begin = thread * s.slabs / threads, end = (thread + 1) * s.slabs / threads;
    std::memset(stream.begin, 0, rows * stream.stride * sizeof(float));
    for (long r = 0; r < rows; r++) {
      std::memcpy(stream[r], call.embeddings + call.tokens[first + r] * s.width, s.width * sizeof(float));
    }
    for (long layer = 0; layer < s.layers; layer++) {
      const float* w = call.weights + layer * p.layer;
      rms_norm(stream, w + p.norm, p, call.eps, u, rows);
      std::memset(low.begin, 0, rows * low.stride * sizeof(float));
      for (long slab = begin; slab < end; slab++) {
        long g = p.first(slab), after = p.first(slab + 1), n = (after - g) * W;
        for (long at = g; at < after; at++) project_and_convolve(w, layer, at);
        add_slab(w + p.xp + p.P * p.tile(g * W), n, g * W, low, x_parts, slab, p.P);
      }
      add_parts(low, x_parts, meeting);
      for (long r = 0; r < rows; r++) {
        for (long i = 0; i < p.M * W; i += W) store(stream[r] + i, load(stream[r] + i) + load(w + p.out_bias + i));
      }
      for (long slab = begin; slab < end; slab++) {
        long g = p.first(slab), after = p.first(slab + 1), n = (after - g) * W;
        for (long at = g; at < after; at++) scan_and_gate(w, layer, at);
        add_slab(w + p.out + p.M * p.tile(g * W), n, g * W, stream, out_parts, slab, p.M);
      }
      add_parts(stream, out_parts, meeting);
    }
    const float* last = call.weights + s.layers * p.layer;
    static const float zeros[W] = {};
    rms_norm(stream, last, p, call.eps, u, rows);
    for (long j = thread * p.V / threads; j < (thread + 1) * p.V / threads; j++) {
      multiply(last + p.M * W + j * p.tile(s.width), s.width, u, {const_cast<float*>(zeros), 0}, delta);
      for (long r = 0; r < rows; r++) {
        store(call.logits + (first + r) * s.vocab + j * W, load(delta[r]), int(std::min<long>(W, s.vocab - j * W)));
      }
    }
  }
};

template <class Weights>
void step(const Plan& p, const Call& call, long threads) {
  Meeting meeting;
#ifdef _OPENMP
  if (threads > 1) {
#pragma omp parallel num_threads(threads)
    {
      long thread = omp_get_thread_num(), all = omp_get_num_threads();
      if (p.s.rows >= EACH * all) {
        long first = thread * p.s.rows / all, after = (thread + 1) * p.s.rows / all;
        float* scratch = call.scratch + first * (p.shared() + p.own()) + thread * p.once();
        Worker<Weights>(p, call, first, after - first, 0, 1, scratch).run(meeting);
      } else {
        Worker<Weights>(p, call, 0, p.s.rows, thread, all, call.scratch).run(meeting);
      }
    }
    return;
  }
#endif
  Worker<Weights>(p, call, 0, p.s.rows, 0, 1, call.scratch).run(meeting);
}
}  // namespace

extern "C" {

// What the caller must provide, in floats: packed weights, windows and states of all layers, scratch.
void mamba_sizes(const long* sizes, long threads, long* floats) {
  Plan p(*reinterpret_cast<const Sizes*>(sizes));
  floats[0] = p.weights();
  floats[1] = p.windows();
  floats[2] = p.states();
  floats[3] = p.scratch(threads);
}

// tokens (B,) are read; windows and states move on by one; logits (B, V) are written.
// Returns 0, or 1 and does nothing where a token is not in the vocabulary.
int mamba_step(const long* sizes, float eps, const float* weights, const float* embeddings, float* windows, float* states,
               float* scratch, const long* tokens, float* logits, int threads) {
  Plan p(*reinterpret_cast<const Sizes*>(sizes));
  for (long r = 0; r < p.s.rows; r++) {
    if (tokens[r] < 0 || tokens[r] >= p.s.vocab) return 1;
  }
  Call call = {eps, weights, embeddings, windows, states, scratch, tokens, logits};
  if (p.s.halves) {
    step<Half>(p, call, threads);
  } else {
    step<Float>(p, call, threads);
  }
  return 0;
}
}
