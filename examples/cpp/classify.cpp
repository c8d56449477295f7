// Prints the label of a photo: classify MODEL IMAGE [KERNELS]
//   MODEL    file of `qat export`, of an ort-… target without -vnni; it says the size, normalisation and labels of its
//   images IMAGE    a JPEG file KERNELS  the library that CMakeLists.txt builds, for a file of target ort-native
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <exception>
#include <string>
#include <vector>

#include "image.hpp"
#include "json.hpp"
#include "runtime.hpp"

namespace {

// The softmax probability of the largest of `logits`.
double probability_of_best(const std::vector<float>& logits, float best) {
  double sum = 0;
  for (const float logit : logits) sum += std::exp(double(logit) - double(best));
  return 1 / sum;
}

void classify(const char* model, const char* path, const char* kernels) {
  const runtime::Session session(model, kernels);
  const std::string metadata = session.metadata("edgeqat");
  if (metadata.empty()) throw std::runtime_error(std::string(model) + ": was not written by `qat export`");
  const json::Value described = json::Reader(metadata).value();
  const json::Value& input = described.at("input");
  const int side = int(input.at("size").number);
  float mean[3];
  float deviation[3];
  for (size_t channel = 0; channel < 3; ++channel) {
    mean[channel] = float(input.at("mean").items.at(channel).number);
    deviation[channel] = float(input.at("std").items.at(channel).number);
  }

  const image::Picture picture = image::resized(image::read_jpeg(path), side);
  const std::vector<float> logits = session.run(image::normalised(picture, mean, deviation), {1, 3, side, side});

  const auto best = std::max_element(logits.begin(), logits.end());
  const std::string& label = input.at("classes").items.at(size_t(best - logits.begin())).text;
  std::printf("%s: %s (%.1f%%)\n", path, label.c_str(), 100 * probability_of_best(logits, *best));
}

}  // namespace

int main(int count, char** arguments) {
  if (count != 3 && count != 4) {
    std::fprintf(stderr, "usage: %s MODEL IMAGE [KERNELS]\n", arguments[0]);
    return 2;
  }
  try {
    classify(arguments[1], arguments[2], count == 4 ? arguments[3] : nullptr);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
}
