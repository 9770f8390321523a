// One token through a whole Mamba language model on a CPU: what `MambaLM.step` in lib/mamba/model.py does.
//
// For one row a step reads every weight once and computes little, so its time is that of reading
// them. They lie as they are read (`pack` in lib/mamba/step_cpu.py): a matrix in tiles of 2 W outputs, W
// being the floats in a vector of this machine, a tile as two vectors for each input, so that a product
// is one straight read of memory; and in 16 bits each where that is exact.
//
// Where there are many rows, each thread takes some of them through the whole model, and nobody
// waits for anybody. Where there are few, all threads share each row: the channels are cut into
// slabs, and a thread owns some slabs through a whole layer. Where a projection needs all channels
// (x_proj, out_proj), each slab gives its part of the sum, and the threads meet to add the parts,
// twice a layer. What every channel needs (the residual, its norm) each thread keeps for itself.
// Sums have one order, so a row has the same digits on any number of threads and beside any others.
#include "simd.h"
#include <algorithm>
#ifdef _OPENMP
#include <atomic>
#include <omp.h>
#include <thread>
#endif

namespace {
constexpr long OWN = 8;  // so many rows make it worthwhile for a thread to read all weights by itself
#ifdef __AVX512F__
constexpr int BLOCK = 8;  // rows whose sums stay in registers
#else
constexpr int BLOCK = 2;
#endif

struct Sizes {
  long rows, vocab, width, layers, channels, states, taps, rank, slabs;
  long halves;  // 1 where a weight of a matrix has 16 bits, 0 where it has 32
};

inline long tiles(long n) { return (n + W - 1) / W; }
inline long pairs(long n) { return (n + 2 * W - 1) / (2 * W); }

// How the packed numbers of a layer follow on each other; all counts in floats.
struct Plan {
  Sizes s;
  long G, M, P, V;  // tiles of W channels; of 2 W of the residual, of x_proj's outputs, of the vocabulary
  long norm, in, in_bias, conv, xp, dt, A, D, out, out_bias, layer;

  explicit Plan(const Sizes& sizes) : s(sizes) {
    G = tiles(s.channels);
    M = pairs(s.width);
    P = pairs(s.rank + 2 * s.states);
    V = pairs(s.vocab);
    norm = 0;
    in = norm + M * 2 * W;                // per channel tile: (width, W of x and W of z)
    in_bias = in + G * tile(s.width);     // per channel tile: x (W), z (W)
    conv = in_bias + G * 2 * W;           // per channel tile: taps (K, W), bias (W)
    xp = conv + G * (s.taps + 1) * W;     // per slab, per tile of outputs: (its channels, 2 W)
    dt = xp + P * tile(G * W);            // per channel tile, in 32 bits: (rank, W), bias (W)
    A = dt + G * (s.rank + 1) * W;        // per channel tile: (N, W), times log2(e)
    D = A + G * s.states * W;
    out = D + G * W;                      // per slab, per tile of outputs: (its channels, 2 W)
    out_bias = out + M * tile(G * W);
    layer = out_bias + M * 2 * W;
  }
  long tile(long n) const { return n * (s.halves ? W : 2 * W); }  // of n inputs and 2 W outputs
  long first(long slab) const { return slab * G / s.slabs; }      // its first tile of channels
  long weights() const { return s.layers * layer + M * 2 * W + V * tile(s.width); }
  long windows() const { return s.layers * G * s.rows * (s.taps - 1) * W; }
  long states() const { return s.layers * G * s.rows * s.states * W; }

