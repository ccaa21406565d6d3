// What attention's kernels for compute capability 8.0 take besides q, k and v: a bias, a table of relative positions,
// relative position keys, a key mask, sequences packed in one row, dropout. A kernel is instantiated three times: with
// Plain, which is empty and costs nothing; with ScoreMod, where each of them is there or a null pointer; and, for the
// registers that they take, with RelPosKeys, which is ScoreMod with relative position keys (attention_diagonals.h).
//
//     x = scale * q k^T + bias, or + table[place(i, j)], or + scale * q R[i - j + T - 1]; -inf where the mask is 0
//     p = exp(x - lse)
//
// in natural units, so that a bias of any size keeps its digits. Nothing of the size of the scores is in memory: what
// belongs to a score is found from its row and column. Of a table that is one subtraction: with y = n / w the line of
// patch n and f(n) = n + y (w - 1), (yi - yj + h - 1) (2w - 1) + (xi - xj + w - 1) = f(i) - f(j) + f(h w - 1).
#pragma once

#include "attention_diagonals.h"
#include "attention_tiles.h"
#include "divisor.cuh"
#include "vectors.cuh"

namespace fastvit::sm80 {

// The highest score of a row that has seen no key. It is finite, so that 2^(-inf - it) is 0 and not NaN; twice it is not,
// so a bias of the lowest finite value masks as -inf does.
constexpr float kNoScore = -1.7e38f;

// The rows (queries, or keys) of an image that are one head's: all of a (B, T, H, d) tensor, or a sequence of it.
struct Rows {
  int64_t first;   // of the tensor's image
  int count;
  int64_t vector;  // where they begin in a (B, H, T) vector
};

struct Plain {
  static constexpr bool kScoreMod = false, kRelPosKeys = false;

  template <bool TRANSPOSED>
  struct Warp {
    template <class... A>
    __device__ __forceinline__ explicit Warp(const A&...) {}
    __device__ __forceinline__ void scores(float (&)[4], int) const {}
    __device__ __forceinline__ static constexpr bool dropping() { return false; }
    __device__ __forceinline__ void keep(bool (&)[4], int) const {}
    __device__ __forceinline__ float kept_scale() const { return 1.0f; }
  };

  __device__ __forceinline__ void stage(float*, int) const {}
  __device__ __forceinline__ Rows queries(const Place& place, int count) const { return {0, count, place.in(count)}; }
  __device__ __forceinline__ Rows keys(const Place& place, int count) const { return {0, count, place.in(count)}; }
};

// A (T,) side of the scores. begins: (n + 1,) starts of the sequences in a row of `total`, or null.
struct Packing {
  const int* begins;
  int total;

  // Whatever the starts are, no row outside the tensor is named.
  __device__ __forceinline__ Rows rows(const Place& place, int count) const {
    if (begins == nullptr) return {0, count, place.in(count)};
    const int first = min(max(begins[place.image], 0), total);
    const int end = min(max(begins[place.image + 1], first), total);
    return {first, end - first, static_cast<int64_t>(place.head) * total + first};
  }
};

// Word 0 of Philox4x32-10 (Salmon, Moraes, Dror and Shaw, 2011) for counters (low, high, third, 0), four side by side.
__device__ __forceinline__ void philox(
    uint32_t (&word)[4], const uint32_t (&low)[4], const uint32_t (&high)[4], uint32_t third, uint64_t seed) {
  uint32_t c[4][4], key[2] = {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    c[i][0] = low[i];
    c[i][1] = high[i];
    c[i][2] = third;
    c[i][3] = 0;
  }
#pragma unroll 1
  for (int round = 0; round < 10; ++round) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint64_t a = uint64_t{0xD2511F53} * c[i][0], b = uint64_t{0xCD9E8D57} * c[i][2];
      c[i][0] = static_cast<uint32_t>(b >> 32) ^ c[i][1] ^ key[0];
      c[i][2] = static_cast<uint32_t>(a >> 32) ^ c[i][3] ^ key[1];
      c[i][1] = static_cast<uint32_t>(b);
      c[i][3] = static_cast<uint32_t>(a);
    }
    key[0] += 0x9E3779B9;
    key[1] += 0xBB67AE85;
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) word[i] = c[i][0];
}

