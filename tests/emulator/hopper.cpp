// PTX of compute capability 9.0a (hopper.cuh) on a CPU. What is asynchronous happens as late as a GPU may do it: a TMA
// load when somebody waits for its mbarrier, a TMA store at bulk_wait_read, a wgmma at wgmma_wait, its accumulators
// being NaN until then. So a wait that is missing shows in the numbers, and in the detector's report.
#include <array>
#include <limits>
#include <map>
#include <memory>

#include "detector.h"
#include "hopper.cuh"

namespace fastvit::ptx {

using host::called_from;
using host::fail;

namespace {

constexpr uint32_t kNone = ~0u;

std::string at(uint32_t shared) { return " at shared memory + " + std::to_string(shared); }

// Where the byte at `linear` of shared memory really is: chunk bits XOR the row's bits above 128 bytes.
uint32_t swizzled(uint32_t linear, SwizzleMode mode) {
  return linear ^ ((linear >> 7) & (row_bytes(mode) / 16 - 1)) << 4;
}

// ---- mbarriers -----------------------------------------------------------------------------------------------------

struct Load {
  TensorMap map;
  uint32_t tile;
  std::array<int, 5> coordinates;
  host::Transfer transfer;
};

struct Barrier {
  uint32_t count = 0, pending = 0;  // arrivals of a phase; still to come in this one
  uint64_t expected = 0;            // bytes
  uint64_t started = 0;             // bytes of the loads
  uint32_t parity = 0;              // of the phase that is under way
  int fenced = -1;                  // the thread that has still to call mbarrier_init_fence
  std::vector<Load> loads;
  host::Clock gathering, completed;  // by arrivals; of phases before this one

