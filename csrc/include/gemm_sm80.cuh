// The matrix product of compute capability 8.0 and later: C (m, n) = A (m, k) B (n, k)^T for 16-bit A and B, summed in
// float32 by mma.sync, one tile of C per block. It is the part that every GEMM-like kernel here shares; what an operand
// is (a matrix, or patches of an image) is its loader's business, and what becomes of C is the kernel's.
//
// Memory: A and B come in steps of tile.k, through a ring of tile.stages stages in shared memory. An operand lies in
// its stage as it lies in memory, contiguous along k ("k_major", rows of tile.k values) or along m or n ("mn_major",
// rows of tile.m or tile.n values), in the places of swizzle.cuh; ldmatrix reads the first, ldmatrix.trans the second,
// and both give the same fragments: no layout costs more than another, and no access meets a bank conflict.
//
// Time: while step t is multiplied, steps t + 1 .. t + stages - 1 are on their way, and the fragments of the next 16 of
// k are read while those of the last 16 are multiplied, across the borders of steps too. There is one barrier a step:
// it says both that step t + 1 has landed and that the stage of step t may be overwritten.
//
// How to use it:
//
//   constexpr Tile tile = {128, 128, 32, 2, 2, 3};
//   using G = Gemm<T, tile, Layout::k_major, Layout::k_major>;          // __launch_bounds__(tile.threads())
//   T* shared = reinterpret_cast<T*>(shared_memory());                  // launched with G::kSharedBytes
//   typename G::LoaderA a(...);                                         // of matrices; or your own, see below
//   typename G::LoaderB b(...);
//   typename G::Sum sum = {};
//   G::multiply(sum, a, b, steps, shared);                              // steps = ceil(k / tile.k), may be 0
//   const int column = G::template piece_column<8>();                   // in the tile: that of all pieces of a lane
//   G::template for_each_piece<8>(sum, shared, [&](int row, float (&values)[8]) { ... 8 neighbours in a row ... });
//
// (A __global__ template can't have a Tile as its parameter: nvcc 13.0 writes a host stub that does not compile. Give
// it an index into a table of tiles.)
//
// All threads of the block call multiply and for_each_piece (the pieces outside of C are yours to drop); a second
// multiply in the same block needs a __syncthreads() before it.
//
// A loader of your own fills the tile of one operand. It is constructed with wherever its block begins and has
//
//   void fetch(T* tile);   // starts loading the next step: called for step 0, 1, 2 .. in order, once each
//   void store(T* tile);   // completes what the last fetch started; the same tile
//
// and it writes value (row, column) of the step, row < kRows and column < kColumns (k_major: tile.m or tile.n by
// tile.k; mn_major: tile.k by tile.m or tile.n), to tile[Swizzle<kColumns>::at(row, column / 8) + column % 8], all of
// them: zeros where there is nothing. One that copies with ptx::copy_async does it in fetch and leaves store empty
// (commit and wait are multiply's). One that computes what it stores loads into registers in fetch and writes from them
// in store: store comes one step of products after fetch, so the loads' latency is hidden. Choose its threads by rows
// of 16-byte chunks as MatrixLoader does, and its stores meet no bank conflict either.
#pragma once

#include "swizzle.cuh"

namespace fastvit {

// What one block computes: m x n of C in steps of k, by warps_m x warps_n warps, with `stages` steps in shared memory.
struct Tile {
  int m, n, k, warps_m, warps_n, stages;
  constexpr int threads() const { return 32 * warps_m * warps_n; }
};

enum class Layout { k_major, mn_major };

// Copies one operand's steps from a matrix in memory. `extent` is tile.m or tile.n.
template <class T, Layout layout, int extent, int k, int threads>
struct MatrixLoader {
  static constexpr bool kAlongRows = layout == Layout::k_major;
  static constexpr int kRows = kAlongRows ? extent : k, kColumns = kAlongRows ? k : extent;
  static constexpr int kChunks = kColumns / 8;        // of a row
  static constexpr int kRowStep = threads / kChunks;  // neighbouring threads copy neighbouring chunks
  static_assert(threads % kChunks == 0 && kRowStep % 8 == 0 && kRows % kRowStep == 0);

