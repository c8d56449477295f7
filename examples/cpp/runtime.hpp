// The part of ONNX Runtime's C interface that classify.cpp uses, declared by ourselves: no header of the runtime is
// needed, only its library. The interface is a table of functions to which every release only appends, so a position is
// a name (export/kernels/abi.hpp says the same of the kernels' part). With the runtime's own headers at hand,
// onnxruntime_cxx_api.h does all of this.
#pragma once
#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

extern "C" {
struct OrtApiBase {
  const void* const* (*get_api)(uint32_t version);
  const char* (*version_string)();
};
const OrtApiBase* OrtGetApiBase();
}

namespace runtime {

constexpr uint32_t kInterface = 17;  // of ONNX Runtime 1.17

enum Slot : int {
  kGetErrorMessage = 2,
  kCreateEnv = 3,
  kCreateSession = 7,
  kRun = 9,
  kCreateSessionOptions = 10,
  kSetIntraOpNumThreads = 24,
  kRegisterCustomOpsLibrary = 29,
  kSessionGetInputName = 36,
  kSessionGetOutputName = 37,
  kCreateTensorWithData = 49,
  kGetTensorMutableData = 51,
  kGetTensorShapeElementCount = 64,
  kGetTensorTypeAndShape = 65,
  kCreateCpuMemoryInfo = 69,
  kGetAllocatorWithDefaultOptions = 78,
  kReleaseStatus = 93,
  kReleaseMemoryInfo = 94,
  kReleaseValue = 96,
  kReleaseTensorTypeAndShapeInfo = 99,
  kSessionGetModelMetadata = 111,
  kLookupCustomMetadata = 116,
  kReleaseModelMetadata = 118,
};

struct Object;  // every object of the runtime is a pointer to something unknown
constexpr int kFloat = 1;
constexpr int kWarning = 2;  // of the log
constexpr int kArena = 1;
constexpr int kDefaultMemory = 0;

inline const void* const* table() {
  static const void* const* const found = OrtGetApiBase()->get_api(kInterface);
  if (found == nullptr) throw std::runtime_error("ONNX Runtime is older than 1.17");
  return found;
}

inline void release(Slot slot, Object* object) {
  reinterpret_cast<void (*)(Object*)>(const_cast<void*>(table()[slot]))(object);
}

// Calls the function at `slot` and throws what it complains about.
template <typename... Arguments>
void call(Slot slot, Arguments... arguments) {
  const auto function = reinterpret_cast<Object* (*)(Arguments...)>(const_cast<void*>(table()[slot]));
  Object* const status = function(arguments...);
  if (status == nullptr) return;
  const auto message_of =
      reinterpret_cast<const char* (*)(const Object*)>(const_cast<void*>(table()[kGetErrorMessage]));
  const std::string message = message_of(status);
  release(kReleaseStatus, status);
  throw std::runtime_error(message);
}

// A file that is ready to run: one input, and the first output, both float32. It lives until the process ends.
class Session {
 public:
  // kernels: the library of edgeqat's kernels, for an ort-native file; else null
  Session(const char* model, const char* kernels) {
    Object* environment = nullptr;
    Object* options = nullptr;
    call(kCreateEnv, kWarning, "edgeqat", &environment);
    call(kCreateSessionOptions, &options);
    call(kSetIntraOpNumThreads, options, 1);
    if (kernels != nullptr) {
      void* library = nullptr;
      call(kRegisterCustomOpsLibrary, options, kernels, &library);
    }
    call(kCreateSession, static_cast<const Object*>(environment), model, static_cast<const Object*>(options),
         &session_);
    call(kGetAllocatorWithDefaultOptions, &allocator_);
    call(kSessionGetInputName, constant(), size_t(0), allocator_, &input_);
    call(kSessionGetOutputName, constant(), size_t(0), allocator_, &output_);
  }

  // The text under `key` of the file's metadata; empty where there is none.
  std::string metadata(const char* key) const {
    Object* all = nullptr;
    char* text = nullptr;
    call(kSessionGetModelMetadata, constant(), &all);
    call(kLookupCustomMetadata, static_cast<const Object*>(all), allocator_, key, &text);
    release(kReleaseModelMetadata, all);
    return text == nullptr ? std::string() : std::string(text);
  }

  // The first output for `values` of the given shape.
  std::vector<float> run(std::vector<float> values, const std::vector<int64_t>& shape) const {
    Object* memory = nullptr;
    Object* input = nullptr;
    Object* output = nullptr;
    call(kCreateCpuMemoryInfo, kArena, kDefaultMemory, &memory);
    call(kCreateTensorWithData, static_cast<const Object*>(memory), static_cast<void*>(values.data()),
         values.size() * sizeof(float), shape.data(), shape.size(), kFloat, &input);
    const Object* const inputs[] = {input};
    const char* const input_names[] = {input_};
    const char* const output_names[] = {output_};
    const Object* const no_options = nullptr;
    call(kRun, session_, no_options, &input_names[0], &inputs[0], size_t(1), &output_names[0], size_t(1), &output);

    Object* type_and_shape = nullptr;
    size_t count = 0;
    float* data = nullptr;
    call(kGetTensorTypeAndShape, static_cast<const Object*>(output), &type_and_shape);
    call(kGetTensorShapeElementCount, static_cast<const Object*>(type_and_shape), &count);
    call(kGetTensorMutableData, output, reinterpret_cast<void**>(&data));
    const std::vector<float> found(data, data + count);
    release(kReleaseTensorTypeAndShapeInfo, type_and_shape);
    release(kReleaseValue, output);
    release(kReleaseValue, input);
    release(kReleaseMemoryInfo, memory);
    return found;
  }

 private:
  const Object* constant() const { return session_; }

  Object* session_ = nullptr;
  Object* allocator_ = nullptr;
  char* input_ = nullptr;
  char* output_ = nullptr;
};

}  // namespace runtime
