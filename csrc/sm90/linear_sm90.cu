// The GEMMs of a linear layer on Hopper (compute capability 9.0), float16 and bfloat16, products summed in float32:
//
//   forward           out (M, N)         = residual + row_scale * gamma * act(x (M, K) weight (N, K)^T + bias)
//   input gradient    dx (M, K)          = dout (M, N) weight (N, K), with an activation * act'(preact)
//   weight gradient   partials (S, N, K) = dout[split]^T x[split], and the column sums of dout
//
// One kernel for the three; below, M, N and K are its own: out (M, N) = A (M, K) B (K, N). The sum runs along the rows
// of an operand in memory (Major::k) or across them (Major::mn); the tensor memory accelerator (TMA) brings both as they
// lie, wgmma reads both as they lie, so nothing is ever transposed:
//
//                    A                  B
//   forward          x       k          weight  k
//   input gradient   dout    k          weight  mn
//   weight gradient  dout    mn         x       mn
//
// Roles. A block is one warpgroup that produces and two that consume, one block to a multiprocessor, and it walks the
// tiles blockIdx.x, blockIdx.x + gridDim.x, ... One thread of the producer issues TMA copies into a ring of stages (64
// of the sum each), whatever tile they belong to; consumers multiply them with wgmma straight from shared memory, the
// sum in their registers. A stage has two mbarriers: `full` (its bytes have landed) and `empty` (every consumer warp has
// finished reading).
//
//                    tile 0                    tile 1                    tile 2
//   producer     |load load load load load load load load load load load load load ...
//   consumer 0     |wgmma ............. epilogue ...........|            |wgmma ...
//   consumer 1                 waits    |wgmma .............. epilogue ...........|
//
// With team 1 the consumers take turns, as drawn: each has a tile of its own, and the tensor cores work for one
// while the other is in its epilogue, which for K = 768 and an erf GELU takes as long as half the products. The mbarriers
// `turn` hand over when the last stage of a tile has been seen. With team 2 both work on one tile, half its rows each,
// which halves the registers it takes (256 columns then fit) and the bytes that come from L2 for a product.
//
// Bytes. Every operand is read from device memory about once: the tiles that run at one time are kGroup rows of tiles
// by a few columns, so that their operands stay in L2. Each tile in shared memory has 128-byte rows under TMA's 128-byte
// swizzle, the layout in which wgmma reads without bank conflicts. Outputs never go through shared memory: lanes of a
// quad exchange their accumulators so that each holds 8 neighbouring columns of a row, and loads and stores are 16 bytes
// a lane, 64 a quad: whole sectors. The epilogue works on float32 and each output is rounded once. What it reads there (the
// residual; the pre-activation) two warps of the producer bring by TMA into a small ring for each consumer.
#include "activations.cuh"
#include "hopper.cuh"
#include "linear_sm90_tiles.h"
#include "ops.h"
#include "vectors.cuh"

namespace fastvit::sm90 {

bool linear_takes(int64_t m, int64_t n, int64_t k);

namespace {

constexpr int kWarpgroup = 128;
constexpr int kThreads = 3 * kWarpgroup;
constexpr int kGroup = 16;  // rows of tiles that share the columns of B while those are in L2
constexpr int kSpan = 128;  // bytes: a row of the swizzle, kBlockK values
constexpr int kBox = 64;    // rows of wgmma's A; columns of an mn-major tile that TMA brings at once
constexpr int kSlots = 2;   // of each consumer's ring of the streamed matrix

using ptx::Major;
using ptx::TensorMap;

// ---- 8 neighbours of a row, of any floating dtype ---------------------------------------------------------------------

template <class T> using Part = Vector<T, 16 / sizeof(T)>;  // 16 bytes of them

// f(i, value i) for each of the 8, which read(T(), part) reads 16 bytes at a time. T is Known, or if that is Any by dtype.
template <class Known, class Read, class F>
__device__ __forceinline__ void for_eight(DType dtype, Read read, F f) {
  with_type<Known>(dtype, [&](auto type) {
    using T = decltype(type);
    constexpr int kPart = 16 / sizeof(T);
#pragma unroll
    for (int i = 0; i < 8; i += kPart) {
      const Part<T> part = read(type, i / kPart);
#pragma unroll
      for (int j = 0; j < kPart; ++j) f(i + j, to_float(part.at[j]));
    }
  });
}

// read() for a matrix or vector in global memory; `aligned`: to 16 bytes.
__device__ __forceinline__ auto from(const Matrix& m, int64_t row, int col, bool aligned) {
  return [&m, offset = row * m.stride + col, aligned](auto type, int i) {
    using T = decltype(type);
    const T* values = static_cast<const T*>(m.data) + offset + i * (16 / sizeof(T));
    if (aligned) return *reinterpret_cast<const Part<T>*>(values);
    Part<T> part;
#pragma unroll
    for (int j = 0; j < 16 / int(sizeof(T)); ++j) part.at[j] = values[j];
    return part;
  };
}

// ---- Epilogues: write() 8 outputs, given their sums v and a function that reads the streamed matrix in their place -----

template <class T>
struct Forward {
  Matrix bias;      // (N,) or none
  Matrix gamma;     // (N,) or none
  Matrix residual;  // (M, N) or none
  Matrix preact;    // (M, N) or none: written
  Matrix out;       // (M, N)
  const float* row_scale;  // (B,) or none
  int rows_per_image;
  Activation activation;
  bool aligned;   // bias and gamma
  bool streamed;  // the residual; else it is read here

