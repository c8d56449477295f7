// AVX-512 with VNNI: products of any width on vpdpbusd (exact: it widens before it adds), one bit on xor and vpopcntd.
#if defined(__x86_64__) && defined(__AVX512VNNI__) && defined(__AVX512VBMI__) && defined(__AVX512VPOPCNTDQ__)
#include <immintrin.h>

#include "isa.hpp"
#include "loops.hpp"

namespace edgeqat {
namespace {

// 32-bit lanes: layer.cpp has shown that bias + Σ |w·x| stays below 2^31 for the layer's own weights.
template <int kUnits, int kPixels>
void product_tile(const Product& p, const uint8_t* const* pixels, int32_t* sums) {
  __m512i sum[kPixels][kUnits];
#pragma GCC unroll 8
  for (int u = 0; u < kUnits; ++u) {
    const __m512i bias = _mm512_loadu_si512(p.bias + u * kLanes);
#pragma GCC unroll 8
    for (int m = 0; m < kPixels; ++m) sum[m][u] = bias;
  }
  const int8_t* w = p.weights;
  const char* ahead = reinterpret_cast<const char*>(p.ahead);
  for (int r = 0; r < p.stretches.runs; ++r) {
    const ptrdiff_t offset = p.stretches.offsets[r];
    const uint8_t* x[kPixels];
#pragma GCC unroll 8
    for (int m = 0; m < kPixels; ++m) x[m] = pixels[m] + offset;
    for (ptrdiff_t q = 0; q < 4 * ptrdiff_t(p.stretches.quads); q += 4, w += 64 * kUnits) {
      // A layer's weights may be larger than the caches next to the processor: its own prefetcher waits until they are
      // read.
      if (kUnits == 4) {
        _mm_prefetch(ahead, _MM_HINT_T1);
        _mm_prefetch(ahead + 64, _MM_HINT_T1);
        ahead += 128;
      }
      __m512i weights[kUnits];
#pragma GCC unroll 8
      for (int u = 0; u < kUnits; ++u) weights[u] = _mm512_load_si512(w + 64 * u);
#pragma GCC unroll 8
      for (int m = 0; m < kPixels; ++m) {
        int32_t four;
        __builtin_memcpy(&four, x[m] + q, 4);
        const __m512i codes = _mm512_set1_epi32(four);
#pragma GCC unroll 8
        for (int u = 0; u < kUnits; ++u) sum[m][u] = _mm512_dpbusd_epi32(sum[m][u], codes, weights[u]);
      }
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < kPixels; ++m)
#pragma GCC unroll 8
    for (int u = 0; u < kUnits; ++u) _mm512_store_si512(sums + m * kBlock + u * kLanes, sum[m][u]);
}

// A lane counts the differing bits of 32 products a quad; layer.cpp bounds gain · K by 2^31.
template <int kUnits, int kPixels>
void binary_tile(const Product& p, const uint8_t* const* pixels, int32_t* sums) {
  __m512i sum[kPixels][kUnits];
#pragma GCC unroll 8
  for (int u = 0; u < kUnits; ++u)
#pragma GCC unroll 8
    for (int m = 0; m < kPixels; ++m) sum[m][u] = _mm512_setzero_si512();
  const int8_t* w = p.weights;
  for (int r = 0; r < p.stretches.runs; ++r) {
    const ptrdiff_t offset = p.stretches.offsets[r];
    const uint8_t* x[kPixels];
#pragma GCC unroll 8
    for (int m = 0; m < kPixels; ++m) x[m] = pixels[m] + offset;
    for (ptrdiff_t q = 0; q < 4 * ptrdiff_t(p.stretches.quads); q += 4, w += 64 * kUnits) {
      __m512i weights[kUnits];
#pragma GCC unroll 8
      for (int u = 0; u < kUnits; ++u) weights[u] = _mm512_load_si512(w + 64 * u);
#pragma GCC unroll 8
      for (int m = 0; m < kPixels; ++m) {
        int32_t bits;
        __builtin_memcpy(&bits, x[m] + q, 4);
        const __m512i codes = _mm512_set1_epi32(bits);
#pragma GCC unroll 8
        for (int u = 0; u < kUnits; ++u)
          sum[m][u] = _mm512_add_epi32(sum[m][u], _mm512_popcnt_epi32(_mm512_xor_si512(codes, weights[u])));
      }
    }
  }
  const __m512i gain = _mm512_set1_epi32(2 * p.binary_gain);
#pragma GCC unroll 8
  for (int u = 0; u < kUnits; ++u) {
    const __m512i bias = _mm512_loadu_si512(p.bias + u * kLanes);
#pragma GCC unroll 8
    for (int m = 0; m < kPixels; ++m)
      _mm512_store_si512(sums + m * kBlock + u * kLanes, _mm512_sub_epi32(bias, _mm512_mullo_epi32(sum[m][u], gain)));
  }
}

// Entry [a][w]: three products of the codes in a with the weights in w, lifted by 18 so that none is negative.
struct Triples {
  alignas(64) uint8_t sum[64][64] = {};
  constexpr Triples() {
    for (int a = 0; a < 64; ++a)
      for (int w = 0; w < 64; ++w) {
        int total = 18;
        for (int i = 0; i < 6; i += 2) total += (a >> i & 3) * ((w >> i & 3) - 2);
        sum[a][w] = uint8_t(total);
      }
  }
};
constexpr Triples kTriples;

// Nine entries, each at most 27, stay below 256; Layer::pack_lookup keeps the whole sum below 65,536.
template <int kPixels>
void lookup_tile(const Product& p, const uint8_t* const* pixels, int32_t* sums) {
  const uint8_t* table = kTriples.sum[0];
  const __m512i low_bytes = _mm512_set1_epi16(0xff);
  __m512i even[kPixels] = {}, odd[kPixels] = {};
  const int8_t* w = p.weights;
  for (int r = 0; r < p.stretches.runs; ++r) {
    const uint8_t* x[kPixels];
#pragma GCC unroll 8
    for (int m = 0; m < kPixels; ++m) x[m] = pixels[m] + p.stretches.offsets[r];
    for (ptrdiff_t q = 0; q < p.stretches.quads;) {
      const ptrdiff_t end = p.stretches.quads - q < 9 ? p.stretches.quads : q + 9;
      __m512i narrow[kPixels] = {};
#pragma GCC unroll 3
      for (; q < end; ++q, w += 64) {
        const __m512i weights = _mm512_load_si512(w);
#pragma GCC unroll 8
        for (int m = 0; m < kPixels; ++m) {
          uint16_t row;
          __builtin_memcpy(&row, x[m] + 2 * q, 2);
          narrow[m] = _mm512_add_epi8(narrow[m], _mm512_permutexvar_epi8(weights, _mm512_load_si512(table + row)));
        }
      }
#pragma GCC unroll 8
      for (int m = 0; m < kPixels; ++m) {
        even[m] = _mm512_add_epi16(even[m], _mm512_and_si512(narrow[m], low_bytes));
        odd[m] = _mm512_add_epi16(odd[m], _mm512_srli_epi16(narrow[m], 8));
      }
    }
  }
  const __m512i lift = _mm512_set1_epi32(18 * p.stretches.runs * p.stretches.quads);
  const __m512i weight_multiplier = _mm512_set1_epi32(p.weight_multiplier);
#pragma GCC unroll 8
  for (int m = 0; m < kPixels; ++m) {
    const __m256i parts[4] = {_mm512_castsi512_si256(even[m]), _mm512_extracti64x4_epi64(even[m], 1),
                              _mm512_castsi512_si256(odd[m]), _mm512_extracti64x4_epi64(odd[m], 1)};
#pragma GCC unroll 4
    for (int u = 0; u < 4; ++u) {
      const __m512i sum =
          _mm512_mullo_epi32(_mm512_sub_epi32(_mm512_cvtepu16_epi32(parts[u]), lift), weight_multiplier);
      _mm512_store_si512(sums + m * kBlock + u * kLanes,
                         _mm512_add_epi32(sum, _mm512_loadu_si512(p.bias + u * kLanes)));
    }
  }
}

using Tile = void (*)(const Product&, const uint8_t* const*, int32_t*);

#define ROW(tile, units)                                           \
  {tile<units, 1>, tile<units, 2>, tile<units, 3>, tile<units, 4>, \
   tile<units, 5>, tile<units, 6>, tile<units, 7>, tile<units, 8>}
constexpr Tile kProducts[4][kMaxPixels] = {
    ROW(product_tile, 1),
    ROW(product_tile, 2),
    ROW(product_tile, 3),
    {product_tile<4, 1>, product_tile<4, 2>, product_tile<4, 3>, product_tile<4, 4>, product_tile<4, 5>,
     product_tile<4, 6>, nullptr, nullptr}};
constexpr Tile kBinaries[4][kMaxPixels] = {ROW(binary_tile, 1),
                                           ROW(binary_tile, 2),
                                           ROW(binary_tile, 3),
                                           {binary_tile<4, 1>, binary_tile<4, 2>, binary_tile<4, 3>, binary_tile<4, 4>,
                                            binary_tile<4, 5>, binary_tile<4, 6>, nullptr, nullptr}};
#undef ROW

void product(const Product& p, const uint8_t* const* pixels, int count, int32_t* sums) {
  kProducts[p.units - 1][count - 1](p, pixels, sums);
}

void binary(const Product& p, const uint8_t* const* pixels, int count, int32_t* sums) {
  kBinaries[p.units - 1][count - 1](p, pixels, sums);
}

void lookup(const Product& p, const uint8_t* const* pixels, int count, int32_t* sums) {
  constexpr Tile kTiles[kMaxPixels] = {lookup_tile<1>, lookup_tile<2>, lookup_tile<3>, lookup_tile<4>,
                                       lookup_tile<5>, lookup_tile<6>, lookup_tile<7>, lookup_tile<8>};
  kTiles[count - 1](p, pixels, sums);
}

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
void interleave(const uint8_t* x, const ptrdiff_t* at, __m512i* quads) {
  const __m512i a = _mm512_loadu_si512(x + at[0]), b = _mm512_loadu_si512(x + at[1]);
  const __m512i c = _mm512_loadu_si512(x + at[2]), d = _mm512_loadu_si512(x + at[3]);
  const __m512i ab_low = _mm512_unpacklo_epi8(a, b), ab_high = _mm512_unpackhi_epi8(a, b);
  const __m512i cd_low = _mm512_unpacklo_epi8(c, d), cd_high = _mm512_unpackhi_epi8(c, d);
  quads[0] = _mm512_unpacklo_epi16(ab_low, cd_low);
  quads[1] = _mm512_unpackhi_epi16(ab_low, cd_low);
  quads[2] = _mm512_unpacklo_epi16(ab_high, cd_high);
  quads[3] = _mm512_unpackhi_epi16(ab_high, cd_high);
}

void multiply_group(const __m512i* quads, const int8_t* w, __m512i* sum) {
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) sum[j] = _mm512_dpbusd_epi32(sum[j], quads[j], _mm512_load_si512(w + 64 * j));
}

void store_ordered(const __m512i* sum, const int32_t* bias, int32_t* to) {
  __m512i ordered[4];
  transpose_lanes(sum, ordered);
#pragma GCC unroll 4
  for (int u = 0; u < 4; ++u)
    _mm512_store_si512(to + u * kLanes, _mm512_add_epi32(ordered[u], _mm512_loadu_si512(bias + u * kLanes)));
}

// Three groups, each shared by three pixels: one column of taps is interleaved once.
void shared_depthwise(const Depthwise& d, const uint8_t* const* pixels, int count, int32_t* sums) {
  constexpr ptrdiff_t group = kBlock * 4;
  __m512i first[4] = {}, second[4] = {}, quads[4];
  interleave(pixels[0], d.offsets, quads);
  multiply_group(quads, d.weights, first);
  interleave(pixels[0], d.offsets + 4, quads);
  multiply_group(quads, d.weights + group, first);
  multiply_group(quads, d.weights, second);
  for (int m = 0; m < count; ++m) {
    __m512i third[4] = {};
    interleave(pixels[m], d.offsets + 8, quads);
    multiply_group(quads, d.weights + 2 * group, first);
    multiply_group(quads, d.weights + group, second);
    multiply_group(quads, d.weights, third);
    store_ordered(first, d.bias, sums + m * kBlock);
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      first[j] = second[j];
      second[j] = third[j];
    }
  }
}

void depthwise(const Depthwise& d, const uint8_t* const* pixels, int count, int32_t* sums) {
  if (d.shares && d.groups == 3) return shared_depthwise(d, pixels, count, sums);
  for (int m = 0; m < count; ++m) {
    __m512i sum[4] = {}, quads[4];
    for (int g = 0; g < d.groups; ++g) {
      interleave(pixels[m], d.offsets + 4 * g, quads);
      multiply_group(quads, d.weights + g * kBlock * 4, sum);
    }
    store_ordered(sum, d.bias, sums + m * kBlock);
  }
}

__mmask64 first_bytes(size_t count) { return count >= 64 ? ~__mmask64(0) : (__mmask64(1) << count) - 1; }

void pack_triples(const uint8_t* codes, size_t pixels, size_t channels, uint8_t* to) {
  alignas(64) uint16_t place[3][32];  // of channel 3·j + i, for i = 0, 1, 2, in word j; the high byte is masked
  for (int j = 0; j < 32; ++j)
    for (int i = 0; i < 3; ++i) place[i][j] = uint16_t(3 * j + i);
  constexpr __mmask64 low = 0x5555555555555555;
  for (size_t p = 0; p < pixels; ++p, codes += channels)
    for (size_t c = 0; c < channels; c += 96) {
      const size_t left = channels - c < 96 ? channels - c : 96, words = (left + 2) / 3;
      const __m512i a = _mm512_maskz_loadu_epi8(first_bytes(left), codes + c);
      const __m512i b = left > 64 ? _mm512_maskz_loadu_epi8(first_bytes(left - 64), codes + c + 64) : __m512i{};
      __m512i part[3];
#pragma GCC unroll 3
      for (int i = 0; i < 3; ++i) part[i] = _mm512_maskz_permutex2var_epi8(low, a, _mm512_load_si512(place[i]), b);
      const __m512i triple =
          _mm512_or_si512(_mm512_slli_epi16(part[0], 6),
                          _mm512_or_si512(_mm512_slli_epi16(part[1], 8), _mm512_slli_epi16(part[2], 10)));
      _mm512_mask_storeu_epi8(to, first_bytes(2 * words), triple);
      to += 2 * words;
    }
}

struct Table {
  __m512i part[4];
  explicit Table(const uint8_t* table) {
    for (int i = 0; i < 4; ++i) part[i] = _mm512_loadu_si512(table + 64 * i);
  }
  __m512i operator()(__m512i index) const {  // vpermi2b looks at 7 bits, the eighth chooses
    const __m512i low = _mm512_permutex2var_epi8(part[0], index, part[1]);
    const __m512i high = _mm512_permutex2var_epi8(part[2], index, part[3]);
    return _mm512_mask_blend_epi8(_mm512_movepi8_mask(index), low, high);
  }
};

void translate(const uint8_t* table, const uint8_t* from, size_t count, uint8_t* to) {
  const Table look(table);
  for (size_t i = 0; i < count; i += 64) {
    const __mmask64 mask = first_bytes(count - i);
    _mm512_mask_storeu_epi8(to + i, mask, look(_mm512_maskz_loadu_epi8(mask, from + i)));
  }
}

void largest(const uint8_t* const* from, size_t vectors, size_t count, uint8_t* to) {
  for (size_t i = 0; i < count; i += 64) {
    const __mmask64 mask = first_bytes(count - i);
    __m512i best = _mm512_setzero_si512();
    for (size_t v = 0; v < vectors; ++v) best = _mm512_max_epu8(best, _mm512_maskz_loadu_epi8(mask, from[v] + i));
    _mm512_mask_storeu_epi8(to + i, mask, best);
  }
}

void quantize(const float* x, size_t count, float scale, int zero, int low, int high, uint8_t* to) {
  const __m512 lowest = _mm512_set1_ps(float(low - zero)), highest = _mm512_set1_ps(float(high - zero));
  const __m512 step = _mm512_set1_ps(scale);
  for (size_t i = 0; i < count; i += 16) {
    const __mmask16 mask = __mmask16(first_bytes(count - i));
    const __m512 code = _mm512_div_ps(_mm512_maskz_loadu_ps(mask, x + i), step);
    const __m512 clipped = _mm512_min_ps(_mm512_max_ps(code, lowest), highest);  // NaN takes the second operand
    const __m512i whole = _mm512_add_epi32(_mm512_cvtps_epi32(clipped), _mm512_set1_epi32(zero));
    _mm_mask_storeu_epi8(to + i, mask, _mm512_cvtepi32_epi8(whole));
  }
}

// Where byte 3·i + k of three vectors comes from: byte i of plane k.
struct Threes {
  alignas(64) uint8_t two[3][64] = {}, third[3][64] = {};
  uint64_t is_third[3] = {};
  constexpr Threes() {
    for (int i = 0; i < 192; ++i) {
      two[i / 64][i % 64] = uint8_t(i % 3 == 1 ? 64 + i / 3 : i / 3);
      third[i / 64][i % 64] = uint8_t(i / 3);
      is_third[i / 64] |= uint64_t(i % 3 == 2) << i % 64;
    }
  }
};
constexpr Threes kThrees;

void interleave_three(const uint8_t* planes, size_t count, uint8_t* to) {
  for (size_t i = 0; i < count; i += 64, to += 192) {
    const size_t left = count - i;
    const __mmask64 mask = first_bytes(left);
    const __m512i a = _mm512_maskz_loadu_epi8(mask, planes + i);
    const __m512i b = _mm512_maskz_loadu_epi8(mask, planes + count + i);
    const __m512i c = _mm512_maskz_loadu_epi8(mask, planes + 2 * count + i);
#pragma GCC unroll 3
    for (int k = 0; k < 3; ++k) {
      const __m512i two = _mm512_permutex2var_epi8(a, _mm512_load_si512(kThrees.two[k]), b);
      const __m512i all =
          _mm512_mask_permutexvar_epi8(two, kThrees.is_third[k], _mm512_load_si512(kThrees.third[k]), c);
      _mm512_mask_storeu_epi8(to + 64 * k, 3 * left > size_t(64 * k) ? first_bytes(3 * left - 64 * k) : 0, all);
    }
  }
}

// Bytes modulo 256 throughout: the results are known to lie within 0 to 255.
void winograd_input(const uint8_t* const* tile, size_t channels, int offset, uint8_t* to, ptrdiff_t plane) {
  const __m512i shift = _mm512_set1_epi8(char(offset));
  for (size_t c = 0; c < channels; c += 64) {
    const __mmask64 mask = first_bytes(channels - c);
    __m512i row[4][4];
#pragma GCC unroll 4
    for (int x = 0; x < 4; ++x) {
      __m512i d[4];
#pragma GCC unroll 4
      for (int y = 0; y < 4; ++y) d[y] = _mm512_maskz_loadu_epi8(mask, tile[4 * y + x] + c);
      row[0][x] = _mm512_sub_epi8(d[0], d[2]);
      row[1][x] = _mm512_add_epi8(d[1], d[2]);
      row[2][x] = _mm512_sub_epi8(d[2], d[1]);
      row[3][x] = _mm512_sub_epi8(d[1], d[3]);
    }
#pragma GCC unroll 4
    for (int y = 0; y < 4; ++y) {
      const __m512i* d = row[y];
      const __m512i v[4] = {_mm512_sub_epi8(d[0], d[2]), _mm512_add_epi8(d[1], d[2]), _mm512_sub_epi8(d[2], d[1]),
                            _mm512_sub_epi8(d[1], d[3])};
#pragma GCC unroll 4
      for (int x = 0; x < 4; ++x) {
        const __m512i moved = 4 * y + x == 5 ? v[x] : _mm512_add_epi8(v[x], shift);
        _mm512_mask_storeu_epi8(to + (4 * y + x) * plane + c, mask, moved);
      }
    }
  }
}

void winograd_output(const int32_t* sums, int units, int weight_multiplier, const int32_t* bias,
                     int32_t* const* pixels) {
  constexpr ptrdiff_t plane = kWinogradTiles * kBlock;
  const __m512i up = _mm512_set1_epi32(weight_multiplier);
  for (int u = 0; u < units; ++u) {
    const __m512i b = _mm512_loadu_si512(bias + u * kLanes);
    __m512i row[2][4];
#pragma GCC unroll 4
    for (int x = 0; x < 4; ++x) {
      const int32_t* m = sums + x * plane + u * kLanes;
      const __m512i m1 = _mm512_load_si512(m + 4 * plane), m2 = _mm512_load_si512(m + 8 * plane);
      row[0][x] = _mm512_add_epi32(_mm512_add_epi32(m1, m2), _mm512_load_si512(m));
      row[1][x] = _mm512_sub_epi32(_mm512_sub_epi32(m1, m2), _mm512_load_si512(m + 12 * plane));
    }
#pragma GCC unroll 2
    for (int y = 0; y < 2; ++y) {
      const __m512i* r = row[y];
      const __m512i left = _mm512_add_epi32(_mm512_add_epi32(r[1], r[2]), r[0]);
      const __m512i right = _mm512_sub_epi32(_mm512_sub_epi32(r[1], r[2]), r[3]);
      const __m512i first = _mm512_mullo_epi32(_mm512_srai_epi32(left, 2), up);
      const __m512i second = _mm512_mullo_epi32(_mm512_srai_epi32(right, 2), up);
      _mm512_store_si512(pixels[2 * y] + u * kLanes, _mm512_add_epi32(first, b));
      _mm512_store_si512(pixels[2 * y + 1] + u * kLanes, _mm512_add_epi32(second, b));
    }
  }
}

// Four vectors of 16 integers -> 64 saturated bytes in order.
__m512i to_bytes(const __m512i* v) {
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  const __m512i bytes = _mm512_packus_epi16(_mm512_packs_epi32(v[0], v[1]), _mm512_packs_epi32(v[2], v[3]));
  return _mm512_permutexvar_epi32(order, bytes);
}

__m512 widened(const uint8_t* bytes, __mmask16 mask) {
  return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(mask, bytes)));
}

