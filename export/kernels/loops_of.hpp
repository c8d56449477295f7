// The loops, for each instruction set that the compiler is told of: plain ones, which it makes vectors of. For that,
// nothing that a loop reads may be what it writes, which __restrict and local copies say. Includes nothing of the
// standard library (isa.hpp says why).
#pragma once
#include "loops.hpp"

namespace edgeqat {
namespace {

constexpr float kRounds = 12582912.0f;  // 1.5 · 2^23: adding it leaves no fraction, rounding half to even

// What is not a number becomes `low`.
inline float clipped(float x, float low, float high) {
  x = x > low ? x : low;
  return x < high ? x : high;
}
inline int rounded(float x) { return int((x + kRounds) - kRounds); }

// Without an instruction for it, as before AVX2, the compiler calls the library's fmaf.
void add(const uint8_t* __restrict a, const uint8_t* __restrict b, size_t count, const SumOfTwo& s,
         uint8_t* __restrict y) {
  const float ratio_a = s.ratio_a, ratio_b = s.ratio_b, offset = s.offset;
  const float low = float(s.low), high = float(s.high);
  for (size_t i = 0; i < count; ++i) {
    const float inner = __builtin_fmaf(float(b[i]), ratio_b, offset);
    y[i] = uint8_t(rounded(clipped(__builtin_fmaf(float(a[i]), ratio_a, inner), low, high)));
  }
}

// Both factors are integers below 256, so their product is exact in a float.
void multiply(const uint8_t* __restrict a, const uint8_t* __restrict b, size_t count, const ProductOfCodes& p,
              uint8_t* __restrict y) {
  const int zero_a = p.zero_a, zero_b = p.zero_b;
  const float ratio = p.ratio, zero = float(p.zero), low = float(p.low), high = float(p.high);
  for (size_t i = 0; i < count; ++i) {
    const int product = (int(a[i]) - zero_a) * (int(b[i]) - zero_b);
    y[i] = uint8_t(rounded(clipped(float(product) * ratio + zero, low, high)));
  }
}

void scale(const uint8_t* __restrict x, const float* __restrict gain, size_t count, const ScaledCodes& s,
           uint8_t* __restrict y) {
  const int x_zero = s.x_zero, zero = s.zero;
  const bool all = !s.below_zero;
  const float x_scale = s.x_scale, y_scale = s.y_scale, low = float(s.low - s.zero), high = float(s.high - s.zero);
  for (size_t i = 0; i < count; ++i) {
    const float real = float(int(x[i]) - x_zero) * x_scale;
    const float scaled = real * gain[i];
    const float chosen = all || real < 0 ? scaled : real;
    y[i] = uint8_t(rounded(clipped(chosen / y_scale, low, high)) + zero);
  }
}

SumsOfCodes sums(const uint8_t* q, size_t count) {
  SumsOfCodes found = {};
  for (size_t i = 0; i < count; ++i) {
    const uint32_t code = q[i];
    found.sum += code;
    found.squares += code * code;
  }
  return found;
}

// n · q and the sum are integers below 2^24, so that d is exact in floats.
void normalize(const uint8_t* __restrict q, size_t count, uint32_t sum, float r, const NormOfCodes& norm,
               uint8_t* __restrict y) {
  const float* __restrict gain = norm.gain;
  const float* __restrict shift = norm.shift;
  const int zero = norm.zero;
  const float size = float(count), total = float(sum), low = float(norm.low - zero), high = float(norm.high - zero);
  for (size_t i = 0; i < count; ++i) {
    const float d = float(q[i]) * size - total;
    y[i] = uint8_t(rounded(clipped(d * r * gain[i] + shift[i], low, high)) + zero);
  }
}

// e^t for -86 <= t <= 0
inline float exponential(float t) {
  constexpr float log2_e = 1.44269504f, ln2_high = 0.693359375f, ln2_low = -2.12194440e-4f;
  const float k = (t * log2_e + kRounds) - kRounds;
  const float r = (t - k * ln2_high) - k * ln2_low;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  const int32_t bits = (int(k) + 127) << 23;
  float power;
  __builtin_memcpy(&power, &bits, sizeof power);
  return ((p * (r * r) + r) + 1.0f) * power;
}

// Maxima or sums side by side: the compiler keeps the order of such chains, so that it makes no vectors of them by
// itself.
typedef float Four __attribute__((vector_size(16)));
inline Four four(const float* x) {
  Four loaded;
  __builtin_memcpy(&loaded, x, sizeof loaded);
  return loaded;
}
inline Four larger(Four next, Four before) { return next > before ? next : before; }

// What is not a number is never larger; where the first is none, neither is the result.
inline float largest(const float* x, size_t count) {
  Four even = {x[0], x[0], x[0], x[0]}, odd = even;
  size_t i = 0;
  for (; i + 8 <= count; i += 8) {
    even = larger(four(x + i), even);
    odd = larger(four(x + i + 4), odd);
  }
  const Four lanes = larger(even, odd);
  float most = x[0];
  for (int lane = 0; lane < 4; ++lane) most = lanes[lane] > most ? lanes[lane] : most;
  for (; i < count; ++i) most = x[i] > most ? x[i] : most;
  return most;
}

// In the order that loops.hpp states. Past `count` lie zeros, which change no sum.
inline float sum_of(const float* e, size_t count) {
  Four even = {}, odd = {};
  for (size_t i = 0; i < count; i += kPlaceUnit) {
    even += four(e + i);
    odd += four(e + i + 4);
  }
  const Four s = even + odd;
  return (s[0] + s[2]) + (s[1] + s[3]);
}

void softmax(const float* __restrict x, size_t count, const Grid& to, float* __restrict place, uint8_t* __restrict y) {
  constexpr float lowest = -86.0f;
  const float most = largest(x, count);
  for (size_t i = 0; i < count; ++i) {
    const float t = x[i] - most;
    place[i] = exponential(t > lowest ? t : lowest);  // also where t is not a number
  }
  for (size_t i = count; i % kPlaceUnit != 0; ++i) place[i] = 0.0f;
  const float factor = (1.0f / sum_of(place, count)) / to.scale;
  const int zero = to.zero;
  const float low = float(to.low - zero), high = float(to.high - zero);
  for (size_t i = 0; i < count; ++i) y[i] = uint8_t(rounded(clipped(place[i] * factor, low, high)) + zero);
}

void sum_reals(const uint8_t* __restrict x, size_t count, int zero, float scale, float* __restrict total) {
  for (size_t i = 0; i < count; ++i) total[i] += float(int(x[i]) - zero) * scale;
}

void mean_to_codes(const float* __restrict total, size_t length, float count, const Grid& to, uint8_t* __restrict y) {
  const float scale = to.scale, zero = float(to.zero), low = float(to.low), high = float(to.high);
  for (size_t i = 0; i < length; ++i) y[i] = uint8_t(rounded(clipped(total[i] / count / scale + zero, low, high)));
}

void sum_rows(const uint8_t* __restrict x, size_t rows, size_t length, uint16_t* __restrict total) {
  for (size_t row = 0; row < rows; ++row, x += length)
    for (size_t i = 0; i < length; ++i) total[i] = uint16_t(total[i] + x[i]);
}

constexpr size_t kSide = 16;  // of a square of bytes that is turned in registers
typedef uint8_t Bytes __attribute__((vector_size(kSide)));

inline Bytes low_halves(Bytes a, Bytes b) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
#else
  return __builtin_shuffle(a, b, Bytes{0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23});
#endif
}
inline Bytes high_halves(Bytes a, Bytes b) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
#else
  return __builtin_shuffle(a, b, Bytes{8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31});
#endif
}

