// NEON with 8-bit matrix products: `smmla` multiplies 2 pixels × 8 codes with 8 codes × 2 channels.
#include "isa.hpp"
#if defined(__aarch64__) && defined(__linux__) && defined(__ARM_FEATURE_MATMUL_INT8)
#include <sys/auxv.h>

#include "neon.hpp"
#include "neon_binary_dotprod.hpp"

namespace edgeqat {
namespace {

constexpr unsigned long kHasMatrixProduct = 1ul << 13;  // HWCAP2_I8MM
constexpr int kChannelPairs = kTileChannels / 2;

// Sums of kPixels × 8 channels, pixels and channels in pairs: (p, c), (p, c + 1), (p + 1, c), (p + 1, c + 1). An odd
// pixel stands twice in the last pair.
template <int kPixels>
struct PairedSums {
  static constexpr int kPairs = (kPixels + 1) / 2;
  int32x4_t part[kPairs][kChannelPairs];

  explicit PairedSums(const int32_t* bias) {
#pragma GCC unroll 4
    for (int c = 0; c < kChannelPairs; ++c) {
      const int32x2_t two = vld1_s32(bias + 2 * c);
#pragma GCC unroll 4
      for (int m = 0; m < kPairs; ++m) part[m][c] = vcombine_s32(two, two);
    }
  }

