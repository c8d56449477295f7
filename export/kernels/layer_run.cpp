// Running a layer: the image gets its border, then parts of it (pixels × blocks of channels) go through the inner loop.
#include <algorithm>
#include <cstring>

#include "layer.hpp"

namespace edgeqat {
namespace {

constexpr size_t kSlack = 128;          // inner loops read up to 63 bytes past the last pixel
constexpr int64_t kPartWork = 150'000;  // multiply-adds that are worth a task of their own
constexpr int64_t kMostParts = 16;

}  // namespace

uint8_t* scratch_bytes(int place, size_t size) {
  thread_local std::vector<uint8_t> places[2];
  if (places[place].size() < size + 64) places[place].assign(size + 64, 0);
  uint8_t* data = places[place].data();
  return data + (64 - reinterpret_cast<uintptr_t>(data) % 64) % 64;
}

// Where pixel (n, y, x) of the (padded, or bit-packed) input begins.
struct Layer::Image {
  const uint8_t* data;
  uint8_t* copied;  // the same where it is a copy, else null
  int64_t height, width, pixel;

  const uint8_t* at(int64_t n, int64_t y, int64_t x) const { return data + ((n * height + y) * width + x) * pixel; }
};

// Walks over the output pixels in order; a division for each would cost as much as a small layer's sums.
struct Layer::Walk {
  const Image& image;
  const Window& window;
  int64_t out_h, out_w, n, y, x;

  Walk(const Image& image, const Window& window, int64_t out_h, int64_t out_w, int64_t pixel)
      : image(image),
        window(window),
        out_h(out_h),
        out_w(out_w),
        n(pixel / (out_h * out_w)),
        y(pixel / out_w % out_h),
        x(pixel % out_w) {}

