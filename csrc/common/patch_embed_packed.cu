// Patch embedding of packed images of any sizes, and its weight's gradient: the kernels of patch_embed_kernels.cuh with
// rows that find their patches by tables. One launch each, whatever the mix.
#include "patch_embed_kernels.cuh"

namespace fastvit {
namespace patch_embed {
namespace {

// The tables of ops.h.
Packed places_of(
    const Array& starts, const Array& sizes, const Array& cu_patches, const Array& image, const Array& row,
    const Array& column, int64_t p, int64_t q) {
  const int64_t images = starts.elements(), patches = image.elements();
  const auto check = [](const char* what, const Array& table, DType dtype, int64_t entries) {
    require(table.dtype == dtype && table.elements() == entries, "patch_embed: ", what, " of ", table.elements(), " ",
            name(table.dtype), "; accepted: ", entries, " ", name(dtype));
  };
  check("starts", starts, DType::int64, images);
  check("sizes", sizes, DType::int32, 2 * images);
  check("cu_patches", cu_patches, DType::int32, images + 1);
  check("image", image, DType::int32, patches);
  check("row", row, DType::int32, patches);
  check("column", column, DType::int32, patches);
  return {
      .starts = starts.as<int64_t>(),
      .sizes = sizes.as<int>(),
      .cu_patches = cu_patches.as<int>(),
      .image = image.as<int>(),
      .patch_y = row.as<int>(),
      .patch_x = column.as<int>(),
      .last = static_cast<int>(patches - 1),
      .p = static_cast<int>(p),
      .q = static_cast<int>(q),
  };
}

// Images are whole patches and begin at whole patches: every distance is a multiple of q.
Access access_of(const Array& pixels, int64_t q) { return {pixels.dtype, pixels_at_once(pixels, q)}; }

}  // namespace
}  // namespace patch_embed

void patch_embed_packed_forward(
    const Device& device,
    const Array& pixels,
    const Array& weight,
    const Array& bias,
    const Array& starts,
    const Array& sizes,
    const Array& cu_patches,
    const Array& image,
    const Array& row,
    const Array& column,
    const Array& pos_embed,
    const Array& prefix_tokens,
    const Array& mean,
    const Array& std,
    const Array& out) {
  using namespace patch_embed;
  if (out.elements() == 0) return;
  const int64_t dim = weight.size[0], channels = weight.size[1], p = weight.size[2], q = weight.size[3];
  const int64_t rows = image.elements(), prefix = prefix_tokens.elements() / dim;
  require(!pos_embed || pos_embed.elements() == rows * dim, "patch_embed: ", pos_embed.elements() / dim,
          " positions; accepted: ", rows);
  const Packed places = places_of(starts, sizes, cu_patches, image, row, column, p, q);
  const auto patches = patches_of(
      pixels, mean, std, channels, p, q, rows, prefix, rows + starts.elements() * prefix, q % 8 == 0, places);
  forward(device, patches, access_of(pixels, q), weight, bias, pos_embed, 0, prefix_tokens, out);
}

void patch_embed_packed_weight_gradient(
    const Device& device,
    const Array& dout,
    const Array& pixels,
    int64_t patch_height,
    int64_t patch_width,
    const Array& starts,
    const Array& sizes,
    const Array& cu_patches,
    const Array& image,
    const Array& row,
    const Array& column,
    const Array& mean,
    const Array& std,
    const Array& partials) {
  using namespace patch_embed;
  if (partials.elements() == 0) return;
  const int64_t rows = dout.size[0], channels = partials.size[2] / (patch_height * patch_width);
  const Packed places = places_of(starts, sizes, cu_patches, image, row, column, patch_height, patch_width);
  const auto patches = patches_of(
      pixels, mean, std, channels, patch_height, patch_width, rows, 0, rows, patch_width % 8 == 0, places);
  weight_gradient(device, patches, access_of(pixels, patch_width), dout, partials);
}

}  // namespace fastvit
