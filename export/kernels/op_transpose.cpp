// QTranspose: codes with their axes in another order. The attribute `order` has a digit for each axis of the result:
// which axis of the input it is.
#include <algorithm>
#include <cstring>

#include "pointwise.hpp"
#include "runtime.hpp"

namespace edgeqat {
namespace {

// An axis of the result: how many steps it has, and how far apart they lie in what is read and in what is written.
struct Axis {
  int64_t size, from, to;
};

// The axes of the result, outermost first. Axes of one element are left out, and neighbours that stay neighbours are
// one.
std::vector<Axis> axes_of(const std::vector<int64_t>& shape, const std::vector<size_t>& order) {
  std::vector<int64_t> strides(shape.size());
  int64_t stride = 1;
  for (size_t axis = shape.size(); axis-- > 0; stride *= shape[axis]) strides[axis] = stride;
  std::vector<Axis> axes;
  for (const size_t axis : order) {
    if (shape[axis] == 1) continue;
    const bool follows = !axes.empty() && axes.back().from == shape[axis] * strides[axis];
    if (follows)
      axes.back() = {axes.back().size * shape[axis], strides[axis], 0};
    else
      axes.push_back({shape[axis], strides[axis], 0});
  }
  int64_t written = 1;
  for (size_t i = axes.size(); i-- > 0; written *= axes[i].size) axes[i].to = written;
  return axes;
}

// What lies within the outermost axes: a run of bytes, or a plane whose rows become columns.
class Mover {
 public:
  Mover(std::vector<Axis> axes, const Loops& loops) : outer_(std::move(axes)), loops_(loops) {
    if (outer_.empty()) return;
    columns_ = outer_.back();
    outer_.pop_back();
    if (columns_.from == 1) return;  // a run
    const auto lies_closest = [](const Axis& axis) { return axis.from == 1; };
    const auto rows = std::find_if(outer_.begin(), outer_.end(), lies_closest);
    rows_ = *rows;
    outer_.erase(rows);
  }
  int64_t places() const {
    int64_t count = 1;
    for (const Axis& axis : outer_) count *= axis.size;
    return count;
  }
  int64_t work() const { return rows_.size * columns_.size; }
  void move(int64_t place, const uint8_t* x, uint8_t* y) const {
    for (size_t i = outer_.size(); i-- > 0;) {
      const int64_t index = place % outer_[i].size;
      place /= outer_[i].size;
      x += index * outer_[i].from;
      y += index * outer_[i].to;
    }
    if (columns_.from == 1)
      std::memcpy(y, x, size_t(columns_.size));
    else
      loops_.transpose(x, size_t(columns_.size), size_t(rows_.size), size_t(columns_.from), y, size_t(rows_.to));
  }

 private:
  std::vector<Axis> outer_;
  Axis rows_ = {1, 1, 1}, columns_ = {1, 1, 1};  // of the result
  const Loops& loops_;
};

struct Transpose : Kernel {
  explicit Transpose(const Info& info) {
    for (const char digit : info.text("order")) {
      const size_t axis = size_t(digit - '0');
      if (digit < '0' || digit > '9') refuse("has an order of axes that is not of digits");
      order.push_back(axis);
    }
    std::vector<size_t> sorted = order;
    std::sort(sorted.begin(), sorted.end());
    for (size_t axis = 0; axis < sorted.size(); ++axis)
      if (sorted[axis] != axis) refuse("has an order that does not name every axis once");
  }
  void compute(const Call& call) const override {
    const Tensor x = call.input(0, kCodesRead);
    if (x.shape.size() != order.size()) refuse("reads codes of another number of axes than its order has");
    std::vector<int64_t> shape;
    for (const size_t axis : order) shape.push_back(x.shape[axis]);
    auto* y = static_cast<uint8_t*>(call.output(0, shape));
    if (!y || x.size() == 0) return;
    const Mover mover(axes_of(x.shape, order), *chosen_isa().loops);
    in_parts(mover.places(), mover.work(), call.pool(), [&](int64_t first, int64_t last) {
      for (int64_t place = first; place < last; ++place) mover.move(place, x.codes(), y);
    });
  }
  std::vector<size_t> order;
};

Kernel* make_transpose(const Info& info) {
  try {
    return new Transpose(info);
  } catch (const std::exception& error) {
    refuse("node of " + info.made() + ": " + error.what());
  }
}

const Operator kTranspose("QTranspose", 1, 1, 1, abi::kUint8, make_transpose);

}  // namespace

std::vector<const Operator*> transpose_operators() { return {&kTranspose}; }

}  // namespace edgeqat
