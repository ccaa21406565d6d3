// Rotary position embeddings: q and k turned by their positions in one pass over both, as kernels/triton/rope.py.
//
// A thread owns N pairs (i, i + d/2) of one token, whose cosines and sines stay in its registers for q and k and for all
// its heads: 16 bytes of each half at a time where d is a multiple of 16, else 8.
#include <algorithm>

#include "ops.h"
#include "vectors.cuh"

namespace fastvit {
namespace {

constexpr int kThreads = 128;

// (B, T, H, d), last stride 1.
template <class T>
struct Heads {
  T* data;
  int64_t image, token, head;  // strides
};

template <class T>
Heads<T> heads_of(const Array& a) { return {a.as<T>(), a.stride[0], a.stride[1], a.stride[2]}; }

// (B or 1, T', d) of any dtype.
struct Angles {
  const void* data;
  DType dtype;
  int64_t image;  // stride; 0: the same for every image
};

template <int N>
__device__ __forceinline__ void load_angles(float (&to)[N], const Angles& angles, int64_t at) {
  with_type<Any>(angles.dtype, [&](auto type) {
    Vector<decltype(type), N> read;
    load<decltype(type)>(read, static_cast<const decltype(type)*>(angles.data) + at);
#pragma unroll
    for (int i = 0; i < N; ++i) to[i] = to_float(read.at[i]);
  });
}

template <class T, int N>
__global__ void __launch_bounds__(kThreads) apply_rotary_kernel(
    Heads<T> q,      // (B, T, H, d)
    Heads<T> k,      // (B, T, H, d)
    Heads<T> q_out,  // (B, T, H, d)
    Heads<T> k_out,  // (B, T, H, d)
    Angles cos,      // (T', d) or (B, T', d)
    Angles sin,      // like cos
    int64_t rows,    // B T
    int tokens,      // T
    int heads,       // H
    int heads_per_block,
    int prefix,      // T - T': tokens that stay as they are
    int half_dim,    // d / 2
    bool inverse) {
  const int lanes = half_dim / N, together = kThreads / lanes, place = threadIdx.x / lanes;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * together + place;
  if (place >= together || row >= rows) return;
  const int64_t image = row / tokens;
  const int token = static_cast<int>(row % tokens), column = threadIdx.x % lanes * N;

  // What each half keeps of itself and takes from the other; a token of the prefix keeps all.
  float keep[2][N], take[2][N];
#pragma unroll
  for (int i = 0; i < N; ++i) {
    keep[0][i] = keep[1][i] = 1;
    take[0][i] = take[1][i] = 0;
  }
  if (token >= prefix) {
    const int64_t at = static_cast<int64_t>(token - prefix) * 2 * half_dim + column;
    load_angles(keep[0], cos, image * cos.image + at);
    load_angles(keep[1], cos, image * cos.image + at + half_dim);
    load_angles(take[0], sin, image * sin.image + at);
    load_angles(take[1], sin, image * sin.image + at + half_dim);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      // The transpose, which is the inverse where both halves have the same angles, takes back what was given.
      const float first = take[0][i], second = take[1][i];
      take[0][i] = inverse ? second : -first;
      take[1][i] = inverse ? -first : second;
    }
  }

  const auto turn = [&](const Heads<T>& from, const Heads<T>& to, int head) {
    const T* x = from.data + image * from.image + token * from.token + head * from.head + column;
    T* y = to.data + image * to.image + token * to.token + head * to.head + column;
    Vector<T, N> first, second;
    load<T>(first, x);
    load<T>(second, x + half_dim);
    float low[N], high[N];
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const float a = to_float(first.at[i]), b = to_float(second.at[i]);
      low[i] = fmaf(b, take[0][i], a * keep[0][i]);
      high[i] = fmaf(a, take[1][i], b * keep[1][i]);
    }
    store(y, low);
    store(y + half_dim, high);
  };
  const int start = blockIdx.y * heads_per_block, end = min(start + heads_per_block, heads);
#pragma unroll 2
  for (int head = start; head < end; ++head) {
    turn(q, q_out, head);
    turn(k, k_out, head);
  }
}

