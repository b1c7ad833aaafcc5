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
#include "device_ptx.h"
#else
#include "device_plain.h"
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