  bool complete() const { return pending == 0 && expected == started; }
};

std::map<uint32_t, Barrier> barriers;  // by address

// A thread's bulk groups of stores.
struct Store {
  TensorMap map;
  uint32_t tile;
  std::array<int, 5> coordinates;
  host::Transfer read, write;
};

struct Stores {
  std::vector<std::vector<Store>> unread, unwritten;  // groups; `unwritten` have been read
  std::vector<Store> open;
};

std::array<Stores, host::kMaxThreads> stores;

Barrier& find(uint64_t* barrier) {
  const uint32_t address = shared_address(barrier);
  const auto found = barriers.find(address);
  if (found == barriers.end()) fail("mbarrier" + at(address) + " was not initialised");
  host::reads(barrier, sizeof(*barrier), "mbarrier");
  return found->second;
}

// Calls f(bytes into the dense tile, the element in global memory or null) for each inner row of a box that is `inside`
// or not in its outer dimensions, and for each of its elements where the tensor's edge cuts it.
template <class F>
void each_run(const TensorMap& map, const std::array<int, 5>& coordinates, F f) {
  int rows = 1;
  for (int i = 1; i < map.rank; ++i) rows *= map.box[i];
  for (int row = 0; row < rows; ++row) {
    char* from = map.data;
    bool inside = true;
    for (int i = 1, rest = row; i < map.rank; rest /= map.box[i], ++i) {
      const int64_t c = int64_t{coordinates[i]} + rest % map.box[i];
      inside = inside && c >= 0 && c < map.size[i];
      from += c * map.stride[i];
    }
    const int64_t first = coordinates[0], low = std::max<int64_t>(first, 0);
    const int64_t high = std::min<int64_t>(first + map.box[0], map.size[0]);
    f(row * map.box[0] * map.element, inside && low < high ? from + low * map.element : nullptr,
      static_cast<int>(low - first) * map.element, static_cast<int>(high - low) * map.element);
  }
}

int box_bytes(const TensorMap& map) {
  int bytes = map.element;
  for (int i = 0; i < map.rank; ++i) bytes *= map.box[i];
  return bytes;
}

uint32_t check_tile(const char* what, const TensorMap& map, const void* tile, int rank) {
  const uint32_t address = shared_address(tile);
  const uint32_t pattern = map.swizzle == SwizzleMode::none ? 128 : 8 * row_bytes(map.swizzle);
  if (rank != map.rank) {
    fail(std::string(what) + ": " + std::to_string(rank) + " coordinates, tensor map of " + std::to_string(map.rank));
  }
  if (address % pattern) {
    fail(std::string(what) + ": a tile" + at(address) + ", which is no multiple of " + std::to_string(pattern));
  }
  return address;
}

// Bytes of a tile as they are in the tensor's order, 16 at a time.
template <class F>
void each_chunk(uint32_t tile, SwizzleMode mode, int begin, int bytes, F f) {
  for (int done = 0; done < bytes;) {
    const int here = begin + done, run = std::min(16 - here % 16, bytes - done);
    f(host::shared_memory() + swizzled(tile + here, mode), done, run);
    done += run;
  }
}

void land(Load& load, host::Clock& clock) {
  std::memset(host::shared_memory() + load.tile, 0, box_bytes(load.map));
  each_run(load.map, load.coordinates, [&](int row, const char* from, int begin, int bytes) {
    if (from == nullptr) return;
    each_chunk(load.tile, load.map.swizzle, row + begin, bytes,
               [&](char* to, int done, int run) { std::memcpy(to, from + done, run); });
  });
  load.transfer.land(clock);
}

void next_phase(Barrier& b) {
  for (Load& load : b.loads) land(load, b.gathering);
  b.loads.clear();
  b.expected = b.started = 0;
  b.pending = b.count;
  b.parity ^= 1;
  b.completed = b.gathering;
}

void arrive(uint64_t* barrier, uint32_t bytes) {
  Barrier& b = find(barrier);
  if (b.pending == 0) {
    fail("mbarrier" + at(shared_address(barrier)) + ": an arrival more than its count of " + std::to_string(b.count));
  }
  host::release(b.gathering);
  b.expected += bytes;
  --b.pending;
  if (b.pending == 0 && b.expected == 0 && b.loads.empty()) next_phase(b);
}

void load(void* tile, const TensorMap* map, uint64_t* barrier, int rank, const std::array<int, 5>& coordinates) {
  const uint32_t address = check_tile("tma_load", *map, tile, rank);
  Barrier& b = find(barrier);
  if (b.fenced >= 0) fail("tma_load: its mbarrier was initialised without mbarrier_init_fence");
  Load load{*map, address, coordinates, host::Transfer("tma_load", host::Proxy::async)};
  load.transfer.writes(tile, box_bytes(*map));
  each_run(*map, coordinates, [&](int, const char* from, int, int bytes) {
    if (from != nullptr) load.transfer.reads(from, bytes);
  });
  b.started += box_bytes(*map);
  b.loads.push_back(std::move(load));
}

void store(const TensorMap* map, const void* tile, int rank, const std::array<int, 5>& coordinates) {
  const uint32_t address = check_tile("tma_store", *map, tile, rank);
  Store store{*map, address, coordinates, host::Transfer("tma_store", host::Proxy::async),
              host::Transfer("tma_store", host::Proxy::async)};
  store.read.reads(tile, box_bytes(*map));
  each_run(*map, coordinates, [&](int, char* to, int, int bytes) {
    if (to != nullptr) store.write.writes(to, bytes);
  });
  stores[host::thread()].open.push_back(std::move(store));
}

}  // namespace

TensorMap make_tensor_map(
    DType dtype, const void* data, int rank, const int64_t* size, const int64_t* stride, const int* box,
    SwizzleMode swizzle) {
  TensorMap map{static_cast<char*>(const_cast<void*>(data)), rank, bytes(dtype), {}, {}, {}, swizzle};
  const auto refuse = [](auto... what) { throw error("tensor map: ", what...); };
  if (reinterpret_cast<uintptr_t>(data) % 16) refuse("the data is not 16-byte aligned");
  if (stride[0] != 1) refuse("the innermost stride is ", stride[0]);
  for (int i = 0; i < rank; ++i) {
    map.size[i] = size[i];
    map.stride[i] = size[i] == 1 ? 16 : stride[i] * map.element;
    map.box[i] = box[i];
    if (size[i] < 1 || size[i] > int64_t{1} << 32) refuse("size ", size[i], " of dimension ", i);
    if (box[i] < 1 || box[i] > 256) refuse("a box of ", box[i], " in dimension ", i);
    if (i > 0 && (map.stride[i] % 16 || map.stride[i] <= 0 || map.stride[i] >= int64_t{1} << 40)) {
      refuse("a stride of ", map.stride[i], " bytes of dimension ", i);
    }
  }
  const int inner = box[0] * map.element;
  if (inner % 16) refuse("rows of ", inner, " bytes in a box");
  if (swizzle != SwizzleMode::none && inner != row_bytes(swizzle)) {
    refuse("rows of ", inner, " bytes in a box with a swizzle of ", row_bytes(swizzle));
  }
  return map;
}

void mbarrier_init(uint64_t* barrier, uint32_t count) {
  called_from(__builtin_return_address(0));
  const uint32_t address = shared_address(barrier);
  if (address % 8 || count == 0 || count >= 1u << 20) {
    fail("mbarrier_init: a count of " + std::to_string(count) + at(address));
  }
  host::writes(barrier, sizeof(*barrier), "mbarrier_init");
  Barrier& b = barriers[address];
  b = {};
  b.count = b.pending = count;
  b.fenced = host::thread();
}

void mbarrier_init_fence() {
  for (auto& [address, b] : barriers) {
    if (b.fenced == host::thread()) b.fenced = -1;
  }
}

void mbarrier_arrive(uint64_t* barrier) {
  called_from(__builtin_return_address(0));
  arrive(barrier, 0);
}

void mbarrier_arrive_expect_tx(uint64_t* barrier, uint32_t bytes) {
  called_from(__builtin_return_address(0));
  arrive(barrier, bytes);
}

void mbarrier_wait(uint64_t* barrier, uint32_t parity) {
  called_from(__builtin_return_address(0));
  Barrier& b = find(barrier);
  if (parity > 1) fail("mbarrier_wait: a parity of " + std::to_string(parity));
  host::wait_until("an mbarrier", [&] { return b.parity != parity || b.complete(); });
  if (b.parity == parity) next_phase(b);
  host::acquire(b.completed);
}

void tma_load(void* tile, const TensorMap* map, uint64_t* barrier, int c0, int c1) {
  called_from(__builtin_return_address(0));
  load(tile, map, barrier, 2, {c0, c1});
}

void tma_load(void* tile, const TensorMap* map, uint64_t* barrier, int c0, int c1, int c2) {
  called_from(__builtin_return_address(0));
  load(tile, map, barrier, 3, {c0, c1, c2});
}

void tma_load(void* tile, const TensorMap* map, uint64_t* barrier, int c0, int c1, int c2, int c3) {
  called_from(__builtin_return_address(0));
  load(tile, map, barrier, 4, {c0, c1, c2, c3});
}

void tma_load(void* tile, const TensorMap* map, uint64_t* barrier, int c0, int c1, int c2, int c3, int c4) {
  called_from(__builtin_return_address(0));
  load(tile, map, barrier, 5, {c0, c1, c2, c3, c4});
}

void tma_store(const TensorMap* map, const void* tile, int c0, int c1) {
  called_from(__builtin_return_address(0));
  store(map, tile, 2, {c0, c1});
}

void tma_store(const TensorMap* map, const void* tile, int c0, int c1, int c2) {
  called_from(__builtin_return_address(0));
  store(map, tile, 3, {c0, c1, c2});
}

void tma_store(const TensorMap* map, const void* tile, int c0, int c1, int c2, int c3) {
  called_from(__builtin_return_address(0));
  store(map, tile, 4, {c0, c1, c2, c3});
}

void tma_store(const TensorMap* map, const void* tile, int c0, int c1, int c2, int c3, int c4) {
  called_from(__builtin_return_address(0));
  store(map, tile, 5, {c0, c1, c2, c3, c4});
}

void bulk_commit() {
  Stores& mine = stores[host::thread()];
  mine.unread.push_back(std::move(mine.open));
  mine.open.clear();
}

// A store is written when it is read: who may look at it before bulk_wait, the detector knows.
void bulk_wait(int pending, bool read) {
  called_from(__builtin_return_address(0));
  Stores& mine = stores[host::thread()];
  while (static_cast<int>(mine.unread.size()) > pending) {
    for (Store& store : mine.unread.front()) {
      each_run(store.map, store.coordinates, [&](int row, char* to, int begin, int bytes) {
        if (to == nullptr) return;
        each_chunk(store.tile, store.map.swizzle, row + begin, bytes,
                   [&](const char* from, int done, int run) { std::memcpy(to + done, from, run); });
      });
      store.read.land();
    }
    mine.unwritten.push_back(std::move(mine.unread.front()));
    mine.unread.erase(mine.unread.begin());
  }
  if (read) return;
  while (static_cast<int>(mine.unread.size() + mine.unwritten.size()) > pending) {
    for (Store& store : mine.unwritten.front()) store.write.land();
    mine.unwritten.erase(mine.unwritten.begin());
  }
}

void fence_async_proxy() {
  called_from(__builtin_return_address(0));
  host::fence_async_proxy();
}

void set_registers(int registers) {
  called_from(__builtin_return_address(0));
  if (registers < 24 || registers > 256 || registers % 8) fail("setmaxnreg " + std::to_string(registers));
  host::meet_warpgroup("setmaxnreg", nullptr, nullptr);
}

bool elect_one() {
  called_from(__builtin_return_address(0));
  host::meet_warp("elect_one", ~0u, nullptr, nullptr);
  return host::thread() % 32 == 0;
}

// ---- wgmma ---------------------------------------------------------------------------------------------------------

namespace {

// What a descriptor says of an operand.
struct Operand {
  uint32_t begin, leading, stride;
  SwizzleMode mode;
  Major major;