  template <class Read>
  __device__ __forceinline__ void write(int64_t row, int col, float (&v)[8], Read read) const {
    const auto add = [&](int i, float x) { v[i] += x; };
    const auto scale = [&](int i, float x) { v[i] *= x; };
    if (bias) for_eight<Any>(bias.dtype, from(bias, 0, col, aligned), add);
    if (preact) store<T>(preact, row, col, v);
    with_activation(activation, [&](auto act) {
#pragma unroll
      for (int i = 0; i < 8; ++i) v[i] = act(v[i]).value;
    });
    if (gamma) for_eight<Any>(gamma.dtype, from(gamma, 0, col, aligned), scale);
    if (row_scale != nullptr) {
      const float of_row = row_scale[static_cast<uint32_t>(row) / static_cast<uint32_t>(rows_per_image)];
#pragma unroll
      for (int i = 0; i < 8; ++i) scale(i, of_row);
    }
    if (residual) {
      if (streamed) for_eight<Any>(residual.dtype, read, add);
      else for_eight<Any>(residual.dtype, from(residual, row, col, false), add);
    }
    store<Any>(out, row, col, v);
  }
};

// The forward product of what is not normalised yet, and with a weight that has the norm's weight in it: each row's norm is
// taken from the sums, out = act(rstd * (v - mean * sums) + offsets).
template <class T>
struct FoldedForward {
  Matrix sums;        // (N,) float32
  Matrix offsets;     // (N,) float32
  const float* mean;  // (M,)
  const float* rstd;  // (M,)
  Matrix out;         // (M, N) T
  Activation activation;

  template <class Read>
  __device__ __forceinline__ void write(int64_t row, int col, float (&v)[8], Read) const {
    const float mean_of_row = mean[row], rstd_of_row = rstd[row];
    for_eight<float>(DType::float32, from(sums, 0, col, true), [&](int i, float s) { v[i] = fmaf(-mean_of_row, s, v[i]); });
    for_eight<float>(DType::float32, from(offsets, 0, col, true), [&](int i, float o) { v[i] = fmaf(rstd_of_row, v[i], o); });
    with_activation(activation, [&](auto act) {
#pragma unroll
      for (int i = 0; i < 8; ++i) v[i] = act(v[i]).value;
    });
    store<T>(out, row, col, v);
  }
};

template <class T>
struct InputGradient {
  Matrix hidden;  // (M, N): act(preact); none without a preact, which is streamed
  Matrix out;     // (M, N)
  Activation activation;

  template <class Read>
  __device__ __forceinline__ void write(int64_t row, int col, float (&v)[8], Read read) const {
    if (hidden) {
      float h[8];
      with_activation(activation, [&](auto act) {
        for_eight<T>(dtype_of<T>, read, [&](int i, float p) {
          const Activated both = act(p);
          h[i] = both.value;
          v[i] *= both.slope;
        });
      });
      store<T>(hidden, row, col, h);
    }
    store<Any>(out, row, col, v);
  }
};

struct WeightGradient {
  Matrix out;   // (S * M, N) float32
  float* sums;  // (S * M,) or none: of the rows of A, beside their products

