// AVX-512: from sums to codes, 64 channels at a time (isa.hpp has the equations).
#pragma once
#include <immintrin.h>

#include "isa.hpp"
#include "avx512_codes.hpp"

namespace edgeqat {
namespace {

// Four vectors of 16 integers -> 64 saturated bytes in order.
__m512i to_bytes(const __m512i* v) {
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  const __m512i bytes = _mm512_packus_epi16(_mm512_packs_epi32(v[0], v[1]), _mm512_packs_epi32(v[2], v[3]));
  return _mm512_permutexvar_epi32(order, bytes);
}

__m512 widened(const uint8_t* bytes, __mmask16 mask) {
  return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(mask, bytes)));
}

// An epilogue's scalars in vectors.
struct Constants {
  explicit Constants(const Epilogue& e)
      : lowest(_mm512_set1_ps(float(e.low - e.zero))),
        highest(_mm512_set1_ps(float(e.high - e.zero))),
        zero(_mm512_set1_ps(float(e.zero))),
        sum_lowest(_mm512_set1_ps(float(e.sum_low))),
        sum_highest(_mm512_set1_ps(float(e.sum_high))),
        ratio_first(_mm512_set1_ps(e.ratio_first)),
        ratio_second(_mm512_set1_ps(e.ratio_second)),
        offset(_mm512_set1_ps(e.offset)),
        zeros(_mm512_set1_epi32(e.zero)) {}
  __m512 lowest, highest, zero, sum_lowest, sum_highest, ratio_first, ratio_second, offset;
  __m512i zeros;
};

// Bounds are integers, so clipping before rounding is clipping after it, and no conversion overflows.
__m512 clipped(const int32_t* sums, const float* multiplier, const Constants& k) {
  const __m512 value = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_load_si512(sums)), _mm512_loadu_ps(multiplier));
  return _mm512_max_ps(_mm512_min_ps(value, k.highest), k.lowest);
}

template <int kUnits, bool kOtherFirst>
void finish_sum(const Epilogue& e, const int32_t* sums, int count, __mmask64 bytes) {
  const Constants k(e);
  for (int m = 0; m < count; ++m, sums += kBlock) {
    const ptrdiff_t at = m * e.stride;
    __m512i codes[4] = {}, added[4] = {};
#pragma GCC unroll 4
    for (int u = 0; u < kUnits; ++u) {
      const __m512 rounded =
          _mm512_roundscale_ps(clipped(sums + u * kLanes, e.multiplier + u * kLanes, k), _MM_FROUND_TO_NEAREST_INT);
      const __m512 own = _mm512_add_ps(rounded, k.zero);
      codes[u] = _mm512_cvtps_epi32(own);
      const __m512 other = widened(e.other + at + u * kLanes, __mmask16(bytes >> (u * kLanes)));
      const __m512 first = kOtherFirst ? other : own, second = kOtherFirst ? own : other;
      const __m512 sum = _mm512_fmadd_ps(first, k.ratio_first, _mm512_fmadd_ps(second, k.ratio_second, k.offset));
      added[u] = _mm512_cvtps_epi32(_mm512_max_ps(_mm512_min_ps(sum, k.sum_highest), k.sum_lowest));
    }
    if (e.own) _mm512_mask_storeu_epi8(e.own + at, bytes, to_bytes(codes));
    const __m512i last = to_bytes(added);
    if (e.sum) _mm512_mask_storeu_epi8(e.sum + at, bytes, last);
    for (int t = 0; t < e.tables; ++t)
      if (e.copy[t]) _mm512_mask_storeu_epi8(e.copy[t] + at, bytes, Table(e.table[t])(last));
  }
}

// Rounded integers of any size -> codes: saturation to 16 bits, with the zero point too, and to bytes clips nothing
// that the bounds, which are bytes, would not.
[[gnu::always_inline]] inline __m512i to_codes(const __m512i* v, __m512i zeros, __m512i lowest, __m512i highest) {
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  const __m512i low = _mm512_adds_epi16(_mm512_packs_epi32(v[0], v[1]), zeros);
  const __m512i high = _mm512_adds_epi16(_mm512_packs_epi32(v[2], v[3]), zeros);
  const __m512i bytes = _mm512_min_epu8(_mm512_max_epu8(_mm512_packus_epi16(low, high), lowest), highest);
  return _mm512_permutexvar_epi32(order, bytes);
}

