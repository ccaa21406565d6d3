// Activations for the epilogues of the GEMMs and for the elementwise kernels: a function for each, of its name in
// fastvit/activations.py, that returns the value and the slope. To add one, write it and name it in FASTVIT_ACTIVATIONS.
//
// "gelu" is the exact (erf) form, "gelu_tanh" its tanh approximation (Hendrycks and Gimpel, arXiv:1606.08415),
// "quick_gelu" CLIP's x sigmoid(1.702 x), "relu_squared" that of Primer (So et al., arXiv:2109.08668).
//
// GELUs and SiLU cost one exponential and, but for "gelu", one reciprocal, both single instructions of the special
// function unit; no branch and no division, so that the elements of an accumulator interleave.
#pragma once

#include <string>

#include "ptx.cuh"

namespace fastvit {

struct Activated {
  float value;
  float slope;  // costs nothing where it is not used
};

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

// x g(x) of a gate g between 0 and 1 with the slope g'.
__device__ __forceinline__ Activated gate(float x, float g, float slope) { return {x * g, fmaf(x, slope, g)}; }

__device__ __forceinline__ Activated gelu(float x) {
  return gate(x, normal_distribution(x), 0.3989422804014327f * ptx::exp2(-0.5f * kLog2e * x * x));
}

__device__ __forceinline__ Activated gelu_tanh(float x) {  // (1 + tanh u) / 2 = sigmoid(2u)
  constexpr float c = 1.5957691216057308f;                 // 2 sqrt(2 / pi)
  const float g = sigmoid(c * x * fmaf(0.044715f * x, x, 1));
  return gate(x, g, g * (1 - g) * c * fmaf(0.134145f * x, x, 1));
}

__device__ __forceinline__ Activated quick_gelu(float x) {
  constexpr float c = 1.702f;
  const float g = sigmoid(c * x);
  return gate(x, g, c * g * (1 - g));
}

__device__ __forceinline__ Activated relu(float x) { return {x < 0 ? 0 : x, x > 0 ? 1.0f : 0.0f}; }  // NaN stays NaN

__device__ __forceinline__ Activated relu_squared(float x) {
  const float positive = relu(x).value;
  return {positive * positive, 2 * positive};
}

__device__ __forceinline__ Activated silu(float x) {
  const float g = sigmoid(x);
  return gate(x, g, g * (1 - g));
}

#define FASTVIT_ACTIVATIONS(_) _(gelu) _(gelu_tanh) _(quick_gelu) _(relu) _(relu_squared) _(silu)

#define FASTVIT_ENUMERATOR(name) , name
enum class Activation { none FASTVIT_ACTIVATIONS(FASTVIT_ENUMERATOR) };
#undef FASTVIT_ENUMERATOR

// "" is none.
inline Activation parse_activation(const char* op, const std::string& text) {
  if (text.empty()) return Activation::none;
#define FASTVIT_PARSE(name) \
  if (text == #name) return Activation::name;
  FASTVIT_ACTIVATIONS(FASTVIT_PARSE)
#undef FASTVIT_PARSE
#define FASTVIT_NAME(name) ", " #name
  throw error(op, ": unknown activation \"", text, "\"; accepted: \"\"" FASTVIT_ACTIVATIONS(FASTVIT_NAME));
#undef FASTVIT_NAME
}

// f(act) for the function act that `activation` names at run time; nothing for none. A uniform branch: a template
// argument would multiply the kernels by the activations.
template <class F>
__device__ __forceinline__ void with_activation(Activation activation, F&& f) {
#define FASTVIT_CASE(name) \
  if (activation == Activation::name) return f([](float x) { return name(x); });
  FASTVIT_ACTIVATIONS(FASTVIT_CASE)
#undef FASTVIT_CASE
}

}  // namespace fastvit