  const T* next;  // this thread's first chunk of the next step
  int64_t stride;
  int rows, columns;  // that are left from there on

  // The matrix has rows of `stride` elements, 16-byte aligned. Of what is contracted take [begin, end), of the other
  // dimension, `size` long, what starts at `first`; all of them are columns in the layout's order, multiples of 8
  // there.
  __device__ __forceinline__ MatrixLoader(const void* matrix, int64_t stride, int first, int size, int begin, int end)
      : stride(stride) {
    const int row = threadIdx.x / kChunks, column = threadIdx.x % kChunks * 8;
    rows = (kAlongRows ? size - first : end - begin) - row;
    columns = (kAlongRows ? end - begin : size - first) - column;
    next = static_cast<const T*>(matrix) + ((kAlongRows ? first : begin) + row) * stride +
           (kAlongRows ? begin : first) + column;
  }

  __device__ __forceinline__ void fetch(T* tile) {
    T* to = tile + Swizzle<kColumns>::at(threadIdx.x / kChunks, threadIdx.x % kChunks);
#pragma unroll
    for (int row = 0; row < kRows; row += kRowStep) {
      ptx::copy_async(to + row * kColumns, next + row * stride, row < rows && columns > 0);
    }
    next += kAlongRows ? k : k * stride;
    (kAlongRows ? columns : rows) -= k;
  }

  __device__ __forceinline__ void store(T*) {}
};

// A matrix of C's shape that an epilogue reads beside C, from the tile's corner on, or none: rows of 16-byte aligned
// pieces of 8 values, `row_bytes` apart; `rows` and `columns` are left of it.
struct Beside {
  const char* corner = nullptr;
  int64_t row_bytes = 0;
  int element_bytes = 2;  // or 4
  int rows = 0, columns = 0;
};

// Nothing to do to the fragments of A.
struct AsLoaded {
  template <class Fragments>
  __device__ __forceinline__ void operator()(Fragments&, int) {}
};

template <class T, Tile tile, Layout a_layout, Layout b_layout>
struct Gemm {
  static constexpr int kThreads = tile.threads();
  static constexpr int kWarpM = tile.m / tile.warps_m, kWarpN = tile.n / tile.warps_n;
  static constexpr int kBlocksM = kWarpM / 16, kBlocksN = kWarpN / 16;  // ldmatrix reads 16 x 16
  static constexpr int kSlices = tile.k / 16;
  static constexpr int kSizeA = tile.m * tile.k, kStage = kSizeA + tile.n * tile.k;  // in elements
  static_assert(kWarpM % 16 == 0 && (kWarpN == 32 || kWarpN == 64));
  static_assert(kSlices % 2 == 0, "the two sets of fragments alternate");
  static_assert(tile.stages >= 3, "a loader's store comes a step late");

  // The epilogue's, for each warp: 16 rows in float32, and twice what lies beside them.
  static constexpr int kBandBytes = 16 * kWarpN * 4, kHalfPiece = 32 * 16;
  static constexpr int kWarpEpilogueBytes = 3 * kBandBytes;
  static constexpr int kEpilogueBytes = tile.warps_m * tile.warps_n * kWarpEpilogueBytes;
  static constexpr int kStagesBytes = tile.stages * kStage * 2;
  static constexpr int kSharedBytes = kStagesBytes > kEpilogueBytes ? kStagesBytes : kEpilogueBytes;

  using LoaderA = MatrixLoader<T, a_layout, tile.m, tile.k, kThreads>;
  using LoaderB = MatrixLoader<T, b_layout, tile.n, tile.k, kThreads>;

