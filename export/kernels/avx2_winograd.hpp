// AVX2: Winograd's transforms (winograd.cpp has the equations).
#pragma once
#include "avx2_vectors.hpp"

namespace edgeqat {
namespace {

constexpr int kMiddle = 5;  // position (1,1), whose transform is never negative

struct Four {
  __m256i v[4];
};

// Rows of Bᵀ, in bytes modulo 256: the results are known to lie within 0 to 255 once the offset is added.
inline Four transform(__m256i d0, __m256i d1, __m256i d2, __m256i d3) {
  return {{_mm256_sub_epi8(d0, d2), _mm256_add_epi8(d1, d2), _mm256_sub_epi8(d2, d1), _mm256_sub_epi8(d1, d3)}};
}

inline void winograd_input(const uint8_t* const* tile, size_t channels, int offset, uint8_t* to, ptrdiff_t plane) {
  const __m256i shift = _mm256_set1_epi8(char(offset));
  for (size_t c = 0; c < channels; c += 32) {
    const size_t some = channels - c;
    Four column[4];
#pragma GCC unroll 4
    for (int x = 0; x < 4; ++x)
      column[x] = transform(load_some(tile[x] + c, some), load_some(tile[4 + x] + c, some),
                            load_some(tile[8 + x] + c, some), load_some(tile[12 + x] + c, some));
#pragma GCC unroll 4
    for (int y = 0; y < 4; ++y) {
      const Four row = transform(column[0].v[y], column[1].v[y], column[2].v[y], column[3].v[y]);
#pragma GCC unroll 4
      for (int x = 0; x < 4; ++x) {
        const int position = 4 * y + x;
        const __m256i code = position == kMiddle ? row.v[x] : _mm256_add_epi8(row.v[x], shift);
        store_some(to + position * plane + c, some, code);
      }
    }
  }
}

// A pixel's sums: (y >> 2) · weight_multiplier + bias.
inline void store_pixel(int32_t* to, __m256i y, __m256i weight_multiplier, __m256i bias) {
  store(to, _mm256_add_epi32(_mm256_mullo_epi32(_mm256_srai_epi32(y, 2), weight_multiplier), bias));
}

inline void winograd_output(const int32_t* sums, int units, int weight_multiplier, const int32_t* bias,
                            int32_t* const* pixels) {
  constexpr ptrdiff_t plane = kWinogradTiles * kBlock;
  const __m256i factor = _mm256_set1_epi32(weight_multiplier);
  for (int o = 0; o < units * kLanes; o += 8) {
    const __m256i start = load(bias + o);
    __m256i rows[2][4];
#pragma GCC unroll 4
    for (int x = 0; x < 4; ++x) {
      const int32_t* m = sums + x * plane + o;
      const __m256i m1 = load(m + 4 * plane), m2 = load(m + 8 * plane);
      rows[0][x] = _mm256_add_epi32(_mm256_add_epi32(m1, m2), load(m));
      rows[1][x] = _mm256_sub_epi32(_mm256_sub_epi32(m1, m2), load(m + 12 * plane));
    }
#pragma GCC unroll 2
    for (int y = 0; y < 2; ++y) {
      const __m256i* m = rows[y];
      const __m256i left = _mm256_add_epi32(_mm256_add_epi32(m[1], m[2]), m[0]);
      const __m256i right = _mm256_sub_epi32(_mm256_sub_epi32(m[1], m[2]), m[3]);
      store_pixel(pixels[2 * y] + o, left, factor, start);
      store_pixel(pixels[2 * y + 1] + o, right, factor, start);
    }
  }
}

}  // namespace
}  // namespace edgeqat
