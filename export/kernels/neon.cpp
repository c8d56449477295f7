// NEON as every 64-bit ARM has it: `smlal` adds eight products to 16-bit lanes, as many as fit, before they are
// widened.
#include "isa.hpp"
#if defined(__aarch64__)
#include "neon.hpp"

namespace edgeqat {
namespace {

// Pixels of a tile: with 8 channels their 16-bit sums, two lanes of 4 a channel, take 16 registers.
constexpr int kTilePixels = 4;
// Differing bits in bytes: a step adds at most 8, so 31 steps stay within 255.
constexpr int kBinarySteps = 31;

// Quads whose products x·w a 16-bit lane holds. p.narrow_steps pairs of products of codes up to input_high do
// (layer_pack.cpp), so do twice as many single ones; |x - 128| <= 128 where codes reach 128, and one always fits.
int steps_of(const Product& p) {
  const int steps = p.codes_below_128 ? 2 * p.narrow_steps : 3 * p.narrow_steps;
  return steps > 1 ? steps : 1;
}

// Adds `quads` quads of every pixel in 16 bits; lanes 4·i to 4·i + 3 of a pair of vectors are channel i's.
template <int kPixels, bool kCentred>
void add_narrow(const Rows<kPixels>& rows, ptrdiff_t at, int quads, const int8_t*& w, Sums<kPixels>& sums) {
  int16x8_t narrow[kPixels][4] = {};
  for (int q = 0; q < quads; ++q, at += 4, w += 4 * kTileChannels) {
    const int8x16_t w0 = vld1q_s8(w), w1 = vld1q_s8(w + 16);
#pragma GCC unroll 4
    for (int m = 0; m < kPixels; ++m) {
      int8x16_t codes = vreinterpretq_s8_u8(repeat_quad(rows.x[m] + at));
      if (kCentred) codes = veorq_s8(codes, vdupq_n_s8(-128));
      narrow[m][0] = vmlal_s8(narrow[m][0], vget_low_s8(codes), vget_low_s8(w0));
      narrow[m][1] = vmlal_high_s8(narrow[m][1], codes, w0);
      narrow[m][2] = vmlal_s8(narrow[m][2], vget_low_s8(codes), vget_low_s8(w1));
      narrow[m][3] = vmlal_high_s8(narrow[m][3], codes, w1);
    }
  }
#pragma GCC unroll 4
  for (int m = 0; m < kPixels; ++m)
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
      const int32x4_t low = vpaddlq_s16(narrow[m][2 * i]), high = vpaddlq_s16(narrow[m][2 * i + 1]);
      sums.part[m][i] = vaddq_s32(sums.part[m][i], vpaddq_s32(low, high));
    }
}

template <int kPixels, bool kCentred>
void product_tiles(const Product& p, const uint8_t* const* pixels, int32_t* to) {
  const int quads = p.stretches.quads, steps = steps_of(p);
  const int8_t* w = p.weights;
  for (int channel = 0; channel < p.units * kLanes; channel += kTileChannels) {
    Sums<kPixels> sums;
    for (int r = 0; r < p.stretches.runs; ++r) {
      const Rows<kPixels> rows(pixels, p.stretches.offsets[r]);
      for (int q = 0; q < quads; q += steps) {
        const int some = quads - q < steps ? quads - q : steps;
        add_narrow<kPixels, kCentred>(rows, 4 * ptrdiff_t(q), some, w, sums);
      }
    }
    Sums<kPixels> scaled(p.bias + channel);
#pragma GCC unroll 4
    for (int m = 0; m < kPixels; ++m)
#pragma GCC unroll 2
      for (int i = 0; i < 2; ++i)
        scaled.part[m][i] = vmlaq_n_s32(scaled.part[m][i], sums.part[m][i], p.weight_multiplier);
    scaled.store(to + channel);
  }
}

// Up to kTilePixels pixels at a time.
void in_fours(const Tiles* tiles, const Product& p, const uint8_t* const* pixels, int count, int32_t* sums) {
  for (int m = 0; m < count; m += kTilePixels) {
    const int some = count - m < kTilePixels ? count - m : kTilePixels;
    tiles[some - 1](p, pixels + m, sums + m * kBlock);
  }
}

void product(const Product& p, const uint8_t* const* pixels, int count, int32_t* sums) {
  constexpr Tiles kSigned[kTilePixels] = {product_tiles<1, false>, product_tiles<2, false>, product_tiles<3, false>,
                                          product_tiles<4, false>};
  constexpr Tiles kCentred[kTilePixels] = {product_tiles<1, true>, product_tiles<2, true>, product_tiles<3, true>,
                                           product_tiles<4, true>};
  in_fours(p.codes_below_128 ? kSigned : kCentred, p, pixels, count, sums);
}

template <int kPixels>
void binary_tiles(const Product& p, const uint8_t* const* pixels, int32_t* to) {
  const int quads = p.stretches.quads;
  const uint8_t* w = reinterpret_cast<const uint8_t*>(p.weights);
  for (int channel = 0; channel < p.units * kLanes; channel += kTileChannels) {
    uint32x4_t differing[kPixels][2] = {};
    for (int r = 0; r < p.stretches.runs; ++r) {
      const Rows<kPixels> rows(pixels, p.stretches.offsets[r]);
      for (int q = 0; q < quads;) {
        const int end = quads - q < kBinarySteps ? quads : q + kBinarySteps;
        uint8x16_t bytes[kPixels][2] = {};
        for (; q < end; ++q, w += 4 * kTileChannels) {
          const uint8x16_t w0 = vld1q_u8(w), w1 = vld1q_u8(w + 16);
#pragma GCC unroll 4
          for (int m = 0; m < kPixels; ++m) {
            const uint8x16_t bits = repeat_quad(rows.x[m] + 4 * ptrdiff_t(q));
            bytes[m][0] = vaddq_u8(bytes[m][0], vcntq_u8(veorq_u8(bits, w0)));
            bytes[m][1] = vaddq_u8(bytes[m][1], vcntq_u8(veorq_u8(bits, w1)));
          }
        }
#pragma GCC unroll 4
        for (int m = 0; m < kPixels; ++m)
#pragma GCC unroll 2
          for (int i = 0; i < 2; ++i) differing[m][i] = vpadalq_u16(differing[m][i], vpaddlq_u8(bytes[m][i]));
      }
    }
    store_agreement(p, differing, channel, to + channel);
  }
}

void binary(const Product& p, const uint8_t* const* pixels, int count, int32_t* sums) {
  constexpr Tiles kTiles[kTilePixels] = {binary_tiles<1>, binary_tiles<2>, binary_tiles<3>, binary_tiles<4>};
  in_fours(kTiles, p, pixels, count, sums);
}

}  // namespace

const Isa* neon_isa() {
  static const Isa isa = neon_table("neon", product, binary);
  return &isa;
}

}  // namespace edgeqat
#else
namespace edgeqat {
const Isa* neon_isa() { return nullptr; }
}  // namespace edgeqat
#endif