struct ScoreMod {
  static constexpr bool kScoreMod = true, kRelPosKeys = false;

  float scale;

  const void* bias;  // (B, H, Tq, Tk), strides 0 where it is broadcast; or null
  DType bias_dtype;
  int64_t bias_image, bias_head, bias_query, bias_key;

  const void* table;  // (entries, H), or null
  DType table_dtype;
  int64_t table_entry, table_head;
  int entries, width, centre;  // centre = f(h w - 1)
  int prefix;                  // 1 where a class token comes first and the last 3 entries are its own, else 0
  Divisor per_line;            // w
  bool staged;                 // the head's entries lie in shared memory, as float32

  const uint8_t* mask;  // (B, Tk), or null
  int64_t mask_image, mask_key;

  Packing packed_queries, packed_keys;

  const int64_t* seed;    // (1,), or null without dropout
  uint32_t threshold;     // what a kept weight's random word reaches
  float kept_scale = 1.0f;  // 1 / (1 - dropout_p)

  __device__ __forceinline__ Rows queries(const Place& place, int count) const {
    return packed_queries.rows(place, count);
  }
  __device__ __forceinline__ Rows keys(const Place& place, int count) const { return packed_keys.rows(place, count); }

  // Copies a head's entries of the table to shared memory, by the whole block; a barrier is the caller's.
  __device__ __forceinline__ void stage(float* to, int head) const {
    if (!staged) return;
    with_type<Any>(table_dtype, [&](auto type) {
      const auto* from = static_cast<const decltype(type)*>(table) + head * table_head;
      for (int i = threadIdx.x; i < entries; i += blockDim.x) to[i] = to_float(from[i * table_entry]);
    });
  }

  // A row or column of the scores. One that is not there, or is masked, is not `present`, and counts as the first.
  struct Token {
    int index, place;  // place: f of its patch
    bool present;
  };

  // What a warp has to know for its 16 rows of one head of one image: rows are queries, or, TRANSPOSED, keys.
  template <bool TRANSPOSED>
  struct Warp {
    const ScoreMod& all;
    const void *bias, *table;
    DType table_dtype;
    int64_t table_entry;
    const uint8_t* mask;
    int queries, keys;
    uint64_t seed;
    uint32_t plane;  // image * H + head
    Token rows[2];   // the lane's

    __device__ __forceinline__ Warp(
        const ScoreMod& all, int64_t image, int head, int heads, int queries, int keys, const float* staged, int first)
        : all(all), bias(all.bias), table(all.table), table_dtype(all.table_dtype), table_entry(all.table_entry),
          mask(all.mask), queries(queries), keys(keys), seed(0), plane(static_cast<uint32_t>(image * heads + head)) {
      const auto advanced = [](const void* from, int64_t elements, DType dtype) {
        return static_cast<const void*>(static_cast<const char*>(from) + elements * (dtype == DType::float32 ? 4 : 2));
      };
      if (bias) bias = advanced(bias, image * all.bias_image + head * all.bias_head, all.bias_dtype);
      if (all.staged) {
        table = staged;
        table_dtype = DType::float32;
        table_entry = 1;
      } else if (table) {
        table = advanced(table, head * all.table_head, table_dtype);
      }
      if (mask) mask += image * all.mask_image;
      if (all.seed) seed = static_cast<uint64_t>(*all.seed);
#pragma unroll
      for (int i = 0; i < 2; ++i) rows[i] = token<TRANSPOSED>(first + lane_id() / 4 + 8 * i);
    }

