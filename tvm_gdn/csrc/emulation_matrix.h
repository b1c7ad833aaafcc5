// Matrix units of AMD devices, for `device_emulation.h`.
#pragma once
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
