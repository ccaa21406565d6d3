// Attention forward for Hopper: softmax(q k^T * scale) v for every head, by TMA and wgmma, one persistent block on
// each multiprocessor.
//
// A block goes through (image, head) after (image, head). A producer thread brings K and V of a head, a block of up
// to 272 keys, to rings of tiles in shared memory, and tiles of 64 query rows to the warpgroup whose turn it is; 2 or
// 3 warpgroups compute, one tile of rows each, and share K and V. Keys, queries and results of the next and the last
// head move while this one is computed, and while one warpgroup takes exponentials others keep the tensor cores busy.
//
//   S = Q K^T      64 x KEYS in registers, both operands from shared memory as TMA left them
//   P = 2^(S - m)  in registers, rounded: the accumulators of S are, pair by pair, the operand A of the next product
//   O += P V       V as it lies in memory, keys by rows, is MN-major for wgmma: nothing is transposed
//   O / sum        to the slot of its Q (swizzled: a warp's 8 rows meet all 32 banks), then out by a TMA store
//
// Keys are taken as they come: KEYS is the number of keys rounded up to a form of the table below (197: 208; 257:
// 272), and then nothing is rescaled; longer sequences are online softmax over blocks (FlashAttention-2, Dao 2023,
// algorithm 1). A head dim is padded to a multiple of 16 by TMA's zeros, in shared memory only. q, k, v and
// out cross the memory bus once (K and V of longer sequences come again, from L2, for each 2 or 3 tiles). Tensor
// maps take any strides: q, k and v may be parts of one packed tensor.
#include <algorithm>
#include <cmath>
#include <iterator>
#include <limits>
#include <utility>

#include "hopper.cuh"
#include "ops.h"

namespace fastvit::sm90 {
namespace {

using namespace ptx;

constexpr int kRows = 64;       // query rows of a tile: m of wgmma
constexpr int kQuerySlots = 2;  // tiles of Q that wait for a warpgroup or are under way
constexpr int kMaxStages = 8;
constexpr size_t kSharedBytes = 232448;  // of one block on compute capability 9.0

constexpr int round_up(int x, int to) { return (x + to - 1) / to * to; }

// A tile of DIM columns in shared memory: one TMA box of 64 columns and one of the rest, each with the narrowest
// swizzle that takes it. Columns from the head dim on are zeros (d = 72 is DIM = 80: 64 + 16).
template <int DIM>
struct Columns {
  static_assert(DIM % 16 == 0 && DIM >= 32 && DIM <= 128);
  static constexpr int kBoxes = DIM > 64 ? 2 : 1;

