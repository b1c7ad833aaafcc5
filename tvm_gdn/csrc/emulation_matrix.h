// Matrix units of AMD devices, and wmma, for `device_emulation.h`.
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

// wmma of warps of 32: 16 x 16 x 16, bf16 or fp16 with fp32 sums. Its fragments' layouts are nobody's business, so they are drawn:
// one per kind of fragment and seed. What is loaded has the addresses that CUDA's manual asks for, and all threads name the same: that
// is looked at in the next product and when the block ends, since to look at once would be a barrier, which loads and stores are not.
#if EMULATED_WARP == 32
namespace nvcuda {
namespace wmma {
struct matrix_a { enum { kind = 0 }; };
struct matrix_b { enum { kind = 1 }; };
struct accumulator { enum { kind = 2 }; };
struct row_major { enum { kind = 0 }; };
struct col_major { enum { kind = 1 }; };
enum layout_t { mem_row_major, mem_col_major };
enum { SIDE = 16, WARP = 32, SIZE = SIDE * SIDE, OWN = SIZE / WARP };
// Which element, row * 16 + column, a thread's numbers are: those of thread n from 8 n on.
struct Layout {
  int places[SIZE];
  explicit Layout(unsigned kind) {
    const char* text = getenv("TVM_GDN_EMULATION_SEED");
    std::mt19937 random(kind + 16 * (text ? (unsigned)atoi(text) : 1));
    for (int n = 0; n < SIZE; ++n) places[n] = n;
    std::shuffle(places, places + SIZE, random);
  }
};
template <class Use, int M, int N, int K, class T, class Order = accumulator>
struct fragment {
  static_assert(M == SIDE && N == SIDE && K == SIDE, "wmma of 16 x 16 x 16");
  enum { num_elements = OWN };
  T x[OWN];
  // What was neither filled nor loaded is no number.
  fragment() {
    for (T& number : x) number = __builtin_nanf("");
  }
  static const Layout& layout() {
    static const Layout drawn(Use::kind + 3 * Order::kind);
    return drawn;
  }
  static int place(int n) { return layout().places[emulation::lane() * OWN + n]; }
};
template <class T>
static inline void check_address(const T* memory, unsigned stride) {
  if ((uintptr_t)memory % 32 || stride * sizeof(T) % 16) emulation::fail("a fragment of wmma whose address or rows are not aligned");
  uint64_t& named = emulation::block->fibers[emulation::block->current].named;
  named = ((named ^ (uintptr_t)memory) * 0x9e3779b97f4a7c15 + stride) * 0x9e3779b97f4a7c15;
}
template <class F>
static inline void fill_fragment(F& to, float value) {
  for (auto& number : to.x) number = value;
}
template <class Use, class T, class Order>
static inline void load_matrix_sync(fragment<Use, 16, 16, 16, T, Order>& to, const T* from, unsigned stride) {
  check_address(from, stride);
  for (int n = 0; n < OWN; ++n) {
    const int i = to.place(n) / SIDE, j = to.place(n) % SIDE;
    to.x[n] = std::is_same<Order, row_major>::value ? from[i * stride + j] : from[j * stride + i];
  }
}
template <class T>
static inline void store_matrix_sync(T* to, const fragment<accumulator, 16, 16, 16, T>& from, unsigned stride, layout_t order) {
  check_address(to, stride);
  for (int n = 0; n < OWN; ++n) {
    const int i = from.place(n) / SIDE, j = from.place(n) % SIDE;
    to[order == mem_row_major ? i * stride + j : j * stride + i] = from.x[n];
  }
}
// The first thread that looks multiplies for its warp.
template <class T, class A, class B>
static inline void mma_sync(fragment<accumulator, 16, 16, 16, float>& to, const fragment<matrix_a, 16, 16, 16, T, A>& left,
                            const fragment<matrix_b, 16, 16, 16, T, B>& right, const fragment<accumulator, 16, 16, 16, float>& from) {
  struct Operands {
    T a[OWN], b[OWN];
    uint64_t named;
  } own;
  own.named = emulation::block->fibers[emulation::block->current].named;
  memcpy(own.a, left.x, sizeof own.a);
  memcpy(own.b, right.x, sizeof own.b);
  static thread_local std::map<int, std::pair<int, std::vector<float>>> made;
  auto& product = made[emulation::block->current / WARP];
  emulation::exchange(own, [&] {
    emulation::agree(own.named, emulation::shown<Operands>(0).named);
    if (!product.first) {
      product = {WARP, std::vector<float>(SIZE)};
      float a[SIZE], b[SIZE];
      for (int thread = 0; thread < WARP; ++thread) {
        const Operands theirs = emulation::shown<Operands>(thread);
        for (int n = 0; n < OWN; ++n) {
          a[left.layout().places[thread * OWN + n]] = theirs.a[n];
          b[right.layout().places[thread * OWN + n]] = theirs.b[n];
        }
      }
      for (int i = 0; i < SIDE; ++i)
        for (int k = 0; k < SIDE; ++k)
          for (int j = 0; j < SIDE; ++j) product.second[i * SIDE + j] += a[i * SIDE + k] * b[k * SIDE + j];
    }
    --product.first;
    return 0;
  });
  for (int n = 0; n < OWN; ++n) to.x[n] = from.x[n] + product.second[to.place(n)];
}
}  // namespace wmma
}  // namespace nvcuda
#endif
