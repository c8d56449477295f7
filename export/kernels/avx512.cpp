// AVX-512 with VNNI: the table of its inner loops.
#if defined(__x86_64__) && defined(__AVX512VNNI__) && defined(__AVX512VBMI__) && defined(__AVX512VPOPCNTDQ__)
#include "avx512_codes.hpp"
#include "avx512_depthwise.hpp"
#include "avx512_epilogue.hpp"
#include "avx512_tile.hpp"
#include "avx512_winograd.hpp"
#include "loops.hpp"

namespace edgeqat {
namespace {

Isa avx512_table() {
  Isa isa = *portable_isa();
  isa.name = "avx512";
  for (int units = 1; units <= 4; ++units) isa.max_pixels[units] = kTilePixels[units - 1];
  isa.product = product;
  isa.product_codes = product_codes;
  isa.binary = binary;
  isa.lookup = lookup;
  isa.pack_triples = pack_triples;
  isa.depthwise = depthwise;
  isa.depthwise_codes = depthwise_codes;
  isa.depthwise_weights = DepthwiseWeights::kQuads;
  isa.narrow_depthwise_weights = DepthwiseWeights::kWidePairs;
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
