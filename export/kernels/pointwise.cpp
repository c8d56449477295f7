#include "pointwise.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

namespace edgeqat {
namespace {

// Adding 1.5 · 2^23 leaves no fraction bits, so the addition itself rounds half to even; |x| must stay below 2^22.
// Unlike rintf it needs no instruction beyond SSE2.
inline float rounded(float x) {
  constexpr float shift = 12582912.0f;
  return (x + shift) - shift;
}

inline float clamp(float x, float low, float high) {
  x = x > low ? x : low;
  return x < high ? x : high;
}

// body(row) for all rows
template <typename Body>
void each_row(int64_t rows, int64_t row_size, const Pool& pool, Body body) {
  in_parts(rows, row_size, pool, [&](int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row) body(row);
  });
}

// Calls body(y, x) for every input pixel under the window of output pixel (out_y, out_x), row by row.
template <typename Body>
void each_tap(const PoolShape& s, const Window& w, int64_t out_y, int64_t out_x, Body body) {
  for (int64_t ky = 0; ky < w.kernel[0]; ++ky) {
    const int64_t y = out_y * w.stride[0] - w.pads[0] + ky * w.dilation[0];
    if (y < 0 || y >= s.height) continue;
    for (int64_t kx = 0; kx < w.kernel[1]; ++kx) {
      const int64_t x = out_x * w.stride[1] - w.pads[1] + kx * w.dilation[1];
      if (x >= 0 && x < s.width) body(y, x);
    }
  }
}

// Window positions that count: inside the image, or also inside its padding.
int64_t counted(const PoolShape& s, const Window& w, int64_t out_y, int64_t out_x, bool padding) {
  const int64_t size[2] = {s.height, s.width}, at[2] = {out_y, out_x};
  int64_t product = 1;
  for (int axis = 0; axis < 2; ++axis) {
    const int64_t low = padding ? -w.pads[axis] : 0, high = size[axis] + (padding ? w.pads[axis + 2] : 0);
    int64_t inside = 0;
    for (int64_t k = 0; k < w.kernel[axis]; ++k) {
      const int64_t place = at[axis] * w.stride[axis] - w.pads[axis] + k;
      inside += place >= low && place < high;
    }
    product *= inside;
  }
  return product;
}

}  // namespace

// The largest of a window is the largest of its columns' largest, which neighbouring windows share.
void max_pool(const uint8_t* x, const PoolShape& s, const Window& w, uint8_t* y, const Pool& pool) {
  const int64_t c = s.channels;
  const Isa& isa = chosen_isa();
  each_row(s.batch * s.out_height, s.out_width * c * w.kernel[0] * w.kernel[1], pool, [&](int64_t row) {
    const uint8_t* image = x + row / s.out_height * s.height * s.width * c;
    std::vector<const uint8_t*> rows, taps(static_cast<size_t>(w.kernel[1]));
    const int64_t top = row % s.out_height * w.stride[0] - w.pads[0];
    for (int64_t in_y = top, k = 0; k < w.kernel[0]; ++k, in_y += w.dilation[0])
      if (in_y >= 0 && in_y < s.height) rows.push_back(image + in_y * s.width * c);
    std::vector<uint8_t> columns(static_cast<size_t>(s.width * c));
    isa.largest(rows.data(), rows.size(), columns.size(), columns.data());
    uint8_t* to = y + row * s.out_width * c;
    for (int64_t out_x = 0; out_x < s.out_width; ++out_x, to += c) {
      size_t count = 0;
      for (int64_t in_x = out_x * w.stride[1] - w.pads[1], k = 0; k < w.kernel[1]; ++k, in_x += w.dilation[1])
        if (in_x >= 0 && in_x < s.width) taps[count++] = columns.data() + in_x * c;
      isa.largest(taps.data(), count, size_t(c), to);
    }
  });
}