// An epilogue's scalars in vectors.
struct Constants {
  explicit Constants(const Epilogue& e)
      : lowest(_mm512_set1_ps(float(e.low - e.zero))),
        highest(_mm512_set1_ps(float(e.high - e.zero))),
        zero(_mm512_set1_ps(float(e.zero))),
        sum_lowest(_mm512_set1_ps(float(e.sum_low))),
        sum_highest(_mm512_set1_ps(float(e.sum_high))),
        ratio_first(_mm512_set1_ps(e.ratio_first)),
        ratio_second(_mm512_set1_ps(e.ratio_second)),
        offset(_mm512_set1_ps(e.offset)),
        zeros(_mm512_set1_epi32(e.zero)) {}
  __m512 lowest, highest, zero, sum_lowest, sum_highest, ratio_first, ratio_second, offset;
  __m512i zeros;
};

// Bounds are integers, so clipping before rounding is clipping after it, and no conversion overflows.
__m512 clipped(const int32_t* sums, const float* multiplier, const Constants& k) {
  const __m512 value = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_load_si512(sums)), _mm512_loadu_ps(multiplier));
  return _mm512_max_ps(_mm512_min_ps(value, k.highest), k.lowest);
}

template <int kUnits, bool kOtherFirst>
void finish_sum(const Epilogue& e, const int32_t* sums, int count, __mmask64 bytes) {
  const Constants k(e);
  for (int m = 0; m < count; ++m, sums += kBlock) {
    const ptrdiff_t at = m * e.stride;
    __m512i codes[4] = {}, added[4] = {};
#pragma GCC unroll 4
    for (int u = 0; u < kUnits; ++u) {
      const __m512 rounded =
          _mm512_roundscale_ps(clipped(sums + u * kLanes, e.multiplier + u * kLanes, k), _MM_FROUND_TO_NEAREST_INT);
      const __m512 own = _mm512_add_ps(rounded, k.zero);
      codes[u] = _mm512_cvtps_epi32(own);
      const __m512 other = widened(e.other + at + u * kLanes, __mmask16(bytes >> (u * kLanes)));
      const __m512 first = kOtherFirst ? other : own, second = kOtherFirst ? own : other;
      const __m512 sum = _mm512_fmadd_ps(first, k.ratio_first, _mm512_fmadd_ps(second, k.ratio_second, k.offset));
      added[u] = _mm512_cvtps_epi32(_mm512_max_ps(_mm512_min_ps(sum, k.sum_highest), k.sum_lowest));
    }
    if (e.own) _mm512_mask_storeu_epi8(e.own + at, bytes, to_bytes(codes));
    const __m512i last = to_bytes(added);
    if (e.sum) _mm512_mask_storeu_epi8(e.sum + at, bytes, last);
    for (int t = 0; t < e.tables; ++t)
      if (e.copy[t]) _mm512_mask_storeu_epi8(e.copy[t] + at, bytes, Table(e.table[t])(last));
  }
}