  template <class Read>
  __device__ __forceinline__ void write(int64_t row, int col, float (&v)[8], Read) const {
    store<float>(out, row, col, v);
  }
};

// ---- The kernel -------------------------------------------------------------------------------------------------------

struct Problem {
  int m, n;      // of the output
  int k_blocks;  // of kBlockK
  int splits;    // of the k_blocks: output s, the s-th m rows of it, sums those from s * k_blocks / splits on
  int m_tiles, tiles_of_group, tiles_of_split, tiles;
  int stream_bytes;  // of a value of the streamed matrix; 0 without one
};

// One output tile and its part of the sum.
struct Work {
  int split, row, col;
  int begin, end;  // in k_blocks
};

// Tiles are counted down groups of kGroup rows of tiles, one split after the other.
template <int TILE, bool SPLIT>
__device__ __forceinline__ Work work_of(const Problem& problem, int tile) {
  Work work = {0, 0, 0, 0, problem.k_blocks};
  if constexpr (SPLIT) {
    const auto bound = [&](int s) { return static_cast<int>(static_cast<int64_t>(s) * problem.k_blocks / problem.splits); };
    work.split = tile / problem.tiles_of_split;
    tile -= work.split * problem.tiles_of_split;
    work.begin = bound(work.split);
    work.end = bound(work.split + 1);
    if (work.begin == work.end) {  // more splits than blocks: a block past the end, that is zeros
      work.begin = problem.k_blocks;
      work.end = work.begin + 1;
    }
  }
  const int group = tile / problem.tiles_of_group, height = min(problem.m_tiles - group * kGroup, kGroup);
  tile -= group * problem.tiles_of_group;
  const int col = tile / height;
  work.row = (group * kGroup + tile - col * height) * kTiles[TILE].block_m;
  work.col = col * kTiles[TILE].block_n;
  return work;
}

// Shared memory: stages of A and B, two rings of the streamed matrix, the barriers, and ones to sum with.
template <int TILE>
struct Layout {
  static constexpr int kA = kTiles[TILE].block_m * kSpan, kStage = kA + kTiles[TILE].block_n * kSpan;  // bytes
  static constexpr int kSlot = kBox * kSpan, kRing = kSlots * kSlot;
  static constexpr int kRings = kTiles[TILE].stages * kStage;
  static constexpr int kBarriers = kRings + 2 * kRing;
  static constexpr int kOnes = kBarriers + (2 * kTiles[TILE].stages + 2 + 4 * kSlots) * 8, kOnesBytes = 256;
  static constexpr int kTotal = kOnes + kOnesBytes;
  static_assert(kOnes % 16 == 0 && kTotal <= 232448);
};

// A ring of buffers in shared memory, filled by TMA and read by warps: a place for each, and two mbarriers, `full` (its
// bytes have landed) and `empty` (all that read it are done). Fills are numbered from 0 on.
template <int PLACES>
struct Ring {
  char* buffers;
  int size;  // of a buffer
  uint64_t* full;
  uint64_t* empty;

  __device__ __forceinline__ char* buffer(uint32_t fill) const { return buffers + fill % PLACES * size; }

  __device__ __forceinline__ uint64_t* begin_fill(uint32_t fill) const {
    ptx::mbarrier_wait(empty + fill % PLACES, fill / PLACES % 2 ^ 1);
    ptx::mbarrier_arrive_expect_tx(full + fill % PLACES, size);
    return full + fill % PLACES;
  }

  // Whoever waits for a fill has seen the one before it in that place, or the parity would mean nothing.
  __device__ __forceinline__ void wait(uint32_t fill) const { ptx::mbarrier_wait(full + fill % PLACES, fill / PLACES % 2); }

  // By every lane of a warp that has read it.
  __device__ __forceinline__ void release(uint32_t fill) const {
    __syncwarp();
    if (threadIdx.x % 32 == 0) ptx::mbarrier_arrive(empty + fill % PLACES);
  }