  static constexpr int count(int box) { return box == 0 ? std::min(DIM, 64) : DIM - 64; }
  static constexpr SwizzleMode mode(int box) {
    return count(box) <= 16 ? SwizzleMode::b32 : count(box) <= 32 ? SwizzleMode::b64 : SwizzleMode::b128;
  }
  static constexpr int row(int box) { return row_bytes(mode(box)); }
  static constexpr int offset(int rows, int box) { return box == 0 ? 0 : round_up(rows * row(0), 1024); }
  static constexpr int bytes(int rows) {
    const int last = kBoxes - 1;
    return round_up(offset(rows, last) + rows * row(last), 1024);
  }
  static constexpr int box_bytes(int rows) { return rows * (row(0) + (kBoxes == 2 ? row(1) : 0)); }  // that TMA reports
};

// One way to cut the work: tiles of DIM columns, KEYS keys at a time, WARPGROUPS that compute.
template <int DIM, int KEYS, int WARPGROUPS, bool SINGLE>
struct Tiling {
  using C = Columns<DIM>;
  static constexpr int kThreads = 128 * (WARPGROUPS + 1);
  static constexpr int kParts = KEYS > (WARPGROUPS == 3 ? 192 : 256) ? 2 : 1;
  static constexpr int kPart = KEYS / kParts;
  static_assert(KEYS % 16 == 0 && kPart % 8 == 0);
  static constexpr int kKeyBytes = C::bytes(KEYS);
  static constexpr int kQueryBytes = C::bytes(kRows);
  static constexpr int kSlots = WARPGROUPS * kQuerySlots;
  static constexpr int kBarrierBytes = 8 * (4 * kMaxStages + 2 * kSlots);
  static constexpr int kStages =
      std::min<int>(kMaxStages, (kSharedBytes - kBarrierBytes - kSlots * kQueryBytes) / (2 * kKeyBytes));
  static_assert(kStages >= 1);
  static constexpr int kShared = kStages * 2 * kKeyBytes + kSlots * kQueryBytes + kBarrierBytes;
  // Steps of 16 keys whose exponentials come before their products. All of them with 208 keys and 160 registers, where
  // accumulators of the products would not fit beside those of S; a third warpgroup keeps the tensor cores busy.
  static constexpr int kTogether = WARPGROUPS == 3 && KEYS > 192 ? KEYS / 16 : 2;
  // What setmaxnreg asks for: 65536 registers among all threads.
  static constexpr int kConsumerRegisters = WARPGROUPS == 3 ? 160 : 232;
  static constexpr int kProducerRegisters = WARPGROUPS == 3 ? 32 : 40;
};

template <int BOXES>
struct Maps {
  TensorMap q[BOXES], k[BOXES], v[BOXES];  // (B, H, T, d), read by boxes of kRows or kPart rows of one head
  TensorMap out[BOXES];                    // written by 16 rows
};

// What a block goes through: items of work, each `tiles` query tiles of one head of one image and all its keys.
struct Item {
  int row;    // image * heads + head
  int first;  // query tile
  int tiles;
  __device__ Item(int index, int spans, int span, int all_tiles)
      : row(index / spans), first(index % spans * span), tiles(min(span, all_tiles - first)) {}
};

// Place in a ring of SIZE: which slot, and the parity of its phase.
template <int SIZE>
struct Place {
  int slot;
  uint32_t parity;
  __device__ explicit Place(uint32_t n) : slot(n % SIZE), parity(n / SIZE & 1) {}
};

// Where columns 8 * chunk to 8 * chunk + 7 of a row begin in a swizzled tile, rows being `bytes` long.
__device__ __forceinline__ int chunk_offset(int row, int chunk, int bytes) {
  return row * bytes + ((chunk ^ (row * bytes >> 7 & (bytes / 16 - 1))) << 4);
}

template <bool LOWEST>
__device__ __forceinline__ float extreme(float a, float b) { return LOWEST ? fminf(a, b) : fmaxf(a, b); }

// The extreme scores of rows g and g + 8, of all four threads that hold them; s as wgmma left it.
template <bool LOWEST, int PARTS, int COUNT>
__device__ __forceinline__ void row_extremes(const float (&s)[PARTS][COUNT], float (&best)[2]) {
#pragma unroll
  for (int part = 0; part < PARTS; ++part) {
#pragma unroll
    for (int i = 0; i < COUNT; ++i) best[i / 2 % 2] = extreme<LOWEST>(best[i / 2 % 2], s[part][i]);
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    best[half] = extreme<LOWEST>(best[half], __shfl_xor_sync(0xffffffff, best[half], 1));
    best[half] = extreme<LOWEST>(best[half], __shfl_xor_sync(0xffffffff, best[half], 2));
  }
}

// Scores of keys from `valid` on, of the blocks of 8 keys from FIRST on, become `absent`.
template <int FIRST, int PARTS, int COUNT>
__device__ __forceinline__ void mask(float (&s)[PARTS][COUNT], int valid, float absent) {
  const int left = valid - threadIdx.x % 4 * 2;
#pragma unroll
  for (int i = FIRST * 4; i < PARTS * COUNT; ++i) {
    if (i / 4 * 8 + i % 2 >= left) s[i / COUNT][i % COUNT] = absent;
  }
}

template <class T, int DIM, int KEYS, int WARPGROUPS, bool SINGLE>
__global__ void __launch_bounds__(128 * (WARPGROUPS + 1), 1) attention_forward_kernel(
    const __grid_constant__ Maps<Columns<DIM>::kBoxes> maps,
    float* __restrict__ lse,  // (B, H, Tq)
    int heads,                // H
    int queries,              // Tq
    int keys,                 // Tk
    float scale_log2,         // of scores, in units of log2; not 0
    int items,                // B * H * spans
    int spans,                // items of a head
    int span) {               // query tiles of an item; at most WARPGROUPS if keys > KEYS
  using Form = Tiling<DIM, KEYS, WARPGROUPS, SINGLE>;
  using C = Columns<DIM>;
  constexpr int kStages = Form::kStages, kTogether = Form::kTogether, kParts = Form::kParts, kPart = Form::kPart;
  char* const k_tiles = shared_memory();
  char* const v_tiles = k_tiles + kStages * Form::kKeyBytes;
  char* const q_tiles = v_tiles + kStages * Form::kKeyBytes;
  uint64_t* const k_full = reinterpret_cast<uint64_t*>(q_tiles + Form::kSlots * Form::kQueryBytes);
  uint64_t* const k_empty = k_full + kStages;
  uint64_t* const v_full = k_empty + kStages;
  uint64_t* const v_empty = v_full + kStages;
  uint64_t* const q_full = v_empty + kStages;
  uint64_t* const q_empty = q_full + Form::kSlots;

  if (threadIdx.x == 0) {
    for (int i = 0; i < kStages; ++i) {
      mbarrier_init(k_full + i, 1);
      mbarrier_init(k_empty + i, 4 * WARPGROUPS);  // by every warp that computes
      mbarrier_init(v_full + i, 1);
      mbarrier_init(v_empty + i, 4 * WARPGROUPS);
    }
    for (int i = 0; i < Form::kSlots; ++i) {
      mbarrier_init(q_full + i, 1);
      mbarrier_init(q_empty + i, 4);
    }
    mbarrier_init_fence();
    for (int box = 0; box < C::kBoxes; ++box) {
      tma_prefetch(maps.q + box);
      tma_prefetch(maps.k + box);
      tma_prefetch(maps.v + box);
      tma_prefetch(maps.out + box);
    }
  }
  __syncthreads();

  const int all_tiles = (queries + kRows - 1) / kRows, blocks = SINGLE ? 1 : (keys + KEYS - 1) / KEYS;
  const int warpgroup = threadIdx.x / 128;
  uint32_t tile_count = 0, block_count = 0;  // of the items before

  if (warpgroup == WARPGROUPS) {  // the producer
    registers_lower<Form::kProducerRegisters>();
    if (threadIdx.x % 128 >= 32 || !elect_one()) return;
    for (int index = blockIdx.x; index < items; index += gridDim.x) {
      const Item item(index, spans, span, all_tiles);
      const int image = item.row / heads, head = item.row % heads;
      const auto load_keys = [&](char* tiles, const TensorMap* map, uint64_t* full, uint64_t* empty, int block) {
        const Place<kStages> stage(block_count + block);
        mbarrier_wait(empty + stage.slot, stage.parity ^ 1);
        mbarrier_arrive_expect_tx(full + stage.slot, C::box_bytes(KEYS));
        for (int box = 0; box < C::kBoxes; ++box) {
          for (int part = 0; part < kParts; ++part) {
            tma_load(
                tiles + stage.slot * Form::kKeyBytes + C::offset(KEYS, box) + part * kPart * C::row(box), map + box,
                full + stage.slot, box * 64, block * KEYS + part * kPart, head, image);
          }
        }
      };
      load_keys(k_tiles, maps.k, k_full, k_empty, 0);
      for (int i = 0; i < item.tiles; ++i) {
        if (i == 1) load_keys(v_tiles, maps.v, v_full, v_empty, 0);
        const uint32_t owner = (tile_count + i) % WARPGROUPS;
        const Place<kQuerySlots> place((tile_count + i) / WARPGROUPS);
        const int slot = owner * kQuerySlots + place.slot;
        mbarrier_wait(q_empty + slot, place.parity ^ 1);
        mbarrier_arrive_expect_tx(q_full + slot, C::box_bytes(kRows));
        for (int box = 0; box < C::kBoxes; ++box) {
          tma_load(
              q_tiles + slot * Form::kQueryBytes + C::offset(kRows, box), maps.q + box, q_full + slot, box * 64,
              (item.first + i) * kRows, head, image);
        }
      }
      if (item.tiles == 1) load_keys(v_tiles, maps.v, v_full, v_empty, 0);
      for (int block = 1; block < blocks; ++block) {
        load_keys(k_tiles, maps.k, k_full, k_empty, block);
        load_keys(v_tiles, maps.v, v_full, v_empty, block);
      }
      tile_count += item.tiles;
      block_count += blocks;
    }
    return;
  }

  registers_raise<Form::kConsumerRegisters>();
  const int warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
  const bool negative = scale_log2 < 0;
  const float absent = negative ? std::numeric_limits<float>::infinity() : -std::numeric_limits<float>::infinity();
  constexpr int kLow = C::count(0), kHigh = C::kBoxes == 2 ? C::count(1) : 8;
  uint64_t* stored = nullptr;  // the q_empty of a slot whose output this warp has still to see read

  const auto arrive = [&](uint64_t* barrier) {
    if (lane == 0) mbarrier_arrive(barrier);
  };
  const auto release_stored = [&] {
    if (stored == nullptr) return;
    if (lane == 0) {
      bulk_wait_read<0>();
      mbarrier_arrive(stored);
    }
    stored = nullptr;
  };

  for (int index = blockIdx.x; index < items; index += gridDim.x) {
    const Item item(index, spans, span, all_tiles);
    int i = (warpgroup + WARPGROUPS - tile_count % WARPGROUPS) % WARPGROUPS;  // tiles are dealt in turn
    if (i >= item.tiles) {
      for (int block = 0; block < blocks; ++block) {
        const Place<kStages> stage(block_count + block);
        mbarrier_wait(k_full + stage.slot, stage.parity);
        __syncwarp();  // no lane may still wait for this phase when the next one can come
        arrive(k_empty + stage.slot);
        mbarrier_wait(v_full + stage.slot, stage.parity);
        __syncwarp();
        arrive(v_empty + stage.slot);
      }
    }
    for (; i < item.tiles; i += WARPGROUPS) {
      const Place<kQuerySlots> place((tile_count + i) / WARPGROUPS);
      const int slot = warpgroup * kQuerySlots + place.slot;
      char* const q_tile = q_tiles + slot * Form::kQueryBytes;
      const int first_row = (item.first + i) * kRows + warp * 16;  // of this warp
      const bool last_tile = i + WARPGROUPS >= item.tiles;
      float best[2] = {absent, absent}, sum[2] = {0, 0};
      float low[kLow / 2], high[kHigh / 2];  // rows of the result, columns below 64 and the rest

      mbarrier_wait(q_full + slot, place.parity);
      for (int block = 0; block < blocks; ++block) {
        const Place<kStages> stage(block_count + block);
        const char* const k_tile = k_tiles + stage.slot * Form::kKeyBytes;
        const char* const v_tile = v_tiles + stage.slot * Form::kKeyBytes;
        float s[kParts][kPart / 2];

        mbarrier_wait(k_full + stage.slot, stage.parity);
        wgmma_fence();
#pragma unroll
        for (int part = 0; part < kParts; ++part) {
#pragma unroll
          for (int column = 0; column < DIM; column += 16) {
            const int box = column / 64, inside = column % 64 * 2;
            wgmma<T, kPart>(
                s[part],
                matrix_descriptor(q_tile + C::offset(kRows, box) + inside, C::mode(box), 8 * C::row(box)),
                matrix_descriptor(
                    k_tile + C::offset(KEYS, box) + part * kPart * C::row(box) + inside, C::mode(box), 8 * C::row(box)),
                column > 0);
          }
        }
        wgmma_commit();
        release_stored();
        wgmma_wait<0>(s);
        if (last_tile) arrive(k_empty + stage.slot);

        const int valid = keys - block * KEYS;
        if (valid < KEYS) {
          if (valid > KEYS - 16) {
            mask<KEYS / 8 - 2>(s, valid, absent);
          } else {
            mask<0>(s, valid, absent);
          }
        }
        const float before[2] = {best[0], best[1]};
        if (negative) {
          row_extremes<true>(s, best);
        } else {
          row_extremes<false>(s, best);
        }
        if (block > 0) {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const float shrink = exp2((before[half] - best[half]) * scale_log2);
            sum[half] *= shrink;
#pragma unroll
            for (int j = half * 2; j < kLow / 2; j += 4) low[j] *= shrink, low[j + 1] *= shrink;
            if constexpr (C::kBoxes == 2) {
#pragma unroll
              for (int j = half * 2; j < kHigh / 2; j += 4) high[j] *= shrink, high[j + 1] *= shrink;
            }
          }
        }
        const float shift[2] = {best[0] * scale_log2, best[1] * scale_log2};
        mbarrier_wait(v_full + stage.slot, stage.parity);
        // A few keys at a time: the tensor cores take these while the exponentials of the next are computed.
        uint32_t p[2][kTogether][4];
#pragma unroll
        for (int first = 0; first < KEYS / 16; first += kTogether) {
          auto& mine = p[first / kTogether % 2];
          if (first >= 2 * kTogether) wgmma_wait<1>();  // has read them
#pragma unroll
          for (int step = first; step < std::min(first + kTogether, KEYS / 16); ++step) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
              const int at = 8 * step + 2 * i, half = i % 2;
              const float a = exp2(fmaf(s[at / (kPart / 2)][at % (kPart / 2)], scale_log2, -shift[half]));
              const float b = exp2(fmaf(s[at / (kPart / 2)][at % (kPart / 2) + 1], scale_log2, -shift[half]));
              sum[half] += a + b;
              mine[step - first][i] = pack<T>(a, b);
            }
          }
          if (first == 0) {
            wgmma_fence(mine, low, high);
          } else {
            wgmma_fence(mine);
          }
#pragma unroll
          for (int step = first; step < std::min(first + kTogether, KEYS / 16); ++step) {
            wgmma<T, kLow, Major::mn>(
                low, mine[step - first],
                matrix_descriptor(v_tile + step * 16 * C::row(0), C::mode(0), 8 * C::row(0)), block > 0 || step > 0);
            if constexpr (C::kBoxes == 2) {
              wgmma<T, kHigh, Major::mn>(
                  high, mine[step - first],
                  matrix_descriptor(
                      v_tile + C::offset(KEYS, 1) + step * 16 * C::row(1), C::mode(1), 8 * C::row(1)),
                  block > 0 || step > 0);
            }
          }
          wgmma_commit();
        }
        wgmma_wait<0>(low, high);
        if (last_tile) arrive(v_empty + stage.slot);
      }

