// The inner loops in plain C++: the definition that every instruction set must reproduce bit for bit.
#include <math.h>

#include "isa.hpp"

namespace edgeqat {
namespace {

// |x| <= 255, |w| <= 128: a quad adds at most 4·255·128 = 130 560, so 32 bits hold 16 447 quads (65 788 products).
// layer.cpp refuses a layer whose own weights could exceed 2^31 - 1.
void product(const Product& p, const uint8_t* const* pixels, int count, int32_t* sums) {
  const int width = p.units * kLanes;
  for (int m = 0; m < count; ++m) {
    int32_t* row = sums + m * kBlock;
    for (int o = 0; o < width; ++o) row[o] = 0;
    const int8_t* w = p.weights;
    for (int r = 0; r < p.stretches.runs; ++r) {
      const uint8_t* x = pixels[m] + p.stretches.offsets[r];
      for (int q = 0; q < p.stretches.quads; ++q, x += 4, w += 4 * width)
        for (int o = 0; o < width; ++o)
          for (int k = 0; k < 4; ++k) row[o] += int32_t(x[k]) * w[4 * o + k];
    }
    for (int o = 0; o < width; ++o) row[o] = row[o] * (1 << p.carry_shift) + p.bias[o];
  }
}

void depthwise(const Depthwise& d, const uint8_t* const* pixels, int count, int32_t* sums) {
  for (int m = 0; m < count; ++m) {
    int32_t* row = sums + m * kBlock;
    for (int c = 0; c < kBlock; ++c) row[c] = d.bias[c];
    for (int t = 0; t < 4 * d.groups; ++t) {
      const uint8_t* x = pixels[m] + d.offsets[t];
      const int8_t* w = d.weights + (t / 4) * 4 * kBlock + t % 4;
      for (int c = 0; c < kBlock; ++c) row[c] += int32_t(x[c]) * w[4 * c];
    }
  }
}

float clamp(float x, int low, int high) {
  const float lowest = float(low), highest = float(high);
  return x < lowest ? lowest : x > highest ? highest : x;
}

// The bounds are integers, so clipping before rounding is clipping after it, and the conversion cannot overflow.
void finish(const Epilogue& e, const int32_t* sums, int count, int width) {
  for (int m = 0; m < count; ++m) {
    const ptrdiff_t at = m * e.stride;
    for (int c = 0; c < width; ++c) {
      const float value = float(sums[m * kBlock + c]) * e.multiplier[c];
      if (e.real) {
        e.real[at + c] = value;
        continue;
      }
      float code = rintf(clamp(value, e.low - e.zero, e.high - e.zero)) + float(e.zero);
      if (e.own) e.own[at + c] = uint8_t(int(code));
      if (e.other) {
        const float other = float(e.other[at + c]);
        const float first = e.other_first ? other : code, second = e.other_first ? code : other;
        const float sum = fmaf(first, e.ratio_first, fmaf(second, e.ratio_second, e.offset));
        code = rintf(clamp(sum, e.sum_low, e.sum_high));
        if (e.sum) e.sum[at + c] = uint8_t(int(code));
      }
      for (int t = 0; t < e.tables; ++t)
        if (e.copy[t]) e.copy[t][at + c] = e.table[t][int(code)];
    }
  }
}

void pack_bits(const uint8_t* codes, size_t count, uint8_t* bits) {
  for (size_t i = 0; i < count; i += 8) {
    unsigned byte = 0;
    for (int k = 0; k < 8; ++k) byte |= unsigned(codes[i + k] >> 7) << k;
    bits[i / 8] = uint8_t(byte);
  }
}

void translate(const uint8_t* table, const uint8_t* from, size_t count, uint8_t* to) {
  for (size_t i = 0; i < count; ++i) to[i] = table[from[i]];
}

// Stretches of bits, 32 to a quad: x and w agree in a bit where both are +1 or both are -1, and with d bits different
// Σ x·w = K - 2d. `bias` holds gain · K already.
void binary(const Product& p, const uint8_t* const* pixels, int count, int32_t* sums) {
  const int width = p.units * kLanes;
  for (int m = 0; m < count; ++m) {
    int32_t* row = sums + m * kBlock;
    for (int o = 0; o < width; ++o) row[o] = 0;
    const uint8_t* w = reinterpret_cast<const uint8_t*>(p.weights);
    for (int r = 0; r < p.stretches.runs; ++r) {
      const uint8_t* x = pixels[m] + p.stretches.offsets[r];
      for (int q = 0; q < p.stretches.quads; ++q, x += 4, w += 4 * width)
        for (int o = 0; o < width; ++o)
          for (int k = 0; k < 4; ++k) row[o] += __builtin_popcount(unsigned(x[k] ^ w[4 * o + k]));
    }
    for (int o = 0; o < width; ++o) row[o] = p.bias[o] - 2 * p.binary_gain * row[o];
  }
}

const Isa kPortable = {"portable", {0, 4, 4, 4, 4}, product, binary, depthwise, finish, pack_bits, translate, 0, 0};

}  // namespace

const Isa* portable_isa() { return &kPortable; }

}  // namespace edgeqat
