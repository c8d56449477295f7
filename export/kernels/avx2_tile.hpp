// AVX2 and AVX-VNNI: a product in tiles of some pixels × 16 channels, whose sums stay in registers.
#pragma once
#include "avx2_vectors.hpp"

namespace edgeqat {
namespace {

constexpr ptrdiff_t kStep = 4 * kLanes;  // bytes of a quad's weights

// Sums of the pixels of a tile and of 16 channels, whose weights and bias are given.
using Tile = void (*)(const Product&, const uint8_t* const* pixels, const int8_t* weights, const int32_t* bias,
                      int32_t* sums);

// tiles[n - 1] computes n pixels, up to `most`. All pixels meet the same 16 channels before the next, whose weights
// then stay near.
inline void in_tiles(const Tile* tiles, int most, const Product& p, const uint8_t* const* pixels, int count,
                     int32_t* sums) {
  const int8_t* w = p.weights;
  for (int u = 0; u < p.units; ++u, w += kStep * p.stretches.runs * p.stretches.quads)
    for (int m = 0; m < count; m += most) {
      const int some = count - m < most ? count - m : most;
      tiles[some - 1](p, pixels + m, w, p.bias + u * kLanes, sums + m * kBlock + u * kLanes);
    }
}

// Eight channels of a pixel: their sum, multiplied and with its bias.
inline __m256i finished(const Product& p, __m256i sum, const int32_t* bias) {
  if (p.weight_multiplier != 1) sum = _mm256_mullo_epi32(sum, _mm256_set1_epi32(p.weight_multiplier));
  return _mm256_add_epi32(sum, load(bias));
}

// Runs `step(x, at, w, sum)` over all quads, sums of 32 bits in registers.
template <int kPixels, typename Step>
void tile_in_32_bits(const Product& p, const uint8_t* const* pixels, const int8_t* w, const int32_t* bias, int32_t* to,
                     Step step) {
  __m256i sum[kPixels][2];
#pragma GCC unroll 8
  for (int m = 0; m < kPixels; ++m) sum[m][0] = sum[m][1] = _mm256_setzero_si256();
  for (int r = 0; r < p.stretches.runs; ++r) {
    const uint8_t* x[kPixels];
#pragma GCC unroll 8
    for (int m = 0; m < kPixels; ++m) x[m] = pixels[m] + p.stretches.offsets[r];
    for (ptrdiff_t q = 0; q < p.stretches.quads; ++q, w += kStep) step(x, 4 * q, w, sum);
  }
#pragma GCC unroll 8
  for (int m = 0; m < kPixels; ++m)
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) store(to + m * kBlock + 8 * half, finished(p, sum[m][half], bias + 8 * half));
}

}  // namespace
}  // namespace edgeqat
