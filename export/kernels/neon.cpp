// NEON as every 64-bit ARM has it: narrow codes stay in 16-bit sums, wide ones are widened before they are multiplied.
#include "isa.hpp"
#if defined(__aarch64__)
#include "neon.hpp"

namespace edgeqat {
namespace {

// Adds one stretch for 4 channels. vmlal_s8 adds one product x·w to a 16-bit lane; p.narrow_steps pairs of products fit
// 16 bits (layer_pack.cpp), so as many single ones do. The codes are taken for signed bytes: only for codes below 128.
int32x4_t narrow(const uint8_t* x, const int8_t* w, ptrdiff_t stride, int quads, int steps, int32x4_t sum) {
  for (int q = 0; q < quads;) {
    const int end = quads - q < steps ? quads : q + steps;
    int16x8_t low = vdupq_n_s16(0), high = vdupq_n_s16(0);
    for (; q < end; ++q, w += stride) {
      const int8x8_t codes = vreinterpret_s8_u32(vdup_n_u32(four_bytes(x + 4 * ptrdiff_t(q))));
      const int8x16_t weights = vld1q_s8(w);
      low = vmlal_s8(low, codes, vget_low_s8(weights));
      high = vmlal_s8(high, codes, vget_high_s8(weights));
    }
    // four lanes of 16 bits are one channel
    sum = vaddq_s32(sum, vpaddq_s32(vpaddlq_s16(low), vpaddlq_s16(high)));
  }
  return sum;
}

int32x4_t wide(const uint8_t* x, const int8_t* w, ptrdiff_t stride, int quads, int32x4_t sum) {
  int32x4_t parts[4] = {vdupq_n_s32(0), vdupq_n_s32(0), vdupq_n_s32(0), vdupq_n_s32(0)};
  for (int q = 0; q < quads; ++q, w += stride) {
    const uint16x8_t both = vmovl_u8(vreinterpret_u8_u32(vdup_n_u32(four_bytes(x + 4 * ptrdiff_t(q)))));
    const int16x4_t codes = vget_low_s16(vreinterpretq_s16_u16(both));
    const int8x16_t weights = vld1q_s8(w);
    const int16x8_t low = vmovl_s8(vget_low_s8(weights)), high = vmovl_s8(vget_high_s8(weights));
    parts[0] = vmlal_s16(parts[0], codes, vget_low_s16(low));
    parts[1] = vmlal_s16(parts[1], codes, vget_high_s16(low));
    parts[2] = vmlal_s16(parts[2], codes, vget_low_s16(high));
    parts[3] = vmlal_s16(parts[3], codes, vget_high_s16(high));
  }
  return vaddq_s32(sum, vpaddq_s32(vpaddq_s32(parts[0], parts[1]), vpaddq_s32(parts[2], parts[3])));
}

void product(const Product& p, const uint8_t* const* pixels, int count, int32_t* sums) {
  constexpr int kFewSteps = 8;
  const ptrdiff_t stride = 64 * ptrdiff_t(p.units);
  for (int m = 0; m < count; ++m)
    for (int c = 0; c < p.units * kLanes; c += kQuarter) {
      int32x4_t sum = vdupq_n_s32(0);
      for (int r = 0; r < p.stretches.runs; ++r) {
        const uint8_t* x = pixels[m] + p.stretches.offsets[r];
        const int8_t* w = p.weights + ptrdiff_t(r) * p.stretches.quads * stride + 4 * c;
        sum = p.narrow_steps >= kFewSteps && p.codes_below_128
                  ? narrow(x, w, stride, p.stretches.quads, p.narrow_steps, sum)
                  : wide(x, w, stride, p.stretches.quads, sum);
      }
      store_sums(p, c, sum, sums + m * kBlock + c);
    }
}

}  // namespace

const Isa* neon_isa() {
  static const Isa isa = neon_table("neon", product);
  return &isa;
}

}  // namespace edgeqat
#else
namespace edgeqat {
const Isa* neon_isa() { return nullptr; }
}  // namespace edgeqat
#endif
