// Runs an exported file on one image: classify MODEL KERNELS IMAGE
//   MODEL    file of `qat export --target ort-native`
//   KERNELS  the library that this folder's CMakeLists.txt builds
//   IMAGE    raw float32, 3 × H × W, normalised as the file's metadata says
#include <algorithm>
#include <cstdio>
#include <fstream>
#include <iterator>
#include <vector>

#include <onnxruntime_cxx_api.h>

namespace {

std::vector<float> read_image(const char* path, size_t expected) {
  std::ifstream file(path, std::ios::binary);
  std::vector<float> pixels(expected);
  file.read(reinterpret_cast<char*>(pixels.data()), std::streamsize(expected * sizeof(float)));
  if (size_t(file.gcount()) != expected * sizeof(float)) {
    std::fprintf(stderr, "%s: needs %zu float32 values\n", path, expected);
    std::exit(1);
  }
  return pixels;
}

}  // namespace

int main(int count, char** arguments) {
  if (count != 4) {
    std::fprintf(stderr, "usage: %s MODEL KERNELS IMAGE\n", arguments[0]);
    return 2;
  }
  try {
    Ort::Env env(ORT_LOGGING_LEVEL_WARNING, "edgeqat");
    Ort::SessionOptions options;
    options.SetIntraOpNumThreads(1);
    options.RegisterCustomOpsLibrary(arguments[2]);
    Ort::Session session(env, arguments[1], options);

    std::vector<int64_t> shape = session.GetInputTypeInfo(0).GetTensorTypeAndShapeInfo().GetShape();
    shape[0] = 1;
    std::vector<float> image = read_image(arguments[3], size_t(shape[1] * shape[2] * shape[3]));
    const auto memory = Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault);
    Ort::Value input = Ort::Value::CreateTensor<float>(memory, image.data(), image.size(), shape.data(), shape.size());
    const char *inputs[] = {"input"}, *outputs[] = {"logits"};
    auto results = session.Run(Ort::RunOptions{}, inputs, &input, 1, outputs, 1);
    const float* logits = results[0].GetTensorData<float>();
    const size_t classes = results[0].GetTensorTypeAndShapeInfo().GetElementCount();
    const auto best = std::max_element(logits, logits + classes);
    std::printf("class %ld, logit %.6f\n", long(best - logits), double(*best));
  } catch (const Ort::Exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
}