  // Scratch: what a team shares a row, what each of its threads has a row, and what it has once.
  long shared() const { return 2 * W * (G + s.slabs * (P + M)); }
  long own() const { return 2 * W * (2 * M + P + 1); }
  long once() const { return 2 * W * std::max(s.width, G * W); }
  long scratch(long threads) const { return s.rows * (shared() + threads * own()) + threads * once(); }
};

// ---- products -------------------------------------------------------------------------------

struct Float {
  static void input(const float* tile, long k, vec& a, vec& b) {
    a = load(tile + 2 * k * W);
    b = load(tile + (2 * k + 1) * W);
  }
};

// Two weights in the place of a float. A half has five bits of exponent where a float has eight:
// moved there it is the number times 2^-112. `pack` has stored it times 2^10, so that none is subnormal.
struct Half {
  static vec widen(ivec upper) {
    ivec moved = (upper >> 3) & int(0x8FFFE000);
    vec v;
    std::memcpy(&v, &moved, sizeof v);
    return v * splat(0x1p102f);
  }
  static void input(const float* tile, long k, vec& a, vec& b) {
    ivec both;
    std::memcpy(&both, tile + k * W, sizeof both);
    a = widen(both << 16);
    b = widen(both);
  }
};

// Vectors that lie one behind the other: v[r] is that of row r, and v[rows] the end of them.
template <class T>
struct Rows {
  T* begin;
  long stride;  // 0: all rows have the same
  T* operator[](long r) const { return begin + r * stride; }
};
typedef Rows<const float> In;
typedef Rows<float> Out;

// out[r] = start[r] + tile' in[r] for R rows at once: the tile (n, 2 W) is read once. W of the
// results lie at out[r], W `apart` behind.
template <class Weights, int R>
inline void block(const float* tile, long n, In in, In start, Out out, long apart) {
  vec first[R] = {}, second[R] = {};
  for (long k = 0; k < n; k++) {
    vec a, b;
    Weights::input(tile, k, a, b);
    for (int r = 0; r < R; r++) {
      vec x = splat(in[r][k]);
      first[r] += a * x;
      second[r] += b * x;
    }
  }
  for (int r = 0; r < R; r++) {
    store(out[r], load(start[r]) + first[r]);
    store(out[r] + apart, load(start[r] + W) + second[r]);
  }
}

// The same for any number of rows.
template <class Weights, int R>
inline void blocks(const float* tile, long n, In in, In start, Out out, long apart, long rows) {
  for (; rows >= R; rows -= R) {
    block<Weights, R>(tile, n, in, start, out, apart);
    in.begin = in[R];
    start.begin = start[R];
    out.begin = out[R];
  }
  if constexpr (R > 1) blocks<Weights, R / 2>(tile, n, in, start, out, apart, rows);
}

// A tile that several blocks read is widened once, into `wide` (n, 2 W).
template <class Weights>
void product(const float* tile, long n, In in, In start, Out out, long apart, long rows, float* wide) {
  if (rows <= BLOCK) {
    blocks<Weights, BLOCK>(tile, n, in, start, out, apart, rows);
    return;
  }
  for (long k = 0; k < n; k++) {
    vec a, b;
    Weights::input(tile, k, a, b);
    store(wide + 2 * k * W, a);
    store(wide + (2 * k + 1) * W, b);
  }
  blocks<Float, BLOCK>(wide, n, in, start, out, apart, rows);
}

// u = x / rms(x) * weight, of n numbers a row, a multiple of 2 W; behind the width there are zeros.
void rms_norm(Out x, const float* weight, long n, long width, float eps, Out u, long rows) {
  for (long r = 0; r < rows; r++) {
    vec sum = {};
    for (long i = 0; i < n; i += W) sum += load(x[r] + i) * load(x[r] + i);
    vec scale = splat(1.f / std::sqrt(total(sum) / width + eps));
    for (long i = 0; i < n; i += W) store(u[r] + i, load(x[r] + i) * scale * load(weight + i));
  }
}

// ---- threads --------------------------------------------------------------------------------

// Where the threads of a team wait for each other. They spin, since a wait lasts microseconds; one
// that has waited long gives its core away, as its partner may have lost its own to another program.
struct Meeting {
#ifdef _OPENMP
  std::atomic<long> arrived{0}, held{0};
  void wait(long threads) {
    long now = held.load(std::memory_order_relaxed);
    if (arrived.fetch_add(1, std::memory_order_acq_rel) + 1 == threads) {
      arrived.store(0, std::memory_order_relaxed);
      held.store(now + 1, std::memory_order_release);
    }
    for (long spins = 0; held.load(std::memory_order_acquire) == now; spins++) {
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
  float *windows, *states, *scratch;  // (layers, tiles of channels, rows, K-1 or N, W)
  const int64_t* tokens;
  float* logits;
};

// One thread of a team that takes `rows` rows, from row `first` on, through the model.
template <class Weights>
struct Worker {
  const Plan& p;
  const Call& call;
  long first, rows, thread, threads;
  const long channels = p.G * W, width = p.M * 2 * W, low_width = p.P * 2 * W;  // as they lie, with padding
  Out x, z;                    // (rows, channels): the team's, though each thread minds its slabs
  float *x_parts, *out_parts;  // (slabs, rows, low_width or width): what the team adds
  Out residual, u, low, some;  // u: the norm; low: what x_proj gives; some: 2 W numbers a row
  float* wide;
  float zeros[2 * W] = {};

  Worker(const Plan& p, const Call& call, long first, long rows, long thread, long threads, float* scratch)
      : p(p), call(call), first(first), rows(rows), thread(thread), threads(threads) {
    x = {scratch, channels};
    z = {x[rows], channels};
    x_parts = z[rows];
    out_parts = x_parts + p.s.slabs * rows * low_width;
    residual = {scratch + rows * (p.shared() + thread * p.own()) + thread * p.once(), width};
    u = {residual[rows], width};
    low = {u[rows], low_width};
    some = {low[rows], 2 * W};
    wide = some[rows];
  }

  void multiply(const float* tile, long n, Out in, In start, Out out, long apart = W) {
    product<Weights>(tile, n, {in.begin, in.stride}, start, out, apart, rows, wide);
  }

  // in_proj, the convolution and SiLU for tile g of the channels.
  void project_and_convolve(const float* w, long layer, long g) {
    const long K = p.s.taps;
    Out here = {x.begin + g * W, x.stride};
    multiply(w + p.in + g * p.tile(p.s.width), p.s.width, u, {w + p.in_bias + g * 2 * W, 0}, here,
             z.begin - x.begin);
    const float* taps = w + p.conv + g * (K + 1) * W;
    float* window = call.windows + ((layer * p.G + g) * p.s.rows + first) * (K - 1) * W;
    for (long r = 0; r < rows; r++) {
      vec now = load(here[r]);
      vec y = load(taps + K * W) + now * load(taps + (K - 1) * W);
      for (long k = 0; k < K - 1; k++) {
        y += load(window + k * W) * load(taps + k * W);
        store(window + k * W, k + 2 < K ? load(window + (k + 1) * W) : now);
      }
      store(here[r], y * sigmoid(y));
      window += (K - 1) * W;
    }
  }

  // dt_proj, the recurrence and the gate for tile g of the channels.
  void scan_and_gate(const float* w, long layer, long g) {
    const long N = p.s.states, rank = p.s.rank;
    const float* dt = w + p.dt + g * (rank + 1) * W;
    const float* A = w + p.A + g * N * W;
    float* h = call.states + ((layer * p.G + g) * p.s.rows + first) * N * W;
    for (long r = 0; r < rows; r++) {
      const float* B = low[r] + rank;
      const float* C = B + N;
      vec delta = load(dt + rank * W);
      for (long k = 0; k < rank; k++) delta += load(dt + k * W) * splat(low[r][k]);
      delta = softplus(delta);
      vec in = load(x[r] + g * W);
      vec y = in * load(w + p.D + g * W);
      in *= delta;
      for (long n = 0; n < N; n++) {
        vec next = exp2v(delta * load(A + n * W)) * load(h + n * W) + in * splat(B[n]);
        store(h + n * W, next);
        y += next * splat(C[n]);
      }
      vec gate = load(z[r] + g * W);
      store(x[r] + g * W, y * gate * sigmoid(gate));
      h += N * W;
    }
  }

  // A slab's part of a sum over all channels. A thread by itself adds it at once; in a team it is
  // kept, to be added when all have met.
  void add_slab(const float* matrix, long slab, Out sum, float* parts) {
    long begin = p.first(slab) * W, n = p.first(slab + 1) * W - begin;
    bool alone = threads == 1;
    Out out = alone ? sum : Out{parts + slab * rows * sum.stride, sum.stride};
    for (long j = 0; j < sum.stride; j += 2 * W) {
      const float* tile = matrix + p.tile(begin * sum.stride / (2 * W) + j / (2 * W) * n);
      Out here = {out.begin + j, out.stride};
      In start = alone ? In{here.begin, here.stride} : In{zeros, 0};
      multiply(tile, n, {x.begin + begin, x.stride}, start, here);
    }
  }
  void add_parts(Out sum, const float* parts, Meeting& meeting) {
    if (threads == 1) return;
    meeting.wait(threads);
    long n = rows * sum.stride;
    for (long i = 0; i < n; i += W) {
      vec now = load(sum.begin + i);
      for (long slab = 0; slab < p.s.slabs; slab++) now += load(parts + slab * n + i);
      store(sum.begin + i, now);
    }
  }

  void run(Meeting& meeting) {
    const Sizes& s = p.s;
    const long begin = thread * s.slabs / threads, end = (thread + 1) * s.slabs / threads;
    std::memset(residual.begin, 0, rows * width * sizeof(float));
    for (long r = 0; r < rows; r++) {
      const float* embedding = call.embeddings + call.tokens[first + r] * s.width;
      std::memcpy(residual[r], embedding, s.width * sizeof(float));
    }
    for (long layer = 0; layer < s.layers; layer++) {
      const float* w = call.weights + layer * p.layer;
      rms_norm(residual, w + p.norm, width, s.width, call.eps, u, rows);
      std::memset(low.begin, 0, rows * low_width * sizeof(float));
      for (long slab = begin; slab < end; slab++) {
        for (long g = p.first(slab); g < p.first(slab + 1); g++) project_and_convolve(w, layer, g);
        add_slab(w + p.xp, slab, low, x_parts);
      }
      add_parts(low, x_parts, meeting);
      for (long r = 0; r < rows; r++) {
        for (long i = 0; i < width; i += W) store(residual[r] + i, load(residual[r] + i) + load(w + p.out_bias + i));
      }
      for (long slab = begin; slab < end; slab++) {
        for (long g = p.first(slab); g < p.first(slab + 1); g++) scan_and_gate(w, layer, g);
        add_slab(w + p.out, slab, residual, out_parts);
      }
      add_parts(residual, out_parts, meeting);
    }
    const float* last = call.weights + s.layers * p.layer;
    rms_norm(residual, last, width, s.width, call.eps, u, rows);
    for (long j = thread * p.V / threads; j < (thread + 1) * p.V / threads; j++) {
      multiply(last + width + j * p.tile(s.width), s.width, u, {zeros, 0}, some);
      long n = std::min(2 * W, int(s.vocab - j * 2 * W));
      for (long r = 0; r < rows; r++) {
        std::memcpy(call.logits + (first + r) * s.vocab + j * 2 * W, some[r], n * sizeof(float));
      }
    }
  }
};

template <class Weights>
void step(const Plan& p, const Call& call, long wanted) {
  Meeting meeting;
#ifdef _OPENMP
  if (wanted > 1) {
#pragma omp parallel num_threads(wanted)
    {
      long thread = omp_get_thread_num(), threads = omp_get_num_threads();
      if (p.s.rows >= OWN * threads) {
        long first = thread * p.s.rows / threads, after = (thread + 1) * p.s.rows / threads;
        float* scratch = call.scratch + first * (p.shared() + p.own()) + thread * p.once();
        Worker<Weights>(p, call, first, after - first, 0, 1, scratch).run(meeting);
      } else {
        Worker<Weights>(p, call, 0, p.s.rows, thread, threads, call.scratch).run(meeting);
      }
    }
    return;
  }
#endif
  Worker<Weights>(p, call, 0, p.s.rows, 0, 1, call.scratch).run(meeting);
}
}  // namespace

extern "C" {

// Floats in a vector, W: the layout of weights and states depends on it.
int mamba_lanes() { return W; }

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
int mamba_step(const long* sizes, float eps, const float* weights, const float* embeddings, float* windows,
               float* states, float* scratch, const int64_t* tokens, float* logits, int threads) {
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