  __device__ __forceinline__ void initialise(int readers) const {
    for (int i = 0; i < PLACES; ++i) {
      ptx::mbarrier_init(full + i, 1);
      ptx::mbarrier_init(empty + i, readers);
    }
  }
};

// Exchanges accumulators within each quad. wgmma leaves the lane with c = lane % 4 columns 2c and 2c + 1 of each 8, so of
// 32 columns of a row it has 4 pairs; after this it has all 8 columns from 8c on. A transposition of 4 x 4 pairs: bit by
// bit, lanes that differ in it swap the pairs whose numbers do.
__device__ __forceinline__ void exchange(float (&v)[8]) {
#pragma unroll
  for (int bit = 1; bit <= 2; bit *= 2) {
    const bool high = threadIdx.x & bit;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if (i / 2 & bit) continue;
      float& low = v[i];
      float& other = v[i + 2 * bit];
      const float got = __shfl_xor_sync(0xffffffff, high ? low : other, bit);
      low = high ? got : low;
      other = high ? other : got;
    }
  }
}

// v = what step `step` of write_tile writes, 4 pairs, for BEGIN <= step < END. Registers have no addresses: branches lead to
// them, kept from becoming as many selections as there are registers.
template <int BEGIN, int END, int ROWS, int SUMS>
__device__ __forceinline__ void take(int step, const float (&d)[ROWS][SUMS], float (&v)[8]) {
  if constexpr (END - BEGIN > 1) {
    constexpr int kMiddle = (BEGIN + END) / 2;
    if (step < kMiddle) take<BEGIN, kMiddle>(step, d, v);
    else take<kMiddle, END>(step, d, v);
  } else {
    constexpr int kSlices = SUMS / 16, kHalf = BEGIN % 2, kSlice = BEGIN / 2 % kSlices, kBoxed = BEGIN / 2 / kSlices;
#pragma unroll
    for (int i = 0; i < 8; ++i) v[i] = d[kBoxed][kSlice * 16 + i / 2 * 4 + kHalf * 2 + i % 2];
    ptx::keep(v);
  }
}

// Hands a warpgroup's sums, 64 rows for each d[i], to the epilogue, 8 rows by 32 columns of each warp at a time: in a loop
// that is not unrolled, for the epilogue is long and the instruction cache is not. `fill` counts the ring's slots.
template <class Epilogue, int ROWS, int SUMS>
__device__ __forceinline__ void write_tile(
    const Problem& problem, const Epilogue& epilogue, const Ring<kSlots>& ring, uint32_t& fill, int split, int row, int col,
    const float (&d)[ROWS][SUMS]) {
  constexpr int kSlices = SUMS / 16;  // of 32 columns
  const int warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
#pragma unroll 1
  for (int step = 0; step < ROWS * kSlices * 2; ++step) {
    const int half = step % 2, slice = step / 2 % kSlices, box = step / 2 / kSlices;
    float v[8];
    take<0, ROWS * kSlices * 2>(step, d, v);
    exchange(v);
    const int in_box = warp * 16 + half * 8 + lane / 4;
    // A slot has 128 bytes of 64 rows: one slice of float32, two of 16-bit values; each is read in two steps.
    const bool wide = problem.stream_bytes == 4;
    const int part = wide ? half : step % 4;
    if (problem.stream_bytes != 0 && part == 0) ring.wait(fill);
    const auto streamed = [&](auto type, int i) {
      const int chunk = wide ? lane % 4 * 2 + i : part / 2 * 4 + lane % 4;
      return *reinterpret_cast<const Part<decltype(type)>*>(
          ring.buffer(fill) + in_box * kSpan + (chunk ^ in_box % 8) * 16);
    };
    const int r = row + box * kBox + in_box, c = col + slice * 32 + lane % 4 * 8;
    if (r < problem.m && c < problem.n) epilogue.write(static_cast<int64_t>(split) * problem.m + r, c, v, streamed);
    if (problem.stream_bytes != 0 && part == (wide ? 1 : 3)) ring.release(fill++);
  }
}

// Brings a stage of an operand whose other side is ROWS long, from `row` on, for the sum from k on. k-major it is ROWS
// rows of 128 bytes; mn-major kBlockK such rows for every kBox of its columns.
template <Major MAJOR, int ROWS>
__device__ __forceinline__ void load_operand(char* stage, const TensorMap& map, uint64_t* full, int row, int k) {
  if constexpr (MAJOR == Major::k) {
    ptx::tma_load(stage, &map, full, k, row);
  } else {
#pragma unroll
    for (int i = 0; i < ROWS; i += kBox) ptx::tma_load(stage + i * kSpan, &map, full, row + i, k);
  }
}

// What wgmma reads of it, and how many bytes on the next 16 of the sum begin.
template <Major MAJOR>
__device__ __forceinline__ uint64_t operand(const char* stage) {
  return ptx::matrix_descriptor(stage, ptx::SwizzleMode::b128, 8 * kSpan, MAJOR == Major::k ? 16 : kBox * kSpan);
}

template <Major MAJOR> constexpr int kStep = MAJOR == Major::k ? 16 * 2 : 16 * kSpan;

template <class T, int TILE, Major A_MAJOR, Major B_MAJOR, class Epilogue>
__global__ void __launch_bounds__(kThreads, 1) linear_sm90_kernel(
    const __grid_constant__ TensorMap a,  // (M, K) in boxes of block_m rows, or (K, M) in boxes of kBox columns
    const __grid_constant__ TensorMap b,  // (N, K) in boxes of block_n rows, or (K, N) in boxes of kBox columns
    const __grid_constant__ TensorMap streamed,  // (M, N) in boxes of kBox rows, if stream_bytes
    Problem problem,
    Epilogue epilogue) {
  using Shared = Layout<TILE>;
  constexpr bool kSums = std::is_same_v<Epilogue, WeightGradient>;
  constexpr int kRows = kTiles[TILE].block_m / kTiles[TILE].team / kBox;  // wgmmas that cover a warpgroup's rows
  char* const shared = shared_memory();
  uint64_t* const barriers = reinterpret_cast<uint64_t*>(shared + Shared::kBarriers);
  uint64_t* const turn = barriers + 2 * kTiles[TILE].stages;
  T* const ones = reinterpret_cast<T*>(shared + Shared::kOnes);
  const Ring<kTiles[TILE].stages> stages = {shared, Shared::kStage, barriers, barriers + kTiles[TILE].stages};
  const auto ring_of = [&](int group) {
    uint64_t* const full = turn + 2 + group * 2 * kSlots;
    return Ring<kSlots>{shared + Shared::kRings + group * Shared::kRing, Shared::kSlot, full, full + kSlots};
  };

  const int thread = threadIdx.x, warp = thread / 32 % 4, lane = thread % 32;
  if (thread == 0) {
    stages.initialise(4 * kTiles[TILE].team);
    for (int group = 0; group < 2; ++group) {
      ptx::mbarrier_init(turn + group, 1);
      ring_of(group).initialise(4);
    }
    ptx::mbarrier_init_fence();
  }
  if (kSums && thread < Shared::kOnesBytes / 2) {
    ones[thread] = from_float<T>(1);
    ptx::fence_async_proxy();
  }
  __syncthreads();

  uint32_t fill = 0;
  if (thread < kWarpgroup) {
    ptx::registers_lower<40>();
    if (lane != 0 || warp == 3 || (warp != 0 && problem.stream_bytes == 0)) return;
    if (warp == 0) {  // the stages
      for (int tile = blockIdx.x; tile < problem.tiles; tile += gridDim.x) {
        const Work work = work_of<TILE, kSums>(problem, tile);
        for (int block = work.begin; block < work.end; ++block, ++fill) {
          uint64_t* const full = stages.begin_fill(fill);
          char* const stage = stages.buffer(fill);
          load_operand<A_MAJOR, kTiles[TILE].block_m>(stage, a, full, work.row, block * kBlockK);
          load_operand<B_MAJOR, kTiles[TILE].block_n>(stage + Shared::kA, b, full, work.col, block * kBlockK);
        }
      }
    } else {  // what consumer group warp - 1 needs in its epilogue
      const int group = warp - 1, columns = kSpan / problem.stream_bytes;
      const Ring<kSlots> ring = ring_of(group);
      const int begin = blockIdx.x + (kTiles[TILE].team == 1 ? group * gridDim.x : 0), step = 2 / kTiles[TILE].team * gridDim.x;
      for (int tile = begin; tile < problem.tiles; tile += step) {
        const Work work = work_of<TILE, kSums>(problem, tile);
        for (int i = 0; i < kRows; ++i) {
          const int row = work.row + ((kTiles[TILE].team == 2 ? group * kRows : 0) + i) * kBox;
          for (int c = 0; c < kTiles[TILE].block_n; c += columns, ++fill) {
            uint64_t* const full = ring.begin_fill(fill);
            ptx::tma_load(ring.buffer(fill), &streamed, full, work.col + c, row);
          }
        }
      }
    }
    return;
  }

  ptx::registers_raise<232>();
  const int group = thread / kWarpgroup - 1;
  const int group_row = kTiles[TILE].team == 2 ? group * kRows * kBox : 0;
  const Ring<kSlots> ring = ring_of(group);
  uint32_t ring_fill = 0;
  int mine = 0;  // tiles that were this warpgroup's
  for (int tile = blockIdx.x, count = 0; tile < problem.tiles; tile += gridDim.x, ++count) {
    const Work work = work_of<TILE, kSums>(problem, tile);
    const int blocks = work.end - work.begin;
    if (kTiles[TILE].team == 1 && count % 2 != group) {
      fill += blocks;
      continue;
    }
    if (kTiles[TILE].team == 1) {
      ptx::mbarrier_wait(turn + group, (mine++ + group + 1) % 2);
      ptx::named_barrier(1 + group, kWarpgroup);  // before the turn goes on, no warp may still wait for this phase
    }
    const auto hand_over = [&] {
      if (kTiles[TILE].team == 1 && thread % kWarpgroup == 0) ptx::mbarrier_arrive(turn + 1 - group);
    };

    float d[kRows][kTiles[TILE].block_n / 2], sums[kRows][4];
    const auto multiply = [&](auto with_sums) {
      const uint64_t all_ones = ptx::matrix_descriptor(ones, ptx::SwizzleMode::none, 128, 128);
#pragma unroll 1
      for (int block = 0; block < blocks; ++block, ++fill) {
        stages.wait(fill);
        if (block == blocks - 1) hand_over();
        const uint64_t a_operand = operand<A_MAJOR>(stages.buffer(fill) + group_row * kSpan);
        const uint64_t b_operand = operand<B_MAJOR>(stages.buffer(fill) + Shared::kA);
        ptx::wgmma_fence();
#pragma unroll
        for (int k = 0; k < kBlockK / 16; ++k) {
          const uint64_t columns = ptx::advance(b_operand, k * kStep<B_MAJOR>);
#pragma unroll
          for (int i = 0; i < kRows; ++i) {
            const uint64_t rows = ptx::advance(a_operand, i * kBox * kSpan + k * kStep<A_MAJOR>);
            ptx::wgmma<T, kTiles[TILE].block_n, A_MAJOR, B_MAJOR>(d[i], rows, columns, block + k > 0);
            if constexpr (with_sums) ptx::wgmma<T, 8, A_MAJOR, Major::k>(sums[i], rows, all_ones, block + k > 0);
          }
        }
        ptx::wgmma_commit();
        ptx::wgmma_wait<1>();  // the block before is done
        if (block > 0) stages.release(fill - 1);
      }
      ptx::wgmma_wait<0>(d, sums);
      stages.release(fill - 1);
    };

    if constexpr (kSums) {
      if (work.col == 0 && epilogue.sums != nullptr) {
        multiply(std::true_type());
      } else {
        multiply(std::false_type());
      }
      if (work.col == 0 && epilogue.sums != nullptr && lane % 4 == 0) {
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const int row = work.row + group_row + i * kBox + warp * 16 + half * 8 + lane / 4;
            if (row < problem.m) epilogue.sums[static_cast<int64_t>(work.split) * problem.m + row] = sums[i][half * 2];
          }
        }
      }
    } else {
      multiply(std::false_type());
    }
    write_tile(problem, epilogue, ring, ring_fill, work.split, work.row + group_row, work.col, d);
  }
}

