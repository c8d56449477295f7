// What all ARM instruction sets share; each adds its own products.
#pragma once
#include "isa.hpp"
#include "neon_codes.hpp"
#include "neon_depthwise.hpp"
#include "neon_epilogue.hpp"
#include "neon_tile.hpp"
#include "neon_winograd.hpp"

namespace edgeqat {
namespace {

inline Isa neon_table(const char* name, ProductFunction product, ProductFunction binary) {
  Isa isa = *portable_isa();
  isa.name = name;
  for (int units = 1; units <= 4; ++units) isa.max_pixels[units] = kMaxPixels;
  isa.product = product;
  isa.binary = binary;
  isa.depthwise = depthwise;
  isa.finish = finish;
  isa.pack_bits = pack_bits;
  isa.translate = translate;
  isa.largest = largest;
  isa.quantize = quantize;
  isa.interleave_three = interleave_three;
  isa.winograd_input = winograd_input;
  isa.winograd_output = winograd_output;
  isa.signed_codes = 1;
  isa.tile_channels = kTileChannels;
  return isa;
}

}  // namespace
}  // namespace edgeqat
