// Loops over codes on NEON, 16 at a time: tables, largest codes, bits, images.
#pragma once
#include <arm_neon.h>

#include "isa.hpp"

namespace edgeqat {
namespace {

// 16 codes, or the first `count` of them and zeros.
template <bool kFull>
uint8x16_t load_codes(const uint8_t* from, int count) {
  if (kFull) return vld1q_u8(from);
  uint8_t codes[16] = {};
  __builtin_memcpy(codes, from, size_t(count));
  return vld1q_u8(codes);
}

template <bool kFull>
void store_codes(uint8_t* to, uint8x16_t v, int count) {
  if (kFull) return vst1q_u8(to, v);
  uint8_t codes[16];
  vst1q_u8(codes, v);
  __builtin_memcpy(to, codes, size_t(count));
}

// table[codes], for codes up to `highest`. An instruction looks up 64 places; for a code beyond them `tbl` gives 0 and
// `tbx` keeps what was found before.
inline uint8x16_t look_up(const uint8_t* table, int highest, uint8x16_t codes) {
  constexpr int kPlaces = 64;
  uint8x16_t found = vqtbl4q_u8(vld1q_u8_x4(table), codes);
  for (int first = kPlaces; first <= highest; first += kPlaces) {
    codes = vsubq_u8(codes, vdupq_n_u8(kPlaces));
    found = vqtbx4q_u8(found, vld1q_u8_x4(table + first), codes);
  }
  return found;
}

inline void translate(const uint8_t* table, const uint8_t* from, size_t count, uint8_t* to) {
  size_t i = 0;
  for (; i + 16 <= count; i += 16) vst1q_u8(to + i, look_up(table, 255, vld1q_u8(from + i)));
  for (; i < count; ++i) to[i] = table[from[i]];
}

inline void largest(const uint8_t* const* from, size_t vectors, size_t count, uint8_t* to) {
  size_t i = 0;
  for (; i + 16 <= count; i += 16) {
    uint8x16_t best = vdupq_n_u8(0);
    for (size_t v = 0; v < vectors; ++v) best = vmaxq_u8(best, vld1q_u8(from[v] + i));
    vst1q_u8(to + i, best);
  }
  for (; i < count; ++i) {
    to[i] = 0;
    for (size_t v = 0; v < vectors; ++v) to[i] = to[i] > from[v][i] ? to[i] : from[v][i];
  }
}

// Keeps of each byte the bit of its place within eight; pairwise additions gather them.
inline void pack_bits(const uint8_t* codes, size_t count, uint8_t* bits) {
  const uint8x8_t places = {1, 2, 4, 8, 16, 32, 64, 128};
  const uint8x16_t place = vcombine_u8(places, places);
  for (size_t i = 0; i < count; i += 32) {
    uint8x16_t kept[2];
    for (int half = 0; half < 2; ++half) {
      const int8x16_t sixteen = vreinterpretq_s8_u8(vld1q_u8(codes + i + 16 * size_t(half)));
      kept[half] = vandq_u8(vcltzq_s8(sixteen), place);
    }
    const uint8x16_t pairs = vpaddq_u8(kept[0], kept[1]);
    const uint8x16_t fours = vpaddq_u8(pairs, pairs);
    const uint8x16_t eights = vpaddq_u8(fours, fours);
    vst1q_lane_u32(reinterpret_cast<uint32_t*>(bits + i / 8), vreinterpretq_u32_u8(eights), 0);
  }
}

// vmaxnm gives the bound where a code is not a number.
inline void quantize(const float* x, size_t count, float scale, int zero, int low, int high, uint8_t* to) {
  const float32x4_t step = vdupq_n_f32(scale);
  const float32x4_t lowest = vdupq_n_f32(float(low - zero)), highest = vdupq_n_f32(float(high - zero));
  const int32x4_t zeros = vdupq_n_s32(zero);
  for (size_t i = 0; i < count; i += 8) {
    float values[8] = {};
    const size_t some = count - i < 8 ? count - i : 8;
    if (some < 8) __builtin_memcpy(values, x + i, some * sizeof(float));
    const float* from = some < 8 ? values : x + i;
    int16x4_t codes[2];
    for (int half = 0; half < 2; ++half) {
      const float32x4_t code = vdivq_f32(vld1q_f32(from + 4 * half), step);
      const float32x4_t clipped = vminq_f32(vmaxnmq_f32(code, lowest), highest);
      codes[half] = vmovn_s32(vaddq_s32(vcvtnq_s32_f32(clipped), zeros));
    }
    const uint8x8_t bytes = vmovn_u16(vreinterpretq_u16_s16(vcombine_s16(codes[0], codes[1])));
    if (some == 8) {
      vst1_u8(to + i, bytes);
      continue;
    }
    uint8_t last[8];
    vst1_u8(last, bytes);
    __builtin_memcpy(to + i, last, some);
  }
}

inline void interleave_three(const uint8_t* planes, size_t count, uint8_t* to) {
  const uint8_t *red = planes, *green = planes + count, *blue = planes + 2 * count;
  size_t i = 0;
  for (; i + 16 <= count; i += 16) {
    const uint8x16x3_t colours = {{vld1q_u8(red + i), vld1q_u8(green + i), vld1q_u8(blue + i)}};
    vst3q_u8(to + 3 * i, colours);
  }
  for (; i < count; ++i) {
    to[3 * i] = red[i];
    to[3 * i + 1] = green[i];
    to[3 * i + 2] = blue[i];
  }
}

}  // namespace
}  // namespace edgeqat
