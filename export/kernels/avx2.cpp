// AVX2: narrow codes on vpmaddubsw with 16-bit sums, wide ones on vpmaddwd; nothing saturates.
#if defined(__x86_64__)
#include "avx2_table.hpp"

namespace edgeqat {
namespace {

constexpr int kTile = 6;        // pixels × 16 channels of 16-bit sums: 12 registers
constexpr int kMiddleTile = 4;  // of 32-bit sums: 8 registers
constexpr int kWideTile = 3;    // likewise, beside four of weights and two of codes
constexpr int kFewSteps = 4;    // below, sums are widened at every step

// A step adds x0·w0 + x1·w1 to a lane of 16 bits. layer_pack.cpp has shown that p.narrow_steps of them stay within 16
// bits, so vpmaddubsw does not saturate and vpaddw does not wrap before they are widened.
// A tile that fetches brings the next 16 channels' weights nearer: where a layer's weights come from memory, the
// processor would wait for them during the next first tile and load nothing during the others.
template <int kPixels, bool kFetches>
inline void narrow_step(const uint8_t* const* x, ptrdiff_t at, const int8_t* w, ptrdiff_t next, __m256i (*sum)[2]) {
  if (kFetches) _mm_prefetch(reinterpret_cast<const char*>(w + next), _MM_HINT_T1);
  const __m256i w0 = load(w), w1 = load(w + 32);
#pragma GCC unroll 8
  for (int m = 0; m < kPixels; ++m) {
    const __m256i codes = quad(x[m] + at);
    sum[m][0] = _mm256_add_epi16(sum[m][0], _mm256_maddubs_epi16(codes, w0));
    sum[m][1] = _mm256_add_epi16(sum[m][1], _mm256_maddubs_epi16(codes, w1));
    settle(sum[m][0], sum[m][1]);
  }
}

// All of a sum fits 16 bits. Adding neighbouring lanes multiplies them, too.
template <int kPixels, bool kFetches = false>
void narrow_tile(const Product& p, const uint8_t* const* pixels, const int8_t* w, const int32_t* bias, int32_t* to) {
  const ptrdiff_t *offset = p.stretches.offsets, *const end = offset + p.stretches.runs;
  const ptrdiff_t bytes = 4 * ptrdiff_t(p.stretches.quads), next = bytes_of_tile(p);
  __m256i sum[kPixels][2];
#pragma GCC unroll 8
  for (int m = 0; m < kPixels; ++m) sum[m][0] = sum[m][1] = _mm256_setzero_si256();
  for (; offset < end; ++offset) {
    const uint8_t* x[kPixels];
#pragma GCC unroll 8
    for (int m = 0; m < kPixels; ++m) x[m] = pixels[m] + *offset;
    for (ptrdiff_t at = 0; at < bytes; at += 4, w += kStep) narrow_step<kPixels, kFetches>(x, at, w, next, sum);
  }
  const __m256i factor = _mm256_set1_epi16(short(p.weight_multiplier));
#pragma GCC unroll 2
  for (int half = 0; half < 2; ++half) {
    const __m256i start = load(bias + 8 * half);
#pragma GCC unroll 8
    for (int m = 0; m < kPixels; ++m)
      store(to + m * kBlock + 8 * half, _mm256_add_epi32(_mm256_madd_epi16(sum[m][half], factor), start));
  }
}

// Adds 16-bit sums, multiplied, to those of 32 bits, and empties them.
template <int kPixels>
inline void widen(const Product& p, __m256i (*sum)[2], int32_t* to) {
  const __m256i factor = _mm256_set1_epi16(short(p.weight_multiplier));
#pragma GCC unroll 8
  for (int m = 0; m < kPixels; ++m)
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      int32_t* at = to + m * kBlock + 8 * half;
      store(at, _mm256_add_epi32(load(at), _mm256_madd_epi16(sum[m][half], factor)));
      sum[m][half] = _mm256_setzero_si256();
    }
}

// Sums of 32 bits grow in `to`.
template <int kPixels, bool kFetches = false>
void long_narrow_tile(const Product& p, const uint8_t* const* pixels, const int8_t* w, const int32_t* bias,
                      int32_t* to) {
  const ptrdiff_t *offset = p.stretches.offsets, *const end = offset + p.stretches.runs;
  const ptrdiff_t bytes = 4 * ptrdiff_t(p.stretches.quads), next = bytes_of_tile(p);
  const ptrdiff_t most = 4 * ptrdiff_t(p.narrow_steps);
  __m256i sum[kPixels][2];
#pragma GCC unroll 8
  for (int m = 0; m < kPixels; ++m)
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      sum[m][half] = _mm256_setzero_si256();
      store(to + m * kBlock + 8 * half, load(bias + 8 * half));
    }
  ptrdiff_t room = most;
  for (; offset < end; ++offset) {
    const uint8_t* x[kPixels];
#pragma GCC unroll 8
    for (int m = 0; m < kPixels; ++m) x[m] = pixels[m] + *offset;
    for (ptrdiff_t at = 0; at < bytes;) {
      const ptrdiff_t last = bytes - at < room ? bytes : at + room;
      room -= last - at;
      for (; at < last; at += 4, w += kStep) narrow_step<kPixels, kFetches>(x, at, w, next, sum);
      if (room > 0) continue;
      room = most;
      widen<kPixels>(p, sum, to);
    }
  }
  widen<kPixels>(p, sum, to);
}

