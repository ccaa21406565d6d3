// Happens-before by vector clocks, a shadow cell for every byte. A barrier over the whole block is the common case and
// costs no more than setting a floor; the rest of the clocks are for warps, named barriers and mbarriers.
#include "detector.h"

#include <link.h>
#include <pthread.h>

#include <algorithm>
#include <string>

#include "host.h"

namespace fastvit::host {

const void* called_from();             // by the running thread, a wrapper
std::string where(const void* address);  // " at file:line", or nothing
std::string block_name(uint32_t block);

namespace {

// One or more accesses by one agent at one time. Agents are the block's threads and the clocks that transfers land on.
// An agent's time goes up whenever it passes on what it did, so that what is known of it is a number.
struct Event {
  uint32_t block, agent, time;
  uint32_t older;   // of reads: the list of those that this one is not ordered after
  uint32_t length;  // of that list
  bool in_flight, async;
  const char* what;
  const void* at;
};

// The shared memory, or an allocation. Event 0 is none.
struct Memory {
  struct Cell {
    uint32_t written, read;
    bool operator==(const Cell&) const = default;
  };
  const char* begin = nullptr;
  size_t bytes = 0;
  std::vector<Cell> cells;
  std::vector<Event> events;

  void clear() {
    cells.assign(bytes, {});
    events.assign(1, {});
  }
};

struct Thread {
  uint32_t time, floor, fenced_floor;    // floors are for threads, not for other agents
  std::vector<uint32_t> known, fenced;
  struct {
    int memory;
    uint32_t event;
  } last_write, last_read;
};

struct Extent {
  const char *begin, *end;
  bool contains(const char* p) const { return p >= begin && p < end; }
};

thread_local std::vector<Extent> allocations;  // of the calls that this thread of the host makes

// Whether the code that runs is a kernel's.
__attribute__((tls_model("initial-exec"))) thread_local bool watching = false;

struct Unwatched {
  Unwatched() { watching = false; }
  ~Unwatched() { watching = true; }
};

struct State {
  Extent stacks, host_stack;
  std::vector<Extent> images;    // this library's constants and variables
  std::vector<Memory> memory;    // shared, then allocations by address
  std::vector<Thread> thread;
  uint32_t block = 0, now = 1, agents = 0;
  bool fences = false;           // was there any in this block
} state;

constexpr uint16_t kPrune = 64;

uint32_t at(const std::vector<uint32_t>& times, uint32_t agent) { return agent < times.size() ? times[agent] : 0; }

void raise(std::vector<uint32_t>& times, uint32_t agent, uint32_t time) {
  if (times.size() <= agent) times.resize(std::max<size_t>(agent + 1, state.agents));
  times[agent] = std::max(times[agent], time);
}

void join(std::vector<uint32_t>& into, const std::vector<uint32_t>& from) {
  if (into.size() < from.size()) into.resize(from.size());
  for (size_t i = 0; i < from.size(); ++i) into[i] = std::max(into[i], from[i]);
}

Thread& self() { return state.thread[thread()]; }

uint32_t floor_for(uint32_t agent, uint32_t floor) { return agent < state.thread.size() ? floor : 0; }

bool happened(const Event& e) {
  if (e.block != state.block || e.in_flight) return false;
  const auto me = static_cast<uint32_t>(thread());
  return e.agent == me || e.time <= std::max(floor_for(e.agent, self().floor), at(self().known, e.agent));
}

bool fenced(const Event& e) {
  return e.async || e.time <= std::max(floor_for(e.agent, self().fenced_floor), at(self().fenced, e.agent));
}

std::string place(int memory, size_t first, size_t last) {
  const std::string array = "an array of " + std::to_string(state.memory[memory].bytes) + " bytes";
  return (memory == 0 ? "shared memory" : array) + ", bytes " + std::to_string(first) + " to " + std::to_string(last);
}

[[noreturn]] void conflict(const Event& mine, const Event& other, int memory, size_t first, size_t last) {
  std::string text = other.in_flight ? "race with an instruction in flight: " : "race: ";
  text += std::string(mine.what) + where(mine.at) + " and " + other.what + where(other.at);
  if (other.agent < state.thread.size()) text += " by thread " + std::to_string(other.agent);
  if (other.block != state.block) text += " of block " + block_name(other.block);
  fail(text + ", on " + place(memory, first, last));
}

// The list of reads without those that happened before now.
uint32_t pruned(Memory& m, uint32_t list) {
  while (list && happened(m.events[list])) list = m.events[list].older;
  if (!list) return 0;
  if (m.events[list].block != state.block) {
    m.events[list].older = 0;  // of blocks that ran, one stands for all
    m.events[list].length = 1;
    return list;
  }
  if (m.events[list].length < kPrune || (m.events[list].length & (m.events[list].length - 1))) return list;
  uint32_t kept = 0;
  for (uint32_t i = list; i; i = m.events[i].older) {
    if (happened(m.events[i])) continue;
    Event copy = m.events[i];
    if (copy.in_flight) return list;  // it is known by its index
    copy.older = kept;
    copy.length = kept ? m.events[kept].length + 1 : 1;
    m.events.push_back(copy);
    kept = static_cast<uint32_t>(m.events.size() - 1);
  }
  return kept;
}

bool same(const Event& a, const Event& b) {
  return a.block == b.block && a.agent == b.agent && a.time == b.time && a.older == b.older &&
         a.in_flight == b.in_flight && a.at == b.at && a.what == b.what;
}

// The event's index: the thread's last one of its kind if it is the same.
template <class Last>
uint32_t add(int memory, const Event& e, Last& last) {
  std::vector<Event>& events = state.memory[memory].events;
  if (last.event && last.memory == memory && same(events[last.event], e)) return last.event;
  events.push_back(e);
  const auto index = static_cast<uint32_t>(events.size() - 1);
  if (!e.in_flight) last = {memory, index};
  return index;
}

Event event(const char* what, const void* address, bool in_flight = false, bool async = false) {
  const auto me = static_cast<uint32_t>(thread());
  return {state.block, me, self().time, 0, 1, in_flight, async, what, address};
}

void check_proxy(const Event& mine, const Event& other, int memory, size_t first, size_t last) {
  if (memory != 0 || !mine.async || fenced(other)) return;
  fail(std::string(mine.what) + where(mine.at) + " sees what " + other.what + where(other.at) + " by thread " +
       std::to_string(other.agent) + " wrote only after a fence.proxy.async, on " + place(memory, first, last));
}

// Calls f(first, past, cell) for every run of equal cells.
template <class F>
void runs(Memory& m, size_t first, size_t past, F f) {
  for (size_t i = first, j; i < past; i = j) {
    const Memory::Cell cell = m.cells[i];
    for (j = i + 1; j < past && m.cells[j] == cell;) ++j;
    f(i, j, cell);
  }
}

uint32_t write(int memory, size_t offset, size_t bytes, const Event& mine) {
  Memory& m = state.memory[memory];
  const uint32_t index = add(memory, mine, self().last_write);
  runs(m, offset, offset + bytes, [&](size_t first, size_t past, Memory::Cell cell) {
    if (cell.written && cell.written != index) {
      const Event& last = m.events[cell.written];
      if (!happened(last)) conflict(mine, last, memory, first, past - 1);
      check_proxy(mine, last, memory, first, past - 1);
    }
    for (uint32_t i = cell.read; i; i = m.events[i].older) {
      if (!happened(m.events[i])) conflict(mine, m.events[i], memory, first, past - 1);
    }
    std::fill(m.cells.begin() + first, m.cells.begin() + past, Memory::Cell{index, 0});
  });
  return index;
}

// Every run of cells has its own event: they differ in what they are added to.
template <class F>
void read(int memory, size_t offset, size_t bytes, Event mine, F added) {
  Memory& m = state.memory[memory];
  runs(m, offset, offset + bytes, [&](size_t first, size_t past, Memory::Cell cell) {
    if (cell.written) {
      const Event& last = m.events[cell.written];
      if (!happened(last)) conflict(mine, last, memory, first, past - 1);
      check_proxy(mine, last, memory, first, past - 1);
    }
    mine.older = pruned(m, cell.read);
    mine.length = mine.older ? m.events[mine.older].length + 1 : 1;
    const uint32_t index = add(memory, mine, self().last_read);
    for (size_t i = first; i < past; ++i) m.cells[i].read = index;
    added(index);
  });
}

// The memory that [data, data + bytes) lies in, or -1 for what is not ours to check.
int find(const char* data, size_t bytes, const char* what, const void* address) {
  const char* const shared = shared_memory();
  const Extent all_shared{shared, shared + kSharedBytes};
  if (all_shared.contains(data)) {
    if (data + bytes <= shared + state.memory[0].bytes) return 0;
    fail(std::string("out of bounds: ") + what + where(address) + " of " + std::to_string(bytes) +
         " bytes at offset " + std::to_string(data - shared) + " of " + std::to_string(state.memory[0].bytes) +
         " bytes of shared memory");
  }
  if (state.memory.size() == 1 || state.stacks.contains(data) || state.host_stack.contains(data)) return -1;
  for (size_t i = 1; i < state.memory.size(); ++i) {
    const Memory& m = state.memory[i];
    if (data >= m.begin && data + bytes <= m.begin + m.bytes) return static_cast<int>(i);
  }
  for (const Extent& image : state.images) {
    if (image.contains(data)) return -1;
  }
  std::string nearest = "far from any array";
  ptrdiff_t distance = 1 << 20;
  for (size_t i = 1; i < state.memory.size(); ++i) {
    const Memory& m = state.memory[i];
    const ptrdiff_t before = m.begin - data, after = data - (m.begin + static_cast<ptrdiff_t>(m.bytes));
    if (std::max(before, after) >= distance) continue;
    distance = std::max(before, after);
    const std::string array = "an array of " + std::to_string(m.bytes) + " bytes";
    nearest = before > 0 ? std::to_string(before) + " bytes before " + array
                         : "at offset " + std::to_string(data - m.begin) + " of " + array;
  }
  fail(std::string("out of bounds: ") + what + where(address) + " of " + std::to_string(bytes) + " bytes " + nearest);
}

void access(const void* pointer, size_t bytes, bool writes, const char* what, const void* address) {
  const Unwatched here;
  const auto* data = static_cast<const char*>(pointer);
  const int memory = find(data, bytes, what, address);
  if (memory < 0) return;
  const auto offset = static_cast<size_t>(data - state.memory[memory].begin);
  if (writes) {
    write(memory, offset, bytes, event(what, address));
  } else {
    read(memory, offset, bytes, event(what, address), [](uint32_t) {});
  }
}

}  // namespace

// ---- Order ---------------------------------------------------------------------------------------------------------

void release(Clock& clock) {
  Thread& me = self();
  join(clock.known, me.known);
  for (uint32_t i = 0; me.floor && i < state.thread.size(); ++i) raise(clock.known, i, me.floor);
  raise(clock.known, static_cast<uint32_t>(thread()), me.time);
  if (state.fences) {
    join(clock.fenced, me.fenced);
    for (uint32_t i = 0; me.fenced_floor && i < state.thread.size(); ++i) raise(clock.fenced, i, me.fenced_floor);
  }
  me.time = ++state.now;
}

void acquire(const Clock& clock) {
  join(self().known, clock.known);
  join(self().fenced, clock.fenced);
}

void fence_async_proxy() {
  Thread& me = self();
  state.fences = true;
  join(me.fenced, me.known);
  me.fenced_floor = me.floor;
  raise(me.fenced, static_cast<uint32_t>(thread()), me.time);
  me.time = ++state.now;
}

namespace detector {

void order(const std::vector<int>& members, const Clock& passed_on) {
  std::vector<Thread>& threads = state.thread;
  const bool everyone = members.size() == threads.size();
  Clock all = passed_on;
  uint32_t floor = 0, fenced_floor = 0;
  for (const int i : members) {
    const Thread& t = threads[i];
    const bool knows_other_agents = t.known.size() > threads.size();  // of whom a floor says nothing
    if (!everyone || knows_other_agents) join(all.known, t.known);
    if (state.fences) join(all.fenced, t.fenced);
    if (!everyone) raise(all.known, static_cast<uint32_t>(i), t.time);
    floor = std::max(floor, t.floor);
    fenced_floor = std::max(fenced_floor, t.fenced_floor);
  }
  if (everyone) floor = state.now;
  ++state.now;
  for (const int i : members) {
    Thread& t = threads[i];
    join(t.known, all.known);
    join(t.fenced, all.fenced);
    t.floor = floor;
    t.fenced_floor = fenced_floor;
    t.time = state.now;
  }
}

// ---- Beginning and end ---------------------------------------------------------------------------------------------

void begin_launch(const char* stacks, size_t stack_bytes) {
  state.stacks = {stacks, stacks + stack_bytes};
  thread_local const Extent host_stack = [] {
    pthread_attr_t attributes;
    void* lowest = nullptr;
    size_t bytes = 0;
    pthread_getattr_np(pthread_self(), &attributes);
    pthread_attr_getstack(&attributes, &lowest, &bytes);
    pthread_attr_destroy(&attributes);
    return Extent{static_cast<const char*>(lowest), static_cast<const char*>(lowest) + bytes};
  }();
  state.host_stack = host_stack;  // where the launcher keeps the kernel's arguments
  if (state.images.empty()) {
    dl_iterate_phdr([](dl_phdr_info* info, size_t, void*) {
      std::vector<Extent> segments;
      for (int i = 0; i < info->dlpi_phnum; ++i) {
        if (info->dlpi_phdr[i].p_type != PT_LOAD) continue;
        const char* begin = reinterpret_cast<const char*>(info->dlpi_addr + info->dlpi_phdr[i].p_vaddr);
        segments.push_back({begin, begin + info->dlpi_phdr[i].p_memsz});
      }
      const auto ours = [](const Extent& e) { return e.contains(reinterpret_cast<const char*>(&state)); };
      if (std::none_of(segments.begin(), segments.end(), ours)) return 0;
      state.images = segments;
      return 1;
    }, nullptr);
  }
  // Views of one tensor overlap: they are one memory.
  std::sort(allocations.begin(), allocations.end(), [](const Extent& a, const Extent& b) { return a.begin < b.begin; });
  std::vector<Extent> merged;
  for (const Extent& e : allocations) {
    if (merged.empty() || e.begin >= merged.back().end) {
      merged.push_back(e);
    } else {
      merged.back().end = std::max(merged.back().end, e.end);
    }
  }
  state.memory.resize(merged.size() + 1);
  for (size_t i = 0; i < merged.size(); ++i) {
    state.memory[i + 1].begin = merged[i].begin;
    state.memory[i + 1].bytes = static_cast<size_t>(merged[i].end - merged[i].begin);
    state.memory[i + 1].clear();
  }
  state.block = 0;
}

void begin_block(size_t shared, int threads) {
  state.memory[0].begin = shared_memory();
  state.memory[0].bytes = shared;
  state.memory[0].clear();
  state.thread.assign(threads, {});
  for (Thread& t : state.thread) t.time = 1;
  state.agents = static_cast<uint32_t>(threads);
  state.now = 1;
  state.fences = false;
  ++state.block;
}

void end_launch() { state.memory.resize(1); }

void watch(bool on) { watching = on; }

}  // namespace detector

void allocation(const void* data, size_t bytes) {
  if (bytes) allocations.push_back({static_cast<const char*>(data), static_cast<const char*>(data) + bytes});
}

void forget_allocations() { allocations.clear(); }

// ---- Accesses ------------------------------------------------------------------------------------------------------

void reads(const void* data, size_t bytes, const char* what) { access(data, bytes, false, what, called_from()); }
void writes(void* data, size_t bytes, const char* what) { access(data, bytes, true, what, called_from()); }

Transfer::Transfer(const char* what, Proxy proxy) : what_(what), proxy_(proxy) {}

void Transfer::reads(const void* data, size_t bytes) {
  const Unwatched here;
  const int memory = find(static_cast<const char*>(data), bytes, what_, called_from());
  if (memory < 0) return;
  const auto offset = static_cast<size_t>(static_cast<const char*>(data) - state.memory[memory].begin);
  read(memory, offset, bytes, event(what_, called_from(), true, proxy_ == Proxy::async),
       [&](uint32_t index) { parts_.push_back({memory, index}); });
}

void Transfer::writes(void* data, size_t bytes) {
  const Unwatched here;
  const int memory = find(static_cast<const char*>(data), bytes, what_, called_from());
  if (memory < 0) return;
  const auto offset = static_cast<size_t>(static_cast<const char*>(data) - state.memory[memory].begin);
  parts_.push_back({memory, write(memory, offset, bytes, event(what_, called_from(), true, proxy_ == Proxy::async))});
}

void Transfer::land() {
  for (const Part& p : parts_) {
    Event& e = state.memory[p.memory].events[p.event];
    e.in_flight = false;
    e.agent = static_cast<uint32_t>(thread());
    e.time = self().time;
  }
}

void Transfer::land(Clock& clock) {
  if (clock.agent < 0) clock.agent = static_cast<int>(state.agents++);
  const uint32_t time = ++state.now;
  for (const Part& p : parts_) {
    Event& e = state.memory[p.memory].events[p.event];
    e.in_flight = false;
    e.agent = static_cast<uint32_t>(clock.agent);
    e.time = time;
  }
  raise(clock.known, static_cast<uint32_t>(clock.agent), time);
}

}  // namespace fastvit::host