// ---- Launchers --------------------------------------------------------------------------------------------------------

// A matrix in boxes of 128 bytes by `rows` rows.
TensorMap map_of(const Array& a, int rows) {
  return ptx::make_tensor_map<2>(
      a.dtype, a.data, {a.size[1], a.size[0]}, {1, a.stride[0]}, {kSpan / bytes(a.dtype), rows}, ptx::SwizzleMode::b128);
}

template <class T, int TILE, Major A_MAJOR, Major B_MAJOR, class Epilogue>
void launch_tile(const Device& device, const Array& a, const Array& b, const Array& streamed, int64_t m, int64_t n, int64_t k,
                 int64_t splits, const Epilogue& epilogue) {
  const int64_t m_tiles = ceil_div(m, kTiles[TILE].block_m), n_tiles = ceil_div(n, kTiles[TILE].block_n);
  const int64_t tiles = m_tiles * n_tiles * splits;
  const Problem problem = {
      static_cast<int>(m), static_cast<int>(n), static_cast<int>(ceil_div(k, kBlockK)), static_cast<int>(splits),
      static_cast<int>(m_tiles), static_cast<int>(kGroup * n_tiles), static_cast<int>(m_tiles * n_tiles),
      static_cast<int>(tiles), streamed ? bytes(streamed.dtype) : 0};
  const TensorMap a_map = map_of(a, A_MAJOR == Major::k ? kTiles[TILE].block_m : kBlockK);
  const TensorMap b_map = map_of(b, B_MAJOR == Major::k ? kTiles[TILE].block_n : kBlockK);
  const auto blocks = static_cast<unsigned>(std::min<int64_t>(tiles, device.multiprocessors));
  launch(device, linear_sm90_kernel<T, TILE, A_MAJOR, B_MAJOR, Epilogue>, dim3(blocks), kThreads, Layout<TILE>::kTotal,
         a_map, b_map, streamed ? map_of(streamed, kBox) : a_map, problem, epilogue);
}

