// Patch embedding of images of one size: the kernels of patch_embed_kernels.cuh, and the images' gradient, a product
// whose epilogue scatters: every pixel is in one patch.
#include "patch_embed_kernels.cuh"

namespace fastvit {
namespace patch_embed {
namespace {

struct ImageGradient {
  Patches<Batch> patches;  // of dimages
  const void* dout;        // (B, patches.prefix + N, D)
  const void* weight;      // (D, K)
  Rows dimages;
  int width;               // D
  int weight_width;        // elements of the weight that one load may take: 8, 2 or 1
  int pixels;              // of dimages that one store may take: 8, 4, 2 or 1
};

// values to the pixels of a patch, kCount neighbours at a time; pixel is less than 0 where there is none.
template <int kCount, class T>
__device__ __forceinline__ void scatter(T* patch, const int (&pixel)[8], const float (&values)[8]) {
#pragma unroll
  for (int i = 0; i < 8; i += kCount) {
    float run[kCount];
#pragma unroll
    for (int j = 0; j < kCount; ++j) run[j] = values[i + j];
    if (pixel[i] >= 0) store(patch + pixel[i], run);
  }
}

// Grid: tiles of (B * N, K), those of the same rows next to each other.
template <class T, bool kAligned>
__global__ void __launch_bounds__(kTileOf<kAligned>.threads())
patch_embed_image_gradient_kernel(const __grid_constant__ ImageGradient p) {
  constexpr Tile kTile = kTileOf<kAligned>;
  constexpr int kThreads = kTile.threads();
  using G = Gemm<T, kTile, Layout::k_major, Layout::mn_major>;
  const Patches<Batch>& patches = p.patches;
  const int tiles_n = (patches.columns + kTile.n - 1) / kTile.n;
  const int m0 = blockIdx.x / tiles_n * kTile.m, n0 = blockIdx.x % tiles_n * kTile.n;
  T* shared = reinterpret_cast<T*>(shared_memory());

  RowTile<T, kTile.m, kTile.k, kThreads, true> dout;
  dout.place_rows(static_cast<const T*>(p.dout), m0, patches.rows, [&](int row) {
    return static_cast<int64_t>(patches.token(row)) * p.width;
  });
  RowTile<T, kTile.k, kTile.n, kThreads, kAligned> weight(p.weight_width);
  weight.place_columns(n0 + weight.chunk() * 8, patches.columns - n0 - weight.chunk() * 8);
  Stepping a(dout, [&](auto& tile, int step) {
    const int d = step * kTile.k + tile.chunk() * 8;
    tile.place_columns(d, p.width - d);
  });
  Stepping b(weight, [&](auto& tile, int step) {
    tile.place_rows(static_cast<const T*>(p.weight), step * kTile.k, p.width, [&](int row) {
      return static_cast<int64_t>(row) * patches.columns;
    });
  });
  typename G::Sum sum = {};
  G::multiply(sum, a, b, (p.width + kTile.k - 1) / kTile.k, shared);

  int pixel[8];
  float inverse[8];  // of std
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const auto column = patches.column(n0 + G::template piece_column<8>() + i);
    pixel[i] = column.pixel.offset;
    inverse[i] = patches.std == nullptr || pixel[i] < 0 ? 1.f : 1.f / patches.std[column.channel];
  }
  G::template for_each_piece<8>(sum, shared, [&](int row, float (&values)[8]) {
    row += m0;
    if (row >= patches.rows) return;
#pragma unroll
    for (int i = 0; i < 8; ++i) values[i] *= inverse[i];
    with_type<Any>(p.dimages.dtype, [&](auto type) {
      using U = decltype(type);
      U* patch = const_cast<U*>(patches.template place<U>(row).first);
      if (p.pixels == 8) {
        scatter<8>(patch, pixel, values);
      } else if (p.pixels >= 2) {
        scatter<2>(patch, pixel, values);
      } else {
        scatter<1>(patch, pixel, values);
      }
    });
  });
}

// From here on: the host.

Patches<Batch> batch_of(
    const Array& images, const Array& mean, const Array& std, int64_t p, int64_t q, int64_t prefix, bool by_lines) {
  const int64_t batch = images.size[0], channels = images.size[1], height = images.size[2], width = images.size[3];
  require(p > 0 && q > 0 && height > 0 && width > 0 && channels > 0 && height % p == 0 && width % q == 0,
          "patch_embed: images of ", channels, "x", height, "x", width, "; accepted: multiples of ", p, "x", q);
  const int64_t* stride = images.stride;
  const int64_t patches = (height / p) * (width / q);
  // Between the pixels of a patch, and from a patch to those below and beside it.
  const int64_t down = height > p ? p : p - 1, right = width > q ? q : q - 1;
  const int64_t span = (channels - 1) * stride[1] + down * stride[2] + right * stride[3];
  constexpr int64_t limit = (int64_t{1} << 31) - kTiles[kLarge].n;
  require(span < limit, "patch_embed: a patch spans ", span, " elements of the images; accepted: fewer than ", limit);
  const Batch places = {
      .per_image = Divisor(patches),
      .per_line = Divisor(width / q),
      .image = stride[0],
      .down = static_cast<int>(p * stride[2]),
      .right = static_cast<int>(q * stride[3]),
      .channel = static_cast<int>(stride[1]),
      .line = static_cast<int>(stride[2]),
      .next = static_cast<int>(stride[3]),
  };
  const int64_t tokens = batch * (prefix + patches);
  return patches_of(images, mean, std, channels, p, q, batch * patches, prefix, tokens, by_lines, places);
}

Access access_of(const Array& images, int64_t q) {
  const int64_t* stride = images.stride;
  const bool rgb = images.dtype == DType::uint8 && images.size[1] == 3 && stride[1] == 1 && stride[3] == 3 &&
                   (q | stride[0] | stride[2]) % 8 == 0 && aligned(images, 8);
  const int64_t distances = stride[3] == 1 ? q | stride[0] | stride[1] | stride[2] : 1;
  return {images.dtype, pixels_at_once(images, distances), rgb};
}

}  // namespace
}  // namespace patch_embed

