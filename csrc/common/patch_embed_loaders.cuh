// Operands of patch embedding's products, as loaders of gemm_sm80.cuh: patches gathered from the images, and rows of a
// matrix that MatrixLoader does not take.
//
// A thread fills the same 8 columns of several rows of a tile, so what it divides by to find a column it does once a
// step for all of them. Both loaders write 16-byte chunks by rows to the places of swizzle.cuh: no bank conflicts.
#pragma once

#include "gemm_sm80.cuh"
#include "patch_embed_patches.cuh"

namespace fastvit {
namespace patch_embed {

// What both loaders share: a thread fills chunk() (8 columns) of rows row(0), row(1), ... of a tile, row by row.
template <int kRows, int kColumns, int kThreads>
struct Share {
  static constexpr int kChunks = kColumns / 8;
  static constexpr int kPasses = kRows * kChunks / kThreads;

  __device__ __forceinline__ static int chunk() { return threadIdx.x % kChunks; }
  __device__ __forceinline__ static int row(int pass) { return threadIdx.x / kChunks + pass * (kThreads / kChunks); }

  template <class T>
  __device__ __forceinline__ static T* at(T* tile, int pass) {
    return tile + Swizzle<kColumns>::at(row(pass), chunk());
  }
};

// A tile of a row-major matrix, rows anywhere. kAligned: each begins at a multiple of 16 bytes.
template <class T, int kRows, int kColumns, int kThreads, bool kAligned>
struct RowTile : Share<kRows, kColumns, kThreads> {
  using Share<kRows, kColumns, kThreads>::kPasses;

  const T* rows[kPasses];
  bool there[kPasses];
  int first = 0;   // column of this thread's chunk
  int inside = 0;  // how many columns there are from there on
  int width;       // columns that one load may take: 8, or 2 or 1 where not aligned
  Vector<T, 2> raw[kPasses][4];

  __device__ __forceinline__ explicit RowTile(int width = 8) : width(width) {}

  // Row r of the tile is row first + r of those before `end`, and at(row) is where it lies.
  template <class F>
  __device__ __forceinline__ void place_rows(const T* matrix, int first, int end, F at) {
#pragma unroll
    for (int i = 0; i < kPasses; ++i) {
      rows[i] = matrix + at(first + this->row(i));
      there[i] = first + this->row(i) < end;
    }
  }

  __device__ __forceinline__ void place_columns(int column, int count) { first = column, inside = count; }

  __device__ __forceinline__ void fetch(T* tile) {
    if (kAligned || width == 8) {
#pragma unroll
      for (int i = 0; i < kPasses; ++i) ptx::copy_async(this->at(tile, i), rows[i] + first, there[i] && inside > 0);
    } else if (width == 2) {
#pragma unroll
      for (int i = 0; i < kPasses; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          raw[i][j] = {};
          if (there[i] && 2 * j < inside) {
            raw[i][j] = *reinterpret_cast<const Vector<T, 2>*>(rows[i] + first + 2 * j);
          }
        }
      }
    } else {
#pragma unroll
      for (int i = 0; i < kPasses; ++i) {
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          raw[i][j / 2].at[j % 2] = there[i] && j < inside ? rows[i][first + j] : T{};
        }
      }
    }
  }

  __device__ __forceinline__ void store(T* tile) {
    if constexpr (!kAligned) {
      if (width == 8) return;
#pragma unroll
      for (int i = 0; i < kPasses; ++i) {
        *reinterpret_cast<Vector<uint32_t, 4>*>(this->at(tile, i)) =
            reinterpret_cast<const Vector<uint32_t, 4>&>(raw[i]);
      }
    }
  }
};

// An exact float of a pixel. An integer below 2^23 is the low bits of the float 2^23 + itself: two full-rate
// instructions, where the conversion of an integer is slower.
__device__ __forceinline__ float exact(uint32_t x) {
  const uint32_t bits = 0x4B000000u | x;
  return reinterpret_cast<const float&>(bits) - 8388608.f;
}
__device__ __forceinline__ float exact(unsigned char x) { return exact(static_cast<uint32_t>(x)); }
template <class T>
__device__ __forceinline__ float exact(T x) {
  return to_float(x);
}