// Rounded integers of any size -> codes: saturation to 16 bits, with the zero point too, and to bytes clips nothing
// that the bounds, which are bytes, would not.
__m512i to_codes(const __m512i* v, __m512i zeros, __m512i lowest, __m512i highest) {
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  const __m512i low = _mm512_adds_epi16(_mm512_packs_epi32(v[0], v[1]), zeros);
  const __m512i high = _mm512_adds_epi16(_mm512_packs_epi32(v[2], v[3]), zeros);
  const __m512i bytes = _mm512_min_epu8(_mm512_max_epu8(_mm512_packus_epi16(low, high), lowest), highest);
  return _mm512_permutexvar_epi32(order, bytes);
}

template <int kUnits>
void finish_own(const Epilogue& e, const int32_t* sums, int count, __mmask64 bytes) {
  const Constants k(e);
  const __m512i zeros = _mm512_set1_epi16(short(e.zero));
  const __m512i lowest = _mm512_set1_epi8(char(e.low)), highest = _mm512_set1_epi8(char(e.high));
  __m512 multiplier[kUnits];
#pragma GCC unroll 4
  for (int u = 0; u < kUnits; ++u) multiplier[u] = _mm512_loadu_ps(e.multiplier + u * kLanes);
  for (int m = 0; m < count; ++m, sums += kBlock) {
    const ptrdiff_t at = m * e.stride;
    __m512i codes[4] = {}, last;
    if (e.in_32_bits) {
#pragma GCC unroll 4
      for (int u = 0; u < kUnits; ++u)
        codes[u] =
            _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_load_si512(sums + u * kLanes)), multiplier[u]));
      last = to_codes(codes, zeros, lowest, highest);
    } else {
#pragma GCC unroll 4
      for (int u = 0; u < kUnits; ++u)
        codes[u] =
            _mm512_add_epi32(_mm512_cvtps_epi32(clipped(sums + u * kLanes, e.multiplier + u * kLanes, k)), k.zeros);
      last = to_bytes(codes);
    }
    if (e.own) _mm512_mask_storeu_epi8(e.own + at, bytes, last);
    for (int t = 0; t < e.tables; ++t)
      if (e.copy[t]) _mm512_mask_storeu_epi8(e.copy[t] + at, bytes, Table(e.table[t])(last));
  }
}

