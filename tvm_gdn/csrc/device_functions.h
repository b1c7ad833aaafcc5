// Functions that generated device code calls by name (`T.call_extern`); put in front of it when it is compiled.
#pragma once

// Whether a vector of `bytes` may be read or written at an address: a misaligned one would end the device's context.
static __device__ __forceinline__ bool tvm_gdn_aligned(const void* address, int bytes) {
  return ((unsigned long long)address & (unsigned long long)(bytes - 1)) == 0;
}

// Fragments of mma.m16n8k16: A is 16 x 16 (four registers of two bf16), B 16 x 8 (two), C and D 16 x 8 fp32 (four), each spread
// over a warp as the PTX manual says. `tile` points to the first element in shared memory, rows are `stride` elements apart.
// "turned": the operand lies the other way round in memory. Returns 0; generated code has no void calls.
#if defined(__CUDACC__) && !defined(TVM_GDN_NO_PTX)
#define TVM_GDN_SHARED(p) ((unsigned)__cvta_generic_to_shared(p))
static __device__ __forceinline__ int tvm_gdn_load_a(unsigned* a, const void* tile, int stride) {
  int lane = threadIdx.x & 31;
  unsigned address = TVM_GDN_SHARED(tile) + 2 * ((lane & 15) * stride + (lane >> 4) * 8);
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];" : "=r"(a[0]), "=r"(a[1]), "=r"(a[2]), "=r"(a[3]) : "r"(address) : "memory");
  return 0;
}
static __device__ __forceinline__ int tvm_gdn_load_a_turned(unsigned* a, const void* tile, int stride) {
  int lane = threadIdx.x & 31;
  unsigned address = TVM_GDN_SHARED(tile) + 2 * (((lane & 7) + (lane >> 4) * 8) * stride + (lane >> 3 & 1) * 8);
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];" : "=r"(a[0]), "=r"(a[1]), "=r"(a[2]), "=r"(a[3]) : "r"(address) : "memory");
  return 0;
}
static __device__ __forceinline__ int tvm_gdn_load_b(unsigned* b, const void* tile, int stride) {
  unsigned address = TVM_GDN_SHARED(tile) + 2 * ((threadIdx.x & 15) * stride);
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];" : "=r"(b[0]), "=r"(b[1]) : "r"(address) : "memory");
  return 0;
}
static __device__ __forceinline__ int tvm_gdn_load_b_turned(unsigned* b, const void* tile, int stride) {
  int lane = threadIdx.x & 31;
  unsigned address = TVM_GDN_SHARED(tile) + 2 * ((lane & 7) * stride + (lane >> 3 & 1) * 8);
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];" : "=r"(b[0]), "=r"(b[1]) : "r"(address) : "memory");
  return 0;
}
static __device__ __forceinline__ int tvm_gdn_mma(float* c, const unsigned* a, const unsigned* b) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  return 0;
}
#else
// The same in plain C++ and shuffles of width 32: for devices whose compilers take no PTX, and for the emulation.
static __device__ __forceinline__ unsigned tvm_gdn_pair(const void* tile, int first, int second) {
  const unsigned short* elements = (const unsigned short*)tile;
  return (unsigned)elements[first] | (unsigned)elements[second] << 16;
}
static __device__ __forceinline__ int tvm_gdn_load_a(unsigned* a, const void* tile, int stride) {
  int lane = threadIdx.x & 31, row = lane / 4, col = lane % 4 * 2;
  for (int n = 0; n < 4; ++n) {
    int at = (row + n % 2 * 8) * stride + col + n / 2 * 8;
    a[n] = tvm_gdn_pair(tile, at, at + 1);
  }
  return 0;
}
static __device__ __forceinline__ int tvm_gdn_load_a_turned(unsigned* a, const void* tile, int stride) {
  int lane = threadIdx.x & 31, row = lane / 4, col = lane % 4 * 2;
  for (int n = 0; n < 4; ++n) {
    int at = (col + n / 2 * 8) * stride + row + n % 2 * 8;
    a[n] = tvm_gdn_pair(tile, at, at + stride);
  }
  return 0;
}
static __device__ __forceinline__ int tvm_gdn_load_b(unsigned* b, const void* tile, int stride) {
  int lane = threadIdx.x & 31, row = lane % 4 * 2, col = lane / 4;
  for (int n = 0; n < 2; ++n) {
    int at = (row + n * 8) * stride + col;
    b[n] = tvm_gdn_pair(tile, at, at + stride);
  }
  return 0;
}
static __device__ __forceinline__ int tvm_gdn_load_b_turned(unsigned* b, const void* tile, int stride) {
  int lane = threadIdx.x & 31, row = lane % 4 * 2, col = lane / 4;
  for (int n = 0; n < 2; ++n) {
    int at = col * stride + row + n * 8;
    b[n] = tvm_gdn_pair(tile, at, at + 1);
  }
  return 0;
}
static __device__ __forceinline__ float tvm_gdn_half_of(unsigned pair, int which) {
  union {
    unsigned bits;
    float value;
  } both;
  both.bits = which ? pair & 0xffff0000u : pair << 16;
  return both.value;
}
static __device__ __forceinline__ int tvm_gdn_mma(float* c, const unsigned* a, const unsigned* b) {
  int lane = threadIdx.x & 31;
  for (int quad = 0; quad < 4; ++quad) {
    for (int n = 0; n < 2; ++n) {
      // Depth quad * 2 + n * 8 and the next: rows lane / 4 and + 8 of A, columns lane % 4 * 2 and + 1 of B.
      unsigned upper = __shfl_sync(0xffffffffu, a[n * 2], lane / 4 * 4 + quad, 32);
      unsigned below = __shfl_sync(0xffffffffu, a[n * 2 + 1], lane / 4 * 4 + quad, 32);
      unsigned first = __shfl_sync(0xffffffffu, b[n], lane % 4 * 2 * 4 + quad, 32);
      unsigned second = __shfl_sync(0xffffffffu, b[n], (lane % 4 * 2 + 1) * 4 + quad, 32);
      for (int k = 0; k < 2; ++k) {
        c[0] += tvm_gdn_half_of(upper, k) * tvm_gdn_half_of(first, k);
        c[1] += tvm_gdn_half_of(upper, k) * tvm_gdn_half_of(second, k);
        c[2] += tvm_gdn_half_of(below, k) * tvm_gdn_half_of(first, k);
        c[3] += tvm_gdn_half_of(below, k) * tvm_gdn_half_of(second, k);
      }
    }
  }
  return 0;
}
#endif
