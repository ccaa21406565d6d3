// Rows read and written 16 bytes at a time, for the kernels that only pass over memory; and values whose dtype is known
// only at run time, so that a combination of dtypes that no model has costs no instantiation.
//
// A kernel is written for N values at a time of types T. T is float, half or bfloat16, or Any: then N is 1, for dtypes
// without a kernel of their own, and for widths, strides and addresses that N values do not divide.
#pragma once

#include <type_traits>

#include "device.cuh"

namespace fastvit {

struct Any {};

template <class T> using Loaded = std::conditional_t<std::is_same_v<T, Any>, float, T>;

// An Array as a kernel takes it. data is null for none.
struct Matrix {
  void* data;      // (M, D), or (D,): one row
  int64_t stride;  // between rows
  DType dtype;

  __device__ __forceinline__ explicit operator bool() const { return data != nullptr; }
};

inline Matrix matrix(const Array& a) { return {a.data, a.dims == 2 ? a.stride[0] : 0, a.dtype}; }

// f(T()), or with Any f(float()), f(half()) or f(bfloat16()), by the dtype.
template <class T, class F>
__device__ __forceinline__ void with_type(DType dtype, F f) {
  if constexpr (!std::is_same_v<T, Any>) {
    f(T());
  } else if (dtype == DType::float32) {
    f(float());
  } else if (dtype == DType::float16) {
    f(half());
  } else {
    f(bfloat16());
  }
}

// N values of T from an address that as many bytes, or 16, divide; with Any, U is what is there.
template <class T, class U, int N>
__device__ __forceinline__ void load(Vector<Loaded<T>, N>& out, const U* from) {
  if constexpr (std::is_same_v<T, Any>) {
    static_assert(N == 1);
    out.at[0] = to_float(*from);
  } else {
    constexpr int n = N * sizeof(T) > 16 ? 16 / sizeof(T) : N;
#pragma unroll
    for (int i = 0; i < N; i += n) {
      const auto part = *reinterpret_cast<const Vector<T, n>*>(from + i);
#pragma unroll
      for (int j = 0; j < n; ++j) out.at[i + j] = part.at[j];
    }
  }
}

template <class T, int N>
__device__ __forceinline__ void store(T* to, const float (&values)[N]) {
  constexpr int n = N * sizeof(T) > 16 ? 16 / sizeof(T) : N;
#pragma unroll
  for (int i = 0; i < N; i += n) {
    Vector<T, n> part;
#pragma unroll
    for (int j = 0; j < n; ++j) part.at[j] = from_float<T>(values[i + j]);
    *reinterpret_cast<Vector<T, n>*>(to + i) = part;
  }
}

// The same for columns column .. column + N - 1 of a row of m.
template <class T, int N>
__device__ __forceinline__ void load(Vector<Loaded<T>, N>& out, const Matrix& m, int64_t row, int column) {
  with_type<T>(m.dtype, [&](auto type) {
    load<T>(out, static_cast<const decltype(type)*>(m.data) + row * m.stride + column);
  });
}

template <class T, int N>
__device__ __forceinline__ void store(const Matrix& m, int64_t row, int column, const float (&values)[N]) {
  with_type<T>(m.dtype, [&](auto type) {
    store(static_cast<decltype(type)*>(m.data) + row * m.stride + column, values);
  });
}

// Whether N values at a time can be read everywhere in a: none, or an address, a row stride and a width that suit.
inline bool suits(const Array& a, int n) {
  if (!a) return true;
  const int unit = n * bytes(a.dtype) < 16 ? n * bytes(a.dtype) : 16;
  return reinterpret_cast<uintptr_t>(a.data) % unit == 0 && a.size[a.dims - 1] % n == 0 &&
         (a.dims == 1 || a.stride[0] % n == 0);
}

template <class... Parts>
void require(bool condition, const Parts&... parts) {
  if (!condition) throw error(parts...);
}

// How many of `rows` rows share an entry of row_scale (B,), or none.
inline int rows_per_image(const char* op, const Array& row_scale, int64_t rows) {
  if (!row_scale) return 1;
  require(row_scale.dtype == DType::float32, op, ": row_scale is ", name(row_scale.dtype), "; accepted: float32");
  require(row_scale.size[0] > 0 && rows % row_scale.size[0] == 0, op, ": row_scale has ", row_scale.size[0],
          " entries; accepted: a number that divides the ", rows, " rows");
  return static_cast<int>(rows / row_scale.size[0]);
}

inline void require_matrix(const char* op, const char* what, const Array& a, int64_t rows, int64_t width) {
  require(a.dims == 2 && a.size[0] == rows && a.size[1] == width && (width <= 1 || a.stride[1] == 1), op, ": ", what,
          "; accepted: (", rows, ", ", width, ") with a unit last stride");
  require(is_floating(a.dtype), op, ": ", what, " is ", name(a.dtype), "; accepted: float32, float16, bfloat16");
}

inline void require_contiguous(const char* op, const char* what, const Array& a, int64_t rows, int64_t width) {
  require_matrix(op, what, a, rows, width);
  require(rows <= 1 || a.stride[0] == width, op, ": ", what, " is strided; accepted: contiguous");
}

inline void require_vector(const char* op, const char* what, const Array& a, int64_t width) {
  require(!a || (a.dims == 1 && a.size[0] == width && is_floating(a.dtype)), op, ": ", what, "; accepted: (", width,
          ",) float32, float16, bfloat16");
}

}  // namespace fastvit
