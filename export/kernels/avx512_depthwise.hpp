// AVX-512: depthwise layers, 64 channels at a time.
#pragma once
#include <immintrin.h>

#include "isa.hpp"
#include "avx512_epilogue.hpp"

namespace edgeqat {
namespace {

// Exchanges lane l of part j with lane j of part l (lanes of 128 bits).
void transpose_lanes(const __m512i* v, __m512i* to) {
  const __m512i p = _mm512_shuffle_i32x4(v[0], v[1], 0x88), q = _mm512_shuffle_i32x4(v[0], v[1], 0xdd);
  const __m512i r = _mm512_shuffle_i32x4(v[2], v[3], 0x88), s = _mm512_shuffle_i32x4(v[2], v[3], 0xdd);
  to[0] = _mm512_shuffle_i32x4(p, r, 0x88);
  to[1] = _mm512_shuffle_i32x4(q, s, 0x88);
  to[2] = _mm512_shuffle_i32x4(p, r, 0xdd);
  to[3] = _mm512_shuffle_i32x4(q, s, 0xdd);
}

// Four taps of 64 channels, interleaved to quads. The shuffles work within 128-bit lanes, so that part j of the result
// has channels 16·l + 4·j + i in dword 4·l + i (the order of DepthwiseWeights::kQuads).
struct Quads {
  Quads(const uint8_t* x, const ptrdiff_t* at) {
    const __m512i a = _mm512_loadu_si512(x + at[0]), b = _mm512_loadu_si512(x + at[1]);
    const __m512i c = _mm512_loadu_si512(x + at[2]), d = _mm512_loadu_si512(x + at[3]);
    const __m512i ab_low = _mm512_unpacklo_epi8(a, b), ab_high = _mm512_unpackhi_epi8(a, b);
    const __m512i cd_low = _mm512_unpacklo_epi8(c, d), cd_high = _mm512_unpackhi_epi8(c, d);
    part[0] = _mm512_unpacklo_epi16(ab_low, cd_low);
    part[1] = _mm512_unpackhi_epi16(ab_low, cd_low);
    part[2] = _mm512_unpacklo_epi16(ab_high, cd_high);
    part[3] = _mm512_unpackhi_epi16(ab_high, cd_high);
  }
  __m512i part[4];
};

// Two taps of 64 channels as neighbouring bytes, in the order of DepthwiseWeights::kWidePairs.
struct Pairs {
  Pairs(const uint8_t* x, const ptrdiff_t* at) {
    __m512i a = _mm512_loadu_si512(x + at[0]), b = _mm512_loadu_si512(x + at[1]);
    asm(""
        : "+v"(a), "+v"(b));  // in registers: the compiler would load each of them twice, and loads are what takes time
    part[0] = _mm512_unpacklo_epi8(a, b);
    part[1] = _mm512_unpackhi_epi8(a, b);
  }
  __m512i part[2];
};

// Sums of one pixel's 64 channels, for any codes and weights.
struct WideSums {
  static constexpr int kTaps = 4;
  using Taps = Quads;

  void add(const Quads& codes, const int8_t* w) {
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) part[j] = _mm512_dpbusd_epi32(part[j], codes.part[j], _mm512_load_si512(w + 64 * j));
  }
  void put_in_order(__m512i* to) const { transpose_lanes(part, to); }

  __m512i part[4];
};

// Sums of 16 bits, which layer_pack.cpp has shown to suffice.
struct NarrowSums {
  static constexpr int kTaps = 2;
  using Taps = Pairs;

  void add(const Pairs& codes, const int8_t* w) {
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j)
      part[j] = _mm512_add_epi16(part[j], _mm512_maddubs_epi16(codes.part[j], _mm512_load_si512(w + 64 * j)));
  }
  void put_in_order(__m512i* to) const {
    const __m512i front = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11),
                  back = _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15);
    const __m512i half[2] = {_mm512_permutex2var_epi64(part[0], front, part[1]),
                             _mm512_permutex2var_epi64(part[0], back, part[1])};
#pragma GCC unroll 2
    for (int h = 0; h < 2; ++h) {
      to[2 * h] = _mm512_cvtepi16_epi32(_mm512_castsi512_si256(half[h]));
      to[2 * h + 1] = _mm512_cvtepi16_epi32(_mm512_extracti64x4_epi64(half[h], 1));
    }
  }

  __m512i part[2];
};

