// AVX2: one-bit products. A lane of 32 bits holds 32 codes or weights of a channel; vpshufb counts the bits in which
// they differ, four at a time.
#pragma once
#include "avx2_tile.hpp"
#include "avx2_vectors.hpp"

namespace edgeqat {
namespace {

constexpr int kBinaryTile = 4;     // pixels × 16 channels of counts: 8 registers
constexpr int kCountedSteps = 31;  // a step adds at most 8 to a byte

// Bits of every byte.
inline __m256i bits_in(__m256i v) {
  const __m256i counts = _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4));
  const __m256i low_bits = _mm256_set1_epi8(15);
  const __m256i low = _mm256_and_si256(v, low_bits), high = _mm256_and_si256(_mm256_srli_epi16(v, 4), low_bits);
  return _mm256_add_epi8(_mm256_shuffle_epi8(counts, low), _mm256_shuffle_epi8(counts, high));
}

// Sums of the four bytes of every lane.
inline __m256i in_lanes(__m256i bytes) {
  return _mm256_madd_epi16(_mm256_maddubs_epi16(bytes, _mm256_set1_epi8(1)), _mm256_set1_epi16(1));
}

// Counts differing bits in bytes, and adds them up in `to` before a byte is full; layer_pack.cpp bounds gain · K.
template <int kPixels>
void binary_tile(const Product& p, const uint8_t* const* pixels, const int8_t* w, const int32_t* bias, int32_t* to) {
  __m256i count[kPixels][2];
#pragma GCC unroll 4
  for (int m = 0; m < kPixels; ++m)
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      count[m][half] = _mm256_setzero_si256();
      store(to + m * kBlock + 8 * half, count[m][half]);
    }
  int room = kCountedSteps;
  for (int r = 0; r < p.stretches.runs; ++r) {
    const uint8_t* x[kPixels];
#pragma GCC unroll 4
    for (int m = 0; m < kPixels; ++m) x[m] = pixels[m] + p.stretches.offsets[r];
    for (int q = 0; q < p.stretches.quads; ++q, w += kStep) {
      const __m256i w0 = load(w), w1 = load(w + 32);
#pragma GCC unroll 4
      for (int m = 0; m < kPixels; ++m) {
        const __m256i codes = quad(x[m] + 4 * ptrdiff_t(q));
        count[m][0] = _mm256_add_epi8(count[m][0], bits_in(_mm256_xor_si256(codes, w0)));
        count[m][1] = _mm256_add_epi8(count[m][1], bits_in(_mm256_xor_si256(codes, w1)));
      }
      if (--room > 0) continue;
      room = kCountedSteps;
#pragma GCC unroll 4
      for (int m = 0; m < kPixels; ++m)
#pragma GCC unroll 2
        for (int half = 0; half < 2; ++half) {
          int32_t* at = to + m * kBlock + 8 * half;
          store(at, _mm256_add_epi32(load(at), in_lanes(count[m][half])));
          count[m][half] = _mm256_setzero_si256();
        }
    }
  }
  const __m256i gain = _mm256_set1_epi32(2 * p.binary_gain);
#pragma GCC unroll 4
  for (int m = 0; m < kPixels; ++m)
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      int32_t* at = to + m * kBlock + 8 * half;
      const __m256i differing = _mm256_add_epi32(load(at), in_lanes(count[m][half]));
      store(at, _mm256_sub_epi32(load(bias + 8 * half), _mm256_mullo_epi32(differing, gain)));
    }
}

inline void binary(const Product& p, const uint8_t* const* pixels, int count, int32_t* sums) {
  constexpr Tile kTiles[kBinaryTile] = {binary_tile<1>, binary_tile<2>, binary_tile<3>, binary_tile<4>};
  in_tiles(kTiles, kBinaryTile, p, pixels, count, sums);
}

}  // namespace
}  // namespace edgeqat