    template <bool KEY>
    __device__ __forceinline__ Token token(int index) const {
      Token token{index, 0, index < (KEY ? keys : queries)};
      if (KEY && mask && token.present) token.present = mask[index * all.mask_key] != 0;
      if (!token.present) token.index = 0;
      if (table) {
        const int patch = max(token.index - all.prefix, 0);
        token.place = patch + all.per_line.quotient(patch) * (all.width - 1);
      }
      return token;
    }

    // Four scores of a slice, as mma left them, become x; column is the slice's first.
    __device__ __forceinline__ void scores(float (&s)[4], int column) const {
      column += lane_id() % 4 * 2;
      const Token columns[2] = {token<!TRANSPOSED>(column), token<!TRANSPOSED>(column + 1)};
      const auto each = [&](const auto& f) {  // (score, query, key)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          if constexpr (TRANSPOSED) {
            f(s[i], columns[i % 2], rows[i / 2]);
          } else {
            f(s[i], rows[i / 2], columns[i % 2]);
          }
        }
      };
      each([&](float& x, const Token&, const Token&) { x *= all.scale; });
      if (bias) {
        with_type<Any>(all.bias_dtype, [&](auto type) {
          const auto* from = static_cast<const decltype(type)*>(bias);
          each([&](float& x, const Token& query, const Token& key) {
            x += to_float(from[query.index * all.bias_query + key.index * all.bias_key]);
          });
        });
      }
      if (table) {
        with_type<Any>(table_dtype, [&](auto type) {
          const auto* from = static_cast<const decltype(type)*>(table);
          each([&](float& x, const Token& query, const Token& key) {
            x += to_float(from[entry(query, key) * table_entry]);
          });
        });
      }
      each([](float& x, const Token& query, const Token& key) {
        if (!query.present || !key.present) x = -INFINITY;
      });
    }

    // The table's entry of a query and a key.
    __device__ __forceinline__ int entry(const Token& query, const Token& key) const {
      const bool class_query = query.index < all.prefix, class_key = key.index < all.prefix;
      const int its_own = all.entries - (class_query ? class_key ? 1 : 3 : 2);
      return class_query || class_key ? its_own : query.place - key.place + all.centre;
    }

    __device__ __forceinline__ bool dropping() const { return all.seed != nullptr; }
    __device__ __forceinline__ float kept_scale() const { return all.kept_scale; }

    // Which of a slice's weights dropout leaves.
    __device__ __forceinline__ void keep(bool (&kept)[4], int column) const {
      uint32_t words[4], key[4], query[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const auto row = static_cast<uint32_t>(rows[i / 2].index);
        const auto other = static_cast<uint32_t>(column + lane_id() % 4 * 2 + i % 2);
        key[i] = TRANSPOSED ? row : other;
        query[i] = TRANSPOSED ? other : row;
      }
      philox(words, key, query, plane, seed);
#pragma unroll
      for (int i = 0; i < 4; ++i) kept[i] = words[i] >= all.threshold;
    }
  };
};

struct RelPosKeys : ScoreMod {
  static constexpr bool kRelPosKeys = true;

  const void* rel_pos_keys;   // (2T - 1, d) in q's dtype
  int64_t rel_pos_keys_head;  // elements to the next head's

  template <bool TRANSPOSED>
  struct Warp : ScoreMod::Warp<TRANSPOSED> {
    const void* matrix;  // the head's
    int first;           // of the warp's rows

    __device__ __forceinline__ Warp(
        const RelPosKeys& all, int64_t image, int head, int heads, int queries, int keys, const float* staged, int first)
        : ScoreMod::Warp<TRANSPOSED>(all, image, head, heads, queries, keys, staged, first),
          matrix(static_cast<const uint16_t*>(all.rel_pos_keys) + head * all.rel_pos_keys_head), first(first) {}

    // Brings to the warp's window (kWindow, DIM) the relative position keys of its rows and 16 columns.
    template <int DIM, class T>
    __device__ __forceinline__ void load_window(T* window, int column) const {
      const int distance = TRANSPOSED ? column - first : first - column, zero = this->keys - 1;  // whose row is `zero`
      load_rows<kWindow, DIM>(window, static_cast<const T*>(matrix), DIM, distance + zero - kPair, 2 * zero + 1);
    }
  };
};

