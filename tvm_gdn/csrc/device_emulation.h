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

struct dim3_ {
  unsigned x, y, z;
};
static thread_local dim3_ threadIdx, blockIdx, blockDim, gridDim;

#define EMULATED_VECTORS(T, N)                                                                                         \
  struct alignas(2 * sizeof(T)) N##2 { T x, y; };                                                                      \
  struct N##3 { T x, y, z; };                                                                                          \
  struct alignas(4 * sizeof(T) > 16 ? 16 : 4 * sizeof(T)) N##4 { T x, y, z, w; };                                      \
  static inline N##2 make_##N##2(T a, T b) { return {a, b}; }                                                          \
  static inline N##3 make_##N##3(T a, T b, T c) { return {a, b, c}; }                                                  \
  static inline N##4 make_##N##4(T a, T b, T c, T d) { return {a, b, c, d}; }
typedef unsigned uint;
EMULATED_VECTORS(float, float)
EMULATED_VECTORS(int, int)
EMULATED_VECTORS(unsigned, uint)
EMULATED_VECTORS(short, short)
EMULATED_VECTORS(unsigned short, ushort)
EMULATED_VECTORS(signed char, char)
EMULATED_VECTORS(unsigned char, uchar)
EMULATED_VECTORS(double, double)
EMULATED_VECTORS(long long, longlong)
#undef EMULATED_VECTORS

// bf16 and fp16: stored in 16 bits, rounded to nearest even, computed in fp32.
struct nv_bfloat16 {
  uint16_t v;
  nv_bfloat16() = default;
  nv_bfloat16(float f) {
    uint32_t u;
    memcpy(&u, &f, 4);
    if ((u & 0x7fffffffu) > 0x7f800000u) v = 0x7fff;
    else v = (uint16_t)((u + 0x7fff + ((u >> 16) & 1)) >> 16);
  }
  nv_bfloat16(double f) : nv_bfloat16((float)f) {}
  nv_bfloat16(int f) : nv_bfloat16((float)f) {}
  operator float() const {
    uint32_t u = (uint32_t)v << 16;
    float f;
    memcpy(&f, &u, 4);
    return f;
  }
};
struct half {
  _Float16 v;
  half() = default;
  half(float f) : v((_Float16)f) {}
  half(double f) : v((_Float16)f) {}
  half(int f) : v((_Float16)f) {}
  operator float() const { return (float)v; }
};
template <class T>
struct alignas(4) EmulatedPair {
  T x, y;
  EmulatedPair() = default;
  EmulatedPair(T a, T b) : x(a), y(b) {}
};
typedef nv_bfloat16 __nv_bfloat16, __mt_bfloat16;
typedef EmulatedPair<nv_bfloat16> nv_bfloat162, __nv_bfloat162, __mt_bfloat162;
typedef half __half;
typedef EmulatedPair<half> half2, __half2;
static inline float __bfloat162float(nv_bfloat16 x) { return x; }
static inline nv_bfloat16 __float2bfloat16(float x) { return x; }
static inline nv_bfloat16 __float2bfloat16_rn(float x) { return x; }
static inline float __half2float(half x) { return x; }
static inline half __float2half(float x) { return half(x); }
static inline half __float2half_rn(float x) { return half(x); }
static inline nv_bfloat16 __ushort_as_bfloat16(unsigned short s) { nv_bfloat16 r; r.v = s; return r; }
static inline unsigned short __bfloat16_as_ushort(nv_bfloat16 b) { return b.v; }
static inline half __ushort_as_half(unsigned short s) { half r; memcpy(&r, &s, 2); return r; }
static inline unsigned short __half_as_ushort(half h) { unsigned short s; memcpy(&s, &h, 2); return s; }
static inline bool __hgt(nv_bfloat16 a, nv_bfloat16 b) { return (float)a > (float)b; }
static inline bool __hlt(nv_bfloat16 a, nv_bfloat16 b) { return (float)a < (float)b; }
static inline bool __hgt(half a, half b) { return (float)a > (float)b; }
static inline bool __hlt(half a, half b) { return (float)a < (float)b; }
#define EMULATED_HALF(name, f)                                          \
  static inline half name(half x) { return half((float)f((float)x)); } \
  static inline nv_bfloat16 name(nv_bfloat16 x) { return nv_bfloat16((float)f((float)x)); }
