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
