// Patch embedding and its gradients as three GEMMs that gather their own patches: no im2col buffer, no float copy of a
// uint8 image, every image byte from device memory once.
//
//   forward          out (rows, D)     = patches (rows, K) weight (D, K)^T + bias + position; prefix rows beside them
//   weight gradient  partials (D, K)   = dout (rows, D)^T patches (rows, K), of a part of the rows each
//   image gradient   dimages (rows, K) = dout (rows, D) weight (D, K) / std, every pixel scattered once
//
// rows are the patches of all images, K = C * p * q. All are the product of gemm_sm80.cuh with loaders of their own
// (patch_embed_loaders.cuh) and epilogues of their own. Where a patch lies is the affair of patch_embed_patches.cuh, so
// the first two serve images of one size (patch_embed.cu) and packed ones of any sizes (patch_embed_packed.cu); the
// third is for images of one size alone, and in patch_embed.cu.
//
//   RowTile    rows of a matrix that are not evenly spaced (dout's patches skip the prefix rows) or whose columns come
//              in another order (the weight): cp.async of 16 bytes, or through registers where K is no multiple of 8
//              (14x14 patches) and the weight's rows are not 16-byte aligned.
//   PatchTile  patches of the images. Within a run of q pixels (one line of one channel of a patch) a load takes kWidth
//              pixels: cp.async straight to shared memory where the image already is what the product takes, else
//              through registers, loaded before a step's products, converted and stored after them. Channels-last bytes
//              are loaded by 24, 8 pixels of three channels, of which a thread keeps one.
//
// The sum over k may run in any order: where 8 divides q it runs line by line and over the channels within a line, so
// that the channels of a channels-last image, which share their bytes, are read in one step and the later ones hit L1.
// Neighbouring blocks share their patches (a row of tiles): device memory gives them once, L2 the other times.
#pragma once

#include <algorithm>

#include "ops.h"
#include "patch_embed_loaders.cuh"
#include "vectors.cuh"

namespace fastvit {
namespace patch_embed {

constexpr int kMaxChannels = 1024;  // whose scale and shift fit beside the tiles

// One block of 8 warps a multiprocessor, up to 255 registers a thread; for small batches four blocks of 4 warps.
constexpr Tile kTiles[] = {{128, 256, 32, 2, 4, 3}, {128, 128, 32, 2, 4, 3}, {64, 64, 32, 2, 2, 3}};
constexpr int kLarge = 0, kMedium = 1, kSmall = 2;

// Whether loads are wide: the others need the large tile's registers for their addresses and pixels.
template <int kWidth> constexpr bool kLean = kWidth >= 4;
template <bool kLean> constexpr Tile kTileOf = kTiles[kLean ? kLarge : kMedium];

// In the weight's gradient float32 pixels, 32 registers of them at once, leave none for where they lie.
template <int kWidth> constexpr Tile kGradientTile = kTileOf<kLean<kWidth> && kWidth != 4>;

// Rows of D values of any floating dtype, D a multiple of 8.
struct Rows {
  void* data;  // null for none
  DType dtype;
  bool aligned;  // for loads of 16 bytes

  Rows(const Array& array) : data(array.data), dtype(array.dtype), aligned(suits(array, 8)) {}

  // to += the 8 elements from `at` on; nothing where there is none.
  __device__ __forceinline__ void add_to(float (&to)[8], int64_t at) const {
    if (data == nullptr) return;
    with_type<Any>(dtype, [&](auto type) {
      using T = decltype(type);
      const T* from = static_cast<const T*>(data) + at;
      Vector<T, 8> x;
      if (aligned) {
        load<T>(x, from);
      } else {
#pragma unroll
        for (int i = 0; i < 8; ++i) x.at[i] = from[i];
      }
#pragma unroll
      for (int i = 0; i < 8; ++i) to[i] += to_float(x.at[i]);
    });
  }

