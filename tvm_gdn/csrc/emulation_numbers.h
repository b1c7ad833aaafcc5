// Numbers and functions of CUDA C on them, for `device_emulation.h`: vectors, bf16 and fp16, which are stored in 16 bits.
#pragma once
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
