// Functions that generated device code calls by name (`T.call_extern`); put in front of it when it is compiled.
#pragma once

// Whether a vector of `bytes` may be read or written at an address: a misaligned one would end the device's context.
static __device__ __forceinline__ bool tvm_gdn_aligned(const void* address, int bytes) {
  return ((unsigned long long)address & (unsigned long long)(bytes - 1)) == 0;
}

// What a warp's threads wrote to shared memory is there for the others of the warp.
template <class T = int>
static __device__ __forceinline__ T tvm_gdn_warp_sync() {
  __syncwarp();
  return 0;
}

// Bytes from an address to the next multiple of a power of two.
static __device__ __forceinline__ int tvm_gdn_to_multiple(const void* address, int bytes) {
  return (int)(-(long long)(unsigned long long)address & (bytes - 1));
}

// The number. All threads of a warp ask for their own; the compiler, which cannot know that, computes it once and keeps it.
static __device__ __forceinline__ int tvm_gdn_once(int number) {
#if defined(__CUDACC__) && !defined(TVM_GDN_NO_PTX)
  return __shfl_sync(0xffffffffu, number, threadIdx.x & 31);
#else
  return number;
#endif
}

// 16 aligned bytes from one place to another.
static __device__ __forceinline__ int tvm_gdn_move(void* to, const void* from) {
  *(uint4*)to = *(const uint4*)from;
  return 0;
}

// The same from registers to global memory; nvcc makes four stores of such a move where the registers hold 16-bit numbers.
static __device__ __forceinline__ int tvm_gdn_put(void* to, const void* from) {
  uint4 x = *(const uint4*)from;
#if defined(__CUDACC__) && !defined(TVM_GDN_NO_PTX)
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" : : "l"(__cvta_generic_to_global(to)), "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w) : "memory");
#else
  *(uint4*)to = x;
#endif
  return 0;
}

static __device__ __forceinline__ int tvm_gdn_put_8(void* to, const void* from) {
  uint2 x = *(const uint2*)from;
#if defined(__CUDACC__) && !defined(TVM_GDN_NO_PTX)
  asm volatile("st.global.v2.b32 [%0], {%1, %2};" : : "l"(__cvta_generic_to_global(to)), "r"(x.x), "r"(x.y) : "memory");
#else
  *(uint2*)to = x;
#endif
  return 0;
}

// 8 and 4 aligned bytes from one place to another.
static __device__ __forceinline__ int tvm_gdn_move_8(void* to, const void* from) {
  *(uint2*)to = *(const uint2*)from;
  return 0;
}
static __device__ __forceinline__ int tvm_gdn_move_4(void* to, const void* from) {
  *(unsigned*)to = *(const unsigned*)from;
  return 0;
}

// 1 / (1 + exp(-x)) with errors of some 1e-7 times |x|, for what is rounded to 16 bits: a full division and exponential cost more
// than the rest of such an element.
static __device__ __forceinline__ float tvm_gdn_sigmoid(float x) {
#if defined(__CUDACC__) && !defined(TVM_GDN_NO_PTX)
  float e, y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(e) : "f"(x * -1.4426950408889634f));
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(1 + e));
  return y;
#else
  return 1 / (1 + expf(-x));
#endif
}

// The same if a condition holds, else zeros, without a branch.
static __device__ __forceinline__ int tvm_gdn_move_if(void* to, const void* from, bool condition) {
  uint4 x = make_uint4(0, 0, 0, 0);
  if (condition) x = *(const uint4*)from;
  *(uint4*)to = x;
  return 0;
}
static __device__ __forceinline__ int tvm_gdn_move_8_if(void* to, const void* from, bool condition) {
  uint2 x = make_uint2(0, 0);
  if (condition) x = *(const uint2*)from;
  *(uint2*)to = x;
  return 0;
}
static __device__ __forceinline__ int tvm_gdn_move_4_if(void* to, const void* from, bool condition) {
  *(unsigned*)to = condition ? *(const unsigned*)from : 0u;
  return 0;
}

// All `threads` of a block, whose warps may come from different places in the code: that wants a barrier with a count of its own.
static __device__ __forceinline__ int tvm_gdn_block_sync(int threads) {
#if defined(__CUDACC__) && !defined(TVM_GDN_NO_PTX)
  asm volatile("bar.sync 1, %0;" : : "r"(threads) : "memory");
#else
  __syncthreads();
#endif
  return 0;
}

// The first 256 threads of a block: two groups of four warps.
#ifndef TVM_GDN_PAIR_SYNC
#define TVM_GDN_PAIR_SYNC() __syncthreads()
#endif
static __device__ __forceinline__ int tvm_gdn_pair_sync() {
#if defined(__CUDACC__) && !defined(TVM_GDN_NO_PTX)
  asm volatile("bar.sync 5, 256;" : : : "memory");
#else
  TVM_GDN_PAIR_SYNC();
#endif
  return 0;
}

// Four warps, the `number`-th of such groups.
#ifndef TVM_GDN_TEAM_SYNC
#define TVM_GDN_TEAM_SYNC() __syncthreads()
#endif
static __device__ __forceinline__ int tvm_gdn_team_sync(int number) {
#if defined(__CUDACC__) && !defined(TVM_GDN_NO_PTX)
  asm volatile("bar.sync %0, 128;" : : "r"(number + 2) : "memory");
#else
  TVM_GDN_TEAM_SYNC();
#endif
  return 0;
}

// What stands at an address, which becomes one more.
static __device__ __forceinline__ int tvm_gdn_next(int* number) { return atomicAdd(number, 1); }

