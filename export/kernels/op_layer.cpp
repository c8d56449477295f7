// QConv and QGemm: codes in, codes out; QConvFloat and QGemmFloat: codes in, real numbers out (a classifier's logits).
//
//   inputs   x u8 | weight scale f32 [O] | bias s32 [O] | planes of the weight codes, 1 to 3 | second summand u8 |
//   tables u8 outputs  the layer's own codes | codes of the sum | codes through each table. Unnamed outputs are not
//   written.
//
// multiplier = float(float(x_scale · weight scale) / y_scale). A one-bit output ("threshold") asks for the sign of the
// sum alone: with ±512, zero point 254 and bounds 0 and 254 every sum from 1 on, and 0, becomes 254 and every other 0.
#include <cmath>
#include <memory>

#include "codes.hpp"
#include "runtime.hpp"

namespace edgeqat {
namespace {

enum Input : size_t { kX, kScale, kBias, kPlane, kOther = 6, kTables, kInputs };
constexpr float kThresholdGain = 512.0f;
constexpr Reads kScaleRead{"weight scale", abi::kFloat}, kBiasRead{"bias", abi::kInt32};
constexpr Reads kPlaneRead{"weight codes", abi::kUint8}, kWholeBytesRead{"weight codes", abi::kInt8, abi::kUint8};
constexpr Reads kOtherRead{"second summand", abi::kUint8};
constexpr int64_t kMostChannels = 1 << 20, kMostCodes = int64_t(1) << 31;

std::vector<Plane> planes_of(const Info& info, int bits) {
  std::vector<Plane> planes;
  for (size_t i = kPlane; i < kOther; ++i)
    if (const Tensor plane = info.constant(i, bits == 8 ? kWholeBytesRead : kPlaneRead))
      planes.push_back({plane.codes(), plane.size()});
  return planes;
}

void read_scales(const Info& info, bool real, LayerSpec& spec) {
  const Tensor scale = info.constant(kScale, kScaleRead), bias = info.constant(kBias, kBiasRead);
  if (!scale || !bias || scale.size() != spec.outputs || bias.size() != spec.outputs)
    throw std::invalid_argument("needs a constant weight scale and bias, one per output channel");
  const float x_scale = info.positive("x_scale"), y_scale = real ? 1.0f : info.positive("y_scale");
  const bool threshold = !real && info.flag("threshold");
  const float* scales = scale.reals();
  const int32_t* biases = bias.integers();
  spec.bias.assign(biases, biases + spec.outputs);
  for (int64_t o = 0; o < spec.outputs; ++o) {
    const float unit = x_scale * scales[o], multiplier = unit / y_scale;
    if (!std::isfinite(multiplier)) throw std::invalid_argument("has a scale that is not finite");
    spec.multiplier.push_back(threshold ? std::copysign(kThresholdGain, unit) : real ? unit : multiplier);
  }
}

void read_epilogue(const Info& info, Epilogue& e) {
  e.zero = info.byte("y_zero");
  e.low = info.byte("y_low");
  e.high = info.byte("y_high");
  e.other_first = info.flag("other_first");
  e.ratio_first = info.real("ratio_first");
  e.ratio_second = info.real("ratio_second");
  e.offset = info.real("offset");
  e.sum_low = info.byte("sum_low");
  e.sum_high = info.byte("sum_high");
  if (e.low > e.high || e.sum_low > e.sum_high) refuse("has a lowest code above its highest");
}

LayerSpec spec_of(const Info& info, bool conv, bool real) {
  LayerSpec spec;
  spec.inputs = info.integer("channels_in", 1, kMostChannels);
  spec.outputs = info.integer("channels_out", 1, kMostChannels);
  spec.groups = conv ? info.integer("groups", 1, kMostChannels) : 1;
  if (conv) spec.window = window_of(info);
  spec.weight_multiplier = info.integer("carry", 1, 127);
  spec.input_zero = info.byte("x_zero");
  spec.input_high = info.integer("x_high", 1, 255);
  spec.one_bit = info.flag("one_bit");
  const int bits = int(info.integer("bits", 1, 8));
  const int64_t count =
      product_of({spec.outputs, spec.inputs / spec.groups, spec.window.kernel[0], spec.window.kernel[1]});
  if (count > kMostCodes) refuse("has more weight codes than a file can hold");
  spec.codes = unpack(planes_of(info, bits), bits, count);
  read_scales(info, real, spec);
  if (real) return spec;
  read_epilogue(info, spec.epilogue);
  spec.tables = read_tables(info, kTables, 2);
  spec.epilogue.tables = int(spec.tables.size() / 256);
  return spec;
}

class LayerKernel : public Kernel {
 public:
  LayerKernel(const Info& info, bool conv, bool real)
      : conv_(conv), real_(real), layer_(spec_of(info, conv, real), chosen_isa()) {}