  // Rounds 8 values to the elements from `at` on, aligned.
  __device__ __forceinline__ void put(const float (&values)[8], int64_t at) const {
    with_type<Any>(dtype, [&](auto type) { store(static_cast<decltype(type)*>(data) + at, values); });
  }
};

template <class Places>
struct Forward {
  Patches<Places> patches;
  const void* weight;  // (D, K)
  Rows bias;           // (D,) or none
  Rows pos;            // (leading + positions of the patches, D) or none
  Rows prefix;         // (patches.prefix, D) or none
  Rows out;            // (patches.rows + images * patches.prefix, D)
  int width;           // D
  int leading;         // positions of the prefix rows: patches.prefix, or 0
  int weight_width;    // elements of the weight that one load may take: 8, 2 or 1
};

// Grid: tiles of (rows, D), those of the same rows next to each other: they gather the same patches.
template <class Places, class T, class Pixel, int kWidth, int kSize>
__global__ void __launch_bounds__(kTiles[kSize].threads(), kSize == kSmall ? 4 : 1)
patch_embed_forward_kernel(const __grid_constant__ Forward<Places> p) {
  constexpr Tile kTile = kTiles[kSize];
  constexpr int kThreads = kTile.threads();
  using G = Gemm<T, kTile, Layout::k_major, Layout::k_major>;
  const Patches<Places>& patches = p.patches;
  const int tiles_n = (p.width + kTile.n - 1) / kTile.n;
  const int m0 = blockIdx.x / tiles_n * kTile.m, n0 = blockIdx.x % tiles_n * kTile.n;
  T* shared = reinterpret_cast<T*>(shared_memory());

  const Scale* scales = fill_scales<kThreads>(patches, shared_memory() + G::kSharedBytes);
  PatchTile<Places, T, Pixel, kWidth, kTile.m, kTile.k, kThreads> images(patches, scales);
  images.place_rows(m0, patches.rows);
  RowTile<T, kTile.n, kTile.k, kThreads, kLean<kWidth>> weight(p.weight_width);
  weight.place_rows(static_cast<const T*>(p.weight), n0, p.width, [&](int row) {
    return static_cast<int64_t>(row) * patches.columns;
  });
  Stepping a(images, [](auto& tile, int step) { tile.place_columns(step * kTile.k); });
  Stepping b(weight, [&](auto& tile, int step) {
    const int k = step * kTile.k + tile.chunk() * 8;
    tile.place_columns(patches.column(k).weight, patches.columns - k);
  });
  typename G::Sum sum = {};
  G::multiply(sum, a, b, (patches.columns + kTile.k - 1) / kTile.k, shared);

  const int n = n0 + G::template piece_column<8>();
  float bias[8] = {};
  if (n < p.width) p.bias.add_to(bias, n);
  G::template for_each_piece<8>(sum, shared, [&](int row, float (&values)[8]) {
    row += m0;
    if (row >= patches.rows || n >= p.width) return;
#pragma unroll
    for (int i = 0; i < 8; ++i) values[i] += bias[i];
    p.pos.add_to(values, static_cast<int64_t>(patches.places.position(row) + p.leading) * p.width + n);
    p.out.put(values, static_cast<int64_t>(patches.token(row)) * p.width + n);
  });

  // The prefix rows of the images whose first patch is here: a warp a row, 8 columns a lane.
  const int64_t end = min(m0 + kTile.m, patches.rows);
  const int prefix_n = n0 + threadIdx.x % (kTile.n / 8) * 8;
  if (patches.prefix == 0 || prefix_n >= p.width) return;
  for (int image = patches.image_from(m0); patches.places.begin(image) < end; ++image) {
    const int64_t first = patches.places.begin(image) + static_cast<int64_t>(image) * patches.prefix;
    for (int row = threadIdx.x / (kTile.n / 8); row < patches.prefix; row += kThreads / (kTile.n / 8)) {
      const int64_t from = static_cast<int64_t>(row) * p.width + prefix_n;
      float values[8] = {};
      p.prefix.add_to(values, from);
      if (p.leading > 0) p.pos.add_to(values, from);
      p.out.put(values, first * p.width + from);
    }
  }
}

template <class Places>
struct WeightGradient {
  Patches<Places> patches;
  const void* dout;  // (patches.rows + images * patches.prefix, D)
  float* partials;   // (splits, D, K)
  int width;         // D
  int rows;          // of a split
};

// Grid: tiles of (D, K), and the splits of the rows. dout and patches both lie by rows of what is contracted.
template <class Places, class T, class Pixel, int kWidth>
__global__ void __launch_bounds__(kGradientTile<kWidth>.threads())
patch_embed_weight_gradient_kernel(const __grid_constant__ WeightGradient<Places> p) {
  constexpr Tile kTile = kGradientTile<kWidth>;
  constexpr int kThreads = kTile.threads();
  using G = Gemm<T, kTile, Layout::mn_major, Layout::mn_major>;
  const Patches<Places>& patches = p.patches;
  const int tiles_n = (patches.columns + kTile.n - 1) / kTile.n;
  const int m0 = blockIdx.x / tiles_n * kTile.m, n0 = blockIdx.x % tiles_n * kTile.n;
  const int64_t begin = static_cast<int64_t>(blockIdx.y) * p.rows;
  const int first = static_cast<int>(min(begin, static_cast<int64_t>(patches.rows)));
  const int end = first + min(p.rows, patches.rows - first);
  T* shared = reinterpret_cast<T*>(shared_memory());

  RowTile<T, kTile.k, kTile.m, kThreads, true> dout;
  dout.place_columns(m0 + dout.chunk() * 8, p.width - m0 - dout.chunk() * 8);
  const Scale* scales = fill_scales<kThreads>(patches, shared_memory() + G::kSharedBytes);
  PatchTile<Places, T, Pixel, kWidth, kTile.k, kTile.n, kThreads> images(patches, scales);
  images.place_columns(n0);
  Stepping a(dout, [&](auto& tile, int step) {
    tile.place_rows(static_cast<const T*>(p.dout), first + step * kTile.k, end, [&](int row) {
      return static_cast<int64_t>(patches.token(row)) * p.width;
    });
  });
  Stepping b(images, [&](auto& tile, int step) { tile.place_rows(first + step * kTile.k, end); });
  typename G::Sum sum = {};
  G::multiply(sum, a, b, (end - first + kTile.k - 1) / kTile.k, shared);

  const int k = n0 + G::template piece_column<4>();
  const int column = patches.column(k).weight;  // four neighbours remain neighbours
  G::template for_each_piece<4>(sum, shared, [&](int row, float (&values)[4]) {
    row += m0;
    if (row >= p.width) return;
    float* out = p.partials + (static_cast<int64_t>(blockIdx.y) * p.width + row) * patches.columns + column;
    if (patches.columns % 4 == 0) {
      if (k < patches.columns) store(out, values);
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (k + i < patches.columns) out[i] = values[i];
      }
    }
  });
}

// From here on: the host.

inline bool aligned(const Array& array, int64_t elements) {
  const int64_t unit = std::min<int64_t>(elements * bytes(array.dtype), 16);
  return reinterpret_cast<uintptr_t>(array.data) % unit == 0;
}

// The matrix of `rows` patches (C, p, q) of images at these places, of which come `tokens` tokens in all. by_lines: k
// runs line by line and over the channels within a line, else as it does in the weight.
template <class Places>
Patches<Places> patches_of(
    const Array& images, const Array& mean, const Array& std, int64_t channels, int64_t p, int64_t q, int64_t rows,
    int64_t prefix, int64_t tokens, bool by_lines, const Places& places) {
  const int64_t columns = channels * p * q;
  constexpr int64_t limit = (int64_t{1} << 31) - kTiles[kLarge].n;
  require(tokens < limit, "patch_embed: ", tokens, " tokens; accepted: fewer than ", limit);
  require(columns < limit, "patch_embed: patches of ", columns, " values; accepted: fewer than ", limit);
  require(images.dtype == DType::uint8 || is_floating(images.dtype), "patch_embed: images are ", name(images.dtype),
          "; accepted: uint8, float32, float16, bfloat16");
  const bool normalise = images.dtype == DType::uint8 || mean || std;
  require(!normalise || channels <= kMaxChannels,
          "patch_embed: ", channels, " channels of uint8, or with mean or std; accepted: at most ", kMaxChannels);
  for (const Array* each : {&mean, &std}) {
    require(!*each || (each->dtype == DType::float32 && each->elements() == channels), "patch_embed: mean or std of ",
            each->elements(), " ", name(each->dtype), "; accepted: ", channels, " float32");
  }
  return {
      .images = images.data,
      .mean = mean.as<float>(),
      .std = std.as<float>(),
      .unit = images.dtype == DType::uint8 ? 1.f / 255 : 1.f,
      .normalise = normalise,
      .channels = static_cast<int>(channels),
      .rows = static_cast<int>(rows),
      .columns = static_cast<int>(columns),
      .prefix = static_cast<int>(prefix),
      .run = Divisor(q),
      .inner = Divisor(by_lines ? channels : p),
      .by_lines = by_lines,
      .plane = static_cast<int>(p * q),
      .places = places,
  };
}

// How neighbouring pixels of a run can be loaded.
struct Access {
  DType dtype;
  int pixels;        // 8, 4, 2 or 1: so many begin at multiples of their size, or of 16 bytes, everywhere
  bool rgb = false;  // 8 pixels of channels-last bytes, three a pixel, are 24 bytes from a multiple of 8 on
};

// Of images whose runs begin at multiples of the largest power of two that divides `distances`.
inline int pixels_at_once(const Array& images, int64_t distances) {
  const int64_t all = distances | 8;
  int64_t width = all & -all;
  while (!aligned(images, width)) width /= 2;
  return static_cast<int>(width);
}

inline int weight_at_once(const Array& weight, int64_t columns) {
  return columns % 8 == 0 && aligned(weight, 8) ? 8 : columns % 2 == 0 && aligned(weight, 2) ? 2 : 1;
}

// D, with the pointers of what is read or written by 16 bytes.
inline int width_of(int64_t width, const Array& tokens) {
  require(width % 8 == 0 && width < (1 << 30) && aligned(tokens, 8),
          "patch_embed: tokens of width ", width, "; accepted: multiples of 8, on 16 bytes");
  return static_cast<int>(width);
}

inline int64_t tiles_of(const Tile& tile, int64_t rows, int64_t columns) {
  return ceil_div(rows, tile.m) * ceil_div(columns, tile.n);
}

template <class G, class Places>
size_t shared_bytes(const Patches<Places>& patches) {
  return G::kSharedBytes + (patches.normalise ? patches.channels * sizeof(Scale) : 0);
}

// The forward's tile: the least work for the busiest multiprocessor, where a smaller tile's costs more for its operands
// (1 / m + 1 / n bytes a product). Estimates: not measured yet.
inline int forward_tile(const Device& device, int64_t rows, int64_t columns) {
  const auto work = [&](int size, double cost) {
    const Tile& tile = kTiles[size];
    return ceil_div(tiles_of(tile, rows, columns), std::max(device.multiprocessors, 1)) * tile.m * tile.n * cost;
  };
  const double large = work(kLarge, 1), medium = work(kMedium, 1.15), small = work(kSmall, 1.8);
  return small < std::min(large, medium) ? kSmall : medium < large ? kMedium : kLarge;
}

template <class F>
void with_products(DType dtype, F f) {
  if (dtype == DType::float16) return f(half());
  if (dtype == DType::bfloat16) return f(bfloat16());
  throw error("patch_embed: products of ", name(dtype), "; accepted: float16, bfloat16");
}

template <int value> using Constant = std::integral_constant<int, value>;

// f(pixel, width of a load) for products in T of such images. `lean` allows the kernels of wide loads.
template <class T, class Places, class F>
void with_pixels(const Patches<Places>& patches, const Access& access, bool lean, F f) {
  const DType dtype = access.dtype;
  const int width = access.pixels;
  using Other = std::conditional_t<std::is_same_v<T, half>, bfloat16, half>;
  if constexpr (std::is_same_v<Places, Batch>) {
    if (lean && access.rgb) return f(Rgb(), Constant<8>());
  }
  if (dtype == DType::uint8) return lean && width == 8 ? f(uint8_t(), Constant<8>()) : f(uint8_t(), Constant<1>());
  if (dtype == DType::float32) return lean && width >= 4 ? f(float(), Constant<4>()) : f(float(), Constant<1>());
  if (dtype == dtype_of<Other>) return f(Other(), Constant<1>());
  if (lean && width == 8 && !patches.normalise) return f(T(), Constant<8>());
  return width >= 2 ? f(T(), Constant<2>()) : f(T(), Constant<1>());
}

// patch_embed_forward of ops.h and its packed twin; leading as in Forward.
template <class Places>
void forward(
    const Device& device, const Patches<Places>& patches, const Access& access, const Array& weight, const Array& bias,
    const Array& pos_embed, int64_t leading, const Array& prefix_tokens, const Array& out) {
  const int64_t dim = weight.size[0];
  const Forward<Places> parameters = {
      .patches = patches,
      .weight = weight.data,
      .bias = bias,
      .pos = pos_embed,
      .prefix = prefix_tokens,
      .out = out,
      .width = width_of(dim, out),
      .leading = static_cast<int>(leading),
      .weight_width = weight_at_once(weight, patches.columns),
  };
  const int best = forward_tile(device, patches.rows, dim);
  const bool lean = parameters.weight_width == 8;
  with_products(weight.dtype, [&](auto product) {
    with_pixels<decltype(product)>(patches, access, lean, [&](auto pixel, auto width) {
      const auto run = [&](auto size) {
        using T = decltype(product);
        constexpr Tile tile = kTiles[size];
        const auto kernel = patch_embed_forward_kernel<Places, T, decltype(pixel), width, size>;
        const size_t shared = shared_bytes<Gemm<T, tile, Layout::k_major, Layout::k_major>>(patches);
        launch(device, kernel, dim3(tiles_of(tile, patches.rows, dim)), tile.threads(), shared, parameters);
      };
      if constexpr (kLean<width>) {
        if (best == kLarge) return run(Constant<kLarge>());
        if (best == kSmall) return run(Constant<kSmall>());
      }
      run(Constant<kMedium>());
    });
  });
}

// patch_embed_weight_gradient of ops.h and its packed twin.
template <class Places>
void weight_gradient(
    const Device& device, const Patches<Places>& patches, const Access& access, const Array& dout,
    const Array& partials) {
  const int64_t splits = partials.size[0], dim = partials.size[1];
  require(splits < 65536 && aligned(partials, 4),
          "patch_embed: ", splits, " splits; accepted: fewer than 65536, on 16 bytes");
  const WeightGradient<Places> parameters = {
      .patches = patches,
      .dout = dout.data,
      .partials = partials.as<float>(),
      .width = width_of(dim, dout),
      .rows = static_cast<int>(ceil_div(ceil_div(patches.rows, kTiles[kLarge].k), splits) * kTiles[kLarge].k),
  };
  with_products(dout.dtype, [&](auto product) {
    with_pixels<decltype(product)>(patches, access, true, [&](auto pixel, auto width) {
      using T = decltype(product);
      constexpr Tile tile = kGradientTile<width>;
      const auto kernel = patch_embed_weight_gradient_kernel<Places, T, decltype(pixel), width>;
      const dim3 grid(tiles_of(tile, dim, patches.columns), splits);
      const size_t shared = shared_bytes<Gemm<T, tile, Layout::mn_major, Layout::mn_major>>(patches);
      launch(device, kernel, grid, tile.threads(), shared, parameters);
    });
  });
}

}  // namespace patch_embed
}  // namespace fastvit
