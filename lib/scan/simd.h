// A vector of floats, and the few functions of it that the kernels need.
//
// GCC's and clang's vector extensions: the same lines run on AVX2, AVX-512, NEON or WebAssembly. Where
// one instruction does what several lines do (AVX-512), it stands behind #ifdef beside those lines.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#if defined(__AVX512F__) && defined(__AVX512DQ__)
#include <immintrin.h>
#define HAS_AVX512
#endif

// As many floats in a vector as one register holds: wider ones compile too, to code that is ten times slower.
#ifndef LANES
#if defined(HAS_AVX512)
#define LANES 16
#elif defined(__AVX__)
#define LANES 8
#else
#define LANES 4
#endif
#endif

namespace {
constexpr int W = LANES;  // floats a vector
typedef float vec __attribute__((vector_size(4 * W)));
typedef int32_t ivec __attribute__((vector_size(4 * W)));
typedef uint32_t uvec __attribute__((vector_size(4 * W)));
typedef uint16_t hvec __attribute__((vector_size(2 * W)));

// The upper half of a float: its sign, its exponent and seven bits of its fraction.
struct bf16 {
  uint16_t bits;
};

template <class To, class From>
inline To as(From v) {  // the same bits, read as another type
  static_assert(sizeof(To) == sizeof(From), "as many bits");
  To out;
  std::memcpy(&out, &v, sizeof out);
  return out;
}

inline vec splat(float a) { return vec{} + a; }  // one broadcast; a loop over lanes is sixteen

inline vec load(const float* p) {
  vec v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

inline vec load(const bf16* p) {
  hvec half;
  std::memcpy(&half, p, sizeof half);
#ifdef HAS_AVX512
  return as<vec>(_mm512_slli_epi32(_mm512_cvtepu16_epi32(as<__m256i>(half)), 16));
#else
  return as<vec>(__builtin_convertvector(half, uvec) << 16);
#endif
}

inline void store(float* p, vec v) { std::memcpy(p, &v, sizeof v); }

inline void store(bf16* p, vec v) {  // rounded to the nearest, ties to even
#ifdef __AVX512BF16__
  auto half = _mm512_cvtneps_pbh(__m512(v));
#else
  uvec bits = as<uvec>(v);
  hvec half = __builtin_convertvector((bits + 0x7fff + ((bits >> 16) & 1)) >> 16, hvec);
#endif
  std::memcpy(p, &half, sizeof half);
}

template <class T>
inline vec load(const T* p, long n) {  // the first n lanes, zeros behind them
  if (n >= W) return load(p);
  T lanes[W] = {};
  std::memcpy(lanes, p, n * sizeof(T));
  return load(lanes);
}

template <class T>
inline void store(T* p, vec v, long n) {
  if (n >= W) return store(p, v);
  T lanes[W];
  store(lanes, v);
  std::memcpy(p, lanes, n * sizeof(T));
}

inline vec clamp(vec v, float low, float high) {
  vec a = splat(low), b = splat(high);
#ifdef HAS_AVX512
  return vec(_mm512_min_ps(_mm512_max_ps(__m512(v), __m512(a)), __m512(b)));
#endif
  v = v < a ? a : v;
  return v > b ? b : v;
}

// 2^v: the whole part goes into the exponent, the rest into a polynomial; relative error 1e-7 for
// v in (-126, 126), and without AVX-512 the value at the nearer end beyond.
inline vec exp2v(vec v) {
#ifdef HAS_AVX512
  vec r = vec(_mm512_reduce_ps(__m512(v), 0x09));  // v - floor(v)
  vec p = splat(1.867130496e-3f);
  p = p * r + splat(9.017029415e-3f);
  p = p * r + splat(5.579991376e-2f);
  p = p * r + splat(2.401644500e-1f);
  p = p * r + splat(6.931513118e-1f);
  p = p * r + splat(1.f);
  return vec(_mm512_scalef_ps(__m512(p), __m512(v)));  // p times 2^floor(v)
#else
  v = clamp(v, -126.f, 126.f);
  const vec magic = splat(12582912.f);  // 1.5 * 2^23: adding it rounds to the nearest integer
  vec shifted = v + magic;
  vec r = v - (shifted - magic);
  vec p = splat(1.326472725e-3f);
  p = p * r + splat(9.671512786e-3f);
  p = p * r + splat(5.550733744e-2f);
  p = p * r + splat(2.402224208e-1f);
  p = p * r + splat(6.931469776e-1f);
  p = p * r + splat(1.f);
  return as<vec>(as<ivec>(p) + (as<ivec>(shifted) << 23));
#endif
}

constexpr float LOG2E = 1.44269504f;
inline vec expv(vec v) { return exp2v(v * splat(LOG2E)); }

inline vec reciprocal(vec v) {  // of numbers whose reciprocal is a normal float
#ifdef HAS_AVX512
  vec guess = vec(_mm512_rcp14_ps(__m512(v)));  // 14 bits, and one step of Newton's method
  return guess * (splat(2.f) - v * guess);
#else
  return splat(1.f) / v;
#endif
}

inline vec sigmoid(vec v) { return reciprocal(splat(1.f) + expv(-clamp(v, -80.f, 80.f))); }

// log(1 + e^v) = max(v, 0) + log1p(u) with u = e^-|v|; log1p(u) / u is a polynomial, to 3e-8.
inline vec softplus(vec v) {
  vec positive = clamp(v, 0.f, INFINITY);
  vec u = expv(v - positive - positive);
  vec p = splat(5.232694605e-3f);
  p = p * u + splat(-2.950524322e-2f);
  p = p * u + splat(7.822596503e-2f);
  p = p * u + splat(-1.366324753e-1f);
  p = p * u + splat(1.910600796e-1f);
  p = p * u + splat(-2.484298266e-1f);
  p = p * u + splat(3.331909689e-1f);
  p = p * u + splat(-4.999949315e-1f);
  p = p * u + splat(1.f);
  return positive + p * u;
}

inline float total(vec v) {
#ifdef HAS_AVX512
  return _mm512_reduce_add_ps(__m512(v));
#endif
  float s[W];
  std::memcpy(s, &v, sizeof s);
  for (int half = W / 2; half; half /= 2)
    for (int i = 0; i < half; i++) s[i] += s[i + half];
  return s[0];
}
}  // namespace
