// PTX of compute capability 8.0 (ptx.cuh) on a CPU. Fragments follow the figures of the PTX ISA: lane l is thread
// t = l % 4 of group g = l / 4.
#include <array>
#include <cfloat>

#include "device.cuh"
#include "host_ptx.h"

namespace fastvit::ptx {

using host::called_from;
using host::fail;

uint32_t shared_address(const void* pointer) {
  const ptrdiff_t offset = static_cast<const char*>(pointer) - host::shared_memory();
  if (offset < 0 || offset >= static_cast<ptrdiff_t>(host::kSharedBytes)) fail("not an address of shared memory");
  return static_cast<uint32_t>(offset);
}

namespace {

// ---- mma -----------------------------------------------------------------------------------------------------------

template <class T>
void unpack(uint32_t pair, float* two) {
  T values[2];
  std::memcpy(static_cast<void*>(values), &pair, sizeof(pair));
  two[0] = to_float(values[0]);
  two[1] = to_float(values[1]);
}

// 16x8xK, K = 8 or 16: products are exact in float32, sums are rounded to it.
template <class T, int K>
struct Mma {
  float* d;
  const uint32_t *a, *b;

  static void together(void* const* lanes) {
    float a[16][K], b[K][8], d[16][8];
    for (int lane = 0; lane < 32; ++lane) {
      const Mma& mine = *static_cast<const Mma*>(lanes[lane]);
      const int g = lane / 4, t = lane % 4;
      for (int i = 0; i < K / 4; ++i) unpack<T>(mine.a[i], &a[g + i % 2 * 8][2 * t + i / 2 * 8]);
      for (int i = 0; i < K / 8; ++i) {
        float pair[2];
        unpack<T>(mine.b[i], pair);
        b[2 * t + i * 8][g] = pair[0];
        b[2 * t + i * 8 + 1][g] = pair[1];
      }
      for (int i = 0; i < 4; ++i) d[g + i / 2 * 8][2 * t + i % 2] = mine.d[i];
    }
    for (int row = 0; row < 16; ++row) {
      float sum[8] = {};  // the products first: one rounding less of a large d
      for (int k = 0; k < K; ++k) {
        for (int column = 0; column < 8; ++column) sum[column] += a[row][k] * b[k][column];
      }
      for (int column = 0; column < 8; ++column) d[row][column] += sum[column];
    }
    for (int lane = 0; lane < 32; ++lane) {
      const Mma& mine = *static_cast<const Mma*>(lanes[lane]);
      for (int i = 0; i < 4; ++i) mine.d[i] = d[lane / 4 + i / 2 * 8][2 * (lane % 4) + i % 2];
    }
  }
};

// ---- ldmatrix ------------------------------------------------------------------------------------------------------

template <int N, bool transposed>
struct Ldmatrix {
  uint32_t* r;
  uint16_t row[8];

  static void together(void* const* lanes) {
    const auto at = [&](int matrix, int row, int column) {
      return static_cast<const Ldmatrix*>(lanes[matrix * 8 + row])->row[column];
    };
    for (int lane = 0; lane < 32; ++lane) {
      const int g = lane / 4, t = lane % 4;
      for (int i = 0; i < N; ++i) {
        const uint32_t low = transposed ? at(i, 2 * t, g) : at(i, g, 2 * t);
        const uint32_t high = transposed ? at(i, 2 * t + 1, g) : at(i, g, 2 * t + 1);
        static_cast<const Ldmatrix*>(lanes[lane])->r[i] = low | high << 16;
      }
    }
  }
};

template <int N, bool transposed>
void load_matrices(uint32_t (&r)[N], const void* row) {
  Ldmatrix<N, transposed> mine{r, {}};
  if (host::thread() % 32 < 8 * N) {
    if (shared_address(row) % 16) fail("ldmatrix: a row's address is no multiple of 16");
    host::reads(row, 16, "ldmatrix");
    std::memcpy(mine.row, row, 16);
  }
  host::meet_warp("ldmatrix", ~0u, &mine, Ldmatrix<N, transposed>::together);
}

// ---- cp.async ------------------------------------------------------------------------------------------------------

struct Copy {
  char* to;
  const char* from;  // or null: zeros
  host::Transfer transfer;
};

// A thread's copies: groups that were committed, and the one that is open. They land when a wait says so, not before.
struct Copies {
  std::vector<std::vector<Copy>> groups;
  std::vector<Copy> open;
};

std::array<Copies, host::kMaxThreads> copies;

const bool registered = host::each_block([] {
  for (Copies& c : copies) c = {};
});

}  // namespace

template <class T>
void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  called_from(__builtin_return_address(0));
  Mma<T, 16> mine{d, a, b};
  host::meet_warp("mma", ~0u, &mine, Mma<T, 16>::together);
}

