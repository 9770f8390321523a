// Sixteen floats in one vector, and the few functions of them that the kernels need. GCC's and
// clang's vector extensions: no intrinsics, so the same lines run on any processor.
#pragma once
#include <cmath>
#include <cstring>

namespace {
constexpr int W = 16;  // floats a vector
typedef float vec __attribute__((vector_size(4 * W)));
typedef int ivec __attribute__((vector_size(4 * W)));

inline vec splat(float a) { return vec{} + a; }  // one broadcast; a loop over lanes is sixteen
inline vec load(const float* p) { vec v; std::memcpy(&v, p, sizeof v); return v; }
inline void store(float* p, vec v) { std::memcpy(p, &v, sizeof v); }
inline vec load(const float* p, int n) {  // the first n lanes, zeros behind them
  if (n >= W) return load(p);
  vec v = {};
  for (int i = 0; i < n; i++) v[i] = p[i];
  return v;
}
inline void store(float* p, vec v, int n) {
  if (n >= W) store(p, v); else for (int i = 0; i < n; i++) p[i] = v[i];
}
inline vec clamp(vec v, float low, float high) {
  vec a = splat(low), b = splat(high);
  v = v < a ? a : v;
  return v > b ? b : v;
}
// 2^v: the whole part goes into the exponent, the rest (|r| <= 1/2) into a polynomial.
inline vec exp2v(vec v) {
  v = clamp(v, -126.f, 126.f);
  const vec magic = splat(12582912.f);  // 1.5 * 2^23: adding it rounds to the nearest integer
  vec shifted = v + magic;
  vec r = v - (shifted - magic);
  ivec whole; std::memcpy(&whole, &shifted, sizeof whole);
  vec p = splat(1.5403530e-4f);
  p = p * r + splat(1.3333558e-3f); p = p * r + splat(9.6181291e-3f);
  p = p * r + splat(5.5504109e-2f); p = p * r + splat(2.4022651e-1f);
  p = p * r + splat(6.9314718e-1f); p = p * r + splat(1.f);
  ivec bits; std::memcpy(&bits, &p, sizeof bits);
  bits += (whole << 23);
  std::memcpy(&p, &bits, sizeof p);
  return p;
}
constexpr float LOG2E = 1.44269504f;
inline vec expv(vec v) { return exp2v(v * splat(LOG2E)); }
inline vec sigmoid(vec v) { return splat(1.f) / (splat(1.f) + expv(-v)); }
// log(1 + e^v) = max(v, 0) + log1p(u) with u = e^-|v|, and log1p(u) = 2 atanh(u / (2 + u)).
inline vec softplus(vec v) {
  vec zero = {}, positive = v > zero ? v : zero;
  vec u = expv(v > zero ? -v : v), q = u / (splat(2.f) + u), q2 = q * q;
  vec p = splat(2.f / 13);
  for (int k = 11; k > 0; k -= 2) p = p * q2 + splat(2.f / k);
  return positive + p * q;
}
inline float total(vec v) {
  float s[W]; std::memcpy(s, &v, sizeof s);
  for (int half = W / 2; half; half /= 2) for (int i = 0; i < half; i++) s[i] += s[i + half];
  return s[0];
}
}  // namespace
