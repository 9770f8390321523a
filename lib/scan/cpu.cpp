// The fused selective scan on a CPU: softplus, discretisation, recurrence, C h, D x and gate in
// one pass. Sixteen channels ride in one vector W. The forward pass keeps one state every CHUNK
// steps; the backward pass recomputes the states in between. Shapes are those of lib/scan/selective.py.
#include "simd.h"
#include <vector>

namespace {
constexpr int CHUNK = 32;  // steps between two kept states
constexpr int SLAB = 128;  // channels of one thread's share of the backward pass

struct Sizes { long batch, length, channels, states; };
inline long chunks(const Sizes& s) { return (s.length + CHUNK - 1) / CHUNK; }
}  // namespace

extern "C" {

// kept: (B, chunks, D, N), the states at the start of each chunk
void scan_forward(const float* x, const float* delta, const float* A, const float* B, const float* C,
                  const float* D, const float* z, const float* bias, const float* h0, int use_softplus, int threads,
                  long batch, long length, long channels, long states,
                  float* y, float* kept, float* last) {
  Sizes s{batch, length, channels, states};
  long groups = (channels + W - 1) / W;
#pragma omp parallel for collapse(2) schedule(static) num_threads(threads)
  for (long b = 0; b < batch; b++)
    for (long g = 0; g < groups; g++) {
      long d = g * W; int n = int(channels - d < W ? channels - d : W);
      std::vector<vec> h(states), a(states);
      for (long k = 0; k < states; k++)
        for (int i = 0; i < W; i++) {
          a[k][i] = i < n ? A[(d + i) * states + k] * LOG2E : 0.f;
          h[k][i] = i < n && h0 ? h0[(b * channels + d + i) * states + k] : 0.f;
        }
      vec skip = D ? load(D + d, n) : vec{}, shift = bias ? load(bias + d, n) : vec{};
      for (long t = 0; t < length; t++) {
        if (t % CHUNK == 0)
          for (long k = 0; k < states; k++)
            for (int i = 0; i < n; i++)
              kept[((b * chunks(s) + t / CHUNK) * channels + d + i) * states + k] = h[k][i];
        long row = b * length + t;
        vec dt = load(delta + row * channels + d, n) + shift;
        if (use_softplus) dt = softplus(dt);
        vec u = load(x + row * channels + d, n), du = dt * u, out = skip * u;
        for (long k = 0; k < states; k++) {
          h[k] = exp2v(dt * a[k]) * h[k] + du * splat(B[row * states + k]);
          out += h[k] * splat(C[row * states + k]);
        }
        if (z) { vec gate = load(z + row * channels + d, n); out = out * gate * sigmoid(gate); }
        store(y + row * channels + d, out, n);
      }
      for (long k = 0; k < states; k++)
        for (int i = 0; i < n; i++) last[(b * channels + d + i) * states + k] = h[k][i];
    }
}

// Gradients: dx, ddelta, dz (B, L, D); dA (B, D, N), dD (B, D), dh0 (B, D, N), still to be summed
// over the batch where the parameter has none; dB, dC (slabs, B, L, N), still to be summed over the
// slabs of SLAB channels. One thread owns one slab of one batch row, so that every sum has one
// order: two runs give the same digits, on any number of cores.
void scan_backward(const float* x, const float* delta, const float* A, const float* B, const float* C,
                   const float* D, const float* z, const float* bias, int use_softplus, int threads,
                   long batch, long length, long channels, long states,
                   const float* kept, const float* dy, const float* dlast,
                   float* dx, float* ddelta, float* dA, float* dB, float* dC, float* dD, float* dz,
                   float* dh0) {
  Sizes s{batch, length, channels, states};
  long slabs = (channels + SLAB - 1) / SLAB;
#pragma omp parallel for collapse(2) schedule(dynamic) num_threads(threads)
  for (long b = 0; b < batch; b++)
    for (long slab = 0; slab < slabs; slab++) {
      long first = slab * SLAB, width = channels - first < SLAB ? channels - first : SLAB;
      long groups = (width + W - 1) / W;
      float* dB_slab = dB + slab * batch * length * states;
      float* dC_slab = dC + slab * batch * length * states;
      std::vector<vec> h((CHUNK + 1) * states), decay(CHUNK * states), sumB(CHUNK * states), sumC(CHUNK * states);
      std::vector<vec> carry(groups * states), gradA(groups * states), gradD(groups), a(groups * states);
      vec steps[CHUNK];
      for (long g = 0; g < groups; g++)
        for (long k = 0; k < states; k++)
          for (int i = 0; i < W; i++) {
            long c = first + g * W + i; bool in = c < channels;
            a[g * states + k][i] = in ? A[c * states + k] : 0.f;
            carry[g * states + k][i] = in && dlast ? dlast[(b * channels + c) * states + k] : 0.f;
            gradA[g * states + k][i] = 0.f; gradD[g][i] = 0.f;
          }
      for (long chunk = chunks(s) - 1; chunk >= 0; chunk--) {
        long begin = chunk * CHUNK, end = begin + CHUNK < length ? begin + CHUNK : length;
        for (auto& v : sumB) v = vec{};
        for (auto& v : sumC) v = vec{};
        for (long g = 0; g < groups; g++) {
          long d = first + g * W; int n = int(channels - d < W ? channels - d : W);
          const vec* ag = &a[g * states];
          vec skip = D ? load(D + d, n) : vec{}, shift = bias ? load(bias + d, n) : vec{};
          for (long k = 0; k < states; k++)
            for (int i = 0; i < W; i++)
              h[k][i] = i < n ? kept[((b * chunks(s) + chunk) * channels + d + i) * states + k] : 0.f;
          for (long t = begin; t < end; t++) {  // the states of this chunk again
            long row = b * length + t, o = (t - begin) * states;
            vec dt = load(delta + row * channels + d, n) + shift;
            if (use_softplus) dt = softplus(dt);
            steps[t - begin] = dt;
            vec du = dt * load(x + row * channels + d, n), scaled = dt * splat(LOG2E);
            for (long k = 0; k < states; k++) {
              decay[o + k] = exp2v(scaled * ag[k]);
              h[o + states + k] = decay[o + k] * h[o + k] + du * splat(B[row * states + k]);
            }
          }
          for (long t = end - 1; t >= begin; t--) {
            long row = b * length + t, o = (t - begin) * states;
            vec dt = steps[t - begin], u = load(x + row * channels + d, n);
            vec g_out = load(dy + row * channels + d, n);
            if (z) {
              vec gate = load(z + row * channels + d, n), sig = sigmoid(gate), before = skip * u;
              for (long k = 0; k < states; k++) before += h[o + states + k] * splat(C[row * states + k]);
              vec slope = sig * (splat(1.f) + gate * (splat(1.f) - sig));
              store(dz + row * channels + d, g_out * before * slope, n);
              g_out = g_out * gate * sig;
            }
            vec du = dt * u, g_du = vec{}, g_dt = vec{};
            for (long k = 0; k < states; k++) {
              sumC[o + k] += g_out * h[o + states + k];
              vec dh = carry[g * states + k] + g_out * splat(C[row * states + k]);
              sumB[o + k] += dh * du;
              g_du += dh * splat(B[row * states + k]);
              vec through = dh * decay[o + k];  // into h[t-1]
              vec g_a = through * h[o + k];     // into dt * A
              g_dt += g_a * ag[k];
              gradA[g * states + k] += g_a * dt;
              carry[g * states + k] = through;
            }
            gradD[g] += g_out * u;
            store(dx + row * channels + d, g_out * skip + g_du * dt, n);
            g_dt += g_du * u;
            if (use_softplus) g_dt = g_dt * sigmoid(load(delta + row * channels + d, n) + shift);
            store(ddelta + row * channels + d, g_dt, n);
          }
        }
        for (long t = begin; t < end; t++)
          for (long k = 0; k < states; k++) {
            dB_slab[(b * length + t) * states + k] = total(sumB[(t - begin) * states + k]);
            dC_slab[(b * length + t) * states + k] = total(sumC[(t - begin) * states + k]);
          }
      }
      for (long i = 0; i < width; i++) {
        long g = i / W, lane = i % W, c = b * channels + first + i;
        dD[c] = gradD[g][lane];
        for (long k = 0; k < states; k++) {
          dA[c * states + k] = gradA[g * states + k][lane];
          dh0[c * states + k] = carry[g * states + k][lane];
        }
      }
    }
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