// For codes of which a pair of products fits 16 bits, but hardly more.
template <int kPixels>
void middle_tile(const Product& p, const uint8_t* const* pixels, const int8_t* w, const int32_t* bias, int32_t* to) {
  const __m256i ones = _mm256_set1_epi16(1);
  tile_in_32_bits<kPixels>(
      p, pixels, w, bias, to, [ones](const uint8_t* const* x, ptrdiff_t at, const int8_t* w, __m256i(*sum)[2]) {
        const __m256i w0 = load(w), w1 = load(w + 32);
#pragma GCC unroll 8
        for (int m = 0; m < kPixels; ++m) {
          const __m256i codes = quad(x[m] + at);
          sum[m][0] = _mm256_add_epi32(sum[m][0], _mm256_madd_epi16(_mm256_maddubs_epi16(codes, w0), ones));
          sum[m][1] = _mm256_add_epi32(sum[m][1], _mm256_madd_epi16(_mm256_maddubs_epi16(codes, w1), ones));
        }
      });
}

// For any codes: those at even and those at odd places of a quad become 16-bit numbers, and so do the weights.
template <int kPixels>
void wide_tile(const Product& p, const uint8_t* const* pixels, const int8_t* w, const int32_t* bias, int32_t* to) {
  const __m256i low_bytes = _mm256_set1_epi16(0xff);
  tile_in_32_bits<kPixels>(
      p, pixels, w, bias, to, [low_bytes](const uint8_t* const* x, ptrdiff_t at, const int8_t* w, __m256i(*sum)[2]) {
        __m256i even[2], odd[2];
#pragma GCC unroll 2
        for (int half = 0; half < 2; ++half) {
          const __m256i weights = load(w + 32 * half);
          even[half] = _mm256_srai_epi16(_mm256_slli_epi16(weights, 8), 8);
          odd[half] = _mm256_srai_epi16(weights, 8);
        }
#pragma GCC unroll 8
        for (int m = 0; m < kPixels; ++m) {
          const __m256i codes = quad(x[m] + at);
          const __m256i even_codes = _mm256_and_si256(codes, low_bytes), odd_codes = _mm256_srli_epi16(codes, 8);
#pragma GCC unroll 2
          for (int half = 0; half < 2; ++half) {
            sum[m][half] = _mm256_add_epi32(sum[m][half], _mm256_madd_epi16(even_codes, even[half]));
            sum[m][half] = _mm256_add_epi32(sum[m][half], _mm256_madd_epi16(odd_codes, odd[half]));
          }
        }
      });
}

// For any codes that Layer::copy_row has made 16-bit numbers.
template <int kPixels>
void widened_tile(const Product& p, const uint8_t* const* pixels, const int8_t* w, const int32_t* bias, int32_t* to) {
  tile_in_32_bits<kPixels>(p, pixels, w, bias, to,
                           [](const uint8_t* const* x, ptrdiff_t at, const int8_t* w, __m256i(*sum)[2]) {
                             const __m256i w0 = load(w), w1 = load(w + 32);
#pragma GCC unroll 8
                             for (int m = 0; m < kPixels; ++m) {
                               const __m256i codes = quad(x[m] + at);
                               sum[m][0] = _mm256_add_epi32(sum[m][0], _mm256_madd_epi16(codes, w0));
                               sum[m][1] = _mm256_add_epi32(sum[m][1], _mm256_madd_epi16(codes, w1));
                               settle(sum[m][0], sum[m][1]);
                             }
                           });
}

void wide(const Product& p, const uint8_t* const* pixels, int count, int32_t* sums) {
  constexpr Tile kTiles[kTile] = {widened_tile<1>, widened_tile<2>, widened_tile<3>,
                                  widened_tile<4>, widened_tile<5>, widened_tile<6>};
  in_tiles(kTiles, kTile, p, pixels, count, sums);
}

void product(const Product& p, const uint8_t* const* pixels, int count, int32_t* sums) {
  constexpr Tile kNarrow[kTile] = {narrow_tile<1>, narrow_tile<2>, narrow_tile<3>,
                                   narrow_tile<4>, narrow_tile<5>, narrow_tile<6>};
  constexpr Tile kLong[kTile] = {long_narrow_tile<1>, long_narrow_tile<2>, long_narrow_tile<3>,
                                 long_narrow_tile<4>, long_narrow_tile<5>, long_narrow_tile<6>};
  constexpr Tile kMiddle[kMiddleTile] = {middle_tile<1>, middle_tile<2>, middle_tile<3>, middle_tile<4>};
  constexpr Tile kWide[kWideTile] = {wide_tile<1>, wide_tile<2>, wide_tile<3>};
  const ptrdiff_t steps = ptrdiff_t(p.stretches.runs) * p.stretches.quads;
  if (p.narrow_steps >= steps)
    in_tiles(kNarrow, kTile, p, pixels, count, sums, narrow_tile<kTile, true>);
  else if (p.narrow_steps >= kFewSteps)
    in_tiles(kLong, kTile, p, pixels, count, sums, long_narrow_tile<kTile, true>);
  else if (p.narrow_steps > 0)
    in_tiles(kMiddle, kMiddleTile, p, pixels, count, sums);
  else
    in_tiles(kWide, kWideTile, p, pixels, count, sums);
}

}  // namespace

const Isa* avx2_isa() {
  if (!has_avx2()) return nullptr;
  static const Isa isa = [] {
    Isa made = avx2_table("avx2", product);
    made.wide = wide;
    return made;
  }();
  return &isa;
}

}  // namespace edgeqat
#else
#include "isa.hpp"
namespace edgeqat {
const Isa* avx2_isa() { return nullptr; }
}  // namespace edgeqat
#endif
