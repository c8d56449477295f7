// Prepacking: what happens to a layer's weights once, when its session is created.
#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <numeric>
#include <stdexcept>

#include "layer.hpp"
#include "narrow.hpp"

namespace edgeqat {
namespace {

constexpr int64_t kLargestSum = 2147483647;

int64_t rounded_up(int64_t value, int64_t unit) { return (value + unit - 1) / unit * unit; }

}  // namespace

Layer::Layer(LayerSpec spec, const Isa& isa) : spec_(std::move(spec)), isa_(isa), kind_(Kind::kProduct) {
  check();
  kind_ = choose_kind();
  blocks_ = rounded_up(group_outputs(), kBlock) / kBlock;
  if (kind_ == Kind::kDepthwise) pixels_together_ = pixels_of_blocks();
  prepare_bias();
  if (kind_ == Kind::kDepthwise) {
    pack_depthwise();
  } else if (kind_ == Kind::kProduct && pack_winograd()) {
    kind_ = Kind::kWinograd;
  } else if (kind_ == Kind::kProduct && pack_lookup()) {
    kind_ = Kind::kLookup;
  } else {
    lay_out_products();
    if (kind_ == Kind::kProduct) prove_narrow_sums();
    if (wants_wide_codes()) {
      kind_ = Kind::kWide;
      lay_out_products();
    }
    pack_products();
  }
}

void Layer::check() const {
  const auto& s = spec_;
  const auto refuse = [&](const std::string& what) { throw std::invalid_argument(what); };
  if (s.groups < 1 || s.inputs % s.groups || s.outputs % s.groups) refuse("channels do not divide into its groups");
  if (s.window.stride[0] < 1 || s.window.stride[1] < 1 || s.window.dilation[0] < 1 || s.window.dilation[1] < 1)
    refuse("strides and dilations are at least 1");
  const int64_t taps = s.window.kernel[0] * s.window.kernel[1], depth = group_inputs() * taps;
  if (int64_t(s.codes.size()) != s.outputs * depth) refuse("has another number of weight codes than its shape says");
  if (int64_t(s.bias.size()) != s.outputs || int64_t(s.multiplier.size()) != s.outputs)
    refuse("needs one bias and one scale per output channel");
  if (s.weight_multiplier < 1 || s.weight_multiplier > 127) refuse("its weight multiplier is not between 1 and 127");
  if (s.input_zero < 0 || s.input_high < 1 || s.input_high > 255 || s.input_zero > s.input_high)
    refuse("its input grid is not within a byte");
  for (const int8_t code : s.codes)
    if (code * s.weight_multiplier < -128 || code * s.weight_multiplier > 127)
      refuse("weight code " + std::to_string(code) + " times its weight multiplier does not fit a byte");
  for (int64_t o = 0; o < s.outputs; ++o) {
    int64_t magnitude = 0, total = 0;
    for (int64_t k = 0; k < depth; ++k) {
      magnitude += std::abs(int(s.codes[o * depth + k]));
      total += s.codes[o * depth + k];
    }
    // |Σ w·x| <= high · Σ|w| for codes 0 <= x <= high; the zero point's share sits in the bias.
    const int64_t bias = std::abs(int64_t(s.bias[o]) - s.weight_multiplier * s.input_zero * total);
    if (s.weight_multiplier * s.input_high * magnitude + bias > kLargestSum)
      refuse("sums of output channel " + std::to_string(o) + " may exceed 32 bits");
  }
}

Layer::Kind Layer::choose_kind() const {
  const auto& s = spec_;
  if (s.groups == s.inputs && s.groups > 1 && group_outputs() <= kMostRepeats) return Kind::kDepthwise;
  if (s.one_bit && s.groups == 1 && s.inputs % 32 == 0 && isa_.binary != nullptr) return Kind::kBinary;
  return Kind::kProduct;
}

void Layer::allot_weights(int64_t bytes) {
  weights_.assign(size_t(bytes) + 63, 0);
  aligned_weights_ = weights_.data() + (64 - reinterpret_cast<uintptr_t>(weights_.data()) % 64) % 64;
}

// Channels in the order of the blocks, zeros where a group's last block is padded. The zero point leaves the sum:
// Σ w (x - z) = Σ w x - z Σ w. One-bit sums are K - 2 · differing bits instead.
void Layer::prepare_bias() {
  const auto& s = spec_;
  const int64_t depth = group_inputs() * s.window.kernel[0] * s.window.kernel[1], padded = blocks_ * kBlock;
  const bool depthwise = kind_ == Kind::kDepthwise;
  const int64_t channels = depthwise ? rounded_up(pixels_together_ * s.outputs, kBlock) : s.groups * padded;
  // Subtracted from codes (Isa::signed_codes). Such a bias wraps where only its sum with the products fits 32 bits.
  const int64_t centre = kind_ == Kind::kProduct && isa_.signed_codes && s.input_high >= 128 ? 128 : 0;
  bias_.assign(channels, 0);
  multiplier_.assign(channels, 0.0f);
  for (int64_t o = 0; o < s.outputs; ++o) {
    const int64_t at = depthwise ? o : o / group_outputs() * padded + o % group_outputs();
    int64_t total = 0;
    for (int64_t k = 0; k < depth; ++k) total += s.codes[o * depth + k];
    const int64_t shift = kind_ == Kind::kBinary ? -s.weight_multiplier * s.input_zero * depth
                                                 : s.weight_multiplier * (s.input_zero - centre) * total;
    bias_[at] = int32_t(s.bias[o] - shift);
    multiplier_[at] = s.multiplier[o];
    in_32_bits_ &= std::abs(s.multiplier[o]) <= 0.5f;  // a sum has 31 bits and a sign
  }
  for (int64_t at = s.outputs; at < pixels_together_ * s.outputs; ++at) {
    bias_[at] = bias_[at - s.outputs];
    multiplier_[at] = multiplier_[at - s.outputs];
  }
}

// Where in a block of `width` channels the four codes of a channel stand, in quad `quad` of stretch `run` of `runs`.
int64_t Layer::weight_place(int64_t run, int64_t quad, int64_t runs, int64_t lane, int64_t width) const {
  const int64_t together = isa_.tile_channels ? isa_.tile_channels : width;
  const int64_t first = (lane / together * runs + run) * quads_ * together, channel = lane % together;
  const bool paired = isa_.quad_pairs && kind_ != Kind::kBinary && (quad | 1) < quads_;
  const int64_t place = paired ? quad / 2 * 2 * together + channel * 2 + quad % 2 : quad * together + channel;
  return 4 * (first + place);
}

// Stretches of a product: rows of the kernel, or its taps where the codes between two of them are not read.
void Layer::lay_out_products() {
  const int64_t taps = spec_.window.kernel[0] * spec_.window.kernel[1];
  const int64_t taps_per_run = merges_columns() ? spec_.window.kernel[1] : 1;
  const int64_t codes = taps_per_run * group_inputs();
  runs_ = taps / taps_per_run;
  length_ = kind_ == Kind::kBinary ? codes / 8 : kind_ == Kind::kWide ? 2 * codes : codes;
  quads_ = rounded_up(length_, 4) / 4;
  block_bytes_ = runs_ * quads_ * kBlock * 4;
}

// Codes are widened once, in the image's copy, where there is one anyway and not even two products fit 16 bits.
bool Layer::wants_wide_codes() const {
  if (kind_ != Kind::kProduct || isa_.wide == nullptr || !copies_image()) return false;
  return std::find(steps_.begin(), steps_.end(), 0) != steps_.end();
}

// A product's weights: for each block of 64 channels (the last one narrower, in units of 16) stretches, quads,
// channels, four codes. One bit: 32 codes take the place of four, a byte eight. Wide codes: two take the place of four.
void Layer::pack_products() {
  const auto& s = spec_;
  const int64_t rows = s.window.kernel[0], columns = s.window.kernel[1], inputs = group_inputs();
  const int64_t taps_per_run = merges_columns() ? columns : 1;
  const bool binary = kind_ == Kind::kBinary, wide = kind_ == Kind::kWide;
  allot_weights(s.groups * blocks_ * block_bytes_);
  if (binary) border_.assign(rows * columns * blocks_ * kBlock, 0);
  const int scale = !binary && isa_.prescales ? int(s.weight_multiplier) : 1;
  for (int64_t o = 0; o < s.outputs; ++o) {
    const int64_t in_group = o % group_outputs(), block = in_group / kBlock, lane = in_group % kBlock;
    const int64_t width = rounded_up(std::min<int64_t>(kBlock, group_outputs() - block * kBlock), kLanes);
    int8_t* packed = aligned_weights_ + (o / group_outputs() * blocks_ + block) * block_bytes_;
    for (int64_t tap = 0; tap < rows * columns; ++tap)
      for (int64_t c = 0; c < inputs; ++c) {
        const int8_t code = s.codes[(o * inputs + c) * rows * columns + tap];
        const int64_t element = tap % taps_per_run * inputs + c;
        const int64_t byte = binary ? element / 8 : wide ? 2 * element : element;
        int8_t& target = packed[weight_place(tap / taps_per_run, byte / 4, runs_, lane, width) + byte % 4];
        if (wide) {
          const auto wide_code = int16_t(code * scale);
          std::memcpy(&target, &wide_code, sizeof wide_code);
          continue;
        }
        if (!binary) {
          target = int8_t(code * scale);
          continue;
        }
        if (code > 0) target = int8_t(uint8_t(target) | 1u << element % 8);
        border_[tap * blocks_ * kBlock + in_group] += int32_t(code * s.weight_multiplier * s.input_zero);
      }
  }
}

// Taps in groups of four. Up to four rows: a column of the kernel is a group, so that neighbouring pixels share groups.
// Two-bit weights in the order of `lookup`. Whether that is possible: a table's entry is at most 27 (three products
// from -6 to 3, lifted by 18), nine of them fit a byte, and all of a sum must fit 16 bits. Kernels of one pixel would
// take longer: the image is packed for all, and they use a packed pixel only once.
bool Layer::pack_lookup() {
  const auto& s = spec_;
  const auto [low, high] = std::minmax_element(s.codes.begin(), s.codes.end());
  const int64_t rows = s.window.kernel[0], columns = s.window.kernel[1], triples = (s.inputs + 2) / 3;
  if (!isa_.lookup || s.groups > 1 || s.input_high > 3 || *low < -2 || *high > 1) return false;
  if (rows * columns == 1 || 27 * rows * columns * triples > 65535) return false;
  const int64_t taps_per_run = merges_columns() ? columns : 1;
  runs_ = rows * columns / taps_per_run;
  quads_ = taps_per_run * triples;
  block_bytes_ = runs_ * quads_ * kBlock;
  allot_weights(blocks_ * block_bytes_);
  std::fill_n(aligned_weights_, blocks_ * block_bytes_, int8_t(2 | 2 << 2 | 2 << 4));  // no weight: 0
  for (int64_t o = 0; o < s.outputs; ++o) {
    const int64_t lane = o % kBlock, place = lane < 32 ? 2 * lane : 2 * (lane - 32) + 1;
    for (int64_t tap = 0; tap < rows * columns; ++tap)
      for (int64_t c = 0; c < s.inputs; ++c) {
        int8_t& target = aligned_weights_[o / kBlock * block_bytes_ + (tap * triples + c / 3) * kBlock + place];
        const int shift = 2 * int(c % 3), code = s.codes[(o * s.inputs + c) * rows * columns + tap] + 2;
        target = int8_t((target & ~(3 << shift)) | code << shift);
      }
  }
  return true;
}

// Of few channels, blocks of 64 would be empty in part. Neighbouring pixels fill them, where they follow one another in
// the image too, as long as the weights, which then are there for each pixel, stay small.
int64_t Layer::pixels_of_blocks() const {
  constexpr int64_t most_weights = 16'384;
  const int64_t c = spec_.outputs, lanes = std::lcm(c, int64_t(kBlock));
  const bool mostly_full = 8 * rounded_up(c, kBlock) < 9 * c;
  const bool apart = spec_.window.stride[1] != 1;
  const int64_t weights = lanes * rounded_up(int64_t(spec_.codes.size()) / c, 4);
  if (!isa_.depthwise_codes || mostly_full || apart || weights > most_weights) return 1;
  return lanes / c;
}

// Whether a pixel's window begins one column of taps after that of the pixel before.
bool Layer::shares_columns() const {
  const auto& w = spec_.window;
  return w.kernel[0] <= 4 && w.stride[1] == w.dilation[1] && pixels_together_ == 1;
}

// Row-major taps, -1 for none, in groups of 4: a column each where they are shared, and where an instruction set takes
// its rows one by one (Depthwise::rows).
std::vector<int64_t> Layer::tap_order() const {
  const int64_t rows = spec_.window.kernel[0], columns = spec_.window.kernel[1];
  const bool in_columns = shares_columns() || (rows <= 4 && !isa_.depthwise_codes);
  std::vector<int64_t> order;
  for (int64_t x = 0; x < columns; ++x) {
    for (int64_t y = 0; y < rows; ++y) order.push_back(y * columns + x);
    while (in_columns && order.size() % 4) order.push_back(-1);
  }
  while (order.size() % 4) order.push_back(-1);
  return order;
}

void Layer::pack_depthwise() {
  const auto& s = spec_;
  const std::vector<int64_t> order = tap_order();
  const int64_t taps = s.window.kernel[0] * s.window.kernel[1];
  const int64_t lanes = pixels_together_ * s.outputs;
  blocks_ = rounded_up(lanes, kBlock) / kBlock;
  quads_ = int64_t(order.size()) / 4;
  block_bytes_ = quads_ * kBlock * 4;
  allot_weights(blocks_ * block_bytes_);
  int64_t largest = 0;
  for (const int8_t code : s.codes) largest = std::max<int64_t>(largest, std::abs(int(code)) * s.weight_multiplier);
  narrow_depthwise_ = s.input_high < 128 && taps * largest * s.input_high <= kLargestNarrow;
  for (int64_t lane = 0; lane < lanes; ++lane)
    for (int64_t i = 0; i < int64_t(order.size()); ++i) {
      if (order[i] < 0) continue;
      int8_t* group = aligned_weights_ + lane / kBlock * block_bytes_ + i / 4 * kBlock * 4;
      const int code = s.codes[lane % s.outputs * taps + order[i]];
      group[depthwise_place(i % 4, lane % kBlock)] = int8_t(code * s.weight_multiplier);
    }
}

// Where in a group's weights those of tap `tap` of its four and of channel `c` of its 64 stand.
int64_t Layer::depthwise_place(int64_t tap, int64_t c) const {
  const int64_t eight = c % kBlock / 8;
  const auto in_pairs = [&](int64_t place) { return tap / 2 * 2 * kBlock + 2 * (8 * place + c % 8) + tap % 2; };
  switch (narrow_depthwise_ ? isa_.narrow_depthwise_weights : isa_.depthwise_weights) {
    case DepthwiseWeights::kQuads:
      return 4 * (c / 4 % 4 * 16 + c / 16 * 4 + c % 4) + tap;
    case DepthwiseWeights::kPairs:
      return in_pairs(eight / 4 * 4 + eight % 2 * 2 + eight % 4 / 2);
    case DepthwiseWeights::kWidePairs:
      return in_pairs(eight % 2 * 4 + eight / 2);
    case DepthwiseWeights::kTaps:
      break;
  }
  return tap * kBlock + c;
}

// 16-bit sums, per block. Signed codes (Isa::signed_codes) are bounded by the largest weight alone: one step adds two
// products, |x0·w0 + x1·w1| <= 2 · high · max|w|.
void Layer::prove_narrow_sums() {
  const auto& s = spec_;
  steps_.assign(size_t(s.groups * blocks_), kMostSteps);
  const int scale = isa_.prescales ? int(s.weight_multiplier) : 1;
  if (isa_.signed_codes) {
    int64_t largest = 1;
    for (const int8_t code : s.codes) largest = std::max<int64_t>(largest, std::abs(int(code)) * scale);
    const int64_t steps = kLargestNarrow / (2 * s.input_high * largest);
    std::fill(steps_.begin(), steps_.end(), int(std::min<int64_t>(steps, kMostSteps)));
    return;
  }
  const int64_t columns = s.window.kernel[1], taps = s.window.kernel[0] * columns, inputs = group_inputs();
  const int64_t taps_per_run = merges_columns() ? columns : 1;
  for (int64_t o = 0; o < s.outputs; ++o) {
    NarrowProof proof(runs_ * quads_, s.input_high);
    for (int64_t tap = 0; tap < taps; ++tap)
      for (int64_t c = 0; c < inputs; ++c) {
        const int64_t element = tap % taps_per_run * inputs + c;
        const int64_t step = tap / taps_per_run * quads_ + element / 4;
        proof.add(step, element % 4, s.codes[(o * inputs + c) * taps + tap] * scale);
      }
    int& steps = steps_[size_t(o / group_outputs() * blocks_ + o % group_outputs() / kBlock)];
    steps = std::min(steps, proof.steps());
  }
}

}  // namespace edgeqat