void finish_real(const Epilogue& e, const int32_t* sums, int count, int width) {
  for (int m = 0; m < count; ++m)
    for (int c = 0; c < width; c += kLanes) {
      const __m512 sum = _mm512_cvtepi32_ps(_mm512_load_si512(sums + m * kBlock + c));
      _mm512_mask_storeu_ps(e.real + m * e.stride + c, __mmask16(first_bytes(size_t(width - c))),
                            _mm512_mul_ps(sum, _mm512_loadu_ps(e.multiplier + c)));
    }
}

void finish(const Epilogue& e, const int32_t* sums, int count, int width) {
  using Finish = void (*)(const Epilogue&, const int32_t*, int, __mmask64);
  constexpr Finish kOwn[4] = {finish_own<1>, finish_own<2>, finish_own<3>, finish_own<4>};
  constexpr Finish kFirst[4] = {finish_sum<1, true>, finish_sum<2, true>, finish_sum<3, true>, finish_sum<4, true>};
  constexpr Finish kSecond[4] = {finish_sum<1, false>, finish_sum<2, false>, finish_sum<3, false>,
                                 finish_sum<4, false>};
  if (e.real) return finish_real(e, sums, count, width);
  const int units = (width + kLanes - 1) / kLanes;
  (e.other ? e.other_first ? kFirst : kSecond : kOwn)[units - 1](e, sums, count, first_bytes(size_t(width)));
}