// A pixel of a channels-last image of three channels.
struct Rgb {
  unsigned char channel[3];
};

template <class Pixel> using ElementOf = std::conditional_t<std::is_same_v<Pixel, Rgb>, unsigned char, Pixel>;

// kWidth neighbours of one channel, as one access loads them; for Rgb the bytes of all three channels.
template <class Pixel, int kWidth>
struct Piece {
  Vector<Pixel, kWidth> pixels;

  __device__ __forceinline__ void load(const Pixel* from) {
    pixels = *reinterpret_cast<const Vector<Pixel, kWidth>*>(from);
  }
  __device__ __forceinline__ void pick(int) {}
  __device__ __forceinline__ Pixel at(int i) const { return pixels.at[i]; }
};

// Bytes stay in the words they come in: taken apart where they are used, not where they are loaded.
template <int kWords>
struct Bytes {
  uint32_t words[kWords];

  __device__ __forceinline__ void load(const unsigned char* from) {
#pragma unroll
    for (int i = 0; i < kWords; i += 2) {
      const auto two = *reinterpret_cast<const Vector<uint32_t, 2>*>(from + 4 * i);
      words[i] = two.at[0], words[i + 1] = two.at[1];
    }
  }
  __device__ __forceinline__ uint32_t byte(int i) const { return words[i / 4] >> i % 4 * 8 & 255; }
};

template <>
struct Piece<unsigned char, 8> : Bytes<2> {
  __device__ __forceinline__ void pick(int) {}
  __device__ __forceinline__ uint32_t at(int i) const { return byte(i); }
};

template <>
struct Piece<Rgb, 8> : Bytes<6> {
  // Moves the channel to where the first one is: six shifts of two words, for eight pixels.
  __device__ __forceinline__ void pick(int channel) {
#pragma unroll
    for (int i = 0; i < 6; ++i) {
      const uint64_t next = i < 5 ? words[i < 5 ? i + 1 : 5] : 0;
      words[i] = static_cast<uint32_t>((next << 32 | words[i]) >> (8 * channel & 31));
    }
  }
  __device__ __forceinline__ uint32_t at(int i) const { return byte(3 * i); }
};

using Scale = Vector<float, 2>;  // of a channel: a pixel becomes pixel * at[0] + at[1]

// A tile of patches in T, kWidth pixels a load.
template <class Places, class T, class Pixel, int kWidth, int kRows, int kColumns, int kThreads>
struct PatchTile : Share<kRows, kColumns, kThreads> {
  using Share<kRows, kColumns, kThreads>::kChunks;
  using Share<kRows, kColumns, kThreads>::kPasses;
  static constexpr int kPieces = 8 / kWidth;
  static constexpr bool kDirect = std::is_same_v<T, Pixel> && kWidth == 8;
  using Element = ElementOf<Pixel>;

  const Patches<Places>& patches;
  const Scale* scales;  // (C,) in shared memory
  typename Places::template Place<Element> rows[kPasses];
  bool there[kPasses];
  typename Patches<Places>::Column columns[kPieces];
  Piece<Pixel, kWidth> raw[kPasses][kPieces];

  __device__ __forceinline__ PatchTile(const Patches<Places>& patches, const Scale* scales)
      : patches(patches), scales(scales) {}

  // What tables say is looked up once for all neighbours who fill the same rows: the i-th of them asks for row(i).
  __device__ __forceinline__ void place_rows(int first, int end) {
    if constexpr (std::is_same_v<Places, Packed>) {
      static_assert(kPasses <= kChunks && 32 % kChunks == 0);
      const auto own = patches.template place<Element>(first + this->row(this->chunk() % kPasses));
#pragma unroll
      for (int i = 0; i < kPasses; ++i) {
        rows[i] = own.of_lane(threadIdx.x % 32 - this->chunk() + i, static_cast<const Element*>(patches.images));
      }
    } else {
#pragma unroll
      for (int i = 0; i < kPasses; ++i) rows[i] = patches.template place<Element>(first + this->row(i));
    }
#pragma unroll
    for (int i = 0; i < kPasses; ++i) there[i] = first + this->row(i) < end;
  }