EMULATED_HALF(hexp, expf) EMULATED_HALF(hexp2, exp2f) EMULATED_HALF(hexp10, exp10f) EMULATED_HALF(hlog, logf)
EMULATED_HALF(hlog2, log2f) EMULATED_HALF(hlog10, log10f) EMULATED_HALF(hsqrt, sqrtf) EMULATED_HALF(hrsqrt, 1.f / sqrtf)
EMULATED_HALF(hceil, ceilf) EMULATED_HALF(hfloor, floorf) EMULATED_HALF(htrunc, truncf) EMULATED_HALF(hrint, rintf)
EMULATED_HALF(hcos, cosf) EMULATED_HALF(hsin, sinf) EMULATED_HALF(__habs, fabsf)
#undef EMULATED_HALF
static inline float rsqrtf(float x) { return 1.f / sqrtf(x); }
static inline float __fdividef(float a, float b) { return a / b; }
static inline float __int_as_float(int x) { float f; memcpy(&f, &x, 4); return f; }
static inline int __float_as_int(float x) { int f; memcpy(&f, &x, 4); return f; }
#define CUDART_INF_F __builtin_inff()
#define CUDART_NAN_F __builtin_nanf("")
#define __expf expf
#define __logf logf
#define __powf powf
#define __sinf sinf
#define __cosf cosf
#define __tanf tanf

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
static inline void* dynamic_shared() { return block->shared.data(); }

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
    own.shared.resize(shared + 64);
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
// AMD's matrix units: D = A B + C, 16 x 16 x 16, of bytes x 32. A row of A has eight words, and so has one of B's transpose; a thread has
// W of them, of row lane % 16, and of C and D S numbers of column lane % 16. With S = 4 these are rows lane / 16 * 4 + 0..3, with S = 8
// rows lane / 16 + 0, 2..14. The numbers of a call are those words, C, and e: the result is element e of D.
namespace emulation {
template <class Sum, int W, int S>
struct Product {
  unsigned a[W], b[W];
  Sum c[S];
  int e;
};
template <class Sum, int W, int S, int PER, class F, class... Numbers>
static inline Sum matrix_product(F element, Numbers... numbers) {
  static_assert(sizeof...(Numbers) == 2 * W + S + 1, "numbers of a matrix product");
  Product<Sum, W, S> mine;
  char* to = (char*)&mine;
  ((memcpy(to, &numbers, 4), to += 4), ...);
  return exchange(mine, [=] {
    Sum sum = mine.c[mine.e];
    const int column = lane() % 16, row = S == 4 ? lane() / 16 * 4 + mine.e : lane() / 16 + 2 * mine.e;
    for (int part = 0; part < 8 / W; ++part) {
      const auto right = shown<Product<Sum, W, S>>(part * 16 + column), left = shown<Product<Sum, W, S>>(part * 16 + row);
      if (W == 8 && (memcmp(left.a, shown<Product<Sum, W, S>>(16 + row).a, 32) || memcmp(right.b, shown<Product<Sum, W, S>>(16 + column).b, 32)))
        fail("a row of an operand that its two threads do not agree on");
      for (int w = 0; w < W; ++w)
        for (int n = 0; n < PER; ++n) sum += element(left.a[w], n) * element(right.b[w], n);
    }
    return sum;
  });
}
static inline float bfloat_of(unsigned word, int n) {
  const unsigned bits = n ? word & 0xffff0000u : word << 16;
  float value;
  memcpy(&value, &bits, 4);
  return value;
}
static inline float half_of(unsigned word, int n) {
  const unsigned short bits = (unsigned short)(word >> 16 * n);
  _Float16 value;
  memcpy(&value, &bits, 2);
  return value;
}
static inline int byte_of(unsigned word, int n) { return (signed char)(word >> 8 * n); }
}  // namespace emulation
#define EMULATED_PRODUCT(name, Sum, W, S, PER, element)                                                       \
  template <class... Numbers>                                                                                 \
  static inline Sum name(Numbers... numbers) {                                                                \
    return emulation::matrix_product<Sum, W, S, PER>(emulation::element, numbers...);                         \
  }
#if EMULATED_WARP == 64
EMULATED_PRODUCT(tvm_gdn_mfma, float, 2, 4, 2, bfloat_of)
EMULATED_PRODUCT(tvm_gdn_mfma_half, float, 2, 4, 2, half_of)
EMULATED_PRODUCT(tvm_gdn_mfma_bytes, int, 2, 4, 4, byte_of)
EMULATED_PRODUCT(tvm_gdn_mfma_bytes_short, int, 2, 4, 4, byte_of)
#else
EMULATED_PRODUCT(tvm_gdn_wmma, float, 8, 8, 2, bfloat_of)
EMULATED_PRODUCT(tvm_gdn_wmma_half, float, 8, 8, 2, half_of)
EMULATED_PRODUCT(tvm_gdn_wmma_bytes, int, 8, 8, 4, byte_of)
#endif
#undef EMULATED_PRODUCT
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
