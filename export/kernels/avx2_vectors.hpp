// AVX2: loads, stores, tables, and the loops over bytes that no sum is part of. For the files of AVX2 and AVX-VNNI.
#pragma once
#include <immintrin.h>

#include "isa.hpp"

namespace edgeqat {
namespace {

inline __m256i load(const void* from) { return _mm256_loadu_si256(static_cast<const __m256i*>(from)); }
inline void store(void* to, __m256i v) { _mm256_storeu_si256(static_cast<__m256i*>(to), v); }
inline __m128i load_half(const void* from) { return _mm_loadu_si128(static_cast<const __m128i*>(from)); }
inline void store_half(void* to, __m128i v) { _mm_storeu_si128(static_cast<__m128i*>(to), v); }
inline __m128i low_half(__m256i v) { return _mm256_castsi256_si128(v); }
inline __m128i high_half(__m256i v) { return _mm256_extracti128_si256(v, 1); }

// The first `count` of 32 bytes; nothing beyond them is read or written.
inline __m256i load_some(const uint8_t* from, size_t count) {
  if (count >= 32) return load(from);
  alignas(32) uint8_t bytes[32] = {};
  __builtin_memcpy(bytes, from, count);
  return load(bytes);
}
inline void store_some(uint8_t* to, size_t count, __m256i v) {
  if (count >= 32) return store(to, v);
  __m128i rest = low_half(v);
  if (count >= 16) {
    store_half(to, rest);
    rest = high_half(v);
    to += 16;
    count -= 16;
  }
  if (count >= 8) {
    _mm_storel_epi64(reinterpret_cast<__m128i*>(to), rest);
    rest = _mm_srli_si128(rest, 8);
    to += 8;
    count -= 8;
  }
  uint8_t bytes[8];
  _mm_storel_epi64(reinterpret_cast<__m128i*>(bytes), rest);
  for (size_t i = 0; i < count; ++i) to[i] = bytes[i];
}

// Four codes in every 32-bit lane.
inline __m256i quad(const uint8_t* x) {
  int32_t four;
  __builtin_memcpy(&four, x, 4);
  return _mm256_set1_epi32(four);
}

// Keeps the compiler from loading the next codes before these sums are there: it would then spill some of them.
inline void settle(__m256i& first, __m256i& second) { asm volatile("" : "+x"(first), "+x"(second)::"memory"); }

// Sixteen entries of a table in both halves.
inline __m256i table_part(const uint8_t* table, int part) {
  return _mm256_broadcastsi128_si256(load_half(table + 16 * part));
}

// Entries of a table; no index is above `highest`. vpshufb knows 16 entries and gives 0 where an index has bit 7, which
// the saturating addition sets in every index of another part.
inline __m256i looked_up(const uint8_t* table, int highest, __m256i index) {
  if (highest < 16) return _mm256_shuffle_epi8(table_part(table, 0), index);
  const __m256i bias = _mm256_set1_epi8(0x70), sixteen = _mm256_set1_epi8(16);
  __m256i found = _mm256_setzero_si256();
  for (int part = 0; 16 * part <= highest; ++part) {
    const __m256i within = _mm256_adds_epu8(index, bias);
    found = _mm256_or_si256(found, _mm256_shuffle_epi8(table_part(table, part), within));
    index = _mm256_sub_epi8(index, sixteen);
  }
  return found;
}

inline void translate(const uint8_t* table, const uint8_t* from, size_t count, uint8_t* to) {
  for (size_t i = 0; i < count; i += 32)
    store_some(to + i, count - i, looked_up(table, 255, load_some(from + i, count - i)));
}

inline void largest(const uint8_t* const* from, size_t vectors, size_t count, uint8_t* to) {
  for (size_t i = 0; i < count; i += 32) {
    __m256i best = _mm256_setzero_si256();
    for (size_t v = 0; v < vectors; ++v) best = _mm256_max_epu8(best, load_some(from[v] + i, count - i));
    store_some(to + i, count - i, best);
  }
}

// Four vectors of eight integers -> 32 saturated bytes in order.
inline __m256i in_order(__m256i bytes) {
  return _mm256_permutevar8x32_epi32(bytes, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
}
inline __m256i to_bytes(const __m256i* v) {
  return in_order(_mm256_packus_epi16(_mm256_packs_epi32(v[0], v[1]), _mm256_packs_epi32(v[2], v[3])));
}

inline __m256 clamp(__m256 x, __m256 low, __m256 high) { return _mm256_min_ps(_mm256_max_ps(x, low), high); }

inline void quantize(const float* x, size_t count, float scale, int zero, int low, int high, uint8_t* to) {
  const __m256 lowest = _mm256_set1_ps(float(low - zero)), highest = _mm256_set1_ps(float(high - zero));
  const __m256 divisor = _mm256_set1_ps(scale);
  const __m256i zeros = _mm256_set1_epi32(zero);
  for (size_t i = 0; i < count; i += 32) {
    float last[32] = {};
    const float* values = x + i;
    if (count - i < 32) {
      __builtin_memcpy(last, values, (count - i) * 4);
      values = last;
    }
    __m256i codes[4];
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      // NaN takes the second operand, which is `lowest`
      const __m256 code = clamp(_mm256_div_ps(_mm256_loadu_ps(values + 8 * j), divisor), lowest, highest);
      codes[j] = _mm256_add_epi32(_mm256_cvtps_epi32(code), zeros);
    }
    store_some(to + i, count - i, to_bytes(codes));
  }
}

// Where byte 16·i + j of three planes' bytes, taken in turns, comes from: byte (16·i + j) / 3 of plane (16·i + j) % 3.
struct Threes {
  alignas(16) uint8_t place[3][3][16] = {};  // [third of the output][plane]; bit 7: from another plane
  constexpr Threes() {
    for (int i = 0; i < 48; ++i)
      for (int plane = 0; plane < 3; ++plane) place[i / 16][plane][i % 16] = uint8_t(i % 3 == plane ? i / 3 : 0x80);
  }
};
constexpr Threes kThrees;

inline void interleave_three(const uint8_t* planes, size_t count, uint8_t* to) {
  size_t i = 0;
  for (; i + 16 <= count; i += 16, to += 48)
    for (int third = 0; third < 3; ++third) {
      __m128i all = _mm_setzero_si128();
      for (int plane = 0; plane < 3; ++plane) {
        const __m128i from = load_half(planes + size_t(plane) * count + i);
        all = _mm_or_si128(all, _mm_shuffle_epi8(from, load_half(kThrees.place[third][plane])));
      }
      store_half(to + 16 * third, all);
    }
  for (; i < count; ++i)
    for (int plane = 0; plane < 3; ++plane) *to++ = planes[size_t(plane) * count + i];
}

inline void pack_bits(const uint8_t* codes, size_t count, uint8_t* bits) {
  for (size_t i = 0; i < count; i += 32) {
    const int word = _mm256_movemask_epi8(load(codes + i));
    __builtin_memcpy(bits + i / 8, &word, 4);
  }
}

}  // namespace
}  // namespace edgeqat