void require_heads(const char* what, const Array& a, const Array& like) {
  const bool same = a.dims == 4 && std::equal(a.size, a.size + 4, like.size);
  require(same && a.dtype == like.dtype && a.stride[3] == 1, "apply_rotary: ", what, "; accepted: q's shape and dtype, ",
          "with a unit last stride");
  for (int i = 0; i < 3; ++i) {
    require(a.stride[i] % 8 == 0, "apply_rotary: ", what, " has a stride of ", a.stride[i], "; accepted: multiples of 8");
  }
  require(reinterpret_cast<uintptr_t>(a.data) % 16 == 0, "apply_rotary: ", what, "; accepted: at a multiple of 16 bytes");
}

}  // namespace

void apply_rotary(
    const Device& device, const Array& q, const Array& k, const Array& cos, const Array& sin, int64_t inverse,
    const Array& q_out, const Array& k_out) {
  require(q.dims == 4 && (q.dtype == DType::float16 || q.dtype == DType::bfloat16), "apply_rotary: q is ", name(q.dtype),
          "; accepted: (B, T, H, d) float16, bfloat16");
  const int64_t batch = q.size[0], tokens = q.size[1], heads = q.size[2], dim = q.size[3];
  require(dim % 8 == 0 && dim <= 1024, "apply_rotary: head dim ", dim, "; accepted: multiples of 8 up to 1024");
  require_heads("q", q, q);
  require_heads("k", k, q);
  require_heads("q_out", q_out, q);
  require_heads("k_out", k_out, q);
  for (const Array* each : {&cos, &sin}) {
    const int last = each->dims - 1;
    require((last == 1 || (last == 2 && each->size[0] == batch)) && each->size[last] == dim && each->dtype == cos.dtype &&
                each->size[last - 1] == cos.size[cos.dims - 2] && each->size[last - 1] <= tokens,
            "apply_rotary: cos or sin; accepted: (T', ", dim, ") or (", batch, ", T', ", dim, ") with T' up to ", tokens);
    require(each->dtype != DType::uint8 && reinterpret_cast<uintptr_t>(each->data) % 16 == 0 && each->stride[last] == 1 &&
                each->stride[last - 1] == dim,
            "apply_rotary: cos or sin; accepted: float32, float16 or bfloat16, contiguous, at a multiple of 16 bytes");
  }
  const int64_t rows = batch * tokens;
  if (rows == 0) return;
  const int n = dim % 16 == 0 ? 8 : 4;
  const int64_t blocks = ceil_div(rows, kThreads / (dim / 2 / n));
  // Few blocks are shared out by heads.
  const int64_t per_block = blocks >= 4 * device.multiprocessors ? heads : 1, groups = ceil_div(heads, per_block);
  require(blocks < (int64_t{1} << 31) && tokens < (int64_t{1} << 31) && groups < 65536, "apply_rotary: ", rows, " tokens of ",
          heads, " heads; accepted: up to 2^31 blocks, 65535 heads");
  const auto angles = [](const Array& a) { return Angles{a.data, a.dtype, a.dims == 3 ? a.stride[0] : 0}; };
  const auto run = [&](auto type, auto vector) {
    using T = decltype(type);
    launch(device, apply_rotary_kernel<T, vector()>, dim3(static_cast<unsigned>(blocks), static_cast<unsigned>(groups)), kThreads,
           0, heads_of<T>(q), heads_of<T>(k), heads_of<T>(q_out), heads_of<T>(k_out), angles(cos), angles(sin), rows,
           static_cast<int>(tokens), static_cast<int>(heads), static_cast<int>(per_block),
           static_cast<int>(tokens - cos.size[cos.dims - 2]), static_cast<int>(dim / 2), inverse != 0);
  };
  const auto run_typed = [&](auto vector) {
    if (q.dtype == DType::float16) {
      run(half(), vector);
    } else {
      run(bfloat16(), vector);
    }
  };
  if (n == 8) {
    run_typed(std::integral_constant<int, 8>());
  } else {
    run_typed(std::integral_constant<int, 4>());
  }
}

}  // namespace fastvit