// A layer's own codes of 16 · kUnits channels, from sums in order, where Epilogue::in_32_bits.
template <int kUnits>
struct OwnCodes {
  explicit OwnCodes(const Epilogue& e)
      : zeros(_mm512_set1_epi16(short(e.zero))),
        lowest(_mm512_set1_epi8(char(e.low))),
        highest(_mm512_set1_epi8(char(e.high))) {
#pragma GCC unroll 4
    for (int u = 0; u < kUnits; ++u) multiplier[u] = _mm512_loadu_ps(e.multiplier + u * kLanes);
  }
  [[gnu::always_inline]] __m512i operator()(const __m512i* sums) const {
    __m512i codes[4] = {};
#pragma GCC unroll 4
    for (int u = 0; u < kUnits; ++u)
      codes[u] = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_cvtepi32_ps(sums[u]), multiplier[u]));
    return to_codes(codes, zeros, lowest, highest);
  }
  __m512i zeros, lowest, highest;
  __m512 multiplier[kUnits];
};

[[gnu::always_inline]] inline void write_own(const Epilogue& e, ptrdiff_t at, __mmask64 bytes, __m512i codes) {
  if (e.own) _mm512_mask_storeu_epi8(e.own + at, bytes, codes);
  for (int t = 0; t < e.tables; ++t)
    if (e.copy[t]) _mm512_mask_storeu_epi8(e.copy[t] + at, bytes, Table(e.table[t])(codes));
}

template <int kUnits>
void finish_own(const Epilogue& e, const int32_t* sums, int count, __mmask64 bytes) {
  const Constants k(e);
  const OwnCodes<kUnits> own(e);
  for (int m = 0; m < count; ++m, sums += kBlock) {
    __m512i read[4] = {};
    if (e.in_32_bits) {
#pragma GCC unroll 4
      for (int u = 0; u < kUnits; ++u) read[u] = _mm512_load_si512(sums + u * kLanes);
      write_own(e, m * e.stride, bytes, own(read));
    } else {
#pragma GCC unroll 4
      for (int u = 0; u < kUnits; ++u)
        read[u] =
            _mm512_add_epi32(_mm512_cvtps_epi32(clipped(sums + u * kLanes, e.multiplier + u * kLanes, k)), k.zeros);
      write_own(e, m * e.stride, bytes, to_bytes(read));
    }
  }
}

void finish_real(const Epilogue& e, const int32_t* sums, int count, int width) {
  for (int m = 0; m < count; ++m)
    for (int c = 0; c < width; c += kLanes) {
      const __m512 sum = _mm512_cvtepi32_ps(_mm512_load_si512(sums + m * kBlock + c));
      _mm512_mask_storeu_ps(e.real + m * e.stride + c, __mmask16(first_bytes(size_t(width - c))),
                            _mm512_mul_ps(sum, _mm512_loadu_ps(e.multiplier + c)));
    }
}

void finish(const Epilogue& e, const int32_t* sums, int count, int width) {
  using Finish = void (*)(const Epilogue&, const int32_t*, int, __mmask64);
  constexpr Finish kOwn[4] = {finish_own<1>, finish_own<2>, finish_own<3>, finish_own<4>};
  constexpr Finish kFirst[4] = {finish_sum<1, true>, finish_sum<2, true>, finish_sum<3, true>, finish_sum<4, true>};
  constexpr Finish kSecond[4] = {finish_sum<1, false>, finish_sum<2, false>, finish_sum<3, false>,
                                 finish_sum<4, false>};
  if (e.real) return finish_real(e, sums, count, width);
  const int units = (width + kLanes - 1) / kLanes;
  (e.other ? e.other_first ? kFirst : kSecond : kOwn)[units - 1](e, sums, count, first_bytes(size_t(width)));
}

}  // namespace
}  // namespace edgeqat
