// What AVX2 and AVX-VNNI share; each adds its own products.
#pragma once
#include "avx2_binary.hpp"
#include "avx2_depthwise.hpp"
#include "avx2_epilogue.hpp"
#include "avx2_tile.hpp"
#include "avx2_vectors.hpp"
#include "avx2_winograd.hpp"
#include "loops.hpp"

namespace edgeqat {
namespace {

inline bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }

inline Isa avx2_table(const char* name, ProductFunction product) {
  Isa isa = *portable_isa();
  isa.name = name;
  for (int units = 1; units <= 4; ++units) isa.max_pixels[units] = kCallPixels;
  isa.product = product;
  isa.binary = binary;
  isa.depthwise = depthwise;
  isa.depthwise_weights = isa.narrow_depthwise_weights = DepthwiseWeights::kPairs;
  isa.finish = finish;
  isa.pack_bits = pack_bits;
  isa.translate = translate;
  isa.largest = largest;
  isa.quantize = quantize;
  isa.interleave_three = interleave_three;
  isa.winograd_input = winograd_input;
  isa.winograd_output = winograd_output;
  isa.loops = avx2_loops();
  isa.tile_channels = kLanes;
  return isa;
}

}  // namespace
}  // namespace edgeqat
