// ONNX Runtime's calls with exceptions for statuses, and the shape that every operator of the library has.
#pragma once
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "abi.hpp"
#include "layer.hpp"

namespace edgeqat {

struct Tensor {
  const void* data = nullptr;
  std::vector<int64_t> shape;

  explicit operator bool() const { return data != nullptr; }
  const uint8_t* codes() const { return static_cast<const uint8_t*>(data); }
  int64_t size() const {
    int64_t product = 1;
    for (const int64_t d : shape) product *= d;
    return product;
  }
};

inline void check(const abi::Api& api, abi::Status* status, const char* what) {
  if (!status) return;
  api.release(status);
  throw std::invalid_argument(what);
}

inline Tensor tensor_of(const abi::Api& api, const abi::Value* value) {
  if (!value) return {};
  Tensor found;
  abi::TypeInfo* info = nullptr;
  check(api, api.type_info(value, &info), "an input is no tensor");
  size_t rank = 0;
  abi::Status* status = api.rank(info, &rank);
  found.shape.resize(rank);
  if (!status) status = api.dimensions(info, found.shape.data(), rank);
  api.release(info);
  check(api, status, "an input has no shape");
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
  float real(const char* name) const {
    float value = 0;
    check(api, api.attribute(info, name, &value), (std::string("has no float attribute ") + name).c_str());
    return value;
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
  Tensor constant(size_t index) const {
    size_t count = 0;
    check(api, api.input_count(info, &count), "has no inputs");
    const abi::Value* value = nullptr;
    int constant = 0;
    if (index >= count) return {};
    if (abi::Status* status = api.constant_input(info, index, &constant, &value)) {
      api.release(status);
      return {};
    }
    return constant ? tensor_of(api, value) : Tensor{};
  }
};

// What a kernel may ask when it runs.
struct Call {
  abi::Api api;
  abi::KernelContext* context;

  Tensor input(size_t index) const {
    size_t count = 0;
    check(api, api.input_count(context, &count), "has no inputs");
    const abi::Value* value = nullptr;
    if (index < count) check(api, api.input(context, index, &value), "an input is missing");
    return tensor_of(api, value);
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
              check(call.api, call.api.parallel_for(call.context, body, total, data), "the thread pool refused the work");
            }};
  }
};

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

  Operator(
      const char* name, size_t inputs, size_t required, size_t outputs, int type, Kernel* (*make)(const Info&));
};

std::vector<const Operator*> layer_operators();
std::vector<const Operator*> pointwise_operators();

Window window_of(const Info& info);

}  // namespace edgeqat
