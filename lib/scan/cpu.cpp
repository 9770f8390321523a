// The fused selective scan on a CPU: softplus, discretisation, recurrence, C h, D x and the gate in
// one pass over memory. Shapes are those of lib/scan/selective.py.
//
// As many channels as a vector has lanes, a tile, go through time together. Time is cut into
// chunks; of the forward pass only the state at the start of each chunk is kept, and the backward
// pass computes those in between again. Numbers are read and written as they lie, in float or
// bfloat16 (T), and the rows of a tensor may be parts of longer rows; every sum and the running
// state are float.
#include "simd.h"
#include <new>
#include <vector>

namespace {
// steps between two kept states: the states of a chunk fit a core's first cache
constexpr int CHUNK = 12;
constexpr int PAD = 8;     // the states of a channel are padded to a multiple of it
#ifdef HAS_AVX512
constexpr int BLOCK = 8;  // states that go through a chunk in registers; it divides PAD
#else
constexpr int BLOCK = 4;
#endif

// A tensor (B, L, columns) whose steps lie `row` numbers apart.
struct Tensor {
  void* data;
  long row;
  template <class T>
  T* at(long step) const { return (T*)data + step * row; }
};

inline long smaller(long a, long b) { return a < b ? a : b; }
inline long up(long a, long b) { return (a + b - 1) / b; }
}  // namespace

extern "C" struct Scan {  // lib/scan/cpu.py has the same fields in the same order
  long batch, length, channels, states, softplus, threads;
  Tensor x, delta, B, C, z, y;            // z.data may be null
  const float *A, *D, *bias, *h0;         // A (D, N); D, bias (D,) or null; h0 (B, D, N) or null
  float *kept, *last;  // kept (B, chunks, tiles, padded states, W) or null; last (B, D, N)
  Tensor dy, dx, ddelta, dB, dC, dz;      // the backward pass
  const float* dlast;                     // (B, D, N) or null
  float *dA, *dD, *dbias, *dh0;           // summed over the batch but dh0 (B, D, N)
};

namespace {
struct Plan {
  const Scan& s;
  long tiles, slab, slabs, padded, chunks;
  // Whole sequences are shared out among the threads, or slabs of their tiles where `cut`.
  explicit Plan(const Scan& s, bool cut)
      : s(s),
        tiles(up(s.channels, W)),
        slab(cut || !tiles ? 8 : tiles),
        slabs(up(tiles, slab)),
        padded(up(s.states, PAD) * PAD),
        chunks(up(s.length, CHUNK)) {}

  float* kept(long b, long chunk, long tile) const {  // the state there, (padded, W)
    return s.kept + ((b * chunks + chunk) * tiles + tile) * padded * W;
  }
};

// `tile` of a (D, N) matrix with the channels in the lanes, (padded, W); zeros where there is
// nothing.
void gather(const Plan& p, const float* matrix, long tile, float factor, float* out) {
  for (long k = 0; k < p.padded; k++)
    for (long i = 0; i < W; i++) {
      long channel = tile * W + i;
      bool inside = matrix && channel < p.s.channels && k < p.s.states;
      out[k * W + i] = inside ? matrix[channel * p.s.states + k] * factor : 0.f;
    }
}

void scatter(const Plan& p, const float* in, long tile, float* matrix) {
  for (long i = 0; i < smaller(W, p.s.channels - tile * W); i++)
    for (long k = 0; k < p.s.states; k++) matrix[(tile * W + i) * p.s.states + k] = in[k * W + i];
}

// The rows of B or C of one chunk as floats, (CHUNK, padded).
template <class T>
void widen(const Plan& p, const Tensor& from, long first, long steps, float* out) {
  for (long t = 0; t < steps; t++)
    for (long k = 0; k < p.s.states; k += W) {
      long n = smaller(W, p.s.states - k);
      store(out + t * p.padded + k, load(from.at<T>(first + t) + k, n), n);
    }
}

// What a tile of one chunk needs at every step, before the states are touched.
struct Steps {
  vec dt[CHUNK], x[CHUNK], dx[CHUNK];  // the step, the input, their product