  struct Sum {
    float at[kBlocksM][2 * kBlocksN][4];  // mma's fragments of the warp's part of C
  };

  // sum += A B^T over `steps` steps. each(fragments (kBlocksM, 4) of A, k) sees, and may change, A's 16 columns from k
  // on just before they are multiplied.
  template <class LoadA, class LoadB, class Each = AsLoaded>
  __device__ __forceinline__ static void multiply(
      Sum& sum, LoadA& load_a, LoadB& load_b, int steps, T* shared, Each&& each = {}) {
    const int lane = threadIdx.x % 32;
    using ReaderA = Reader<a_layout, tile.m, true>;
    using ReaderB = Reader<b_layout, tile.n, false>;
    const int a_lane = ReaderA::lane_offset(warp_m() * kWarpM, lane);
    const int b_lane = ReaderB::lane_offset(warp_n() * kWarpN, lane);
    const auto fetch = [&](int stage) {
      load_a.fetch(shared + stage * kStage);
      load_b.fetch(shared + stage * kStage + kSizeA);
    };
    const auto store = [&](int stage) {
      load_a.store(shared + stage * kStage);
      load_b.store(shared + stage * kStage + kSizeA);
    };
    uint32_t a[2][kBlocksM][4], b[2][kBlocksN][4];
    const auto read = [&](int set, int stage, int slice) {
      const T* from = shared + stage * kStage;
#pragma unroll
      for (int i = 0; i < kBlocksM; ++i) ReaderA::read(a[set][i], from, a_lane, i, slice);
#pragma unroll
      for (int j = 0; j < kBlocksN; ++j) ReaderB::read(b[set][j], from + kSizeA, b_lane, j, slice);
    };

#pragma unroll
    for (int i = 0; i < tile.stages - 1; ++i) {
      if (i < steps) {
        fetch(i);
        store(i);
      }
      ptx::copy_async_commit();
    }
    if (steps <= 0) return;
    ptx::copy_async_wait<tile.stages - 2>();
    __syncthreads();
    read(0, 0, 0);
    int reading = 0, writing = tile.stages - 1;
    for (int step = 0; step < steps; ++step) {
      const int coming = step + tile.stages - 1;
#pragma unroll
      for (int slice = 0; slice < kSlices; ++slice) {
        const int set = slice % 2;
        if (slice + 1 < kSlices) {
          read(set ^ 1, reading, slice + 1);
        } else {
          ptx::copy_async_wait<tile.stages - 2>();
          __syncthreads();
          reading = reading + 1 < tile.stages ? reading + 1 : 0;
          if (step + 1 < steps) read(set ^ 1, reading, 0);
        }
        if (slice == 0) {  // into the stage of the step before this one
          if (step > 0 && coming <= steps) store(writing > 0 ? writing - 1 : tile.stages - 1);
          if (coming < steps) fetch(writing);
          ptx::copy_async_commit();
          writing = writing + 1 < tile.stages ? writing + 1 : 0;
        }
        each(a[set], step * tile.k + slice * 16);
#pragma unroll
        for (int i = 0; i < kBlocksM; ++i) {
#pragma unroll
          for (int j = 0; j < kBlocksN; ++j) {
            const int turn = i % 2 == 0 ? j : kBlocksN - 1 - j;  // back and forth: neighbours share a register operand
            ptx::mma<T>(sum.at[i][2 * turn], a[set][i], {b[set][turn][0], b[set][turn][1]});
            ptx::mma<T>(sum.at[i][2 * turn + 1], a[set][i], {b[set][turn][2], b[set][turn][3]});
          }
        }
      }
    }
  }