// f(T()) for the operands' dtype, half or bfloat16.
template <class F>
void with_operand_type(DType dtype, F f) {
  if (dtype == DType::float16) f(half());
  else f(bfloat16());
}

// out (m, n) = A B with whichever tile suits.
template <class T, Major B_MAJOR, class Epilogue>
void launch_best(const Device& device, const Array& a, const Array& b, const Array& streamed, int64_t m, int64_t n,
                 int64_t k, const Epilogue& epilogue) {
  const int best = choose_tile(m, n, k, device.multiprocessors);
  [&]<int... I>(std::integer_sequence<int, I...>) {
    (void)((I == best && (launch_tile<T, I, Major::k, B_MAJOR>(device, a, b, streamed, m, n, k, 1, epilogue), true)) || ...);
  }(std::make_integer_sequence<int, std::size(kTiles)>());
}

// Whether TMA can: rows on 16-byte boundaries that do not overlap.
bool tma_reads(const Array& a) {
  return a && reinterpret_cast<uintptr_t>(a.data) % 16 == 0 &&
         (a.size[0] == 1 || (a.stride[0] * bytes(a.dtype) % 16 == 0 && a.stride[0] >= a.size[1]));
}

void require_operand(const char* op, const char* what, const Array& a, int64_t rows, int64_t width, DType dtype) {
  require_matrix(op, what, a, rows, width);
  require(a.dtype == dtype && bytes(dtype) == 2, op, ": ", what, " is ", name(a.dtype),
          "; accepted: float16 or bfloat16, both operands the same");
  require(rows == 0 || tma_reads(a), op, ": ", what, "; accepted: rows on 16-byte boundaries");
}

