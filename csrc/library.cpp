// Registers every launcher of ops.h with PyTorch, through the LibTorch stable ABI: one shared object for every supported
// version. The schema of an op follows from its C++ signature: all its arrays are `Tensor?`, outputs too, and before them
// stands a tensor that says on which device to run. fastvit/cuda/ is the only caller.
//
// Built with g++ and FASTVIT_HOST, the same ops take CPU tensors and run in tests/emulator.

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <mutex>
#include <optional>
#include <string>

#include "ops.h"

#ifdef FASTVIT_HOST
#include "host.h"
#define FASTVIT_NAMESPACE fastvit_emulated
#define FASTVIT_KEY CPU
#else
#include <cuda_runtime_api.h>
#define FASTVIT_NAMESPACE fastvit_cuda
#define FASTVIT_KEY CUDA
#endif

namespace fastvit {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

DType dtype_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return DType::float32;
    case ScalarType::Half: return DType::float16;
    case ScalarType::BFloat16: return DType::bfloat16;
    case ScalarType::Byte: return DType::uint8;
    case ScalarType::Int: return DType::int32;
    case ScalarType::Long: return DType::int64;
    default: throw error("dtype not supported; accepted: float32, float16, bfloat16, uint8, int32, int64");
  }
}

Array array(const std::optional<Tensor>& tensor) {
  Array result;
  if (!tensor) return result;
  if (tensor->dim() < 1 || tensor->dim() > kMaxDims) throw error(tensor->dim(), " dimensions; accepted: 1 to ", kMaxDims);
  result.data = tensor->data_ptr();
  result.dtype = dtype_of(*tensor);
  result.dims = static_cast<int>(tensor->dim());
  for (int i = result.dims - 1; i >= 0; --i) {
    result.size[i] = tensor->size(i);
    const bool last = i == result.dims - 1;
    const int64_t dense = last ? 1 : result.size[i + 1] * result.stride[i + 1];
    const bool free = result.size[i] == 1 || tensor->numel() == 0;  // PyTorch's stride may be anything there
    result.stride[i] = free ? dense : tensor->stride(i);
  }
  return result;
}

#ifdef FASTVIT_HOST

int assumed_architecture = 80;

void assume(const Tensor, int64_t architecture) { assumed_architecture = static_cast<int>(architecture); }

Device device_of(const Tensor&) {
  const int arch = assumed_architecture;
  return {arch, 4, arch == 90 || arch == 100 ? 232448 : arch == 80 ? 166912 : 101376, nullptr};
}

// Kernels may touch the arrays they were given and nothing else.
struct Scope {
  template <class... A>
  explicit Scope(const A&... arguments) { (allow(arguments), ...); }
  ~Scope() { host::forget_allocations(); }

  static void allow(const Array& a) {
    if (!a || a.elements() == 0) return;
    int64_t last = 0;
    for (int i = 0; i < a.dims; ++i) last += (a.size[i] - 1) * a.stride[i];
    host::allocation(a.data, (last + 1) * bytes(a.dtype));
  }
  static void allow(const AttentionOptions& m) {
#define FASTVIT_ALLOW(name) allow(m.name);
#define FASTVIT_SKIP(name)
    FASTVIT_ATTENTION_OPTIONS(FASTVIT_ALLOW, FASTVIT_SKIP, FASTVIT_SKIP)
#undef FASTVIT_ALLOW
#undef FASTVIT_SKIP
  }
  template <class T> static void allow(const T&) {}
};

#else

Device device_of(const Tensor& tensor) {
  constexpr int kDevices = 64;
  static Device known[kDevices];
  static std::mutex filling;
  const int index = tensor.get_device_index();
  if (index < 0 || index >= kDevices) throw error("device ", index, "; accepted: 0 to ", kDevices - 1);
  const std::lock_guard lock(filling);
  Device device = known[index];
  if (device.architecture == 0) {
    const auto attribute = [index](cudaDeviceAttr which) {
      int value = 0;
      const cudaError_t status = cudaDeviceGetAttribute(&value, which, index);
      if (status != cudaSuccess) throw error("CUDA: ", cudaGetErrorString(status));
      return value;
    };
    device.multiprocessors = attribute(cudaDevAttrMultiProcessorCount);
    device.shared_bytes = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
    device.architecture =
        attribute(cudaDevAttrComputeCapabilityMajor) * 10 + attribute(cudaDevAttrComputeCapabilityMinor);
    known[index] = device;
  }
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index, &stream));
  device.stream = static_cast<CUstream_st*>(stream);
  return device;
}

struct Scope {
  template <class... A>
  explicit Scope(const A&...) {}
};

#endif

// How each parameter arrives from PyTorch, its name in a schema, and what the launcher gets.
template <class P> struct Parameter {
  using Boxed = P;
  static P unbox(const Boxed& value) { return value; }
};
template <> struct Parameter<const Array&> {
  using Boxed = std::optional<Tensor>;
  static Array unbox(const Boxed& value) { return array(value); }
};
template <> struct Parameter<const std::string&> {
  using Boxed = std::string;
  static std::string unbox(const Boxed& value) { return value; }
};

template <class T> constexpr const char* schema_name = nullptr;
template <> constexpr const char* schema_name<const Array&> = "Tensor?";
template <> constexpr const char* schema_name<const std::string&> = "str";
template <> constexpr const char* schema_name<double> = "float";
template <> constexpr const char* schema_name<int64_t> = "int";
template <> constexpr const char* schema_name<void> = "()";

