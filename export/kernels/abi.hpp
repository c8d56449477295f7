// The part of ONNX Runtime's C interface that this library uses, declared by ourselves: the runtime's wheel ships no
// header.
//
// The interface is a table of function pointers to which every release only appends, so an entry's position is its
// name. `OrtCustomOp` grows the same way; a library says with `version` which prefix of it is filled in. Everything
// here holds from interface version 17 on (ONNX Runtime 1.17), which brought KernelContext_ParallelFor's neighbours
// into their place; an older runtime is refused by `Api::load` with a message, before anything is registered.
#pragma once
#include <cstddef>
#include <cstdint>

namespace edgeqat::abi {

constexpr uint32_t kVersion = 17;

struct Status;  // opaque objects of the runtime
struct KernelInfo;
struct KernelContext;
struct Value;
struct TypeInfo;
struct SessionOptions;
struct OpDomain;

enum ElementType : int { kAny = 0, kFloat = 1, kUint8 = 2, kInt8 = 3, kInt32 = 6 };
enum Characteristic : int { kRequired = 0, kOptional = 1 };
enum ErrorCode : int { kFail = 1, kInvalidArgument = 2 };

struct Base {
  const void* const* (*get_api)(uint32_t version);
  const char* (*version_string)();
};

struct CustomOp {
  uint32_t version;
  void* (*create_kernel)(const CustomOp*, const void* const* api, const KernelInfo*);
  const char* (*name)(const CustomOp*);
  const char* (*execution_provider)(const CustomOp*);
  int (*input_type)(const CustomOp*, size_t);
  size_t (*input_count)(const CustomOp*);
  int (*output_type)(const CustomOp*, size_t);
  size_t (*output_count)(const CustomOp*);
  void (*compute)(void*, KernelContext*);
  void (*destroy)(void*);
  int (*input_characteristic)(const CustomOp*, size_t);
  int (*output_characteristic)(const CustomOp*, size_t);
  int (*input_memory_type)(const CustomOp*, size_t);
  int (*variadic_input_arity)(const CustomOp*);
  int (*variadic_input_homogeneity)(const CustomOp*);
  int (*variadic_output_arity)(const CustomOp*);
  int (*variadic_output_homogeneity)(const CustomOp*);
  Status* (*create_kernel_v2)(const CustomOp*, const void* const* api, const KernelInfo*, void** kernel);
  Status* (*compute_v2)(void*, KernelContext*);
  Status* (*infer_shapes)(const CustomOp*, void*);
  int (*start_version)(const CustomOp*);
  int (*end_version)(const CustomOp*);
  void* reserved[4];  // what version 18 appended; a runtime reads it only of a library that says 18
};

// Positions in the table, under the names the runtime gives them.
enum Slot : int {
  kCreateStatus = 0,
  kCreateCustomOpDomain = 26,
  kCustomOpDomainAdd = 27,
  kAddCustomOpDomain = 28,
  kGetTensorMutableData = 51,
  kGetTensorElementType = 60,
  kGetDimensionsCount = 61,
  kGetDimensions = 62,
  kGetTensorTypeAndShape = 65,
  kKernelInfoGetAttributeFloat = 85,
  kKernelInfoGetAttributeInt64 = 86,
  kKernelInfoGetAttributeString = 87,
  kKernelContextGetInputCount = 88,
  kKernelContextGetInput = 90,
  kKernelContextGetOutput = 91,
  kReleaseStatus = 93,
  kReleaseTensorTypeAndShapeInfo = 99,
  kKernelInfoGetInputCount = 230,
  kKernelInfoGetOutputCount = 231,
  kKernelInfoGetOutputName = 233,
  kKernelInfoGetConstantInput = 249,
  kKernelContextParallelFor = 274,
};

// The table, with one typed call per slot.
struct Api {
  const void* const* slots = nullptr;

  static Api load(const Base* base) { return Api{base->get_api(kVersion)}; }