// ---- What g++ -fsanitize=thread,alignment,bounds calls -------------------------------------------------------------

#define EXPORT extern "C" __attribute__((used))

EXPORT void __tsan_init() {}
EXPORT void __tsan_func_entry(void*) {}
EXPORT void __tsan_func_exit() {}
EXPORT void __tsan_vptr_update(void**, void*) {}
EXPORT void __tsan_vptr_read(void**) {}
EXPORT unsigned char __tsan_atomic8_load(const volatile unsigned char* p, int) {  // of a static local's guard
  return __atomic_load_n(p, __ATOMIC_SEQ_CST);
}

// Most accesses are of the thread's own stack: they go no further.
#define CHECK(pointer, bytes, writes)                                                                       \
  using namespace fastvit::host;                                                                            \
  if (!watching || state.stacks.contains(static_cast<const char*>(pointer))) return;                        \
  access(pointer, bytes, writes, writes ? "write" : "read", __builtin_return_address(0));

#define ACCESSES(bytes)                                                        \
  EXPORT void __tsan_read##bytes(void* p) { CHECK(p, bytes, false) }           \
  EXPORT void __tsan_write##bytes(void* p) { CHECK(p, bytes, true) }           \
  EXPORT void __tsan_unaligned_read##bytes(void* p) { CHECK(p, bytes, false) } \
  EXPORT void __tsan_unaligned_write##bytes(void* p) { CHECK(p, bytes, true) }

