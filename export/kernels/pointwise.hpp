// Pools, sums, tables and borders on NHWC codes. All run on any processor; none is where the time goes.
#pragma once
#include <algorithm>
#include <cstdint>

#include "layer.hpp"
#include "loops.hpp"

namespace edgeqat {

// body(first, last) for parts of `rows`, each worth a task of its own. `work`: of a row, in codes that are added.
template <typename Body>
void in_parts(int64_t rows, int64_t work, const Pool& pool, Body body) {
  constexpr int64_t in_part = 32'768, most = 16;
  const int64_t parts = std::clamp<int64_t>(rows * work / in_part, 1, std::min(most, std::max<int64_t>(rows, 1)));
  pool.each(size_t(parts),
            [&](size_t part) { body(int64_t(part) * rows / parts, (int64_t(part) + 1) * rows / parts); });
}

struct PoolShape {
  int64_t batch = 1, height = 1, width = 1, channels = 1, out_height = 1, out_width = 1;
};

// The largest code of each window; what lies outside does not count, and a window wholly outside gives 0.
void max_pool(const uint8_t* x, const PoolShape& s, const Window& w, uint8_t* y, const Pool& pool);

// clip(rint((((x1 + x2) + x3) + ...) / n / scale_y + zero_y)) with x = float((q - zero_x) · scale_x), row by row;
// padding adds nothing, and counts where `counts_padding`.
void average_pool(const uint8_t* x, const PoolShape& s, const Window& w, bool counts_padding, const Grid& from,
                  const Grid& to, uint8_t* y, const Pool& pool);

// clip(rint(float(Σ (q - zero_x)) · multiplier) + zero_y) over all pixels of an image.
void global_pool(const uint8_t* x, const PoolShape& s, int zero, float multiplier, const Grid& to, uint8_t* y);

void add_codes(const uint8_t* a, const uint8_t* b, int64_t count, const SumOfTwo& sum, uint8_t* y, const Pool& pool);

// Images N_C_H_W float -> codes N_H_W_C: clip(rint(x / scale) + zero). NaN becomes the lowest code.
void quantize_images(const float* x, const PoolShape& s, const Grid& to, uint8_t* y, const Pool& pool);

}  // namespace edgeqat