      // The result takes the place of Q, which all warps have read when they are here.
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        sum[half] += __shfl_xor_sync(0xffffffff, sum[half], 1);
        sum[half] += __shfl_xor_sync(0xffffffff, sum[half], 2);
      }
      const float inverse[2] = {1 / sum[0], 1 / sum[1]};
      named_barrier(1 + warpgroup, 128);
      const auto write = [&](const float* o, int box) {
#pragma unroll
        for (int chunk = 0; chunk < C::count(box) / 8; ++chunk) {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const int at = chunk_offset(warp * 16 + half * 8 + lane / 4, chunk, C::row(box)) + lane % 4 * 4;
            *reinterpret_cast<uint32_t*>(q_tile + C::offset(kRows, box) + at) =
                pack<T>(o[chunk * 4 + half * 2] * inverse[half], o[chunk * 4 + half * 2 + 1] * inverse[half]);
          }
        }
      };
      write(low, 0);
      if constexpr (C::kBoxes == 2) write(high, 1);
      fence_async_proxy();
      __syncwarp();
      if (lane == 0) {
        const int image = item.row / heads, head = item.row % heads;
        for (int box = 0; box < C::kBoxes; ++box) {
          tma_store(
              maps.out + box, q_tile + C::offset(kRows, box) + warp * 16 * C::row(box), box * 64, first_row, head,
              image);
        }
        bulk_commit();
      }
      stored = q_empty + slot;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = first_row + half * 8 + lane / 4;
        if (lane % 4 == 0 && row < queries) {
          lse[static_cast<int64_t>(item.row) * queries + row] = best[half] * scale_log2 / kLog2e + logf(sum[half]);
        }
      }
    }
    tile_count += item.tiles;
    block_count += blocks;
  }
  release_stored();
}