  Operand(uint64_t descriptor, Major major)
      : begin((descriptor & 0x3fff) << 4),
        leading((descriptor >> 16 & 0x3fff) << 4),
        stride((descriptor >> 32 & 0x3fff) << 4),
        mode(static_cast<SwizzleMode>((4 - (descriptor >> 62)) & 3)),
        major(major) {
    if (descriptor >> 46 & 0xffff) fail("wgmma: a descriptor with a base offset or reserved bits");
    const uint32_t w = row_bytes(mode);
    if (mode != SwizzleMode::none && begin % (8 * w) >= w) {
      fail("wgmma: a tile" + at(begin) + " does not begin where its swizzle of " + std::to_string(w) + " bytes does");
    }
  }

  // Of element (row, k) of a K-major, or (k, row) of an MN-major tile.
  uint32_t address(uint32_t row, uint32_t k) const {
    const uint32_t w = row_bytes(mode);
    uint32_t linear = begin;
    if (major == Major::k) {
      linear += row % 8 * w + row / 8 * stride;
      linear += mode == SwizzleMode::none ? k / 8 * leading + k % 8 * 2 : k * 2;
    } else if (mode == SwizzleMode::none) {
      linear += row % 8 * 2 + row / 8 * stride + k % 8 * 16 + k / 8 * leading;
    } else {
      linear += row % (w / 2) * 2 + row / (w / 2) * leading + k % 8 * w + k / 8 * stride;
    }
    return swizzled(linear & 0x3ffff, mode);
  }

