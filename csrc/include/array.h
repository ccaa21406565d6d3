// What a launcher is given: tensors without PyTorch, so that no kernel file includes its headers.
#pragma once

#include <cstdint>
#include <sstream>
#include <stdexcept>
#include <string>

struct CUstream_st;

namespace fastvit {

enum class DType { float32, float16, bfloat16, uint8, int32, int64 };

constexpr int bytes(DType dtype) {
  constexpr int sizes[] = {4, 2, 2, 1, 4, 8};
  return sizes[static_cast<int>(dtype)];
}

constexpr bool is_floating(DType dtype) { return dtype <= DType::bfloat16; }

inline const char* name(DType dtype) {
  constexpr const char* names[] = {"float32", "float16", "bfloat16", "uint8", "int32", "int64"};
  return names[static_cast<int>(dtype)];
}

constexpr int kMaxDims = 5;

// A tensor, or none (data is null and dims is 0). Strides count elements.
struct Array {
  void* data = nullptr;
  DType dtype = DType::float32;
  int dims = 0;
  int64_t size[kMaxDims] = {};
  int64_t stride[kMaxDims] = {};

  explicit operator bool() const { return dims > 0; }

  template <class T>
  T* as() const { return static_cast<T*>(data); }

  int64_t elements() const {
    int64_t product = dims > 0;
    for (int i = 0; i < dims; ++i) product *= size[i];
    return product;
  }
};

// Where a launcher runs: a device's current stream, and what its tiles are chosen by.
struct Device {
  int architecture = 0;  // major * 10 + minor: 80, 86, 89, 90, 100, 120
  int multiprocessors = 0;
  int shared_bytes = 0;  // that one block may use: 232448 on 90 and 100, 166912 on 80, 101376 on 86, 89 and 120
  CUstream_st* stream = nullptr;
};

// throw error("attention: head dim ", d, "; accepted: multiples of 8 from 32 to 128");
template <class... Parts>
std::runtime_error error(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  return std::runtime_error(text.str());
}

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace fastvit