// What is written 16 bytes at a time, or streamed.
void require_dense(const char* op, const char* what, const Array& a, int64_t rows, int64_t width) {
  require_contiguous(op, what, a, rows, width);
  require(reinterpret_cast<uintptr_t>(a.data) % 16 == 0, op, ": ", what, "; accepted: 16-byte alignment");
}

void require_sizes(const char* op, int64_t m, int64_t n, int64_t k) {
  require(m == 0 || linear_takes(m, n, k), op, ": sizes ", m, ", ", n, ", ", k,
          "; accepted: widths that 8 divides, below 2^31 rows and 2^31 tiles");
}

}  // namespace

bool linear_takes(int64_t m, int64_t n, int64_t k) {
  constexpr int64_t kMost = int64_t(1) << 30;
  return m > 0 && n > 0 && k > 0 && n % 8 == 0 && k % 8 == 0 && m < kMost && n < kMost && k < kMost &&
         ceil_div(m, 64) * ceil_div(std::max(n, k), 64) < kMost && ceil_div(n, 64) * ceil_div(k, 64) * 64 < kMost;
}

void linear_forward(
    const Device& device, const Array& x, const Array& weight, const Array& bias, const std::string& activation,
    const Array& residual, const Array& gamma, const Array& row_scale, const Array& out, const Array& preact) {
  const char* const op = "linear_forward";
  const int64_t m = x.size[0], k = x.size[1], n = weight.size[0];
  require_operand(op, "x", x, m, k, weight.dtype);
  require_operand(op, "weight", weight, n, k, x.dtype);
  require_sizes(op, m, n, k);
  require_vector(op, "bias", bias, n);
  require_vector(op, "gamma", gamma, n);
  if (residual) require_matrix(op, "residual", residual, m, n);
  require_dense(op, "out", out, m, n);
  require(out.dtype == (residual ? residual.dtype : x.dtype), op, ": out is ", name(out.dtype), "; accepted: ",
          name(residual ? residual.dtype : x.dtype));
  if (preact) require_dense(op, "preact", preact, m, n);
  const Activation act = parse_activation(op, activation);
  const int per_image = rows_per_image(op, row_scale, m);
  if (m == 0) return;
  const bool streamed = tma_reads(residual);
  with_operand_type(x.dtype, [&](auto type) {
    using T = decltype(type);
    const Forward<T> epilogue = {
        matrix(bias), matrix(gamma), matrix(residual), matrix(preact), matrix(out), row_scale.as<float>(), per_image, act,
        suits(bias, 8) && suits(gamma, 8), streamed};
    launch_best<T, Major::k>(device, x, weight, streamed ? residual : Array(), m, n, k, epilogue);
  });
}

