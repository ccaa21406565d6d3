// Activations for the epilogues of the GEMMs and for the elementwise kernels.
//
// Every one is x g(x) with a gate g between 0 and 1, so one function gives the value x g and the slope g + x g'. "gelu"
// is the exact (erf) form, "gelu_tanh" its tanh approximation (Hendrycks and Gimpel, arXiv:1606.08415), "quick_gelu"
// CLIP's x sigmoid(1.702 x); "swiglu" (Shazeer, arXiv:2002.05202) stands for its gating half, x sigmoid(x).
//
// A gate costs one exponential and, but for "gelu", one reciprocal, both single instructions of the special function
// unit; no branch and no division, so that the elements of an accumulator interleave.
#pragma once

#include <string>

#include "ptx.cuh"

namespace fastvit {

enum class Activation { none, gelu, gelu_tanh, quick_gelu, swiglu };

// "" is none. "swiglu" pairs distant columns, so no epilogue takes it.
inline Activation parse_activation(const char* op, const std::string& text, bool swiglu = false) {
  constexpr const char* names[] = {"", "gelu", "gelu_tanh", "quick_gelu", "swiglu"};
  for (int i = 0; i < (swiglu ? 5 : 4); ++i) {
    if (text == names[i]) return static_cast<Activation>(i);
  }
  throw error(op, ": unknown activation \"", text, "\"; accepted: \"\", gelu, gelu_tanh, quick_gelu",
              swiglu ? ", swiglu" : "");
}

__device__ __forceinline__ float sigmoid(float x) { return ptx::reciprocal(1 + ptx::exp2(-kLog2e * x)); }

// The normal distribution function. Its logarithm is smooth: P(-t) = 2^p(t) for t >= 0, where p is the polynomial of
// least error in 2^p on 0 <= t <= 6, relative below 3e-3 of the maximum and absolute above it. Evaluated in float32, P
// is right to 4.1e-8 (erf's way, 0.5 + 0.5 erf(x / sqrt 2), to 6e-8) and to 6e-6 of itself down to P(-6) = 1e-9, where
// erf's way cancels. Past 6, p falls faster than the logarithm, so that x P(x) goes to 0.
__device__ __forceinline__ float normal_distribution(float x) {
  constexpr float coefficients[] = {
      -9.563987077854108e-6f, 6.876934639876708e-5f, -2.549474302213639e-4f, -4.762271782965399e-5f,
      7.000850047916174e-3f, -5.247512832283974e-2f, -0.45921045541763306f, -1.1511054039001465f,
      -1.0f};
  const float t = fabsf(x);
  float p = fmaf(-2.318328817807469e-8f, t, 7.206659802250215e-7f);
#pragma unroll
  for (int i = 0; i < 9; ++i) p = fmaf(p, t, coefficients[i]);
  const float tail = ptx::exp2(p);
  return x < 0 ? tail : 1 - tail;
}

struct Gate {
  float value;
  float slope;  // costs nothing where it is not used
};

template <Activation A>
__device__ __forceinline__ Gate gate(float x) {
  static_assert(A != Activation::none);
  if constexpr (A == Activation::gelu) {
    return {normal_distribution(x), 0.3989422804014327f * ptx::exp2(-0.5f * kLog2e * x * x)};
  } else if constexpr (A == Activation::gelu_tanh) {  // (1 + tanh u) / 2 = sigmoid(2u)
    constexpr float c = 1.5957691216057308f;          // 2 sqrt(2 / pi)
    const float g = sigmoid(c * x * fmaf(0.044715f * x, x, 1));
    return {g, g * (1 - g) * c * fmaf(0.134145f * x, x, 1)};
  } else {
    constexpr float c = A == Activation::quick_gelu ? 1.702f : 1.0f;
    const float g = sigmoid(c * x);
    return {g, c * g * (1 - g)};
  }
}

// act(x).
template <Activation A>
__device__ __forceinline__ float activate(float x) {
  if constexpr (A == Activation::none) return x;
  else return x * gate<A>(x).value;
}

struct Activated {
  float value;
  float slope;
};

// act(x) and act'(x).
template <Activation A>
__device__ __forceinline__ Activated activate_with_slope(float x) {
  if constexpr (A == Activation::none) {
    return {x, 1};
  } else {
    const Gate g = gate<A>(x);
    return {x * g.value, fmaf(x, g.slope, g.value)};
  }
}

}  // namespace fastvit
