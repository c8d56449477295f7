// ONNX Runtime's calls with exceptions for statuses, and the shape that every operator of the library has.
#pragma once
#include <cmath>
#include <cstring>
#include <initializer_list>
#include <stdexcept>
#include <string>
#include <vector>

#include "abi.hpp"
#include "layer.hpp"

namespace edgeqat {

// Files are a stranger's: what they say of sizes and types is checked before memory is touched.
[[noreturn]] inline void refuse(const std::string& what) { throw std::invalid_argument(what); }

constexpr int64_t kMostElements = int64_t(1) << 40;  // of one tensor: far from what 64 bits overflow at

inline int64_t product_of(const std::vector<int64_t>& sizes) {
  int64_t product = 1;
  for (const int64_t size : sizes) {
    if (size < 0 || (size > 0 && product > kMostElements / size)) refuse("has a tensor of impossible size");
    product *= size;
  }
  return product;
}

inline const char* type_name(int type) {
  switch (type) {
    case abi::kFloat:
      return "float";
    case abi::kUint8:
      return "uint8";
    case abi::kInt8:
      return "int8";
    case abi::kInt32:
      return "int32";
    default:
      return "another type";
  }
}

// An input that was checked to be there and of a type that the kernel reads.
struct Tensor {
  const void* data = nullptr;
  int type = abi::kAny;
  std::vector<int64_t> shape;

  explicit operator bool() const { return data != nullptr; }
  const uint8_t* codes() const { return static_cast<const uint8_t*>(data); }
  const float* reals() const { return static_cast<const float*>(data); }
  const int32_t* integers() const { return static_cast<const int32_t*>(data); }
  int64_t size() const { return product_of(shape); }
};

// What a kernel reads at one place: its name in messages, and the element types that it can have.
struct Reads {
  const char* name;
  int type, other_type;
  constexpr Reads(const char* name, int type, int other_type = -1) : name(name), type(type), other_type(other_type) {}
};

inline void check(const abi::Api& api, abi::Status* status, const char* what) {
  if (!status) return;
  api.release(status);
  throw std::invalid_argument(what);
}

inline Tensor tensor_of(const abi::Api& api, const abi::Value* value, const Reads& reads) {
  if (!value) return {};
  Tensor found;
  abi::TypeInfo* info = nullptr;
  check(api, api.type_info(value, &info), "an input is not a tensor");
  size_t rank = 0;
  abi::Status* status = api.element_type(info, &found.type);
  if (!status) status = api.rank(info, &rank);
  found.shape.resize(rank);
  if (!status) status = api.dimensions(info, found.shape.data(), rank);
  api.release(info);
  check(api, status, "an input has no shape");
  if (found.type != reads.type && found.type != reads.other_type)
    refuse(std::string("its input ") + reads.name + " is " + type_name(found.type) + ", not " + type_name(reads.type));
  found.size();  // refuses what 64 bits do not hold
  void* data = nullptr;
  check(api, api.data(const_cast<abi::Value*>(value), &data), "an input has no data");
  static const char empty = 0;  // a tensor without elements is not an absent one
  found.data = data ? data : &empty;
  return found;
}

// What a kernel may ask when it is created.
struct Info {
  abi::Api api;
  const abi::KernelInfo* info;

