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
