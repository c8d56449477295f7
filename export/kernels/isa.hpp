// What an instruction set implements: the inner loops. Everything else is written once, in portable C++.
//
// Translation units of an instruction set include only headers that say so and <*intrin.h>: an inline function of the
// standard library compiled there with wider instructions could be the copy that the linker keeps for everybody.
#pragma once
#include <stddef.h>
#include <stdint.h>

namespace edgeqat {

constexpr int kBlock = 64;          // output channels that one call of an inner loop computes
constexpr int kLanes = 16;          // channels of the unit in which a block's width is counted
constexpr int kMaxPixels = 8;       // pixels of one tile
constexpr int kCallPixels = 24;     // pixels of one call, at most: of several tiles, if an instruction set wants them
constexpr int kWinogradTiles = 24;  // whose sums are kept at a time
constexpr int kMaxTables = 4;       // requantized copies of one output

// A sum over `runs` stretches of 4·`quads` bytes each: stretch r of a pixel starts at `pixel + offsets[r]`.
//   weights  s8 [runs][quads][16 · units][4], zero where a stretch or the block is padded; see also Isa::tile_channels
//   bias     s32 [16 · units]
// The inner loop writes sums s32 [pixels][64] = bias + weight_multiplier · Σ w·x, exactly.
struct Stretches {
  const ptrdiff_t* offsets;
  int runs;
  int quads;
};
struct Product {
  Stretches stretches;
  const int8_t* weights;
  const int32_t* bias;
  int units;              // 1 to 4
  int weight_multiplier;  // what sums are multiplied with; 1 where the weights were multiplied with it beforehand
  // Quads, counted through all stretches, whose sums fit 16 bits: proven in layer_pack.cpp. 0: this product must be
  // widened at once.
  int narrow_steps;
  int32_t binary_gain;  // one-bit product only: real value of one agreeing bit
  bool codes_below_128;
  const int8_t* ahead;  // weights that are wanted next, worth fetching where they come from memory
};
// Two-bit products by table. Weights -2 to 1 and codes 0 to 3 of three channels at a time:
//   pixels   u16 [steps] of 64 · (c0 | c1 << 2 | c2 << 4), from `pack_triples`
//   weights  u8 [runs][steps][64], (w0 + 2) | (w1 + 2) << 2 | (w2 + 2) << 4; channel o at place 2·o, 2·(o - 32) + 1
//   from 32 on
// `quads` counts steps, `units` says nothing.
using ProductFunction = void (*)(const Product&, const uint8_t* const* pixels, int count, int32_t* sums);

// Depthwise: `taps` stretches of one byte; 64 channels of one pixel.
//   weights  s8 [groups of 4 taps][4][64], or as Isa::depthwise_weights says
struct Depthwise {
  const ptrdiff_t* offsets;  // of 4 · groups taps; weights of those that pad are 0 and their offsets valid
  int groups;
  const int8_t* weights;
  const int32_t* bias;  // s32 [64]
  bool shares;          // group g of a pixel lies where group g - 1 of the next pixel does
  int channels = 64;    // of the 64, as many as are wanted
  int rows = 4;         // taps of a group that are not padding
  int taps = 4;         // of all groups, less those at the end that are padding
  bool narrow = false;  // codes are below 128, and Σ |w·x| of a channel's products fits 16 bits whatever they are
};
using DepthwiseFunction = void (*)(const Depthwise&, const uint8_t* const* pixels, int count, int32_t* sums);

// From sums to codes, for `count` pixels of `width` <= 64 channels. Pointers are at the first pixel and channel of the
// call; the distance between pixels is `stride` bytes. Outputs that nobody reads are null.
//   own    q = clip(rint(float(sum) · m) + zero, low, high)
//   sum    clip(rint(fma(q_first, ratio_first, fma(q_second, ratio_second, offset))), sum_low, sum_high)
//   copies table[sum, or own where nothing is added]
//   real   float(sum) · m, instead of all codes
struct Epilogue {
  const float* multiplier;  // [64]
  int zero, low, high;
  const uint8_t* other;  // second summand, or null
  float ratio_first, ratio_second, offset;
  int other_first;  // whether `other` is the first summand
  int sum_low, sum_high;
  uint8_t* own;
  uint8_t* sum;
  int tables;
  const uint8_t* table[kMaxTables];  // 256 bytes each
  uint8_t* copy[kMaxTables];
  float* real;
  ptrdiff_t stride;
  bool in_32_bits;  // whether |sum · m| stays below 2^31, so that rounding may come before clipping

