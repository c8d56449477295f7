// AVX2 and AVX-VNNI: a product in tiles of some pixels × 16 channels, whose sums stay in registers.
#pragma once
#include "avx2_vectors.hpp"

namespace edgeqat {
namespace {

constexpr ptrdiff_t kStep = 4 * kLanes;  // bytes of a quad's weights

// Sums of the pixels of a tile and of 16 channels, whose weights and bias are given.
using Tile = void (*)(const Product&, const uint8_t* const* pixels, const int8_t* weights, const int32_t* bias,
                      int32_t* sums);

// Weights of 16 channels.
inline ptrdiff_t bytes_of_tile(const Product& p) { return kStep * p.stretches.runs * p.stretches.quads; }

// tiles[n - 1] computes n pixels, up to `most`. All pixels meet the same 16 channels before the next, whose weights
// then stay near. `second`, if any, computes the second `most` pixels.
inline void in_tiles(const Tile* tiles, int most, const Product& p, const uint8_t* const* pixels, int count,
                     int32_t* sums, Tile second = nullptr) {
  const int8_t* w = p.weights;
  for (int u = 0; u < p.units; ++u, w += bytes_of_tile(p))
    for (int m = 0; m < count; m += most) {
      const int some = count - m < most ? count - m : most;
      const Tile tile = second && m == most && some == most ? second : tiles[some - 1];
      tile(p, pixels + m, w, p.bias + u * kLanes, sums + m * kBlock + u * kLanes);
    }
}

// Runs `step(x, at, w, sum)` over all quads, sums of 32 bits in registers.
template <int kPixels, typename Step>
void tile_in_32_bits(const Product& p, const uint8_t* const* pixels, const int8_t* w, const int32_t* bias, int32_t* to,
                     Step step) {
  const ptrdiff_t *offset = p.stretches.offsets, *const end = offset + p.stretches.runs;
  const ptrdiff_t bytes = 4 * ptrdiff_t(p.stretches.quads);
  __m256i sum[kPixels][2];
#pragma GCC unroll 8
  for (int m = 0; m < kPixels; ++m) sum[m][0] = sum[m][1] = _mm256_setzero_si256();
  for (; offset < end; ++offset) {
    const uint8_t* x[kPixels];
#pragma GCC unroll 8
    for (int m = 0; m < kPixels; ++m) x[m] = pixels[m] + *offset;
    for (ptrdiff_t at = 0; at < bytes; at += 4, w += kStep) step(x, at, w, sum);
  }
  const __m256i factor = _mm256_set1_epi32(p.weight_multiplier);
#pragma GCC unroll 2
  for (int half = 0; half < 2; ++half) {
    const __m256i start = load(bias + 8 * half);
#pragma GCC unroll 8
    for (int m = 0; m < kPixels; ++m)
      store(to + m * kBlock + 8 * half, _mm256_add_epi32(_mm256_mullo_epi32(sum[m][half], factor), start));
  }
}

}  // namespace
}  // namespace edgeqat