template <auto launcher, class... P>
auto run(const Tensor& on, const P&... arguments) {
#ifndef FASTVIT_HOST
  const torch::stable::accelerator::DeviceGuard guard(on.get_device_index());
  // Since CUDA 12 this binds the device's context to the thread, which tensor maps need, and autograd's may lack.
  if (const cudaError_t status = cudaSetDevice(on.get_device_index())) {
    throw error("CUDA: ", cudaGetErrorString(status));
  }
#endif
  const Device device = device_of(on);
  const Scope scope(arguments...);
  return launcher(device, arguments...);
}

template <class... P>
std::string schema_of(const char* name, const char* result, const char* options = "") {
  std::string text = std::string(name) + "(Tensor on" + options;
  int i = 0;
  ((text += std::string(", ") + schema_name<P> + " x" + std::to_string(i++)), ...);
  return text + ") -> " + result;
}

template <auto launcher, class F = decltype(launcher)> struct Op;
template <auto launcher, class R, class... P>
struct Op<launcher, R (*)(const Device&, P...)> {
  static R call(const Tensor on, typename Parameter<P>::Boxed... boxed) {
    return run<launcher>(on, Parameter<P>::unbox(boxed)...);
  }
  static std::string schema(const char* name) { return schema_of<P...>(name, schema_name<R>); }
};

// Attention's options come one by one, before the other arguments and under their names.
template <auto launcher, class R, class... P>
struct Op<launcher, R (*)(const Device&, const AttentionOptions&, P...)> {
#define FASTVIT_ARRAY(name) const std::optional<Tensor> name,
#define FASTVIT_INTEGER(name) const int64_t name,
#define FASTVIT_REAL(name) const double name,
  static R call(
      const Tensor on, FASTVIT_ATTENTION_OPTIONS(FASTVIT_ARRAY, FASTVIT_INTEGER, FASTVIT_REAL)
      typename Parameter<P>::Boxed... boxed) {
#undef FASTVIT_ARRAY
#undef FASTVIT_INTEGER
#undef FASTVIT_REAL
#define FASTVIT_ARRAY(name) array(name),
#define FASTVIT_NUMBER(name) name,
    const AttentionOptions options{FASTVIT_ATTENTION_OPTIONS(FASTVIT_ARRAY, FASTVIT_NUMBER, FASTVIT_NUMBER)};
#undef FASTVIT_ARRAY
#undef FASTVIT_NUMBER
    return run<launcher>(on, options, Parameter<P>::unbox(boxed)...);
  }

  static std::string schema(const char* name) {
#define FASTVIT_ARRAY(name) ", Tensor? " #name
#define FASTVIT_INTEGER(name) ", int " #name
#define FASTVIT_REAL(name) ", float " #name
    return schema_of<P...>(
        name, schema_name<R>, FASTVIT_ATTENTION_OPTIONS(FASTVIT_ARRAY, FASTVIT_INTEGER, FASTVIT_REAL));
#undef FASTVIT_ARRAY
#undef FASTVIT_INTEGER
#undef FASTVIT_REAL
  }
};

}  // namespace
}  // namespace fastvit

#define FASTVIT_OPS(_)               \
  _(layer_norm_forward)              \
  _(layer_norm_backward)             \
  _(layer_norm_programs)             \
  _(sum_partials)                    \
  _(scale_rows)                      \
  _(gated_forward)                   \
  _(activation_gradient)             \
  _(linear_forward)                  \
  _(fold_norm)                       \
  _(linear_folded_forward)           \
  _(linear_input_gradient)           \
  _(linear_weight_gradient)          \
  _(linear_weight_gradient_splits)   \
  _(finish_weight_gradient)          \
  _(attention_forward)               \
  _(attention_query_gradient)        \
  _(attention_key_value_gradient)    \
  _(attention_bias_gradient)         \
  _(attention_table_gradient)        \
  _(attention_rel_pos_keys_gradient)    \
  _(attention_rows)                  \
  _(attention_distance)              \
  _(attention_distance_blocks)       \
  _(apply_rotary)                    \
  _(patch_embed_forward)             \
  _(patch_embed_weight_gradient)     \
  _(patch_embed_weight_gradient_splits) \
  _(patch_embed_image_gradient)      \
  _(patch_embed_packed_forward)      \
  _(patch_embed_packed_weight_gradient)

STABLE_TORCH_LIBRARY(FASTVIT_NAMESPACE, m) {
#define FASTVIT_DEFINE(name) m.def(fastvit::Op<&fastvit::name>::schema(#name).c_str());
  FASTVIT_OPS(FASTVIT_DEFINE)
#ifdef FASTVIT_HOST
  m.def("assume(Tensor on, int architecture) -> ()");
#endif
}

STABLE_TORCH_LIBRARY_IMPL(FASTVIT_NAMESPACE, FASTVIT_KEY, m) {
#define FASTVIT_IMPLEMENT(name) m.impl(#name, TORCH_BOX((&fastvit::Op<&fastvit::name>::call)));
  FASTVIT_OPS(FASTVIT_IMPLEMENT)
#ifdef FASTVIT_HOST
  m.impl("assume", TORCH_BOX((&fastvit::assume)));
#endif
}
