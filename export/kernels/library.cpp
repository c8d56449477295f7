// The library's one entry: ONNX Runtime calls RegisterCustomOps when a session names the library.
#include <cstdlib>
#include <memory>

#include "runtime.hpp"

namespace edgeqat {
namespace {

// A kernel with the interface it was made with, and how messages name it.
struct Instance {
  abi::Api api;
  std::unique_ptr<Kernel> kernel;
  std::string name;
};

const Operator& self(const abi::CustomOp* op) { return *static_cast<const Operator*>(op); }

abi::Status* failed(const abi::Api& api, const char* op, const char* what) {
  return api.status(abi::kInvalidArgument, (std::string("edgeqat.") + op + ": " + what).c_str());
}

abi::Status* create(const abi::CustomOp* op, const void* const* slots, const abi::KernelInfo* info, void** kernel) {
  const abi::Api api{slots};
  try {
    const Info asked{api, info};
    *kernel = new Instance{api, std::unique_ptr<Kernel>(self(op).make(asked)), "node of " + asked.made()};
    return nullptr;
  } catch (const std::exception& error) {
    return failed(api, self(op).op_name, error.what());
  }
}

abi::Status* compute(void* kernel, abi::KernelContext* context) {
  const auto& instance = *static_cast<Instance*>(kernel);
  try {
    instance.kernel->compute(Call{instance.api, context});
    return nullptr;
  } catch (const std::exception& error) {
    return failed(instance.api, instance.name.c_str(), error.what());
  }
}

void destroy(void* kernel) { delete static_cast<Instance*>(kernel); }

}  // namespace

Operator::Operator(const char* name, size_t inputs, size_t required, size_t outputs, int type,
                   Kernel* (*make)(const Info&))
    : abi::CustomOp{},
      op_name(name),
      inputs(inputs),
      required_inputs(required),
      outputs(outputs),
      type(type),
      make(make) {
  version = abi::kVersion;
  create_kernel = [](const CustomOp*, const void* const*, const abi::KernelInfo*) -> void* { return nullptr; };
  this->name = [](const CustomOp* op) { return self(op).op_name; };
  execution_provider = [](const CustomOp*) -> const char* { return "CPUExecutionProvider"; };
  input_type = [](const CustomOp*, size_t) -> int { return abi::kAny; };
  input_count = [](const CustomOp* op) { return self(op).inputs; };
  output_type = [](const CustomOp* op, size_t) { return self(op).type; };
  output_count = [](const CustomOp* op) { return self(op).outputs; };
  abi::CustomOp::compute = [](void*, abi::KernelContext*) {};
  abi::CustomOp::destroy = edgeqat::destroy;
  input_characteristic = [](const CustomOp* op, size_t i) -> int {
    return i < self(op).required_inputs ? abi::kRequired : abi::kOptional;
  };
  output_characteristic = [](const CustomOp*, size_t) -> int { return abi::kOptional; };
  input_memory_type = [](const CustomOp*, size_t) { return 0; };
  variadic_input_arity = variadic_output_arity = [](const CustomOp*) { return 1; };
  variadic_input_homogeneity = variadic_output_homogeneity = [](const CustomOp*) { return 0; };
  create_kernel_v2 = create;
  compute_v2 = edgeqat::compute;
  infer_shapes = nullptr;
  start_version = [](const CustomOp*) { return 1; };
  end_version = [](const CustomOp*) { return 1 << 30; };
}

constexpr int64_t kMostWindow = 4096;

Window window_of(const Info& info) {
  Window w;
  const char* axes[2] = {"_h", "_w"};
  for (int axis = 0; axis < 2; ++axis) {
    w.kernel[axis] = info.integer((std::string("kernel") + axes[axis]).c_str(), 1, kMostWindow);
    w.stride[axis] = info.integer((std::string("stride") + axes[axis]).c_str(), 1, kMostWindow);
    w.dilation[axis] = info.integer((std::string("dilation") + axes[axis]).c_str(), 1, kMostWindow);
  }
  const char* sides[4] = {"pad_top", "pad_left", "pad_bottom", "pad_right"};
  for (int side = 0; side < 4; ++side) w.pads[side] = info.integer(sides[side], 0, kMostWindow);
  return w;
}

}  // namespace edgeqat

#define EDGEQAT_EXPORT extern "C" __attribute__((visibility("default")))

EDGEQAT_EXPORT edgeqat::abi::Status* RegisterCustomOps(edgeqat::abi::SessionOptions* options,
                                                       const edgeqat::abi::Base* base) {
  using namespace edgeqat;
  const abi::Api api = abi::Api::load(base);
  if (!api.slots) {
    // Slot 0 has been CreateStatus since the first release, so the oldest interface can carry the refusal.
    const abi::Api oldest{base->get_api(1)};
    const std::string message = std::string("edgeqat's kernels need ONNX Runtime 1.17 or newer, this is ") +
                                base->version_string() + "; ort-packed is the same model without kernels of its own";
    return oldest.slots ? oldest.status(abi::kFail, message.c_str()) : nullptr;
  }
  try {
    chosen_isa();
  } catch (const std::exception& error) {
    return api.status(abi::kFail, error.what());
  }
  abi::OpDomain* domain = nullptr;  // lives as long as the process, like the operators it names
  if (abi::Status* status = api.create_domain("edgeqat", &domain)) return status;
  for (const auto& group : {layer_operators(), pointwise_operators(), softmax_operators(), transpose_operators()})
    for (const Operator* op : group)
      if (abi::Status* status = api.add_op(domain, op)) return status;
  return api.add_domain(options, domain);
}

EDGEQAT_EXPORT const char* edgeqat_isa() {
  try {
    return edgeqat::chosen_isa().name;
  } catch (const std::exception&) {
    return "";
  }
}
