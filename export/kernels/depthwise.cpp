// Depthwise layers read the image where it is. Taps outside of it read a stretch of the input's zero point instead, and
// only pixels near the tensor's end, where 64 channels would reach past it, are computed from a copy of their window.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

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

// Taps in the order of the weights, as distances in the image; where there is no tap the weights are 0 and any place
// will do.
struct Tap {
  int64_t y, x;
};

// Where the taps of the pixels of one call lie, seen from the first of them.
struct Places {
  std::vector<ptrdiff_t> offsets;
  ptrdiff_t last = 0;  // of those inside the image
};

// Of taps whose window begins at (`top`, `left`), seen from `pixel`, which is at (`y`, `x`) of the image.
void locate(const std::vector<Tap>& taps, const LayerTensors& t, int64_t channels, int64_t top, int64_t left, int64_t y,
            int64_t x, ptrdiff_t outside, Places& to) {
  to.last = PTRDIFF_MIN;
  for (size_t i = 0; i < taps.size(); ++i) {
    const int64_t at_y = top + taps[i].y, at_x = left + taps[i].x;
    const bool inside = at_y >= 0 && at_y < t.height && at_x >= 0 && at_x < t.width;
    to.offsets[i] = inside ? ((at_y - y) * t.width + at_x - x) * channels : outside;
    if (inside) to.last = std::max(to.last, to.offsets[i]);
  }
}

}  // namespace

void Layer::run_depthwise(const LayerTensors& t, const Pool& pool) const {
  const auto& w = spec_.window;
  const int64_t rows = t.batch * w.outputs(0, t.height),
                work = rows * w.outputs(1, t.width) * int64_t(spec_.codes.size());
  const int64_t parts = std::clamp<int64_t>(work / kPartWork, 1, std::min(kMostParts, std::max<int64_t>(rows, 1)));
  pool.each(size_t(parts),
            [&](size_t i) { depthwise_rows(t, int64_t(i) * rows / parts, (int64_t(i) + 1) * rows / parts); });
}

// Rows of output pixels, 64 channels of each at a time.
void Layer::depthwise_rows(const LayerTensors& t, int64_t row, int64_t end_row) const {
  const auto& w = spec_.window;
  const int64_t out_h = w.outputs(0, t.height), out_w = w.outputs(1, t.width), c = spec_.inputs, step = w.stride[1] * c;
  const auto columns = interior(w, 1, t.width, out_w), lines = interior(w, 0, t.height, out_h);
  const uint8_t* end = t.x + t.batch * t.height * t.width * c;
  std::vector<Tap> taps;
  for (const int64_t tap : tap_order()) {
    const int64_t at = std::max<int64_t>(tap, 0);
    taps.push_back({at / w.kernel[1] * w.dilation[0], at % w.kernel[1] * w.dilation[1]});
  }
  // Columns are shared where the next pixel's window begins one tap further right.
  const bool shares = w.kernel[0] <= 4 && w.stride[1] == w.dilation[1];
  // Here, too, pixel m of a call starts m · step after its first pixel.
  const std::vector<uint8_t> zeros(size_t((kMaxPixels - 1) * step + kBlock), uint8_t(spec_.input_zero));
  std::vector<uint8_t> window(taps.size() * kBlock);
  Places places{std::vector<ptrdiff_t>(taps.size())}, copied = places;
  for (size_t i = 0; i < taps.size(); ++i) copied.offsets[i] = ptrdiff_t(i * kBlock);
  alignas(64) int32_t sums[kMaxPixels * kBlock];
  for (; row < end_row; ++row) {
    const int64_t n = row / out_h, y = row % out_h, top = y * w.stride[0] - w.pads[0];
    const int64_t base_y = std::clamp<int64_t>(top, 0, t.height - 1);
    for (int64_t block = 0; block < blocks_; ++block) {
      const int64_t channel = block * kBlock;
      const int width = int(std::min<int64_t>(kBlock, c - channel));
      Epilogue epilogue = epilogue_of(t, row * out_w, channel);
      const uint8_t* line = t.x + (n * t.height + base_y) * t.width * c + channel;
      bool located = false;  // whether `places` are those of any pixel whose window lies inside the image
      for (int64_t x = 0; x < out_w;) {
        const int64_t left = x * w.stride[1] - w.pads[1], base_x = std::clamp<int64_t>(left, 0, t.width - 1);
        int count = x < columns.first ? 1 : int(std::clamp<int64_t>(columns.second - x, 1, kMaxPixels));
        const uint8_t* pixels[kMaxPixels] = {line + base_x * c};
        const ptrdiff_t outside = reinterpret_cast<intptr_t>(zeros.data()) - reinterpret_cast<intptr_t>(pixels[0]);
        const bool inner = y >= lines.first && y < lines.second && x >= columns.first && x < columns.second;
        if (!inner || !located) locate(taps, t, c, top, left, base_y, base_x, outside, places);
        located = inner;
        const ptrdiff_t room = end - pixels[0] - kBlock;
        while (count > 1 && places.last + (count - 1) * step > room) --count;
        const bool fits = places.last <= room;
        if (!fits) {
          for (size_t i = 0; i < taps.size(); ++i)
            std::memcpy(window.data() + i * kBlock, pixels[0] + places.offsets[i], size_t(width));
          pixels[0] = window.data();
        }
        for (int m = 1; m < count; ++m) pixels[m] = pixels[m - 1] + step;
        isa_.depthwise(
            {(fits ? places : copied).offsets.data(), int(quads_), aligned_weights_ + block * block_bytes_,
             bias_.data() + channel, shares, width, w.kernel[0] <= 4 ? int(w.kernel[0]) : 4, narrow_depthwise_},
            pixels, count, sums);
        isa_.finish(epilogue, sums, count, width);
        epilogue.advance(count * c);
        x += count;
      }
    }
  }
}

}  // namespace edgeqat
