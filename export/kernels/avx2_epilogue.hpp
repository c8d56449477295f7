// AVX2: from sums to codes, 32 channels at a time (isa.hpp has the equations).
#pragma once
#include "avx2_vectors.hpp"

namespace edgeqat {
namespace {

constexpr int kAtOnce = 32;

// An epilogue's scalars in vectors.
struct Constants {
  explicit Constants(const Epilogue& e)
      : lowest(_mm256_set1_ps(float(e.low - e.zero))),
        highest(_mm256_set1_ps(float(e.high - e.zero))),
        zero(_mm256_set1_ps(float(e.zero))),
        sum_lowest(_mm256_set1_ps(float(e.sum_low))),
        sum_highest(_mm256_set1_ps(float(e.sum_high))),
        ratio_first(_mm256_set1_ps(e.ratio_first)),
        ratio_second(_mm256_set1_ps(e.ratio_second)),
        offset(_mm256_set1_ps(e.offset)),
        zeros(_mm256_set1_epi32(e.zero)) {}
  __m256 lowest, highest, zero, sum_lowest, sum_highest, ratio_first, ratio_second, offset;
  __m256i zeros;
};

inline __m256 scaled(const int32_t* sums, const float* multiplier) {
  return _mm256_mul_ps(_mm256_cvtepi32_ps(load(sums)), _mm256_loadu_ps(multiplier));
}

inline void store_copies(const Epilogue& e, ptrdiff_t at, size_t some, int highest, __m256i codes) {
  for (int t = 0; t < e.tables; ++t)
    if (e.copy[t]) store_some(e.copy[t] + at, some, looked_up(e.table[t], highest, codes));
}

// Bounds are integers, so clipping before rounding is clipping after it, and no conversion overflows.
template <bool kOtherFirst>
void finish_sum(const Epilogue& e, const int32_t* sums, int count, int width) {
  const Constants k(e);
  for (int m = 0; m < count; ++m, sums += kBlock)
    for (int c = 0; c < width; c += kAtOnce) {
      const ptrdiff_t at = m * e.stride + c;
      const auto some = size_t(width - c);
      alignas(32) uint8_t others[kAtOnce];
      store(others, load_some(e.other + at, some));
      __m256i codes[4], added[4];
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        const __m256 value = clamp(scaled(sums + c + 8 * i, e.multiplier + c + 8 * i), k.lowest, k.highest);
        const __m256 rounded = _mm256_round_ps(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
        const __m256 own = _mm256_add_ps(rounded, k.zero);
        codes[i] = _mm256_cvtps_epi32(own);
        const __m128i packed = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(others + 8 * i));
        const __m256 other = _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(packed));
        const __m256 first = kOtherFirst ? other : own, second = kOtherFirst ? own : other;
        const __m256 sum = _mm256_fmadd_ps(first, k.ratio_first, _mm256_fmadd_ps(second, k.ratio_second, k.offset));
        added[i] = _mm256_cvtps_epi32(clamp(sum, k.sum_lowest, k.sum_highest));
      }
      if (e.own) store_some(e.own + at, some, to_bytes(codes));
      const __m256i last = to_bytes(added);
      if (e.sum) store_some(e.sum + at, some, last);
      store_copies(e, at, some, e.sum_high, last);
    }
}

// Rounded integers of any size -> codes: saturation to 16 bits, with the zero point too, and to bytes clips nothing
// that the bounds, which are bytes, would not.
inline __m256i to_codes(const __m256i* v, __m256i zeros, __m256i lowest, __m256i highest) {
  const __m256i low = _mm256_adds_epi16(_mm256_packs_epi32(v[0], v[1]), zeros);
  const __m256i high = _mm256_adds_epi16(_mm256_packs_epi32(v[2], v[3]), zeros);
  return in_order(_mm256_min_epu8(_mm256_max_epu8(_mm256_packus_epi16(low, high), lowest), highest));
}

template <bool kIn32Bits, bool kCopies>
void finish_own(const Epilogue& e, const int32_t* sums, int count, int width) {
  const Constants k(e);
  const __m256i zeros = _mm256_set1_epi16(short(e.zero));
  const __m256i lowest = _mm256_set1_epi8(char(e.low)), highest = _mm256_set1_epi8(char(e.high));
  for (int m = 0; m < count; ++m, sums += kBlock)
    for (int c = 0; c < width; c += kAtOnce) {
      const ptrdiff_t at = m * e.stride + c;
      const auto some = size_t(width - c);
      __m256i codes[4];
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        const __m256 value = scaled(sums + c + 8 * i, e.multiplier + c + 8 * i);
        if (kIn32Bits)
          codes[i] = _mm256_cvtps_epi32(value);
        else
          codes[i] = _mm256_add_epi32(_mm256_cvtps_epi32(clamp(value, k.lowest, k.highest)), k.zeros);
      }
      const __m256i last = kIn32Bits ? to_codes(codes, zeros, lowest, highest) : to_bytes(codes);
      if (!kCopies || e.own) store_some(e.own + at, some, last);
      if (kCopies) store_copies(e, at, some, e.high, last);
    }
}

inline void finish_real(const Epilogue& e, const int32_t* sums, int count, int width) {
  for (int m = 0; m < count; ++m, sums += kBlock)
    for (int c = 0; c < width; c += 8) {
      float values[8];
      _mm256_storeu_ps(values, scaled(sums + c, e.multiplier + c));
      __builtin_memcpy(e.real + m * e.stride + c, values, size_t(width - c < 8 ? width - c : 8) * 4);
    }
}

inline void finish(const Epilogue& e, const int32_t* sums, int count, int width) {
  if (e.real) return finish_real(e, sums, count, width);
  if (e.other) return (e.other_first ? finish_sum<true> : finish_sum<false>)(e, sums, count, width);
  const bool copies = e.tables > 0 || e.own == nullptr;
  if (e.in_32_bits)
    (copies ? finish_own<true, true> : finish_own<true, false>)(e, sums, count, width);
  else
    (copies ? finish_own<false, true> : finish_own<false, false>)(e, sums, count, width);
}

}  // namespace
}  // namespace edgeqat
