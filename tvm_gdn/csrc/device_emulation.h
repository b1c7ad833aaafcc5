// Runs generated CUDA C on a CPU, as a driver: what nvcc or mcc would compile is compiled by the C++ compiler behind this header.
//
// A block runs on one OS thread, its threads as fibers that change at barriers and warp-wide operations. In what order they run
// is drawn anew at every such point (TVM_GDN_EMULATION_SEED; "0" keeps them in order), so that a missing barrier shows as a wrong
// result. Warps have EMULATED_WARP threads; shuffles, votes and matrix fragments work within a warp. Divergent barriers, and
// threads that leave before a barrier, end the process with a message.
#pragma once
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <mutex>
#include <random>
#include <string>
#include <thread>
#include <type_traits>
#include <ucontext.h>
#include <vector>
#ifndef EMULATED_WARP
#define EMULATED_WARP 32
#endif
#define __CUDA_ARCH__ 800
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __shared__ static thread_local
#define __constant__ static
#define __align__(n) alignas(n)
#define __launch_bounds__(...)
#define __restrict__ __restrict
#define __maxnreg__(...)
using std::max;
using std::min;

#include "emulation_numbers.h"

#if defined(__x86_64__)
// Saves what a call must keep and changes stacks: twenty times faster than swapcontext, which enters the kernel.
extern "C" void tvm_gdn_emulation_switch(void** save, void* to);
__asm__(
    ".text\n.weak tvm_gdn_emulation_switch\n.type tvm_gdn_emulation_switch,@function\ntvm_gdn_emulation_switch:\n"
    " push %rbp\n push %rbx\n push %r12\n push %r13\n push %r14\n push %r15\n mov %rsp,(%rdi)\n mov %rsi,%rsp\n"
    " pop %r15\n pop %r14\n pop %r13\n pop %r12\n pop %rbx\n pop %rbp\n ret\n");
#endif