  void compute(const Call& call) const override {
    const auto& spec = layer_.spec();
    const Tensor x = call.input(kX, kCodesRead);
    const size_t rank = conv_ ? 4 : 2;
    if (x.shape.size() != rank || x.shape.back() != spec.inputs)
      throw std::invalid_argument("reads codes of another shape than its weights are for");
    LayerTensors t;
    t.x = x.codes();
    t.batch = x.shape[0];
    t.height = conv_ ? x.shape[1] : 1;
    t.width = conv_ ? x.shape[2] : 1;
    const int64_t height = spec.window.outputs(0, t.height), width = spec.window.outputs(1, t.width);
    if (t.batch < 0 || t.height < 1 || t.width < 1) refuse("reads images without pixels");
    if (height < 1 || width < 1) throw std::invalid_argument("has a kernel larger than its padded image");
    const std::vector<int64_t> shape = conv_ ? std::vector<int64_t>{t.batch, height, width, spec.outputs}
                                             : std::vector<int64_t>{t.batch, spec.outputs};
    const int64_t padded_height = t.height + spec.window.pads[0] + spec.window.pads[2];
    const int64_t padded_width = t.width + spec.window.pads[1] + spec.window.pads[3];
    product_of(shape);  // both refuse what 64 bits do not hold
    product_of({t.batch, padded_height, padded_width, spec.inputs});
    if (real_) {
      t.real = static_cast<float*>(call.output(0, shape));
    } else {
      const Tensor other = call.optional(kOther, kOtherRead);
      if (other && other.shape != shape) throw std::invalid_argument("adds codes of another shape than its own");
      t.other = other ? other.codes() : nullptr;
      t.own = static_cast<uint8_t*>(call.output(0, shape));
      t.sum = static_cast<uint8_t*>(call.output(1, shape));
      if (t.sum && !t.other) refuse("is to write codes of a sum, and has no second summand");
      for (int i = 0; i < spec.epilogue.tables; ++i)
        t.copy[i] = static_cast<uint8_t*>(call.output(size_t(2 + i), shape));
    }
    if (height * width * t.batch > 0) layer_.run(t, call.pool());
  }

 private:
  bool conv_, real_;
  Layer layer_;
};

template <bool kConv, bool kReal>
Kernel* make(const Info& info) {
  try {
    return new LayerKernel(info, kConv, kReal);
  } catch (const std::exception& error) {
    refuse("layer " + info.text("layer") + ": " + error.what());
  }
}

const Operator kConvOp("QConv", kInputs, 4, 2 + kMaxTables, abi::kUint8, make<true, false>);
const Operator kGemmOp("QGemm", kInputs, 4, 2 + kMaxTables, abi::kUint8, make<false, false>);
const Operator kConvFloatOp("QConvFloat", kInputs, 4, 1, abi::kFloat, make<true, true>);
const Operator kGemmFloatOp("QGemmFloat", kInputs, 4, 1, abi::kFloat, make<false, true>);

}  // namespace

std::vector<const Operator*> layer_operators() { return {&kConvOp, &kGemmOp, &kConvFloatOp, &kGemmFloatOp}; }

}  // namespace edgeqat