ACCESSES(1)
ACCESSES(2)
ACCESSES(4)
ACCESSES(8)
ACCESSES(16)
EXPORT void __tsan_read_range(void* p, size_t bytes) { CHECK(p, bytes, false) }
EXPORT void __tsan_write_range(void* p, size_t bytes) { CHECK(p, bytes, true) }

namespace {

struct Source {
  const char* file;
  uint32_t line, column;
};

struct Type {
  uint16_t kind, information;
  char name[1];  // longer
};

// What x86 forgives and a GPU does not: a vector at an address that is no multiple of its size; and an index past the
// end of an array in registers, which no access of memory shows.
[[noreturn]] void fail_at(const Source& source, const std::string& what) {
  const std::string file = source.file;
  fastvit::host::fail(what + " at " + file.substr(file.rfind('/') + 1) + ":" + std::to_string(source.line));
}

}  // namespace

EXPORT void __ubsan_handle_type_mismatch_v1(void* data, uintptr_t address) {
  struct Mismatch {
    Source source;
    const Type* type;
    unsigned char log2_alignment, kind;
  };
  const auto& mismatch = *static_cast<const Mismatch*>(data);
  const uintptr_t alignment = uintptr_t{1} << mismatch.log2_alignment;
  if (!fastvit::host::watching || address % alignment == 0) return;
  const std::string past = std::to_string(address % alignment) + " past a multiple of " + std::to_string(alignment);
  fail_at(mismatch.source, "misaligned: an access as " + std::string(mismatch.type->name) + " at an address " + past);
}

EXPORT void __ubsan_handle_out_of_bounds(void* data, uintptr_t index) {
  struct OutOfBounds {
    Source source;
    const Type *array, *index;
  };
  const auto& found = *static_cast<const OutOfBounds*>(data);
  if (!fastvit::host::watching) return;
  const std::string which = std::to_string(static_cast<intptr_t>(index));
  fail_at(found.source, "out of bounds: index " + which + " of " + found.array->name);
}
