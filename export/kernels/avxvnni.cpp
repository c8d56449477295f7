// AVX-VNNI: products of any width on vpdpbusd at 256 bits (exact: it widens before it adds); all else as on AVX2.
// For client processors since 2021, which have no AVX-512.
#include "isa.hpp"
#if defined(__x86_64__) && defined(__AVXVNNI__)
#include <cpuid.h>

#include "avx2_table.hpp"

namespace edgeqat {
namespace {

constexpr int kPixelsOfTile = 6;             // × 16 channels: 12 registers
constexpr unsigned kLeaf = 7, kSubleaf = 1;  // of CPUID, register EAX
constexpr unsigned kHasAvxVnni = 1u << 4;

// 32-bit lanes: layer_pack.cpp has shown that bias + Σ |w·x| stays below 2^31 for the layer's own weights.
template <int kPixels>
void product_tile(const Product& p, const uint8_t* const* pixels, const int8_t* w, const int32_t* bias, int32_t* to) {
  tile_in_32_bits<kPixels>(p, pixels, w, bias, to,
                           [](const uint8_t* const* x, ptrdiff_t at, const int8_t* w, __m256i(*sum)[2]) {
                             const __m256i w0 = load(w), w1 = load(w + 32);
#pragma GCC unroll 8
                             for (int m = 0; m < kPixels; ++m) {
                               const __m256i codes = quad(x[m] + at);
                               sum[m][0] = _mm256_dpbusd_avx_epi32(sum[m][0], codes, w0);
                               sum[m][1] = _mm256_dpbusd_avx_epi32(sum[m][1], codes, w1);
                             }
                           });
}

void product(const Product& p, const uint8_t* const* pixels, int count, int32_t* sums) {
  constexpr Tile kTiles[kPixelsOfTile] = {product_tile<1>, product_tile<2>, product_tile<3>,
                                          product_tile<4>, product_tile<5>, product_tile<6>};
  in_tiles(kTiles, kPixelsOfTile, p, pixels, count, sums);
}

bool has_avxvnni() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  return has_avx2() && __get_cpuid_count(kLeaf, kSubleaf, &a, &b, &c, &d) && (a & kHasAvxVnni);
}

}  // namespace

const Isa* avxvnni_isa() {
  if (!has_avxvnni()) return nullptr;
  static const Isa isa = avx2_table("avxvnni", product);
  return &isa;
}

}  // namespace edgeqat
#else
namespace edgeqat {
const Isa* avxvnni_isa() { return nullptr; }
}  // namespace edgeqat
#endif
