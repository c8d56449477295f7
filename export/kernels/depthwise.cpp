// Depthwise layers read the image where it is: pixels whose whole window lies inside are computed in place, the others (at
// the border, or where 64 channels would reach behind the tensor) from a copy of their window.
#include <algorithm>
#include <cstring>
#include <utility>

#include "layer.hpp"

namespace edgeqat {
namespace {

constexpr int64_t kPartWork = 60'000;
constexpr int64_t kMostParts = 16;

// Output places whose taps all lie inside an axis of `size`.
std::pair<int64_t, int64_t> interior(const Window& w, int axis, int64_t size, int64_t outputs) {
  const int64_t stride = w.stride[axis], reach = w.dilation[axis] * (w.kernel[axis] - 1);
  const int64_t first = (w.pads[axis] + stride - 1) / stride, free = size + w.pads[axis] - 1 - reach;
  const int64_t last = free < 0 ? 0 : free / stride + 1;
  return {std::min(first, outputs), std::max(std::min(last, outputs), std::min(first, outputs))};
}

}  // namespace

void Layer::run_depthwise(const LayerTensors& t, const Pool& pool) const {
  const auto& w = spec_.window;
  const int64_t rows = t.batch * w.outputs(0, t.height), work = rows * w.outputs(1, t.width) * int64_t(spec_.codes.size());
  std::vector<ptrdiff_t> offsets;
  for (const int64_t tap : tap_order()) {  // where there is no tap the weights are 0 and any place will do
    const int64_t at = std::max<int64_t>(tap, 0), y = at / w.kernel[1], x = at % w.kernel[1];
    offsets.push_back((y * w.dilation[0] * t.width + x * w.dilation[1]) * spec_.inputs);
  }
  const int64_t parts = std::clamp<int64_t>(work / kPartWork, 1, std::min(kMostParts, std::max<int64_t>(rows, 1)));
  pool.each(size_t(parts), [&](size_t i) {
    for (int64_t row = int64_t(i) * rows / parts; row < (int64_t(i) + 1) * rows / parts; ++row)
      for (int64_t block = 0; block < blocks_; ++block) depthwise_row(t, row, block, offsets.data());
  });
}

// One row of output pixels, 64 channels of each.
void Layer::depthwise_row(const LayerTensors& t, int64_t row, int64_t block, const ptrdiff_t* offsets) const {
  const auto& w = spec_.window;
  const int64_t out_h = w.outputs(0, t.height), out_w = w.outputs(1, t.width), c = spec_.inputs, channel = block * kBlock;
  const int64_t n = row / out_h, y = row % out_h, top = y * w.stride[0] - w.pads[0];
  const int width = int(std::min<int64_t>(kBlock, c - channel));
  const auto rows_inside = interior(w, 0, t.height, out_h);
  auto columns_inside = interior(w, 1, t.width, out_w);
  const uint8_t* image = t.x + n * t.height * t.width * c + channel;
  const uint8_t* end = t.x + t.batch * t.height * t.width * c;
  if (y < rows_inside.first || y >= rows_inside.second) columns_inside = {0, 0};
  const int64_t below = w.dilation[0] * (w.kernel[0] - 1), right = w.dilation[1] * (w.kernel[1] - 1);
  const ptrdiff_t furthest = (below * t.width + right) * c + kBlock;
  // Columns are shared where the next pixel's window begins one tap further right.
  const bool shares = w.kernel[0] <= 4 && w.stride[1] == w.dilation[1];
  Depthwise inside{offsets, int(quads_), aligned_weights_ + block * block_bytes_, bias_.data() + channel, shares};
  Epilogue epilogue = epilogue_of(t, row * out_w, channel);
  alignas(64) int32_t sums[kMaxPixels * kBlock];
  std::vector<uint8_t> window;
  std::vector<ptrdiff_t> places;
  for (int64_t x = 0; x < out_w;) {
    const uint8_t* pixels[kMaxPixels];
    int count = 0;
    for (; count < kMaxPixels && x + count >= columns_inside.first && x + count < columns_inside.second; ++count) {
      pixels[count] = image + (top * t.width + (x + count) * w.stride[1] - w.pads[1]) * c;
      if (end - pixels[count] < furthest) break;
    }
    if (count > 0) {
      isa_.depthwise(inside, pixels, count, sums);
    } else {
      const int64_t taps = w.kernel[0] * w.kernel[1];
      if (window.empty()) {
        window.resize(size_t(taps * kBlock));
        for (const int64_t tap : tap_order()) places.push_back(std::max<int64_t>(tap, 0) * kBlock);
      }
      for (int64_t tap = 0; tap < taps; ++tap) {
        const int64_t at_y = top + tap / w.kernel[1] * w.dilation[0];
        const int64_t at_x = x * w.stride[1] - w.pads[1] + tap % w.kernel[1] * w.dilation[1];
        uint8_t* to = window.data() + tap * kBlock;
        if (at_y < 0 || at_y >= t.height || at_x < 0 || at_x >= t.width)
          std::memset(to, int(spec_.input_zero), kBlock);
        else
          std::memcpy(to, image + (at_y * t.width + at_x) * c, size_t(width));
      }
      Depthwise copied = inside;
      copied.offsets = places.data();
      pixels[0] = window.data();
      count = 1;
      isa_.depthwise(copied, pixels, count, sums);
    }
    isa_.finish(epilogue, sums, count, width);
    epilogue.advance(count * c);
    x += count;
  }
}

}  // namespace edgeqat
