// AVX-512: Winograd's transforms (winograd.cpp has the equations).
#pragma once
#include <immintrin.h>

#include "isa.hpp"
#include "avx512_codes.hpp"

namespace edgeqat {
namespace {

// Bytes modulo 256 throughout: the results are known to lie within 0 to 255.
void winograd_input(const uint8_t* const* tile, size_t channels, int offset, uint8_t* to, ptrdiff_t plane) {
  const __m512i shift = _mm512_set1_epi8(char(offset));
  for (size_t c = 0; c < channels; c += 64) {
    const __mmask64 mask = first_bytes(channels - c);
    __m512i row[4][4];
#pragma GCC unroll 4
    for (int x = 0; x < 4; ++x) {
      __m512i d[4];
#pragma GCC unroll 4
      for (int y = 0; y < 4; ++y) d[y] = _mm512_maskz_loadu_epi8(mask, tile[4 * y + x] + c);
      row[0][x] = _mm512_sub_epi8(d[0], d[2]);
      row[1][x] = _mm512_add_epi8(d[1], d[2]);
      row[2][x] = _mm512_sub_epi8(d[2], d[1]);
      row[3][x] = _mm512_sub_epi8(d[1], d[3]);
    }
#pragma GCC unroll 4
    for (int y = 0; y < 4; ++y) {
      const __m512i* d = row[y];
      const __m512i v[4] = {_mm512_sub_epi8(d[0], d[2]), _mm512_add_epi8(d[1], d[2]), _mm512_sub_epi8(d[2], d[1]),
                            _mm512_sub_epi8(d[1], d[3])};
#pragma GCC unroll 4
      for (int x = 0; x < 4; ++x) {
        const __m512i moved = 4 * y + x == 5 ? v[x] : _mm512_add_epi8(v[x], shift);
        _mm512_mask_storeu_epi8(to + (4 * y + x) * plane + c, mask, moved);
      }
    }
  }
}

void winograd_output(const int32_t* sums, int units, int weight_multiplier, const int32_t* bias,
                     int32_t* const* pixels) {
  constexpr ptrdiff_t plane = kWinogradTiles * kBlock;
  const __m512i up = _mm512_set1_epi32(weight_multiplier);
  for (int u = 0; u < units; ++u) {
    const __m512i b = _mm512_loadu_si512(bias + u * kLanes);
    __m512i row[2][4];
#pragma GCC unroll 4
    for (int x = 0; x < 4; ++x) {
      const int32_t* m = sums + x * plane + u * kLanes;
      const __m512i m1 = _mm512_load_si512(m + 4 * plane), m2 = _mm512_load_si512(m + 8 * plane);
      row[0][x] = _mm512_add_epi32(_mm512_add_epi32(m1, m2), _mm512_load_si512(m));
      row[1][x] = _mm512_sub_epi32(_mm512_sub_epi32(m1, m2), _mm512_load_si512(m + 12 * plane));
    }
#pragma GCC unroll 2
    for (int y = 0; y < 2; ++y) {
      const __m512i* r = row[y];
      const __m512i left = _mm512_add_epi32(_mm512_add_epi32(r[1], r[2]), r[0]);
      const __m512i right = _mm512_sub_epi32(_mm512_sub_epi32(r[1], r[2]), r[3]);
      const __m512i first = _mm512_mullo_epi32(_mm512_srai_epi32(left, 2), up);
      const __m512i second = _mm512_mullo_epi32(_mm512_srai_epi32(right, 2), up);
      _mm512_store_si512(pixels[2 * y] + u * kLanes, _mm512_add_epi32(first, b));
      _mm512_store_si512(pixels[2 * y + 1] + u * kLanes, _mm512_add_epi32(second, b));
    }
  }
}

}  // namespace
}  // namespace edgeqat