  // Pointers of the next `count` pixels.
  void take(int count, int64_t byte, const uint8_t** pixels) {
    const int64_t step = window.stride[1] * image.pixel;
    for (int m = 0; m < count;) {
      const uint8_t* at = image.at(n, y * window.stride[0], x * window.stride[1]) + byte;
      for (; m < count && x < out_w; ++m, ++x, at += step) pixels[m] = at;
      if (x < out_w) return;
      x = 0;
      if (++y == out_h) y = 0, ++n;
    }
  }
};

struct Layer::Place {
  int64_t first_pixel, last_pixel, first_block, last_block;  // blocks counted over all groups
};

void Layer::run(const LayerTensors& t, const Pool& pool) const {
  if (kind_ == Kind::kWinograd) return run_winograd(t, pool);
  if (kind_ == Kind::kDepthwise) return run_depthwise(t, pool);
  const Image image = image_of(t);
  if (image.copied) fill(t, image, pool);
  const std::vector<ptrdiff_t> where = offsets(image);
  const auto& w = spec_.window;
  const int64_t pixels = t.batch * w.outputs(0, t.height) * w.outputs(1, t.width);
  const int64_t blocks = spec_.groups * blocks_;
  const int64_t work = pixels * int64_t(spec_.codes.size());
  const int64_t wanted = std::clamp<int64_t>(work / kPartWork, 1, kMostParts);
  const int64_t by_block = std::min(blocks, wanted);
  const int64_t by_pixel = std::clamp<int64_t>((wanted + by_block - 1) / by_block, 1, std::max<int64_t>(pixels, 1));
  pool.each(size_t(by_block * by_pixel), [&](size_t i) {
    const int64_t b = int64_t(i) / by_pixel, p = int64_t(i) % by_pixel;
    run_part(t, image, where.data(),
             {p * pixels / by_pixel, (p + 1) * pixels / by_pixel, b * blocks / by_block, (b + 1) * blocks / by_block});
  });
}

// Bytes of a pixel as the inner loop reads it.
int64_t Layer::packed_pixel() const {
  switch (kind_) {
    case Kind::kBinary:
      return spec_.inputs / 8;
    case Kind::kLookup:
      return (spec_.inputs + 2) / 3 * 2;
    case Kind::kWide:
      return 2 * spec_.inputs;
    default:
      return spec_.inputs;
  }
}

ProductFunction Layer::product_function() const {
  switch (kind_) {
    case Kind::kBinary:
      return isa_.binary;
    case Kind::kLookup:
      return isa_.lookup;
    case Kind::kWide:
      return isa_.wide;
    default:
      return isa_.product;
  }
}

Layer::Image Layer::image_of(const LayerTensors& t) const {
  const auto& w = spec_.window;
  if (!copies_image()) return {t.x, nullptr, t.height, t.width, spec_.inputs};
  const int64_t pixel = packed_pixel();
  Image image{nullptr, nullptr, t.height + w.pads[0] + w.pads[2], t.width + w.pads[1] + w.pads[3], pixel};
  const size_t needed = size_t(t.batch * image.height * image.width * pixel) + kSlack;
  image.data = image.copied = scratch_bytes(0, needed);
  return image;
}

// Whether the image's copy holds codes less 128 already (Isa::signed_codes).
bool Layer::centres(const Image& image) const {
  return kind_ == Kind::kProduct && isa_.signed_codes && spec_.input_high >= 128 && image.copied != nullptr;
}

void Layer::fill(const LayerTensors& t, const Image& image, const Pool& pool) const {
  const int64_t rows = t.batch * image.height;
  const int64_t parts = std::clamp<int64_t>(rows * image.width * spec_.inputs / 65536, 1, kMostParts);
  pool.each(size_t(parts), [&](size_t i) {
    for (int64_t row = int64_t(i) * rows / parts; row < (int64_t(i) + 1) * rows / parts; ++row) copy_row(t, image, row);
  });
}

// Padding holds the zero point; of one-bit images it holds bits 0, which `add_border` makes up for.
void Layer::copy_row(const LayerTensors& t, const Image& image, int64_t row) const {
  const auto& w = spec_.window;
  const int64_t n = row / image.height, y = row % image.height - w.pads[0];
  uint8_t* to = image.copied + row * image.width * image.pixel;
  const int flip = centres(image) ? 128 : 0;  // x ^ 128, as a signed byte, is x - 128
  const bool in_two_bytes = kind_ == Kind::kLookup || kind_ == Kind::kWide;
  const auto border = [&](uint8_t* at, int64_t pixels) {
    const int zero = kind_ == Kind::kBinary ? 0 : int(spec_.input_zero) ^ flip;
    if (!in_two_bytes) return void(std::memset(at, zero, size_t(pixels * image.pixel)));
    const int triple = 64 * (zero | zero << 2 | zero << 4);
    std::fill_n(reinterpret_cast<uint16_t*>(at), pixels * image.pixel / 2,
                uint16_t(kind_ == Kind::kLookup ? triple : zero));
  };
  if (y < 0 || y >= t.height) return border(to, image.width);
  const uint8_t* from = t.x + (n * t.height + y) * t.width * spec_.inputs;
  border(to, w.pads[1]);
  border(to + (w.pads[1] + t.width) * image.pixel, w.pads[3]);
  to += w.pads[1] * image.pixel;
  if (kind_ == Kind::kBinary)
    isa_.pack_bits(from, size_t(t.width * spec_.inputs), to);
  else if (kind_ == Kind::kLookup)
    isa_.pack_triples(from, size_t(t.width), size_t(spec_.inputs), to);
  else if (kind_ == Kind::kWide)
    std::copy_n(from, t.width * spec_.inputs, reinterpret_cast<uint16_t*>(to));
  else if (flip)
    std::transform(from, from + t.width * spec_.inputs, to, [](uint8_t code) { return uint8_t(code ^ 128); });
  else
    std::memcpy(to, from, size_t(t.width * spec_.inputs));
}

std::vector<ptrdiff_t> Layer::offsets(const Image& image) const {
  const auto& w = spec_.window;
  const int64_t columns = merges_columns() ? 1 : w.kernel[1];
  std::vector<ptrdiff_t> found;
  for (int64_t y = 0; y < w.kernel[0]; ++y)
    for (int64_t x = 0; x < columns; ++x)
      found.push_back((y * w.dilation[0] * image.width + x * w.dilation[1]) * image.pixel);
  return found;
}

void Layer::run_part(const LayerTensors& t, const Image& image, const ptrdiff_t* offsets, const Place& place) const {
  const auto& w = spec_.window;
  const int64_t out_h = w.outputs(0, t.height), out_w = w.outputs(1, t.width);
  const bool binary = kind_ == Kind::kBinary, lookup = kind_ == Kind::kLookup;
  const ProductFunction multiply = product_function();
  alignas(64) int32_t sums[kCallPixels * kBlock];
  const uint8_t* pixels[kCallPixels];
  for (int64_t block = place.first_block; block < place.last_block; ++block) {
    const int64_t group = block / blocks_, within = block % blocks_;
    const int width = int(std::min<int64_t>(kBlock, group_outputs() - within * kBlock));
    const int units = (width + kLanes - 1) / kLanes;
    const int64_t channel = group * group_outputs() + within * kBlock;
    const int8_t* weights = aligned_weights_ + block * block_bytes_;
    const int32_t* bias = bias_.data() + block * kBlock;
    const int weight_multiplier = (isa_.prescales && !lookup) || binary ? 1 : int(spec_.weight_multiplier);
    Product product{{offsets, int(runs_), int(quads_)},
                    weights,
                    bias,
                    units,
                    weight_multiplier,
                    binary || lookup ? 0 : steps_[size_t(block)],
                    int32_t(spec_.weight_multiplier * spec_.input_zero),
                    spec_.input_high < 128 || centres(image),
                    weights + block_bytes_};
    const int64_t first_byte = group * (packed_pixel() / spec_.groups);
    Walk walk(image, w, out_h, out_w, place.first_pixel);
    Epilogue epilogue = epilogue_of(t, place.first_pixel, channel);
    const bool to_codes = kind_ == Kind::kProduct && isa_.product_codes && only_own_codes(epilogue);
    const int most = lookup ? kMaxPixels : isa_.max_pixels[units], step = to_codes ? kCallPixels : most;
    for (int64_t p = place.first_pixel; p < place.last_pixel; p += step) {
      const int count = int(std::min<int64_t>(step, place.last_pixel - p));
      walk.take(count, first_byte, pixels);
      if (to_codes) {
        isa_.product_codes(product, pixels, count, epilogue, width);
        epilogue.advance(count * spec_.outputs);
        continue;
      }
      multiply(product, pixels, count, sums);
      product.ahead = weights + block_bytes_ + block_bytes_ / 2;  // a call fetches half as much as it reads
      if (binary && w.padded())
        for (int m = 0; m < count; ++m)
          add_border(t, (p + m) / out_w % out_h, (p + m) % out_w, block * kBlock, width, sums + m * kBlock);
      isa_.finish(epilogue, sums, count, width);
      epilogue.advance(count * spec_.outputs);
    }
  }
}

// One-bit layers: bits of padding count as -1 in the inner loop but are 0, so each tap outside gives its weights back.
void Layer::add_border(const LayerTensors& t, int64_t y, int64_t x, int64_t channel, int width, int32_t* sums) const {
  const auto& w = spec_.window;
  const int64_t top = y * w.stride[0] - w.pads[0], left = x * w.stride[1] - w.pads[1];
  const int64_t bottom = top + (w.kernel[0] - 1) * w.dilation[0], right = left + (w.kernel[1] - 1) * w.dilation[1];
  if (top >= 0 && left >= 0 && bottom < t.height && right < t.width) return;
  for (int64_t ky = 0; ky < w.kernel[0]; ++ky)
    for (int64_t kx = 0; kx < w.kernel[1]; ++kx) {
      const int64_t at_y = top + ky * w.dilation[0], at_x = left + kx * w.dilation[1];
      if (at_y >= 0 && at_y < t.height && at_x >= 0 && at_x < t.width) continue;
      const int32_t* tap = border_.data() + (ky * w.kernel[1] + kx) * blocks_ * kBlock + channel;
      for (int o = 0; o < width; ++o) sums[o] += tap[o];
    }
}

// Whether an instruction set may go from codes to codes (isa.hpp).
bool only_own_codes(const Epilogue& e) { return e.in_32_bits && !e.other && !e.real; }

Epilogue Layer::epilogue_of(const LayerTensors& t, int64_t pixel, int64_t channel) const {
  Epilogue e = spec_.epilogue;
  const int64_t block_of_group = channel % group_outputs() / kBlock, padded = blocks_ * kBlock;
  const bool depthwise = kind_ == Kind::kDepthwise;
  e.multiplier =
      multiplier_.data() + (depthwise ? channel : channel / group_outputs() * padded + block_of_group * kBlock);
  e.stride = spec_.outputs;
  e.in_32_bits = in_32_bits_;
  e.other = t.other;
  e.own = t.own;
  e.sum = t.sum;
  e.real = t.real;
  for (int i = 0; i < e.tables; ++i) {
    e.table[i] = spec_.tables.data() + 256 * i;
    e.copy[i] = t.copy[i];
  }
  e.advance(pixel * spec_.outputs + channel);
  return e;
}

}  // namespace edgeqat
