// Images as a matrix of patches: a row is a patch, its columns are the C * p * q pixels. Patches knows what is the same
// for all images; where a patch begins, whose it is and how far apart its pixels lie it asks its Places:
//
//   Batch    images of one size, any strides: division of a patch's number tells all
//   Packed   images of any sizes, in planes, one after the other in one buffer (fastvit/packing.py): tables tell
//
// A Place is a row's share of an address, a Pixel a column's: place.at(pixel). With Batch they are added; with Packed
// a place has strides too, and a pixel remains channel, line and place in the line.
#pragma once

#include <type_traits>

#include "divisor.cuh"

namespace fastvit {
namespace patch_embed {

struct Batch {
  Divisor per_image, per_line;  // patches
  int64_t image;                // from a patch to that of the next image, in elements
  int down, right;              // and of the next line and column
  int channel, line, next;      // between the pixels of a patch

  struct Pixel {
    int offset = -1;  // from the first one of a patch; less than 0 for none
    __device__ __forceinline__ bool there() const { return offset >= 0; }
  };

  template <class E>
  struct Place {
    const E* first;
    __device__ __forceinline__ const E* at(Pixel pixel) const { return first + pixel.offset; }
  };

  __device__ __forceinline__ Pixel pixel(int c, int i, int j) const { return {c * channel + i * line + j * next}; }

  template <class E>
  __device__ __forceinline__ Place<E> place(const E* images, int row) const {
    const int b = image_of(row), patch = row - b * static_cast<int>(per_image.divisor);
    const int y = per_line.quotient(patch), x = patch - y * static_cast<int>(per_line.divisor);
    return {images + (b * image + static_cast<int64_t>(y) * down + static_cast<int64_t>(x) * right)};
  }

  // Whose a patch is, and the first patch of an image.
  __device__ __forceinline__ int image_of(int row) const { return per_image.quotient(row); }
  __device__ __forceinline__ int64_t begin(int image) const { return static_cast<int64_t>(image) * per_image.divisor; }

  // Its row in the position embeddings of patches.
  __device__ __forceinline__ int position(int row) const {
    return row - image_of(row) * static_cast<int>(per_image.divisor);
  }
};

struct Packed {
  const int64_t* starts;         // (n,): the first pixel of an image
  const int* sizes;              // (n, 2): its height and width
  const int* cu_patches;         // (n + 1,): its first patch, and at the end N
  const int* image;              // (N,): whose a patch is
  const int *patch_y, *patch_x;  // (N,): where in the grid of that image's patches
  int last;                      // N - 1: what is asked of rows beyond is answered for it
  int p, q;

  struct Pixel {
    int channel = 0, line = 0, next = -1;  // next is less than 0 for none
    __device__ __forceinline__ bool there() const { return next >= 0; }
  };

  template <class E>
  struct Place {
    const E* first;
    int plane, line;  // from there to the next channel and line
    __device__ __forceinline__ const E* at(const Pixel& pixel) const {
      return first + (pixel.channel * plane + pixel.line * line + pixel.next);
    }

    // What another lane of the warp has. The pointer goes as a distance: the compiler still knows that it is one to
    // global memory.
    __device__ __forceinline__ Place of_lane(int lane, const E* pixels) const {
      constexpr unsigned kAll = 0xffffffffu;
      return {pixels + __shfl_sync(kAll, static_cast<int64_t>(first - pixels), lane), __shfl_sync(kAll, plane, lane),
              __shfl_sync(kAll, line, lane)};
    }
  };

  __device__ __forceinline__ static Pixel pixel(int c, int i, int j) { return {c, i, j}; }

  template <class E>
  __device__ __forceinline__ Place<E> place(const E* pixels, int row) const {
    row = min(row, last);
    const int b = image[row], y = patch_y[row] * p, x = patch_x[row] * q;
    const int height = sizes[2 * b], width = sizes[2 * b + 1];
    return {pixels + (starts[b] + (y * width + x)), height * width, width};
  }

  __device__ __forceinline__ int image_of(int row) const { return image[row]; }
  __device__ __forceinline__ int64_t begin(int image) const { return cu_patches[image]; }
  __device__ __forceinline__ int position(int row) const { return row; }
};

template <class Places>
struct Patches {
  const void* images;
  const float* mean;  // (C,) or null
  const float* std;   // (C,) or null
  float unit;         // 1 / 255 for uint8, else 1
  bool normalise;
  int channels;
  int rows, columns;   // patches of all images, C * p * q
  int prefix;          // rows of an image's tokens before its patches
  Divisor run, inner;  // q; what the runs of q pixels count within: C with by_lines, else p
  bool by_lines;       // k runs line by line and over the channels within a line, else as in the weight
  int plane;           // p * q
  Places places;

  struct Column {
    typename Places::Pixel pixel;
    int weight;  // where it is in a row of the weight
    int channel;
  };

  __device__ __forceinline__ Column column(int k) const {
    const int number = run.quotient(k), j = k - number * static_cast<int>(run.divisor);
    const int outer = inner.quotient(number), in = number - outer * static_cast<int>(inner.divisor);
    const int channel = by_lines ? in : outer, line = by_lines ? outer : in;
    return {k < columns ? places.pixel(channel, line, j) : typename Places::Pixel(),
            channel * plane + line * static_cast<int>(run.divisor) + j, channel};
  }

  template <class E>
  __device__ __forceinline__ auto place(int row) const {
    return places.place(static_cast<const E*>(images), row);
  }

  // The row of a patch in the tokens.
  __device__ __forceinline__ int token(int row) const {
    return prefix > 0 ? row + (places.image_of(row) + 1) * prefix : row;
  }

  // The first image whose patches begin at row or after it.
  __device__ __forceinline__ int image_from(int row) const { return row > 0 ? places.image_of(row - 1) + 1 : 0; }
};

}  // namespace patch_embed
}  // namespace fastvit