  void advance(ptrdiff_t elements) {
    if (other) other += elements;
    if (own) own += elements;
    if (sum) sum += elements;
    if (real) real += elements;
    for (int t = 0; t < tables; ++t)
      if (copy[t]) copy[t] += elements;
  }
};
using EpilogueFunction = void (*)(const Epilogue&, const int32_t* sums, int count, int width);

// From codes to codes, without sums in memory; for epilogues with `in_32_bits` that only make the layer's own codes and
// their copies. A product of at most kCallPixels pixels, of `width` channels:
using ProductCodes = void (*)(const Product&, const uint8_t* const* pixels, int count, Epilogue, int width);
// A depthwise layer's pixels, any number that lie `step` bytes apart:
using DepthwiseCodes = void (*)(const Depthwise&, const uint8_t* first, ptrdiff_t step, int64_t count, const Epilogue&,
                                int width);

// Winograd's F(2×2, 3×3) in integers; winograd.cpp has the equations.
//   input   16 pixels of a 4×4 tile -> its 16 transforms, `plane` bytes apart, each in bytes modulo 256 plus offset
//           (the one of positions 1,1 without, it is never negative)
//   output  16 sums, kWinogradTiles · 64 elements apart, of `units` · 16 channels -> 4 pixels: (y >> 2) ·
//   weight_multiplier + bias
using WinogradInput = void (*)(const uint8_t* const* tile, size_t channels, int offset, uint8_t* to, ptrdiff_t plane);
using WinogradOutput = void (*)(const int32_t* sums, int units, int weight_multiplier, const int32_t* bias,
                                int32_t* const* pixels);

// Order of a depthwise group's weights, of four taps and 64 channels.
enum class DepthwiseWeights {
  kTaps,       // [4][64]
  kQuads,      // [64][4], channel 16·l + 4·j + i at place 16·j + 4·l + i
  kPairs,      // [2][64][2], of 32 channels 0 to 7, 16 to 23, 8 to 15, 24 to 31
  kWidePairs,  // [2][64][2], of 64 channels 0 to 7, 16 to 23, 32 to 39, 48 to 55, then 8 to 15, 24 to 31, ...
};

struct Loops;  // loops.hpp

struct Isa {
  const char* name;
  int max_pixels[5];  // per units, at most kCallPixels; of `lookup` and `depthwise` kMaxPixels
  ProductFunction product;
  ProductCodes product_codes;  // null: `product` and `finish`
  ProductFunction binary;      // null: one-bit layers are computed as 8-bit ones
  ProductFunction lookup;      // null: two-bit layers are computed as 8-bit ones
  // Two codes and two weights of 16 bits in place of four of 8, for codes of which not even two products fit 16 bits;
  // codes are 0 to 255 and weights -128 to 127 all the same. null: `product` is as fast.
  ProductFunction wide;
  // u8 [pixels][channels] -> u16 [pixels][ceil(channels / 3)], as `lookup` reads them
  void (*pack_triples)(const uint8_t* codes, size_t pixels, size_t channels, uint8_t* to);
  DepthwiseFunction depthwise;
  DepthwiseCodes depthwise_codes;  // null: `depthwise` and `finish`
  EpilogueFunction finish;
  void (*pack_bits)(const uint8_t* codes, size_t count, uint8_t* bits);  // bit = code >= 128; count is a multiple of 32
  void (*translate)(const uint8_t* table, const uint8_t* from, size_t count, uint8_t* to);
  void (*largest)(const uint8_t* const* from, size_t vectors, size_t count, uint8_t* to);  // 0 of no vectors
  // clip(rint(x / scale) + zero, low, high); NaN becomes the lowest code
  void (*quantize)(const float* x, size_t count, float scale, int zero, int low, int high, uint8_t* to);
  void (*interleave_three)(const uint8_t* planes, size_t count, uint8_t* to);  // [3][count] -> [count][3], or null
  WinogradInput winograd_input;
  WinogradOutput winograd_output;
  const Loops* loops;
  int prescales;  // whether `product` wants weights multiplied with their weight multiplier
  DepthwiseWeights depthwise_weights;
  DepthwiseWeights narrow_depthwise_weights;  // where Depthwise::narrow
  // Whether codes are multiplied as signed bytes. Where they reach 128, `product` subtracts 128 from each, and the bias
  // makes up for it. `winograd_input` then adds no offset, and subtracts it at positions 1,1; `product` takes what it
  // made for codes below 128.
  int signed_codes = 0;
  // Channels that `product` and `binary` finish before they go on to the next: their weights stand together,
  // [16 · units / tile_channels][runs][quads][tile_channels][4]. 0: all of a block.
  int tile_channels = 0;
  // Whether a tile's weights stand in pairs of quads, [quads / 2][tile_channels][8], a stretch's odd quad after them.
  int quad_pairs = 0;
};

const Isa& chosen_isa();  // by the processor, or at first by EDGEQAT_ISA=portable, avx2, avxvnni, avx512, neon, ...
const Isa* isa_named(const char* name);  // null: unknown, or the processor cannot run it

const Isa* portable_isa();
const Isa* avx2_isa();
const Isa* avxvnni_isa();
const Isa* avx512_isa();
const Isa* neon_isa();
const Isa* neon_dotprod_isa();
const Isa* neon_i8mm_isa();

}  // namespace edgeqat