// ---- Which form for which sizes ------------------------------------------------------------------------------------

struct Form {
  int dim;   // head dims up to this one, 16 at a time
  int keys;  // of a block: all of them where they fit
  int warpgroups;
  bool single;  // no more keys than that
};

// By dim, then keys.
constexpr Form kForms[] = {
    {32, 80, 3, false},  {32, 208, 2, false},  {32, 272, 2, false},                                             //
    {64, 64, 3, true},   {64, 80, 3, false},   {64, 160, 3, false},  {64, 208, 3, true},  {64, 272, 2, false},  //
    {80, 80, 3, false},  {80, 208, 2, false},  {80, 272, 2, true},                                              //
    {96, 80, 3, false},  {96, 144, 2, false},  {96, 208, 2, false},                                             //
    {112, 80, 3, false}, {112, 112, 2, false}, {112, 144, 2, false},                                            //
    {128, 80, 3, false}, {128, 112, 2, false}, {128, 144, 2, false},
};

// The form that takes the fewest keys too many, a block of keys counting as 16 more; nullptr if no form takes the head
// dim.
const Form* choose(int64_t head_dim, int64_t keys) {
  const Form* best = nullptr;
  int64_t least = 0;
  for (const Form& form : kForms) {
    if (form.dim < head_dim || (best != nullptr && form.dim > best->dim) || (form.single && keys > form.keys)) continue;
    const int64_t cost = ceil_div(keys, form.keys) * (form.keys + 16);
    if (best == nullptr || cost <= least) best = &form, least = cost;
  }
  return best;
}