// Fragments of mma.m16n8k16: A is 16 x 16 (four registers of two bf16), B 16 x 8 (two), C and D 16 x 8 fp32 (four), each spread
// over a warp as the PTX manual says. `tile` points to the first element in shared memory, rows are `stride` elements apart.
// "pair": two fragments of B, the second `apart` elements behind the first. "turned": the operand lies the other way round in memory. Returns 0; generated code has no void calls.
// Registers come as whole arrays with the place of the first element, so that the emulation can check that a fragment lies inside
// (TVM cuts arrays down to the elements that it sees being used, and compilers drop what is written behind their ends).
#ifndef TVM_GDN_INSIDE
#define TVM_GDN_INSIDE(size, at, count)
#endif
// Copies, and products of four warps, that nobody waits for, without PTX: at once. The emulation makes them when a thread waits, so
// that reading too soon, or writing over what is still read, shows.
#ifndef TVM_GDN_DEFER
#define TVM_GDN_DEFER(to, from, inside) (*(uint4*)(to) = (inside) ? *(const uint4*)(from) : make_uint4(0, 0, 0, 0), 0)
#define TVM_GDN_GROUP() 0
#define TVM_GDN_ARRIVE(left, all) 0
#define TVM_GDN_LATER(product) product()
#define TVM_GDN_FINISH(left) 0
// The same of the copy engine's: opening a barrier, reading to shared memory, an arrival without a copy, waiting, writing.
#define TVM_GDN_OPEN(barrier) 0
#define TVM_GDN_READ(to, from, bytes, barrier) (memcpy(to, from, bytes), 0)
#define TVM_GDN_SKIP(barrier) 0
#define TVM_GDN_WAIT(barrier) 0
#define TVM_GDN_WRITE(to, from, bytes) (memcpy(to, from, bytes), 0)
// Of a ring's stage: opening, arriving, arriving with what was copied, waiting.
#define TVM_GDN_RING_OPEN(barrier, count) 0
#define TVM_GDN_RING_ARRIVE(barrier) 0
#define TVM_GDN_RING_COPIED(barrier) 0
#define TVM_GDN_RING_WAIT(barrier, parity) 0
#endif
#if defined(__CUDACC__) && !defined(TVM_GDN_NO_PTX)
#define TVM_GDN_SHARED(p) ((unsigned)__cvta_generic_to_shared(p))
// 2^x for a factor, by the unit for powers of two: 2^-22 off, and zero below 2^-126.
template <class T = float>
static __device__ __forceinline__ T tvm_gdn_power(float x) {
  float power;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x));
  return power;
}
// Waits until what the kernels ahead of this one wrote is there, where blocks may begin before that; then the next kernel's may.
template <class T = int>
static __device__ __forceinline__ T tvm_gdn_follow() {
  asm volatile("griddepcontrol.wait;\ngriddepcontrol.launch_dependents;" : : : "memory");
  return 0;
}
template <int N>
static __device__ __forceinline__ int tvm_gdn_load_a(unsigned (&registers)[N], int at, const void* tile, int stride) {
  TVM_GDN_INSIDE(N, at, 4);
  unsigned* a = registers + at;
  int lane = threadIdx.x & 31;
  unsigned address = TVM_GDN_SHARED(tile) + 2 * ((lane & 15) * stride + (lane >> 4) * 8);
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];" : "=r"(a[0]), "=r"(a[1]), "=r"(a[2]), "=r"(a[3]) : "r"(address) : "memory");
  return 0;
}
template <int N>
static __device__ __forceinline__ int tvm_gdn_load_a_turned(unsigned (&registers)[N], int at, const void* tile, int stride) {
  TVM_GDN_INSIDE(N, at, 4);
  unsigned* a = registers + at;
  int lane = threadIdx.x & 31;
  unsigned address = TVM_GDN_SHARED(tile) + 2 * (((lane & 7) + (lane >> 4) * 8) * stride + (lane >> 3 & 1) * 8);
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];" : "=r"(a[0]), "=r"(a[1]), "=r"(a[2]), "=r"(a[3]) : "r"(address) : "memory");
  return 0;
}
template <int N>
static __device__ __forceinline__ int tvm_gdn_load_b(unsigned (&registers)[N], int at, const void* tile, int stride) {
  TVM_GDN_INSIDE(N, at, 2);
  unsigned* b = registers + at;
  unsigned address = TVM_GDN_SHARED(tile) + 2 * ((threadIdx.x & 15) * stride);
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];" : "=r"(b[0]), "=r"(b[1]) : "r"(address) : "memory");
  return 0;
}
template <int N>
static __device__ __forceinline__ int tvm_gdn_load_b_turned(unsigned (&registers)[N], int at, const void* tile, int stride) {
  TVM_GDN_INSIDE(N, at, 2);
  unsigned* b = registers + at;
  int lane = threadIdx.x & 31;
  unsigned address = TVM_GDN_SHARED(tile) + 2 * ((lane & 7) * stride + (lane >> 3 & 1) * 8);
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];" : "=r"(b[0]), "=r"(b[1]) : "r"(address) : "memory");
  return 0;
}
template <int N>
static __device__ __forceinline__ int tvm_gdn_load_b_pair(unsigned (&registers)[N], int at, const void* tile, int stride, int apart) {
  unsigned* b = registers + at;
  int lane = threadIdx.x & 31;
  unsigned address = TVM_GDN_SHARED(tile) + 2 * ((lane & 15) * stride + (lane >> 4) * apart);
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];" : "=r"(b[0]), "=r"(b[1]), "=r"(b[2]), "=r"(b[3]) : "r"(address) : "memory");
  return 0;
}
template <int N>
static __device__ __forceinline__ int tvm_gdn_load_b_pair_turned(unsigned (&registers)[N], int at, const void* tile, int stride, int apart) {
  unsigned* b = registers + at;
  int lane = threadIdx.x & 31;
  unsigned address = TVM_GDN_SHARED(tile) + 2 * ((lane & 7) * stride + (lane >> 3 & 1) * 8 + (lane >> 4) * apart);
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];" : "=r"(b[0]), "=r"(b[1]), "=r"(b[2]), "=r"(b[3]) : "r"(address) : "memory");
  return 0;
}
template <int NC, int NA, int NB>
static __device__ __forceinline__ int tvm_gdn_mma(float (&sums)[NC], int at_c, const unsigned (&left)[NA], int at_a, const unsigned (&right)[NB], int at_b) {
  TVM_GDN_INSIDE(NC, at_c, 4);
  TVM_GDN_INSIDE(NA, at_a, 4);
  TVM_GDN_INSIDE(NB, at_b, 2);
  float* c = sums + at_c;
  const unsigned *a = left + at_a, *b = right + at_b;
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  return 0;
}
// Copies 16 aligned bytes to shared memory, or zeros, without waiting; `tvm_gdn_copied` waits for all that this thread copies.
static __device__ __forceinline__ int tvm_gdn_copy(void* to, const void* from, int inside) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" : : "r"(TVM_GDN_SHARED(to)), "l"(from), "r"(inside ? 16 : 0) : "memory");
  return 0;
}
// The same; the L2 cache fetches the 256 bytes around them.
static __device__ __forceinline__ int tvm_gdn_copy_ahead(void* to, const void* from, int inside) {
  asm volatile("cp.async.cg.shared.global.L2::256B [%0], [%1], 16, %2;" : : "r"(TVM_GDN_SHARED(to)), "l"(from), "r"(inside ? 16 : 0) : "memory");
  return 0;
}
static __device__ __forceinline__ int tvm_gdn_copied() {
  asm volatile("cp.async.wait_all;" : : : "memory");
  return 0;
}
// The same on fp16.
template <int NC, int NA, int NB>
static __device__ __forceinline__ int tvm_gdn_mma_half(float (&sums)[NC], int at_c, const unsigned (&left)[NA], int at_a, const unsigned (&right)[NB], int at_b) {
  float* c = sums + at_c;
  const unsigned *a = left + at_a, *b = right + at_b;
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  return 0;
}
// m16n8k32 on bytes, signed times unsigned: four to a register.
template <int NC, int NA, int NB>
static __device__ __forceinline__ int tvm_gdn_mma_bytes(int (&sums)[NC], int at_c, const unsigned (&left)[NA], int at_a, const unsigned (&right)[NB], int at_b) {
  int* c = sums + at_c;
  const unsigned *a = left + at_a, *b = right + at_b;
  asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.u8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  return 0;
}
// Four warps multiply 64 rows of 64 16-bit numbers with as many rows as a thread has sums times two; both tiles lie in shared memory
// at multiples of 1024 bytes, in rows of 128 bytes whose 16-byte pieces change places by the row's number. `publish`: what this
// thread wrote is there for the matrix unit behind the next barrier. `arrived` waits for all products but the last `left`; until all
// are done the sums are not to be read.
#define TVM_GDN_R32 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define TVM_GDN_R64 TVM_GDN_R32 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define TVM_GDN_R128 TVM_GDN_R64 ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define TVM_GDN_S8(n) "+f"(c[n]), "+f"(c[n + 1]), "+f"(c[n + 2]), "+f"(c[n + 3]), "+f"(c[n + 4]), "+f"(c[n + 5]), "+f"(c[n + 6]), "+f"(c[n + 7])
#define TVM_GDN_S32(n) TVM_GDN_S8(n), TVM_GDN_S8(n + 8), TVM_GDN_S8(n + 16), TVM_GDN_S8(n + 24)
#define TVM_GDN_WGMMA(columns, kind, registers, left, right, ...)                                                             \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, 1, 0;\nwgmma.mma_async.sync.aligned.m64n" columns "k16.f32." kind "." kind  \
               " {" registers "}, " left ", " right ", p, 1, 1, 0, 0;\n}\n" : __VA_ARGS__ : "l"(a + 2 * k), "l"(b + 2 * k))