  // `next` is the way to the chunk that comes after this one, in steps: it is fetched while this
  // one is computed.
  template <class T>
  void read(const Scan& s, long first, long steps, long next, long d, long n) {
    vec shift = s.bias ? load(s.bias + d, n) : vec{};
    bool soft = s.softplus;
    const T *delta_at = s.delta.at<T>(first) + d, *x_at = s.x.at<T>(first) + d;
    long delta_row = s.delta.row, x_row = s.x.row;
    for (long t = 0; t < steps; t++) {
      __builtin_prefetch(delta_at + (t + next) * delta_row);
      __builtin_prefetch(x_at + (t + next) * x_row);
      vec raw = load(delta_at + t * delta_row, n) + shift;
      dt[t] = soft ? softplus(raw) : raw;
      x[t] = load(x_at + t * x_row, n);
      dx[t] = dt[t] * x[t];
    }
  }
};

template <class T>
void forward(const Plan& p, long b, long slab) {
  const Scan& s = p.s;
  long begin = slab * p.slab, end = smaller(begin + p.slab, p.tiles);
  std::vector<vec> A((end - begin) * p.padded), state(A.size());
  std::vector<float> B(CHUNK * p.padded), C(B.size());
  const float* h0 = s.h0 ? s.h0 + b * s.channels * s.states : nullptr;
  for (long tile = begin; tile < end; tile++) {
    gather(p, s.A, tile, LOG2E, (float*)&A[(tile - begin) * p.padded]);
    gather(p, h0, tile, 1.f, (float*)&state[(tile - begin) * p.padded]);
  }
  for (long chunk = 0; chunk < p.chunks; chunk++) {
    long first = b * s.length + chunk * CHUNK, steps = smaller(CHUNK, s.length - chunk * CHUNK);
    widen<T>(p, s.B, first, steps, B.data());
    widen<T>(p, s.C, first, steps, C.data());
    for (long tile = begin; tile < end; tile++) {
      long d = tile * W, n = smaller(W, s.channels - d);
      Steps in;
      in.read<T>(s, first, steps, CHUNK, d, n);
      vec y[CHUNK], skip = s.D ? load(s.D + d, n) : vec{};
      for (long t = 0; t < steps; t++) y[t] = skip * in.x[t];
      for (long k0 = 0; k0 < p.padded; k0 += BLOCK) {
        const vec* a = &A[(tile - begin) * p.padded + k0];
        vec* carried = &state[(tile - begin) * p.padded + k0];
        vec h[BLOCK];
#pragma GCC unroll 16
        for (int k = 0; k < BLOCK; k++) h[k] = carried[k];
        if (s.kept)
          for (int k = 0; k < BLOCK; k++) store(p.kept(b, chunk, tile) + (k0 + k) * W, h[k]);
        for (long t = 0; t < steps; t++) {
          const float *B_t = &B[t * p.padded + k0], *C_t = &C[t * p.padded + k0];
          vec sum = y[t];
#pragma GCC unroll 16
          for (int k = 0; k < BLOCK; k++) {
            h[k] = exp2v(in.dt[t] * a[k]) * h[k] + in.dx[t] * splat(B_t[k]);
            sum += h[k] * splat(C_t[k]);
          }
          y[t] = sum;
        }
#pragma GCC unroll 16
        for (int k = 0; k < BLOCK; k++) carried[k] = h[k];
      }
      const T* z_at = s.z.at<T>(first) + d;
      T* y_at = s.y.at<T>(first) + d;
      long z_row = s.z.row, y_row = s.y.row;
      bool gated = s.z.data;
      for (long t = 0; t < steps; t++) {
        if (gated) {
          __builtin_prefetch(z_at + (t + CHUNK) * z_row);
          vec z = load(z_at + t * z_row, n);
          y[t] *= z * sigmoid(z);
        }
        store(y_at + t * y_row, y[t], n);
      }
    }
  }
  for (long tile = begin; tile < end; tile++)
    scatter(p, (float*)&state[(tile - begin) * p.padded], tile, s.last + b * s.channels * s.states);
}

// The sums over a slab's channels, and over the batch, that are still to be added up.
struct Sums {
  std::vector<float> dB, dC;           // (slabs, B, L, padded)
  std::vector<vec> dA, dD, dbias;      // (B, tiles, padded), (B, tiles), (B, tiles)
  explicit Sums(const Plan& p)
      : dB(p.slabs * p.s.batch * p.s.length * p.padded),
        dC(dB.size()),
        dA(p.s.batch * p.tiles * p.padded),
        dD(p.s.batch * p.tiles),
        dbias(dD.size()) {}
};

// One share owns one slab of one row of the batch, so that every sum has one order: two runs give
// the same digits, on any number of threads.
template <class T>
void backward(const Plan& p, Sums& sums, long b, long slab) {
  const Scan& s = p.s;
  long begin = slab * p.slab, end = smaller(begin + p.slab, p.tiles);
  std::vector<vec> A((end - begin) * p.padded), carry(A.size()), sumB(CHUNK * p.padded),
      sumC(sumB.size());
  std::vector<float> B(CHUNK * p.padded), C(B.size());
  const float* dlast = s.dlast ? s.dlast + b * s.channels * s.states : nullptr;
  for (long tile = begin; tile < end; tile++) {
    gather(p, s.A, tile, 1.f, (float*)&A[(tile - begin) * p.padded]);
    gather(p, dlast, tile, 1.f, (float*)&carry[(tile - begin) * p.padded]);
  }
  for (long chunk = p.chunks - 1; chunk >= 0; chunk--) {
    long first = b * s.length + chunk * CHUNK, steps = smaller(CHUNK, s.length - chunk * CHUNK);
    widen<T>(p, s.B, first, steps, B.data());
    widen<T>(p, s.C, first, steps, C.data());
    for (auto& v : sumB) v = vec{};
    for (auto& v : sumC) v = vec{};
    for (long tile = begin; tile < end; tile++) {
      long d = tile * W, n = smaller(W, s.channels - d);
      const float* before = p.kept(b, chunk, tile);
      Steps in;
      in.read<T>(s, first, steps, -CHUNK, d, n);
      vec skip = s.D ? load(s.D + d, n) : vec{}, one = splat(1.f);
      // gradients of y before its gate, of dt x, of dt
      vec g[CHUNK], y[CHUNK], g_dx[CHUNK], g_dt[CHUNK];
      const T *dy_at = s.dy.at<T>(first) + d, *z_at = s.z.at<T>(first) + d;
      long dy_row = s.dy.row, z_row = s.z.row;
      bool gated = s.z.data;
      vec gate[CHUNK];  // sigmoid(z)
      for (long t = 0; t < steps; t++) {
        __builtin_prefetch(dy_at + (t - CHUNK) * dy_row);
        g[t] = load(dy_at + t * dy_row, n);
        if (gated) {
          __builtin_prefetch(z_at + (t - CHUNK) * z_row);
          vec z = load(z_at + t * z_row, n);
          gate[t] = sigmoid(z);
          g[t] *= z * gate[t];
        }
        y[t] = skip * in.x[t];
        g_dx[t] = g_dt[t] = vec{};
      }
      for (long k0 = 0; k0 < p.padded; k0 += BLOCK) {
        const vec* a = &A[(tile - begin) * p.padded + k0];
        vec h[CHUNK + 1][BLOCK], decay[CHUNK][BLOCK];
#pragma GCC unroll 16
        for (int k = 0; k < BLOCK; k++) {
          h[0][k] = load(before + (k0 + k) * W);
          __builtin_prefetch(before + (k0 + k) * W - p.tiles * p.padded * W);
        }
        for (long t = 0; t < steps; t++) {  // the states of this chunk again
          const float *B_t = &B[t * p.padded + k0], *C_t = &C[t * p.padded + k0];
          vec scaled = in.dt[t] * splat(LOG2E), sum = y[t];
#pragma GCC unroll 16
          for (int k = 0; k < BLOCK; k++) {
            decay[t][k] = exp2v(scaled * a[k]);
            h[t + 1][k] = decay[t][k] * h[t][k] + in.dx[t] * splat(B_t[k]);
            sum += h[t + 1][k] * splat(C_t[k]);
          }
          y[t] = sum;
        }
        vec dh[BLOCK], dA[BLOCK];
#pragma GCC unroll 16
        for (int k = 0; k < BLOCK; k++) {
          dh[k] = carry[(tile - begin) * p.padded + k0 + k];
          dA[k] = sums.dA[(b * p.tiles + tile) * p.padded + k0 + k];
        }
        for (long t = steps - 1; t >= 0; t--) {
          const float *B_t = &B[t * p.padded + k0], *C_t = &C[t * p.padded + k0];
          vec *sB = &sumB[t * p.padded + k0], *sC = &sumC[t * p.padded + k0];
          vec to_dx = g_dx[t], to_dt = g_dt[t];
#pragma GCC unroll 16
          for (int k = 0; k < BLOCK; k++) {
            sC[k] += g[t] * h[t + 1][k];
            dh[k] += g[t] * splat(C_t[k]);
            sB[k] += dh[k] * in.dx[t];
            to_dx += dh[k] * splat(B_t[k]);
            dh[k] *= decay[t][k];           // now of the state one step before
            vec g_a = dh[k] * h[t][k];      // of dt A
            to_dt += g_a * a[k];
            dA[k] += g_a * in.dt[t];
          }
          g_dx[t] = to_dx;
          g_dt[t] = to_dt;
        }
#pragma GCC unroll 16
        for (int k = 0; k < BLOCK; k++) {
          carry[(tile - begin) * p.padded + k0 + k] = dh[k];
          sums.dA[(b * p.tiles + tile) * p.padded + k0 + k] = dA[k];
        }
      }
      vec dD = {}, dbias = {}, shift = s.bias ? load(s.bias + d, n) : vec{};
      const T* delta_at = s.delta.at<T>(first) + d;
      T *dx_at = s.dx.at<T>(first) + d, *ddelta_at = s.ddelta.at<T>(first) + d,
        *dz_at = s.dz.at<T>(first) + d;
      long delta_row = s.delta.row, dx_row = s.dx.row, ddelta_row = s.ddelta.row, dz_row = s.dz.row;
      bool soft = s.softplus;
      for (long t = 0; t < steps; t++) {
        __builtin_prefetch(dx_at + (t - CHUNK) * dx_row, 1);
        __builtin_prefetch(ddelta_at + (t - CHUNK) * ddelta_row, 1);
        if (gated) {
          __builtin_prefetch(dz_at + (t - CHUNK) * dz_row, 1);
          vec z = load(z_at + t * z_row, n);
          vec slope = gate[t] * (one + z * (one - gate[t]));
          store(dz_at + t * dz_row, load(dy_at + t * dy_row, n) * y[t] * slope, n);
        }
        store(dx_at + t * dx_row, g[t] * skip + g_dx[t] * in.dt[t], n);
        vec through = g_dt[t] + g_dx[t] * in.x[t];
        if (soft) through *= sigmoid(load(delta_at + t * delta_row, n) + shift);
        store(ddelta_at + t * ddelta_row, through, n);
        dbias += through;
        dD += g[t] * in.x[t];
      }
      sums.dD[b * p.tiles + tile] += dD;
      sums.dbias[b * p.tiles + tile] += dbias;
    }
    for (long t = 0; t < steps; t++)
      for (long k = 0; k < p.padded; k++) {
        long at = ((slab * s.batch * s.length) + first + t) * p.padded + k;
        sums.dB[at] = total(sumB[t * p.padded + k]);
        sums.dC[at] = total(sumC[t * p.padded + k]);
      }
  }
  for (long tile = begin; tile < end; tile++)
    scatter(p, (float*)&carry[(tile - begin) * p.padded], tile, s.dh0 + b * s.channels * s.states);
}

// A row of dB or dC: the parts of all slabs added up, in their order.
template <class T>
void add_slabs(const Plan& p, const std::vector<float>& parts, const Tensor& out, long step) {
  for (long k = 0; k < p.s.states; k += W) {
    long n = smaller(W, p.s.states - k);
    vec sum = {};
    for (long slab = 0; slab < p.slabs; slab++)
      sum += load(&parts[(slab * p.s.batch * p.s.length + step) * p.padded + k], n);
    store(out.at<T>(step) + k, sum, n);
  }
}

void add_rows(const Plan& p, const Sums& sums, long tile) {  // of the batch: dA, dD, dbias
  const Scan& s = p.s;
  std::vector<vec> dA(p.padded);
  vec dD = {}, dbias = {};
  for (long b = 0; b < s.batch; b++) {
    for (long k = 0; k < p.padded; k++) dA[k] += sums.dA[(b * p.tiles + tile) * p.padded + k];
    dD += sums.dD[b * p.tiles + tile];
    dbias += sums.dbias[b * p.tiles + tile];
  }
  long d = tile * W, n = smaller(W, s.channels - d);
  scatter(p, (float*)dA.data(), tile, s.dA);
  store(s.dD + d, dD, n);
  store(s.dbias + d, dbias, n);
}

template <class T>
void all_forward(const Scan& s) {
  Plan p(s, s.batch < 2 * s.threads);
#pragma omp parallel for collapse(2) schedule(static) num_threads(s.threads)
  for (long b = 0; b < s.batch; b++)
    for (long slab = 0; slab < p.slabs; slab++) forward<T>(p, b, slab);
}

template <class T>
void all_backward(const Scan& s) {
  // The number of threads has no say: it would change the order of the sums over slabs. These
  // take slabs * B * L * N floats, so a batch of 4 and more is cut into sequences alone.
  Plan p(s, s.batch < 4);
  Sums sums(p);
#pragma omp parallel for collapse(2) schedule(static) num_threads(s.threads)
  for (long b = 0; b < s.batch; b++)
    for (long slab = 0; slab < p.slabs; slab++) backward<T>(p, sums, b, slab);
#pragma omp parallel for schedule(static) num_threads(s.threads)
  for (long step = 0; step < s.batch * s.length; step++) {
    add_slabs<T>(p, sums.dB, s.dB, step);
    add_slabs<T>(p, sums.dC, s.dC, step);
  }
  for (long tile = 0; tile < p.tiles; tile++) add_rows(p, sums, tile);
}
}  // namespace

