// QSoftmax: softmax of floats over their last axis, written as codes. Its last input, where it is given, is tables
// u8 [k][256]; outputs from the second on are its codes through each table.
#include "softmax.hpp"

#include <algorithm>
#include <cstring>

#include "isa.hpp"
#include "runtime.hpp"
#include "softmax_loop.hpp"

namespace edgeqat {
namespace {

constexpr Reads kScoresRead{"scores", abi::kFloat};
constexpr int64_t kInPart = 8192;  // elements that are worth a task of their own

void softmax_portable(const float* x, size_t n, const SoftmaxToCodes& to, float* place, uint8_t* y) {
  softmax_row(x, n, to, place, y);
}

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
    const int64_t in_part = std::max<int64_t>(1, kInPart / width);
    const SoftmaxFunction softmax = chosen_softmax();
    call.pool().each(size_t((rows + in_part - 1) / in_part), [&](size_t part) {
      std::vector<float> place(static_cast<size_t>(width));
      const int64_t first = int64_t(part) * in_part, last = std::min(rows, first + in_part);
      for (int64_t row = first; row < last; ++row)
        softmax(x + row * width, size_t(width), to, place.data(), y + row * width);
    });
  }
  SoftmaxToCodes to;
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

SoftmaxFunction chosen_softmax() {
#ifdef __x86_64__
  if (!std::strncmp(chosen_isa().name, "avx", 3)) return softmax_avx2;
#endif
  return softmax_portable;
}

std::vector<const Operator*> softmax_operators() { return {&kSoftmax}; }

}  // namespace edgeqat