#define TVM_GDN_WGMMAS(name, kind)                                                                                            \
  template <int N>                                                                                                            \
  static __device__ __forceinline__ int name(float (&c)[N], const void* left, const void* right) {                           \
    static_assert(N == 32 || N == 64 || N == 128, "columns of a product");                                                    \
    const unsigned long long a = tvm_gdn_swizzled(left), b = tvm_gdn_swizzled(right);                                         \
    tvm_gdn_wgmma_hold(c);                                                                                                    \
    asm volatile("wgmma.fence.sync.aligned;" : : : "memory");                                                                 \
    _Pragma("unroll") for (int k = 0; k < 4; ++k) {                                                                           \
      if constexpr (N == 32) TVM_GDN_WGMMA("64", kind, TVM_GDN_R32, "%32", "%33", TVM_GDN_S32(0));                            \
      else if constexpr (N == 64) TVM_GDN_WGMMA("128", kind, TVM_GDN_R64, "%64", "%65", TVM_GDN_S32(0), TVM_GDN_S32(32));     \
      else TVM_GDN_WGMMA("256", kind, TVM_GDN_R128, "%128", "%129", TVM_GDN_S32(0), TVM_GDN_S32(32), TVM_GDN_S32(64), TVM_GDN_S32(96)); \
    }                                                                                                                         \
    asm volatile("wgmma.commit_group.sync.aligned;" : : : "memory");                                                          \
    tvm_gdn_wgmma_hold(c);                                                                                                    \
    return 0;                                                                                                                 \
  }
// A descriptor of the tile for the matrix unit: address, 1024 bytes from eight rows to the next eight, pieces that change places.
static __device__ __forceinline__ unsigned long long tvm_gdn_swizzled(const void* tile) {
  return (unsigned long long)(TVM_GDN_SHARED(tile) >> 4 & 0x3fffu) | 1ull << 16 | 64ull << 32 | 1ull << 62;
}
// The compiler moves nothing that has to do with these registers past this place.
template <int N>
static __device__ __forceinline__ void tvm_gdn_wgmma_hold(float (&c)[N]) {
#pragma unroll
  for (int n = 0; n < N; ++n) asm volatile("" : "+f"(c[n]) : : "memory");
}
TVM_GDN_WGMMAS(tvm_gdn_wgmma_bf16, "bf16")
TVM_GDN_WGMMAS(tvm_gdn_wgmma_f16, "f16")
static __device__ __forceinline__ int tvm_gdn_wgmma_publish() {
  asm volatile("fence.proxy.async.shared::cta;" : : : "memory");
  return 0;
}
// Four warps multiply 64 rows of `steps` times 16 numbers with a tile that has as many rows of 128 bytes: 32 numbers each, `one`, and
// behind them 32 others, `two`, whose products go into sums of their own. Of the left tile the first 64 numbers of every row lie
// `apart` bytes before the next 64; `turned`: its rows are the columns of a tile with `steps` times 16 rows. Nobody waits:
// `arrived` does, for all but the last `left` products. `fresh`: the sums begin at zero.
#define TVM_GDN_R16 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define TVM_GDN_S16(c)                                                                                                            \
  "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]), "+f"(c[4]), "+f"(c[5]), "+f"(c[6]), "+f"(c[7]), "+f"(c[8]), "+f"(c[9]), "+f"(c[10]), \
      "+f"(c[11]), "+f"(c[12]), "+f"(c[13]), "+f"(c[14]), "+f"(c[15])
#define TVM_GDN_WGMMA_ROWS(columns, sums, a, b, go_on, turned, ...)                                                                \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " go_on ", 0;\nwgmma.mma_async.sync.aligned.m64n" columns                         \
               "k16.f32.bf16.bf16 {" sums "}, " a ", " b ", p, 1, 1, " turned ", 1;\n}\n" : __VA_ARGS__ : "l"(x), "l"(y), "r"(more))
#define TVM_GDN_WGMMA_HELD(columns, sums, left, right, go_on, turned, ...)                                                          \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " go_on ", 0;\nwgmma.mma_async.sync.aligned.m64n" columns                         \
               "k16.f32.bf16.bf16 {" sums "}, {" left "}, " right ", p, 1, 1, " turned ";\n}\n"                                    \
               : __VA_ARGS__ : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(y), "r"(more))
template <int N>
static __device__ __forceinline__ int tvm_gdn_wgmma_one(float (&sums)[N], int at, const void* left, const void* right, int steps, int apart, int fresh) {
  const unsigned long long a = tvm_gdn_swizzled(left), b = tvm_gdn_swizzled(right);
  float* c = sums + at;
  asm volatile("wgmma.fence.sync.aligned;" : : : "memory");
#pragma unroll
  for (int k = 0; k < steps; ++k) {
    const unsigned long long x = a + 2 * (k % 4) + (apart >> 4) * (k / 4), y = b + 128 * k;
    const int more = !fresh || k > 0;
    TVM_GDN_WGMMA_ROWS("32", TVM_GDN_R16, "%16", "%17", "%18", "0", TVM_GDN_S16(c));
  }
  asm volatile("wgmma.commit_group.sync.aligned;" : : : "memory");
  return 0;
}
template <int N, int M>
static __device__ __forceinline__ int tvm_gdn_wgmma_two(float (&sums)[N], int at, float (&others)[M], int at_others, const void* left, const void* right, int steps, int apart, int turned, int fresh) {
  const unsigned long long a = tvm_gdn_swizzled(left), b = tvm_gdn_swizzled(right);
  float *c = sums + at, *d = others + at_others;
  asm volatile("wgmma.fence.sync.aligned;" : : : "memory");
#pragma unroll
  for (int k = 0; k < steps; ++k) {
    const unsigned long long x = a + (turned ? 128 * k : 2 * (k % 4) + (apart >> 4) * (k / 4)), y = b + 128 * k;
    const int more = !fresh || k > 0;
    if (turned) TVM_GDN_WGMMA_ROWS("64", TVM_GDN_R32, "%32", "%33", "%34", "1", TVM_GDN_S16(c), TVM_GDN_S16(d));
    else TVM_GDN_WGMMA_ROWS("64", TVM_GDN_R32, "%32", "%33", "%34", "0", TVM_GDN_S16(c), TVM_GDN_S16(d));
  }
  asm volatile("wgmma.commit_group.sync.aligned;" : : : "memory");
  return 0;
}
// Four warps multiply two tiles of 64 rows, `apart` bytes from each other, of 64 numbers with one of COLUMNS rows; all of them lie as above.
// The second tile's sums are the second half of a thread's. `fresh`: sums begin at zero.
#define TVM_GDN_R8 "%0, %1, %2, %3, %4, %5, %6, %7"
#define TVM_GDN_R24 TVM_GDN_R16 ", %16, %17, %18, %19, %20, %21, %22, %23"
#define TVM_GDN_R40 TVM_GDN_R32 ", %32, %33, %34, %35, %36, %37, %38, %39"
#define TVM_GDN_R48 TVM_GDN_R40 ", %40, %41, %42, %43, %44, %45, %46, %47"
#define TVM_GDN_R56 TVM_GDN_R48 ", %48, %49, %50, %51, %52, %53, %54, %55"
#define TVM_GDN_R72 TVM_GDN_R64 ", %64, %65, %66, %67, %68, %69, %70, %71"
#define TVM_GDN_R80 TVM_GDN_R72 ", %72, %73, %74, %75, %76, %77, %78, %79"
#define TVM_GDN_R88 TVM_GDN_R80 ", %80, %81, %82, %83, %84, %85, %86, %87"
#define TVM_GDN_R96 TVM_GDN_R88 ", %88, %89, %90, %91, %92, %93, %94, %95"
#define TVM_GDN_WGMMA_MORE(columns, kind, registers, left, right, go_on, ...)                                                      \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " go_on ", 0;\nwgmma.mma_async.sync.aligned.m64n" columns "k16.f32." kind "." kind \
               " {" registers "}, " left ", " right ", p, 1, 1, 0, 0;\n}\n" : __VA_ARGS__ : "l"(x), "l"(y), "r"(more))
