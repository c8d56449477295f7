// Winograd's minimal filtering F(2×2, 3×3) (arXiv 1509.09308) in exact integers: 16 products for 4 outputs instead
// of 36.
//
//   y = Aᵀ [ (G g Gᵀ) ⊙ (Bᵀ d B) ] A,   d a 4×4 tile of codes, g a 3×3 kernel of codes, y 2×2 sums
//   Bᵀ rows: d0 - d2, d1 + d2, d2 - d1, d1 - d3      2·G rows: 2 g0, g0 + g1 + g2, g0 - g1 + g2, 2 g2
//   Aᵀ rows: m0 + m1 + m2, m1 - m2 - m3
//
// With 2·G in both directions everything is an integer and the sums are exactly 4·y. Low bits make it fit the byte
// kernels:
//   codes 0 <= d <= h: Bᵀ d B lies within [-2h, 2h], at position (1,1) within [0, 4h]; with 2h added everywhere else
//   all are within [0, 4h], a byte for h <= 63 (6 bits). What 2h adds, 2h · Σ U, leaves the sums again through their
//   bias. |2G g 2Gᵀ| <= 9 · max|g|: 72 at 4 bits; wider codes qualify where the layer's own weights stay within a byte.
#include <algorithm>
#include <cstdlib>

#include "layer.hpp"
#include "narrow.hpp"

