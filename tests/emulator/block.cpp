// Runs blocks one after the other. Their threads are fibers: each runs until it has to wait for others, the lanes of a
// warp in turn, then the next warp. When none can go on, that is a deadlock, and who waits for what is reported.
#define FASTVIT_SCHEDULER
#include <dlfcn.h>
#include <sys/mman.h>

#include <algorithm>
#include <array>
#include <cstdio>
#include <map>
#include <mutex>
#include <sstream>

#include "detector.h"
#include "fiber.h"
#include "host.h"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace fastvit::host {
namespace {

constexpr size_t kStackBytes = 256 * 1024;
constexpr int kMaxWarps = kMaxThreads / 32;

alignas(1024) char shared[kSharedBytes];

struct Thread {
  Fiber fiber;
  bool done = false;
  const char* waits_for = nullptr;
  bool (*ready)(void*) = nullptr;
  void* argument = nullptr;
  const void* called_from = nullptr;
};

// The launch that runs; one at a time in a process.
struct Launch {
  const void* kernel = nullptr;
  void (*call)(void*) = nullptr;
  void* argument = nullptr;
  int threads = 0;
  int running = 0;
  std::string error;
  Fiber scheduler;
  std::array<Thread, kMaxThreads> thread;
  std::array<std::map<uint32_t, Meeting>, kMaxWarps> warp;  // by mask
  std::array<Meeting, kMaxWarps / 4> warpgroup;
  std::array<Meeting, 16> barrier;
} launch;

std::mutex one_launch;

std::vector<void (*)()>& each_block_functions() {
  static std::vector<void (*)()> functions;
  return functions;
}

// Reserved once; pages come as they are touched. The lowest page of every stack is a guard.
char* stacks() {
  static char* const memory = [] {
    void* m = mmap(nullptr, kStackBytes * kMaxThreads, PROT_READ | PROT_WRITE,
                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (m == MAP_FAILED) throw error("no memory for the stacks of ", kMaxThreads, " threads");
    for (int i = 0; i < kMaxThreads; ++i) mprotect(static_cast<char*>(m) + i * kStackBytes, 4096, PROT_NONE);
    return static_cast<char*>(m);
  }();
  return memory;
}

void yield() { Fiber::switch_to(launch.thread[launch.running].fiber, launch.scheduler); }

void run_thread() {
  Thread& self = launch.thread[launch.running];
  try {
    launch.call(launch.argument);
  } catch (const std::exception& e) {
    if (launch.error.empty()) launch.error = e.what();
  }
  self.done = true;
  yield();
}

void resume(int i) {
  launch.running = i;
  threadIdx.x = static_cast<unsigned>(i);
  detector::watch(true);
  Fiber::switch_to(launch.scheduler, launch.thread[i].fiber);
  detector::watch(false);
}

std::string ranges(const std::vector<int>& numbers) {
  std::string text;
  for (size_t i = 0, j; i < numbers.size(); i = j) {
    for (j = i + 1; j < numbers.size() && numbers[j] == numbers[j - 1] + 1;) ++j;
    text += (text.empty() ? "" : ", ") + std::to_string(numbers[i]);
    if (j > i + 1) text += "-" + std::to_string(numbers[j - 1]);
  }
  return (numbers.size() == 1 ? "thread " : "threads ") + text;
}

std::string deadlock() {
  std::map<std::string, std::vector<int>> who;
  for (int i = 0; i < launch.threads; ++i) {
    const Thread& t = launch.thread[i];
    who[t.done ? "returned" : std::string("wait for ") + t.waits_for].push_back(i);
  }
  std::string text = "deadlock:";
  for (const auto& [what, numbers] : who) text += " " + ranges(numbers) + " " + what + ";";
  text.pop_back();
  return text;
}

void run_block() {
  for (auto& warp : launch.warp) warp.clear();
  for (Meeting& m : launch.warpgroup) m = {};
  for (Meeting& m : launch.barrier) m = {};
  for (int i = 0; i < launch.threads; ++i) {
    launch.thread[i] = {};
    launch.thread[i].fiber.start(stacks() + i * kStackBytes, kStackBytes, run_thread);
  }
  int left = launch.threads;
  while (left > 0) {
    bool stuck = true;
    for (int warp = 0; warp < launch.threads; warp += 32) {
      for (bool moved = true; moved;) {
        moved = false;
        for (int i = warp; i < warp + 32; ++i) {
          Thread& t = launch.thread[i];
          if (t.done || (t.ready && !t.ready(t.argument))) continue;
          t.ready = nullptr;
          resume(i);
          if (!launch.error.empty()) return;
          left -= t.done;
          moved = true;
          stuck = false;
        }
      }
    }
    if (stuck) {
      launch.error = deadlock();
      return;
    }
  }
}

std::string command_output(const std::string& command) {
  std::string text;
  if (FILE* pipe = popen(command.c_str(), "r")) {
    char line[512];
    while (fgets(line, sizeof(line), pipe)) text += line;
    pclose(pipe);
  }
  return text;
}

// The function's name, without arguments, or the lines of the source that an address belongs to, the call's own first.
std::string symbol(const void* address, bool line) {
  Dl_info info;
  if (address == nullptr || !dladdr(address, &info)) return "";
  std::ostringstream command;
  command << "addr2line " << (line ? "-si" : "-fC") << " -e '" << info.dli_fname << "' 0x" << std::hex
          << reinterpret_cast<uintptr_t>(address) - reinterpret_cast<uintptr_t>(info.dli_fbase) - (line ? 1 : 0)
          << " 2>/dev/null";
  std::istringstream lines(command_output(command.str()));
  std::string text, part;
  if (!line) {
    std::getline(lines, text);
    return text;
  }
  while (std::getline(lines, part)) {
    part = part.substr(0, part.find(' '));
    if (part.find('?') == std::string::npos && part.find("host") != 0) text += (text.empty() ? "" : " < ") + part;
  }
  return text;
}

}  // namespace

char* shared_memory() { return shared; }
int thread() { return launch.running; }
int threads() { return launch.threads; }

bool each_block(void (*begin)()) {
  each_block_functions().push_back(begin);
  return true;
}

void called_from(const void* address) { launch.thread[launch.running].called_from = address; }
const void* called_from() { return launch.thread[launch.running].called_from; }

std::string where(const void* address) {
  const std::string lines = symbol(address, true);
  return lines.empty() ? "" : " at " + lines;
}

std::string block_name(uint32_t block) {
  const uint32_t i = block - 1;
  return "(" + std::to_string(i % gridDim.x) + ", " + std::to_string(i / gridDim.x % gridDim.y) + ", " +
         std::to_string(i / gridDim.x / gridDim.y) + ")";
}

// (By a switch and not an exception: the detector's callers are calls that the compiler knows cannot throw.)
void fail(const std::string& what) {
  launch.error = what + " (thread " + std::to_string(launch.running) + ")";
  yield();
  __builtin_unreachable();
}

void wait(const char* what, bool (*ready)(void*), void* argument) {
  Thread& self = launch.thread[launch.running];
  self.waits_for = what;
  self.ready = ready;
  self.argument = argument;
  yield();
}

void run_blocks(const void* kernel, dim3 grid, int threads, size_t bytes, void (*call)(void*), void* argument) {
  const std::lock_guard<std::mutex> lock(one_launch);
  if (threads <= 0 || threads > kMaxThreads || threads % 32) {
    throw error("launch: ", threads, " threads in a block; accepted: multiples of 32 up to ", kMaxThreads);
  }
  if (bytes > kSharedBytes) throw error("launch: ", bytes, " bytes of shared memory; accepted: up to ", kSharedBytes);
  if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535) {
    throw error("launch: grid (", grid.x, ", ", grid.y, ", ", grid.z, "); accepted: 1 to 2147483647, 65535, 65535");
  }
  launch.kernel = kernel;
  launch.call = call;
  launch.argument = argument;
  launch.threads = threads;
  launch.error.clear();
  blockDim = dim3(static_cast<unsigned>(threads));
  gridDim = grid;
  detector::begin_launch(stacks(), kStackBytes * kMaxThreads);
  for (blockIdx.z = 0; blockIdx.z < grid.z && launch.error.empty(); ++blockIdx.z) {
    for (blockIdx.y = 0; blockIdx.y < grid.y && launch.error.empty(); ++blockIdx.y) {
      for (blockIdx.x = 0; blockIdx.x < grid.x && launch.error.empty(); ++blockIdx.x) {
        std::memset(shared, 0xff, bytes);
        detector::begin_block(bytes, threads);
        for (const auto begin : each_block_functions()) begin();
        run_block();
        if (launch.error.empty()) continue;
        detector::end_launch();
        throw error(launch.error, ", block (", blockIdx.x, ", ", blockIdx.y, ", ", blockIdx.z, "), kernel ",
                    symbol(kernel, false));
      }
    }
  }
  detector::end_launch();
}

