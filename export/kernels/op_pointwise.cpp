// QMaxPool, QAveragePool, QGlobalPool, QAdd, QTables and QImage. Their last input, where it is given, is tables u8 [k][256];
// outputs from the second on are their codes through each table.
#include "pointwise.hpp"
#include "runtime.hpp"

namespace edgeqat {
namespace {

class Tables {
 public:
  Tables(const Info& info, size_t input) {
    if (const Tensor given = info.constant(input)) {
      if (given.size() % 256 || given.size() > 256 * kMaxTables) throw std::invalid_argument("has a table of wrong size");
      tables_.assign(given.codes(), given.codes() + given.size());
    }
  }
  // Writes the outputs from `first` on.
  void write(const Call& call, size_t first, const uint8_t* codes, const std::vector<int64_t>& shape) const {
    int64_t count = 1;
    for (const int64_t d : shape) count *= d;
    for (size_t i = 0; i < tables_.size() / 256; ++i)
      if (auto* to = static_cast<uint8_t*>(call.output(first + i, shape)))
        chosen_isa().translate(tables_.data() + 256 * i, codes, size_t(count), to);
  }

 private:
  std::vector<uint8_t> tables_;
};

PoolShape shape_of(const Tensor& x) {
  if (x.shape.size() != 4) throw std::invalid_argument("reads codes that are no images");
  PoolShape s;
  s.batch = x.shape[0];
  s.height = x.shape[1];
  s.width = x.shape[2];
  s.channels = x.shape[3];
  return s;
}

Grid grid_of(const Info& info) {
  return {info.real("y_scale"), int(info.integer("y_zero")), int(info.integer("y_low")), int(info.integer("y_high"))};
}

// Output 0, or a place of our own where only the tables' outputs are read.
uint8_t* own_output(const Call& call, const std::vector<int64_t>& shape, std::vector<uint8_t>& place) {
  if (auto* to = static_cast<uint8_t*>(call.output(0, shape))) return to;
  size_t count = 1;
  for (const int64_t d : shape) count *= size_t(d);
  place.resize(count);
  return place.data();
}

struct WindowPool : Kernel {
  WindowPool(const Info& info, bool average)
      : average(average), window(window_of(info)), out_height(info.integer("out_h")), out_width(info.integer("out_w")),
        tables(info, 1) {
    if (!average) return;
    from = {info.real("x_scale"), int(info.integer("x_zero")), 0, 255};
    to = grid_of(info);
    counts_padding = info.integer("count_include_pad") != 0;
  }
  void compute(const Call& call) const override {
    const Tensor x = call.input(0);
    PoolShape s = shape_of(x);
    s.out_height = out_height;
    s.out_width = out_width;
    const std::vector<int64_t> shape = {s.batch, out_height, out_width, s.channels};
    std::vector<uint8_t> place;
    uint8_t* y = own_output(call, shape, place);
    if (average)
      average_pool(x.codes(), s, window, counts_padding, from, to, y, call.pool());
    else
      max_pool(x.codes(), s, window, y, call.pool());
    tables.write(call, 1, y, shape);
  }
  bool average, counts_padding = false;
  Window window;
  int64_t out_height, out_width;
  Tables tables;
  Grid from, to;
};

struct GlobalPool : Kernel {
  explicit GlobalPool(const Info& info)
      : zero(int(info.integer("x_zero"))), multiplier(info.real("multiplier")), to(grid_of(info)), tables(info, 1) {}
  void compute(const Call& call) const override {
    const Tensor x = call.input(0);
    const PoolShape s = shape_of(x);
    const std::vector<int64_t> shape = {s.batch, 1, 1, s.channels};
    std::vector<uint8_t> place;
    uint8_t* y = own_output(call, shape, place);
    global_pool(x.codes(), s, zero, multiplier, to, y);
    tables.write(call, 1, y, shape);
  }
  int zero;
  float multiplier;
  Grid to;
  Tables tables;
};

struct Add : Kernel {
  explicit Add(const Info& info)
      : ratio_first(info.real("ratio_first")), ratio_second(info.real("ratio_second")), offset(info.real("offset")),
        to(grid_of(info)), tables(info, 2) {}
  void compute(const Call& call) const override {
    const Tensor a = call.input(0), b = call.input(1);
    if (a.shape != b.shape) throw std::invalid_argument("adds codes of different shapes");
    std::vector<uint8_t> place;
    uint8_t* y = own_output(call, a.shape, place);
    add_codes(a.codes(), b.codes(), a.size(), ratio_first, ratio_second, offset, to, y, call.pool());
    tables.write(call, 1, y, a.shape);
  }
  float ratio_first, ratio_second, offset;
  Grid to;
  Tables tables;
};

struct Translate : Kernel {
  explicit Translate(const Info& info) : tables(info, 1) {}
  void compute(const Call& call) const override {
    const Tensor x = call.input(0);
    tables.write(call, 0, x.codes(), x.shape);
  }
  Tables tables;
};

struct Image : Kernel {
  explicit Image(const Info& info) : to(grid_of(info)) {
    if (!(to.scale > 0)) throw std::invalid_argument("has a step that is not positive");
  }
  void compute(const Call& call) const override {
    const Tensor x = call.input(0);
    if (x.shape.size() != 4) throw std::invalid_argument("reads an input that is no batch of images");
    PoolShape s;
    s.batch = x.shape[0];
    s.channels = x.shape[1];
    s.height = x.shape[2];
    s.width = x.shape[3];
    auto* y = static_cast<uint8_t*>(call.output(0, {s.batch, s.height, s.width, s.channels}));
    if (y) quantize_images(static_cast<const float*>(x.data), s, to, y, call.pool());
  }
  Grid to;
};

template <typename Made>
Kernel* make(const Info& info) {
  return new Made(info);
}
Kernel* make_max_pool(const Info& info) { return new WindowPool(info, false); }
Kernel* make_average_pool(const Info& info) { return new WindowPool(info, true); }

const Operator kMaxPool("QMaxPool", 2, 1, 1 + kMaxTables, abi::kUint8, make_max_pool);
const Operator kAveragePool("QAveragePool", 2, 1, 1 + kMaxTables, abi::kUint8, make_average_pool);
const Operator kGlobalPool("QGlobalPool", 2, 1, 1 + kMaxTables, abi::kUint8, make<GlobalPool>);
const Operator kAdd("QAdd", 3, 2, 1 + kMaxTables, abi::kUint8, make<Add>);
const Operator kTranslate("QTables", 2, 2, kMaxTables, abi::kUint8, make<Translate>);
const Operator kImage("QImage", 1, 1, 1, abi::kUint8, make<Image>);

}  // namespace

std::vector<const Operator*> pointwise_operators() {
  return {&kMaxPool, &kAveragePool, &kGlobalPool, &kAdd, &kTranslate, &kImage};
}

}  // namespace edgeqat