// lse in units of log2, as p is recomputed from it. A row without keys has a lse of -inf, and probabilities of 0.
template <class M>
__device__ __forceinline__ float in_log2(float lse) {
  if (M::kScoreMod && lse == -INFINITY) return INFINITY;
  return lse * kLog2e;
}

// ---- Launching -----------------------------------------------------------------------------------------------------

// What a launch goes through, packed or not.
struct Extent {
  int64_t images, queries, keys;  // images or sequences, and the most rows of one
};

inline Extent extent(const AttentionOptions& m, const Array& q, const Array& k) {
  if (m.cu_q) return {m.cu_q.size[0] - 1, m.max_q, m.max_k};
  return {q.size[0], q.size[1], k.size[1]};
}

// The kernels' form of the options of a call, checked against q (B, Tq, H, d) and k (B, Tk, H, d).
inline ScoreMod score_mod(const AttentionOptions& m, const Array& q, const Array& k, double scale) {
  const int64_t batch = q.size[0], queries = q.size[1], heads = q.size[2], keys = k.size[1];
  ScoreMod to{.scale = static_cast<float>(scale), .per_line = Divisor(1)};
  if (m.bias) {
    const Array& a = m.bias;
    require(a.dims == 4 && a.size[0] == batch && a.size[1] == heads && a.size[2] == queries && a.size[3] == keys &&
                is_floating(a.dtype),
            "attention: bias; accepted: (", batch, ", ", heads, ", ", queries, ", ", keys,
            ") float32, float16, bfloat16");
    to.bias = a.data, to.bias_dtype = a.dtype;
    to.bias_image = a.stride[0], to.bias_head = a.stride[1], to.bias_query = a.stride[2], to.bias_key = a.stride[3];
  }
  if (m.rel_pos_table) {
    const Array& a = m.rel_pos_table;
    const int64_t h = m.window_height, w = m.window_width, entries = (2 * h - 1) * (2 * w - 1);
    require(a.dims == 2 && is_floating(a.dtype), "attention: table; accepted: (R, H) float32, float16, bfloat16");
    require(h > 0 && w > 0 && (a.size[0] == entries || a.size[0] == entries + 3) && a.size[1] == heads,
            "attention: a table of (", a.size[0], ", ", a.size[1], ") for a window of ", h, "x", w, "; accepted: (",
            entries, " or ", entries + 3, ", ", heads, ")");
    to.prefix = a.size[0] != entries;
    require(queries == h * w + to.prefix && keys == queries, "attention: ", queries, " queries and ", keys,
            " keys for a window of ", h, "x", w, "; accepted: ", h * w + to.prefix);
    to.table = a.data, to.table_dtype = a.dtype, to.table_entry = a.stride[0], to.table_head = a.stride[1];
    to.entries = static_cast<int>(a.size[0]), to.width = static_cast<int>(w), to.per_line = Divisor(w);
    to.centre = static_cast<int>(entries / 2);
  }
  if (m.key_mask) {
    const Array& a = m.key_mask;
    require(a.dims == 2 && a.size[0] == batch && a.size[1] == keys && a.dtype == DType::uint8,
            "attention: key_mask; accepted: (", batch, ", ", keys, ") bytes");
    to.mask = a.as<uint8_t>(), to.mask_image = a.stride[0], to.mask_key = a.stride[1];
  }
  if (m.cu_q || m.cu_k) {
    require(m.cu_q.dims == 1 && m.cu_k.dims == 1 && m.cu_q.dtype == DType::int32 && m.cu_k.dtype == DType::int32 &&
                m.cu_q.size[0] == m.cu_k.size[0] && m.cu_q.size[0] > 0 && m.cu_q.stride[0] == 1 && m.cu_k.stride[0] == 1,
            "attention: cu_q and cu_k; accepted: (n + 1,) int32, contiguous, both");
    require(batch == 1, "attention: packed sequences in ", batch, " rows; accepted: 1");
    require(!m.bias && !m.rel_pos_table && !m.rel_pos_keys && !m.key_mask,
            "attention: packed sequences; accepted: no bias, rel_pos_table, rel_pos_keys or key_mask");
    to.packed_queries = {m.cu_q.as<const int>(), static_cast<int>(queries)};
    to.packed_keys = {m.cu_k.as<const int>(), static_cast<int>(keys)};
  }
  if (m.dropout_p != 0) {
    require(m.dropout_p > 0 && m.dropout_p < 1, "attention: dropout_p is ", m.dropout_p, "; accepted: 0 <= p < 1");
    require(m.seed.elements() == 1 && m.seed.dtype == DType::int64, "attention: seed; accepted: (1,) int64");
    to.seed = m.seed.as<const int64_t>();
    to.threshold = static_cast<uint32_t>(m.dropout_p * 4294967296.0);
    to.kept_scale = static_cast<float>(1 / (1 - m.dropout_p));
  }
  return to;
}