  // The bytes of its `rows` rows and 16 k lie between these two.
  std::pair<uint32_t, uint32_t> span(int rows) const {
    uint32_t first = kNone, last = 0;
    for (int row = 0; row < rows; row += 1) {
      for (int k = 0; k < 16; k += major == Major::k ? 8 : 1) {
        first = std::min(first, address(row, k));
        last = std::max(last, address(row, k));
      }
    }
    return {first, last + (major == Major::k ? 16 : 2)};
  }
};

// The accumulators of one warp, 16 rows of D: what its registers will hold.
struct Accumulator {
  float* registers[32];
  int count;
  std::vector<float> values;  // by lane
  int under_way = 0;
};

struct Operation {
  WgmmaCall call;
  uint32_t a_registers[32][4];
  std::shared_ptr<Accumulator> accumulator;
  std::unique_ptr<host::Transfer> transfer;
};

struct Warp {
  std::vector<std::vector<Operation>> groups;
  std::vector<Operation> open;
  std::map<float*, std::shared_ptr<Accumulator>> accumulators;  // by lane 0's registers
  host::Clock landed;
};

std::array<Warp, host::kMaxThreads / 32> warps;
std::array<bool, host::kMaxThreads> fenced;  // since the last wait

const bool registered = host::each_block([] {
  barriers.clear();
  for (Stores& s : stores) s = {};
  for (Warp& w : warps) w = {};
  fenced.fill(false);
});

constexpr uint32_t kPoison = 0x7fc0dead;  // a NaN

bool poisoned(const float& x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return bits == kPoison;
}

// What a thread brings to the warpgroup.
struct Part {
  const WgmmaCall& call;
  std::unique_ptr<host::Transfer> transfer;  // of lane 0
};

void start(void* const* parts) {
  const auto part = [&](int thread) -> Part& { return *static_cast<Part*>(parts[thread]); };
  for (int thread = 0; thread < 128; ++thread) {
    const WgmmaCall &a = part(thread).call, &b = part(0).call;
    if (a.dtype != b.dtype || a.n != b.n || a.a != b.a || a.b != b.b || a.accumulate != b.accumulate) {
      fail("wgmma: the threads of a warpgroup call for different products");
    }
  }
  for (int w = 0; w < 4; ++w) {
    Warp& warp = warps[host::thread() / 128 * 4 + w];
    Operation op{part(w * 32).call, {}, nullptr, std::move(part(w * 32).transfer)};
    std::shared_ptr<Accumulator>& d = warp.accumulators[op.call.d];
    const bool fresh = d == nullptr;
    if (fresh) {
      d = std::make_shared<Accumulator>();
      d->count = op.call.n / 2;
      d->values.resize(32 * d->count);
    }
    if (d->count != op.call.n / 2) fail("wgmma: accumulators of another product that is under way");
    for (int lane = 0; lane < 32; ++lane) {
      const WgmmaCall& call = part(w * 32 + lane).call;
      for (int i = 0; i < d->count; ++i) {
        if (fresh) {
          d->values[lane * d->count + i] = call.d[i];
          std::memcpy(&call.d[i], &kPoison, sizeof(float));
        } else if (!poisoned(call.d[i])) {
          fail("wgmma: its accumulators were written while another wgmma on them was under way");
        }
      }
      d->registers[lane] = call.d;
      if (call.a_registers) std::memcpy(op.a_registers[lane], call.a_registers, 16);
    }
    ++d->under_way;
    op.accumulator = d;
    warp.open.push_back(std::move(op));
  }
}

float value(DType dtype, const void* bits) {
  if (dtype == DType::float16) return to_float(*static_cast<const half*>(bits));
  return to_float(*static_cast<const bfloat16*>(bits));
}

// One warp's 16 rows.
void compute(const Operation& op, int warp) {
  const WgmmaCall& call = op.call;
  const int n = call.n;
  float a[16][16];
  std::vector<float> b(16 * n), sum(n);
  if (call.a_registers) {
    for (int lane = 0; lane < 32; ++lane) {
      for (int i = 0; i < 8; ++i) {
        const char* const bits = reinterpret_cast<const char*>(op.a_registers[lane]) + 2 * i;
        a[lane / 4 + i / 2 % 2 * 8][lane % 4 * 2 + i % 2 + i / 4 * 8] = value(call.dtype, bits);
      }
    }
  } else {
    const Operand operand(call.a, call.a_major);
    for (int row = 0; row < 16; ++row) {
      for (int k = 0; k < 16; ++k) {
        a[row][k] = value(call.dtype, host::shared_memory() + operand.address(warp * 16 + row, k));
      }
    }
  }
  const Operand operand(call.b, call.b_major);
  for (int column = 0; column < n; ++column) {
    for (int k = 0; k < 16; ++k) {
      b[k * n + column] = value(call.dtype, host::shared_memory() + operand.address(column, k));
    }
  }
  Accumulator& d = *op.accumulator;
  for (int row = 0; row < 16; ++row) {
    std::fill(sum.begin(), sum.end(), 0.0f);
    for (int k = 0; k < 16; ++k) {
      for (int column = 0; column < n; ++column) sum[column] += a[row][k] * b[k * n + column];
    }
    for (int column = 0; column < n; ++column) {
      const int lane = row % 8 * 4 + column % 8 / 2;
      float& to = d.values[lane * d.count + column / 8 * 4 + row / 8 * 2 + column % 2];
      to = call.accumulate ? to + sum[column] : sum[column];
    }
  }
}

void finish(Warp& warp, Operation& op) {
  op.transfer->land(warp.landed);
  Accumulator& d = *op.accumulator;
  if (--d.under_way > 0) return;
  float* const key = d.registers[0];
  for (int lane = 0; lane < 32; ++lane) {
    std::memcpy(d.registers[lane], &d.values[lane * d.count], d.count * sizeof(float));
  }
  warp.accumulators.erase(key);
}

}  // namespace

void wgmma(const WgmmaCall& call) {
  called_from(__builtin_return_address(0));
  const Warp& warp = warps[host::thread() / 32];
  const bool fresh = host::thread() % 32 == 0 && !warp.accumulators.contains(call.d);
  if (!fenced[host::thread()] && (call.a_registers || fresh)) {
    fail("wgmma: no wgmma_fence since its registers were last waited for");
  }
  Part mine{call, nullptr};
  if (host::thread() % 32 == 0) {
    mine.transfer = std::make_unique<host::Transfer>("wgmma", host::Proxy::async);
    const auto read = [&](const Operand& operand, int rows) {
      const auto [first, last] = operand.span(rows);
      mine.transfer->reads(host::shared_memory() + first, last - first);
    };
    if (!call.a_registers) read(Operand(call.a, call.a_major), 64);
    read(Operand(call.b, call.b_major), call.n);
  }
  host::meet_warpgroup("wgmma", &mine, start);
}

void wgmma_fence_registers() { fenced[host::thread()] = true; }

void wgmma_commit() {
  if (host::thread() % 32) return;
  Warp& warp = warps[host::thread() / 32];
  warp.groups.push_back(std::move(warp.open));
  warp.open.clear();
}

void wgmma_wait(int pending) {
  called_from(__builtin_return_address(0));
  host::meet_warp("wgmma_wait", ~0u, &pending, [](void* const* lanes) {
    const int index = host::thread() / 32, pending = *static_cast<int*>(lanes[0]);
    Warp& warp = warps[index];
    while (static_cast<int>(warp.groups.size()) > pending) {
      for (Operation& op : warp.groups.front()) {
        compute(op, index % 4);
        finish(warp, op);
      }
      warp.groups.erase(warp.groups.begin());
    }
  });
  host::acquire(warps[host::thread() / 32].landed);
  fenced[host::thread()] = false;
}

}  // namespace fastvit::ptx