#define TVM_GDN_WGMMA_PAIRS(name, kind) \
  template <int COLUMNS, int N> \
  static __device__ __forceinline__ int name(float (&sums)[N], const void* left, int apart, const void* right, int fresh) { \
    static_assert(COLUMNS <= N && COLUMNS % 16 == 0, "columns of a product"); \
    const unsigned long long a = tvm_gdn_swizzled(left), b = tvm_gdn_swizzled(right); \
    asm volatile("wgmma.fence.sync.aligned;" : : : "memory"); \
    _Pragma("unroll") for (int n = 0; n < 8; ++n) { \
      float* c = sums + n % 2 * (N / 2); \
      const unsigned long long x = a + n % 2 * (apart >> 4) + n / 2 * 2, y = b + n / 2 * 2; \
      const int more = !fresh || n > 1; \
      if constexpr (COLUMNS == 16) TVM_GDN_WGMMA_MORE("16", kind, TVM_GDN_R8, "%8", "%9", "%10", TVM_GDN_S8(0)); \
      else if constexpr (COLUMNS == 32) TVM_GDN_WGMMA_MORE("32", kind, TVM_GDN_R16, "%16", "%17", "%18", TVM_GDN_S8(0), TVM_GDN_S8(8)); \
      else if constexpr (COLUMNS == 48) TVM_GDN_WGMMA_MORE("48", kind, TVM_GDN_R24, "%24", "%25", "%26", TVM_GDN_S8(0), TVM_GDN_S8(8), TVM_GDN_S8(16)); \
      else if constexpr (COLUMNS == 64) TVM_GDN_WGMMA_MORE("64", kind, TVM_GDN_R32, "%32", "%33", "%34", TVM_GDN_S32(0)); \
      else if constexpr (COLUMNS == 80) TVM_GDN_WGMMA_MORE("80", kind, TVM_GDN_R40, "%40", "%41", "%42", TVM_GDN_S32(0), TVM_GDN_S8(32)); \
      else if constexpr (COLUMNS == 96) TVM_GDN_WGMMA_MORE("96", kind, TVM_GDN_R48, "%48", "%49", "%50", TVM_GDN_S32(0), TVM_GDN_S8(32), TVM_GDN_S8(40)); \
      else if constexpr (COLUMNS == 112) TVM_GDN_WGMMA_MORE("112", kind, TVM_GDN_R56, "%56", "%57", "%58", TVM_GDN_S32(0), TVM_GDN_S8(32), TVM_GDN_S8(40), TVM_GDN_S8(48)); \
      else if constexpr (COLUMNS == 128) TVM_GDN_WGMMA_MORE("128", kind, TVM_GDN_R64, "%64", "%65", "%66", TVM_GDN_S32(0), TVM_GDN_S32(32)); \
      else if constexpr (COLUMNS == 144) TVM_GDN_WGMMA_MORE("144", kind, TVM_GDN_R72, "%72", "%73", "%74", TVM_GDN_S32(0), TVM_GDN_S32(32), TVM_GDN_S8(64)); \
      else if constexpr (COLUMNS == 160) TVM_GDN_WGMMA_MORE("160", kind, TVM_GDN_R80, "%80", "%81", "%82", TVM_GDN_S32(0), TVM_GDN_S32(32), TVM_GDN_S8(64), TVM_GDN_S8(72)); \
      else if constexpr (COLUMNS == 176) TVM_GDN_WGMMA_MORE("176", kind, TVM_GDN_R88, "%88", "%89", "%90", TVM_GDN_S32(0), TVM_GDN_S32(32), TVM_GDN_S8(64), TVM_GDN_S8(72), TVM_GDN_S8(80)); \
      else if constexpr (COLUMNS == 192) TVM_GDN_WGMMA_MORE("192", kind, TVM_GDN_R96, "%96", "%97", "%98", TVM_GDN_S32(0), TVM_GDN_S32(32), TVM_GDN_S32(64)); \
    } \
    asm volatile("wgmma.commit_group.sync.aligned;" : : : "memory"); \
    return 0; \
  }
