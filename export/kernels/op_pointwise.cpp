// QMaxPool, QAveragePool, QGlobalPool, QAdd, QMul, QScale, QLayerNorm, QTables and QImage. Their last input, where it
// is given, is tables u8 [k][256]; outputs from the second on are their codes through each table.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "loops.hpp"
#include "pointwise.hpp"
#include "runtime.hpp"

namespace edgeqat {
namespace {

constexpr Reads kFirstRead{"first summand", abi::kUint8}, kSecondRead{"second summand", abi::kUint8};
constexpr Reads kFirstFactor{"first factor", abi::kUint8}, kSecondFactor{"second factor", abi::kUint8};
constexpr Reads kGainRead{"gain", abi::kFloat}, kShiftRead{"shift", abi::kFloat};
constexpr Reads kImagesRead{"images", abi::kFloat};
constexpr int64_t kMostPlaces = 1 << 16;

class Tables {
 public:
  // `first` is the place of the first output that goes through a table.
  Tables(const Info& info, size_t input, size_t first) : tables_(read_tables(info, input, first)) {}
  // Writes the outputs from `first` on.
  void write(const Call& call, size_t first, const uint8_t* codes, const std::vector<int64_t>& shape) const {
    const int64_t count = product_of(shape);
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
  if (s.height < 1 || s.width < 1 || s.channels < 1) refuse("reads images without pixels");
  return s;
}

Grid grid_of(const Info& info) {
  const Grid grid = {info.positive("y_scale"), info.byte("y_zero"), info.byte("y_low"), info.byte("y_high")};
  if (grid.low > grid.high) refuse("has a lowest code above its highest");
  return grid;
}

// Output 0, or a place of our own where only the tables' outputs are read.
uint8_t* own_output(const Call& call, const std::vector<int64_t>& shape, std::vector<uint8_t>& place) {
  if (auto* to = static_cast<uint8_t*>(call.output(0, shape))) return to;
  place.resize(size_t(product_of(shape)));
  return place.data();
}

struct WindowPool : Kernel {
  WindowPool(const Info& info, bool average)
      : average(average),
        window(window_of(info)),
        out_height(info.integer("out_h", 1, kMostPlaces)),
        out_width(info.integer("out_w", 1, kMostPlaces)),
        tables(info, 1, 1) {
    if (!average) return;
    from = {info.positive("x_scale"), info.byte("x_zero"), 0, 255};
    to = grid_of(info);
    counts_padding = info.flag("count_include_pad");
  }
  void compute(const Call& call) const override {
    const Tensor x = call.input(0, kCodesRead);
    PoolShape s = shape_of(x);
    s.out_height = out_height;
    s.out_width = out_width;
    check_places(0, s.height, out_height);
    check_places(1, s.width, out_width);
    const std::vector<int64_t> shape = {s.batch, out_height, out_width, s.channels};
    std::vector<uint8_t> place;
    uint8_t* y = own_output(call, shape, place);
    if (average)
      average_pool(x.codes(), s, window, counts_padding, from, to, y, call.pool());
    else
      max_pool(x.codes(), s, window, y, call.pool());
    tables.write(call, 1, y, shape);
  }
  // Rounded down or up (ceil_mode), as many places as the window has in an image of `size`.
  void check_places(int axis, int64_t size, int64_t places) const {
    const int64_t whole = window.outputs(axis, size);
    if (places != whole && places != whole + 1) refuse("has an output of another size than its window makes");
  }
  bool average, counts_padding = false;
  Window window;
  int64_t out_height, out_width;
  Tables tables;
  Grid from, to;
};

struct GlobalPool : Kernel {
  explicit GlobalPool(const Info& info)
      : zero(info.byte("x_zero")), multiplier(info.positive("multiplier")), to(grid_of(info)), tables(info, 1, 1) {}
  void compute(const Call& call) const override {
    const Tensor x = call.input(0, kCodesRead);
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
  explicit Add(const Info& info) : tables(info, 2, 1) {
    const Grid to = grid_of(info);
    sum = {info.real("ratio_first"), info.real("ratio_second"), info.real("offset"), to.low, to.high};
  }
  void compute(const Call& call) const override {
    const Tensor a = call.input(0, kFirstRead), b = call.input(1, kSecondRead);
    if (a.shape != b.shape) throw std::invalid_argument("adds codes of different shapes");
    std::vector<uint8_t> place;
    uint8_t* y = own_output(call, a.shape, place);
    add_codes(a.codes(), b.codes(), a.size(), sum, y, call.pool());
    tables.write(call, 1, y, a.shape);
  }
  SumOfTwo sum;
  Tables tables;
};

// The sizes of `shape`, ones before them.
constexpr size_t kAxes = 4;
std::vector<int64_t> with_four_axes(const std::vector<int64_t>& shape) {
  if (shape.size() > kAxes) refuse("multiplies codes of more than 4 axes");
  std::vector<int64_t> sizes(kAxes - shape.size(), 1);
  sizes.insert(sizes.end(), shape.begin(), shape.end());
  return sizes;
}

// The second factor, of as many axes or fewer elements, is spread over the axes where it has one element.
struct Multiply : Kernel {
  explicit Multiply(const Info& info) : to(grid_of(info)), tables(info, 2, 1) {
    product = {info.byte("a_zero"), info.byte("b_zero"), info.positive("ratio"), to.zero, to.low, to.high};
  }
  void compute(const Call& call) const override {
    const Tensor a = call.input(0, kFirstFactor), b = call.input(1, kSecondFactor);
    if (a.shape.size() != b.shape.size()) refuse("multiplies codes of different numbers of axes");
    const std::vector<int64_t> sizes = with_four_axes(a.shape), spread = with_four_axes(b.shape);
    for (size_t axis = 0; axis < kAxes; ++axis)
      if (spread[axis] != sizes[axis] && spread[axis] != 1) refuse("multiplies codes whose shapes do not fit");
    std::vector<uint8_t> place;
    uint8_t* y = own_output(call, a.shape, place);
    if (spread == sizes)
      in_parts(a.size(), 1, call.pool(), [&](int64_t first, int64_t last) {
        loops.multiply(a.codes() + first, b.codes() + first, size_t(last - first), product, y + first);
      });
    else
      in_parts(sizes[0] * sizes[1], sizes[2] * sizes[3], call.pool(),
               [&](int64_t first, int64_t last) { multiply_rows(a, b, sizes, spread, first, last, y); });
    tables.write(call, 1, y, a.shape);
  }
  // From row `first` to before `last`; a row is all that has the same indices on the first two axes.
  void multiply_rows(const Tensor& a, const Tensor& b, const std::vector<int64_t>& sizes,
                     const std::vector<int64_t>& spread, int64_t first, int64_t last, uint8_t* y) const {
    const int64_t row_size = sizes[2] * sizes[3];
    std::vector<uint8_t> factors(static_cast<size_t>(row_size));
    int64_t copied = -1;
    for (int64_t row = first; row < last; ++row) {
      const int64_t of_first = spread[0] == 1 ? 0 : row / sizes[1], of_second = spread[1] == 1 ? 0 : row % sizes[1];
      const int64_t at = (of_first * spread[1] + of_second) * spread[2] * spread[3];
      if (at != copied) spread_row(b.codes() + at, sizes, spread, factors.data());
      copied = at;
      loops.multiply(a.codes() + row * row_size, factors.data(), size_t(row_size), product, y + row * row_size);
    }
  }
  // The factor of every element of a row: short loops over the last axis would take longer than copying it.
  static void spread_row(const uint8_t* from, const std::vector<int64_t>& sizes, const std::vector<int64_t>& spread,
                         uint8_t* to) {
    const size_t width = size_t(sizes[3]);
    for (int64_t i = 0; i < sizes[2]; ++i, to += width) {
      const uint8_t* line = from + (spread[2] == 1 ? 0 : i * spread[3]);
      if (spread[3] == 1)
        std::memset(to, *line, width);
      else
        std::memcpy(to, line, width);
    }
  }
  const Loops& loops = *chosen_isa().loops;
  Grid to;
  Tables tables;
  ProductOfCodes product;
};

// A constant for each element of the last axis, for all codes or, as a PReLU has it, for those below zero.
struct Scale : Kernel {
  explicit Scale(const Info& info) : to(grid_of(info)), tables(info, 2, 1) {
    scaled = {info.byte("x_zero"),    info.positive("x_scale"), to.scale, to.zero, to.low, to.high,
              info.flag("below_zero")};
    const Tensor given = info.constant(1, kGainRead);
    if (!given || given.size() == 0) refuse("needs constant gains");
    gain.assign(given.reals(), given.reals() + given.size());
    for (const float one : gain)
      if (!std::isfinite(one)) refuse("has a gain that is not finite");
  }
  void compute(const Call& call) const override {
    const Tensor x = call.input(0, kCodesRead);
    if (x.shape.empty() || x.shape.back() != int64_t(gain.size())) refuse("scales rows of another length");
    std::vector<uint8_t> place;
    uint8_t* y = own_output(call, x.shape, place);
    const int64_t width = int64_t(gain.size()), rows = x.size() / width;
    const Loops& loops = *chosen_isa().loops;
    in_parts(rows, width, call.pool(), [&](int64_t first, int64_t last) {
      for (int64_t at = first * width; at < last * width; at += width)
        loops.scale(x.codes() + at, gain.data(), size_t(width), scaled, y + at);
    });
    tables.write(call, 1, y, x.shape);
  }
  Grid to;
  Tables tables;
  ScaledCodes scaled;
  std::vector<float> gain;
};

// Over the last axis.
struct LayerNorm : Kernel {
  explicit LayerNorm(const Info& info) : to(grid_of(info)), epsilon(info.positive("epsilon")), tables(info, 3, 1) {
    gain = constants(info, 1, kGainRead);
    shift = constants(info, 2, kShiftRead);
    if (gain.empty() || gain.size() != shift.size()) refuse("has gains and shifts of different numbers");
  }
  static std::vector<float> constants(const Info& info, size_t input, const Reads& reads) {
    const Tensor given = info.constant(input, reads);
    if (!given || given.size() > kMostNormed) refuse("needs constant gains and shifts, 65,536 at most");
    return std::vector<float>(given.reals(), given.reals() + given.size());
  }
  void compute(const Call& call) const override {
    const Tensor x = call.input(0, kCodesRead);
    if (x.shape.empty() || x.shape.back() != int64_t(gain.size())) refuse("normalizes rows of another length");
    std::vector<uint8_t> place;
    uint8_t* y = own_output(call, x.shape, place);
    const size_t width = gain.size();
    const NormOfCodes norm = {gain.data(), shift.data(), to.zero, to.low, to.high};
    in_parts(x.size() / int64_t(width), int64_t(width) * 2, call.pool(), [&](int64_t first, int64_t last) {
      for (int64_t row = first; row < last; ++row) {
        const int64_t at = row * int64_t(width);
        normalize(x.codes() + at, width, norm, y + at);
      }
    });
    tables.write(call, 1, y, x.shape);
  }
  void normalize(const uint8_t* q, size_t width, const NormOfCodes& norm, uint8_t* y) const {
    const SumsOfCodes found = loops.sums(q, width);
    const int64_t sum = found.sum;
    const int64_t variance = int64_t(width) * int64_t(found.squares) - sum * sum;
    const float r = float(1.0 / std::sqrt(double(variance) + double(epsilon)));
    loops.normalize(q, width, found.sum, r, norm, y);
  }
  const Loops& loops = *chosen_isa().loops;
  Grid to;
  float epsilon;
  std::vector<float> gain, shift;
  Tables tables;
};

struct Translate : Kernel {
  explicit Translate(const Info& info) : tables(info, 1, 0) {}
  void compute(const Call& call) const override {
    const Tensor x = call.input(0, kCodesRead);
    tables.write(call, 0, x.codes(), x.shape);
  }
  Tables tables;
};

struct Image : Kernel {
  explicit Image(const Info& info) : to(grid_of(info)) {}
  void compute(const Call& call) const override {
    const Tensor x = call.input(0, kImagesRead);
    if (x.shape.size() != 4) throw std::invalid_argument("expects 4-D (image) codes");
    PoolShape s;
    s.batch = x.shape[0];
    s.channels = x.shape[1];
    s.height = x.shape[2];
    s.width = x.shape[3];
    if (s.height < 1 || s.width < 1 || s.channels < 1) refuse("reads images without pixels");
    auto* y = static_cast<uint8_t*>(call.output(0, {s.batch, s.height, s.width, s.channels}));
    if (y) quantize_images(x.reals(), s, to, y, call.pool());
  }
  Grid to;
};

// A kernel, or a refusal that names the node by what it makes.
template <typename Made, typename... Rest>
Kernel* named(const Info& info, Rest... rest) {
  try {
    return new Made(info, rest...);
  } catch (const std::exception& error) {
    refuse("node of " + info.made() + ": " + error.what());
  }
}
template <typename Made>
Kernel* make(const Info& info) {
  return named<Made>(info);
}
Kernel* make_max_pool(const Info& info) { return named<WindowPool>(info, false); }
Kernel* make_average_pool(const Info& info) { return named<WindowPool>(info, true); }

const Operator kMaxPool("QMaxPool", 2, 1, 1 + kMaxTables, abi::kUint8, make_max_pool);
const Operator kAveragePool("QAveragePool", 2, 1, 1 + kMaxTables, abi::kUint8, make_average_pool);
const Operator kGlobalPool("QGlobalPool", 2, 1, 1 + kMaxTables, abi::kUint8, make<GlobalPool>);
const Operator kAdd("QAdd", 3, 2, 1 + kMaxTables, abi::kUint8, make<Add>);
const Operator kMultiply("QMul", 3, 2, 1 + kMaxTables, abi::kUint8, make<Multiply>);
const Operator kScale("QScale", 3, 2, 1 + kMaxTables, abi::kUint8, make<Scale>);
const Operator kLayerNorm("QLayerNorm", 4, 3, 1 + kMaxTables, abi::kUint8, make<LayerNorm>);
const Operator kTranslate("QTables", 2, 2, kMaxTables, abi::kUint8, make<Translate>);
const Operator kImage("QImage", 1, 1, 1, abi::kUint8, make<Image>);

}  // namespace

std::vector<const Operator*> pointwise_operators() {
  return {&kMaxPool, &kAveragePool, &kGlobalPool, &kAdd, &kMultiply, &kScale, &kLayerNorm, &kTranslate, &kImage};
}

}  // namespace edgeqat
