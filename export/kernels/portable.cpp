// The inner loops in plain C++: the definition that every instruction set must reproduce bit for bit.
#include <math.h>

#include "isa.hpp"
#include "loops.hpp"

namespace edgeqat {
namespace {

// |x| <= 255, |w| <= 128: a quad adds at most 4·255·128 = 130 560, so 32 bits hold 16 447 quads (65 788 products).
// layer_pack.cpp refuses a layer whose own weights could exceed 2^31 - 1.
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
    for (int o = 0; o < width; ++o) row[o] = row[o] * p.weight_multiplier + p.bias[o];
  }
}

void depthwise(const Depthwise& d, const uint8_t* const* pixels, int count, int32_t* sums) {
  for (int m = 0; m < count; ++m) {
    int32_t* row = sums + m * kBlock;
    for (int c = 0; c < kBlock; ++c) row[c] = d.bias[c];
    for (int t = 0; t < 4 * d.groups; ++t) {
      const uint8_t* x = pixels[m] + d.offsets[t];
      const int8_t* w = d.weights + t * kBlock;
      for (int c = 0; c < kBlock; ++c) row[c] += int32_t(x[c]) * w[c];
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

void largest(const uint8_t* const* from, size_t vectors, size_t count, uint8_t* to) {
  for (size_t i = 0; i < count; ++i) {
    to[i] = 0;
    for (size_t v = 0; v < vectors; ++v) to[i] = to[i] > from[v][i] ? to[i] : from[v][i];
  }
}

void quantize(const float* x, size_t count, float scale, int zero, int low, int high, uint8_t* to) {
  const float lowest = float(low - zero), highest = float(high - zero);
  for (size_t i = 0; i < count; ++i) {
    float code = x[i] / scale;
    code = code > lowest ? code : lowest;  // false for NaN
    to[i] = uint8_t(int(rintf(code < highest ? code : highest)) + zero);
  }
}

void winograd_input(const uint8_t* const* tile, size_t channels, int offset, uint8_t* to, ptrdiff_t plane) {
  for (size_t c = 0; c < channels; ++c) {
    int rows[4][4];
    for (int x = 0; x < 4; ++x) {
      const int d0 = tile[x][c], d1 = tile[4 + x][c], d2 = tile[8 + x][c], d3 = tile[12 + x][c];
      rows[0][x] = d0 - d2;
      rows[1][x] = d1 + d2;
      rows[2][x] = d2 - d1;
      rows[3][x] = d1 - d3;
    }
    for (int y = 0; y < 4; ++y) {
      const int* d = rows[y];
      const int v[4] = {d[0] - d[2], d[1] + d[2], d[2] - d[1], d[1] - d[3]};
      for (int x = 0; x < 4; ++x)
        to[(4 * y + x) * plane + ptrdiff_t(c)] = uint8_t(v[x] + (4 * y + x == 5 ? 0 : offset));
    }
  }
}

void winograd_output(const int32_t* sums, int units, int weight_multiplier, const int32_t* bias,
                     int32_t* const* pixels) {
  constexpr ptrdiff_t plane = kWinogradTiles * kBlock;
  for (int o = 0; o < units * kLanes; ++o) {
    int32_t rows[2][4];
    for (int x = 0; x < 4; ++x) {
      const int32_t* m = sums + x * plane + o;
      rows[0][x] = m[0] + m[4 * plane] + m[8 * plane];
      rows[1][x] = m[4 * plane] - m[8 * plane] - m[12 * plane];
    }
    for (int y = 0; y < 2; ++y) {  // both are multiples of 4, so the division is exact
      pixels[2 * y][o] = (rows[y][0] + rows[y][1] + rows[y][2]) / 4 * weight_multiplier + bias[o];
      pixels[2 * y + 1][o] = (rows[y][1] - rows[y][2] - rows[y][3]) / 4 * weight_multiplier + bias[o];
    }
  }
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

Isa portable_table() {
  Isa isa = {};
  isa.name = "portable";
  for (int units = 1; units <= 4; ++units) isa.max_pixels[units] = 4;
  isa.product = product;
  isa.binary = binary;
  isa.depthwise = depthwise;
  isa.finish = finish;
  isa.pack_bits = pack_bits;
  isa.translate = translate;
  isa.largest = largest;
  isa.quantize = quantize;
  isa.winograd_input = winograd_input;
  isa.winograd_output = winograd_output;
  isa.loops = portable_loops();
  return isa;
}

}  // namespace

const Isa* portable_isa() {
  static const Isa isa = portable_table();
  return &isa;
}

}  // namespace edgeqat