void linear_folded_forward(
    const Device& device, const Array& x, const Array& weight, const Array& sums, const Array& offsets,
    const Array& mean, const Array& rstd, const std::string& activation, const Array& out) {
  const char* const op = "linear_folded_forward";
  const int64_t m = x.size[0], k = x.size[1], n = weight.size[0];
  require_operand(op, "x", x, m, k, weight.dtype);
  require_operand(op, "weight", weight, n, k, x.dtype);
  require_sizes(op, m, n, k);
  const auto require_floats = [&](const char* what, const Array& vector, int64_t width) {
    require(vector && vector.dtype == DType::float32, op, ": ", what, "; accepted: float32");
    require_vector(op, what, vector, width);
  };
  require_floats("sums", sums, n);
  require_floats("offsets", offsets, n);
  require_floats("mean", mean, m);
  require_floats("rstd", rstd, m);
  require(suits(sums, 8) && suits(offsets, 8), op, ": sums and offsets; accepted: 16-byte alignment");
  require_dense(op, "out", out, m, n);
  require(out.dtype == x.dtype, op, ": out is ", name(out.dtype), "; accepted: ", name(x.dtype));
  const Activation act = parse_activation(op, activation);
  if (m == 0) return;
  with_operand_type(x.dtype, [&](auto type) {
    using T = decltype(type);
    const FoldedForward<T> epilogue = {
        matrix(sums), matrix(offsets), mean.as<float>(), rstd.as<float>(), matrix(out), act};
    launch_best<T, Major::k>(device, x, weight, Array(), m, n, k, epilogue);
  });
}

void linear_input_gradient(
    const Device& device, const Array& dout, const Array& weight, const Array& gamma, const Array& preact,
    const std::string& activation, const Array& dx, const Array& hidden) {
  const char* const op = "linear_input_gradient";
  const int64_t m = dout.size[0], n = weight.size[0], k = weight.size[1];
  require_operand(op, "dout", dout, m, n, weight.dtype);
  require_operand(op, "weight", weight, n, k, dout.dtype);
  require_sizes(op, m, n, k);
  require(!gamma, op, ": gamma scales what is summed; accepted: none");
  require_dense(op, "dx", dx, m, k);
  const Activation act = parse_activation(op, activation);
  require(bool(preact) == (act != Activation::none) && bool(preact) == bool(hidden), op,
          ": an activation, preact and hidden go together");
  if (preact) {
    require_dense(op, "preact", preact, m, k);
    require_dense(op, "hidden", hidden, m, k);
  }
  if (m == 0) return;
  with_operand_type(weight.dtype, [&](auto type) {
    using T = decltype(type);
    const InputGradient<T> epilogue = {matrix(hidden), matrix(dx), act};
    launch_best<T, Major::mn>(device, dout, weight, preact, m, k, n, epilogue);
  });
}

void linear_weight_gradient(
    const Device& device, const Array& dout, const Array& x, const Array& partials, const Array& bias_partials) {
  const char* const op = "linear_weight_gradient";
  const int64_t m = x.size[0], n = dout.size[1], k = x.size[1], splits = partials.size[0];
  require_operand(op, "dout", dout, m, n, x.dtype);
  require_operand(op, "x", x, m, k, dout.dtype);
  require(linear_takes(m, n, k), op, ": sizes ", m, ", ", n, ", ", k);
  require(partials.dims == 3 && splits > 0 && partials.size[1] == n && partials.size[2] == k &&
              partials.dtype == DType::float32, op, ": partials; accepted: (S, ", n, ", ", k, ") float32, contiguous");
  require(!bias_partials || (bias_partials.dims == 2 && bias_partials.size[0] == splits && bias_partials.size[1] == n &&
                             bias_partials.dtype == DType::float32),
          op, ": bias_partials; accepted: (", splits, ", ", n, ") float32, contiguous");
  const WeightGradient epilogue = {{partials.data, k, DType::float32}, bias_partials.as<float>()};
  with_operand_type(x.dtype, [&](auto type) {
    launch_tile<decltype(type), kWeightGradientTile, Major::mn, Major::mn>(
        device, dout, x, Array(), n, k, m, splits, epilogue);
  });
}

int64_t linear_weight_gradient_splits(const Device& device, int64_t m, int64_t n, int64_t k) {
  return choose_splits(m, n, k, device.multiprocessors);
}

}  // namespace fastvit::sm90
