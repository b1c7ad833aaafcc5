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
#include "device_wgmma.h"
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