// Calls emit(m, sums) for kPixels pixels, `step` bytes apart: together, so that weights are loaded once.
template <typename Sums, int kPixels, typename Emit>
[[gnu::always_inline]] inline void some_pixels(const Depthwise& d, const uint8_t* x, ptrdiff_t step, Emit emit) {
  constexpr int kTaps = Sums::kTaps;
  Sums sums[kPixels] = {};
  for (int tap = 0; tap < d.taps; tap += kTaps)
#pragma GCC unroll 4
    for (int m = 0; m < kPixels; ++m)
      sums[m].add(typename Sums::Taps(x + m * step, d.offsets + tap), d.weights + kBlock * tap);
#pragma GCC unroll 4
  for (int m = 0; m < kPixels; ++m) emit(m, sums[m]);
}

template <typename Sums, typename Emit>
void each_pixel(const Depthwise& d, const uint8_t* x, ptrdiff_t step, int64_t count, Emit emit) {
  constexpr int kTogether = 4;
  int64_t m = 0;
  const auto from_here = [&](int64_t i, const Sums& sums) __attribute__((always_inline)) { emit(m + i, sums); };
  for (; m + kTogether <= count; m += kTogether) some_pixels<Sums, kTogether>(d, x + m * step, step, from_here);
  for (; m < count; ++m) some_pixels<Sums, 1>(d, x + m * step, step, from_here);
}

// Three groups, each a column of taps that three pixels share: it is interleaved once.
template <typename Sums, typename Emit>
void each_column(const Depthwise& d, const uint8_t* x, ptrdiff_t step, int64_t count, Emit emit) {
  constexpr int kTaps = Sums::kTaps;
  const auto weights = [&](int group, int tap) { return d.weights + kBlock * (4 * group + tap); };
  Sums first = {}, second = {};
#pragma GCC unroll 2
  for (int tap = 0; tap < 4; tap += kTaps) {
    const typename Sums::Taps left(x, d.offsets + tap), middle(x, d.offsets + 4 + tap);
    first.add(left, weights(0, tap));
    first.add(middle, weights(1, tap));
    second.add(middle, weights(0, tap));
  }
  for (int64_t m = 0; m < count; ++m, x += step) {
    Sums third = {};
#pragma GCC unroll 2
    for (int tap = 0; tap < 4; tap += kTaps) {
      const typename Sums::Taps right(x, d.offsets + 8 + tap);
      first.add(right, weights(2, tap));
      second.add(right, weights(1, tap));
      third.add(right, weights(0, tap));
    }
    emit(m, first);
    first = second;
    second = third;
  }
}

template <typename Emit>
void each_sum(const Depthwise& d, const uint8_t* x, ptrdiff_t step, int64_t count, Emit emit) {
  const bool columns = d.shares && d.groups == 3;
  if (d.narrow && columns)
    each_column<NarrowSums>(d, x, step, count, emit);
  else if (d.narrow)
    each_pixel<NarrowSums>(d, x, step, count, emit);
  else if (columns)
    each_column<WideSums>(d, x, step, count, emit);
  else
    each_pixel<WideSums>(d, x, step, count, emit);
}

// The sums of a pixel, in order, with their bias.
template <typename Sums>
[[gnu::always_inline]] inline void finished(const Sums& sums, const int32_t* bias, __m512i* to) {
  sums.put_in_order(to);
#pragma GCC unroll 4
  for (int u = 0; u < 4; ++u) to[u] = _mm512_add_epi32(to[u], _mm512_loadu_si512(bias + u * kLanes));
}

void depthwise(const Depthwise& d, const uint8_t* const* pixels, int count, int32_t* sums) {
  const ptrdiff_t step = count > 1 ? pixels[1] - pixels[0] : 0;
  each_sum(d, pixels[0], step, count, [&](int64_t m, const auto& sum) __attribute__((always_inline)) {
    __m512i ordered[4];
    finished(sum, d.bias, ordered);
#pragma GCC unroll 4
    for (int u = 0; u < 4; ++u) _mm512_store_si512(sums + m * kBlock + u * kLanes, ordered[u]);
  });
}

void depthwise_codes(const Depthwise& d, const uint8_t* x, ptrdiff_t step, int64_t count, const Epilogue& e,
                     int width) {
  const OwnCodes<4> own(e);
  const __mmask64 bytes = first_bytes(size_t(width));
  each_sum(d, x, step, count, [&](int64_t m, const auto& sum) __attribute__((always_inline)) {
    __m512i ordered[4];
    finished(sum, d.bias, ordered);
    write_own(e, m * e.stride, bytes, own(ordered));
  });
}

}  // namespace
}  // namespace edgeqat