inline RelPosKeys rel_pos_keys(const AttentionOptions& m, const Array& q, const Array& k, double scale) {
  const Array& a = m.rel_pos_keys;
  const int64_t rows = 2 * k.size[1] - 1;
  require(q.size[1] == k.size[1] && a.dims == 3 && a.size[0] == q.size[2] && a.size[1] == rows &&
              a.size[2] == q.size[3] && a.dtype == q.dtype,
          "attention: rel_pos_keys; accepted: (", q.size[2], ", ", rows, ", ", q.size[3], ") ", name(q.dtype),
          " for as many queries as keys");
  require(a.stride[2] == 1 && a.stride[1] == a.size[2] && a.stride[0] % 8 == 0 &&
              reinterpret_cast<uintptr_t>(a.data) % 16 == 0,
          "attention: rel_pos_keys; accepted: each head's contiguous, at a multiple of 16 bytes");
  return {score_mod(m, q, k, scale), a.data, a.stride[0]};
}

// f(Plain, ScoreMod or RelPosKeys): the kind that a call needs.
template <class F>
void with_kind(const AttentionOptions& m, const Array& q, const Array& k, double scale, const F& f) {
  if (m.rel_pos_keys) {
    f(rel_pos_keys(m, q, k, scale));
  } else if (m.any()) {
    f(score_mod(m, q, k, scale));
  } else {
    f(Plain());
  }
}

// What the gradient of something learned is written to.
inline void check_gradient(const char* label, const Array& a) {
  int64_t dense = 1;
  for (int i = a.dims - 1; i >= 0; dense *= a.size[i--]) {
    require(a.size[i] == 1 || a.stride[i] == dense, "attention: ", label, " is strided; accepted: contiguous");
  }
  require(a.dtype == DType::float32, "attention: ", label, " in ", name(a.dtype), "; accepted: float32");
}

// The bytes of shared memory that a kernel with `bytes` of its own is launched with. Behind them lies a head's part of
// the table, as long as two blocks still share a multiprocessor (each takes 1 KB for itself), or else it is read as it is.
inline size_t stage_table(const Device& device, size_t bytes, ScoreMod& score_mod) {
  const size_t all = bytes + score_mod.entries * sizeof(float);
  score_mod.staged = score_mod.table && 2 * (all + 1024) <= static_cast<size_t>(device.shared_bytes) + 1024;
  return score_mod.staged ? all : bytes;
}

// The same for a kernel that goes through scores by `warps` warps, each of which has a window where a table would lie.
template <int DIM, class M>
size_t stage(const Device& device, size_t bytes, int warps, M& options) {
  if constexpr (M::kRelPosKeys) {
    return bytes + warps * kWindow * DIM * sizeof(uint16_t);
  } else if constexpr (M::kScoreMod) {
    return stage_table(device, bytes, options);
  } else {
    return bytes;
  }
}

}  // namespace fastvit::sm80
