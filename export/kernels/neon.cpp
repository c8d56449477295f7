// NEON as every 64-bit ARM has it: `smlal` adds eight products to 16-bit lanes, as many as fit, before they are
// widened.
#include "isa.hpp"
#if defined(__aarch64__)
#include "neon.hpp"

namespace edgeqat {
namespace {

// Pixels of a tile: with 8 channels their 16-bit sums, two lanes of 4 a channel, take 16 registers.
constexpr int kTilePixels = 4;
// Differing bits in bytes: a step adds at most 8, so that 31 steps stay within 255;
// 28 are whole vectors of codes.
constexpr int kBinarySteps = 28;

// Quads whose products x·w a 16-bit lane holds. p.narrow_steps pairs of products of codes up to input_high do
// (layer_pack.cpp), so do twice as many single ones; |x - 128| <= 128 where codes reach 128, and one always fits.
int steps_of(const Product& p) {
  const int steps = p.codes_below_128 ? 2 * p.narrow_steps : 3 * p.narrow_steps;
  return steps > 1 ? steps : 1;
}

// 16-bit sums of every pixel; lanes 4·i to 4·i + 3 of a pair of vectors are channel i's.
template <int kPixels>
struct NarrowSums {
  int16x8_t part[kPixels][4] = {};
};

// Adds kQuads quads of every pixel. A vector of codes is loaded once for all its quads.
template <int kQuads, int kPixels, bool kCentred>
void add_quads(const Rows<kPixels>& rows, ptrdiff_t at, const int8_t*& w, NarrowSums<kPixels>& sums) {
  int32x4_t codes[kPixels];
#pragma GCC unroll 4
  for (int m = 0; m < kPixels; ++m) {
    const int8x16_t loaded = load_quads<kQuads>(rows.x[m] + at);
    codes[m] = vreinterpretq_s32_s8(kCentred ? veorq_s8(loaded, vdupq_n_s8(-128)) : loaded);
  }
#define ADD_QUAD(lane)                                                              \
  if (lane < kQuads) {                                                              \
    const int8x16_t w0 = vld1q_s8(w), w1 = vld1q_s8(w + 16);                        \
    w += 4 * kTileChannels;                                                         \
    _Pragma("GCC unroll 4") for (int m = 0; m < kPixels; ++m) {                     \
      const int8x16_t quad = vreinterpretq_s8_s32(vdupq_laneq_s32(codes[m], lane)); \
      int16x8_t* part = sums.part[m];                                               \
      part[0] = vmlal_s8(part[0], vget_low_s8(quad), vget_low_s8(w0));              \
      part[1] = vmlal_high_s8(part[1], quad, w0);                                   \
      part[2] = vmlal_s8(part[2], vget_low_s8(quad), vget_low_s8(w1));              \
      part[3] = vmlal_high_s8(part[3], quad, w1);                                   \
    }                                                                               \
  }
  ADD_QUAD(0)
  ADD_QUAD(1)
  ADD_QUAD(2)
  ADD_QUAD(3)
#undef ADD_QUAD
}

// Adds `quads` quads of every pixel in 16 bits, then what they make in 32.
template <int kPixels, bool kCentred>
void add_stretch(const Rows<kPixels>& rows, ptrdiff_t at, int quads, const int8_t*& w, Sums<kPixels>& sums) {
  NarrowSums<kPixels> narrow;
  for (; quads >= 4; quads -= 4, at += 16) add_quads<4, kPixels, kCentred>(rows, at, w, narrow);
  if (quads & 2) {
    add_quads<2, kPixels, kCentred>(rows, at, w, narrow);
    at += 8;
  }
  if (quads & 1) add_quads<1, kPixels, kCentred>(rows, at, w, narrow);
#pragma GCC unroll 4
  for (int m = 0; m < kPixels; ++m)
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
      const int32x4_t low = vpaddlq_s16(narrow.part[m][2 * i]), high = vpaddlq_s16(narrow.part[m][2 * i + 1]);
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
        add_stretch<kPixels, kCentred>(rows, 4 * ptrdiff_t(q), some, w, sums);
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

// Counts differing bits of kQuads quads of every pixel in bytes.
template <int kQuads, int kPixels>
void count_quads(const Rows<kPixels>& rows, ptrdiff_t at, const int8_t*& w, uint8x16_t (&differing)[kPixels][2]) {
  uint32x4_t codes[kPixels];
#pragma GCC unroll 4
  for (int m = 0; m < kPixels; ++m) codes[m] = vreinterpretq_u32_s8(load_quads<kQuads>(rows.x[m] + at));
#define COUNT_QUAD(lane)                                                                                \
  if (lane < kQuads) {                                                                                  \
    const uint8x16_t w0 = vreinterpretq_u8_s8(vld1q_s8(w)), w1 = vreinterpretq_u8_s8(vld1q_s8(w + 16)); \
    w += 4 * kTileChannels;                                                                             \
    _Pragma("GCC unroll 4") for (int m = 0; m < kPixels; ++m) {                                         \
      const uint8x16_t bits = vreinterpretq_u8_u32(vdupq_laneq_u32(codes[m], lane));                    \
      differing[m][0] = vaddq_u8(differing[m][0], vcntq_u8(veorq_u8(bits, w0)));                        \
      differing[m][1] = vaddq_u8(differing[m][1], vcntq_u8(veorq_u8(bits, w1)));                        \
    }                                                                                                   \
  }
  COUNT_QUAD(0)
  COUNT_QUAD(1)
  COUNT_QUAD(2)
  COUNT_QUAD(3)
#undef COUNT_QUAD
}

template <int kPixels>
void binary_tiles(const Product& p, const uint8_t* const* pixels, int32_t* to) {
  const int8_t* w = p.weights;
  for (int channel = 0; channel < p.units * kLanes; channel += kTileChannels) {
    uint32x4_t differing[kPixels][2] = {};
    for (int r = 0; r < p.stretches.runs; ++r) {
      const Rows<kPixels> rows(pixels, p.stretches.offsets[r]);
      ptrdiff_t at = 0;
      for (int left = p.stretches.quads; left > 0; left -= kBinarySteps) {
        uint8x16_t bytes[kPixels][2] = {};
        int quads = left < kBinarySteps ? left : kBinarySteps;
        for (; quads >= 4; quads -= 4, at += 16) count_quads<4, kPixels>(rows, at, w, bytes);
        for (; quads > 0; --quads, at += 4) count_quads<1, kPixels>(rows, at, w, bytes);
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