void patch_embed_forward(
    const Device& device,
    const Array& images,
    const Array& weight,
    const Array& bias,
    const Array& pos_embed,
    const Array& prefix_tokens,
    const Array& mean,
    const Array& std,
    const Array& out) {
  using namespace patch_embed;
  if (out.elements() == 0) return;
  const int64_t dim = weight.size[0], p = weight.size[2], q = weight.size[3];
  const auto patches = batch_of(images, mean, std, p, q, prefix_tokens.elements() / dim, q % 8 == 0);
  const int64_t positions = pos_embed.elements() / dim, per_image = patches.places.per_image.divisor;
  require(!pos_embed || positions == per_image || positions == patches.prefix + per_image, "patch_embed: ", positions,
          " positions; accepted: ", per_image, " or ", patches.prefix + per_image);
  const int64_t leading = pos_embed ? positions - per_image : 0;
  forward(device, patches, access_of(images, q), weight, bias, pos_embed, leading, prefix_tokens, out);
}

// As many as give every multiprocessor a block at once, none shorter than 16 steps.
int64_t patch_embed_weight_gradient_splits(const Device& device, int64_t rows, int64_t width, int64_t features) {
  constexpr Tile tile = patch_embed::kTiles[patch_embed::kLarge];
  const int64_t tiles = std::max<int64_t>(patch_embed::tiles_of(tile, width, features), 1);
  return std::max<int64_t>(std::min(device.multiprocessors / tiles, rows / (16 * tile.k)), 1);
}

void patch_embed_weight_gradient(
    const Device& device,
    const Array& dout,
    const Array& images,
    const Array& mean,
    const Array& std,
    int64_t patch_height,
    int64_t patch_width,
    int64_t prefix,
    const Array& partials) {
  using namespace patch_embed;
  if (partials.elements() == 0) return;
  const auto patches = batch_of(images, mean, std, patch_height, patch_width, prefix, patch_width % 8 == 0);
  weight_gradient(device, patches, access_of(images, patch_width), dout, partials);
}

void patch_embed_image_gradient(
    const Device& device,
    const Array& dout,
    const Array& weight,
    const Array& std,
    int64_t prefix,
    const Array& dimages) {
  using namespace patch_embed;
  if (dimages.elements() == 0) return;
  const int64_t dim = weight.size[0], p = weight.size[2], q = weight.size[3];
  const auto patches = batch_of(dimages, Array(), std, p, q, prefix, false);
  require(dout.dtype == weight.dtype, "patch_embed: a gradient in ", name(dout.dtype), " with a weight in ",
          name(weight.dtype), "; accepted: the same");
  const ImageGradient parameters = {
      .patches = patches,
      .dout = dout.data,
      .weight = weight.data,
      .dimages = dimages,
      .width = width_of(dim, dout),
      .weight_width = weight_at_once(weight, patches.columns),
      .pixels = access_of(dimages, q).pixels,
  };
  with_products(weight.dtype, [&](auto product) {
    const auto run = [&](auto aligned) {
      using T = decltype(product);
      constexpr Tile tile = kTileOf<aligned>;
      constexpr size_t shared = Gemm<T, tile, Layout::k_major, Layout::mn_major>::kSharedBytes;
      const auto kernel = patch_embed_image_gradient_kernel<T, aligned>;
      launch(device, kernel, dim3(tiles_of(tile, patches.rows, patches.columns)), tile.threads(), shared, parameters);
    };
    parameters.weight_width == 8 ? run(std::true_type()) : run(std::false_type());
  });
}

}  // namespace fastvit