namespace emulation {
enum State { RUN, BARRIER, WARP, DONE };
// Threads of the groups that may have barriers of their own, and of two of them.
enum { TEAM = 128, PAIR = 2 * TEAM };

struct Context {
#if defined(__x86_64__)
  void* stack_pointer;
  void make(char* stack, size_t size, void (*entry)()) {
    void** top = (void**)(((uintptr_t)stack + size) & ~(uintptr_t)15);
    *--top = 0;
    *--top = (void*)entry;
    for (int n = 0; n < 6; ++n) *--top = 0;
    stack_pointer = top;
  }
  void change(Context& to) { tvm_gdn_emulation_switch(&stack_pointer, to.stack_pointer); }
#else
  ucontext_t place;
  void make(char* stack, size_t size, void (*entry)()) {
    getcontext(&place);
    place.uc_stack.ss_sp = stack;
    place.uc_stack.ss_size = size;
    place.uc_link = 0;
    makecontext(&place, entry, 0);
  }
  void change(Context& to) { swapcontext(&place, &to.place); }
#endif
};

struct Copy {
  void* to;
  const void* from;
  int inside, group;
};
// A barrier of the copy engine: 8 bytes of shared memory.
struct Arrival {
  unsigned opened, arrived;
};
// A barrier of a ring's stage: the number of the phase that is not over, and arrivals that it waits for.
struct Stage {
  unsigned short opened, phase;
  short expected, left;
};
struct Staged {
  Copy copy;
  Stage* stage;
  unsigned short phase;
};
struct Bulk {
  void* to;
  const void* from;
  int bytes;
  Arrival* arrival;
};
struct Fiber {
  Context context;
  State state;
  int width;  // lanes that take part in the warp-wide operation that the thread waits in
  dim3_ index;
  alignas(16) char slot[256];  // what the thread shows to its warp
  std::vector<char> stack;
  std::vector<Copy> copies;  // asked for, not waited for
  int group;                 // of copies, the one that is open
  std::vector<std::function<int()>> products;  // begun, not waited for
  uint64_t named;  // mixes the addresses of the fragments of wmma that it loaded and stored
};
struct Block {
  std::vector<Fiber> fibers;
  Context main;
  int current = 0;
  std::function<void()> body;
  std::vector<char> shared;
  std::vector<Bulk> bulks;  // asked for, not waited for
  std::vector<Staged> staged;  // the same for stages of a ring
  unsigned drawn;  // whether the next ones are there at once
};
static thread_local Block* block;

[[noreturn]] static inline void fail(const char* what) {
  fprintf(stderr, "emulation: %s in block (%u, %u, %u)\n", what, blockIdx.x, blockIdx.y, blockIdx.z);
  abort();
}
// What two threads of a warp have named in wmma.
static inline void agree(uint64_t one, uint64_t other) {
  if (one != other) fail("fragments of wmma whose threads name different addresses");
}
// Fragments of matrix instructions: a compiler for the device drops what lies outside of an array, padding here would hide it.
#define TVM_GDN_INSIDE(size, at, count) \
  if ((at) < 0 || (at) + (count) > (size)) emulation::fail("a fragment outside of its registers")
static inline int defer(void* to, const void* from, int inside) {
  if (((uintptr_t)to | (uintptr_t)from) & 15) fail("a copy of 16 bytes that are not aligned");
  Fiber& me = block->fibers[block->current];
  me.copies.push_back({to, from, inside, me.group});
  return 0;
}
static inline int end_group() { return ++block->fibers[block->current].group, 0; }
// All copies, or those of all but the last `left` groups.
static inline int arrive(int left, bool all) {
  Fiber& me = block->fibers[block->current];
  size_t done = 0;
  for (; done < me.copies.size() && (all || me.copies[done].group < me.group - left); ++done) {
    const Copy& copy = me.copies[done];
    if (copy.inside) memcpy(copy.to, copy.from, 16);
    else memset(copy.to, 0, 16);
  }
  me.copies.erase(me.copies.begin(), me.copies.begin() + (long)done);
  return 0;
}
// Products of four warps read shared memory, and their results are there, when this thread waits for them: others change too soon
// what they read, or results are read too soon, and it shows.
static inline int later(std::function<int()> product) {
  block->fibers[block->current].products.push_back(std::move(product));
  return 0;
}
// All products but the last `left`.
static inline int finish(int left) {
  auto& products = block->fibers[block->current].products;
  for (; products.size() > (size_t)left; products.erase(products.begin())) products.front()();
  return 0;
}
#define TVM_GDN_LATER emulation::later
#define TVM_GDN_FINISH emulation::finish
#define TVM_GDN_DEFER emulation::defer
#define TVM_GDN_GROUP emulation::end_group
#define TVM_GDN_ARRIVE emulation::arrive
static const unsigned OPENED = 0x6f70656e;
static inline int open_arrival(void* barrier) { return *(Arrival*)barrier = {OPENED, 0}, 0; }
static inline int arrive_once(void* barrier) {
  Arrival* arrival = (Arrival*)barrier;
  if (arrival->opened != OPENED || arrival->arrived) fail("an arrival at a barrier that is not open, or a second one");
  return arrival->arrived = 1, 0;
}
static inline int bulk_read(void* to, const void* from, int bytes, void* barrier) {
  if (((uintptr_t)to | (uintptr_t)from | (uintptr_t)bytes) & 15) fail("a copy of bytes that are not aligned");
  block->bulks.push_back({to, from, bytes, (Arrival*)barrier});
  return arrive_once(barrier);
}
// At once: a fence that is missing in front does not show.
static inline int bulk_write(void* to, const void* from, int bytes) {
  if (((uintptr_t)to | (uintptr_t)from | (uintptr_t)bytes) & 15) fail("a copy of bytes that are not aligned");
  return memcpy(to, from, (size_t)bytes), 0;
}
static inline int open_stage(void* barrier, int count) { return *(Stage*)barrier = {0x6f70, 0, (short)count, (short)count}, 0; }
static inline int arrive_at(void* barrier) {
  Stage* stage = (Stage*)barrier;
  if (stage->opened != 0x6f70) fail("an arrival at a stage that is not open");
  if (!--stage->left) stage->left = stage->expected, ++stage->phase;
  return 0;
}
// What a thread asked for is there at once, or when a thread waits for it: reading too soon shows, and writing over what is still read.
static inline int copied(void* barrier) {
  Fiber& me = block->fibers[block->current];
  if ((block->drawn = block->drawn * 1664525u + 1013904223u) >> 31) arrive(0, true);
  for (const Copy& copy : me.copies) block->staged.push_back({copy, (Stage*)barrier, ((Stage*)barrier)->phase});
  me.copies.clear();
  return arrive_at(barrier);
}
static inline int wait_stage(void* barrier, int parity);
#define TVM_GDN_RING_OPEN emulation::open_stage
#define TVM_GDN_RING_ARRIVE emulation::arrive_at
#define TVM_GDN_RING_COPIED emulation::copied
#define TVM_GDN_RING_WAIT emulation::wait_stage
static inline void team_sync();
static inline void pair_sync();
static inline int bulk_wait(void* barrier);
#define TVM_GDN_OPEN emulation::open_arrival
#define TVM_GDN_READ emulation::bulk_read
#define TVM_GDN_SKIP emulation::arrive_once
#define TVM_GDN_WAIT emulation::bulk_wait
#define TVM_GDN_WRITE emulation::bulk_write
#define TVM_GDN_TEAM_SYNC emulation::team_sync
#define TVM_GDN_PAIR_SYNC emulation::pair_sync
// Begins where generated code says that it does, at a multiple of 64 bytes.
static inline void* dynamic_shared() { return (void*)(((uintptr_t)block->shared.data() + 63) & ~(uintptr_t)63); }

static void entry() {
  Block* own = block;
  own->body();
  own->fibers[own->current].state = DONE;
  own->fibers[own->current].context.change(own->main);
  __builtin_trap();
}
static inline void pause(State state, int width = EMULATED_WARP) {
  Block* own = block;
  Fiber& me = own->fibers[own->current];
  me.state = state;
  me.width = width;
  me.context.change(own->main);
}
// Threads of a group of four warps, whatever the width of a warp.
static inline void team_sync() { pause(WARP, TEAM); }
static inline void pair_sync() { pause(WARP, PAIR); }
static inline int bulk_wait(void* barrier) {
  Arrival* arrival = (Arrival*)barrier;
  if (arrival->opened != OPENED) fail("waiting for a barrier that is not open");
  for (int turn = 0; !arrival->arrived; ++turn) {
    if (turn == 1 << 16) fail("waiting for copies that nobody asked for");
    pause(RUN);
  }
  auto& bulks = block->bulks;
  for (const Bulk& bulk : bulks)
    if (bulk.arrival == arrival) memcpy(bulk.to, bulk.from, (size_t)bulk.bytes);
  bulks.erase(std::remove_if(bulks.begin(), bulks.end(), [=](const Bulk& bulk) { return bulk.arrival == arrival; }), bulks.end());
  return 0;
}
static inline int wait_stage(void* barrier, int parity) {
  Stage* stage = (Stage*)barrier;
  if (stage->opened != 0x6f70) fail("waiting for a stage that is not open");
  for (int turn = 0; (stage->phase & 1) == parity; ++turn) {
    if (turn == 1 << 20) fail("waiting for a stage that nobody fills");
    pause(RUN);
  }
  auto& staged = block->staged;
  const auto there = [=](const Staged& one) { return one.stage == stage && one.phase != stage->phase; };
  for (const Staged& one : staged)
    if (there(one)) one.copy.inside ? memcpy(one.copy.to, one.copy.from, 16) : memset(one.copy.to, 0, 16);
  staged.erase(std::remove_if(staged.begin(), staged.end(), there), staged.end());
  return 0;
}
static inline int lane() { return block->current % EMULATED_WARP; }
static inline Fiber& peer(int other) {
  size_t index = (size_t)(block->current / EMULATED_WARP * EMULATED_WARP + other);
  if (index >= block->fibers.size()) index = (size_t)block->current;
  return block->fibers[index];
}

/* Every thread of the warp shows `value`; then `read` looks at what the others show; then all go on. In warps of more than 32 threads
 * an operation of width 32 concerns 32 neighbours: the others may be elsewhere, as the devices that have such warps allow. */
template <class T, class F>
static inline auto exchange(const T& value, F read, int width = EMULATED_WARP) {
  static_assert(sizeof(T) <= sizeof(Fiber::slot), "too much for one thread to show");
  memcpy(block->fibers[block->current].slot, &value, sizeof(T));
  width = width < 32 ? 32 : width;
  pause(WARP, width);
  auto result = read();
  pause(WARP, width);  // nobody shows something new before all have read
  return result;
}
template <class T>
static inline T shown(int other) {
  T value;
  memcpy(&value, peer(other).slot, sizeof(T));
  return value;
}

static void run_block(Block& own, int threads, std::mt19937* random) {
  block = &own;
  std::vector<int> order(threads);
  for (int n = 0; n < threads; ++n) {
    Fiber& fiber = own.fibers[n];
    order[n] = n;
    fiber.state = RUN;
    fiber.copies.clear();
    fiber.products.clear();
    fiber.group = 0;
    fiber.named = 0;
    fiber.index = {n % blockDim.x, n / blockDim.x % blockDim.y, n / (blockDim.x * blockDim.y)};
    fiber.context.make(fiber.stack.data(), fiber.stack.size(), entry);
  }
  own.bulks.clear();
  own.staged.clear();
  own.drawn = random ? (unsigned)(*random)() : 0;
  int alive = threads;
  while (alive) {
    bool progress = false;
    if (random) std::shuffle(order.begin(), order.end(), *random);
    for (int n : order) {
      Fiber& fiber = own.fibers[n];
      if (fiber.state != RUN) continue;
      progress = true;
      own.current = n;
      threadIdx = fiber.index;
      own.main.change(fiber.context);
      alive -= fiber.state == DONE;
    }
    for (int width = 32; width <= PAIR; width *= 2)
      for (int first = 0; first < threads; first += width) {
        int end = std::min(threads, first + width), waiting = 0, left = 0;
        for (int n = first; n < end; ++n)
          waiting += own.fibers[n].state == WARP && own.fibers[n].width == width, left += own.fibers[n].state != DONE;
        if (!waiting || waiting != left) continue;
        for (int n = first; n < end; ++n)
          if (own.fibers[n].state == WARP) own.fibers[n].state = RUN;
        progress = true;
      }
    int waiting = 0;
    for (Fiber& fiber : own.fibers) waiting += fiber.state == BARRIER;
    if (waiting && waiting == alive) {
      if (alive != threads) fail("a barrier after some threads had left");
      for (Fiber& fiber : own.fibers) fiber.state = RUN;
      progress = true;
    }
    if (alive && !progress) fail("a barrier or warp operation that not all threads reach");
  }
  for (int n = 0; n < threads; ++n) agree(own.fibers[n].named, own.fibers[n / EMULATED_WARP * EMULATED_WARP].named);
}

typedef std::function<void(void**)> Body;
static std::map<std::string, Body>& kernels() {
  static std::map<std::string, Body> all;
  return all;
}
struct Registration {
  Registration(const char* name, Body body) { kernels()[name] = std::move(body); }
};

static int launch(const Body& body, dim3_ grid, dim3_ threads, unsigned shared, void** parameters) {
  const char* text = getenv("TVM_GDN_EMULATION_SEED");
  const unsigned seed = text ? (unsigned)atol(text) : 1;
  const long blocks = (long)grid.x * grid.y * grid.z;
  const int count = (int)(threads.x * threads.y * threads.z);
  if (count < 1 || count > 1024) return 1;
  std::atomic<long> next{0};
  auto work = [&](unsigned worker) {
    Block own;
    own.fibers.resize((size_t)count);
    for (Fiber& fiber : own.fibers) fiber.stack.resize(1 << 17);
    own.shared.resize(shared + 64 + 63);
    own.body = [&] { body(parameters); };
    std::mt19937 random(seed * 7919 + worker);
    blockDim = threads;
    gridDim = grid;
    for (long n; (n = next++) < blocks;) {
      // What an earlier block left in shared memory is no initial value.
      std::fill(own.shared.begin(), own.shared.end(), (char)0xff);
      blockIdx = {(unsigned)(n % grid.x), (unsigned)(n / grid.x % grid.y), (unsigned)(n / grid.x / grid.y)};
      run_block(own, count, seed ? &random : nullptr);
    }
  };
  std::vector<std::thread> workers;
  unsigned wanted = (unsigned)std::min<long>(blocks, std::max(1u, std::thread::hardware_concurrency()));
  for (unsigned n = 0; n < wanted; ++n) workers.emplace_back(work, n);
  for (std::thread& worker : workers) worker.join();
  return 0;
}
}  // namespace emulation