  __device__ __forceinline__ void place_columns(int first) {
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
      columns[i] = patches.column(first + this->chunk() * 8 + i * kWidth);
      if constexpr (std::is_same_v<Pixel, Rgb>) columns[i].pixel.offset -= columns[i].channel;
    }
  }

  __device__ __forceinline__ void fetch(T* tile) {
#pragma unroll
    for (int i = 0; i < kPasses; ++i) {
#pragma unroll
      for (int j = 0; j < kPieces; ++j) {
        const bool inside = there[i] && columns[j].pixel.there();
        if constexpr (kDirect) {
          ptx::copy_async(this->at(tile, i), inside ? rows[i].at(columns[j].pixel) : rows[i].first, inside);
        } else {
          raw[i][j] = {};
          if (inside) raw[i][j].load(rows[i].at(columns[j].pixel));
        }
      }
    }
  }

  __device__ __forceinline__ void store(T* tile) {
    if constexpr (!kDirect) {
      Scale scale[kPieces];
#pragma unroll
      for (int j = 0; j < kPieces; ++j) {
        scale[j] = {1.f, 0.f};
        if (patches.normalise) scale[j] = columns[j].pixel.there() ? scales[columns[j].channel] : Scale{0.f, 0.f};
      }
#pragma unroll
      for (int i = 0; i < kPasses; ++i) {
#pragma unroll
        for (int j = 0; j < kPieces; ++j) raw[i][j].pick(columns[j].channel);
        *reinterpret_cast<Vector<uint32_t, 4>*>(this->at(tile, i)) =
            std::is_same_v<T, Pixel> && !patches.normalise ? copied(raw[i]) : computed(raw[i], scale);
      }
    }
  }

 private:
  using Raw = Piece<Pixel, kWidth>[kPieces];

  __device__ __forceinline__ static Vector<uint32_t, 4> copied(const Raw& raw) {
    Vector<uint32_t, 4> words = {};
    if constexpr (std::is_same_v<T, Pixel>) {
      Vector<T, 8> all;
#pragma unroll
      for (int e = 0; e < 8; ++e) all.at[e] = raw[e / kWidth].at(e % kWidth);
      words = reinterpret_cast<const Vector<uint32_t, 4>&>(all);
    }
    return words;
  }

  __device__ __forceinline__ static Vector<uint32_t, 4> computed(const Raw& raw, const Scale (&scale)[kPieces]) {
    Vector<uint32_t, 4> words;
#pragma unroll
    for (int e = 0; e < 8; e += 2) {
      const Scale a = scale[e / kWidth], b = scale[(e + 1) / kWidth];
      words.at[e / 2] = pack<T>(
          fmaf(exact(raw[e / kWidth].at(e % kWidth)), a.at[0], a.at[1]),
          fmaf(exact(raw[(e + 1) / kWidth].at((e + 1) % kWidth)), b.at[0], b.at[1]));
    }
    return words;
  }
};

// A loader that is told where its next tile is before it fetches it, by place(loader, step).
template <class Loader, class Place>
struct Stepping : Loader {
  Place place;
  int step = 0;

  __device__ __forceinline__ Stepping(const Loader& loader, Place place) : Loader(loader), place(place) {}

  template <class T>
  __device__ __forceinline__ void fetch(T* tile) {
    place(*static_cast<Loader*>(this), step++);
    Loader::fetch(tile);
  }
};

// Scale and shift of every channel: divisions are done here, a pixel costs one multiply-add.
template <int kThreads, class Places>
__device__ __forceinline__ const Scale* fill_scales(const Patches<Places>& patches, char* shared) {
  Scale* scales = reinterpret_cast<Scale*>(shared);
  if (patches.normalise) {
    for (int c = threadIdx.x; c < patches.channels; c += kThreads) {
      const float mean = patches.mean == nullptr ? 0.f : patches.mean[c];
      const float std = patches.std == nullptr ? 1.f : patches.std[c];
      scales[c] = {patches.unit / std, -mean / std};
    }
    __syncthreads();
  }
  return scales;
}

}  // namespace patch_embed
}  // namespace fastvit
