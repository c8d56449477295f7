// AVX-512: products of pixels with a block's weights, on vpdpbusd (exact: it widens before it adds), on xor and
// vpopcntd for one bit, by look-up for two.
#pragma once
#include <immintrin.h>

#include "avx512_epilogue.hpp"

namespace edgeqat {
namespace {

// 32-bit lanes: layer_pack.cpp has shown that bias + Σ |w·x| stays below 2^31 for the layer's own weights.
template <int kUnits, int kPixels>
[[gnu::always_inline]] inline void accumulate(const Product& p, const uint8_t* const* pixels,
                                              __m512i (&sum)[kPixels][kUnits]) {
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
}

template <int kUnits, int kPixels>
void product_tile(const Product& p, const uint8_t* const* pixels, int32_t* sums) {
  __m512i sum[kPixels][kUnits];
  accumulate(p, pixels, sum);
#pragma GCC unroll 8
  for (int m = 0; m < kPixels; ++m)
#pragma GCC unroll 8
    for (int u = 0; u < kUnits; ++u) _mm512_store_si512(sums + m * kBlock + u * kLanes, sum[m][u]);
}

template <int kUnits, int kPixels>
void codes_tile(const Product& p, const uint8_t* const* pixels, const Epilogue& e, __mmask64 bytes) {
  __m512i sum[kPixels][kUnits];
  accumulate(p, pixels, sum);
  // Where sums end: the compiler would otherwise spill what follows within the loop.
#pragma GCC unroll 8
  for (int m = 0; m < kPixels; ++m)
#pragma GCC unroll 8
    for (int u = 0; u < kUnits; ++u) asm("" : "+v"(sum[m][u]));
  const OwnCodes<kUnits> own(e);
#pragma GCC unroll 8
  for (int m = 0; m < kPixels; ++m) write_own(e, m * e.stride, bytes, own(sum[m]));
}

// A lane counts the differing bits of 32 products a quad; layer_pack.cpp bounds gain · K by 2^31.
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
using CodesTile = void (*)(const Product&, const uint8_t* const*, const Epilogue&, __mmask64);
constexpr int kTilePixels[4] = {8, 8, 8, 6};  // per units - 1: accumulators that fit the registers

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
constexpr CodesTile kCodes[4][kMaxPixels] = {ROW(codes_tile, 1),
                                             ROW(codes_tile, 2),
                                             ROW(codes_tile, 3),
                                             {codes_tile<4, 1>, codes_tile<4, 2>, codes_tile<4, 3>, codes_tile<4, 4>,
                                              codes_tile<4, 5>, codes_tile<4, 6>, nullptr, nullptr}};
#undef ROW

void product_codes(const Product& p, const uint8_t* const* pixels, int count, Epilogue e, int width) {
  const int most = kTilePixels[p.units - 1];
  const __mmask64 bytes = first_bytes(size_t(width));
  for (int done = 0; done < count; done += most) {
    const int now = count - done < most ? count - done : most;
    kCodes[p.units - 1][now - 1](p, pixels + done, e, bytes);
    e.advance(now * e.stride);
  }
}

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

}  // namespace
}  // namespace edgeqat
