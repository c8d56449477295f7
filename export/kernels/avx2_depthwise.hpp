// AVX2: depthwise layers, 32 channels at a time. Two taps of a channel become neighbouring bytes, as vpmaddubsw wants
// them. Interleaving works within halves of 128 bits, so the first result has channels 0 to 7 and 16 to 23, the second
// 8 to 15 and 24 to 31; weights were packed in that order (DepthwiseWeights::kPairs).
#pragma once
#include "avx2_vectors.hpp"

namespace edgeqat {
namespace {

constexpr int kHalf = 32;                 // channels of one round
constexpr ptrdiff_t kGroup = 4 * kBlock;  // bytes of a group's weights
constexpr ptrdiff_t kPair = 2 * kBlock;   // bytes of a pair's weights

struct Interleaved {
  __m256i first, second;
};

inline Interleaved interleave(const uint8_t* x, const ptrdiff_t* at) {
  const __m256i a = load(x + at[0]), b = load(x + at[1]);
  return {_mm256_unpacklo_epi8(a, b), _mm256_unpackhi_epi8(a, b)};
}

// Sums of 16 bits, which layer_pack.cpp has shown to suffice.
struct NarrowSums {
  __m256i first, second;

  void add(const Interleaved& codes, const int8_t* w) {
    first = _mm256_add_epi16(first, _mm256_maddubs_epi16(codes.first, load(w)));
    second = _mm256_add_epi16(second, _mm256_maddubs_epi16(codes.second, load(w + 32)));
  }

  void store_with(const int32_t* bias, int32_t* to) const {
    const __m128i parts[4] = {low_half(first), low_half(second), high_half(first), high_half(second)};
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i)
      store(to + 8 * i, _mm256_add_epi32(_mm256_cvtepi16_epi32(parts[i]), load(bias + 8 * i)));
  }
};

// Sums of 32 bits for any codes and weights.
struct WideSums {
  __m256i part[4];

  void add(const Interleaved& codes, const int8_t* w) {
    const __m128i x[4] = {low_half(codes.first), low_half(codes.second), high_half(codes.first),
                          high_half(codes.second)};
    constexpr int kPlace[4] = {0, 32, 16, 48};
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const __m256i weights = _mm256_cvtepi8_epi16(load_half(w + kPlace[i]));
      part[i] = _mm256_add_epi32(part[i], _mm256_madd_epi16(_mm256_cvtepu8_epi16(x[i]), weights));
    }
  }

  void store_with(const int32_t* bias, int32_t* to) const {
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) store(to + 8 * i, _mm256_add_epi32(part[i], load(bias + 8 * i)));
  }
};

// One pixel after another. `pairs` is 1 where only the first two taps of a group are no padding.
template <typename Sums>
void each_pixel(const Depthwise& d, const uint8_t* const* pixels, int count, int channel, int pairs, int32_t* sums) {
  const int8_t* weights = d.weights + 2 * channel;
  for (int m = 0; m < count; ++m) {
    const uint8_t* x = pixels[m] + channel;
    Sums sum = {};
    for (int g = 0; g < d.groups; ++g)
      for (int pair = 0; pair < pairs; ++pair)
        sum.add(interleave(x, d.offsets + 4 * g + 2 * pair), weights + g * kGroup + pair * kPair);
    sum.store_with(d.bias + channel, sums + m * kBlock + channel);
  }
}

// Three groups, each shared by three pixels: one column of taps is interleaved once.
inline void each_column(const Depthwise& d, const uint8_t* const* pixels, int count, int channel, int32_t* sums) {
  const int8_t* weights = d.weights + 2 * channel;
  NarrowSums first = {}, second = {};
#pragma GCC unroll 2
  for (int pair = 0; pair < 2; ++pair) {
    const Interleaved left = interleave(pixels[0] + channel, d.offsets + 2 * pair);
    const Interleaved middle = interleave(pixels[0] + channel, d.offsets + 4 + 2 * pair);
    const int8_t* w = weights + pair * kPair;
    first.add(left, w);
    first.add(middle, w + kGroup);
    second.add(middle, w);
  }
  for (int m = 0; m < count; ++m) {
    NarrowSums third = {};
#pragma GCC unroll 2
    for (int pair = 0; pair < 2; ++pair) {
      const Interleaved right = interleave(pixels[m] + channel, d.offsets + 8 + 2 * pair);
      const int8_t* w = weights + pair * kPair;
      first.add(right, w + 2 * kGroup);
      second.add(right, w + kGroup);
      third.add(right, w);
    }
    first.store_with(d.bias + channel, sums + m * kBlock + channel);
    first = second;
    second = third;
  }
}

inline void depthwise(const Depthwise& d, const uint8_t* const* pixels, int count, int32_t* sums) {
  const int pairs = d.rows > 2 ? 2 : 1;
  for (int channel = 0; channel < d.channels; channel += kHalf) {
    if (!d.narrow)
      each_pixel<WideSums>(d, pixels, count, channel, pairs, sums);
    else if (d.shares && d.groups == 3)
      each_column(d, pixels, count, channel, sums);
    else
      each_pixel<NarrowSums>(d, pixels, count, channel, pairs, sums);
  }
}

}  // namespace
}  // namespace edgeqat
