// QSoftmax: softmax of floats over their last axis, written as codes. Its last input, where it is given, is tables
// u8 [k][256]; outputs from the second on are its codes through each table.
#include "isa.hpp"
#include "pointwise.hpp"
#include "runtime.hpp"

namespace edgeqat {
namespace {

constexpr Reads kScoresRead{"scores", abi::kFloat};
constexpr int64_t kWork = 4;  // of an element, in codes that are added

struct Softmax : Kernel {
  explicit Softmax(const Info& info)
      : to({info.positive("y_scale"), info.byte("y_zero"), info.byte("y_low"), info.byte("y_high")}),
        tables(read_tables(info, 1, 1)) {
    if (to.low > to.high) refuse("has a lowest code above its highest");
  }
  void compute(const Call& call) const override {
    const Tensor x = call.input(0, kScoresRead);
    if (x.shape.empty()) refuse("reads scores without an axis");
    const int64_t width = x.shape.back(), count = x.size();
    std::vector<uint8_t> own;
    auto* y = static_cast<uint8_t*>(call.output(0, x.shape));
    if (!y) {
      own.resize(size_t(count));
      y = own.data();
    }
    if (count) compute_rows(x.reals(), count / width, width, call, y);
    for (size_t i = 0; i < tables.size() / 256; ++i)
      if (auto* through = static_cast<uint8_t*>(call.output(1 + i, x.shape)))
        chosen_isa().translate(tables.data() + 256 * i, y, size_t(count), through);
  }
  void compute_rows(const float* x, int64_t rows, int64_t width, const Call& call, uint8_t* y) const {
    const Loops& loops = *chosen_isa().loops;
    const size_t placed = (size_t(width) + kPlaceUnit - 1) / kPlaceUnit * kPlaceUnit;
    in_parts(rows, width * kWork, call.pool(), [&](int64_t first, int64_t last) {
      std::vector<float> place(placed);
      for (int64_t row = first; row < last; ++row)
        loops.softmax(x + row * width, size_t(width), to, place.data(), y + row * width);
    });
  }
  Grid to;
  std::vector<uint8_t> tables;
};

Kernel* make_softmax(const Info& info) {
  try {
    return new Softmax(info);
  } catch (const std::exception& error) {
    refuse("node of " + info.made() + ": " + error.what());
  }
}

const Operator kSoftmax("QSoftmax", 2, 1, 1 + kMaxTables, abi::kUint8, make_softmax);

}  // namespace

std::vector<const Operator*> softmax_operators() { return {&kSoftmax}; }

}  // namespace edgeqat
