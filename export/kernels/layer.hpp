// One quantized convolution (a linear layer is one of a single pixel), prepacked once and run on NHWC codes.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "isa.hpp"

namespace edgeqat {

// How the caller's thread pool runs body(data, i) for i < total. A null `run` means here and now.
struct Pool {
  void* self = nullptr;
  void (*run)(void* self, size_t total, void (*body)(void*, size_t), void* data) = nullptr;

  template <typename Body>
  void each(size_t total, Body body) const {
    if (run == nullptr || total <= 1) {
      for (size_t i = 0; i < total; ++i) body(i);
    } else {
      run(self, total, [](void* data, size_t i) { (*static_cast<Body*>(data))(i); }, &body);
    }
  }
};

// Height and width of kernel, stride, dilation; top, left, bottom, right of the padding.
struct Window {
  int64_t kernel[2] = {1, 1}, stride[2] = {1, 1}, dilation[2] = {1, 1}, pads[4] = {0, 0, 0, 0};

  int64_t outputs(int axis, int64_t size) const {
    const int64_t free = size + pads[axis] + pads[axis + 2] - dilation[axis] * (kernel[axis] - 1) - 1;
    return free < 0 ? 0 : free / stride[axis] + 1;  // none where the kernel is larger than the padded image
  }
  bool padded() const { return pads[0] || pads[1] || pads[2] || pads[3]; }
};

struct LayerSpec {
  int64_t inputs = 0, outputs = 0, groups = 1;
  Window window;
  std::vector<int8_t> codes;  // [O][I / groups][kH][kW]
  std::vector<int32_t> bias;  // in units of input scale · weight scale / weight_multiplier
  std::vector<float> multiplier;
  int64_t weight_multiplier = 1;
  int64_t input_zero = 0, input_high = 255;
  bool one_bit = false;         // weights are -1 and +1, inputs 0 and 254 around 127, padding 127
  Epilogue epilogue{};          // its scalars and tables; pointers into tensors come with each run
  std::vector<uint8_t> tables;  // [tables][256]
};

struct LayerTensors {
  const uint8_t* x = nullptr;  // N_H_W_I
  int64_t batch = 1, height = 1, width = 1;
  const uint8_t* other = nullptr;  // all others N_OH_OW_O, or null
  uint8_t* own = nullptr;
  uint8_t* sum = nullptr;
  uint8_t* copy[kMaxTables] = {};
  float* real = nullptr;
};

// Of a group of one input, in a layer that counts as depthwise; more are worth a product.
constexpr int64_t kMostRepeats = 4;

class Layer {
 public:
  // Throws std::invalid_argument that says what is wrong; the caller knows the layer's name.
  Layer(LayerSpec spec, const Isa& isa);
  void run(const LayerTensors& t, const Pool& pool) const;
  const LayerSpec& spec() const { return spec_; }

 private:
  struct Image;
  struct Place;
  struct Walk;
  enum class Kind { kProduct, kWide, kBinary, kLookup, kDepthwise, kWinograd };

  void check() const;
  Kind choose_kind() const;
  void prepare_bias();
  void lay_out_products();
  bool wants_wide_codes() const;
  void pack_products();
  bool pack_lookup();
  void pack_depthwise();
  int64_t pixels_of_blocks() const;
  bool shares_columns() const;
  std::vector<int64_t> tap_order() const;
  int64_t depthwise_place(int64_t tap, int64_t channel) const;
  void prove_narrow_sums();
  bool pack_winograd();
  void run_winograd(const LayerTensors& t, const Pool& pool) const;
  void transform_tiles(const LayerTensors& t, const uint8_t* border, uint8_t* to, int64_t first, int64_t last) const;
  void winograd_strip(const LayerTensors& t, const uint8_t* transformed, int64_t block, int64_t first,
                      int64_t last) const;
  Image image_of(const LayerTensors& t) const;
  void copy_row(const LayerTensors& t, const Image& image, int64_t row) const;
  bool centres(const Image& image) const;
  void fill(const LayerTensors& t, const Image& image, const Pool& pool) const;
  std::vector<ptrdiff_t> offsets(const Image& image) const;
  void run_depthwise(const LayerTensors& t, const Pool& pool) const;
  void depthwise_rows(const LayerTensors& t, int64_t row, int64_t end_row) const;
  void depthwise_pixels(const Depthwise& depthwise, const uint8_t* first, ptrdiff_t step, int64_t count,
                        Epilogue epilogue) const;
  void run_part(const LayerTensors& t, const Image& image, const ptrdiff_t* offsets, const Place& place) const;
  void allot_weights(int64_t bytes);
  void add_border(const LayerTensors& t, int64_t y, int64_t x, int64_t channel, int width, int32_t* sums) const;
  Epilogue epilogue_of(const LayerTensors& t, int64_t pixel, int64_t channel) const;

  int64_t packed_pixel() const;
  ProductFunction product_function() const;
  int64_t weight_place(int64_t run, int64_t quad, int64_t runs, int64_t lane, int64_t width) const;
  int64_t group_inputs() const { return spec_.inputs / spec_.groups; }
  int64_t group_outputs() const { return spec_.outputs / spec_.groups; }
  bool copies_image() const { return spec_.window.padded() || length_ % 4 != 0 || kind_ != Kind::kProduct; }
  bool merges_columns() const { return spec_.groups == 1 && spec_.window.dilation[1] == 1; }

  LayerSpec spec_;
  const Isa& isa_;
  Kind kind_;
  int64_t runs_ = 0, length_ = 0, quads_ = 0, blocks_ = 0, block_bytes_ = 0;  // length in bytes of the packed image
  std::vector<int> steps_;         // whose sums fit 16 bits: products [groups][blocks], Winograd [blocks][16]
  bool narrow_depthwise_ = false;  // whether all of a sum fits 16 bits
  int64_t pixels_together_ = 1;    // depthwise: whose channels stand one after another in the blocks
  std::vector<int32_t> bias_;      // [groups][blocks][64]
  std::vector<float> multiplier_;  // likewise
  bool in_32_bits_ = true;
  std::vector<int32_t> winograd_bias_;  // [blocks][16][64]
  std::vector<int32_t> border_;         // one bit: [kH · kW][groups · blocks · 64], gain · Σ of a tap's weights
  std::vector<int8_t> weights_;         // [groups][blocks][block_bytes], from aligned_weights_ on
  int8_t* aligned_weights_ = nullptr;
};

bool only_own_codes(const Epilogue& e);

// `size` bytes that stay until the calling thread asks again; at most two places at a time.
uint8_t* scratch_bytes(int place, size_t size);

}  // namespace edgeqat