  Sums<kPixels> by_pixel() const {
    Sums<kPixels> found;
#pragma GCC unroll 8
    for (int m = 0; m < kPixels; ++m)
#pragma GCC unroll 2
      for (int i = 0; i < 2; ++i) {
        const int64x2_t left = vreinterpretq_s64_s32(part[m / 2][2 * i]);
        const int64x2_t right = vreinterpretq_s64_s32(part[m / 2][2 * i + 1]);
        found.part[m][i] = vreinterpretq_s32_s64(m % 2 ? vzip2q_s64(left, right) : vzip1q_s64(left, right));
      }
    return found;
  }
};

template <bool kCentred>
int8x16_t centred(int8x16_t codes) {
  return kCentred ? veorq_s8(codes, vdupq_n_s8(-128)) : codes;
}

// Adds eight codes of every pixel; codes[m] has those of a pair of pixels.
template <int kPixels>
void add_eight(const int8x16_t* codes, const int8_t*& w, PairedSums<kPixels>& sums) {
#pragma GCC unroll 4
  for (int c = 0; c < kChannelPairs; ++c, w += 16) {
    const int8x16_t weights = vld1q_s8(w);
#pragma GCC unroll 4
    for (int m = 0; m < sums.kPairs; ++m) sums.part[m][c] = vmmlaq_s32(sums.part[m][c], codes[m], weights);
  }
}

// The second pixel of a pair, or the first where there is no second.
template <int kPixels>
int second_of(int pair) {
  return 2 * pair + 1 < kPixels ? 2 * pair + 1 : 2 * pair;
}

template <int kPixels, bool kCentred>
void add_sixteen(const Rows<kPixels>& rows, ptrdiff_t at, const int8_t*& w, PairedSums<kPixels>& sums) {
  int8x16_t low[sums.kPairs], high[sums.kPairs];
#pragma GCC unroll 4
  for (int m = 0; m < sums.kPairs; ++m) {
    const int64x2_t first = vreinterpretq_s64_s8(centred<kCentred>(load_quads<4>(rows.x[2 * m] + at)));
    const int64x2_t second = vreinterpretq_s64_s8(centred<kCentred>(load_quads<4>(rows.x[second_of<kPixels>(m)] + at)));
    low[m] = vreinterpretq_s8_s64(vzip1q_s64(first, second));
    high[m] = vreinterpretq_s8_s64(vzip2q_s64(first, second));
  }
  add_eight<kPixels>(low, w, sums);
  add_eight<kPixels>(high, w, sums);
}

template <int kPixels, bool kCentred>
void add_one_eight(const Rows<kPixels>& rows, ptrdiff_t at, const int8_t*& w, PairedSums<kPixels>& sums) {
  int8x16_t codes[sums.kPairs];
#pragma GCC unroll 4
  for (int m = 0; m < sums.kPairs; ++m) {
    const uint8x8_t first = vld1_u8(rows.x[2 * m] + at), second = vld1_u8(rows.x[second_of<kPixels>(m)] + at);
    codes[m] = centred<kCentred>(vreinterpretq_s8_u8(vcombine_u8(first, second)));
  }
  add_eight<kPixels>(codes, w, sums);
}

// A stretch's odd quad: weights are widened to eight with zeros, so that the codes beside the four may be anything.
template <int kPixels, bool kCentred>
void add_quad(const Rows<kPixels>& rows, ptrdiff_t at, const int8_t*& w, PairedSums<kPixels>& sums) {
  int8x16_t codes[sums.kPairs];
#pragma GCC unroll 4
  for (int m = 0; m < sums.kPairs; ++m) {
    const int8x16_t first = centred<kCentred>(load_quads<1>(rows.x[2 * m] + at));
    const int8x16_t second = centred<kCentred>(load_quads<1>(rows.x[second_of<kPixels>(m)] + at));
    codes[m] = vcombine_s8(vget_low_s8(first), vget_low_s8(second));
  }
#pragma GCC unroll 4
  for (int c = 0; c < kChannelPairs; ++c, w += 8) {
    const uint32x2_t two = vreinterpret_u32_s8(vld1_s8(w));  // four weights of each of two channels
    const int8x16_t weights = vreinterpretq_s8_u64(vmovl_u32(two));
#pragma GCC unroll 4
    for (int m = 0; m < sums.kPairs; ++m) sums.part[m][c] = vmmlaq_s32(sums.part[m][c], codes[m], weights);
  }
}

template <int kPixels, bool kCentred>
void product_tiles(const Product& p, const uint8_t* const* pixels, int32_t* to) {
  const ptrdiff_t bytes = 4 * ptrdiff_t(p.stretches.quads);
  const int8_t* w = p.weights;
  for (int channel = 0; channel < p.units * kLanes; channel += kTileChannels) {
    PairedSums<kPixels> sums(p.bias + channel);
    for (int r = 0; r < p.stretches.runs; ++r) {
      const Rows<kPixels> rows(pixels, p.stretches.offsets[r]);
      ptrdiff_t at = 0;
      for (; at + 16 <= bytes; at += 16) add_sixteen<kPixels, kCentred>(rows, at, w, sums);
      if (bytes & 8) {
        add_one_eight<kPixels, kCentred>(rows, at, w, sums);
        at += 8;
      }
      if (bytes & 4) add_quad<kPixels, kCentred>(rows, at, w, sums);
    }
    sums.by_pixel().store(to + channel);
  }
}

void product(const Product& p, const uint8_t* const* pixels, int count, int32_t* sums) {
#define TILES(centred)                                                                                             \
  {                                                                                                                \
    product_tiles<1, centred>, product_tiles<2, centred>, product_tiles<3, centred>, product_tiles<4, centred>,    \
        product_tiles<5, centred>, product_tiles<6, centred>, product_tiles<7, centred>, product_tiles<8, centred> \
  }
  constexpr Tiles kSigned[kMaxPixels] = TILES(false), kCentred[kMaxPixels] = TILES(true);
#undef TILES
  (p.codes_below_128 ? kSigned : kCentred)[count - 1](p, pixels, sums);
}

}  // namespace

const Isa* neon_i8mm_isa() {
  static const Isa isa = [] {
    Isa made = neon_table("neon-i8mm", product, binary);
    made.prescales = 1;
    made.quad_pairs = 1;
    return made;
  }();
  return getauxval(AT_HWCAP2) & kHasMatrixProduct ? &isa : nullptr;
}

}  // namespace edgeqat
#else
namespace edgeqat {
const Isa* neon_i8mm_isa() { return nullptr; }
}  // namespace edgeqat
#endif
