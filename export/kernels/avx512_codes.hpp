// AVX-512: loops over codes without arithmetic: tables, maxima, quantizing, interleaving, packing.
#pragma once
#include <immintrin.h>

#include "isa.hpp"

namespace edgeqat {
namespace {

__mmask64 first_bytes(size_t count) { return count >= 64 ? ~__mmask64(0) : (__mmask64(1) << count) - 1; }

struct Table {
  __m512i part[4];
  explicit Table(const uint8_t* table) {
    for (int i = 0; i < 4; ++i) part[i] = _mm512_loadu_si512(table + 64 * i);
  }
  __m512i operator()(__m512i index) const {  // vpermi2b looks at 7 bits, the eighth chooses
    const __m512i low = _mm512_permutex2var_epi8(part[0], index, part[1]);
    const __m512i high = _mm512_permutex2var_epi8(part[2], index, part[3]);
    return _mm512_mask_blend_epi8(_mm512_movepi8_mask(index), low, high);
  }
};

void translate(const uint8_t* table, const uint8_t* from, size_t count, uint8_t* to) {
  const Table look(table);
  for (size_t i = 0; i < count; i += 64) {
    const __mmask64 mask = first_bytes(count - i);
    _mm512_mask_storeu_epi8(to + i, mask, look(_mm512_maskz_loadu_epi8(mask, from + i)));
  }
}

void largest(const uint8_t* const* from, size_t vectors, size_t count, uint8_t* to) {
  for (size_t i = 0; i < count; i += 64) {
    const __mmask64 mask = first_bytes(count - i);
    __m512i best = _mm512_setzero_si512();
    for (size_t v = 0; v < vectors; ++v) best = _mm512_max_epu8(best, _mm512_maskz_loadu_epi8(mask, from[v] + i));
    _mm512_mask_storeu_epi8(to + i, mask, best);
  }
}

void quantize(const float* x, size_t count, float scale, int zero, int low, int high, uint8_t* to) {
  const __m512 lowest = _mm512_set1_ps(float(low - zero)), highest = _mm512_set1_ps(float(high - zero));
  const __m512 step = _mm512_set1_ps(scale);
  for (size_t i = 0; i < count; i += 16) {
    const __mmask16 mask = __mmask16(first_bytes(count - i));
    const __m512 code = _mm512_div_ps(_mm512_maskz_loadu_ps(mask, x + i), step);
    const __m512 clipped = _mm512_min_ps(_mm512_max_ps(code, lowest), highest);  // NaN takes the second operand
    const __m512i whole = _mm512_add_epi32(_mm512_cvtps_epi32(clipped), _mm512_set1_epi32(zero));
    _mm_mask_storeu_epi8(to + i, mask, _mm512_cvtepi32_epi8(whole));
  }
}

// Where byte 3·i + k of three vectors comes from: byte i of plane k.
struct Threes {
  alignas(64) uint8_t two[3][64] = {}, third[3][64] = {};
  uint64_t is_third[3] = {};
  constexpr Threes() {
    for (int i = 0; i < 192; ++i) {
      two[i / 64][i % 64] = uint8_t(i % 3 == 1 ? 64 + i / 3 : i / 3);
      third[i / 64][i % 64] = uint8_t(i / 3);
      is_third[i / 64] |= uint64_t(i % 3 == 2) << i % 64;
    }
  }
};
constexpr Threes kThrees;

void interleave_three(const uint8_t* planes, size_t count, uint8_t* to) {
  for (size_t i = 0; i < count; i += 64, to += 192) {
    const size_t left = count - i;
    const __mmask64 mask = first_bytes(left);
    const __m512i a = _mm512_maskz_loadu_epi8(mask, planes + i);
    const __m512i b = _mm512_maskz_loadu_epi8(mask, planes + count + i);
    const __m512i c = _mm512_maskz_loadu_epi8(mask, planes + 2 * count + i);
#pragma GCC unroll 3
    for (int k = 0; k < 3; ++k) {
      const __m512i two = _mm512_permutex2var_epi8(a, _mm512_load_si512(kThrees.two[k]), b);
      const __m512i all =
          _mm512_mask_permutexvar_epi8(two, kThrees.is_third[k], _mm512_load_si512(kThrees.third[k]), c);
      _mm512_mask_storeu_epi8(to + 64 * k, 3 * left > size_t(64 * k) ? first_bytes(3 * left - 64 * k) : 0, all);
    }
  }
}

void pack_triples(const uint8_t* codes, size_t pixels, size_t channels, uint8_t* to) {
  alignas(64) uint16_t place[3][32];  // of channel 3·j + i, for i = 0, 1, 2, in word j; the high byte is masked
  for (int j = 0; j < 32; ++j)
    for (int i = 0; i < 3; ++i) place[i][j] = uint16_t(3 * j + i);
  constexpr __mmask64 low = 0x5555555555555555;
  for (size_t p = 0; p < pixels; ++p, codes += channels)
    for (size_t c = 0; c < channels; c += 96) {
      const size_t left = channels - c < 96 ? channels - c : 96, words = (left + 2) / 3;
      const __m512i a = _mm512_maskz_loadu_epi8(first_bytes(left), codes + c);
      const __m512i b = left > 64 ? _mm512_maskz_loadu_epi8(first_bytes(left - 64), codes + c + 64) : __m512i{};
      __m512i part[3];
#pragma GCC unroll 3
      for (int i = 0; i < 3; ++i) part[i] = _mm512_maskz_permutex2var_epi8(low, a, _mm512_load_si512(place[i]), b);
      const __m512i triple =
          _mm512_or_si512(_mm512_slli_epi16(part[0], 6),
                          _mm512_or_si512(_mm512_slli_epi16(part[1], 8), _mm512_slli_epi16(part[2], 10)));
      _mm512_mask_storeu_epi8(to, first_bytes(2 * words), triple);
      to += 2 * words;
    }
}

void pack_bits(const uint8_t* codes, size_t count, uint8_t* bits) {
  for (size_t i = 0; i < count; i += 32) {
    const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes + i));
    const uint32_t word = _mm256_movemask_epi8(bytes);
    __builtin_memcpy(bits + i / 8, &word, 4);
  }
}

}  // namespace
}  // namespace edgeqat