namespace edgeqat {
namespace {

constexpr int kPositions = 16;
constexpr int kMiddle = 5;  // position (1,1)
constexpr int64_t kPartWork = 150'000;
constexpr int64_t kMostParts = 16;
constexpr int64_t kLargestSum = 2147483647;

void transform_kernel(const int8_t* g, int* u) {
  int rows[4][3];
  for (int x = 0; x < 3; ++x) {
    const int g0 = g[x], g1 = g[3 + x], g2 = g[6 + x];
    rows[0][x] = 2 * g0;
    rows[1][x] = g0 + g1 + g2;
    rows[2][x] = g0 - g1 + g2;
    rows[3][x] = 2 * g2;
  }
  for (int y = 0; y < 4; ++y) {
    const int* g = rows[y];
    u[4 * y] = 2 * g[0];
    u[4 * y + 1] = g[0] + g[1] + g[2];
    u[4 * y + 2] = g[0] - g[1] + g[2];
    u[4 * y + 3] = 2 * g[2];
  }
}

int64_t half_up(int64_t size) { return (size + 1) / 2; }

}  // namespace

// Weights [blocks][16][quads][16 · units][4]. False where the layer is not of this kind or does not fit.
bool Layer::pack_winograd() {
  const auto& s = spec_;
  const auto& w = s.window;
  const bool shape = w.kernel[0] == 3 && w.kernel[1] == 3 && w.stride[0] == 1 && w.stride[1] == 1 &&
                     w.dilation[0] == 1 && w.dilation[1] == 1 && s.groups == 1 && s.inputs >= 16 && s.outputs >= 16;
  if (!shape || 4 * s.input_high > 255 || isa_.winograd_input == nullptr) return false;
  quads_ = (s.inputs + 3) / 4;
  block_bytes_ = kPositions * quads_ * kBlock * 4;
  allot_weights(blocks_ * block_bytes_);
  winograd_bias_.assign(size_t(blocks_ * kPositions * kBlock), 0);
  steps_.assign(size_t(blocks_ * kPositions), kMostSteps);
  int64_t largest = 1;
  for (int64_t o = 0; o < s.outputs; ++o) {
    const int64_t block = o / kBlock, lane = o % kBlock;
    const int64_t width = (std::min<int64_t>(kBlock, s.outputs - block * kBlock) + kLanes - 1) / kLanes * kLanes;
    int8_t* packed = aligned_weights_ + block * block_bytes_;
    int64_t magnitude = 0;
    std::vector<NarrowProof> proofs(kPositions, NarrowProof(quads_, 4 * s.input_high));
    for (int64_t c = 0; c < s.inputs; ++c) {
      int u[kPositions];
      transform_kernel(s.codes.data() + (o * s.inputs + c) * 9, u);
      for (int p = 0; p < kPositions; ++p) {
        if (u[p] < -128 || u[p] > 127) return false;
        packed[p * quads_ * width * 4 + weight_place(0, c / 4, 1, lane, width) + c % 4] = int8_t(u[p]);
        int32_t& bias = winograd_bias_[(block * kPositions + p) * kBlock + lane];
        if (isa_.signed_codes && p == kMiddle) bias += int32_t(2 * s.input_high * u[p]);
        if (!isa_.signed_codes && p != kMiddle) bias -= int32_t(2 * s.input_high * u[p]);
        largest = std::max<int64_t>(largest, std::abs(u[p]));
        magnitude += std::abs(u[p]);
        proofs[size_t(p)].add(c / 4, c % 4, u[p]);
      }
    }
    for (int64_t p = 0; p < kPositions; ++p) {
      int& steps = steps_[size_t(block * kPositions + p)];
      steps = std::min(steps, proofs[size_t(p)].steps());
    }
    // A sum and its bias are each at most 4h · Σ|U|, and the output transform adds up to 16 of them with signs.
    if (2 * 4 * s.input_high * magnitude > kLargestSum) return false;
  }
  if (isa_.signed_codes)  // |V| <= 2h
    std::fill(steps_.begin(), steps_.end(), int(kLargestNarrow / (2 * 2 * s.input_high * largest)));
  return true;
}

void Layer::run_winograd(const LayerTensors& t, const Pool& pool) const {
  const auto& w = spec_.window;
  const int64_t tiles = t.batch * half_up(w.outputs(0, t.height)) * half_up(w.outputs(1, t.width));
  const int64_t depth = 4 * quads_, plane = tiles * depth;
  uint8_t* transformed = scratch_bytes(0, size_t(kPositions * plane) + 64);
  uint8_t* border = scratch_bytes(1, size_t(spec_.inputs) + 64);
  std::fill(border, border + spec_.inputs, uint8_t(spec_.input_zero));
  const int64_t input_parts = std::clamp<int64_t>(tiles * depth * kPositions / 65536, 1, std::min(kMostParts, tiles));
  pool.each(size_t(input_parts), [&](size_t i) {
    transform_tiles(t, border, transformed, int64_t(i) * tiles / input_parts, (int64_t(i) + 1) * tiles / input_parts);
  });
  const int64_t strips = (tiles + kWinogradTiles - 1) / kWinogradTiles, units = blocks_ * strips;
  const int64_t work = tiles * kPositions * depth * spec_.outputs;
  const int64_t parts = std::clamp<int64_t>(work / kPartWork, 1, std::min(kMostParts, units));
  pool.each(size_t(parts), [&](size_t i) {
    for (int64_t unit = int64_t(i) * units / parts; unit < (int64_t(i) + 1) * units / parts; ++unit) {
      const int64_t strip = unit % strips;
      winograd_strip(t, transformed, unit / strips, strip * tiles / strips, (strip + 1) * tiles / strips);
    }
  });
}

void Layer::transform_tiles(const LayerTensors& t, const uint8_t* border, uint8_t* to, int64_t first,
                            int64_t last) const {
  const auto& w = spec_.window;
  const int64_t rows = half_up(w.outputs(0, t.height)), columns = half_up(w.outputs(1, t.width));
  const int64_t depth = 4 * quads_, plane = t.batch * rows * columns * depth;
  const int64_t pixel = spec_.inputs, line = t.width * pixel;
  int64_t n = first / (rows * columns), row = first / columns % rows, column = first % columns;
  for (int64_t tile = first; tile < last; ++tile) {
    const int64_t top = 2 * row - w.pads[0], left = 2 * column - w.pads[1];
    const uint8_t* pixels[kPositions];
    if (top >= 0 && left >= 0 && top + 4 <= t.height && left + 4 <= t.width) {
      const uint8_t* corner = t.x + ((n * t.height + top) * t.width + left) * pixel;
      for (int64_t p = 0; p < kPositions; ++p) pixels[p] = corner + p / 4 * line + p % 4 * pixel;
    } else {
      for (int64_t p = 0; p < kPositions; ++p) {
        const int64_t y = top + p / 4, x = left + p % 4;
        const bool inside = y >= 0 && y < t.height && x >= 0 && x < t.width;
        pixels[p] = inside ? t.x + ((n * t.height + y) * t.width + x) * pixel : border;
      }
    }
    isa_.winograd_input(pixels, size_t(pixel), int(2 * spec_.input_high), to + tile * depth, plane);
    if (++column == columns) {
      column = 0;
      if (++row == rows) row = 0, ++n;
    }
  }
}

void Layer::winograd_strip(const LayerTensors& t, const uint8_t* transformed, int64_t block, int64_t first,
                           int64_t last) const {
  const auto& w = spec_.window;
  const int64_t out_h = w.outputs(0, t.height), out_w = w.outputs(1, t.width);
  const int64_t rows = half_up(out_h), columns = half_up(out_w);
  const int64_t depth = 4 * quads_, plane = t.batch * rows * columns * depth, tiles = last - first;
  const int width = int(std::min<int64_t>(kBlock, spec_.outputs - block * kBlock)),
            units = (width + kLanes - 1) / kLanes;
  const int8_t* weights = aligned_weights_ + block * block_bytes_;
  const int step = isa_.max_pixels[units], weight_multiplier = int(spec_.weight_multiplier);
  const ptrdiff_t nowhere = 0;
  alignas(64) int32_t sums[kPositions * kWinogradTiles * kBlock];
  alignas(64) int32_t lines[2][2 * kWinogradTiles * kBlock];
  for (int64_t p = 0; p < kPositions; ++p) {
    const int32_t* bias = winograd_bias_.data() + (block * kPositions + p) * kBlock;
    const int64_t bytes = quads_ * units * kLanes * 4;
    Product product{
        {&nowhere, 1, int(quads_)}, weights + p * bytes,      bias, units, 1, steps_[size_t(block * kPositions + p)], 0,
        isa_.signed_codes != 0,     weights + (p + 1) * bytes};
    for (int64_t tile = 0; tile < tiles; tile += step) {
      const int count = int(std::min<int64_t>(step, tiles - tile));
      const uint8_t* pixels[kCallPixels];
      for (int m = 0; m < count; ++m) pixels[m] = transformed + p * plane + (first + tile + m) * depth;
      isa_.product(product, pixels, count, sums + (p * kWinogradTiles + tile) * kBlock);
      product.ahead = weights + (p + 1) * bytes + bytes / 2;  // a call fetches half as much as it reads
    }
  }
  for (int64_t tile = first; tile < last;) {  // as many tiles at a time as lie in one row of tiles
    const int64_t column = tile % columns, run = std::min(last - tile, columns - column);
    for (int64_t i = 0; i < run; ++i) {
      int32_t* const pixels[4] = {lines[0] + 2 * i * kBlock, lines[0] + (2 * i + 1) * kBlock, lines[1] + 2 * i * kBlock,
                                  lines[1] + (2 * i + 1) * kBlock};
      isa_.winograd_output(sums + (tile - first + i) * kBlock, units, weight_multiplier, bias_.data() + block * kBlock,
                           pixels);
    }
    const int64_t n = tile / (rows * columns), y = 2 * (tile / columns % rows), x = 2 * column;
    const int count = int(std::min(2 * run, out_w - x));
    for (int64_t line = 0; line < std::min<int64_t>(2, out_h - y); ++line)
      isa_.finish(epilogue_of(t, (n * out_h + y + line) * out_w + x, block * kBlock), lines[line], count, width);
    tile += run;
  }
}

}  // namespace edgeqat
