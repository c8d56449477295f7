// Depthwise layers read lines of the image that were copied with their padding, as many as one window covers: they stay
// in the first cache, and no pixel is a special case. Where a channel has several outputs, the copy repeats it as
// often.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "layer.hpp"

namespace edgeqat {
namespace {

constexpr int64_t kPartWork = 60'000;
constexpr int64_t kMostParts = 16;

template <int kTimes>
void repeat(const uint8_t* __restrict from, int64_t count, uint8_t* __restrict to) {
  for (int64_t i = 0; i < count; ++i)
    for (int time = 0; time < kTimes; ++time) to[kTimes * i + time] = from[i];
}

// The lines under one window, each where its number modulo their count says, and one of padding alone.
class Lines {
 public:
  Lines(const LayerTensors& t, const Window& w, int64_t inputs, int64_t outputs, int64_t zero)
      : t_(t),
        span_(w.dilation[0] * (w.kernel[0] - 1) + 1),
        left_(w.pads[1] * outputs),
        row_(t.width * inputs),
        repeats_(outputs / inputs),
        line_((t.width + w.pads[1] + w.pads[3]) * outputs) {
    const size_t size = size_t((span_ + 1) * line_);
    data_ = scratch_bytes(0, size + kBlock);
    std::memset(data_, int(zero), size);
  }
  // Copies what is new under a window whose first line is `top` of image `n`.
  void show(int64_t n, int64_t top) {
    if (n != image_) next_ = 0;
    image_ = n;
    const int64_t end = std::min(top + span_, t_.height);
    for (int64_t y = std::max({next_, top, int64_t(0)}); y < end; ++y)
      copy(t_.x + (n * t_.height + y) * row_, data_ + y % span_ * line_ + left_);
    next_ = std::max(next_, end);
  }
  // Of line `y` of the image, inside or not, from the first line on.
  ptrdiff_t offset(int64_t y) const { return (y >= 0 && y < t_.height ? y % span_ : span_) * line_; }
  const uint8_t* data() const { return data_; }

 private:
  void copy(const uint8_t* from, uint8_t* to) const {
    static_assert(kMostRepeats == 4, "each number of repeats has its loop");
    if (repeats_ == 1) std::memcpy(to, from, size_t(row_));
    if (repeats_ == 2) repeat<2>(from, row_, to);
    if (repeats_ == 3) repeat<3>(from, row_, to);
    if (repeats_ == 4) repeat<4>(from, row_, to);
  }

  const LayerTensors& t_;
  int64_t span_, left_, row_, repeats_, line_, image_ = -1, next_ = 0;
  uint8_t* data_;
};

}  // namespace

void Layer::run_depthwise(const LayerTensors& t, const Pool& pool) const {
  const auto& w = spec_.window;
  const int64_t rows = t.batch * w.outputs(0, t.height);
  const int64_t work = rows * w.outputs(1, t.width) * int64_t(spec_.codes.size());
  // Each part copies the lines under its first window, so it has more rows than a window has
  const int64_t most = std::min(kMostParts, rows / (2 * w.kernel[0]));
  const int64_t parts = pool.run ? std::clamp<int64_t>(work / kPartWork, 1, std::max<int64_t>(most, 1)) : 1;
  pool.each(size_t(parts),
            [&](size_t i) { depthwise_rows(t, int64_t(i) * rows / parts, (int64_t(i) + 1) * rows / parts); });
}

// Rows of output pixels. A block is 64 channels, or 64 outputs that follow one another where `pixels_together_` pixels
// fill whole blocks.
void Layer::depthwise_rows(const LayerTensors& t, int64_t row, int64_t end_row) const {
  const auto& w = spec_.window;
  const int64_t out_h = w.outputs(0, t.height), out_w = w.outputs(1, t.width), c = spec_.outputs;
  const int64_t lanes = pixels_together_ * c, total = out_w * c;
  const std::vector<int64_t> taps = tap_order();
  std::vector<ptrdiff_t> offsets(taps.size());
  const auto is_tap = [](int64_t tap) { return tap >= 0; };
  const int last_tap = int(std::find_if(taps.rbegin(), taps.rend(), is_tap).base() - taps.begin());
  Lines lines(t, w, spec_.inputs, c, spec_.input_zero);
  for (; row < end_row; ++row) {
    const int64_t top = row % out_h * w.stride[0] - w.pads[0];
    lines.show(row / out_h, top);
    for (size_t i = 0; i < taps.size(); ++i) {
      const int64_t tap = std::max<int64_t>(taps[i], 0);  // weights of no tap are 0, any place will do
      offsets[i] = lines.offset(top + tap / w.kernel[1] * w.dilation[0]) + tap % w.kernel[1] * w.dilation[1] * c;
    }
    for (int64_t first = 0; first < std::min(lanes, total); first += kBlock) {
      const int64_t width = std::min<int64_t>(kBlock, lanes - first);
      Depthwise depthwise = {};
      depthwise.offsets = offsets.data();
      depthwise.groups = int(quads_);
      depthwise.weights = aligned_weights_ + first / kBlock * block_bytes_;
      depthwise.bias = bias_.data() + first;
      depthwise.shares = shares_columns();
      depthwise.channels = int(width);
      depthwise.rows = int(std::min<int64_t>(w.kernel[0], 4));
      depthwise.taps = last_tap;
      depthwise.narrow = narrow_depthwise_;
      Epilogue epilogue = epilogue_of(t, row * out_w, first);
      epilogue.stride = lanes;
      const int64_t step = w.stride[1] * lanes;
      const int64_t whole = total < first + width ? 0 : (total - first - width) / lanes + 1;
      depthwise_pixels(depthwise, lines.data() + first, step, whole, epilogue);
      // What is left of a row that ends within a block
      const int64_t left = total - first - whole * lanes;
      if (left <= 0) continue;
      depthwise.channels = int(std::min(width, left));
      epilogue.advance(whole * lanes);
      depthwise_pixels(depthwise, lines.data() + first + whole * step, step, 1, epilogue);
    }
  }
}

void Layer::depthwise_pixels(const Depthwise& depthwise, const uint8_t* first, ptrdiff_t step, int64_t count,
                             Epilogue epilogue) const {
  const int width = depthwise.channels;
  if (isa_.depthwise_codes && only_own_codes(epilogue))
    return isa_.depthwise_codes(depthwise, first, step, count, epilogue, width);
  alignas(64) int32_t sums[kMaxPixels * kBlock];
  for (int64_t done = 0; done < count; done += kMaxPixels) {
    const int now = int(std::min<int64_t>(kMaxPixels, count - done));
    const uint8_t* pixels[kMaxPixels];
    for (int m = 0; m < now; ++m) pixels[m] = first + (done + m) * step;
    isa_.depthwise(depthwise, pixels, now, sums);
    isa_.finish(epilogue, sums, now, width);
    epilogue.advance(now * epilogue.stride);
  }
}

}  // namespace edgeqat