  int64_t integer(const char* name) const {
    int64_t value = 0;
    check(api, api.attribute(info, name, &value), (std::string("has no integer attribute ") + name).c_str());
    return value;
  }
  int64_t integer(const char* name, int64_t low, int64_t high) const {
    const int64_t value = integer(name);
    if (value < low || value > high)
      refuse(std::string("its attribute ") + name + " is " + std::to_string(value) + "; " + std::to_string(low) +
             " to " + std::to_string(high) + " are possible");
    return value;
  }
  int byte(const char* name) const { return int(integer(name, 0, 255)); }
  bool flag(const char* name) const { return integer(name, 0, 1) != 0; }
  float real(const char* name) const {
    float value = 0;
    check(api, api.attribute(info, name, &value), (std::string("has no float attribute ") + name).c_str());
    if (!std::isfinite(value)) refuse(std::string("its attribute ") + name + " is not finite");
    return value;
  }
  float positive(const char* name) const {
    const float value = real(name);
    if (!(value > 0)) refuse(std::string("its attribute ") + name + " is not above 0");
    return value;
  }
  // How a message names the node: by the first tensor that it makes.
  std::string made() const {
    for (size_t i = 0, count = outputs(); i < count; ++i) {
      char place[256] = {};
      size_t size = sizeof place;
      if (abi::Status* status = api.output_name(info, i, place, &size))
        api.release(status);
      else if (*place)
        return place;
    }
    return {};
  }
  size_t outputs() const {
    size_t count = 0;
    check(api, api.output_count(info, &count), "has no outputs");
    return count;
  }
  std::string text(const char* name) const {  // empty where there is none; it serves messages alone
    char place[256] = {};
    size_t size = sizeof place;
    if (abi::Status* status = api.attribute(info, name, place, &size)) {
      api.release(status);
      return {};
    }
    return std::string(place);
  }
  Tensor constant(size_t index, const Reads& reads) const {
    size_t count = 0;
    check(api, api.input_count(info, &count), "has no inputs");
    const abi::Value* value = nullptr;
    int constant = 0;
    if (index >= count) return {};
    if (abi::Status* status = api.constant_input(info, index, &constant, &value)) {
      api.release(status);
      return {};
    }
    return constant ? tensor_of(api, value, reads) : Tensor{};
  }
};

// What a kernel may ask when it runs.
struct Call {
  abi::Api api;
  abi::KernelContext* context;

  // An input that may be left out.
  Tensor optional(size_t index, const Reads& reads) const {
    size_t count = 0;
    check(api, api.input_count(context, &count), "has no inputs");
    const abi::Value* value = nullptr;
    if (index < count) check(api, api.input(context, index, &value), "an input is missing");
    return tensor_of(api, value, reads);
  }
  Tensor input(size_t index, const Reads& reads) const {
    Tensor found = optional(index, reads);
    if (!found) refuse(std::string("its input ") + reads.name + " is missing");
    return found;
  }
  void* output(size_t index, const std::vector<int64_t>& shape) const {  // null where nobody reads it
    abi::Value* value = nullptr;
    check(api, api.output(context, index, shape.data(), shape.size(), &value), "an output cannot be made");
    void* data = nullptr;
    if (value) check(api, api.data(value, &data), "an output has no data");
    return data;
  }
  Pool pool() const {
    return {const_cast<Call*>(this), [](void* self, size_t total, void (*body)(void*, size_t), void* data) {
              const Call& call = *static_cast<Call*>(self);
              check(call.api, call.api.parallel_for(call.context, body, total, data),
                    "the thread pool refused the work");
            }};
  }
};

constexpr Reads kCodesRead{"codes", abi::kUint8}, kTablesRead{"tables", abi::kUint8};

// The tables of a node [k][256], none where it has none. `first` is the place of the first output that goes through
// one.
inline std::vector<uint8_t> read_tables(const Info& info, size_t input, size_t first) {
  const Tensor given = info.constant(input, kTablesRead);
  const int64_t size = given ? given.size() : 0;
  if (size % 256 || size > 256 * kMaxTables) refuse("has a table of wrong size");
  if (info.outputs() > first + size_t(size / 256))
    refuse("has more outputs than it computes; its tables are to be constants");
  return size == 0 ? std::vector<uint8_t>{} : std::vector<uint8_t>(given.codes(), given.codes() + size);
}

struct Kernel {
  virtual ~Kernel() = default;
  virtual void compute(const Call& call) const = 0;
};

// An operator: inputs of any type (the kernel knows what it reads), outputs of one type, all optional.
struct Operator : abi::CustomOp {
  const char* op_name;
  size_t inputs, required_inputs, outputs;
  int type;
  Kernel* (*make)(const Info&);

  Operator(const char* name, size_t inputs, size_t required, size_t outputs, int type, Kernel* (*make)(const Info&));
};

std::vector<const Operator*> layer_operators();
std::vector<const Operator*> pointwise_operators();
std::vector<const Operator*> softmax_operators();
std::vector<const Operator*> transpose_operators();

Window window_of(const Info& info);

}  // namespace edgeqat