// Interleaving the rows of a square with those eight further, four times over, makes its rows its columns.
inline void turn_square(const uint8_t* x, size_t x_stride, uint8_t* y, size_t y_stride) {
  Bytes rows[kSide], next[kSide];
  for (size_t row = 0; row < kSide; ++row) __builtin_memcpy(&rows[row], x + row * x_stride, kSide);
  for (int round = 0; round < 4; ++round) {
    for (size_t row = 0; row < kSide / 2; ++row) {
      next[2 * row] = low_halves(rows[row], rows[row + kSide / 2]);
      next[2 * row + 1] = high_halves(rows[row], rows[row + kSide / 2]);
    }
    for (size_t row = 0; row < kSide; ++row) rows[row] = next[row];
  }
  for (size_t row = 0; row < kSide; ++row) __builtin_memcpy(y + row * y_stride, &rows[row], kSide);
}

// Through a square of our own, which a part of one is copied into and out of.
void turn_part(const uint8_t* x, size_t rows, size_t columns, size_t x_stride, uint8_t* y, size_t y_stride) {
  uint8_t part[kSide * kSide] = {}, turned[kSide * kSide];
  for (size_t row = 0; row < rows; ++row) __builtin_memcpy(part + row * kSide, x + row * x_stride, columns);
  turn_square(part, kSide, turned, kSide);
  for (size_t column = 0; column < columns; ++column)
    __builtin_memcpy(y + column * y_stride, turned + column * kSide, rows);
}

void transpose(const uint8_t* __restrict x, size_t rows, size_t columns, size_t x_stride, uint8_t* __restrict y,
               size_t y_stride) {
  for (size_t column = 0; column < columns; column += kSide)
    for (size_t row = 0; row < rows; row += kSide) {
      const uint8_t* from = x + row * x_stride + column;
      uint8_t* to = y + column * y_stride + row;
      const size_t height = rows - row < kSide ? rows - row : kSide;
      const size_t width = columns - column < kSide ? columns - column : kSide;
      if (height == kSide && width == kSide)
        turn_square(from, x_stride, to, y_stride);
      else
        turn_part(from, height, width, x_stride, to, y_stride);
    }
}

constexpr Loops kLoops = {add,     multiply,  scale,         sums,     normalize,
                          softmax, sum_reals, mean_to_codes, sum_rows, transpose};

}  // namespace
}  // namespace edgeqat