extern "C" {
void scan_forward(const Scan* s, int half) {
  half ? all_forward<bf16>(*s) : all_forward<float>(*s);
}
int scan_backward(const Scan* s, int half) {  // 1 where there is no memory for the sums
  try {
    half ? all_backward<bf16>(*s) : all_backward<float>(*s);
  } catch (const std::bad_alloc&) {
    return 1;
  }
  return 0;
}

// One step of time: h (B, D, N) is written over; x, delta, z, y (B, D); B, C (B, N).
void scan_step(const float* x, const float* delta, const float* A, const float* B, const float* C,
               const float* D, const float* z, const float* bias, int use_softplus,
               long batch, long channels, long states, float* h, float* y) {
  for (long b = 0; b < batch; b++)
    for (long first = 0; first < channels; first += W) {
      int width = int(channels - first < W ? channels - first : W);
      long row = b * channels + first;
      vec u = load(x + row, width), dt = load(delta + row, width);
      if (bias) dt += load(bias + first, width);
      if (use_softplus) dt = softplus(dt);
      vec du = dt * u, out = D ? load(D + first, width) * u : vec{};
      for (int i = 0; i < width; i++)
        for (long k = 0; k < states; k += W) {  // here the lanes are states
          int n = int(states - k < W ? states - k : W);
          float* state = h + (row + i) * states + k;
          vec next = expv(splat(dt[i]) * load(A + (first + i) * states + k, n)) * load(state, n)
                     + splat(du[i]) * load(B + b * states + k, n);
          store(state, next, n);
          out[i] += total(next * load(C + b * states + k, n));
        }
      if (z) { vec gate = load(z + row, width); out = out * gate * sigmoid(gate); }
      store(y + row, out, width);
    }
}
}