  // What the epilogue does with C: f(row, values, beside) for values (row, column .. column + width) of the tile,
  // column = piece_column<width>(), for all rows that fall to this lane. 16 rows of a warp at a time (a band) are
  // turned through shared memory, so that neighbouring lanes hold neighbouring pieces of a row and can load and store
  // 16 bytes each.
  //
  // A matrix of C's shape that is read beside it (a residual, say) comes a band ahead, into places that only this lane
  // reads: the epilogue waits for memory once, not once for every piece. The constructor starts the first band, so that
  // what the caller loads before for_each comes at the same time. load_piece<U>(values, beside) reads a piece of it.
  //
  // Banks: chunk c (16 bytes) of row r lies at c ^ 2 (r % 4), and its neighbours change places in odd rows and in the
  // right half of 64 columns. The 4 rows x 8 columns that half a warp writes as pairs are then 32 different banks, and
  // so are the 8 chunks that a quarter reads: every second one of a row or two for width 8, neighbours for width 4.
  template <int width>
  class Pieces {
    static_assert(width == 4 || width == 8);
    static constexpr int kInRow = kWarpN / width, kRows = 32 / kInRow;  // a warp sees kRows rows at once
    static constexpr int kPasses = 16 / kRows;

    Beside beside_;
    float* band_;
    char* beside_band_;  // two of them: kPasses places of 32 bytes for each lane

    __device__ __forceinline__ static int lane() { return threadIdx.x % 32; }
    __device__ __forceinline__ static int place(int row, int chunk) {
      return row * kWarpN + (chunk ^ (row & 3) << 1 ^ ((chunk >> 3 ^ row) & 1)) * 4;
    }
    __device__ __forceinline__ static int row_of(int band, int pass) {
      return warp_m() * kWarpM + band * 16 + pass * kRows + lane() / kInRow;
    }
    __device__ __forceinline__ char* beside_of(int band, int pass) const {
      return beside_band_ + ((band % 2 * kPasses + pass) * 2 * 32 + lane()) * 16;
    }

    __device__ __forceinline__ void read_beside(int band) {
      if (width != 8 || !beside_.corner) return;
      const int column = piece_column<width>();
#pragma unroll
      for (int pass = 0; pass < kPasses; ++pass) {
        const int row = row_of(band, pass);
        const bool inside = row < beside_.rows && column < beside_.columns;
        const char* from = beside_.corner + row * beside_.row_bytes + column * beside_.element_bytes;
        ptx::copy_async(beside_of(band, pass), from, inside);
        if (beside_.element_bytes == 4) ptx::copy_async(beside_of(band, pass) + kHalfPiece, from + 16, inside);
      }
      ptx::copy_async_commit();
    }

   public:
    __device__ __forceinline__ Pieces(void* shared, const Beside& beside) : beside_(beside) {
      char* own = static_cast<char*>(shared) + threadIdx.x / 32 * kWarpEpilogueBytes;
      band_ = reinterpret_cast<float*>(own);
      beside_band_ = own + kBandBytes;
      read_beside(0);
    }

    template <class F>
    __device__ __forceinline__ void for_each(const Sum& sum, F&& f) {
      const int g = lane() / 4, t = lane() % 4;
#pragma unroll
      for (int band = 0; band < kBlocksM; ++band) {
        if (band + 1 < kBlocksM) read_beside(band + 1);
#pragma unroll
        for (int j = 0; j < 2 * kBlocksN; ++j) {
          float* to = band_ + place(g, 2 * j + t / 2) + t % 2 * 2;
          const float(&c)[4] = sum.at[band][j];
          *reinterpret_cast<Vector<float, 2>*>(to) = {c[0], c[1]};
          *reinterpret_cast<Vector<float, 2>*>(to + 8 * kWarpN) = {c[2], c[3]};
        }
        if (band + 1 < kBlocksM) {
          ptx::copy_async_wait<1>();
        } else {
          ptx::copy_async_wait<0>();
        }
        __syncwarp();
#pragma unroll 1
        for (int pass = 0; pass < kPasses; ++pass) {
          const int row = pass * kRows + lane() / kInRow;
          float values[width];
#pragma unroll
          for (int c = 0; c < width / 4; ++c) {
            const auto four =
                *reinterpret_cast<const Vector<float, 4>*>(band_ + place(row, lane() % kInRow * (width / 4) + c));
#pragma unroll
            for (int e = 0; e < 4; ++e) values[4 * c + e] = four.at[e];
          }
          f(row_of(band, pass), values, beside_of(band, pass));
        }
        __syncwarp();
      }
    }
  };