#define EMULATED_JOIN_(a, b) a##b
#define EMULATED_JOIN(a, b) EMULATED_JOIN_(a, b)
#define EMULATED_KERNEL(name, body) static emulation::Registration EMULATED_JOIN(registration_, __COUNTER__)(name, body);

static inline void __syncthreads() { emulation::pause(emulation::BARRIER); }
static inline void __syncwarp(unsigned = 0xffffffffu) { emulation::pause(emulation::WARP); }
static inline void __threadfence() {}
static inline void __threadfence_block() {}
static inline int atomicAdd(int* number, int more) { return __atomic_fetch_add(number, more, __ATOMIC_RELAXED); }
static inline unsigned __activemask() { return 0xffffffffu; }
template <class T>
static inline T __shfl_sync(unsigned, T value, int source, int width = EMULATED_WARP) {
  int from = emulation::lane() / width * width + source % width;
  return emulation::exchange(value, [=] { return emulation::shown<T>(from); }, width);
}
template <class T>
static inline T __shfl_up_sync(unsigned, T value, unsigned delta, int width = EMULATED_WARP) {
  int me = emulation::lane(), from = me % width >= (int)delta ? me - (int)delta : me;
  return emulation::exchange(value, [=] { return emulation::shown<T>(from); }, width);
}
template <class T>
static inline T __shfl_down_sync(unsigned, T value, unsigned delta, int width = EMULATED_WARP) {
  int me = emulation::lane(), from = me % width + (int)delta < width ? me + (int)delta : me;
  return emulation::exchange(value, [=] { return emulation::shown<T>(from); }, width);
}
template <class T>
static inline T __shfl_xor_sync(unsigned, T value, int mask, int width = EMULATED_WARP) {
  int from = emulation::lane() ^ mask;
  return emulation::exchange(value, [=] { return emulation::shown<T>(from); }, width);
}
// An fp32 number's bits; generated C takes the address of what it reinterprets, which a constant has not.
static inline unsigned tvm_gdn_bits(float number) {
  unsigned bits;
  memcpy(&bits, &number, 4);
  return bits;
}
#include "emulation_matrix.h"
static inline int __all_sync(unsigned, int predicate) {
  return emulation::exchange(predicate, [] {
    int result = 1;
    for (int n = 0; n < EMULATED_WARP; ++n) result &= !!emulation::shown<int>(n);
    return result;
  });
}
static inline int __any_sync(unsigned, int predicate) { return !__all_sync(0, !predicate); }
template <class T>
static inline T __ldg(const T* p) { return *p; }
template <class T>
static inline T atomicAdd(T* p, T value) {
  static std::mutex guard;
  std::lock_guard<std::mutex> held(guard);
  T old = *p;
  *p = old + value;
  return old;
}

// The driver's functions, as device_launcher.c calls them.
extern "C" {
int emuInit(unsigned) { return 0; }
int emuDeviceGet(int* device, int id) { return *device = id, 0; }
int emuDevicePrimaryCtxRetain(void** context, int) { return *context = (void*)1, 0; }
int emuCtxGetCurrent(void** context) { return *context = (void*)1, 0; }
int emuCtxPushCurrent(void*) { return 0; }
int emuCtxPopCurrent(void**) { return 0; }
int emuModuleLoadData(void** module, const void*) { return *module = (void*)1, 0; }
int emuModuleGetFunction(void** function, void*, const char* name) {
  auto& all = emulation::kernels();
  auto found = all.find(name);
  if (found == all.end()) return 500;
  *function = &found->second;
  return 0;
}
int emuLaunchKernel(void* function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz, unsigned shared,
                    void*, void** parameters, void**) {
  return emulation::launch(*(emulation::Body*)function, {gx, gy, gz}, {bx, by, bz}, shared, parameters);
}
int emuGetErrorName(int, const char** name) { return *name = "emulation", 0; }
}