TVM_GDN_WGMMA_PAIRS(tvm_gdn_wgmma_pair_bf16, "bf16")
TVM_GDN_WGMMA_PAIRS(tvm_gdn_wgmma_pair_f16, "f16")
// Both tiles' rows are the depth's other way round: 64 rows of the left one times 32 of the right one, whose first 64 numbers of every
// row lie `apart_right` bytes before the next 64.
template <int N>
static __device__ __forceinline__ int tvm_gdn_wgmma_shown(float (&sums)[N], int at, const void* left, const void* right, int steps, int apart, int apart_right, int fresh) {
  const unsigned long long a = tvm_gdn_swizzled(left), b = tvm_gdn_swizzled(right);
  float* c = sums + at;
  asm volatile("wgmma.fence.sync.aligned;" : : : "memory");
#pragma unroll
  for (int k = 0; k < steps; ++k) {
    const unsigned long long x = a + 2 * (k % 4) + (apart >> 4) * (k / 4), y = b + 2 * (k % 4) + (apart_right >> 4) * (k / 4);
    const int more = !fresh || k > 0;
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %18, 0;\nwgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16 {" TVM_GDN_R16
                 "}, %16, %17, p, 1, 1, 0, 0;\n}\n" : TVM_GDN_S16(c) : "l"(x), "l"(y), "r"(more));
  }
  asm volatile("wgmma.commit_group.sync.aligned;" : : : "memory");
  return 0;
}
// The left operand in registers, four to a step of 16 numbers, as fragments of mma.m16n8k16 are: 64 rows of it times 64 of the right
// tile, as above. `kind` 1: times 64 columns of a tile with `steps` times 16 rows; 2: the right tile, 64 x 64, has zeros above the
// diagonal, and of its first 32 rows the first 32 numbers are read.
template <int N, int M>
static __device__ __forceinline__ int tvm_gdn_wgmma_held(float (&sums)[N], int at, const unsigned (&left)[M], const void* right, int steps, int apart, int kind, int fresh) {
  const unsigned long long b = tvm_gdn_swizzled(right);
  asm volatile("wgmma.fence.sync.aligned;" : : : "memory");
#pragma unroll
  for (int k = 0; k < steps; ++k) {
    const unsigned* a = left + 4 * k;
    unsigned long long y = b + (kind == 1 ? 128 * k : 2 * (k % 4) + (apart >> 4) * (k / 4));
    const int more = !fresh || k > 0;
    float *c = sums + at, *d = c + 16;
    if (kind == 1) TVM_GDN_WGMMA_HELD("64", TVM_GDN_R32, "%32, %33, %34, %35", "%36", "%37", "1", TVM_GDN_S16(c), TVM_GDN_S16(d));
    else if (kind == 0) TVM_GDN_WGMMA_HELD("64", TVM_GDN_R32, "%32, %33, %34, %35", "%36", "%37", "0", TVM_GDN_S16(c), TVM_GDN_S16(d));
    else {
      if (k < 2) TVM_GDN_WGMMA_HELD("32", TVM_GDN_R16, "%16, %17, %18, %19", "%20", "%21", "0", TVM_GDN_S16(c));
      y += 256;
      TVM_GDN_WGMMA_HELD("32", TVM_GDN_R16, "%16, %17, %18, %19", "%20", "%21", "0", TVM_GDN_S16(d));
    }
  }
  asm volatile("wgmma.commit_group.sync.aligned;" : : : "memory");
  return 0;
}
static __device__ __forceinline__ int tvm_gdn_wgmma_left(int left) {
  switch (left) {
    case 0: asm volatile("wgmma.wait_group.sync.aligned 0;" : : : "memory"); break;
    case 1: asm volatile("wgmma.wait_group.sync.aligned 1;" : : : "memory"); break;
    case 2: asm volatile("wgmma.wait_group.sync.aligned 2;" : : : "memory"); break;
    default: asm volatile("wgmma.wait_group.sync.aligned 3;" : : : "memory");
  }
  return 0;
}
template <int N>
static __device__ __forceinline__ int tvm_gdn_wgmma_arrived(float (&c)[N], int left) {
  tvm_gdn_wgmma_left(left);
  tvm_gdn_wgmma_hold(c);
  return 0;
}
// Copies in groups: `tvm_gdn_group` ends one, `tvm_gdn_arrived` waits for all but this thread's last `left`.
static __device__ __forceinline__ int tvm_gdn_group() {
  asm volatile("cp.async.commit_group;" : : : "memory");
  return 0;
}
static __device__ __forceinline__ int tvm_gdn_arrived(int left) {
  switch (left) {
    case 0: asm volatile("cp.async.wait_group 0;" : : : "memory"); break;
    case 1: asm volatile("cp.async.wait_group 1;" : : : "memory"); break;
    case 2: asm volatile("cp.async.wait_group 2;" : : : "memory"); break;
    case 3: asm volatile("cp.async.wait_group 3;" : : : "memory"); break;
    default: asm volatile("cp.async.wait_group 4;" : : : "memory");
  }
  return 0;
}
// The copy engine of sm_90 moves `bytes`, a multiple of 16, between aligned addresses. What one thread asks for is there when
// waiting for its barrier (8 bytes of shared memory, used once) returns; others wait for it only behind a barrier of theirs, after
// `open`. `skip`: nothing is copied for it. `publish`: what this thread wrote is there for the engine behind the next barrier.
// `write` returns when shared memory has been read.
static __device__ __forceinline__ int tvm_gdn_bulk_open(void* barrier) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;\nfence.proxy.async.shared::cta;" : : "r"(TVM_GDN_SHARED(barrier)) : "memory");
  return 0;
}
static __device__ __forceinline__ int tvm_gdn_bulk_read(void* to, const void* from, int bytes, void* barrier) {
  asm volatile(
      "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%3], %2;\n"
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
      : : "r"(TVM_GDN_SHARED(to)), "l"(from), "r"(bytes), "r"(TVM_GDN_SHARED(barrier)) : "memory");
  return 0;
}
static __device__ __forceinline__ int tvm_gdn_bulk_skip(void* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" : : "r"(TVM_GDN_SHARED(barrier)) : "memory");
  return 0;
}
static __device__ __forceinline__ int tvm_gdn_bulk_wait(void* barrier) {
  asm volatile(
      "{\n.reg .pred done;\nTRY:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], 0;\n@!done bra TRY;\n}"
      : : "r"(TVM_GDN_SHARED(barrier)) : "memory");
  return 0;
}
static __device__ __forceinline__ int tvm_gdn_bulk_publish() {
  return tvm_gdn_wgmma_publish();
}
static __device__ __forceinline__ int tvm_gdn_bulk_write(void* to, const void* from, int bytes) {
  asm volatile(
      "cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;\ncp.async.bulk.commit_group;\ncp.async.bulk.wait_group.read 0;"
      : : "l"(to), "r"(TVM_GDN_SHARED(from)), "r"(bytes) : "memory");
  return 0;
}
// A barrier (8 bytes of shared memory) of a ring's stage, used again and again: a phase is over after `count` arrivals, and `wait` returns
// when the phase of a parity is; of a new barrier the phase before the first one is over. `copied` arrives when all that this thread
// asked for is there.
static __device__ __forceinline__ int tvm_gdn_ring_open(void* barrier, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" : : "r"(TVM_GDN_SHARED(barrier)), "r"(count) : "memory");
  return 0;
}
static __device__ __forceinline__ int tvm_gdn_ring_arrive(void* barrier) { return tvm_gdn_bulk_skip(barrier); }
static __device__ __forceinline__ int tvm_gdn_ring_copied(void* barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" : : "r"(TVM_GDN_SHARED(barrier)) : "memory");
  return 0;
}
static __device__ __forceinline__ int tvm_gdn_ring_wait(void* barrier, int parity) {
  asm volatile(
      "{\n.reg .pred done;\nTRY:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n@!done bra TRY;\n}"
      : : "r"(TVM_GDN_SHARED(barrier)), "r"(parity) : "memory");
  return 0;
}
// Four warps take registers that others gave up.
template <int N>
static __device__ __forceinline__ int tvm_gdn_take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" : : "n"(N));
  return 0;
}
template <int N>
static __device__ __forceinline__ int tvm_gdn_leave_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" : : "n"(N));
  return 0;
}
// Two numbers as a pair of bf16 numbers; what these leave of them stays.
static __device__ __forceinline__ unsigned tvm_gdn_take(float& first, float& second) {
  unsigned pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
  first -= __uint_as_float(pair << 16);
  second -= __uint_as_float(pair & 0xffff0000u);
  return pair;
}
#else
// The same in plain C++ and shuffles of width 32: for devices whose compilers take no PTX, and for the emulation.
static __device__ __forceinline__ int tvm_gdn_follow() { return 0; }
static __device__ __forceinline__ unsigned tvm_gdn_pair(const void* tile, int first, int second) {
  const unsigned short* elements = (const unsigned short*)tile;
  return (unsigned)elements[first] | (unsigned)elements[second] << 16;
}
template <int N>
static __device__ __forceinline__ int tvm_gdn_load_a(unsigned (&registers)[N], int at, const void* tile, int stride) {
  TVM_GDN_INSIDE(N, at, 4);
  unsigned* a = registers + at;
  int lane = threadIdx.x & 31, row = lane / 4, col = lane % 4 * 2;
  for (int n = 0; n < 4; ++n) {
    int place = (row + n % 2 * 8) * stride + col + n / 2 * 8;
    a[n] = tvm_gdn_pair(tile, place, place + 1);
  }
  return 0;
}
template <int N>
static __device__ __forceinline__ int tvm_gdn_load_a_turned(unsigned (&registers)[N], int at, const void* tile, int stride) {
  TVM_GDN_INSIDE(N, at, 4);
  unsigned* a = registers + at;
  int lane = threadIdx.x & 31, row = lane / 4, col = lane % 4 * 2;
  for (int n = 0; n < 4; ++n) {
    int place = (col + n / 2 * 8) * stride + row + n % 2 * 8;
    a[n] = tvm_gdn_pair(tile, place, place + stride);
  }
  return 0;
}
template <int N>
static __device__ __forceinline__ int tvm_gdn_load_b(unsigned (&registers)[N], int at, const void* tile, int stride) {
  TVM_GDN_INSIDE(N, at, 2);
  unsigned* b = registers + at;
  int lane = threadIdx.x & 31, row = lane % 4 * 2, col = lane / 4;
  for (int n = 0; n < 2; ++n) {
    int place = (row + n * 8) * stride + col;
    b[n] = tvm_gdn_pair(tile, place, place + stride);
  }
  return 0;
}
template <int N>
static __device__ __forceinline__ int tvm_gdn_load_b_turned(unsigned (&registers)[N], int at, const void* tile, int stride) {
  TVM_GDN_INSIDE(N, at, 2);
  unsigned* b = registers + at;
  int lane = threadIdx.x & 31, row = lane % 4 * 2, col = lane / 4;
  for (int n = 0; n < 2; ++n) {
    int place = col * stride + row + n * 8;
    b[n] = tvm_gdn_pair(tile, place, place + 1);
  }
  return 0;
}
template <int N>
static __device__ __forceinline__ int tvm_gdn_load_b_pair(unsigned (&registers)[N], int at, const void* tile, int stride, int apart) {
  tvm_gdn_load_b(registers, at, tile, stride);
  return tvm_gdn_load_b(registers, at + 2, (const unsigned short*)tile + apart, stride);
}
template <int N>
static __device__ __forceinline__ int tvm_gdn_load_b_pair_turned(unsigned (&registers)[N], int at, const void* tile, int stride, int apart) {
  tvm_gdn_load_b_turned(registers, at, tile, stride);
  return tvm_gdn_load_b_turned(registers, at + 2, (const unsigned short*)tile + apart, stride);
}
static __device__ __forceinline__ float tvm_gdn_half_of(unsigned pair, int which) {
  union {
    unsigned bits;
    float value;
  } both;
  both.bits = which ? pair & 0xffff0000u : pair << 16;
  return both.value;
}
// Without the vendor's fp16 header, which kernels of other dtypes do not include.
static __device__ __forceinline__ float tvm_gdn_fp16_of(unsigned pair, int which) {
  const unsigned half = which ? pair >> 16 : pair & 0xffffu, exponent = half >> 10 & 31, digits = half & 0x3ff;
  union {
    unsigned bits;
    float value;
  } both;
  if (exponent) {
    both.bits = (exponent == 31 ? 255 : exponent + 112) << 23 | digits << 13;
  } else {
    both.value = digits * 5.9604644775390625e-8f;  // 2^-24
  }
  both.bits |= (half & 0x8000u) << 16;
  return both.value;
}
template <class T = float>
static __device__ __forceinline__ T tvm_gdn_power(float x) { return exp2f(x); }
template <float (*NUMBER)(unsigned, int), int NC, int NA, int NB>
static __device__ __forceinline__ int tvm_gdn_products(float (&sums)[NC], int at_c, const unsigned (&left)[NA], int at_a, const unsigned (&right)[NB], int at_b) {
  TVM_GDN_INSIDE(NC, at_c, 4);
  TVM_GDN_INSIDE(NA, at_a, 4);
  TVM_GDN_INSIDE(NB, at_b, 2);
  float* c = sums + at_c;
  const unsigned *a = left + at_a, *b = right + at_b;
  int lane = threadIdx.x & 31;
  for (int quad = 0; quad < 4; ++quad) {
    for (int n = 0; n < 2; ++n) {
      // Depth quad * 2 + n * 8 and the next: rows lane / 4 and + 8 of A, columns lane % 4 * 2 and + 1 of B.
      unsigned upper = __shfl_sync(0xffffffffu, a[n * 2], lane / 4 * 4 + quad, 32);
      unsigned below = __shfl_sync(0xffffffffu, a[n * 2 + 1], lane / 4 * 4 + quad, 32);
      unsigned first = __shfl_sync(0xffffffffu, b[n], lane % 4 * 2 * 4 + quad, 32);
      unsigned second = __shfl_sync(0xffffffffu, b[n], (lane % 4 * 2 + 1) * 4 + quad, 32);
      for (int k = 0; k < 2; ++k) {
        c[0] += NUMBER(upper, k) * NUMBER(first, k);
        c[1] += NUMBER(upper, k) * NUMBER(second, k);
        c[2] += NUMBER(below, k) * NUMBER(first, k);
        c[3] += NUMBER(below, k) * NUMBER(second, k);
      }
    }
  }
  return 0;
}
template <int NC, int NA, int NB>
static __device__ __forceinline__ int tvm_gdn_mma(float (&sums)[NC], int at_c, const unsigned (&left)[NA], int at_a, const unsigned (&right)[NB], int at_b) {
  return tvm_gdn_products<tvm_gdn_half_of>(sums, at_c, left, at_a, right, at_b);
}
template <int NC, int NA, int NB>
static __device__ __forceinline__ int tvm_gdn_mma_half(float (&sums)[NC], int at_c, const unsigned (&left)[NA], int at_a, const unsigned (&right)[NB], int at_b) {
  return tvm_gdn_products<tvm_gdn_fp16_of>(sums, at_c, left, at_a, right, at_b);
}
template <int NC, int NA, int NB>
static __device__ __forceinline__ int tvm_gdn_mma_bytes(int (&sums)[NC], int at_c, const unsigned (&left)[NA], int at_a, const unsigned (&right)[NB], int at_b) {
  TVM_GDN_INSIDE(NC, at_c, 4);
  TVM_GDN_INSIDE(NA, at_a, 4);
  TVM_GDN_INSIDE(NB, at_b, 2);
  int* c = sums + at_c;
  const unsigned *a = left + at_a, *b = right + at_b;
  int lane = threadIdx.x & 31;
  for (int quad = 0; quad < 4; ++quad) {
    for (int n = 0; n < 2; ++n) {
      unsigned upper = __shfl_sync(0xffffffffu, a[n * 2], lane / 4 * 4 + quad, 32);
      unsigned below = __shfl_sync(0xffffffffu, a[n * 2 + 1], lane / 4 * 4 + quad, 32);
      unsigned first = __shfl_sync(0xffffffffu, b[n], lane % 4 * 2 * 4 + quad, 32);
      unsigned second = __shfl_sync(0xffffffffu, b[n], (lane % 4 * 2 + 1) * 4 + quad, 32);
      for (int k = 0; k < 32; k += 8) {
        int x = (int)(upper << (24 - k)) >> 24, y = (int)(below << (24 - k)) >> 24;
        int u = (int)(first >> k & 255u), v = (int)(second >> k & 255u);
        c[0] += x * u;
        c[1] += x * v;
        c[2] += y * u;
        c[3] += y * v;
      }
    }
  }
  return 0;
}
template <float (*NUMBER)(unsigned, int), int N>
static __device__ __forceinline__ int tvm_gdn_wgmma_products(float (&sums)[N], const void* left, const void* right) {
  const unsigned short *a = (const unsigned short*)left, *b = (const unsigned short*)right;
  const int lane = threadIdx.x & 31, above = (int)(threadIdx.x >> 5 & 3) * 16 + lane / 4;
  if (((unsigned long long)left | (unsigned long long)right) & 1023) return sums[0] = sums[N - 1] / 0.f, 1;
  for (int n = 0; n < N; ++n) {
    const int row = above + n % 4 / 2 * 8, column = n / 4 * 8 + lane % 4 * 2 + n % 2;
    for (int k = 0; k < 64; ++k) {
      const int x = row * 64 + ((k / 8) ^ (row & 7)) * 8 + k % 8, y = column * 64 + ((k / 8) ^ (column & 7)) * 8 + k % 8;
      sums[n] += NUMBER(a[x], 0) * NUMBER(b[y], 0);
    }
  }
  return 0;
}
template <int N>
static __device__ __forceinline__ int tvm_gdn_wgmma_bf16(float (&sums)[N], const void* left, const void* right) {
  return TVM_GDN_LATER(([&sums, left, right] { return tvm_gdn_wgmma_products<tvm_gdn_half_of>(sums, left, right); }));
}
template <int N>
static __device__ __forceinline__ int tvm_gdn_wgmma_f16(float (&sums)[N], const void* left, const void* right) {
  return TVM_GDN_LATER(([&sums, left, right] { return tvm_gdn_wgmma_products<tvm_gdn_fp16_of>(sums, left, right); }));
}
static __device__ __forceinline__ float tvm_gdn_swizzled_number(const void* tile, int row, int column) {
  return tvm_gdn_half_of(((const unsigned short*)tile)[row * 64 + ((column / 8) ^ (row & 7)) * 8 + column % 8], 0);
}
// 32 columns, from `column` of the right tile on.
static __device__ __forceinline__ int tvm_gdn_wgmma_rows(float* c, const void* left, const void* right, int column, int steps, int apart, int turned, int fresh) {
  const int lane = threadIdx.x & 31, above = (int)(threadIdx.x >> 5 & 3) * 16 + lane / 4;
  for (int n = 0; n < 16; ++n) {
    const int row = above + n % 4 / 2 * 8;
    if (fresh) c[n] = 0;
    if (((unsigned long long)left | (unsigned long long)right) & 1023) c[n] /= 0.f;
    for (int k = 0; k < steps * 16; ++k) {
      const float x = turned ? tvm_gdn_swizzled_number(left, k, row) : tvm_gdn_swizzled_number((const char*)left + k / 64 * apart, row, k % 64);
      c[n] += x * tvm_gdn_swizzled_number(right, k, column + n / 4 * 8 + lane % 4 * 2 + n % 2);
    }
  }
  return 0;
}
template <int N>
static __device__ __forceinline__ int tvm_gdn_wgmma_one(float (&sums)[N], int at, const void* left, const void* right, int steps, int apart, int fresh) {
  TVM_GDN_INSIDE(N, at, 16);
  float* c = sums + at;
  return TVM_GDN_LATER(([=] { return tvm_gdn_wgmma_rows(c, left, right, 0, steps, apart, 0, fresh); }));
}
template <int N, int M>
static __device__ __forceinline__ int tvm_gdn_wgmma_two(float (&sums)[N], int at, float (&others)[M], int at_others, const void* left, const void* right, int steps, int apart, int turned, int fresh) {
  TVM_GDN_INSIDE(N, at, 16);
  TVM_GDN_INSIDE(M, at_others, 16);
  float *c = sums + at, *d = others + at_others;
  return TVM_GDN_LATER(([=] {
    tvm_gdn_wgmma_rows(c, left, right, 0, steps, apart, turned, fresh);
    return tvm_gdn_wgmma_rows(d, left, right, 32, steps, apart, turned, fresh);
  }));
}
template <float (*NUMBER)(unsigned, int), int COLUMNS, int N>
static __device__ __forceinline__ int tvm_gdn_wgmma_pair(float (&sums)[N], const void* left, int apart, const void* right, int fresh) {
  for (int half = 0; half < 2; ++half) {
    float own[COLUMNS / 2], *to = sums + half * (N / 2);
    for (int n = 0; n < COLUMNS / 2; ++n) own[n] = fresh ? 0 : to[n];
    tvm_gdn_wgmma_products<NUMBER>(own, (const char*)left + half * apart, right);
    for (int n = 0; n < COLUMNS / 2; ++n) to[n] = own[n];
  }
  return 0;
}
template <int COLUMNS, int N>
static __device__ __forceinline__ int tvm_gdn_wgmma_pair_bf16(float (&sums)[N], const void* left, int apart, const void* right, int fresh) {
  return TVM_GDN_LATER(([&sums, left, apart, right, fresh] { return tvm_gdn_wgmma_pair<tvm_gdn_half_of, COLUMNS>(sums, left, apart, right, fresh); }));
}
template <int COLUMNS, int N>
static __device__ __forceinline__ int tvm_gdn_wgmma_pair_f16(float (&sums)[N], const void* left, int apart, const void* right, int fresh) {
  return TVM_GDN_LATER(([&sums, left, apart, right, fresh] { return tvm_gdn_wgmma_pair<tvm_gdn_fp16_of, COLUMNS>(sums, left, apart, right, fresh); }));
}
static __device__ __forceinline__ int tvm_gdn_wgmma_left(int left) { return TVM_GDN_FINISH(left); }
template <int N>
static __device__ __forceinline__ int tvm_gdn_wgmma_shown(float (&sums)[N], int at, const void* left, const void* right, int steps, int apart, int apart_right, int fresh) {
  TVM_GDN_INSIDE(N, at, 16);
  float* c = sums + at;
  const int lane = threadIdx.x & 31, above = (int)(threadIdx.x >> 5 & 3) * 16 + lane / 4;
  return TVM_GDN_LATER(([=] {
    for (int n = 0; n < 16; ++n) {
      const int row = above + n % 4 / 2 * 8, column = n / 4 * 8 + lane % 4 * 2 + n % 2;
      if (fresh) c[n] = 0;
      if (((unsigned long long)left | (unsigned long long)right) & 1023) c[n] /= 0.f;
      for (int k = 0; k < steps * 16; ++k)
        c[n] += tvm_gdn_swizzled_number((const char*)left + k / 64 * apart, row, k % 64) * tvm_gdn_swizzled_number((const char*)right + k / 64 * apart_right, column, k % 64);
    }
    return 0;
  }));
}
template <int N, int M>
static __device__ __forceinline__ int tvm_gdn_wgmma_held(float (&sums)[N], int at, const unsigned (&left)[M], const void* right, int steps, int apart, int kind, int fresh) {
  TVM_GDN_INSIDE(N, at, 32);
  TVM_GDN_INSIDE(M, 0, 4 * steps);
  float* c = sums + at;
  const int lane = threadIdx.x & 31;
  // Four threads have the rows lane / 4 and lane / 4 + 8 of a warp's fragment.
  struct {
    unsigned words[M][4];
  } rows;
  for (int n = 0; n < M; ++n)
    for (int quad = 0; quad < 4; ++quad) rows.words[n][quad] = __shfl_sync(0xffffffffu, left[n], lane / 4 * 4 + quad, 32);
  return TVM_GDN_LATER(([=] {
    for (int n = 0; n < 32; ++n) {
      const int column = n / 4 * 8 + lane % 4 * 2 + n % 2;
      if (fresh) c[n] = 0;
      if ((unsigned long long)right & 1023) c[n] /= 0.f;
      for (int k = 0; k < (kind == 2 && column < 32 ? 32 : steps * 16); ++k) {
        const float x = tvm_gdn_half_of(rows.words[k / 16 * 4 + k % 16 / 8 * 2 + n % 4 / 2][k % 8 / 2], k % 2);
        c[n] += x * (kind == 1 ? tvm_gdn_swizzled_number(right, k, column) : tvm_gdn_swizzled_number((const char*)right + k / 64 * apart, column, k % 64));
      }
    }
    return 0;
  }));
}
template <int N>
static __device__ __forceinline__ int tvm_gdn_wgmma_arrived(float (&)[N], int left) {
  return TVM_GDN_FINISH(left);
}
static __device__ __forceinline__ int tvm_gdn_wgmma_publish() { return 0; }
static __device__ __forceinline__ int tvm_gdn_copy(void* to, const void* from, int inside) { return TVM_GDN_DEFER(to, from, inside); }
static __device__ __forceinline__ int tvm_gdn_copy_ahead(void* to, const void* from, int inside) { return TVM_GDN_DEFER(to, from, inside); }
static __device__ __forceinline__ int tvm_gdn_copied() { return TVM_GDN_ARRIVE(0, true); }
static __device__ __forceinline__ int tvm_gdn_group() { return TVM_GDN_GROUP(); }
static __device__ __forceinline__ int tvm_gdn_arrived(int left) { return TVM_GDN_ARRIVE(left, false); }
static __device__ __forceinline__ int tvm_gdn_bulk_open(void* barrier) { return TVM_GDN_OPEN(barrier); }
static __device__ __forceinline__ int tvm_gdn_bulk_read(void* to, const void* from, int bytes, void* barrier) { return TVM_GDN_READ(to, from, bytes, barrier); }
static __device__ __forceinline__ int tvm_gdn_bulk_skip(void* barrier) { return TVM_GDN_SKIP(barrier); }
static __device__ __forceinline__ int tvm_gdn_bulk_wait(void* barrier) { return TVM_GDN_WAIT(barrier); }
static __device__ __forceinline__ int tvm_gdn_ring_open(void* barrier, int count) { return TVM_GDN_RING_OPEN(barrier, count); }
static __device__ __forceinline__ int tvm_gdn_ring_arrive(void* barrier) { return TVM_GDN_RING_ARRIVE(barrier); }
static __device__ __forceinline__ int tvm_gdn_ring_copied(void* barrier) { return TVM_GDN_RING_COPIED(barrier); }
static __device__ __forceinline__ int tvm_gdn_ring_wait(void* barrier, int parity) { return TVM_GDN_RING_WAIT(barrier, parity); }
template <int N>
static __device__ __forceinline__ int tvm_gdn_take_registers() { return 0; }
template <int N>
static __device__ __forceinline__ int tvm_gdn_leave_registers() { return 0; }
static __device__ __forceinline__ int tvm_gdn_bulk_publish() { return 0; }
static __device__ __forceinline__ int tvm_gdn_bulk_write(void* to, const void* from, int bytes) { return TVM_GDN_WRITE(to, from, bytes); }
static __device__ __forceinline__ unsigned tvm_gdn_bfloat16(float x) {
  union {
    float value;
    unsigned bits;
  } both;
  both.value = x;
  if ((both.bits & 0x7fffffffu) > 0x7f800000u) return 0x7fff;
  return (both.bits + 0x7fff + (both.bits >> 16 & 1)) >> 16;
}
static __device__ __forceinline__ unsigned tvm_gdn_take(float& first, float& second) {
  const unsigned pair = tvm_gdn_bfloat16(first) | tvm_gdn_bfloat16(second) << 16;
  first -= tvm_gdn_half_of(pair, 0);
  second -= tvm_gdn_half_of(pair, 1);
  return pair;
}
#endif
// Two neighbouring numbers as `parts` pairs of bf16 numbers, each the rest that the ones before leave, `plane` elements apart.
static __device__ __forceinline__ int tvm_gdn_split(void* place, int plane, int parts, float first, float second) {
#pragma unroll
  for (int part = 0; part < parts; ++part) ((unsigned*)place)[part * plane / 2] = tvm_gdn_take(first, second);
  return 0;
}
// The same into registers, `apart` from one part to the next.
template <int N>
static __device__ __forceinline__ int tvm_gdn_split_pair(unsigned (&registers)[N], int at, int apart, int parts, float first, float second) {
  TVM_GDN_INSIDE(N, at, (parts - 1) * apart + 1);
#pragma unroll
  for (int part = 0; part < parts; ++part) registers[at + part * apart] = tvm_gdn_take(first, second);
  return 0;
}
// Fragments as such parts, one after the other: of A and of B from fp32 numbers in shared memory, and of A from the sums of two
// fragments from `from` on.
template <int N>
static __device__ __forceinline__ int tvm_gdn_split_a(unsigned (&registers)[N], int parts, const float* tile, int stride) {
  const int lane = threadIdx.x & 31, row = lane / 4, col = lane % 4 * 2;
  TVM_GDN_INSIDE(N, 0, 4 * parts);
#pragma unroll
  for (int n = 0; n < 4; ++n) {
    const float* at = tile + (row + n % 2 * 8) * stride + col + n / 2 * 8;
    float first = at[0], second = at[1];
#pragma unroll
    for (int part = 0; part < parts; ++part) registers[part * 4 + n] = tvm_gdn_take(first, second);
  }
  return 0;
}
template <int N>
static __device__ __forceinline__ int tvm_gdn_split_b(unsigned (&registers)[N], int parts, const float* tile, int stride) {
  const int lane = threadIdx.x & 31, row = lane % 4 * 2, col = lane / 4;
  TVM_GDN_INSIDE(N, 0, 2 * parts);
#pragma unroll
  for (int n = 0; n < 2; ++n) {
    const float* at = tile + (row + n * 8) * stride + col;
    float first = at[0], second = at[stride];
#pragma unroll
    for (int part = 0; part < parts; ++part) registers[part * 2 + n] = tvm_gdn_take(first, second);
  }
  return 0;
}
template <int N, int M>
static __device__ __forceinline__ int tvm_gdn_split_sums(unsigned (&registers)[N], int parts, const float (&sums)[M], int from) {
  TVM_GDN_INSIDE(N, 0, 4 * parts);
  TVM_GDN_INSIDE(M, from, 8);
#pragma unroll
  for (int n = 0; n < 4; ++n) {
    float first = sums[from + n / 2 * 4 + n % 2 * 2], second = sums[from + n / 2 * 4 + n % 2 * 2 + 1];
#pragma unroll
    for (int part = 0; part < parts; ++part) registers[part * 4 + n] = tvm_gdn_take(first, second);
  }
  return 0;
}
// Eight neighbouring numbers as the sum of two bf16 numbers each; all addresses are multiples of 16 bytes.
static __device__ __forceinline__ int tvm_gdn_sum_of(void* high, void* low, const float* from) {
  alignas(16) unsigned pairs[8];
#pragma unroll
  for (int n = 0; n < 4; ++n) {
    float first = from[2 * n], second = from[2 * n + 1];
    pairs[n] = tvm_gdn_take(first, second);
    pairs[4 + n] = tvm_gdn_take(first, second);
  }
  *(uint4*)high = *(const uint4*)pairs;
  *(uint4*)low = *(const uint4*)(pairs + 4);
  return 0;
}
// The same, rounded to one.
static __device__ __forceinline__ int tvm_gdn_rounded_eight(void* to, const float* from) {
  alignas(16) unsigned pairs[4];
#pragma unroll
  for (int n = 0; n < 4; ++n) {
    float first = from[2 * n], second = from[2 * n + 1];
    pairs[n] = tvm_gdn_take(first, second);
  }
  *(uint4*)to = *(const uint4*)pairs;
  return 0;
}
// `count` pieces of 16 bytes, each `stride` bytes behind the one before in memory, `apart` in shared memory and `rows` further down a
// tile: those from row `first` on and before row `end`, as counted from the first piece's; zeros for the others.
static __device__ __forceinline__ int tvm_gdn_copy_rows(void* to, const void* from, int apart, long long stride, int count, int rows, int first, int end) {
#pragma unroll
  for (int n = 0; n < count; ++n) tvm_gdn_copy((char*)to + n * apart, (const char*)from + n * stride, n * rows >= first && n * rows < end);
  return 0;
}
// The same, where what stands before the first row stays as it is: zeros cost more of shared memory's time than copies.
static __device__ __forceinline__ int tvm_gdn_copy_rows_below(void* to, const void* from, int apart, long long stride, int count, int rows, int first, int end) {
#pragma unroll
  for (int n = 0; n < count; ++n)
    if (n * rows >= first) tvm_gdn_copy((char*)to + n * apart, (const char*)from + n * stride, n * rows < end);
  return 0;
}
// The same where memory is not aligned: at once, element by element. A loop, so that the code that is not meant to run is short.
static __device__ __forceinline__ int tvm_gdn_copy_elements(void* to, const void* from, int apart, long long stride, int count, int rows, int first, int end) {
#pragma unroll 1
  for (int n = 0; n < 8 * count; ++n) {
    const int row = n / 8 * rows;
    const unsigned short* source = (const unsigned short*)((const char*)from + n / 8 * stride) + n % 8;
    ((unsigned short*)((char*)to + n / 8 * apart))[n % 8] = row >= first && row < end ? *source : 0;
  }
  return 0;
}