using Launcher = void (*)(
    const Device&, const Array& q, const Array& k, const Array& v, double scale, const Array& out, const Array& lse);

template <class T, int FORM>
void launch_form(
    const Device& device, const Array& q, const Array& k, const Array& v, double scale, const Array& out,
    const Array& lse) {
  constexpr int kDim = kForms[FORM].dim, kKeys = kForms[FORM].keys, kWarpgroups = kForms[FORM].warpgroups;
  constexpr bool kSingle = kForms[FORM].single;
  using Form = Tiling<kDim, kKeys, kWarpgroups, kSingle>;
  using C = Columns<kDim>;
  Maps<C::kBoxes> maps;
  for (int box = 0; box < C::kBoxes; ++box) {
    const auto map = [&](const Array& x, int rows) {  // (d, T, H, B)
      return make_tensor_map<4>(
          x.dtype, x.data, {x.size[3], x.size[1], x.size[2], x.size[0]}, {1, x.stride[1], x.stride[2], x.stride[0]},
          {row_bytes(C::mode(box)) / 2, rows, 1, 1}, C::mode(box));
    };
    maps.q[box] = map(q, kRows);
    maps.k[box] = map(k, Form::kPart);
    maps.v[box] = map(v, Form::kPart);
    maps.out[box] = map(out, 16);
  }
  const int rows = static_cast<int>(q.size[0] * q.size[2]), queries = static_cast<int>(q.size[1]);
  const int keys = static_cast<int>(k.size[1]), tiles = static_cast<int>(ceil_div(queries, kRows));
  // A head is one item where there are heads enough to go round, and less where its tiles are needed to fill the GPU.
  const int most = keys <= kKeys ? tiles : std::min(tiles, kWarpgroups);
  const int wanted = static_cast<int>(ceil_div(2 * device.multiprocessors, rows));
  const int span = std::min(most, std::max<int>(1, static_cast<int>(ceil_div(tiles, wanted))));
  const int spans = static_cast<int>(ceil_div(tiles, span)), items = rows * spans;
  const float scale_log2 = static_cast<float>(scale) * kLog2e;
  launch(
      device, attention_forward_kernel<T, kDim, kKeys, kWarpgroups, kSingle>,
      dim3(std::min(items, device.multiprocessors)), Form::kThreads, Form::kShared, maps,
      lse.as<float>(), static_cast<int>(q.size[2]), queries, keys,
      // With a scale of 0 absent keys must stay absent.
      std::abs(scale_log2) < 1e-37f ? 1e-37f : scale_log2, items, spans, span);
}