// ---- Meetings ------------------------------------------------------------------------------------------------------

void Meeting::come(
    const char* name, int count, int place, void* mine, Together together, bool orders, bool stay) {
  if (arrived == 0) {
    what = name;
    expected = count;
    arguments.assign(std::max<size_t>(place + 1, std::max(count, 32)), nullptr);
    members.clear();
    passed_on = {};
  } else if (std::strcmp(what, name) != 0 || expected != count) {
    fail(std::string(name) + " of " + std::to_string(count) + " threads, while others are at " + what + " of " +
         std::to_string(expected));
  }
  if (static_cast<size_t>(place) < arguments.size()) arguments[place] = mine;
  if (stay) members.push_back(launch.running);
  if (orders && !stay) release(passed_on);
  const uint64_t mine_generation = generation;
  if (++arrived == expected) {
    if (together) together(arguments.data());
    if (orders) detector::order(members, passed_on);
    arrived = 0;
    ++generation;
  } else if (stay) {
    wait_until(name, [&] { return generation != mine_generation; });
  }
}

void meet_warp(const char* what, uint32_t mask, void* mine, Meeting::Together together, bool orders) {
  const int lane = launch.running % 32;
  if (!(mask >> lane & 1)) fail(std::string(what) + ": the mask does not name the lane that calls it");
  launch.warp[launch.running / 32][mask].come(what, __builtin_popcount(mask), lane, mine, together, orders);
}

