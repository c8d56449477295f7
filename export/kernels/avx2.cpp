// AVX2: narrow codes on vpmaddubsw with 16-bit sums, wide ones on vpmaddwd; nothing saturates.
#if defined(__x86_64__)
#include <immintrin.h>

#include "isa.hpp"

namespace edgeqat {
namespace {

constexpr int kTile = 6;      // pixels × 16 channels of 16-bit sums: 12 registers
constexpr int kWideTile = 2;  // pixels × 16 channels of 32-bit sums: 8 registers
constexpr int kFewSteps = 8;  // below, sums are widened at every step

__m256i load(const void* from) { return _mm256_loadu_si256(static_cast<const __m256i*>(from)); }
void store(void* to, __m256i v) { _mm256_storeu_si256(static_cast<__m256i*>(to), v); }
__m128i load_half(const void* from) { return _mm_loadu_si128(static_cast<const __m128i*>(from)); }

__m256i quad(const uint8_t* x) {
  int32_t four;
  __builtin_memcpy(&four, x, 4);
  return _mm256_set1_epi32(four);
}

// Adds `quads` quads of one stretch, in 16 bits: a step adds |x0·w0 + x1·w1| to a lane, and p.narrow_steps of them stay
// within 32 767 (layer_pack.cpp), so vpmaddubsw does not saturate and vpaddw does not wrap before a flush to 32 bits.
template <int kPixels>
void narrow_stretch(const uint8_t* const* x, const int8_t* w, ptrdiff_t stride, int quads, int steps, int32_t* sums) {
  const __m256i ones = _mm256_set1_epi16(1);
  for (int q = 0; q < quads;) {
    const int end = quads - q < steps ? quads : q + steps;
    __m256i sum[kPixels][2];
#pragma GCC unroll 8
    for (int m = 0; m < kPixels; ++m) sum[m][0] = sum[m][1] = _mm256_setzero_si256();
    for (; q < end; ++q, w += stride) {
      const __m256i w0 = load(w), w1 = load(w + 32);
#pragma GCC unroll 8
      for (int m = 0; m < kPixels; ++m) {
        const __m256i codes = quad(x[m] + 4 * ptrdiff_t(q));
        sum[m][0] = _mm256_add_epi16(sum[m][0], _mm256_maddubs_epi16(codes, w0));
        sum[m][1] = _mm256_add_epi16(sum[m][1], _mm256_maddubs_epi16(codes, w1));
      }
    }
#pragma GCC unroll 8
    for (int m = 0; m < kPixels; ++m) {
      int32_t* to = sums + m * kBlock;
      store(to, _mm256_add_epi32(load(to), _mm256_madd_epi16(sum[m][0], ones)));
      store(to + 8, _mm256_add_epi32(load(to + 8), _mm256_madd_epi16(sum[m][1], ones)));
    }
  }
}

// The same for codes whose pairs of products need 17 bits: bytes become 16-bit numbers, vpmaddwd adds pairs in 32 bits.
template <int kPixels>
void wide_stretch(const uint8_t* const* x, const int8_t* w, ptrdiff_t stride, int quads, int32_t* sums) {
  __m256i sum[kPixels][4];
#pragma GCC unroll 8
  for (int m = 0; m < kPixels; ++m) sum[m][0] = sum[m][1] = sum[m][2] = sum[m][3] = _mm256_setzero_si256();
  for (int q = 0; q < quads; ++q, w += stride) {
    __m256i weights[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) weights[i] = _mm256_cvtepi8_epi16(load_half(w + 16 * i));
#pragma GCC unroll 8
    for (int m = 0; m < kPixels; ++m) {
      int32_t four;
      __builtin_memcpy(&four, x[m] + 4 * ptrdiff_t(q), 4);
      const __m256i codes = _mm256_broadcastq_epi64(_mm_cvtepu8_epi16(_mm_cvtsi32_si128(four)));
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) sum[m][i] = _mm256_add_epi32(sum[m][i], _mm256_madd_epi16(codes, weights[i]));
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < kPixels; ++m)
    for (int half = 0; half < 2; ++half) {  // pairs of lanes belong to one channel
      const __m256i pairs = _mm256_hadd_epi32(sum[m][2 * half], sum[m][2 * half + 1]);
      int32_t* to = sums + m * kBlock + 8 * half;
      store(to, _mm256_add_epi32(load(to), _mm256_permute4x64_epi64(pairs, 0xd8)));
    }
}

// Between the two: pairs fit 16 bits, but hardly more than one step does.
template <int kPixels>
void middle_stretch(const uint8_t* const* x, const int8_t* w, ptrdiff_t stride, int quads, int32_t* sums) {
  const __m256i ones = _mm256_set1_epi16(1);
  __m256i sum[kPixels][2];
#pragma GCC unroll 8
  for (int m = 0; m < kPixels; ++m) sum[m][0] = sum[m][1] = _mm256_setzero_si256();
  for (int q = 0; q < quads; ++q, w += stride) {
    const __m256i w0 = load(w), w1 = load(w + 32);
#pragma GCC unroll 8
    for (int m = 0; m < kPixels; ++m) {
      const __m256i codes = quad(x[m] + 4 * ptrdiff_t(q));
      sum[m][0] = _mm256_add_epi32(sum[m][0], _mm256_madd_epi16(_mm256_maddubs_epi16(codes, w0), ones));
      sum[m][1] = _mm256_add_epi32(sum[m][1], _mm256_madd_epi16(_mm256_maddubs_epi16(codes, w1), ones));
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < kPixels; ++m)
    for (int half = 0; half < 2; ++half) {
      int32_t* to = sums + m * kBlock + 8 * half;
      store(to, _mm256_add_epi32(load(to), sum[m][half]));
    }
}

template <int kPixels>
void stretch(const Product& p, const uint8_t* const* x, const int8_t* w, int32_t* sums) {
  const ptrdiff_t stride = 64 * ptrdiff_t(p.units);
  if (p.narrow_steps >= kFewSteps)
    narrow_stretch<kPixels>(x, w, stride, p.stretches.quads, p.narrow_steps, sums);
  else if (p.narrow_steps > 0)
    middle_stretch<kPixels>(x, w, stride, p.stretches.quads, sums);
  else
    wide_stretch<kPixels>(x, w, stride, p.stretches.quads, sums);
}

template <int kPixels>
void unit(const Product& p, const uint8_t* const* pixels, int u, int32_t* sums) {
  for (int m = 0; m < kPixels; ++m)
    for (int half = 0; half < 16; half += 8) store(sums + m * kBlock + half, _mm256_setzero_si256());
  for (int r = 0; r < p.stretches.runs; ++r) {
    const uint8_t* x[kPixels];
    for (int m = 0; m < kPixels; ++m) x[m] = pixels[m] + p.stretches.offsets[r];
    const int8_t* w = p.weights + ptrdiff_t(r) * p.stretches.quads * 64 * p.units + 64 * u;
    stretch<kPixels>(p, x, w, sums);
  }
  const __m256i weight_multiplier = _mm256_set1_epi32(p.weight_multiplier);
  for (int half = 0; half < 16; half += 8) {
    const __m256i bias = load(p.bias + u * kLanes + half);
    for (int m = 0; m < kPixels; ++m) {
      int32_t* to = sums + m * kBlock + half;
      store(to, _mm256_add_epi32(_mm256_mullo_epi32(load(to), weight_multiplier), bias));
    }
  }
}

void product(const Product& p, const uint8_t* const* pixels, int count, int32_t* sums) {
  using Unit = void (*)(const Product&, const uint8_t* const*, int, int32_t*);
  constexpr Unit kUnits[kTile] = {unit<1>, unit<2>, unit<3>, unit<4>, unit<5>, unit<6>};
  const int most = p.narrow_steps > 0 ? kTile : kWideTile;
  for (int u = 0; u < p.units; ++u)
    for (int m = 0; m < count; m += most)
      kUnits[(count - m < most ? count - m : most) - 1](p, pixels + m, u, sums + m * kBlock + u * kLanes);
}

// A byte times a code is within ±255·128 = ±32 640: 16 bits hold a product, 32 bits their sum.
void depthwise(const Depthwise& d, const uint8_t* const* pixels, int count, int32_t* sums) {
  for (int m = 0; m < count; ++m)
    for (int c = 0; c < kBlock; c += kLanes) {
      __m256i low = load(d.bias + c), high = load(d.bias + c + 8);
      for (int t = 0; t < 4 * d.groups; ++t) {
        const __m256i x = _mm256_cvtepu8_epi16(load_half(pixels[m] + d.offsets[t] + c));
        const __m256i w = _mm256_cvtepi8_epi16(load_half(d.weights + t * kBlock + c));
        const __m256i product = _mm256_mullo_epi16(x, w);
        low = _mm256_add_epi32(low, _mm256_cvtepi16_epi32(_mm256_castsi256_si128(product)));
        high = _mm256_add_epi32(high, _mm256_cvtepi16_epi32(_mm256_extracti128_si256(product, 1)));
      }
      store(sums + m * kBlock + c, low);
      store(sums + m * kBlock + c + 8, high);
    }
}

void translate(const uint8_t* table, const uint8_t* from, size_t count, uint8_t* to) {
  for (size_t i = 0; i < count; ++i) to[i] = table[from[i]];
}

void largest(const uint8_t* const* from, size_t vectors, size_t count, uint8_t* to) {
  size_t i = 0;
  for (; i + 32 <= count; i += 32) {
    __m256i best = _mm256_setzero_si256();
    for (size_t v = 0; v < vectors; ++v) best = _mm256_max_epu8(best, load(from[v] + i));
    store(to + i, best);
  }
  for (; i < count; ++i) {
    to[i] = 0;
    for (size_t v = 0; v < vectors; ++v) to[i] = to[i] > from[v][i] ? to[i] : from[v][i];
  }
}

__m256 clamp(__m256 x, __m256 low, __m256 high) { return _mm256_min_ps(_mm256_max_ps(x, low), high); }

// Eight integers within 0 to 255 -> eight bytes.
void store_bytes(uint8_t* to, __m256i v) {
  const __m128i words = _mm_packus_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(to), _mm_packus_epi16(words, words));
}

void quantize(const float* x, size_t count, float scale, int zero, int low, int high, uint8_t* to) {
  const __m256 lowest = _mm256_set1_ps(float(low - zero)), highest = _mm256_set1_ps(float(high - zero));
  const __m256i zeros = _mm256_set1_epi32(zero);
  for (size_t i = 0; i < count; i += 8) {
    float values[8] = {};
    uint8_t bytes[8];
    const size_t some = count - i < 8 ? count - i : 8;
    __builtin_memcpy(values, x + i, some * 4);
    // NaN takes the second operand, which is `lowest`
    const __m256 code = clamp(_mm256_div_ps(_mm256_loadu_ps(values), _mm256_set1_ps(scale)), lowest, highest);
    store_bytes(bytes, _mm256_add_epi32(_mm256_cvtps_epi32(code), zeros));
    __builtin_memcpy(to + i, bytes, some);
  }
}

// Bounds are integers, so clipping before rounding is clipping after it, and no conversion overflows.
void finish(const Epilogue& e, const int32_t* sums, int count, int width) {
  const __m256 lowest = _mm256_set1_ps(float(e.low - e.zero)), highest = _mm256_set1_ps(float(e.high - e.zero));
  const __m256 zero = _mm256_set1_ps(float(e.zero)), offset = _mm256_set1_ps(e.offset);
  const __m256 sum_low = _mm256_set1_ps(float(e.sum_low)), sum_high = _mm256_set1_ps(float(e.sum_high));
  const __m256 ratio_first = _mm256_set1_ps(e.ratio_first), ratio_second = _mm256_set1_ps(e.ratio_second);
  for (int m = 0; m < count; ++m) {
    const ptrdiff_t at = m * e.stride;
    for (int c = 0; c < width; c += 8) {
      const size_t some = width - c < 8 ? size_t(width - c) : 8;
      const __m256 value =
          _mm256_mul_ps(_mm256_cvtepi32_ps(load(sums + m * kBlock + c)), _mm256_loadu_ps(e.multiplier + c));
      if (e.real) {
        float values[8];
        _mm256_storeu_ps(values, value);
        __builtin_memcpy(e.real + at + c, values, some * 4);
        continue;
      }
      const __m256 rounded =
          _mm256_round_ps(clamp(value, lowest, highest), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
      const __m256 own = _mm256_add_ps(rounded, zero);
      uint8_t bytes[8];
      store_bytes(bytes, _mm256_cvtps_epi32(own));
      if (e.own) __builtin_memcpy(e.own + at + c, bytes, some);
      if (e.other) {
        uint8_t others[8] = {};
        __builtin_memcpy(others, e.other + at + c, some);
        const __m128i packed = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(others));
        const __m256 other = _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(packed));
        const __m256 first = e.other_first ? other : own, second = e.other_first ? own : other;
        const __m256 sum = _mm256_fmadd_ps(first, ratio_first, _mm256_fmadd_ps(second, ratio_second, offset));
        store_bytes(bytes, _mm256_cvtps_epi32(clamp(sum, sum_low, sum_high)));
        if (e.sum) __builtin_memcpy(e.sum + at + c, bytes, some);
      }
      for (int t = 0; t < e.tables; ++t)
        if (e.copy[t])
          for (size_t i = 0; i < some; ++i) e.copy[t][at + c + ptrdiff_t(i)] = e.table[t][bytes[i]];
    }
  }
}

void pack_bits(const uint8_t* codes, size_t count, uint8_t* bits) {
  for (size_t i = 0; i < count; i += 32) {
    const int word = _mm256_movemask_epi8(load(codes + i));
    __builtin_memcpy(bits + i / 8, &word, 4);
  }
}

const Isa kAvx2 = {"avx2",    {0, 6, 6, 6, 6}, product,  nullptr, nullptr, nullptr, depthwise, finish, pack_bits,
                   translate, largest,         quantize, nullptr, nullptr, nullptr, 0,         0};

}  // namespace

const Isa* avx2_isa() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? &kAvx2 : nullptr; }

}  // namespace edgeqat
#else
#include "isa.hpp"
namespace edgeqat {
const Isa* avx2_isa() { return nullptr; }
}  // namespace edgeqat
#endif