template <class T, size_t... FORMS>
Launcher launcher(size_t form, std::index_sequence<FORMS...>) {
  constexpr Launcher all[] = {&launch_form<T, FORMS>...};
  return all[form];
}

// What TMA can read or write: rows of 16-byte pieces, positive strides.
bool addressable(const Array& x) {
  bool fits = x.dims == 4 && reinterpret_cast<uintptr_t>(x.data) % 16 == 0 && (x.stride[3] == 1 || x.size[3] == 1);
  for (int i = 0; i < 3; ++i) {
    fits = fits && x.size[i] <= std::numeric_limits<int>::max() &&
           (x.size[i] == 1 || (x.stride[i] % 8 == 0 && x.stride[i] > 0 && x.stride[i] < int64_t{1} << 39));
  }
  return fits;
}

}  // namespace

bool attention_forward_takes(const Device& device, const Array& q, const Array& k, const Array& v) {
  const int64_t dim = q.size[3];
  return (q.dtype == DType::float16 || q.dtype == DType::bfloat16) && k.dtype == q.dtype && v.dtype == q.dtype &&
         dim % 8 == 0 && dim >= 32 && dim <= 128 && addressable(q) && addressable(k) && addressable(v) &&
         q.size[0] * q.size[2] * ceil_div(q.size[1], kRows) < std::numeric_limits<int>::max() / 2 &&
         static_cast<size_t>(device.shared_bytes) >= kSharedBytes;
}

void attention_forward(
    const Device& device, const Array& q, const Array& k, const Array& v, double scale, const Array& out,
    const Array& lse) {
  if (!attention_forward_takes(device, q, k, v) || !addressable(out) || out.dtype != q.dtype) {
    throw error(
        "attention: ", name(q.dtype), ", head dim ", q.size[3], " on compute capability ", device.architecture,
        "; accepted: float16 or bfloat16, head dims that are multiples of 8 from 32 to 128, 16-byte aligned data and "
        "strides, compute capability 9.0");
  }
  if (q.elements() == 0) return;
  if (k.size[1] == 0) throw error("attention: no keys");
  const size_t form = choose(q.size[3], k.size[1]) - kForms;
  constexpr auto forms = std::make_index_sequence<std::size(kForms)>();
  const Launcher run =
      q.dtype == DType::float16 ? launcher<half>(form, forms) : launcher<bfloat16>(form, forms);
  run(device, q, k, v, scale, out, lse);
}

}  // namespace fastvit::sm90