void meet_warpgroup(const char* what, void* mine, Meeting::Together together) {
  launch.warpgroup[launch.running / 128].come(what, 128, launch.running % 128, mine, together, false);
}

void barrier(int id, int count, bool stay) {
  if (id < 0 || id > 15 || count <= 0 || count % 32 || count > launch.threads) {
    fail("barrier " + std::to_string(id) + " of " + std::to_string(count) +
         " threads; accepted: ids 0 to 15, whole warps of the block");
  }
  static const auto names = [] {
    std::array<std::string, 16> n;
    for (int i = 0; i < 16; ++i) n[i] = "barrier " + std::to_string(i);
    n[0] = "__syncthreads";
    return n;
  }();
  launch.barrier[id].come(names[id].c_str(), count, 0, nullptr, nullptr, true, stay);
}

// ---- Shuffles ------------------------------------------------------------------------------------------------------

uint64_t shuffle(uint32_t mask, uint64_t value, Shuffle how, int lane, int width) {
  struct Mine {
    uint64_t value;
    Shuffle how;
    int lane, width;
    uint64_t result;
    bool unnamed;
  } mine{value, how, lane, width, 0, false};
  meet_warp("shuffle", mask, &mine, [](void* const* lanes) {
    for (int i = 0; i < 32; ++i) {
      if (!lanes[i]) continue;
      auto& self = *static_cast<Mine*>(lanes[i]);
      const int segment = i & ~(self.width - 1), last = segment + self.width - 1;
      int from = self.how == Shuffle::from   ? segment + (self.lane & (self.width - 1))
                 : self.how == Shuffle::with ? i ^ self.lane
                                             : i + self.lane;
      if (self.how != Shuffle::from && from > last) from = i;  // past the segment: one's own value
      self.unnamed = lanes[from] == nullptr;
      if (!self.unnamed) self.result = static_cast<const Mine*>(lanes[from])->value;
    }
  });
  if (mine.unnamed) fail("shuffle: reads a lane that the mask does not name");
  return mine.result;
}

}  // namespace fastvit::host

void __syncthreads() { fastvit::host::barrier(0, fastvit::host::threads()); }

void __syncwarp(unsigned mask) { fastvit::host::meet_warp("__syncwarp", mask, nullptr, nullptr, true); }