  template <class U>
  __device__ __forceinline__ static void load_piece(float (&values)[8], const char* beside) {
    constexpr int kLane = 16 / sizeof(U);
#pragma unroll
    for (int i = 0; i < 8; i += kLane) {
      const auto part = *reinterpret_cast<const Vector<U, kLane>*>(beside + i / kLane * kHalfPiece);
#pragma unroll
      for (int e = 0; e < kLane; ++e) values[i + e] = to_float(part.at[e]);
    }
  }

  // The same with nothing beside C: f(row, values).
  template <int width, class F>
  __device__ __forceinline__ static void for_each_piece(const Sum& sum, void* shared, F&& f) {
    Pieces<width>(shared, {}).for_each(sum, [&](int row, float(&values)[width], const char*) { f(row, values); });
  }

  template <int width>
  __device__ __forceinline__ static int piece_column() {
    return warp_n() * kWarpN + threadIdx.x % 32 % (kWarpN / width) * width;
  }

  __device__ __forceinline__ static int warp_m() { return threadIdx.x / 32 % tile.warps_m; }
  __device__ __forceinline__ static int warp_n() { return threadIdx.x / 32 / tile.warps_m; }

 private:
  // Reads 16 x 16 blocks of one operand as fragments: for A a[0..3] of mma, for B b[0], b[1] of 8 rows and of the next
  // 8.
  template <Layout layout, int extent, bool is_a>
  struct Reader {
    static constexpr bool kAlongRows = layout == Layout::k_major;
    static constexpr int kColumns = kAlongRows ? tile.k : extent;

    // Of the row of which this lane gives ldmatrix the address, in block 0 of the warp (from `first` on) and slice 0.
    // Fragments 1 and 2 are a step of 8 in m (A) or k (B) and in k (A) or n (B) from 0: along a row, or to other rows.
    __device__ __forceinline__ static int lane_offset(int first, int lane) {
      constexpr bool kRowsFirst = is_a == kAlongRows;
      const int row = lane % 8 + (kRowsFirst ? lane / 8 % 2 : lane / 16) * 8;
      const int chunk = kRowsFirst ? lane / 16 : lane / 8 % 2;
      return Swizzle<kColumns>::at(kAlongRows ? first + row : row, kAlongRows ? chunk : first / 8 + chunk);
    }

    // Down, 16 rows are a constant; along, 2 chunks flip bits that are free in block 0 and slice 0.
    __device__ __forceinline__ static void read(
        uint32_t (&r)[4], const T* from, int lane_offset, int block, int slice) {
      const int along = kAlongRows ? slice : block, down = kAlongRows ? block : slice;
      const T* row = from + (lane_offset ^ along * 16) + down * 16 * kColumns;
      if constexpr (kAlongRows) {
        ptx::ldmatrix(r, row);
      } else {
        ptx::ldmatrix_transposed(r, row);
      }
    }
  };
};

// Row and column of the first element of tile number `number`, in an order that keeps kGroup rows of tiles together:
// what they read of B is then in L2 while they need it.
struct Origin {
  int row, column;
};

__device__ __forceinline__ Origin tile_origin(const Tile& tile, int number, int rows, int columns) {
  constexpr int kGroup = 8;
  const int down = (rows + tile.m - 1) / tile.m, across = (columns + tile.n - 1) / tile.n;
  const int group = number / (kGroup * across), within = number % (kGroup * across);
  const int height = min(down - group * kGroup, kGroup);
  return {(group * kGroup + within % height) * tile.m, within / height * tile.n};
}

}  // namespace fastvit