template <class T>
void mma_k8(float (&d)[4], const uint32_t (&a)[2], const uint32_t& b) {
  called_from(__builtin_return_address(0));
  Mma<T, 8> mine{d, a, &b};
  host::meet_warp("mma_k8", ~0u, &mine, Mma<T, 8>::together);
}

template void mma<half>(float (&)[4], const uint32_t (&)[4], const uint32_t (&)[2]);
template void mma<bfloat16>(float (&)[4], const uint32_t (&)[4], const uint32_t (&)[2]);
template void mma_k8<half>(float (&)[4], const uint32_t (&)[2], const uint32_t&);
template void mma_k8<bfloat16>(float (&)[4], const uint32_t (&)[2], const uint32_t&);

void ldmatrix(uint32_t (&r)[4], const void* row) {
  called_from(__builtin_return_address(0));
  load_matrices<4, false>(r, row);
}

void ldmatrix(uint32_t (&r)[2], const void* row) {
  called_from(__builtin_return_address(0));
  load_matrices<2, false>(r, row);
}

void ldmatrix_transposed(uint32_t (&r)[4], const void* row) {
  called_from(__builtin_return_address(0));
  load_matrices<4, true>(r, row);
}

void ldmatrix_transposed(uint32_t (&r)[2], const void* row) {
  called_from(__builtin_return_address(0));
  load_matrices<2, true>(r, row);
}

void copy_async(void* shared, const void* global, bool inside) {
  called_from(__builtin_return_address(0));
  if (shared_address(shared) % 16) fail("cp.async: the address in shared memory is no multiple of 16");
  if (reinterpret_cast<uintptr_t>(global) % 16) {  // even where nothing is read
    fail("cp.async: the address in global memory is no multiple of 16");
  }
  Copy copy{static_cast<char*>(shared), inside ? static_cast<const char*>(global) : nullptr,
            host::Transfer("cp.async", host::Proxy::generic)};
  if (inside) copy.transfer.reads(global, 16);
  copy.transfer.writes(shared, 16);
  copies[host::thread()].open.push_back(std::move(copy));
}

void copy_async_commit() {
  Copies& mine = copies[host::thread()];
  mine.groups.push_back(std::move(mine.open));
  mine.open.clear();
}

void copy_async_wait(int pending) {
  called_from(__builtin_return_address(0));
  auto& groups = copies[host::thread()].groups;
  const int landing = std::max(0, static_cast<int>(groups.size()) - pending);
  for (int i = 0; i < landing; ++i) {
    for (Copy& copy : groups[i]) {
      if (copy.from) {
        std::memcpy(copy.to, copy.from, 16);
      } else {
        std::memset(copy.to, 0, 16);
      }
      copy.transfer.land();
    }
  }
  groups.erase(groups.begin(), groups.begin() + landing);
}

float exp2(float x) {
  const auto flushed = [](float v) { return std::fabs(v) < FLT_MIN ? std::copysign(0.0f, v) : v; };
  return flushed(::exp2f(flushed(x)));
}

float reciprocal(float x) { return 1 / x; }

}  // namespace fastvit::ptx