  template <typename Function>
  Function at(Slot slot) const {
    return reinterpret_cast<Function>(const_cast<void*>(slots[slot]));
  }
  Status* status(int code, const char* message) const {
    return at<Status* (*)(int, const char*)>(kCreateStatus)(code, message);
  }
  void release(Status* status) const {
    if (status) at<void (*)(Status*)>(kReleaseStatus)(status);
  }
  Status* create_domain(const char* name, OpDomain** out) const {
    return at<Status* (*)(const char*, OpDomain**)>(kCreateCustomOpDomain)(name, out);
  }
  Status* add_op(OpDomain* domain, const CustomOp* op) const {
    return at<Status* (*)(OpDomain*, const CustomOp*)>(kCustomOpDomainAdd)(domain, op);
  }
  Status* add_domain(SessionOptions* options, OpDomain* domain) const {
    return at<Status* (*)(SessionOptions*, OpDomain*)>(kAddCustomOpDomain)(options, domain);
  }
  Status* data(Value* value, void** out) const {
    return at<Status* (*)(Value*, void**)>(kGetTensorMutableData)(value, out);
  }
  Status* type_info(const Value* value, TypeInfo** out) const {
    return at<Status* (*)(const Value*, TypeInfo**)>(kGetTensorTypeAndShape)(value, out);
  }
  Status* element_type(const TypeInfo* info, int* out) const {
    return at<Status* (*)(const TypeInfo*, int*)>(kGetTensorElementType)(info, out);
  }
  Status* rank(const TypeInfo* info, size_t* out) const {
    return at<Status* (*)(const TypeInfo*, size_t*)>(kGetDimensionsCount)(info, out);
  }
  Status* dimensions(const TypeInfo* info, int64_t* out, size_t rank) const {
    return at<Status* (*)(const TypeInfo*, int64_t*, size_t)>(kGetDimensions)(info, out, rank);
  }
  void release(TypeInfo* info) const { at<void (*)(TypeInfo*)>(kReleaseTensorTypeAndShapeInfo)(info); }
  Status* attribute(const KernelInfo* info, const char* name, float* out) const {
    return at<Status* (*)(const KernelInfo*, const char*, float*)>(kKernelInfoGetAttributeFloat)(info, name, out);
  }
  Status* attribute(const KernelInfo* info, const char* name, int64_t* out) const {
    return at<Status* (*)(const KernelInfo*, const char*, int64_t*)>(kKernelInfoGetAttributeInt64)(info, name, out);
  }
  Status* attribute(const KernelInfo* info, const char* name, char* out, size_t* size) const {
    using Function = Status* (*)(const KernelInfo*, const char*, char*, size_t*);
    return at<Function>(kKernelInfoGetAttributeString)(info, name, out, size);
  }
  Status* constant_input(const KernelInfo* info, size_t index, int* is_constant, const Value** out) const {
    using Function = Status* (*)(const KernelInfo*, size_t, int*, const Value**);
    return at<Function>(kKernelInfoGetConstantInput)(info, index, is_constant, out);
  }
  Status* input_count(const KernelInfo* info, size_t* out) const {
    return at<Status* (*)(const KernelInfo*, size_t*)>(kKernelInfoGetInputCount)(info, out);
  }
  Status* output_count(const KernelInfo* info, size_t* out) const {
    return at<Status* (*)(const KernelInfo*, size_t*)>(kKernelInfoGetOutputCount)(info, out);
  }
  Status* output_name(const KernelInfo* info, size_t index, char* out, size_t* size) const {
    using Function = Status* (*)(const KernelInfo*, size_t, char*, size_t*);
    return at<Function>(kKernelInfoGetOutputName)(info, index, out, size);
  }
  Status* input(const KernelContext* context, size_t index, const Value** out) const {
    return at<Status* (*)(const KernelContext*, size_t, const Value**)>(kKernelContextGetInput)(context, index, out);
  }
  Status* input_count(const KernelContext* context, size_t* out) const {
    return at<Status* (*)(const KernelContext*, size_t*)>(kKernelContextGetInputCount)(context, out);
  }
  Status* output(KernelContext* context, size_t index, const int64_t* shape, size_t rank, Value** out) const {
    using Function = Status* (*)(KernelContext*, size_t, const int64_t*, size_t, Value**);
    return at<Function>(kKernelContextGetOutput)(context, index, shape, rank, out);
  }
  Status* parallel_for(const KernelContext* context, void (*body)(void*, size_t), size_t total, void* data) const {
    using Function = Status* (*)(const KernelContext*, void (*)(void*, size_t), size_t, size_t, void*);
    return at<Function>(kKernelContextParallelFor)(context, body, total, 0, data);
  }
};

}  // namespace edgeqat::abi