void pack_bits(const uint8_t* codes, size_t count, uint8_t* bits) {
  for (size_t i = 0; i < count; i += 32) {
    const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes + i));
    const uint32_t word = _mm256_movemask_epi8(bytes);
    __builtin_memcpy(bits + i / 8, &word, 4);
  }
}

Isa avx512_table() {
  Isa isa = *portable_isa();
  isa.name = "avx512";
  isa.max_pixels[1] = isa.max_pixels[2] = isa.max_pixels[3] = 8;
  isa.max_pixels[4] = 6;
  isa.product = product;
  isa.binary = binary;
  isa.lookup = lookup;
  isa.pack_triples = pack_triples;
  isa.depthwise = depthwise;
  isa.depthwise_weights = DepthwiseWeights::kQuads;
  isa.finish = finish;
  isa.pack_bits = pack_bits;
  isa.translate = translate;
  isa.largest = largest;
  isa.quantize = quantize;
  isa.interleave_three = interleave_three;
  isa.winograd_input = winograd_input;
  isa.winograd_output = winograd_output;
  isa.loops = avx512_loops();
  isa.prescales = 1;
  return isa;
}

}  // namespace

const Isa* avx512_isa() {
  const bool able = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                    __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                    __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512vbmi") &&
                    __builtin_cpu_supports("avx512vpopcntdq");
  if (!able) return nullptr;
  static const Isa isa = avx512_table();
  return &isa;
}

}  // namespace edgeqat
#else
#include "isa.hpp"
namespace edgeqat {
const Isa* avx512_isa() { return nullptr; }
}  // namespace edgeqat
#endif