void average_pool(const uint8_t* x, const PoolShape& s, const Window& w, bool counts_padding, const Grid& from,
                  const Grid& to, uint8_t* y, const Pool& pool) {
  const int64_t c = s.channels;
  const Loops& loops = *chosen_isa().loops;
  each_row(s.batch * s.out_height, s.out_width * c * w.kernel[0] * w.kernel[1], pool, [&](int64_t row) {
    const uint8_t* image = x + row / s.out_height * s.height * s.width * c;
    std::vector<float> total(static_cast<size_t>(c));
    for (int64_t out_x = 0; out_x < s.out_width; ++out_x) {
      std::fill(total.begin(), total.end(), 0.0f);
      each_tap(s, w, row % s.out_height, out_x, [&](int64_t in_y, int64_t in_x) {
        loops.sum_reals(image + (in_y * s.width + in_x) * c, size_t(c), from.zero, from.scale, total.data());
      });
      const float count = float(counted(s, w, row % s.out_height, out_x, counts_padding));
      loops.mean_to_codes(total.data(), size_t(c), count, to, y + (row * s.out_width + out_x) * c);
    }
  });
}

// Whole rows of an image are added first, since a pixel may have few channels. 32 bits would hold the sums of 8.4
// million pixels; nothing limits an image to that, so they are 64 bits wide.
void global_pool(const uint8_t* x, const PoolShape& s, int zero, float multiplier, const Grid& to, uint8_t* y) {
  const int64_t c = s.channels, row_size = s.width * c, pixels = s.height * s.width;
  const Loops& loops = *chosen_isa().loops;
  std::vector<int64_t> total(static_cast<size_t>(c));
  std::vector<uint16_t> of_rows(static_cast<size_t>(row_size));
  for (int64_t n = 0; n < s.batch; ++n, y += c) {
    std::fill(total.begin(), total.end(), 0);
    for (int64_t left = s.height; left > 0;) {
      const int64_t rows = std::min(left, kMostRowsSummed);
      std::fill(of_rows.begin(), of_rows.end(), 0);
      loops.sum_rows(x, size_t(rows), size_t(row_size), of_rows.data());
      for (int64_t at = 0; at < row_size; at += c)
        for (int64_t i = 0; i < c; ++i) total[i] += of_rows[at + i];
      x += rows * row_size;
      left -= rows;
    }
    for (int64_t i = 0; i < c; ++i) {
      const float mean = float(total[i] - pixels * zero) * multiplier;
      y[i] = uint8_t(int(rounded(clamp(mean, float(to.low - to.zero), float(to.high - to.zero)))) + to.zero);
    }
  }
}

void add_codes(const uint8_t* a, const uint8_t* b, int64_t count, const SumOfTwo& sum, uint8_t* y, const Pool& pool) {
  const Loops& loops = *chosen_isa().loops;
  in_parts(count, 1, pool,
           [&](int64_t first, int64_t last) { loops.add(a + first, b + first, size_t(last - first), sum, y + first); });
}

void quantize_images(const float* x, const PoolShape& s, const Grid& to, uint8_t* y, const Pool& pool) {
  const int64_t c = s.channels, w = s.width;
  const Isa& isa = chosen_isa();
  each_row(s.batch * s.height, c * w, pool, [&](int64_t row) {
    const int64_t n = row / s.height, h = row % s.height;
    std::vector<uint8_t> planes(static_cast<size_t>(w * c));
    for (int64_t k = 0; k < c; ++k)
      isa.quantize(x + ((n * c + k) * s.height + h) * w, size_t(w), to.scale, to.zero, to.low, to.high, &planes[k * w]);
    uint8_t* codes = y + row * w * c;
    if (c == 3 && isa.interleave_three) {
      isa.interleave_three(planes.data(), size_t(w), codes);
    } else if (c == 3) {
      const uint8_t *red = planes.data(), *green = red + w, *blue = green + w;
      for (int64_t i = 0; i < w; ++i, codes += 3) {
        codes[0] = red[i];
        codes[1] = green[i];
        codes[2] = blue[i];
      }
    } else {
      for (int64_t i = 0; i < w; ++i)
        for (int64_t k = 0; k < c; ++k) codes[i * c + k] = planes[k * w + i];
    }
  });
}

}  // namespace edgeqat
